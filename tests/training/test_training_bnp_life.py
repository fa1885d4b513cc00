"""The life of a BNP object: saved, loaded, copied, closed, measured beside, frozen layers, and all it refuses.

Bugs that only these tests catch: a resumed run that is not the uninterrupted one, a state put into another network,
hooks that survive `close()` or a copy of the model (a measurement would then change the statistics it is measured
with), a second application of `P P^T`, a layer skipped in silence, a step that half happened before an error.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from bnp_loops import backward, gradient, loss_of, network, parameters, stepped
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.training.bnp import BNP


def numbers(pre: BNP) -> object:
    """The whole state, comparable."""
    state = pre.state_dict()
    layers = {n: {k: torch.as_tensor(v).tolist() for k, v in e.items()} for n, e in state["layers"].items()}
    return state["step"], layers


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("options", [{}, {"q": "measured"}, {"statistics": "patch"}, {"init": "paper", "q": 2.0}])
def test_a_resumed_run_is_the_uninterrupted_one(options: dict[str, object]) -> None:
    model, x, y = network("padding")
    pre = BNP(model, **options)  # type: ignore[arg-type]
    for k in range(3):
        stepped(model, x + k, y, pre)
    file = io.BytesIO()
    torch.save(pre.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = BNP(twin, **options)  # type: ignore[arg-type]
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.preconditioner().to_dense(), pre.preconditioner().to_dense())
    for k in range(2):
        expected = stepped(model, x - k, y, pre)[1]
        found = stepped(twin, x - k, y, other)[1]
        if options.get("q") == "measured":
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # power steps begin anew
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sequence", {}), ("1d", {}), ("padding", {"statistics": "patch"}), ("padding", {"exclude": "0"})],
)
def test_the_state_of_another_architecture_is_refused_whole(kind: str, options: dict[str, object]) -> None:
    model, x, y = network("padding")
    pre = BNP(model)
    stepped(model, x, y, pre)
    other_model, other_x, other_y = network(kind)
    other = BNP(other_model, **options)  # type: ignore[arg-type]
    stepped(other_model, other_x, other_y, other)
    before = other.preconditioner().to_dense()
    with pytest.raises(InvalidInputError, match="another architecture"):
        other.load_state_dict(pre.state_dict())
    assert torch.equal(other.preconditioner().to_dense(), before)
    with pytest.raises(InvalidInputError, match="no state of BNP"):
        other.load_state_dict({"weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (None, None, "no entries"),
        ("mean", torch.tensor([torch.nan] * 5), "mean that is not finite"),
        ("variance", -torch.ones(5), "variance that is not finite, or negative"),
        ("variance", None, "no variance"),
        ("rows", -1, "no counts"),
        ("start", 2.0, "outside of"),
        ("q2", 0.0, "not positive"),
        ("output_squares", -torch.ones(4), "output_squares that is not finite, or negative"),
        ("skewness", torch.ones(5), "entries skewness that no statistics have"),
        ("direction", torch.ones(6), r"direction that is no tensor \(1, 6, 1\)"),
        ("direction", [1.0] * 6, "direction that is no tensor"),
        ("direction", torch.full((1, 6, 1), torch.nan), "direction that is not finite"),
    ],
)
def test_a_damaged_state_changes_nothing(key: str | None, value: object, said: str) -> None:
    model, x, y = network()
    pre = BNP(model, output_scale="estimated")
    stepped(model, x, y, pre)
    state = copy.deepcopy(pre.state_dict())
    if key is None:
        state["layers"]["0"] = value
    else:
        state["layers"]["0"][key] = value
    before = numbers(pre)
    with pytest.raises(InvalidInputError, match=f"'0' has .*{said}.*nothing was changed"):
        pre.load_state_dict(state)
    assert numbers(pre) == before


def test_a_deep_copy_goes_on_by_itself() -> None:
    model, x, y = network()
    pre = BNP(model, rho=0.5)
    stepped(model, x, y, pre)
    twin, other = copy.deepcopy((model, pre))
    assert other.model is twin
    expected = stepped(model, x + 1, y, pre)[1]
    assert torch.equal(stepped(twin, x + 1, y, other)[1], expected)
    stepped(twin, 100 * x, y, other)
    assert pre.state_dict()["step"] == 2


def test_a_copy_of_a_closed_object_is_closed() -> None:
    model, x, y = network()
    pre = BNP(model)
    stepped(model, x, y, pre)
    pre.close()
    twin, other = copy.deepcopy((model, pre))
    assert hooks(twin) == 0
    with pytest.raises(InvalidInputError, match="after close"):
        other.step()
    assert numbers(other) == numbers(pre)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_the_hooks_of_a_copied_model_do_nothing(how: object) -> None:
    model, x, _ = network()
    linear = model[0]
    pre = BNP(linear)
    twin = how(linear)  # type: ignore[operator]
    twin(100 * x).sum().backward()
    assert not pre._pending


def test_measurements_do_not_disturb_the_statistics() -> None:
    model, x, y = network("padding")
    pre = BNP(model)
    stepped(model, x, y, pre)
    state = numbers(pre)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (100 * x, y))
    bnp.condition_number(bnp.gauss_newton(risk, block="0"))
    bnp.bnp_preconditioner(risk)
    assert not pre._pending
    assert numbers(pre) == state
    assert hooks(model) == 3


def test_close_removes_every_hook() -> None:
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with BNP(model).attach(optimizer) as pre:
        assert hooks(model) == 3
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        backward(model, x, y)
    assert hooks(model) == 0
    assert len(optimizer._optimizer_step_pre_hooks) == 0
    optimizer.step()
    pre.close()
    for act in (pre.step, lambda: pre.attach(optimizer)):
        with pytest.raises(InvalidInputError, match="close"):
            act()


def test_a_step_of_frozen_layers_says_so() -> None:
    """No advice about forward passes: adapters beside a frozen layer leave nothing to precondition."""
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.LayerNorm(4))
    pre = BNP(model)
    model(torch.ones(5, 3)).sum().backward()
    with pytest.raises(InvalidInputError, match=r"nothing to precondition.*0 first, are frozen"):
        pre.step()


def test_a_script_of_a_hooked_model_is_explained() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with BNP(model), pytest.raises(InvalidInputError, match=r"compile the hooks of BNP.*close\(\) first"):
        torch.jit.script(model)


def test_a_forgotten_object_does_nothing() -> None:
    model, x, y = network()
    BNP(model)
    gc.collect()
    backward(model, x, y)
    attached = torch.optim.SGD(model.parameters(), lr=0.1)
    BNP(model).attach(attached)
    gc.collect()
    before = gradient(model).clone()
    backward(model, x, y)
    attached.step()
    assert not torch.equal(gradient(model), 2 * before), "the optimizer keeps the attached one"


def test_a_second_step_is_an_error() -> None:
    model, x, y = network()
    pre = BNP(model)
    before, after = stepped(model, x, y, pre)
    with pytest.raises(InvalidInputError, match="twice"):
        pre.step()
    assert torch.equal(gradient(model), after)
    loss_of(model, x, y)
    with pytest.raises(InvalidInputError, match="without a backward pass"):
        pre.step()
    assert torch.equal(gradient(model), after)
    backward(model, x, y)
    pre.step()
    assert pre.state_dict()["step"] == 2
    assert not torch.equal(before, after)
    versions = [p.grad._version for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    backward(model, x, y)
    for p, version in zip(model.parameters(), versions, strict=True):
        while p.grad is not None and p.grad._version < version:
            p.grad.mul_(1)
    pre.step()
    assert pre.state_dict()["step"] == 3, "new gradients that were written to as often as the old"


def test_missing_gradients_are_said() -> None:
    model, x, y = network()
    pre = BNP(model)
    with pytest.raises(InvalidInputError, match="without a forward pass"):
        pre.step()
    loss = loss_of(model, x, y)
    with pytest.raises(InvalidInputError, match="before any backward"):
        pre.step()
    loss.backward()
    model[0].weight.grad = None
    before = gradient(model).clone()
    with pytest.raises(InvalidInputError, match=r"no gradient: 0\.weight\."):
        pre.step()
    assert torch.equal(gradient(model), before)
    assert pre.state_dict()["step"] == 0


def test_sparse_gradients_are_refused() -> None:
    model, x, y = network()
    pre = BNP(model)
    backward(model, x, y)
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(InvalidInputError, match="layer '2' is sparse"):
        pre.step()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 12])
def test_non_finite_activations_name_the_layer_and_the_step(bad: float, rows: int) -> None:
    model, x, y = network(rows=rows)
    pre = BNP(model)
    stepped(model, x, y, pre)
    state = numbers(pre)
    z = x.clone()
    z[0, 0] = bad
    model.zero_grad()
    backward(model, z, y)
    before = gradient(model).clone()
    with pytest.raises(NonFiniteError, match="layer '0' has NaN or infinite entries at step 2"):
        pre.step()
    assert torch.equal(gradient(model).nan_to_num(), before.nan_to_num())
    assert numbers(pre) == state
    assert not torch.is_inference_mode_enabled(), "the error left the mode that step() works in"
    stepped(model, x, y, pre)


@pytest.mark.parametrize("reading", ["period", "state_dict", "close", "exit"])
def test_the_flag_is_read_every_so_often(reading: str) -> None:
    """As on a GPU: the statistics never take in what is not finite, and the first bad step is the one reported."""
    model, x, y = network()
    pre = BNP(model, check_every=4)
    stepped(model, x, y, pre)
    good = pre.preconditioner().to_dense()
    bad = x.clone()
    bad[3, 1] = torch.inf
    stepped(model, bad, y, pre)
    stepped(model, bad, y, pre)
    assert torch.equal(pre.preconditioner().to_dense(), good)

    def leave() -> None:
        with pre:
            pass

    last = {
        "period": lambda: stepped(model, x, y, pre),
        "state_dict": pre.state_dict,
        "close": pre.close,
        "exit": leave,
    }
    with pytest.raises(NonFiniteError, match=r"layer '0' .* at step 2"):
        last[reading]()


def test_large_finite_activations_are_finite() -> None:
    model = nn.Linear(3, 2)
    pre = BNP(model)
    x = torch.tensor([[1e19, 2e19, 1.0], [3e19, 1e19, 2.0]])
    (1e-20 * model(x)).sum().backward()
    pre.step()
    assert bool(torch.isfinite(gradient(model)).all())


def test_frozen_layers() -> None:
    model, x, y = network()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    pre = BNP(model, eps1=0, eps2=0)
    assert pre.covered == ("2",)
    _, after = stepped(model, x, y, pre)
    assert model[0].weight.grad is None
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    P = bnp.bnp_preconditioner(risk)
    assert pre.preconditioner().dim == P.dim == 12
    torch.testing.assert_close(after, P.direction(risk.gradient), rtol=1e-11, atol=1e-13)
    assert pre.uncovered == {
        "0.weight": "0: its weight is frozen",
        "0.bias": "0: its weight is frozen",
        "2.bias": "frozen",
    }
    model[0].requires_grad_(True)
    stepped(model, x, y, pre)
    assert pre.covered == ("0", "2")


class Attention(nn.Module):
    """Its output layer's forward never runs, though it has a gradient; a tied pair; an own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.own = Own(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(x, x, x)[0] + self.own(x)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(h)))).mean(1))


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x**2, self.weight, self.bias)


def test_what_cannot_be_covered_is_named_and_left_alone() -> None:
    _, x, y = network("sequence")
    model = Attention().double()
    pre = BNP(model)
    assert pre.covered == ("attention.out_proj", "head")
    before = stepped(model, x, y, pre)[0]
    named = dict(model.named_parameters())
    assert pre.covered == ("head",)
    assert set(pre.uncovered) >= set(named) - {"head.weight", "head.bias"}
    assert "never ran" in pre.uncovered["attention.out_proj.weight"]
    assert "tied" in pre.uncovered["first.weight"]
    assert "computes something else" in pre.uncovered["own.weight"]
    n = before.numel() - sum(p.numel() for p in model.head.parameters())
    assert torch.equal(before[:n], gradient(model)[:n])
    assert pre.preconditioner().dim == parameters(model).numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 1.0}, "rho"),
        ({"rho": -0.1}, "rho"),
        ({"eps1": -1.0}, "eps1 must be at least 0"),
        ({"eps2": float("nan")}, "eps2 must be"),
        ({"q": 0}, "q must be"),
        ({"q": True}, "q must be"),
        ({"q": "off"}, "q must be"),
        ({"variance": "none"}, "variance must be one of total, within"),
        ({"init": "zero"}, "init must be one of"),
        ({"statistics": "pixel"}, "statistics must be one of"),
        ({"bias_free": "full"}, "bias_free must be one of"),
        ({"check_every": 0}, "check_every"),
        ({"reference_rows": 0}, "reference_rows"),
        ({"include": "body"}, "match no layer; there are: 0, 2"),
        ({"exclude": ["0", "2"]}, "nothing to precondition"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        BNP(network()[0], **options)  # type: ignore[arg-type]


def test_models_without_anything_to_precondition() -> None:
    for model in (nn.LayerNorm(3), nn.ReLU(), nn.Sequential(nn.Embedding(3, 2))):
        with pytest.raises(InvalidInputError, match="nothing to precondition"):
            BNP(model)
    with pytest.raises(InvalidInputError, match="lazy"):
        BNP(nn.LazyLinear(3))
    with pytest.raises(InvalidInputError, match=r"nn\.Module"):
        BNP(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="before the first step"):
        BNP(nn.Linear(2, 2)).preconditioner()


def test_an_empty_batch_and_a_bare_layer() -> None:
    model = nn.Linear(3, 2).double()
    pre = BNP(model)
    model(torch.zeros(0, 3, dtype=torch.float64)).sum().backward()
    with pytest.raises(InvalidInputError, match="without a forward pass"):
        pre.step()
    model(torch.eye(3, dtype=torch.float64)).sum().backward()
    pre.step()
    assert pre.covered == ("",)
    assert list(pre.state_dict()["layers"]) == [""]
    assert "BNP" in repr(pre)


@pytest.mark.parametrize("kind", ["sequence", "padding"])
def test_an_empty_batch_among_others_changes_nothing(kind: str) -> None:
    model, x, y = network(kind)
    twin = copy.deepcopy(model)
    pre, other = BNP(model), BNP(twin)
    model(x[:0])
    assert torch.equal(stepped(model, x, y, pre)[1], stepped(twin, x, y, other)[1])


def test_changes_of_precision_and_device_are_followed() -> None:
    model, x, y = network()
    pre = BNP(model)
    stepped(model, x, y, pre)
    model.float()
    stepped(model, x.float(), y, pre)
    assert pre.preconditioner().dtype == torch.float32
    assert gradient(model).dtype == torch.float32


@pytest.mark.parametrize("kind", ["dense", "padding"])
def test_precision_changes_back_and_forth(kind: str) -> None:
    """Views that are made once are made anew: otherwise old statistics would go on acting, unseen."""
    model, x, y = network(kind)
    pre = BNP(model, rho=0.5)
    for dtype in (torch.float64, torch.float32, torch.float64):
        model.to(dtype)
        for k in range(3):
            h = (x * (1 + k)).to(dtype)
            twin = copy.deepcopy(model)
            fresh = BNP(twin, rho=0.5)
            fresh.load_state_dict(pre.state_dict())
            after = stepped(model, h, y, pre)[1]
            assert torch.equal(stepped(twin, h, y, fresh)[1], after)
            assert after.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_layers_of_other_numbers_are_named_and_left_alone(dtype: torch.dtype) -> None:
    """Moments of complex inputs would be those of their real parts."""
    other = nn.Linear(3, 2, dtype=dtype) if dtype.is_complex else nn.Linear(3, 2).to(dtype)
    with pytest.raises(InvalidInputError, match=r"nothing to precondition.*weight: BNP is defined for real numbers"):
        bnp.BNP(other)
    pre = bnp.BNP(nn.ModuleDict({"real": nn.Linear(3, 2), "other": other}))
    assert str(dtype) in pre.uncovered["other.weight"]
    assert "real.weight" not in pre.uncovered
