"""Names that people bring from Torch-TensorRT and Inductor: each exists, or is an error that says what to do."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import reduce
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from tests.test_docs import DOCS, rows_of, table_in
from torch_rtx import CompilationSettings, Input, InputError, RuntimeSettings, SettingsError, peers
from torch_rtx.settings import MODES

PAGE = "from-torch-tensorrt.md"
OPTIONS = {item.name for kind in (CompilationSettings, RuntimeSettings) for item in fields(kind)}
# Fields of CompilationSettings and of RuntimeSettings, and arguments of compile, in Torch-TensorRT 2.8 to 2.14.
THEIRS = """
    workspace_size min_block_size torch_executed_ops require_full_compilation pass_through_build_failures
    use_fast_partitioner enable_experimental_decompositions truncate_double assume_dynamic_shape_support
    use_complex_decomposition decompose_attention attn_bias_is_causal disabled_constant_fold_exclusions
    fallback_data_dependent_ops optimization_level num_avg_timing_iters max_aux_streams sparse_weights disable_tf32
    use_fp32_acc tiling_optimization_level l2_limit_for_tiling engine_capability dla_sram_size dla_local_dram_size
    dla_global_dram_size version_compatible hardware_compatible device timing_cache_path lazy_engine_init dryrun
    cache_built_engines reuse_cached_engines engine_cache_dir engine_cache_size custom_engine_cache immutable_weights
    refit_identical_engine_weights strip_engine_weights enable_weight_streaming offload_module_to_cpu
    dynamically_allocate_resources enable_resource_partitioning cpu_memory_budget enable_autocast
    autocast_low_precision_type autocast_excluded_nodes autocast_excluded_ops autocast_max_output_threshold
    autocast_max_depth_of_reduction autocast_calibration_dataloader enable_cross_compile_for_windows
    use_distributed_mode_trace enabled_precisions use_explicit_typing use_python_runtime debug make_refittable
    runtime_cache_path dynamic_shapes_kernel_specialization_strategy cuda_graph_strategy runtime_cache ir arg_inputs
    kwarg_inputs
""".split()  # noqa: SIM905
X = torch.linspace(-1, 1, 12).view(3, 4)
LINEAR = nn.Linear(4, 2).eval()


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted({*THEIRS, *peers.TORCH_TENSORRT, *peers.INDUCTOR}))
def test_an_option_is_here_or_answered(name: str) -> None:
    if name in OPTIONS:
        assert name not in peers.TORCH_TENSORRT
        return
    (found,) = (options[name] for options in peers.LIBRARIES.values() if name in options)
    for give in (CompilationSettings, RuntimeSettings):
        with pytest.raises(SettingsError, match=f"unknown option {re.escape(name)}") as error:
            give(**{name: True})
        assert f"Here: {found.use} ({found.why})" in str(error.value)


@pytest.mark.quick
@pytest.mark.parametrize("options", peers.LIBRARIES.values(), ids=peers.LIBRARIES)
def test_answers_name_what_exists(options: dict[str, peers.Answer]) -> None:
    """What looks like an option, a function or a pass in an answer is one."""
    from torch_rtx.lowering.pipeline import PASSES

    for use, _ in options.values():
        for name in re.findall(r"torch_rtx\.([\w.]+)", use):
            assert exists(name), use
        for name in re.findall(r"(?<![\w.])([a-z]+(?:_[a-z]+)+)(?![\w(.])", re.sub(r"torch[\w.]+", "", use)):
            assert name in OPTIONS | PASSES.keys() | {"dynamic_shapes"}, use


def test_every_way_to_give_options() -> None:
    """By settings, by arguments of `compile`, and by torch.compile."""
    for give in (
        lambda **options: torch_rtx.compile(LINEAR, (X,), **options),
        lambda **options: torch.compile(LINEAR, backend="rtx", options=options)(X),
        lambda **options: torch_rtx.MutableModule(LINEAR, **options),
    ):
        for name, said in {
            "enabled_precisions": "enabled_precisions is an option of Torch-TensorRT. Here: convert the model",
            "ir": "ir is an option of Torch-TensorRT. Here: leave it out",
            "use_python_runtime": "Here: leave it out (there is one runtime)",
            "max_autotune": 'max_autotune is an option of Inductor. Here: specialization_strategy="eager"',
            "triton.cudagraphs": "Here: cuda_graph_strategy (CUDA graphs are on by default)",
            "triton.unique_kernel_names": "is an option of Inductor. Here: leave it out (nothing corresponds to it)",
            "enable_precision": "enabled_precisions is an option of Torch-TensorRT",  # misspelt
            "cuda_graphs_strategy": "did you mean cuda_graph_strategy?",
        }.items():
            with pytest.raises(SettingsError) as error:
                give(**{name: "dynamo"})
            assert said in str(error.value)


def test_modes_of_inductor_are_answered() -> None:
    """Each option that a mode stands for, since people write them out."""
    modes = torch._inductor.list_mode_options()
    assert {name for mode in MODES for name in modes[mode]} <= peers.INDUCTOR.keys()


# ---- compile ---------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def forward(self, a: dict[str, torch.Tensor], b: list[torch.Tensor], scale: float = 1.0) -> torch.Tensor:
        return (a["x"] @ b[0] + b[1]) * scale


def test_inputs() -> None:
    """As a list, nested, of tensors and of `Input`s with names."""
    rows = Input(min_shape=[1, 4], opt_shape=(2, 4), max_shape=torch.Size((8, 4)), name="rows")
    given = [{"x": rows}, [torch.randn(4, 3), Input([3], dtype=torch.float32)]]
    module = torch_rtx.compile(Nested(), inputs=given, kwargs={"scale": 2.0})
    (profile,) = module.profiles
    assert str(profile["rows"][0]) == "1..8 (opt 2)"
    for batch in (1, 5, 8):
        args = {"x": torch.randn(batch, 4)}, [torch.randn(4, 3), torch.randn(3)]
        torch.testing.assert_close(module(*args, scale=2.0), Nested()(*args, scale=2.0))
    with pytest.raises(InputError, match="rows"):
        module({"x": torch.randn(9, 4)}, given[1], scale=2.0)


@pytest.mark.parametrize("build", [torch_rtx.compile, torch_rtx.dryrun, torch_rtx.cross_compile_for_windows])
def test_inputs_are_the_arguments(build: Any) -> None:
    settings = CompilationSettings(targets=["sm_89"])
    for given in ({"inputs": [X]}, {"inputs": (X,)}, {"args": [X]}, {"args": (X,)}):
        assert build(LINEAR, settings=settings, **given)
    assert build(LINEAR, inputs=[X], targets=["sm_89"], min_block_size=1)
    with pytest.raises(InputError, match="args and inputs are both given"):
        build(LINEAR, (X,), inputs=[X])
    with pytest.raises(SettingsError, match="ir is an option of Torch-TensorRT"):
        build(LINEAR, inputs=[X], ir="dynamo")


def test_options_are_fields_of_both_settings() -> None:
    module = torch_rtx.compile(LINEAR, inputs=[X], strip_weights=False, tuning_seconds=3)
    assert module.engine.weights is not None
    assert module.session.settings.tuning_seconds == 3
    for settings in ({"settings": CompilationSettings()}, {"runtime": RuntimeSettings()}):
        with pytest.raises(
            SettingsError, match=r"min_block_size and settings are both given\s+write min_block_size in"
        ):
            torch_rtx.compile(LINEAR, inputs=[X], min_block_size=1, **settings)


# ---- the page --------------------------------------------------------------------------------------------------------


def exists(name: str) -> bool:
    """Whether `torch_rtx` has this attribute, or attribute of an attribute."""
    return reduce(lambda found, part: getattr(found, part, None), name.split("."), torch_rtx) is not None


def test_names_in_the_page_exist() -> None:
    text = (DOCS / PAGE).read_text()
    assert [name for name in re.findall(r"`torch_rtx\.([\w.]+)", text) if not exists(name)] == []
    rows = rows_of(table_in(PAGE, "## Functions and classes"))
    named = [name for theirs, *_ in rows for name in theirs.split(", ")]
    assert len(named) == len(set(named))
    for name in ("dryrun", "Debugger", "MutableModule", "runtime.enable_cudagraphs", "runtime.weight_streaming"):
        assert f"`torch_rtx.{name}`" in text


def test_tables_are_printed_by_the_code() -> None:
    assert table_in(PAGE, "## Options that are not here") == peers.table(peers.TORCH_TENSORRT)
    assert table_in("integrations.md", "peers.INDUCTOR") == peers.table(peers.INDUCTOR)
    text = (DOCS / PAGE).read_text()
    same = text[text.index("## Options with the same name") : text.index("## Options that are not here")]
    assert set(re.findall(r"`(\w+)`", same)) - {"RuntimeSettings"} == OPTIONS & set(THEIRS)
