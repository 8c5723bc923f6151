"""What users bring along, inside of compiled code: flex_attention, a loop over tokens, and a kernel of their own.

    python -m benchmarks.user_programs [flex|loop|launch ...] [--cases causal,...] [--size full|small] [--json FILE]

`flex`: flex_attention of float16 operands [4, 16, 4096, 64 or 128] beside PyTorch's compiled one, forward and gradients
of query, key and value; errors are those of one head, to float64, relative to the norm; `--cases` selects some of the
modifications. `loop`: `while_loop` that makes 64 tokens in one CUDA graph, beside 64 calls of an engine of one step.
`launch`: an engine of a Triton kernel beside one of the kernel that is generated for the same sum. Times are medians on
the device. Without a GPU only `loop` runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._higher_order_ops import while_loop
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import torch_rtx
from benchmarks import timing

ROUNDS = 8
PEERS = ("rtx", "inductor")
CASES = ("causal", "window", "alibi", "documents")
TOKENS = 64
Row = dict[str, Any]


def median_ms(calls: Mapping[str, timing.Call], device: str) -> dict[str, float]:
    """Of calls that take turns."""
    clock = "device_ms" if device == "cuda" else "wall_ms"
    found = timing.interleaved(calls, device, ROUNDS if device == "cuda" else 1, lambda name: None)
    return {name: statistics.median(ms for one in times[clock] for ms in one) for name, times in found.items()}


def ready(call: timing.Call) -> None:
    """Let what is compiled in the background take its place."""
    for _ in range(2):
        for _ in range(4):
            call()
        torch_rtx.wait(60)
    call()


def flex(device: str, small: bool, cases: Sequence[str] = CASES) -> list[Row]:
    """A row for each modification and width of heads."""
    batch, heads, length = (2, 2, 256) if small else (4, 16, 4096)
    slopes = (2.0 ** -torch.arange(1, heads + 1, device=device) / 2).float()
    documents = (torch.arange(length, device=device) // (length // 8)).expand(batch, length).contiguous()

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    modifications: dict[str, tuple[Callable[..., Tensor] | None, Callable[..., Tensor]]] = {
        "causal": (None, causal),
        "window": (None, lambda b, h, q, k: (q >= k) & (q - k < length // 4)),
        "alibi": (lambda score, b, h, q, k: score + (k - q) * slopes[h], causal),
        "documents": (None, lambda b, h, q, k: (q >= k) & (documents[b, q] == documents[b, k])),
    }
    rows = []
    for width in (64,) if small else (64, 128):
        for name in cases:
            score_mod, mask_mod = modifications[name]
            per_batch = batch if name == "documents" else None
            mask = create_block_mask(mask_mod, per_batch, None, length, length, device=device)
            shape = (batch, heads, length, width)
            rows.append({"case": f"{name} {width}", **_attention(shape, score_mod, mask, device)})
            print(_flex_text(rows[-1]), flush=True)
    return rows


def _attention(shape: tuple[int, ...], score_mod: Any, mask: Any, device: str) -> Row:
    """Milliseconds of each peer, forward and backward, and its errors."""
    torch.manual_seed(0)
    functorch_config.donated_buffer = False  # Inductor's backward would refuse to run again
    dtype = torch.float16 if device == "cuda" else torch.float32
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    upstream = torch.randn(shape, device=device, dtype=dtype)
    calls: dict[str, Callable[..., Tensor]] = {}
    forward: dict[str, timing.Call] = {}
    backward: dict[str, timing.Call] = {}
    errors = {}
    exact = _exact(query, key, value, upstream, score_mod, mask)

    def run(peer: str) -> Tensor:
        with torch.no_grad():
            return calls[peer](query, key, value)

    def step(peer: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(calls[peer](query, key, value), (query, key, value), upstream)

    torch._dynamo.reset()  # not for each peer: what the first one has compiled would be gone when it is measured
    for peer in PEERS:  # ours first: it compiles in another process, and measures kernels, while Inductor compiles here
        calls[peer] = torch.compile(
            lambda q, k, v: flex_attention(q, k, v, score_mod=score_mod, block_mask=mask), backend=peer
        )
        run(peer)
        step(peer)
    for peer in PEERS:
        forward[peer] = partial(run, peer)
        ready(forward[peer])
        ready(partial(step, peer))
        result = calls[peer](query, key, value)
        backward[peer] = partial(torch.autograd.grad, result, (query, key, value), upstream, retain_graph=True)
        ready(backward[peer])
        errors[peer] = [
            _error(one[0, 0], wanted) for one, wanted in zip((run(peer), *backward[peer]()), exact, strict=True)
        ]
    return {"forward": median_ms(forward, device), "backward": median_ms(backward, device), "errors": errors}


def _exact(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, score_mod: Any, mask: Any) -> list[Tensor]:
    """The result and the gradients of the first head, in float64."""
    q, k, v = (one[0, 0].detach().double().requires_grad_() for one in (query, key, value))
    rows, columns = torch.arange(len(q), device=q.device)[:, None], torch.arange(len(k), device=q.device)
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if score_mod is None else score_mod(scores, zero, zero, rows, columns)
    result = torch.where(mask.mask_mod(zero, zero, rows, columns), scores, -torch.inf).softmax(-1) @ v
    return [result, *torch.autograd.grad(result, (q, k, v), upstream[0, 0].double())]


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _flex_text(row: Row) -> str:
    parts = []
    for name in ("forward", "backward"):
        ours, theirs = (row[name][peer] for peer in PEERS)
        parts.append(f"{name} {ours:.3f} ms, PyTorch's {theirs:.3f}: {theirs / ours:.2f}x")
    return f"{row['case']:14} {'; '.join(parts)}; errors {' '.join(f'{one:.0e}' for one in row['errors']['rtx'])}"


class Step(nn.Module):
    """A token from a token."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(4096, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, token: Tensor) -> Tensor:
        x = self.table(token)
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(self.norm(x)))
        return (x @ self.table.weight.t()).argmax(-1)


class Decode(nn.Module):
    """TOKENS of them. The number of the token is on the device."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, token: Tensor) -> Tensor:
        number = torch.zeros((1,), dtype=torch.int64, device=token.device)
        made = torch.zeros((TOKENS, 1), dtype=torch.int64, device=token.device)

        def again(number: Tensor, token: Tensor, made: Tensor) -> Tensor:
            return (number < TOKENS).all()

        def once(number: Tensor, token: Tensor, made: Tensor) -> tuple[Tensor, ...]:
            token = self.step(token)
            return number + 1, token, made.index_copy(0, number, token.reshape(1, 1))

        result: Tensor = while_loop(again, once, (number, token, made))[2]
        return result


def loop(device: str, small: bool) -> list[Row]:
    """Milliseconds of a loop, and of as many calls of its step."""
    torch.manual_seed(0)
    step = Step(*(32, 2) if small else (4096, 32)).to(device, torch.float16 if device == "cuda" else torch.float32)
    token = torch.tensor([7], device=device)
    with torch.no_grad():
        one, all_ = torch_rtx.compile(step, (token,)), torch_rtx.compile(Decode(step), (token,))

        def steps() -> list[Tensor]:
            made = [token]
            for _ in range(TOKENS):
                made.append(one(made[-1]))
            return made[1:]

        calls: dict[str, timing.Call] = {"while_loop": lambda: all_(token), "steps": steps}
        for call in calls.values():
            ready(call)
        same = torch.equal(all_(token).flatten(), torch.cat(steps()))
        row = {"case": f"while_loop of {TOKENS} tokens", **median_ms(calls, device), "same tokens": same}
    print(f"{row['case']}: {row['while_loop']:.3f} ms, of its step {row['steps']:.3f}", end="")
    print(f": {row['while_loop'] / row['steps']:.3f}; same tokens: {same}", flush=True)
    return [row]


@triton.jit
def scaled_sum(x, y, out, n, alpha, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + alpha * tl.load(y + at, mask=inside), mask=inside)


class Sum(nn.Module):
    """A scaled sum by the user's kernel, or by PyTorch's operators."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.own:
            return x + 0.5 * y
        out = torch.empty_like(x)
        scaled_sum[(triton.cdiv(x.numel(), 1024),)](x, y, out, x.numel(), 0.5, BLOCK=1024)
        return out


def launch(device: str, small: bool) -> list[Row]:
    """Microseconds of an engine of one kernel: the user's, and a generated one."""
    x, y = (torch.randn(64 if small else 4096, 40, device=device) for _ in range(2))
    calls: dict[str, timing.Call] = {}
    for name, own in (("the user's", True), ("generated", False)):
        module = torch_rtx.compile(Sum(own), (x, y))
        calls[name] = lambda module=module: module(x, y)  # type: ignore[misc]
        ready(calls[name])
        torch.testing.assert_close(calls[name](), x + 0.5 * y)
    found = {name: 1e3 * ms for name, ms in median_ms(calls, device).items()}
    print("an engine of one kernel:", ", ".join(f"{name} {us:.2f} us" for name, us in found.items()), flush=True)
    return [{"case": "launch", **found}]


PROGRAMS: dict[str, Callable[[str, bool], list[Row]]] = {"flex": flex, "loop": loop, "launch": launch}


def _cases(text: str) -> list[str]:
    found = text.split(",")
    if unknown := sorted({*found} - {*CASES}):
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Measure; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", choices=[*PROGRAMS, []])
    parser.add_argument("--cases", type=_cases, default=CASES, metavar="NAME,...", help=f"of flex: {', '.join(CASES)}")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    rows = {}
    programs = PROGRAMS | {"flex": partial(flex, cases=given.cases)}
    for name in given.programs or PROGRAMS:
        if given.device != "cuda" and name != "loop":
            print(f"{name}: needs a GPU")
            continue
        rows[name] = programs[name](given.device, given.size == "small")
    for part in ("forward", "backward"):
        ratios = [row[part]["inductor"] / row[part]["rtx"] for row in rows.get("flex", ())]
        if ratios:
            print(f"flex, geometric mean {part}: {math.prod(ratios) ** (1 / len(ratios)):.2f}x of PyTorch's")
    if given.json is not None:
        given.json.write_text(json.dumps({"time": time.time(), "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
