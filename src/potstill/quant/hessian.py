"""What a layer's inputs say of which errors of its weights matter.

Shape suffixes: I inputs, O outputs, N rows of calibration data, C rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from potstill.core.errors import UserError

CHUNK = 1024  # rows whose products are summed in their own float32, before float64 adds them up
SIDE = 256  # columns of a tile: where a matrix is symmetric, tiles under the diagonal are not computed
RAISES = 5  # dampings that are tried, each ten times the one before


class Products:
    """Σ x yᵀ over rows, x of a layer's inputs, in float64. Of x with itself it is the Hessian.

    H = Σ x xᵀ is, up to a constant, the Hessian of the layer's squared output error. Products of up to `CHUNK` rows are summed
    in float32, which is several times as fast, and these sums in float64: 10⁵ rows summed in float32 alone leave too few digits
    for the inverse. Rows in float64 stay in it.
    """

    def __init__(self, width: int, symmetric: bool = True) -> None:
        """
        Args:
            symmetric: y is x.
        """
        self.symmetric, self.rows = symmetric, 0
        self._sum_II = torch.zeros(width, width, dtype=torch.float64)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def sum_II(self) -> Tensor:
        """The sum so far, on the device of its rows."""
        self._multiply()
        if self.symmetric:
            parts = tiles(len(self._sum_II))
            for below in ((one, other) for one in parts for other in parts if other.start < one.start):
                self._sum_II[below].copy_(self._sum_II[below[::-1]].T)
        return self._sum_II

    def add(self, x: Tensor, weights: Tensor | None = None, y: Tensor | None = None) -> None:
        """Add every row of x, shaped [..., in]; the sum follows x to its device. x is read later too: leave it as it is.

        Args:
            weights: how often each row counts, one number a row; default: once.
            y: of x's shape, where the sum is not symmetric.
        """
        assert self.symmetric == (y is None)
        device = torch.device("cpu") if x.device.type == "mps" else x.device  # Apple's GPUs know no float64
        x_NI = x.detach().reshape(-1, x.shape[-1]).to(device)
        x_NI = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))
        y_NI = x_NI if y is None else y.detach().reshape(x_NI.shape).to(x_NI)
        if weights is not None:
            weights_N1 = weights.to(x_NI).reshape(-1, 1)
            x_NI = x_NI * (weights_N1.sqrt() if y is None else weights_N1)
            y_NI = x_NI if y is None else y_NI
        self._sum_II, self.rows = self._sum_II.to(device), self.rows + len(x_NI)
        for x_CI, y_CI in zip(x_NI.split(CHUNK), y_NI.split(CHUNK), strict=True):
            if sum(len(waits_CI) for waits_CI, _ in self._waiting) + len(x_CI) > CHUNK:
                self._multiply()
            self._waiting.append((x_CI, y_CI))

    def _multiply(self) -> None:
        """What was added a little at a time, in one product."""
        if not self._waiting:
            return
        x_CI, y_CI = (torch.cat(rows) for rows in zip(*self._waiting, strict=True))
        self._waiting = []
        for tile in tiles(x_CI.shape[1]):
            right = slice(tile.start if self.symmetric else 0, None)
            self._sum_II[tile, right] += x_CI[:, tile].T @ y_CI[:, right]


def tiles(width: int) -> list[slice]:
    """Of a symmetric matrix, by rows or by columns."""
    return [slice(start, min(start + SIDE, width)) for start in range(0, width, SIDE)]


@dataclass(frozen=True)
class Curvature:
    """A Hessian, damped and factored once for all matrices that read the same inputs.

    The damped one, with its columns in `order_I`, is S·diag(d)·Sᵀ, S unit lower triangular: of an error e in column i, e²·d_i
    remains once the columns before it have made up for it as well as they can.

    Attributes:
        hessian_II: as it was summed, in float64.
        damped_I: the diagonal of the damped one; it differs in nothing else.
        order_I: columns, the first to be rounded last: by rising diagonal of H, or from right to left.
        spread_II: S.
        remains_I: d.
        damping: λ, the share of the mean diagonal that made it positive definite.
        dead_I: inputs that were zero in every row. By the damping they stand alone.
    """

    hessian_II: Tensor
    damped_I: Tensor
    order_I: Tensor
    spread_II: Tensor
    remains_I: Tensor
    damping: float
    dead_I: Tensor

    @cached_property
    def damped_II(self) -> Tensor:
        """The damped one, in float32."""
        damped_II = self.hessian_II.float()
        damped_II.diagonal().copy_(self.damped_I)
        return damped_II

    def solve(self, right_IO: Tensor) -> Tensor:
        """(H damped)⁻¹ times this."""
        inner_IO = torch.linalg.solve_triangular(self.spread_II, right_IO[self.order_I], upper=False, unitriangular=True)
        inner_IO /= self.remains_I[:, None]
        made_IO = torch.empty_like(right_IO)
        made_IO[self.order_I] = torch.linalg.solve_triangular(self.spread_II.T, inner_IO, upper=True, unitriangular=True)
        return made_IO


def curvature(hessian_II: Tensor, damping: float = 0.01, by_activation: bool = True) -> Curvature:
    """Factor H + λ·mean(diag H)·1, with λ raised tenfold, up to four times, while that is not positive definite.

    Args:
        hessian_II: `Products.sum_II`; its scale does not matter, and it is left alone.
        damping: λ.
        by_activation: round the columns of the largest inputs first, while most columns are left to make up for their errors.

    Raises:
        UserError: H is not finite, or not positive definite with 10⁴·λ either.
    """
    if not torch.isfinite(hessian_II).all():
        raise UserError("GPTQ: the layer's calibration inputs hold NaN or infinity; check that the model's loss is finite")
    hessian_II = hessian_II.double()
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean() if not dead_I.all() else torch.ones_like(diagonal_I[0])
    # H is positive semidefinite, so the rest of a dead column is zero too, and the damping alone leaves it on its own.
    order_I = (
        hessian_II.diagonal().argsort(descending=True, stable=True)
        if by_activation
        else torch.arange(len(hessian_II), device=hessian_II.device)
    ).flip(0)
    for raised, spread_II in _factors(hessian_II[order_I[:, None], order_I], diagonal_I[order_I], mean, damping):
        root_I = spread_II.diagonal().clone()
        return Curvature(
            hessian_II, diagonal_I + raised * mean, order_I, spread_II.div_(root_I), root_I.square(), raised, dead_I
        )
    raise UserError(
        f"GPTQ: the Hessian of {len(hessian_II)} inputs is not positive definite, even with damping "
        f"{damping * 10 ** (RAISES - 1):g}; calibrate on more rows, raise the damping, or use the method 'rtn'"
    )


def _factors(ordered_II: Tensor, diagonal_I: Tensor, mean: Tensor, damping: float) -> Iterator[tuple[float, Tensor]]:
    """λ and the lower Cholesky factor, wherever there is one; the matrix is used up."""
    for raised in (damping * 10**attempt for attempt in range(RAISES)):
        ordered_II.diagonal().copy_(diagonal_I + raised * mean)
        lower_II, failed = torch.linalg.cholesky_ex(ordered_II)
        if not failed:
            yield raised, lower_II
