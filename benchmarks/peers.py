"""The peers: each way to run a model, with the settings that a good user of it would choose.

A peer prepares a *subject*, a model with example inputs, and returns something to call like the model. `PEERS` is the
register; a module given as `--plugin` may add to it. Loading this module loads no torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Subject:
    """What a peer prepares.

    Attributes:
        folder: for files of the peer; what it finds there from before (an engine, a package) it may use.
        dynamic: as `dynamic_shapes` of torch.export, where shapes will change; None: they stay.
        device: "cpu" or "cuda".
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    folder: Path
    device: str
    dynamic: Any = None


Prepared = Callable[..., Any]


def _always(device: str) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """One way to run a model.

    Attributes:
        prepare: makes it callable.
        why_not: why it can't run on a device of this kind here, None if it can.
        exported: a file is made and loaded, as for an application without the model's code: no gradients.
        ours: torch_rtx, which ratios compare with the best of all others.
        by_default: measured unless `--peers` says otherwise.
        settled: waits up to that many seconds until calls get no faster by themselves; whether that is so.
    """

    name: str
    prepare: Callable[[Subject], Prepared]
    why_not: Callable[[str], str | None] = _always
    exported: bool = False
    ours: bool = False
    by_default: bool = True
    settled: Callable[[float], bool] = lambda seconds: True


PEERS: dict[str, Peer] = {}


def register(peer: Peer) -> None:
    """Add a peer."""
    PEERS[peer.name] = peer


# PyTorch's own -------------------------------------------------------------------------------------------------------


def _eager(subject: Subject) -> Prepared:
    return subject.model


def _aot_eager(subject: Subject) -> Prepared:
    import torch

    return torch.compile(subject.model, backend="aot_eager", fullgraph=True)


def _inductor(subject: Subject, mode: str) -> Prepared:
    import torch

    compiled = torch.compile(subject.model, mode=mode, fullgraph=True)
    if mode == "default" or subject.device != "cuda":
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        # The results of the last call were read: CUDA graph trees may write over them.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs)

    return call


def _needs_cuda_graphs(device: str) -> str | None:
    return None if device == "cuda" else "is CUDA graphs around inductor, and there is no CUDA device"


def _has_compiler(device: str) -> str | None:
    compiler = os.environ.get("CXX", "")
    found = any(map(shutil.which, filter(None, (compiler, "g++", "c++", "clang++"))))
    return None if found else "needs a C++ compiler, and there is none on the PATH"


def _aoti(subject: Subject) -> Prepared:
    import torch
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    package = subject.folder / "model.pt2"
    if not package.exists():
        with torch.no_grad():
            program = torch.export.export(
                subject.model, subject.args, subject.kwargs, dynamic_shapes=subject.dynamic, strict=False
            )
            aoti_compile_and_package(program, package_path=str(package))
    return aoti_load_package(str(package))


# torch_rtx -----------------------------------------------------------------------------------------------------------


def _rtx(subject: Subject, **options: object) -> Prepared:
    import torch

    from torch_rtx.backend.entry import rtx

    return torch.compile(subject.model, backend=rtx, fullgraph=True, options=options)


def _rtx_exported(
    subject: Subject, targets: str | None = None, tactics: str = "best", strategy: str = "none"
) -> Prepared:
    """As an application gets it: from a weight-stripped file, with weights of its own."""
    import torch_rtx

    path = subject.folder / f"model-{targets}.rtx"
    if not path.exists():
        made = torch_rtx.compile(
            subject.model,
            subject.args,
            subject.kwargs,
            dynamic_shapes=subject.dynamic,
            settings=torch_rtx.CompilationSettings(targets=targets),
        )
        torch_rtx.save(made, path)
    settings = torch_rtx.RuntimeSettings(tactics=tactics, specialization_strategy=strategy)
    module = torch_rtx.load(path, device=subject.device, settings=settings, trust_binaries=True)
    module.refit(subject.model)
    return module


def _nothing_in_the_background(seconds: float) -> bool:
    import torch_rtx

    return torch_rtx.wait(seconds)


def no_kernels(device: str) -> str | None:
    """Why there are no generated kernels on a device of this kind, None if there are."""
    if device != "cuda":
        return "kernels need a CUDA device"
    return None if find_spec("triton") else "not installed: triton"


# Others --------------------------------------------------------------------------------------------------------------


def _no_tensorrt_rtx(device: str) -> str | None:
    if find_spec("torch_tensorrt") is None or find_spec("tensorrt_rtx") is None:
        return "not installed: torch_tensorrt and tensorrt_rtx"
    if device != "cuda":
        return "needs a CUDA device"
    import torch

    if torch.cuda.get_device_capability() in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return f"TensorRT for RTX does not support {torch.cuda.get_device_name()}"
    return None


def _tensorrt_rtx(subject: Subject) -> Prepared:
    import torch_tensorrt

    return torch_tensorrt.compile(
        subject.model, ir="dynamo", arg_inputs=list(subject.args), kwarg_inputs=subject.kwargs, min_block_size=1
    )


def _no_onnxruntime(device: str) -> str | None:
    missing = [name for name in ("onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    import onnxruntime

    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    found = provider in onnxruntime.get_available_providers()
    return None if found else f"this onnxruntime has no {provider}"


def _onnxruntime(subject: Subject) -> Prepared:
    from benchmarks.onnx_peer import prepare

    return prepare(subject)


for _peer in (
    Peer("eager", _eager),
    Peer("aot_eager", _aot_eager, by_default=False),
    Peer("inductor", partial(_inductor, mode="default")),
    Peer("reduce-overhead", partial(_inductor, mode="reduce-overhead"), _needs_cuda_graphs),
    Peer("max-autotune", partial(_inductor, mode="max-autotune"), by_default=False),
    Peer("aoti", _aoti, _has_compiler, exported=True),
    Peer("tensorrt-rtx", _tensorrt_rtx, _no_tensorrt_rtx),
    Peer("onnxruntime", _onnxruntime, _no_onnxruntime, exported=True),
    # The tiers of torch_rtx, with CUDA graphs where it can: ATen calls; what torch.compile does by default, kernels
    # that are compiled and measured in the background; and the engine's tactics: those expected to be fastest, or those
    # of one kind wherever there is one.
    Peer("rtx", partial(_rtx, specialization_strategy="none"), ours=True),
    Peer(
        "rtx-lazy",
        partial(_rtx, tuning_seconds=20.0),
        no_kernels,
        ours=True,
        settled=_nothing_in_the_background,
    ),
    Peer(
        "rtx-merged",
        partial(_rtx, tuning_seconds=20.0, copy_weights=True),
        no_kernels,
        ours=True,
        by_default=False,
        settled=_nothing_in_the_background,
    ),
    Peer("rtx-exported", _rtx_exported, exported=True, ours=True),
    Peer(
        "rtx-exported-lazy",
        partial(_rtx_exported, targets="later", strategy="lazy"),
        no_kernels,
        exported=True,
        ours=True,
        by_default=False,
        settled=_nothing_in_the_background,
    ),
    Peer("rtx-kernels", partial(_rtx_exported, targets="current"), no_kernels, exported=True, ours=True),
    *(
        Peer(
            f"rtx-{name}",
            partial(_rtx_exported, targets="current", tactics=kind),
            no_kernels,
            exported=True,
            ours=True,
            by_default=False,
        )
        for name, kind in (("generated", "kernel"), ("split", "split"), ("library", "library"))
    ),
):
    register(_peer)
