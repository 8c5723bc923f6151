"""What workers of the suite `sweep` need, imported: see `forked`. A library that is missing or damaged is left out."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module

# CUDA can't be used in the fork of a process that has used it: whether there is a GPU is asked of NVML.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
for _name in (
    "torch",
    "torch.export",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.codegen.triton",
    "triton.compiler",
    "torch_rtx.backend.entry",
    "torch_rtx.runtime.session",
    "transformers.modeling_utils",
    "transformers.generation",
    "timm",
    "torchvision.models",
    "diffusers.models",
    "benchmarks.models",
    "benchmarks.suites.sweep",
):
    with suppress(Exception):
        import_module(_name)
