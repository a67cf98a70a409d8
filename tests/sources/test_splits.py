"""What must not lie on both sides of a split: a question in other spellings, a conversation, what is nearly equal."""

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import UserError
from potstill.core.types import Example, Split
from potstill.scorers.text import key_form
from potstill.sources import Skip, Source, Splits
from potstill.sources._near import near_duplicates
from potstill.sources._survey import place, survey
from potstill.sources.dolly import Dolly
from potstill.sources.jsonl import Jsonl
from potstill.sources.primer import Primer
from potstill.sources.squad import Squad

WriteRows = Callable[..., str]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TOPICS = [
    *("amber", "barley", "copper", "draff", "ester", "foreshot", "grist", "heads", "kiln"),
    *("lauter", "malt", "neck", "oak", "peat", "reflux", "spirit", "tun", "vapour"),
]

SPELLINGS: dict[str, Callable[[str], str]] = {
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "trailing blank": lambda text: text + " \t",
    "line ends": lambda text: text.replace("\n", "\r\n") + "\r\n",
    "capitals": str.upper,
    "runs of blanks": lambda text: text.replace(" ", " \u00a0 "),
    "byte-order mark": lambda text: "\ufeff" + text,
    "full-width marks": lambda text: text.replace("?", "？").replace(",", "，"),
    "no final mark": lambda text: text.rstrip("?"),
    "another final mark": lambda text: text + "؟",
}


def question(number: int) -> str:
    draw = random.Random(number)
    return f"¿Qué decís de {' '.join(draw.choices(TOPICS, k=12))},\nseñor número {number}?"


def held_apart(source: Source) -> bool:
    """Whether no question lies in two splits, in whatever spelling."""
    splits: dict[tuple[str, str], set[Split]] = {}
    for split in SPLITS:
        for row in source.examples(split):
            opening = next((turn.content for turn in row.history if turn.role == "user"), row.instruction)
            splits.setdefault((key_form(opening), key_form(row.context)), set()).add(split)
    return all(len(each) == 1 for each in splits.values()) and len(set.union(*splits.values())) == 3


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("key", [None, "id"])
def test_a_question_in_another_spelling_stays_in_its_split(spelling: str, key: str | None, write_rows: WriteRows) -> None:
    texts = [question(number) for number in range(120)]
    asked = [*texts, *map(SPELLINGS[spelling], texts)]
    rows = [{"id": str(i), "instruction": text, "context": "c", "response": "r"} for i, text in enumerate(asked)]
    path = write_rows(rows)
    assert held_apart(Jsonl(path=path, key=key, context="context"))
    assert held_apart(Dolly(path=path, category=""))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_key_in_another_spelling_is_the_same_key(spelling: str) -> None:
    keys = [f"Señor {number} de la Peña" for number in range(200)]
    splits = Splits(validation=0.3, test=0.3)
    assert [splits.of(key) for key in keys] == [splits.of(SPELLINGS[spelling](key)) for key in keys]


def test_the_law_rejects_keys_that_are_not_normalised(write_rows: WriteRows) -> None:
    texts = [question(number) for number in range(120)]
    path = write_rows([{"instruction": text, "response": "r"} for text in [*texts, *map(str.upper, texts)]])
    assert not held_apart(AsWritten(path=path))


def squad_rows(titles: int) -> list[dict[str, Any]]:
    """Paragraphs with a title each; each of the first forty is there under another title too."""
    rows = [
        {"title": f"T{i}", "instruction": f"Who is {i}.{j}?", "context": f"About {i}.", "response": "x"}
        for i in range(titles)
        for j in range(3)
    ]
    return [*rows, *({**row, "title": f"copy of {row['title']}"} for row in rows[:120])]


def test_equal_questions_under_two_titles_join_the_titles(write_rows: WriteRows) -> None:
    source = Squad(path=write_rows(squad_rows(100)))
    assert held_apart(source)
    titles: dict[str, set[Split]] = {}
    for split in SPLITS:
        for row in source.examples(split):
            titles.setdefault(row.tag, set()).add(split)
    assert all(len(splits) == 1 for splits in titles.values())
    assert all(titles[f"T{i}"] == titles[f"copy of T{i}"] for i in range(40))


def test_joined_keys_are_one_cluster_of_the_bootstrap(write_rows: WriteRows) -> None:
    rows = [row for split in SPLITS for row in Squad(path=write_rows(squad_rows(60))).examples(split)]
    keys = {tag: {row.key for row in rows if row.tag == tag} for tag in {row.tag for row in rows}}
    assert all(len(each) == 1 for each in keys.values())
    assert keys["T3"] == keys["copy of T3"] != keys["T50"]
    assert len(set.union(*keys.values())) == 60


def test_joining_goes_on_from_key_to_key(write_rows: WriteRows) -> None:
    rows = [{"id": f"{chain}-{link}", "instruction": f"{chain}.{link + more}", "response": "r"}
            for chain in range(60) for link in range(5) for more in (0, 1)]  # fmt: skip
    source = Jsonl(path=write_rows(rows), key="id")
    splits: dict[str, set[Split]] = {}
    for row in source.rows():
        splits.setdefault(row.key.split("-")[0], set()).add(source.split_of(row))
    assert len(splits) == 60
    assert all(len(each) == 1 for each in splits.values())


def test_joined_keys_do_not_crowd_into_one_split(write_rows: WriteRows) -> None:
    rows = [{"id": f"{group}-{i}", "instruction": f"{group}", "response": "r"} for group in range(1500) for i in range(4)]
    counts = Counter(map(Jsonl(path=write_rows(rows), key="id").split_of, Jsonl(path=write_rows(rows), key="id").rows()))
    assert abs(counts["test"] / 6000 - 0.1) < 0.03
    assert abs(counts["validation"] / 6000 - 0.05) < 0.02


def test_joined_keys_keep_their_split_when_other_rows_come_and_change_places(write_rows: WriteRows) -> None:
    rows, more = (
        squad_rows(60),
        [{"title": f"new {i}", "instruction": f"{i}", "context": "", "response": "x"} for i in range(60)],
    )
    before, after = Squad(path=write_rows(rows, "a.jsonl")), Squad(path=write_rows([*more, *reversed(rows)], "b.jsonl"))
    where = {(row.tag, row.instruction): after.split_of(row) for row in after.rows()}
    assert all(where[row.tag, row.instruction] == before.split_of(row) for row in before.rows())


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_turns_of_a_conversation_as_rows_of_growing_history_have_one_key(system: str, write_rows: WriteRows) -> None:
    rows = []
    for number in range(120):
        said = [question(number), "Bien.", "go on", "Más.", "go on", "Fin."]
        rows += [{"messages": chat(*said[:end], system=system), "id": f"{number}/{end}", "c": f"{end}"} for end in (2, 4, 6)]
    path = write_rows(rows)
    for source in (Jsonl(path=path, messages="messages"), Jsonl(path=path, messages="messages", context="c")):
        splits: dict[str, set[Split]] = {}
        keys: dict[str, set[str]] = {}
        for row in source.rows():
            opening = next((turn.content for turn in row.history if turn.role == "user"), row.instruction)
            splits.setdefault(opening, set()).add(source.split_of(row))
            keys.setdefault(opening, set()).add(row.key)
        assert len(splits) == 120
        assert all(len(each) == 1 for each in (*splits.values(), *keys.values()))
    assert held_apart(Jsonl(path=path, messages="messages", key="id"))


def test_a_key_of_more_than_a_fifth_of_the_rows_is_said(write_rows: WriteRows) -> None:
    rows = [{"messages": chat("Hi" if n % 2 else question(n), "Hello.", question(-n), "r")} for n in range(400)]
    source = Jsonl(path=write_rows(rows), messages="messages")
    assert source.largest_key() == ("Hi", 200, 400)
    (note,) = source.notes()
    assert note.startswith("one key holds 200 of 400 rows, which all lie in one split; the first of them begins with 'Hi'")
    assert Jsonl(path=write_rows(rows[::2], "b.jsonl"), messages="messages").notes() == []


class AsWritten(Jsonl, kind="as written"):
    """Broken on purpose: each spelling is a key of its own."""

    def split_of(self, example: Example) -> Split:
        return self.splits.of(example.instruction.encode().hex())


class Capitals(Source, kind="some capitals"):
    """As a user writes one: keys of its own, and no word of languages."""

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        for number in range(200):
            yield Example(
                key=str(number), instruction=f"What is the capital of {number // 2}?", response="It is the one that I am in."
            )

    def content_hash(self) -> str:
        return "capitals"


del Source.kinds["as written"], Source.kinds["some capitals"]


def test_a_source_of_the_users_own_inherits_all_of_it() -> None:
    assert held_apart(Capitals())
    assert Capitals().language_in_use() == "en"
    assert {row.language for row in Capitals().examples("train")} == {"en"}


# what is left out is counted for the split that it is left out of


def test_rows_left_out_are_counted_in_their_own_split(write_rows: WriteRows) -> None:
    rows = [{"instruction": question(number), "response": "" if number % 2 else "r"} for number in range(200)]
    source = Jsonl(path=write_rows(rows), splits=Splits(validation=0.2, test=0.3))
    counts: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}
    kept = {split: len(list(source.examples(split, counts[split]))) for split in SPLITS}
    assert sum(kept.values()) == 100
    assert sum(sum(each.values()) for each in counts.values()) == 100
    for split, share in zip(SPLITS, (0.5, 0.2, 0.3), strict=True):
        assert abs(counts[split]["empty response"] - 100 * share) < 20


def test_no_row_is_counted_for_a_split_that_lost_none(write_rows: WriteRows) -> None:
    rows = [{"instruction": question(number), "response": "r"} for number in range(100)]
    source = Jsonl(path=write_rows(rows))
    training = next(source.examples("train")).instruction
    path = write_rows([{**row, "response": ""} if row["instruction"] == training else row for row in rows], "one.jsonl")
    counts: Counter[str] = Counter()
    assert list(Jsonl(path=path).examples("test", counts))
    assert not counts
    list(Jsonl(path=path).examples("train", counts))
    assert counts == {"empty response": 1}


def test_a_row_outside_the_share_is_not_left_out(write_rows: WriteRows) -> None:
    rows = [{"instruction": question(number), "response": ""} for number in range(200)] + [
        {"instruction": "q", "response": "r"}
    ]
    counts: Counter[str] = Counter()
    for split in SPLITS:
        list(Jsonl(path=write_rows(rows), share=0.3).examples(split, counts))
    assert 30 < counts["empty response"] < 90


# nearly equal


def near_rows(count: int = 200) -> list[dict[str, str]]:
    """Each question twice, the second time with one word of fourteen changed at its end."""
    texts = [question(number) for number in range(count)]
    return [{"instruction": text, "response": "r"} for text in [*texts, *(text.replace("señor", "señores") for text in texts)]]


def test_near_duplicates_are_counted_and_stay_until_they_are_dropped(write_rows: WriteRows) -> None:
    path = write_rows(near_rows())
    source = Jsonl(path=path)
    found = source.near_duplicates()
    pairs = Counter()
    where = {row.instruction: source.split_of(row) for row in source.rows()}
    for number in range(200):  # the oracle: by construction
        a, b = where[question(number)], where[question(number).replace("señor", "señores")]
        pairs.update({a, b} - {"train"} if "train" in (a, b) else ())
    assert found.count == {"validation": pairs["validation"], "test": pairs["test"]}
    assert found.total > 20
    assert found.training == found.total
    assert all(pair.similarity >= 0.8 and pair.training != pair.held_out for pair in found.examples)
    assert found.sentence().endswith('stay in training; splits.near_duplicates = "drop" leaves them out')

    dropping = Jsonl(path=path, splits=Splits(near_duplicates="drop"))
    counts: Counter[str] = Counter()
    kept, all_of_them = list(dropping.examples("train", counts)), list(source.examples("train"))
    assert counts == {"nearly repeats a held-out row": found.training}
    assert len(kept) == len(all_of_them) - found.training
    assert dropping.near_duplicates().sentence().endswith("are left out of training")
    for split in ("validation", "test"):
        assert list(dropping.examples(split)) == list(source.examples(split))


@pytest.mark.parametrize("typed", ["What’s “{}” – in peat’s own words?", "What‘s „{}“ — in peatʼs own words？"])
def test_typographic_marks_do_not_part_a_question(typed: str, write_rows: WriteRows) -> None:
    plain = "What's \"{}\" - in peat's own words?"
    rows = [{"instruction": each.format(question(n)), "response": "r"} for n in range(120) for each in (plain, typed)]
    source = Jsonl(path=write_rows(rows))
    where = [source.split_of(row) for row in source.rows()]
    assert where[::2] == where[1::2]
    assert set(where) == set(SPLITS)


def greeted(answers: tuple[str, str] = ("Copper.", "Copper.")) -> list[dict[str, Any]]:
    """Conversations of two turns in pairs: greetings that differ, then the same question with one of two answers."""
    greetings = ("Good morning to all of you", "¿Qué tal? Tengo una duda")
    return [
        {"messages": chat(f"{greeting}, {n}", "Hello.", question(n), f"{n}: {answer}")}
        for n in range(100)
        for greeting, answer in zip(greetings, answers, strict=True)
    ]


def test_the_same_last_question_and_answer_after_another_greeting_is_a_repetition(write_rows: WriteRows) -> None:
    path = write_rows(greeted())
    source = Jsonl(path=path, messages="messages", splits=Splits(validation=0.1, test=0.2))
    held: dict[Split, set[str]] = {split: {row.instruction for row in source.examples(split)} for split in SPLITS}
    found = source.near_duplicates()
    assert found.count["test"] == len(held["test"] & held["train"]) > 10
    dropping = Jsonl(path=path, messages="messages", splits=Splits(validation=0.1, test=0.2, near_duplicates="drop"))
    kept = {row.instruction for row in dropping.examples("train")}
    assert kept == held["train"] - held["test"] - held["validation"]


def test_the_same_last_question_with_another_answer_is_no_repetition(write_rows: WriteRows) -> None:
    source = Jsonl(path=write_rows(greeted(("Copper.", "Peat."))), messages="messages")
    assert source.near_duplicates().total == 0


BEGIN = "You are a careful assistant of a distillery. Answer in one short sentence and name the tool. "
END = " Write nothing else, give no reasons, and end with a full stop."


@pytest.mark.parametrize("begin, end", [(BEGIN, ""), ("", END), (BEGIN, END)])
def test_what_all_instructions_begin_or_end_with_makes_no_row_near(begin: str, end: str, write_rows: WriteRows) -> None:
    def asked(n: int, seed: int) -> str:
        return " ".join(random.Random(f"{n} {seed}").sample(TOPICS, k=3)) + f" {n}?"

    rows = [{"instruction": begin + asked(n, 0) + end, "response": "r"} for n in range(150)]
    assert Jsonl(path=write_rows(rows)).near_duplicates().total == 0
    near = [{**row, "instruction": begin + question(n) + end} for n, row in enumerate(rows)]
    near += [{**row, "instruction": begin + question(n).replace("señor", "señores") + end} for n, row in enumerate(rows)]
    assert Jsonl(path=write_rows(near, "near.jsonl")).near_duplicates().total > 20


def test_to_drop_most_of_the_training_rows_is_refused(write_rows: WriteRows) -> None:
    rows = [{"instruction": f"{question(number % 5)} {number}", "response": "r"} for number in range(100)]
    source = Jsonl(path=write_rows(rows), splits=Splits(near_duplicates="drop"))
    with pytest.raises(
        UserError, match=r'near_duplicates = "drop" would leave out \d+ of \d+ training rows; raise splits.simil'
    ):
        next(source.examples("train"))


def test_near_duplicates_do_not_hang_on_the_order_of_rows(write_rows: WriteRows) -> None:
    rows = near_rows(80)
    one, other = Jsonl(path=write_rows(rows, "a.jsonl")), Jsonl(path=write_rows(rows[::-1], "b.jsonl"))
    assert one.near_duplicates().count == other.near_duplicates().count
    assert one.near_duplicates().training == other.near_duplicates().training


def test_one_passage_asked_two_questions_is_no_repetition(write_rows: WriteRows) -> None:
    rows = [
        {"instruction": asked, "context": question(n) * 10, "response": "r", "category": ""}
        for n in range(150)
        for asked in ("Who was there first?", "When did all of that begin to happen?")
    ]
    assert Dolly(path=write_rows(rows)).near_duplicates().total == 0


def test_unlike_questions_are_not_near_and_exact_ones_are_never_parted(write_rows: WriteRows) -> None:
    rows = [{"instruction": question(number % 100), "response": f"r{number}"} for number in range(300)]
    found = Jsonl(path=write_rows(rows)).near_duplicates()
    assert found.total == found.training == 0
    assert found.sentence() == ""


def test_a_sample_says_that_it_is_one(write_rows: WriteRows) -> None:
    source = Jsonl(path=write_rows(near_rows()))
    found, _ = near_duplicates(source._parted, 0.8, most=100)
    assert 60 < found.compared < 140 < found.rows
    assert f" (compared: {found.compared} of {found.rows} training rows and {found.held_out_rows} of" in found.sentence()


def test_splits_of_a_source_s_own_are_left_alone() -> None:
    source = Primer(countries=5)
    assert source.near_duplicates().sentence() == ""
    rows = {row.instruction: row for split in SPLITS for row in source.examples(split)}
    assert rows == {row.instruction: row for row in source.rows()}


# the language of the rows

ENGLISH = "It is the one that was there before they had come."
SPANISH = "Es el que estaba en la casa antes de que ellos llegaran con los otros."


@pytest.mark.parametrize(
    "answers, language",
    [
        ([ENGLISH] * 40, "en"),
        ([SPANISH] * 40, "es"),
        (["巴黎是法国的首都。"] * 40, "zh"),
        (["東京は日本の首都です。"] * 40, "ja"),
        (["서울은 한국의 수도입니다."] * 40, "ko"),
        (["กรุงเทพเป็นเมืองหลวง"] * 40, "th"),
        ([ENGLISH] * 30 + [SPANISH] * 20, "und"),
        ([ENGLISH] * 58 + [SPANISH] * 2, "en"),
        (["42", "7", "👍"] * 10, "und"),
        ([ENGLISH] * 20 + ["Se on talo jonka he ostivat viime vuonna kaupungista"] * 20, "und"),  # half Finnish
        (["Det er ikke det samme som han har med til den."] * 40, "und"),  # Danish or Norwegian
    ],
)
def test_the_language_is_told_from_the_rows_in_any_order(answers: list[str], language: str, write_rows: WriteRows) -> None:
    rows = [{"instruction": f"{number} + {number}", "response": answer} for number, answer in enumerate(answers)]
    for each in (rows, rows[::-1]):
        source = Jsonl(path=write_rows(each, f"{each[0]['instruction'][:2].strip()}.jsonl"))
        assert source.language_in_use() == language
        assert {row.language for split in SPLITS for row in source.examples(split)} == {language}


def test_what_a_row_or_a_recipe_says_of_its_language_is_not_guessed(write_rows: WriteRows) -> None:
    said = ["en-US", "EN", "eng", "es_PE", "", None]
    path = write_rows([{"instruction": str(i), "response": SPANISH, "l": code} for i, code in enumerate(said)])
    named = Jsonl(path=path, language_column="l", language="pt")
    assert sorted(row.language for split in SPLITS for row in named.examples(split)) == ["en", "en", "en", "es", "pt", "pt"]
    assert named.language_in_use() == named.language_note() == "en, es, pt"
    partly = Jsonl(path=path, language_column="l")
    assert sorted(row.language for split in SPLITS for row in partly.examples(split)) == ["en", "en", "en", "es", "es", "es"]
    assert partly.language_note() == "en, es (detected from the rows: in 2 of 2 rows looked at)"


def test_rows_of_several_languages_say_so(write_rows: WriteRows) -> None:
    path = write_rows([{"instruction": str(i), "response": (ENGLISH, SPANISH)[i % 2]} for i in range(40)])
    assert Jsonl(path=path).language_note() == "und (detected from the rows: rows of several languages (en 20, es 20))"


def test_a_language_column_that_holds_no_code_is_named(write_rows: WriteRows) -> None:
    path = write_rows([{"instruction": "q", "response": "r", "l": "English"}])
    with pytest.raises(UserError) as caught:
        list(Jsonl(path=path, language_column="l").rows())
    assert str(caught.value) == f"{path}:1: column 'l' holds 'english'; write an ISO 639-1 code, such as en"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40))
def test_joined_keys_are_the_connected_components(pairs: list[tuple[int, int]]) -> None:
    from networkx import Graph, connected_components

    rows = [Example(f"key {key}", f"question {asked}", "r", language="en") for key, asked in pairs]
    kin = survey(rows, join=True).kin
    graph = Graph([(f"key {key}", asked) for key, asked in pairs])
    for component in connected_components(graph):
        places = {place(key) for key in component if isinstance(key, str)}
        leaders = {kin.get(here, here) for here in places}
        assert len(leaders) == 1
        assert leaders <= places


def test_a_share_of_one_takes_every_place_for_the_test():
    """Also the last places, which 2⁶⁴ rounds up to a share of 1."""
    all_of_it = Splits(validation=0, test=1)
    assert {all_of_it.at(place) for place in (0, 2**63, 2**64 - 1)} == {"test"}
    with pytest.raises(ValueError, match="leaves no row to train on"):
        Splits(validation=0.1, test=1)
