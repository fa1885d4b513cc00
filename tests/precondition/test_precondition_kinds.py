"""Catches: a layer whose rows are not those that multiply its weights, in moments, in `P`, in training or in tables; a
layer that is taken for a product by its shape and computes something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kind_laws import check_kind
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import coverage


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """The same network in float64 every time, all its parameters drawn at random."""

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make().double()
            for p in model.parameters():
                nn.init.normal_(p, std=0.5)
        return model

    return made


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Inputs of uneven means and scales along the last dimension."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    spread = torch.linspace(0, 1, shape[-1], dtype=torch.float64)
    return 3**spread * (x + spread)


def labels(n: int, classes: int = 3) -> Tensor:
    return torch.arange(n) % classes


# transposed and linear-like layers


class Conv1D(nn.Module):
    """The contract of the layer of this name in `transformers`, written out."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class Like(nn.Module):
    """`F.linear` without being `nn.Linear`, as PyG has it."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def headed(layer: nn.Module, units: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(units, 3))


LINEAR_LIKE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1D": (lambda: headed(Conv1D(4, 5), 4), (12, 5)),
    "square Conv1D on sequences": (lambda: headed(Conv1D(4, 4), 8), (12, 2, 4)),
    "like": (lambda: headed(Like(5, 4), 4), (12, 5)),
    "square, without a bias": (lambda: headed(Like(4, 4, bias=False), 8), (12, 2, 4)),
}


@pytest.mark.parametrize("name", LINEAR_LIKE)
def test_layers_that_are_products_without_being_linear(name: str) -> None:
    make, shape = LINEAR_LIKE[name]
    x = numbers(*shape)
    check_kind(drawn(make), x, labels(len(x)), lambda model, x: {"0": x.flatten(0, -2)})


def test_conv1d_trains_as_its_transposed_twin() -> None:
    own = drawn(lambda: headed(Conv1D(4, 5), 4))()
    twin = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), copy.deepcopy(own[3])).double()
    with torch.no_grad():
        twin[0].weight.copy_(own[0].weight.T)
        twin[0].bias.copy_(own[0].bias)
    x, y = numbers(12, 5), labels(12)
    for model in (own, twin):
        pre = bnp.BNP(model).attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
        assert pre.covered == ("0", "3")
        for rows in torch.arange(12).split(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    torch.testing.assert_close(own[0].weight.T, twin[0].weight)


def _forward(formula: Callable[[Any, Tensor], Tensor]) -> type[Like]:
    return type("Own", (Like,), {"forward": formula})


ANOTHER = numbers(4, 4)
LOOKALIKES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a mask that is all ones": lambda m, x: F.linear(x, m.weight * torch.ones_like(m.weight), m.bias),
    "a gain that is one": lambda m, x: 1.0 * F.linear(x, m.weight, m.bias),
    "a dropout that is off": lambda m, x: F.linear(F.dropout(x, 0.0), m.weight, m.bias),
    "a normalization that does next to nothing": lambda m, x: F.linear(x / (1 + 1e-9) ** 0.5, m.weight, m.bias),
    "the transposed weight": lambda m, x: x @ m.weight + m.bias,
    "message passing": lambda m, x: torch.eye(len(x), dtype=x.dtype) @ (x @ m.weight.T) + m.bias,
    "a residual": lambda m, x: x + F.linear(x, m.weight, m.bias),
    "no bias where there is one": lambda m, x: F.linear(x, m.weight) + 0 * m.bias.sum(),
    "the bias twice": lambda m, x: F.linear(x, m.weight, m.bias) + m.bias,
    "a product that is written to": lambda m, x: F.linear(x, m.weight, m.bias).clamp_(-1e9),
    "an input that is written to": lambda m, x: F.linear(x.mul_(1.0), m.weight, m.bias),
    "rows in another order": lambda m, x: F.linear(x.flip(0), m.weight, m.bias).flip(0),
    "another weight": lambda m, x: F.linear(x, ANOTHER, m.bias) + 0 * m.weight.sum(),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_only_looks_like_a_dense_layer_is_named(name: str) -> None:
    """Most of them give the very numbers of one: only what was called tells them apart."""
    kind = _forward(LOOKALIKES[name])
    model = drawn(lambda: nn.Sequential(kind(4, 4), nn.Tanh(), nn.Linear(4, 3)))()
    x, y = numbers(12, 4), labels(12)
    said = "Own does something else than to multiply its input by its weight and add its bias"
    pre = bnp.BNP(model)
    F.cross_entropy(model(x.clone()), y).backward()
    plain = model[0].weight.grad.clone()
    pre.step()
    assert pre.covered == ("2",)
    assert said in pre.uncovered["0.weight"]
    assert torch.equal(model[0].weight.grad, plain)
    if "written" not in name and "off" not in name:  # a risk is of what a pass does at the moment
        found = coverage(bnp.EmpiricalRisk(model, F.cross_entropy, (x, y)))
        assert [layer.name for layer in found] == ["2"]
        assert found.uncovered["0.weight"] == said


PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "matmul": lambda m, x: x @ m.weight.T + m.bias,
    "the sum turned round": lambda m, x: m.bias + torch.matmul(x, m.weight.t()),
    "addmm": lambda m, x: torch.addmm(m.bias, x.reshape(-1, 4), m.weight.transpose(0, 1)).view(x.shape),
    "words": lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias).contiguous(),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_other_ways_to_write_the_product(name: str) -> None:
    model = drawn(lambda: nn.Sequential(_forward(PRODUCTS[name])(4, 4)))()
    x = numbers(12, 2, 4)
    pre = bnp.BNP(model)
    model(x).square().mean().backward()
    pre.step()
    assert pre.covered == ("0",)
    assert [layer.name for layer in coverage(bnp.EmpiricalRisk(model, F.mse_loss, (x, x)))] == ["0"]


def test_the_first_pass_counts_also_with_output_scales_and_a_failed_pass_proves_nothing() -> None:
    model, twin = drawn(lambda: nn.Sequential(Like(4, 3)))(), nn.Sequential(nn.Linear(4, 3)).double()
    twin.load_state_dict(model.state_dict())
    x, y = numbers(12, 4), labels(12)
    grads = []
    for net in (model, twin):
        pre = bnp.BNP(net, output_scale="estimated")
        with pytest.raises(RuntimeError):
            net(x[:, :2])
        copied = copy.deepcopy(net)  # has no hooks that work
        copied(x)
        F.cross_entropy(net(x), y).backward()
        pre.step()
        grads.append(net[0].weight.grad)
    torch.testing.assert_close(*grads)


def test_which_modules_may_be_dense_layers() -> None:
    """Where nothing says on which side the units are, or there is more than a weight and a bias, nothing is tried."""

    class Bare(nn.Module):
        def __init__(self, *shape: int, **more: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))
            for name, value in more.items():
                setattr(self, name, nn.Parameter(value))

    from bnp_analysis.network.layer_kinds import kind_of

    no: list[nn.Module] = [
        Bare(3, 2), Bare(3, 2, bias=torch.zeros(4)), Bare(3, 2, 2), Bare(3, 2, bias=torch.zeros(3), gain=torch.ones(3)),
        nn.EmbeddingBag(3, 2), nn.Bilinear(2, 2, 2), nn.PReLU(),
    ]  # fmt: skip
    assert [kind_of(module) for module in no] == [None] * len(no)
    yes = Bare(3, 2, bias=torch.zeros(3)), Bare(3, 2, bias=torch.zeros(2)), Conv1D(3, 3), Like(3, 3)
    assert [kind_of(module).transposed for module in yes] == [False, True, True, False]


def test_a_dense_layer_that_gives_more_than_its_product_is_named() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.head = _forward(lambda m, x: (F.linear(x, m.weight, m.bias), x))(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.add(*self.own(x)))

    found = coverage(bnp.EmpiricalRisk(drawn(Both)(), F.cross_entropy, (numbers(12, 4), labels(12))))
    assert [layer.name for layer in found] == ["head"]
    said = "Own does something else than to multiply its input by its weight and add its bias"
    assert found.uncovered["own.weight"] == said


def test_nothing_but_a_lookalike() -> None:
    model = drawn(lambda: _forward(LOOKALIKES["a residual"])(4, 4))()
    pre = bnp.BNP(model)
    model(numbers(5, 4)).mean().backward()
    with pytest.raises(InvalidInputError, match="nothing to precondition"):
        pre.step()


# pruned and parametrized weights


class Times(nn.Module):
    """A parametrization that multiplies by what it holds."""

    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, v: Tensor) -> Tensor:
        return self.factor * v * 1.5


def with_mask(layer: nn.Module, parametrized: bool) -> nn.Module:
    mask = torch.bernoulli(torch.full_like(layer.weight, 0.6), generator=torch.Generator().manual_seed(3))
    if parametrized:
        return parametrize.register_parametrization(layer, "weight", Times((mask + 0.5) * 2))
    return prune.custom_from_mask(layer, "weight", mask)


def gain_of(layer: nn.Module) -> Tensor:
    """The fixed numbers, `(units, m)`, by hand."""
    if hasattr(layer, "weight_mask"):
        return layer.weight_mask.flatten(1)
    return 1.5 * layer.parametrizations.weight[0].factor.flatten(1)


GAINS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "dense": (lambda p: headed(with_mask(nn.Linear(5, 4), p), 4), (14, 5), lambda x: x),
    "sequence, no bias": (
        lambda p: headed(with_mask(nn.Linear(4, 3, bias=False), p), 6), (12, 2, 4), lambda x: x.flatten(0, 1),
    ),
    "convolution": (
        lambda p: headed(with_mask(nn.Conv1d(2, 3, 2), p), 6), (12, 2, 3),
        lambda x: torch.stack([x[:, :, i : i + 2].flatten(1) for i in range(2)], 1).flatten(0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("name", GAINS)
def test_weights_that_are_parameters_times_fixed_numbers(name: str, parametrized: bool) -> None:
    """Each unit's parameters meet the inputs times its own numbers; pruned entries meet zeros and get no step."""
    make, shape, table = GAINS[name]
    x = numbers(*shape)
    check_kind(
        drawn(lambda: make(parametrized)), x, labels(len(x)),
        lambda model, x: {"0": table(x)[:, None] * gain_of(model[0])}, shared=lambda model, x: {"0": table(x)},
    )  # fmt: skip


def test_pruned_entries_get_no_step_and_a_later_mask_is_read() -> None:
    model = drawn(lambda: headed(nn.Linear(5, 4), 4))()
    x, y = numbers(14, 5), labels(14)
    prune.random_unstructured(model[0], "weight", 0.5)
    pre = bnp.BNP(model)
    for amount in (0.5, 0.3):
        prune.random_unstructured(model[0], "weight", amount)  # a smaller mask, the same parameter
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pre.step()
        gone = model[0].weight_mask == 0
        assert pre.covered == ("0", "3")
        assert bool((model[0].weight_orig.grad[gone] == 0).all())
        assert bool((model[0].weight_orig.grad[~gone] != 0).all())
    prune.remove(model[0], "weight")
    assert pre.covered == ("3",)


def test_a_parametrization_that_is_taken_away_takes_its_layer_along() -> None:
    model = drawn(lambda: headed(with_mask(nn.Linear(5, 4), True), 4))()
    pre = bnp.BNP(model)
    assert pre.covered == ("0", "3")
    parametrize.remove_parametrizations(model[0], "weight")
    assert pre.covered == ("3",)


def test_pruned_biases_and_other_parametrizations_are_named() -> None:
    x, y = numbers(12, 4), labels(12)

    class Moving(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return v / v.norm()

    class Random(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return v * torch.ones_like(v)

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.ones(1))

        def forward(self, v: Tensor) -> Tensor:
            return v * self.s

    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.ones(4, 4))

        def forward(self, v: Tensor) -> Tensor:
            return self.w

    def layers() -> nn.Module:
        return nn.Sequential(
            prune.random_unstructured(nn.Linear(4, 4), "bias", 0.5),
            parametrizations.weight_norm(nn.Linear(4, 4)),
            parametrizations.orthogonal(nn.Linear(4, 4)),
            *(
                parametrize.register_parametrization(nn.Linear(4, 4), "weight", k())
                for k in (Moving, Random, Learned, Stored)
            ),
            nn.Linear(4, 3),
        )

    model = drawn(layers)()
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))
    found = coverage(risk)
    assert [layer.name for layer in found] == ["0", "7"]
    assert found["0"].bias is None
    assert found.uncovered["0.bias_orig"].startswith("a pruned bias")
    for i, kind in enumerate(["_WeightNorm", "_Orthogonal", "Moving", "Random", "Learned", "Stored"], start=1):
        said = {why for name, why in found.uncovered.items() if name.startswith(f"{i}.parametrizations.weight.orig")}
        assert said == {f"parametrized by {kind}: a weight is covered where it is one parameter times fixed numbers"}
    pre = bnp.BNP(model)
    F.cross_entropy(model(x), y).backward()
    pre.step()
    assert pre.covered == ("0", "7")


def test_kfac_leaves_pruned_weights_alone() -> None:
    model = drawn(lambda: headed(prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), 4))()
    P = bnp.kfac_preconditioner(bnp.EmpiricalRisk(model, F.cross_entropy, (numbers(12, 4), labels(12))))
    assert [*P.blocks] == ["3"]
    assert "no factors of pruned" in P.uncovered["0.weight_orig"]


def test_measured_scales_of_pruned_weights() -> None:
    """`q^2 = |G^|^2 / R` of the unit with the largest."""
    model = drawn(lambda: headed(prune.random_unstructured(nn.Linear(4, 4), "weight", 0.4), 4))()
    x, y = numbers(12, 4), labels(12)
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))
    normalized = (x - x.mean(0)) / x.std(0, correction=0)
    sizes = [
        torch.linalg.matrix_norm(torch.cat([normalized * mask, x.new_ones(12, 1)], 1), 2) / 12**0.5
        for mask in model[0].weight_mask
    ]
    assert bnp.bnp_preconditioner(risk, q="measured").q["0"] == pytest.approx(float(max(sizes)))
    pre = bnp.BNP(model, rho=0.0, eps1=0.0, eps2=0.0, q="measured")
    for _ in range(10):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pre.step()
    assert pre.preconditioner().q["0"] == pytest.approx(float(max(sizes)), rel=1e-3)


# embeddings


class Words(nn.Module):
    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(6, 4, padding_idx=padding), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).flatten(1))


def sentences(n: int = 14) -> Tensor:
    """Indices 0 to 4 of 6, unevenly."""
    return torch.randint(25, (n, 2), generator=torch.Generator().manual_seed(2)).sqrt().long()


def test_embeddings() -> None:
    x = sentences()
    check_kind(
        drawn(Words), x, labels(len(x)),
        lambda model, x: {
            "words": F.one_hot(x.flatten(), 6).double(), "head": torch.tanh(model.words(x)).flatten(1).detach(),
        },
        also=[nn.Embedding],
    )  # fmt: skip


def test_an_embedding_trains_as_a_dense_layer_on_indicators_and_padding_gets_no_step() -> None:
    """`padding_idx` cuts the gradient of its row: the indicators of that index are zero rows."""
    for padding in (None, 0, 4):
        model = drawn(lambda padding=padding: Words(padding))()
        twin = nn.Linear(6, 4, bias=False).double()
        twin.weight.data.copy_(model.words.weight.T)
        x, y = sentences(), labels(14)
        one_hot = F.one_hot(x, 6).double()
        fixed = 0.0
        if padding is not None:
            one_hot[..., padding] = 0
            fixed = (x == padding).double()[..., None] * model.words.weight[padding].detach()
        pres = bnp.BNP(model, also=[nn.Embedding], exclude="head"), bnp.BNP(twin)
        for rows in torch.arange(14).split(7):
            model.zero_grad()
            twin.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            inner = twin(one_hot[rows]) + (fixed if padding is None else fixed[rows])
            F.cross_entropy(model.head(torch.tanh(inner).flatten(1)), y[rows]).backward()
            for pre in pres:
                pre.step()
            torch.testing.assert_close(model.words.weight.grad, twin.weight.grad.T)
        if padding is not None:
            assert not model.words.weight.grad[padding].any()


@pytest.mark.parametrize("padding", [None, 4])
def test_the_measured_scale_of_an_embedding_is_that_of_its_indicators(padding: int | None) -> None:
    x, y = sentences(), labels(14)
    one_hot = F.one_hot(x, 6).double()
    if padding is not None:
        one_hot[..., padding] = 0
    model, twin = drawn(lambda: Words(padding))(), nn.Linear(6, 4, bias=False).double()
    scales = []
    for net, output, options in (
        (model, lambda: F.cross_entropy(model(x), y), {"also": [nn.Embedding], "exclude": "head"}),
        (twin, lambda: twin(one_hot).square().mean(), {}),
    ):
        pre = bnp.BNP(net, q="measured", **options)
        output().backward()
        pre.step()
        scales += pre.preconditioner().q.values()
    assert scales[0] == pytest.approx(scales[1], rel=1e-9)


def test_no_dense_rows_for_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnp_analysis.network.layer_kinds import EmbeddingLayer

    def fail(self: object, h: Tensor) -> Tensor:
        raise AssertionError("formed")

    monkeypatch.setattr(EmbeddingLayer, "rows", fail)
    model, x, y = drawn(Words)(), sentences(), labels(14)
    bnp.bnp_preconditioner(bnp.EmpiricalRisk(model, F.cross_entropy, (x, y)), also=[nn.Embedding])
    pre = bnp.BNP(model, also=[nn.Embedding])
    F.cross_entropy(model(x), y).backward()
    pre.step()
    assert pre.covered == ("words", "head")


def test_embeddings_are_left_alone_unless_asked_for() -> None:
    model, x, y = drawn(Words)(), sentences(), labels(14)
    pre = bnp.BNP(model)
    F.cross_entropy(model(x), y).backward()
    plain = model.words.weight.grad.clone()
    pre.step()
    said = "covered where it is asked for, also=[Embedding]"
    assert torch.equal(model.words.weight.grad, plain)
    assert pre.uncovered == {"words.weight": said}
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))
    assert coverage(risk).uncovered == {"words.weight": said}
    for options, why in (
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse"),
        ({"scale_grad_by_freq": True}, "freq"),
    ):
        net = nn.Sequential(nn.Embedding(6, 4, **options), nn.Linear(4, 3))
        assert why in bnp.BNP(net, also=[nn.Embedding]).uncovered["0.weight"]
    for wrong in ([nn.ReLU], ["Embedding"], nn.ReLU):
        with pytest.raises(InvalidInputError, match="also= takes types of layers"):
            bnp.BNP(model, also=wrong)
    other = copy.deepcopy(bnp.BNP(model, also=[nn.Embedding]))
    assert other.covered == ("words", "head")


# transposed convolutions


def by_unit_vectors(module: nn.Module, x: Tensor) -> Tensor:
    """The rows of a transposed convolution, `(R, units, m)`, from derivatives of its output in its weight alone."""
    kernel = module.weight.shape

    def output(w: Tensor) -> Tensor:
        return torch.func.functional_call(
            module, {"weight": w, "bias": torch.zeros(module.out_channels).double()}, (x,)
        )

    J = torch.autograd.functional.jacobian(output, module.weight.detach())  # (N, units, ..., in, units/groups, ...)
    J = J.movedim(1, -1 - len(kernel)).flatten(0, -2 - len(kernel))  # (R, units, in, units/groups, ...)
    per_group = module.out_channels // module.groups
    inputs = module.in_channels // module.groups
    rows = []
    for i in range(module.out_channels):
        g = i // per_group
        rows.append(J[:, i, g * inputs : (g + 1) * inputs, i % per_group].flatten(1))
    return torch.stack(rows, 1)


TRANSPOSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (7, 2, 3)),
    "1d, cropped, dilation": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=3, padding=3, dilation=2), (7, 2, 4)),
    "2d, groups": (
        lambda: nn.ConvTranspose2d(4, 4, 2, stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2), (6, 4, 3, 2),
    ),
    "2d, no bias": (lambda: nn.ConvTranspose2d(2, 2, 2, stride=2, bias=False), (6, 2, 2, 2)),
    "3d": (lambda: nn.ConvTranspose3d(1, 2, (3, 1, 2), stride=(2, 1, 2), padding=(1, 0, 0)), (5, 1, 2, 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name: str) -> None:
    make, shape = TRANSPOSED[name]
    x = numbers(*shape)
    width = make()(x.float()).flatten(1).shape[1]
    check_kind(
        drawn(lambda: headed(make(), width)), x, labels(len(x)),
        lambda model, x: {"0": by_unit_vectors(model[0], x)},
    )  # fmt: skip


@pytest.mark.parametrize("name", TRANSPOSED)
def test_moments_of_transposed_convolutions_per_channel(name: str) -> None:
    """Of the image with zeros in between; in training and in the exact risk, with numbers of rows and examples."""
    make, shape = TRANSPOSED[name]
    x, model = numbers(*shape), drawn(make)()
    risk = bnp.EmpiricalRisk(model, lambda o, y: o.flatten(1).square().sum(1).mean(), (x, torch.zeros(len(x))))
    found = bnp.network.layer_moments(risk)[""]
    zeros = torch.zeros(*shape[:2], *((n - 1) * s + 1 for n, s in zip(shape[2:], model.stride, strict=True))).double()
    zeros[(..., *(slice(None, None, s) for s in model.stride))] = x
    image = zeros.movedim(1, -1).flatten(0, -2)
    layer = coverage(risk)[""]
    torch.testing.assert_close(found.mean, layer.expand(image.mean(0)))
    torch.testing.assert_close(found.variance, layer.expand(image.var(0, correction=0)))
    assert (found.rows, found.examples) == (model(x).numel() // model.out_channels, len(x))
    pre = bnp.BNP(model, rho=0.0)
    model(x).square().mean().backward()
    pre.step()
    torch.testing.assert_close(pre.preconditioner().blocks[""][1].mean, found.mean)
    entry = pre.state_dict()["layers"][""]
    assert (entry["rows"], entry["examples"]) == (found.rows, found.examples)


def test_another_output_size_is_named() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 3, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[8])

    x = numbers(5, 2, 3)
    found = coverage(bnp.EmpiricalRisk(drawn(Sized)(), F.mse_loss, (x, torch.zeros(5, 3, 8).double())))
    assert found.uncovered["up.weight"] == "ConvTranspose1d does not compute the product that it was registered for"


# graph networks


class GCN(nn.Module):
    """Two graph convolutions: propagation, then a dense layer."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.A @ torch.tanh(self.inner(self.A @ x)))


def test_rows_of_graph_convolutions_are_the_nodes_of_propagated_features() -> None:
    """Message passing couples the examples; a layer's rows, and its curvature by the whole graph, stay exact."""
    g = torch.Generator().manual_seed(5)
    A = torch.bernoulli(torch.full((12, 12), 0.3), generator=g)
    A = ((A + A.T) > 0).double() + torch.eye(12)
    A = A / (A.sum(0)[:, None] * A.sum(0)).sqrt()
    x = numbers(12, 3)
    check_kind(
        drawn(lambda: GCN(A)), x, labels(12),
        lambda model, x: {"inner": A @ x, "outer": A @ torch.tanh(model.inner(A @ x)).detach()},
    )  # fmt: skip


# normalizations


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_gains_and_offsets_of_normalizations(kind: type[nn.Module]) -> None:
    x = numbers(12, 2, 5)

    def normalized(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if kind is nn.LayerNorm else x
        eps = 1e-5 if kind is nn.LayerNorm else torch.finfo(torch.float64).eps
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def rows(model: Any, x: Tensor) -> dict[str, Tensor]:
        return {"0": normalized(x).flatten(0, 1).unsqueeze(2)}

    check_kind(drawn(lambda: headed(kind(5), 10)), x, labels(12), rows, also=[kind])
    said = f"covered where it is asked for, also=[{kind.__name__}]"
    assert bnp.BNP(headed(kind(5), 10)).uncovered["0.weight"] == said
    several = nn.Sequential(kind([2, 5]), nn.Flatten(), nn.Linear(10, 3))
    assert bnp.BNP(several, also=[kind]).uncovered["0.weight"] == "it normalizes several dimensions"


# The norm, its mode, the shape of its input, and the axes whose mean and variance it takes out; None: running ones.
CHANNELS: dict[str, tuple[Callable[[], nn.Module], bool, tuple[int, ...], tuple[int, ...] | None]] = {
    "group": (lambda: nn.GroupNorm(2, 4, eps=0.1), True, (9, 4, 3), (2, 3)),
    "group, one channel": (lambda: nn.GroupNorm(1, 1), True, (9, 1, 2, 2), (2, 3, 4)),
    "group, without positions": (lambda: nn.GroupNorm(2, 6), True, (9, 6), (2,)),
    "instance 1d": (lambda: nn.InstanceNorm1d(2, affine=True), True, (9, 2, 4), (2,)),
    "instance 2d": (lambda: nn.InstanceNorm2d(2, affine=True), True, (9, 2, 2, 3), (2, 3)),
    "instance 3d": (lambda: nn.InstanceNorm3d(2, affine=True, eps=0.1), True, (6, 2, 2, 1, 3), (2, 3, 4)),
    "instance, tracked": (lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), True, (9, 2, 4), (2,)),
    "batch, running": (lambda: nn.BatchNorm1d(4), False, (9, 4), None),
    "batch 1d, running": (lambda: nn.BatchNorm1d(2, eps=0.1), False, (9, 2, 3), None),
    "batch 2d, running": (lambda: nn.BatchNorm2d(2), False, (9, 2, 2, 2), None),
    "batch 3d, running": (lambda: nn.BatchNorm3d(2), False, (6, 2, 1, 2, 2), None),
    "batch, untracked": (lambda: nn.BatchNorm1d(2, track_running_stats=False), False, (9, 2, 3), (0, 2)),
    "batch, training": (lambda: nn.BatchNorm2d(2), True, (9, 2, 2, 2), (0, 2, 3)),
}  # fmt: skip


def channels_normalized(norm: Any, x: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """The normalized channels of every position, `(R, c)`."""
    grouped = x.unflatten(1, (norm.num_groups, -1)) if isinstance(norm, nn.GroupNorm) else x
    if axes is None:
        per_channel = [-1, *[1] * (x.ndim - 2)]
        mean, variance = norm.running_mean.view(per_channel), norm.running_var.view(per_channel)
    else:
        mean = grouped.mean(axes, keepdim=True)
        variance = (grouped - mean).square().mean(axes, keepdim=True)
    found = ((grouped - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    return found.movedim(1, -1).reshape(-1, x.shape[1])


def channel_norm(name: str) -> tuple[Callable[[], nn.Module], Tensor]:
    """A network that begins with a norm in its mode, all else in training; its data."""
    make, training, shape, _ = CHANNELS[name]

    def made() -> nn.Module:
        model = headed(make(), torch.Size(shape[1:]).numel())
        model[0].train(training)
        if getattr(model[0], "running_mean", None) is not None:
            nn.init.normal_(model[0].running_mean)
            nn.init.uniform_(model[0].running_var, 0.2, 3.0)
        return model

    return drawn(made), numbers(*shape)


@pytest.mark.parametrize("name", CHANNELS)
def test_gains_and_offsets_of_normalized_channels(name: str) -> None:
    make, x = channel_norm(name)
    check_kind(
        make, x, labels(len(x)),
        lambda model, x: {"0": channels_normalized(model[0], x, CHANNELS[name][3]).unsqueeze(2)},
        also=[type(make()[0])],
    )  # fmt: skip


def test_normalized_channels_are_counted_and_asked_for() -> None:
    """Rows and examples, also of one example by itself; K-FAC; what is no layer of the kind is named."""
    make, x = channel_norm("batch 2d, running")
    risk = bnp.EmpiricalRisk(make(), F.cross_entropy, (x, labels(9)))
    found = coverage(risk, [nn.BatchNorm2d])
    moments = bnp.network.layer_moments(risk, layers=found)["0"]
    assert (moments.rows, moments.examples, found["0"].positions(x)) == (36, 9, 4)
    pre = bnp.BNP(make(), also=[nn.BatchNorm2d], output_scale="estimated")
    F.cross_entropy(pre.model(x), labels(9)).backward()
    pre.step()
    entry = pre.state_dict()["layers"]["0"]
    assert (entry["rows"], entry["examples"]) == (36, 9)
    assert bool((entry["output_squares"] != 1).all())
    pre.model.eval()
    pre.model(x)
    with pytest.raises(InvalidInputError, match="without a forward pass in training mode"):
        pre.step()
    one = bnp.BNP(nn.InstanceNorm1d(2, affine=True).double(), also=[nn.InstanceNorm1d])
    one.model(numbers(2, 5)).square().sum().backward()
    one.step()
    assert (one.state_dict()["layers"][""]["rows"], one.state_dict()["layers"][""]["examples"]) == (5, 1)
    low = make().bfloat16()
    half = bnp.BNP(low, also=[nn.BatchNorm2d])
    low(x.bfloat16()).square().sum().backward()
    half.step()
    seen = half.state_dict()["layers"]["0"]["mean"]
    torch.testing.assert_close(seen, moments.mean[:, 0].float(), rtol=0.02, atol=0.02)
    said = "covered where it is asked for, also=[BatchNorm2d]"
    assert bnp.BNP(make()).uncovered["0.weight"] == said
    own = type("Own", (nn.GroupNorm,), {"forward": lambda self, x: 2 * x * self.weight[:, None] + self.bias[:, None]})
    twice = bnp.EmpiricalRisk(drawn(lambda: headed(own(2, 4), 12))(), F.cross_entropy, (numbers(9, 4, 3), labels(9)))
    said = "Own computes something else with its weight or its input"
    assert coverage(twice, [nn.GroupNorm]).uncovered["0.weight"] == said
