"""Takes an exported program apart call by call, and each distinct call once.

PyTorch traces a program twice more to decompose it and to make it functional, which takes most of the time of a
capture, although the layers of a model make the same calls. Here a call is traced by itself, with the same tables and
modes, and what it became is copied wherever it is made again with tensors of the same types. Calls that PyTorch does
not take apart need no trace. A call that writes to a tensor changes what later nodes read under its name.

A program is left to PyTorch where that is not enough: if a tensor is written of which another view is still read, if
sizes are only known at run time, and for operators of a higher order, tensor subclasses and objects.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context
from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation, to_fun
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.export import ExportedProgram
from torch.export._trace import _disable_custom_triton_op_functional_decomposition, _ignore_backend_decomps
from torch.export.exported_program import _get_updated_range_constraints
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.proxy_tensor import (
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    maybe_enable_thunkify,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from torch_rtx.errors import Unsupported

log = logging.getLogger(__name__)
Table = Mapping[Any, Callable[..., Any]]
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
NUMBERS = (*SYMBOLIC, int, float)
READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)  # numbers that are no sizes
LITERALS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# Of types, devices and ranges that a capture fixes anyway.
ASSERTION = torch.ops.aten._assert_tensor_metadata.default
WRITTEN = {InputKind.BUFFER: OutputKind.BUFFER_MUTATION, InputKind.USER_INPUT: OutputKind.USER_INPUT_MUTATION}
RENAMED = {
    getattr(torch.ops.aten, name).default for name in ("lift", "lift_fresh", "lift_fresh_copy", "detach", "alias")
}
OF_ITS_PLACE = ("val", "tensor_meta", "unbacked_bindings", "from_node")  # in the meta of a node, not of what it becomes


def decomposed(program: ExportedProgram, table: Table, with_triton: bool) -> ExportedProgram | None:
    """What `run_decompositions` makes of a program for training IR, by the decompositions of `table` alone; None: it is
    left to PyTorch.

    Args:
        with_triton: operators made of Triton kernels are traced, and not called as they are.
    """
    try:
        return _Copy(program).program(table, with_triton)
    except Exception as error:  # whatever it is: PyTorch may know better, and says it in its own words
        log.info("the program is traced again as a whole: %s", error)
        return None


@dataclass(frozen=True)
class _Parts:
    """What a call became.

    Attributes:
        given: the distinct tensors among its arguments.
        calls: those that it made.
        results: the leaves of its result, then the new contents of what it writes to.
        spec: the structure of its result.
        written: which of the tensors it writes to.
    """

    given: Sequence[fx.Node]
    calls: Sequence[fx.Node]
    results: Sequence[Any]
    spec: pytree.TreeSpec
    written: Sequence[int]


class _Copy:
    """A functional copy of a program's graph.

    Attributes:
        now: what each node of the program stands for at this point: a node of the copy, a literal, or a list of these.
        sizes: the nodes of the copy that compute a number, by its expression.
        sharing: the nodes of the program whose tensors lie in the same memory.
        written: inputs that are written to.
    """

    def __init__(self, source: ExportedProgram) -> None:
        self.source, self.nodes = source, list(source.graph.nodes)
        self.now: dict[fx.Node, Any] = {}
        self.sizes: dict[Any, fx.Node] = {}
        self.parts: dict[Any, _Parts] = {}
        self.types: dict[fx.Node, Any] = {}
        self.written: set[fx.Node] = set()
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.sharing: dict[StorageWeakRef, list[fx.Node]] = {}
        self.tracer: Any = None
        self.table: Table = {}

    def program(self, table: Table, with_triton: bool) -> ExportedProgram:
        """The copy; arguments as in `decomposed`.

        Raises:
            Unsupported: see the module.
        """
        self.table, signature = table, self.source.graph_signature
        kinds = {spec.kind for spec in (*signature.input_specs, *signature.output_specs)}
        if kinds - {*WRITTEN, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR, OutputKind.USER_OUTPUT}:
            raise Unsupported(f"an input or output is of the kinds {kinds}")
        values = [node.meta.get("val") for node in self.nodes]
        if any(map(_is_late, pytree.tree_leaves(values))):
            raise Unsupported("a size is known when the program runs")
        mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None) or FakeTensorMode()
        for node, value in zip(self.nodes, values, strict=True):
            for tensor in pytree.tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    self.sharing.setdefault(StorageWeakRef(tensor.untyped_storage()), []).append(node)
        with _decomposing(mode, with_triton), FunctionalTensorMode(_allow_token_discovery=True):
            graph = make_fx(lambda: self._copied(), table, _disable_torch_fn_metadata_mode=True)().graph
        return self._finished(graph)

    def _copied(self) -> list[Any]:
        """Makes the copy in the trace that is running. Returns what inputs are written with, and the results."""
        mode: Any = get_proxy_mode()
        self.tracer, self.graph = mode.tracer, mode.tracer.graph
        with maybe_enable_thunkify():
            for node in self.nodes:
                self._copy(node)
        results = [self.now[node] for node in self.nodes if node in self.written]
        results += map(self._of, self.nodes[-1].args[0])
        return [self.tracer.proxy(one) if isinstance(one, fx.Node) else one for one in results]

    def _copy(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            self._placeholder(node, value)
        elif node.op == "call_function" and isinstance(value, NUMBERS) and node.target not in READS:
            self._number(node, value)
        elif node.op == "call_function" and node.target is getitem:
            self.now[node] = self._of(node.args[0])[node.args[1]]
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target is ASSERTION:
                return
            if not node.target._schema.returns:
                raise Unsupported(f"{node.target} has no result")
            self._call(node)
        elif node.op != "output":
            raise Unsupported(f"there is no copy of {node.format_node()}")

    def _placeholder(self, node: fx.Node, value: Any) -> None:
        made = self.graph.create_node("placeholder", node.target)
        made.meta, made.name = dict(node.meta), node.name  # also of a built-in function, as the signature has it
        if isinstance(value, SYMBOLIC):
            self._track(made, value)
        elif not isinstance(value, LITERALS) and (type(value) is not FakeTensor or value.layout != torch.strided):
            raise Unsupported(f"an input is a {type(value).__name__}")
        self.now[node] = value if isinstance(value, LITERALS) else made

    def _number(self, node: fx.Node, value: Any) -> None:
        """A number that `node` computes: a literal, or the node that computes it already, or a copy of `node`."""
        if isinstance(value, SYMBOLIC) and _expression(value) not in self.sizes:
            self._track(self._made(node, self._of, node), value)
        self.now[node] = self.sizes[_expression(value)] if isinstance(value, SYMBOLIC) else value

    def _track(self, node: fx.Node, number: Any) -> None:
        self.sizes[_expression(number)] = node
        with _disable_current_modes():
            track_tensor_tree(number, self.tracer.proxy(node), constant=None, tracer=self.tracer)

    def _of(self, value: Any) -> Any:
        return self.now[value] if isinstance(value, fx.Node) else value

    def _made(self, node: fx.Node, new: Callable[[fx.Node], Any], source: fx.Node) -> fx.Node:
        """A copy of a call at the end of the graph, for the line of the model that `source` is from."""
        made: fx.Node = self.graph.create_node(node.op, node.target, *fx.map_arg((node.args, node.kwargs), new))
        made.meta = _from(source) | {"val": node.meta["val"]}
        return made

    def _call(self, node: fx.Node) -> None:
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        values = list(map(self._of, leaves))
        if _is_plain(node.target) and node.target not in self.table and self._has_its_types(node, leaves, values):
            self.now[node] = self._made(node, self._of, node)
            return
        tensors = (value for value in values if isinstance(value, fx.Node) and self._type(value) is not None)
        given = list(dict.fromkeys(tensors))
        places = {value: index for index, value in enumerate(given)}
        where = [(fx.Node, places[value]) if value in places else self._literal(value) for value in values]
        key = node.target, spec, tuple(where), tuple(map(self._type, given))
        parts = self.parts.get(key)
        if parts is None:
            parts = self.parts[key] = self._traced(node, values, spec, given)
            results = parts.results
        else:
            new = dict(zip(parts.given, given, strict=True))
            for one in parts.calls:
                new[one] = self._made(one, lambda old: new.get(old, old), node)
            results = [new.get(one, one) if isinstance(one, fx.Node) else one for one in parts.results]
        count = parts.spec.num_leaves
        for index, content in zip(parts.written, results[count:], strict=True):
            self._write(node, given[index], content)
        self.now[node] = pytree.tree_unflatten(results[:count], parts.spec)

    def _has_its_types(self, node: fx.Node, leaves: Sequence[Any], values: Sequence[Any]) -> bool:
        """A call of these values gives what the program says."""
        pairs = ((leaf, value) for leaf, value in zip(leaves, values, strict=True) if isinstance(value, fx.Node))
        return isinstance(node.meta["val"], FakeTensor) and all(self._type(a) == self._type(b) for a, b in pairs)

    def _traced(self, node: fx.Node, values: Sequence[Any], spec: pytree.TreeSpec, given: Sequence[fx.Node]) -> _Parts:
        last = next(iter(reversed(self.graph.nodes)), None)  # that of PyTorch 2.11 is no iterator
        known = {one: one.meta["val"] for one in given}
        with _disable_current_modes():
            if len({*map(id, known.values())}) < len(known):
                # What a call became shares its types with its copies, and PyTorch tells tensors apart by their objects.
                known = {one: value.detach() for one, value in known.items()}
            for one, tensor in known.items():
                track_tensor_tree(tensor, self.tracer.proxy(one), constant=None, tracer=self.tracer)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)):
            wrapped = {one: to_fun(tensor) for one, tensor in known.items()}
            flat = [wrapped.get(v, v.meta["val"]) if isinstance(v, fx.Node) else v for v in values]
            args, kwargs = pytree.tree_unflatten(flat, spec)
            leaves, structure = pytree.tree_flatten(node.target(*args, **kwargs))  # type: ignore[operator]
            written = [index for index, one in enumerate(given) if has_data_mutation(wrapped[one])]
            found = [from_fun(leaf) for leaf in (*leaves, *(wrapped[given[index]] for index in written))]
            if any(_type(wrapped[one])[:4] != self._type(one)[:4] for one in given):
                raise Unsupported(f"{node.target} gives a tensor another shape")
        made = [*takewhile(lambda one: one is not last, reversed(self.graph.nodes))][::-1]
        calls = [one for one in made if not isinstance(one.meta.get("val"), SYMBOLIC)]
        for one in calls:
            if one.op != "call_function" or not (
                one.target is getitem or isinstance(one.target, torch._ops.OpOverload)
            ):
                raise Unsupported(f"{node.target} makes {one.format_node()}")
        for one in made:
            one.meta = _from(node) | {"val": one.meta["val"]}
        return _Parts(given, calls, list(map(self._node, found)), structure, written)

    def _node(self, value: Any) -> Any:
        """What computes a value of the trace."""
        if isinstance(value, torch.Tensor):
            return get_proxy_slot(value, self.tracer).proxy.node
        return get_proxy_slot(value, self.tracer).force().node if isinstance(value, SYMBOLIC) else value

    def _type(self, node: fx.Node) -> Any:
        """As part of a key: everything that a trace of a call can depend on; None for a number."""
        if node not in self.types:
            self.types[node] = _type(node.meta["val"])
        return self.types[node]

    def _literal(self, value: Any) -> Any:
        """As part of a key: numbers that are equal may still differ."""
        if isinstance(value, fx.Node):
            return _expression(value.meta["val"])
        if not isinstance(value, LITERALS):
            raise Unsupported(f"an argument is a {type(value).__name__}")
        return type(value), repr(value) if isinstance(value, float | complex) else value

    def _write(self, node: fx.Node, old: fx.Node, new: Any) -> None:
        """From `node` on, what stood for `old` stands for `new`.

        Raises:
            Unsupported: another view of the memory is still read, or the new contents have another type.
        """
        if not isinstance(new, fx.Node) or self._type(new) != self._type(old):
            raise Unsupported("a tensor gets contents of another type")
        names = [one for one, stands in self.now.items() if stands is old]
        memory = {StorageWeakRef(one.meta["val"].untyped_storage()) for one in names}
        here = self.position[node]
        for one in {other for storage in memory for other in self.sharing.get(storage, ())} - {*names}:
            read = one.op == "placeholder" or any(self.position[user] > here for user in one.users)
            if self.position[one] < here and read:
                raise Unsupported("a tensor is written of which another view is read")
        for one in names:
            self.now[one] = new
            if one.op == "placeholder":
                self.written.add(one)

    def _finished(self, graph: fx.Graph) -> ExportedProgram:
        """The program that has this graph."""
        source, signature = self.source, self.source.graph_signature
        specs: list[OutputSpec] = []
        for node, spec in zip(self.nodes, signature.input_specs, strict=False):
            if node in self.written:
                if spec.kind not in WRITTEN:
                    raise Unsupported("a constant is written")
                name = node.name if spec.kind is InputKind.USER_INPUT else spec.target
                specs.append(OutputSpec(WRITTEN[spec.kind], TensorArgument(name=""), name))
        output = graph.output_node()
        output.meta = dict(self.nodes[-1].meta)
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        for index, spec in enumerate(specs):
            if spec.kind is OutputKind.BUFFER_MUTATION and results[index].target is torch.ops.aten.copy.default:
                results[index] = results[index].args[1]  # the buffer is written with it anyway
        specs += map(copy, signature.output_specs)
        output.args = (tuple(results),)
        graph.eliminate_dead_code()
        for value, spec in zip(results, specs, strict=True):
            if isinstance(value, fx.Node) and isinstance(spec.arg, TensorArgument | SymIntArgument):
                spec.arg = type(spec.arg)(name=value.name)
            elif isinstance(value, fx.Node) or not isinstance(spec.arg, ConstantArgument):
                raise Unsupported("a result is of another kind")
        gm = _make_graph_module(torch.nn.Module(), graph)
        gm.meta.update(source.graph_module.meta)
        return ExportedProgram(
            root=gm,
            graph=gm.graph,
            graph_signature=ExportGraphSignature(list(signature.input_specs), specs),
            state_dict=source.state_dict,
            range_constraints=_get_updated_range_constraints(gm, source.range_constraints),
            module_call_graph=source.module_call_graph,
            example_inputs=source.example_inputs,
            constants=source.constants,
        )


@contextlib.contextmanager
def _decomposing(mode: FakeTensorMode, with_triton: bool) -> Iterator[None]:
    """The modes in which PyTorch decomposes programs."""
    with contextlib.ExitStack() as stack:
        if not with_triton:
            stack.enter_context(_disable_custom_triton_op_functional_decomposition())
        for context in (mode, tracing(TracingContext(mode)), _ignore_backend_decomps(), _compiling_state_context()):
            stack.enter_context(context)
        stack.enter_context(torch.no_grad())
        stack.enter_context(enable_python_dispatcher())
        yield


@cache
def _is_plain(op: Any) -> bool:
    """PyTorch does not take a call of `op` apart, and records it as it is, with a result of the same type."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    known = all(key is torch._C.DispatchKey.Meta for key in op.py_kernels)
    return op.namespace == "aten" and known and not composite and not op._schema.is_mutable and op not in RENAMED


def _is_late(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, *SYMBOLIC)) and bool(free_unbacked_symbols(value))


def _from(source: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in source.meta.items() if key not in OF_ITS_PLACE}


def _expression(number: Any) -> Any:
    return type(number), number.node.expr


def _type(value: Any) -> Any:
    """See `_Copy._type`."""
    if not isinstance(value, torch.Tensor):
        return None
    numbers = (*value.shape, *value.stride(), value.storage_offset())
    exact = tuple(number.node.expr if isinstance(number, torch.SymInt) else number for number in numbers)
    return value.dtype, value.device, value.dim(), exact, value.is_conj(), value.is_neg(), value.requires_grad
