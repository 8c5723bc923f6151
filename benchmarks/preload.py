"""What workers of the suite `sweep` need, imported: see `forked`. A library that is missing or damaged is left out, and
one that uses CUDA while it is imported."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module

from benchmarks.forked import is_cuda_in_use, is_spoilt_by

# Whether there is a GPU is asked of NVML, which a fork can do again.
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
    if not is_spoilt_by(_name, is_cuda_in_use):
        with suppress(Exception):
            import_module(_name)
    if "torch" not in sys.modules:  # all others import it, too
        break
