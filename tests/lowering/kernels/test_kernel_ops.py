"""Every declared operator as a kernel in Triton's interpreter, on PyTorch's own samples, against the ATen call.

Each operator is tried in float32, and of the other pairs of `DTYPES` in one dtype, told by its name;
`pytest --all-dtypes` tries all of them in each.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.numerics import widened
from tests.backend.test_op_db import operators, pick, spaced
from tests.doubles.interpreter import begin, run
from tests.lowering.kernels.kernel_bodies import whole
from torch_rtx import aten
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_values
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.generate import Form
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.loops import loop_kernel
from torch_rtx.lowering.kernels.ops import views
from torch_rtx.lowering.kernels.ops.registry import OPS
from torch_rtx.lowering.kernels.reduction_rules import RULES
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.rows import PERSISTENT
from torch_rtx.tactics import KernelTable
from torch_rtx.targets import Target

DTYPES = ((torch.float32,), (torch.float16, torch.bfloat16), (torch.int64, torch.int32), (torch.bool,))
CHUNKS = 12
BUILT_CHUNKS = 8
DECLARED = OPS.keys() | RULES.keys()
LARGEST = 20_000  # elements: the interpreter takes milliseconds per program
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-6}


def type_of(tensor: torch.Tensor) -> TensorType:
    return TensorType(aten.dtype_name(tensor.dtype), tuple(tensor.shape), tuple(tensor.stride()))


class Body:
    """One call as the body of a kernel, with its tensors."""

    def __init__(self, op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.call = op, args, kwargs
        self.tensors: list[torch.Tensor] = []
        self.inputs: list[Value] = []
        named = dict(zip([a.name for a in op._schema.arguments], args, strict=False)) | kwargs
        defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
        given = {k: v for k, v in named.items() if isinstance(v, torch.Tensor) or k not in defaults or v != defaults[k]}
        pairs = tuple((key, self.attr(value)) for key, value in given.items())
        self.results = list(result) if isinstance(result, tuple | list) else [result]
        outputs = tuple(Value(f"r{i}", type_of(r)) for i, r in enumerate(self.results))
        node = Node("op", str(op), pairs, outputs)
        self.graph = Graph("import", tuple(self.inputs), nodes=(node,), outputs=outputs)

    @staticmethod
    def of(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Body | None:
        """The call as a body, if the operator is declared and the call is no larger than the interpreter likes."""
        results = result if isinstance(result, tuple | list) else [result]
        if str(op) not in DECLARED or not all(
            isinstance(r, torch.Tensor) and 0 <= r.numel() <= LARGEST for r in results
        ):
            return None
        return Body(op, args, kwargs, result)

    def attr(self, given: Any) -> Attr:
        if isinstance(given, torch.Tensor):
            self.tensors.append(given)
            self.inputs.append(Value(f"in{len(self.inputs)}", type_of(given)))
            return self.inputs[-1]
        if isinstance(given, list | tuple):
            return tuple(map(self.attr, given))
        if isinstance(given, torch.dtype):
            return aten.dtype_name(given)
        if isinstance(given, torch.device | torch.layout | torch.memory_format):
            return str(given).removeprefix("torch.")
        assert given is None or isinstance(given, bool | int | float | str), given
        return given

    def check(self) -> None:
        """Runs a kernel for each result. Raises Unsupported, or an AssertionError."""
        for value, result, exact in zip(self.graph.outputs, self.results, self.in_float64(), strict=True):
            graph = replace(self.graph, outputs=(value,))
            kernel = loop_kernel(region(graph), "kernel")
            output = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)
            output.fill_(math.nan if output.is_floating_point() else 1)
            begin(graph, self.tensors, [output])
            if result.numel():
                run(kernel, [*self.tensors, output])
            assert_near(output, result, exact)

    def in_float64(self) -> list[torch.Tensor]:
        """The results for the same numbers in float64."""
        op, args, kwargs = self.call
        args, kwargs = widened((args, kwargs))
        args, kwargs = tree_map_only(torch.dtype, lambda d: torch.float64 if d.is_floating_point else d, (args, kwargs))
        result = op(*args, **kwargs)
        return list(result) if isinstance(result, tuple | list) else [result]


class Recorder(TorchDispatchMode):
    """Keeps the calls of one overload packet."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = tree_map_only(torch.Tensor, snapshot, (args, kwargs or {}))
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, *before, tree_map_only(torch.Tensor, snapshot, result)))
        return result


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same gaps in memory: what is called later may write to the original."""
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        return tensor
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def assert_near(output: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Integers are equal; the error of floats is at most twice eager's, or the tolerance of their dtype. One in a
    hundred may be four times as far off as eager's worst: where large terms cancel, luck decides which element suffers.
    """
    if not output.is_floating_point():
        assert torch.equal(output, eager), f"{output} is not {eager}"
        return
    tolerance = TOLERANCE[output.dtype]
    ours, theirs, right = output.double(), eager.double(), exact.double()
    limit = torch.maximum(2 * (theirs - right).abs(), tolerance * (0.1 + right.abs())).nan_to_num(math.inf, math.inf)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan()) | ((ours - right).abs() <= limit)
    if 0 < (~same).sum() <= same.numel() / 100:
        worst = (theirs - right).abs().nan_to_num(0, 0).max()
        same |= (ours - right).abs() <= 4 * worst
    assert same.all(), f"{output[~same][:4]} is not {eager[~same][:4]}, in float64 {exact[~same][:4]}"


def described(body: Body) -> tuple[str, tuple[object, ...], tuple[tuple[object, ...], ...]]:
    """What makes a call another case than the one before: the call, kinds of arguments, and each tensor's dtype and
    layout."""
    node = body.graph.nodes[0]
    kinds = tuple(attr if isinstance(attr, str | bool) else type(attr).__name__ for _, attr in node.args)
    return node.op, kinds, tuple((t.dtype, t.dim(), t.is_contiguous(), t.numel() > 0) for t in body.tensors)


def size(sample: Any) -> int:
    """The elements of the smallest tensor of a sample: 0, where it has nothing to compute."""
    leaves = tree_leaves((sample.input, sample.args, sample.kwargs))
    return min((leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)), default=0)


def chosen(samples: list[Any]) -> list[Any]:
    """The first sample that has elements, the largest one, with gaps in its memory, and the last, if it has none."""
    full = [sample for sample in samples if 0 < size(sample) <= LARGEST]
    return [*full[:1], *map(spaced, sorted(full, key=size)[-1:]), *(one for one in samples[-1:] if size(one) == 0)]


def sampled(name: str, every: bool) -> Iterator[Body]:
    """Different declared ATen calls that PyTorch makes for samples of an operator, in `every` dtype or in some.

    Raises:
        ValueError: op_db has no operator of this name.
    """
    op = operators().get(name)
    if op is None:
        raise ValueError(f"op_db has no operator {name!r}; near are {get_close_matches(name, operators())}")
    seen: set[object] = set()
    for dtype in (dtype for kinds in DTYPES for dtype in (kinds if every else [pick(name, kinds)])):
        for sample in chosen(list(op.sample_inputs("cpu", dtype)) if op.supports_dtype(dtype, "cpu") else []):
            with Recorder() as recorder, suppress(RuntimeError, NotImplementedError):  # eager refuses some here
                op.op(sample.input, *sample.args, **sample.kwargs)
            for call in recorder.calls:
                body = Body.of(*call)
                if body is not None and described(body) not in seen:
                    seen.add(described(body))
                    yield body


def lacking() -> list[str]:
    """The elementwise ATen calls of op_db's operators that kernels lack: each runs as a call of its own."""
    packets = [getattr(torch.ops.aten, op.aten_name, None) for op in operators().values()]
    calls = [getattr(packet, name) for packet in packets if packet is not None for name in packet.overloads()]
    wanted = {str(op) for op in calls if torch.Tag.pointwise in op.tags and not op._schema.is_mutable}
    return sorted(wanted - DECLARED)


# Operators whose samples all call what is not declared, or is refused; CALLS has some that are.
ELSEWHERE = {"pow", "linalg.vector_norm"}
ELSEWHERE.add("scatter")  # its samples scatter several elements of a row
# Of their samples few add, and those to a single number: see test_kernel_accumulations.
ELSEWHERE |= {"index_add", "index_copy", "index_fill", "index_put"}
ELSEWHERE |= {*(f"scatter_reduce.{kind}" for kind in ("sum", "prod", "mean", "amax", "amin"))}
ELSEWHERE |= {f"round.decimals_{kind}" for kind in ("0", "3", "neg_3")}
ELSEWHERE |= {f"bitwise_{side}_shift" for side in ("left", "right")}  # its samples shift by tensors
ELSEWHERE |= {f"nn.functional.{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg") for rank in (1, 2, 3)}


def names() -> list[str]:
    """The operators that are declared, as op_db calls them."""
    packets = {name.split(".")[1] for name in DECLARED}
    found = {name for name, op in operators().items() if {op.name, op.aten_name, f"_{op.name}"} & packets}
    return sorted(found - ELSEWHERE)


def test_samples_of_no_operator() -> None:
    with pytest.raises(ValueError, match=r"op_db has no operator 'expn1'; near are .*'expm1'"):
        next(sampled("expn1", every=False))


# Why kernels do not have some calls of operators that they do have.
REFUSED = (
    "which is rounded",  # the ATen call rounds more often than a kernel would
    "rounded quotient",
    "out of range is undefined",
    "the norm",
    "the power",
    "isinf of integers",
    "a result of dtype",
    "complex",
    "in a kernel",
    "by index",
    "not next to each other",
    "of a single number",
    "a slice with steps",
    "of a window",
    "windows of",
    "parts of different sizes",
    "a scan of",
    "additions to",
    "in another layout",
    "elements that are replaced",
    "a scatter of the",
)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_samples(chunk: int, all_dtypes: bool) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names()[chunk::CHUNKS]:
            ran = 0
            for body in sampled(name, all_dtypes):
                try:
                    body.check()
                    ran += 1
                except Unsupported as error:
                    if not any(reason in error.message for reason in REFUSED):
                        raise
                except Exception as error:
                    raise AssertionError(f"{name}: {error}\n{body.graph}") from error
            assert ran, f"{name}: no sample ran"


def compilable(bodies: list[Body]) -> list[Body]:
    """Those that kernels have; that no others are refused is for the tests without a GPU."""
    found = []
    for body in bodies:
        with suppress(Unsupported):
            loop_kernel(region(body.graph), "kernel")
            found.append(body)
    return found


def program(bodies: list[Body]) -> Graph:
    """A graph with a kernel for each body, and inputs and outputs of its own for each."""
    nodes, inputs, outputs = [], [], []
    for index, body in enumerate(bodies):
        own = [Value(f"k{index}_{value.name}", value.type) for value in body.graph.inputs]
        results = tuple(Value(f"k{index}_{v.name}", v.type) for v in attr_values(body.graph.outputs))
        args = tuple((value.name, given) for value, given in zip(body.graph.inputs, own, strict=True))
        nodes.append(Node("kernel", f"k{index}", args, results, body=body.graph))
        inputs += own
        outputs += results
    return Graph("fused", tuple(inputs), nodes=tuple(nodes), outputs=tuple(outputs))


def built(bodies: list[Body], target: Target) -> tuple[Graph, KernelTable]:
    """The graph of `program`, and its kernels for a target."""
    graph = program(bodies)

    def forms(node: Node, _: Target) -> list[Form]:
        assert node.body is not None
        return [whole([loop_kernel(region(node.body), node.op)])]

    table, report = build_kernels(graph, [target], forms)
    assert not report.missing, str(report)
    return graph, table


def of_chunk(chunk: int, all_dtypes: bool) -> list[Body]:
    """The calls of samples that kernels have, one part of `BUILT_CHUNKS`."""
    torch.manual_seed(0)
    return compilable([body for name in names()[chunk::BUILT_CHUNKS] for body in sampled(name, all_dtypes)])


def declaration(body: Body) -> Any:
    """What declares the call: several ATen calls may share it."""
    name = body.graph.nodes[0].op
    return OPS.get(name) or RULES[name]


def traits(body: Body) -> set[object]:
    """What makes code generation take another way for one and the same declaration. What moves positions alone does so
    in every dtype alike."""
    _, kinds, tensors = described(body)
    found = {("arguments", kinds), ("layouts", *(t[1:] for t in tensors))}
    moves = getattr(declaration(body), "__module__", "") == views.__name__
    return found if moves else {*found, ("dtypes", *(t[0] for t in tensors))}


def covering(bodies: list[Body]) -> list[Body]:
    """Few of the bodies that have, for each declaration, all kinds of arguments, all dtypes and all layouts: a compiler
    that refuses one of these does so next to any of the others."""
    calls: dict[Any, list[Body]] = {}
    for body in bodies:
        calls.setdefault(declaration(body), []).append(body)
    found = []
    for alike in calls.values():
        missing = set().union(*map(traits, alike))
        while missing:
            found.append(max(alike, key=lambda body: len(traits(body) & missing)))
            missing -= traits(found[-1])
    return found


def together(kernels: Iterable[Kernel]) -> Iterator[Kernel]:
    """Kernels that call four of these after each other, if they are short: half the time that a short kernel takes to
    compile is the start of the compiler's stages and of ptxas."""
    alike: dict[tuple[int, int, bool], list[Kernel]] = {}
    for kernel in kernels:
        assert not kernel.scalars, kernel
        short = len(kernel.source.splitlines()) <= 16 and len(kernel.pointers) <= 4
        alike.setdefault((kernel.num_warps, kernel.num_stages, short), []).append(kernel)
    for (_, _, short), group in alike.items():
        for few in (group[at : at + 4] for at in range(0, len(group), 4)) if short else ([one] for one in group):
            given = [[f"k{number}_{i}" for i in range(len(kernel.pointers))] for number, kernel in enumerate(few)]
            calls = "".join(f"    {kernel.name}({', '.join(g)})\n" for kernel, g in zip(few, given, strict=True))
            caller = f"\n\n@triton.jit\ndef every({', '.join(name for g in given for name in g)}):\n{calls}"
            source = "\n\n".join(kernel.source for kernel in few) + caller
            yield replace(few[0], name="every", source=source, pointers=sum((kernel.pointers for kernel in few), ()))


@pytest.mark.parametrize("half", range(2))
def test_samples_compile(half: int, all_dtypes: bool) -> None:
    """The interpreter takes what the compiler refuses, such as a division by a size of 0. Without `--all-dtypes` half
    of the samples are compiled."""
    if half and not all_dtypes:
        pytest.skip("--all-dtypes compiles the other half")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bodies = [body for chunk in range(half, BUILT_CHUNKS, 2) for body in of_chunk(chunk, all_dtypes)]
    if not all_dtypes:
        bodies = covering(bodies)
    kernels = [loop_kernel(region(body.graph), f"kernel{number}") for number, body in enumerate(bodies)]
    found = compile_kernels((kernel, Target(90)) for kernel in together(kernels))
    assert len(found) >= len(bodies) / 4
    assert [built.problem for built in found.values() if built.codes == ()] == []


A = torch.ops.aten
ROWS = torch.randn(6, 40)
IMAGE = torch.randn(2, 6, 5, 4)


def pool_gradient(image: torch.Tensor, *form: Any) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The gradient of a pooling, with what its forward chose."""
    values, indices = A.max_pool2d_with_indices.default(image, *form)
    return A.max_pool2d_with_indices_backward.default, (torch.randn_like(values), image, *form, indices)


BATCH_NORM = A._native_batch_norm_legit_no_training.default
STATISTICS = (torch.randn(6), torch.rand(6) + 0.1)
CALLS = {
    "layer_norm": lambda: (A.layer_norm.default, (ROWS, [40], ROWS[0], ROWS[1])),
    "layer_norm over two dimensions": lambda: (A.layer_norm.default, (IMAGE, [5, 4])),
    "layer_norm of long rows": lambda: (A.layer_norm.default, (torch.randn(3, 9001) + 7, [9001])),
    "layer_norm bf16": lambda: (A.layer_norm.default, (ROWS.bfloat16(), [40], ROWS[0].bfloat16(), ROWS[1].bfloat16())),
    "rms_norm": lambda: (A.rms_norm.default, (ROWS.half(), [40], ROWS[0].half(), 1e-6)),
    "rms_norm, its own eps": lambda: (A.rms_norm.default, (ROWS, [40])),
    "_fused_rms_norm": lambda: (A._fused_rms_norm.default, (ROWS, [40], ROWS[0], 1e-6)),
    "group_norm": lambda: (A.group_norm.default, (IMAGE, 3, torch.randn(6), torch.randn(6))),
    "group_norm of one group, half": lambda: (A.group_norm.default, (IMAGE.half(), 1, None, None)),
    "batch_norm": lambda: (BATCH_NORM, (IMAGE, IMAGE[0, :, 0, 0], IMAGE[0, :, 0, 1], *STATISTICS, 0.1, 1e-5)),
    "batch_norm without affine weights, half": lambda: (
        BATCH_NORM,
        (IMAGE.half().to(memory_format=torch.channels_last), None, None, *STATISTICS, 0.1, 1e-3),
    ),
    "softmax": lambda: (A.softmax.int, (ROWS, -1)),
    "softmax over columns": lambda: (A.softmax.int, (IMAGE, 1)),
    "softmax in another dtype": lambda: (A.softmax.int, (ROWS.half(), 1, torch.float32)),
    "softmax of long rows": lambda: (A.softmax.int, (4 * torch.randn(2, 8200), 1)),
    "log_softmax": lambda: (A.log_softmax.int, (ROWS, 0)),
    "linalg_vector_norm": lambda: (A.linalg_vector_norm.default, (ROWS, 2, [1])),
    "upsample_nearest2d": lambda: (A.upsample_nearest2d.default, (IMAGE, [10, 12])),
    "upsample_nearest2d.vec": lambda: (A.upsample_nearest2d.vec, (IMAGE, None, [2.0, 3.0])),
    "bitwise_and of a number": lambda: (A.bitwise_and.Scalar_Tensor, (5, torch.arange(-9, 9))),
    "bitwise_xor of a number": lambda: (A.bitwise_xor.Scalar_Tensor, (-3, torch.arange(9, dtype=torch.uint8))),
    "split_with_sizes": lambda: (A.split_with_sizes.default, (ROWS, [7, 33], 1)),
    "split_with_sizes_copy": lambda: (A.split_with_sizes_copy.default, (ROWS, [2, 4])),
    "amax keeps NaN": lambda: (A.amax.default, (torch.tensor([[1.0, math.nan, 3.0], [1.0, 2.0, 3.0]]), [1])),
    "_to_copy rounds": lambda: (A._to_copy.default, (ROWS,), {"dtype": torch.bfloat16}),
    "scatter, one of a row": lambda: (A.scatter.src, (ROWS, 1, torch.tensor([[0], [3], [39], [1], [1], [2]]), ROWS)),
    "scatter of a number": lambda: (A.scatter.value, (ROWS, 0, torch.randint(0, 6, (1, 40)), 2.5)),
    "unsafe index": lambda: (A._unsafe_index.Tensor, (IMAGE, [None, torch.tensor([-1, 3])])),
    "two indices": lambda: (A.index.Tensor, (IMAGE, [None, torch.tensor([[1], [-2]]), torch.tensor([0, 2, 4])])),
    "bitwise scalars": lambda: (A.bitwise_and.Scalar, (torch.arange(9), 5)),
    "nibbles": lambda: (A.__rshift__.Scalar, (torch.arange(256, dtype=torch.uint8), 4)),
    "right shift": lambda: (A.bitwise_right_shift.Tensor_Scalar, (torch.arange(-9, 9), 2)),
    "left shift": lambda: (A.__lshift__.Scalar, (torch.arange(-9, 9, dtype=torch.int8), 6)),
    "every bit of bytes": lambda: (A.bitwise_not.default, (torch.arange(256, dtype=torch.uint8),)),
    "bytes and a negative number": lambda: (A.add.Scalar, (torch.arange(256, dtype=torch.uint8), -3)),
    "a number that does not fit": lambda: (A.lt.Scalar, (torch.arange(-128, 128, dtype=torch.int8), 200)),
    "pow 3": lambda: (A.pow.Tensor_Scalar, (ROWS, 3)),
    "pow 0.5": lambda: (A.pow.Tensor_Scalar, (ROWS.abs(), 0.5)),
    "pow 1.7": lambda: (A.pow.Tensor_Scalar, (ROWS.half(), 1.7)),
    "pow of a number": lambda: (A.pow.Scalar, (0.9, ROWS)),
    "pow of tensors": lambda: (A.pow.Tensor_Tensor, (ROWS.abs().half(), ROWS[:, :1].half())),
    "clamp_max": lambda: (A.clamp_max.default, (ROWS, 0.5)),
    "max_pool2d": lambda: (A.max_pool2d.default, (IMAGE, [3, 2], [2, 1], [1, 0])),
    "max_pool2d, ceil_mode": lambda: (A.max_pool2d.default, (IMAGE.half(), [3, 3], [2, 2], [1, 1], [1, 1], True)),
    "max_pool2d, dilated": lambda: (A.max_pool2d.default, (IMAGE, [2, 2], [1, 1], [0, 0], [2, 3])),
    "max_pool2d, channels last": lambda: (
        A.max_pool2d.default,
        (IMAGE.to(memory_format=torch.channels_last), [2, 2]),
    ),
    "max_pool2d_with_indices": lambda: (A.max_pool2d_with_indices.default, (IMAGE, [3, 2], [2, 1], [1, 0])),
    "max_pool2d_with_indices, equal ones": lambda: (
        A.max_pool2d_with_indices.default,
        (IMAGE.sign().half().to(memory_format=torch.channels_last), [3, 3], [2, 2], [1, 1], [1, 1], True),
    ),
    "max_pool2d_with_indices, NaN and -inf": lambda: (
        A.max_pool2d_with_indices.default,
        (torch.tensor([-math.inf, math.nan, 1.0])[torch.randint(0, 3, (2, 7, 9))], [3, 3], [1, 1], [1, 1]),
    ),
    "max_pool2d_with_indices_backward": lambda: pool_gradient(IMAGE, [3, 2], [2, 1], [1, 0], [1, 1], False),
    "max_pool2d_with_indices_backward, ceil_mode": lambda: pool_gradient(
        IMAGE.half().to(memory_format=torch.channels_last), [3, 3], [2, 2], [1, 1], [1, 1], True
    ),
    "max_pool2d_with_indices_backward, dilated": lambda: pool_gradient(IMAGE, [2, 2], [1, 1], [0, 0], [2, 3], False),
    "max_pool2d_with_indices_backward, gaps": lambda: pool_gradient(IMAGE[0], [2, 1], [3, 2], [0, 0], [1, 1], False),
    "avg_pool2d": lambda: (A.avg_pool2d.default, (IMAGE.bfloat16(), [2, 2], [1, 1], [1, 1])),
    "avg_pool2d, divisor": lambda: (A.avg_pool2d.default, (IMAGE, [2, 2], [], [1, 1], False, False, 3)),
    "avg_pool2d, the whole image": lambda: (A.avg_pool2d.default, (IMAGE.half(), IMAGE.shape[-2:])),
    "adaptive_avg_pool2d": lambda: (A.adaptive_avg_pool2d.default, (IMAGE, [1, 1])),
    "adaptive_avg_pool2d to parts": lambda: (A.adaptive_avg_pool2d.default, (IMAGE, [5, 2])),
    "floats as bytes": lambda: (
        A._to_copy.default,
        (torch.tensor([-1.5, 0.9, 255.9, 256.0, 1e9]),),
        {"dtype": torch.uint8},
    ),
    "col2im": lambda: (A.col2im.default, (torch.randn(2, 18, 12), [5, 4], [3, 2], [1, 2], [1, 1], [2, 1])),
    "col2im, one image": lambda: (
        A.col2im.default,
        (torch.randn(8, 4).bfloat16(), [5, 4], [2, 2], [1, 1], [0, 0], [2, 2]),
    ),
    "copy": lambda: (A.copy.default, (ROWS.half(), ROWS[:1])),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    op, args, *kwargs = CALLS[name]()
    Body(op, args, kwargs[0] if kwargs else {}, op(*args, **(kwargs[0] if kwargs else {}))).check()


KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
EXTREMES = (A.argmax.default, A.argmin.default, A.max.dim, A.min.dim)


def tied(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Few different numbers, so that every row has its extremes more than once."""
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("op", EXTREMES, ids=str)
def test_positions_of_extremes(op: torch._ops.OpOverload, dtype: torch.dtype) -> None:
    """Of several the first; rows of one element, odd ones, none, columns, and rows that are read in steps."""
    for shape, dim in (((5, 37), 1), ((5, 37), 0), ((3, 1), -1), ((0, 4), 1), ((2, 3, 5), 1), ((1, 8200), -1), ((), 0)):
        x = tied(shape, dtype)
        Body(op, (x, dim), {}, op(x, dim)).check()
        if x.numel() < 40:  # the same kernel but for the strides of what it returns
            Body(op, (x, dim, True), {}, op(x, dim, True)).check()
    if op in EXTREMES[:2]:
        x = tied((3, 4, 5), dtype)
        Body(op, (x,), {}, op(x)).check()
        Body(op, (x, None, True), {}, op(x, None, True)).check()


@pytest.mark.parametrize("op", EXTREMES, ids=str)
def test_positions_of_nan(op: torch._ops.OpOverload) -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor(
        [[1.0, nan, 3.0, nan], [inf, -inf, inf, -inf], [nan] * 4, [-0.0, 0.0, -0.0, 0.0], [inf] * 4, [-inf] * 4]
    )
    for dtype in KINDS[:3]:
        Body(op, (x.to(dtype), 1), {}, op(x.to(dtype), 1)).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_of_every_number(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    kernel = loop_kernel(region(Body(A.gelu.default, (x,), {}, x).graph), "kernel")
    y = torch.full_like(x, math.nan)
    run(kernel, [x, y])
    exact = torch.where(x == math.inf, x.double(), A.gelu.default(x.double()))  # eager's is NaN
    assert torch.equal(y.isnan(), exact.isnan())
    limit = torch.finfo(dtype)
    # The interpreter cuts off what does not fit in bf16, and does not round it.
    step = limit.eps * (0.51 if dtype == torch.float16 else 1.01)
    near = (y.double() - exact).abs() <= step * exact.abs() + 1e-10 + limit.smallest_normal * limit.eps
    assert (near | (y == exact) | exact.isnan()).all()


EDGES = torch.tensor(
    [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.49999997, 2.5, -3.5, 8388609.0, 1e-30, 1e30]
)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    "op",
    [A.log1p, A.expm1, A.relu, A.sigmoid, A.tanh, A.silu, A.elu, A.mish, A.softplus, A.hardsigmoid]
    + [A.hardswish, A.hardtanh, A.leaky_relu, A.sign, A.round, A.floor, A.trunc, A.rsqrt, A.reciprocal, A.exp2],
    ids=str,
)
def test_edges(op: torch._ops.OpOverloadPacket) -> None:
    """What is no number, infinite, or beside a place where a formula could go wrong."""
    same_edges(op.default, EDGES)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_edges_with_another_operand() -> None:
    every = EDGES[:, None].expand(-1, len(EDGES)).contiguous()
    for op in (A.maximum.default, A.minimum.default, A.div.Tensor):
        same_edges(op, every, every.t().contiguous())
    same_edges(A.clamp.Tensor, every, every.t().contiguous())
    same_edges(A.clamp.Tensor, every, None, every.t().contiguous())
    for limits in ((math.nan, None), (0.0, math.nan), (-math.inf, 1.0)):
        same_edges(A.clamp.default, EDGES, *limits)
    same_edges(A.pow.Tensor_Tensor, every, every.t().contiguous())
    same_edges(A.pow.Scalar, 0.999, EDGES)
    same_edges(A.pow.Tensor_Scalar, EDGES, 0)


def same_edges(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> None:
    """Near where both are finite, and equal elsewhere."""
    expected = op(*args, **kwargs)
    body = Body(op, args, kwargs, expected)
    output = torch.empty_strided(expected.shape, expected.stride())
    run(loop_kernel(region(body.graph), "kernel"), [*body.tensors, output])
    torch.testing.assert_close(output, expected, equal_nan=True)


@pytest.mark.parametrize("op", [A.remainder.Tensor, A.remainder.Scalar], ids=str)
def test_quotients_near_integers(op: torch._ops.OpOverload) -> None:
    """5 / 0.1 is 49.9999993 for numbers of 32 bits, and 50 when it is rounded to these."""
    x = torch.arange(-200, 200) / 10
    other = 0.1 if op is A.remainder.Scalar else torch.full_like(x, 0.1)
    name = "Scalar_mode" if op is A.remainder.Scalar else "Tensor_mode"
    for call, kwargs in ((op, {}), (getattr(A.div, name), {"rounding_mode": "floor"})):
        same_edges(call, x, other, **kwargs)
        same_edges(call, 3 * x, -other, **kwargs)


TINY, SMALLEST = torch.finfo(torch.float32).tiny, 2.0**-149  # the least normal number, and the least of all
FRACTIONS = [0.3, 0.5, 0.49999997, 1.0, 1.5, 2.5, 3.0, 6.0, 7.0, 8388607.5, 8388609.0, 1e10, 3e15, 1e20, 3e38]
SPECIAL = [sign * x for x in (0.0, SMALLEST, TINY, 1e-30, *FRACTIONS, math.inf) for sign in (1, -1)] + [math.nan]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def exact_calls(dtype: torch.dtype) -> Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]]:
    """Calls whose results have no rounding error on a GPU, or that of one IEEE operation; for numbers where a sign of
    zero, an overflow or a long quotient could go wrong."""
    x = torch.tensor(SPECIAL).to(dtype)
    if dtype == torch.bfloat16:  # the interpreter has no subnormal ones
        x = x[(x == 0) | ~(x.abs() <= TINY)]
    one = x[:, None].expand(-1, len(x)).contiguous()
    other = one.t().contiguous()
    for op in (A.neg, A.abs, A.round, A.floor, A.ceil, A.trunc, A.sign, A.leaky_relu, A.hardtanh, A.isnan, A.isinf):
        yield op.default, (x, *([0.5] if op is A.leaky_relu else [])), {}
    for op in (A.remainder, A.fmod, A.add, A.sub):
        yield op.Tensor, (one, other), {}
    if dtype in FLOATS[:2]:
        yield A.floor_divide.default, (one, other), {}
        for mode in ("floor", "trunc"):
            yield A.div.Tensor_mode, (one, other), {"rounding_mode": mode}
    for op in (A.remainder, A.fmod, A.mul, A.add, A.rsub, A.full_like, A.threshold):
        for number in (-0.0, 0.0, -0.5, 3.0):
            overload = op.default if op in (A.full_like, A.threshold) else op.Scalar
            yield overload, (x, number, *([-0.0] if op is A.threshold else [])), {}
    yield A.masked_fill.Scalar, (x, x > 0, -0.0), {}
    yield A.where.self, (one > other, one, other), {}


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, of: object) -> None:
    """NaN for NaN, and else the same number with the same sign."""
    same = (found == expected) & (torch.signbit(found) == torch.signbit(expected)) | found.isnan() & expected.isnan()
    assert same.all(), f"{of}: {found[~same][:4]} is not {expected[~same][:4]}"


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit(dtype: torch.dtype) -> None:
    for op, args, kwargs in exact_calls(dtype):
        expected = op(*args, **kwargs)
        if op.overloadpacket in (A.remainder, A.fmod):  # eager's for fewer bits overflow on a CPU, not on a GPU
            expected = op(*(x.double() if isinstance(x, torch.Tensor) else x for x in args)).to(dtype)
        body = Body(op, args, kwargs, expected)
        output = torch.empty_strided(expected.shape, expected.stride(), dtype=expected.dtype)
        run(loop_kernel(region(body.graph), "kernel"), [*body.tensors, output])
        assert_same_bits(output, expected, body.graph)


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (A.relu.default, (), "0 0"),
        (A.relu6.default, (), "0 0"),
        (A.clamp.default, (0,), "0 0"),
        (A.clamp_min.default, (-0.0,), "0 -0"),
        (A.clamp_max.default, (0.0,), "0 -0"),
        (A.clamp.default, (None, -0.0), "-0 -0"),
        (A.clamp.default, (-1, 1), "0 -0"),
    ],
)
def test_the_larger_zero(op: torch._ops.OpOverload, args: tuple[Any, ...], expected: str) -> None:
    """Of two zeros, GPUs take -0 for the smaller one; eager on a CPU takes either."""
    x = torch.tensor([0.0, -0.0])
    y = torch.empty_like(x)
    run(loop_kernel(region(Body(op, (x, *args), {}, x).graph), "kernel"), [x, y])
    assert " ".join(f"{number:g}" for number in y.tolist()) == expected


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (A.div.Tensor_mode, (ROWS.half(), ROWS.half(), "floor")),
        (A.remainder.Scalar, (ROWS.half(), 0.1)),
        (A.pow.Tensor_Scalar, (ROWS.half(), math.inf)),
        (A.pow.Tensor_Scalar, (ROWS.half(), math.nan)),
    ],
)
def test_what_no_formula_is_right_for(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    """PyTorch rounds a quotient in half precision twice, and a number that half precision lacks first; a power that is
    no number has no code."""
    given, mode = (args[:2], {"rounding_mode": args[2]}) if len(args) > 2 else (args, {})
    with pytest.raises(Unsupported, match="rounded twice|rounded first|power"):
        region(Body(op, given, mode, op(*given, **mode)).graph)


def test_extremes_of_truth_values() -> None:
    x = torch.rand(6, 7) > 0.5
    for op in EXTREMES[2:]:
        Body(op, (x, 1), {}, op(x, 1)).check()


@pytest.mark.parametrize("dtype", [*KINDS, torch.bool, torch.int32], ids=str)
@pytest.mark.parametrize("op", [A.cumsum.default, A.cumprod.default], ids=str)
def test_scans(op: torch._ops.OpOverload, dtype: torch.dtype) -> None:
    for shape, dim in (
        ((5, 37), 1),
        ((5, 37), 0),
        ((3, 1), -1),
        ((0, 4), 1),
        ((4, 0), 1),
        ((2, 3, 5), 1),
        ((1, 2048), 1),
        ((), 0),
    ):
        x = (
            tied(shape, dtype)
            if op is A.cumsum.default or not dtype.is_floating_point
            else torch.rand(shape).to(dtype) + 0.5
        )
        Body(op, (x, dim), {}, op(x, dim)).check()
    x = tied((3, 9), dtype)
    Body(op, (x, 1), {"dtype": torch.float32}, op(x, 1, dtype=torch.float32)).check()


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered")
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("op", [A.logcumsumexp.default, A.cummax.default, A.cummin.default], ids=str)
def test_scans_that_are_no_sums(op: torch._ops.OpOverload, dtype: torch.dtype) -> None:
    """Far below what came before, next to infinities and NaN, and equal elements."""
    if op is A.logcumsumexp.default and not dtype.is_floating_point:
        return
    torch.manual_seed(0)
    special = torch.tensor([-math.inf, 3.0, 3.0, -40.0, 9.0, math.inf, math.nan, 1.0, 2.0])
    for x, dim in ((torch.randn(5, 37) * 9, 1), (torch.randn(3, 5).round(), 0), (special.expand(2, 9), 1)):
        given = x.to(dtype).contiguous()
        Body(op, (given, dim), {}, op(given, dim)).check()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_scans_keep_what_is_no_number() -> None:
    x = torch.tensor([[1.0, math.nan, 3.0], [1.0, math.inf, 2.0], [math.inf, 1.0, -math.inf]])
    Body(A.cumsum.default, (x, 1), {}, A.cumsum.default(x, 1)).check()


def test_long_scans_are_refused() -> None:
    for size in (PERSISTENT, PERSISTENT + 1):
        x = torch.ones(1, size, dtype=torch.int64)
        body = Body(A.cumsum.default, (x, 1), {}, A.cumsum.default(x, 1))
        if size == PERSISTENT:
            body.check()
        else:
            with pytest.raises(Unsupported, match=f"a scan of {size} elements"):
                body.check()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("kind", ["reflection", "replication"])
def test_padding(kind: str, dtype: torch.dtype) -> None:
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(dtype)
    for rank, padding in ((1, [2, 3]), (1, [0, 3]), (2, [1, 2, 3, 0]), (2, [0, 0, 1, 1]), (3, [2, 1, 3, 0, 1, 2])):
        op = getattr(A, f"{kind}_pad{rank}d").default
        if kind == "reflection" and dtype == torch.int64:
            continue  # PyTorch has none of integers on the CPU
        given = x[0] if rank == 1 else x
        for tensor in (given, given.transpose(-1, -2)):
            Body(op, (tensor, padding), {}, op(tensor, padding)).check()


def test_declarations_have_the_defaults_of_their_schemas() -> None:
    """Arguments at their default are left out of the IR, so that a declaration has to know the same default."""
    for name, declaration in OPS.items():
        known = inspect.signature(declaration).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
        for argument in aten.overload(name)._schema.arguments:
            if argument.name in known and argument.has_default_value():
                expected = argument.default_value
                found = known[argument.name].default
                one_for_all = (
                    isinstance(expected, list) and set(expected) == {found} if isinstance(found, int) else False
                )
                same = found == expected or one_for_all or (isinstance(found, tuple) and list(found) == expected)
                assert same, f"{name}: {argument.name} is {found!r}, not {expected!r}"
            elif not argument.has_default_value():
                assert argument.name in known or takes_all, f"{name} does not know {argument.name}"


if __name__ == "__main__":
    print(*lacking(), sep="\n")
