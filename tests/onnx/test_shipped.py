"""Models from packages on real inputs: the same results, and the same answers, as from onnxruntime on a CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("onnx_ir")
pytest.importorskip("transformers")  # of the model zoo

import torch_rtx
from benchmarks.exports import for_gpu, work
from benchmarks.shipped import FOLDER, MODELS, Model, windows
from torch_rtx.onnx.module import from_onnx

DTYPES = [torch.float32, torch.float16]


def found(model: Model) -> Path:
    """The model's file, and what says what its results should be."""
    if FOLDER not in os.environ:
        pytest.importorskip("onnxruntime")
    path = model.path()
    if path is None:
        pytest.skip(f"no package {model.package}, nor {FOLDER}; see CONTRIBUTING.md")
    return path


def same(name: str, outputs: list[Tensor], wanted: list[np.ndarray], path: Path, dtype: torch.dtype) -> None:
    """Raises AssertionError if results, or what a user reads from them, are not those of onnxruntime."""
    model, results = MODELS[name], [y.float().cpu().numpy() for y in outputs]
    for result, expected in zip(results, wanted, strict=True):
        most = np.abs(expected).max()
        atol = model.atol if dtype is torch.float32 else model.half_atol
        np.testing.assert_allclose(result, expected, rtol=0, atol=atol * most)
    answer, right = (model.answer(path, arrays) for arrays in (results, wanted))
    assert right
    assert model.right is None or right == model.right
    if dtype is torch.float32 or name != "det":
        assert answer == right
    else:  # boxes may begin one pixel elsewhere
        assert np.shape(answer) == np.shape(right)
        assert np.abs(np.subtract(answer, right)).max() <= 1


# Convolutions of float32 multiply in TF32 otherwise.
EXACT = partial(torch.backends.cudnn.flags, enabled=True, allow_tf32=False)
# Launches of attention, of library calls that copy, and of others.
WORK = {
    "det": (0, 1, 0),
    "rec": (2, 1, 0),
    "cls": (0, 1, 0),
    "silero": (0, 0, 0),
    "magika": (0, 0, 0),
    "pitch": (0, 0, 0),
    "minilm": (6, 0, 0),
    "nsfw": (0, 0, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_answers(name: str) -> None:
    """The graph that a GPU has, run call by call: it is right, and attention is attention."""
    path = found(MODELS[name])
    inputs, wanted = MODELS[name].expected(path)
    args = tuple(map(torch.from_numpy, inputs))
    engine = for_gpu(from_onnx(path, MODELS[name].fixed), args)
    results = engine(*args)
    same(name, [results] if isinstance(results, Tensor) else list(results), wanted, path, torch.float32)
    counts = work(engine.engine.graph)
    attention = sum(count for kind, count in counts.items() if kind.startswith("attention"))
    calls = sum(count for kind, count in counts.items() if "." in kind)
    copies = counts["aten.clone.default"]
    assert (attention, copies, calls - copies) == WORK[name]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_answers_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]
    path = found(model)
    inputs, wanted = model.expected(path)
    whole = dtype if model.half else torch.float32
    module = from_onnx(path, model.fixed).to("cuda", whole)
    args = [torch.from_numpy(x).cuda() for x in inputs]
    args = [x.to(whole) if x.is_floating_point() else x for x in args]
    with EXACT(), torch.autocast("cuda", dtype, enabled=dtype is not whole):
        results = torch_rtx.compile(module, tuple(args))(*args)
    same(name, [results] if isinstance(results, Tensor) else list(results), wanted, path, dtype)


# ---- one network in two files ----------------------------------------------------------------------------------------


class Silero(nn.Module):
    """Silero VAD for 16 kHz: a window of sound (1, 576) and a state (2, 1, 128) to a probability and a new state."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = self.stft_conv(F.pad(x, (0, 64), "reflect")[:, None]).chunk(2, 1)
        y = (real**2 + imaginary**2).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = layer(y).relu()
        h, c = self.lstm_cell(y.squeeze(-1), (state[0], state[1]))
        return self.final_conv(h.relu()[..., None]).sigmoid().mean(-1), torch.stack((h, c))


NAMES = {
    "model.stft.forward_basis_buffer": "stft_conv.weight",
    "model.encoder.0.reparam_conv": "conv1",
    "model.encoder.1.reparam_conv": "conv2",
    "model.encoder.2.reparam_conv": "conv3",
    "model.encoder.3.reparam_conv": "conv4",
    "model.decoder.rnn": "lstm_cell",
    "model.decoder.decoder.2": "final_conv",
}


def renamed(names: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of the safetensors file by those of the ONNX file."""
    pairs = ((name, next(start for start in NAMES if name.startswith(start))) for name in names)
    return {name: NAMES[start] + name.removeprefix(start) for name, start in pairs}


def engines_agree(device: str) -> None:
    """Raises AssertionError if the engines of both files differ: with the weights of the ONNX file, and refitted with
    those of the other, which are of another training."""
    folder = found(MODELS["silero"]).parent
    read = from_onnx(folder / "silero_vad_16k_op15.onnx", {"sr": 16000})
    names, module = renamed(read.state_dict()), Silero()
    module.load_state_dict({names[name]: tensor for name, tensor in read.state_dict().items()})
    sound = torch.from_numpy(windows()[26:42]).to(device)
    state = torch.zeros(2, 1, 128, device=device)
    engines = [torch_rtx.compile(model.to(device), (sound[:1], state)) for model in (read, module.eval())]
    first = probabilities(engines, sound, state)
    other = load_file(folder / "silero_vad_16k.safetensors")
    engines[0].refit({name: other[names[name]] for name in names})
    engines[1].refit(other)
    assert probabilities(engines, sound, state) != pytest.approx(first, abs=1e-2)


def probabilities(engines: list[torch_rtx.CompiledModule], sound: Tensor, state: Tensor) -> list[float]:
    """What both engines say of each window, which must be the same."""
    states, said = [state, state], []
    for window in sound.split(1):
        results = [engine(window, state) for engine, state in zip(engines, states, strict=True)]
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
        states = [state for _, state in results]
        said.append(results[0][0].item())
    assert max(said) > 0.9
    assert min(said) < 0.1
    return said


def test_silero_in_two_files() -> None:
    engines_agree("cpu")


@pytest.mark.gpu
def test_silero_in_two_files_on_a_gpu() -> None:
    with EXACT():
        engines_agree("cuda")
