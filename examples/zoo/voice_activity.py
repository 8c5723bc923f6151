"""When does somebody speak? Silero VAD from its ONNX file, window by window as from a microphone; needs onnx_ir.

    pip install --no-deps silero-vad pyannote.audio    # the model, and a conversation of 30 seconds
    python examples/zoo/voice_activity.py [--sound FILE.wav]

The model of the package becomes an engine for one window of 32 ms, which is called with the state that the last call
returned. Without a recording, noise and a voice are made up. The picture shows the sound above the probabilities.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, beside, described, options, package, parsed, picture, recording, right, timed, verdict
from torch import Tensor

import torch_rtx

RATE, WINDOW, BEFORE = 16000, 512, 64  # samples: per second, of a window, and of what is read again before it
FORMANTS = (730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410), (530, 1840, 2480)  # of four vowels, in Hz


def voice() -> Tensor:
    """A second of noise, and a second of vowels: pulses of a glottis through the resonances of a mouth."""
    time = torch.arange(RATE) / RATE
    pitch = 120 + 15 * torch.sin(8 * torch.pi * time)
    pulses = torch.floor(torch.cumsum(pitch, 0) / RATE).diff(prepend=torch.zeros(1))
    parts = []
    for part, vowel in zip(pulses.repeat(2).chunk(8)[4:], FORMANTS, strict=True):
        spectrum = torch.fft.rfft(part)
        delay = torch.exp(-2j * torch.pi * torch.arange(len(spectrum)) / len(part))
        for frequency in vowel:
            pole = 0.98 * np.exp(2j * np.pi * frequency / RATE)
            spectrum = spectrum / ((1 - pole * delay) * (1 - pole.conjugate() * delay))
        parts.append(torch.fft.irfft(spectrum, len(part)))
    spoken = torch.cat(parts)
    noise = 1e-3 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, 0.3 * spoken / spoken.abs().max()])


def listen(call: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], windows: Tensor) -> Tensor:
    """The probability of each window (windows, 1, 576) that somebody speaks. Nothing waits for the GPU meanwhile."""
    state, found = windows.new_zeros(2, 1, 128), []
    for window in windows:
        probability, state = call(window, state)
        found.append(probability.flatten())
    return torch.cat(found)


def curve(sound: Tensor, probabilities: Tensor, height: int = 80) -> Tensor:
    """A picture (3, 2 height, windows): the loudest sample of each window, and below it the probability."""
    loud = sound[: len(probabilities) * WINDOW].reshape(-1, WINDOW).abs().amax(1).sqrt()
    rows = torch.linspace(1, 0, height)[:, None]
    waves, bars = rows < loud.cpu(), rows < probabilities.float().cpu()
    picture = torch.cat([waves, bars]).float().expand(3, -1, -1).clone()
    picture[0, height:] *= 0.9
    picture[2, height:] *= 0.2
    return picture


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "voice_activity")
    parser.add_argument("--sound", type=Path, help="a WAV file")
    given = parsed(parser, arguments)
    file = package("silero_vad", "data/silero_vad_16k_op15.onnx")
    if file is None:
        raise SystemExit("pip install --no-deps silero-vad")
    sound = recording(given.sound)
    sound = voice() if sound is None else sound
    windows = torch.nn.functional.pad(sound, (BEFORE, 0)).unfold(0, WINDOW + BEFORE, WINDOW)[:, None].to(DEVICE)
    model = torch_rtx.from_onnx(file, fixed={"sr": RATE}).to(DEVICE)
    described(model, f"the weights of {file.name}")
    engine = torch_rtx.compile(model, (windows[0], torch.zeros(2, 1, 128, device=DEVICE)))

    found, compiled = timed(lambda: listen(engine, windows), given.patience)
    expected, eager = timed(lambda: listen(model, windows), times=1)
    beside("a window of 32 ms", compiled / len(windows), eager / len(windows))
    right("probabilities", found, expected, listen(copy.deepcopy(model).double(), windows.double()))
    speech = torch.nn.functional.pad((found > 0.5).int(), (1, 1))
    times = (speech.diff().nonzero().flatten() * WINDOW / RATE).tolist()
    spans = [f"{start:.1f} to {end:.1f} s" for start, end in zip(times[::2], times[1::2], strict=True)]
    verdict(f"speech in {', '.join(spans)}", bool(spans) and torch.equal(found > 0.5, expected > 0.5))
    picture(given.out / "speech.png", curve(sound, found))
    print(f"{len(sound) / RATE:.0f} s of sound in {compiled:.2f} s; {given.out / 'speech.png'}")


if __name__ == "__main__":
    main()
