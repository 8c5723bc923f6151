"""What is measured: workloads (a model at one shape) and cases (a suite, a workload and a peer). Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from benchmarks.sweep_table import ENTRIES

Size = Literal["small", "full"]

# Published in bfloat16, or overflow in float16; all others run in float16 on a GPU.
BF16 = frozenset({"llama", "qwen3", "t5", "llama_prefill", "llama_decode", "flux_dit"})
# The pipelines of the suite of that name, see `pipelines`; all run in bfloat16.
PIPELINES = ("llama_1b", "sdxl_lora", "whisper_small", "sdxl", "flux", "llama_8b")
# Convolutions in half precision are fastest in this layout, for PyTorch's libraries and compilers alike.
CHANNELS_LAST = frozenset({"resnet50", "mobilenet_v2", "mobilenet_v3", "convnext_t", "sd15_unet"})


class UsageError(Exception):
    """The command line asks for something that does not exist."""


@dataclass(frozen=True)
class Workload:
    """A model of the zoo at one shape.

    Attributes:
        model: its name in the zoo.
        batch, length: the shape of its inputs, as `models.inputs` takes them.
        trace: the shapes, as (batch, length), that the suite `shapes` walks through; empty: the model's shape is fixed.
        dtype: the floating-point dtype of weights and inputs, as torch names it.
    """

    model: str
    batch: int = 2
    length: int | None = None
    trace: tuple[tuple[int, int | None], ...] = ()
    size: Size = "full"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Such as `bert_base-b8-l384`."""
        return f"{self.model}-b{self.batch}" + (f"-l{self.length}" if self.length else "")

    @property
    def channels_last(self) -> bool:
        """Whether images and weights lie channels last."""
        return self.model in CHANNELS_LAST


def half(model: str) -> str:
    """The half precision that a model runs in, as torch names the dtype."""
    if model in ENTRIES:
        return ENTRIES[model].dtype
    return "bfloat16" if model in BF16 or model in PIPELINES else "float16"


def _batches(*batches: int, length: int | None = None) -> tuple[tuple[int, int | None], ...]:
    return tuple((batch, length) for batch in batches)


def _lengths(*lengths: int) -> tuple[tuple[int, int | None], ...]:
    return tuple((1, length) for length in lengths)


_IMAGES = _batches(4, 2, 8, 3, 16, 5, 32, 6)
_TEXTS = _lengths(128, 64, 192, 320, 96, 384, 80, 256)

# What a user meets: one image or sequence at a time, and batches for throughput. One step of Stable Diffusion with
# guidance is a batch of 2; FLUX.1 at 1024 x 1024 pixels has 64 x 64 image tokens.
WORKLOADS = (
    Workload("resnet50", 1, trace=_IMAGES),
    Workload("resnet50", 32),
    Workload("mobilenet_v3", 1, trace=_IMAGES),
    Workload("mobilenet_v3", 32),
    Workload("vit_b_16", 1, trace=_IMAGES),
    Workload("vit_b_16", 32),
    Workload("bert_base", 1, 128, trace=_TEXTS),
    Workload("bert_base", 8, 384),
    Workload("gpt2", 1, 512, trace=_TEXTS),
    Workload("gpt2", 8, 512),
    Workload("llama", 1, 512, trace=_TEXTS),
    Workload("llama", 4, 512),
    Workload("whisper_encoder", 1),
    Workload("whisper_encoder", 8),
    Workload("sd15_unet", 2, trace=((2, 64), (2, 48), (2, 96), (2, 72), (2, 56), (2, 80))),
    Workload("sd15_unet", 16),
    Workload("flux_dit", 1, trace=((1, 64), (1, 48), (1, 32), (1, 56), (1, 40))),
    Workload("flux_dit", 4),
    Workload("gpt2_decode", 1),
    Workload("llama_decode", 1),
)
# What users train at these sizes: language models, image classifiers, and LoRA of a denoiser; see `training`.
TRAINED = (
    Workload("bert_base", 16, 128),
    Workload("gpt2", 8, 512),
    Workload("vit_b_16", 32),
    Workload("resnet50", 32),
    Workload("resnet50", 128),
    Workload("swin_t", 64),
    Workload("llama", 1, 1024),
    Workload("sd15_unet", 4),
)
# The rest of the zoo, on request by name.
FURTHER = ("mobilenet_v2", "convnext_t", "swin_t", "qwen3", "t5", "whisper_decoder", "clip", "gpt2_prefill")
FURTHER_WORKLOADS = tuple(Workload(model) for model in (*FURTHER, "llama_prefill"))
_SMALL_TRACE = {"resnet50": _batches(2, 4, 3), "bert_base": _lengths(8, 24, 16), "gpt2": _lengths(8, 24, 16)}


def workloads(names: Sequence[str], size: Size, device: str, own: Sequence[Workload] = ()) -> list[Workload]:
    """The workloads that `names` mean: a model's name all of its, `resnet50-b32` one; no names: every model's first.

    Of size `small` each model has one, of batch 2.

    Args:
        own: those of a suite with workloads of its own, which come first: a model's name means them where there are
            any, and no names mean them all.

    Raises:
        UsageError: an unknown name.
    """
    known = [*WORKLOADS, *FURTHER_WORKLOADS]
    found: list[Workload] = [] if names else list(own)
    for name in names or ([] if own else list(dict.fromkeys(w.model for w in WORKLOADS))):
        matching = [w for w in own if name in (w.model, w.name)] or [w for w in known if name in (w.model, w.name)]
        if not matching:
            models = ", ".join(dict.fromkeys(w.model for w in (*own, *known)))
            raise UsageError(f"unknown model {name!r}; known models: {models}, or one shape of them as in `list`")
        found += matching if names else matching[:1]
    if size == "small":
        found = [Workload(w.model, trace=_SMALL_TRACE.get(w.model, ()), size="small") for w in found]
    dtyped = (replace(w, dtype=half(w.model) if device == "cuda" else "float32") for w in found)
    return list(dict.fromkeys(dtyped))


@dataclass(frozen=True)
class Job:
    """What a worker process does: one suite on one workload, for some peers.

    Attributes:
        device: "cpu" or "cuda".
        rounds: how often the peers take turns.
        plugins: modules that register further peers.
        settle_s: seconds that a peer has to reach its full speed, where a suite has not less.
        cores: that the process is bound to; empty: to none.
        shared: a file for locks of those that use the same GPU; empty: the process has it alone.
        warm: where a suite begins with empty caches, measure a second process as well, which finds full ones.
    """

    suite: str
    workload: Workload
    peers: tuple[str, ...]
    device: str
    rounds: int
    plugins: tuple[str, ...] = ()
    settle_s: float = math.inf
    cores: tuple[int, ...] = ()
    shared: str = ""
    warm: bool = True

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Job:
        """What `to_json` wrote."""
        trace = tuple((batch, length) for batch, length in data["workload"]["trace"])
        workload = Workload(**{**data["workload"], "trace": trace})
        tuples = {name: tuple(data[name]) for name in ("peers", "plugins", "cores")}
        return Job(**{**data, **tuples, "workload": workload})


def key(suite: str, workload: Workload, device: str, peer: str) -> dict[str, Any]:
    """The fields of a row that say what was measured; `device` is the device's own name."""
    fields = ("model", "size", "batch", "length", "dtype")
    return {"suite": suite, **{f: getattr(workload, f) for f in fields}, "device": device, "peer": peer}
