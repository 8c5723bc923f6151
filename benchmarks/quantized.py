"""What the suite `quantized` measures: workloads, the formats of each, and its peers. Loading it loads no torch.

A peer is a format and a way to run it, such as `fp8-inductor`; a format alone is torch_rtx's engine of a model that
`torch_rtx.quantize` has quantized.

| way | model | runs by |
|---|---|---|
| (none) | `torch_rtx.quantize` | torch_rtx |
| `torchao` | torchao's `quantize_` | torch_rtx |
| `inductor` | torchao's `quantize_` | Inductor, `max-autotune` |
| `eager` | torchao's `quantize_` | library calls, one by one |

The format `half` is the model as it is, for which `torch_rtx` has one way alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from benchmarks.cases import Workload
from benchmarks.results import Row, headline

HALF, OURS, TORCHAO, INDUCTOR, EAGER = "half", "", "torchao", "inductor", "eager"


@dataclass(frozen=True)
class Format:
    """How a workload is quantized.

    Attributes:
        config: what `torch_rtx.quantize` takes.
        torchao: the name of torchao's configuration, see `suites.quantized`; None: it has none for these layers.
    """

    config: Any
    torchao: str | None


FP8, INT8 = Format("fp8_dynamic", "fp8"), Format("int8_dynamic", "int8")
# torchao leaves convolutions as they are: of a UNet it quantizes the linear layers, of a ResNet the last one.
FORMATS: dict[str, dict[str, Format]] = {
    "flux_dit": {"fp8": FP8},
    "bert_base": {"fp8": FP8, "int8": INT8},
    "vit_b_16": {"fp8": FP8},
    "resnet50": {"int8": Format("int8", None)},
    "sd15_unet": {"int8": Format("int8", "int8"), "fp8": Format("fp8", "fp8")},
    "llama_decode": {
        "int4": Format("int4_weight_only", "int4"),
        "int8": Format("int8_weight_only", "int8 weights"),
    },
}
FORMATS["llama_prefill"] = FORMATS["llama_decode"]

QUANTIZED = (
    Workload("flux_dit", 1),
    Workload("bert_base", 8, 384),
    Workload("vit_b_16", 32),
    Workload("resnet50", 32),
    Workload("resnet50", 1),
    Workload("sd15_unet", 2),
    Workload("llama_decode", 1),
    Workload("llama_prefill", 1, 512),
)

_NAMES = ("fp8", "int8", "int4")
# What is asked most of comes first: a run that is stopped keeps what it has.
DEFAULT_PEERS = (
    *(HALF, *_NAMES),
    *(f"{name}-{INDUCTOR}" for name in _NAMES),
    *(f"{name}-{EAGER}" for name in (HALF, *_NAMES)),
)
PEER_NAMES = (*DEFAULT_PEERS, f"{HALF}-{INDUCTOR}", *(f"{name}-{TORCHAO}" for name in _NAMES))


def parts(peer: str) -> tuple[str, str]:
    """The format and the way of a peer."""
    name, _, way = peer.partition("-")
    return name, way


def why_not(peer: str, workload: Workload, device: str) -> str | None:
    """Why a peer can't be measured, None if it can; empty where the workload is not measured in this format."""
    name, way = parts(peer)
    if name == HALF:
        return None
    form = FORMATS[workload.model].get(name) if workload.model in FORMATS else None
    if form is None:
        return ""
    if way == OURS:
        return None
    if form.torchao is None:
        return "torchao has no quantized convolutions"
    if find_spec("torchao") is None:
        return "not installed: torchao"
    return "torchao makes this format on GPUs alone" if device == "cpu" and form.torchao in ("fp8", "int4") else None


def beside(rows: Sequence[Row]) -> list[Row]:
    """The rows of one workload with how many times faster than others they are, where those were measured on the same
    device: `times_half`, torch_rtx's engine in half precision; `times_inductor` and `times_eager`, in the same
    format."""
    found = {row["peer"]: value for row in rows if (value := headline(row, ("device_ms", "wall_ms")))}
    more = []
    for row in rows:
        name, way = parts(row["peer"])
        times = {"times_half": HALF, **{f"times_{other}": f"{name}-{other}" for other in (INDUCTOR, EAGER)}}
        known = {column: other for column, other in times.items() if other in found and other != row["peer"]}
        own = found.get(row["peer"]) if way in (OURS, TORCHAO) else None
        metrics = {column: found[other][1] / own[1] for column, other in known.items()} if own else {}
        more.append({**row, "metrics": {**row["metrics"], **metrics}})
    return more
