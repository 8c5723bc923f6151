"""Bytes and build time of engines without weights, in half precision and quantized, by part of the file.

    python -m benchmarks.engine_bytes                                   BERT-base in all formats, and ResNet-50
    python -m benchmarks.engine_bytes --models vit_b_16 --formats half,fp8_dynamic --size small

Needs no GPU: kernels are built for the portable targets. `times` is against the same model in half precision.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import torch_rtx
from benchmarks import models
from torch_rtx.engine import packs_by_binary, program_of
from torch_rtx.engine_header import PROGRAM, Header, parse_header, reading
from torch_rtx.lowering.kernels import toolchain
from torch_rtx.quantization import quantize

HALF = "half"
FORMATS = {
    "bert_base": (HALF, "fp8_dynamic", "int8_dynamic", "int8_weight_only", "int4_weight_only"),
    "resnet50": (HALF,),
}
SHAPES = {"bert_base": (8, 384), "resnet50": (32, None)}


def build(name: str, form: str, size: str, path: Path) -> float:
    """Build an engine without weights; the processor's seconds from the model to the file."""
    batch, length = SHAPES.get(name, (1, None))
    model = models.without_weights(name, size, batch=batch, dtype=torch.float16)
    args, kwargs = models.inputs(name, size, batch=batch, length=length, dtype=torch.float16)
    if form != HALF:
        quantize(model, form)
    torch._dynamo.reset()
    toolchain.forget()
    settings = torch_rtx.CompilationSettings(
        device="cuda", targets="portable", cache_built_engines=False, reuse_cached_engines=False
    )
    start = seconds()
    with torch.no_grad():
        torch_rtx.save(torch_rtx.compile(model, args, kwargs, settings=settings), path)
    return seconds() - start


def seconds() -> float:
    """Of the processor, of this process and those that it has waited for."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def parts(path: Path) -> tuple[Header, dict[str, int]]:
    """The bytes of a file by part: the program, packs by their targets, constants, and the header."""
    with reading(path) as file:
        header = parse_header(file)
    _, table = program_of(header)
    pack = packs_by_binary(header)
    targets: dict[str, set[str]] = {}
    for target, launch in table.launches():
        for variant in launch.variants:
            targets.setdefault(pack[variant.binary], set()).add(str(target))
    found = Counter[str]()
    for key, info in header.tensors.items():
        kind = key.partition("/")[0]
        found["program" if key == PROGRAM else " ".join(sorted(targets[key])) if key in targets else kind] += (
            info.nbytes
        )
    found["header"] = header.file_bytes - found.total()
    return header, dict(found)


def main() -> None:
    """Build the engines, and print a line for each and one for each part."""
    parser = argparse.ArgumentParser("benchmarks.engine_bytes", description=__doc__)
    parser.add_argument("--models", default=",".join(FORMATS), help="comma-separated")
    parser.add_argument("--formats", help=f"{HALF} and presets of quantize, comma-separated; default: the model's")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    options = parser.parse_args()
    print(
        "| model | format | bytes | times | build, CPU s | times | parts |\n|---|---|---|---|---|---|---|", flush=True
    )
    for name in options.models.split(","):
        first: Any = None
        for form in options.formats.split(",") if options.formats else FORMATS.get(name, (HALF,)):
            with tempfile.TemporaryDirectory() as folder:
                built = build(name, form, options.size, Path(folder, "model.rtx"))
                header, found = parts(Path(folder, "model.rtx"))
            total = header.file_bytes
            first = first or (total, built)
            text = ", ".join(f"{part} {nbytes}" for part, nbytes in found.items())
            ratios = total / first[0], built / first[1]
            print(
                f"| {name} | {form} | {total} | {ratios[0]:.2f} | {built:.1f} | {ratios[1]:.2f} | {text} |", flush=True
            )


if __name__ == "__main__":
    main()
