"""Programs that open exported files, one class each, and what each of them makes of a file."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from potstill.core.artifact import read_json
from potstill.core.errors import UserError
from potstill.data.tricky import TEXTS
from potstill.edges import gguf_files
from potstill.edges.compressed import is_compressed, load_compressed, loader_problem, loader_version
from potstill.edges.llamacpp import Opening, answers_of, runtime_problem, runtime_version
from potstill.edges.machine import versions
from potstill.edges.models import Model, Tokenizer, load_model, load_tokenizer, positions_of, stored_dtype
from potstill.edges.tokens import Unspellable, beginning, control_tokens
from potstill.exporters import compressed_tensors
from potstill.exporters.web import PAGE_FILES, prompt_parts
from potstill.stages.passages import Places
from potstill.stages.reference import WORDS, Reference, greedy, logp_at

_OWN_TOKENS = 4  # control tokens of a tokenizer that texts are made around
_TYPES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16", "torch.float64": "f32"}


@dataclass(frozen=True)
class Asked:
    """What a runtime is asked of a file.

    Attributes:
        chosen: places at which distributions are compared.
        prompt: after which a greedy text is written.
        heard: gets how many places more are done.
    """

    chosen: Places
    prompt: list[int]
    heard: Callable[[int], None]

    @property
    def count(self) -> int:
        """Of places."""
        return sum(len(places) for _, places in self.chosen)


@dataclass(frozen=True)
class Weights:
    """Of a model's weights those that a file holds otherwise, bit for bit, once ours are in the file's type."""

    count: int
    differ: tuple[str, ...]


@dataclass(frozen=True)
class Theirs:
    """What a runtime made of a file.

    Attributes:
        logq_PV: log-probabilities at each place, NaN where it named none.
        texts: whose token ids were compared.
        wanted: these ids by our tokenizer.
        ids: these ids by the runtime.
        greedy: its text after the prompt.
        said: what in the file is not the model's, which no distribution shows.
        weights: None: they were not compared one by one.
    """

    logq_PV: np.ndarray
    texts: list[str]
    wanted: list[list[int]]
    ids: list[list[int]]
    greedy: str
    said: list[str]
    weights: Weights | None = None


class Runtime(ABC):
    """A program that opens some kind of file."""

    name: ClassVar[str]

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that it is, by name; "" of one that is absent."""

    def problem(self) -> str | None:
        """Why it is not here, and the command that installs it; None where it is."""
        return None

    @abstractmethod
    def type_of(self, file: Path) -> str:
        """The narrowest encoding of the file's matrices, such as "q4_0".

        Raises:
            UserError: it cannot be read.
        """

    @abstractmethod
    def ask(self, file: Path, ours: Reference, asked: Asked) -> Theirs:
        """Open a file.

        Raises:
            Refused: llama.cpp did not take it.
            UserError: it cannot be read.
        """


class LlamaCpp(Runtime):
    """llama.cpp opens a GGUF file."""

    name = "llama.cpp"

    def versions(self) -> dict[str, str]:
        return {"llama.cpp (xllamacpp)": runtime_version()}

    def problem(self) -> str | None:
        return runtime_problem()

    def type_of(self, file: Path) -> str:
        return type_of(file)

    def ask(self, file: Path, ours: Reference, asked: Asked) -> Theirs:
        texts = [*TEXTS, *around(ours.control)]
        template = ours.tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        told = _asked_of_llamacpp(file, texts, asked)
        said = _other_ends(told.header, ours)
        if (told.header.get("tokenizer.chat_template") or None) != (template or None):
            said.insert(0, _OTHER_TEMPLATE)
        weights = None
        with suppress(UserError):  # llama.cpp reads more networks than we do
            weights = stored_in(ours.model, load_model(f"path:{file}"))
        return Theirs(told.logq_PV, texts, ours.ids(texts), told.ids, told.greedy, said, weights)


class WebPage(LlamaCpp):
    """llama.cpp opens the page's model, in which control tokens have private names; the page's files beside it are whole."""

    def ask(self, file: Path, ours: Reference, asked: Asked) -> Theirs:
        spelt = Unspellable(ours.tokenizer, control_tokens(ours.tokenizer))
        texts = [*TEXTS, *around(ours.control), *around(spelt.names.values())]  # what spells a control token is text
        before = beginning(ours.tokenizer)
        wanted = [[*before, *spelt.encode(text)] for text in texts]
        told = _asked_of_llamacpp(file, texts, asked)
        said = [*_page_says_otherwise(file, ours), *_other_ends(told.header, ours)]
        return Theirs(told.logq_PV, texts, wanted, told.ids, told.greedy, said)


class Transformers(Runtime):
    """transformers opens a folder of safetensors."""

    name = "transformers"

    def versions(self) -> dict[str, str]:
        return {"transformers": versions()["transformers"]}

    def type_of(self, file: Path) -> str:
        return _TYPES.get(str(stored_dtype(f"path:{file.parent}")), "f32")

    def ask(self, file: Path, ours: Reference, asked: Asked) -> Theirs:
        model, tokenizer = self._load(file.parent), load_tokenizer(f"path:{file.parent}")
        _refuse_smaller(model, asked)
        texts = [*TEXTS, *around(ours.control)]
        ids = [list(tokenizer(text).input_ids) for text in texts]
        weights = compared(ours.model, model, self.type_of(file))
        said = _says_otherwise(model, tokenizer, ours)
        found = Theirs(
            logp_at(model, asked.chosen), texts, ours.ids(texts), ids, greedy(model, tokenizer, asked.prompt), said, weights
        )
        asked.heard(asked.count)
        return found

    def _load(self, folder: Path) -> Model:
        return load_model(f"path:{folder}")


class CompressedTensors(Transformers):
    """transformers opens a folder of packed codes and scales, by the package compressed-tensors."""

    name = "transformers, compressed-tensors"

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "compressed-tensors": loader_version()}

    def problem(self) -> str | None:
        return loader_problem()

    def type_of(self, file: Path) -> str:
        return "int4"

    def _load(self, folder: Path) -> Model:
        return load_compressed(folder)


_COMPRESSED = CompressedTensors()


def runtime_of(file: Path) -> Runtime:
    """What opens a file of weights, by its ending and, of a folder's safetensors, its config."""
    if file.suffix == ".gguf":
        return LlamaCpp()
    if file.suffix == ".bin":
        return WebPage()
    return _COMPRESSED if is_compressed(file.parent) else Transformers()


def trouble_with(names: Iterable[str]) -> list[str]:
    """Which runtimes of an export's files are not here, each with the command that installs it, by the names of the files."""
    found = [_COMPRESSED if compressed_tensors.FOLDER in Path(name).parts else runtime_of(Path(name)) for name in names]
    return list(dict.fromkeys(trouble for one in found if (trouble := one.problem()) is not None))


def around(control: Iterable[str]) -> list[str]:
    """Texts around the first of some control tokens."""
    return [f"{token}a {token} b\n" for token in list(control)[:_OWN_TOKENS]]


def compared(ours: Model, theirs: Model, type: str) -> Weights:
    """Weights of two models one by one: ours are first cast to the type of the other's file."""
    import torch

    cast = {"f16": torch.float16, "bf16": torch.bfloat16}.get(type, torch.float32)
    found = dict(theirs.named_parameters(remove_duplicate=False))
    differ, count = [], 0
    for name, own in ours.named_parameters():
        other, count = found.get(name), count + 1
        if other is None or not own.detach().to(cast).float().cpu().equal(other.detach().float().cpu()):
            differ.append(name)
    return Weights(count, tuple(differ))


def stored_in(ours: Model, file: Model) -> Weights:
    """Matrices one by one with those of a GGUF file: ours as they are, or in one of the types that it has.

    Vectors are left out: some networks' norms are written otherwise.
    """
    found = dict(file.named_parameters(remove_duplicate=False))
    own = {name: weight for name, weight in ours.named_parameters() if weight.ndim == 2}
    differ = [name for name, weight in own.items() if name not in found or not _stands_for(weight, found[name])]
    return Weights(len(own), tuple(differ))


def _stands_for(own: Any, other: Any) -> bool:
    """Whether one of a file's types makes just these numbers of the matrix."""
    import gguf
    import torch

    own, other = own.detach().float().cpu(), other.detach().float().cpu()
    if own.shape != other.shape:
        return False
    if any(own.to(type).float().equal(other) for type in (torch.float32, torch.float16, torch.bfloat16)):
        return True
    eight = gguf.GGMLQuantizationType.Q8_0
    return any(  # GPT-2's lie the other way in the file
        one.shape[1] % gguf.GGML_QUANT_SIZES[eight][0] == 0
        and bool((gguf.dequantize(gguf.quantize(one.contiguous().numpy(), eight), eight) == two.numpy()).all())
        for one, two in ((own, other), (own.T, other.T))
    )


@dataclass(frozen=True)
class _Told:
    """What llama.cpp said of a file."""

    logq_PV: np.ndarray
    ids: list[list[int]]
    greedy: str
    header: Mapping[str, Any]


def _asked_of_llamacpp(file: Path, texts: Sequence[str], asked: Asked) -> _Told:
    header = gguf_files.read(f"path:{file}", file).keys  # says in our words what is cut short
    prompts = [ids[:place] for ids, places in asked.chosen for place in places]
    opening = Opening(context=max(map(len, [asked.prompt, *prompts])) + WORDS + 8)
    found = answers_of(
        file, prompts, texts, continued=[asked.prompt], words=WORDS, opening=opening, reuse=True, heard=lambda: asked.heard(1)
    )
    logq_PV = np.full((len(prompts), max(map(len, found.logp_V))), np.nan, np.float32)
    for row, logp_V in zip(logq_PV, found.logp_V, strict=True):
        row[: len(logp_V)] = logp_V
    return _Told(logq_PV, found.ids, found.written[0][0], header)


def _refuse_smaller(model: Model, asked: Asked) -> None:
    """Refuse a model that cannot be asked, because it has too few tokens or positions."""
    rows, positions = model.get_input_embeddings().weight.shape[0], positions_of(model.config)
    asked_ids = [asked.prompt, *(ids for ids, _ in asked.chosen)]
    if (most := max(max(ids) for ids in asked_ids)) >= rows:
        raise UserError(f"its vocabulary has {rows:,} rows, and our rows have the token {most:,}")
    if positions is not None and (longest := max(map(len, asked_ids))) > positions:
        raise UserError(f"it has {positions:,} positions, and our rows up to {longest:,}")


_OTHER_TEMPLATE = "its chat template is not the model's: prompts are written otherwise, by the system message or the form"
_NO_PARTS = (
    "its prompts cannot be compared, because the model has no chat template of fixed texts around what is said, and no page is "
    "written without one: compare it with the model that it was made from"
)


def _other_ends(header: Mapping[str, Any], ours: Reference) -> list[str]:
    """Whether a GGUF file names all ends of answers."""
    return _missing_ends({header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}, ours)


def _missing_ends(named: set[Any], ours: Reference) -> list[str]:
    missing = [end for end in ours.ends if end not in named]
    names = ", ".join(repr(token) for token in ours.tokenizer.convert_ids_to_tokens(missing))
    return [f"it does not name {names} as an end of answers"] if missing else []


def _says_otherwise(model: Model, tokenizer: Tokenizer, ours: Reference) -> list[str]:
    """Template and ends of a folder that transformers loaded."""
    ends = model.generation_config.eos_token_id
    found = _missing_ends(set(ends if isinstance(ends, list) else [ends]), ours)
    return [*([_OTHER_TEMPLATE] if (tokenizer.chat_template or None) != (ours.tokenizer.chat_template or None) else []), *found]


def _page_says_otherwise(file: Path, ours: Reference) -> list[str]:
    """Files that the page lacks, and what it would write around what is said."""
    found = [f"{name} is missing beside it" for name in PAGE_FILES if not (file.parent / name).is_file()]
    if (file.parent / "model.json").is_file():
        told, wanted = read_json(file.parent / "model.json"), json.loads(json.dumps(prompt_parts(ours.tokenizer)))
        if not wanted:
            found.append(f"model.json: {_NO_PARTS}")
        elif not isinstance(told, dict) or any(told.get(key) != value for key, value in wanted.items()):
            found.append(f"model.json: {_OTHER_TEMPLATE}")
        elif told.get("bytes") != file.stat().st_size:
            found.append(f"model.json says {told.get('bytes')} bytes, and the page refuses a file of {file.stat().st_size}")
    return found


def type_of(file: Path) -> str:
    """The narrowest encoding of a GGUF file's matrices, such as "q4_0".

    Raises:
        UserError: not a whole GGUF file.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found = gguf_files.read(f"path:{file}", file)
    types = {tensor.type for tensor in found.tensors.values() if len(tensor.shape) > 1}

    def bits(type: int) -> float:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(type)]
        return size / block

    return GGMLQuantizationType(min(types, key=bits)).name.lower() if types else "f32"
