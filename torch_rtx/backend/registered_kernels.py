"""Kernels in CUDA C++, PTX or cubins for operators of the user's own: `register_kernel`.

A registered operator is captured as the launch of its kernel (see `foreign`), whose arguments and grid are computed
from the sizes of the operator's tensors. NVRTC compiles CUDA C++ for each target, without a GPU; its PTX says of what
types the parameters are. From there on the kernel goes the way of a generated one.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import fx

from torch_rtx.backend.registered_operators import operator_of
from torch_rtx.binaries import named
from torch_rtx.errors import CaptureError, KernelError, SettingsError, Unsupported
from torch_rtx.foreign import launch_in, register
from torch_rtx.ir import Dim, Graph, Loc
from torch_rtx.lowering.foreign_calls import OPERATORS, Launched
from torch_rtx.lowering.kernels.families.foreign import address, grid_of, tactic
from torch_rtx.lowering.kernels.kernel import ForeignCode, Kernel
from torch_rtx.lowering.kernels.toolchain import Job, lower
from torch_rtx.lowering.kernels.triton_kernels import NUMBER, SIZE, TENSOR, Argument
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime.launch import Launcher, gpu_of
from torch_rtx.tactics import MAX_THREADS, NUMBERS, Launch, Slot, Tactic
from torch_rtx.targets import Arch, arch_of

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([bsuf])(\d+)\b[^,]*?([\w$]+)(\[\d+\])?\s*$")
_INTEGERS = {8: "i8", 16: "i16", 32: "i32", 64: "i64"}
_FLOATS = {16: "f16", 32: "f32", 64: "f64"}
Expressions = Callable[..., Any]  # of the arguments and results of an operator


@dataclass(frozen=True, eq=False)
class BinaryKernel:
    """See `foreign.Foreign`.

    Attributes:
        entry: its name in the code.
        form: "ptx" or "cubin", what `code` gives for an SM version; it raises Unsupported if there is none.
        arguments: in the order of the kernel's parameters.
        types: of the parameters, see `register_kernel`; None: the PTX says them.
        reference: does the same on the CPU.
        made_of: what the kernel depends on, as text.
    """

    entry: str
    form: str
    code: Callable[[Arch], str]
    arguments: tuple[Argument, ...]
    block: tuple[int, int, int]
    shared: int
    types: tuple[str, ...] | None
    reference: Callable[..., object] | None
    made_of: str
    loc: object = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        text = repr((self.made_of, self.entry, self.arguments, self.block, self.shared, self.types))
        object.__setattr__(self, "key", f"{self.entry}_{hashlib.sha256(text.encode()).hexdigest()[:16]}")

    @property
    def integers(self) -> int:
        """How many arguments are integers."""
        return sum(argument.kind == SIZE for argument in self.arguments)

    def offers(self, body: Graph, arch: Arch) -> list[Tactic[Kernel]]:
        """See `foreign.Foreign`.

        Raises:
            Unsupported: there is no code for this SM version.
            KernelError: NVRTC rejects the source, or the arguments do not fit the parameters.
        """
        found = launch_in(body)
        assert found is not None
        launch, code = found[1], self.code(arch)
        scalars = list[Dim]()
        slots = tuple(
            self._slot(argument, kind, lambda position: address(body, launch, position), launch.sizes, scalars)
            for argument, kind in zip(self.arguments, self._types(code), strict=True)
        )
        made = ForeignCode(self.form, (code,), slots, (), self.block, self.shared)
        grid = grid_of(launch, self.integers, 0)
        kernel = Kernel(self.entry, "", (), tuple(scalars), grid, self._warps, foreign=made)
        return [tactic(kernel, body, arch, 0)]

    @property
    def _warps(self) -> int:
        return -(-prod(self.block) // 32)

    def _slot(
        self,
        argument: Argument,
        kind: str,
        address_of: Callable[[int], Slot],
        sizes: Sequence[Dim],
        scalars: list[Dim],
    ) -> Slot:
        """The parameter for an argument; a size that differs between calls is added to `scalars`."""
        is_float = isinstance(argument.value, float) and argument.kind == NUMBER
        if (argument.kind == TENSOR) != (kind == "pointer") or (kind in _FLOATS.values()) != is_float:
            what = {TENSOR: "a tensor", SIZE: "an integer"}.get(argument.kind, f"the number {argument.value}")
            problem = f"the parameter {argument.name} of the kernel {self.entry} is of type {kind}, and gets {what}"
            raise KernelError(problem, loc=self.loc)
        if argument.kind == TENSOR:
            return address_of(int(argument.value))
        value = sizes[int(argument.value)] if argument.kind == SIZE else argument.value
        if isinstance(value, bool | int | float):
            return Slot(kind, "constant", value if is_float else int(value))
        scalars.append(value)
        return Slot(kind, "scalar", len(scalars) - 1)

    def _types(self, code: str) -> tuple[str, ...]:
        """The types of the parameters.

        Raises:
            KernelError: the code has no such kernel, it has others than there are arguments, or a structure.
        """
        types = self.types
        if types is None:
            entries = dict(_ENTRY.findall(code))
            if self.entry not in entries:
                known = ", ".join(entries) or "none"
                hint = 'declare it as extern "C" __global__'
                raise KernelError(f"the code has no kernel {self.entry}; it has {known}", loc=self.loc, hint=hint)
            rows = [row for row in entries[self.entry].split(",") if row.strip()]
            types = tuple(_type_of(row) for row in rows)
        if len(types) != len(self.arguments):
            problem = f"the kernel {self.entry} has {len(types)} parameters, and gets {len(self.arguments)} arguments"
            raise KernelError(problem, loc=self.loc)
        if not all(kind == "pointer" or kind in NUMBERS for kind in types):
            raise KernelError(f"the kernel {self.entry} has a parameter that is no number or pointer", loc=self.loc)
        # PTX does not tell a pointer from an integer of 64 bits.
        pairs = zip(types, self.arguments, strict=True)
        return tuple("pointer" if kind == "i64" and given.kind == TENSOR else kind for kind, given in pairs)

    def run(self, tensors: Sequence[Any], sizes: Sequence[int]) -> None:
        """Launch the kernel, or call the reference for tensors on the CPU.

        Raises:
            KernelError: there is no reference, no code for the GPU, or no driver API.
        """
        given: dict[str, Sequence[Any]] = {TENSOR: tensors, SIZE: sizes}
        if all(tensor.is_cuda for tensor in tensors):
            x, y, z = sizes[self.integers : self.integers + 3]
            launcher = self._launcher(tensors[0].device.index, len(tensors))
            with torch.cuda.device(tensors[0].device):
                launcher([x.data_ptr() for x in tensors], sizes[: self.integers], (x, y, z))
        elif self.reference is None:
            hint = "register_kernel(..., reference=function) says what does the same on the CPU"
            raise KernelError(f"the kernel {self.entry} runs on a GPU alone", loc=self.loc, hint=hint)
        else:
            self.reference(*(given[a.kind][int(a.value)] if a.kind in given else a.value for a in self.arguments))

    @lru_cache(maxsize=16)  # noqa: B019 - registered kernels live as long as the process
    def _launcher(self, index: int, count: int) -> Launcher:
        driver = driver_api.driver()
        if driver is None:
            raise KernelError("kernels are launched by the package cuda-bindings, which is not installed")
        gpu = gpu_of(driver, index)
        target = arch_of(gpu.sm).target
        code, scalars = self.code(target.arch), list[Dim]()
        sizes = [_Open(f"n{position}") for position in range(self.integers)]
        slots = tuple(
            self._slot(argument, kind, lambda position: Slot("pointer", "tensor", position), sizes, scalars)  # type: ignore[arg-type]
            for argument, kind in zip(self.arguments, self._types(code), strict=True)
        )
        made = ForeignCode(self.form, (code,), slots, (), self.block, self.shared)
        job = Job(self.entry, "", (), (), False, self._warps, 1, target.sm, foreign=made, **{self.form: code})  # type: ignore[arg-type]
        built = lower(job)
        name, binary = named(built.ptx if target.ptx else built.cubin)
        launch = Launch((0,) * self.integers, (1, 1, 1), False, built.variant(name), None, slots, self.block)
        return Launcher(gpu, self.entry, launch, target, {name: binary}, count)


@dataclass(frozen=True)
class _Open:
    """A size that each launch says."""

    name: str


def _type_of(row: str) -> str:
    """The type of a parameter, by its declaration in PTX; another word for what is no number."""
    found = _PARAMETER.search(row.strip())
    if found is None or found[4]:
        return "structure"
    return (_FLOATS if found[1] == "f" else _INTEGERS).get(int(found[2]), "structure")


# ---- registration ----------------------------------------------------------------------------------------------------


def register_kernel(
    op: str,
    *,
    entry: str,
    args: Expressions,
    grid: Expressions,
    block: int | Sequence[int],
    source: str | None = None,
    ptx: str | None = None,
    cubin: Mapping[int, bytes] | None = None,
    types: Sequence[str] | None = None,
    shared: int = 0,
    options: Sequence[str] = (),
    reference: Callable[..., object] | None = None,
) -> None:
    """Let engines run an operator by a kernel, which files hold without its source.

    Args:
        op: "namespace::name" of an operator without overloads that writes to no argument, and whose results PyTorch
            knows the types of (`torch.library.register_fake`).
        entry: the kernel's name in its code: `extern "C" __global__` in CUDA C++.
        args: a function of the operator's arguments, then of its results: the kernel's arguments in order, as a tuple.
            These are tensors among those of the operator, integers computed from sizes and strides, and floats.
        grid: a function of the same: one to three numbers of blocks.
        block: its threads, one to three numbers.
        source, ptx, cubin: one of them: CUDA C++, PTX, or binaries by SM version (`{89: ...}`).
        types: of the parameters: "pointer", "i32", "i64", "f32", ...; for cubins. PTX says them itself.
        shared: bytes of dynamic shared memory of a block.
        options: of NVRTC, for `source`.
        reference: a function of the kernel's arguments that does the same in PyTorch, for the CPU.

    Raises:
        SettingsError: there is no such operator, it writes to an argument, or arguments contradict each other.
    """
    overload = _overload(op)
    given = {"source": source, "ptx": ptx, "cubin": cubin}
    chosen = [name for name, code in given.items() if code is not None]
    if len(chosen) != 1:
        raise SettingsError(f"register_kernel({op!r}) takes one of source, ptx and cubin, not {chosen or 'none'}")
    threads = _three(block)
    if not 1 <= prod(threads) <= MAX_THREADS or min(threads) < 1:
        raise SettingsError(f"register_kernel({op!r}): a block of {' x '.join(map(str, threads))} threads")
    if cubin is not None and types is None:
        hint = 'types=("pointer", "pointer", "i32")'
        raise SettingsError(f"register_kernel({op!r}): cubins do not say the types of parameters", hint=hint)
    code = _code(source, ptx, cubin, tuple(options))
    made_of = repr((source, ptx, sorted((cubin or {}).items()), tuple(options)))
    form = "cubin" if cubin is not None else "ptx"
    fixed = threads, shared, None if types is None else tuple(types), reference, made_of

    def launched(node: fx.Node, loc: Loc | None) -> Launched:
        call = _Call(overload, node, loc)
        arguments, tensors, sizes = call.arguments(_as_tuple(args(*call.values)), args)
        blocks = _as_tuple(grid(*call.values))
        if not 1 <= len(blocks) <= 3 or not all(isinstance(size, int | torch.SymInt) for size in blocks):
            raise CaptureError(f"the grid of {op} is {blocks}, not one to three integers", loc=loc)
        key = register(BinaryKernel(entry, form, code, arguments, *fixed, loc))
        return Launched(key, tensors, call.written(tensors), (*sizes, *_three(blocks)))

    OPERATORS[overload] = launched


def _overload(op: str) -> torch._ops.OpOverload:
    found = operator_of(op)
    if found._schema.is_mutable:
        raise SettingsError(f"register_kernel: {op} writes to an argument", hint="let it return what it computes")
    return found


def _code(
    source: str | None, ptx: str | None, cubin: Mapping[int, bytes] | None, options: tuple[str, ...]
) -> Callable[[Arch], str]:
    if source is not None:
        return lambda arch: nvrtc(source, arch.sm, arch.ptx_version, options)
    if ptx is not None:
        return lambda arch: ptx

    def binary(arch: Arch) -> str:
        fitting = [
            sm for sm in cubin or {} if sm == arch.sm or (not arch.exact and sm // 10 == arch.sm // 10 and sm < arch.sm)
        ]
        if not fitting:
            raise Unsupported(f"there is no cubin for sm_{arch.sm}")
        assert cubin is not None
        return cubin[max(fitting)].hex()

    return binary


class _Call:
    """A call of a registered operator in a capture; `values`: the types of its arguments and results."""

    def __init__(self, op: torch._ops.OpOverload, node: fx.Node, loc: Loc | None) -> None:
        self.op, self.loc = op, loc
        names = [argument.name for argument in op._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
        self.nodes = [given.get(name, defaults.get(name)) for name in names]
        inputs = [one.meta["val"] if isinstance(one, fx.Node) else one for one in self.nodes]
        content = node.meta["val"]
        self.results = list(content) if isinstance(content, tuple | list) else [content]
        self.values = [*inputs, *self.results]

    def arguments(
        self, given: tuple[Any, ...], function: Expressions
    ) -> tuple[tuple[Argument, ...], tuple[fx.Node | int, ...], tuple[int | torch.SymInt, ...]]:
        """The kernel's arguments, with the tensors and sizes that they refer to.

        Raises:
            CaptureError: one is no tensor of the operator and no number.
        """
        arguments, tensors, sizes = list[Argument](), list[fx.Node | int](), list[int | torch.SymInt]()
        for index, value in enumerate(given):
            name = str(index)
            if isinstance(value, torch.Tensor):
                position = next((at for at, own in enumerate(self.values) if own is value), None)
                if position is None:
                    problem = f"argument {index} is a tensor that {self.op} neither takes nor returns"
                    raise self._error(problem, function)
                node: Any = self.nodes[position] if position < len(self.nodes) else position - len(self.nodes)
                tensors.append(node)
                arguments.append(Argument(name, TENSOR, len(tensors) - 1))
            elif type(value) in (bool, float):
                arguments.append(Argument(name, NUMBER, value))
            elif isinstance(value, int | torch.SymInt):
                arguments.append(Argument(name, SIZE, len(sizes)))
                sizes.append(value)
            else:
                raise self._error(f"argument {index} is a {type(value).__name__}", function)
        return tuple(arguments), tuple(tensors), tuple(sizes)

    def written(self, tensors: Sequence[fx.Node | int]) -> tuple[int, ...]:
        """The positions of the results among the tensors.

        Raises:
            CaptureError: the kernel does not get one of them.
        """
        missing = [index for index in range(len(self.results)) if index not in tensors]
        if missing:
            raise CaptureError(f"the kernel of {self.op} does not get result {missing[0]}", loc=self.loc)
        return tuple(tensors.index(index) for index in range(len(self.results)))

    def _error(self, problem: str, function: Expressions) -> CaptureError:
        code = getattr(inspect.unwrap(function), "__code__", None)
        hint = None if code is None else f"see {code.co_filename}:{code.co_firstlineno}"
        return CaptureError(f"the kernel of {self.op}: {problem}", loc=self.loc, hint=hint)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _three(value: Any) -> tuple[Any, Any, Any]:
    x, y, z = (*_as_tuple(value), 1, 1, 1)[:3]
    return x, y, z


# ---- NVRTC -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def nvrtc(source: str, sm: int, ptx_version: int | None, options: tuple[str, ...]) -> str:
    """The PTX of CUDA C++ for an SM version.

    Args:
        ptx_version: which PTX says it is of; None: that of NVRTC. An older one is taken by older tools and drivers.

    Raises:
        KernelError: NVRTC is missing, or rejects the source.
    """
    hint = "pip install cuda-bindings nvidia-cuda-nvrtc"
    try:
        library: Any = import_module("cuda.bindings.nvrtc")
        _, major, _ = library.nvrtcVersion()
    except Exception as error:  # several kinds, if the library is not found
        raise KernelError(f"CUDA C++ is compiled by NVRTC, which is missing: {error}", hint=hint) from None

    def text_of(size: Callable[..., Any], read: Callable[..., Any]) -> str:
        buffer = b" " * size(program)[1]
        read(program, buffer)
        return buffer.rstrip(b"\0").decode()

    _, program = library.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    flags = [f"--gpu-architecture=compute_{sm}", "--std=c++17", *options]
    (status,) = library.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    if int(status):
        log = text_of(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
        raise KernelError(f"NVRTC {major} refuses the source for sm_{sm}: {log.strip()[:2000]}")
    ptx = text_of(library.nvrtcGetPTXSize, library.nvrtcGetPTX)
    version = ptx_version or 87
    return re.sub(r"^\.version .*$", f".version {version // 10}.{version % 10}", ptx, count=1, flags=re.MULTILINE)
