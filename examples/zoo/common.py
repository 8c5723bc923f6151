"""What the examples in this folder share: their options, how they measure time, and when a result counts as right."""

from __future__ import annotations

import argparse
import copy
import time
import warnings
import wave
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import torch_rtx

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
NOISE = 1e-6  # of float32: nobody counts multiples of an error below
Result = TypeVar("Result")
torch.backends.cudnn.allow_tf32 = False  # float32 is float32, also in convolutions
warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)  # torch.export's own


def options(doc: str | None, folder: str) -> argparse.ArgumentParser:
    """`--size`, `--out` and `--patience`; an example adds its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "real"), default="real" if ON_GPU else "tiny")
    parser.add_argument("--out", type=Path, default=Path(folder), help="a folder for what there is to look at")
    parser.add_argument(
        "--patience", type=float, default=600, help="seconds to wait for kernels before times are taken"
    )
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with a folder that exists."""
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def package(name: str, file: str) -> Path | None:
    """A file of an installed package, which is not imported; None, and a line that says so, without it."""
    spec = find_spec(name)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, file)).exists():
            return path
    print(f"no package {name} ({file}) is installed: what it would give is made up")
    return None


def recording(file: Path | None, seconds: int = 30) -> Tensor | None:
    """The beginning of a WAV file, or of the conversation of a package: 16000 samples per second from -1 to 1; None
    without either."""
    file = file or package("pyannote", "audio/sample/sample.wav")
    if file is None:
        return None
    with wave.open(str(file)) as sound:
        if (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) != (16000, 1, 2):
            raise SystemExit(f"{file}: needs 16000 samples of 16 bits per second, of one channel")
        samples = np.frombuffer(sound.readframes(seconds * 16000), np.int16)
    return torch.from_numpy(samples / np.float32(32768))


def described(model: nn.Module, weights: str = "random weights") -> None:
    """Print what runs, and where."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"{type(model).__name__}: {parameters / 1e6:.3g} million parameters, {weights}, {dtype}, {DEVICE}")


def timed(call: Callable[[], Result], patience: float = 0, times: int = 3) -> tuple[Result, float]:
    """What a call returns, and the median of its seconds once nothing is being compiled any more; `patience` says how
    many seconds to wait for that."""
    end, ready = time.perf_counter() + patience, True
    for _ in range(3 if ON_GPU else 1):  # libraries choose algorithms, kernels are compiled, a CUDA graph is captured
        result = call()
        ready = not patience or torch_rtx.wait(timeout=max(0, end - time.perf_counter()))
    if not ready:
        print("kernels are still being compiled: calls become faster than this")
    seconds = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        result = call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return result, sorted(seconds)[times // 2]


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def beside(what: str, compiled: float, eager: float) -> None:
    """Print both times."""
    print(f"{what}: {1e3 * compiled:.2f} ms, in eager mode {1e3 * eager:.2f} ms: {eager / compiled:.2f}x")


def exactly(model: nn.Module, *args: Any) -> Any:
    """What a model computes in float64."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.compiler.set_stance("force_eager"):
        return copy.deepcopy(model).double()(*tree_map(wide, args))


def right(what: str, compiled: Tensor, eager: Tensor, exact: Tensor, than: str = "float64") -> None:
    """Print how far both results are from an exact one, as a share of its largest value, and end the example if the
    compiled one is more than twice as far as that of eager mode."""
    ours, own = ((x.double() - exact).abs().max().item() / exact.abs().max().item() for x in (compiled, eager))
    verdict(f"{what}: {ours:.1g} from {than}, eager mode {own:.1g}", ours <= max(2 * own, NOISE))


def verdict(line: str, fine: bool) -> None:
    """Print a comparison; end the example where it is not fine."""
    print(f"{line}: {'right' if fine else 'WRONG'}")
    if not fine:
        raise SystemExit(1)


def same_tokens(model: Any, start: Tensor, compiled: Tensor, eager: Tensor) -> None:
    """Print whether two texts of the best tokens are the same. Where they part, both tokens have to be equally good, as
    far as eager mode can tell: its scores err by more than those of the two differ.

    Args:
        model: gives the scores of the next token, `.logits (1, length, vocabulary)`, for tokens (1, length).
        start: the tokens of the prompt (1, n).
        compiled, eager: the tokens that follow (1, m).
    """
    if torch.equal(compiled, eager):
        return verdict(f"{eager.shape[1]} tokens, the same as in eager mode", True)
    common = min(compiled.shape[1], eager.shape[1])
    place = int((compiled[0, :common] != eager[0, :common]).int().argmax())
    tokens = torch.cat([start, eager[:, :place]], 1)
    exact = exactly(model, tokens).logits[0, -1]
    with torch.compiler.set_stance("force_eager"):
        error = (model(tokens).logits[0, -1] - exact).abs().max().item()
    gap = (exact[compiled[0, place]] - exact[eager[0, place]]).abs().item()
    line = f"texts part at {place} of {common}, where scores differ by {gap:.1g} and eager mode errs by {error:.1g}"
    return verdict(line, 0 < gap <= 4 * error)


def picture(path: Path, image: Tensor) -> None:
    """Write an image (3, height, width) with values from 0 to 1."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
