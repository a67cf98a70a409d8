"""The few nouns that several rooms share."""

from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: who speaks.
        content: what is said; may be empty beside tool calls.
        reasoning: what an assistant thought before, where the row keeps it apart from the content.
        tool_calls: of an assistant, in OpenAI's form: {"type": "function", "function": {"name", "arguments"}}.
        name: of the tool that a result is of.
        tool_call_id: of the call that a result is of.
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True)
class Case:
    """A program reads `stdin` and must print `expected`; blanks at the ends of lines and a last line break do not count."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class Tests:
    """How a row's program is judged: by cases, or by asserts about what it defines.

    Attributes:
        asserts: Python statements that a judge runs; what they call runs where the program is.
        before: Python that is put before the program, such as the imports that a data set takes for granted.
    """

    cases: tuple[Case, ...] = ()
    asserts: str = ""
    before: str = ""


@dataclass(frozen=True)
class Example:
    """One row: what is asked, what may be shortened, what is answered.

    Attributes:
        key: rows with equal keys are kin: they fall into the same split (but for sources with splits of their own), and the
            bootstrap draws them together. Equal means equal but for Unicode composition, case and white space.
        instruction: the last user turn without its context; never shortened.
        response: the target text; an end-of-turn marker at its end is taken off when it becomes tokens.
        context: supporting text shown with the instruction; shortened first when the row is too long.
        references: every accepted answer, `response` among them; scored by the best.
        history: earlier turns of the conversation, oldest first.
        language: ISO 639-1 code; decides, for one, whether Rouge stems. Empty where the row names none: its source
            then tells it from the rows. "und" where the rows do not tell either.
        tag: a group for breakdowns in the report, such as the category or the phrasing.
        weight: what each of its response tokens counts in a training loss; evaluation counts all rows alike.
        reasoning: what the assistant thought before the response, where the row keeps it apart.
        tool_calls: the assistant's calls after the response; see `Turn`.
        since: turns between the instruction and the answer: an assistant's tool calls and their results.
        tools: descriptions of the tools on offer, as the chat template takes them.
        tests: how a program that answers the row is judged; None where no program is asked for.
    """

    key: str
    instruction: str
    response: str
    context: str = ""
    references: tuple[str, ...] = ()
    history: tuple[Turn, ...] = field(default=())
    language: str = ""
    tag: str = ""
    weight: float = 1.0
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    since: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    tests: Tests | None = None

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", (self.response,))


@dataclass(frozen=True)
class Abstain:
    """A score that could not be given, and why; never counted as zero."""

    reason: str
