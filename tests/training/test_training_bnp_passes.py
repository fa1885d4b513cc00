"""BNP where a loop goes astray: skipped batches, failed passes, optimizers that are not the one, layers that changed.

Bugs that only these tests catch: rows of a batch that failed or was skipped in the next step's statistics, gradients of
`torch.func` that leave dead tensors there, an optimizer that trains while BNP never steps, `P P^T` applied by two
objects, layers that were replaced, added or pruned and count as covered, wrappers of optimizers without hooks.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from bnp_loops import backward, gradient, network, relative, stepped
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, NonFiniteError, TrainingWarning
from bnp_analysis.network import ParameterSpace
from bnp_analysis.network.layer_kinds import KINDS
from bnp_analysis.training.bnp import BNP


def twins() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model, x, y = network()
    return model, copy.deepcopy(model), x, y


def test_a_discarded_batch_leaves_nothing() -> None:
    model, twin, x, y = twins()
    pre, other = BNP(model, q="measured"), BNP(twin, q="measured")
    model(torch.full_like(x, torch.nan))
    pre.discard()
    assert torch.equal(stepped(model, x, y, pre)[1], stepped(twin, x, y, other)[1])
    model(torch.full_like(x, torch.nan))
    with pytest.raises(NonFiniteError, match=r"discard\(\)"):
        stepped(model, x, y, pre)


class FailError(Exception):
    pass


class Failing:
    """A hook that raises while it is `on`."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.on = error, False

    def __call__(self, *_: object) -> None:
        if self.on:
            raise self.error

    def pass_of(self, model: nn.Module, x: Tensor) -> None:
        """A forward pass that fails."""
        self.on = True
        with pytest.raises(self.error):
            model(x)
        self.on = False


def alone(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def accumulated(model: nn.Module, x: Tensor, y: Tensor, pre: BNP, between: Any = lambda: None) -> Tensor:
    """The gradient of two micro-batches after `step()`; what happens between them must not matter."""
    model.zero_grad()
    backward(model, x[:5], y[:5])
    between()
    backward(model, x[5:], y[5:])
    pre.step()
    return gradient(model)


OPTIONS: list[dict[str, bool]] = [{}, {"always_call": True}, {"prepend": True}, {"with_kwargs": True}]
ERRORS: list[type[BaseException]] = [FailError, KeyboardInterrupt]
#: Wrapper, error, whose hook raises it, options of the hook, whether BNP is made before it, whether in an except block.
FAILURES: list[Any] = [
    *itertools.product([alone], ERRORS, ["0", "2", ""], OPTIONS, [False, True], [False, True]),
    *itertools.product([nn.DataParallel], ERRORS, ["0", "", "wrapper"], [{}], [True], [False]),
    # Compiling takes most of a case: each wrapper raises each error, in each place once.
    (compiled, FailError, "0", {}, True, False),
    (compiled, KeyboardInterrupt, "", {}, True, False),
    (compiled, FailError, "wrapper", {}, True, False),
    (compiled_in_place, KeyboardInterrupt, "0", {}, True, False),
    (compiled_in_place, FailError, "", {}, True, False),
    (compiled_in_place, KeyboardInterrupt, "wrapper", {}, True, False),
]


@pytest.mark.parametrize(("wrap", "error", "where", "options", "first", "handling"), FAILURES)
def test_rows_of_a_failed_pass_do_not_stay(
    wrap: Any, error: type[BaseException], where: str, options: dict[str, bool], first: bool, handling: bool
) -> None:
    """Whatever hook raises, of the model, a layer or a wrapper; rows of the micro-batch before do stay."""
    model, twin, x, y = twins()
    wrapped, hook = wrap(model), Failing(error)
    module = wrapped if where == "wrapper" else model.get_submodule(where)
    if not first:
        module.register_forward_hook(hook, **options)
    pre, other = BNP(wrapped, q="measured"), BNP(twin, q="measured")
    if first:
        module.register_forward_hook(hook, **options)

    def fails() -> None:
        if not handling:
            hook.pass_of(wrapped, 100 * x)
            return
        try:
            raise ValueError
        except ValueError:
            hook.pass_of(wrapped, 100 * x)

    for _ in range(2):
        found = accumulated(wrapped, x, y, pre, fails)
        assert relative(found, accumulated(twin, x, y, other)) < 1e-14
    if wrap in (compiled, compiled_in_place):
        torch.compiler.reset()


@pytest.mark.parametrize("error", ERRORS)
def test_rows_of_a_model_that_calls_itself_stay_if_it_survives(error: type[BaseException]) -> None:
    """The inner pass that fails and is caught leaves nothing; the outer one, and inner ones that succeed, leave all."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.hook = nn.Linear(3, 3).double(), Failing(error)
            self.layer.register_forward_hook(self.hook)
            self.tries = True

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            out = torch.tanh(self.layer(x))
            if depth:
                if self.tries:
                    self.hook.pass_of(self, 100 * x)
                out = self(out, depth - 1)
            return self.layer(out)

    model = Nested()
    twin = copy.deepcopy(model)
    twin.tries = False
    x = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for m in (model, twin):
        pre = BNP(m, q="measured")
        m(x).square().sum().backward()
        pre.step()
        found.append(gradient(m))
    assert relative(*found) < 1e-14


def test_a_step_inside_a_pass_that_fails_afterwards_is_not_undone() -> None:
    """As in loops that optimize by hand inside of the model's `forward`."""

    class Manual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fails = nn.Linear(3, 2).double(), False

        def forward(self, x: Tensor) -> None:
            self.zero_grad()
            self.layer(x).square().sum().backward()
            self.pre.step()
            if self.fails:
                raise FailError

    model = Manual()
    twin = copy.deepcopy(model)
    x = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for m in (model, twin):
        m.pre = BNP(m, q="measured")
        m(x)
    model.fails = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch makes warnings of errors in hooks
        with pytest.raises(FailError):
            model(100 * x)
    twin(100 * x)
    model.fails = False
    for m in (model, twin):
        m(x)
    assert torch.equal(gradient(model), gradient(twin))


def test_a_model_without_an_output_has_not_failed() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> None:
            self.kept = self.layer(x)

    model = Silent()
    pre = BNP(model)
    model(torch.ones(4, 3))
    model.kept.sum().backward()
    pre.step()


def test_the_end_of_a_pass_that_never_began_is_none() -> None:
    """A hook of the user that runs before those of BNP fails: torch calls only what stands behind the pass."""
    model, twin, x, y = twins()
    pre, other = BNP(model), BNP(twin)

    def refuse(module: nn.Module, args: Any) -> None:
        raise ValueError("not this one")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="not this one"):
            model(100 * x)
    handle.remove()
    assert torch.equal(stepped(model, x, y, pre)[1], stepped(twin, x, y, other)[1])


def test_per_example_gradients_between_steps_change_nothing() -> None:
    model, twin, x, y = twins()
    pre, other = BNP(model), BNP(twin)

    def one(values: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, values, (a[None],)), b[None])

    values = {name: p.detach() for name, p in model.named_parameters()}
    for closed_over in (False, True):
        if closed_over:
            per_example = grad(lambda v: nn.functional.cross_entropy(functional_call(model, v, (100 * x,)), y))(values)
        else:
            per_example = vmap(grad(one), (None, 0, 0))(values, 100 * x, y)
        assert set(per_example) == set(values)
        assert torch.equal(stepped(model, x, y, pre)[1], stepped(twin, x, y, other)[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()


@pytest.mark.parametrize("attached", [True, False])
def test_training_without_it_is_noticed_once(attached: bool) -> None:
    model, x, y = network()
    pre = BNP(model)
    if attached:
        pre.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    trained = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, trained, x, y, 3)
    with pytest.warns(
        TrainingWarning, match="attached to does not step" if attached else r"step\(\) was not called"
    ) as w:
        train(model, trained, x, y, 5)
    assert len(w) == 1
    if attached:
        with pytest.warns(TrainingWarning, match="8 forward passes"):
            pre.close()
    else:
        pre.close()


def test_other_changes_of_the_weights_are_no_training() -> None:
    """A gradient accumulated over many passes, a checkpoint that is loaded, a schedule that steps every other time."""
    model, x, y = network()
    pre, optimizer = BNP(model), torch.optim.SGD(model.parameters(), lr=0.1)
    state = copy.deepcopy(model.state_dict())
    for k in range(12):
        backward(model, x, y)
        if k % 2:
            pre.step()
            optimizer.step()
        model.load_state_dict(state)
    for _ in range(20):
        backward(model, x, y)
    pre.step()
    pre.close()


class ByHand(nn.Module):
    """A layer that is known by its shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.eye(4, 5) + 0.1), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("own", [False, True])
def test_two_objects_may_measure_but_only_one_steps(own: bool) -> None:
    model, x, y = network()
    if own:
        model = ByHand().double()
    first, second = BNP(model), BNP(model)
    before, once = stepped(model, x, y, first)
    assert relative(once, before) > 0.1
    with pytest.raises(InvalidInputError, match="another BNP object"):
        second.step()
    assert torch.equal(gradient(model), once)
    first.close()
    stepped(model, x, y, second)
    stepped(model, x, y, second)


def test_two_objects_on_layers_of_their_own() -> None:
    model, twin, x, y = twins()
    pre, first, second = BNP(twin), BNP(model, include="0"), BNP(model, exclude="0")
    backward(model, x, y)
    first.step()
    second.step()
    assert relative(gradient(model), stepped(twin, x, y, pre)[1]) < 1e-14


def _adapted(model: Any) -> str:
    model[0].requires_grad_(False)
    model[0] = nn.Sequential(model[0], nn.Linear(4, 4, bias=False).double())
    return "0.1.weight"


def _headed(model: Any) -> str:
    model[2] = nn.Linear(4, 5).double()
    return "2.weight"


def _pruned(model: Any) -> str:
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return "0.weight"


@pytest.mark.parametrize("change", [_adapted, _headed, _pruned])
def test_layers_that_change_are_named_and_left_alone(change: Any) -> None:
    model, x, y = network()
    pre = BNP(model)
    name = change(model)
    model.zero_grad()
    backward(model, x, y)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with pytest.warns(TrainingWarning, match="after BNP was made|since BNP was made"):
        pre.step()
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert name in pre.uncovered
    assert "BNP was made" in pre.uncovered[name]
    layer = name.removesuffix(".weight")
    assert layer not in pre.covered
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith(layer))
    assert any(not torch.equal(before[n], after[n]) for n in before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model, x, y)
        pre.step()


def test_a_change_that_comes_late_is_found() -> None:
    model, x, y = network()
    pre = BNP(model)
    for _ in range(5):
        stepped(model, x, y, pre)
    _headed(model)
    for _ in range(2):
        stepped(model, x, y, pre)
    with pytest.warns(TrainingWarning, match="2: it was replaced or removed"):
        stepped(model, x, y, pre)


def _tied(model: Any, pre: BNP) -> None:
    model[2].weight = model[0].weight


def _complex(model: Any, pre: BNP) -> None:
    model.to(torch.complex128)


@pytest.mark.parametrize(
    ("change", "dtype", "words"),
    [(_tied, torch.float64, "shares its weight"), (_complex, torch.complex128, "has become torch.complex128")],
)
@pytest.mark.filterwarnings("ignore:Complex modules", "ignore:Casting complex")
def test_what_would_be_preconditioned_wrongly_is_refused(change: Any, dtype: torch.dtype, words: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    pre = BNP(model)
    change(model, pre)
    model(torch.rand(5, 3, dtype=torch.float64).to(dtype)).abs().sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(InvalidInputError, match=words):
        pre.step()
    assert all(torch.equal(b, p.grad) for b, p in zip(before, model.parameters(), strict=True) if p.grad is not None)


def test_a_weight_that_is_tied_to_a_layer_left_alone_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)).double()
    pre = BNP(model)
    model[1].weight = model[0].weight
    model(torch.arange(4)).square().sum().backward()
    with pytest.warns(TrainingWarning, match="1: its weight is shared with another module"):
        pre.step()
    assert pre.covered == ()


@pytest.mark.parametrize("kept", [0, 2])
def test_an_optimizer_that_loses_its_parameters_is_noticed(kept: int) -> None:
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    BNP(model).attach(optimizer)
    train(model, optimizer, x, y, 1)
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:kept]
    with pytest.warns(TrainingWarning, match="2: the optimizer that BNP is attached to does not hold its weight"):
        train(model, optimizer, x, y, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, x, y, 3)


def test_copies_that_would_share_its_hooks_are_refused() -> None:
    model, x, y = network()
    pre = BNP(model)
    for copied in (copy.copy, pickle.dumps, lambda p: torch.save(p, io.BytesIO())):
        with pytest.raises(InvalidInputError, match=r"deepcopy\(\(model, pre\)\)"):
            copied(pre)
    pickle.loads(pickle.dumps(model))
    stepped(model, x, y, pre)


def test_a_space_of_another_model_has_no_P() -> None:
    model, x, y = network()
    pre = BNP(model)
    stepped(model, x, y, pre)
    with pytest.raises(InvalidInputError, match="of another model"):
        pre.preconditioner(ParameterSpace({"w": (3,)}))
    with pytest.raises(InvalidInputError, match="space must be a ParameterSpace"):
        pre.preconditioner("space")  # type: ignore[arg-type]


def test_a_layer_registered_the_wrong_way_round_is_named() -> None:
    class UnitsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    bnp.register_layer(UnitsLast, like=nn.Linear)
    try:
        pre = BNP(model := nn.Sequential(UnitsLast()))
        with pytest.raises(InvalidInputError, match="rows of 3 features, its weight has 2"):
            model(torch.rand(4, 3))
        pre.close()
    finally:
        del KINDS[UnitsLast]
    for wrong, like in ((nn.Module, nn.Linear), (UnitsLast, nn.Linear(1, 1))):
        with pytest.raises(InvalidInputError, match="not what a kind of layer is made of"):
            bnp.register_layer(wrong, like=like)  # type: ignore[arg-type]


class Wrapper(torch.optim.Optimizer):
    """As privacy libraries wrap: an optimizer by type, without the hooks of one."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.original_optimizer = inner

    @property
    def param_groups(self) -> Any:
        return self.original_optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.original_optimizer.step(closure)


def test_wrappers_of_optimizers_are_seen_through() -> None:
    model, twin, x, y = twins()
    pre, by_hand = BNP(model), BNP(twin)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    wrapped = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    pre.attach(wrapped)
    for _ in range(3):
        model.zero_grad()
        backward(model, x, y)
        wrapped.step()
        stepped(twin, x, y, by_hand)
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))

    class Bare(torch.optim.Optimizer):
        def __init__(self) -> None:
            pass

    with pytest.raises(InvalidInputError, match=r"Bare; call step\(\) yourself"):
        BNP(twin).attach(Bare())
