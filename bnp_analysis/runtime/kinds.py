"""Type checks of arguments, with errors that show the code that makes the wanted type from the given one."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

import torch

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.files import require_outputs

Args = ParamSpec("Args")
Out = TypeVar("Out")

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
    "LinearOperator": {
        "EmpiricalRisk": "bnp.gauss_newton(risk).factor",
        "Module": f"bnp.gauss_newton({_RISK}).factor",
        "Tensor": "bnp.linalg.MatrixOperator(matrix)",
        "object": "bnp.linalg.MatrixOperator(matrix), or bnp.gauss_newton(risk).factor",
    },
    "Preconditioner": {
        "EmpiricalRisk": "bnp.bnp_preconditioner(risk)",
        "Module": f"bnp.bnp_preconditioner({_RISK})",
        "BNP": "pre.preconditioner(risk.space)",
        "Optimizer": "bnp.optimizer_preconditioner(optimizer, model, space=risk)",
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


def require_plain(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor that is sparse, complex or without values, where a vector or a matrix is wanted.

    Raises:
        InvalidInputError: says what it is, and what to write.

    Example:
        >>> require_plain(torch.ones(2), "theta")
    """
    if tensor.layout is not torch.strided:
        raise InvalidInputError(f"{what} must be a dense tensor, not {tensor.layout}: write .to_dense()")
    if tensor.is_meta:
        raise InvalidInputError(f"{what} is on the meta device: it has a shape and no values")
    if tensor.is_complex():
        raise InvalidInputError(f"{what} must be real, not {tensor.dtype}")


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


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_word(value: object) -> bool:
    return isinstance(value, str)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and bool(os.fspath(value))


def _is_device(value: object) -> bool:
    try:
        return isinstance(value, str | torch.device) and torch.device(value) is not None
    except RuntimeError:
        return False


def _is_block(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and isinstance(value[0], str) and (_is_integer(value[1]) or isinstance(value[1], slice))
    return isinstance(value, str)


def _holds(values: object, fits: Callable[[object], bool]) -> bool:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        return False
    return not isinstance(values, Sized) or all(map(fits, values))  # what can be read only once is left to be read


#: An annotation, without `| None` -> whether a value is of that kind, and the kind in words. Others are not looked at.
KINDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "int": (_is_integer, "an integer"),
    "float": (_is_real, "a real number"),
    "bool": (lambda v: isinstance(v, bool), "True or False"),
    "str": (_is_word, "a word"),
    "torch.dtype": (
        lambda v: isinstance(v, torch.dtype) and v.is_floating_point,
        "a floating-point type, such as torch.float64,",
    ),
    "torch.device | str": (_is_device, "a device of torch, such as 'cpu'"),
    "Sequence[int]": (lambda v: _holds(v, _is_integer), "a list of integers"),
    "Sequence[float]": (lambda v: _holds(v, _is_real), "a list of real numbers"),
    "Sequence[str]": (lambda v: _holds(v, _is_word), "a list of words"),
    "Sequence[str] | str": (lambda v: isinstance(v, str) or _holds(v, _is_word), "a word or a list of words"),
    "Progress": (lambda v: isinstance(v, bool) or callable(v), "True, False or a function (done, total)"),
    "str | Path": (_is_path, "the path of a file"),
    "str | os.PathLike[str]": (_is_path, "the path of a file"),
    "Block": (_is_block, "the name of a layer, or (name, unit)"),
    "Callable[[Any], Tensor]": (callable, "a function"),
}
_LARGEST = sys.float_info.max
#: An argument's name -> the least number that it may be, the largest, and whether these two are themselves left out;
#: the same wherever the name stands.
RANGES: Mapping[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("k", "probes", "steps", "points", "samples", "every", "most"), (1, 2**63 - 1, False)),
    **dict.fromkeys(
        ("batch_size", "check_every", "checkpoint_every", "max_matvecs", "top", "probe_every", "probe_samples"),
        (1, 2**63 - 1, False),
    ),
    **dict.fromkeys(
        ("epochs", "max_flops", "time_limit"),
        (0, math.inf, False),
    ),
    **dict.fromkeys(("eps1", "eps2", "damping", "weight_decay"), (0, _LARGEST, False)),
    **dict.fromkeys(("lr", "width", "grow", "max_memory"), (0, math.inf, True)),
    **{"seed": (-(2**63), 2**63 - 1, False), "failure_probability": (0, 1, True), "tol": (0, 1, True)},
}
_OUTPUTS = ("str | Path", "str | os.PathLike[str]")


def gated(function: Callable[Args, Out]) -> Callable[Args, Out]:
    """Let a public verb be called only with arguments of the kinds that its signature names, in the ranges of `RANGES`.

    Every argument is looked at before anything is done, so that a call which is refused has changed nothing: numbers,
    words and such by `KINDS`, objects of the package and of torch by `WAYS`. What another annotation means, the verb
    checks itself.

    Raises:
        InvalidInputError: when the verb is called: names the argument, what it must be and what was given.

    Example:
        >>> @gated
        ... def repeat(word: str, times: int = 2) -> str:
        ...     return word * times
        >>> repeat("na")
        'nana'
        >>> try:
        ...     repeat("na", times=2.5)
        ... except InvalidInputError as error:
        ...     print(error)
        times must be an integer, not 2.5
    """
    signature = inspect.signature(function)
    known = {name: _kind(parameter.annotation) for name, parameter in signature.parameters.items()}

    @functools.wraps(function)
    def verb(*args: Args.args, **kwargs: Args.kwargs) -> Out:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # which says so itself
        outputs: dict[str, list[str | os.PathLike[str]]] = {}
        for name, value in given.items():
            kind, optional = known[name]
            if optional and value is None:
                continue
            if classes := _classes(kind, function):
                require_kind(value, name, *classes)
            if kind not in KINDS:
                continue
            fits, words = KINDS[kind]
            if not fits(value):
                none = " or None" if optional else ""
                raise InvalidInputError(f"{name} must be {words}{none}, not {_shown(value)}")
            if kind in ("int", "float") and name in RANGES:
                require_range(name, value)
            if kind in _OUTPUTS and isinstance(value, str | os.PathLike):
                outputs[name] = [value]
        require_outputs(outputs)
        return function(*args, **kwargs)

    return verb


def _kind(annotation: object) -> tuple[str, bool]:
    words = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    kind = words.removesuffix(" | None")
    return kind, kind != words


def _classes(annotation: str, function: Callable[..., object]) -> tuple[type, ...]:
    """The classes of an annotation such as `nn.Module` or `Comparison | LayerTable`; none where `WAYS` lacks them."""
    found = []
    for words in annotation.split(" | "):
        first, *rest = words.split(".")
        value = functools.reduce(
            lambda parent, part: getattr(parent, part, None), rest, function.__globals__.get(first)
        )
        found.append(value)
    classes = tuple(value for value in found if isinstance(value, type))
    return classes if len(classes) == len(found) and classes[0].__name__ in WAYS else ()


def require_range(name: str, value: object) -> None:
    """Refuse a number outside of `RANGES`, for an argument of a function or of a command.

    Raises:
        InvalidInputError: it is, or is no number.

    Example:
        >>> require_range("epochs", 3)
    """
    least, most, open_ended = RANGES[name]
    if not _is_real(value):
        raise InvalidInputError(f"{name} must be a real number, got {value!r:.60}")
    assert isinstance(value, Real)
    number = value if isinstance(value, int) else float(value)
    if not (least < number < most if open_ended else least <= number <= most):
        if open_ended:
            ends = "positive and finite" if most == math.inf else f"strictly between {least:g} and {most:g}"
        elif number > most:
            ends = "finite and not negative" if most == _LARGEST else f"at most {most:g}"
        else:
            ends = "positive" if least == 1 else f"at least {least:g}"
        raise InvalidInputError(f"{name} must be {ends}, got {name}={value!r:.60}")


def _shown(value: object) -> str:
    plain = value is None or isinstance(value, str | int | float | bytes | tuple | list | torch.dtype)
    return f"{value!r:.60}" if plain else f"{article(type(value).__name__)} {type(value).__name__}"


def article(word: str) -> str:
    """The indefinite article of a word.

    Example:
        >>> article("int"), article("float")
        ('an', 'a')
    """
    return "an" if word[0] in "AEIOaeio" else "a"
