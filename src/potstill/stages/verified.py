"""Exported files opened in their runtime and compared with the model that they were made from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from potstill.core.artifact import MANIFEST, Artifact, file_hash
from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.data.tricky import CHATS, TEXTS
from potstill.edges import gguf_files
from potstill.edges.llamacpp import Opening, Refused, answers_of, runtime_problem, runtime_version
from potstill.edges.machine import versions
from potstill.edges.models import (
    PACKED,
    Model,
    Tokenizer,
    as_dtype,
    load_model,
    load_tokenizer,
    positions_of,
    stored_dtype,
    weight_files,
)
from potstill.edges.sampling import generate
from potstill.edges.tokens import begun, control_tokens, encode
from potstill.exporters._ends import end_ids
from potstill.sources import Source
from potstill.stages.lineage import ancestry, as_chosen, trained_as
from potstill.study.parity import compare_ids, distance, limit, verdict

VERIFIED = "verify.json"  # beside the files
FEW, POSITIONS = 24, 48  # positions that an export looks at, and `potstill verify` by default
IN_FOLDERS = "it is for other programs, and is not opened; a GGUF file of the same model holds the same weights, and is"
_ROWS = 4
_ANSWER = 64  # tokens of an answer that positions are chosen from
_WORDS = 40  # tokens of the greedy text
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Passages:
    """Rows to compare on.

    Attributes:
        own: prompt and answer of rows that the model was made for, in tokens; none where they cannot be had.
        built_in: likewise of texts of any model: a model that is sure of its own rows shows little there.
        of: which rows these are, in words.
    """

    own: list[Pair]
    built_in: list[Pair]
    of: str

    @property
    def first(self) -> list[int]:
        """The first prompt."""
        return [*self.own, *self.built_in][0][0]

    def chosen(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Of each row its tokens and the places before which the next token is predicted: half in either kind."""
        half = count // 2 if self.own else 0
        return self._evenly(self.own, half) + self._evenly(self.built_in, count - half)

    def _evenly(self, pairs: list[Pair], count: int) -> list[tuple[list[int], list[int]]]:
        """Places evenly over the answers of some rows."""
        rows = [(prompt + answer[:_ANSWER], len(prompt)) for prompt, answer in pairs]
        places = [(n, p) for n, (ids, begin) in enumerate(rows) for p in range(max(begin, 1), len(ids))]
        count = min(count, len(places))
        taken = {places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)}
        found = [(ids, sorted(p for m, p in taken if m == n)) for n, (ids, _) in enumerate(rows)]
        return [(ids, at) for ids, at in found if at]


@dataclass
class Reference:
    """The model that files must answer as.

    Attributes:
        model: with the weights that were exported.
        tokenizer: with the chat template that was exported.
        passages: what it is asked.
        named: what people call it.
        full: where it lies before it was quantised; "": it was not, or nobody knows.
    """

    model: Model
    tokenizer: Tokenizer
    passages: Passages
    named: str
    full: str = ""
    _known: dict[int, np.ndarray] = field(default_factory=dict)

    @cached_property
    def _exact(self) -> Model:
        """The model in float32, in which it is computed with."""
        import torch

        return as_dtype(self.model, torch.float32).eval()

    def logp_PV(self, count: int) -> np.ndarray:
        """Its log-probabilities at so many places of the passages, computed once.

        Raises:
            UserError: they are not numbers.
        """
        if count not in self._known:
            found_PV = logp_at(self._exact, self.passages.chosen(count))
            if np.isnan(found_PV).any():
                raise UserError(
                    f"{self.named}: its own logits are not numbers, so nothing can be compared with it; choose another"
                )
            self._known[count] = found_PV
        return self._known[count]

    @cached_property
    def control(self) -> list[str]:
        """Its tokenizer's control tokens."""
        return list(control_tokens(self.tokenizer))

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end an answer, as a file must name them."""
        return end_ids(self.model, self.tokenizer)

    @cached_property
    def greedy(self) -> str:
        """Its answer to the first passage."""
        return greedy(self._exact, self.tokenizer, self.passages.first)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self.tokenizer(text).input_ids) for text in texts]

    @cached_property
    def _full(self) -> Model:
        return load_model(self.full)

    def own_kl(self, count: int) -> float | None:
        """What rounding itself cost, in KL at the same positions; None where nothing is known of the model before it."""
        if not self.full:
            return None
        return distance(logp_at(self._full, self.passages.chosen(count)), self.logp_PV(count)).kl


def logp_at(model: Model, chosen: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
    """Log-probabilities [P, V] of the tokens at the chosen places, each after all before it."""
    import torch

    found = []
    with torch.inference_mode():
        for ids, places in chosen:
            logits_TV = model(torch.tensor([ids], device=model.device)).logits[0]
            at_P = torch.tensor([place - 1 for place in places], device=model.device)
            found.append(logits_TV[at_P].double().log_softmax(-1).float().cpu().numpy())
    return np.concatenate(found)


def greedy(model: Model, tokenizer: Tokenizer, prompt: list[int]) -> str:
    limit = positions_of(model.config)
    words = _WORDS if limit is None else min(_WORDS, limit - len(prompt))
    return generate(model, tokenizer, [prompt], stop_ids=[], max_new_tokens=max(1, words)).texts[0]


def passages_for(model: Artifact | None, tokenizer: Tokenizer, positions: int | None) -> Passages:
    """Rows that the model's training held out, else learned, as they were rendered, where they can be read; and built-in texts.

    Args:
        model: None: it was not made here.
        positions: that the model has; None: nothing bounds them.
    """
    room = positions or 2**31
    cut = max(1, room // 2)  # of a model with very few positions
    built_in = [(prompt[:cut], answer[: room - min(cut, len(prompt))]) for prompt, answer in _built_in(tokenizer)]
    named = f"{len(built_in)} built-in texts"
    trained = trained_as(as_chosen(model)) if model is not None else None
    for split in ("validation", "test", "train") if trained is not None else ():
        pairs = _rows(trained, split, tokenizer)  # pyright: ignore[reportArgumentType]
        pairs = [(prompt, answer) for prompt, answer in pairs if len(prompt) + _ANSWER <= room]
        if pairs:
            of = f"{len(pairs)} {split} rows of {trained.name}"  # pyright: ignore[reportOptionalMemberAccess]
            return Passages(pairs, built_in, f"{of} and {named}")
    return Passages([], built_in, named)


def _rows(trained: Artifact | None, split: Any, tokenizer: Tokenizer) -> list[Pair]:
    """The first rows of a split, as they were trained; none where they cannot be read any more."""
    if trained is None or "data" not in trained.stage:
        return []
    try:
        source = Source.parse(trained.stage["data"])
        assert isinstance(source, Source)
        writer = source.written_by()
        if writer is not None:
            name = writer.target
            made = [one for one in ancestry(trained).values() if one.makes == "rows" and one.name.partition("@")[0] == name]
            source = source.found_in(made[0].folder if writer.scheme == "stage" else Path(name).expanduser())
        renderer = Renderer(tokenizer, Prompts.model_validate(trained.stage.get("prompts", {})))
        found = []
        for pair in instruction_pairs(source.examples(split), renderer, Counts()):
            found.append(pair)
            if len(found) == _ROWS:
                break
        return found
    except (UserError, ValidationError, PydanticCustomError, IndexError, OSError):
        return []


def _built_in(tokenizer: Tokenizer) -> list[Pair]:
    """The built-in texts through the chat template; as plain text where there is none, or it does not take them."""
    try:
        renderer = Renderer(tokenizer, Prompts(max_tokens=4096, max_prompt_tokens=2048))
        rows = [Example(key=asked, instruction=asked, response=said) for asked, said in CHATS]
        pairs = list(instruction_pairs(rows, renderer, Counts()))
    except UserError:
        pairs = []
    if pairs:
        return pairs
    rows = [begun(tokenizer, encode(tokenizer, f"{asked}\n\n{said}")) for asked, said in CHATS]
    return [(ids[: len(ids) // 3 + 1], ids[len(ids) // 3 + 1 :]) for ids in rows]


def _own_texts(control: Sequence[str]) -> list[str]:
    """Texts around the first of a tokenizer's own control tokens."""
    return [f"{token}a {token} b\n" for token in control[:4]]


def full_precision(artifact: Artifact | None) -> str:
    """Where a model lies as it was before it was quantised; "" of one that was not, or where nothing says so."""
    where = ""
    while artifact is not None and (artifact.folder / PACKED).is_file():
        before = artifact.stage.get("model") or artifact.stage.get("student", "")  # of one that was healed, its student
        scheme, _, target = str(before).partition(":")
        if scheme == "stage":
            made = ancestry(artifact)
            prints = [one for name, one in artifact.parents.items() if name.partition("@")[0] == target]
            artifact = next((made[one] for one in prints if one in made), None)
            where = f"path:{artifact.folder}" if artifact is not None else ""
        else:
            folder = Path(target).expanduser()
            artifact = Artifact.load(folder) if scheme == "path" and (folder / "artifact.json").is_file() else None
            where = f"{scheme}:{target}" if target else ""
    return where


def damage(folder: Path, listed: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Which of an export's files are not as they were written, and in what.

    Args:
        listed: size and SHA-256 of each file, as the export's summary has them.
    """
    found = {}
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            found[name] = "is missing"
        elif path.stat().st_size != size:
            found[name] = f"has {path.stat().st_size:,} bytes instead of {size:,}"
        elif file_hash(path) != digest:
            found[name] = "has the right size and another content: a bit flipped, or it was changed"
    return found


def written_as(file: Path) -> Sequence[Any] | None:
    """A file's size and hash as its export wrote them; None where no manifest beside it says so."""
    if not (file.parent / MANIFEST).is_file():
        return None
    return Artifact.load(file.parent).summary.get("files", {}).get(file.name)


def check_whole(file: Path) -> None:
    """Refuse a file that is not as its export wrote it, where the manifest lies beside it.

    Raises:
        UserError: says in what it differs.
    """
    listed = written_as(file)
    broken = damage(file.parent, {file.name: listed}) if listed is not None else {}
    if broken:
        raise UserError(f"{file} {broken[file.name]}; export the model again")


def exported_in(folder: Path) -> list[str]:
    """Files of a folder that can be verified: each GGUF file, and the first of its safetensors for all of them."""
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    plain = weight_files(folder)[:1] if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file() else []
    return [*(path.name for path in plain), *ggufs]


def weights_among(names: Iterable[str]) -> list[str]:
    """Those of an export's files that hold weights, wherever they lie."""
    return [name for name in names if name.endswith((".gguf", ".safetensors", ".bin"))]


def verify_files(
    folder: Path,
    names: Sequence[str],
    ours: Reference,
    *,
    positions: int = FEW,
    damaged: Mapping[str, str] | None = None,
    always_own: bool = False,
    heard: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> dict[str, Any]:
    """Open each file in its runtime and compare; what `verify.json` holds.

    Args:
        names: as `exported_in` gives them.
        positions: at which distributions are compared.
        damaged: files that need not be opened, and why.
        always_own: tell what rounding cost itself, also where the limit does not depend on it.
        heard: gets how many positions of how many are done, and of which file.
    """
    trouble = runtime_problem()
    found, left_out = [], {}
    for name in names:
        broken = dict(damaged or {})
        # config and tokenizer are read with the weights of a folder
        beside = [one for one in broken if "/" not in one and one.endswith((".json", ".jinja", ".model", ".safetensors"))]
        told = name if name in broken or name.endswith(".gguf") else next(iter(beside), "")
        if told in broken:
            why = broken[told] if told == name else f"{told} {broken[told]}"
            found.append({"file": name, "passed": False, "why": why})
        elif "/" in name:
            left_out[name] = IN_FOLDERS
        elif name.endswith(".gguf") and trouble is not None:
            left_out[name] = trouble
        else:
            found.append(_verify(folder, name, ours, positions, always_own, heard))
    passed = all(one["passed"] for one in found)
    runtimes = {"llama.cpp (xllamacpp)": runtime_version(), "transformers": versions()["transformers"]}
    return {
        "against": ours.named,
        "rows": ours.passages.of,
        "runtimes": runtimes,
        "files": found,
        "not_verified": left_out,
        "passed": passed,
    }


def _verify(
    folder: Path, name: str, ours: Reference, positions: int, always_own: bool, heard: Callable[[int, int, str], None]
) -> dict[str, Any]:
    chosen, texts = ours.passages.chosen(positions), [*TEXTS, *_own_texts(ours.control)]
    prompt = ours.passages.first
    total, done = sum(len(places) for _, places in chosen), 0

    def count() -> None:
        nonlocal done
        done += 1
        heard(done, total, name)

    heard(0, total, name)
    told: dict[str, Any] = {"file": name}
    try:
        if name.endswith(".gguf"):
            told |= {"runtime": "llama.cpp", "type": type_of(folder / name)}
            theirs = _in_llamacpp(folder / name, chosen, texts, prompt, count)
        else:
            told |= {"runtime": "transformers", "type": _TYPES.get(str(stored_dtype(f"path:{folder}")), "f32")}
            theirs = _in_transformers(f"path:{folder}", chosen, texts, prompt)
            heard(total, total, name)
    except Refused as error:
        return {**told, "passed": False, "why": f"llama.cpp does not open it: {error}"}
    except UserError as error:
        return {**told, "passed": False, "why": f"cannot be opened: {error}"}
    type, logp_PV = told["type"], ours.logp_PV(positions)
    if theirs.logq_PV.shape != logp_PV.shape:
        return {
            **told,
            "passed": False,
            "why": f"its vocabulary has {theirs.logq_PV.shape[1]:,} rows, ours {logp_PV.shape[1]:,}",
        }
    ids = compare_ids(texts, ours.ids(texts), theirs.ids, ours.control)
    apart, said = distance(logp_PV, theirs.logq_PV), [] if theirs.header is None else _says_otherwise(theirs.header, ours)
    coded = type not in ("f32", "f16", "bf16")
    own = ours.own_kl(positions) if coded and (always_own or verdict(type, ids, apart)) else None
    why = verdict(type, ids, apart, own, said)
    return {
        **told,
        "passed": not why,
        "why": why,
        **asdict(apart),
        "limit": limit(type, own),
        "own_kl": own,
        "texts": ids.texts,
        "differ": list(ids.differ),
        "known": ids.known,
        "prompt": ours.tokenizer.decode(prompt),
        "ours": ours.greedy,
        "theirs": theirs.text.strip(),
    }


@dataclass(frozen=True)
class _Theirs:
    logq_PV: np.ndarray
    ids: list[list[int]]
    text: str
    header: Mapping[str, Any] | None = None  # of a GGUF file


def _in_llamacpp(
    file: Path,
    chosen: Sequence[tuple[list[int], list[int]]],
    texts: Sequence[str],
    prompt: list[int],
    heard: Callable[[], None],
) -> _Theirs:
    header = gguf_files.read(f"path:{file}", file).keys  # says in our words what is cut short
    prompts = [ids[:place] for ids, places in chosen for place in places]
    longest = max(map(len, [prompt, *prompts]))
    opening = Opening(context=longest + _WORDS + 8)
    found = answers_of(file, prompts, texts, continued=[prompt], words=_WORDS, opening=opening, reuse=True, heard=heard)
    rows = max(map(len, found.logp_V))
    logq_PV = np.full((len(prompts), rows), np.nan, np.float32)
    for row, logp_V in zip(logq_PV, found.logp_V, strict=True):
        row[: len(logp_V)] = logp_V
    return _Theirs(logq_PV, found.ids, found.written[0][0], header)


def _says_otherwise(header: Mapping[str, Any], ours: Reference) -> list[str]:
    """What a file says of the template and of the ends of answers, where it is not the model's: KL does not see it."""
    found, template = [], ours.tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if (header.get("tokenizer.chat_template") or None) != (template or None):
        found.append("its chat template is not the model's: prompts are written otherwise, by the system message or the form")
    ends = {header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    if missing := [end for end in ours.ends if end not in ends]:
        names = ", ".join(repr(token) for token in ours.tokenizer.convert_ids_to_tokens(missing))
        found.append(f"it does not name {names} as an end of answers")
    return found


def _in_transformers(
    where: str, chosen: Sequence[tuple[list[int], list[int]]], texts: Sequence[str], prompt: list[int]
) -> _Theirs:
    model, tokenizer = load_model(where), load_tokenizer(where)
    ids = [list(tokenizer(text).input_ids) for text in texts]
    return _Theirs(logp_at(model, chosen), ids, greedy(model, tokenizer, prompt))


_TYPES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16", "torch.float64": "f32"}


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


def unverified(names: Sequence[str], why: str) -> dict[str, Any]:
    """The record of files that were not opened."""
    return {"against": "", "rows": "", "runtimes": {}, "files": [], "not_verified": dict.fromkeys(names, why), "passed": True}
