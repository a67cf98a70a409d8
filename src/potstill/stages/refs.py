"""What a stage's fields may name: models, caches and studies, by stage, hub name or folder."""

from typing import ClassVar

from potstill.core.artifact import Makes
from potstill.core.refs import StageRef


class ModelRef(StageRef):
    """`stage:NAME`, `hf:ORG/NAME` (or `hf:ORG/NAME@REVISION`), `path:FOLDER` or `path:FILE.gguf`: a model."""

    schemes = ("stage", "hf", "path")
    accepts = ("model",)


class CacheRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: what a `cache` stage made."""

    schemes = ("stage", "path")
    accepts = ("cache",)


class ExportRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: what an `export` stage wrote."""

    schemes = ("stage", "path")
    accepts: ClassVar[tuple[Makes, ...]] = ("export",)


class DeviceRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: what a `device` stage measured."""

    schemes = ("stage", "path")
    accepts: ClassVar[tuple[Makes, ...]] = ("measurement",)


class StudyRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: an evaluation."""

    schemes = ("stage", "path")
