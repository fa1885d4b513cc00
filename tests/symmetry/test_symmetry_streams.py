"""Symmetries across a network: streams, attention, rotations through norms, and the orbits along them.

Bugs that only these tests catch: a writer or reader of a stream forgotten, or scaled the wrong way; keys mixed like
queries; a shift passed on where weights do not sum to one; a rotation that forgets a norm's gain or offset; a shared
parameter moved for one of its uses only; an orbit that leaves the level set of the risk, or is offered where there is
only a tangent.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from curvature_reference import classes, numbers, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError

Norm = Callable[[int], nn.Module] | None


class Stream(nn.Module):
    """One block on a stream of four channels; the norm of the branch has no offset to spare."""

    def __init__(self, norm: Norm = None, act: Callable[[Tensor], Tensor] = F.gelu, *, on_stream: bool = False) -> None:
        super().__init__()
        self.enter, self.inner, self.outer, self.leave = (
            nn.Linear(5, 4),
            nn.Linear(4, 3),
            nn.Linear(3, 4),
            nn.Linear(4, 6),
        )
        self.norm, self.last = (nn.Identity(), nn.Identity()) if norm is None else (norm(4), norm(4))
        self.act, self.on_stream = act, on_stream

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h = h + self.outer(self.act(self.inner(self.norm(h))))
        return self.leave(self.act(h) if self.on_stream else self.last(h))


class Attention(nn.Module):
    """Two heads of two channels, in several spellings; tanh before the mean, so that nothing passes the output."""

    def __init__(self, kind: str = "hand", *, causal: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.kind, self.causal = kind, causal
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True, bias=bias)
        self.leave = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        if self.kind == "module":
            return self.leave(torch.tanh(self.mha(x, x, x, attn_mask=mask, need_weights=False)[0]).mean(1))
        packed = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias)
        q, k, v = (part.view(*x.shape[:2], 2, 2).transpose(1, 2) for part in packed.chunk(3, dim=-1))
        if self.kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v, None if mask is None else ~mask)
        else:
            scores = q @ k.transpose(-2, -1) * 2**-0.5
            scores = scores if mask is None else scores.masked_fill(mask, float("-inf"))
            y = scores.softmax(-1) @ v
        return self.leave(torch.tanh(self.mha.out_proj(y.transpose(1, 2).flatten(2))).mean(1))


class Tied(nn.Module):
    """An embedding that is also the head: of the mixings of its linear stream, rotations are left."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.inner, self.outer = nn.Embedding(20, 3), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rows(x)
        h = h + self.outer(torch.tanh(self.inner(h)))
        return F.linear(h.mean(1), self.rows.weight)


def risk_of(model: nn.Module, x: Tensor, outputs: int, seed: int = 0) -> bnp.EmpiricalRisk:
    return bnp.EmpiricalRisk(spread(model, seed), F.mse_loss, (x, numbers(len(x), outputs, seed=9)))


def nullity(risk: bnp.EmpiricalRisk) -> int:
    factor = bnp.gauss_newton(risk).factor
    assert factor is not None
    sigma = torch.linalg.svdvals(factor.to_dense())
    rank = int((sigma > 10 * max(factor.shape) * 2.3e-16 * sigma[0]).sum())
    assert rank == len(sigma) or sigma[rank - 1] > 1e4 * sigma[rank]
    return factor.shape[1] - rank


ROWS, TOKENS = numbers(200, 5, seed=4), numbers(120, 5, 4, seed=5)
STREAMS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    # One scale a channel; shifts between the two writers, taken up by the inner bias, and by both readers.
    "relu on the stream": (
        lambda: Stream(act=F.relu, on_stream=True),
        {"residual stream": 8, "homogeneity": 3},
    ),
    # GL(4), and the shifts.
    "linear": (Stream, {"residual stream": 24}),
    "tanh on the stream": (lambda: Stream(act=torch.tanh, on_stream=True), {"residual stream": 4}),
    # Gain and offset of both norms; rotations of four channels.
    "rms norm": (lambda: Stream(lambda d: nn.RMSNorm(d, eps=1e-2)), {"norm affine": 8, "rotation through norms": 6}),
    # What the mean takes out of both writers; rotations that keep it.
    "layer norm": (
        lambda: Stream(nn.LayerNorm),
        {"dependent inputs": 9, "layer_norm shift": 10, "norm affine": 16, "rotation through norms": 3},
    ),
    "layer norm, plain": (
        lambda: Stream(lambda d: nn.LayerNorm(d, elementwise_affine=False)),
        {"dependent inputs": 9, "layer_norm shift": 10, "rotation through norms": 3},
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams(name: str) -> None:
    make, sources = STREAMS[name]
    risk = risk_of(make(), ROWS, 6, seed=1)
    N = bnp.null_directions(risk)
    assert dict(N.sources) == sources
    assert nullity(risk) == N.basis.shape[1]
    assert not N.rejected
    assert not N.not_analysed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["hand", "fused", "module"])
def test_attention_in_every_spelling(kind: str, causal: bool) -> None:
    risk = risk_of(Attention(kind, causal=causal), TOKENS, 3)
    N = bnp.null_directions(risk)
    # GL(2) for keys and queries, and for values, of both heads; the value bias goes into the output bias.
    assert dict(N.sources) == {"attention query-key": 8, "key bias": 4, "attention values": 12}
    assert nullity(risk) == 24
    assert not N.rejected
    assert not N.not_analysed


def test_attention_without_biases_and_a_shared_embedding() -> None:
    N = bnp.null_directions(risk := risk_of(Attention("fused", bias=False), TOKENS, 3))
    assert dict(N.sources) == {"attention query-key": 8, "attention values": 8}
    assert nullity(risk) == 16
    N = bnp.null_directions(risk := risk_of(Tied(), classes(150, 20, 5), 20))
    assert dict(N.sources) == {"residual stream": 3}
    assert nullity(risk) == 3
    assert not N.rejected


def test_powers_scale_by_their_exponent() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).pow(3))

    N = bnp.null_directions(risk := risk_of(Squared(), ROWS, 2))
    assert dict(N.sources) == {"homogeneity": 4}
    assert nullity(risk) == 4
    moved = N.orbit("homogeneity", 2).apply(risk.theta, 4.0) / risk.theta
    assert moved[10:15] == pytest.approx(moved[10].expand(5))
    assert moved[[26, 30]] == pytest.approx((moved[10] ** -3).expand(2))


@settings(max_examples=25, deadline=None)
@given(st.floats(-2, 2), st.integers(0, 10**6))
def test_orbits_are_level_sets(power: float, which: int) -> None:
    name = list(ORBITS)[which % len(ORBITS)]
    risk, found = ORBITS[name]
    orbit = found.orbits[which // len(ORBITS) % len(found.orbits)]
    moved = orbit.apply(risk.theta, 10**power)
    size = float(risk.value) * (1 + float(moved.abs().max()) ** 2)
    assert abs(float(risk(moved) - risk.value)) < 1e-11 * size
    # A group, that starts along its tangent.
    assert torch.allclose(orbit.apply(moved, 10**-power), risk.theta, atol=1e-9 * float(moved.abs().max()))
    slope = (orbit.apply(risk.theta, 1.0 + 1e-7) - orbit.apply(risk.theta, 1.0 - 1e-7)) / 2e-7
    assert torch.allclose(slope, orbit.tangent(risk.theta), atol=1e-6)
    t = orbit.tangent(risk.theta)
    assert float((t - found.basis @ (found.basis.T @ t)).norm()) < 1e-9 * float(t.norm())


def _found(risk: bnp.EmpiricalRisk) -> tuple[bnp.EmpiricalRisk, bnp.symmetry.NullDirections]:
    return risk, bnp.null_directions(risk)


ORBITS = {
    "linear stream": _found(risk_of(Stream(), ROWS[:20], 6)),
    "relu on the stream": _found(risk_of(Stream(act=F.relu, on_stream=True), ROWS[:20], 6)),
    "attention": _found(risk_of(Attention("fused"), TOKENS[:20], 3)),
    "softmax": _found(
        bnp.EmpiricalRisk(spread(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))), F.cross_entropy,
                          (ROWS[:30], classes(30, 3)))
    ),
}  # fmt: skip


def test_orbits_of_every_kind_are_offered_and_no_others() -> None:
    kinds = {name: {orbit.cause for orbit in found.orbits} for name, (_, found) in ORBITS.items()}
    assert kinds["attention"] >= {"attention query-key", "attention values", "key bias"}
    assert kinds["softmax"] >= {"homogeneity", "softmax shift"}
    assert len([orbit for orbit in ORBITS["linear stream"][1].orbits if orbit.cause == "residual stream"]) == 24
    risk = risk_of(Stream(lambda d: nn.RMSNorm(d, eps=1e-2)), ROWS, 6)
    found = bnp.null_directions(risk)
    with pytest.raises(InvalidInputError, match="0 finite symmetries of 'rotation through norms'"):
        found.orbit("rotation through norms")
    with pytest.raises(InvalidInputError, match="t = 0"):
        ORBITS["softmax"][1].orbit("homogeneity").apply(risk.theta, 0.0)


def test_a_scale_moves_parameters_that_are_zero_where_it_was_found() -> None:
    model = spread(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)))
    model[0].bias.data.zero_()
    risk = bnp.EmpiricalRisk(model, F.mse_loss, (ROWS[:30], numbers(30, 2, seed=9)))
    orbit = bnp.null_directions(risk).orbit("homogeneity", 1)
    elsewhere = risk.theta + 0.5
    assert float(risk(orbit.apply(elsewhere, 7.0)) - risk(elsewhere)) == pytest.approx(0.0, abs=1e-12)


def test_what_is_not_followed_is_named_and_nothing_is_invented() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cumsum(F.relu(self.a(x)), dim=1))

    N = bnp.null_directions(risk_of(Odd(), ROWS, 2))
    assert N.basis.shape[1] == 0
    assert "passes through cumsum" in N.summary()
