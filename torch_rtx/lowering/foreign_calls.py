"""Launches of Triton kernels that a model makes: from nodes of a capture to calls of `torch_rtx.launch`.

PyTorch captures a launch, whether the model makes it directly or in a `torch.library.triton_op`, as a higher-order
operator: the kernel and its constants are in a table of the process, a grid for each configuration is computed from
sizes, and the tensors that the kernel writes are copied before. `@triton.heuristics` are evaluated by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torch_rtx.errors import CaptureError, Unsupported
from torch_rtx.foreign import register
from torch_rtx.ir import Loc, Node, Value
from torch_rtx.lowering.kernels.triton_kernels import NUMBER, SIZE, TENSOR, Argument, Config, TritonKernel
from torch_rtx.optable import LAUNCH

NAME = "triton_kernel_wrapper_functional"
OPTIONS = ("maxnreg",)  # of a configuration, beside the numbers of warps and stages
# Options of a launch beside these: for the compiler, and those without which a kernel computes the same.
LAUNCH_OPTIONS = (*OPTIONS, "enable_fp_fusion", "sanitize_overflow", "default_dot_input_precision", "debug")
IGNORED = ("launch_pdl", "warmup")


@dataclass(frozen=True)
class Launched:
    """A launch in a capture: see `foreign.Launch`. Instead of a tensor, the index of a result of the node stands for
    memory that the kernel fills."""

    kernel: str
    tensors: tuple[fx.Node | int, ...]
    written: tuple[int, ...]
    sizes: tuple[fx.Node | int | torch.SymInt, ...]


# What registered operators launch, see `backend.registered_kernels`.
OPERATORS: dict[Any, Callable[[fx.Node, Loc | None], Launched]] = {}


def is_launch(node: fx.Node) -> bool:
    """Whether the node launches a Triton kernel of the model, or the kernel that its operator is registered with."""
    target = node.target
    return target in OPERATORS or (isinstance(target, torch._ops.HigherOrderOperator) and target.name() == NAME)


def launched(node: fx.Node, loc: Loc | None) -> Launched:
    """The launch of a node, whose kernel is then registered.

    Raises:
        Unsupported: an argument that no engine passes.
        CaptureError: the arguments do not fit the kernel.
    """
    return OPERATORS[node.target](node, loc) if node.target in OPERATORS else _of_triton(node, loc)


def import_launch(node: fx.Node, outputs: tuple[Value | None, ...], importer: Any, loc: Loc | None) -> Node:
    """The node for a launch, whose results are `outputs`; before it, the importer gets nodes for memory that the kernel
    fills."""
    found, contents = launched(node, loc), pytree.tree_leaves(node.meta["val"])

    def memory(content: torch.Tensor) -> Value:
        type_ = importer.symbols.type(content)
        args = ("size", type_.shape), ("stride", type_.strides), ("dtype", type_.dtype), ("device", type_.device)
        made: Value = importer.next_value(type_)
        importer.nodes.append(Node("op", "aten.empty_strided.default", args, (made,), None, loc))
        return made

    tensors = tuple(memory(contents[one]) if isinstance(one, int) else importer.attr(one) for one in found.tensors)
    sizes = tuple(importer.sym(one) if isinstance(one, torch.SymInt) else importer.attr(one) for one in found.sizes)
    args = ("kernel", found.kernel), ("tensors", tensors), ("written", found.written), ("sizes", sizes)
    return Node("op", LAUNCH, args, outputs, None, loc)


def _of_triton(node: fx.Node, loc: Loc | None) -> Launched:
    """The launch of a Triton kernel.

    Raises:
        Unsupported: an argument that no engine passes.
        CaptureError: the arguments do not fit the function.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table as table

    given: Mapping[str, Any] = node.kwargs
    kernel: Any = table.get_kernel(given["kernel_idx"])
    if given["tma_descriptor_metadata"]:
        raise Unsupported("a Triton kernel that takes tensor descriptors")
    values = {**given["kwargs"], **table.get_constant_args(given["constant_args_idx"])}
    function, configs = kernel, getattr(kernel, "configs", None)
    while hasattr(function, "fn") and not hasattr(function, "params"):
        function = function.fn
    options = _options(function, values)
    made = [_config(config) for config in configs] if configs else [Config({})]
    made = [replace(one, options=tuple((dict(one.options) | options).items())) for one in made]
    arguments, tensors, sizes, constants = _sorted(function, values, {name for c in made for name in c.constants}, loc)
    configs = tuple(Config({**constants, **c.constants}, c.num_warps, c.num_stages, c.options) for c in made)
    grids = [size for grid in given["grid"] for size in grid]
    if not all(_is_integer(size) for size in grids) or len(grids) != 3 * len(configs):
        raise Unsupported("a grid that is not of sizes")
    positions = {a.name: int(a.value) for a in arguments if a.kind == TENSOR}
    key = register(TritonKernel(function, arguments, configs, loc))
    written = tuple(positions[name] for name in node.meta["val"])
    return Launched(key, tuple(tensors), written, (*sizes, *grids))


def _options(function: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The options of a launch, which are taken out of its arguments.

    Raises:
        Unsupported: one that no engine heeds.
    """
    params = {param.name for param in function.params}
    if values.get("launch_cooperative_grid") and "launch_cooperative_grid" not in params:
        raise Unsupported("a cooperative launch of a Triton kernel")
    for name in (*IGNORED, "launch_cooperative_grid"):
        if name not in params:
            values.pop(name, None)
    given = [name for name in LAUNCH_OPTIONS if name in values and name not in params]
    return {name: value for name in given if (value := values.pop(name)) is not None}


def _config(config: Any) -> Config:
    if config.num_ctas != 1:
        raise Unsupported("a Triton kernel of clusters (num_ctas)")
    options = ((name, getattr(config, name, None)) for name in OPTIONS)
    return Config(config.kwargs, config.num_warps, config.num_stages, tuple(o for o in options if o[1] is not None))


def _sorted(
    function: Any, values: Mapping[str, Any], chosen: set[str], loc: Loc | None
) -> tuple[tuple[Argument, ...], list[fx.Node], list[fx.Node | int], dict[str, Any]]:
    """The arguments, with the tensors and sizes that they refer to; and the constants. `chosen`: the names of constants
    that configurations choose."""
    params = {param.name: param for param in function.params}
    unknown = [name for name in (*values, *chosen) if name not in params]
    missing = [name for name, p in params.items() if name not in {*values, *chosen} and not p.has_default]
    if unknown or missing:
        problem = f"has no parameter {unknown[0]}" if unknown else f"lacks the argument {missing[0]}"
        expected = f"its parameters are {', '.join(params)}"
        raise CaptureError(f"the launch of the Triton kernel {function.fn.__name__} {problem}", loc=loc, hint=expected)
    arguments, constants = list[Argument](), dict[str, Any]()
    tensors, sizes = list[fx.Node](), list[fx.Node | int]()
    for name, param in params.items():
        if name in chosen:
            continue
        value = values.get(name, param.default)
        content = value.meta.get("val") if isinstance(value, fx.Node) else value
        if param.is_constexpr or value is None:
            if isinstance(value, fx.Node):
                raise Unsupported(f"the constant {name} of a Triton kernel, which differs between calls")
            constants[name] = value
        elif isinstance(content, torch.Tensor):
            arguments.append(Argument(name, TENSOR, len(tensors)))
            tensors.append(value)
        elif isinstance(content, torch.SymInt) or type(content) is int:
            arguments.append(Argument(name, SIZE, len(sizes)))
            sizes.append(value)
        elif type(content) in (bool, float) and not isinstance(value, fx.Node):
            arguments.append(Argument(name, NUMBER, value))
        else:
            raise Unsupported(f"the argument {name} of a Triton kernel, a {type(content).__name__}")
    return tuple(arguments), tensors, sizes, constants


def _is_integer(size: Any) -> bool:
    return isinstance(size.meta.get("val") if isinstance(size, fx.Node) else size, int | torch.SymInt)
