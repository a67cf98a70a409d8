"""Whether a model can be read exactly: asked of a small random copy of it, because names of models tell nothing."""

import copy
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from potstill.core.errors import UserError
from potstill.edges.experts import CHOSEN, COUNTS, is_mixture, layers_with_experts, names_experts
from potstill.edges.families import logits_of
from potstill.edges.hub import library
from potstill.edges.models import cut_layers, head_width, per_layer, positions_of, ropes_of, skeleton

Way = Literal["packed", "batched"]
Read = Callable[..., Any]  # (model, ids_T, lengths, *, packed, shared) -> final hidden states [T, D]

LENGTHS = (3, 9, 9, 14)  # tokens of the rows that are read
BEGINNING = 5  # tokens that all rows but the first begin with: more than the window
WINDOW = 4  # of the copy, so that rows cross it
# numbers of tokens from which on a network computes otherwise, by the ends of their names -> in the copy
THRESHOLDS = {
    r"(window|window_size|window_len|chunk_size|block_size|index_topk)$": WINDOW,
    r"topk_blocks$": 2,
    r"(floor_scale|n_floor)$": WINDOW,
}
ENTRIES = 64  # of its vocabulary
ALLOWED = 2e-6  # of a difference, in units of the largest value: norms and softmaxes of many models round to float32
ALLOWED_FLOAT32 = 1e-4  # where the copy is in float32
MOST_PARAMETERS = 30_000_000  # of a copy
_KNOWN: dict[tuple[str, Read], Way] = {}  # of this process


def way_of(config: Any, read: Read) -> Way:
    """How rows of different lengths go through a model: end to end, or those of one length as a batch.

    A copy of few layers and little width, its windows so small that rows cross them, reads rows in a pack, also where what
    they begin with lies once, as batches of equal lengths, and one at a time, in float64, forward and backward. It answers
    from its cache, and beside a longer row, as it reads; and its logits are what `logits_of` makes of its head's products.

    Args:
        read: reads rows that lie end to end, by either way.

    Raises:
        UserError: the copy cannot be built, or differs; with the figure.
    """
    key = json.dumps(_telling(config), sort_keys=True, default=str)
    if (key, read) not in _KNOWN:
        _KNOWN[key, read] = _way_of(config, read)
    return _KNOWN[key, read]


def _telling(config: Any) -> dict[str, Any]:
    """What of a config says how it computes."""
    silent = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "id2label"}
    return {"model_type": config.model_type} | {k: v for k, v in config.to_dict().items() if k not in silent}


def _way_of(config: Any, read: Read) -> Way:
    import torch

    what = f"a model of type '{config.model_type}'"
    for field in ("vision_config", "audio_config", "text_config"):
        if isinstance(getattr(config, field, None), dict) or hasattr(getattr(config, field, None), "to_dict"):
            raise UserError(f"{what} reads more than text ({field}); take its text model alone")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{what} has an encoder; choose a decoder")
    with _undisturbed():
        torch.manual_seed(0)
        try:
            small = _copy(config, what)
            if names_experts(config) and not is_mixture(small) and is_mixture(skeleton(config)):
                raise UserError(f"{what}: no small copy of it has experts, so nothing is known of them; choose another model")
            return _asked(small, what, read)
        except UserError:
            raise
        except Exception as error:  # in the words of any network
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
            raise UserError(f"{what}: a small copy of it cannot be asked how it reads ({why}); choose another model") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither the caller's modes (inference, autocast, device) nor its random state have a part in what is inside."""
    import torch

    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _asked(model: Any, what: str, read: Read) -> Way:
    import torch

    _perturb(model)
    most = positions_of(model.config) or max(LENGTHS)
    rows = [torch.randint(4, ENTRIES, (min(length, most),)) for length in LENGTHS]
    for row in rows[2:]:
        row[:BEGINNING] = rows[1][:BEGINNING]
    alone = _Seen(model, _one_at_a_time(model, rows))
    _check_logits(model, rows[-1], what)
    found: dict[str, str] = {}
    for way in ("packed", "batched"):
        try:
            gap = max(alone.gap(hidden) for hidden in _together(read, model, rows, way))
        except UserError as error:
            found[way] = str(error)
            continue
        if gap <= ALLOWED:
            _check_answers(_in_float32(model), rows, what)  # padding is masked by float32's least number
            return way
        found[way] = f"differs by {gap:.1e}"
    raise UserError(
        f"{what} cannot be read exactly: rows end to end {found['packed']}, rows of one length as a batch {found['batched']}, "
        f"where a copy of it reads them one at a time ({ALLOWED:g} is rounding); choose another model"
    )


def _copy(config: Any, what: str) -> Any:
    """Two layers or a few more, with new weights in float64, as small as its config lets it be."""
    import torch

    few = cut_layers(config, _telling_layers(config))
    problem: Exception | None = None
    for small in (_small(few), _small(few, width=False)):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in library().AutoModelForCausalLM.from_config(small).parameters())
            if size > MOST_PARAMETERS:
                continue
            model = library().AutoModelForCausalLM.from_config(small).double().eval()
            if names_experts(small):
                model.set_experts_implementation("eager")  # torch has no grouped products in float64
            return model
        except Exception as error:  # a config that does not go with these sizes, in the words of any library
            problem = error
    why = (
        f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
        if problem is not None and str(problem)
        else "too large"
    )
    raise UserError(f"{what}: no small copy of it could be made to check how it reads ({why}); choose another model")


def _in_float32(model: Any) -> Any:
    """A copy as models are used, its experts multiplied in groups."""
    model = copy.deepcopy(model).float()
    if names_experts(model.config):
        model.config._experts_implementation = None
        model.set_experts_implementation(model.get_correct_experts_implementation(None))
    return model


def _telling_layers(config: Any) -> list[int]:
    """Two layers at least, and one of every kind that the config tells apart."""
    count = config.num_hidden_layers
    lists = [values for _, values in per_layer(config, count)]
    if len(set(layers_with_experts(config))) > 1:
        lists.append(layers_with_experts(config))
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(str([values[layer] for values in lists]), layer)
    repeats = [
        value
        for name, value in vars(config).items()
        if re.search(r"(period|interval|_step|pattern|_freq|_replace)$", name) and isinstance(value, int) and 1 < value < 16
    ]
    least = max(2, *(value + 1 for value in repeats)) if repeats and not lists else 2
    found = set(kinds.values())
    for layer in range(count):
        if len(found) >= least:
            break
        found.add(layer)
    return sorted(found)


def _small(config: Any, *, width: bool = True) -> Any:
    """A config of the same kind with small numbers."""
    small = copy.deepcopy(config)

    def lower(name: str, value: int) -> None:
        had = getattr(small, name, None)
        if isinstance(had, int | float) and not isinstance(had, bool) and had > value:
            setattr(small, name, value)

    small.vocab_size = ENTRIES
    if (getattr(small, "max_position_embeddings", None) or ENTRIES) < ENTRIES:
        small.max_position_embeddings = ENTRIES
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 1)
    for name in vars(config):
        for pattern, most in THRESHOLDS.items():
            if re.search(pattern, name):
                lower(name, most)
    for rope in ropes_of(small):
        if "llama_4_scaling_beta" in rope:  # queries grow from this position on
            rope["original_max_position_embeddings"] = WINDOW
    _fewer_experts(lower)
    for name in vars(small):
        if name.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(getattr(small, name), float):
            setattr(small, name, 0.0)
    if not width or getattr(config, "num_attention_heads", None) is None:
        return small
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not isinstance(heads, int) or not isinstance(groups, int):
        return small
    kept = min(groups, 2)
    small.num_attention_heads = kept * min(heads // groups, 2)
    if getattr(config, "num_key_value_heads", None) is not None:
        small.num_key_value_heads = kept
    small.hidden_size = small.num_attention_heads * head_width(config)
    for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"):
        lower(name, 2 * small.hidden_size)
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"):
        lower(name, 32)
    for name in ("q_lora_rank", "kv_lora_rank"):
        lower(name, 32)
    for name in ("linear_num_value_heads", "linear_num_key_heads"):
        lower(name, 2)
    return small


def _fewer_experts(lower: Callable[[str, int], None]) -> None:
    """Four experts at most, two for a token; in two groups of two where they stand in groups.

    Many routers round to float32. Rounding changes a choice only where two scores agree to seven digits, which the copy's
    random weights do not do; more experts would bring such pairs closer.
    """
    for names, most in ((COUNTS, 4), (CHOSEN, 2), (("n_group", "num_expert_group"), 2), (("topk_group",), 1)):
        for name in names:
            lower(name, most)


def _perturb(model: Any) -> None:
    """Give norms and biases values of their own: at their usual ones and zeros mistakes would cancel out."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


class _Seen:
    """Hidden states of rows one at a time, and the gradients of a sum of them."""

    def __init__(self, model: Any, hidden: Any) -> None:
        self.model = model
        self.states, self.gradients = self._both(hidden)

    def _both(self, hidden: Any) -> tuple[Any, list[Any]]:
        import torch

        weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad((hidden * weights).sum(), parameters, allow_unused=True)
        return hidden.detach(), [g if g is not None else torch.zeros(()) for g in gradients]

    def gap(self, hidden: Any) -> float:
        hidden, gradients = self._both(hidden)
        slope = max(float(g.abs().max()) for g in self.gradients)  # of all: some are nothing but rounding
        gaps = [_difference(a, b, slope) for a, b in zip(gradients, self.gradients, strict=True)]
        return max(_difference(hidden, self.states), *gaps)


def _difference(a: Any, b: Any, unit: float | None = None) -> float:
    """The largest of two tensors, in units of the second one's largest value; infinite where it is not a number."""
    if a.shape != b.shape:
        return float("inf")
    gap = float((a - b).abs().max()) / max(float(b.abs().max()) if unit is None else unit, 1e-300)
    return gap if gap == gap else float("inf")


def _one_at_a_time(model: Any, rows: Sequence[Any]) -> Any:
    import torch

    return torch.cat([model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows])


def _together(read: Read, model: Any, rows: Sequence[Any], way: str) -> list[Any]:
    """Hidden states by one of our ways; a model that dies of it in its own words is one that it does not fit."""
    import torch

    ids_F, lengths = torch.cat(list(rows)), [len(row) for row in rows]
    try:
        if way == "batched":  # which reads each row whole, whatever rows share
            return [read(model, ids_F, lengths, packed=False)]
        shared = _beginning_once(rows)
        once = read(model, shared.keep(ids_F), lengths, packed=True, shared=shared)
        return [read(model, ids_F, lengths, packed=True), shared.spread(once)]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"fail ({type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''})") from error


def _beginning_once(rows: Sequence[Any]) -> Any:
    """What all rows but the first begin with lies once."""
    import torch

    from potstill.edges.attention import Shared

    begins = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
    first_F, shared = torch.arange(begins[-1]), min(BEGINNING, len(rows[1]))
    for begin in begins[2:-1]:
        first_F[begin : begin + shared] = first_F[begins[1] : begins[1] + shared]
    return Shared.of(first_F)


def _check_logits(model: Any, row: Any, what: str) -> None:
    """Refuse a network that does with its head's products what nobody has said."""
    import torch

    with torch.no_grad():
        states = model.base_model(input_ids=row[None], use_cache=False).last_hidden_state
        theirs = model(input_ids=row[None], use_cache=False).logits
        gap = _difference(logits_of(model.config)(model.get_output_embeddings()(states)), theirs)
    if gap > ALLOWED:
        raise UserError(
            f"{what} makes its logits in a way that is unknown here (they differ by {gap:.1e}); choose another model"
        )


def _check_answers(model: Any, rows: Sequence[Any], what: str) -> None:
    """Refuse a model that answers otherwise than it reads: from its cache, beside a longer prompt, or both."""
    import torch

    both = [rows[1], rows[-1]]
    with torch.no_grad():
        alone = torch.stack([model(input_ids=row[None], use_cache=False).logits[0, -1] for row in both])
        for how, asked, wanted, steps in (
            ("from its cache", both[1:], alone[1:], 2),
            ("beside a longer prompt", both, alone, 0),
            ("from its cache beside a longer prompt", both, alone, 2),
        ):
            gap = _difference(_answered(model, asked, steps), wanted)
            if gap > ALLOWED_FLOAT32:
                raise UserError(
                    f"{what} answers otherwise {how} than it reads (logits differ by {gap:.1e}); choose another model"
                )


def _answered(model: Any, rows: Sequence[Any], steps: int) -> Any:
    """Logits [B, V] after rows that are padded on the left, so many last tokens of them read one by one from the cache."""
    import torch

    longest = max(map(len, rows))
    ids_BT = torch.stack([torch.cat([torch.ones(longest - len(row), dtype=row.dtype), row]) for row in rows])
    mask_BT = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    places_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache: dict[str, Any] = {}
    for end in range(longest - steps, longest + 1):
        new = slice(0 if not cache else end - 1, end)
        out = model(
            input_ids=ids_BT[:, new],
            attention_mask=mask_BT[:, :end],
            **places(model, places_BT[:, new]),
            use_cache=steps > 0,
            **cache,
        )
        cache = {cache_name(model): out.past_key_values} if steps else {}
    return out.logits[:, -1]


def cache_name(model: Any) -> str:
    """What a model's forward calls the cache that it is given: transformers renames it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def places(model: Any, places_BT: Any) -> dict[str, Any]:
    """The keyword by which a model's forward takes positions; none where it counts them itself."""
    return {"position_ids": places_BT} if "position_ids" in inspect.signature(model.forward).parameters else {}
