"""Which models a study compares, and by which question."""

from dataclasses import dataclass

from potstill.study.records import ModelRow, Study
from potstill.study.words import bits_in_words


@dataclass(frozen=True)
class Question:
    """One comparison of two models: a − b, or for `retention` a ÷ b."""

    key: str
    question: str
    a: ModelRow
    b: ModelRow
    cut: bool = False  # whether a was cut out of a larger model before it was trained


ABOUT_TEACHER = ("teacher_over_sft", "retention")
COMPARED = "compared"  # the key of questions about models that nothing is known of but their scores


def questions(study: Study) -> list[Question]:
    """The questions that the study names, else all that its roles allow; the headline's own first.

    Whether there was anything to teach is asked in any case: verdicts on distilled models rest on it.
    """
    asked = _of_roles(study)
    if not study.compare:
        return asked
    known = {(one.a.name, one.b.name): one for one in asked if one.key != "retention"}
    named = [known.get((a, b)) or _pair(study.row(a), study.row(b)) for a, b in study.compare]
    return named + [one for one in asked if one.key in ABOUT_TEACHER and one not in named]


def _pair(a: ModelRow, b: ModelRow) -> Question:
    return Question(COMPARED, f"{a.name} against {b.name}", a, b)


def _of_roles(study: Study) -> list[Question]:
    kd, sft, base = (study.with_role(role) for role in ("kd", "sft", "base"))
    quantized, rtn = study.with_role("quantized"), study.with_role("rtn")
    asked = [Question("kd_over_sft", "KD over SFT", a, b) for a in kd for b in sft]
    asked += _of_rewarded(study)
    asked += _of_the_teacher(study)
    for row in quantized:
        source = source_of(study, row)
        if source is not None:
            asked.append(Question("quantized", f"{bits_in_words(row.bits)} against full precision", row, source))
    asked += [_pair(row, other) for row in quantized for other in quantized if began_as(row, other)]  # healed and not
    for row in quantized:
        if row.trained or any(other.name == row.equals for other in quantized):
            continue  # healed: what it gained over rounding is not GPTQ's alone; or not, and the same as another one
        rivals = [other for other in rtn if of_one_model(study, other, row)]
        asked += [Question("gptq_over_rtn", "GPTQ against round-to-nearest", row, other) for other in rivals[:1]]
    asked += [
        Question("sft_over_base", "SFT over base", a, b, cut=was_cut(a) and not began_as(a, b)) for a in sft for b in base
    ]
    asked += _of_candidates(study)
    for row in (*kd, *sft, *quantized, *study.with_role("candidate")):
        full = source_of(study, row) if row.role == "quantized" else row
        teacher = study.teacher_of(full) if full is not None else None
        if teacher is not None and teacher is not full and teacher.role != "start":
            asked.append(Question("retention", "Share of the teacher kept", row, teacher))
    return asked


def _of_rewarded(study: Study) -> list[Question]:
    """Each model that learned from rewards with its start and with each control; then what these controls gained."""
    rl, sft, starts = (study.with_role(role) for role in ("rl", "sft", "start"))
    begun = [(a, b) for a in rl for b in starts if may_begin_as(a, b)]
    begun += [(a, b) for a in rl for b in study.with_role("base") if began_as(a, b)]
    asked = [Question("rl_over_start", "RL over its start", a, b) for a, b in begun]
    asked += [Question("rl_over_sft", "RL over SFT", a, b) for a in rl for b in sft]
    return asked + [Question("sft_over_start", "SFT over its start", a, b) for a in sft for b in starts if may_begin_as(a, b)]


def _of_the_teacher(study: Study) -> list[Question]:
    """Each teacher with each control: whether there was anything to teach."""
    teachers = {teacher.name: teacher for row in study.with_role("kd") if (teacher := study.teacher_of(row)) is not None}
    sft = study.with_role("sft")
    return [
        Question("teacher_over_sft", "Teacher over SFT", teacher, b)
        for teacher in teachers.values()
        for b in sft
        if b is not teacher
    ]


def _of_candidates(study: Study) -> list[Question]:
    """Each pair of base, candidates and teacher, the later one against the earlier; none where students were trained."""
    given = study.with_role("base", "candidate", "teacher")
    if not study.with_role("candidate") and study.with_role("kd", "sft", "rl", "quantized", "rtn"):
        return []
    return [_pair(a, b) for number, b in enumerate(given) for a in given[number + 1 :]]


def source_of(study: Study, row: ModelRow) -> ModelRow | None:
    """The measured model that a quantised row came from; None where it was not measured.

    Of a row that does not say what it was made from: the longest name that begins its own, else KD, else RL, else SFT.
    """
    full = study.with_role("kd", "rl", "sft", "base", "start", "candidate", "other", "teacher")
    if row.source is not None or row.made_from:
        return next((other for other in study.rows if other.name == row.source), None)
    begun = [other for other in full if row.name.startswith(other.name)]
    if begun:
        return max(begun, key=lambda other: len(other.name))
    return full[0] if full and full[0].role != "teacher" else None


def of_one_model(study: Study, a: ModelRow, b: ModelRow) -> bool:
    """Whether two quantised rows came from the same model, measured or not."""
    source = source_of(study, a)
    return source is source_of(study, b) and (source is not None or a.made_from == b.made_from)


def was_cut(row: ModelRow) -> bool:
    """Whether training began from a part of a larger model."""
    return any(one.init != "none" for one in row.trained or ())


def began_as(row: ModelRow, other: ModelRow) -> bool:
    """Whether training of a row began with another row, whatever that one was cut from."""
    return bool(row.trained) and all(one.start == other.model for one in row.trained or ())


def may_begin_as(row: ModelRow, other: ModelRow) -> bool:
    """Whether training of a row began with another row, as far as anyone knows."""
    return not row.trained or began_as(row, other)


def about_teacher(question: Question) -> bool:
    """Whether a question compares a model with its teacher; no metric that is a distance to the teacher can answer it."""
    compared = question.key == COMPARED and "teacher" in (question.a.role, question.b.role)
    return compared or question.key in ABOUT_TEACHER
