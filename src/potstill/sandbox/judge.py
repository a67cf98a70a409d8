"""From how a run ended to what it is worth. Only what the parent saw counts: no word of a program is its own verdict."""

import signal as signals

from potstill.sandbox.backend import Backend, Ended, Job
from potstill.sandbox.verdict import Limits, Verdict

NEAR_LIMIT = 0.8  # share of the time from which load could have decided
_SHOWN = 60  # characters of a line in a reason
_REASON = 400


def case_verdict(backend: Backend, program: str, stdin: str, expected: str, limits: Limits) -> Verdict:
    """Judge a program by what it prints: status 0 and equal text is a pass.

    Args:
        backend: where the program runs.
        program: source; runs as `__main__`.
        stdin: what it reads.
        expected: what it must print; it stays in this process.
        limits: of the run.
    """
    if any("\ud800" <= character <= "\udfff" for character in program):
        return Verdict("crash", "the program is no text: it holds half of a character", 0.0)
    ended = backend.run(Job(program=program, stdin=stdin.encode("utf-8", "surrogatepass")), limits)
    verdict = limit_verdict(ended, limits) or status_verdict(ended)
    if verdict is not None:
        return verdict
    difference = difference_of(ended.stdout, expected)
    return Verdict("fail", difference, ended.wall_s) if difference else Verdict("pass", "", ended.wall_s)


def limit_verdict(ended: Ended, limits: Limits) -> Verdict | None:
    """The verdict on a run that did not begin or did not end of itself; None where it did."""
    if ended.trouble or not ended.started:
        return abstained(ended, ended.trouble or "the program did not start")
    if ended.denied:
        return Verdict("denied", clipped(f"ended for the system call {ended.denied}"), ended.wall_s)
    match ended.limit:
        case "timeout":
            return Verdict("timeout", f"ran longer than {limits.time_s:g} s", ended.wall_s)
        case "memory":
            return Verdict("memory", f"needed more than {limits.memory_mb} MiB", ended.wall_s)
        case "output_limit":
            return Verdict("output_limit", f"printed more than {limits.stdout_kb} KiB", ended.wall_s)
    return None


def status_verdict(ended: Ended) -> Verdict | None:
    """The verdict on a run that ended with a signal or a status other than 0; None for status 0."""
    if ended.signal is not None:
        return Verdict("crash", f"ended by {_signal_name(ended.signal)}", ended.wall_s)
    if ended.status is None:
        return abstained(ended, "the sandbox did not say how the program ended")
    if ended.status == 0:
        return None
    words = _last_line(ended.stderr)
    return Verdict("crash", clipped(f"status {ended.status}" + (f": {shown(words)}" if words else "")), ended.wall_s)


def abstained(ended: Ended, why: str) -> Verdict:
    """No score: the sandbox failed, not the program."""
    return Verdict("abstain", clipped(f"sandbox: {why}"), ended.wall_s)


def difference_of(stdout: bytes, expected: str) -> str:
    """The first difference in one line, "" where the texts are equal.

    Blanks at the ends of lines and one last line break do not count.
    """
    try:
        printed = stdout.decode("utf-8")
    except UnicodeDecodeError as error:
        line = stdout.count(b"\n", 0, error.start) + 1
        return f"line {line}: printed bytes that are not UTF-8"
    got, wanted = lines_of(printed), lines_of(expected)
    if got == [""] and wanted != [""]:
        return f"line 1: expected {shown(wanted[0])}, printed nothing"
    for number, (one, other) in enumerate(zip(got, wanted, strict=False), 1):
        if one != other:
            start = _first_difference(one, other)
            return f"line {number}: expected {shown(other, start)}, printed {shown(one, start)}"
    if len(got) < len(wanted):
        return f"line {len(got) + 1}: expected {shown(wanted[len(got)])}, printed nothing"
    if len(got) > len(wanted):
        return f"line {len(wanted) + 1}: expected nothing more, printed {shown(got[len(wanted)])}"
    return ""


def lines_of(text: str) -> list[str]:
    """The lines that are compared."""
    lines = [line.rstrip(" \t\r\f\v") for line in text.split("\n")]
    return lines[:-1] if len(lines) > 1 and not lines[-1] else lines


def shown(text: str, start: int = 0) -> str:
    """A quoted piece of a text around `start`, with control characters made visible."""
    begin = max(0, start - _SHOWN // 2) if start > _SHOWN // 2 and len(text) > _SHOWN else 0
    piece = text[begin : begin + _SHOWN]
    return f"{'…' if begin else ''}{piece!r}{'…' if begin + len(piece) < len(text) else ''}"


def clipped(reason: str) -> str:
    """One line of bounded length without control characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in reason)
    return line if len(line) <= _REASON else f"{line[: _REASON - 1]}…"


def _first_difference(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"
