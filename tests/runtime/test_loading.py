"""Engines in another process, from damaged and from hostile files; and models of the zoo there and back."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import torch_rtx
from benchmarks.numerics import assert_right, in_float64, tensors
from tests.engine_files import forge
from tests.fuzz.files import engine_of
from tests.helpers.ahead import IMAGE, Function, Net
from tests.helpers.compiled import same
from tests.paths import ROOT
from torch_rtx.engine import load as load_engine
from torch_rtx.errors import EngineFormatError
from torch_rtx.irparse import parse
from torch_rtx.runtime.signature import Signature


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def in_new_process(code: str, *arguments: object) -> tuple[str, str]:
    """Standard output and error of a Python process that runs `code`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


# Another process ------------------------------------------------------------------------------------------------------

RUN = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
import torch, torch_rtx
from safetensors.torch import load_file, save_file
if "{transformers}" == "with":
    import transformers.utils.generic, transformers.modeling_outputs
folder = sys.argv[1]
module = torch_rtx.load(f"{{folder}}/bert.rtx", weights=f"{{folder}}/bert.safetensors")
result = module(**load_file(f"{{folder}}/inputs.safetensors"))
print(type(result).__name__, list(result), result["pooler_output"] is result.get("pooler_output"))
print("transformers" in sys.modules, hasattr(result, "last_hidden_state"))
assert "{transformers}" == "with" or not {{"torch._dynamo", "sympy"}} & sys.modules.keys()
save_file({{name: tensor.contiguous() for name, tensor in result.items()}}, f"{{folder}}/outputs.safetensors")
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with an engine, weights and inputs; and what the engine returns."""
    pytest.importorskip("transformers")
    from benchmarks import models

    folder = tmp_path_factory.mktemp("bert")
    model, args, kwargs = models.build("bert_base")
    module = torch_rtx.compile(model, args, kwargs)
    torch_rtx.save(module, folder / "bert.rtx")
    save_file(model.state_dict(), folder / "bert.safetensors")
    save_file(kwargs, folder / "inputs.safetensors")
    return folder, module(**kwargs)


@pytest.mark.parametrize("transformers", ["with", "without"])
def test_in_a_new_process(transformers, bert):
    folder, expected = bert
    out, err = in_new_process(RUN.format(transformers=transformers), folder)
    name, known = type(expected).__name__, transformers == "with"
    assert out.splitlines() == [f"{name if known else 'dict'} {list(expected)} True", f"{known} {known}"]
    assert (f"{name} is unknown here and becomes a dict; import it before load" in err) is not known
    from safetensors.torch import load_file

    assert all(torch.equal(load_file(folder / "outputs.safetensors")[key], expected[key]) for key in expected)


@pytest.mark.quick
def test_inspect_without_torch(tmp_path):
    torch_rtx.save(torch_rtx.compile(Net().eval(), (IMAGE,)), tmp_path / "model.rtx")
    code = "import sys; sys.modules['torch'] = None; import torch_rtx; print(torch_rtx.inspect(sys.argv[1]))"
    out, _ = in_new_process(code, tmp_path / "model.rtx")
    assert out.rstrip("\n") == str(torch_rtx.inspect(tmp_path / "model.rtx"))
    assert "'q.weight': f32[8, 8]" in out


# The zoo --------------------------------------------------------------------------------------------------------------


# Every model goes through the bytes of its engine in tests/lowering/test_kernel_models.py.
@pytest.mark.parametrize("name", ["t5", "llama_decode"])  # tied weights and two inputs; caches that are written
def test_zoo(name, tmp_path):
    pytest.importorskip("transformers")
    from benchmarks import models

    model, args, kwargs = models.build(name)
    state = {key: buffer.clone() for key, buffer in model.named_buffers()}
    module = torch_rtx.compile(model, args, kwargs)
    torch_rtx.save(module, tmp_path / "model.rtx")
    loaded = torch_rtx.load(tmp_path / "model.rtx")
    assert not any(constant.data_ptr() % 64 for constant in loaded.engine.constants.values())
    loaded.refit(model)
    ours = module(*args, **kwargs)
    theirs = loaded(*args, **kwargs)
    for key, buffer in model.named_buffers():  # of which the module in this process has used the model's own
        buffer.copy_(state[key])
    same(theirs, ours, atol=0, rtol=0)
    reference = in_float64(model, args, kwargs)
    assert_right(ours, model(*args, **kwargs), reference)
    found = torch_rtx.inspect(tmp_path / "model.rtx")
    assert found.manifest.stripped
    assert len(found.manifest.inputs) == len(args) + len(kwargs)
    assert set(found.kinds) <= {"kernel", "extern", "view"}
    assert found.weight_bytes == sum(p.nbytes for p in found.parameters if not p.constant)
    assert len(tensors(ours)) > 0


def test_full_size_bert(tmp_path):
    """110 million parameters, built on `meta` in seconds, in a file of a few hundred kilobytes."""
    pytest.importorskip("transformers")
    from benchmarks import models

    with torch.device("meta"):
        model = models.spec("bert_base").model("full").eval()
    args, kwargs = models.inputs("bert_base", "full")
    compilation = torch_rtx.CompilationSettings(device="cuda")
    torch_rtx.save(torch_rtx.compile(model, args, kwargs, settings=compilation), tmp_path / "bert.rtx")
    found = torch_rtx.inspect(tmp_path / "bert.rtx")
    assert (tmp_path / "bert.rtx").stat().st_size == found.engine_bytes <= 300_000
    parameters = sum(p.numel() for p in model.parameters())
    assert 4 * parameters <= found.weight_bytes <= 4 * parameters + 10_000
    assert found.manifest.device == "cuda"


# Damage ---------------------------------------------------------------------------------------------------------------


def test_flipped_bytes_of_a_real_engine(tmp_path):
    model = Net().eval()
    compilation = torch_rtx.CompilationSettings(strip_weights=False)
    module = torch_rtx.compile(model, (IMAGE,), settings=compilation)
    path = tmp_path / "model.rtx"
    torch_rtx.save(module, path)
    raw, generator, expected = path.read_bytes(), random.Random(0), module(IMAGE)
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(generator.choice((1, 1, 1, 4))):
            damaged[generator.randrange(len(raw))] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(EngineFormatError):
            torch_rtx.load(path, weights=model)
    for size in [generator.randrange(len(raw)) for _ in range(50)]:
        path.write_bytes(raw[:size])
        with pytest.raises(EngineFormatError):
            torch_rtx.load(path, weights=model)
    path.write_bytes(raw)
    assert torch.equal(torch_rtx.load(path)(IMAGE), expected)


# Hostile call signatures ----------------------------------------------------------------------------------------------

SIGNATURE = torch_rtx.compile(
    Function(lambda batch, n: {"a": [batch["x"] * n, (batch["y"],)], "b": batch["x"].max(0)}),
    ({"x": torch.ones(2, 2), "y": torch.ones(3)}, 3),
).engine.manifest.signature
scalars = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=4)
NAMES = [
    *(f"builtins.{name}" for name in ("tuple", "list", "dict")),
    *(f"collections.{name}" for name in ("namedtuple", "OrderedDict", "defaultdict", "deque")),
    *(f"torch.{name}" for name in ("Size", "return_types.max", "return_types.__name__")),
    *(f"torch.fx.immutable_collections.immutable_{name}" for name in ("list", "dict")),
    *("NO_SERIALIZED_TYPE_NAME_FOUND", "os.system", ""),
]
contexts = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["factory", "keys", "name", "fields", "default_factory_module", "default_factory_name"]),
            inner,
        )
    ),
    max_leaves=4,
)
specs = st.recursive(
    st.none(),
    lambda inner: st.fixed_dictionaries(
        {
            "type": st.sampled_from(NAMES) | scalars,
            "context": contexts,
            "children": st.lists(inner, max_size=3) | scalars,
        }
    ),
    max_leaves=5,
)
calls = st.fixed_dictionaries(
    {"type": st.just("builtins.tuple"), "context": st.none(), "children": st.lists(specs, min_size=1, max_size=3)}
)
leaves = st.integers(-1, 3) | st.fixed_dictionaries({"name": scalars, "value": contexts}) | scalars
signatures = st.fixed_dictionaries(
    {
        "names": st.just(SIGNATURE["names"]) | st.lists(scalars, max_size=3) | scalars,
        "leaves": st.just(SIGNATURE["leaves"]) | st.lists(leaves, max_size=3) | scalars,
        "in": st.just(SIGNATURE["in"]) | specs | calls | scalars,
        "out": st.just(SIGNATURE["out"]) | specs | scalars,
    }
)


def read(tree: Any) -> None:
    """Reads a signature as a file would hold it: it is either refused in the one way, or good enough to be used."""
    tree = json.loads(json.dumps(tree))
    before = set(sys.modules)
    try:
        signature = Signature.from_json(tree)
    except EngineFormatError:
        return
    finally:
        assert set(sys.modules) == before
    signature.unflatten([1] * signature.out_spec.num_leaves)
    text = json.dumps(signature.to_json())
    assert json.dumps(Signature.from_json(json.loads(text)).to_json()) == text


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(signatures | contexts)
def test_hostile_signatures(tree):
    read(tree)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_edited_signatures(data):
    """A real signature with one place in it replaced."""
    tree = json.loads(json.dumps(SIGNATURE))
    at = tree
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if isinstance(at[key], dict | list) and at[key] and data.draw(st.integers(0, 3)):
            at = at[key]
            continue
        at[key] = data.draw(contexts | specs | st.sampled_from(NAMES))
        break
    read(tree)


def container(name: str, context: Any, children: int = 1) -> dict[str, Any]:
    return {"type": name, "context": context, "children": [None] * children}


@pytest.mark.parametrize(
    "spec",
    [
        container("builtins.dict", None),
        container("builtins.dict", ["a", "b"]),
        container("builtins.dict", ["a", "a"], 2),
        container("builtins.dict", [["a"]]),
        container("collections.defaultdict", {"default_factory_module": "antigravity", "default_factory_name": "x"}),
        container("collections.namedtuple", "os.stat_result"),
        container("collections.namedtuple", {"name": "x", "fields": ["a; import antigravity"]}),
        container("collections.namedtuple", {"name": "x", "fields": ["class"]}),
        container("collections.namedtuple", {"name": "x", "fields": ["a", "b"]}),
        container("collections.deque", 0),
        container("torch.return_types.max", None),
        container("torch.return_types.os", None),
        {"type": "builtins.list", "context": None},
        {"children": [None]},
        7,
        "text",
        [[]],
    ],
)
def test_containers_that_are_refused(spec, tmp_path):
    tree = {**SIGNATURE, "out": spec}
    with pytest.raises(EngineFormatError):
        Signature.from_json(tree)
    engine = torch_rtx.compile(Net().eval(), (IMAGE,)).engine if spec == 7 else None
    if engine is not None:  # and so is the file
        path = forge(tmp_path / "model.rtx", lambda p: p["manifest"]["signature"].update(out=spec), what=engine)
        load_engine(path)
        with pytest.raises(EngineFormatError, match="damaged call signature"):
            torch_rtx.load(path)


@pytest.mark.parametrize("defaults", [7, [], {"flag": []}, {"flag": {"a": 1}}])
def test_defaults_that_are_refused(defaults):
    with pytest.raises(EngineFormatError, match="a default of the signature is no plain value"):
        Signature.from_json({**SIGNATURE, "defaults": defaults})


@pytest.mark.parametrize("sizes", [7, [], {"s1": 2}, {"s1": "a b"}, {"s1": "a\x1b"}])
def test_names_of_sizes_that_are_refused(sizes, tmp_path):
    with pytest.raises(EngineFormatError, match="invalid names of sizes"):
        Signature.from_json({**SIGNATURE, "sizes": sizes})
    engine = torch_rtx.compile(Net().eval(), (IMAGE,)).engine
    path = forge(tmp_path / "model.rtx", lambda p: p["manifest"]["signature"].update(sizes=sizes), what=engine)
    with pytest.raises(EngineFormatError, match="invalid names of sizes"):
        torch_rtx.inspect(path)


def test_deep_signatures():
    for depth in (60, 70, 900):
        spec = None
        for _ in range(depth):
            spec = {"type": "builtins.list", "context": None, "children": [spec]}
        tree = {**SIGNATURE, "out": spec}
        if depth < 64:
            Signature.from_json(tree)
        else:
            with pytest.raises(EngineFormatError, match="nested too deep"):
                Signature.from_json(tree)


def test_modules_that_a_file_names_are_not_imported(tmp_path):
    """In whatever place it names them."""
    module = "antigravity"
    engine = torch_rtx.compile(Net().eval(), (IMAGE,)).engine
    out = [
        container(f"{module}.Thing", ["value"]),
        container("collections.defaultdict", {"factory": f"{module}.Thing", "keys": ["a"]}),
        container("collections.defaultdict", {"default_factory_module": module, "default_factory_name": "x"}),
    ]
    paths = []
    for index, spec in enumerate(out):
        edit = lambda program, spec=spec: program["manifest"]["signature"].update(out=spec)  # noqa: E731
        paths.append(forge(tmp_path / f"{index}.rtx", edit, what=engine))
    code = f"""
import sys, torch_rtx
for path in sys.argv[1:]:
    try:
        torch_rtx.load(path, weights=None)
    except torch_rtx.EngineFormatError as error:
        print(type(error).__name__)
    else:
        print("loaded")
assert {module!r} not in sys.modules
"""
    assert in_new_process(code, *paths)[0].split() == ["loaded", "loaded", "EngineFormatError"]


# Trust ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine_file(tmp_path_factory):
    """Indexes its input; the number of rows is dynamic."""
    path = tmp_path_factory.mktemp("trust") / "model.rtx"
    model = Function(lambda x, i: x.index_select(0, i) + 1)
    rows = {0: torch.export.Dim("rows", min=1, max=64)}
    module = torch_rtx.compile(
        model, (torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)), dynamic_shapes=((rows, None),)
    )
    torch_rtx.save(module, path)
    return path, module


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "xpu", "cpu:x", 7])
def test_devices_that_do_not_exist(device, engine_file):
    with pytest.raises(torch_rtx.SettingsError, match="there is no device|an engine can.t run on"):
        torch_rtx.load(engine_file[0], device=device)


def test_errors_of_operators(engine_file):
    """A caller of a loaded engine knows the errors of torch_rtx; one who built it here knows those of the model."""
    path, module = engine_file
    wrong = torch.ones(4, 3), torch.tensor([0, 9])
    with pytest.raises(
        torch_rtx.CallError, match="an operator of the engine failed: IndexError: .*out of range"
    ) as caught:
        torch_rtx.load(path)(*wrong)
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(IndexError):
        module(*wrong)


def test_sizes_of_calls_are_checked_once(engine_file, monkeypatch):
    checked = []
    monkeypatch.setattr("torch_rtx.runtime.file_check.FileCheck.at", lambda self, sizes: checked.append(dict(sizes)))
    module = torch_rtx.load(engine_file[0])
    for rows in (4, 5, 4, 5, 5):
        module(torch.ones(rows, 3), torch.zeros(2, dtype=torch.int64))
    assert [list(sizes.values()) for sizes in checked] == [[], [4], [5]]  # the first by `load`


def test_a_trusted_file_is_not_checked(engine_file, monkeypatch):
    monkeypatch.setattr("torch_rtx.runtime.file_check.FileCheck.__init__", None)
    digest = hashlib.sha256(engine_file[0].read_bytes()).hexdigest()
    assert torch_rtx.load(engine_file[0], sha256=digest)(torch.ones(4, 3), torch.tensor([1, 0])).shape == (2, 3)


@pytest.mark.parametrize("threads", [True, False])
def test_digests_of_large_files(threads, tmp_path, monkeypatch):
    """Digests are computed beside reading, or between pieces: of all bytes, before any of them changes."""
    monkeypatch.setattr("torch_rtx.serialization.Digests.LARGE", 0 if threads else 1 << 40)
    monkeypatch.setattr("torch_rtx.engine.CHUNK", 7)  # many more pieces than may wait

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(9, 11))
            self.register_buffer("mask", torch.rand(9, 11) > 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(self.mask, self.weight, x)

    settings = torch_rtx.CompilationSettings(strip_weights=False)
    model, path, x = Model(), tmp_path / "model.rtx", torch.randn(9, 11)
    module = torch_rtx.compile(model, (x,), settings=settings)
    torch_rtx.save(module, path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for options in ({}, {"mmap": True}, {"sha256": digest}, {"sha256": digest, "mmap": True}):
        assert torch.equal(torch_rtx.load(path, **options)(x), module(x)), options
    with pytest.raises(EngineFormatError, match=f"another file: its SHA-256 is {digest}"):
        torch_rtx.load(path, sha256="0" * 64)
    held = content.index(model.weight.detach().numpy().tobytes())
    for at in (held, held + 200, held + 395):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        for mmap in (False, True):
            with pytest.raises(EngineFormatError, match="the data is damaged"):
                torch_rtx.load(path, mmap=mmap)


def test_inspect_says_what_needs_trust(tmp_path):
    module = torch_rtx.compile(Function(lambda x: x.as_strided((2, 2), (1, 1), 0) + 1), (torch.ones(9),))
    torch_rtx.save(module, tmp_path / "model.rtx")
    seen = torch_rtx.inspect(tmp_path / "model.rtx")
    assert seen.needs_trust == ("aten.as_strided.default",)
    assert "needs trusted_ops=['aten.as_strided.default']" in str(seen)
    with pytest.raises(torch_rtx.InvalidIR, match="aten.as_strided.default is not on the allow-list for engine files"):
        torch_rtx.load(tmp_path / "model.rtx")
    loaded = torch_rtx.load(tmp_path / "model.rtx", trusted_ops=seen.needs_trust)
    same(loaded(torch.arange(9.0)), module(torch.arange(9.0)))


FAILING = """graph fused {
  parameter 'p': i64[2]
  constant 'c': f32[4]
  weight w: f32[2] = 'c', 'p' graph import {
    input c: f32[4]
    input p: i64[2]
    w: f32[2] = op aten.index_select.default(self=c, dim=0, index=p)
    return [w]
  }
  return [w]
}
"""


@pytest.mark.parametrize("method", ["attach", "refit"])
def test_errors_of_recipes(method, tmp_path):
    data = {"constant/c": ("f32", (4,), bytes(16)), "weight/p": ("i64", (2,), bytes(16))}
    (tmp_path / "engine.rtx").write_bytes(engine_of(parse(FAILING), data))
    module = torch_rtx.load(tmp_path / "engine.rtx")
    with pytest.raises(torch_rtx.CallError, match="a weight can't be computed: IndexError: .*out of range") as caught:
        getattr(module, method)({"p": torch.tensor([0, 9])})
    assert isinstance(caught.value.__cause__, IndexError)
