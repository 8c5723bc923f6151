"""The engine file: what goes in comes out, equal engines are equal bytes, and saving is all or nothing."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import strategies
from tests.engine_files import ENGINE, GRAPH, MANIFEST, SMALL, digest_of, same, saved
from torch_rtx import aten
from torch_rtx.dtypes import DTYPES as IR_DTYPES
from torch_rtx.engine import Engine, load, read_header, save, write
from torch_rtx.engine_header import DTYPES, TensorInfo
from torch_rtx.errors import EngineFormatError, InvalidIR, RtxError
from torch_rtx.inspection import inspect
from torch_rtx.ir import Graph, Loc, Node, Parameter, TensorType, Value, Weight, contiguous
from torch_rtx.manifest import FORMAT_VERSION, Manifest


def one_parameter(dtype: str, tensor: torch.Tensor, constant: bool = False) -> Engine:
    """An engine that holds one tensor, called t."""
    shape = tuple(tensor.shape)
    graph = Graph("fused", parameters=(Parameter("t", TensorType(dtype, shape, contiguous(shape)), (), constant),))
    data = {"t": tensor}
    return Engine(graph, Manifest("cpu"), data if constant else {}, {} if constant else data)


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.rtx"
    save(ENGINE, path)
    got = load(path)
    assert got.graph == GRAPH
    assert got.manifest == replace(MANIFEST, digests={"model": "abc", "graph": digest_of(GRAPH)})
    assert list(got.manifest.signature["kwargs"]) == ["b", "a"]  # type: ignore[index,call-overload]
    assert same(got.constants, ENGINE.constants)
    assert same(got.weights, ENGINE.weights)
    assert all(tensor.is_contiguous() for tensor in (got.weights or {}).values())
    save(got, path)  # over the file that its tensors map
    assert same(load(path).weights, ENGINE.weights)


@pytest.mark.parametrize("stripped", [True, False])
def test_file_objects(stripped: bool, tmp_path: Path) -> None:
    engine = ENGINE if not stripped else replace(ENGINE, weights=None)
    save(engine, tmp_path / "model.rtx")
    expected = (tmp_path / "model.rtx").read_bytes()
    buffer = io.BytesIO()
    save(engine, buffer)
    assert buffer.getvalue() == expected
    with (tmp_path / "object.rtx").open("wb") as file:
        file.write(b"before")
        save(engine, file)
    assert (tmp_path / "object.rtx").read_bytes() == b"before" + expected
    with (tmp_path / "object.rtx").open("rb") as file:
        file.seek(6)
        found = load(file)
    for one in (
        found,
        load(io.BytesIO(expected)),
        load(io.BytesIO(expected), sha256=hashlib.sha256(expected).hexdigest()),
    ):
        assert one.graph == GRAPH
        assert (one.weights is None) is stripped
        assert one.constants.keys() == ENGINE.constants.keys()
    assert read_header(io.BytesIO(expected)).file_bytes == len(expected)


class Slow(io.BytesIO):
    """Takes few bytes at once, as an unbuffered file may."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[:1000])


def test_a_file_object_that_takes_few_bytes_at_once() -> None:
    slow, whole = Slow(), io.BytesIO()
    save(ENGINE, slow)
    save(ENGINE, whole)
    assert slow.getvalue() == whole.getvalue()
    assert len(whole.getvalue()) > 1000


def test_what_is_no_file_object(tmp_path: Path) -> None:
    save(ENGINE, tmp_path / "model.rtx")
    raw = (tmp_path / "model.rtx").read_bytes()
    for number in (0, 8, 100, len(raw) - 1):
        with pytest.raises(EngineFormatError, match="<BytesIO>"):
            load(io.BytesIO(raw[:number]))
    with pytest.raises(EngineFormatError, match="<BytesIO>"):
        load(io.BytesIO(raw + b"after"))
    with pytest.raises(RtxError, match="mmap=True maps a file"):
        load(io.BytesIO(raw), mmap=True)
    with (tmp_path / "model.rtx").open("w") as text, pytest.raises(RtxError, match="opened for text\n.*'wb'"):
        save(ENGINE, text)  # type: ignore[arg-type]
    with (tmp_path / "model.rtx").open() as text, pytest.raises(RtxError, match="opened for text\n.*'rb'"):
        load(text)  # type: ignore[arg-type]
    for wrong in (raw, 3, None):
        with pytest.raises(RtxError, match="an engine is a file, not a"):
            load(wrong)  # type: ignore[arg-type]


def test_stripped(tmp_path: Path) -> None:
    whole, stripped = saved(tmp_path / "a.rtx"), saved(tmp_path / "b.rtx", replace(ENGINE, weights=None))
    assert len(stripped) < len(whole)
    got = load(tmp_path / "b.rtx")
    assert got.weights is None
    assert got.manifest.stripped
    assert same(got.constants, ENGINE.constants)
    assert not load(tmp_path / "a.rtx").manifest.stripped


def test_plain_safetensors_reads_it(tmp_path: Path) -> None:
    save(ENGINE, tmp_path / "model.rtx")
    with safetensors.safe_open(tmp_path / "model.rtx", "pt") as file:
        assert sorted(file.keys()) == ["constant/table", "program", 'weight/it\'s "odd"\n', "weight/lin.weight"]
        assert list(file.metadata()) == ["torch_rtx"]
        assert file.get_tensor("constant/table").tolist() == [3, -4]


def test_equal_engines_are_equal_bytes(tmp_path: Path) -> None:
    first = saved(tmp_path / "a.rtx")
    assert first == saved(tmp_path / "b.rtx")
    assert first == saved(tmp_path / "c.rtx", load(tmp_path / "a.rtx"))
    turned = replace(ENGINE, weights=dict(reversed((ENGINE.weights or {}).items())))
    assert first == saved(tmp_path / "d.rtx", turned)
    command = "import sys; from torch_rtx.engine import load, save; save(load(sys.argv[1]), sys.argv[2])"
    subprocess.run([sys.executable, "-c", command, tmp_path / "a.rtx", tmp_path / "e.rtx"], check=True)
    assert first == (tmp_path / "e.rtx").read_bytes()


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    """A graph with data of its types: random bytes, so NaNs too."""
    graph = draw(strategies.graphs())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    data: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
    for parameter in graph.parameters:
        dtype, shape = aten.DTYPES[parameter.type.dtype], parameter.type.shape
        count = torch.Size(shape).numel() * dtype.itemsize  # type: ignore[arg-type]
        limit = 2 if dtype == torch.bool else 256
        raw = torch.randint(0, limit, (count,), dtype=torch.uint8, generator=generator)
        data[parameter.constant][parameter.name] = raw.view(dtype).reshape(shape)  # type: ignore[arg-type]
    return Engine(
        graph, Manifest(draw(st.sampled_from(["cpu", "cuda"]))), data[True], draw(st.sampled_from([None, data[False]]))
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(engines())
def test_any_engine_comes_back(tmp_path: Path, drawn: Engine) -> None:
    raw = saved(tmp_path / "a.rtx", drawn)
    got = load(tmp_path / "a.rtx")
    assert got.graph == drawn.graph
    assert same(got.constants, drawn.constants)
    assert same(got.weights, drawn.weights)
    assert raw == saved(tmp_path / "b.rtx", got)
    assert inspect(tmp_path / "a.rtx").engine_bytes <= len(raw)


def test_the_dtype_table_is_complete() -> None:
    assert DTYPES.keys() == IR_DTYPES.keys() == aten.DTYPES.keys()
    assert {name: size for name, (_, size) in DTYPES.items()} == {name: aten.DTYPES[name].itemsize for name in DTYPES}


@pytest.mark.parametrize("shape", [(3,), (), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("constant", [False, True])
def test_dtypes(tmp_path: Path, dtype: str, shape: tuple[int, ...], constant: bool) -> None:
    torch_dtype = aten.DTYPES[dtype]
    count = torch.Size(shape).numel() * torch_dtype.itemsize
    tensor = (torch.arange(count, dtype=torch.uint8) % 2).view(torch_dtype).reshape(shape)
    written = one_parameter(dtype, tensor, constant)
    path = tmp_path / "model.rtx"
    save(written, path)
    got = load(path, mmap=shape == (3,))
    assert inspect(path).weight_bytes == (0 if constant else count)
    assert same(got.constants, written.constants)
    assert same(got.weights, written.weights)
    assert read_header(path).tensors[f"{'constant' if constant else 'weight'}/t"].nbytes == count


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    tensors = {
        "a": base,
        "b": base,
        "c": base[2:6],
        "d": base[6:],
        "e": base[3:3],
        "f": base[::2],
        "g": base.view(2, 4).t(),
    }
    tensors["h"] = torch.nn.Parameter(base.view(2, 4))
    tensors["i"] = torch.complex(base, base).conj()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    parameters = tuple(
        Parameter(name, TensorType("c64" if name == "i" else "f32", shape, contiguous(shape)))
        for name, shape in shapes.items()
    )
    save(Engine(Graph("fused", parameters=parameters), Manifest("cpu"), {}, tensors), tmp_path / "model.rtx")
    got = load(tmp_path / "model.rtx").weights
    assert got is not None
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    got["a"].zero_()  # tensors of a file are apart, and are not the file
    assert torch.equal(got["b"], base)
    assert torch.equal((load(tmp_path / "model.rtx").weights or {})["a"], base)


# ---- without torch ---------------------------------------------------------------------------------------------------


def test_reading_the_header_needs_no_torch(tmp_path: Path) -> None:
    save(ENGINE, tmp_path / "model.rtx")
    program = """
import sys
from torch_rtx import engine, inspection
path = sys.argv[1]
header = engine.read_header(path)
assert header.manifest.device == "cuda" and header.graph_text.startswith("graph fused {")
print(inspection.inspect(path))
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", program, tmp_path / "model.rtx"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"format {FORMAT_VERSION}, built by torch_rtx 0.1.0, torch 2.13.0\n" in result.stdout


@pytest.mark.quick
def test_inspect(tmp_path: Path) -> None:
    size = len(saved(tmp_path / "a.rtx"))
    seen = inspect(tmp_path / "a.rtx")
    assert seen.kinds == {"extern": 1, "fallback": 1}
    assert seen.ops == {"aten.linear.default": 1, "my_lib.op.default": 1}
    assert (seen.engine_bytes, seen.weight_bytes) == (size - 26, 26)
    assert [(info.name, info.dtype, info.shape, info.nbytes, info.constant) for info in seen.parameters] == [
        ("table", "i64", (2,), 16, True),
        ("lin.weight", "f32", (2, 3), 24, False),
        ('it\'s "odd"\n', "bf16", (), 2, False),
    ]
    assert seen.graph_text == str(GRAPH)
    save(replace(ENGINE, weights=None), tmp_path / "b.rtx")
    stripped = inspect(tmp_path / "b.rtx")
    assert stripped.weight_bytes == 26
    assert stripped.engine_bytes == os.path.getsize(tmp_path / "b.rtx")
    assert "weights 26 B (stripped" in str(stripped)
    assert "device cuda, platform any, inputs x" in str(seen)
    assert str(seen).count("\n") == len(str(seen).splitlines()) - 1  # odd names stay on their line


def test_header(tmp_path: Path) -> None:
    size = len(saved(tmp_path / "a.rtx"))
    header = read_header(tmp_path / "a.rtx")
    assert header.graph_text == str(GRAPH)
    assert header.manifest == load(tmp_path / "a.rtx").manifest
    assert header.file_bytes == size
    assert header.tensors["weight/lin.weight"] == TensorInfo("f32", (2, 3), 24)


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_tensors_must_fit_the_graph(tmp_path: Path) -> None:
    weights = ENGINE.weights or {}
    wrong = {
        "missing: weight/it": replace(ENGINE, weights={"lin.weight": weights["lin.weight"]}),
        "unexpected: weight/more": replace(ENGINE, weights={**weights, "more": torch.zeros(1)}),
        "missing: constant/table": replace(ENGINE, constants={}),
        "weight/lin.weight is a torch.float64": replace(
            ENGINE, weights={**weights, "lin.weight": weights["lin.weight"].double()}
        ),
        r"shape \(3, 2\), not f32\[2, 3\]": replace(ENGINE, weights={**weights, "lin.weight": torch.zeros(3, 2)}),
        "has no data": replace(ENGINE, weights={**weights, "lin.weight": torch.zeros(2, 3, device="meta")}),
        "field 'inputs'": replace(ENGINE, manifest=replace(MANIFEST, inputs=(1,))),  # type: ignore[arg-type]
    }
    for message, bad in wrong.items():
        with pytest.raises(RtxError, match=message):
            save(bad, tmp_path / "model.rtx")
    assert list(tmp_path.iterdir()) == []


def test_python_functions_stay_here(tmp_path: Path) -> None:
    out = Value("res", TensorType("f32", (2,), (1,)))
    node = Node("fallback", "python", (("index", 0), ("inputs", ())), (out,), None, Loc("model.loss", "m.py", 9))
    written = Engine(Graph("fused", nodes=(node,)), Manifest("cpu"), {}, {})
    with pytest.raises(RtxError, match=r"node res calls a Python function.*model.loss @ m.py:9"):
        save(written, tmp_path / "model.rtx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "graph",
    [
        Graph("import"),
        Graph("fused", outputs=(Value("x", TensorType("f32", (), ())),)),
        Graph("fused", nodes=(Node("fallback", "a.b", (), (), None, Loc("m", "two\nlines", 1)),)),
        Graph("fused", nodes=(Node("fallback", "no name", (), ()),)),
        Graph("fused", parameters=(Parameter("p", TensorType("f32", (-1,), (1,))),)),
    ],
    ids=["level", "undefined", "location", "op", "parameter"],
)
def test_graphs_that_could_not_be_loaded(tmp_path: Path, graph: Graph) -> None:
    with pytest.raises(InvalidIR):
        save(Engine(graph, Manifest("cpu"), {}, None), tmp_path / "model.rtx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "torch_rtx.engine.serialize"])
def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "model.rtx"
    old = saved(path, SMALL)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        for target in (path, tmp_path / "new.rtx"):
            with pytest.raises(OSError, match="disk full"):
                save(ENGINE, target)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("as_on_posix")
def test_who_reads_the_old_file_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "model.rtx"
    old = saved(path)
    mapped = load(path, mmap=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        save(SMALL, path)
        assert view[:] == old
    assert same(mapped.weights, ENGINE.weights)
    assert load(path).graph == SMALL.graph


@pytest.mark.usefixtures("as_on_posix")
def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.rtx"
    save(ENGINE, path)
    open_again = safetensors.torch.load_file

    def replaced(again: Path) -> dict[str, torch.Tensor]:
        save(SMALL, path)
        return open_again(again)

    monkeypatch.setattr("safetensors.torch.load_file", replaced)
    with pytest.raises(EngineFormatError, match="replaced while it was read"):
        load(path, mmap=True)


def test_weights_that_change_while_they_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a training goes on meanwhile: the file has some state of each byte, and its digest."""
    weights = {name: tensor.clone() for name, tensor in (ENGINE.weights or {}).items()}

    class Changing(io.BytesIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            for tensor in weights.values():
                tensor.add_(1)
            return super().write(data)

    file = Changing()
    write(replace(ENGINE, weights=weights), file)
    (tmp_path / "model.rtx").write_bytes(file.getvalue())
    load(tmp_path / "model.rtx")


def test_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.rtx"
    raw = saved(path)
    got = load(path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * len(raw))
        file.truncate(100)
    assert same(got.weights, ENGINE.weights)
    assert same(got.constants, ENGINE.constants)


def test_a_file_known_by_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "model.rtx"
    digest = hashlib.sha256(saved(path)).hexdigest()
    assert same(load(path, sha256=digest.upper()).weights, ENGINE.weights)
    saved(path, replace(ENGINE, manifest=replace(MANIFEST, producer={})))
    with pytest.raises(EngineFormatError, match="this is another file: its SHA-256 is"):
        load(path, sha256=digest)


def test_bools_are_0_or_1(tmp_path: Path) -> None:
    save(one_parameter("bool", torch.tensor([2, 0], dtype=torch.uint8).view(torch.bool)), tmp_path / "model.rtx")
    weights = load(tmp_path / "model.rtx").weights
    assert weights is not None
    assert weights["t"].view(torch.uint8).tolist() == [1, 0]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and links")
def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    path, plain = tmp_path / "model.rtx", tmp_path / "plain"
    plain.touch()
    (tmp_path / "link.rtx").symlink_to(path)
    save(ENGINE, tmp_path / "link.rtx")
    assert path.stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "link.rtx").is_symlink()


def test_folders_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save(ENGINE, tmp_path / "missing" / "model.rtx")


def test_an_engine_with_a_weight_recipe(tmp_path: Path) -> None:
    type_ = TensorType("f32", (2,), (1,))
    p, q = Value("p", type_), Value("q", type_)
    recipe = Graph("import", (p,), nodes=(Node("op", "aten.neg.default", (("self", p),), (q,)),), outputs=(q,))
    graph = Graph("fused", (), (Parameter("b", type_),), (Weight(Value("w", type_), ("b",), recipe),))
    save(Engine(graph, Manifest("cpu"), {}, {"b": torch.ones(2)}), tmp_path / "model.rtx")
    assert load(tmp_path / "model.rtx").graph == graph
