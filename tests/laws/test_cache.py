"""What is read back is what the teacher said; what is damaged, moved or another's is never used in silence."""

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_parts import chat_tokenizer, rows, tiny_model
from torch import Tensor

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.batches import Batch, pack
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.divergences import Divergence
from potstill.divergences.forward_kl import ForwardKL
from potstill.edges.families import Logits
from potstill.losses.distillation import Distillation
from potstill.teachers.cache import RECORD, RowCache, keys_of, row_key
from potstill.teachers.signals import Buckets, Cached, Dense, Form, HiddenForm, Live, TopKForm

WIDTH = 6
Pairs = list[tuple[Any, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> Pairs:
    examples = [Example(str(i), row["instruction"], row["response"]) for i, row in enumerate(rows(12))]
    return list(instruction_pairs(examples, Renderer(tokenizer, Prompts()), Counts()))


class Counted:
    """Loads a teacher and counts how often, and how many rows it read."""

    def __init__(self, teacher: Any) -> None:
        self.teacher, self.loads = teacher, 0

    def __call__(self) -> Any:
        self.loads += 1
        return self.teacher


def teacher_of(tokenizer: Any, **more: Any) -> Any:
    return tiny_model("qwen2", len(tokenizer), seed=2, **more).eval().requires_grad_(False)


def topk(teacher: Any, k: int, temperature: float = 1.0) -> TopKForm:
    head = teacher.get_output_embeddings()
    return TopKForm(head, Logits(), k, temperature, head.out_features)


def hidden(teacher: Any) -> HiddenForm:
    return HiddenForm(teacher.get_output_embeddings(), Logits())


def cached(folder: Path, teacher: Any, form: Form, pairs: Pairs, told: Callable[[str], None] = lambda _: None) -> Cached:
    cache = RowCache(folder, {"teacher": "t"}, form.width, say=told)
    return Cached(cache, form, Counted(teacher), cache.missing(keys_of(pairs)))


def loss_of(signal: Any, student: Any, batch: Batch, divergence: Any = None, T: float = 1.0) -> tuple[Tensor, Tensor]:
    student.zero_grad(set_to_none=True)
    vocab = student.get_output_embeddings().out_features
    total = Distillation(signal, divergence or ForwardKL(), 0.7, T, vocab)(student, batch).total
    total.backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def student_of(tokenizer: Any) -> Any:
    return tiny_model("qwen2", len(tokenizer), seed=1)


# what comes back


@pytest.mark.parametrize("kind", sorted(Divergence.kinds))
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_cached_is_live_with_the_hidden_states_rounded(
    kind: str, T: float, tokenizer: Any, pairs: Pairs, tmp_path: Path
) -> None:
    teacher, student, batch = teacher_of(tokenizer), student_of(tokenizer), pack(pairs)
    rounded = Live(teacher)(batch)
    signals = [
        lambda batch: Dense(rounded.hidden_ND.bfloat16(), rounded.head),
        cached(tmp_path, teacher, hidden(teacher), pairs),  # as it is written
        cached(tmp_path, teacher, hidden(teacher), pairs),  # as it is read
    ]
    found = [loss_of(signal, student, batch, Divergence.parse(kind), T) for signal in signals]
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])
    live = loss_of(Live(teacher), student, batch, Divergence.parse(kind), T)
    torch.testing.assert_close(found[0][0], live[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("written", ["whole", "shared"])
def test_rows_that_share_a_prompt_are_kept_and_read_by_their_own_tokens(
    written: str, tokenizer: Any, pairs: Pairs, tmp_path: Path
) -> None:
    teacher, student = teacher_of(tokenizer).double(), student_of(tokenizer).double()
    several = [*pairs[:3], (pairs[0][0], pairs[1][1]), (pairs[2][0], pairs[1][1])]
    layouts = {"whole": pack(several), "shared": pack(several, None, [repr(prompt).encode() for prompt, _ in several])}
    assert layouts["shared"].shared is not None
    found = []
    for batch in (layouts[written], *layouts.values()):
        signal = cached(tmp_path, teacher, hidden(teacher), several)
        found.append(loss_of(signal, student, batch))
        signal.cache.close()
        assert signal.computed == (5 if len(found) == 1 else 0)
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=2e-6)  # norms are in float32


def test_the_rounding_costs_next_to_nothing(tokenizer: Any, pairs: Pairs) -> None:
    teacher, batch = teacher_of(tokenizer), pack(pairs)
    said = Live(teacher)(batch)
    exact, rounded = (F.log_softmax(said.head(h), -1) for h in (said.hidden_ND, said.hidden_ND.bfloat16().float()))
    assert ForwardKL()(exact, rounded).mean() < 1e-3


def test_any_order_and_any_company_reads_the_same(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher = teacher_of(tokenizer)
    first = cached(tmp_path, teacher, hidden(teacher), pairs)
    whole = first(pack(pairs))
    assert isinstance(whole, Dense)
    again = cached(tmp_path, teacher, hidden(teacher), pairs)
    apart = [again(pack([pair])) for pair in pairs[::-1]][::-1]
    assert torch.equal(torch.cat([said.hidden_ND for said in apart if isinstance(said, Dense)]), whole.hidden_ND)
    assert again.computed == 0
    assert again._load.loads == 0, "the teacher is not even loaded"


def test_a_row_is_known_by_its_tokens_and_its_boundary() -> None:
    ids = np.arange(9)
    keys = {row_key(ids[:n], ids[n:]) for n in range(1, 9)}
    assert len(keys) == 8
    assert row_key(ids[:3], ids[3:]) == row_key(ids[:3].astype(np.uint32), ids[3:].astype(np.int32))
    assert row_key(ids[:3], ids[3:]) not in {row_key(ids[:3], ids[3:] + 1), row_key(ids[:3] + 1, ids[3:])}


# top-k


def test_all_tokens_kept_is_the_whole_distribution(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher, student, batch = teacher_of(tokenizer), student_of(tokenizer), pack(pairs)
    vocab = len(tokenizer)
    for kind in sorted(Divergence.kinds):
        signal = cached(tmp_path / kind, teacher, topk(teacher, vocab), pairs)
        found, live = (loss_of(s, student, batch, Divergence.parse(kind)) for s in (signal, Live(teacher)))
        torch.testing.assert_close(found[0], live[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], live[1], rtol=1e-3, atol=1e-4)


def summing_to_one(said: Buckets) -> Callable[[Batch], Buckets]:
    """The rest left out, and what is kept made to sum to one, as some do."""
    kept_NK, rest_N1 = said.logp_NK1[:, :-1].log_softmax(-1), torch.full_like(said.logp_NK1[:, :1], -1e4)
    return lambda batch: Buckets(said.ids_NK, torch.cat([kept_NK, rest_N1], -1))


def by_k(tokenizer: Any, pairs: Pairs, tmp_path: Path, kind: str, ks: list[int], broken: bool = False) -> list[float]:
    teacher, student, batch = teacher_of(tokenizer), student_of(tokenizer), pack(pairs)
    found = []
    for k in ks:
        signal: Any = cached(tmp_path / f"{kind}-{k}-{broken}", teacher, topk(teacher, k), pairs)
        if broken:
            signal = summing_to_one(signal(batch))
        objective = Distillation(signal, Divergence.parse(kind), 1.0, 1.0, len(tokenizer))
        found.append(objective(student, batch).parts["divergence"].item())
    return found


# data processing inequality, Csiszár 1967: merging outcomes never raises an f-divergence
@pytest.mark.parametrize("kind", sorted(Divergence.kinds))
def test_more_tokens_come_closer_from_below(kind: str, tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    found = by_k(tokenizer, pairs, tmp_path, kind, [1, 4, 16, 64, len(tokenizer)])
    assert found == sorted(found)
    assert found[0] > 0
    assert found[0] < 0.9 * found[-1]


def test_the_law_rejects_a_top_k_made_to_sum_to_one(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    found = by_k(tokenizer, pairs, tmp_path, "forward_kl", [1, 4, 16, 64, len(tokenizer) - 1], broken=True)
    assert found != sorted(found)


def test_top_k_by_hand(tokenizer: Any) -> None:
    head = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
    form = TopKForm(head, Logits(), 2, 2.0, 4)
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    said = form.decode(form.encode(2 * probabilities.log()), torch.device("cpu"))
    assert said.ids_NK.tolist() == [[1, 3]]
    torch.testing.assert_close(said.logp_NK1.exp(), torch.tensor([[0.5, 0.25, 0.25]]))


def test_top_k_gradient(tokenizer: Any) -> None:
    torch.manual_seed(0)
    said = Buckets(torch.tensor([[1, 4], [0, 2]]), torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]], dtype=torch.float64).log())
    objective = Distillation(lambda batch: said, ForwardKL(), 1.0, 2.0, 5)
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def value(logits: Tensor) -> Tensor:
        return ForwardKL()(said.logp_NK1, objective._buckets(logits, said.ids_NK)).sum()

    assert torch.autograd.gradcheck(value, (logits,))


# who reads


class Shaky:
    """A form whose values depend on the company that a row is computed in, as a rounding may."""

    width = 2

    def encode(self, hidden_ND: Tensor) -> np.ndarray:
        return np.full((len(hidden_ND), 2), len(hidden_ND), dtype=np.uint8)

    def decode(self, values: np.ndarray, device: torch.device) -> Any:
        return values.copy()


def test_a_row_keeps_the_values_it_first_had(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    """Alone, beside rows that are computed, and twice in one batch: as a run reads it that goes on after being killed."""
    teacher, form = teacher_of(tokenizer), Shaky()
    cache = RowCache(tmp_path, {}, form.width)
    signal = Cached(cache, form, Counted(teacher), ())  # type: ignore[arg-type]
    batches = [pack(pairs[:1]), pack(pairs[:3]), pack([pairs[3], pairs[4], pairs[3]])]
    first = [signal(batch) for batch in batches]
    again = [signal(batch) for batch in batches]
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    assert signal.computed == 5


@pytest.mark.parametrize("form", ["hidden", "topk"])
def test_a_batch_without_rows_asks_nobody(form: str, tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher = teacher_of(tokenizer)
    signal = cached(tmp_path, teacher, hidden(teacher) if form == "hidden" else topk(teacher, 5), pairs)
    student, idle = student_of(tokenizer), pack([([0], [])])
    loss, gradient = loss_of(signal, student, idle)
    assert loss == 0
    assert not gradient.any()
    assert signal._load.loads == 0
    assert not list(tmp_path.glob("part-*"))


def test_a_teacher_is_let_go_whoever_wrote_the_rows(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher = teacher_of(tokenizer)
    twice = [*pairs, *pairs[:3]]  # the same rows again count once
    one, two = (cached(tmp_path, teacher, hidden(teacher), twice) for _ in range(2))
    one(pack(pairs[:6]))
    two(pack(pairs[6:]))
    assert one._teacher is not None
    one(pack(pairs[6:]))
    two(pack(pairs[:6]))
    assert one._teacher is None
    assert two._teacher is None
    assert (one.computed, two.computed) == (6, 6)


def test_after_damage_the_teacher_comes_back_and_stays(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher = teacher_of(tokenizer)
    signal = cached(tmp_path, teacher, hidden(teacher), pairs)
    signal(pack(pairs))
    assert signal._teacher is None
    flip(tmp_path / "part-000.values", 0)
    signal(pack(pairs))
    assert signal._load.loads == 2
    assert signal._teacher is not None


# what is broken


def fill(folder: Path, count: int = 8) -> dict[bytes, np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(0))
    made = {os.urandom(16): draw.integers(0, 256, (int(draw.integers(1, 9)), WIDTH), dtype=np.uint8) for _ in range(count)}
    cache = RowCache(folder, {"teacher": "t"}, WIDTH)
    for key, values in made.items():
        cache.append(key, values)
    cache.close()
    return made


def whole(folder: Path, made: dict[bytes, np.ndarray], told: Callable[[str], None] = lambda _: None) -> list[bool]:
    """Which rows come back; those that do are as they were written."""
    cache = RowCache(folder, {"teacher": "t"}, WIDTH, say=told)
    found = []
    for key, values in made.items():
        out = np.empty_like(values)
        found.append(cache.read(key, out))
        assert not found[-1] or np.array_equal(out, values)
    cache.close()
    return found


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    made = fill(tmp_path)
    assert all(whole(tmp_path, made))
    more = fill(tmp_path, 3)
    assert all(whole(tmp_path, {**made, **more}))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("where", ["begin", "middle", "end"])
def test_a_flipped_bit_loses_its_row_only(where: str, tmp_path: Path) -> None:
    made, told = fill(tmp_path), []
    path = tmp_path / "part-000.values"
    flip(path, {"begin": 0, "middle": path.stat().st_size // 2, "end": -1}[where])
    assert whole(tmp_path, made, told.append).count(False) == 1
    (line,) = told
    assert line == f"{tmp_path}: rows are damaged (their checksums do not fit); these are computed again"


def test_the_law_rejects_a_cache_without_checksums(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("potstill.teachers.cache.zlib.crc32", lambda data: 0)
    made = fill(tmp_path)
    flip(tmp_path / "part-000.values", 0)
    with pytest.raises(AssertionError):
        whole(tmp_path, made)


def test_a_flipped_bit_in_the_index_loses_its_row_only(tmp_path: Path) -> None:
    made, told = fill(tmp_path), []
    for byte in (0, 17, 25, RECORD.itemsize - 1):
        flip(tmp_path / "part-000.index", 2 * RECORD.itemsize + byte)
        assert whole(tmp_path, made, told.append).count(False) == 1
        flip(tmp_path / "part-000.index", 2 * RECORD.itemsize + byte)
    assert told[0].endswith("part-000 is cut short or damaged: 1 rows of it are computed again")
    assert all(whole(tmp_path, made))


@pytest.mark.parametrize("suffix", [".values", ".index"])
def test_a_truncated_file_loses_its_end_only(suffix: str, tmp_path: Path) -> None:
    made = fill(tmp_path)
    path = tmp_path / f"part-000{suffix}"
    os.truncate(path, path.stat().st_size // 2)
    found = whole(tmp_path, made)
    assert 1 < found.count(True) < len(made)
    assert found == sorted(found, reverse=True)
    again = RowCache(tmp_path, {"teacher": "t"}, WIDTH)
    for (key, values), there in zip(made.items(), found, strict=True):
        if not there:
            again.append(key, values)
    again.close()
    assert all(whole(tmp_path, made))


def test_lost_values_under_a_whole_index_lose_all(tmp_path: Path) -> None:
    made, told = fill(tmp_path), []
    (tmp_path / "part-000.values").unlink()
    assert not any(whole(tmp_path, made, told.append))
    assert told == [f"{tmp_path}/part-000.values cannot be read: its rows are computed again"]


def test_a_writer_killed_within_a_record_is_outlived(tmp_path: Path) -> None:
    made = fill(tmp_path)
    for suffix in (".index", ".values"):
        with (tmp_path / f"part-000{suffix}").open("ab") as file:
            file.write(b"half a recor")
    more = fill(tmp_path, 2)
    assert all(whole(tmp_path, {**made, **more}))


def test_two_writers_keep_apart_and_see_each_other(tmp_path: Path) -> None:
    one, two = (RowCache(tmp_path, {"teacher": "t"}, WIDTH) for _ in range(2))
    values = np.arange(3 * WIDTH, dtype=np.uint8).reshape(3, WIDTH)
    one.append(b"1" * 16, values)
    two.append(b"2" * 16, values + 1)
    assert sorted(path.name for path in tmp_path.glob("*.values")) == ["part-000.values", "part-001.values"]
    out = np.empty_like(values)
    assert not one.read(b"2" * 16, out)
    one.refresh()
    assert one.read(b"2" * 16, out)
    assert np.array_equal(out, values + 1)
    one.close()
    two.close()


def test_only_what_was_lost_is_computed_again(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher, batches = teacher_of(tokenizer), [pack(pairs[:6]), pack(pairs[6:])]
    first = cached(tmp_path, teacher, hidden(teacher), pairs)
    said = [first(batch) for batch in batches]
    first.cache.close()
    flip(tmp_path / "part-000.values", 0)
    again = cached(tmp_path, teacher, hidden(teacher), pairs)
    for batch, before in zip(batches, said, strict=True):
        after = again(batch)
        assert isinstance(after, Dense)
        assert isinstance(before, Dense)
        assert torch.equal(after.hidden_ND, before.hidden_ND)
    assert (again.computed, again.cache.lost) == (1, 1)
    again.cache.close()
    assert all(key in RowCache(tmp_path, {"teacher": "t"}, again.form.width) for key in keys_of(pairs))


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UserError, match=r"^another teacher said it: its weights or tokenizer are others$"):
        RowCache(tmp_path, {"teacher": "another"}, WIDTH)
    with pytest.raises(UserError, match=r"^its bytes per token is 6, and 8 is asked for$"):
        RowCache(tmp_path, {"teacher": "t"}, 8)


def test_a_disk_without_locks_is_told_as_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("potstill.teachers.cache.fcntl.flock", refuse)
    told: list[str] = []
    cache = RowCache(tmp_path, {}, WIDTH, say=told.append)
    assert not cache.append(b"1" * 16, np.zeros((1, WIDTH), np.uint8))
    assert len(list(tmp_path.glob("part-*"))) == 1
    assert "cannot be written (No locks available)" in told[0]


def test_many_may_open_a_new_cache_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for trial in range(10):
            opened = list(pool.map(lambda _, trial=trial: RowCache(tmp_path / str(trial), {}, WIDTH), range(4)))
            assert not any(cache.readonly for cache in opened)


@pytest.mark.parametrize("text", ["{}", "[]", '{"identity": 3}'])
def test_a_description_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(UserError, match=r"cache.json: damaged; delete .* and run again$"):
        RowCache(tmp_path, {}, WIDTH)
    told: list[str] = []
    RowCache(tmp_path, {}, WIDTH, say=told.append, mend=True)
    assert told == [f"{tmp_path}/cache.json was damaged; it is written again"]
    RowCache(tmp_path, {}, WIDTH)


def test_a_full_disk_ends_the_keeping_and_not_the_run(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher, told = teacher_of(tokenizer), []
    signal = cached(tmp_path, teacher, hidden(teacher), pairs, told.append)
    (tmp_path / "part-000.values").symlink_to("/dev/full")
    batch = pack(pairs)
    for _ in range(2):
        said = signal(batch)
        assert isinstance(said, Dense)
        assert torch.equal(said.hidden_ND, Live(teacher)(batch).hidden_ND.bfloat16())
    assert signal.computed == 2 * len(pairs)
    assert signal._load.loads == 1
    (line,) = told
    assert "cannot be written (No space left on device); what it lacks is computed again whenever it is needed" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told_once(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher, told = teacher_of(tokenizer), []
    tmp_path.chmod(0o500)
    signal = cached(tmp_path / "here", teacher, hidden(teacher), pairs, told.append)
    signal(pack(pairs))
    tmp_path.chmod(0o700)
    assert len(told) == 1


def test_nan_is_never_kept(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher = teacher_of(tokenizer)
    teacher.model.norm.weight[0] = torch.nan
    for signal in (Live(teacher), cached(tmp_path, teacher, hidden(teacher), pairs)):
        with pytest.raises(UserError, match="the teacher's hidden states are not finite"):
            signal(pack(pairs))
    assert not list(tmp_path.glob("part-*"))


def test_the_teacher_is_let_go_once_all_rows_are_kept(tokenizer: Any, pairs: Pairs, tmp_path: Path) -> None:
    teacher = teacher_of(tokenizer)
    signal = cached(tmp_path, teacher, hidden(teacher), pairs)
    signal(pack(pairs[:6]))
    assert signal._teacher is not None
    signal(pack(pairs[6:]))
    assert signal._teacher is None
    signal(pack(pairs))
    assert signal._load.loads == 1
    signal.cache.close()
