"""Kernels in the engine file: what goes in comes out, old readers are told, and nothing wrong gets through."""

from __future__ import annotations

import copy
import hashlib
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import torch_rtx
from tests.engine_files import ENGINE, forge, saved
from tests.helpers.kernels import GRAPH
from tests.paths import ENGINES
from torch_rtx import tactics
from torch_rtx.binaries import (
    MAX_BINARY,
    Binaries,
    Pack,
    compress,
    decompress,
    digest,
    named,
    packs_of,
    with_differences,
    with_numbers,
)
from torch_rtx.cli.app import app
from torch_rtx.engine import Engine, Manifest, load, save
from torch_rtx.errors import EngineFormatError, InvalidIR, RtxError
from torch_rtx.inspection import inspect
from torch_rtx.ir import Expr, Sym, dim_expr
from torch_rtx.irparse import parse, parse_dim
from torch_rtx.manifest import FORMAT_VERSION
from torch_rtx.runtime.tuning_context import tactics_and_context
from torch_rtx.tactics import OWN, KernelTable, Launch, Tactic, Variant
from torch_rtx.tactics_v4 import read_table_v4
from torch_rtx.targets import PTX, Target

S = GRAPH.syms["s"]
BINARIES = dict(named(bytes([number]) * (500 + number)) for number in range(3))
FIRST, SECOND, THIRD = BINARIES
SHARED = Launch(
    (S, dim_expr("*", 4, S)),
    (dim_expr("//", dim_expr("+", S, 1023), 1024), 1, 2),
    False,
    Variant(FIRST, "add", 4, 0, 24, 0),
    Variant(SECOND, "add", 4, 1024, 32, 8, uses_pdl=True),
)
ONE = Launch((), (1, 1, 1), True, Variant(THIRD, "both$1", 32, 99 << 10, 255, 0), None)
ADD = (Tactic("kernel", 1.5, {OWN: SHARED}), Tactic("library", 2.5))
ADD_120 = (Tactic("library", 0.5), Tactic("kernel", 1.25, {OWN: SHARED}))
BOTH = (Tactic("kernel", 3.0, {OWN: ONE}),)
TABLE = KernelTable(
    {"add": {Target(80): ADD, Target(86): ADD, Target(120): ADD_120}, "both": {PTX: BOTH}},
    BINARIES,
)
MANIFEST = Manifest("cuda", ("x", "y"))
WITH_KERNELS = Engine(GRAPH, MANIFEST, {}, None, TABLE)
BODY = """graph import {
  dim s = 1, 1048576, 1
  input in0: f32[s]
  t: f32[s] = kernel part(in0=in0) graph import {
    dim s = 1, 1048576, 1
    input in0: f32[s]
    a: f32[s] = op aten.exp.default(self=in0)
    return [a]
  }
  b: f32[s], a: f32[s] = kernel rest(in0=t, in1=in0) graph import {
    dim s = 1, 1048576, 1
    input in0: f32[s]
    input in1: f32[s]
    a: f32[s] = op aten.mul.Scalar(self=in0, other=2.0)
    b: f32[s] = op aten.add.Tensor(self=a, other=in1)
    return [b, in0]
  }
  return [b, a]
}
"""
SPLIT = Tactic("split", 2.0, {"part": ONE, "rest": ONE}, parse(BODY))
SPLIT_TABLE = replace(TABLE, tactics={**TABLE.tactics, "both": {PTX: (SPLIT, *BOTH)}})
WITH_SPLITS = replace(WITH_KERNELS, kernels=SPLIT_TABLE)


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_round_trip(tmp_path: Path) -> None:
    raw = saved(tmp_path / "a.rtx", WITH_KERNELS)
    got = load(tmp_path / "a.rtx")
    assert got.kernels == TABLE
    assert got.graph == GRAPH
    assert raw == saved(tmp_path / "b.rtx", got)
    turned = KernelTable(dict(reversed(TABLE.tactics.items())), dict(reversed(BINARIES.items())))
    assert raw == saved(tmp_path / "c.rtx", replace(WITH_KERNELS, kernels=turned))
    with safetensors.safe_open(tmp_path / "a.rtx", "pt") as file:
        stored = {key: bytes(file.get_tensor(key).tolist()) for key in file.keys() if key != "program"}  # noqa: SIM118
        assert sorted(file.keys()) == sorted([*stored, "program"])
    assert set(stored) == {f"kernels/{digest(data)}" for data in stored.values()}
    assert len(stored) == 2  # FIRST and SECOND serve the same targets


def test_older_readers_refuse_the_format(tmp_path: Path) -> None:
    for engine in (WITH_KERNELS, replace(ENGINE, manifest=replace(MANIFEST, min_reader=2))):
        save(engine, tmp_path / "a.rtx")
        manifest = load(tmp_path / "a.rtx").manifest
        assert (manifest.format_version, manifest.min_reader) == (FORMAT_VERSION, FORMAT_VERSION)


def test_readers_of_format_5_refuse_kernels_that_add_in_memory() -> None:
    readers = {name: inspect(ENGINES / "v6" / f"{name}.rtx").manifest.min_reader for name in ("split", "sums")}
    assert readers == {"split": 5, "sums": 6}


def test_split_bodies(tmp_path: Path) -> None:
    raw = saved(tmp_path / "a.rtx", WITH_SPLITS)
    got = load(tmp_path / "a.rtx")
    assert got.kernels == SPLIT_TABLE
    assert raw == saved(tmp_path / "b.rtx", got)
    assert inspect(tmp_path / "a.rtx").kernels["compute_80"][0] == 3


def test_inspect(tmp_path: Path) -> None:
    save(WITH_KERNELS, tmp_path / "a.rtx")
    seen = inspect(tmp_path / "a.rtx")
    both, third = (len(pack.stored) for pack in packs_of([sorted((FIRST, SECOND)), [THIRD]], BINARIES))
    expected = {"sm_80": (1, both), "sm_86": (1, both), "sm_120": (1, both), "compute_80": (1, third)}
    assert seen.kernels == expected
    assert list(seen.kernels) == list(expected)
    line = f"sm_80: 1, {both} B; fastest by expectation: 1 kernel"
    assert f"kernels: compiled for (they run only with trust_binaries=True)\n  {line}\n" in str(seen)
    assert seen.tactics == {name: {"library" if name == "sm_120" else "kernel": 1} for name in expected}
    assert seen.engine_bytes == (tmp_path / "a.rtx").stat().st_size
    save(ENGINE, tmp_path / "b.rtx")
    assert "kernels: none\n" in str(inspect(tmp_path / "b.rtx"))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.rtx"), "--json"])
    assert f'"sm_86": [\n   1,\n   {both}\n  ]' in result.stdout


def test_binaries_of_a_file_run_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[KernelTable] = []

    def recorded(table: KernelTable, *rest: Any) -> Any:
        tables.append(table)
        return tactics_and_context(table, *rest)

    monkeypatch.setattr("torch_rtx.runtime.module.tactics_and_context", recorded)
    signature = torch_rtx.compile(torch.nn.ReLU(), (torch.ones(2),)).engine.manifest.signature
    text = "graph fused {\n  input input: f32[2]\n  y: f32[2] = kernel k(in0=input) graph import {\n    "
    text += "input in0: f32[2]\n    y: f32[2] = op aten.relu.default(self=in0)\n    return [y]\n  }\n  return [y]\n}\n"
    launch = replace(ONE, aligned=replace(ONE.aligned, binary=FIRST))
    table = KernelTable({"k": {PTX: (Tactic("kernel", 1.0, {OWN: launch}),)}}, {FIRST: BINARIES[FIRST]})
    save(Engine(parse(text), Manifest("cpu", ("input",), signature), {}, None, table), tmp_path / "a.rtx")
    x = torch.tensor([-1.0, 2.0])
    digest = hashlib.sha256((tmp_path / "a.rtx").read_bytes()).hexdigest()
    for trust in ({"trust_binaries": True}, {"sha256": digest}, {}):
        module = torch_rtx.load(tmp_path / "a.rtx", **trust)  # type: ignore[arg-type]
        assert bool(tables.pop()) is bool(trust)
        assert module.engine.kernels  # saved again
        assert module(x).tolist() == [0, 2]


# ---- compression -----------------------------------------------------------------------------------------------------


def test_pack() -> None:
    names = dict(named(bytes([number]) * 1000) for number in range(3))
    first, second, third = names
    packs = packs_of([[first, third], [second]], names)
    assert [pack.names() for pack in packs] == [(first, third), (second,)]
    assert all(len(pack.stored) < 150 for pack in packs)
    read = Binaries(packs)
    assert read == names
    assert read[third] is read[third]  # decompressed once
    assert list(map(id, packs_of([[second], [first, third]], read))) == list(map(id, reversed(packs)))
    assert packs_of([[third, first]], Binaries(packs, names)) == packs_of([[third, first]], names)  # other content
    single = Pack(compress(names[first]), None)
    assert Binaries([single]) == {single.names()[0]: names[first]}


PTX_TEXT = b".reg .b32 %r<9>; // %rd %laneid\n" + b"".join(
    b"add.s32 %%r%d, %%r%d, 0x%d;\nld.b64 {%%rd%d}, [%%rd%d+5];\n" % (n + 2, n, n % 3, 2 * n, n) for n in range(90)
)


@pytest.mark.parametrize("text", [PTX_TEXT, PTX_TEXT + b"[%r+5]", PTX_TEXT + b"%r007", PTX_TEXT + b"%r1234567890"])
def test_ptx_in_packs(text: bytes) -> None:
    """Registers as differences, where that can be undone."""
    names = dict(named(one) for one in (text, PTX_TEXT[:1000]))
    (pack,) = packs_of([list(names)], names)
    assert Binaries([pack]) == names
    assert pack.ptx is (text in (PTX_TEXT, PTX_TEXT + b"%r1234567890"))
    assert pack.key.startswith("ptx/" if pack.ptx else "kernels/")


def test_ptx_takes_less_as_differences() -> None:
    names = dict([named(PTX_TEXT)])
    (pack,) = packs_of([list(names)], names)
    assert len(pack.stored) < 0.7 * len(compress(PTX_TEXT))
    assert with_numbers(with_differences(PTX_TEXT)) == PTX_TEXT


def test_a_large_group_is_several_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_rtx.binaries.FULL", 1200)
    packs = packs_of([list(BINARIES)], BINARIES)  # of 500, 501 and 502 bytes
    assert [pack.names() for pack in packs] == [(FIRST, SECOND), (THIRD,)]
    assert Binaries(packs) == BINARIES


@pytest.mark.parametrize("rows", [[(FIRST, 499)], [(FIRST, 501)], [(SECOND, 500)], [(FIRST, 500), (SECOND, 0)]])
def test_packs_with_other_binaries_than_they_say(rows: list[tuple[str, int]]) -> None:
    (pack,) = packs_of([[FIRST]], BINARIES)
    with pytest.raises(EngineFormatError, match="what is compressed|is damaged"):
        Pack(pack.stored, tuple(rows)).unpacked()


def test_what_does_not_unpack() -> None:
    bomb = lzma.compress(bytes(MAX_BINARY + 1), check=lzma.CHECK_NONE)
    assert len(bomb) < 20_000
    good = compress(b"binary")
    for stored in (b"", b"\x7fELF" + bytes(100), good[:-8], good + b"more", bomb):
        with pytest.raises(EngineFormatError, match="decompressed|what is compressed"):
            decompress(stored)


@given(st.binary(max_size=200))
def test_any_bytes_unpack_or_are_refused(stored: bytes) -> None:
    with pytest.raises(EngineFormatError):
        decompress(stored)


# ---- dims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [7, S, SHARED.grid[0], dim_expr("min", S, 5), Expr("%", (S, 3))])
def test_dims(dim: Any) -> None:
    assert parse_dim(str(dim), {"s": S}) == dim


@pytest.mark.parametrize(
    "text",
    ["", "t", "1.5", "s.x", "s(", "[s]", "None", "s - 1", "s // 0", "9" * 5000, "(" * 5000, "s" + " // 2" * 5000],
)
def test_dims_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidIR) as caught:
        parse_dim(text, {"s": Sym("s")})
    assert len(str(caught.value)) < 1000


# ---- what is refused -------------------------------------------------------------------------------------------------


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces one place in the table of a file."""

    def edit(program: dict[str, Any]) -> None:
        at = program["tactics"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return edit


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def edit(program: dict[str, Any]) -> None:
        at = program["tactics"]["add"][0]
        for key in path[:-1]:
            at = at[key]
        at.pop(path[-1])

    return edit


LAUNCH = ("add", 0, "kernels", OWN)
VARIANT = (*LAUNCH, "aligned")
REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no table": lambda program: program.update(tactics=[1]),
    "table is text": lambda program: program.update(tactics="x"),
    "tactics are no list": change("add", to={}),
    "no tactic": change("add", to=[]),
    "tactic is none": change("add", 0, to=None),
    "unknown kernel": change("other", to=[]),
    **{f"no {name}": without(name) for name in ("kind", "body", "kernels", "expected_us")},
    **{f"no {name}": without("kernels", OWN, name) for name in ("scalars", "grid", "wide", "aligned", "generic")},
    "kind is a number": change("add", 0, "kind", to=1),
    "kernels are a list": change("add", 0, "kernels", to=[]),
    "a kernel that is not there": change("add", 0, "kernels", "other", to=None),
    "targets are a list": change("add", 0, "expected_us", to=["sm_80"]),
    "PTX and binaries": change("add", 0, "expected_us", to={"sm_80": 1.0, "compute_80": 1.0}),
    "strange target": change("add", 0, "expected_us", to={"sm_80a": 1.0}),
    "a time that is text": change("add", 0, "expected_us", to={"sm_80": "1.0"}),
    "a time that is a bool": change("add", 0, "expected_us", to={"sm_80": True}),
    "a negative time": change("add", 0, "expected_us", to={"sm_80": -1.0}),
    "a time that is no number": change("add", 0, "expected_us", to={"sm_80": float("nan")}),
    "an endless time": change("add", 0, "expected_us", to={"sm_80": float("inf")}),
    "grid of two": change(*LAUNCH, "grid", to=["1", "1"]),
    "grid of four": change(*LAUNCH, "grid", to=["1"] * 4),
    "grid of numbers": change(*LAUNCH, "grid", to=[1, 1, 1]),
    "negative grid": change(*LAUNCH, "grid", to=["-1", "1", "1"]),
    "unknown symbol": change(*LAUNCH, "scalars", to=["t"]),
    "value as a scalar": change(*LAUNCH, "scalars", to=["x"]),
    "scalar is code": change(*LAUNCH, "scalars", to=["__import__('os').getpid()"]),
    "scalars are none": change(*LAUNCH, "scalars", to=None),
    "deep scalar": change(*LAUNCH, "scalars", to=["s" + " // 3" * 3000]),
    "wide is a number": change(*LAUNCH, "wide", to=1),
    "launch is none": change(*LAUNCH, to=None),
    "no aligned variant": change(*VARIANT, to=None),
    "generic is text": change(*LAUNCH, "generic", to="x"),
    "no such binary": change(*VARIANT, "binary", to="0" * 32),
    "digest is short": change(*VARIANT, "binary", to="0" * 31),
    "digest is a path": change(*VARIANT, "binary", to="../../../../../etc/passwd"),
    "entry is empty": change(*VARIANT, "entry", to=""),
    "entry with a zero": change(*VARIANT, "entry", to="add\0"),
    "entry is no text": change(*VARIANT, "entry", to=1),
    "no warps": change(*VARIANT, "num_warps", to=0),
    "too many warps": change(*VARIANT, "num_warps", to=33),
    "warps as text": change(*VARIANT, "num_warps", to="4"),
    "warps as a bool": change(*VARIANT, "num_warps", to=True),
    "negative shared memory": change(*VARIANT, "shared", to=-1),
    "huge shared memory": change(*VARIANT, "shared", to=2**31),
    "half a register": change(*VARIANT, "registers", to=0.5),
    "waits as a number": change(*VARIANT, "waits", to=1),
    "table without its binaries": lambda program: program["tactics"].pop("both"),
    "no table for binaries": lambda program: program.pop("tactics"),
    "null": lambda program: program.update(tactics=None),
}


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
def test_tables_that_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = forge(tmp_path / "a.rtx", edit, what=WITH_KERNELS)
    for read in (load, inspect):
        with pytest.raises(EngineFormatError) as caught:
            read(path)
        assert len(str(caught.value)) < 2000


def split(text: str = BODY, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces fields of the split tactic of a file; `text` is its body's."""
    return lambda program: program["tactics"]["both"][0].update({"body": text, **changes})


REFUSED_SPLITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "body is none": split(body=None),
    "body is a number": split(body=1),
    "body is no graph": split("print()"),
    "other spaces": split(BODY.replace("  input", " input", 1)),
    "other inputs": split(BODY.replace("input in0: f32[s]\n  t", "input in0: f16[s]\n  t")),
    "other outputs": split(BODY.replace("return [b, a]\n}\n", "return [b]\n}\n")),
    "an op that is not allowed": split(BODY.replace("aten.exp.default", "aten.resize_.default")),
    "kernels of another name": split(BODY.replace("kernel part", "kernel other")),
    "a name for two kernels": split(BODY.replace("kernel part", "kernel rest")),
    "the whole node in a body": split(kernels={OWN: None}),
    "deep": split("graph import {\n" * 2000),
    "left out": lambda program: program["tactics"]["both"].clear(),
}


@pytest.mark.parametrize("edit", REFUSED_SPLITS.values(), ids=REFUSED_SPLITS)
def test_split_bodies_that_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = forge(tmp_path / "a.rtx", edit, what=WITH_SPLITS)
    for read in (load, inspect):
        with pytest.raises(EngineFormatError) as caught:
            read(path)
        assert len(str(caught.value)) < 4000


def test_a_forged_table_can_be_right(tmp_path: Path) -> None:
    def edit(program: dict[str, Any]) -> None:  # what a later release may add is ignored
        row = program["tactics"]["add"][0]
        row["new"] = row["kernels"][OWN]["new"] = row["kernels"][OWN]["aligned"]["new"] = 1
        row["expected_us"]["sm_150"] = 1.5

    got = load(forge(tmp_path / "a.rtx", edit, what=WITH_KERNELS)).kernels.tactics["add"]
    assert got == {**TABLE.tactics["add"], Target(150): ADD[:1]}


def test_files_that_do_not_say_whether_kernels_wait(tmp_path: Path) -> None:
    """No kernel of theirs does."""

    def edit(program: dict[str, Any]) -> None:
        launches = [launch for row in program["tactics"]["add"] for launch in row["kernels"].values()]
        assert launches
        for launch in launches:
            assert [launch[name].pop("waits") for name in ("aligned", "generic")] == [False, True]

    got = load(forge(tmp_path / "a.rtx", edit, what=WITH_KERNELS)).kernels
    assert not any(variant.uses_pdl for _, launch in got.launches() for variant in launch.variants)


# ---- formats 2 to 4 --------------------------------------------------------------------------------------------------

OLD_LAUNCH = {**tactics._write_launch(ONE), "targets": ["sm_80", "sm_86"], "library": "slower"}  # type: ignore[dict-item]
OLD = {"both": [OLD_LAUNCH], "part": [OLD_LAUNCH], "rest": [OLD_LAUNCH]}
OLD_SPLITS = {"both": [{"targets": ["sm_86"], "body": BODY}]}


@pytest.mark.parametrize(
    ("library", "with_split", "expected"),
    [
        ("none", False, ["kernel"]),
        ("slower", False, ["kernel", "library"]),
        ("faster", False, ["library", "kernel"]),
        ("none", True, ["split", "kernel"]),
        ("slower", True, ["split", "kernel", "library"]),
        ("faster", True, ["library", "split", "kernel"]),
    ],
)
def test_tactics_of_old_files(library: str, with_split: bool, expected: list[str]) -> None:
    """Launches, split bodies and what was said of the library call are tactics, in the order that they had."""
    launches = {op: [{**OLD_LAUNCH, "library": library}] for op in (OLD if with_split else ["both"])}
    table = read_table_v4(launches, OLD_SPLITS if with_split else None, GRAPH)
    assert [tactic.kind for tactic in table.tactics["both"][Target(86)]] == expected
    assert [tactic.kind for tactic in table.tactics["both"][Target(80)]] == [k for k in expected if k != "split"]
    assert table.tactics.keys() == {"both"}
    if with_split:
        split = next(tactic for tactic in table.tactics["both"][Target(86)] if tactic.kind == "split")
        assert (split.body, split.kernels) == (SPLIT.body, SPLIT.kernels)


@pytest.mark.parametrize(
    ("launches", "splits"),
    [
        ([], None),
        ({"both": [{**OLD_LAUNCH, "library": "fastest"}]}, None),
        ({"both": [{**OLD_LAUNCH, "targets": ["sm_80a"]}]}, None),
        ({"both": [{**OLD_LAUNCH, "targets": ["sm_80", "compute_80"]}]}, None),
        ({"other": [OLD_LAUNCH]}, None),
        ({"both": []}, None),
        (OLD, {"strange": OLD_SPLITS["both"]}),
        ({"both": [OLD_LAUNCH]}, OLD_SPLITS),
        (OLD, {"both": [{"targets": ["sm_90"], "body": BODY}]}),
        (OLD, {"both": [{"targets": ["sm_86"], "body": BODY.replace("return [b, a]\n}\n", "return [b]\n}\n")}]}),
    ],
)
def test_old_tables_that_are_refused(launches: Any, splits: Any) -> None:
    with pytest.raises(EngineFormatError, match="the table of kernels is invalid"):
        read_table_v4(launches, splits, GRAPH)


PACK, OTHER = (pack.key for pack in packs_of([sorted((FIRST, SECOND)), [THIRD]], BINARIES))
EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    "outer",
    [
        lambda header: header[PACK].update(dtype="I8"),
        lambda header: header[PACK].update(shape=[1, *header[PACK]["shape"]]),
        lambda header: header.pop(PACK),
        lambda header: header.update({f"kernels/{'0' * 32}": header.pop(PACK)}),
        lambda header: header.update({"kernels/": EMPTY}),
        lambda header: header.update({f"kernel/{FIRST}": EMPTY}),
    ],
    ids=["dtype", "rank", "missing", "renamed", "unexpected", "of format 6"],
)
def test_tensors_that_are_refused(tmp_path: Path, outer: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(EngineFormatError):
        load(forge(tmp_path / "a.rtx", outer=outer, what=WITH_KERNELS))


@pytest.mark.parametrize(
    "rows",
    [None, 1, [None], [[FIRST]], [[FIRST, "500"], [SECOND, 501]], [[FIRST, 500, 1]], [[FIRST, 500]], [[1, 500]]]
    + [[[FIRST, -1], [SECOND, 501]], [[FIRST, MAX_BINARY], [SECOND, 1]], [[FIRST, 1], [SECOND, 1], [THIRD, 1]]],
)
def test_tables_of_binaries_that_are_refused(tmp_path: Path, rows: Any) -> None:
    path = forge(tmp_path / "a.rtx", lambda program: program["packs"].update({PACK: rows}), what=WITH_KERNELS)
    for read in (load, inspect):
        with pytest.raises(EngineFormatError):
            read(path)


def test_a_pack_that_is_another(tmp_path: Path) -> None:
    """One with another digest than its name is refused; one whose binaries are others, when they are asked for."""
    with safetensors.safe_open(saved_path(tmp_path), "pt") as file:
        data = b"".join(bytes(file.get_tensor(key).tolist()) for key in sorted((PACK, OTHER)))
    path = forge(tmp_path / "a.rtx", data=data[:-1] + bytes([data[-1] ^ 1]), what=WITH_KERNELS)
    with pytest.raises(EngineFormatError, match="is damaged: its digest is not its name"):
        load(path)

    def swap(program: dict[str, Any]) -> None:
        rows = program["packs"][PACK]
        rows[0][0], rows[1][0] = rows[1][0], rows[0][0]

    got = load(forge(path, swap, what=WITH_KERNELS))
    with pytest.raises(EngineFormatError, match="is damaged: its digest is not its name"):
        got.kernels.binaries[FIRST]
    assert got.kernels.binaries[THIRD] == BINARIES[THIRD]


def saved_path(folder: Path) -> Path:
    saved(folder / "a.rtx", WITH_KERNELS)
    return folder / "a.rtx"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.data())
def test_damage_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.rtx"
    raw = saved(path, WITH_KERNELS)
    at = data.draw(st.integers(0, len(raw) - 1))
    path.write_bytes(raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :])
    with pytest.raises(EngineFormatError):
        load(path)


# ---- what is not saved -----------------------------------------------------------------------------------------------


def graph(old: str, new: str) -> Engine:
    """The engine with the first occurrence of a text in its graph replaced."""
    assert old in str(GRAPH)
    return replace(WITH_KERNELS, graph=parse(str(GRAPH).replace(old, new, 1)))


def table(**changes: Any) -> Engine:
    return replace(WITH_KERNELS, kernels=replace(TABLE, **changes))


ON_CPU = graph("input y: f32[s]", "input y: f32[s].cpu")
ON_CPU = replace(ON_CPU, graph=parse(str(ON_CPU.graph).replace("input in1: f32[s]", "input in1: f32[s].cpu")))
UNSAVED: dict[str, Engine] = {
    "the graph has no kernel other": table(tactics={**TABLE.tactics, "other": {PTX: BOTH}}),
    "two different kernels are called add": graph("aten.add.Tensor(self=in0", "aten.sub.Tensor(self=in0"),
    "must take and return tensors of the session's device": ON_CPU,
    "both has a target without tactics": table(tactics={**TABLE.tactics, "both": {PTX: ()}}),
    "kernel both has a target without": table(tactics={**TABLE.tactics, "both": {}}),
    "launched as PTX and as a binary": table(tactics={**TABLE.tactics, "both": {PTX: BOTH, Target(80): BOTH}}),
    "binaries do not fit the graph; missing": table(binaries={FIRST: BINARIES[FIRST], SECOND: BINARIES[SECOND]}),
    "missing: none; unexpected: 000": table(binaries={**BINARIES, "0" * 32: b""}),
}


@pytest.mark.parametrize(("message", "engine"), UNSAVED.items())
def test_kernels_must_fit_the_graph(tmp_path: Path, message: str, engine: Engine) -> None:
    with pytest.raises(RtxError, match=message):
        save(engine, tmp_path / "a.rtx")
    assert list(tmp_path.iterdir()) == []


def test_reading_changes_nothing_of_the_json() -> None:
    """`read_table` is the inverse of `write_table`, and leaves what it is given as it is."""
    for made in (TABLE, SPLIT_TABLE):
        written = tactics.write_table(made)
        before = copy.deepcopy(written)
        assert tactics.read_table(written, GRAPH) == replace(made, binaries={})
        assert written == before
