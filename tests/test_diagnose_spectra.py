"""`block_spectra` and the share outside of blocks: numbers that are those of the dense matrices.

Bugs that only this file catches: a density under the label of another block, parts of a packed projection cut by the
wrong rows, a share with the wrong square or root, bars of a share that are too short, distances of unlike axes.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.diagnose.spectra import jensen_shannon
from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg import GramOperator, MatrixOperator, Restriction, off_block_share


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, t: Tensor) -> Tensor:
        h = self.embed(t)
        return self.head(h + self.attn(h, h, h, need_weights=False)[0]).mean(1)


@pytest.fixture(scope="module")
def risk() -> bnp.EmpiricalRisk:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Encoder().double()
    tokens = torch.randint(5, (20, 4), generator=torch.Generator().manual_seed(0))
    return bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (tokens, torch.arange(20) % 3))


@pytest.fixture(scope="module")
def found(risk: bnp.EmpiricalRisk) -> bnp.diagnose.BlockSpectra:
    blocks = {"embed": "embed*", "head": "head"} | risk.space.row_blocks("attn.in_proj_*", "qkv")
    return bnp.block_spectra(risk, blocks=blocks)


def by_double_backward(risk: bnp.EmpiricalRisk) -> Tensor:
    """The Hessian from the model itself, without operators of ours."""
    theta = risk.theta.clone().requires_grad_()
    (batch,) = list(risk.batches)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model = Encoder().double()
        logits = torch.func.functional_call(model, risk.space.unflatten(theta), (batch.x,))
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(logits, batch.y), theta, create_graph=True)
        return torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0] for x in g])


def share_of(matrix: Tensor, blocks: list[Tensor]) -> float:
    inside = torch.zeros_like(matrix)
    for b in blocks:
        inside[b[:, None], b] = matrix[b[:, None], b]
    return float((matrix - inside).norm() / matrix.norm())


def test_spectra_and_share_are_those_of_the_dense_hessian(
    risk: bnp.EmpiricalRisk, found: bnp.diagnose.BlockSpectra
) -> None:
    H, tensors = by_double_backward(risk), risk.space.unflatten(torch.arange(risk.space.dim))
    rows = {part: slice(4 * i, 4 * i + 4) for i, part in enumerate("qkv")}
    places = {"embed": tensors["embed.weight"].flatten()}
    places["head"] = torch.cat([tensors["head.weight"].flatten(), tensors["head.bias"]])
    for part, own in rows.items():
        packed = [tensors["attn.in_proj_weight"][own].flatten(), tensors["attn.in_proj_bias"][own]]
        places[f"attn.in_proj_*[{part}]"] = torch.cat(packed)
    assert set(found.names) == set(places)
    for name, size, density, profile in zip(found.names, found.sizes, found.densities, found.profiles, strict=True):
        p = places[name]
        truth = torch.linalg.eigvalsh(H[p[:, None], p]).numpy()
        assert size == len(p)
        assert density.nodes[0] == pytest.approx(truth, abs=1e-12)
        assert profile is not None
        assert profile.lambda_max == pytest.approx(np.abs(truth).max(), rel=1e-9)
        sizes = np.sort(np.abs(truth))[::-1]
        few = profile.ranks[profile.value < 1e8]
        assert np.all(profile.lower[: len(few)] <= sizes[0] / sizes[few - 1] * (1 + 1e-6))
        assert np.all(sizes[0] / sizes[few - 1] <= profile.upper[: len(few)] * (1 + 1e-6))
    assert found.off_block is not None
    every = torch.cat(list(places.values())).sort().values
    inside = [torch.searchsorted(every, p) for p in places.values()]
    assert found.off_block.value == pytest.approx(share_of(H[every[:, None], every], inside), rel=1e-9)


def test_records_are_floats_and_the_table_is_printed(found: bnp.diagnose.BlockSpectra, tmp_path) -> None:
    rows = found.records()
    assert [row["block"] for row in rows] == list(found.names)
    assert all(isinstance(v, float) for row in rows for k, v in row.items() if k not in ("block", "size"))
    by_name = dict(zip(found.names, rows, strict=True))
    nodes = found.densities[found.names.index("attn.in_proj_*[q]")].nodes[0]
    assert by_name["attn.in_proj_*[q]"]["negative"] == pytest.approx(float((nodes < -1e-12).mean()))
    assert "attn.in_proj_*[k]" in str(found)
    assert "|A - blockdiag(A)|_F / |A|_F" in str(found)
    assert bnp.diagnose.BlockSpectra.load(found.save(tmp_path / "blocks.json")) == found


def test_probes_of_large_blocks_come_near_to_all_eigenvalues(risk: bnp.EmpiricalRisk) -> None:
    every = bnp.block_spectra(risk, blocks=["embed", "attn"], profiles=False)
    few = bnp.block_spectra(risk, blocks=["embed", "attn"], profiles=False, probes=3, steps=6)
    assert [d.settings["method"] for d in few.densities] == ["quadrature"] * 2
    assert (every.noise == 0).all()
    assert (few.noise > 0).all()
    assert abs(few.distance[0, 1] - every.distance[0, 1]) <= few.noise.max()
    for low, exact in zip(few.densities, every.densities, strict=True):
        for x in (-1e-3, 1e-4, 1e-2):
            estimate = low.mass(-np.inf, x, 0.999)
            assert estimate.lower <= float((exact.nodes <= x).mean()) <= estimate.upper


def test_distances_are_scipys_and_of_prescribed_spectra_known() -> None:
    g = np.random.default_rng(0)
    p, q = g.random(50), g.random(50)
    p[:5] = 0
    p, q = p / p.sum(), q / q.sum()
    assert jensen_shannon(p, q) == pytest.approx(float(jensenshannon(p, q, base=2)))
    assert jensen_shannon(np.array([5e-324, 1.0]), np.array([0.0, 1.0])) == pytest.approx(0, abs=1e-150)


def test_densities_of_all_eigenvalues_are_exact() -> None:
    values = torch.cat([torch.zeros(3), torch.tensor([-1.0, 2.0, 2.0, 5.0])]).double()
    Q = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    A = bnp.DenseOperator((Q * values) @ Q.T)
    density = bnp.spectral_density(A, method="dense")
    assert density.nodes[0] == pytest.approx(np.sort(values.numpy()), abs=1e-14)
    for confidence in (0.5, 0.99):
        mass = density.mass(-0.5, 2.5, confidence)
        assert (mass.lower, mass.value, mass.upper) == pytest.approx((5 / 7,) * 3)
        median = density.quantile(0.5, confidence)
        assert median.lower <= 1e-12
        assert median.upper >= -1e-12
        assert median.error < 1e-11
    low, high = density.band()
    assert np.all(low <= density.density * (1 + 1e-12) + 1e-15)
    assert np.all(density.density <= high * (1 + 1e-12) + 1e-15)
    assert "all 7 eigenvalues" in str(density)
    known = bnp.spectral_density(A, method="dense", null=Q[:, :3])
    assert known.nodes[0] == pytest.approx([-1, 2, 2, 5])
    assert known.mass(0, 10).value == pytest.approx(3 / 4)
    with pytest.raises(InvalidInputError, match="quadrature"):
        bnp.spectral_density(A, method="exact")


IDX = list(torch.arange(24).split([4, 8, 12]))


@pytest.fixture(scope="module")
def matrices() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    half = torch.randn(24, 24, generator=g, dtype=torch.float64)
    inside = torch.block_diag(*(torch.ones(len(b), len(b), dtype=torch.float64) for b in IDX))
    Q = torch.linalg.qr(half)[0]
    return {
        "dense": half + half.T,
        "decaying": (Q * 0.5 ** torch.arange(24)) @ Q.T,
        "rank one": Q[:, :1] @ Q[:, :1].T,
        "nearly block diagonal": inside + 1e-4 * (half + half.T),
    }


@pytest.mark.parametrize("name", ["dense", "decaying", "rank one", "nearly block diagonal"])
def test_bars_of_a_share_contain_it_as_often_as_they_say(matrices: dict[str, Tensor], name: str) -> None:
    truth, runs = share_of(matrices[name], IDX), 60
    A = bnp.DenseOperator(matrices[name])
    assert off_block_share(A, IDX).value == pytest.approx(truth, rel=1e-12)
    hits = 0
    for seed in range(runs):
        share = off_block_share(A, IDX, method="stochastic", seed=seed, confidence=0.8)
        assert share.lower <= share.value <= share.upper
        hits += share.lower <= truth <= share.upper
    assert 0.62 <= hits / runs <= 0.95


def test_a_share_by_its_factor_by_parts_and_at_far_scales(matrices: dict[str, Tensor]) -> None:
    F = matrices["dense"][:9]
    A, truth = GramOperator(MatrixOperator(F)), share_of(F.T @ F, IDX)
    assert off_block_share(A, IDX).value == pytest.approx(truth, rel=1e-12)
    whole = off_block_share(A, IDX, method="stochastic")
    parts = off_block_share(A, IDX, method="stochastic", parts=lambda i: Restriction(A, IDX[i]))
    assert whole.value == pytest.approx(parts.value, rel=1e-12)
    far = off_block_share(bnp.DenseOperator(2.0**-700 * matrices["dense"]), IDX, method="stochastic")
    near = off_block_share(bnp.DenseOperator(matrices["dense"]), IDX, method="stochastic")
    assert far.value == pytest.approx(near.value, rel=1e-12)
    assert far.norm == pytest.approx(2.0**-700 * near.norm, rel=1e-12)
    assert near.norm == pytest.approx(float(matrices["dense"].norm()), rel=0.3)


def test_a_share_says_its_error_and_its_price(matrices: dict[str, Tensor]) -> None:
    share = off_block_share(bnp.DenseOperator(matrices["dense"]), IDX, method="stochastic", probes=5)
    assert share.summary() == f"{share}, {5 * (1 + len(IDX))} products"
    assert replace(share, value=0.5, lower=0.25, upper=0.625).error == 0.25
    assert replace(share, value=0.5, lower=0.375, upper=0.75).error == 0.25


def test_a_block_diagonal_matrix_has_nothing_outside() -> None:
    A = bnp.DenseOperator(torch.block_diag(torch.ones(2, 2), 3 * torch.ones(3, 3)).double())
    blocks = list(torch.arange(5).split([2, 3]))
    for method in ("exact", "stochastic"):
        share = off_block_share(A, blocks, method=method)
        assert (share.value, share.upper <= 1e-14) == (0.0, True)


def test_layer_tables_say_what_their_blocks_leave_out(risk: bnp.EmpiricalRisk) -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = bnp.models.mlp([4, 5, 3], dtype=torch.float64)
    small = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, torch.arange(30) % 3))
    table = bnp.layer_table(small)
    assert table.off_block is not None
    G = bnp.gauss_newton(small).to_dense()
    assert table.off_block.value == pytest.approx(share_of(G, list(torch.arange(43).split([25, 18]))), rel=1e-9)
    assert "Outside of the layers' blocks" in str(table)
    assert bnp.layer_table(small, layers=["fc1"]).off_block is None
    assert bnp.layer_table(small, off_block=False).off_block is None


def test_bad_input_is_refused_with_words(risk: bnp.EmpiricalRisk) -> None:
    with pytest.raises(InvalidInputError, match="gauss_newton"):
        bnp.block_spectra(risk, curvature="nothing")
    with pytest.raises(InvalidInputError, match=r"give \['embed'\]"):
        bnp.block_spectra(risk, blocks="embed")
    with pytest.raises(InvalidInputError, match="twice"):
        bnp.block_spectra(risk, blocks=["embed", "embed"])
    with pytest.raises(InvalidInputError, match=r"embed\.weight"):
        bnp.block_spectra(risk, blocks=["decoder.*"])
    with pytest.raises(InvalidInputError, match="leave blocks out"):
        bnp.block_spectra(risk, blocks=[])
    with pytest.raises(InvalidInputError, match="the noise of a distance needs at least two probes, got 1"):
        bnp.block_spectra(risk, probes=1)
    A = bnp.DenseOperator(torch.eye(4))
    with pytest.raises(InvalidInputError, match="distinct"):
        off_block_share(A, [torch.arange(3), torch.arange(2, 4)])
    with pytest.raises(InvalidInputError, match="1 of 4 coordinates are in no block"):
        off_block_share(A, [torch.arange(3)])
    for wrong, got in (({"method": "dense"}, "'dense' and 0.95"), ({"confidence": 1.0}, "'auto' and 1.0")):
        with pytest.raises(InvalidInputError, match=rf"auto, exact or stochastic and .* in \(0, 1\), got {got}"):
            off_block_share(A, [torch.arange(4)], **wrong)
    with pytest.raises(InvalidInputError, match="three probes"):
        off_block_share(A, [torch.arange(4)], probes=2)
    with pytest.raises(ZeroOperatorError):
        off_block_share(bnp.DenseOperator(torch.zeros(4, 4)), [torch.arange(4)])


class Beside(nn.Module):
    """Its second layer has no part in the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_units_are_blocks_and_one_without_curvature_has_no_profile() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    risk = bnp.EmpiricalRisk(Beside().double(), nn.functional.mse_loss, (x, x[:, :3]))
    blocks = [("used", 0), ("used", slice(1, 3)), "unused"]
    found = bnp.block_spectra(risk, blocks=blocks, curvature="gauss_newton")
    assert found.names == ("used[0]", "used[1:3]", "unused")
    assert found.sizes == (5, 10, 10)
    unit, pair, none = found.profiles
    whole = torch.linalg.eigvalsh(bnp.gauss_newton(risk, block="used").to_dense())
    assert none is None
    for profile in (unit, pair):
        assert profile.value[-1] == pytest.approx(float(whole[-1] / whole[0]))
    zero = bnp.block_spectra(risk, blocks=["unused.weight", "unused.bias"], curvature="gauss_newton")
    assert zero.off_block is None
    assert zero.profiles == (None, None)


def test_overlapping_blocks_have_no_share(risk: bnp.EmpiricalRisk) -> None:
    assert bnp.block_spectra(risk, blocks=["head", "head.*"], profiles=False).off_block is None


@pytest.mark.parametrize(("dtype", "small"), [(torch.float64, 1e-18), (torch.float32, 1e-9), (torch.float32, 3e-6)])
def test_a_share_below_rounding_is_inside_the_bounds(dtype: torch.dtype, small: float) -> None:
    """Its products cancel it: a share of exactly zero would be a false claim."""
    matrix = torch.diag(torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64))
    matrix[0, 1] = matrix[1, 0] = 0.7
    matrix[1, 2] = matrix[2, 1] = small
    matrix = matrix.to(dtype)
    exact = [[Fraction(x) for x in row] for row in matrix.tolist()]
    outside = sum(exact[i][j] ** 2 for i in range(4) for j in range(4) if (i < 2) != (j < 2))
    squared = outside / sum(x**2 for row in exact for x in row)
    for seed in range(5):
        share = off_block_share(
            bnp.DenseOperator(matrix), [torch.arange(2), torch.arange(2, 4)], method="stochastic", seed=seed
        )
        assert Fraction(share.lower) ** 2 <= squared <= Fraction(share.upper) ** 2
        assert share.lower <= share.value <= share.upper <= max(2 * small, 20 * torch.finfo(dtype).eps)
