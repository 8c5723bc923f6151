"""Capture: from a model to a functional ATen graph, for torch.compile (inference, training) and ahead of time.

Every inference path keeps the same *composite* operators whole (`KEEP`) and decomposes nothing else but the other
composites, so the importer sees one op set however the model came in.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.convert_frame import compile_lock
from torch._export.utils import _is_preservable_cia_op
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.export.exported_program import _decompose_exported_program, _override_composite_implicit_decomp
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_rtx.backend.fake_cuda import constants_on_cpu, install_cuda_guard
from torch_rtx.backend.fast_path import FAST_PATH
from torch_rtx.errors import CaptureError

# `compiler(gm, example_inputs) -> callable`: `gm` is an ATen GraphModule, the inputs are FakeTensors and SymInts.
GraphCompiler = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]

# CompositeImplicit operators for which a kernel or a library call exists: decomposed they could only be found again by
# pattern matching, and some (attention, LSTM) decompose differently on CPU, on fake CUDA and on a real GPU.
_KEEP_NAMES = """
    linear bilinear matmul
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    scaled_dot_product_attention softmax log_softmax
    layer_norm rms_norm _fused_rms_norm group_norm instance_norm
    relu6 selu prelu log_sigmoid
    avg_pool1d max_pool1d max_pool2d max_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler
    embedding_bag one_hot repeat_interleave lstm gru
""".split()  # noqa: SIM905


def _keep_whole(*args: Any, **kwargs: Any) -> Any:
    """The "decomposition" of a kept op: NotImplemented makes the tracer record the op itself."""
    return NotImplemented


def _overloads(names: Sequence[str]) -> Iterator[torch._ops.OpOverload]:
    for name in names:
        packet = getattr(torch.ops.aten, name, None)  # a name that this PyTorch does not have has nothing to keep
        for overload in packet.overloads() if packet else ():
            yield getattr(packet, overload)


KEEP: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    op: _keep_whole for op in _overloads(_KEEP_NAMES) if _is_preservable_cia_op(op)
}


# Per op of `KEEP`, its kernels in Python by dispatch key, and its rule for FakeTensors, if it has one.
_Tables = dict[torch._ops.OpOverload, tuple[dict[Any, Callable[..., Any]], Callable[..., Any] | None]]


def _tables() -> _Tables:
    return {op: (dict(op.py_kernels), op_implementations_dict.get(op)) for op in KEEP}


def _put(tables: _Tables) -> None:
    for op, (kernels, rule) in tables.items():
        op.py_kernels.clear()
        op.py_kernels.update(kernels)
        op._dispatch_cache.clear()
        if rule is None:
            op_implementations_dict.pop(op, None)
        else:
            op_implementations_dict[op] = rule


@cache
def _overridden() -> _Tables:
    """The tables under PyTorch's own override, which takes milliseconds: too long for every graph."""
    with _override_composite_implicit_decomp(KEEP):
        return _tables()


@contextlib.contextmanager
def keep_ops() -> Iterator[None]:
    """Trace the ops of `KEEP` whole while this is active. For inference only, see `capture_training`.

    The override patches the operators for the whole process. Dynamo's own lock guards it: another torch.compile in
    another thread must not trace under it, and a lock of our own could deadlock with Dynamo's.
    """
    with compile_lock:
        overridden, before = _overridden(), _tables()
        try:
            _put(overridden)
            yield
        finally:
            _put(before)


class NeedsAutograd(CaptureError):
    """A graph captured for inference computes gradients after all: it enables them itself."""


def needs_autograd(example_inputs: Sequence[Any]) -> bool:
    """Whether the graph must be captured for training: gradients are on and an input (or parameter) asks for one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def capture(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], inference: GraphCompiler, training: GraphCompiler
) -> Callable[..., Any]:
    """Turn a Dynamo graph into ATen graphs: for `inference` if no gradients are needed, else two for `training`."""
    if not needs_autograd(example_inputs):
        with contextlib.suppress(NeedsAutograd):
            return capture_inference(gm, example_inputs, inference)
    return capture_training(gm, example_inputs, training, training)


def capture_inference(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], compiler: GraphCompiler
) -> Callable[..., Any]:
    """Turn a Dynamo graph into one functional ATen graph, hand it to `compiler`, return the callable for Dynamo.

    Placeholders of the ATen graph stand in the order of `example_inputs`. A mutated input appears as a trailing
    `aten.copy_` to its placeholder; views of inputs that are returned are made again outside of the graph.

    Raises NeedsAutograd when the graph turns out to need gradients (use `capture_training`).
    """
    backend = aot_autograd(
        fw_compiler=_refuse_autograd,
        inference_compiler=compiler,
        decompositions=FAST_PATH,
        keep_inference_input_mutations=True,
    )
    with keep_ops():
        return backend(gm, example_inputs)


def _refuse_autograd(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    # AOTAutograd found an output that requires grad. Traced with kept ops, its gradients would silently be None.
    raise NeedsAutograd("this graph computes gradients, which inference capture would lose")


def capture_training(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], compiler_fw: GraphCompiler, compiler_bw: GraphCompiler
) -> Callable[..., Any]:
    """Turn a Dynamo graph into a forward and a backward ATen graph, return the callable for Dynamo.

    `compiler_bw` is called lazily, at the first backward. A graph that needs no gradient after all goes to
    `compiler_fw` alone, with its mutated inputs in the graph as in `capture_inference`. The min-cut partitioner decides
    what is saved for the backward and what is computed again.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    # No keep_ops() here: a kept op has no autograd formula, so every gradient behind it would silently become None.
    backend = aot_autograd(
        fw_compiler=compiler_fw,
        bw_compiler=compiler_bw,
        partition_fn=min_cut_rematerialization_partition,
        decompositions={},
        keep_inference_input_mutations=True,
    )
    return backend(gm, example_inputs)


def capture_export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
) -> torch.export.ExportedProgram:
    """Export `model` for inference as a functional ATen program in which the ops of `KEEP` are whole.

    `args`, `kwargs`, `dynamic_shapes` are those of `torch.export.export`. With `device=None` the model is traced where
    it is. With a `device`, parameters, buffers, tensor attributes and arguments are replaced by FakeTensors there while
    the model is traced: this needs neither that device nor memory for weights, so the model may live on `meta`, or hold
    FakeTensors. The model is unchanged afterwards, also when the export fails. In the result `state_dict` and
    `constants` hold the model's own tensors, on their own devices; the graph's values are on `device`.

    An ExportedProgram is taken as it is, and only decomposed if it was not; `args` must then be None.

    Raises CaptureError for arguments that do not fit together, for tensors that have no fake twin (sparse, subclasses),
    for a trace on `meta` and where fake CUDA tensors are impossible; torch.export's own errors are passed on.
    """
    device = None if device is None else torch.device(device)
    if isinstance(model, torch.export.ExportedProgram):
        if args is not None or kwargs or dynamic_shapes is not None:
            raise CaptureError("an ExportedProgram is already traced: pass no args, kwargs or dynamic_shapes")
        with compile_lock, constants_on_cpu():
            return _decompose(_on_device(model, device))
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"cannot export a {type(model).__name__}: pass an nn.Module or an ExportedProgram")
    if not isinstance(args, tuple):
        raise CaptureError(f"args must be a tuple of the model's positional arguments, not {type(args).__name__}")
    device = _trace_device(model, device)
    if device is None:
        return _decompose(_export(model, args, kwargs, dynamic_shapes))
    twins = _FakeTwins(device)
    with twins.swapped_into(model):
        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, twins.get, (args, dict(kwargs or {})))
        with twins.mode, compile_lock, constants_on_cpu():
            program = _decompose(_export(model, fake_args, fake_kwargs, dynamic_shapes))
    _put_back(twins, program.state_dict)
    _put_back(twins, program.constants)
    return program


def _trace_device(model: torch.nn.Module, device: torch.device | None) -> torch.device | None:
    """Where to trace with FakeTensors; None when the model's own tensors can be traced as they are."""
    held = [*model.parameters(), *model.buffers()]
    if device is None:
        device = next((tensor.device for tensor in held if isinstance(tensor, FakeTensor)), None)
    if "meta" in ({tensor.device.type for tensor in held} if device is None else {device.type}):
        # torch.tensor([...]) in a traced forward would lose its data there.
        raise CaptureError(
            "cannot trace on the meta device", hint="pass the device the engine is for, e.g. device='cuda'"
        )
    return device


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Any, dynamic_shapes: Any) -> Any:
    # Without gradients, `with torch.no_grad()` inside the model is no change of mode and leaves no trace in the graph.
    with torch.no_grad(), compile_lock:
        return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)


def _decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Functionalise, and take apart the composite ops that are not in `KEEP`; nothing else, as in torch.compile."""
    if program.verifier.dialect == "TRAINING":
        # What `run_decompositions` does, but for its override of every composite op, which takes longer than the rest.
        with torch.no_grad(), keep_ops(), unset_fake_temporarily():
            program = _decompose_exported_program(
                program,
                cia_to_decomp={},
                python_decomp_table=FAST_PATH,
                joint_loss_index=None,
                decompose_custom_triton_ops=False,
            )
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        program.graph.erase_node(node)  # it asserts about the traced dtypes and devices, which a capture fixes anyway
    program.graph_module.recompile()
    return program


def _on_device(program: torch.export.ExportedProgram, device: torch.device | None) -> torch.export.ExportedProgram:
    values = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    found = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    if device is not None and found and (device.type not in found or found - {device.type, "cpu"}):  # constants: on cpu
        raise CaptureError(
            f"the ExportedProgram was traced on {', '.join(sorted(found))} and cannot be moved to {device.type}",
            hint=f"capture the model itself with device={device.type!r}",
        )
    if "cuda" in found:
        install_cuda_guard()
    return program


class _FakeTwins:
    """FakeTensors on `device` in place of given tensors: the same tensor always gets the same twin (tied weights)."""

    def __init__(self, device: torch.device):
        if device.type == "cuda":
            install_cuda_guard()
        self.device = device
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._by_original: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._by_twin: dict[int, torch.Tensor] = {}

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin of `tensor`: same shape, strides, dtype; a Parameter's twin is a Parameter."""
        if id(tensor) not in self._by_original:
            twin = self._make(tensor)
            self._by_original[id(tensor)] = tensor, twin  # holds both, so that neither id is used again
            self._by_twin[id(twin)] = tensor
        return self._by_original[id(tensor)][1]

    def original(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor whose twin is `tensor`; `tensor` itself when it is no twin."""
        return self._by_twin.get(id(tensor), tensor)

    def _make(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
            raise CaptureError(
                f"cannot capture a {type(tensor).__name__} of layout {tensor.layout} on another device",
                hint="pass device=None to trace the model where it is",
            )
        with self.mode:
            twin = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
        return twin

    @contextlib.contextmanager
    def swapped_into(self, model: torch.nn.Module) -> Iterator[None]:
        """Replace every parameter, buffer and tensor attribute of `model` by its twin; put the same objects back."""
        undo: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for module in model.modules():
                for slots in (module._parameters, module._buffers, module.__dict__):
                    for name, value in slots.items():
                        own = name in ("_parameters", "_buffers", "_modules")  # in __dict__, but visited by themselves
                        twin = None if own else self._twin_of(value)
                        if twin is not None:
                            undo.append((slots, name, value))
                            slots[name] = twin
            yield
        finally:
            for slots, name, value in undo:
                slots[name] = value

    def _twin_of(self, value: Any) -> Any:
        """`value`, a tensor or a container of tensors (nn.LSTM has a list), with twins; None when it has no tensor."""
        if not isinstance(value, (torch.Tensor, list, tuple, dict)):
            return None
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            return None
        return pytree.tree_map_only(torch.Tensor, self.get, value)


def _put_back(twins: _FakeTwins, tensors: dict[str, Any]) -> None:
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = twins.original(value)
