"""No damaged, foreign or forged file becomes an engine."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.engine_files import ENGINE, GRAPH, SMALL, forge, saved
from torch_rtx import engine_header
from torch_rtx.engine import load, read_header, save
from torch_rtx.engine_header import MAX_GRAPH, MAX_TABLES
from torch_rtx.errors import EngineFormatError, EngineVersionError
from torch_rtx.inspection import inspect
from torch_rtx.manifest import FORMAT_VERSION, Manifest

# ---- damage ----------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.rtx"
    raw, generator = saved(path, SMALL), random.Random(0)
    data = 8 + int.from_bytes(raw[:8], "little")  # three bytes, and then the program
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(EngineFormatError):
            load(path)
        if not 0 <= at - data < 3:  # reading the header leaves the data alone
            with pytest.raises(EngineFormatError):
                read_header(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.rtx"
    raw = saved(path, SMALL)
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        for read in (load, read_header, inspect):
            with pytest.raises(EngineFormatError):
                read(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_damage_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.rtx"
    raw = saved(path, SMALL)
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 64)))
    damaged = raw[:start] + data.draw(st.binary(max_size=64)) + raw[stop:]
    path.write_bytes(damaged)
    if damaged == raw:
        load(path)
    else:
        with pytest.raises(EngineFormatError):
            load(path)


@pytest.mark.quick
@pytest.mark.parametrize("extra", [b"\0", b"trailing bytes"])
def test_trailing_bytes(tmp_path: Path, extra: bytes) -> None:
    path = tmp_path / "model.rtx"
    path.write_bytes(saved(path) + extra)
    with pytest.raises(EngineFormatError, match="its header describes"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_length_field_lies(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.rtx"
    path.write_bytes(length.to_bytes(8, "little") + saved(path)[8:])
    with pytest.raises(EngineFormatError, match="not an .rtx file"):
        read_header(path)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "other"
    for content in (b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(60), b"\0" * 8, bytes([2, *[0] * 7]) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(EngineFormatError, match=r"not an .rtx file.*other"):
            load(path)
    for metadata in (None, {"format": "pt"}, {"torch_rtx": "{}"}):
        save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(EngineFormatError, match="not an .rtx file"):
            load(path)
    with pytest.raises(EngineFormatError, match="folder"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")


# ---- forged headers: right digests, wrong content --------------------------------------------------------------------


def test_a_forged_file_can_be_right(tmp_path: Path) -> None:
    path = forge(tmp_path / "model.rtx")
    assert load(path).graph == GRAPH
    assert path.read_bytes() == saved(path)


@pytest.mark.parametrize(("version", "reader"), [(99, 98), (FORMAT_VERSION, FORMAT_VERSION + 1), (0, 0), (-1, 1)])
def test_versions(tmp_path: Path, version: int, reader: int) -> None:
    def edit(program: dict[str, Any]) -> None:  # another format may have other fields
        program["manifest"] = {"format_version": version, "min_reader": reader}

    path = forge(tmp_path / "model.rtx", edit)
    for read in (load, read_header, inspect):
        with pytest.raises(EngineVersionError) as caught:
            read(path)
        assert f"format {version}" in str(caught.value)
        if reader > FORMAT_VERSION:
            assert f"reader of format {reader}" in str(caught.value)
            assert f"this one reads {FORMAT_VERSION}" in str(caught.value)


def test_a_newer_format_that_this_reader_understands(tmp_path: Path) -> None:
    path = forge(
        tmp_path / "model.rtx", lambda p: p["manifest"].update(format_version=FORMAT_VERSION + 1, new_field=[1])
    )
    assert load(path).manifest.format_version == FORMAT_VERSION + 1
    save(load(path), path)
    assert load(path).manifest.format_version == FORMAT_VERSION


MODEL = {"frame": None, "structure": "", "weights": [None], "initializers": [0], "numbers": [""]}
OPTIONAL = ("float32", "groups", "model", "shards")
NAMES: list[Any] = [{name: 1} for name in ("", "_run", "__class__", "a b", "1")]  # that no engine has of its model
FIELDS = [field.name for field in fields(Manifest)]
WRONG: dict[str, list[Any]] = {
    **dict.fromkeys(("format_version", "min_reader"), [None, "1", 1.0, True, [1]]),
    **dict.fromkeys(("device", "platform"), [None, 1, ["cpu"]]),
    **dict.fromkeys(("producer", "digests"), [None, "x", [["a", "b"]], {"a": 1}, {"a": None}]),
    **dict.fromkeys(("inputs", "unused_names"), [None, "x", {"a": "b"}, [1], [["a"]]]),
    "float32": [None, "high", ["high"], ["high", "low"], {"product": 1}],
    "stripped": [None, 0, "false"],
    "products": [None, [], {"a": None}, {"a": {"axis": 2, "bias": None}}, {"a": {"axis": 0, "module": 1}}],
    "onnx": [1, {}, *({**MODEL, name: wrong} for name in MODEL for wrong in (1, [1.5]))],
    "model": [None, [], {"buffers": "a"}, {"buffers": [1]}, *({"attributes": wrong} for wrong in ([], *NAMES))],
    "groups": [None, [], {"tp": 2}, {"tp": {"size": 0}}, {"tp": {"size": 2.0}}, {"tp": {"size": 2, "rank": "1"}}],
    "shards": [None, [], {"a": 1}, *({"a": {"shape": [4], "splits": wrong}} for wrong in (1, [["tp"]], [["tp", 1]]))],
    "profiles": [None, {}, [[]], [{"s": 1}], [{"s": [1, 2]}], [{"s": [None, 1, 2]}], [{"s": [1, 2.0, 3]}]],
}


@pytest.mark.parametrize("name", FIELDS)
def test_manifest_fields(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.rtx"
    if name in OPTIONAL:
        found = load(forge(path, lambda p: p["manifest"].pop(name))).manifest
        assert getattr(found, name) == getattr(Manifest("cpu"), name)
    elif name != "digests":
        with pytest.raises(EngineFormatError, match=f"has no field '{name}'"):
            load(forge(path, lambda p: p["manifest"].pop(name)))
    for value in WRONG.get(name, []):
        with pytest.raises(EngineFormatError, match=f"field '{name}' of the manifest|graph is not the one"):
            load(forge(path, lambda p, value=value: p["manifest"].update({name: value})))  # type: ignore[misc]


def test_stripped_must_be_true(tmp_path: Path) -> None:
    with pytest.raises(EngineFormatError, match="unexpected: weight/it"):
        load(forge(tmp_path / "a.rtx", lambda p: p["manifest"].update(stripped=True)))
    with pytest.raises(EngineFormatError, match="missing: weight/it"):
        load(
            forge(
                tmp_path / "a.rtx", lambda p: p["manifest"].update(stripped=False), what=replace(ENGINE, weights=None)
            )
        )


def program(**changes: Any) -> Callable[[bytes], bytes]:
    """Changes what the header says of the program."""

    def change(raw: bytes) -> bytes:
        header = json.loads(raw)
        inner = json.loads(header["__metadata__"]["torch_rtx"])
        inner["program"] = {name: value for name, value in {**inner["program"], **changes}.items() if value is not None}
        header["__metadata__"]["torch_rtx"] = json.dumps(inner, separators=(",", ":"))
        return json.dumps(header, separators=(",", ":")).encode()

    return change


@pytest.mark.parametrize(
    "changes",
    [
        *({name: wrong} for name in ("tables", "graph") for wrong in (None, -1, 1.0, True, 0, 1, 2**62, "1")),
        *({"digest": wrong} for wrong in (None, 1, "0" * 64)),
        *({"codec": wrong} for wrong in (None, 1, "", "xz", "lz4", ["zlib"])),
        {"tables": MAX_TABLES},
        {"graph": MAX_GRAPH},
    ],
)
def test_a_header_that_is_wrong_about_the_program(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "a.rtx"
    saved(path)
    assert load(resign(path, program())).graph == GRAPH
    resign(path, program(**changes))
    for read in (load, read_header, inspect):
        with pytest.raises(EngineFormatError, match="program|graph"):
            read(path)


def test_a_header_without_a_program(tmp_path: Path) -> None:
    path = tmp_path / "a.rtx"
    for old, new in ((b"program\\", b"programs\\"), (b'"program":', b'"programs":')):
        assert old in saved(path)
        with pytest.raises(EngineFormatError, match="does not describe a program"):
            load(resign(path, lambda raw, old=old, new=new: raw.replace(old, new)))


@pytest.mark.parametrize("manifest", [None, [], "x", 1])
def test_no_manifest(tmp_path: Path, manifest: object) -> None:
    with pytest.raises(EngineFormatError, match="no manifest"):
        load(forge(tmp_path / "a.rtx", lambda p: p.update(manifest=manifest)))


@pytest.mark.parametrize("graph", [None, [], 1])
def test_no_graph(tmp_path: Path, graph: object) -> None:
    """The header of a file up to format 6 has it."""

    def edit(program: dict[str, Any]) -> None:
        program["graph"] = graph
        program["manifest"]["format_version"] = 6

    with pytest.raises(EngineFormatError, match="no graph"):
        load(forge(tmp_path / "a.rtx", edit))


def test_another_graph_than_the_manifest_says(tmp_path: Path) -> None:
    path = forge(tmp_path / "a.rtx", lambda p: p["manifest"]["digests"].update(graph="0" * 64))
    with pytest.raises(EngineFormatError, match="not the one that the manifest was written for"):
        read_header(path)


TEXT = str(GRAPH)
GRAPHS = {
    "text ends": "graph fused {",
    "level 'fused', not 'import'": "graph import {\n  return []\n}\n",
    "not on the allow-list": TEXT.replace("extern aten.linear.default", "extern os.system.default"),
    "defined twice": TEXT.replace("  input x: f32[s, 3]", "  input x: f32[s, 3]\n  input x: f32[s, 3]"),
    "z is not defined": TEXT.replace("input=x", "input=z"),
    "x is not defined": TEXT.replace("  input x: f32[s, 3]\n", ""),
    "line 2": "graph fused {\n" + "(" * 10_000,
    "Python function": TEXT.replace("fallback my_lib.op.default(x=y)", "fallback python(index=0, inputs=[y])"),
    "(?#body)Python function": TEXT.replace(
        "  return [z]",
        "  kernel k() graph import {\n    fallback python(index=0, inputs=[])\n    return []\n  }\n  return [z]",
    ),
    "negative size": TEXT.replace("constant 'table': i64[2]", "constant 'table': i64[-2]"),
    "(?#symbol)has no static shape": TEXT.replace("constant 'table': i64[2]", "constant 'table': i64[s]"),
    r"constant/table is i64\[2\], not i64\[3\]": TEXT.replace("'table': i64[2]", "'table': i64[3]"),
    r"constant/table is i64\[2\], not f64\[2\]": TEXT.replace("'table': i64[2]", "'table': f64[2]"),
    "missing: constant/other; unexpected: constant/table": TEXT.replace("'table'", "'other'"),
    "missing: weight/table; unexpected: constant/table": TEXT.replace("constant 'table'", "parameter 'table'"),
}


@pytest.mark.parametrize(("message", "text"), GRAPHS.items())
def test_graphs_that_are_refused(tmp_path: Path, message: str, text: str) -> None:
    assert text != TEXT

    def edit(program: dict[str, Any]) -> None:
        program["graph"] = text

    path = forge(tmp_path / "a.rtx", edit)
    for read in (load, inspect):
        with pytest.raises(EngineFormatError, match=message):
            read(path)


def table(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """Changes the entry of the constant in the table of tensors."""
    return lambda header: header["constant/table"].update(changes)


OUTER = {
    "unknown dtype": table(dtype="F33"),
    "dtype is no text": table(dtype=1),
    "a dtype of another size": table(dtype="F32"),
    "negative size": table(shape=[-2]),
    "size is no integer": table(shape=[2.0]),
    "size is a bool": table(shape=[True, 2]),
    "shape is no list": table(shape=2),
    "shape of another size": table(shape=[3]),
    "huge shape": table(shape=[2**62, 2**62, 2**62]),
    "too many sizes": table(shape=[1] * 65),
    "offset beyond the file": table(data_offsets=[0, 2**40]),
    "offsets from the end": table(data_offsets=[16, 0]),
    "a hole": table(data_offsets=[8, 24]),
    "an overlap": table(data_offsets=[16, 32]),
    "one offset": table(data_offsets=[0]),
    "no offsets": lambda header: header["constant/table"].pop("data_offsets"),
    "an unknown field": table(more=1),
    "an entry that is none": lambda header: header.update({"constant/table": None}),
    "an extra tensor": lambda header: header.update(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    "an extra weight": lambda header: header.update(
        {"weight/e": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    ),
    "a missing tensor": lambda header: header.pop("constant/table"),
    "swapped names": lambda header: header.update({"constant/tablet": header.pop("constant/table")}),
}


@pytest.mark.parametrize("edit", OUTER.values(), ids=OUTER)
def test_tables_that_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(EngineFormatError):
        load(forge(tmp_path / "a.rtx", outer=edit))


def test_data_of_another_size(tmp_path: Path) -> None:
    for data in (b"", bytes(41), bytes(43)):
        with pytest.raises(EngineFormatError, match="its header describes"):
            read_header(forge(tmp_path / "a.rtx", data=data))


def resign(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Changes the raw header of the file and makes its digest and length right again."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    old = raw[8 : 8 + length]
    digest = engine_header.PREFIX.match(old)[1]  # type: ignore[index]
    body = change(old.replace(digest, b"0" * 64, 1))
    start = len(body).to_bytes(8, "little")
    path.write_bytes(
        start + body.replace(b"0" * 64, hashlib.sha256(start + body).hexdigest().encode(), 1) + raw[8 + length :]
    )
    return path


def test_headers_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "a.rtx"
    entry = b',"constant/table":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}'
    for change in (
        lambda raw: raw.rstrip()[:-1],
        lambda raw: raw + b"{}",
        lambda raw: raw.rstrip()[:-1] + b',"a":' + b"[" * 100_000,
        lambda raw: raw.rstrip()[:-1] + b',"a":' + b"9" * 5000 + b"}",
        lambda raw: raw.rstrip()[:-1] + b',"\xff":1}',
        lambda raw: raw.rstrip()[:-1] + entry + b"}",  # given twice
        lambda raw: raw.rstrip()[:-1] + b',"__metadata__":{"torch_rtx":"{}"}}',
    ):
        saved(path)
        with pytest.raises(EngineFormatError, match="not the JSON of an engine"):
            load(resign(path, change))
    saved(path)
    assert load(resign(path, lambda raw: raw + b"        ")).graph == GRAPH
