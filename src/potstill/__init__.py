"""Distil a large language model into a small one, and prove whether distilling helped.

The names below are the public API; each is imported when it is first used, so that `import potstill` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names for an editor, which sees no `__getattr__`
    from potstill.core.artifact import Artifact as Artifact
    from potstill.core.errors import Interrupted as Interrupted
    from potstill.core.errors import RecipeError as RecipeError
    from potstill.core.errors import UserError as UserError
    from potstill.core.progress import Progress as Progress
    from potstill.core.types import Example as Example
    from potstill.data.prompts import Prompts as Prompts
    from potstill.data.rollout import Sampling as Sampling
    from potstill.divergences import Divergence as Divergence
    from potstill.divergences.forward_kl import ForwardKL as ForwardKL
    from potstill.divergences.generalised_jsd import GeneralisedJSD as GeneralisedJSD
    from potstill.divergences.reverse_kl import ReverseKL as ReverseKL
    from potstill.divergences.skew_kl import SkewKL as SkewKL
    from potstill.divergences.skew_reverse_kl import SkewReverseKL as SkewReverseKL
    from potstill.divergences.total_variation import TotalVariation as TotalVariation
    from potstill.divergences.weighted_sum import WeightedSum as WeightedSum
    from potstill.edges.models import load_model as load_model
    from potstill.edges.models import load_tokenizer as load_tokenizer
    from potstill.exporters import Exporter as Exporter
    from potstill.exporters.compressed_tensors import CompressedTensors as CompressedTensors
    from potstill.exporters.gguf import Gguf as Gguf
    from potstill.exporters.safetensors import Safetensors as Safetensors
    from potstill.exporters.web import Web as Web
    from potstill.inits import Init as Init
    from potstill.inits.layers import Layers as Layers
    from potstill.inits.width import Width as Width
    from potstill.metrics import Metric as Metric
    from potstill.recipe.header import Recipe as Recipe
    from potstill.recipe.parse import load_recipe as load_recipe
    from potstill.recipe.parse import parse_recipe as parse_recipe
    from potstill.rewards import Answered as Answered
    from potstill.rewards import Reward as Reward
    from potstill.rollouts.api import OpenAI as OpenAI
    from potstill.run.runner import run_recipe as run_recipe
    from potstill.run.runner import run_stage as run_stage
    from potstill.sources import Source as Source
    from potstill.sources import Splits as Splits
    from potstill.sources.csv import Csv as Csv
    from potstill.sources.dolly import Dolly as Dolly
    from potstill.sources.hub import Hub as Hub
    from potstill.sources.jsonl import Jsonl as Jsonl
    from potstill.sources.parquet import Parquet as Parquet
    from potstill.sources.primer import Primer as Primer
    from potstill.sources.squad import Squad as Squad
    from potstill.sources.stdlib import Stdlib as Stdlib
    from potstill.stages import Stage as Stage
    from potstill.stages.best import Best as Best
    from potstill.stages.cache import Cache as Cache
    from potstill.stages.distill import Distill as Distill
    from potstill.stages.distill import LayerMatch as LayerMatch
    from potstill.stages.evaluate import Evaluate as Evaluate
    from potstill.stages.export import Export as Export
    from potstill.stages.filters import Filters as Filters
    from potstill.stages.generate import Generate as Generate
    from potstill.stages.grpo import GRPO as GRPO
    from potstill.stages.heal import Heal as Heal
    from potstill.stages.measure import Decoding as Decoding
    from potstill.stages.minillm import MiniLLM as MiniLLM
    from potstill.stages.pretrain import Pretrain as Pretrain
    from potstill.stages.pretrain import Shape as Shape
    from potstill.stages.quantize import Quantize as Quantize
    from potstill.stages.readers import Row as Row
    from potstill.stages.report import Report as Report
    from potstill.stages.sft import SFT as SFT
    from potstill.stages.start import Adapter as Adapter
    from potstill.stages.training import Validation as Validation
    from potstill.train.loop import Optim as Optim

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
    "Parquet": "potstill.sources.parquet",
    "Csv": "potstill.sources.csv",
    "Dolly": "potstill.sources.dolly",
    "Hub": "potstill.sources.hub",
    "Primer": "potstill.sources.primer",
    "Stdlib": "potstill.sources.stdlib",
    "Squad": "potstill.sources.squad",
    "Metric": "potstill.metrics",
    "Reward": "potstill.rewards",
    "Answered": "potstill.rewards",
    "Exporter": "potstill.exporters",
    "Safetensors": "potstill.exporters.safetensors",
    "Gguf": "potstill.exporters.gguf",
    "CompressedTensors": "potstill.exporters.compressed_tensors",
    "Web": "potstill.exporters.web",
    "Prompts": "potstill.data.prompts",
    "Optim": "potstill.train.loop",
    "Stage": "potstill.stages",
    "Pretrain": "potstill.stages.pretrain",
    "Shape": "potstill.stages.pretrain",
    "SFT": "potstill.stages.sft",
    "Cache": "potstill.stages.cache",
    "Distill": "potstill.stages.distill",
    "LayerMatch": "potstill.stages.distill",
    "MiniLLM": "potstill.stages.minillm",
    "Generate": "potstill.stages.generate",
    "GRPO": "potstill.stages.grpo",
    "Heal": "potstill.stages.heal",
    "Filters": "potstill.stages.filters",
    "OpenAI": "potstill.rollouts.api",
    "Sampling": "potstill.data.rollout",
    "Quantize": "potstill.stages.quantize",
    "Best": "potstill.stages.best",
    "Evaluate": "potstill.stages.evaluate",
    "Row": "potstill.stages.readers",
    "Decoding": "potstill.stages.measure",
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


if not TYPE_CHECKING:  # or an editor would take every name for a public one

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'potstill' has no attribute '{name}'")
        return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
