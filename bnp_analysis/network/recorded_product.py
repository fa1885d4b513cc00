"""Whether a recorded pass multiplies its input, or fixed numbers, by its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

_TURNED = {"x w": "x w^T", "x w^T": "x w", "w": "w^T", "w^T": "w"}
_PRODUCTS = ("x w", "x w^T")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "contiguous", "unsqueeze", "squeeze")
_SAME = ("contiguous", "to", "type_as", "__get__")  # may return what they are given
_FLIPS = ("t", "T", "mT", "transpose", "permute", "swapaxes", "numpy_T")


class Recorded:
    """The calls of a pass, each under the tensor that it returned.

    A call is read backwards from an output: `"x w^T + b"` is derived through views, transposes of the weight, products
    and one sum, and from no other tensor. Whatever else was called on the way leaves the output without a meaning, so
    that a layer is never taken for a product by its numbers: a mask of ones, a gain of 1 or a dropout that is off at
    the moment are seen.
    """

    def __init__(self) -> None:
        # The tensors are held, so that no other gets their identity.
        self._calls: dict[int, tuple[Tensor, int, str, tuple[Any, ...], dict[str, Any]]] = {}
        self._returned: set[int] = set()

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Take in a call and what it returned."""
        if not isinstance(out, Tensor):
            return
        known = self._calls.get(id(out))
        name = getattr(function, "__name__", "")
        name = getattr(getattr(function, "__self__", None), "__name__", "") if name == "__get__" else name
        if any(out is a for a in args):
            self._returned |= set() if name in _SAME else {id(out)}
            if known is None or known[1] == out._version:
                return  # it returned its argument as it was
        self._calls[id(out)] = out, out._version, name, args, kwargs

    def returned(self, t: Tensor) -> bool:
        """Whether a call returned this tensor that it was given: written to, or a dropout that is off."""
        return id(t) in self._returned

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()
        self._returned.clear()

    def is_product(self, output: Any, x: Any, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> bool:
        """Whether the output is `x w^T + b`, or `x w + b` of a transposed weight, and nothing else.

        Example:
            >>> import torch
            >>> x, w, b = torch.ones(3, 2), torch.ones(4, 2), torch.ones(4)
            >>> with Recording() as recorded:
            ...     plain, masked = x @ w.T + b, x @ (w * torch.ones(4, 2)).T + b
            >>> [recorded.is_product(out, x, w, b, transposed=False) for out in (plain, masked)]
            [True, False]
        """
        roles = {id(x): "x", id(weight): "w"} | ({} if bias is None else {id(bias): "b"})
        wanted = "x w" if transposed else "x w^T"
        return len(roles) == 2 + (bias is not None) and self._meaning(output, roles) == (
            wanted if bias is None else f"{wanted} + b"
        )

    def is_multiple(self, output: Any, of: Tensor, names: tuple[str, ...]) -> bool:
        """Whether an output is a tensor times others that no call has made, `names` being those of such products.

        Example:
            >>> import torch
            >>> w, mask = torch.ones(2), torch.ones(2)
            >>> with Recording() as recorded:
            ...     fixed, moving = 2 * (mask * w), w / w.norm()
            >>> [recorded.is_multiple(out, w, ("mul", "__mul__", "__rmul__", "__truediv__")) for out in (fixed, moving)]
            [True, False]
        """
        if output is of:
            return not self._returned
        call = self._calls.get(id(output))
        if call is None or call[0] is not output or output._version != call[1]:
            return False
        _, _, name, args, kwargs = call
        if name not in names or kwargs or len(args) != 2 or output.shape != of.shape:
            return False
        operands = args[::-1] if self._fixed(args[0], of) else args
        by_division = "div" in name and operands is not args
        return not by_division and self._fixed(operands[1], of) and self.is_multiple(operands[0], of, names)

    def _fixed(self, t: Any, of: Tensor) -> bool:
        """Whether an operand is a number, or a tensor that was there before."""
        if isinstance(t, Tensor):
            return t is not of and id(t) not in self._calls and not t.requires_grad
        return isinstance(t, int | float)

    def _meaning(self, t: Any, roles: dict[int, str]) -> str:
        """What a tensor is, in the letters of `is_product`; empty for anything else."""
        if id(t) in roles:
            return roles[id(t)]
        call = self._calls.get(id(t))
        if call is None or call[0] is not t or t._version != call[1]:
            return ""
        _, _, name, args, kwargs = call
        if name == "linear":
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            made = self._product(given["input"], given["weight"], roles)
            made = _TURNED.get(made, "")
            return made if given.get("bias") is None else self._sum(made, given["bias"], roles)
        if kwargs or any(t is a for a in args):
            return ""
        if name in _VIEWS:
            inner = self._meaning(args[0], roles)
            keeps_rows = inner not in ("w", "w^T", "b") and t.ndim and t.shape[-1:] == args[0].shape[-1:]
            return inner if keeps_rows or name == "contiguous" else ""
        if name in _FLIPS:
            axes = {a % 2 for a in args[1:] if isinstance(a, int)} or {0, 1}
            inner = self._meaning(args[0], roles)
            return _TURNED.get(inner, "") if inner in ("w", "w^T") and t.ndim == 2 and axes == {0, 1} else ""
        if name in ("matmul", "mm", "__matmul__") and len(args) == 2:
            return self._product(*args, roles)
        if name == "addmm" and len(args) == 3:
            return self._sum(self._product(*args[1:], roles), args[0], roles)
        if name in ("add", "__add__", "__radd__") and len(args) == 2:
            one, two = args
            made = self._meaning(one, roles)
            return self._sum(made, two, roles) or self._sum(self._meaning(two, roles), one, roles)
        return ""

    def _product(self, left: Any, right: Any, roles: dict[int, str]) -> str:
        factors = self._meaning(left, roles), self._meaning(right, roles)
        return f"x {factors[1]}" if factors[0] == "x" and factors[1] in ("w", "w^T") else ""

    def _sum(self, made: str, bias: Any, roles: dict[int, str]) -> str:
        return f"{made} + b" if made in _PRODUCTS and self._meaning(bias, roles) == "b" else ""


class Recording(TorchFunctionMode):
    """Meanwhile calls are recorded, and returned on entry."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = Recorded()

    def __enter__(self) -> Recorded:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self.recorded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.recorded.note(func, args, kwargs or {}, out)
        return out


_TIMES = ("mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "divide")


def where_stored(module: nn.Module, weight: str) -> tuple[str, str]:
    """Where the parameter behind a weight is, and where the numbers are that it is multiplied by; the latter may be "".

    `torch.nn.utils.prune` keeps `weight_orig` and `weight_mask`, `torch.nn.utils.parametrize` the parameter in
    `parametrizations.weight.original`, which counts if all that is done to it is to multiply it by fixed numbers.

    Example:
        >>> from torch.nn.utils import prune
        >>> where_stored(prune.random_unstructured(nn.Linear(3, 2), "weight", 0.5), "weight")
        ('weight_orig', 'weight_mask')
    """
    pruned, mask = f"{weight}_orig", f"{weight}_mask"
    if pruned in module._parameters and mask in module._buffers:
        return pruned, mask
    if parametrize.is_parametrized(module, weight) and not (why_not_fixed(module, weight)):
        return f"parametrizations.{weight}.original", f"parametrizations.{weight}"
    return weight, ""


def why_not_fixed(module: nn.Module, weight: str) -> str:
    """The parametrization that is no multiplication by fixed numbers, by its name; empty if there is none."""
    chain: Any = module.parametrizations
    chain = chain[weight]
    if not hasattr(chain, "original"):
        return ", ".join(type(one).__name__ for one in chain)
    at = chain.original.detach()
    for one in chain:
        if next(one.parameters(), None) is not None or not _multiplies(one, at):
            return type(one).__name__
    return ""


@torch.no_grad()
def _multiplies(parametrization: nn.Module, at: Tensor) -> bool:
    """Whether all that it calls are products of its argument with tensors or numbers that it holds."""
    with Recording() as recorded:
        made = parametrization(at)
    return recorded.is_multiple(made, at, _TIMES)


@torch.no_grad()
def multiplier(module: nn.Module, gain: str, like: Tensor) -> Tensor:
    """The fixed numbers, in the shape of the parameter."""
    if not gain.startswith("parametrizations."):
        mask: Tensor = getattr(module, gain)
        return mask.to(like)
    made = torch.ones_like(like)
    chain: Any = module.get_submodule(gain)
    for one in chain:
        made = one(made)
    return made
