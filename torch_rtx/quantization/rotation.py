"""Which rotations of inputs the weights of earlier layers can take, so that no call computes them.

Let a layer's output reach rotated layers through operations that treat all channels alike: then the first layer's
weight can rotate its outputs, and the others get rotated inputs for free. The values of attention and its projection
are the common case. What reaches what is watched while the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from torch_rtx.quantization.calibration import ForwardLoop, run
from torch_rtx.quantization.config import LayerConfig
from torch_rtx.quantization.hadamard import block_of
from torch_rtx.quantization.layers import kind_of, weight_of

SMALLEST_BLOCK = 32  # below, a rotation of its own spreads outliers better
aten = torch.ops.aten


@dataclass
class Space:
    """Tensors whose last axes would be rotated together: blocks of channels of one or several layers' outputs."""

    limit: int  # what the block has to divide
    sources: set[str] = field(default_factory=set)
    sinks: set[str] = field(default_factory=set)
    is_open: bool = False  # something else than rotated layers depends on the values
    parent: Space | None = None

    def root(self) -> Space:
        """The space that this one has become part of."""
        return self if self.parent is None else self.parent.root()

    def join(self, other: Space) -> None:
        """Make two spaces one."""
        mine, others = self.root(), other.root()
        if mine is not others:
            mine.limit = gcd(mine.limit, others.limit)
            mine.sources |= others.sources
            mine.sinks |= others.sinks
            mine.is_open |= others.is_open
            others.parent = mine


# Operations that copy, negate, or rearrange all but the last axis; blocks that divide both last axes stay together.
_REARRANGING = {
    *(aten.view.default, aten._unsafe_view.default, aten.clone.default, aten.alias.default, aten.detach.default),
    *(aten._to_copy.default, aten.expand.default, aten.repeat.default, aten.transpose.int, aten.permute.default),
    *(aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.cat.default, aten.neg.default),
}
_ALONG_AN_AXIS = {aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.cat.default}
_SCALING = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


def _keeps_channels(func: Any, args: tuple[Any, ...], x: Tensor, result: Tensor) -> bool:
    """Whether a rearranging operation leaves blocks of the last axis of `x` what they are."""
    if func is aten.transpose.int:
        return (x.dim() - 1) not in {axis % x.dim() for axis in args[1:3]}
    if func is aten.permute.default:
        return args[1][-1] % x.dim() == x.dim() - 1
    if func in _ALONG_AN_AXIS:
        axes = max(x.dim(), result.dim())
        return (args[1] if len(args) > 1 else 0) % axes != axes - 1
    if func in (aten.expand.default, aten.repeat.default):
        return result.shape[-1] == x.shape[-1]
    return result.is_floating_point()


class _Flow(TorchDispatchMode):
    """Follows outputs of layers to inputs of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.spaces = WeakIdKeyDictionary()
        self.of_source: dict[str, Space] = {}
        self.of_sink: dict[str, Space] = {}
        self.depth = 0

    def space(self, x: Any) -> Space | None:
        found = self.spaces.get(x) if isinstance(x, Tensor) else None
        return None if found is None else found.root()

    def open(self, values: Iterable[Any]) -> None:
        """Say that something else depends on these values."""
        for space in map(self.space, values):
            if space:
                space.is_open = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.depth:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if any(self.space(x) for x in tensors):
                self._follow(func, args, tensors, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor], result: Any) -> None:
        """Give a result the space of an operand that it is rotated with; other operands are open."""
        first = result[0] if isinstance(result, tuple) else result
        carriers = self._carriers(func, args, tensors, first)
        spaces = [self.space(x) for x in carriers]
        if not carriers or None in spaces:
            self.open([*tensors, *tree_leaves(result)])
            return
        self.open(x for x in tensors if not any(x is carrier for carrier in carriers))
        space = spaces[0]
        assert space
        for other in spaces[1:]:
            assert other
            space.join(other)
        space = space.root()
        space.limit = gcd(space.limit, first.shape[-1])
        self.spaces[first] = space

    def _carriers(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor], result: Tensor) -> list[Tensor]:
        """The operands that a result is rotated with; none where a rotation does not commute."""
        if func in _REARRANGING:
            return tensors if all(_keeps_channels(func, args, x, result) for x in tensors) else []
        if func is aten.add.Tensor and len(tensors) == 2 and tensors[0].shape[-1:] == tensors[1].shape[-1:]:
            return tensors
        if func in _SCALING and self.space(args[0]):
            factor = args[1]
            alike = not isinstance(factor, Tensor) or factor.dim() == 0 or factor.shape[-1] == 1
            return [args[0]] if alike and result.shape[-1] == args[0].shape[-1] else []
        if func is aten.bmm.default:
            return [args[1]]
        return [args[2]] if "scaled_dot_product" in str(func) else []

    def enter(self, name: str, rotates: bool) -> Callable[..., None]:
        """A hook before a layer's call."""

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.depth += 1
            if self.depth > 1:
                return
            x = args[0] if args else next(iter(kwargs.values()))
            space = self.space(x) or Space(max(x.shape[-1:], default=1), is_open=True)
            if not rotates:
                space.is_open = True
                return
            space.sinks.add(name)
            self.of_sink.setdefault(name, space).join(space)

        return before

    def leave(self, name: str, can_rotate: bool) -> Callable[..., None]:
        """A hook after a layer's call."""

        def after(layer: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
            self.depth -= 1
            if not self.depth and can_rotate:
                space = Space(result.shape[-1], sources={name})
                self.of_source.setdefault(name, space).join(space)
                self.spaces[result] = space.root()

        return after


def fused_rotations(
    model: nn.Module, plan: Mapping[str, LayerConfig], forward_loop: ForwardLoop
) -> dict[str, dict[str, Tensor]]:
    """The buffers `input_rotation` and `output_rotation`, i64[]: the blocks in which a layer's input comes rotated, and
    in which its weight has to rotate the output. Only linear layers of the plan take part."""
    flow, handles = _Flow(), []
    for name, config in plan.items():
        layer = model.get_submodule(name)
        rotates = config.rotate and (config.input is None or config.input.dynamic)
        before, after = flow.enter(name, rotates), flow.leave(name, kind_of(layer) == "linear")
        handles += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    handles.append(model.register_forward_hook(lambda model, args, result: flow.open(tree_leaves(result))))
    try:
        with flow:
            run(model, forward_loop)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, dict[str, Tensor]] = {}
    for space in {id(space.root()): space.root() for space in flow.of_source.values()}.values():
        block = block_of(space.limit)
        if space.is_open or not space.sinks or block < SMALLEST_BLOCK:
            continue
        for key, names in (("input_rotation", space.sinks), ("output_rotation", space.sources)):
            for name in names:
                device = weight_of(model.get_submodule(name)).device
                found.setdefault(name, {})[key] = torch.tensor(block, device=device)
    return found
