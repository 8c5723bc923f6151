"""What users get wrong: each mistake is an error of its own type that says what, where and what to do, in few lines."""

from __future__ import annotations

import io
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torch_rtx
from torch_rtx.errors import (
    CaptureError,
    EngineFormatError,
    EnginePlatformError,
    InputError,
    QuantizationError,
    RefitError,
    RtxError,
    SettingsError,
)
from torch_rtx.targets import parse_targets

X = torch.ones(2, 4)
OTHER = "linux" if sys.platform == "win32" else "windows"


class Scaled(nn.Module):
    """Takes a number beside its tensor."""

    def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        return x if scale is None else scale * x


@dataclass
class Place:
    """A folder with an engine `model.rtx` of a model, and the model.

    Attributes:
        ranged: takes sizes of 1 to 8, and the default of the number.
        fixed: was built for the number 2.
    """

    folder: Path
    model: nn.Module
    engine: torch_rtx.CompiledModule
    ranged: torch_rtx.CompiledModule
    fixed: torch_rtx.CompiledModule

    def __truediv__(self, name: str) -> str:
        return str(self.folder / name)

    def load(self, **kwargs: object) -> torch_rtx.CompiledModule:
        return torch_rtx.load(self / "model.rtx", **kwargs)  # type: ignore[arg-type]

    def state(self, prefix: str = "") -> dict[str, torch.Tensor]:
        return {prefix + name: tensor for name, tensor in self.model.state_dict().items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    batch = torch_rtx.Input(min_shape=(1, 4), opt_shape=(2, 4), max_shape=(8, 4), shared_dims={0: "batch"})
    engines = (
        torch_rtx.compile(model, (X,)),
        torch_rtx.compile(Scaled(), (batch,)),
        torch_rtx.compile(Scaled(), (X, 2.0)),
    )
    found = Place(tmp_path_factory.mktemp("mistakes"), model, *engines)
    torch_rtx.save(found.engine, found / "model.rtx")
    other = torch_rtx.compile(Scaled(), (X,), platform=OTHER)
    torch_rtx.save(other, found / "other.rtx")
    whole = Path(found / "model.rtx").read_bytes()
    Path(found / "short.rtx").write_bytes(whole[:100])
    Path(found / "bad.rtx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    torch.save(model.state_dict(), found / "model.pt")
    save_file(model.state_dict(), found / "w.st")
    (found.folder / "empty").mkdir()
    return found


def rtx(**options: object) -> object:
    return torch.compile(torch.relu, backend="rtx", options=options)(X)


# Name, call, type of the error, what it says, what to do.
MISTAKES: list[tuple[str, Callable[[Place], object], type[Exception], str, str]] = [
    # options
    ("misspelt option", lambda p: rtx(min_blok_size=3), SettingsError, "min_blok_size", "did you mean min_block_size?"),
    ("of Inductor", lambda p: rtx(**{"triton.cudagraphs": True}), SettingsError, "triton.c", "cuda_graph_strategy"),
    ("of Inductor", lambda p: rtx(max_autotune=True), SettingsError, "max_autotune", "specialization_strategy"),
    (
        "of Torch-TensorRT",
        lambda p: torch_rtx.CompilationSettings(enabled_precisions={torch.half}),  # type: ignore[call-arg]
        SettingsError,
        "unknown option enabled_precisions",
        "model.half()",
    ),
    (
        "of the other kind",
        lambda p: torch_rtx.CompilationSettings(tactics="library"),  # type: ignore[call-arg]
        SettingsError,
        "unknown option tactics",
        "an option of RuntimeSettings",
    ),
    (
        "a dictionary",
        lambda p: torch_rtx.compile(p.model, (X,), settings={"device": "cpu"}),  # type: ignore[arg-type]
        SettingsError,
        "settings must be a CompilationSettings, not dict",
        "settings=torch_rtx.CompilationSettings(device='cpu')",
    ),
    (
        "the wrong settings",
        lambda p: p.load(settings=torch_rtx.CompilationSettings()),
        SettingsError,
        "must be a RuntimeSettings",
        "RuntimeSettings(...)",
    ),
    (
        "the wrong runtime settings",
        lambda p: torch_rtx.compile(p.model, (X,), runtime=torch_rtx.CompilationSettings()),  # type: ignore[arg-type]
        SettingsError,
        "runtime must be a RuntimeSettings",
        "runtime=torch_rtx.RuntimeSettings(...)",
    ),
    (
        "an SM version that is not known",
        lambda p: torch_rtx.CompilationSettings(targets="sm_999"),
        SettingsError,
        "unknown target 'sm_999'",
        '"ptx" (also compute_80, ...; newer GPUs run it)',
    ),
    (
        "an SM version that is too old",
        lambda p: torch_rtx.CompilationSettings(targets="sm_70"),
        SettingsError,
        "'sm_70' is older than the GPUs that kernels are built for",
        "sm_75, Turing, is the oldest",
    ),
    ("a GPU that is too old", lambda p: torch_rtx.CompilationSettings(targets="V100"), SettingsError, "'V100'", "T4"),
    (
        "one GPU of several",
        lambda p: torch_rtx.CompilationSettings(device="cuda:1"),
        SettingsError,
        "option device must be None",
        'load(path, device="cuda:1")',
    ),
    ("another type", lambda p: rtx(min_block_size="3"), SettingsError, "min_block_size must be an int", "not '3'"),
    (
        "no such mode",
        lambda p: torch.compile(torch.relu, backend="rtx", mode="fast")(X),
        SettingsError,
        "'fast'",
        "max-",
    ),
    (
        "no such strategy",
        lambda p: torch_rtx.RuntimeSettings(specialization_strategy="never"),
        SettingsError,
        "specialization_strategy must be 'lazy'",
        "not 'never'",
    ),
    (
        "no budget",
        lambda p: torch_rtx.RuntimeSettings(weight_streaming_budget="lots"),
        SettingsError,
        '"2GiB"',
        "not 'lots'",
    ),
    (
        "over all",
        lambda p: torch_rtx.RuntimeSettings(weight_streaming_budget="150%"),
        SettingsError,
        '"50%"',
        "not '150%'",
    ),
    (
        "no such operator",
        lambda p: torch_rtx.compile(p.model, (X,), torch_executed_ops=["aten.softmux"]),
        SettingsError,
        "no operator aten.softmux",
        "names look like aten.exp",
    ),
    (
        "no such pass",
        lambda p: torch_rtx.compile(p.model, (X,), disabled_passes=["fuze"]),
        SettingsError,
        "unknown passes fuze",
        "the passes are simplify",
    ),
    (
        "of runtime settings",
        lambda p: torch_rtx.runtime_settings(static_outputs=True).__enter__(),
        SettingsError,
        "static_outputs can't be changed per call",
        "cuda_graph_strategy can",
    ),
    ("no GPU here", lambda p: parse_targets("current"), SettingsError, "needs a CUDA GPU", 'such as "RTX 4090"'),
    ("no name", lambda p: torch_rtx.CompilationSettings(2), SettingsError, "given by name", "2 has none"),
    (
        "an object of settings",
        lambda p: torch.compile(torch.relu, backend="rtx", options=torch_rtx.RuntimeSettings())(X),  # type: ignore[arg-type]
        SettingsError,
        "options must be a dictionary, not a RuntimeSettings",
        "write options={",
    ),
    # calls
    (
        "a sparse tensor",
        lambda p: p.engine(X.to_sparse()),
        InputError,
        "'input' is of layout torch.sparse_coo",
        "dense",
    ),
    ("a CSR tensor", lambda p: p.engine(X.to_sparse_csr()), InputError, "is of layout torch.sparse_csr", "dense"),
    ("numpy", lambda p: p.engine(X.numpy()), InputError, "is a ndarray", "expected a tensor"),
    ("another dtype", lambda p: p.engine(X.half()), InputError, "'input' has dtype torch.float16", "torch.float32"),
    ("another size", lambda p: p.engine(X[:1]), InputError, "dimension 0 of input 'input' is 1", "was built for 2"),
    ("another rank", lambda p: p.engine(X[0]), InputError, "has 1 dimensions", "expected 2: [2, 4]"),
    ("another device", lambda p: p.engine(X.to("meta")), InputError, "is on meta", "expected cpu"),
    ("nothing", lambda p: p.engine(), InputError, "missing argument input", "built for (input)"),
    ("too much", lambda p: p.engine(X, X), InputError, "got 2 positional arguments", "built for 1"),
    ("another name", lambda p: p.engine(x=X), InputError, "unexpected argument x", "built for (input)"),
    ("twice", lambda p: p.engine(X, input=X), InputError, "argument input is given twice", "by position and by name"),
    ("no weights yet", lambda p: p.load()(X), RtxError, "weight-stripped", "module.refit("),
    (
        "out of range",
        lambda p: p.ranged(torch.ones(9, 4)),
        InputError,
        "'x' is 9",
        "outside its range batch = 1..8",
    ),
    ("a number", lambda p: p.engine(1.0), InputError, "'input' is a float", "expected a tensor"),
    ("not the default", lambda p: p.ranged(X, scale=2.0), InputError, "unexpected argument scale", "which is not None"),
    ("another number", lambda p: p.fixed(X, 3.0), InputError, "argument scale is 3.0", "was built for 2.0"),
    ("a tensor for a number", lambda p: p.fixed(X, X), InputError, "argument scale is a Tensor", "was built for 2.0"),
    ("another device", lambda p: p.engine.to("xpu:9"), RtxError, "runs on cpu and can't move", "torch_rtx.load(path"),
    ("half precision", lambda p: p.engine.half(), RtxError, "can't become torch.float16", "convert the model"),
    (
        "a device without engines",
        lambda p: torch.compile(torch.relu, backend="rtx")(X.to("meta")),
        CaptureError,
        "are on meta, and torch_rtx runs on cpu and cuda",
        "move the model and its inputs",
    ),
    ("training mode", lambda p: p.engine.train(), RtxError, "can't change to training mode", "torch.compile"),
    # save
    ("a module", lambda p: torch_rtx.save(p.model, p / "a.rtx"), RtxError, "not a Sequential", "torch_rtx.compile("),  # type: ignore[arg-type]
    (
        "what torch.compile returned",
        lambda p: torch_rtx.save(torch.compile(p.model), p / "a.rtx"),
        RtxError,
        "not a OptimizedModule",
        "leaves nothing to save; build an engine",
    ),
    ("swapped", lambda p: torch_rtx.save(p / "a.rtx", p.engine), RtxError, "not a str", "the module comes first"),  # type: ignore[arg-type]
    ("a text buffer", lambda p: torch_rtx.save(p.engine, io.StringIO()), RtxError, "opened for text", "io.BytesIO"),  # type: ignore[arg-type]
    ("no folder", lambda p: torch_rtx.save(p.engine, p / "no/a.rtx"), FileNotFoundError, "No such file", "no/a.rtx"),
    ("a folder", lambda p: torch_rtx.save(p.engine, p / "empty"), IsADirectoryError, "Is a directory", "empty"),
    ("nothing", lambda p: torch_rtx.save(p.engine, None), RtxError, "not a NoneType", "pass its path"),  # type: ignore[arg-type]
    # load
    (
        "a part of a file",
        lambda p: torch_rtx.load(p / "short.rtx"),
        EngineFormatError,
        "is incomplete",
        "copy the file",
    ),
    ("a damaged file", lambda p: torch_rtx.load(p / "bad.rtx"), EngineFormatError, "is damaged", "copy the file again"),
    (
        "of another system",
        lambda p: torch_rtx.load(p / "other.rtx"),
        EnginePlatformError,
        f"built for {OTHER}",
        'platform="any"',
    ),
    ("no such device", lambda p: p.load(device="gpu"), SettingsError, "can't run on 'gpu'", '"cpu", "cuda"'),
    ("another device", lambda p: p.load(device="meta"), SettingsError, "can't run on 'meta'", '"cpu", "cuda"'),
    ("too many devices", lambda p: p.load(device="cuda:99"), SettingsError, "no device cuda:99", 'device="cpu"'),
    ("bytes", lambda p: torch_rtx.load(b"\0"), RtxError, "not a bytes", "pass its path"),  # type: ignore[arg-type]
    ("no engine", lambda p: torch_rtx.load(p / "b.rtx"), FileNotFoundError, "No such file", "b.rtx"),
    ("a folder", lambda p: torch_rtx.load(p / "empty"), EngineFormatError, "this is a folder", "not an .rtx file"),
    (
        "a file of weights",
        lambda p: torch_rtx.load(p / "w.st"),
        EngineFormatError,
        "not written by torch_rtx",
        "weights=",
    ),
    ("a digest", lambda p: p.load(sha256="abc"), EngineFormatError, "another file: its SHA-256 is", "not abc"),
    ("one operator", lambda p: p.load(trusted_ops="aten.a"), SettingsError, "trusted_ops must be a list", "['aten.a']"),  # type: ignore[arg-type]
    # weights
    ("an engine", lambda p: p.load(weights=p / "model.rtx"), EngineFormatError, "is an engine", "state dict"),
    (
        "a whole checkpoint",
        lambda p: p.load(weights={"model": p.state(), "step": 3}),
        RtxError,
        "no state dict: 'model' in them",
        "weights['model']",
    ),
    ("parameters", lambda p: p.load(weights=[*p.model.parameters()]), RtxError, "not a Parameter", "a state dict"),
    ("NumPy's", lambda p: p.load(weights={"0.bias": 1.0}), RefitError, "missing: 0.weight", "2.bias"),
    (
        "sparse",
        lambda p: p.load(weights={name: tensor.to_sparse() for name, tensor in p.state().items()}),
        RefitError,
        "0.weight: expected a dense tensor, got a torch.sparse_coo one",
        "nothing was changed",
    ),
    (
        "nested",
        lambda p: p.engine.refit({name: torch.nested.nested_tensor([tensor]) for name, tensor in p.state().items()}),
        RefitError,
        "0.weight: expected a dense tensor, got a nested one",
        "nothing was changed",
    ),
    (
        "half of them",
        lambda p: p.load(weights={name: tensor.half() for name, tensor in p.state().items()}),
        RefitError,
        "0.weight: expected dtype torch.float32, got torch.float16",
        "nothing was changed",
    ),
    ("no weights", lambda p: p.load(weights=p / "w.safetensors"), FileNotFoundError, "no file", "w.safetensors"),
    ("a checkpoint", lambda p: p.load(weights=p / "model.pt"), EngineFormatError, "model.pt is no", "save_file"),
    ("an empty folder", lambda p: p.load(weights=p / "empty"), EngineFormatError, "no safetensors", "are files *.saf"),
    ("an object", lambda p: p.load(weights=3), RtxError, "can't be a int", "a state dict"),
    ("ONNX in a list", lambda p: p.load(weights=["a.onnx"]), RtxError, "no part of a list", "the model by itself"),
    ("a prefix", lambda p: p.load(weights=p.state("module.")), RefitError, "missing: 0.bias", "prefix('module.')"),
    (
        "a prefix",
        lambda p: p.engine.refit(p.state("_orig_mod.")),
        RefitError,
        "unexpected: _orig",
        "prefix('_orig_mod.')",
    ),
    ("too many", lambda p: p.load(weights=p.state() | {"lora": X}), RefitError, "weights do not", "unexpected: lora"),
    # capture
    ("a function", lambda p: torch_rtx.compile(torch.relu, (X,)), CaptureError, "cannot export", "pass an nn.Module"),  # type: ignore[arg-type]
    ("no tuple", lambda p: torch_rtx.compile(p.model, X), CaptureError, "not Tensor", "must be a tuple"),  # type: ignore[arg-type]
    ("no dictionary", lambda p: torch_rtx.compile(p.model, (X,), [X]), CaptureError, "not a list", "be a dictionary"),  # type: ignore[arg-type]
    ("an engine", lambda p: torch_rtx.compile(p.engine, (X,)), CaptureError, "is compiled already", "was built from"),  # type: ignore[arg-type]
    ("an engine", lambda p: torch_rtx.explain(p.engine, X), CaptureError, "is compiled already", "was built from"),
    (
        "no arguments",
        lambda p: torch_rtx.explain(p.model),
        CaptureError,
        "missing a required argument",
        "forward(input",
    ),
    (
        "of numpy",
        lambda p: torch_rtx.compile(p.model, (X.numpy(),)),
        CaptureError,
        "is a numpy.ndarray",
        "pass tensors",
    ),
    (
        "an axis too many",
        lambda p: torch_rtx.compile(p.model, (X,), dynamic_shapes=({5: torch.export.Dim("b")},)),
        CaptureError,
        "dynamic_shapes names an axis that an argument does not have",
        "from 0",
    ),
    (
        "another size",
        lambda p: torch_rtx.compile(p.model, (X,), dynamic_shapes=({0: torch.export.Dim("b", min=4, max=8)},)),
        CaptureError,
        "an argument is outside of what dynamic_shapes declares: 2 not in range [4, 8]",
        "sizes in the ranges",
    ),
    ("nothing to capture", lambda p: torch_rtx.compile(p.model), CaptureError, "not NoneType", "compile(model, (x,))"),
    ("too many", lambda p: torch_rtx.compile(p.model, (X, X)), CaptureError, "too many positional", "forward(input"),
    (
        "a class",
        lambda p: torch_rtx.compile(nn.Linear, (X,)),
        CaptureError,
        "cannot export a type",
        "pass an nn.Module",
    ),  # type: ignore[arg-type]
    (
        "no such argument",
        lambda p: torch_rtx.compile(p.model, (X,), dynamic_shapes={"y": {0: torch.export.Dim("b")}}),
        CaptureError,
        "here they are ['y'].\n",
        "the structure of the arguments",
    ),
    ("of Torch-TensorRT", lambda p: torch_rtx.Input((1, 4), format="NHWC"), InputError, "has no format", "min_shape"),
    ("no opt_shape", lambda p: torch_rtx.Input(min_shape=(1,), max_shape=(2,)), InputError, "opt_shape=None", "tuple"),
    (
        "the wrong way round",
        lambda p: torch_rtx.Input(min_shape=(9,), opt_shape=(4,), max_shape=(2,)),
        InputError,
        "on axis 0 min 9",
        "opt 4, max 2",
    ),
    ("a name", lambda p: torch_rtx.Input((1,), dtype="half"), InputError, "must be a torch.dtype", "not 'half'"),  # type: ignore[arg-type]
    # quantization
    (
        "no such preset",
        lambda p: torch_rtx.quantize(p.model, "int3"),
        QuantizationError,
        "no preset 'int3'",
        "presets: ",
    ),
    ("no data", lambda p: torch_rtx.quantize(p.model, "int8"), QuantizationError, "needs data", "a forward_loop"),
    # looking inside
    (
        "no model",
        lambda p: torch_rtx.runtime.enable_cudagraphs(p.model).__enter__(),
        RtxError,
        "not compiled",
        "pass a",
    ),
    (
        "no engine",
        lambda p: torch_rtx.runtime.weight_streaming(p.model).__enter__(),  # type: ignore[arg-type]
        RtxError,
        "of a Sequential can't be streamed",
        "build an engine",
    ),
    (
        "no such GPU",
        lambda p: torch_rtx.check_engine(p / "model.rtx", "RTX 9999"),
        SettingsError,
        "unknown target 'RTX 9999'",
        "known are sm_75",
    ),
    ("a model", lambda p: torch_rtx.profile(p.model, X), RtxError, "no engine ran", "pass what torch_rtx.compile"),
    ("no engine", lambda p: torch_rtx.inspect(p.engine), RtxError, "an engine is a file", "pass its path"),  # type: ignore[arg-type]
    (
        "never",
        lambda p: torch_rtx.profile(p.engine, X, repeats=0),
        SettingsError,
        "repeats must be at least 1",
        "not 0",
    ),
    (
        "a model",
        lambda p: torch_rtx.refit_module_weights(p.model, {}),
        RtxError,
        "Sequential is not compiled",
        "pass a",
    ),
]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("call", "kind", "what", "remedy"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistake(call: Callable[[Place], object], kind: type[Exception], what: str, remedy: str, place: Place) -> None:
    with pytest.raises(kind) as caught:
        call(place)
    assert type(caught.value).__name__ == kind.__name__  # no class below it, and none that Dynamo puts around it
    text = str(caught.value)
    assert what in text
    assert remedy in text
    assert "PyTorch" not in text
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert len(frames) <= 10
    assert sum("/torch/" in frame.filename for frame in frames) <= 1, "of PyTorch there is the call alone"
    if kind is not CaptureError:  # which keeps what torch.export raised
        assert caught.value.__cause__ is None


def test_a_path_is_a_folder() -> None:
    folder = Path("caches")
    assert torch_rtx.CompilationSettings(engine_cache_dir=folder).engine_cache_dir == "caches"  # type: ignore[arg-type]


def test_layouts_are_checked_again(place: Place) -> None:
    """After a call with a tensor of the same shape and dtype, which would say that these are known."""
    place.engine(X)
    for given in (X.to_sparse(), X.to_sparse_csr(), X.to_mkldnn()):
        with pytest.raises(InputError, match="expected a dense tensor"):
            place.engine(given)


def test_many_names_are_counted() -> None:
    names = tuple(f"layers.{number}.weight" for number in range(100))
    error = RefitError(names, names[:3])
    assert error.missing == names
    assert len(str(error).splitlines()) < 30
    assert "and 80 more" in str(error)


def test_weights_in_several_files(place: Place, tmp_path: Path) -> None:
    state = place.state()
    shards = {name: f"{index % 2}.safetensors" for index, name in enumerate(state)}
    for file in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == file}, tmp_path / file)
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(EngineFormatError, match="several sets of weights: 0.safetensors, 1.safetensors"):
        place.load(weights=tmp_path)
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    expected = place.engine(X)
    for weights in (paths, [str(path) for path in paths], tmp_path, index):
        assert torch.equal(place.load(weights=weights)(X), expected)
        module = place.load()
        module.refit(weights)
        assert torch.equal(module(X), expected)
    with pytest.raises(EngineFormatError, match="is in two files"):
        place.load(weights=[*paths, paths[0]])
    for text in ("[]", "{}", "no json", '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(EngineFormatError, match="is no index of safetensors files"):
            place.load(weights=index)
    index.unlink()
    paths[1].unlink()
    with pytest.raises(RefitError, match="missing"):
        place.load(weights=tmp_path)
