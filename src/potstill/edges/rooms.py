"""Keys and values of many rows at once, in blocks: columns come at the right and go at the left without a copy, rows join."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # columns by which room for keys and values grows


class Room:
    """Keys or values [B, G, T, K] as a view of a larger tensor."""

    def __init__(self, tensor_BGXK: Tensor, begin: int = 0, end: int | None = None) -> None:
        self.tensor, self.begin = tensor_BGXK, begin
        self.end = tensor_BGXK.shape[-2] if end is None else end

    @property
    def width(self) -> int:
        return self.end - self.begin

    @property
    def view(self) -> Tensor:
        return self.tensor[..., self.begin : self.end, :]

    def append(self, new_BGTK: Tensor) -> None:
        end = self.end + new_BGTK.shape[-2]
        if end > self.tensor.shape[-2]:
            end -= self.begin
            self._move(0, end + BLOCK)
        self.tensor[..., self.end : end, :] = new_BGTK
        self.end = end

    def narrow(self, width: int) -> None:
        """Drop what lies left of the last `width` columns."""
        self.begin = max(self.begin, self.end - width)

    def widen(self, columns: int) -> None:
        """Empty columns on the left; their zeros are masked, and what is masked must be finite."""
        self._move(columns, self.width + columns + BLOCK)
        self.tensor[..., :columns, :] = 0
        self.begin = 0

    def picked(self, rows_B: Tensor) -> "Room":
        """These rows in a tensor of their own."""
        return Room(self.tensor[:, :, self.begin :].index_select(0, rows_B), 0, self.width)

    def write(self, slots_N: Tensor, other: "Room", rows_N: Tensor) -> None:
        """Rows of another, no wider one in the place of ours, their last columns under our last ones."""
        left = self.end - other.width
        self.tensor[slots_N, :, self.begin : left] = 0  # masked, and so finite whatever stood there
        self.tensor[slots_N, :, left : self.end] = other.view.index_select(0, rows_N)

    def _move(self, at: int, columns: int) -> None:
        B, G, _, K = self.tensor.shape
        tensor = self.tensor.new_empty((B, G, columns, K))
        tensor[..., at : at + self.width, :] = self.view
        self.tensor, self.begin, self.end = tensor, at, at + self.width


def autocast_type(device: torch.device) -> torch.dtype | None:
    """What products are cast to; None without autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def in_rooms(cache: Any, config: Any) -> bool:
    """Give the plain and sliding layers of a cache room to grow. Whether all of its layers are such, so that rows can join.

    Under autocast the rooms have its type: attention would cast all that is there at every token.
    Chunks of attention are counted from the first column, which padding on the left and its removal would move.
    """
    full, sliding, plain_types, empty = _layers()
    layers: list[Any] = getattr(cache, "layers", [])
    joins = bool(layers) and getattr(config, "attention_chunk_size", None) is None
    for i, layer in enumerate(layers):
        if type(layer) in empty or (type(layer) in plain_types and layer.keys is None):
            continue
        if type(layer) not in plain_types or not layer.keys.numel():
            joins = False
        elif hasattr(layer, "sliding_window"):
            layers[i] = sliding(layer.sliding_window, layer.cumulative_length, *_rooms(layer))
        else:
            layers[i] = full(*_rooms(layer))
    return joins


def _rooms(layer: Any) -> tuple[Room, Room]:
    to = autocast_type(layer.keys.device)
    keys, values = (each if to is None else each.to(to) for each in (layer.keys, layer.values))
    return Room(keys), Room(values)


def can_be_reordered(cache: Any) -> bool:
    """Whether rows of a cache can be picked: layers that transformers' models define themselves may hold more than it moves."""
    layers: list[Any] = getattr(cache, "layers", [])
    return bool(layers) and all(type(each).__module__ in ("transformers.cache_utils", __name__) for each in layers)


def roomy(cache: Any) -> list[Any]:
    """Those layers of a cache that `in_rooms` made."""
    return [layer for layer in cache.layers if hasattr(layer, "rooms")]


@cache
def _layers() -> tuple[Any, Any, tuple[type, ...], tuple[type, ...]]:
    """Layers of a cache as transformers knows them, with rooms; the types that they stand for; types that hold nothing."""
    from transformers import cache_utils
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    class InRooms:
        """What both kinds of layers do with their rooms, that of the keys and that of the values."""

        rooms: tuple[Room, ...]

        def settle(self, *rooms: Room) -> None:
            self.rooms, self.is_initialized = rooms, True
            self.dtype, self.device = rooms[0].tensor.dtype, rooms[0].tensor.device
            self._show()

        def _show(self) -> None:
            self.keys, self.values = (room.view for room in self.rooms)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.rooms = tuple(room.picked(beam_idx) for room in self.rooms)
            self._show()

        def alone(self, rows_B: Tensor) -> Any:
            """These rows in a layer of their own."""
            other = copy.copy(self)
            other.reorder_cache(rows_B)
            return other

        def write(self, slots_N: Tensor, other: Any, rows_N: Tensor) -> None:
            """Rows of another, no wider layer in the place of ours."""
            for room, theirs in zip(self.rooms, other.rooms, strict=True):
                room.write(slots_N, theirs, rows_N)

    class Full(InRooms, DynamicLayer):
        """Every column is kept."""

        def __init__(self, *rooms: Room) -> None:
            super().__init__()
            self.settle(*rooms)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            for room, new in zip(self.rooms, (key_states, value_states), strict=True):
                room.append(new)
            self._show()
            return self.keys, self.values  # pyright: ignore[reportReturnType]

        def resize(self, columns: int) -> None:
            """Add empty columns at the left, or, below 0, drop some."""
            for room in self.rooms:
                if columns > 0:
                    room.widen(columns)
                room.narrow(room.width + min(columns, 0))
            self._show()

    class Sliding(InRooms, DynamicSlidingWindowLayer):
        """The last columns are kept, one less than the window has; `cumulative_length` counts all."""

        def __init__(self, window: int, columns: int, *rooms: Room) -> None:
            super().__init__(sliding_window=window)
            self.cumulative_length = columns
            self.settle(*rooms)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.cumulative_length += key_states.shape[-2]
            for room, new in zip(self.rooms, (key_states, value_states), strict=True):
                room.append(new)
            keys, values = (room.view for room in self.rooms)
            self._narrow()
            return keys, values

        def resize(self, columns: int) -> None:
            self.cumulative_length += columns
            for room in self.rooms:
                if self._kept() > room.width:
                    room.widen(self._kept() - room.width)
            self._narrow()

        def _kept(self) -> int:
            return min(self.cumulative_length, self.sliding_window - 1)

        def _narrow(self) -> None:
            for room in self.rooms:
                room.narrow(self._kept())
            self._show()

    dummy = getattr(cache_utils, "DummyLayer", None)
    return Full, Sliding, (DynamicLayer, DynamicSlidingWindowLayer), () if dummy is None else (dummy,)
