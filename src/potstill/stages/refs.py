"""What a stage's fields may name: models, caches and studies, by stage, hub name or folder."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from potstill.core.artifact import Artifact, Makes


class StageRef(str):
    """`stage:NAME`: what an earlier stage made."""

    schemes: ClassVar[tuple[str, ...]] = ("stage",)
    accepts: ClassVar[tuple[Makes, ...]] = ("evaluation",)

    @property
    def scheme(self) -> str:
        return self.partition(":")[0]

    @property
    def target(self) -> str:
        return self.partition(":")[2]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def _parse(cls, value: Any) -> "StageRef":
        if isinstance(value, Artifact):
            value = f"path:{value.folder}"
        if not isinstance(value, str | Path):
            raise PydanticCustomError("reference", "must be text such as '{scheme}:…'", {"scheme": cls.schemes[0]})
        scheme, colon, target = str(value).partition(":")
        if not colon or scheme not in cls.schemes or not target:
            known = " or ".join(f"'{scheme}:…'" for scheme in cls.schemes)
            raise PydanticCustomError("reference", "must begin with {known}", {"known": known})
        return cls(value)


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


class StudyRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: an evaluation."""

    schemes = ("stage", "path")
