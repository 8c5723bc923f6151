"""The cache key of a captured FX graph: everything that lowering reads of the graph, except names.

Nodes are numbered in post-order of a traversal along the arguments, whose roots are the nodes with side effects and the
nodes without users, in the graph's order; the output is last. So the order of independent nodes does not matter, while
random draws, writes and calls with unknown effects keep theirs. Two equal calls get two numbers: a value used twice
differs from a value computed twice, since a caller that gets both results can tell. The record of a node after a write
contains the number of writes before it.

The digest is of the `repr` of nested lists and tuples of numbers, strings and None, which is unambiguous (True, 1 and
1.0 differ, so do 0.0 and -0.0). Everything else is encoded as bytes, a type that no argument of a graph has.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._library.fake_class_registry import FakeScriptObject
from torch._subclasses.fake_tensor import FakeTensor

from torch_rtx.backend.compiler import named_targets
from torch_rtx.cache.key import Key, Part, digest
from torch_rtx.errors import Uncacheable, Unsupported
from torch_rtx.ir import Sym
from torch_rtx.lowering.foreign_calls import OPERATORS, is_launch, launched
from torch_rtx.lowering.from_fx import Role
from torch_rtx.lowering.location import Locations
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.serialization import memory_of
from torch_rtx.settings import CompilationSettings, assemblers, key_settings
from torch_rtx.version import __version__

MISSING = b"missing"  # stands for the value of a node without meta["val"]
LITERALS = frozenset((int, float, bool, str, complex, type(None)))
NAMED = (torch.dtype, torch.layout, torch.memory_format, torch.device)  # their text is their identity
PURE_NAMESPACES = frozenset(("aten", "prims", "prim"))  # their schemas and tags declare every write and random draw
PURE_MODULES = frozenset(("_operator", "math", "builtins", "torch_rtx.quantization.layers"))
# Higher-order operators that depend on their arguments alone. Others read global state of the process.
HIGHER_ORDER = frozenset(
    ("cond", "while_loop", "scan", "associative_scan", "map_impl", "invoke_subgraph", "flex_attention", "with_effects")
    + ("auto_functionalized", "auto_functionalized_v2", "wrap_with_set_grad_enabled", "wrap_with_autocast")
    + ("run_and_save_rng_state", "run_with_rng_state", "flex_attention_backward", "tag_activation_checkpoint")
    + ("while_loop_stack_output",)
)
# Global state on which ATen calls, their meta functions or the engine's library calls depend.
FLAGS = tuple(
    name
    for name in (
        *("_get_deterministic_algorithms", "_get_deterministic_fill_uninitialized_memory", "_get_mkldnn_enabled"),
        *("_get_cublas_allow_fp16_reduced_precision_reduction", "_get_cublas_allow_bf16_reduced_precision_reduction"),
        *("_get_cublas_allow_fp16_accumulation", "_get_cudnn_enabled", "_get_cudnn_deterministic"),
        *("_get_cudnn_benchmark", "_get_mkldnn_deterministic", "_get_flash_sdp_enabled", "_get_math_sdp_enabled"),
        *("_get_mem_efficient_sdp_enabled", "_get_cudnn_sdp_enabled", "_get_math_sdp_allow_fp16_bf16_reduction"),
    )
    if hasattr(torch._C, name)
)
PRECISIONS = (("generic", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "matmul"))


@dataclass(frozen=True)
class GraphKey:
    """The key of a graph, and its `nodes` in canonical order, the same for all graphs with one key; at the end those of
    graphs that its calls hold."""

    key: Key
    nodes: list[fx.Node]


def graph_key(
    gm: fx.GraphModule,
    roles: Sequence[Role],
    settings: CompilationSettings,
    symbols: Symbols,
    writes: Mapping[int, str] | None = None,
) -> GraphKey:
    """The key of the engine that `compile_fx` builds from the same arguments.

    Raises:
        Uncacheable: the graph contains an object without a process-independent identity.
    """
    shared = SharedTables(symbols)
    hasher = GraphHasher(gm, shared)
    numbers = {node.name: hasher.numbers[node] for node in hasher.placeholders}
    hasher.records.append([(position, numbers[name]) for position, name in sorted((writes or {}).items())])
    inputs, weights = _placeholders(hasher, roles)
    parts = {
        "kind": Part.of("engine"),
        "graph": Part.of(hasher.summary, encode((hasher.records, list(shared.callees)))),
        "inputs": Part.of(lambda: _type_lines(inputs), encode(inputs)),
        "weights": Part.of(lambda: _type_lines(weights), encode(weights)),
        "types": Part.of(f"tensors: {len(hasher.types)}", encode(_numbered(hasher.types))),
        "symbols": Part.of("\n".join(shared.ranges)),
        "constants": Part.of("\n".join(shared.constants)),
        **environment_parts(settings, symbols.main),
    }
    return GraphKey(Key(parts), hasher.nodes + hasher.inside)


def encode(content: object) -> bytes:
    """The bytes of nested lists and tuples of plain values."""
    return repr(content).encode("utf-8", "surrogatepass")


def environment_parts(settings: CompilationSettings, device: torch.device) -> dict[str, Part]:
    """The parts of a key that do not depend on the graph."""
    return {
        "settings": Part.of(lines(key_settings(settings))),
        "state": Part.of(lines(torch_state())),
        "target": Part.of(lines({"device": device.type, "platform": "any", **_targets(settings, device)})),
        "versions": versions(),
    }


def _targets(settings: CompilationSettings, device: torch.device) -> dict[str, str]:
    """The targets by name, since "current" differs between machines, with the GPUs that kernels are chosen for, and the
    assemblers that replace Triton's own."""
    if settings.targets is None or device.type != "cuda":
        return {"kernels": "none"}
    targets = [
        str(target) + f" of {target.chip}" * (target.chip is not None)
        for target in named_targets(settings.targets, device)
    ]
    return {"kernels": ", ".join(targets), **assemblers()}


def _numbered(types: Sequence[object]) -> object:
    """`types` as indices into a table of distinct tensor types, of which a graph has few."""
    table: dict[object, int] = {}
    numbers = [table.setdefault(t, len(table)) if type(t) is tuple and len(t) == 4 else [t] for t in types]
    return numbers, list(table)


def lines(values: Mapping[str, object]) -> str:
    """The text of a part: one "name: value" per line."""
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def _placeholders(hasher: GraphHasher, roles: Sequence[Role]) -> tuple[list[object], list[object]]:
    """(position, kind, type, position of the placeholder it is tied to) of the inputs and of all other placeholders."""
    inputs: list[object] = []
    weights: list[object] = []
    first: dict[str, int] = {}
    for position, (type_, role) in enumerate(zip(hasher.types, roles, strict=False)):  # the placeholders come first
        if role.kind == "input":
            inputs.append((position, role.kind, type_, None))
            continue
        tied = next((first[name] for name in (role.name, *role.aliases) if name in first), None)
        if tied is None:
            first[role.name] = position
        kind = role.kind if role.number is None else f"{role.kind} {role.number!r}"
        weights.append((position, kind, type_, tied))
    return inputs, weights


def _type_lines(encoded: Sequence[Any]) -> str:
    """The result of `_placeholders` as text for people."""
    shown = {}
    for position, kind, type_, tied in encoded:
        words = ("" if kind == "input" else kind, _type_text(type_), "" if tied is None else f"tied to {tied}")
        shown[str(position)] = " ".join(filter(None, words))
    return lines(shown)


def _type_text(encoded: object) -> str:
    match encoded:
        case (bytes() as dtype, tuple() as shape, tuple() as strides, bytes() as device):
            sizes, steps = (", ".join(map(_size_text, dims)) for dims in (shape, strides))
            return f"{dtype.decode().removeprefix('torch.')}[{sizes}]({steps}) {device.decode()}"
    return repr(encoded)


def _size_text(size: object) -> str:
    return size.decode() if isinstance(size, bytes) else str(size)


# ---- the traversal ---------------------------------------------------------------------------------------------------


@dataclass
class SharedTables:
    """Numbering of callees, symbols and constants that a graph shares with the graphs nested in it.

    Attributes:
        ranges, constants: one line of the key per symbol and per constant.
        texts: names of dtypes and devices, as bytes.
        callees: the number of each callee's identity.
    """

    symbols: Symbols
    ranges: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    texts: dict[object, bytes] = field(default_factory=dict)
    callees: dict[bytes, int] = field(default_factory=dict)
    _syms: dict[sympy.Symbol, sympy.Symbol] = field(default_factory=dict)
    _exprs: dict[tuple[type, sympy.Expr], bytes] = field(default_factory=dict)

    def text(self, named: Any) -> bytes:
        """The name of a dtype, layout or memory format; of a device, its name in the IR."""
        found = self.texts.get(named)
        if found is None:
            name = self.symbols.device(named) if isinstance(named, torch.device) else str(named)
            found = self.texts[named] = name.encode()
        return found

    def expr(self, value: torch.SymInt | torch.SymFloat | torch.SymBool) -> bytes:
        """A symbolic number, with its symbols numbered in order of first appearance."""
        expr = value.node.expr
        found = self._exprs.get((type(value), expr))
        if found is None:
            known = value.node.shape_env.var_to_range
            for symbol in sorted(expr.free_symbols - self._syms.keys(), key=str):
                self._add(symbol, self.symbols.sym(symbol, known))
            # `srepr` writes every digit of a float; renaming the symbols first makes the order of terms canonical.
            text = f"{type(value).__name__} {sympy.srepr(expr.xreplace(self._syms))}"
            found = self._exprs[type(value), expr] = text.encode()
        return found

    def _add(self, symbol: sympy.Symbol, sym: Sym) -> None:
        name = f"d{len(self._syms)}"
        facts = {fact: value for fact, value in symbol.assumptions0.items() if value is not None}
        self._syms[symbol] = sympy.Symbol(name, **facts)
        # The prefix of PyTorch's name tells backed symbols (sizes of inputs) from unbacked ones (data-dependent).
        kind = re.match(r"[a-z_]*", str(symbol))
        self.ranges.append(f"{name}: {kind and kind[0]} {sym.min} {sym.max} {sym.multiple} {sym.typical}")

    def constant(self, tensor: torch.Tensor) -> int:
        """The number of a constant; adds its type and the digest of its bytes to `constants`."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise Uncacheable(f"a constant of type {type(tensor).__name__}, without readable bytes")
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        data = bytes(memory_of(plain))
        type_ = f"{tensor.dtype}{list(tensor.shape)}{tensor.stride()} {self.symbols.device(tensor.device)}"
        self.constants.append(f"{len(self.constants)}: {type_.removeprefix('torch.')} {digest(data)}")
        return len(self.constants) - 1


class GraphHasher:
    """Numbers and encodes the nodes of one graph.

    Args:
        ordered: keep the graph's order of all nodes, for graphs whose calls may write to their arguments.

    Attributes:
        numbers: the number of each node, as bytes.
        nodes: in the order of their numbers, placeholders first.
        records, types: for each node its encoded call, and the type of its value (`MISSING` outside of ATen graphs).
    """

    def __init__(self, gm: fx.GraphModule, shared: SharedTables, ordered: bool = False) -> None:
        self.gm, self.shared, self.ordered = gm, shared, ordered
        self.numbers: dict[fx.Node, bytes] = {}
        self.nodes: list[fx.Node] = []
        self.placeholders: list[fx.Node] = []
        self.inside: list[fx.Node] = []  # of graphs that calls hold
        self.records: list[object] = []
        self.types: list[object] = []
        after: dict[fx.Node, int] = {}
        roots, writes = [], 0
        for node in gm.graph.nodes:
            if writes:
                after[node] = writes
            if node.op == "call_function":
                called = _CALLEES.get(id(node.target)) or callee(node.target)
                if ordered or called.ordered or not node.users:
                    roots.append(node)
                writes += called.writes
            elif node.op == "placeholder":
                self._number(node)
                self.placeholders.append(node)
            elif ordered or not node.users:  # the output is the last of these
                roots.append(node)
        self._visit(roots, after)

    def summary(self) -> str:
        """The number of nodes in total and of each operator."""
        calls = (n for n in self.nodes if n.op in ("call_function", "call_method"))
        counts = Counter(name_of(n.target) if n.op == "call_function" else f".{n.target}" for n in calls)
        return lines({"nodes": len(self.nodes), **dict(sorted(counts.items()))})

    def _number(self, node: fx.Node) -> None:
        self.numbers[node] = b"%d" % len(self.nodes)
        self.nodes.append(node)
        value = node.meta.get("val", MISSING)
        if node.op == "placeholder" and isinstance(value, FakeScriptObject):
            self.types.append(self._object(node))
        else:
            self.types.append(self.tensor(value) if type(value) is FakeTensor else self.value(value))

    def _object(self, placeholder: fx.Node) -> object:
        """An object that no call reads, such as the mesh of a DTensor, may be any one."""
        if all(user.op == "output" for user in placeholder.users):
            return b"object"
        raise Uncacheable(f"an object, {placeholder.name}, which a call of the graph reads")

    def _visit(self, roots: list[fx.Node], after: dict[fx.Node, int]) -> None:
        """Number and encode each root in post-order; iterative, since graphs are deeper than Python's stack."""
        numbers, stack = self.numbers, roots[::-1]
        ready: set[fx.Node] = set()  # their arguments have a number, or are above them on the stack
        while stack:
            node = stack[-1]
            if node in numbers:
                stack.pop()
                continue
            waiting = () if node in ready else [needed for needed in node.all_input_nodes if needed not in numbers]
            if waiting:
                ready.add(node)
                stack += reversed(waiting)
                continue
            stack.pop()
            record = self._record(node)
            self.records.append((record, after[node]) if node in after else record)
            self._number(node)

    def _record(self, node: fx.Node) -> object:
        numbers, argument, callees = self.numbers, self.argument, self.shared.callees
        if is_launch(node) and not self.ordered:
            return self._launch(node)
        args = [numbers[a] if type(a) is fx.Node else a if type(a) in LITERALS else argument(a) for a in node.args]
        if node.op == "call_function":
            called = callee(node.target)
            if called.problem:
                raise Uncacheable(called.problem)
            index = callees.setdefault(called.identity, len(callees))
            if not node.kwargs and called.schema:
                return index, args
            # Keyword arguments keep their order: a Python fallback receives its inputs in this order.
            kwargs = [(name, argument(given)) for name, given in node.kwargs.items()]
            needed = None if called.schema else [numbers[needed] for needed in node.all_input_nodes]
            return index, args, kwargs, needed
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            return b"output", args
        if node.op == "call_method":
            return b"method", node.target, args, [(name, argument(given)) for name, given in node.kwargs.items()]
        raise Uncacheable(f"a call of the module {node.target}")

    def _launch(self, node: fx.Node) -> object:
        """The launch of a kernel that others wrote, by the digest of the kernel, which this process knows from now on:
        the table of PyTorch that the node refers to is another one in each process."""
        try:
            found = launched(node, Locations().of(node))
        except Unsupported as error:
            raise Uncacheable(error.message) from None
        tensors, sizes = (
            [self.numbers[one] if isinstance(one, fx.Node) else self.value(one) for one in given]
            for given in (found.tensors, found.sizes)
        )
        return b"launch", found.kernel, tensors, list(found.written), sizes

    def _attribute(self, node: fx.Node) -> object:
        content: Any = self.gm
        for part in str(node.target).split("."):
            content = getattr(content, part)
        if isinstance(content, torch.Tensor):
            return b"constant", self.shared.constant(content)
        if isinstance(content, fx.GraphModule):
            inner = GraphHasher(content, self.shared, self.ordered)
            self.inside += (*inner.nodes, *inner.inside)
            return b"graph", inner.records, inner.types
        raise Uncacheable(f"an attribute of type {type(content).__name__}")

    def argument(self, given: Any) -> object:
        """An argument as nested lists and tuples of literals and bytes."""
        kind = type(given)
        if kind is fx.Node:
            return self.numbers[given]
        if kind in LITERALS:
            return given
        if isinstance(given, list):
            return [self.argument(item) for item in given]
        if isinstance(given, tuple):
            return tuple([self.argument(item) for item in given])
        if isinstance(given, dict):
            return b"dict", [(self.argument(key), self.argument(item)) for key, item in given.items()]
        if isinstance(given, NAMED):
            return self.shared.text(given)
        if isinstance(given, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.shared.expr(given)
        if isinstance(given, torch._ops.OpOverload):
            return b"operator", callee(given).identity
        if kind is slice:
            return b"slice", self.argument(given.start), self.argument(given.stop), self.argument(given.step)
        if given is Ellipsis:
            return b"..."
        raise Uncacheable(f"an argument of type {kind.__name__}")

    def value(self, content: Any) -> object:
        """The properties of a node's value that lowering reads: types and sizes; of literals, the value."""
        if isinstance(content, torch.Tensor):
            return self.tensor(content)
        if isinstance(content, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.shared.expr(content)
        if type(content) in LITERALS or content is MISSING:
            return content
        if isinstance(content, list | tuple):
            return [self.value(item) for item in content]
        if isinstance(content, dict):
            return b"dict", [(self.argument(key), self.value(item)) for key, item in content.items()]
        raise Uncacheable(f"a value of type {type(content).__name__}")

    def tensor(self, tensor: torch.Tensor) -> object:
        """The type of a tensor. Lowering reads only layout, dtype and shape of a tensor that is not strided."""
        if tensor.layout != torch.strided:
            return str(tensor.layout).encode(), str(tensor.dtype).encode(), tuple(map(str, tensor.shape))
        shape: tuple[object, ...] = tensor.shape
        strides: tuple[object, ...] = tensor.stride()
        if tensor._has_symbolic_sizes_strides:
            shape, strides = tuple(map(self._size, shape)), tuple(map(self._size, strides))
        texts, dtype, device = self.shared.texts, tensor.dtype, tensor.device
        return (
            texts.get(dtype) or self.shared.text(dtype),
            shape,
            strides,
            texts.get(device) or self.shared.text(device),
        )

    def _size(self, size: Any) -> object:
        return self.shared.expr(size) if isinstance(size, torch.SymInt) else size


@dataclass(frozen=True, slots=True)
class Callee:
    """The target of a call.

    Attributes:
        target: the object itself; referenced, so that no other object can get its id.
        identity: its name, the same in every process of the same versions.
        schema: it is an operator with a schema.
        ordered: its calls keep their order among each other and those of other ordered callees.
        writes: it may write to its arguments or to global state.
        problem: why it has no process-independent identity; empty if it has one.
    """

    target: Any
    identity: bytes
    schema: bool
    ordered: bool
    writes: bool
    problem: str = ""


_CALLEES: dict[int, Callee] = {}  # by id: hashing an operator takes longer than all other work on a node


def callee(target: Any) -> Callee:
    """The `Callee` of a call's target."""
    if target in OPERATORS:
        return Callee(target, b"", True, True, True, f"the kernel that {target} is registered with")
    found = _CALLEES.get(id(target))
    if found is None:
        found = _operator(target) if isinstance(target, torch._ops.OpOverload) else _function(target)
        if not found.problem:
            _CALLEES[id(target)] = found
    return found


def _operator(op: torch._ops.OpOverload) -> Callee:
    # Schemas of other libraries need not declare all writes and random draws.
    unknown = op.namespace not in PURE_NAMESPACES
    writes = unknown or op._schema.is_mutable
    random = torch.Tag.nondeterministic_seeded in op.tags
    return Callee(op, f"{op} {op._schema} {sorted(map(str, op.tags))}".encode(), True, writes or random, writes)


def _function(target: Any) -> Callee:
    if isinstance(target, torch._ops.HigherOrderOperator):
        problem = "" if target.name() in HIGHER_ORDER else f"the higher-order operator {target.name()}"
        return Callee(target, f"higher-order {target.name()}".encode(), False, True, True, problem)
    name = name_of(target)
    module, _, attribute = name.rpartition(".")
    known = module in PURE_MODULES or module.partition(".")[0] == "torch"
    found = known and getattr(_module(module), attribute, None) is target
    unknown = module not in PURE_MODULES and not name.startswith("torch.sym_")
    return Callee(target, name.encode(), False, unknown, unknown, "" if found else f"the Python function {name}")


def _module(name: str) -> Any:
    try:
        return sys.modules.get(name) or import_module(name)
    except ImportError:
        return None


def name_of(target: Any) -> str:
    """The qualified name of a call's target."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', None)}.{getattr(target, '__name__', type(target).__name__)}"


# ---- the process -----------------------------------------------------------------------------------------------------


def torch_state() -> dict[str, object]:
    """PyTorch's global settings on which a capture, its lowering or the engine's library calls may depend."""
    with compile_lock:  # an export of another thread sets some of these to other values while it runs
        found: dict[str, object] = {name.removeprefix("_get_"): getattr(torch._C, name)() for name in FLAGS}
        for backend, op in PRECISIONS:
            found[f"fp32_precision {backend} {op}"] = torch._C._get_fp32_precision_getter(backend, op)
    for device in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device)
        found[f"autocast {device}"] = str(torch.get_autocast_dtype(device)) if enabled else "off"
    found["default dtype"] = torch.get_default_dtype()
    found["default device"] = torch.get_default_device()
    found["inference mode"] = torch.is_inference_mode_enabled()
    return found


@cache
def versions() -> Part:
    """The versions of everything that builds an engine, and a digest of this package's sources."""
    found = {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "cuda": torch.version.cuda,
        "sympy": sympy.__version__,
        "torch_rtx": __version__,
        "sources": _sources(),
    }
    for package in ("triton", "triton-windows"):  # each brings the ptxas that it calls
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Part.of(lines(found))


def _sources() -> str:
    folder = Path(__file__).parent.parent
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*.py")):
        data = path.read_bytes()
        hashed.update(f"{path.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    return hashed.hexdigest()
