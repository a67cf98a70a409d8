"""The report's figures: matplotlib drawings as inline SVG that takes its colours from the page, light or dark.

Text stays text and every colour is a CSS variable, so that one drawing serves both themes. The same report always
gives the same bytes.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from potstill.core.numbers import estimate, number, size
from potstill.study.programs import OUTCOMES

Report = Mapping[str, Any]

# Drawn with these stand-ins, then replaced; nothing else in a figure has such a colour.
_INK = {"#010203": "var(--ink)", "#010204": "var(--muted)", "#010205": "var(--line)", "#010206": "var(--page)"}
_ROLES = ("base", "start", "sft", "kd", "rl", "quantized", "rtn", "teacher", "candidate", "other")
_STEPS = 7  # of the ramp from --step0 to --step6, which the page defines for both themes
_VARIABLES = {
    **_INK,
    **{f"#0102{16 + i:02x}": f"var(--{role})" for i, role in enumerate(_ROLES)},
    **{f"#0104{16 + i:02x}": f"var(--{kind.replace('_', '-')})" for i, kind in enumerate(OUTCOMES)},
    **{f"#0103{16 + i:02x}": f"var(--step{i})" for i in range(_STEPS)},
}
_MARKERS = "os^Dv<>"
INK, MUTED, LINE, PAGE = _INK
_WIDTH = 11.0  # inches; the SVG is scaled to its column


def colour(role: str) -> str:
    """The stand-in for a role's colour."""
    return f"#0102{16 + (_ROLES.index(role) if role in _ROLES else len(_ROLES) - 1):02x}"


def intervals(report: Report) -> str:
    """One panel per metric: each model's value and its 95% interval."""
    metrics = [m for m in report["metrics"] if any(m["name"] in row["metrics"] for row in report["rows"])]
    rows = report["rows"]
    if not metrics or not rows:
        return ""
    per_line = min(2, len(metrics))
    lines = -(-len(metrics) // per_line)
    with _figure(_WIDTH, lines * (0.9 + 0.3 * len(rows)), lines, per_line) as (figure, axes):
        for axis, metric in zip(axes, metrics, strict=False):
            for y, row in enumerate(rows):
                found = row["metrics"].get(metric["name"])
                if found is None or found["value"] is None:
                    continue
                ink = colour(row["role"])
                if found["ci"]:
                    axis.plot(found["ci"], [y, y], color=ink, linewidth=2.2, solid_capstyle="round")
                axis.plot([found["value"]], [y], "o", color=ink, markersize=6, markeredgecolor=PAGE, markeredgewidth=0.8)
            axis.set_yticks(range(len(rows)), [_short(row["name"]) for row in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.margins(x=0.08)
            better = "higher is better" if metric["higher_is_better"] else "lower is better"
            unit = f", {_short(metric['unit'])}" if metric["unit"] else ""
            axis.set_title(f"{_short(metric['title'])}{unit} ({better})", loc="left")
            axis.grid(axis="x")
            axis.tick_params(axis="y", length=0)
        for axis in axes[len(metrics) :]:
            axis.set_visible(False)
        for k, axis in enumerate(axes):
            if k % per_line:
                axis.set_yticklabels([])
        primary = next(m for m in report["metrics"] if m["name"] == report["primary"])
        description = "; ".join(
            f"{row['name']} {estimate(found['value'], found['ci'], primary['unit'])}"
            for row in rows
            if (found := row["metrics"].get(primary["name"]))
        )
        return _svg(figure, "intervals", f"Values with 95% intervals. {primary['title']}: {description}.")


def learning_curves(report: Report) -> str:
    """Loss and validation scores by epoch, thin per seed and thick their mean; the teacher as a dashed line (figure 3)."""
    curves = [curve for curve in report["curves"] if curve.get("points")]
    primary = next(m for m in report["metrics"] if m["name"] == report["primary"])
    drawn = [curve for curve in curves if curve.get("role") != "teacher"] or curves
    titles = _curve_titles(report)
    elsewhere = (_ON_ANSWERS, _ON_REFERENCES) if _has(drawn, _ON_ANSWERS) else ()  # see `own_answers`
    panels = [name for name in _curve_names(drawn, f"{_VALIDATION}{primary['name']}") if name not in elsewhere]
    if not panels:
        return ""
    inks = _inks(report)
    with _panels(len(panels)) as (figure, axes):
        for axis, name in zip(axes, panels, strict=True):
            for model in dict.fromkeys(curve["name"] for curve in drawn):
                own = [curve for curve in curves if curve["name"] == model]
                _draw(axis, [_points(curve, name) for curve in own], inks[model], label=_short(model))
            teacher = _teacher(report, curves, name)
            if teacher is not None:
                axis.axhline(teacher[0], color=colour("teacher"), linewidth=1.3, linestyle=(0, (5, 3)), label=teacher[1])
            axis.set_title(titles.get(name, name.replace("_", " ")), loc="left")
            axis.set_xlabel("epoch")
            axis.grid(axis="y")
        _legend(figure, axes)
        return _svg(figure, "curves", "Training loss and validation scores by epoch, one line per model.")


_VALIDATION = "validation_"  # begins the name of each figure that was taken on validation rows
_ON_ANSWERS, _ON_REFERENCES = f"{_VALIDATION}kl_on_answers", f"{_VALIDATION}kl_to_teacher"
_OWN = (  # title; what is drawn solid, by the first name that a curve has; what is drawn dashed
    ("Divergence in training, nats/token", ("samples_divergence", "samples_reverse_kl"), "divergence"),
    ("KL to teacher, validation, nats/token", (_ON_ANSWERS,), _ON_REFERENCES),
    ("Length of own answers, tokens", ("samples_length",), ""),
    ("Own answers that were cut, share", ("samples_cut",), ""),
    ("Surprisal of own tokens, nats/token", ("samples_ce", "samples_nll"), ""),
    ("Writing against training, nats/token", ("samples_gap",), ""),
)


def own_answers(report: Report) -> str:
    """What models did on answers of their own, by step: thin per seed, thick their mean; nothing where none wrote."""
    written = [curve for curve in report["curves"] if not _has([curve], f"{_REWARD}total")]  # those others: see `rewards`
    curves = [curve for curve in written if any(_has([curve], name) for _, names, _ in _OWN for name in names)]
    panels = [panel for panel in _OWN if any(_has(curves, name) for name in panel[1])]
    if not panels:
        return ""
    inks = _inks(report)
    with _panels(len(panels)) as (figure, axes):
        for axis, (title, names, dashed) in zip(axes, panels, strict=True):
            for model in dict.fromkeys(curve["name"] for curve in curves):
                own = [curve for curve in curves if curve["name"] == model]
                name = next((name for name in names if _has(own, name)), None)
                if name is None:
                    continue
                _draw(axis, [_points(curve, name, "step") for curve in own], inks[model], label=_short(model))
                if dashed:
                    _draw(axis, [_points(curve, dashed, "step") for curve in own], inks[model], dashed=True)
            axis.set_title(title, loc="left")
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
            axis.grid(axis="y")
        _legend(figure, axes)
        return _svg(figure, "own", "Figures of models on answers that they wrote themselves, by step, one line per model.")


_REWARD = "samples_reward_"  # begins the name of each reward's mean
_REWARDED = (  # title, and the first name that a curve has, of what stands beside the rewards
    ("KL to where it began, nats/token", ("samples_kl_exact", "samples_kl")),
    ("Length of answers, tokens", ("samples_length",)),
    ("Answers that were cut, share", ("samples_cut",)),
    ("Entropy of own tokens, nats", ("samples_entropy",)),
    ("Groups without signal, share", ("samples_silent",)),
    ("KL to the teacher, nats/token", ("samples_reverse_kl", "samples_divergence")),
    ("Writing against training, nats/token", ("samples_gap",)),
)


def rewards(report: Report) -> str:
    """Each reward's mean over a round's answers, the KL to the reference, length, what else there is: by step (figure 5)."""
    curves = [curve for curve in report["curves"] if _has([curve], f"{_REWARD}total")]
    names = dict.fromkeys(name for curve in curves for point in curve["points"] for name in point if name.startswith(_REWARD))
    order = sorted(names, key=lambda name: name != f"{_REWARD}total")
    panels = [(_reward_title(name), (name,)) for name in order]
    panels += [panel for panel in _REWARDED if any(_has(curves, name) for name in panel[1])]
    if not curves:
        return ""
    inks = _inks(report)
    with _panels(len(panels)) as (figure, axes):
        for axis, (title, candidates) in zip(axes, panels, strict=True):
            for model in dict.fromkeys(curve["name"] for curve in curves):
                own = [curve for curve in curves if curve["name"] == model]
                name = next((name for name in candidates if _has(own, name)), None)
                if name is not None:
                    _draw(axis, [_points(curve, name, "step") for curve in own], inks[model], label=_short(model))
            axis.set_title(title, loc="left")
            axis.set_xlabel("step")
            axis.grid(axis="y")
        _legend(figure, axes)
        return _svg(figure, "rewards", "Rewards of models' own answers and KL to the reference, by step, one line per model.")


def outcomes(report: Report) -> str:
    """How each model's programs ended: a bar of shares for each, a panel for each metric that ran some."""
    metrics = list(dict.fromkeys(tally["metric"] for tally in report["outcomes"]))
    if not metrics:
        return ""
    lines = [[tally for tally in report["outcomes"] if tally["metric"] == metric] for metric in metrics]
    most = max(map(len, lines))
    with _figure(_WIDTH, 0.9 + len(metrics) * (0.7 + 0.36 * most), len(metrics), 1) as (figure, axes):
        for axis, tallies in zip(axes, lines, strict=True):
            for y, tally in enumerate(tallies):
                left = 0.0
                for number_, kind in enumerate(OUTCOMES):
                    share = 100 * tally["counts"].get(kind, 0) / max(1, tally["programs"])
                    if share:
                        ink = f"#0104{16 + number_:02x}"
                        axis.barh(y, share, left=left, height=0.66, color=ink, edgecolor=PAGE, label=kind.replace("_", " "))
                    left += share
            axis.set_yticks(range(len(tallies)), [_short(tally["name"]) for tally in tallies])
            axis.set_ylim(len(tallies) - 0.5, -0.5)
            axis.set_xlim(0, 100)
            axis.set_title(f"{_short(tallies[0]['title'])}: how programs ended, % of {_programs(tallies)}", loc="left")
            axis.tick_params(axis="y", length=0)
        order = [kind.replace("_", " ") for kind in OUTCOMES]
        named = {label: bar for axis in axes for bar, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        labels = sorted(named, key=order.index)
        figure.legend([named[label] for label in labels], labels, loc="outside lower center", ncols=min(6, len(labels)))
        passed = "; ".join(f"{t['name']} {t['counts'].get('pass', 0)} of {t['programs']}" for t in lines[0])
        return _svg(figure, "outcomes", f"How programs of answers ended, in per cent. Passed: {passed}.")


def _programs(tallies: Sequence[Mapping[str, Any]]) -> str:
    counts = {tally["programs"] for tally in tallies}
    return f"{counts.pop():,} programs" if len(counts) == 1 else "a model's programs"


def _reward_title(name: str) -> str:
    kind = name.removeprefix(_REWARD)
    return "Reward, all together" if kind == "total" else f"Reward: {_short(kind.replace('_', ' '))}"


def _has(curves: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(point.get(name) is not None for curve in curves for point in curve["points"])


@dataclass(frozen=True)
class _Ink:
    colour: str
    marker: str = "o"


_SPARE = (6, 0, 3, 5, 1)  # of the ramp, far from one another


def _inks(report: Report) -> dict[str, _Ink]:
    """How each model's curves are drawn: in its role's colour; others of the same role in colours of the ramp."""
    inks: dict[str, _Ink] = {}
    taken: set[str] = set()
    spare = 0
    for curve in report["curves"]:
        name, role = curve["name"], curve.get("role", "other")
        if name in inks:
            continue
        if role not in taken:
            inks[name] = _Ink(colour(role))
        else:
            inks[name] = _Ink(_ramp(_SPARE[spare % len(_SPARE)]), _MARKERS[1 + spare % (len(_MARKERS) - 1)])
            spare += 1
        taken.add(role)
    return inks


def _draw(axis: Any, lines: Sequence[list[tuple[float, float]]], ink: _Ink, label: str = "", *, dashed: bool = False) -> None:
    """One model's line: thin per seed where there are several, thick their mean."""
    lines = [points for points in lines if points]
    if not lines:
        return
    style: dict[str, Any] = {"linestyle": (0, (4, 2))} if dashed else {}
    for points in lines if len(lines) > 1 else ():
        axis.plot(*zip(*points, strict=True), color=ink.colour, linewidth=0.8, alpha=0.45, **style)
    mean = _mean_curve(lines)
    style |= {"marker": ink.marker, "markersize": 3.5} if len(mean) <= 40 else {}
    style |= {"label": label} if label else {}
    axis.plot(*zip(*mean, strict=True), color=ink.colour, linewidth=1.5 if dashed else 2.2, **style)


def _panels(count: int) -> AbstractContextManager[tuple[Any, list[Any]]]:
    """A figure of so many panels, at most three beside one another."""
    columns = count if count <= 3 else 2 if count == 4 else 3
    return _figure(_WIDTH, 3.0 * -(-count // columns), -(-count // columns), columns, count)


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """Each name once, beneath all panels; in several lines where the names are many."""
    named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(5, len(named)))


def _curve_titles(report: Report) -> dict[str, str]:
    """Titles of the figures that were followed, as far as they are known: metrics of the study, and what sweeps picked by."""
    titles = {f"{_VALIDATION}{m['name']}": m["title"] for m in report["metrics"]}
    titles |= {sweep["by"]: sweep["title"] for sweep in report["sweeps"]}
    return {"loss": "Training loss", **{name: f"{_short(title)} on the validation rows" for name, title in titles.items()}}


def _curve_names(curves: Sequence[Mapping[str, Any]], first: str) -> list[str]:
    """The loss, then every figure on validation rows that some curve has, `first` before the others."""
    found = dict.fromkeys(name for curve in curves for point in curve["points"] for name in point)
    validated = sorted(name for name in found if name.startswith(_VALIDATION))
    names = dict.fromkeys(["loss", first, *validated])
    return [name for name in names if any(_points(curve, name) for curve in curves)]


def sweep_curves(report: Report, sweep: Mapping[str, Any], ident: str) -> str:
    """Loss and validation scores by epoch, a line for each value tried (figure 2): thin per seed, thick their mean."""
    candidates = sweep["candidates"]
    titles = _curve_titles(report)
    panels = _curve_names([curve for candidate in candidates for curve in candidate["curves"]], sweep["by"])
    if not panels:
        return ""
    with _panels(len(panels)) as (figure, axes):
        for axis, name in zip(axes, panels, strict=True):
            for at, candidate in enumerate(candidates):
                lines = [points for curve in candidate["curves"] if (points := _points(curve, name))]
                if not lines:
                    continue
                chosen = at == sweep["chosen"]
                ink = _step(at, len(candidates))
                for points in lines if len(lines) > 1 else ():
                    axis.plot(*zip(*points, strict=True), color=ink, linewidth=0.7, alpha=0.4)
                mean = _mean_curve(lines)
                # shapes tell values apart without colours; on a noisy loss they would only be in the way
                style = {"marker": _MARKERS[at % len(_MARKERS)], "markersize": 4.5} if name != "loss" else {}
                label = _short(candidate["label"]) + (" (picked)" if chosen else "")
                width, above = (2.8, 4) if chosen else (1.5, 3)
                axis.plot(*zip(*mean, strict=True), color=ink, linewidth=width, zorder=above, label=label, **style)
                if chosen:
                    ring = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.2}
                    axis.plot(*mean[-1], "o", zorder=5, clip_on=False, **ring)
            axis.set_title(titles.get(name, name.replace("_", " ")), loc="left")
            axis.set_xlabel("epoch")
            axis.grid(axis="y")
        named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        title = _short(" and ".join(sweep["fields"]))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(6, len(named)), title=title)
        description = "; ".join(f"{candidate['label']} {number(candidate['mean'], 2)}" for candidate in candidates)
        chosen = candidates[sweep["chosen"]]["label"]
        about = f"{sweep['name']}: loss and validation scores by epoch, one line per value of {' and '.join(sweep['fields'])}."
        return _svg(figure, ident, f"{about} {sweep['by'].replace('_', ' ')} at the end: {description}. Picked: {chosen}.")


def _step(at: int, count: int) -> str:
    """The stand-in for a colour of the ramp, the values spread over all of it."""
    return _ramp(round(at * (_STEPS - 1) / max(1, count - 1)))


def _ramp(step: int) -> str:
    return f"#0103{16 + step:02x}"


def size_quality(report: Report) -> str:
    """Bytes (log) of the shipped file, or of the weights where nothing is exported, against the primary metric."""
    primary = next(m for m in report["metrics"] if m["name"] == report["primary"])
    points = [
        (row, found)
        for row in report["rows"]
        if row["size"]["bytes"] and (found := row["metrics"].get(primary["name"])) and found["value"] is not None
    ]
    if len(points) < 2:
        return ""
    with _figure(_WIDTH * 0.62, 3.3, 1, 1) as (figure, axes):
        axis = axes[0]
        places = _side_by_side([row["size"]["bytes"] for row, _ in points])
        for (row, found), x in zip(points, places, strict=True):
            ink = colour(row["role"])
            if found["ci"]:
                axis.plot([x, x], found["ci"], color=ink, linewidth=1.8, solid_capstyle="round")
            axis.plot([x], [found["value"]], "o", color=ink, markersize=7, markeredgecolor=PAGE, markeredgewidth=0.8)
        for (row, found), x, shift in zip(points, places, _label_shifts(points), strict=True):
            place = {"xytext": (9, shift), "textcoords": "offset points", "va": "center"}
            axis.annotate(_short(row["name"]), (x, found["value"]), color=INK, fontsize=9, **place)
        axis.set_xscale("log")
        low, high = min(row["size"]["bytes"] for row, _ in points), max(row["size"]["bytes"] for row, _ in points)
        axis.set_xlim(low / 1.25, high * max(1.9, (high / low) ** 0.35))
        ticks = _size_ticks(low, high)
        axis.set_xticks(ticks, [re.sub(r"\.0+ ", " ", size(tick)) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("size of the shipped file, or of the weights where none is exported; logarithmic")
        axis.set_title(f"{_short(primary['title'])} against size", loc="left")
        axis.grid(axis="y")
        description = "; ".join(
            f"{row['name']} {size(row['size']['bytes'])}, {number(found['value'], 1)}" for row, found in points
        )
        return _svg(figure, "size", f"Size against {primary['title']}: {description}.")


def on_device(report: Report) -> str:
    """The primary metric against the memory and against the speed of each exported file."""
    primary = next(m for m in report["metrics"] if m["name"] == report["primary"])
    values = {row["name"]: row["metrics"].get(primary["name"], {}).get("value") for row in report["rows"]}
    files = [one for one in report["device"].get("files", ()) if values.get(one["name"]) is not None]
    if len(files) < 2:
        return ""
    better = "higher is better" if primary["higher_is_better"] else "lower is better"
    unit = f", {_short(primary['unit'])}" if primary["unit"] else ""
    panels = (
        ("memory", lambda one: one["memory"]["resident_bytes"] / 1e6, "resident memory, MB; logarithmic"),
        ("speed", _fastest, "tokens per second, fastest case; logarithmic"),
    )
    with _figure(_WIDTH, 3.3, 1, 2) as (figure, axes):
        for axis, (what, of, below) in zip(axes, panels, strict=True):
            places = [of(one) for one in files]
            for one, place in zip(files, places, strict=True):
                marker = _SHAPES.get(one["type"], "D")
                axis.plot([place], [values[one["name"]]], marker, color=colour(one["role"]), markersize=7, markeredgecolor=PAGE)
            axis.set_xscale("log")
            low, high = min(places), max(places)
            axis.set_xlim(low / 1.5, high * 1.5)
            ticks = _size_ticks(low, high)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.margins(y=0.35)
            axis.set_xlabel(below)
            axis.set_title(f"{_short(primary['title'])}{unit} ({better}) against {what}", loc="left")
            axis.grid(axis="y")
        figure.draw_without_rendering()  # until then no axis knows where its points will lie
        for axis, (_, of, _) in zip(axes, panels, strict=True):
            points = [(of(one), values[one["name"]]) for one in files]
            _label(axis, points, [_short(f"{one['name']} {one['type']}") for one in files])
        description = "; ".join(
            f"{one['name']} {one['type']} {size(one['memory']['resident_bytes'])}, {_fastest(one):.1f} tokens/s"
            for one in files
        )
        return _svg(figure, "device", f"{primary['title']} against memory and speed: {description}.")


def _fastest(one: Mapping[str, Any]) -> float:
    return max(case["tokens_per_s"] for case in one["latency"])


_SHAPES = {"f32": "^", "f16": "o", "bf16": "o", "q8_0": "s", "q4_0": "v"}


_POINT, _LETTER, _LINE = 9.0, 4.7, 10.5  # sizes in points: of a marker; of a label's letters, about, and of its height
_PLACES = ((0, 12), (0, -13), (9, 0), (-9, 0), (7, 11), (-7, 11), (7, -12), (-7, -12), (0, 25), (0, -26), (0, 38), (0, -39))


def _label(axis: Any, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Name each point of an axis that is laid out, where the name covers no other name and no point.

    A name that had to go further has a line to its point.
    """
    places = [tuple(72 / axis.figure.dpi * pixel for pixel in axis.transData.transform(point)) for point in points]
    taken = [(x - _POINT / 2, y - _POINT / 2, x + _POINT / 2, y + _POINT / 2) for x, y in places]
    left, right = (72 / axis.figure.dpi * edge for edge in (axis.bbox.x0, axis.bbox.x1))
    for at in sorted(range(len(points)), key=lambda at: places[at]):
        boxes = [(shift, _box(places[at], shift, len(labels[at]) * _LETTER)) for shift in _PLACES]
        inside = [(shift, box) for shift, box in boxes if left <= box[0] and box[2] <= right] or boxes
        free = [(shift, box) for shift, box in inside if not any(_overlap(box, other) for other in taken)]
        (dx, dy), box = (free or inside)[0]
        taken.append(box)
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0.0, "shrinkB": 4.0} if abs(dy) > 13 else None
        where = {"xytext": (dx, dy), "textcoords": "offset points", "va": "center", "ha": side}
        named = axis.annotate(labels[at], points[at], color=INK, fontsize=8.5, arrowprops=line, **where)
        named.set_in_layout(False)  # or the axis would move from under it


def _box(point: Sequence[float], shift: tuple[int, int], width: float) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of a label that is so far from its point."""
    x, y = point[0] + shift[0] - (width / 2 if shift[0] == 0 else width if shift[0] < 0 else 0.0), point[1] + shift[1]
    return x, y - _LINE / 2, x + width, y + _LINE / 2


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def layer_errors(quantized: Mapping[str, Any], ident: str) -> str:
    """Each layer's reconstruction error with GPTQ and with round-to-nearest, in the model's own order."""
    layers = [
        layer
        for layer in quantized.get("layers") or ()
        if layer.get("gptq_error") is not None or layer.get("rtn_error") is not None
    ]
    if not layers:
        return ""
    with _figure(_WIDTH, 2.6, 1, 1) as (figure, axes):
        axis = axes[0]
        for x, layer in enumerate(layers):
            both = [layer.get("gptq_error"), layer.get("rtn_error")]
            if None not in both:
                axis.plot([x, x], both, color=LINE, linewidth=1.2, zorder=1)
        small = 4.5 if len(layers) <= 60 else 2.6
        for key, role, marker, label in (
            ("rtn_error", "rtn", "s", "round to nearest"),
            ("gptq_error", "quantized", "o", "GPTQ"),
        ):
            found = [(x, layer[key]) for x, layer in enumerate(layers) if layer.get(key) is not None]
            if found:
                axis.plot(*zip(*found, strict=True), marker, color=colour(role), markersize=small, label=label, zorder=2)
        errors = [layer.get(key) for layer in layers for key in ("gptq_error", "rtn_error") if layer.get(key) is not None]
        if min(errors) > 0 and max(errors) > 8 * min(errors):
            axis.set_yscale("log")
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if len(layers) <= 12:
            names = [re.sub(r"^model\.(layers\.)?", "", str(layer["name"])) for layer in layers]
            axis.set_xticks(range(len(layers)), [_short(name, 22) for name in names], rotation=30, ha="right")
        else:
            axis.set_xlabel("linear layer, in the model's order")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title("Reconstruction error per layer (lower is better)", loc="left")
        axis.grid(axis="y")
        axis.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        better = sum(1 for layer in layers if (layer.get("gptq_error") or 0) < (layer.get("rtn_error") or 0))
        return _svg(figure, ident, f"Reconstruction error of {len(layers)} layers; GPTQ's is the smaller in {better}.")


def _points(curve: Mapping[str, Any], name: str, by: str = "epoch") -> list[tuple[float, float]]:
    found = [(point.get(by, point.get("step")), point.get(name)) for point in curve["points"]]
    return [(x, y) for x, y in found if x is not None and y is not None]


def _mean_curve(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean at the epochs that every seed has reached; one seed's line where they share none."""
    at = [dict(points) for points in lines]
    shared = sorted(set.intersection(*(set(line) for line in at)))
    return [(x, sum(line[x] for line in at) / len(at)) for x in shared] or list(lines[0])


def _teacher(report: Report, curves: Sequence[Mapping[str, Any]], name: str) -> tuple[float, str] | None:
    """The teacher's height: on the validation rows if it was trained here, else on the test rows; it says which."""
    if name == "loss" or all(curve.get("role") == "teacher" for curve in curves):
        return None  # a teacher's loss is not the student's; and alone, its own curve is drawn
    for curve in curves:
        if curve.get("role") == "teacher" and (points := _points(curve, name)):
            return points[-1][1], f"{_short(curve['name'])}, trained"
    for row in report["rows"]:
        found = row["metrics"].get(name.removeprefix("validation_"))
        if row["role"] == "teacher" and found and found["value"] is not None:
            return found["value"], f"{_short(row['name'])} (test rows)"
    return None


def _side_by_side(sizes: Sequence[float]) -> list[float]:
    """Sizes within 5% of one another moved apart by 4%, so that their bars do not hide each other."""
    places = list(sizes)
    for i in range(len(sizes)):
        near = [j for j in range(len(sizes)) if abs(sizes[j] / sizes[i] - 1) < 0.05]
        places[i] = sizes[i] * 1.04 ** (near.index(i) - (len(near) - 1) / 2)
    return places


def _label_shifts(points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[float]:
    """Vertical shifts, in points, that keep the labels of near neighbours apart."""
    values = [found["value"] for _, found in points]
    low = min(min(found["ci"] or [found["value"]]) for _, found in points)
    high = max(max(found["ci"] or [found["value"]]) for _, found in points)
    height, gap = 175.0, 12.0
    per_unit = height / ((high - low) or 1.0)
    placed: list[tuple[float, float]] = []
    shifts = [0.0] * len(points)
    for i in sorted(range(len(points)), key=lambda i: values[i]):
        x, y = points[i][0]["size"]["bytes"], values[i] * per_unit
        near = [top for other, top in placed if 0.35 < other / x < 2.9]
        top = max([y, *(top + gap for top in near)])
        shifts[i] = top - y
        placed.append((x, top))
    return shifts


def _size_ticks(low: float, high: float) -> list[float]:
    import math

    steps = [m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for m in (1, 2, 5)]
    inside = [step for step in steps if low / 1.25 <= step <= high * 1.9]
    return inside if len(inside) <= 6 else [step for step in inside if str(int(step))[0] in "1"] or inside[::3]


def _short(text: str, most: int = 26) -> str:
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(text))
    return text if len(text) <= most else text[: most - 1] + "…"


@contextmanager
def _figure(width: float, height: float, lines: int, columns: int, count: int | None = None) -> Iterator[tuple[Any, list[Any]]]:
    """A figure in our style and its first `count` axes, row by row; no global state of matplotlib is left changed."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titlecolor": INK,
        "axes.titlepad": 10,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "text.color": INK,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.title_fontsize": 9,
        "lines.dash_capstyle": "butt",
    }
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **style}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a model's name may be in any script; the page's fonts have it
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.08, h_pad=0.06, wspace=0.04, hspace=0.06)
        axes = list(figure.subplots(lines, columns, squeeze=False).ravel())
        for unused in axes[count:] if count is not None else ():
            unused.set_visible(False)
        yield figure, axes[:count]


def _svg(figure: Any, ident: str, description: str) -> str:
    """The drawing as an `<svg>` element whose ids are its own and whose colours are the page's."""
    import html

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": ident}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    text = re.sub(r'\b(id="|href="#)', rf"\g<1>{ident}-", text).replace("url(#", f"url(#{ident}-")
    text = text.replace("'DejaVu Sans'", "var(--sans)")
    opening = f'<svg role="img" aria-label="{html.escape(_short(description, 1_000))}"'
    return re.sub(r'<svg (?:width|height)="[^"]*" |<svg ', opening + " ", text, count=1)
