"""Whether a teacher reads rows as its student does: token by token, in the form of its own chat template."""

from collections.abc import Iterable
from typing import Literal

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, Pair, instruction_pairs
from potstill.edges.models import Tokenizer, form_of

TeacherReads = Literal["own", "student"]
AROUND = 4  # tokens shown before and after the place where two renderings part


def foreign_form(
    student: Tokenizer, teacher: Tokenizer, prompts: Prompts, rows: Iterable[Example], reads: TeacherReads, who: str
) -> str | None:
    """How the student's form of the rows differs from the teacher's own, in words; None where they are the same.

    Args:
        rows: those that both are to read.
        reads: with "student" a difference is returned, with "own" it is refused.
        who: the stage, for the message.

    Raises:
        UserError: the forms differ and `reads` is "own".
    """
    if form_of(student) == form_of(teacher):
        return None
    ours = Renderer(student, prompts)
    try:
        theirs = Renderer(teacher, prompts)
    except UserError as error:
        found: str | None = f"the teacher has no such form: {error}"
    else:
        differences = (difference(row_of(row, ours), row_of(row, theirs), ours, theirs) for row in rows)
        found = next((words for words in differences if words is not None), None)
    if found is not None and reads == "own":
        raise UserError(
            f"{who}: teacher and student read the rows in different forms: {found}; give both one chat template, or set "
            "teacher_reads = 'student' to let the teacher read the student's form, which it was not trained on"
        )
    return found


def row_of(row: Example, renderer: Renderer) -> Pair | str:
    """A row as a renderer gives it; where it leaves the row out, the reason."""
    counts = Counts()
    pairs = list(instruction_pairs([row], renderer, counts))
    return pairs[0] if pairs else ", ".join(counts.dropped)


def difference(ours: Pair | str, theirs: Pair | str, student: Renderer, teacher: Renderer) -> str | None:
    """Where two renderings of a row part, in words; None: nowhere, or the student does not read the row.

    Args:
        ours, theirs: the row, or why the renderer leaves it out.
    """
    if isinstance(ours, str) or ours == theirs:
        return None
    if isinstance(theirs, str):
        return f"the teacher's form leaves out a row that the student's form has: {theirs}"
    (mine, my_answer), (other, other_answer) = ours, theirs
    if len(mine) != len(other) and [*mine, *my_answer] == [*other, *other_answer]:
        return f"the answer begins at token {len(mine)} of the student's row and at token {len(other)} of the teacher's"
    part, a, b = ("prompt", mine, other) if mine != other else ("answer", my_answer, other_answer)
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shown = slice(max(0, at - AROUND), at + AROUND)
    words = (renderer.tokenizer.decode(ids[shown]) for renderer, ids in ((student, a), (teacher, b)))
    return "at token {} of the {} the student reads {!r} and the teacher {!r}".format(at, part, *words)
