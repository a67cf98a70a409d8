"""What fields may name: what an earlier stage made, or a folder."""

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


class RowsRef(StageRef):
    """`stage:NAME` or `path:FOLDER`: rows that a `generate` stage wrote."""

    schemes = ("stage", "path")
    accepts: ClassVar[tuple[Makes, ...]] = ("rows",)
