"""The key-value part of a GGUF file."""

from typing import Any

Keys = dict[str, str | bool | int | float | list[str] | list[int] | list[bool] | list[float]]


def write_keys(writer: Any, keys: Keys) -> None:
    """Add every key to a `gguf.GGUFWriter`, in its order: text, bool, uint32, float32 or array, as the value's type says."""
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
