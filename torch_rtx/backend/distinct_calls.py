"""Takes an exported program apart call by call, and each distinct call once.

PyTorch traces a program twice more to decompose it and to make it functional, which takes most of the time of a
capture, although the layers of a model make the same calls. Here a call is traced by itself, with the same tables and
modes, and what it became is copied wherever it is made again with tensors of the same types. A call that writes to a
tensor changes what later nodes read under its name.

A program is left to PyTorch where that is not enough: if a tensor is written of which another view is still read, if
sizes are only known at run time, and for operators of a higher order, tensor subclasses and objects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context
from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation, has_metadata_mutation, to_fun
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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._thunk import Thunk

from torch_rtx.errors import Unsupported

Table = Mapping[torch._ops.OperatorBase, Callable[..., Any]]
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
LITERALS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# Of types, devices and ranges that a capture fixes anyway.
ASSERTION = torch.ops.aten._assert_tensor_metadata.default
WRITTEN = {InputKind.BUFFER: OutputKind.BUFFER_MUTATION, InputKind.USER_INPUT: OutputKind.USER_INPUT_MUTATION}
OF_ITS_PLACE = ("val", "tensor_meta", "unbacked_bindings", "from_node")  # in the meta of a node, not of what it becomes


def decomposed(program: ExportedProgram, table: Table, with_triton: bool) -> ExportedProgram | None:
    """What `run_decompositions` makes of a program for training IR, by the decompositions of `table` alone; None: it is
    left to PyTorch.

    Args:
        with_triton: operators made of Triton kernels are traced, and not called as they are.
    """
    try:
        return _Copy(program, table, with_triton).program()
    except Unsupported:
        return None


@dataclass(frozen=True)
class _Parts:
    """What a call becomes: a graph, whose results are those of the call, then the new contents of what it writes to.

    Attributes:
        spec: the structure of the call's result.
        written: which of the distinct tensors among its arguments it writes to.
    """

    graph: fx.Graph
    spec: pytree.TreeSpec
    written: tuple[int, ...]


class _Copy:
    """A functional copy of a program's graph.

    Attributes:
        now: what each node of the program stands for at this point: a node of the copy, a literal, or a list of these.
        sizes: the nodes of the copy that compute a number, by its expression.
    """

    def __init__(self, source: ExportedProgram, table: Table, with_triton: bool) -> None:
        self.source, self.table, self.with_triton = source, table, with_triton
        self.graph = fx.Graph()
        self.now: dict[fx.Node, Any] = {}
        self.sizes: dict[Any, fx.Node] = {}
        self.parts: dict[Any, _Parts] = {}
        self.written: set[fx.Node] = set()
        nodes = list(source.graph.nodes)
        self.position = {node: index for index, node in enumerate(nodes)}
        self.last_read = {node: max((self.position[u] for u in node.users), default=-1) for node in nodes}
        self.sharing: dict[StorageWeakRef, list[fx.Node]] = {}
        modes = [val.fake_mode for node in nodes if isinstance(val := node.meta.get("val"), FakeTensor)]
        self.mode = modes[0] if modes else FakeTensorMode()

    def program(self) -> ExportedProgram:
        """The copy.

        Raises:
            Unsupported: see the module.
        """
        signature = self.source.graph_signature
        kinds = {spec.kind for spec in signature.input_specs} - set(InputKind) | {spec.kind for spec in signature.output_specs}
        if kinds - {OutputKind.USER_OUTPUT} or signature.input_tokens:
            raise Unsupported("an output is no result")
        for node in self.source.graph.nodes:
            val = node.meta.get("val")
            if any(isinstance(leaf, (torch.Tensor, *SYMBOLIC)) and free_unbacked_symbols(leaf) for leaf in pytree.tree_leaves(val)):
                raise Unsupported("a size is known when the program runs")
            if isinstance(val, torch.Tensor):
                self.sharing.setdefault(StorageWeakRef(val.untyped_storage()), []).append(node)
        with self._tracing():
            for node in self.source.graph.nodes:
                self._copy(node)
        return self._finished()

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        """The modes in which PyTorch decomposes programs."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.mode)
            stack.enter_context(tracing(TracingContext(self.mode)))
            stack.enter_context(_ignore_backend_decomps())
            stack.enter_context(_compiling_state_context())
            if not self.with_triton:
                stack.enter_context(_disable_custom_triton_op_functional_decomposition())
            stack.enter_context(torch.no_grad())
            stack.enter_context(enable_python_dispatcher())
            yield

    def _copy(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target is not ASSERTION:
                self._call(node)
        elif node.op == "call_function" and isinstance(node.meta.get("val"), (*SYMBOLIC, int, float)):
            self.now[node] = self._number(node, self._of)
        elif node.op == "call_function" and node.target is getitem:
            self.now[node] = self._of(node.args[0])[node.args[1]]
        elif node.op != "output":
            raise Unsupported(f"no copy of {node.format_node()}")

    def _placeholder(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        made = self.graph.placeholder(node.name)
        made.meta = dict(node.meta)
        made.name = node.name
        if type(val) is FakeTensor and val.layout == torch.strided:
            self.now[node] = made
        elif isinstance(val, SYMBOLIC):
            self.now[node] = self.sizes[_expression(val)] = made
        elif isinstance(val, LITERALS):
            self.now[node] = val
        else:
            raise Unsupported(f"an input is a {type(val).__name__}")

    def _of(self, value: Any) -> Any:
        return self.now[value] if isinstance(value, fx.Node) else value

    def _number(self, node: fx.Node, new: Callable[[fx.Node], Any], like: fx.Node | None = None) -> Any:
        """A number that `node` computes: a literal, or the node that computes it already, or a copy of `node`."""
        val = node.meta["val"]
        if not isinstance(val, SYMBOLIC):
            return val
        found = self.sizes.get(_expression(val))
        if found is None:
            found = self.sizes[_expression(val)] = self._made(node, new, like or node)
        return found

    def _made(self, node: fx.Node, new: Callable[[fx.Node], Any], like: fx.Node) -> fx.Node:
        """A copy of a call at the end of the graph, at the line of the model of `like`."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), new)
        made = self.graph.create_node("call_function", node.target, args, kwargs, name=like.name)
        made.meta = {key: value for key, value in like.meta.items() if key not in OF_ITS_PLACE}
        made.meta["val"] = node.meta["val"]
        return made

    def _call(self, node: fx.Node) -> None:
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        values = list(map(self._of, leaves))
        given = list(dict.fromkeys(value for value in values if isinstance(value, fx.Node)))
        places = {value: index for index, value in enumerate(given)}
        where = tuple((fx.Node, places[v]) if isinstance(v, fx.Node) else (type(v), _literal(v)) for v in values)
        key = node.target, spec, where, tuple(_type(one.meta["val"]) for one in given)
        parts = self.parts.get(key)
        if parts is None:
            parts = self.parts[key] = self._traced(node.target, values, spec, given)
        new = dict(zip(parts.graph.find_nodes(op="placeholder"), given, strict=True))
        for one in parts.graph.nodes:
            if one.op == "call_function":
                is_number = isinstance(one.meta.get("val"), SYMBOLIC)
                new[one] = self._number(one, new.__getitem__, node) if is_number else self._made(one, new.__getitem__, node)
        results = fx.map_arg(parts.graph.output_node().args[0], new.__getitem__)
        count = parts.spec.num_leaves
        for index, content in zip(parts.written, results[count:], strict=True):
            self._write(node, given[index], content)
        self.now[node] = pytree.tree_unflatten(list(results[:count]), parts.spec)

    def _traced(self, target: Any, values: Sequence[Any], spec: pytree.TreeSpec, given: list[fx.Node]) -> _Parts:
        places = {one: index for index, one in enumerate(given)}
        found: list[Any] = []

        def call(*args: Any) -> list[Any]:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)):
                wrapped = [to_fun(arg) for arg in args]
                flat = [wrapped[places[value]] if isinstance(value, fx.Node) else value for value in values]
                args, kwargs = pytree.tree_unflatten(flat, spec)
                leaves, structure = pytree.tree_flatten(target(*args, **kwargs))
                tensors = [index for index, one in enumerate(wrapped) if isinstance(one, torch.Tensor)]
                written = tuple(index for index in tensors if has_data_mutation(wrapped[index]))
                found[:] = [structure, written]
                return [from_fun(leaf) for leaf in (*leaves, *(wrapped[index] for index in written))]

        # Nodes that the same call became share the object that is their type; PyTorch tells arguments apart by theirs.
        examples = [val.detach() if isinstance(val, torch.Tensor) else val for val in (one.meta["val"] for one in given)]
        try:
            with FunctionalTensorMode(_allow_token_discovery=True):
                trace = make_fx(call, self.table, _disable_torch_fn_metadata_mode=True)
                graph = trace(*examples).graph
        except Exception as error:  # PyTorch will raise it again, with its own words
            raise Unsupported(f"{target}: {error}") from error
        for one in graph.nodes:
            if one.op == "call_function":
                val = one.meta.get("val")
                if not isinstance(val, SYMBOLIC) and one.target is not getitem and not isinstance(one.target, torch._ops.OpOverload):
                    raise Unsupported(f"{target} calls {one.target}")
            elif one.op not in ("placeholder", "output"):
                raise Unsupported(f"{target} has a constant")
        return _Parts(graph, *found)

    def _write(self, node: fx.Node, old: fx.Node, new: Any) -> None:
        """From `node` on, what stood for `old` stands for `new`.

        Raises:
            Unsupported: another view of the memory is still read, or has another type.
        """
        if not isinstance(new, fx.Node) or _type(new.meta["val"]) != _type(old.meta["val"]):
            raise Unsupported("a tensor gets contents of another type")
        names = [one for one, stands in self.now.items() if stands is old]
        memory = {StorageWeakRef(one.meta["val"].untyped_storage()) for one in names}
        for one in {other for storage in memory for other in self.sharing.get(storage, ())} - {*names}:
            before = self.position[one] < self.position[node]
            if before and (one.op == "placeholder" or self.last_read[one] > self.position[node]):
                raise Unsupported("a tensor is written of which another view is read")
        for one in names:
            self.now[one] = new
            if one.op == "placeholder":
                self.written.add(one)

    def _finished(self) -> ExportedProgram:
        source, signature = self.source, self.source.graph_signature
        specs: list[OutputSpec] = []
        results: list[Any] = []
        inputs = zip(source.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True)
        for node, spec in inputs:
            if node in self.written:
                if spec.kind not in WRITTEN:
                    raise Unsupported("a constant is written")
                results.append(self._content(self.now[node], spec.kind))
                name = node.name if spec.kind is InputKind.USER_INPUT else spec.target
                specs.append(OutputSpec(WRITTEN[spec.kind], TensorArgument(""), name))
        for value, spec in zip(source.graph.output_node().args[0], signature.output_specs, strict=True):
            results.append(self._of(value))
            specs.append(copy(spec))
        self.graph.output(tuple(results)).meta = dict(source.graph.output_node().meta)
        self.graph.eliminate_dead_code()
        for value, spec in zip(results, specs, strict=True):
            if isinstance(spec.arg, TensorArgument | SymIntArgument):
                if not isinstance(value, fx.Node):
                    raise Unsupported("a result is a number")
                spec.arg = type(spec.arg)(name=value.name)
            elif isinstance(value, fx.Node) or not isinstance(spec.arg, ConstantArgument):
                raise Unsupported("a result is of another kind")
        gm = fx.GraphModule(torch.nn.Module(), self.graph)
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

    def _content(self, value: fx.Node, kind: InputKind) -> fx.Node:
        """The new content of an input; a buffer's may be a copy, of which what is copied is enough."""
        return value


def _expression(number: Any) -> Any:
    return type(number), number.node.expr


def _literal(value: Any) -> Any:
    """As part of a key: numbers that are equal may still differ."""
    if not isinstance(value, LITERALS):
        raise Unsupported(f"an argument is a {type(value).__name__}")
    return repr(value) if isinstance(value, float | complex) else value


def _type(value: Any) -> Any:
    """As part of a key: everything of a value that a trace of it can depend on."""
    if not isinstance(value, torch.Tensor):
        return _expression(value)
    numbers = (*value.shape, *value.stride(), value.storage_offset())
    exact = tuple(number.node.expr if isinstance(number, torch.SymInt) else number for number in numbers)
    return value.dtype, value.device, value.dim(), exact, value.is_conj(), value.is_neg(), value.requires_grad
