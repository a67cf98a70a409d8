"""Whether a broken program was repaired."""

from typing import ClassVar

from potstill.metrics.pass_at_1 import PassAt1


class Repaired(PassAt1, kind="repaired"):
    """100 when the repaired program runs and passes all of its row's tests in the sandbox, else 0.

    The figure of `pass_at_1` under the name that repairs have. Rows without tests are abstained from: of `bugnet` those without
    an input and output, of `debugbench` those whose examples are no plain values.
    """

    title: ClassVar[str] = "Repaired"
