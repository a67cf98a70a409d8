"""Which field was meant by a name that no field has."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.core.component import Settings
from potstill.recipe.header import Header
from potstill.recipe.places import place_of
from potstill.recipe.spots import Loc, Named, at, nested, of_other_kinds, spot
from potstill.stages.base import Stage

# Ours -> what TRL, transformers, axolotl, LLaMA-Factory and papers call it.
ELSEWHERE = {
    "lr": "learning_rate peak_lr max_lr base_lr step_size eta",
    "epochs": "epoch num_epochs n_epochs num_train_epochs max_epochs passes",
    "steps": "step max_steps num_steps n_steps total_steps train_steps num_train_steps max_iters iterations iters",
    "batch_size": "batch bs per_device_train_batch_size per_device_batch_size train_batch_size global_batch_size "
    "effective_batch_size total_batch_size",
    "micro_batch_tokens": "micro_batch_size micro_batch microbatch gradient_accumulation_steps grad_accum "
    "gradient_accumulation accumulate_grad_batches max_tokens_per_batch",
    "weight_decay": "wd decay l2",
    "betas": "adam_betas adam_beta1 adam_beta2 beta1 beta2",
    "clip": "max_grad_norm grad_clip gradient_clipping grad_norm_clip clip_grad_norm max_norm clip_norm",
    "schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style",
    "warmup": "warmup_ratio warmup_steps num_warmup_steps lr_warmup",
    "precision": "bf16 fp16 dtype torch_dtype mixed_precision amp compute_dtype",
    "optim": "optimizer optimiser training training_args trainer",
    "prompts.max_tokens": "max_length max_len max_seq_length max_seq_len seq_len seq_length sequence_len sequence_length "
    "cutoff_len block_size context_length model_max_length",
    "prompts.max_prompt_tokens": "max_prompt_length max_prompt_len max_source_length",
    "max_new_tokens": "max_completion_length max_target_length max_gen_length max_tokens_to_generate generation_max_length",
    "prompts.system": "system_prompt system_message default_system",
    "prompts.format": "chat_template template prompt_template prompt_format prompt_style",
    "prompts": "prompt",
    "adapter": "lora peft peft_config lora_config qlora",
    "adapter.r": "lora_r lora_rank lora_dim rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target_modules lora_target lora_targets",
    "key_env": "api_key key token api_token",
    "model": "model_name_or_path model_name base_model model_id pretrained pretrained_model",
    "student": "student_model student_model_name_or_path model_name_or_path model_name base_model model_id model",
    "teacher": "teacher_model teacher_model_name_or_path teacher_name teacher_model_name",
    "teacher_precision": "load_in_8bit load_in_4bit teacher_dtype teacher_torch_dtype int8_teacher",
    "ratio": "alpha lmbda lambda lambda_ kd_ratio kd_weight kd_alpha distill_weight distillation_weight alpha_kd mix",
    "temperature": "temp tau t kd_temperature distill_temperature distillation_temperature softmax_temperature",
    "divergence": "loss loss_type kd_loss distill_loss kd_objective criterion",
    "top_k": "topk k num_logits",
    "signal": "cache_signal targets logits",
    "data": "dataset datasets dataset_name train_file train_data data_files data_path train_dataset",
    "data.limit": "max_samples num_samples n_samples max_train_samples max_rows num_rows subset",
    "data.splits": "split_ratio",
    "data.splits.test": "test_size test_split test_share",
    "data.splits.validation": "val_size val_set_size validation_split eval_split val_split",
    "validation": "eval evaluation eval_strategy evaluation_strategy",
    "validation.times": "eval_steps eval_every eval_interval val_check_interval evals",
    "validation.rows": "eval_samples max_eval_samples eval_rows",
    "decoding.method": "do_sample sampling",
    "decoding": "generation generation_config generation_kwargs",
    "metrics": "metric eval_metrics",
    "primary": "primary_metric metric_for_best_model main_metric",
    "study": "models rows_of_study evaluation source",
    "formats": "format exporters quantization_method",
    "group": "group_size groupsize q_group_size",
    "damping": "damp_percent percdamp damp",
    "rows": "nsamples num_calibration_samples calibration_rows n_samples",
    "method": "quant_method algorithm",
    "layers": "num_hidden_layers num_layers n_layers n_layer depth",
    "heads": "num_attention_heads n_heads n_head num_heads",
    "kv_heads": "num_key_value_heads num_kv_heads n_kv_heads",
    "hidden_size": "width d_model dim n_embd embed_dim",
    "intermediate_size": "ffn_dim d_ff n_inner mlp_dim",
    "positions": "max_position_embeddings n_positions n_ctx",
    "keep": "keep_layers layers layer_indices",
    "seed": "random_seed data_seed random_state",
    "per_seed": "each_seed every_seed",
    "name": "id stage_name title",
    "kind": "type stage_type",
    "path": "file filename data_file folder",
    "instruction": "prompt_column question_column input_column",
    "response": "answer_column completion_column output_column",
    "messages": "conversations conversation chat_column messages_column",
    "delimiter": "sep separator",
    "hub": "repo_id repo dataset dataset_name dataset_id",
    "subset": "config config_name configuration dataset_config_name",
    # of the recipe itself
    "seeds": "seed random_seed random_seeds num_seeds",
    "log": "report_to logging logger wandb tensorboard",
    "checkpoint": "checkpoints checkpointing save_strategy",
    "checkpoint.every_steps": "save_steps save_every checkpoint_every checkpointing_steps",
    "sweep": "grid search hyperparameters",
    "description": "notes comment about",
}
CLOSE = 0.6  # difflib's ratio, for a field of the same table
CLOSER = 0.75  # for one in another table, and for another program's name
MOST = 3  # suggestions in one message


@dataclass(frozen=True)
class Hint:
    """What is said after "no such field", and the fields (as places in the same stage) that may have been meant."""

    text: str = ""
    meant: tuple[str, ...] = ()


def hint(word: str, inside: Loc, cls: type[Settings], raw: Any, label: str) -> Hint:
    """The field that was meant by a name.

    Args:
        inside: the table where the name stands.
        cls, raw: the stage, or the recipe's header, as a class and as its table.
        label: what messages call the stage; empty for the header.
    """
    owner = spot(cls, raw, inside).annotation
    if not (isinstance(owner, type) and issubclass(owner, Settings)):
        return Hint()
    here = list(nested(owner, at(raw, inside)))
    elsewhere = [named for named in nested(cls, raw) if named.path[: len(inside)] != inside]
    word = _plain(word)
    if not label and not inside and word == "stages":
        return Hint("; did you mean [[stage]]?")
    table = tuple(part for part in inside if isinstance(part, str))
    if found := _exact(word, here) + _aliases(word, here, table):
        return _meant(found, inside, "")
    if label and not inside and word in Header.model_fields:
        return Hint(f"; '{word}' is a field of the recipe: write it above the first [[stage]]")
    if found := _exact(word, elsewhere):
        return _meant(found, (), label)
    if not label and not inside and (place := _of_stages(word)):
        return Hint(f"; '{place}' belongs in a stage: write it below its [[stage]]")
    if found := _exact(word, of_other_kinds(owner, at(raw, inside))):
        component, field = found[0].path
        kinds = ", ".join(f"'{named.kind}'" for named in found if named.path[0] == component)
        meant = (place_of("", (*inside, component)),)
        return Hint(f"; did you mean '{component}.{field}', of {component} with kind = {kinds}?", meant)
    if label and (place := _of_header(word)):
        return Hint(f"; '{place}' is a field of the recipe: write it above the first [[stage]]")
    if found := _aliases(word, elsewhere):
        return _meant(found, (), label)
    return _close(word, inside, here, elsewhere, label)


def _close(word: str, inside: Loc, here: Sequence[Named], elsewhere: Sequence[Named], label: str) -> Hint:
    """The name that is spelt most like the word, one of the same table first; of none, all names of that table."""
    own = [named for named in here if len(named.path) == 1]
    above = [Named((name,)) for name in Header.model_fields] if label and not inside else []
    of_header = _closest(word, above, CLOSER)
    if of_header and _likeness(word, of_header.name) > max((_likeness(word, named.name) for named in here), default=0):
        return Hint(f"; did you mean '{of_header.name}'? It is a field of the recipe: write it above the first [[stage]]")
    if found := _closest(word, own, CLOSE):
        rival = _closest(word, here, CLOSER)
        return _meant([rival if rival and _likeness(word, rival.name) > _likeness(word, found.name) else found], inside, "")
    if found := _closest(word, here, CLOSER):
        return _meant([found], inside, "")
    alias = difflib.get_close_matches(word, [other for names in ELSEWHERE.values() for other in names.split()], 1, CLOSER)
    table = tuple(part for part in inside if isinstance(part, str))
    if alias and (several := _aliases(alias[0], here, table)):
        return _meant(several, inside, "")
    if found := _closest(word, elsewhere, CLOSER):
        return _meant([found], (), label)
    if of_header:
        return Hint(f"; did you mean '{of_header.name}'? It is a field of the recipe: write it above the first [[stage]]")
    if not label and not inside and (place := _of_stages(word, CLOSER)):
        return Hint(f"; did you mean '{place}'? It belongs in a stage: write it below its [[stage]]")
    return Hint(f" (known: {', '.join(sorted(named.name for named in own))})")


def _meant(found: Sequence[Named], inside: Loc, label: str) -> Hint:
    """Fields named from the table where the mistake stands; from the stage's name on where they are outside of it."""
    shortest = sorted(dict.fromkeys(found), key=lambda named: len(named.path))[:MOST]
    shown = " or ".join(f"'{place_of(label, named.path)}'" for named in shortest)
    return Hint(f"; did you mean {shown}?", tuple(place_of("", (*inside, *named.path)) for named in shortest))


def _exact(word: str, among: Iterator[Named] | Sequence[Named]) -> list[Named]:
    return [named for named in among if _plain(named.name) == word]


def _aliases(word: str, among: Sequence[Named], table: tuple[str, ...] = ()) -> list[Named]:
    """Fields that other programs call so; `table`: where the fields' paths begin."""
    ours = [tuple(place.split(".")) for place, names in ELSEWHERE.items() if word in names.split()]
    return [named for place in ours for named in among if (*table, *named.path)[-len(place) :] == place]


def _closest(word: str, among: Sequence[Named], cutoff: float) -> Named | None:
    close = difflib.get_close_matches(word, [named.name for named in among], 1, cutoff)
    return next((named for named in among if close and named.name == close[0]), None)


def _likeness(word: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, word).ratio()


def _of_stages(word: str, cutoff: float | None = None) -> str | None:
    """The place that a name, or one like it, has in some kind of stage."""
    if word == "kind":
        return word
    fields = [named for cls in Stage.kinds.values() for named in nested(cls, {})]
    found = _exact(word, fields) or _aliases(word, fields)
    if not found and cutoff is not None and (close := _closest(word, fields, cutoff)):
        found = [close]
    return place_of("", min(found, key=lambda named: len(named.path)).path) if found else None


def _of_header(word: str) -> str | None:
    fields = [named for named in nested(Header, {}) if named.path[0] not in ("name", "description", "data", "prompts")]
    found = _exact(word, fields) or _aliases(word, fields)
    return place_of("", found[0].path) if found else None


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")
