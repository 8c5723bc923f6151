"""Triton kernels that others wrote: traced to TTIR here, for the sizes of a call, and compiled like generated kernels.

Arguments are specialized as Triton's own launcher does it: the number 1 becomes a constant, multiples of 16 are known
to be some, and so are addresses. Sizes that differ between calls give two variants, see `aot`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import KernelError, Unsupported
from torch_rtx.foreign import Launch, launch_in
from torch_rtx.ir import Dim, Graph, TensorType
from torch_rtx.lowering.kernels.families.foreign import address, grid_of, tactic
from torch_rtx.lowering.kernels.index import bounds, multiple
from torch_rtx.lowering.kernels.kernel import ForeignCode, Kernel
from torch_rtx.lowering.kernels.toolchain import Job, trace
from torch_rtx.tactics import NUMBERS, Slot, Tactic
from torch_rtx.targets import ALIGNMENT, Arch

log = logging.getLogger(__name__)
TENSOR, SIZE, NUMBER = "tensor", "size", "number"
NULL = Slot("u64", "constant", 0)  # Triton's ABI ends with the addresses of two kinds of scratch memory
_FORMATS = {"u1": "u8", "fp16": "f16", "fp32": "f32", "fp64": "f64"}  # of numbers: Triton's name, and that of a slot


@dataclass(frozen=True)
class Argument:
    """A parameter of the function that gets a value at each launch.

    Attributes:
        kind: TENSOR or SIZE: `value` is its position in the call; NUMBER: `value` is what all calls give.
    """

    name: str
    kind: str
    value: int | float | bool


@dataclass(frozen=True)
class Config:
    """A configuration of the kernel: its constants by the names of parameters, and Triton's options."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class TritonKernel:
    """See `foreign.Foreign`.

    Attributes:
        function: Triton's JIT function.
        arguments: its parameters in order, without the constants.
    """

    function: Any
    arguments: tuple[Argument, ...]
    configs: tuple[Config, ...]
    loc: object = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        configs = [
            (sorted((n, _text(v)) for n, v in c.constants.items()), c.num_warps, c.num_stages, c.options)
            for c in self.configs
        ]
        made_of = self.function.cache_key, self.arguments, configs
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
        object.__setattr__(self, "key", f"{self.name}_{digest}")

    @property
    def name(self) -> str:
        """Of the function."""
        return str(self.function.fn.__name__)

    @property
    def integers(self) -> int:
        """How many arguments are integers."""
        return sum(argument.kind == SIZE for argument in self.arguments)

    def run(self, tensors: Sequence[Any], sizes: Sequence[int]) -> None:
        """Launch the first configuration through Triton.

        Raises:
            KernelError: the tensors are not on a GPU.
        """
        if not all(tensor.is_cuda for tensor in tensors):
            hint = "run the model on a GPU, or give its operator a kernel for the CPU (torch.library.register_kernel)"
            raise KernelError(f"the Triton kernel {self.name} runs on a GPU alone", loc=self.loc, hint=hint)
        config = self.configs[0]
        grid = tuple(sizes[self.integers : self.integers + 3])
        if 0 in grid:
            return
        given = {TENSOR: tensors, SIZE: sizes}
        values = {a.name: given[a.kind][int(a.value)] if a.kind in given else a.value for a in self.arguments}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **dict(config.options)}
        self.function[grid](**values, **config.constants, **options)

    def offers(self, body: Graph, arch: Arch) -> list[Tactic[Kernel]]:
        """See `foreign.Foreign`. Configurations that Triton rejects are left out.

        Raises:
            KernelError: Triton rejects all of them.
        """
        found, problems = list[Tactic[Kernel]](), list[KernelError]()
        for which in range(len(self.configs)):
            try:
                found.append(tactic(self._kernel(body, which, arch), body, arch, which))
            except KernelError as error:
                problems.append(error)
        if not found:
            raise KernelError(problems[0].message, loc=self.loc, hint=problems[0].hint)
        for problem in problems:
            log.warning("a configuration is left out: %s", problem.message)
        return found

    def _kernel(self, body: Graph, which: int, arch: Arch) -> Kernel:
        config, given = self.configs[which], launch_in(body)
        assert given is not None
        signature = Signature(self, body, given[1], dict(config.constants))
        code = ForeignCode("ttir", (), (*signature.slots, NULL, NULL), config.options)
        warps, stages = config.num_warps, config.num_stages
        name = f"{self.name}_{which}" if which else self.name  # of dumped stages
        job = Job(name, "", (), (), False, warps, stages, arch.sm, foreign=code)
        texts = tuple(trace(self.function, signature.types, signature.constants, c, job) for c in signature.cases)
        grid, code = grid_of(given[1], self.integers, which), replace(code, texts=texts)
        return Kernel(name, "", (), tuple(signature.scalars), grid, warps, stages, foreign=code)


class Signature:
    """The parameters of a kernel, specialized for the sizes of a call.

    Attributes:
        types: as Triton writes them, by name; constants have none.
        slots, scalars: see `tactics.Launch`.
        divisible: the parameters that may be multiples of 16; whether they are in all calls.
    """

    def __init__(self, kernel: TritonKernel, body: Graph, launch: Launch, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self.types = dict[str, str]()
        self.slots, self.scalars = list[Slot](), list[Dim]()
        self.divisible = dict[str, bool]()
        params = {param.name: param for param in kernel.function.params}
        for argument in kernel.arguments:
            if argument.kind == TENSOR:
                position = int(argument.value)
                self.types[argument.name] = _pointer(launch.tensors[position].type, params[argument.name].is_const)
                self.slots.append(address(body, launch, position))
                self.divisible[argument.name] = True
            elif argument.kind == SIZE:
                self._size(argument.name, launch.sizes[int(argument.value)], params[argument.name])
            else:
                self._typed(argument.name, argument.value, params[argument.name])

    @property
    def cases(self) -> tuple[frozenset[str], ...]:
        """The parameters that are multiples of 16 where all that may be are, and otherwise, if that differs."""
        always = frozenset(name for name, known in self.divisible.items() if known)
        return tuple(dict.fromkeys((frozenset(self.divisible), always)))

    def _size(self, name: str, size: Dim, param: Any) -> None:
        if size == 1 and not param.do_not_specialize and not param.annotation_type:
            self.constants[name] = 1
            return
        self._typed(name, size, param)
        always = multiple(size) % ALIGNMENT == 0
        if not (param.do_not_specialize or param.do_not_specialize_on_alignment) and (
            always or not isinstance(size, int)
        ):
            self.divisible[name] = always

    def _typed(self, name: str, value: Dim | float, param: Any) -> None:
        declared = param.annotation_type
        self.types[name] = declared if isinstance(declared, str) and declared else _number(value)
        kind = _FORMATS.get(self.types[name], self.types[name])
        if kind not in NUMBERS:
            problem = f"the parameter {name} of {self.kernel.name} is a {kind}, which no launch passes"
            raise KernelError(problem, loc=self.kernel.loc)
        if isinstance(value, bool | int | float):
            self.slots.append(Slot(kind, "constant", float(value) if kind.startswith("f") else int(value)))
        else:
            self.slots.append(Slot(kind, "scalar", len(self.scalars)))
            self.scalars.append(value)


def _text(value: Any) -> str:
    """What a constant is, without addresses of objects."""
    return str(value.cache_key) if hasattr(value, "cache_key") else repr(value)


def _pointer(type_: object, const: bool) -> str:
    assert isinstance(type_, TensorType)
    if not DTYPES[type_.dtype].pointer:
        raise Unsupported(f"Triton has no pointers to {type_.dtype}")
    return f"*{'k' if const else ''}{DTYPES[type_.dtype].pointer}"


def _number(value: Dim | bool | float) -> str:
    """The type that Triton gives a number."""
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    low, high = bounds(value)
    if low >= -(2**31) and high < 2**31:
        return "i32"
    return "i64" if high < 2**63 or not isinstance(value, int) else "u64"
