"""Keys of graphs: different where anything that lowering reads differs, equal where nothing does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch._library.fake_class_registry import FakeScriptObject

from tests.backend.graphs import FAKES, Spec, build, canonical, key_of, reordered, specs
from tests.helpers.caching import Keys
from tests.paths import ROOT
from torch_rtx.backend import fx_hash
from torch_rtx.cache.key import Key, Part
from torch_rtx.errors import Uncacheable
from torch_rtx.settings import CompilationSettings, assemblers, key_settings

X, Y = torch.linspace(-1, 1, 16).view(4, 4), torch.linspace(1, 2, 16).view(4, 4)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Keys:
    return Keys(monkeypatch)


# ---- drawn graphs ----------------------------------------------------------------------------------------------------


def test_a_thousand_graphs() -> None:
    """Equal keys where an independent form of the graph is equal, and there alone."""
    forms: dict[str, str] = {}
    names: dict[str, str] = {}
    drawn = random.Random(0)
    for _ in range(1000):
        spec = Spec.random(drawn, small=True)
        form, digest = canonical(spec), key_of(build(spec)).digest
        assert forms.setdefault(digest, form) == form
        assert names.setdefault(form, digest) == digest
    assert 300 < len(forms) < 1000  # else there was nothing to collide, or nothing to agree


@given(specs(), st.randoms(use_true_random=False))
def test_names_and_order_of_independent_nodes_do_not_matter(spec: Spec, drawn: random.Random) -> None:
    other = reordered(spec, drawn)
    assert key_of(build(spec, prefix="a")).digest == key_of(build(other, prefix="zz")).digest


CHANGES = ("edge", "order", "literal", "constant", "dtype", "stride", "input")


@given(specs(), st.sampled_from(CHANGES), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_one_change_is_another_key(spec: Spec, change: str, drawn: random.Random) -> None:
    other = spec.changed(change, drawn)
    same = canonical(spec) == canonical(other)
    assert (key_of(build(spec)).digest == key_of(build(other)).digest) == same


def test_another_process_and_hash_seed() -> None:
    drawn = random.Random(1)
    wanted = [Spec.random(drawn) for _ in range(20)]
    code = (
        "import json, sys; from tests.backend.graphs import FAKES, Spec, build, key_of\n"
        "print(json.dumps([key_of(build(Spec.of(item))).digest for item in json.load(sys.stdin)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([spec.plain() for spec in wanted]),
        env={**os.environ, "PYTHONHASHSEED": "17", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [key_of(build(spec)).digest for spec in wanted]


# ---- captured graphs -------------------------------------------------------------------------------------------------


def dynamic(tensor: torch.Tensor, low: int | None = None, high: int | None = None) -> torch.Tensor:
    copy = tensor.clone()
    torch._dynamo.mark_dynamic(copy, 0, min=low, max=high)
    return copy


PAIRS = {
    "argument order": (lambda x, y: x - y, lambda x, y: y - x),
    "int and float": (lambda x, y: x * 2, lambda x, y: x * 2.0),
    "float and float": (lambda x, y: x * 2.0, lambda x, y: x * (2.0 + 2**-50)),
    "the sign of zero": (lambda x, y: torch.full_like(x, 0.0), lambda x, y: torch.full_like(x, -0.0)),
    "nan and inf": (lambda x, y: torch.full_like(x, float("nan")), lambda x, y: torch.full_like(x, float("inf"))),
    "string": (lambda x, y: x.div(y, rounding_mode="floor"), lambda x, y: x.div(y, rounding_mode="trunc")),
    "dtype": (lambda x, y: x.to(torch.float16), lambda x, y: x.to(torch.bfloat16)),
    "bool": (lambda x, y: x.sum(1, keepdim=True), lambda x, y: x.sum(1, keepdim=False)),
    "scale of attention": (
        lambda x, y: F.scaled_dot_product_attention(x[None], y[None], x[None]),
        lambda x, y: F.scaled_dot_product_attention(x[None], y[None], x[None], scale=0.5),
    ),
    "causal attention": (
        lambda x, y: F.scaled_dot_product_attention(x[None], y[None], x[None], is_causal=True),
        lambda x, y: F.scaled_dot_product_attention(x[None], y[None], x[None]),
    ),
    "order in a list": (lambda x, y: torch.cat([x, y]), lambda x, y: torch.cat([y, x])),
    "optional tensor": (lambda x, y: F.linear(x, y), lambda x, y: F.linear(x, y, y[0])),
    "position of None": (lambda x, y: x[:, [0, 1]], lambda x, y: x[[0, 1]]),
    "order of results": (lambda x, y: (x + 1, y + 1), lambda x, y: (y + 1, x + 1)),
    "which result": (lambda x, y: x.max(0)[0], lambda x, y: x.max(0)[1].float()),
    "memory format": (
        lambda x, y: x.view(2, 2, 2, 2).clone() + 1,
        lambda x, y: x.view(2, 2, 2, 2).clone(memory_format=torch.channels_last) + 1,
    ),
    "who is written": (lambda x, y: (x.add_(1), y * 1)[1], lambda x, y: (y.add_(1), x * 1)[1]),
    "what is written": (lambda x, y: x.add_(1) * 1, lambda x, y: x.add_(2) * 1),
    "order of draws": (
        lambda x, y: (torch.rand_like(x) + x, torch.rand_like(y[0]) + y),
        lambda x, y: tuple(reversed((torch.rand_like(y[0]) + y, torch.rand_like(x) + x))),
    ),
    "one draw and two": (
        lambda x, y: (lambda r: r + r)(torch.rand_like(x)),
        lambda x, y: torch.rand_like(x) + torch.rand_like(x),
    ),
    "one result and two": (lambda x, y: (lambda r: (r, r * y, r))(x + 1), lambda x, y: (x + 1, (x + 1) * y, x + 1)),
    "nested graph": (
        lambda x, y: torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,)),
        lambda x, y: torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos() + 1, (x,)),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_functions_that_differ(pair: str, keys: Keys) -> None:
    first, second = (keys.exported(function, X, Y) for function in PAIRS[pair])
    assert first.digest != second.digest
    assert "graph" in first.differing(second)


@pytest.mark.quick
def test_constants(keys: Keys) -> None:
    """Constants of the graph are built into the engine: their bytes and types are in the key."""
    base = keys(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), X)
    assert base.digest == keys(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), X).digest
    assert base.differing(keys(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 5.0]), X)) == ["constants"]
    assert "constants" in base.differing(keys(lambda x: x + torch.tensor([1, 2, 3, 4]), X))


INPUTS = {
    "shape": (X, torch.ones(5, 4)),
    "dtype": (X, X.double()),
    "strides": (X, X.t()),
    "expanded": (X, X[:1].expand(4, 4)),
    "rank": (X, X[None]),
    "no dimensions": (torch.tensor(1.0), torch.tensor([1.0])),
    "symbolic": (X, dynamic(X)),
    "least size": (dynamic(X, 2, 64), dynamic(X, 3, 64)),
    "largest size": (dynamic(X, 2, 64), dynamic(X, 2, 65)),
}


@pytest.mark.parametrize("pair", INPUTS)
def test_inputs_that_differ(pair: str, keys: Keys) -> None:
    first, second = (keys(lambda x: x * 2, x) for x in INPUTS[pair])
    assert set(first.differing(second)) & {"inputs", "symbols"}


def test_sizes_that_are_related(keys: Keys) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, y + 1

    def equal(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch._check(x.shape[0] == y.shape[0])
        return x + 1, y + 1

    assert keys(function, dynamic(X), dynamic(Y)).digest != keys(equal, dynamic(X), dynamic(Y)).digest
    assert keys(function, dynamic(X), dynamic(Y)).digest == keys(function, dynamic(X), dynamic(Y)).digest


class Net(nn.Module):
    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(4, 4, bias=False, dtype=dtype) for _ in range(2))
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def test_weights(keys: Keys) -> None:
    """Values and names are no part of a key; types and ties are."""

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.layers(given)

    with torch.no_grad():
        base = keys(Net(), X)
        for same in (Net(), Renamed(), nn.Sequential(nn.Identity(), Net())):
            assert keys(same, X).digest == base.digest
        assert base.differing(keys(Net(tied=True), X))
        assert "weights" in base.differing(keys(Net(dtype=torch.float64), X.double()))


def test_settings(keys: Keys) -> None:
    """Options that make another engine are in the key, a set of them in any order; others are not."""
    base = keys(torch.relu, X)
    for options in (
        {"min_block_size": 2},
        {"torch_executed_ops": ["aten.relu"]},
        {"require_full_compilation": True},
        {"disabled_passes": ["cse"]},
        {"copy_weights": True},
        {"logits_chunk_bytes": 1 << 20},
    ):
        assert base.differing(keys(torch.relu, X, options=options)) == ["settings"]
    for options in ({"fallback_on_error": True}, {"cuda_graph_pool_size": 3}, {"strip_weights": False}):
        assert keys(torch.relu, X, options=options).digest == base.digest
    orders = [keys(torch.relu, X, options={"disabled_passes": list(o)}) for o in (("cse", "dce"), ("dce", "cse"))]
    assert orders[0].digest == orders[1].digest


def test_every_option_says_whether_it_makes_another_engine() -> None:
    """A new option fails here until someone has decided: does another value of it make another engine?"""
    marked = {item.name for item in fields(CompilationSettings) if item.metadata["key"]}
    assert marked == {
        *("min_block_size", "torch_executed_ops", "require_full_compilation", "disabled_passes", "copy_weights"),
        *("logits_chunk_bytes", "float32_precision", "targets"),
    }
    assert {item.name for item in fields(CompilationSettings)} - marked == {
        *(
            "fallback_on_error",
            "strip_weights",
            "device",
            "dump_dir",
            "override_dir",
            "cache_built_engines",
            "platform",
            "reuse_cached_engines",
        ),
        *("engine_cache_dir", "engine_cache_size", "engine_cache"),
    }


def test_state(keys: Keys) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        found = []
        for torch.backends.cuda.matmul.allow_tf32 in (True, False):
            found.append(keys(torch.relu, X))
        assert found[0].differing(found[1]) == ["state"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    base = keys(torch.relu, X)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert base.differing(keys(torch.relu, X)) == ["state"]
    torch.set_default_dtype(torch.float64)
    try:
        assert base.differing(keys(torch.relu, X)) == ["state"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert keys(torch.relu, X).digest == base.digest


@pytest.mark.parametrize("name", ["torch", "triton", "sources"])
def test_versions(name: str, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    base = keys(torch.relu, X)
    if name == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif name == "triton":
        found = fx_hash.metadata.version
        monkeypatch.setattr(fx_hash.metadata, "version", lambda n: "9.9" if n == "triton" else found(n))
    else:
        monkeypatch.setattr(fx_hash, "_sources", lambda: "other")
    fx_hash.versions.cache_clear()
    try:
        assert base.differing(keys(torch.relu, X)) == ["versions"]
    finally:
        monkeypatch.undo()
        fx_hash.versions.cache_clear()


def test_custom_operators() -> None:
    """Another schema under the same name is another key; so is another type from the operator's own fake."""

    def key(schema: str, kind: str = "f32") -> Key:
        with torch.library._scoped_library("rtx_cache_schemas", "FRAGMENT") as library:
            library.define(f"op({schema}) -> Tensor")
            graph = torch.fx.Graph()
            x = graph.placeholder("x")
            node = graph.call_function(torch.ops.rtx_cache_schemas.op.default, (x,))
            x.meta["val"], node.meta["val"] = FAKES["f32"], FAKES[kind]
            graph.output((node,))
            return key_of(torch.fx.GraphModule({}, graph))

    base = key("Tensor x")
    assert base.digest == key("Tensor x").digest
    assert base.differing(key("Tensor x, float scale=1.0")) == ["graph"]
    assert base.differing(key("Tensor x", kind="transposed")) == ["types"]


def test_what_has_no_name_has_no_key() -> None:
    class Local:
        pass

    def walk(target: Any, argument: Any) -> None:
        graph = torch.fx.Graph()
        node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
        graph.output((node,))
        gm = torch.fx.GraphModule({}, graph)
        node.target, node.args = target, (argument,)
        fx_hash.GraphHasher(gm, fx_hash.SharedTables(fx_hash.Symbols(torch.device("cpu"))))

    for argument in (Local(), object(), torch.Generator(), walk):
        with pytest.raises(Uncacheable, match="an argument of type"):
            walk(torch.ops.aten.relu.default, argument)
    for target in (lambda x: x, walk, Local()):
        with pytest.raises(Uncacheable, match="the Python function"):
            walk(target, 1)
    with pytest.raises(Uncacheable, match="the higher-order operator triton_kernel_wrapper_mutation"):
        walk(triton_kernel_wrapper_mutation, 1)


def test_an_object_that_no_call_reads_may_be_any_one() -> None:
    """Such as the mesh of a DTensor, which is an input of the graph beside its part."""

    def key(read: bool) -> object:
        graph = torch.fx.Graph()
        x, mesh = graph.placeholder("x"), graph.placeholder("mesh")
        x.meta["val"], mesh.meta["val"] = FAKES["f32"], FakeScriptObject.__new__(FakeScriptObject)
        given = (x, mesh) if read else (x,)
        graph.output((graph.call_function(torch.ops.aten.relu.default, given), mesh))
        hasher = fx_hash.GraphHasher(
            torch.fx.GraphModule({}, graph), fx_hash.SharedTables(fx_hash.Symbols(torch.device("cpu")))
        )
        return hasher.types, hasher.records

    assert key(False) == key(False)
    with pytest.raises(Uncacheable, match="an object, mesh, which a call of the graph reads"):
        key(True)


def test_reading_before_and_after_a_write() -> None:
    """The same calls on the same inputs, in an order that the arguments alone do not tell."""

    def graph(first: bool) -> torch.fx.GraphModule:
        graph = torch.fx.Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        early = graph.call_function(torch.ops.aten.relu.default, (x,)) if first else None
        graph.call_function(torch.ops.aten.copy_.default, (x, y))
        graph.output((early or graph.call_function(torch.ops.aten.relu.default, (x,)),))
        return torch.fx.GraphModule({}, graph)

    walks = [
        fx_hash.GraphHasher(graph(b), fx_hash.SharedTables(fx_hash.Symbols(torch.device("cpu")))) for b in (True, False)
    ]
    assert fx_hash.encode(walks[0].records) != fx_hash.encode(walks[1].records)


# ---- keys by themselves ----------------------------------------------------------------------------------------------


def test_why() -> None:
    a = Key({"settings": Part.of("x: 1\ny: 2"), "graph": Part.of("nodes: 7", b"one"), "same": Part.of("")})
    b = Key({"settings": Part.of("x: 1\ny: 3\nz: 4"), "graph": Part.of("nodes: 7", b"two"), "same": Part.of("")})
    assert a.differing(b) == ["settings", "graph"]
    assert a.why(b) == [
        "settings: y 2 -> 3; z none -> 4",
        "graph: equal summaries, different content",
    ]
    assert a.why(a) == []
    long = Key({"settings": Part.of("\n".join(f"{i}: {i}" for i in range(9)))})
    assert long.why(Key({}))[0].endswith("3 3 -> none; and 5 more")


def test_settings_in_a_key_are_sorted_text() -> None:
    settings = CompilationSettings(disabled_passes={"dce", "cse"})
    assert key_settings(settings)["disabled_passes"] == "['cse', 'dce']"
    assert key_settings(settings) == key_settings(replace(settings, engine_cache_size=7, dump_dir="x"))


def test_assemblers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another ptxas than Triton's own is in the key of engines with kernels, and so is a change of it."""
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert assemblers() == {}
    program = tmp_path / "ptxas"
    program.write_text("one")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(program))
    before = assemblers()
    assert str(program) in before["TRITON_PTXAS_PATH"]
    program.write_text("another")
    assert assemblers() != before
    program.unlink()
    assert assemblers()["TRITON_PTXAS_PATH"].endswith("None")
