"""Which models a study compares, and by which question."""

from dataclasses import dataclass

from potstill.study.records import ModelRow, Study


@dataclass(frozen=True)
class Question:
    key: str
    question: str
    a: ModelRow
    b: ModelRow


def questions(study: Study) -> list[Question]:
    kd, sft, base, teacher = (study.with_role(role) for role in ("kd", "sft", "base", "teacher"))
    quantized, rtn = study.with_role("quantized"), study.with_role("rtn")
    questions = [Question("kd_over_sft", "KD over SFT", a, b) for a in kd for b in sft]
    for row in quantized:
        source = source_of(study, row)
        if source is not None:
            questions.append(Question("four_bits", "4 bits against full precision", row, source))
    for row in quantized:
        rivals = [other for other in rtn if source_of(study, other) is source_of(study, row)]
        for other in rivals[:1] or rtn[:1]:
            questions.append(Question("gptq_over_rtn", "GPTQ against round-to-nearest", row, other))
    questions += [Question("sft_over_base", "SFT over base", a, b) for a in sft for b in base]
    students = [*kd, *sft, *quantized]
    return questions + [Question("retention", "Share of the teacher kept", row, teacher[0]) for row in students if teacher]


def source_of(study: Study, row: ModelRow) -> ModelRow | None:
    """The model that a quantised row came from: as told, else the longest name that begins its own, else KD, else SFT."""
    full = study.with_role("kd", "sft", "base", "other", "teacher")
    if row.source is not None:
        return next((other for other in study.rows if other.name == row.source), None)
    begun = [other for other in full if row.name.startswith(other.name)]
    if begun:
        return max(begun, key=lambda other: len(other.name))
    return full[0] if full and full[0].role != "teacher" else None
