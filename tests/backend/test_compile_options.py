"""torch.compile(backend="rtx"): how it is found, its options and modes, its errors and what it logs."""

import dataclasses
import os
import pickle
import re
import runpy
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import nn

from tests.helpers.compiled import check, compile_rtx
from torch_rtx.cache.store import FileStore
from torch_rtx.errors import LoweringError, PartitionError, SettingsError
from torch_rtx.lowering import pipeline
from torch_rtx.settings import MODES, CompilationSettings, RuntimeSettings, from_options, table

FIELDS = sorted({item.name for kind in (CompilationSettings, RuntimeSettings) for item in dataclasses.fields(kind)})
GOOD = {
    "min_block_size": 2,
    "torch_executed_ops": {"aten.exp"},
    "require_full_compilation": True,
    "fallback_on_error": True,
    "disabled_passes": ["cse"],
    "copy_weights": True,
    "float32_precision": "high",
    "logits_chunk_bytes": 1 << 30,
    "strip_weights": False,
    "device": "cpu",
    "targets": ("sm_86", 120, "ptx"),
    "platform": "any",  # any other is refused under torch.compile
    "dump_dir": "dumps",
    "override_dir": "edited",
    "tactics": "library",
    "cache_built_engines": False,
    "reuse_cached_engines": False,
    "engine_cache_dir": "engines",
    "engine_cache_size": 1 << 20,
    "engine_cache": FileStore(Path(mkdtemp()) / "own", 1 << 20),
    "cuda_graph_strategy": "disabled",
    "cuda_graph_pool_size": 3,
    "watch_weights": False,
    "specialization_strategy": "lazy",
    "specialized_shapes": 2,
    "static_outputs": True,
    "tuning_seconds": 1.5,
    "weight_streaming_budget": None,  # any other is refused under torch.compile
    "runtime_cache": "off",
    "runtime_cache_size": 1 << 20,
}
BAD = {
    "min_block_size": 0,
    "torch_executed_ops": [len],
    "require_full_compilation": 1,
    "fallback_on_error": "yes",
    "disabled_passes": [3],
    "copy_weights": 1,
    "float32_precision": "tf32",
    "logits_chunk_bytes": 0,
    "strip_weights": None,
    "device": "tpu",
    "targets": 8.6,
    "platform": "win32",
    "dump_dir": 3,
    "override_dir": True,
    "tactics": "kernel library",
    "cache_built_engines": 1,
    "reuse_cached_engines": "no",
    "engine_cache_dir": 3,
    "engine_cache_size": "5 GiB",
    "engine_cache": {},
    "cuda_graph_strategy": "sometimes",
    "cuda_graph_pool_size": True,
    "watch_weights": 1,
    "specialization_strategy": "later",
    "specialized_shapes": 0,
    "static_outputs": "yes",
    "tuning_seconds": -1,
    "weight_streaming_budget": "half",
    "runtime_cache": "",
    "runtime_cache_size": 0.5,
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_python(code, cwd, **env):
    """Run `code`, from a file because Dynamo wants sources, in a new interpreter with none of our variables set."""
    script = cwd / "script.py"
    script.write_text(textwrap.dedent(code))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCH_RTX", "TORCH_LOGS"))}
    kept["TORCH_RTX_CACHE_DIR"] = os.environ["TORCH_RTX_CACHE_DIR"]  # never the user's own
    result = subprocess.run([sys.executable, script], cwd=cwd, env=kept | env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def f(x):
    return (x.exp() + 1).sin()


# Being found ---------------------------------------------------------------------------------------------------------


def test_new_process_finds_the_backend_logs_and_dumps(tmp_path):
    """One process for three questions, because importing PyTorch is what takes the time."""
    code = """
        import torch

        assert "rtx" in torch._dynamo.list_backends(exclude_tags=())
        x = torch.randn(3)
        model = torch.compile(lambda x: (x.exp() + 1).sin(), backend="rtx", fullgraph=True)
        torch.testing.assert_close(model(x), (x.exp() + 1).sin())
    """
    result = run_python(code, tmp_path, TORCH_LOGS="+torch_rtx", TORCH_RTX_DUMP="dumps")
    assert re.search(r"simplify: \d+ -> \d+ nodes", result.stderr)  # DEBUG
    assert "1 blocks, 0 fallback nodes" in result.stderr  # INFO
    written = {path.name for path in (tmp_path / "dumps" / "graph_000").iterdir()}
    stages = {f"{index:02}_{step.name}.rtxir" for index, step in enumerate(pipeline.PIPELINE, 1) if not step.needs}
    assert written >= {"00_fx.py", "00_import.rtxir", "00_partition.txt", "run.py", *stages}


def test_importing_the_package_is_cheap(tmp_path):
    code = """
        import sys, torch_rtx

        loaded = {"torch", "torch._dynamo", "triton", "transformers"} & sys.modules.keys()
        assert not loaded, loaded
    """
    run_python(code, tmp_path)


# Options and modes ---------------------------------------------------------------------------------------------------


def test_every_option_is_tested_here():
    assert sorted(GOOD) == sorted(BAD) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_option_by_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    compilation, runtime = from_options({name: GOOD[name]})
    holder = compilation if hasattr(compilation, name) else runtime
    value = getattr(holder, name)
    assert value == (frozenset(GOOD[name]) if isinstance(value, frozenset) else GOOD[name])
    options = {name: GOOD[name]}
    torch.testing.assert_close(compile_rtx(f, options=options)(torch.ones(3)), f(torch.ones(3)))


@pytest.mark.parametrize("name", FIELDS)
def test_mistyped_option(name):
    with pytest.raises(SettingsError, match=f"option {name} must be .*, not {re.escape(repr(BAD[name]))}"):
        from_options({name: BAD[name]})


@pytest.mark.parametrize("name", ["torch_executed_ops", "disabled_passes"])
def test_one_name_is_no_collection(name):
    with pytest.raises(SettingsError, match=f"option {name} must be a collection of names, not 'aten.exp'"):
        from_options({name: "aten.exp"})


def test_torch_compile_reports_bad_options():
    with pytest.raises(SettingsError, match="unknown option min_blok_size") as caught:
        compile_rtx(f, options={"min_blok_size": 3})(torch.ones(3))
    assert all(name in str(caught.value) for name in FIELDS)
    with pytest.raises(SettingsError, match="option min_block_size must be an int of at least 1, not '3'"):
        compile_rtx(f, options={"min_block_size": "3"})(torch.ones(3))
    with pytest.raises(SettingsError, match="unknown passes nosuch[\\s\\S]*the passes are simplify"):
        compile_rtx(f, options={"disabled_passes": ["nosuch"]})(torch.ones(3))
    with pytest.raises(SettingsError, match="finish can't be disabled"):
        compile_rtx(f, options={"disabled_passes": ["finish"]})(torch.ones(3))
    for name in ("aten.sofmax", "aten.exp.nosuch", "nosuch.exp", "exp"):
        with pytest.raises(SettingsError, match=f"torch_executed_ops: no operator {name}"):
            compile_rtx(f, options={"torch_executed_ops": [name]})(torch.ones(3))


@pytest.mark.parametrize("mode", [None, *MODES])
def test_modes(mode):
    check(f, torch.ones(3), compiled=compile_rtx(f, mode=mode))


def test_bad_modes():
    with pytest.raises(SettingsError, match="unknown mode 'fastest'[\\s\\S]*known modes are default"):
        compile_rtx(f, mode="fastest")(torch.ones(3))
    with pytest.raises(RuntimeError, match="Either mode or options"):
        compile_rtx(f, mode="default", options={"min_block_size": 1})


def test_modes_are_those_of_inductor():
    assert set(MODES) <= {"default", *torch._inductor.list_mode_options()}


def test_table_names_every_option():
    text = table()
    assert all(f"| `{name}` |" in text for name in FIELDS)


def test_dump_variable_is_read_when_settings_are_made(monkeypatch):
    monkeypatch.setenv("TORCH_RTX_DUMP", "somewhere")
    assert CompilationSettings().dump_dir == "somewhere"
    assert [settings.dump_dir for settings in from_options({"dump_dir": "else"})] == ["else", "else"]


# Partition -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aten.exp", "aten.exp.default", torch.ops.aten.exp, torch.ops.aten.exp.default])
def test_torch_executed_ops(name, recorder):
    check(f, torch.ones(3), compiled=compile_rtx(f, options={"torch_executed_ops": [name]}))
    assert recorder.ops == ["!exp", "add", "sin"]


def test_min_block_size(recorder):
    options = {"torch_executed_ops": ["aten.exp"], "min_block_size": 3}
    check(f, torch.ones(3), compiled=compile_rtx(f, options=options))
    assert recorder.ops == ["!exp", "!add", "!sin"]


def test_blocks_around_a_fallback(recorder):
    """What does not depend on the fallback is one block with what stands before it."""

    def g(x, y):
        a, b = x.exp(), y.cos()
        return a.sinh() + 1, b.sin()

    options = {"torch_executed_ops": ["aten.sinh"], "min_block_size": 2}
    check(g, torch.ones(3), torch.ones(3), compiled=compile_rtx(g, options=options))
    assert sorted(recorder.ops) == ["!add", "!sinh", "cos", "exp", "sin"]


def test_require_full_compilation_names_the_node():
    options = {"torch_executed_ops": ["aten.exp"], "require_full_compilation": True}
    with pytest.raises(PartitionError, match="aten.exp.default: listed in torch_executed_ops") as caught:
        compile_rtx(f, options=options)(torch.ones(3))
    line = f.__code__.co_firstlineno + 1
    assert f"test_compile_options.py:{line}" in str(caught.value)
    with pytest.raises(PartitionError, match="min_block_size is 9"):
        compile_rtx(f, options={"min_block_size": 9, "require_full_compilation": True})(torch.ones(3))


def test_require_full_compilation_is_stronger_than_fallback_on_error():
    options = {"torch_executed_ops": ["aten.exp"], "require_full_compilation": True, "fallback_on_error": True}
    with pytest.raises(PartitionError, match="these nodes must fall back"):
        compile_rtx(f, options=options)(torch.ones(3))


def breaks_in_the_middle(x):
    y = x.exp()
    torch._dynamo.graph_break()
    return y.sin()


def breaks_first(x):
    torch._dynamo.graph_break()
    return x.exp()


def branches(x):
    return x.exp() if x.sum() > 0 else x.sin()


def calls_python(x):
    return in_python(x.exp())


@torch.compiler.disable
def in_python(x):
    return x.sin()


def is_skipped(x):
    try:
        torch._dynamo.graph_break()  # Dynamo can't go on within `try`, and compiles what is called there alone
        return f(x)
    finally:
        pass


@pytest.mark.parametrize(
    ("function", "line"),
    [(breaks_in_the_middle, 2), (breaks_first, 1), (branches, 1), (calls_python, 1), (is_skipped, 3)],
)
def test_require_full_compilation_forbids_graph_breaks(function, line):
    """Also those that leave no graph before them."""
    where = f"{Path(__file__).name}:{function.__code__.co_firstlineno + line}"
    options = {"require_full_compilation": True}
    with pytest.raises(PartitionError, match=f"a graph break leaves code to Python: .*{where}") as caught:
        compile_rtx(function, options=options, fullgraph=False)(torch.ones(3))
    assert "fullgraph=True" in caught.value.hint


class Wrapped(nn.Module):
    """Python runs functions of PyTorch's own between the call and what is compiled."""

    @torch.no_grad()
    def forward(self, x):
        return f(x)


def test_require_full_compilation_knows_what_python_runs_anyway():
    options = {"require_full_compilation": True}
    hooked = Wrapped()
    hooked.register_forward_hook(lambda module, args, result: result + 1)
    for model in (hooked, Wrapped()):
        torch._dynamo.reset()
        check(model, torch.ones(3), compiled=compile_rtx(model, options=options, fullgraph=False))
    model = Wrapped()
    model.compile(backend="rtx", options=options)
    assert torch.equal(model(torch.ones(3)), f(torch.ones(3)))
    inner = compile_rtx(f, options=options, fullgraph=False)
    assert torch.equal(breaks_first(inner(torch.ones(3))), f(torch.ones(3)).exp())  # breaks of a caller are its own


# Errors --------------------------------------------------------------------------------------------------------------


def test_an_error_arrives_as_it_is():
    """Once, with its type and without Dynamo's frames and advice; and it can go on to another process."""
    with pytest.raises(SettingsError) as caught:
        compile_rtx(f, options={"min_blok_size": 3})(torch.ones(3))
    text = "".join(traceback.format_exception(caught.value))
    assert text.count("unknown option min_blok_size") == 1
    assert "PyTorch" not in str(caught.value)
    frames = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[0] == __file__
    assert len(frames) <= 3, text
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.hint) == (SettingsError, str(caught.value), caught.value.hint)


@pytest.mark.usefixtures("broken")
def test_an_error_of_a_backward_graph_arrives_as_it_is(monkeypatch):
    loss = compile_rtx(f)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "PIPELINE", ())
        result = loss(torch.ones(3, requires_grad=True))
    with pytest.raises(LoweringError, match="pass cse failed"):
        result.sum().backward()


# Bugs ----------------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x).relu()


def failing(graph, infer):
    raise ValueError("off by one")


def in_place_of(name, run):
    """The pipeline with another function for a pass."""
    run.__name__ = name
    return tuple(dataclasses.replace(step, run=run) if step.name == name else step for step in pipeline.PIPELINE)


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setattr(pipeline, "PIPELINE", in_place_of("cse", failing))


@pytest.mark.usefixtures("broken")
def test_failing_pass_says_where_and_how_to_reproduce(tmp_path):
    compiled = compile_rtx(Broken(), options={"dump_dir": str(tmp_path)})
    message = "pass cse failed with ValueError: off by one"
    with torch.no_grad(), pytest.raises(LoweringError, match=message) as caught:
        compiled(torch.ones(2, 4))
    error = caught.value
    folder = tmp_path / "graph_000"
    script = Path(re.search(r"reproduce it with (\S+);", str(error))[1])
    assert script.parent == folder
    assert {"00_fx.py", "00_import.rtxir", "01_simplify.rtxir", "reproduce.py", "error.txt"} <= {
        p.name for p in folder.iterdir()
    }

    with pytest.raises(LoweringError, match=message):
        runpy.run_path(str(script), run_name="__main__")


def test_reproduction_runs_where_the_bug_is_fixed(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "PIPELINE", in_place_of("dce", failing))
        compiled = compile_rtx(Broken(), options={"dump_dir": str(tmp_path), "disabled_passes": ["cse"]})
        with torch.no_grad(), pytest.raises(LoweringError):
            compiled(torch.ones(2, 4))
    script = tmp_path / "graph_000" / "reproduce.py"
    assert "disabled_passes=['cse']" in script.read_text()
    runpy.run_path(str(script), run_name="__main__")
    assert "aten.linear.default" in capsys.readouterr().out


@pytest.mark.usefixtures("broken")
def test_folder_without_dump_dir():
    with pytest.raises(LoweringError) as caught:
        compile_rtx(f)(torch.ones(3))
    script = Path(re.search(r"reproduce it with (\S+);", str(caught.value))[1])
    assert script.is_file()
    for path in script.parent.iterdir():
        path.unlink()
    script.parent.rmdir()


@pytest.mark.usefixtures("broken")
def test_fallback_on_error(caplog):
    model = Broken()
    compiled = compile_rtx(model, options={"fallback_on_error": True})
    with torch.no_grad(), caplog.at_level("WARNING", logger="torch_rtx"):
        check(model, torch.ones(2, 4), compiled=compiled)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "off by one" in caplog.text


@pytest.mark.usefixtures("broken")
def test_fallback_on_error_trains(caplog):
    model, x = Broken(), torch.ones(2, 4)
    compile_rtx(model, options={"fallback_on_error": True})(x).sum().backward()
    found, model.fc.weight.grad = model.fc.weight.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(found, model.fc.weight.grad)


def test_disabled_passes_leave_a_pass_out(recorder):
    def g(x):
        return x.exp() + x.exp()

    check(g, torch.ones(3))
    assert recorder.ops == ["exp", "add"]
    torch._dynamo.reset()
    check(g, torch.ones(3), compiled=compile_rtx(g, options={"disabled_passes": ["cse"]}))
    assert recorder.ops == ["exp", "add", "exp", "exp", "add"]
