"""Convolutions whose second derivatives compute only the requested products.

torch's own computes all three products of a convolution's second derivative whoever asks, by convolutions that swap
examples and channels: twice the work that a Gauss-Newton product needs. A convolution is bilinear, `y = C(x, w)`, so
each product is a convolution or half of its first derivative, and only those that are wanted are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.observation import transformed

# stride, padding, dilation, transposed, output padding, groups
Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
_PLACES: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class TwiceDifferentiable(TorchFunctionMode):
    """Convolutions called inside are computed by `Convolution`, with the same values.

    Args:
        linear: the gradient, taken outside, will be differentiated in its cotangent alone, as Jacobian products do.
            A gradient taken inside, by the model itself, keeps all its derivatives.
    """

    def __init__(self, *, linear: bool = False) -> None:
        super().__init__()
        self._linear = linear
        self.constant = False

    def __exit__(self, *error: Any) -> None:
        self.constant = self._linear
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PLACES and (taken := _arguments(_PLACES[func], *args, **kwargs)) is not None:
            return Convolution.apply(*taken, self)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _arguments(
    places: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Geometry] | None:
    """The arguments in one form; None for what is left to torch.

    Padding by name, no batch, tensors of other kinds, derivatives by `torch.func` or forwards.
    """
    plain = all(type(t) in (Tensor, nn.Parameter) and not transformed(t) for t in (input, weight))
    plain = plain and forward_ad._current_level < 0
    if isinstance(padding, str) or not plain or input.ndim != places + 2:
        return None
    stride, padding, dilation = ([a] * places if isinstance(a, int) else list(a) for a in (stride, padding, dilation))
    return input, weight, bias, (stride, padding, dilation, False, [0] * places, groups)


def _derivatives(
    g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`C(x, w)` differentiated backwards: in the input, the weight and a bias, those that are wanted."""
    found = torch.ops.aten.convolution_backward(g, x, w, [w.shape[0]], *geometry, wanted)
    return cast(tuple[Tensor | None, Tensor | None, Tensor | None], found)


class Convolution(torch.autograd.Function):
    """`y = C(x, w) + b`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry, within: TwiceDifferentiable) -> Tensor:
        return torch.convolution(x, w, b, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, ctx.geometry, ctx.within = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        x, w = ctx.saved_tensors
        if ctx.within.constant:
            x, w = x.detach(), w.detach()
        found = Pullback.apply(cotangents[0], x, w, ctx.geometry, ctx.needs_input_grad[:3])  # type: ignore[no-untyped-call]
        return *found, None, None


class Pullback(torch.autograd.Function):
    """The first derivative of `Convolution`: `(C_x(g, w), C_w(g, x), sum of g)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: Iterable[bool]) -> Any:
        return _derivatives(g, x, w, geometry, list(wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, x, w, ctx.geometry, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g if any(ctx.needs_input_grad[1:]) else None, x, w)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        g, x, w = ctx.saved_tensors
        dx, dw, db = cotangents
        wanted, geometry = ctx.needs_input_grad, ctx.geometry
        along_g = along_x = along_w = None
        if wanted[0]:
            if dw is not None or db is not None:
                along_g = torch.convolution(x, torch.zeros_like(w) if dw is None else dw, db, *geometry)
            if dx is not None:
                image = torch.convolution(dx, w, None, *geometry)
                along_g = image if along_g is None else along_g.add_(image)
        if wanted[1] and dw is not None:
            along_x = _derivatives(g, x, dw, geometry, [True, False, False])[0]
        if wanted[2] and dx is not None:
            along_w = _derivatives(g, dx, w, geometry, [False, True, False])[1]
        return along_g, along_x, along_w, None, None
