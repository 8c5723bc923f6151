"""Options of Torch-TensorRT and of Inductor that torch_rtx does not have: what to do instead, and why.

`settings` answers an unknown name from these tables, and docs/from-torch-tensorrt.md and docs/integrations.md contain
`table()` of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Answer(NamedTuple):
    """What to do in place of an option, and why it is not here."""

    use: str
    why: str


def _answers(*rows: tuple[str, str, str]) -> dict[str, Answer]:
    """Answers by name; the first cell of a row has one name or several."""
    return {name: Answer(use, why) for names, use, why in rows for name in names.split()}


_LEAVE = "leave it out"

TORCH_TENSORRT = _answers(
    (
        "enabled_precisions precision use_explicit_typing",
        "convert the model, as by model.half(), or call it under autocast",
        "an engine computes in the dtypes of its model",
    ),
    (
        "enable_autocast autocast_low_precision_type autocast_excluded_nodes autocast_excluded_ops "
        "autocast_max_output_threshold autocast_max_depth_of_reduction autocast_calibration_dataloader",
        "call the model under torch.autocast, also in an export",
        "PyTorch's own casts are captured with the model",
    ),
    ("calibrator", "torch_rtx.quantize", "a model is quantized before it is compiled"),
    ("truncate_double truncate_long_and_double", _LEAVE, "float64 and int64 are computed as they are"),
    ("disable_tf32", "float32_precision", "by default as PyTorch is set to when the engine is built"),
    ("use_fp32_acc", _LEAVE, "kernels accumulate in float32; library calls obey PyTorch's settings"),
    ("inputs", "the argument inputs of torch_rtx.compile", "it is no option of an engine"),
    ("arg_inputs", "the argument inputs of torch_rtx.compile", "both are the positional arguments"),
    ("kwarg_inputs", "the argument kwargs of torch_rtx.compile", "both are the keyword arguments"),
    ("ir", _LEAVE, 'models are captured by torch.export; torch.compile(model, backend="rtx") is the other way'),
    ("dynamic_shapes", "the argument dynamic_shapes of torch_rtx.compile, or torch_rtx.Input", "it is no option"),
    ("dryrun", "torch_rtx.dryrun(model, inputs)", "it builds nothing"),
    ("debug", "torch_rtx.Debugger()", "it is a context, and logs and dumps while it lasts"),
    ("pass_through_build_failures", _LEAVE, "errors are raised, unless fallback_on_error=True"),
    ("use_python_runtime", _LEAVE, "there is one runtime"),
    ("lazy_engine_init", _LEAVE, "loading an engine compiles nothing"),
    ("workspace_size", _LEAVE, "module.session.memory() says what a call takes; nothing else is allocated"),
    ("dynamically_allocate_resources", _LEAVE, "the memory of a call is PyTorch's, and free after it"),
    (
        "enable_resource_partitioning cpu_memory_budget offload_module_to_cpu",
        _LEAVE,
        "a build needs no weights: the model may be on the meta device",
    ),
    ("use_fast_partitioner", _LEAVE, "there is one partitioner"),
    ("fallback_data_dependent_ops", _LEAVE, "operators fall back by themselves where they must"),
    ("assume_dynamic_shape_support", _LEAVE, "there are no converters, which could lack it"),
    ("allow_shape_tensors", _LEAVE, "sizes are part of every engine"),
    ("use_complex_decomposition", _LEAVE, "complex numbers are PyTorch's"),
    ("enable_experimental_decompositions", _LEAVE, "there is one set of decompositions"),
    ("decompose_attention", 'disabled_passes=["raise_attention"]', "attention is one kernel where it can be"),
    ("attn_bias_is_causal", _LEAVE, "a mask is taken for causal only where that is proven"),
    ("disabled_constant_fold_exclusions", _LEAVE, "weights are computed by recipes, which a refit runs again"),
    (
        "optimization_level num_avg_timing_iters tiling_optimization_level l2_limit_for_tiling",
        'specialization_strategy="eager", and tuning_seconds',
        "kernels are measured where the engine runs",
    ),
    ("max_aux_streams", _LEAVE, "an engine runs on the stream of its caller"),
    ("sparse_weights", _LEAVE, "structured sparsity is not used"),
    (
        "engine_capability dla_sram_size dla_local_dram_size dla_global_dram_size",
        _LEAVE,
        "there is neither a DLA nor a safety runtime",
    ),
    ("gpu_id", 'device="cuda:1" of torch_rtx.load', "an engine names no device of a machine"),
    ("version_compatible", _LEAVE, "a later release reads the engines of earlier ones"),
    ("hardware_compatible", 'targets="portable"', "such an engine has kernels for several generations of GPUs"),
    ("enable_cross_compile_for_windows", 'platform="windows"', "it names the system that may load the engine"),
    ("use_distributed_mode_trace", _LEAVE, "collectives are part of every graph that has some"),
    (
        "make_refittable immutable_weights refit_identical_engine_weights",
        _LEAVE,
        "every engine can be refitted",
    ),
    ("strip_engine_weights", "strip_weights", "it is that option, and True by default"),
    (
        "enable_weight_streaming",
        "weight_streaming_budget, or torch_rtx.runtime.weight_streaming(module)",
        "every engine can stream its weights",
    ),
    ("timing_cache_path runtime_cache_path", "runtime_cache", "measurements and kernels are in one file"),
    ("custom_engine_cache", "engine_cache", "it is that option"),
    ("dynamic_shapes_kernel_specialization_strategy", "specialization_strategy", "it is that option"),
)

_ON = "done wherever it pays"
_MEASURED = 'specialization_strategy="eager"', "it compiles and measures kernels before the call returns"
INDUCTOR = _answers(
    ("triton.cudagraphs triton.cudagraph_trees", "cuda_graph_strategy", "CUDA graphs are on by default"),
    ("max_autotune max_autotune_gemm max_autotune_pointwise coordinate_descent_tuning", *_MEASURED),
    ("max_autotune_gemm_backends max_autotune_conv_backends", "tactics", "it names the kinds of implementations"),
    ("epilogue_fusion prologue_fusion aggressive_fusion combo_kernels pattern_matcher", _LEAVE, _ON),
    ("shape_padding permute_fusion layout_optimization split_reductions", _LEAVE, _ON),
    ("freezing", "torch_rtx.compile", "an engine that is built ahead of time computes weights once"),
    ("benchmark_kernel profile_bandwidth", "torch_rtx.profile", "it measures each node of a call"),
    ("trace.enabled", "dump_dir, or torch_rtx.Debugger()", "it writes every stage of a compilation"),
    ("fx_graph_cache force_disable_caches", "cache_built_engines and reuse_cached_engines", "both are on by default"),
    ("compile_threads", _LEAVE, "kernels are compiled in the background, in a process of their own"),
    ("cpp_wrapper", _LEAVE, "a CUDA graph is one launch"),
    ("size_asserts", _LEAVE, "the inputs of each call are checked"),
    ("fullgraph dynamic mode", "an argument of torch.compile", "it is no option of a backend"),
)
LIBRARIES: Mapping[str, Mapping[str, Answer]] = {"Torch-TensorRT": TORCH_TENSORRT, "Inductor": INDUCTOR}


def answer(name: str) -> str | None:
    """What to do instead of the option `name` of a peer; None: no peer has it."""
    for library, options in LIBRARIES.items():
        if name in options:
            use, why = options[name]
            return f"{name} is an option of {library}. Here: {use} ({why})"
    if name.partition(".")[0] in ("triton", "cpp", "cuda", "trace", "aot_inductor", "test_configs"):
        return f"{name} is an option of Inductor. Here: {_LEAVE} (nothing corresponds to it)"
    return None


def table(options: Mapping[str, Answer]) -> str:
    """Answers as a Markdown table; names with one answer share a row."""
    rows: dict[Answer, list[str]] = {}
    for name, found in options.items():
        rows.setdefault(found, []).append(f"`{name}`")
    lines = ["| option | instead | why |", "|---|---|---|"]
    lines += [f"| {', '.join(names)} | {use} | {why} |" for (use, why), names in rows.items()]
    return "\n".join(lines) + "\n"
