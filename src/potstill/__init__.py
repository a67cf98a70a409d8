"""Distil a large language model into a small one, and prove whether distilling helped.

The names below are the public API; each is imported when it is first used, so that `import potstill` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Artifact": "potstill.core.artifact",
    "UserError": "potstill.core.errors",
    "RecipeError": "potstill.core.errors",
    "Interrupted": "potstill.core.errors",
    "Progress": "potstill.core.progress",
    "Example": "potstill.core.types",
    "Divergence": "potstill.divergences",
    "ForwardKL": "potstill.divergences.forward_kl",
    "ReverseKL": "potstill.divergences.reverse_kl",
    "GeneralisedJSD": "potstill.divergences.generalised_jsd",
    "SkewKL": "potstill.divergences.skew_kl",
    "SkewReverseKL": "potstill.divergences.skew_reverse_kl",
    "TotalVariation": "potstill.divergences.total_variation",
    "WeightedSum": "potstill.divergences.weighted_sum",
    "Init": "potstill.inits",
    "Layers": "potstill.inits.layers",
    "Width": "potstill.inits.width",
    "Source": "potstill.sources",
    "Splits": "potstill.sources",
    "Jsonl": "potstill.sources.jsonl",
    "Dolly": "potstill.sources.dolly",
    "Primer": "potstill.sources.primer",
    "Stdlib": "potstill.sources.stdlib",
    "Squad": "potstill.sources.squad",
    "Metric": "potstill.metrics",
    "Exporter": "potstill.exporters",
    "Safetensors": "potstill.exporters.safetensors",
    "Gguf": "potstill.exporters.gguf",
    "Prompts": "potstill.data.prompts",
    "Optim": "potstill.train.loop",
    "Stage": "potstill.stages",
    "Pretrain": "potstill.stages.pretrain",
    "Shape": "potstill.stages.pretrain",
    "SFT": "potstill.stages.sft",
    "Cache": "potstill.stages.cache",
    "Distill": "potstill.stages.distill",
    "Quantize": "potstill.stages.quantize",
    "Best": "potstill.stages.best",
    "Evaluate": "potstill.stages.evaluate",
    "Row": "potstill.stages.evaluate",
    "Decoding": "potstill.stages.evaluate",
    "Export": "potstill.stages.export",
    "Report": "potstill.stages.report",
    "Validation": "potstill.stages.training",
    "Adapter": "potstill.stages.start",
    "Recipe": "potstill.recipe.header",
    "load_recipe": "potstill.recipe.parse",
    "parse_recipe": "potstill.recipe.parse",
    "run_recipe": "potstill.run.runner",
    "run_stage": "potstill.run.runner",
    "load_model": "potstill.edges.models",
    "load_tokenizer": "potstill.edges.models",
}

__all__ = [*_WHERE, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'potstill' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
