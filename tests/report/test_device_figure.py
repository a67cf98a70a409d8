"""Names in the figure of exported files: near their points, over no other name and no other point."""

import re

import pytest

from potstill.report import figures
from potstill.report.figures import on_device


def report(places):
    """Of files at these places: memory in MB, tokens per second, and quality."""
    rows, files = [], []
    for n, (memory, rate, value) in enumerate(places):
        name = f"Model {n}"
        rows.append({"name": name, "role": "kd", "metrics": {"nll": {"value": value, "ci": None}}})
        one = {"name": name, "role": "kd", "type": ("f16", "q8_0", "q4_0")[n % 3], "latency": [{"tokens_per_s": rate}]}
        files.append(one | {"memory": {"resident_bytes": memory * 1e6, "file_bytes": memory * 1e6}})
    metric = {"name": "nll", "title": "NLL", "unit": "nats/token", "higher_is_better": False}
    return {"metrics": [metric], "primary": "nll", "rows": rows, "device": {"files": files}}


SIX = [(322, 38, 2.99), (196, 46, 2.99), (201, 61, 3.13), (290, 50, 3.4), (180, 52, 3.4), (184, 70, 3.5)]


ALIKE = [(324, 114, 89.6), (198, 145, 89.6), (278, 138, 78.1), (171, 185, 78.1), (176, 241, 78.1), (176, 247, 74.5)]


@pytest.mark.parametrize(
    "places", [SIX, [(200 + n, 40 + n / 4, 3.0) for n in range(6)], ALIKE], ids=["apart", "crowded", "alike"]
)
def test_no_name_covers_another_or_a_point(places, monkeypatch):
    seen = []
    keep = figures._svg

    def looked_at(figure, *words):
        """The whole figure as it will lie on the page."""
        drawn = keep(figure, *words)
        for axis in figure.axes:
            for text in axis.texts:
                text.arrow_patch = text.arrowprops = None  # the line to its point is no part of a name
            boxes = [text.get_window_extent() for text in axis.texts]
            marks = [axis.transData.transform(line.get_xydata()[0]) for line in axis.lines]
            assert len(boxes) == len(marks) == len(places)
            for n, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[n + 1 :])
                assert not any(box.contains(*mark) for mark in marks)
            seen.append(axis)
        return drawn

    monkeypatch.setattr(figures, "_svg", looked_at)
    drawn = on_device(report(places))
    assert len(seen) == 2
    assert drawn.count("<svg") == 1
    for words in ("NLL, nats/token (lower is better) against memory", "resident memory, MB", "tokens per second"):
        assert words in re.sub(r"<!--.*?-->", "", drawn, flags=re.S)
    assert drawn == on_device(report(places))
