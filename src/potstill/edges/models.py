"""Language models as the Hub stores them: loading, saving, sizes."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.core.errors import UserError
from potstill.edges.hub import commit_of, folder_of, hub_errors, hub_name, library, refuse_remote_code
from potstill.edges.known import KNOWN
from potstill.edges.vocabulary import Model, Tokenizer, check_rows, check_vocabulary, load_tokenizer, shared_vocabulary
from potstill.edges.weights import PACKED, bytes_of, content_id, header_of, weight_files

ARCHITECTURES = ("qwen2", "llama", "gpt2")

__all__ = [  # what lies in the rooms beside is still asked for here
    "PACKED",
    "Model",
    "Tokenizer",
    "bytes_of",
    "check_rows",
    "check_vocabulary",
    "content_id",
    "load_tokenizer",
    "shared_vocabulary",
    "weight_files",
]


def device() -> Any:
    """The accelerator when there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config_of(where: str, offline_shape: bool = False) -> Any:
    """The transformers config of `path:…` or `hf:…`; with `offline_shape` the shipped table is asked before the hub."""
    transformers = library()
    folder = folder_of(where)
    if folder is not None:
        try:
            config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        except (ValueError, OSError) as error:
            refuse_remote_code(where, error)
            raise UserError(f"{where}: config.json cannot be read ({str(error).splitlines()[0][:160]})") from error
    else:
        name, revision = hub_name(where)
        if offline_shape and name in KNOWN:
            shape = dict(KNOWN[name])
            return transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
        with hub_errors(name):
            commit = commit_of(name, revision)
            config = transformers.AutoConfig.from_pretrained(name, revision=commit, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"{where}: model type '{config.model_type}' is not supported (known: {', '.join(ARCHITECTURES)})")
    return config


def load_model(where: str, dtype: Any = None) -> Model:
    """The causal language model of `path:…` or `hf:…`, in float32 unless told, on `device()`, in evaluation mode.

    Raises:
        UserError: no such folder, no safetensors, truncated weights, weights that do not fit the config, hub out of reach.
    """
    import torch

    transformers = library()
    config = config_of(where)
    folder = folder_of(where)
    options = {
        "dtype": dtype or torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that we can name them
    }
    if folder is None:
        name, revision = hub_name(where)
        with hub_errors(name):
            options["revision"] = commit_of(name, revision)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, **options)
    else:
        weight_files(folder)
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(str(folder), config=config, **options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{where}: the weights do not fit config.json ({str(error).splitlines()[0][:160]})") from error
    for name, stored, expected in sorted(info["mismatched_keys"]):
        shapes = f"'{name}' is {tuple(stored)}, config.json asks for {tuple(expected)}"
        raise UserError(f"{where}: the weights do not fit config.json: {shapes}; take both from one model")
    missing = sorted(info["missing_keys"])
    if missing:
        lost = "1 weight is missing:" if len(missing) == 1 else f"{len(missing)} weights are missing, the first is"
        raise UserError(f"{where}: {lost} '{missing[0]}'; the folder is not complete")
    return model.to(device()).eval()


def softcap_in(config: Any) -> float | None:
    """The bound of a model's logits, c·tanh(logits / c), where its architecture has one."""
    return getattr(config, "final_logit_softcapping", None) if getattr(config, "model_type", "").startswith("gemma") else None


def load_head(where: str, dtype: Any = None) -> tuple[Any, float | None]:
    """A model's output layer alone, frozen, on `device()`, and the softcap of its logits; the body is not kept in memory.

    Raises:
        UserError: as `load_model`.
    """
    import torch
    from safetensors import safe_open

    config, folder = config_of(where), folder_of(where)
    softcap = softcap_in(config)
    with torch.device("meta"):
        model = library().AutoModelForCausalLM.from_config(config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = config.tie_word_embeddings
    owner = embedding if tied else head
    (name,) = (name for name, module in model.named_modules() if module is owner)
    files = weight_files(folder) if folder is not None and head.bias is None else []
    holding = [file for file in files if f"{name}.weight" in header_of(file)]
    if holding:
        with safe_open(str(holding[0]), framework="pt") as tensors:
            weight = tensors.get_tensor(f"{name}.weight")
        if tuple(weight.shape) == tuple(head.weight.shape):
            alone = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            alone.weight = torch.nn.Parameter(weight.to(device(), dtype or torch.float32), requires_grad=False)
            return alone, softcap
    whole = load_model(where, dtype).get_output_embeddings()  # from the hub, or saved under other names
    return whole.requires_grad_(False), softcap


def with_weights(model: Model, config: Any, weights: dict[str, Any]) -> Model:
    """A model of the same class and of another config, holding these weights; nothing is shared with the first."""
    import torch

    with torch.device("meta"):
        made = type(model)(config)
    made.load_state_dict(weights, strict=False, assign=True)
    made.tie_weights()
    for name, _ in list(made.named_buffers()):  # rotary frequencies, which no state holds
        owner, _, last = name.rpartition(".")
        made.get_submodule(owner).register_buffer(last, model.get_buffer(name).clone(), persistent=False)
    left = [name for name, tensor in [*made.named_parameters(), *made.named_buffers()] if tensor.is_meta]
    assert not left, f"no weights for {left}"
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)


def save_model(model: Model, tokenizer: Tokenizer, folder: Path, stop_ids: list[int] | None = None) -> None:
    """As any Hub model is saved: config, safetensors, tokenizer with its chat template.

    With `stop_ids` plain transformers' `generate` stops where the model was trained to, and is greedy: what a checkpoint
    brought along (sampling, a repetition penalty, another end) was not what it was measured with.
    """
    transformers = library()
    if stop_ids is not None:
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, do_sample=False
        )
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))


def blocks_of(model: Model) -> list[Any]:
    """The decoder layers, in order.

    Raises:
        UserError: their place in the model is unknown.
    """
    base = model.base_model
    blocks = getattr(base, "layers", None) or getattr(base, "h", None)
    if blocks is None:
        raise UserError(f"the blocks of a {type(model).__name__} are unknown; use a Qwen2, Llama or GPT-2 model")
    return list(blocks)


def linears_in(module: Any) -> dict[str, Any]:
    """Linear layers by name: torch's, and GPT-2's, whose weight is stored [in, out]."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {name: inner for name, inner in module.named_modules() if isinstance(inner, nn.Linear | Conv1D)}


@dataclass(frozen=True)
class Size:
    """Parameters of a model, by what they cost.

    Attributes:
        body: in the transformer's layers; each token passes through all of them.
        embedding: in the token embedding (and learned positions).
        head: in the output head, 0 when it shares the embedding's matrix.
        hidden: width of the final hidden state.
        vocab: rows of the output head.
    """

    body: int
    embedding: int
    head: int
    hidden: int
    vocab: int

    @property
    def parameters(self) -> int:
        return self.body + self.embedding + self.head


def size_of(config: Any) -> Size:
    """Count a model's parameters from its config, without allocating them."""
    import torch

    with torch.device("meta"):
        model = library().AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tied = head is embedding or config.tie_word_embeddings
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    if tied and head is not embedding:
        total -= head.numel()
    head_count = 0 if tied else head.numel()
    positions = sum(p.numel() for name, p in model.named_parameters() if name.endswith("wpe.weight"))
    in_embedding = embedding.numel() + positions
    return Size(total - in_embedding - head_count, in_embedding, head_count, head.shape[1], head.shape[0])
