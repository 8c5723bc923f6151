"""Triton and ptxas without a GPU: compiles the source of a kernel to PTX and a cubin for one SM version.

Triton's stages are called one by one in place of `triton.compile`. That needs no driver, cache folder or torch; TTIR,
which does not depend on the target, is made once for all targets; and ptxas is run from here. The stages are not a
public interface of Triton: `_triton` checks that they exist. Output is deterministic: equal sources give equal bytes in
any process, since line information is left out and the command line of ptxas never changes.
"""

from __future__ import annotations

import linecache
import logging
import re
import subprocess
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import KernelError
from torch_rtx.lowering.kernels.kernel import ForeignCode
from torch_rtx.lowering.kernels.masks import fold_masks
from torch_rtx.lowering.kernels.pdl import WAIT, insert_pdl
from torch_rtx.lowering.kernels.turing import NoTensorCores, rewrite
from torch_rtx.lowering.kernels.wgmma_waits import wait_for_registers
from torch_rtx.tactics import Variant
from torch_rtx.targets import NEWEST, PORTABLE_PTX, Target, arch_of, by_age

log = logging.getLogger(__name__)
OLDEST = (3, 6)  # version of Triton
_lock = threading.Lock()
_parsing = threading.Lock()
KEPT = 256  # size of the caches of compiled kernels and of TTIR, in entries of some 100 KB
_POINTERS = {name: dtype.pointer for name, dtype in DTYPES.items() if dtype.pointer}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Job:
    """The inputs of one compilation.

    Attributes:
        name, source: see `Kernel`.
        pointers: dtype of each pointer, as the IR names it; all addresses are multiples of 16 bytes.
        scalars: per scalar, true if it is always a multiple of 16.
        wide: scalars are int64, not int32.
        sm: SM version.
        trigger_early: see `Kernel`.
        portable: the PTX must run on later SM versions, too: it has no features of one architecture (no "a" suffix).
        ttir, ptx: overrides of the stages of these names; None: the stage is generated.
        foreign: the kernel that others wrote; `source` is empty, and `ttir`, `ptx` or `cubin` its code.
    """

    name: str
    source: str
    pointers: tuple[str, ...]
    scalars: tuple[bool, ...]
    wide: bool
    num_warps: int
    num_stages: int
    sm: int
    trigger_early: bool = False
    portable: bool = False
    ttir: str | None = None
    ptx: str | None = None
    foreign: ForeignCode | None = None
    cubin: str | None = None


@dataclass(frozen=True)
class Code:
    """A kernel for one SM version.

    Attributes:
        ptx, cubin: the same code, as text and as a binary.
        entry: name of the kernel in both.
        num_warps: warps per block.
        shared: dynamic shared memory per block, in bytes; a launch has to request it.
        registers, spills, stack: per thread, as ptxas reports them: registers, bytes of spill stores, bytes of stack.
        tensor_memory: columns per block that tensor cores sum in, from sm_100 on.
    """

    ptx: bytes
    cubin: bytes
    entry: str
    num_warps: int
    shared: int
    registers: int
    spills: int
    stack: int
    tensor_memory: int = 0

    @property
    def uses_pdl(self) -> bool:
        """The kernel waits for its predecessors by itself, see `insert_pdl`."""
        return WAIT.encode() in self.ptx

    def variant(self, binary: str) -> Variant:
        """The record of this code in an engine; `binary` is the digest that it is stored under."""
        return Variant(binary, self.entry, self.num_warps, self.shared, self.registers, self.spills, self.uses_pdl)


@dataclass(frozen=True)
class _Triton:
    """The parts of Triton that are used here."""

    version: str
    backend: Any
    target: Any
    source: Any
    function: Any
    ir: Any
    get_ptxas: Any
    arch_name: Any
    knobs: Any


@cache
def _triton() -> _Triton:
    """Triton, if its version has the stages that are called here.

    Raises:
        KernelError: it is missing, too old, or has other stages.
    """
    try:
        version = str(import_module("triton").__version__)
    except ImportError as error:
        hint = "install the extra `build` of torch_rtx; building without `targets` and running engines needs no Triton"
        raise KernelError(f"kernels are built with Triton, which can't be imported: {error}", hint=hint) from None
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    hint = f"install triton {'.'.join(map(str, OLDEST))} or 3.7"
    if number < OLDEST:
        raise KernelError(f"triton {version} is too old to build kernels", hint=hint)
    try:
        nvidia = import_module("triton.backends.nvidia.compiler")
        for stage in ("parse_options", "load_dialects", "make_ttir", "make_ttgir", "make_llir", "make_ptx"):
            getattr(nvidia.CUDABackend, stage)
        return _Triton(
            version,
            nvidia.CUDABackend,
            import_module("triton.backends.compiler").GPUTarget,
            import_module("triton.compiler").ASTSource,
            import_module("triton.runtime.jit").JITFunction,
            import_module("triton._C.libtriton").ir,
            nvidia.get_ptxas,
            nvidia.sm_arch_from_capability,
            import_module("triton").knobs.compilation,
        )
    except (ImportError, AttributeError) as error:
        raise KernelError(f"triton {version} has other stages than torch_rtx knows: {error}", hint=hint) from None


def versions() -> dict[str, str]:
    """The versions of Triton and of the two ptxas that it brings; binaries depend on all of them."""
    triton = _triton()
    tools = {"ptxas": triton.get_ptxas(80), "ptxas-blackwell": triton.get_ptxas(120)}
    return {"triton": triton.version, **{name: tool.version for name, tool in tools.items()}}


def built_with(targets: Iterable[Target]) -> dict[str, str]:
    """What builds code for `targets` here, for the manifest of an engine: Triton, and for each target its ptxas."""
    triton = _triton()
    used = {f"ptxas for {target}": _assembler(triton, target.arch.sm).version for target in by_age(targets)}
    return {"triton": triton.version, **used}


@lru_cache(maxsize=KEPT)
def lower(job: Job) -> Code:
    """Compile a kernel. Thread-safe; results are cached per process.

    Raises:
        KernelError: Triton or ptxas rejects the kernel, Triton can't be used, or the SM version is unknown.
        NoTensorCores: the kernel has a matrix product that no instruction of sm_75 computes.
    """
    if arch_of(job.sm).like is not None:
        hint = f"build {arch_of(job.sm).target} instead, which its driver compiles"
        raise KernelError(f"no ptxas is known that makes binaries for sm_{job.sm}", hint=hint)
    triton = _triton()
    if job.cubin is not None:
        return _given(triton, job, bytes.fromhex(job.cubin))
    try:
        if job.foreign is not None and job.foreign.form == "ptx":
            generated, metadata = _assembled(job)
        else:
            with _no_line_info(triton):
                generated, metadata = _ptx(triton, job, lower_to_ttir(job))
        ptx = generated if job.ptx is None else job.ptx
        cubin, registers, spills, stack = _ptxas(triton, job, ptx)
    except (KernelError, NoTensorCores):
        raise
    except Exception as error:  # Triton has many exception types; its C++ parts raise RuntimeError
        cause = f"\n{error.__cause__!r}" if error.__cause__ else ""  # often the only text of a CompilationError
        raise _error(job, "Triton", f"{type(error).__name__}: {error}{cause}") from error
    if metadata["global_scratch_size"] or metadata.get("profile_scratch_size"):
        raise _error(job, "the launcher", "the kernel needs scratch memory, which launches do not give it")
    warps = metadata.get("num_warps", job.num_warps)  # warp specialization changes it
    limits = metadata["shared"], registers, spills, stack, metadata.get("tmem_size", 0)
    return Code(ptx.encode(), cubin, metadata["name"], warps, *limits)


def lower_to_ttir(job: Job) -> str:
    """The TTIR of a job: the override if there is one, else generated from the source; cached per process.

    Raises:
        KernelError: Triton rejects the source.
    """
    if job.ttir is not None:
        return job.ttir
    has_float8 = "tl.float8" in job.source or any(dtype.startswith("f8") for dtype in job.pointers)
    any_sm = job.sm if has_float8 else 80
    return _ttir(replace(job, sm=any_sm, num_warps=1, num_stages=1, trigger_early=False, portable=False, ptx=None))


@lru_cache(maxsize=KEPT)
def _ttir(job: Job) -> str:
    """TTIR. It is the same for every SM version, except with fp8, and for all numbers of warps and stages."""
    triton = _triton()
    function = _function(triton, job)
    types = [f"*{_POINTERS[dtype]}" if dtype in _POINTERS else "" for dtype in job.pointers]
    if "" in types:
        raise _error(job, "Triton", f"no pointers to {job.pointers[types.index('')]}")
    types += ["i64" if job.wide else "i32"] * len(job.scalars)
    if len(function.arg_names) != len(types) or any(parameter.is_constexpr for parameter in function.params):
        raise _error(job, "Triton", f"its parameters {', '.join(function.arg_names)} are not the {len(types)} declared")
    divisible = [True] * len(job.pointers) + list(job.scalars)
    source = triton.source(
        function,
        dict(zip(function.arg_names, types, strict=True)),
        attrs={(index,): _DIVISIBLE for index, given in enumerate(divisible) if given},
    )
    return _made(triton, source, job)


def _made(triton: _Triton, source: Any, job: Job) -> str:
    """The TTIR of a source of Triton's."""
    backend, options, context = _backend(triton, job)
    helpers = backend.get_codegen_implementation(options), backend.get_module_map()
    # CPython's AST constructor keeps its recursion depth in a global: with two threads parsing, it may fail spuriously
    # ("AST constructor recursion depth mismatch"). Other code may parse without this lock, so try twice.
    for attempt in (1, 2):
        try:
            with _parsing:
                module = source.make_ir(backend.target, options, *helpers, context)
            break
        except SystemError:
            if attempt == 2:
                raise
    return str(backend.make_ttir(module, {}, options, job.sm))


def trace(
    function: Any, types: Mapping[str, str], constants: Mapping[str, Any], divisible: Collection[str], job: Job
) -> str:
    """The TTIR of a JIT function that others wrote.

    Args:
        function: of Triton.
        types: of the parameters that are not constant, by name, as Triton writes them.
        constants: the other parameters.
        divisible: the parameters that are multiples of 16.
        job: for the SM version and the options.

    Raises:
        KernelError: Triton rejects the function.
    """
    triton = _triton()
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    places = {name: (index,) for index, name in enumerate(function.arg_names)}
    try:
        source = triton.source(
            function,
            signature,
            {places[name]: value for name, value in constants.items()},
            {places[name]: _DIVISIBLE for name in function.arg_names if name in divisible},
        )
        with _no_line_info(triton):
            return _made(triton, source, job)
    except KernelError:
        raise
    except Exception as error:  # see `lower`
        cause = f"\n{error.__cause__!r}" if error.__cause__ else ""
        raise _error(job, "Triton", f"{type(error).__name__}: {error}{cause}") from error


def _function(triton: _Triton, job: Job) -> Any:
    """The JIT function that the source defines. Triton reads the source through `linecache`, at definition only."""
    file = f"<torch_rtx kernel {job.name}>"
    names: dict[str, Any] = {"__name__": "torch_rtx_kernel"}
    with _lock:  # another thread may define a kernel of the same name
        linecache.cache[file] = (len(job.source), None, job.source.splitlines(True), file)
        try:
            exec(compile(job.source, file, "exec"), names)
        finally:
            del linecache.cache[file]
    function = names.get(job.name)
    if not isinstance(function, triton.function):
        raise _error(job, "Triton", f"the source defines no JIT function {job.name} (is TRITON_INTERPRET set?)")
    return function


def _backend(triton: _Triton, job: Job) -> tuple[Any, Any, Any]:
    """Triton's backend, options and context for the job."""
    backend = triton.backend(triton.target("cuda", job.sm, 32))
    given = {
        "arch": f"sm{job.sm}",
        "num_warps": job.num_warps,
        "num_stages": job.num_stages,
        "enable_fp_fusion": True,
        "ptx_version": PORTABLE_PTX if job.portable else arch_of(job.sm).ptx_version,
        # Checks of integers, whose results only Triton's debug mode uses: a fifth of the time until TTIR.
        **({"sanitize_overflow": False} if job.foreign is None else dict(job.foreign.options)),
    }
    context = triton.ir.context()
    triton.ir.load_dialects(context)
    backend.load_dialects(context)
    return backend, backend.parse_options(given), context


def _ptx(triton: _Triton, job: Job, ttir: str) -> tuple[str, dict[str, Any]]:
    """PTX, and Triton's metadata of the kernel."""
    backend, options, context = _backend(triton, job)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttir"
        path.write_text(ttir)
        module = triton.ir.parse_mlir_module(str(path), context)
    module.context = context
    metadata: dict[str, Any] = {}
    arch = arch_of(job.sm)
    rewritten = "mma_k16" not in arch.features and "tt.dot" in ttir
    if rewritten:
        module = backend.make_ttgir(module, metadata, replace(options, num_stages=1), 80)
    else:
        module = backend.make_ttgir(module, metadata, options, job.sm)
    llir = backend.make_llir(module, metadata, options, job.sm)
    ptx = backend.make_ptx(llir, metadata, options, job.sm)
    if job.foreign is None:
        ptx = fold_masks(ptx)
    ptx = wait_for_registers(ptx)
    if job.portable:
        ptx = ptx.replace(f".target {triton.arch_name(job.sm)}", f".target {_gpu_name(triton, job)}")
    if rewritten:
        ptx = rewrite(ptx)
    elif "griddepcontrol" in arch.features:
        ptx = insert_pdl(ptx, job.trigger_early)
    return ptx, metadata


def _assembled(job: Job) -> tuple[str, dict[str, Any]]:
    """PTX that others wrote, and metadata of the kernel as Triton would give it."""
    assert job.ptx is not None
    assert job.foreign is not None
    return job.ptx, {"name": job.name, "shared": job.foreign.shared, "global_scratch_size": 0}


def _given(triton: _Triton, job: Job, cubin: bytes) -> Code:
    """A cubin that others built, with the registers that cuobjdump reads from it."""
    assert job.foreign is not None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(cubin)
        command = [import_module("triton").knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    used = re.search(rf"Function {re.escape(job.name)}:\s*REG:(\d+) STACK:(\d+)", result.stdout)
    if used is None:
        raise _error(job, "cuobjdump", result.stderr or f"the binary has no kernel {job.name}")
    return Code(b"", cubin, job.name, job.num_warps, job.foreign.shared, int(used[1]), 0, int(used[2]))


def _ptxas(triton: _Triton, job: Job, ptx: str) -> tuple[bytes, int, int, int]:
    """The cubin, and per thread: registers, bytes of spill stores, bytes of stack. A cubin contains the command line of
    ptxas, so file names are fixed."""
    tool = _assembler(triton, job.sm)
    # Triton passes this option too, as a workaround for a bug of ptxas 13.
    extra = ["--regAllocOptLevel=2"] if int(tool.version.partition(".")[0]) >= 13 else []
    command = [tool.path, "-v", *extra, f"--gpu-name={_gpu_name(triton, job)}", "kernel.ptx", "-o", "kernel.cubin"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if result.returncode:
            raise _error(job, "ptxas", result.stderr or f"it ended with code {result.returncode}")
        cubin = (Path(folder) / "kernel.cubin").read_bytes()
    registers = re.search(r"Used (\d+) registers", result.stderr)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
    if registers is None or frame is None:
        raise _error(job, "ptxas", f"it does not say what the kernel uses: {result.stderr}")
    return cubin, int(registers[1]), int(frame[2]), int(frame[1])


@lru_cache(maxsize=16)  # targets of a generation share a cubin, each of which leaves a file
def disassemble(cubin: bytes) -> str | None:
    """The SASS of a cubin, from the nvdisasm that Triton ships; None if it ships none, which is logged once."""
    tool = _disassembler()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(cubin)
        command = [tool, "-c", "kernel.cubin"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return result.stdout if result.returncode == 0 else result.stderr


@cache
def _disassembler() -> str | None:
    try:
        return str(import_module("triton").knobs.nvidia.nvdisasm.path)
    except (AttributeError, RuntimeError) as error:
        log.info("kernels are not disassembled: Triton brings no nvdisasm: %s", error)
        return None


def _gpu_name(triton: _Triton, job: Job) -> str:
    """The name of the architecture in PTX and for ptxas, such as "sm_90a"."""
    return f"sm_{job.sm}" if job.portable else str(triton.arch_name(job.sm))


def _assembler(triton: _Triton, sm: int) -> Any:
    """The ptxas for an SM version: Triton's choice, which the user or PyTorch can set. If that is too old for the SM
    version, Triton's ptxas for the newest one."""
    tool = triton.get_ptxas(sm)
    number = tuple(int(part) for part in tool.version.split(".")[:2])
    return triton.get_ptxas(NEWEST) if number < arch_of(sm).oldest_ptxas else tool


def _error(job: Job, who: str, message: str) -> KernelError:
    lines = [line[:300] for line in message.strip().splitlines()]
    if len(lines) > 9:  # the cause is in the first lines of ptxas and in the last lines of Triton
        lines[4:-4] = ["..."]
    shown = "\n  ".join(lines)
    own = "this is a bug of torch_rtx; until it is fixed, leave out the option `targets`, or this target"
    theirs = "the kernel is the model's own: change it, or leave this target out of the option `targets`"
    hint = own if job.foreign is None else theirs
    return KernelError(f"{who} refuses the kernel {job.name} for sm_{job.sm}: {shown}", hint=hint)


# ---- line information ------------------------------------------------------------------------------------------------

_KNOB = "disable_line_info"
_running = 0
_before: list[Any] = []  # the user's value of the knob while compilations run; empty: not set


@contextmanager
def _no_line_info(triton: _Triton) -> Iterator[None]:
    """Turn Triton's line information off, in every thread, while any compilation runs.

    Line information makes binaries four times as large and different in each run. The knob is written past its
    descriptor, which would also set an environment variable.
    """
    global _running
    knobs = vars(triton.knobs)
    with _lock:
        _running += 1
        if _running == 1:
            _before[:] = [knobs[_KNOB]] if _KNOB in knobs else []
            knobs[_KNOB] = True
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                del knobs[_KNOB]
                if _before:
                    knobs[_KNOB] = _before[0]


def forget() -> None:
    """Clear the caches of this process: the next build is a cold one."""
    lower.cache_clear()
    _ttir.cache_clear()
