"""Configuration and behaviour as one object, and the registry that makes a new file a new feature."""

import importlib
import pkgutil
import typing
from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from potstill.core.spelling import suggest


class Settings(BaseModel):
    """A frozen, validated group of fields; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts `true` as 1: a ratio of `true` would train with 1 and tell nobody."""
        if _numbers_only(cls.model_fields[info.field_name or ""].annotation) and _holds_truth(value):
            raise PydanticCustomError("truth_for_number", "must be a number, not true or false")
        return value


def _holds_truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_truth, value)))


def _numbers_only(annotation: Any) -> bool:
    """Whether a field takes numbers, or lists of numbers, and nothing else but to be left out."""
    args = [arg for arg in typing.get_args(annotation) if arg not in (type(None), ...)]
    return all(map(_numbers_only, args)) if args else annotation in (int, float)


class Component(Settings):
    """A frozen, validated model whose fields are hyper-parameters and whose method is the mathematics.

    A direct subclass is a *role* (`Divergence`, `Source` …) and owns a registry `kinds`. A subclass of a role
    that names its `kind` enters that registry. A field annotated with a role accepts an instance, a table with a
    `kind`, or the kind alone as a string.
    """

    role: ClassVar[str] = ""
    kind: ClassVar[str | None] = None
    kinds: ClassVar[dict[str, type["Component"]]] = {}
    version: ClassVar[int] = 1  # raised when behaviour changes, so that older artifacts are not taken for new ones

    @classmethod
    def __pydantic_init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if kind is not None:
            if not isinstance(kind, str):
                raise TypeError(f'the kind of class {cls.__name__} must be text in quotes: kind="{cls.__name__.lower()}"')
            known = cls.kinds.get(kind)
            # the same class again is a notebook's cell run twice; another one would take its place in silence
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"the {cls.role} '{kind}' exists already, as {known.__module__}.{known.__qualname__}")
            cls.kind = kind
            cls.kinds[kind] = cls
        elif Component in cls.__bases__:
            cls.role = cls.__name__.lower()
            cls.kinds = {}

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        # `kind` is set before pydantic builds the schema, which differs between a role and a kind.
        super().__init_subclass__(**kwargs)
        cls.kind = kind if kind is not None else cls.__dict__.get("kind")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if cls.kind is not None or Settings in cls.__bases__:
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda c: c.spec())
        )

    @classmethod
    def parse(cls, value: Any) -> "Component":
        """Build the component that a table (or a bare kind) describes.

        Raises:
            PydanticCustomError, ValidationError: unknown kind, unknown field, value out of range.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "table",
                "must be a table with a kind, or the kind alone: one of {known}",
                {"known": ", ".join(sorted(cls.kinds))},
            )
        fields = dict(value)
        kind = fields.pop("kind", None)
        if kind is None:
            raise PydanticCustomError("no_kind", "needs a kind: one of {known}", {"known": ", ".join(sorted(cls.kinds))})
        if not isinstance(kind, str):
            known = ", ".join(sorted(cls.kinds))
            raise PydanticCustomError("no_kind", "needs a kind in quotes: one of {known}", {"known": known})
        if kind not in cls.kinds:
            raise PydanticCustomError(
                "unknown_kind",
                "no {role} of kind '{kind}'{hint} (known: {known})",
                {
                    "role": cls.role,
                    "kind": kind,
                    "hint": suggest(kind, cls.kinds) or "; one of your own is given with --plugin FILE",
                    "known": ", ".join(sorted(cls.kinds)),
                },
            )
        return cls.kinds[kind].model_validate(fields)

    def spec(self) -> dict[str, Any]:
        """The table that would build this component again: its kind and every field, defaults written out."""
        return {"kind": self.kind, **self.model_dump(mode="json")}


def discover(package: str, path: Iterable[str]) -> None:
    """Import every module of a role's package, so that one new file is enough to register a component."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
