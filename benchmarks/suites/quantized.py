"""Suite `quantized`: quantized models beside the same in half precision, one peer after the other.

Peers do not take turns and need no row of another one: each has its row as soon as it is measured, and the report puts
rows beside each other. So a run that is stopped, or done for some peers, goes on with what is left.

What is right: of a model in half precision, as in all suites. A quantized model's own eager result has an error against
the unquantized model in float64. From neither of these two a peer may be further away than `APART` times that error.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks import models, timing
from benchmarks.cases import Job
from benchmarks.numerics import tensors, widened
from benchmarks.peers import PEERS, Prepared, Subject
from benchmarks.quantized import EAGER, FORMATS, HALF, INDUCTOR, OURS, Format, parts
from benchmarks.suites import common
from benchmarks.worker import Reporter
from torch_rtx.quantization import quantize
from torch_rtx.quantization.layers import quantized_layers
from torch_rtx.runtime.candidate_check import relative_error, tolerance

APART = 1.5
GROUP = {"full": 128, "small": 32}  # weights of 4 bits that share a scale


def measure(job: Job, out: Reporter) -> None:
    """`device_ms` (on a GPU) and `wall_ms` of a call; `prepare_s` until full speed; of quantized models the
    `quantization_error` of eager, the peer's own `error` and `distance`, see `Quantized.check`, and of torch_rtx's the
    `packed_bytes` of codes and scales."""
    out.begin(None, "model")
    with common.set_up(job) as setup:
        out.begin(None, "reference")
        for index in range(common.CHECKED):
            setup.expected(index)
        made: dict[tuple[str, bool], Quantized] = {}
        for name in job.peers:
            with out.attempt(name, "prepare"):
                out.ok(name, _measured(name, job, setup, made, out))
            forget(job.device)


def _measured(
    name: str, job: Job, setup: common.Setup, made: dict[tuple[str, bool], Quantized], out: Reporter
) -> dict[str, Any]:
    """The metrics of one peer."""
    form, way = parts(name)
    own = way == OURS
    subject: Quantized | None = None
    if form != HALF:
        if (form, own) not in made:
            made.clear()  # one quantized model at a time: of the largest ones two do not fit everywhere
            made[form, own] = Quantized(setup, FORMATS[job.workload.model][form], own)
        subject = made[form, own]
    start = time.perf_counter()
    runner = PEERS[_runner(way, job.device)]
    with _inductor_for(form):
        call = runner.prepare(subject.subject if subject else setup.subject)
        check = subject.check if subject else setup.check
        check(call)
        if not runner.settled(common.SETTLE_S):
            raise TimeoutError(f"still not at its full speed after {common.SETTLE_S} s")
        errors = check(call) or {}
    metrics = {"prepare_s": time.perf_counter() - start, **errors}
    if subject:
        metrics |= {"quantize_s": subject.seconds, "packed_bytes": subject.packed_bytes}
    rotating = (subject or setup).rotating(call)
    times = timing.interleaved({name: rotating}, job.device, job.rounds, lambda name: out.begin(name, "measure"))
    return {**metrics, **{clock: common.flat(rounds) for clock, rounds in times[name].items()}}


@contextmanager
def _inductor_for(form: str) -> Iterator[None]:
    """Inductor's settings for one peer: of models in torchao's formats those that it recommends."""
    config: Any = torch._inductor.config
    before = config.get_config_copy()
    config.max_autotune_conv_backends = "ATEN"  # templates of convolutions take minutes
    if form != HALF and find_spec("torchao"):
        from torchao.quantization.utils import recommended_inductor_config_setter

        recommended_inductor_config_setter()
    try:
        yield
    finally:
        config.load_config(
            {name: before[name] for name, now in config.get_config_copy().items() if before[name] != now}
        )


def _runner(way: str, device: str) -> str:
    """The peer of other suites that runs a model this way."""
    if way == EAGER:
        return "eager"
    if way == INDUCTOR:
        return "max-autotune"
    return "rtx-merged" if device == "cuda" else "rtx"  # packed weights of 4 bits get a layout of their own


class Quantized:
    """A workload's model, quantized, with its inputs and what is right for it.

    Args:
        own: by `torch_rtx.quantize`; otherwise by torchao.
    """

    def __init__(self, setup: common.Setup, form: Format, own: bool) -> None:
        start = time.perf_counter()
        self._setup = setup
        model, self.sets = copy.deepcopy(setup.subject.model), setup.sets
        if own:
            quantize(model, _config(form, setup.workload.size), lambda model: [model(*a, **k) for a, k in self.sets])
        else:
            if form.torchao in ("fp8", "int4"):  # its libraries have these for bfloat16 alone
                model, self.sets = model.bfloat16(), [_in_bfloat16(one) for one in self.sets]
            _by_torchao(model, form.torchao or "", setup.workload.size)
        timing.synchronize(setup.device)
        self.seconds = time.perf_counter() - start
        self.packed_bytes = packed_bytes(model) if own else None
        args, kwargs = self.sets[0]
        self.subject = Subject(model, args, kwargs, setup.subject.folder, setup.device)
        self._eager: dict[int, list[torch.Tensor]] = {}

    rotating = common.Setup.rotating

    def eager(self, index: int) -> list[torch.Tensor]:
        """What the quantized model returns for a set, uncompiled."""
        if index not in self._eager:
            args, kwargs = self.sets[index]
            self._eager[index] = [tensor.clone() for tensor in tensors(self.subject.model(*args, **kwargs))]
        return self._eager[index]

    def check(self, prepared: Prepared, checks: int = common.CHECKS) -> dict[str, float]:
        """The largest errors of a peer, set by set: its `error` against the unquantized model in float64, the
        `quantization_error` of eager against it, and the `distance` from eager.

        Raises:
            WrongResult: an error or a distance is too large, or a result has another form.
        """
        worst = dict.fromkeys(("error", "quantization_error", "distance"), 0.0)
        for index in [*range(common.CHECKED)] * checks:
            args, kwargs = self.sets[index]
            got, eager, (_, exact) = tensors(prepared(*args, **kwargs)), self.eager(index), self._setup.expected(index)
            found = compared(got, eager, exact)
            worst = {name: max(value, found[name]) for name, value in worst.items()}
        return worst


def compared(
    got: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> dict[str, float]:
    """The largest errors over the tensors of a result, see `Quantized.check`.

    Raises:
        WrongResult: as there.
    """
    worst = dict.fromkeys(("error", "quantization_error", "distance"), 0.0)
    if len(got) != len(eager):
        raise common.WrongResult(f"wrong result: {len(got)} tensors, eager returns {len(eager)}")
    for index, (mine, theirs, truth) in enumerate(zip(got, eager, exact, strict=True)):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise common.WrongResult(f"wrong result: output {index} is {mine.dtype}{list(mine.shape)}")
        errors = {
            "quantization_error": relative_error(theirs, truth),
            "error": relative_error(mine, truth),
            "distance": relative_error(mine, theirs.to(truth.dtype)),
        }
        limit = max(APART * errors["quantization_error"], tolerance(mine.dtype))
        for name, value in errors.items():
            if name != "quantization_error" and not value <= limit:
                raise common.WrongResult(f"wrong result: output {index}: {name} {value:.2e}, at most {limit:.2e}")
            worst[name] = max(worst[name], value)
    return worst


def _config(form: Format, size: models.Size) -> Any:
    """What `torch_rtx.quantize` takes; groups fit the narrow models of size small."""
    if form.torchao == "int4":
        return {"*": {"preset": form.config, "weight": {"block": GROUP[size]}}}
    return form.config


def _in_bfloat16(inputs: models.Inputs) -> models.Inputs:
    found: models.Inputs = widened(inputs, torch.bfloat16)
    return found


def _by_torchao(model: nn.Module, name: str, size: models.Size) -> None:
    """Quantize the linear layers in place."""
    from torchao import quantization as ao
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    # The packing of 4 bits is that of PyTorch's own kernel: the others need a library that is not in PyTorch.
    packing = Int4PackingFormat.TILE_PACKED_TO_4D
    configs: Mapping[str, Any] = {
        "fp8": partial(ao.Float8DynamicActivationFloat8WeightConfig, granularity=ao.PerRow()),
        "int8": ao.Int8DynamicActivationInt8WeightConfig,
        "int8 weights": ao.Int8WeightOnlyConfig,
        "int4": partial(ao.Int4WeightOnlyConfig, group_size=GROUP[size], int4_packing_format=packing),
    }
    ao.quantize_(model, configs[name](set_inductor_config=False))


def packed_bytes(model: nn.Module) -> int:
    """What codes and scales of a model's layers take in memory. Embeddings are not among them: few rows are read."""
    bits = 0.0
    for _, layer in quantized_layers(model):
        if not isinstance(layer, nn.Embedding):
            form, weight = layer.quantization.weight, layer.weight
            scales = weight.shape[0] if form.granularity == "channel" else 1
            bits += weight.numel() * form.bits + (0 if form.block else 32 * scales)
    return round(bits / 8)


def forget(device: str) -> None:
    """What the last peer compiled, and its memory."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
