"""Grade-school mathematics with worked steps."""

import re

from pydantic import Field

from potstill.core.errors import UserError
from potstill.core.types import Example
from potstill.sources._cells import Row, text
from potstill.sources._published import Published
from potstill.sources._survey import asked_key

_CALCULATION = re.compile(r"<<[^<>]*>>")


class Gsm8k(Published, kind="gsm8k"):
    """Word problems; the answer works in steps, and `#### 42` ends it. Cobbe et al., arXiv:2110.14168; MIT.

    From the hub, or from `path` with the same rows (`question, answer`) as JSON lines. Split by question. The metric and the
    reward `answer` read the number after `####`. The data set's own test rows are `split = "test"` of the hub, or a file of
    their own, with `splits = { validation = 0, test = 1 }`.
    """

    hub: str = Field(default="openai/gsm8k", min_length=1, description="name of the data set on the hub")
    subset: str | None = Field(default="main", min_length=1, description="the data set's configuration")
    calculations: bool = Field(default=False, description="keep the data set's marks for a calculator, such as <<48/2=24>>")
    think: bool = Field(default=False, description="write the steps inside <think> and the number inside <answer>")

    def keyed_by_question(self) -> bool:
        return True

    def example(self, row: Row, place: str) -> Example:
        question, answer = text(row, "question", place), text(row, "answer", place)
        worked = answer if self.calculations else _CALCULATION.sub("", answer)
        return Example(
            key=asked_key(question),
            instruction=question,
            response=self._thought(worked, place) if self.think and worked.strip() else worked,
            language="en",
        )

    def _thought(self, worked: str, place: str) -> str:
        steps, marked, final = worked.rpartition("####")
        if not marked:
            raise UserError(f"{place}: column 'answer' has no `####` before its number; leave data.think out for such rows")
        return f"<think>\n{steps.strip()}\n</think>\n<answer>\n{final.strip()}\n</answer>"
