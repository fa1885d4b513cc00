"""The one gate for arguments of the wrong kind: what is wanted, and the code that makes it from what was given."""

from __future__ import annotations

from collections.abc import Mapping

from bnp_analysis.errors import InvalidInputError

_RISK = "bnp.EmpiricalRisk(model, loss, (x, y))"

#: Kind wanted -> kind given (the first of the value's classes that is listed, by name) -> the code to write.
#: Names, not classes: this room knows none of them, and a class's subclasses are found by their ancestors' names.
WAYS: Mapping[str, Mapping[str, str]] = {
    "EmpiricalRisk": {
        "Preconditioner": "the risk first and the preconditioner after it: (risk, P)",
        "LinearOperator": "the risk that the operator was made from; bnp.condition_number(A) measures an operator",
        "object": _RISK,
    },
    "SymmetricOperator": {
        "EmpiricalRisk": "bnp.gauss_newton(risk), or bnp.hessian(risk)",
        "Module": f"bnp.gauss_newton({_RISK})",
        "Preconditioner": "the operator first and P after it: bnp.condition_number(A, preconditioner=P)",
        "LinearOperator": "bnp.linalg.GramOperator(F) for F^T F, or bnp.linalg.singular_condition_number(F)",
        "function": "bnp.CallableOperator(function, n)",
        "ndarray": "bnp.DenseOperator(torch.as_tensor(matrix))",
        "object": "bnp.gauss_newton(risk), or bnp.DenseOperator(matrix)",
    },
    "Preconditioner": {
        "EmpiricalRisk": "bnp.bnp_preconditioner(risk)",
        "Module": f"bnp.bnp_preconditioner({_RISK})",
        "BNP": "pre.preconditioner(risk.space)",
        "Optimizer": "bnp.diagonal_preconditioner(risk, optimizer, model=model)",
        "SymmetricOperator": "bnp.linalg.DensePreconditioner(matrix), or bnp.bnp_preconditioner(risk)",
        "Tensor": "bnp.linalg.DensePreconditioner(matrix)",
        "object": "bnp.bnp_preconditioner(risk), or bnp.linalg.DensePreconditioner(matrix)",
    },
    "Module": {
        "EmpiricalRisk": "model, the module from which the risk was made",
        "Optimizer": "model, the module whose parameters the optimizer holds",
        "type": "Model(), an instance of the class",
        "function": "a torch.nn.Module whose forward() is the function",
        "object": "model, a torch.nn.Module",
    },
    "Optimizer": {
        "type": "torch.optim.SGD(model.parameters(), lr=0.1), an instance of the class",
        "object": "torch.optim.SGD(model.parameters(), lr=0.1)",
    },
    "StepsGradients": {
        "Preconditioner": "preconditioner=bnp.BNP(model), whose statistics follow the training",
        "object": "preconditioner=bnp.BNP(model)",
    },
    "Conditioning": {"object": "bnp.condition(risk)"},
    "ConditionProfile": {"object": "bnp.condition_profile(A)"},
    "LayerTable": {"object": "bnp.layer_table(risk)"},
    "BlockSpectra": {"object": "bnp.block_spectra(risk)"},
    "Comparison": {"object": "bnp.compare(risk)"},
    "Diagonal": {"object": "bnp.diagonal(A)"},
    "Eigenpairs": {"object": "bnp.eigenpairs(A)"},
    "EigenvectorMass": {"object": "bnp.diagnose.eigenvector_mass(pairs, risk.space)"},
    "Slice": {"object": "bnp.slice(risk, 'gradient')"},
    "SpectralDensity": {"object": "bnp.spectral_density(A)"},
    "ParameterSpace": {"object": f"{_RISK}.space"},
}


def require_kind(value: object, argument: str, *kinds: type) -> None:
    """Refuse a value that is an instance of none of the kinds, with one sentence and the code to write.

    Args:
        value: what was given.
        argument: its name in the function that was called.
        kinds: what would do, the usual one first.

    Raises:
        InvalidInputError: it is none of them.

    Example:
        >>> from bnp_analysis.linalg import SymmetricOperator
        >>> try:
        ...     require_kind(lambda v: v, "A", SymmetricOperator)
        ... except InvalidInputError as error:
        ...     print(error)
        A must be a SymmetricOperator, not a function: write bnp.CallableOperator(function, n)
    """
    if isinstance(value, kinds):
        return
    ways = WAYS[kinds[0].__name__]
    given = [kind.__name__ for kind in type(value).__mro__]
    way = next(ways[name] for name in given if name in ways)
    wanted = " or ".join(f"{article(kind.__name__)} {kind.__name__}" for kind in kinds)
    what = "None" if value is None else f"{article(given[0])} {given[0]}"
    raise InvalidInputError(f"{argument} must be {wanted}, not {what}: write {way}")


def require_loss(loss: object) -> None:
    """Refuse what is no function `loss(output, y)`: a class of losses, or a name.

    Raises:
        InvalidInputError: it cannot be called, or calling it makes a loss.

    Example:
        >>> require_loss(max)
    """
    if isinstance(loss, type):
        name = loss.__name__
        raise InvalidInputError(f"loss must be a function (output, y), not the class {name}: write {name}()")
    if not callable(loss):
        raise InvalidInputError(
            f"loss must be a function (output, y), not {loss!r:.60}: write torch.nn.functional.cross_entropy"
        )


def article(word: str) -> str:
    """The indefinite article of a word.

    Example:
        >>> article("int"), article("float")
        ('an', 'a')
    """
    return "an" if word[0] in "AEIOaeio" else "a"
