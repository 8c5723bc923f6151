"""`torch-rtx build` of a Hugging Face folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import torch_rtx
from torch_rtx.cli.app import app
from torch_rtx.cli.hugging_face import model_of
from torch_rtx.cli.sources import file_of

transformers = pytest.importorskip("transformers")
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = [("input_ids", ("batch", "sequence")), ("attention_mask", ("batch", "sequence"))]


def folder_of(kind: str, folder: Path, weights: bool = False, **values: Any) -> Path:
    """A folder with a model of this class."""
    cls = getattr(transformers, kind)
    config = cls.config_class(**values)
    config.architectures = [kind]
    if weights:
        cls(config).save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def build(*given: object) -> Result:
    return CliRunner().invoke(app, ["build", *map(str, given), "--device", "cpu"])


def test_build(tmp_path: Path) -> None:
    """The engine takes the weights of the folder."""
    folder = folder_of("LlamaForCausalLM", tmp_path / "tiny", True, vocab_size=20, **TINY)
    sizes = ("--size", "batch=1", "--size", "sequence=2:8:16")
    done = build(folder, *sizes)
    assert done.exit_code == 0, done.output
    engine = torch_rtx.load(tmp_path / "tiny.rtx", weights=folder)
    given = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(engine(**given).logits, model(**given).logits)
    assert torch_rtx.inspect(tmp_path / "tiny.rtx").inputs["input_ids"] == "i64[1, sequence]"


@pytest.mark.parametrize(
    ("kind", "values", "inputs"),
    [
        ("BertModel", {"vocab_size": 20, **TINY}, TEXT),
        (
            "T5ForConditionalGeneration",
            {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
            [*TEXT, ("decoder_input_ids", ("batch", "decoder_sequence"))],
        ),
        (
            "ViTForImageClassification",
            {"image_size": 32, "patch_size": 16, **TINY},
            [("pixel_values", ("batch", 3, 32, 32))],
        ),
        (
            "ResNetModel",
            {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
            [("pixel_values", ("batch", 3, "height", "width"))],
        ),
    ],
)
def test_inputs(kind: str, values: dict[str, Any], inputs: list[Any], tmp_path: Path) -> None:
    """Those that the model takes; weights are not needed for a stripped engine."""
    model, found = model_of(folder_of(kind, tmp_path, **values), torch.float16)
    assert [(value.name, value.shape) for value in found] == inputs
    assert model.dtype == torch.float16
    assert not model.training


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({}, (), "a model without architectures"),
        ({"architectures": ["Unheard"]}, (), "of the architecture 'Unheard', which this transformers lacks"),
        ({"architectures": ["BertModel"], "hidden_size": "x"}, (), "transformers can't make the model"),
        ({"architectures": ["BertModel"], **TINY}, ("--no-strip",), "has no weights"),
        ({"architectures": ["BertModel"], **TINY}, (), "leaves the sizes batch, sequence open"),
        ({"architectures": ["BertModel"], **TINY}, ("--opt-shapes", "foo:1"), "the model has no input 'foo'"),
        ({"architectures": ["BertModel"], **TINY}, ("--fix", "x=1"), "--fix is for ONNX models"),
    ],
)
def test_mistakes(config: dict[str, Any], given: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 20, **config}))
    done = build(tmp_path, *given, "--out", tmp_path / "a.rtx")
    assert (done.exit_code, message in done.output) == (1, True), done.output


def test_a_damaged_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    done = build(tmp_path, "--out", tmp_path / "a.rtx")
    assert (done.exit_code, "config.json can't be read" in done.output) == (1, True)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = build(tmp_path, "--out", tmp_path / "a.rtx")
    assert done.exit_code == 1
    assert "is a model of transformers, which is not installed\n  pip install transformers" in done.output


def test_where_engines_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.b").mkdir()
    (tmp_path / "a.b" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "a.b")
    assert file_of(f"{tmp_path}/a.b/", ".rtx") == file_of(".", ".rtx") == tmp_path / "a.b.rtx"
