"""A first mistake is answered by one sentence with the code to write, at every public verb.

Bugs that only these tests catch: a new verb whose first argument is not checked, so that a model in place of a risk
ends in an AttributeError far inside; advice that names nothing there is; a sum that passes for a mean.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, NotConvexError, StochasticModelError
from bnp_analysis.runtime.kinds import KINDS, WAYS, _kind, require_range
from bnp_analysis.runtime.random import generator

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3
MODEL = bnp.models.mlp([4, 3], dtype=torch.float64)
RISK = bnp.EmpiricalRisk(MODEL, cross_entropy, (X, Y))
A = bnp.gauss_newton(RISK)
P = bnp.bnp_preconditioner(RISK)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)

#: What stands in the place of each kind of argument, and a word of the answer.
WRONG: dict[str, list[tuple[object, str]]] = {
    "risk": [
        (MODEL, "bnp.EmpiricalRisk(model, loss, (x, y))"),
        ((X, Y), "bnp.EmpiricalRisk(model, loss, (x, y))"),
        (A, "the risk that the operator was made from"),
        (P, "(risk, P)"),
        (None, "bnp.EmpiricalRisk(model, loss, (x, y))"),
    ],
    "A": [
        (RISK, "bnp.gauss_newton(risk)"),
        (MODEL, "bnp.gauss_newton(bnp.EmpiricalRisk(model, loss, (x, y)))"),
        (torch.eye(3), "bnp.DenseOperator(matrix)"),
        (torch.eye(3).numpy(), "bnp.DenseOperator(torch.as_tensor(matrix))"),
        (lambda v: v, "bnp.CallableOperator(function, n)"),
        (P, "preconditioner=P"),
        (bnp.linalg.MatrixOperator(torch.ones(3, 2)), "bnp.linalg.GramOperator(F)"),
        (None, "bnp.DenseOperator(matrix)"),
    ],
    "preconditioner": [
        (RISK, "bnp.bnp_preconditioner(risk)"),
        (MODEL, "bnp.bnp_preconditioner(bnp.EmpiricalRisk(model, loss, (x, y)))"),
        (OPTIMIZER, "bnp.optimizer_preconditioner(optimizer, model, space=risk)"),
        (A, "bnp.linalg.DensePreconditioner(matrix)"),
        (torch.eye(3), "bnp.linalg.DensePreconditioner(matrix)"),
    ],
    "model": [
        (RISK, "the module from which the risk was made"),
        (nn.Linear, "an instance of the class"),
        (OPTIMIZER, "the module whose parameters the optimizer holds"),
        (lambda x: x, "a torch.nn.Module whose forward() is the function"),
        (MODEL.parameters(), "a torch.nn.Module"),
    ],
    "loss": [(nn.CrossEntropyLoss, "write CrossEntropyLoss()"), ("mse", "torch.nn.functional.cross_entropy")],
    "optimizer": [(torch.optim.SGD, "torch.optim.SGD(model.parameters(), lr=0.1)")],
}
WRONG["over"], WRONG["P"] = WRONG["risk"][:2], WRONG["preconditioner"]
RIGHT = {
    "direction": "gradient",
    "risk": RISK,
    "over": RISK,
    "A": A,
    "P": P,
    "delta": 0.1,
    "steps": 3,
    "model": MODEL,
    "loss": cross_entropy,
    "data": (X, Y),
    "loader": (X, Y),
    "optimizer": OPTIMIZER,
}
#: Public callables whose arguments are none of these.
OTHERS = {"CallableOperator", "DenseOperator", "DensePreconditioner", "ParameterSpace", "register_layer"}


def verbs() -> Iterator[tuple[str, Callable[..., object], dict[str, inspect.Parameter]]]:
    """Every public function, and every public class that takes one of the kinds."""
    for name in bnp.__all__:
        found = getattr(bnp, name)
        if not callable(found) or name in OTHERS:
            continue
        # A result or an abstract class is made by the package itself.
        if isinstance(found, type) and found not in (bnp.EmpiricalRisk, bnp.BNP):
            continue
        yield name, found, dict(inspect.signature(found).parameters)


def cases() -> list[Any]:
    found = []
    for name, verb, parameters in verbs():
        for argument in [name for name in parameters if name in WRONG]:
            for value, usual in WRONG[argument]:
                training = name == "train" and argument == "preconditioner"
                if training and isinstance(value, torch.optim.Optimizer):
                    continue  # it steps and has a state, as what trains must
                words = "preconditioner=bnp.BNP(model)" if training else usual
                label = f"{name}({argument}={type(value).__name__})"
                found.append(pytest.param(verb, argument, value, words, id=label))
    return found


def call(verb: Callable[..., object], **wrong: object) -> object:
    """The verb with right arguments wherever it needs one, but for the wrong one."""
    needed = {
        name: RIGHT[name]
        for name, p in inspect.signature(verb).parameters.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    return verb(**(needed | wrong))


@pytest.mark.parametrize(("verb", "argument", "value", "words"), cases())
def test_a_wrong_kind_is_answered_by_the_code_to_write(
    verb: Callable[..., object], argument: str, value: object, words: str
) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        call(verb, **{argument: value})
    assert words in str(refusal.value)


def test_every_verb_has_an_argument_that_is_checked() -> None:
    unchecked = [name for name, _, parameters in verbs() if not parameters.keys() & WRONG.keys()]
    assert not unchecked


@pytest.mark.parametrize(
    "room", ["curvature", "diagnose", "distributed", "linalg", "network", "plotting", "precondition"]
)
def test_arguments_of_every_public_function_are_looked_at_in_one_place(room: str) -> None:
    functions = [f for name in getattr(bnp, room).__all__ if inspect.isfunction(f := getattr(getattr(bnp, room), name))]
    assert functions
    for function in functions:
        kinds = {_kind(parameter.annotation)[0] for parameter in inspect.signature(function).parameters.values()}
        assert hasattr(function, "__wrapped__") or not kinds & KINDS.keys(), function


def test_every_name_of_the_advice_exists() -> None:
    for ways in WAYS.values():
        for way in ways.values():
            for dotted in re.findall(r"\bbnp((?:\.\w+)+)", way):
                found: object = bnp
                for part in dotted[1:].split("."):
                    found = getattr(found, part)


@pytest.mark.parametrize(
    "plot",
    [
        "plot_profile",
        "plot_blocks",
        "plot_block_distances",
        "plot_block_densities",
        "plot_diagonal",
        "plot_slice",
        "plot_eigenvector_mass",
        "plot_inputs",
        "plot_spectral_density",
    ],
)
def test_a_plot_names_the_verb_that_makes_its_result(plot: str) -> None:
    with pytest.raises(InvalidInputError, match=r"write bnp\.[\w.]+\("):
        getattr(bnp.plotting, plot)(RISK)


def test_a_sum_is_no_mean() -> None:
    """Over several batches; of one batch it is another loss, with the same condition numbers."""
    data = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    with pytest.raises(InvalidInputError, match=r"a sum over batch 0.*reduction='mean'"):
        bnp.EmpiricalRisk(MODEL, nn.CrossEntropyLoss(reduction="sum"), data)
    with pytest.raises(InvalidInputError, match=r"reduction='mean'"):
        bnp.EmpiricalRisk(MODEL, nn.CrossEntropyLoss(reduction="none"), data)
    summed = bnp.EmpiricalRisk(MODEL, nn.CrossEntropyLoss(reduction="sum"), (X, Y))
    assert torch.allclose(summed.value, 12 * RISK.value)


def test_one_batch_may_have_a_loss_that_is_no_sum_of_its_examples() -> None:
    targets = Y.clone()  # read from outside: no part of the batch fits it

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(output, targets)

    assert bnp.EmpiricalRisk(MODEL, loss, (X, Y)).value > 0
    assert bnp.EmpiricalRisk(MODEL, lambda o, y: cross_entropy(o, y) + o.var(), (X, Y)).value > 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"x": X, "labels": Y}, "batch['labels']"),
        ([{"x": X, "labels": Y}], "batch['labels']"),
        ((X, X, Y), "write ((a, b), y) for each batch a, b, y"),
        ([(X, X, Y)], "write ((a, b), y) for each batch a, b, y"),
        (X, "write (x, y)"),
        ([X, X], "write (x, y)"),
    ],
)
def test_a_batch_in_another_form_is_shown_how_to_become_a_pair(data: Any, words: str) -> None:
    with pytest.raises(InvalidInputError) as refusal:
        bnp.EmpiricalRisk(MODEL, cross_entropy, data)
    assert words in str(refusal.value)
    if isinstance(data, list):
        with pytest.raises(InvalidInputError) as refusal:
            bnp.train(MODEL, cross_entropy, data, OPTIMIZER, epochs=1)
        assert words in str(refusal.value)


def test_the_advice_on_batches_works() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bnp.models.mlp([4, 3], dtype=torch.float64)

        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            out: Tensor = self.inner(a if b is None else a + b)
            return out

    batch = {"a": X, "labels": Y}
    pair = ({k: v for k, v in batch.items() if k != "labels"}, batch["labels"])
    assert bnp.EmpiricalRisk(Both(), cross_entropy, pair).value > 0
    loader = [(X, X, Y)]
    assert bnp.EmpiricalRisk(Both(), cross_entropy, [((a, b), y) for a, b, y in loader]).value > 0


def test_a_model_that_remembers_its_calls() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = bnp.models.mlp([4, 3], dtype=torch.float64), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.inner(x) * self.calls
            return out

    with pytest.raises(StochasticModelError, match=r"\(calls\).*Let forward\(\) begin from a fixed state"):
        bnp.EmpiricalRisk(Counts(), cross_entropy, (X, Y))


def test_an_indefinite_matrix_names_the_number_that_it_has() -> None:
    with pytest.raises(NotConvexError, match=r"magnitude_condition_number\(A\)"):
        bnp.condition_number(bnp.DenseOperator(torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))))


@pytest.mark.parametrize("count", [lambda x, y: (y >= 0).sum(), lambda pair: len(pair[1]), lambda x, y: len(y)])
def test_the_recipe_of_the_guide_for_weights(count: Callable[..., float]) -> None:
    data = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    assert torch.allclose(bnp.EmpiricalRisk(MODEL, cross_entropy, data, count=count).value, RISK.value)


def test_curvature_may_be_one_name() -> None:
    assert list(bnp.compare(RISK, curvature="gauss_newton").network) == ["gauss_newton"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: bnp.linalg.MatrixOperator(torch.eye(2).to_sparse()),
            "the matrix must be a dense tensor, not torch.sparse_coo: write .to_dense()",
        ),
        (
            lambda: bnp.linalg.MatrixOperator(torch.eye(2, device="meta")),
            "the matrix is on the meta device: it has a shape and no values",
        ),
        (
            lambda: bnp.EmpiricalRisk(MODEL, cross_entropy, (X, Y), device="abacus"),
            "device must be a device of torch, such as 'cpu' or None, not 'abacus'",
        ),
        (
            lambda: bnp.EmpiricalRisk(MODEL, cross_entropy, (X, Y), dtype=torch.int64),
            "dtype must be a floating-point type, such as torch.float64, or None, not torch.int64",
        ),
        (
            lambda: bnp.bnp_preconditioner(RISK, output_scale="estimated"),
            "output_scale must be True or False, not 'estimated'",
        ),
        (lambda: require_range("lr", float("nan")), "lr must be a real number, got nan"),
        (lambda: require_range("epochs", "three"), "epochs must be a real number, got 'three'"),
        (lambda: generator(True), "seed must be an integer, got True"),
        (lambda: generator(1.5), "seed must be an integer, got 1.5"),
    ],
)
def test_arguments_are_told_what_they_must_be(call: Callable[[], object], said: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{re.escape(said)}$"):
        call()
