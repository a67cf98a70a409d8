"""The parts of an answer that thinks before it answers: `<think>…</think>` and `<answer>…</answer>`."""

from dataclasses import dataclass

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
OPEN, CLOSE, ANSWER, END = TAGS


@dataclass(frozen=True)
class Parts:
    """What stands between the tags, without outer white space."""

    thought: str
    answer: str


def strict(text: str) -> Parts | None:
    """The parts of a text that has the whole format, else None.

    The format: `<think>` thought `</think>` `<answer>` answer `</answer>`, each tag once, in this order, nothing but white
    space outside of them, neither part empty. DeepSeek-AI, arXiv:2501.12948.
    """
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    outside, _, rest = text.partition(OPEN)
    thought, _, rest = rest.partition(CLOSE)
    between, _, rest = rest.partition(ANSWER)
    answer, _, after = rest.partition(END)
    in_order = text.find(OPEN) < text.find(CLOSE) < text.find(ANSWER) < text.find(END)
    if not in_order or outside.strip() or between.strip() or after.strip() or not thought.strip() or not answer.strip():
        return None
    return Parts(thought.strip(), answer.strip())


def tags_in_place(text: str) -> int:
    """How many of the four tags stand exactly once and before none of the tags that belong before them; 0 to 4."""
    at = {tag: text.find(tag) for tag in TAGS if text.count(tag) == 1}
    right, reached = 0, -1
    for tag in TAGS:
        if at.get(tag, -1) > reached:
            right, reached = right + 1, at[tag]
    return right


def thought_of(text: str) -> str:
    """What was thought: up to the last `</think>`, from the first `<think>` before it or from the start.

    A thought that never ends goes on to the end of the text; a text without either tag holds no thought.
    """
    before, closed, _ = text.rpartition(CLOSE)
    if closed:
        _, opened, inside = before.partition(OPEN)
        return (inside if opened else before).strip()
    return text.partition(OPEN)[2].strip()


def answer_of(text: str) -> str:
    """What was answered: what follows the last `</think>`, and of it what is inside the last `<answer>`.

    A text that opens a thought and never ends it has no answer: it was cut while it thought. A text without tags is all
    answer; an `<answer>` that never ends goes on to the end of the text.
    """
    _, _, after = text.rpartition(CLOSE)
    if OPEN in after:
        return ""
    _, opened, inside = after.rpartition(ANSWER)
    return (inside.partition(END)[0] if opened else after.partition(END)[0]).strip()
