"""What holds for every source; a new kind inherits these by one line in conftest.make_source."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from writing import WRITERS, write_jsonl

from potstill.core.types import Example, Split
from potstill.sources import Skip, Source, Splits
from potstill.sources.jsonl import Jsonl

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FROM_FILES = ("jsonl", "csv", "parquet", "dolly", "squad")
MakeSource = Callable[..., Source]
Texts = tuple[str, str, str]


def texts(example: Example) -> Texts:
    """What a row says; `examples` adds the language that is told, and the key shared with other rows."""
    return example.instruction, example.context, example.response


def split_of_rows(source: Source) -> dict[tuple[str, str, str], set[Split]]:
    found: dict[tuple[str, str, str], set[Split]] = {}
    for example in source.rows():
        found.setdefault(texts(example), set()).add(source.split_of(example))
    return found


def in_one_split(source: Source) -> bool:
    return all(len(splits) == 1 for splits in split_of_rows(source).values())


class Alternating(Jsonl, kind="alternating"):
    """Broken on purpose: the split depends on the place in the file."""

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        for number, example in enumerate(super().rows(skip)):
            yield replace(example, tag=str(number))

    def split_of(self, example: Example) -> Split:
        return "train" if int(example.tag) < 60 else "test"


del Source.kinds["alternating"]


@pytest.mark.parametrize("kind", sorted(Source.kinds))
def test_no_row_lies_in_two_splits(kind: str, make_source: MakeSource) -> None:
    assert in_one_split(make_source(kind, [*range(60), *range(60)]))


def test_the_law_of_one_split_rejects_a_split_by_place(make_source: MakeSource) -> None:
    path = make_source("jsonl", [*range(60), *range(60)]).spec()["path"]
    assert not in_one_split(Alternating(path=path))


@pytest.mark.parametrize("kind", FROM_FILES)
def test_a_question_with_two_answers_lies_in_one_split(kind: str, make_source: MakeSource, tmp_path: Path) -> None:
    numbers = [number % 200 for number in range(400)]
    rows = [
        {"instruction": f"¿{n}?", "context": f"c{n}", "response": f"r{at}", "category": "qa", "title": ""}
        for at, n in enumerate(numbers)
    ]
    file = tmp_path / f"asked.{kind}"
    WRITERS.get(kind, write_jsonl)(rows, file)
    source = Source.parse({**make_source(kind).spec(), "path": str(file)})
    assert isinstance(source, Source)
    splits: dict[str, set[Split]] = {}
    for example in source.rows():
        splits.setdefault(example.instruction, set()).add(source.split_of(example))
    assert len(splits) == 200
    assert all(len(each) == 1 for each in splits.values())
    assert len(set.union(*splits.values())) == 3


@pytest.mark.parametrize("kind", sorted(set(Source.kinds) - {"primer"}))
def test_rows_with_equal_keys_lie_in_one_split(kind: str, make_source: MakeSource) -> None:
    source = make_source(kind)
    splits: dict[str, set[Split]] = {}
    for example in source.rows():
        splits.setdefault(example.key, set()).add(source.split_of(example))
    assert all(len(each) == 1 for each in splits.values())


def test_primer_asks_no_question_in_two_splits(make_source: MakeSource) -> None:
    """Its keys are countries and lie in all splits; what must not straddle is a question in a language."""
    source = make_source("primer")
    splits: dict[tuple[str, str], set[Split]] = {}
    for example in source.rows():
        splits.setdefault((example.instruction, example.language), set()).add(source.split_of(example))
    assert all(len(each) == 1 for each in splits.values())
    assert len(set.union(*splits.values())) == 3


@pytest.mark.parametrize("kind", sorted(Source.kinds))
def test_the_splits_share_out_all_rows(kind: str, make_source: MakeSource) -> None:
    source = make_source(kind)
    rows = list(source.rows())
    parts = {split: list(source.examples(split)) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(rows) > 0
    assert Counter(texts(row) for part in parts.values() for row in part) == Counter(map(texts, rows))
    assert parts["train"]


@pytest.mark.parametrize("kind", sorted(Source.kinds))
def test_a_source_built_again_from_its_own_table_gives_the_same_rows(kind: str, make_source: MakeSource) -> None:
    source = make_source(kind)
    again = Source.parse(source.spec())
    assert isinstance(again, Source)
    assert list(again.rows()) == list(source.rows())
    assert again.content_hash() == source.content_hash()


@pytest.mark.parametrize("kind", sorted(Source.kinds))
def test_every_row_can_be_asked_and_answered(kind: str, make_source: MakeSource) -> None:
    for example in make_source(kind).rows():
        assert example.instruction.strip()
        assert example.response.strip()
        assert example.references[0] == example.response
        assert example.key


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 99), unique=True, min_size=1), st.randoms())
@pytest.mark.parametrize("kind", FROM_FILES)
def test_splits_stay_when_rows_come_go_or_change_places(kind: str, make_source: MakeSource, numbers: list[int], random) -> None:
    before = split_of_rows(make_source(kind, range(100)))
    random.shuffle(numbers)
    after = split_of_rows(make_source(kind, numbers))
    assert after.items() <= before.items()


@pytest.mark.parametrize("kind", FROM_FILES)
def test_content_hash_changes_with_a_row(kind: str, make_source: MakeSource) -> None:
    numbers: Iterable[Iterable[int]] = ([1, 2, 3], [1, 2, 4], [1, 2], [2, 1, 3])
    assert len({make_source(kind, each).content_hash() for each in numbers}) == 4


def test_limit_counts_rows_of_all_splits(make_source: MakeSource) -> None:
    source = Source.parse({**make_source("jsonl").spec(), "limit": 7})
    assert isinstance(source, Source)
    assert sum(len(list(source.examples(split))) for split in SPLITS) == 7


def of_share(source: Source, share: float, **more: int) -> tuple[list[Texts], dict[Split, list[Texts]]]:
    """The rows of a share in the order of the file, and by split."""
    part = Source.parse({**source.spec(), "share": share, **more})
    assert isinstance(part, Source)
    by_split = {split: list(map(texts, part.examples(split))) for split in SPLITS}
    taken = Counter(row for rows in by_split.values() for row in rows)
    return [row for row in map(texts, source.rows()) if row in taken], by_split


def many(kind: str, make_source: MakeSource) -> Source:
    """Some hundreds of rows, so that a share of them is near what is asked for."""
    source = make_source(kind, range(600))
    more = {
        "primer": {"countries": 40},
        "stdlib": {"max_lines": 3},
        "programs": {"families": 12, "new_families": 3, "instances": 20},
    }.get(kind, {})
    parsed = Source.parse({**source.spec(), **more})
    assert isinstance(parsed, Source)
    return parsed


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("kind", sorted(Source.kinds))
def test_a_share_is_a_part_of_each_split_about_as_large_as_asked_for(kind: str, share: float, make_source: MakeSource) -> None:
    source = many(kind, make_source)
    whole = {split: list(map(texts, source.examples(split))) for split in SPLITS}
    taken, by_split = of_share(source, share)
    for split in SPLITS:  # same splits, same order
        drawn = set(by_split[split])
        assert by_split[split] == [row for row in whole[split] if row in drawn]
        spread = (len(whole[split]) * share * (1 - share)) ** 0.5
        assert abs(len(by_split[split]) - share * len(whole[split])) <= 4 * spread + 1
    assert 0 < len(taken) < sum(map(len, whole.values()))


@pytest.mark.parametrize("kind", sorted(Source.kinds))
def test_a_smaller_share_is_part_of_a_larger_one(kind: str, make_source: MakeSource) -> None:
    source = many(kind, make_source)
    small, large, whole = (set(of_share(source, share)[0]) for share in (0.2, 0.6, 1.0))
    assert small < large < whole == set(map(texts, source.rows()))


@pytest.mark.parametrize("kind", FROM_FILES)
def test_a_share_stays_when_rows_are_added_or_change_places(kind: str, make_source: MakeSource) -> None:
    before = make_source(kind, range(0, 300, 2))
    old, (drawn, _) = set(map(texts, before.rows())), of_share(before, 0.4)
    after, _ = of_share(make_source(kind, reversed(range(300))), 0.4)
    assert set(after) & old == set(drawn) < set(after)


def test_a_share_is_drawn_by_row_and_not_by_key(write_rows: Callable[..., str]) -> None:
    rows = [{"id": number // 40, "instruction": f"¿{number}?", "response": "r"} for number in range(400)]
    source = Jsonl(path=write_rows(rows), key="id")
    drawn = set(of_share(source, 0.5)[0])
    assert {row.key for row in source.rows() if texts(row) in drawn} == set(map(str, range(10)))


def test_limit_counts_rows_of_the_share(make_source: MakeSource) -> None:
    source = make_source("jsonl")
    assert of_share(source, 0.5, limit=7)[0] == of_share(source, 0.5)[0][:7]


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_lies_between_none_and_all(share: float) -> None:
    with pytest.raises(ValidationError):
        Jsonl(path="rows.jsonl", share=share)


def test_shares_of_the_splits_are_about_those_asked_for() -> None:
    splits = Splits(validation=0.2, test=0.3)
    counts = Counter(splits.of(str(number)) for number in range(5000))
    assert abs(counts["validation"] - 1000) < 100
    assert abs(counts["test"] - 1500) < 110


def test_splits_must_leave_rows_to_train_on() -> None:
    with pytest.raises(ValidationError, match=r"validation \+ test = 1 leaves no row to train on"):
        Splits(validation=0.5, test=0.5)
