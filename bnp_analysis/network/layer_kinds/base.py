"""The interface of a kind of layer, and the registry of the known kinds.

A covered layer computes `a_i = w_i . h + b_i` for every row `h` of its input. The kind defines how inputs become rows,
the numbers of units, features and groups, and the names and layout of the parameters. Statistics, preconditioners,
curvature factors, tables and training use only this interface and check no type of layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.recorded_product import multiplier, where_stored
from bnp_analysis.runtime.kinds import gated


@dataclass(frozen=True)
class LayerKind:
    """How the layers of one type are read.

    Attributes:
        module_type: of the modules.
        layer: the class that answers for one of them.
        weight, bias: names of the parameters in the module.
        transposed: whether the weight is stored with its units last, `(m, n)` in place of `(n, m)`.
        builtin: whether `forward` is known to be the product; a user's type is tried on the data instead.
        recognized: whether the type was found by the shape of a module; its forward pass must be proved a product.
        gain: where the fixed numbers are that the parameter is multiplied by to be the weight (`multiples`), or "".
        asked: whether layers of this type are covered only where they are asked for, with `also=`.
        part: where a module holds several layers, the pattern of this one's tensors in it, else "".
    """

    module_type: type[nn.Module]
    layer: type[Layer]
    weight: str = "weight"
    bias: str = "bias"
    transposed: bool = False
    builtin: bool = False
    recognized: bool = False
    gain: str = ""
    asked: bool = False
    part: str = ""

    def parameter(self, module: nn.Module) -> nn.Parameter | None:
        """The weight's parameter in a module; None where it was replaced by something computed."""
        if not self.gain:
            return module._parameters.get(self.weight)
        holder, _, leaf = self.weight.rpartition(".")
        try:
            return module.get_submodule(holder)._parameters.get(leaf)
        except AttributeError:
            return None

    def changes_product(self, module: nn.Module) -> bool:
        """Whether a subclass, or the module itself, computes its output in another way than the type does."""
        own = any(getattr(type(module), m, None) is not getattr(self.module_type, m, None) for m in _FORWARD)
        return own or "forward" in vars(module)

    def of(self, name: str, module: nn.Module, *, bias: bool = True) -> Layer:
        """The layer that a module of this type is, under its name; without its bias where that is not free."""
        weight: Any = self.parameter(module)
        units = self.layer.units_of(self, module, weight)
        prefix = f"{name}." if name else ""
        bias_name = f"{prefix}{self.bias}" if bias and getattr(module, self.bias, None) is not None else None
        return self.layer(
            f"{prefix}{self.part}" if self.part else name, module, self, f"{prefix}{self.weight}", bias_name, units,
            weight.numel() // units, self.layer.groups_of(module),
        )  # fmt: skip


#: A module's output, and weight's name in the module -> its products: their inputs and outputs.
Apart = tuple[Any, Mapping[str, Sequence[tuple[Tensor, Tensor]]]]
_FORWARD = ("forward", "_conv_forward")
KINDS: dict[type[nn.Module], LayerKind] = {}
# For modules whose type is not registered: each says of what kind a module may be by its shape.
RECOGNIZERS: list[Callable[[nn.Module], LayerKind | None]] = []


@dataclass(frozen=True)
class Layer(ABC):
    """One layer of a model, and where its tensors lie among the parameters: what every kind can be asked.

    A new kind is a subclass in a file of its own, with `rows`, and `register_layer`.

    Attributes:
        name: of the module, empty for a bare layer as root; where a module holds several layers with the pattern of
            this one's tensors. A block of the parameter space either way.
        module: of the model, or of a risk's snapshot.
        kind: its entry in the registry.
        weight, bias: names in the parameter space; `bias` is None without one, or when it is frozen.
        units: output units `n`.
        features: inputs of one unit, `m`; `k^d c / groups` for a convolution.
        groups: of a convolution, else 1; units and features are split evenly among them.
    """

    #: Whether an input `(R, m)` is its own table of rows.
    rows_are_inputs: ClassVar[bool] = False
    #: Whether it is one of several layers inside a module, whose inputs and outputs are not the module's.
    inner: ClassVar[bool] = False
    #: Whether the module's `training` says that it trains; False where it chooses statistics, and the model's says so.
    own_mode: ClassVar[bool] = True

    name: str
    module: Any
    kind: LayerKind
    weight: str
    bias: str | None
    units: int
    features: int
    groups: int

    @abstractmethod
    def rows(self, h: Tensor) -> Tensor:
        """The rows that multiply the weights, `(R, groups, m)`, of an input of the layer."""

    @classmethod
    def units_of(cls, kind: LayerKind, module: Any, weight: Tensor) -> int:
        """The number of output units of a module.

        Raises:
            InvalidInputError: a weight that is no matrix, or that is stored transposed and has more dimensions.
        """
        if weight.ndim < 2 or (kind.transposed and weight.ndim != 2):
            raise InvalidInputError(
                f"a {type(module).__name__} has a weight {kind.weight!r} of shape {tuple(weight.shape)}, which is no "
                "matrix of units and features"
            )
        return weight.shape[-1 if kind.transposed else 0]

    @staticmethod
    def groups_of(module: Any) -> int:
        """Into how many groups units and features are split."""
        return 1

    @classmethod
    def kinds(cls, kind: LayerKind, module: Any) -> list[LayerKind]:
        """The layers that a module of this kind holds; one, unless it says otherwise."""
        return [kind]

    def inputs(self, args: Any, output: Any) -> Mapping[str, Tensor]:
        """What the layers of the module got in a forward pass of it: name of the weight in the module -> input."""
        return {self.kind.weight: args[0]}

    def apart(self, args: Any) -> Apart | None:
        """For a layer inside a module: this one's forward pass, every product by itself; else None."""
        return None

    @classmethod
    def refused(cls, module: Any) -> str:
        """Why a module of this kind is not covered as it is set up; empty if it is."""
        return ""

    def counted(self, h: Tensor) -> tuple[int, Tensor] | None:
        """For rows of zeros with a one: how many there are, and how often each feature `(m,)` is it; else None."""
        return None

    @classmethod
    def unlike(cls, module_type: type[nn.Module], like: type[nn.Module], *, transposed: bool) -> str:
        """Why modules of a type cannot be read as those that they are said to be like; empty if they can."""
        return ""

    @property
    def module_name(self) -> str:
        """The name of the module, of which this may be one of several layers."""
        return self.name.removesuffix(self.kind.part).removesuffix(".") if self.kind.part else self.name

    @property
    def spatial(self) -> int:
        """Dimensions of an image behind the channels of an input; 0 where features come last, as in a dense layer."""
        return 0

    @property
    def patch(self) -> int:
        """Entries of a row that come from one channel; 1 where features are channels."""
        return 1

    @property
    def channel_count(self) -> int:
        """Input channels of all groups together; features where each is a channel of its own."""
        return self.groups * self.features // self.patch

    @property
    def channel_axis(self) -> int:
        """The axis of an input, or of an output, that runs over channels (units), from the end."""
        return -1 - self.spatial

    @property
    def own_weight(self) -> Tensor:
        """The parameter of the module."""
        # In a risk not a parameter but the tensor that stands for it.
        holder, _, leaf = self.kind.weight.rpartition(".")
        weight: Tensor = getattr(self.module.get_submodule(holder) if holder else self.module, leaf)
        return weight

    @property
    def own_bias(self) -> Tensor | None:
        """The parameter of the module, free or not."""
        return getattr(self.module, self.kind.bias, None)

    @property
    def trains(self) -> bool:
        """Whether the weight requires a gradient; not where it was replaced by something computed."""
        weight = self.kind.parameter(self.module)
        return weight is not None and weight.requires_grad

    def gain(self) -> Tensor | None:
        """The fixed numbers `(units, m)` that the parameter is multiplied by; None where it is the weight itself."""
        if not self.kind.gain:
            return None
        found = self.matrix(multiplier(self.module, self.kind.gain, self.own_weight.detach()))
        return found.reshape(self.units, self.features)

    def per_unit(self, values: Tensor) -> Tensor:
        """Values, or rows, of the groups `(..., groups, m)` as what each unit's parameters meet.

        A parameter that is multiplied by a gain meets the input times this gain, so that units differ, `(..., units,
        m)`; else nothing changes.
        """
        gain = self.gain()
        return values if gain is None else values.repeat_interleave(self.units // self.groups, dim=-2) * gain.to(values)

    def unit_moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance `(groups, m)` of the inputs, or `(units, m)` of what each unit's parameters meet."""
        return (self.per_unit(mean), self.per_unit(variance.sqrt()).square()) if self.kind.gain else (mean, variance)

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor in the shape of the weight, as a view with its units first."""
        return weight.mT if self.kind.transposed else weight

    def example_count(self, h: Tensor) -> int:
        """The number `N` of examples in an input `(N, ...)`, 1 for an input without that dimension."""
        return h.shape[0] if h.ndim > self.spatial + 1 else 1

    def image(self, h: Tensor) -> Tensor:
        """For layers with `spatial` dimensions, the image `(N, c, ...)` whose patches are rows, before padding."""
        return h

    def positions(self, h: Tensor) -> int:
        """Rows of one example of an input `(N, ...)`."""
        return self.rows(h[:1]).shape[0]

    def channels(self, h: Tensor) -> Tensor:
        """The values of each input channel, `(samples, c)`, before padding; features where each is a channel."""
        return self.rows(h).flatten(1)

    def expand(self, per_channel: Tensor) -> Tensor:
        """A value per input channel `(c,)` repeated over each patch, `(groups, m)`."""
        return per_channel.repeat_interleave(self.patch).view(self.groups, self.features)

    def by_unit(self, g: Tensor) -> Tensor:
        """A tensor in the shape of the layer's output as `(R, units)`."""
        return g.movedim(self.channel_axis, -1).reshape(-1, self.units)

    def output_rows(self, output: Tensor) -> int:
        """The number `R` of rows behind an output of the layer."""
        return output.numel() // self.units

    def row_count(self, h: Tensor, output: Any) -> int:
        """The number `R` of rows of an input, whose module gave this output."""
        return self.output_rows(output)

    def product(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """`a = rows . w + b`, `(R, units)`, from the parameters of the module; and the sums of the terms' sizes."""
        rows = self.rows(h).to(self.own_weight.dtype)
        weights, gain = self.matrix(self.own_weight.detach()).reshape(self.groups, -1, self.features), self.gain()
        weights = weights if gain is None else weights * gain.view_as(weights)
        out, size = (
            torch.einsum("rgm,gum->rgu", r, w).flatten(1) for r, w in ((rows, weights), (rows.abs(), weights.abs()))
        )
        bias = self.own_bias
        return (out, size) if bias is None else (out + bias.detach(), size + bias.detach().abs())

    def beyond_paper(self, rows: int, examples: int) -> list[str]:
        """What of the layer the paper's rule for `q` does not speak of, in words, for so many rows and examples."""
        return [f"{type(self.module).__name__}, by its rows"]


def enter(layer: type[Layer], *types: type[nn.Module], **how: Any) -> None:
    """Enter types of torch's layers into the registry; `how` as in `LayerKind`."""
    KINDS.update({module_type: LayerKind(module_type, layer, **how) for module_type in types})


def kind_of(module: nn.Module) -> LayerKind | None:
    """The registered kind of a module's type, or of the nearest type above it; else one that its shape allows, or None.

    Example:
        >>> kind_of(nn.Linear(2, 1)).module_type.__name__, kind_of(nn.ReLU())
        ('Linear', None)
    """
    known = next((KINDS[above] for above in type(module).__mro__ if above in KINDS), None)
    if known is not None:
        weight, gain = where_stored(module, known.weight)
        return replace(known, weight=weight, gain=gain) if gain else known
    return next(filter(None, (recognize(module) for recognize in RECOGNIZERS)), None)


def kinds_of(module: nn.Module) -> list[LayerKind]:
    """The kinds of the layers that a module holds: none, one, or several as in a recurrent layer.

    Example:
        >>> [kind.part for kind in kinds_of(nn.GRU(2, 3))]
        ['*_ih_l0', '*_hh_l0']
    """
    kind = kind_of(module)
    return [] if kind is None else kind.layer.kinds(kind, module)


def by_module(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Name of a module -> its layers."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.module_name, []).append(layer)
    return found


def transposed_weights(model: nn.Module) -> dict[str, int]:
    """Names of the weights that are stored with their units last, or second in a convolution -> their groups."""
    found = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        # A normalization without gains has no weight.
        if kind is not None and kind.transposed and getattr(module, kind.weight, None) is not None:
            found[f"{name}.{kind.weight}" if name else kind.weight] = kind.layer.groups_of(module)
    return found


@gated
def register_layer(
    module_type: type[nn.Module],
    *,
    like: type[nn.Module] | type[Layer],
    weight: str = "weight",
    bias: str = "bias",
    transposed: bool = False,
) -> None:
    """Let a type of layer of one's own be covered: in moments, `P`, tables, curvature factors and training.

    Its output must be the product of its weight with the rows of its input, plus its bias, as those of the layer that
    it is like. A risk tries this on its data: layers that compute something else are left out, and named with the
    reason in `uncovered`.

    Args:
        module_type: of the modules; a later call for the same type replaces the earlier one.
        like: a registered type, such as `nn.Linear`, whose rows it has; or a subclass of
            `bnp_analysis.network.layer_kinds.Layer`, which says how inputs become rows.
        weight, bias: names of the parameters in the module; a module without that bias has none.
        transposed: whether the weight is stored with its units last, `(m, n)` in place of `(n, m)`.

    Raises:
        InvalidInputError: `like` is not registered, a convolution that is stored transposed, or a type like a
            convolution that is no subclass of it, whose geometry would not be known.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> class Transposed(torch.nn.Module):
        ...     def __init__(self, m, n):
        ...         super().__init__()
        ...         self.w, self.b = torch.nn.Parameter(torch.ones(m, n)), torch.nn.Parameter(torch.zeros(n))
        ...
        ...     def forward(self, x):
        ...         return x @ self.w + self.b
        >>> bnp.register_layer(Transposed, like=torch.nn.Linear, weight="w", bias="b", transposed=True)
        >>> risk = bnp.EmpiricalRisk(Transposed(3, 2), torch.nn.functional.mse_loss, (torch.eye(3), torch.ones(3, 2)))
        >>> [layer.weight for layer in bnp.network.coverage(risk)]
        ['w']
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise InvalidInputError(
            f"a class of modules is registered, not {module_type!r}: write register_layer(type(layer), like=...)"
        )
    if module_type is nn.Module or not isinstance(like, type):
        wrong = "nn.Module, which every module is," if module_type is nn.Module else f"like={like!r:.40}"
        raise InvalidInputError(
            f"{wrong} is not what a kind of layer is made of: register_layer(MyLayer, like=nn.Linear)"
        )
    if like in KINDS:
        layer = KINDS[like].layer
        if why := layer.unlike(module_type, like, transposed=transposed):
            raise InvalidInputError(
                f"{module_type.__name__} is {why}: write a subclass of Layer that says how its inputs become rows, and "
                "register the type like that"
            )
    elif issubclass(like, Layer):
        layer = like
    else:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise InvalidInputError(f"like={like.__name__} is no registered layer ({known}) and no subclass of Layer")
    KINDS[module_type] = LayerKind(module_type, layer, weight, bias, transposed)
