"""What draft models gained in llama.cpp, in lines of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from potstill.core.numbers import MISSING, number


def named(drafts: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The measurements with the names that a study gives to the models; their references where it has none."""
    return [
        {**one, "name": names.get(one["model"], one["model"]), "draft_name": names.get(one["draft_model"], one["draft_model"])}
        for one in drafts
    ]


def lines(device: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each pair of files and number of threads."""
    return [_line(one) for one in device.get("drafts", ())]


def _line(one: Mapping[str, Any]) -> dict[str, Any]:
    alone, drafted, ratios = (one[f"all_{what}"] for what in ("alone_tokens_per_s", "tokens_per_s", "speed_ups"))
    return {
        **{
            key: one[key]
            for key in ("name", "type", "file", "draft_name", "draft_type", "draft_file", "ahead", "threads", "of")
        },
        "alone": number(one["alone_tokens_per_s"], 1),
        "alone_range": f"{number(min(alone), 1)} to {number(max(alone), 1)}",
        "drafted": number(one["tokens_per_s"], 1),
        "drafted_range": f"{number(min(drafted), 1)} to {number(max(drafted), 1)}",
        "speed_up": f"{number(one['speed_up'], 2)}×",
        "speed_up_range": f"{number(min(ratios), 2)} to {number(max(ratios), 2)}",
        "acceptance": MISSING if one["acceptance_percent"] is None else f"{number(one['acceptance_percent'], 1)} %",
        "same": f"{one['same_texts']} of {one['prompts']}",
    }
