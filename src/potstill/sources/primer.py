"""Questions about countries in English and Spanish, made from facts of the Unicode CLDR that the package carries."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import ClassVar, Literal, cast

from pydantic import Field, field_validator, model_validator

from potstill.core.types import Example, Split
from potstill.sources import Skip, Source, Splits, hash_of_made
from potstill.sources._cells import with_first

Language = Literal["en", "es"]
Relation = Literal["currency", "language", "continent", "code"]

# {c} is the country. The last phrasing is asked in the test only, the one before it in validation only; both are made of
# words that training phrasings use too, for a model trained from scratch cannot know others.
_QUESTIONS: dict[tuple[Language, Relation], tuple[str, ...]] = {
    ("en", "currency"): (
        "What currency does {c} use?",
        "Which currency is used in {c}?",
        "What is the currency of {c}?",
        "What money do people pay with in {c}?",
        "Which money is used in {c}?",
        "What is the currency used in {c}?",
    ),
    ("es", "currency"): (
        "¿Qué moneda usa {c}?",
        "¿Qué moneda se usa en {c}?",
        "¿Cuál es la moneda de {c}?",
        "¿Con qué moneda se paga en {c}?",
        "¿Qué moneda tiene {c}?",
        "¿Cuál es la moneda que se usa en {c}?",
    ),
    ("en", "language"): (
        "What is the official language of {c}?",
        "Which language is official in {c}?",
        "Which official language does {c} have?",
        "What language does the government of {c} use?",
        "What is the language of the government of {c}?",
        "Which is the official language in {c}?",
    ),
    ("es", "language"): (
        "¿Cuál es el idioma oficial de {c}?",
        "¿Qué idioma es oficial en {c}?",
        "¿Qué idioma oficial tiene {c}?",
        "¿Qué idioma usa el gobierno de {c}?",
        "¿Cuál es el idioma que usa el gobierno de {c}?",
        "¿Qué idioma oficial se usa en {c}?",
    ),
    ("en", "continent"): (
        "On which continent is {c}?",
        "Which continent does {c} belong to?",
        "What continent is {c} part of?",
        "In which part of the world is {c}?",
        "What part of the world does {c} belong to?",
        "What is the continent of {c}?",
    ),
    ("es", "continent"): (
        "¿En qué continente está {c}?",
        "¿A qué continente pertenece {c}?",
        "¿De qué continente forma parte {c}?",
        "¿En qué parte del mundo queda {c}?",
        "¿A qué parte del mundo pertenece {c}?",
        "¿Cuál es el continente de {c}?",
    ),
    ("en", "code"): (
        "What is the two-letter code of {c}?",
        "Which two letters stand for {c} in ISO 3166?",
        "How is {c} abbreviated to two letters?",
        "What is the ISO code of {c}?",
        "Which ISO code does {c} have?",
        "Which two-letter code does {c} use?",
    ),
    ("es", "code"): (
        "¿Cuál es el código de dos letras de {c}?",
        "¿Qué dos letras representan a {c} en la norma ISO 3166?",
        "¿Cómo se abrevia {c} con dos letras?",
        "¿Cuál es el código ISO de {c}?",
        "¿Qué código ISO tiene {c}?",
        "¿Qué código de dos letras usa {c}?",
    ),
}
_VALIDATION, _TEST = 4, 5

# {x} is the fact. Spanish currencies go without an article, for CLDR does not tell their gender.
_ANSWERS: dict[tuple[Language, Relation], tuple[str, ...]] = {
    ("en", "currency"): ("The currency of {c} is the {x}.", "{c} uses the {x}.", "It is the {x}.", "{x}."),
    ("es", "currency"): ("La moneda de {c} se llama {x}.", "En {c} la moneda se llama {x}.", "Se llama {x}.", "{x}."),
    ("en", "language"): ("The official language of {c} is {x}.", "In {c} it is {x}.", "It is {x}.", "{x}."),
    ("es", "language"): ("El idioma oficial de {c} es el {x}.", "En {c} es el {x}.", "Es el {x}.", "{x}."),
    ("en", "continent"): ("{c} belongs to {x}.", "{c} is in {x}.", "It is in {x}.", "{x}."),
    ("es", "continent"): ("{c} pertenece a {x}.", "{c} está en {x}.", "Está en {x}.", "{x}."),
    ("en", "code"): ("The code of {c} is {x}.", "{c} has the code {x}.", "It is {x}.", "{x}."),
    ("es", "code"): ("El código de {c} es {x}.", "{c} tiene el código {x}.", "Es {x}.", "{x}."),
}

_ARTICLES = {
    "en": {"DO": "the ", "GB": "the ", "GM": "the "},
    "es": {"DO": "la ", "GB": "el ", "VA": "la "},
}


class Primer(Source, kind="primer"):
    """Closed questions about countries: currency, official language, continent, ISO 3166 code. No file, no network.

    A row is a (language, relation, country, phrasing); the answer is written in one of `answer_styles`, drawn per
    row, and every style is an accepted reference. Countries are those with a single answer to each relation in CLDR,
    on the first of January 2025. Splits are its own: each fact is asked once in the test, in a phrasing that no
    training row has, and every other one in validation, in another such phrasing. A fifth of the facts are trained in
    one language and asked in the other: their tag ends in "new language", that of the others in "new phrasing".
    The key is the country, over all splits: rows of one country are alike, and are drawn together by the bootstrap.
    """

    own_splits: ClassVar[bool] = True

    languages: tuple[Language, ...] = Field(default=("en", "es"), min_length=1, description="languages of the questions")
    relations: tuple[Relation, ...] = Field(
        default=("currency", "language", "continent", "code"), min_length=1, description="what is asked about each country"
    )
    countries: int = Field(default=100, ge=1, description="at most so many countries")
    phrasings: int = Field(default=6, ge=3, le=6, description="ways to ask, one of them for validation and one for the test")
    answer_styles: int = Field(default=4, ge=1, le=4, description="ways to answer, from full sentence to bare fact")
    seed: int = Field(default=0, description="of the draw of countries, styles and held-out facts")

    @field_validator("languages", "relations")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"names something twice: {', '.join(names)}")
        return names

    @model_validator(mode="after")
    def _own_splits(self) -> "Primer":
        if self.splits != Splits():
            raise ValueError("primer splits by phrasing; leave splits out")
        return self

    def rows(self, skip: Skip | None = None) -> Iterator[Example]:
        for country in self._countries():
            for relation in self.relations:
                asked = self.languages[self._draw("asked", country, relation) % len(self.languages)]
                crossing = len(self.languages) > 1 and self._draw("crossing", country, relation) % 5 == 0
                validated = self._draw("validated", country, relation) % 2 == 0
                for language in self.languages:
                    if not (crossing and language == asked):
                        for phrasing in range(self.phrasings - 2):
                            yield self._row(language, relation, country, phrasing, "seen")
                kind = "new language" if crossing else "new phrasing"
                if validated:
                    yield self._row(asked, relation, country, _VALIDATION, kind)
                yield self._row(asked, relation, country, _TEST, kind)

    def split_of(self, example: Example) -> Split:
        language, relation = cast(Language, example.language), cast(Relation, example.tag.split("/")[0])
        name, questions = _name(language, example.key), _QUESTIONS[language, relation]
        if example.instruction == _sentence(questions[_TEST], name):
            return "test"
        return "validation" if example.instruction == _sentence(questions[_VALIDATION], name) else "train"

    def content_hash(self) -> str:
        return hash_of_made(self)

    def _row(self, language: Language, relation: Relation, country: str, phrasing: int, kind: str) -> Example:
        name, fact = _name(language, country), _facts(language, country)[relation]
        styles = [_sentence(style, name, fact) for style in _ANSWERS[language, relation][-self.answer_styles :]]
        response = styles[self._draw("style", language, relation, country, str(phrasing)) % len(styles)]
        return Example(
            key=country,
            instruction=_sentence(_QUESTIONS[language, relation][phrasing], name),
            response=response,
            references=with_first(response, tuple(styles)),
            language=language,
            tag=f"{relation}/{kind}",
        )

    def _countries(self) -> list[str]:
        """ISO codes, sorted; which ones, when there are more than asked for, depends on the seed."""
        return sorted(sorted(_facts_of_countries(), key=lambda country: self._draw("country", country))[: self.countries])

    def _draw(self, *parts: str) -> int:
        text = "/".join((str(self.seed), *parts))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _sentence(pattern: str, country: str, fact: str = "") -> str:
    text = pattern.format(c=country, x=fact).replace(" de el ", " del ").replace(" a el ", " al ")
    return text[0].upper() + text[1:]


def _name(language: Language, country: str) -> str:
    return _ARTICLES[language].get(country, "") + _facts_of_countries()[country][language]["name"]


def _facts(language: Language, country: str) -> dict[Relation, str]:
    """The answers in the words of a language."""
    facts = _facts_of_countries()[country][language]
    return {"currency": facts["currency"], "language": facts["language"], "continent": facts["continent"], "code": country}


@cache
def _facts_of_countries() -> dict[str, dict[Language, dict[str, str]]]:
    """By country and language: its name, currency, official language and continent; written by `tools/primer_facts.py`."""
    return json.loads(files("potstill.sources").joinpath("primer.json").read_text(encoding="utf-8"))["countries"]
