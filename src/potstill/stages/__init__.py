"""The steps of a recipe: artifacts in, one artifact out. One file per stage."""

from potstill.core.component import discover
from potstill.stages.base import Context, Stage
from potstill.stages.refs import ModelRef, StageRef

discover(__name__, __path__)

__all__ = ["Context", "ModelRef", "Stage", "StageRef"]
