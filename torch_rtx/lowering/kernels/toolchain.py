"""Triton and ptxas without a GPU: from the source of a kernel to PTX and a binary for one SM version.

Triton's stages are called one by one instead of `triton.compile`: that needs no driver, no cache folder and no torch,
makes the target-independent form (TTIR) once for all targets, and leaves the run of ptxas to this file. These stages
are no public interface of Triton: `_triton` checks that they are there. Without line information, and with ptxas under
one command line, equal sources give equal bytes, in any process.
"""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import KernelError
from torch_rtx.kerneltable import Variant
from torch_rtx.lowering.kernels.dependent import WAIT, dependent
from torch_rtx.lowering.kernels.turing import NoTensorCores, rewrite
from torch_rtx.targets import NEWEST, arch_of

OLDEST = (3, 6)  # version of Triton
PORTABLE_PTX = 87  # version of PTX for sm_120 and later: drivers of CUDA 12.8 and later take it
_lock = threading.Lock()
_parsing = threading.Lock()
KEPT = 256  # lowered kernels that are kept for the builds to come; some 100 KB each
_POINTERS = {name: dtype.pointer for name, dtype in DTYPES.items() if dtype.pointer}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Job:
    """One lowering.

    Attributes:
        name, source: see `Kernel`.
        pointers: dtypes as the IR names them; all addresses are multiples of 16.
        scalars: one entry per scalar: whether it is always a multiple of 16.
        wide: the scalars are 64 bit.
        sm: SM version.
        early: see `Kernel`.
        portable: the PTX is for later SM versions, too, although a binary would not be.
    """

    name: str
    source: str
    pointers: tuple[str, ...]
    scalars: tuple[bool, ...]
    wide: bool
    num_warps: int
    num_stages: int
    sm: int
    early: bool = False
    portable: bool = False


@dataclass(frozen=True)
class Code:
    """A kernel for one SM version.

    Attributes:
        ptx, cubin: the same code, as text and as a binary.
        entry: the name of the kernel in both.
        num_warps: warps of a block.
        shared: bytes of dynamic shared memory that a launch has to give.
        registers, spills, stack: registers, bytes of spill stores and bytes of stack per thread, as ptxas counts them.
    """

    ptx: bytes
    cubin: bytes
    entry: str
    num_warps: int
    shared: int
    registers: int
    spills: int
    stack: int

    @property
    def waits(self) -> bool:
        """Whether it waits for the kernels before it, see `dependent`."""
        return WAIT.encode() in self.ptx

    def variant(self, binary: str) -> Variant:
        """How it is launched, stored under the digest `binary`."""
        return Variant(binary, self.entry, self.num_warps, self.shared, self.registers, self.spills, self.waits)


@dataclass(frozen=True)
class _Triton:
    """What is used of Triton."""

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
    """Triton, if it is a version whose stages this file knows.

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


@lru_cache(maxsize=KEPT)
def lower(job: Job) -> Code:
    """Compile a kernel. Safe to call from many threads; equal jobs are compiled once per process.

    Raises:
        KernelError: Triton or ptxas refuses the kernel, Triton can't be used, or the SM version is unknown.
        NoTensorCores: sm_75 has no instruction for its matrix product.
    """
    if arch_of(job.sm).like is not None:
        hint = f"build {arch_of(job.sm).target} instead, which its driver compiles"
        raise KernelError(f"no ptxas is known that makes binaries for sm_{job.sm}", hint=hint)
    triton = _triton()
    try:
        with _no_line_info(triton):
            sm = job.sm if any(p.startswith("f8") for p in job.pointers) else 80
            ttir = _ttir(replace(job, sm=sm, portable=False))
            ptx, metadata = _ptx(triton, job, ttir)
        cubin, registers, spills, stack = _ptxas(triton, job, ptx)
    except (KernelError, NoTensorCores):
        raise
    except Exception as error:  # Triton's own are of many types, and those of its C++ parts are RuntimeErrors
        cause = f"\n{error.__cause__!r}" if error.__cause__ else ""  # often all that a CompilationError has to say
        raise _error(job, "Triton", f"{type(error).__name__}: {error}{cause}") from error
    if metadata["global_scratch_size"] or metadata.get("profile_scratch_size"):
        raise _error(job, "the launcher", "the kernel needs scratch memory, which launches do not give it")
    warps = metadata.get("num_warps", job.num_warps)  # warp specialization changes it
    return Code(ptx.encode(), cubin, metadata["name"], warps, metadata["shared"], registers, spills, stack)


@lru_cache(maxsize=KEPT)
def _ttir(job: Job) -> str:
    """The kernel in the form that is the same for every SM version, the dtypes of 8 bits apart."""
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
    backend, options, context = _backend(triton, job)
    helpers = backend.get_codegen_implementation(options), backend.get_module_map()
    # CPython's parser counts its depth in one place for all threads: two at once may fail for no reason, with "AST
    # constructor recursion depth mismatch". Who else parses can't be known: one failure is not the last word.
    for attempt in (1, 2):
        try:
            with _parsing:
                module = source.make_ir(backend.target, options, *helpers, context)
            break
        except SystemError:
            if attempt == 2:
                raise
    return str(backend.make_ttir(module, {}, options, job.sm))


def _function(triton: _Triton, job: Job) -> Any:
    """The JIT function that the source defines. Triton reads the source back through `linecache`, once."""
    file = f"<torch_rtx kernel {job.name}>"
    names: dict[str, Any] = {"__name__": "torch_rtx_kernel"}
    with _lock:  # another thread may define the same one
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
    }
    context = triton.ir.context()
    triton.ir.load_dialects(context)
    backend.load_dialects(context)
    return backend, backend.parse_options(given), context


def _ptx(triton: _Triton, job: Job, ttir: str) -> tuple[str, dict[str, Any]]:
    """PTX, and what Triton says about the kernel."""
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
    if job.portable:
        ptx = ptx.replace(f".target {triton.arch_name(job.sm)}", f".target {_gpu_name(triton, job)}")
    if rewritten:
        ptx = rewrite(ptx)
    elif "griddepcontrol" in arch.features:
        ptx = dependent(ptx, job.early)
    return ptx, metadata


def _ptxas(triton: _Triton, job: Job, ptx: str) -> tuple[bytes, int, int, int]:
    """The binary, and its registers, spill stores and stack. Binaries hold the command line: it is always the same."""
    tool = _assembler(triton, job.sm)
    # Triton's own workaround for a bug of ptxas 13.
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


def _gpu_name(triton: _Triton, job: Job) -> str:
    """Of PTX and for ptxas, "sm_90a"."""
    return f"sm_{job.sm}" if job.portable else str(triton.arch_name(job.sm))


def _assembler(triton: _Triton, sm: int) -> Any:
    """The ptxas for an SM version: Triton's, or the one that the user or PyTorch has named to it. Where that is too old
    for the SM version, the one for the newest."""
    tool = triton.get_ptxas(sm)
    number = tuple(int(part) for part in tool.version.split(".")[:2])
    return triton.get_ptxas(NEWEST) if number < arch_of(sm).oldest_ptxas else tool


def _error(job: Job, who: str, message: str) -> KernelError:
    lines = [line[:300] for line in message.strip().splitlines()]
    if len(lines) > 9:  # ptxas begins with what matters, Triton ends with it
        lines[4:-4] = ["..."]
    shown = "\n  ".join(lines)
    return KernelError(
        f"{who} refuses the kernel {job.name} for sm_{job.sm}: {shown}",
        hint="this is a bug of torch_rtx; until it is fixed, leave out the option `targets`, or this target",
    )


# ---- line information ------------------------------------------------------------------------------------------------

_KNOB = "disable_line_info"
_running = 0
_before: list[Any] = []  # what the user had set the knob to, while lowerings run


@contextmanager
def _no_line_info(triton: _Triton) -> Iterator[None]:
    """Triton leaves out line information meanwhile, in every thread; the environment stays as it is.

    With it, binaries are four times as large and differ from run to run. The knob is written past its descriptor, which
    would set an environment variable as well.
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
    """Drop what this process keeps of its builds, so that the next one takes the time of a first one."""
    lower.cache_clear()
    _ttir.cache_clear()
