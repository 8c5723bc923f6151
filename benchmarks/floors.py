"""What the device can do at most, and what a model needs at least; `report.floor_ms` makes the least time of them.

A call can be no faster than its FLOPs at the measured rate of a large matrix product, nor than moving its compulsory
bytes (each weight that it reads, its inputs and outputs, once) at the measured rate of a large copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing

# Bytes of the copied buffer, and sides of the square matrices, by device: large enough that neither caches nor the
# launch matter, small enough for a second.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}
REPEATS = 10


def device_rates(device: str) -> dict[str, Any]:
    """Measured rates: `bytes_per_s` of a copy, read and written bytes counted, and `flops_per_s` by dtype."""

    def seconds(call: timing.Call) -> float:
        timing.warm_up(call, device)
        if device == "cuda":
            return timing.summary(timing.device_ms(call, REPEATS))["median"] / 1e3
        return timing.summary(timing.wall_ms(call, REPEATS, device))["median"] / 1e3

    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source))
    rates, side = {}, MATMUL_SIDE[device]
    for dtype in DTYPES[device]:
        # Random numbers: on zeros a GPU draws less power and is faster than on any real data.
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> Tensor:
            return torch.mm(a, b, out=out)

        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds(product)
    return {"bytes_per_s": copied, "flops_per_s": rates}


class _Reads(TorchDispatchMode):
    """Which of `tensors` are read as a whole, and how many bytes of the others are looked up."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {id(tensor) for tensor in tensors}
        self.whole: set[int] = set()
        self.looked_up: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} & self._known
        if func is torch.ops.aten.embedding.default and used:
            self.looked_up[id(args[0])] = self.looked_up.get(id(args[0]), 0) + result.nbytes
        else:
            self.whole |= used
        return result


def work(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, int]:
    """`flops` and compulsory `bytes` of one call; everything may be on the `meta` device.

    FLOPs are those of matrix products, convolutions and attention, a multiplication and an addition counted as two.
    Bytes are a lower bound: of a table only the rows that are looked up count, and caches do not count.
    """
    kept = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    # PyTorch counts no FLOPs in the CPU's fused attention; as plain products every device has the same.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as flops,
        _Reads(list(kept.values())) as reads,
    ):
        result = model(*args, **kwargs)
    weights = sum(kept[i].nbytes for i in reads.whole)
    rows = sum(min(n, kept[i].nbytes) for i, n in reads.looked_up.items() if i not in reads.whole)
    passed = {id(leaf): leaf.nbytes for leaf in pytree.tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
    return {"flops": flops.get_total_flops(), "bytes": weights + rows + sum(passed.values())}
