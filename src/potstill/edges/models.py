"""Language models as the Hub stores them: loading, saving, sizes, and whether two of them can be distilled."""

import copy
import json
import logging
import os
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from potstill.core.artifact import file_hash, fingerprint
from potstill.core.component import suggest
from potstill.core.errors import UserError
from potstill.edges.known import KNOWN

Model = Any  # transformers.PreTrainedModel
Tokenizer = Any  # transformers.PreTrainedTokenizerBase
PACKED = "packed.safetensors"
ARCHITECTURES = ("qwen2", "llama", "gpt2")


@cache
def _transformers() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers


def device() -> Any:
    """The accelerator when there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _refuse_remote_code(where: str, error: Exception) -> None:
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        raise UserError(f"{where}: needs its own Python code, which potstill never runs; choose another model") from error


@contextmanager
def _hub_errors(name: str):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the hub's HTTP client of the day raises
        _refuse_remote_code(f"hf:{name}", error)
        text = str(error)
        raise UserError(
            f"hf:{name}: cannot be loaded from the hub ({type(error).__name__}: {text.splitlines()[0][:160]}); "
            "without a network, download it elsewhere with 'hf download " + name + " --local-dir DIR' and write 'path:DIR'"
        ) from error


def _folder(where: str) -> Path | None:
    """The local folder that `path:` names, checked; None for a hub name."""
    scheme, _, rest = where.partition(":")
    if scheme == "hf":
        return None
    folder = Path(os.path.expanduser(rest))  # unlike pathlib's, leaves the home of nobody as it is
    if not folder.is_dir():
        near = suggest(folder.name, [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else [])
        raise UserError(f"path:{rest}: no such folder{near}")
    if not (folder / "config.json").is_file():
        raise UserError(f"path:{rest}: holds no config.json, so it is not a model that transformers saved")
    return folder


def _hub(where: str) -> tuple[str, str | None]:
    name, _, revision = where.removeprefix("hf:").partition("@")
    return name, revision or None


def config_of(where: str, offline_shape: bool = False) -> Any:
    """The transformers config of `path:…` or `hf:…`; with `offline_shape` the shipped table is asked before the hub."""
    transformers = _transformers()
    folder = _folder(where)
    if folder is not None:
        try:
            config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        except (ValueError, OSError) as error:
            _refuse_remote_code(where, error)
            raise UserError(f"{where}: config.json cannot be read ({str(error).splitlines()[0][:160]})") from error
    else:
        name, revision = _hub(where)
        if offline_shape and name in KNOWN:
            shape = dict(KNOWN[name])
            return transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
        with _hub_errors(name):
            commit = _commit(name, revision)
            config = transformers.AutoConfig.from_pretrained(name, revision=commit, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"{where}: model type '{config.model_type}' is not supported (known: {', '.join(ARCHITECTURES)})")
    return config


def _safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path}: truncated in its header ({size:,} bytes); copy or download it again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: not a safetensors file (its header is no JSON); copy or download it again") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < expected:
        raise UserError(f"{path}: truncated, {size:,} of {expected:,} bytes; copy or download it again")
    return header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be whole.

    Raises:
        UserError: there are none, only pickled ones, one is missing, or one is truncated.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index of weight files; copy or download it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            lost = f"{missing[0]} is missing ({len(missing)} of {len(names)} weight files)"
            raise UserError(f"path:{folder}: {lost}; copy or download it again")
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    if not files:
        if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise UserError(
                f"path:{folder}: has pickled weights only, and unpickling can run code; save it once with "
                "save_pretrained(…) in an environment you trust, which writes safetensors"
            )
        raise UserError(f"path:{folder}: holds no model.safetensors")
    for file in files:
        _safetensors_header(file)
    return files


def load_tokenizer(where: str) -> Tokenizer:
    """The tokenizer of `path:…` or `hf:…`.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    transformers = _transformers()
    folder = _folder(where)
    if folder is None:
        name, revision = _hub(where)
        with _hub_errors(name):
            return transformers.AutoTokenizer.from_pretrained(name, revision=_commit(name, revision), trust_remote_code=False)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"{where}: holds no tokenizer (tokenizer.json); copy it from the model it was trained from")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{where}: the tokenizer cannot be read ({str(error).splitlines()[0][:160]})") from error


def load_model(where: str, dtype: Any = None) -> Model:
    """The causal language model of `path:…` or `hf:…`, in float32 unless told, on `device()`, in evaluation mode.

    Raises:
        UserError: no such folder, no safetensors, truncated weights, weights that do not fit the config, hub out of reach.
    """
    import torch

    transformers = _transformers()
    config = config_of(where)
    folder = _folder(where)
    options = {
        "dtype": dtype or torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that we can name them
    }
    if folder is None:
        name, revision = _hub(where)
        with _hub_errors(name):
            options["revision"] = _commit(name, revision)
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

    config, folder = config_of(where), _folder(where)
    softcap = softcap_in(config)
    with torch.device("meta"):
        model = _transformers().AutoModelForCausalLM.from_config(config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = config.tie_word_embeddings
    owner = embedding if tied else head
    (name,) = (name for name, module in model.named_modules() if module is owner)
    files = weight_files(folder) if folder is not None and head.bias is None else []
    holding = [file for file in files if f"{name}.weight" in _safetensors_header(file)]
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


def check_vocabulary(model: Model, tokenizer: Tokenizer, where: str) -> None:
    """Refuse a model that has no embedding for some of its tokenizer's tokens.

    Raises:
        UserError: tokens were added to the tokenizer, and not to the model.
    """
    check_rows(model.get_input_embeddings().weight.shape[0], tokenizer, where)


def check_rows(rows: int, tokenizer: Tokenizer, where: str) -> None:
    """`check_vocabulary` of a model that is not loaded, by the rows of its embedding."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        raise UserError(
            f"{where}: the tokenizer has {tokens:,} tokens and the model only {rows:,} embeddings; "
            "call model.resize_token_embeddings(len(tokenizer)) and save it again"
        )


def stored_dtype(where: str) -> Any:
    """The torch dtype of a folder's weights: what all of them share, else float32; of a hub name what its config says.

    Raises:
        UserError: as `weight_files`.
    """
    import torch

    folder = _folder(where)
    if folder is None:
        return getattr(config_of(where), "dtype", None)
    known = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    stored = {entry["dtype"] for file in weight_files(folder) for entry in _safetensors_header(file).values()}
    return known.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32


def load_stored(where: str) -> Model:
    """`load_model`, its parameters in the dtype in which they are stored, where that holds each exactly; else in float32."""
    model, dtype = load_model(where), stored_dtype(where)
    if dtype is not None and all(bool((p == p.to(dtype).to(p.dtype)).all()) for p in model.parameters()):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def as_dtype(model: Model, dtype: Any) -> Model:
    """The model itself where it has this dtype, else a copy of it in this dtype.

    Raises:
        UserError: a weight is too large or too small for the dtype.
    """
    if all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    cast = copy.deepcopy(model).to(dtype)
    for (name, stored), own in zip(cast.named_parameters(), model.parameters(), strict=True):
        values, lost = own.detach().double(), stored.detach().double() - own.detach().double()
        if not lost.isfinite().all() or lost.norm() > 0.05 * values.norm():  # overflowed, or flushed to zero
            size = "large" if stored.isinf().any() else "small"
            raise UserError(f"the weight '{name}' is too {size} for {str(dtype).removeprefix('torch.')}; use float32")
    return cast


def skeleton(config: Any) -> Model:
    """The modules of a model of this config, with shapes and without weights."""
    import torch

    with torch.device("meta"):
        return _transformers().AutoModelForCausalLM.from_config(config)


def save_model(model: Model, tokenizer: Tokenizer, folder: Path, stop_ids: list[int] | None = None, dtype: Any = None) -> None:
    """As any Hub model is saved: config, safetensors, tokenizer with its chat template; weights in `dtype`, default: theirs.

    With `stop_ids` plain transformers' `generate` stops where the model was trained to, and is greedy: what a checkpoint
    brought along (sampling, a repetition penalty, another end) was not what it was measured with.
    """
    transformers = _transformers()
    if stop_ids is not None:
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, do_sample=False
        )
    (model if dtype is None else as_dtype(model, dtype)).save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))


@cache
def _commit(name: str, revision: str | None) -> str:
    """The commit that a hub name stands for now, or that the cache holds when the hub is out of reach."""
    if revision and len(revision) == 40:
        return revision
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        with _hub_errors(name):
            return str(HfApi().model_info(name, revision=revision, timeout=10).sha)
    except UserError:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
        raise


_HASHES: dict[str, Any] = {}  # of this process


def content_id(where: str, hashes: dict[str, Any] | None = None) -> str:
    """What identifies a model's content: file hashes for a folder, the commit for a hub name.

    `hashes` remembers file hashes by path, size and time, so that gigabytes are read once; default: while the process lives.
    """
    folder = _folder(where)
    if folder is None:
        name, revision = _hub(where)
        return f"{name}@{_commit(name, revision)}"
    hashes = hashes if hashes is not None else _HASHES
    named = [path for pattern in ("*.json", "*.jinja", "*.txt", PACKED) for path in sorted(folder.glob(pattern))]
    files = [*weight_files(folder), *(path for path in named if path.name != "artifact.json")]
    found = {}
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in hashes:
            hashes[key] = file_hash(file)
        found[file.name] = hashes[key]
    return fingerprint(found)


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
        model = _transformers().AutoModelForCausalLM.from_config(config)
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


def bytes_of(folder: Path) -> int:
    """Bytes of a model's weights on disk; quantised layers count in their packed form."""
    files = weight_files(folder)
    packed = folder / PACKED
    if not packed.is_file():
        return sum(file.stat().st_size for file in files)
    replaced = {name.rpartition(".")[0] for name in _safetensors_header(packed)}
    rest = 0
    for file in files:
        for name, entry in _safetensors_header(file).items():
            if name.removesuffix(".weight") not in replaced:
                rest += entry["data_offsets"][1] - entry["data_offsets"][0]
    return packed.stat().st_size + rest


def shared_vocabulary(
    teacher: Tokenizer, student: Tokenizer, teacher_name: str = "teacher", student_name: str = "student"
) -> int:
    """How many leading token ids mean the same to both; logits are sliced to these, never padded.

    Raises:
        UserError: the tokenizers differ, with the first id or setting where they do.
    """
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs != ours:
        by_id = {i: token for token, i in theirs.items()}
        mine = {i: token for token, i in ours.items()}
        where = min(i for i in by_id.keys() | mine.keys() if by_id.get(i) != mine.get(i))
        raise UserError(
            f"{student_name} and {teacher_name} have different tokenizers ({len(ours):,} and {len(theirs):,} tokens; "
            f"id {where} is {mine.get(where)!r} in one, {by_id.get(where)!r} in the other); "
            "white-box distillation compares them token by token: choose two models of one family"
        )
    probe = "¿Qué tal, naïve café?  def f(x):\n\treturn x+1  1234 <|im_end|>"
    if teacher.encode(probe, add_special_tokens=False) != student.encode(probe, add_special_tokens=False):
        raise UserError(
            f"{student_name} and {teacher_name} have the same tokens but cut text differently (merges or normaliser); "
            "white-box distillation compares them token by token: choose two models of one family"
        )
    return max(theirs.values()) + 1
