"""The one form of a quantised matrix, which every writer packs from and never re-quantises."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.core.errors import UserError
from potstill.edges.codes import check_codes
from potstill.edges.models import PACKED, Model


@dataclass(frozen=True)
class Packed:
    """A symmetric group-wise quantised matrix: weight[o, i] = scale[o, i // group] · code[o, i].

    Attributes:
        codes_OI: int8 in −8 … 7, or −128 … 127 of eight bits, shape [out, in].
        scales_OG: float16, shape [out, in / group]; fixed in float16 before the codes were solved for.
        group: columns that share a scale.
        bits: 4 or 8.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    group: int
    bits: int = 4

    def dequantise(self) -> Tensor:
        """float32 [out, in], exact: a float16 times an 8-bit integer fits in a float32."""
        return self.codes_OI.to(torch.float32) * self.scales_OG.to(torch.float32).repeat_interleave(self.group, dim=1)

    def cpu(self) -> "Packed":
        """The same matrix in main memory."""
        return Packed(self.codes_OI.cpu(), self.scales_OG.cpu(), self.group, self.bits)


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def pack_nibbles(codes_OI: Tensor) -> Tensor:
    """int8 codes −8 … 7 [out, in] as uint8 [out, in / 2]: code + 8, even columns in the low nibble."""
    assert codes_OI.shape[1] % 2 == 0
    nibbles_OI = (codes_OI + 8).to(torch.uint8)
    return nibbles_OI[:, 0::2] | (nibbles_OI[:, 1::2] << 4)


def unpack_nibbles(bytes_OJ: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([bytes_OJ & 15, bytes_OJ >> 4], dim=-1).flatten(1).to(torch.int8) - 8


def save_packed(packed: Mapping[str, Packed], path: Path) -> None:
    """Write every matrix to one safetensors file: `<name>.codes`, of four bits in nibbles, and `<name>.scales` in float16."""
    from safetensors.torch import save_file

    tensors = {f"{name}.codes": _stored(matrix).contiguous() for name, matrix in packed.items()}
    tensors |= {f"{name}.scales": matrix.scales_OG.contiguous() for name, matrix in packed.items()}
    groups = {f"{name}.group": str(matrix.group) for name, matrix in packed.items()}
    save_file(tensors, path, metadata=groups or {"empty": "true"})  # safetensors cannot read back a header of nothing


def load_packed(path: Path) -> dict[str, Packed]:
    """Read what `save_packed` wrote, in the file's order of names.

    Raises:
        UserError: the file is damaged, or something else wrote it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            groups = {key.removesuffix(".group"): int(group) for key, group in file.metadata().items() if key != "empty"}
            return {name: _packed(file, name, group) for name, group in sorted(groups.items())}
    except (SafetensorError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not the codes of a quantised model ({error}); quantise the model again") from error


def _stored(matrix: Packed) -> Tensor:
    return pack_nibbles(matrix.codes_OI) if matrix.bits == 4 else matrix.codes_OI


def _packed(file: Any, name: str, group: int) -> Packed:
    codes, scales_OG = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales")
    if codes.dtype == torch.int8:
        return Packed(codes, scales_OG, group, 8)
    return Packed(unpack_nibbles(codes), scales_OG, group)


def packed_of(model: Model, where: str) -> dict[str, Packed]:
    """The codes beside a model's weights, compared with them exactly; {} where it is not quantised.

    Args:
        model: loaded from `where` in float32, which alone holds dequantised weights exactly.
        where: `path:…` or `hf:…`.

    Raises:
        UserError: the weights were changed after they were quantised; names the layer and the remedy.
    """
    file = Path(where.removeprefix("path:")).expanduser() / PACKED
    if not where.startswith("path:") or not file.is_file():
        return {}
    packed = load_packed(file)
    try:
        check_codes(model, packed)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return packed
