import itertools
from functools import partial
from statistics import fmean, geometric_mean

import pytest
import torch
from torch import Tensor

from potstill.core.errors import UserError
from potstill.quant.gptq import _column_by_column, gptq, output_error, row_errors, solve
from potstill.quant.hessian import SIDE, Products, curvature
from potstill.quant.making_up import Reads, differences
from potstill.quant.packed import Packed, load_packed, pack_nibbles, save_packed, unpack_nibbles
from potstill.quant.rounding import group_scales, round_to_nearest


def correlated_layer(
    seed: int, outputs: int = 24, inputs: int = 64, rows: int = 512, directions: int = 6
) -> tuple[Tensor, Tensor]:
    """A random matrix and the Hessian of inputs that a few directions dominate, as a language model's do."""
    random = torch.Generator().manual_seed(seed)
    few_directions = torch.randn(rows, directions, generator=random) @ torch.randn(directions, inputs, generator=random)
    hessian = Products(inputs)
    hessian.add(few_directions + 0.3 * torch.randn(rows, inputs, generator=random))
    return torch.randn(outputs, inputs, generator=random) * 0.05, hessian.sum_II


# Laws


def without_feedback(weight_OI: Tensor, hessian_II: Tensor, group: int = 32) -> Packed:
    """A broken GPTQ that forgets to spread a column's error."""
    return gptq(weight_OI, torch.diag(hessian_II.diagonal()), group=group)


def with_wrong_sign(weight_OI: Tensor, hessian_II: Tensor, group: int = 32) -> Packed:
    """A broken GPTQ that spreads errors the wrong way: flipping the odd inputs flips half of H's off-diagonal."""
    signs = torch.ones(len(hessian_II), dtype=torch.float64)
    signs[1::2] = -1
    return gptq(weight_OI, hessian_II * torch.outer(signs, signs), group=group)


def spreads_error(solve) -> bool:
    """The law: on correlated inputs the outputs come out far closer than rounding alone leaves them."""
    layers = [correlated_layer(seed) for seed in range(5)]
    return all(
        output_error(weight, solve(weight, hessian), hessian) < 0.5 * output_error(weight, round_to_nearest(weight), hessian)
        for weight, hessian in layers
    )


def test_gptq_spreads_error_and_broken_ones_do_not() -> None:
    assert spreads_error(gptq)
    assert spreads_error(lambda weight, hessian: gptq(weight, hessian, clip_search=True))
    assert not spreads_error(without_feedback)
    assert not spreads_error(with_wrong_sign)


@pytest.mark.parametrize("clip_search", [False, True])
def test_uncorrelated_inputs_make_gptq_rounding_to_nearest(clip_search: bool) -> None:
    weight, _ = correlated_layer(0)
    solved = gptq(weight, torch.eye(64, dtype=torch.float64), clip_search=clip_search)
    nearest = round_to_nearest(weight, clip_search=clip_search)
    assert torch.equal(solved.codes_OI, nearest.codes_OI)
    assert torch.equal(solved.scales_OG, nearest.scales_OG)


@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_block_size_changes_nothing(block: int) -> None:
    weight, hessian = correlated_layer(1)
    assert torch.equal(gptq(weight, hessian, block=block).codes_OI, gptq(weight, hessian).codes_OI)


def test_scale_of_the_hessian_changes_nothing() -> None:
    weight, hessian = correlated_layer(2)
    assert torch.equal(gptq(weight, 1024 * hessian).codes_OI, gptq(weight, hessian).codes_OI)


def test_arguments_are_left_alone() -> None:
    weight, hessian = correlated_layer(2)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_rows_are_solved_independently() -> None:
    weight, hessian = correlated_layer(3)
    assert torch.equal(gptq(weight[4:9], hessian).codes_OI, gptq(weight, hessian).codes_OI[4:9])


def test_groups_have_independent_scales() -> None:
    weight, _ = correlated_layer(4)
    louder = weight.clone()
    louder[:, 32:] *= 4
    before, after = round_to_nearest(weight), round_to_nearest(louder)
    assert torch.equal(after.codes_OI, before.codes_OI)
    assert torch.equal(after.scales_OG[:, 0], before.scales_OG[:, 0])
    assert torch.equal(after.scales_OG[:, 1], 4 * before.scales_OG[:, 1])


@pytest.mark.parametrize("group", [8, 32, 64])
def test_codes_fit_four_bits_and_scales_are_float16(group: int) -> None:
    weight, hessian = correlated_layer(5)
    packed = gptq(weight, hessian, group=group)
    assert packed.codes_OI.dtype == torch.int8
    assert packed.codes_OI.min() >= -8
    assert packed.codes_OI.max() <= 7
    assert packed.scales_OG.dtype == torch.float16
    assert packed.scales_OG.shape == (24, 64 // group)


def test_dequantising_is_exact() -> None:
    packed = gptq(*correlated_layer(6))
    exact = packed.codes_OI.double() * packed.scales_OG.double().repeat_interleave(32, dim=1)
    assert packed.dequantise().dtype == torch.float32
    assert torch.equal(packed.dequantise().double(), exact)


def test_clip_search_lowers_the_rounding_error_and_never_raises_it() -> None:
    weight, _ = correlated_layer(7)
    identity = torch.eye(64, dtype=torch.float64)
    for row in weight.split(1):
        plain, searched = round_to_nearest(row), round_to_nearest(row, clip_search=True)
        assert output_error(row, searched, identity) <= output_error(row, plain, identity)
    assert output_error(weight, round_to_nearest(weight, clip_search=True), identity) < output_error(
        weight, round_to_nearest(weight), identity
    )


# Oracles


def test_scales_by_hand() -> None:
    weight = torch.tensor([[0.5, -2.0, 1.0, 0.25, 4.0, -1.0, 0.0, 3.6]])
    packed = round_to_nearest(weight, group=4)
    assert packed.scales_OG.tolist() == [[0.25, -0.5]]
    assert packed.codes_OI.tolist() == [[2, -8, 4, 1, -8, 2, 0, -7]]


@pytest.mark.parametrize("by_activation", [False, True])
def test_codes_equal_those_of_repeated_least_squares(by_activation: bool) -> None:
    """Independent derivation: after each column, solve anew for what the free columns should be, given the fixed ones."""
    weight, hessian = correlated_layer(8, outputs=40, inputs=12)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    packed = gptq(weight, hessian, group=4, by_activation=by_activation, sweeps=0)
    scale = packed.scales_OG.double().repeat_interleave(4, dim=1)
    target, fixed = weight.double(), torch.zeros(40, 12, dtype=torch.float64)
    order = sorted(range(12), key=lambda i: -float(hessian[i, i])) if by_activation else [*range(12)]
    for n, i in enumerate(order):
        wanted, done, free = target[:, i], order[:n], order[n:]
        if n:
            missed = target[:, done] - fixed[:, done]
            wanted = wanted + torch.linalg.solve(damped[free][:, free], damped[free][:, done] @ missed.T).T[:, 0]
        fixed[:, i] = scale[:, i] * (wanted / scale[:, i]).round().clamp(-8, 7)
    nearest = scale * (weight.double() / scale).round().clamp(-8, 7)
    worse = row_error(weight, fixed, hessian) >= row_error(weight, nearest, hessian)
    assert 0 < worse.sum() < 40, "both kinds of row are seen"
    assert torch.equal(packed.dequantise().double(), torch.where(worse[:, None], nearest, fixed))


def test_close_to_the_best_of_all_codes() -> None:
    """All 16⁵ choices of five codes: being greedy costs less than twofold on average, rounding alone more."""
    every_code = torch.tensor(list(itertools.product(range(-8, 8), repeat=5)), dtype=torch.float64)
    over_best: dict[str, list[float]] = {"gptq": [], "rtn": []}
    for seed in range(8):
        weight, hessian = correlated_layer(seed, outputs=1, inputs=5, directions=2)
        solved, nearest = gptq(weight, hessian, group=5, damping=1e-6), round_to_nearest(weight, group=5)
        errors = every_code * solved.scales_OG.double() - weight.double()
        best = float((errors @ hessian * errors).sum(-1).min() / (weight.double() @ hessian @ weight.double().T))
        over_best["gptq"].append(output_error(weight, solved, hessian) / best)
        over_best["rtn"].append(output_error(weight, nearest, hessian) / best)
    assert min(*over_best["gptq"], *over_best["rtn"]) > 0.999
    assert geometric_mean(over_best["gptq"]) < 2 < geometric_mean(over_best["rtn"])


def test_hessian_and_output_error_by_hand() -> None:
    hessian = Products(2)
    hessian.add(torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]]))
    hessian.add(torch.tensor([[0.0, 1.0]]))
    assert hessian.rows == 3
    assert hessian.sum_II.tolist() == [[10.0, -1.0], [-1.0, 6.0]]
    packed = Packed(torch.tensor([[2, 1]], dtype=torch.int8), torch.tensor([[0.5]], dtype=torch.float16), 2)
    # W = (1, 1), so E = (0, 0.5): 0.25 · 6 over 10 − 2 + 6
    assert output_error(torch.ones(1, 2), packed, hessian.sum_II) == pytest.approx(1.5 / 14)


@pytest.mark.parametrize("width", [3, SIDE, 2 * SIDE + 5])
def test_sums_over_tiles_are_plain_products(width: int) -> None:
    random = torch.Generator().manual_seed(0)
    x_NI, y_NI = (torch.randn(1500, width, generator=random, dtype=torch.float64) for _ in range(2))
    squares, crossed = Products(width), Products(width, symmetric=False)
    for rows in (slice(0, 1200), slice(1200, None)):
        squares.add(x_NI[rows])
        crossed.add(x_NI[rows], y=y_NI[rows])
    assert torch.allclose(squares.sum_II, x_NI.T @ x_NI)
    assert torch.allclose(crossed.sum_II, x_NI.T @ y_NI)
    error_OI = torch.randn(4, width, generator=random, dtype=torch.float64)
    assert torch.allclose(row_errors(error_OI, squares.sum_II), row_error(error_OI, torch.zeros_like(error_OI), squares.sum_II))


@pytest.mark.parametrize("by_activation", [False, True])
def test_a_curvature_is_its_hessian_damped(by_activation: bool) -> None:
    _, hessian_II = correlated_layer(17)
    curved = curvature(hessian_II, 0.05, by_activation)
    damped_II = hessian_II + 0.05 * hessian_II.diagonal().mean() * torch.eye(64)
    order_I, spread_II = curved.order_I, curved.spread_II
    assert torch.allclose(spread_II * curved.remains_I @ spread_II.T, damped_II[order_I][:, order_I])
    assert torch.equal(spread_II, spread_II.tril())
    assert torch.allclose(curved.damped_II.double(), damped_II, rtol=1e-6)
    right_IO = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(damped_II @ curved.solve(right_IO), right_IO)


# No row is worse than rounding to nearest


def row_error(weight_OI: Tensor, rounded_OI: Tensor, hessian_II: Tensor) -> Tensor:
    error_OI = weight_OI.double() - rounded_OI.double()
    return torch.einsum("oi,ij,oj->o", error_OI, hessian_II, error_OI)


def inputs_that_mislead(kind: str, seed: int) -> Tensor:
    """Rows of calibration inputs [N, 64] on which spreading errors column by column can go wrong."""
    random = torch.Generator().manual_seed(seed)
    if kind == "few rows":
        return torch.randn(3, 64, generator=random, dtype=torch.float64)
    x = torch.randn(256, 64, generator=random, dtype=torch.float64)
    match kind:
        case "outlier":
            x[:, 5] *= 1e4
        case "duplicates":
            x[:, 32:] = x[:, :32]
        case "opposites":
            x[:, 32:] = -x[:, :32] + 1e-3 * x[:, 32:]
        case "rank one":
            x = x[:, :1] @ x[:1]
        case "dead":
            x[:, ::3] = 0
        case "tiny":
            x *= 1e-12
    return x


def never_worse(solver) -> bool:
    """The law, by the outputs themselves: ‖X (w − q)‖² of each output row is at most that of rounding to nearest."""
    for kind in ("few rows", "plain", "outlier", "duplicates", "opposites", "rank one", "dead", "tiny"):
        for seed in range(12):
            x_NI = inputs_that_mislead(kind, seed)
            weight_OI = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed + 100)) * 0.05
            solved, nearest = solver(weight_OI, x_NI.T @ x_NI), round_to_nearest(weight_OI)
            energy_O = (x_NI @ weight_OI.double().T).square().sum(0)
            errors = [(x_NI @ (weight_OI - p.dequantise()).double().T).square().sum(0) for p in (solved, nearest)]
            if (errors[0] > errors[1] + 1e-12 * energy_O).any():
                return False
    return True


def greedy_alone(weight_OI: Tensor, hessian_II: Tensor) -> Packed:
    """A broken GPTQ that keeps its codes whatever they do: the paper's."""
    scales_OG = group_scales(weight_OI, 32)
    return Packed(_column_by_column(weight_OI.double(), scales_OG, curvature(hessian_II), 32), scales_OG, 32)


def test_no_output_row_is_worse_than_rounding_and_the_greedy_codes_alone_are() -> None:
    assert never_worse(gptq)
    assert never_worse(partial(gptq, sweeps=4))
    assert not never_worse(greedy_alone)


def test_what_the_solver_did_is_reported() -> None:
    weight, hessian = correlated_layer(13)
    curved = curvature(hessian)
    solved = solve(weight, curved, sweeps=2)
    assert (curved.damping, curved.dead_I.sum(), solved.rounded_O.sum()) == (0.01, 0, 0)
    assert solved.share(solved.error_O) == pytest.approx(output_error(weight, solved.packed, hessian))
    assert solved.share(solved.nearest_O) == pytest.approx(output_error(weight, round_to_nearest(weight), hessian))
    hessian[7], hessian[:, 7] = 0, 0
    assert curvature(hessian).dead_I.nonzero().tolist() == [[7]]
    slightly_indefinite = torch.eye(64, dtype=torch.float64)
    slightly_indefinite[0, 1] = slightly_indefinite[1, 0] = 1.05
    assert curvature(slightly_indefinite).damping == pytest.approx(0.1)


# Edges


@pytest.mark.parametrize("clip_search", [False, True])
def test_zero_huge_and_vanishing_groups(clip_search: bool) -> None:
    _, hessian = correlated_layer(9, inputs=16)
    weight = torch.tensor([[0.0] * 4 + [524_000, -524_000, 1.0, 0.0] + [1e-12] * 4 + [1e-6] * 4])
    for packed in (
        round_to_nearest(weight, 4, clip_search=clip_search),
        gptq(weight, hessian, group=4, clip_search=clip_search),
    ):
        assert torch.isfinite(packed.scales_OG).all()
        assert torch.isfinite(packed.dequantise()).all()
        assert packed.dequantise()[0, :4].tolist() == [0.0] * 4
        assert packed.dequantise()[0, 8:12].tolist() == [0.0] * 4
    assert round_to_nearest(weight, 4).dequantise()[0, 12:].tolist() == pytest.approx([1e-6] * 4, rel=0.1)


def test_dead_columns_are_rounded_to_nearest_and_disturb_nothing() -> None:
    weight, hessian = correlated_layer(10)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[3, 40]] = True
    hessian[dead], hessian[:, dead] = 0, 0
    packed = gptq(weight, hessian)
    assert torch.equal(packed.codes_OI[:, dead], round_to_nearest(weight).codes_OI[:, dead])
    assert output_error(weight, packed, hessian) < output_error(weight, round_to_nearest(weight), hessian)


def test_a_layer_never_reached_is_rounded_to_nearest() -> None:
    weight, hessian = correlated_layer(11)
    packed = gptq(weight, torch.zeros_like(hessian))
    assert torch.equal(packed.codes_OI, round_to_nearest(weight).codes_OI)
    assert output_error(weight, packed, torch.zeros_like(hessian)) == 0.0


def test_fewer_rows_than_inputs_are_rescued_by_damping() -> None:
    weight, hessian = correlated_layer(12, rows=8)
    assert output_error(weight, gptq(weight, hessian), hessian) < output_error(weight, round_to_nearest(weight), hessian)


def test_damping_is_raised_until_the_hessian_is_definite() -> None:
    weight, _ = correlated_layer(13)
    slightly_indefinite = torch.eye(64, dtype=torch.float64)
    slightly_indefinite[0, 1] = slightly_indefinite[1, 0] = 1.05
    gptq(weight, slightly_indefinite)
    with pytest.raises(UserError, match="not positive definite, even with damping 1e-05; calibrate on more rows"):
        gptq(weight, slightly_indefinite, damping=1e-9)


def test_errors_name_the_remedy() -> None:
    weight, hessian = correlated_layer(14)
    with pytest.raises(ValueError, match="width of 64 does not divide into groups of 48; keep this layer at full precision"):
        gptq(weight, hessian, group=48)
    with pytest.raises(UserError, match="calibration inputs hold NaN"):
        gptq(weight, hessian * torch.nan)
    with pytest.raises(UserError, match="weights hold NaN"):
        group_scales(weight * torch.inf, 32)
    weight[0, 0] = 1e6
    with pytest.raises(
        UserError, match="a weight of 1,000,000 needs a scale that float16 cannot hold; four bits reach 524,032"
    ):
        round_to_nearest(weight)


# Storing


def test_nibbles_round_trip() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    assert pack_nibbles(codes).shape == (3, 16)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    assert pack_nibbles(torch.tensor([[-8, 7]], dtype=torch.int8)).tolist() == [[0xF0]]


def test_saved_matrices_come_back_equal(tmp_path) -> None:
    weight, hessian = correlated_layer(15)
    packed = {"b.q_proj": gptq(weight, hessian), "a.k_proj": gptq(weight[:5], hessian, group=8)}
    save_packed(packed, tmp_path / "packed.safetensors")
    loaded = load_packed(tmp_path / "packed.safetensors")
    assert loaded.keys() == packed.keys()
    for name, matrix in packed.items():
        assert loaded[name].group == matrix.group
        assert torch.equal(loaded[name].codes_OI, matrix.codes_OI)
        assert torch.equal(loaded[name].scales_OG, matrix.scales_OG)


def test_nothing_quantised_is_saved_as_nothing(tmp_path) -> None:
    save_packed({}, tmp_path / "packed.safetensors")
    assert load_packed(tmp_path / "packed.safetensors") == {}


# Making up for the errors before a layer


def drifting(seed: int, rows: int = 400, noise: float = 0.2, inputs: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs behind rounded layers, those of full precision, and a matrix."""
    random = torch.Generator().manual_seed(seed)
    exact_NI, noise_NI = (torch.randn(rows, inputs, generator=random).double() for _ in range(2))
    seen_NI = exact_NI + noise * noise_NI @ torch.randn(inputs, inputs, generator=random).double()
    return seen_NI, exact_NI, torch.randn(5, inputs, generator=random).double()


def test_differences_are_those_to_the_least_squares_of_the_outputs_of_full_precision() -> None:
    """Independent oracle: regress the outputs that were wanted on the inputs there are."""
    seen_NI, exact_NI, weight_OI = drifting(0)
    drift = Products(12, symmetric=False)
    drift.add(seen_NI, y=exact_NI - seen_NI)
    found = weight_OI + differences(weight_OI, curvature(seen_NI.T @ seen_NI, 1e-12), drift.sum_II)
    assert torch.allclose(found, torch.linalg.lstsq(seen_NI, exact_NI @ weight_OI.T).solution.T, atol=1e-7)


def read(seen_NI: Tensor, exact_NI: Tensor, weight_OI: Tensor):
    reads = Reads(seen_NI.shape[1], drifts=True)
    for half, rows in enumerate(reads.halves):
        reads.add(half, seen_NI[rows], None, exact_NI[rows])
    return reads.all(weight_OI, 1e-6)


def test_what_is_wanted_is_the_weights_and_their_share_of_the_differences() -> None:
    seen_NI, exact_NI, weight_OI = drifting(1)
    found = read(seen_NI, exact_NI, weight_OI)
    curved = curvature(found.hessian_II, 1e-6)
    assert torch.allclose(found.hessian_II, seen_NI.T @ seen_NI)
    whole_OI = differences(weight_OI, curved, seen_NI.T @ (exact_NI - seen_NI))
    assert torch.allclose(found.wanted(weight_OI, curved), weight_OI + found.share * whole_OI)
    assert read(exact_NI, exact_NI, weight_OI).wanted(weight_OI, curved) is None


def test_the_share_is_near_the_best_one_on_rows_that_were_not_seen() -> None:
    """Of many rows nearly all; of five to an input as much as 20,000 further rows say, or a little less."""
    assert read(*drifting(2, rows=20_000)).share > 0.99
    best, found = [], []
    for seed in range(40):
        seen_NI, exact_NI, weight_OI = drifting(seed, rows=20_000)
        few = read(seen_NI[:60], exact_NI[:60], weight_OI)
        drift_II = seen_NI[:60].T @ (exact_NI - seen_NI)[:60]
        moved_NO = seen_NI @ differences(weight_OI, curvature(few.hessian_II, 1e-6), drift_II).T
        missed_NO = (exact_NI - seen_NI) @ weight_OI.T
        best.append(float((missed_NO * moved_NO).sum() / moved_NO.square().sum()))
        found.append(few.share)
    assert 0.7 < fmean(best) < 0.9, "a case in which a part is best"
    assert fmean(best) - 0.15 < fmean(found) < fmean(best)


def test_of_one_row_nothing_is_made_up_for() -> None:
    seen_NI, exact_NI, weight_OI = drifting(3, rows=1)
    assert read(seen_NI, exact_NI, weight_OI).share == 0
