"""Catches: recurrent layers whose rows are not (example, time step): states a step off, of another layer or direction,
of padding; a bias counted in two maps; moments in training other than those of the risk."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kind_laws import check_kind, expected_direction, units_first
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import coverage, layer_moments

Affine = Callable[[str, Tensor], Tensor]
CELLS: dict[type[nn.Module], str] = {nn.RNNCell: "RNN_TANH", nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
LENGTHS = [2, 4, 3, 4, 1, 4, 2, 4, 3, 1, 4, 2, 3, 4, 2, 4]


class Net(nn.Module):
    """A recurrent layer or cell on sequences `(N, T, 3)`, then a dense layer on its first and last outputs."""

    def __init__(self, kind: type[nn.Module], *, packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.packed = packed
        self.rnn: Any = kind(3, 2, **options)
        width = (options.get("proj_size") or 2) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            front = self.rnn.batch_first
            given = x if front else x.transpose(0, 1)
            packed = pack_padded_sequence(given, LENGTHS[: len(x)], batch_first=front, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return self.head(out.sum(1))
        if isinstance(self.rnn, nn.RNNCellBase):
            state, outs = None, []
            for step in x.unbind(1):
                state = self.rnn(step, state)
                outs.append(state[0] if isinstance(state, tuple) else state)
            return self.head(outs[0] + outs[-1])
        out = self.rnn(x)[0] if self.rnn.batch_first else self.rnn(x.transpose(0, 1))[0].transpose(0, 1)
        return self.head(out[:, 0] + out[:, -1])


def mode_of(net: Net) -> str:
    return CELLS.get(type(net.rnn)) or str(net.rnn.mode)


def step(mode: str, a: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """State and memory after a step, from the input's part of the gates and the state's."""
    if mode == "LSTM":
        i, f, g, o = (a + b).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if mode == "GRU":
        (r, z, n), (s, u, m) = a.chunk(3, 1), b.chunk(3, 1)
        z = torch.sigmoid(z + u)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + s) * m) + z * h, c
    return (torch.relu if mode == "RNN_RELU" else torch.tanh)(a + b), c


def written(net: Net, affine: Affine, x: Tensor) -> Tensor:
    """The network by hand: every product is `affine(name of its map, rows)`."""
    if net.packed:
        return torch.cat([affine("head", _states(net, affine, x[i : i + 1, :n]).sum(1)) for i, n in enumerate(LENGTHS)])
    out = _states(net, affine, x)
    return affine("head", out[:, 0] + out[:, -1])


def _states(net: Net, affine: Affine, x: Tensor) -> Tensor:
    cell = isinstance(net.rnn, nn.RNNCellBase)
    proj = 0 if cell else net.rnn.proj_size
    for k in range(1 if cell else net.rnn.num_layers):
        sides = []
        for side in ("", "_reverse")[: 1 if cell or not net.rnn.bidirectional else 2]:
            end = "" if cell else f"_l{k}{side}"
            h, c = x.new_zeros(len(x), proj or 2), x.new_zeros(len(x), 2)
            outs = {}
            for t in range(x.shape[1])[:: -1 if side else 1]:
                a, b = affine(f"rnn.*_ih{end}", x[:, t]), affine(f"rnn.*_hh{end}", h)
                h, c = step(mode_of(net), a, b, h, c)
                outs[t] = h = affine(f"rnn.*_hr{end}", h) if proj else h
            sides.append(torch.stack([outs[t] for t in range(x.shape[1])], 1))
        x = torch.cat(sides, 2)
    return x


def tensors_of_map(net: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    own = dict(net.named_parameters())
    names = [name.replace("*", part) if "*" in name else f"{name}.{part}" for part in ("weight", "bias")]
    return own[names[0]], own.get(names[1])


def plain(net: Net, seen: dict[str, list[Tensor]] | None = None) -> Affine:
    """`W h + b` with the network's own tensors; `seen` gets the rows."""

    def affine(name: str, h: Tensor) -> Tensor:
        if seen is not None:
            seen.setdefault(name, []).append(h.detach())
        return F.linear(h, *tensors_of_map(net, name))

    return affine


def rows_by_hand(net: Any, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    written(net, plain(net, seen), x)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def drawn(kind: type[nn.Module], **options: Any) -> Callable[[], Net]:
    def made() -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Net(kind, **options).double()
            for p in net.parameters():
                nn.init.normal_(p, std=0.7)
        return net

    return made


def sequences(n: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    spread = torch.linspace(0, 1, 3, dtype=torch.float64)
    return 2**spread * (torch.randn(n, 4, 3, dtype=torch.float64, generator=g) + spread), torch.arange(n) % 3


NETS: dict[str, Callable[[], Net]] = {
    "RNN": drawn(nn.RNN, batch_first=True),
    "RNN, rectified, no bias, steps first": drawn(nn.RNN, nonlinearity="relu", bias=False),
    "RNN, two layers, both ways": drawn(nn.RNN, num_layers=2, bidirectional=True, batch_first=True),
    "GRU, steps first": drawn(nn.GRU),
    "GRU, two layers, no bias": drawn(nn.GRU, num_layers=2, bias=False, batch_first=True),
    "LSTM": drawn(nn.LSTM, batch_first=True),
    "LSTM, two layers, both ways, steps first": drawn(nn.LSTM, num_layers=2, bidirectional=True),
    "LSTM, projected": drawn(nn.LSTM, num_layers=2, proj_size=1, batch_first=True),
    "GRU, packed, both ways": drawn(nn.GRU, packed=True, bidirectional=True, batch_first=True),
    "LSTM, packed, steps first": drawn(nn.LSTM, packed=True),
    "RNNCell": drawn(nn.RNNCell),
    "GRUCell, no bias": drawn(nn.GRUCell, bias=False),
    "LSTMCell": drawn(nn.LSTMCell),
}


@pytest.mark.parametrize("name", NETS)
def test_moments_and_the_step_are_those_of_the_network_by_hand(name: str) -> None:
    """In training and of the risk; P acts on each map with the bias that torch gives it (T3, T5)."""
    net, (x, y) = NETS[name](), sequences()
    rows = rows_by_hand(net, x)
    torch.testing.assert_close(written(net, plain(net), x), net(x), rtol=1e-12, atol=1e-12)
    risk = bnp.EmpiricalRisk(net, F.cross_entropy, (x, y))
    found, layers = layer_moments(risk), coverage(risk)
    assert [layer.name for layer in layers] == [*rows]
    assert not layers.uncovered
    pre = bnp.BNP(net, rho=0.0, eps1=0.0, eps2=0.0)
    F.cross_entropy(net(x), y).backward()
    plain_step = risk.space.flatten({n: p.grad.clone() for n, p in net.named_parameters()})
    pre.step()
    step = risk.space.flatten({n: p.grad for n, p in net.named_parameters()})
    P = pre.preconditioner(risk.space)
    assert pre.covered == tuple(rows)
    for layer in layers:
        h, m, block = rows[layer.name], found[layer.name], P.blocks[layer.name][1]
        assert m.rows == len(h)
        for mean, variance in ((m.mean, m.variance), (block.mean, block.variance)):
            torch.testing.assert_close(mean[0], h.mean(0), rtol=1e-12, atol=1e-12)
            expected = h.var(0, correction=0)
            torch.testing.assert_close(
                variance[0], torch.where(expected > 0, expected, variance[0]), rtol=1e-11, atol=1e-12
            )
        q2 = max(layer.features / len(h), 1.0)
        expected_step = expected_direction(*units_first(risk, layer, plain_step), h, q2)
        for a, b in zip(units_first(risk, layer, step), expected_step, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_all_laws_of_a_kind(name: str) -> None:
    """A training run whose moments are those of the exact risk at every step; factors and tables against a Jacobian."""
    check_kind(NETS[name], *sequences(), rows_by_hand, curvature=name in TABLES)


# Those whose layer tables are looked at as well.
TABLES = {"RNN", "GRU, steps first", "GRU, packed, both ways", "LSTMCell"}


def in_z(net: Net, rows: dict[str, Tensor], z: dict[str, tuple[Tensor, Tensor | None]]) -> Affine:
    """The maps in the variables of BNP: of normalized inputs, with `z` as weights and biases."""

    def affine(name: str, h: Tensor) -> Tensor:
        mu, sigma = rows[name].mean(0), rows[name].std(0, correction=0)
        weight, bias = z[name]
        q = max(len(mu) / len(rows[name]), 1.0) ** 0.5
        if bias is not None:
            return ((h - mu) / sigma @ weight.T + bias) / q
        v = mu / sigma
        shrink = (1 - 1 / (1 + v @ v).sqrt()) / (v @ v)
        g = h / sigma
        return (g - shrink * torch.outer(g @ v, v)) @ weight.T / q

    return affine


@pytest.mark.parametrize("name", [name for name in NETS if name != "RNN, rectified, no bias, steps first"])
def test_hessian_of_the_network_written_in_the_variables_of_bnp(name: str) -> None:
    """T2: `P^T H P` of torch's layer is the Hessian of a network written by hand on normalized rows, to 1e-10."""
    net, (x, y) = NETS[name](), sequences()
    risk = bnp.EmpiricalRisk(net, F.cross_entropy, (x, y))
    P = bnp.bnp_preconditioner(risk)
    rows = rows_by_hand(net, x)
    z = P.solve(risk.theta).requires_grad_()
    named = risk.space.unflatten(z)

    def at(name: str) -> tuple[Tensor, Tensor | None]:
        ends = [name.replace("*", part) if "*" in name else f"{name}.{part}" for part in ("weight", "bias")]
        return named[ends[0]], named.get(ends[1])

    out = written(net, in_z(net, rows, {n: at(n) for n in rows}), x)
    torch.testing.assert_close(out, net(x), rtol=1e-10, atol=1e-10)
    (g,) = torch.autograd.grad(F.cross_entropy(out, y), z, create_graph=True)
    A = bnp.hessian(risk)
    for v in torch.randn(2, risk.space.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2)):
        (expected,) = torch.autograd.grad(g, z, v, retain_graph=True)
        found = P.apply_transpose(A @ P.apply(v))
        assert float((found - expected).norm() / expected.norm()) < 1e-10


def test_what_is_left_alone_is_named() -> None:
    dropped = drawn(nn.LSTM, num_layers=2, dropout=0.1, batch_first=True)()
    said = "dropout between its layers hides what the upper ones get: use layers of one each, with nn.Dropout"
    assert bnp.BNP(dropped).uncovered == {f"rnn.{n}": said for n, _ in dropped.rnn.named_parameters()}
    scaled = bnp.BNP(NETS["GRU, steps first"](), output_scale="estimated")
    assert scaled.covered == ("head",)
    said = "output_scale='estimated' needs the gradients at its outputs, which torch's recurrent kernels do not show"
    assert scaled.uncovered["rnn.weight_hh_l0"] == said

    class Scaled(nn.GRU):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            return super().forward(2 * x, hx)

    net, (x, y) = drawn(Scaled, batch_first=True)(), sequences()
    own = "Scaled computes something else with its weight or its input"
    assert bnp.BNP(net).covered == ("head",)
    assert bnp.BNP(net).uncovered["rnn.weight_ih_l0"] == own
    hooked = drawn(nn.GRU, batch_first=True)()
    hooked.rnn.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    longer = drawn(nn.GRU, batch_first=True)()
    longer.rnn.register_forward_hook(lambda module, args, output: (output[0].repeat(1, 2, 1), output[1]))
    other = "GRU does not compute what a loop over its steps does"
    for net_, said in ((net, own), (hooked, other), (longer, other)):
        found = coverage(bnp.EmpiricalRisk(net_, F.cross_entropy, (x, y)))
        assert [layer.name for layer in found] == ["head"]
        assert {found.uncovered[f"rnn.weight_{end}_l0"] for end in ("ih", "hh")} == {said}
    with pytest.raises(InvalidInputError, match="Scaled is a recurrent layer, whose maps have names of their own"):
        bnp.register_layer(Scaled, like=nn.GRU)


def test_a_sequence_by_itself_is_read_as_a_batch_of_one() -> None:
    """Without the dimension of examples the steps come first, whatever `batch_first` says."""

    class Alone(nn.Module):
        def __init__(self, first: bool, alone: bool) -> None:
            super().__init__()
            self.rnn, self.alone = nn.GRU(3, 2, batch_first=first), alone

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0] if self.alone else self.rnn(x[None])[0][0]

    x, y = sequences()[0][0], torch.arange(sequences()[0].shape[1]) % 2
    batch = Alone(True, False).double()
    for first in (False, True):
        alone = Alone(first, True).double()
        alone.load_state_dict(batch.state_dict())
        found, expected = (
            bnp.network.layer_rows(bnp.EmpiricalRisk(net, F.cross_entropy, (x, y))) for net in (alone, batch)
        )
        assert found.keys() == expected.keys()
        assert torch.equal(found["rnn.*_ih_l0"][:, 0], x)
        for name, rows in expected.items():
            torch.testing.assert_close(found[name], rows)


def test_passes_that_do_not_train_are_not_seen_and_a_forgotten_object_sees_nothing() -> None:
    net, x = (
        Net(nn.LSTM, batch_first=True).double(),
        torch.randn((6, 4, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    pre = bnp.BNP(net)
    net.eval()(x)
    with torch.no_grad():
        net.train()(x)
    assert not pre._pending
    net(x)
    assert len(pre._pending) == 3
    del pre
    gc.collect()
    net(x).sum().backward()


def test_states_that_are_given_to_a_stack() -> None:
    """Each layer and direction starts from its own; the lower layer is made here as a layer by itself."""
    g = torch.Generator().manual_seed(3)
    net = nn.LSTM(3, 2, 2, bidirectional=True, batch_first=True).double()
    lower = nn.LSTM(3, 2, bidirectional=True, batch_first=True).double()
    lower.load_state_dict({name: t for name, t in net.state_dict().items() if "_l0" in name})
    (x, _), h, c = sequences(), *torch.randn(2, 4, 16, 2, generator=g, dtype=torch.float64)
    pre = bnp.BNP(net, rho=0.0)
    out = net(x, (h, c))[0]
    out.square().mean().backward()
    pre.step()
    inner, out = lower(x, (h[:2], c[:2]))[0].detach(), out.detach()
    expected = {"*_ih_l0_reverse": x, "*_ih_l1": inner}
    for k, own in enumerate((inner, out)):
        expected[f"*_hh_l{k}"] = torch.cat([h[2 * k, :, None], own[:, :-1, :2]], 1)
        expected[f"*_hh_l{k}_reverse"] = torch.cat([own[:, 1:, 2:], h[2 * k + 1, :, None]], 1)
    blocks = pre.preconditioner().blocks
    for name, rows in expected.items():
        torch.testing.assert_close(blocks[name][1].mean[0], rows.flatten(0, 1).mean(0), rtol=1e-12, atol=1e-12)


def test_one_map_can_be_frozen_chosen_or_given_its_first_states() -> None:
    """Blocks are patterns of the parameter space; states that are given are rows as well."""
    net = nn.GRU(3, 2, batch_first=True).double()
    (x, _), start = sequences(), torch.full((1, 16, 2), 5.0).double()
    pre = bnp.BNP(net, exclude="*_ih_l0", rho=0.0)
    out = net(hx=start, input=x)[0]  # by name, in any order
    out.square().mean().backward()
    pre.step()
    assert pre.covered == ("*_hh_l0",)
    states = torch.cat([start.transpose(0, 1), out.detach()[:, :-1]], 1).flatten(0, 1)
    torch.testing.assert_close(pre.preconditioner().blocks["*_hh_l0"][1].mean[0], states.mean(0))
    net.weight_hh_l0.requires_grad_(False)
    risk = bnp.EmpiricalRisk(net, F.mse_loss, (x, out.detach() + 1), output=lambda o: o[0])
    assert [layer.name for layer in coverage(risk)] == ["*_ih_l0"]
    assert bnp.gauss_newton(risk, block="*_ih_l0").dim == 6 * 3 + 6
    assert copy.deepcopy(bnp.BNP(net)).covered == ("*_ih_l0",)
