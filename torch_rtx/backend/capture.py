"""Capture: from a model to a functional ATen graph, for torch.compile (inference, training) and ahead of time.

Every path keeps the same CompositeImplicit operators (`KEEP`) wherever nothing differentiates them, and decomposes the
other ones and nothing else, so that the importer sees one op set for every frontend.
"""

import contextlib
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.convert_frame import compile_lock
from torch._export.passes import lift_constants_pass
from torch._export.utils import _compiling_state_context, _get_decomp_for_cia, _is_preservable_cia_op
from torch._functorch._aot_autograd.subclass_parametrization import UnwrapTensorSubclass
from torch._guards import TracingContext
from torch._ops import resolve_key
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd import forward_ad
from torch.export.exported_program import (
    _AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE,
    _decompose_exported_program,
    _override_composite_implicit_decomp,
)
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_rtx.backend.carried import carried_by, carrying
from torch_rtx.backend.distinct_calls import decomposed
from torch_rtx.backend.fake_cuda import constants_on_cpu, install_cuda_guard
from torch_rtx.backend.fake_triton import standing_in, traced_launches, whole_operators
from torch_rtx.backend.fast_path import FAST_PATH
from torch_rtx.backend.joint_graph import rewriting
from torch_rtx.backend.known_values import fixed_numbers, known_values
from torch_rtx.backend.light_trace import light_trace
from torch_rtx.backend.ordered_sizes import ordered_multiples
from torch_rtx.backend.quantized_ops import definitions
from torch_rtx.backend.registered_operators import defined_operators, registered_definitions
from torch_rtx.backend.rematerialization import partition
from torch_rtx.backend.saved_images import save_channels_last
from torch_rtx.backend.scale_check import check_scales
from torch_rtx.backend.sharded import export_divided, is_divided
from torch_rtx.backend.training import save_old_values, then
from torch_rtx.backend.undefined_gradients import Tolerating, undefined_is_none
from torch_rtx.errors import CaptureError
from torch_rtx.runtime.background import BACKGROUND
from torch_rtx.runtime.garbage import uncollected
from torch_rtx.runtime.subclasses import inner, rebuilt

# `compiler(gm, example_inputs) -> callable`: `gm` is an ATen GraphModule, the inputs are FakeTensors and SymInts.
GraphCompiler = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]

_GUARD = threading.Lock()
_ALONE = WeakKeyDictionary[FakeTensorMode, threading.RLock]()

# CompositeImplicit operators that have a kernel or a library call. Only pattern matching could recover them from their
# decompositions, and some (attention, LSTM) decompose differently on CPU, on fake CUDA and on a real GPU.
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


def _overloads(names: Sequence[str]) -> Iterator[torch._ops.OpOverload]:
    for name in names:
        packet = getattr(torch.ops.aten, name, None)  # an older PyTorch may lack the operator
        for overload in packet.overloads() if packet else ():
            yield getattr(packet, overload)


# Contexts of tools that an export needs, by their modules: without, ModelOpt's quantizers read values in Python.
_EXPORT_MODES = {"modelopt.torch.quantization.utils": "export_torch_mode"}
KEEP = tuple(op for op in _overloads(_KEEP_NAMES) if _is_preservable_cia_op(op))


def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether nothing differentiates, batches or wraps this call, so that it may be recorded as it is.

    A kept op has no formula of its own for a derivative, a batch or a tensor subclass: those of its parts are needed.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    tensors = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return not any(map(is_traceable_wrapper_subclass, tensors))


def _kept(parts: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The "decomposition" of a kept op: NotImplemented makes the tracer record the op itself."""
    return NotImplemented if _plain(args, kwargs) else parts(*args, **kwargs)


def _below_autograd(op: torch._ops.OpOverload, formula: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The kernel of a kept op where autograd could record it; `formula` is the kernel that it has otherwise."""
    if not _plain(args, kwargs):
        return formula(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


# For each op of `KEEP`: its Python kernels by dispatch key, and its FakeTensor implementation, if it has one.
_Tables = dict[torch._ops.OpOverload, tuple[dict[Any, Callable[..., Any]], Callable[..., Any] | None]]


def _tables() -> _Tables:
    return {op: (dict(op.py_kernels), op_implementations_dict.get(op)) for op in KEEP}


def _install(tables: _Tables) -> None:
    for op, (kernels, rule) in tables.items():
        op.py_kernels.clear()
        op.py_kernels.update(kernels)
        op._dispatch_cache.clear()
        if rule is None:
            op_implementations_dict.pop(op, None)
        else:
            op_implementations_dict[op] = rule


def _kernel(op: torch._ops.OpOverload, key: torch._C.DispatchKey) -> Callable[..., Any]:
    """The kernel that `op` has for a dispatch key."""
    found = resolve_key(op, key)
    return op.py_kernels.get(found) or partial(op._op_dk, found)


@cache
def _overridden() -> _Tables:
    """The tables under PyTorch's own override; cached, since the override takes milliseconds per graph."""
    formulas = {op: {key: _kernel(op, key) for key in _AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE} for op in KEEP}
    with _override_composite_implicit_decomp({op: partial(_kept, _get_decomp_for_cia(op)) for op in KEEP}):
        tables = _tables()
    for op, (kernels, _) in tables.items():
        kernels |= {key: partial(_below_autograd, op, formula) for key, formula in formulas[op].items()}
    return tables


@contextlib.contextmanager
def keep_ops() -> Iterator[None]:
    """Do not decompose the ops of `KEEP` inside of this context, except calls that something differentiates or batches.

    The override patches the operators for the whole process. It holds Dynamo's own lock: torch.compile in another
    thread must not trace meanwhile, and a second lock could deadlock with Dynamo's.
    """
    with compile_lock:
        overridden, before = _overridden(), _tables()
        try:
            _install(overridden)
            yield
        finally:
            _install(before)


@BACKGROUND.paused()
@_use_lazy_graph_module(True)  # see `capture_export`
@uncollected()
def capture(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    inference: GraphCompiler,
    forward: GraphCompiler,
    backward: GraphCompiler,
    logits_bytes: float = math.inf,
    has_kernels: bool = False,
) -> Callable[..., Any]:
    """Turn a Dynamo graph into one functional ATen graph for `inference`, or, if one of its results needs a gradient,
    into a forward and a backward graph; return the callable for Dynamo.

    Placeholders of an inference graph have the order of `example_inputs`. A mutated input appears as a trailing
    `aten.copy_` to its placeholder. AOTAutograd recreates returned views of inputs outside of the graph. In training
    the first backward may be what calls `backward`; `rematerialization` decides which tensors are saved for it.
    Products of more than `logits_bytes` exist by chunks of rows where only a loss reads them (`row_chunks`). Images are
    saved channels-last (`saved_images`) if there are kernels for the device.
    """
    changes = (save_channels_last, save_old_values) if has_kernels else (save_old_values,)
    partitioner = Tolerating(then(rewriting(partition, logits_bytes), *changes))
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=inference,
        partition_fn=partitioner,
        decompositions=FAST_PATH | definitions() | registered_definitions(),
        keep_inference_input_mutations=True,
    )
    with keep_ops(), standing_in(), whole_operators(example_inputs), defined_operators():
        call: Callable[..., Any] = backend(gm, example_inputs)
    context = TracingContext.try_get()
    meta = None if context is None or not partitioner.tolerates else context.fw_metadata
    return call if meta is None else undefined_is_none(call, meta)


@uncollected()
@_use_lazy_graph_module(True)  # nobody calls the modules between the passes of an export: their code is not written
def capture_export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
) -> torch.export.ExportedProgram:
    """Export `model` for inference as a functional ATen program that keeps the ops of `KEEP`.

    `args`, `kwargs`, `dynamic_shapes` are those of `torch.export.export`. `device=None` traces the model on its own
    device. With a `device`, FakeTensors on it replace parameters, buffers, tensor attributes and arguments during the
    trace: this needs neither the device nor memory for weights, so the model may be on `meta` or have FakeTensors. The
    model is unchanged afterwards, also if the export fails. `state_dict` and `constants` of the result have the model's
    own tensors, on their own devices; the graph's values are on `device`.

    An ExportedProgram is only decomposed, if it was not; `args` must then be None.

    Raises CaptureError for arguments that contradict each other, for tensors that can't be faked (sparse), for a
    trace on `meta`, and where fake CUDA tensors are impossible. Errors of torch.export propagate.
    """
    device = None if device is None else torch.device(device)
    if isinstance(model, torch.export.ExportedProgram):
        if args is not None or kwargs or dynamic_shapes is not None:
            raise CaptureError("an ExportedProgram is already traced: pass no args, kwargs or dynamic_shapes")
        with compile_lock, constants_on_cpu():
            return _decompose(_on_device(model, device), state_of(model))
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"cannot export a {type(model).__name__}: pass an nn.Module or an ExportedProgram")
    if not isinstance(args, tuple):
        problem = f"args must be a tuple of the model's positional arguments, not {type(args).__name__}"
        raise CaptureError(problem, hint="write torch_rtx.compile(model, (x,))")
    device = _trace_device(model, device)
    numbers = fixed_numbers(model)
    program = _traced(model, args, kwargs, dynamic_shapes, device, numbers)
    if numbers.keys().isdisjoint(program.graph_signature.buffers_to_mutate.values()):
        return program
    return _traced(model, args, kwargs, dynamic_shapes, device, {})


def _traced(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Any,
    dynamic_shapes: Any,
    device: torch.device | None,
    numbers: Mapping[str, torch.Tensor],
) -> torch.export.ExportedProgram:
    """See `capture_export`. `numbers`: buffers, by name, whose values may become part of the program."""
    if device is None:
        with carried_by(model) as carried, carrying(carried):
            known = {tensor: tensor for tensor in numbers.values()}
            return _decompose(_export(model, args, kwargs, dynamic_shapes, known), state_of(model))
    fakes = _FakeCopies(device)
    known = {fakes.get(tensor): tensor for tensor in numbers.values()}
    with carried_by(model) as carried, contextlib.nullcontext(state_of(model)) as state, fakes.swapped_into(model):
        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, fakes.get, (args, dict(kwargs or {})))
        with fakes.mode, compile_lock, constants_on_cpu(), carrying(carried):
            program = _decompose(_export(model, fake_args, fake_kwargs, dynamic_shapes, known), state)
    _restore(fakes, program.state_dict)
    _restore(fakes, program.constants)
    return program


def state_of(model: torch.nn.Module | torch.export.ExportedProgram) -> dict[str, Any]:
    """The model's parameters, buffers and, of a program, constants, by all their names."""
    if isinstance(model, torch.export.ExportedProgram):
        return {**model.constants, **model.state_dict}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


@contextlib.contextmanager
def with_fakes(model: torch.nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Inside, `model` is as in a capture for this device: it has FakeTensors, and a call of it computes types alone.
    Yields the device that they are on.

    Raises:
        CaptureError: see `capture_export`.
    """
    placed = _trace_device(model, None if device is None else torch.device(device))
    if placed is None:
        placed = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    fakes = _FakeCopies(placed)
    with fakes.swapped_into(model), fakes.mode, torch.no_grad(), _compiling_state_context():
        yield placed


def _trace_device(model: torch.nn.Module, device: torch.device | None) -> torch.device | None:
    """The device of a trace with FakeTensors; None to trace with the model's own tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    if device is None:
        device = next((tensor.device for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    if "meta" in ({tensor.device.type for tensor in tensors} if device is None else {device.type}):
        # torch.tensor([...]) in a traced forward would lose its data there.
        raise CaptureError(
            "cannot trace on the meta device", hint="pass the device the engine is for, e.g. device='cuda'"
        )
    return device


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """PyTorch warns in each export of what its own code does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        yield


@_without_warnings()
def _export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Any,
    dynamic_shapes: Any,
    known: Mapping[torch.Tensor, torch.Tensor],
) -> Any:
    # Gradients are disabled as in the decomposition, which keeps no operator that something differentiates.
    # PyTorch infers the type of a kept operator once for all calls alike, and that of a composite by its parts.
    with (
        torch.no_grad(),
        keep_ops(),
        _exporting(),
        known_values(known),
        traced_launches(),
        ordered_multiples(),
        light_trace(),
    ):
        if is_divided(model):
            with _mending({}):
                return export_divided(model, args, kwargs, dynamic_shapes)
        return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)


@contextlib.contextmanager
def _exporting() -> Iterator[None]:
    """Tell tools that replace layers, and are imported, that their layers are exported now."""
    with contextlib.ExitStack() as stack:
        for module, context in _EXPORT_MODES.items():
            enter = getattr(sys.modules.get(module), context, None)
            if enter is not None:
                stack.enter_context(enter())
        yield


@_without_warnings()
def _decompose(program: torch.export.ExportedProgram, tensors: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """Functionalize, and decompose the composite ops that are not in `KEEP`; nothing else, as in torch.compile.

    Args:
        tensors: of the model, by name.
    """
    if program.verifier.dialect == "TRAINING":
        check_scales(program, tensors)
        # `run_decompositions` without its override of every composite op, which takes longer than the rest.
        program = copy(program)
        program._constants = dict(program.constants)
        table, with_triton = FAST_PATH | definitions() | registered_definitions(), _is_for_gpu(program)
        with (
            torch.no_grad(),
            keep_ops(),
            unset_fake_temporarily(),
            _mending(program.constants),
            standing_in(),
            defined_operators(),
            ordered_multiples(),
        ):
            program = decomposed(program, table, with_triton) or _decompose_exported_program(
                program,
                cia_to_decomp={},
                python_decomp_table=table,
                joint_loss_index=None,
                decompose_custom_triton_ops=with_triton,
            )
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        program.graph.erase_node(node)  # checks dtypes and devices, which the capture fixes anyway
    program.graph_module.recompile()
    return program


def _is_for_gpu(program: torch.export.ExportedProgram) -> bool:
    """A tensor of the program is on a GPU: operators made of Triton kernels are traced. On the CPU these are called."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)


@contextlib.contextmanager
def _mending(constants: dict[str, Any]) -> Iterator[None]:
    """Mend PyTorch's decomposition of programs: it expects inner tensors of class Tensor, which FakeTensors are not,
    and forgets the constants that decompositions make. `constants` gets them.

    What it changes all threads see, as they see the flags that PyTorch changes meanwhile: one thread at a time is here.
    """

    def right_inverse(self: Any, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.like = (tensor,)  # in a tuple, since it is no parameter of `self`
        return list(inner(tensor))

    def forward(self: Any, *parts: torch.Tensor) -> torch.Tensor:
        return rebuilt(self.like[0], iter(parts))

    def lift(*args: Any) -> dict[str, Any]:
        found: dict[str, Any] = before[2](*args)
        constants.update({name: constant for name, constant in found.items() if name not in constants})
        return found

    kind: Any = UnwrapTensorSubclass
    passes: Any = lift_constants_pass
    with compile_lock:
        before = kind.right_inverse, kind.forward, passes.lift_constants_pass
        kind.right_inverse, kind.forward = right_inverse, forward
        passes.lift_constants_pass = lift
        try:
            yield
        finally:
            kind.right_inverse, kind.forward, passes.lift_constants_pass = before


@contextlib.contextmanager
def alone_with(model: object) -> Iterator[None]:
    """Let no other thread capture or lower the exported program `model`: while PyTorch infers the type of a call, all
    tensors of the program's FakeTensorMode say that they are on the device `meta`."""
    nodes = model.graph.nodes if isinstance(model, torch.export.ExportedProgram) else ()
    fakes = (value for node in nodes if isinstance(value := node.meta.get("val"), FakeTensor))
    fake = next(fakes, None)
    if fake is None:
        yield
        return
    with _GUARD:
        lock = _ALONE.setdefault(fake.fake_mode, threading.RLock())
    with lock:
        yield


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


class _FakeCopies:
    """FakeTensors on `device` that replace real tensors. A tensor has one fake copy, so that tied weights stay tied."""

    def __init__(self, device: torch.device):
        if device.type == "cuda":
            install_cuda_guard()
        self.device = device
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._by_original: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._by_fake: dict[int, torch.Tensor] = {}

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake copy of `tensor`: same shape, strides, dtype; a Parameter for a Parameter. What is no tensor, as the
        mesh of a DTensor, stays itself."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if id(tensor) not in self._by_original:
            fake = self._create(tensor)
            self._by_original[id(tensor)] = tensor, fake  # references both, so that neither id is reused
            self._by_fake[id(fake)] = tensor
        return self._by_original[id(tensor)][1]

    def original(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor whose fake copy is `tensor`; `tensor` itself if it is not a copy."""
        return self._by_fake.get(id(tensor), tensor)

    def _create(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided:
            raise CaptureError(
                f"cannot capture a {type(tensor).__name__} of layout {tensor.layout} on another device",
                hint="pass device=None to trace the model where it is",
            )
        if is_traceable_wrapper_subclass(tensor):
            fake = rebuilt(tensor, map(self.get, inner(tensor)))
        else:
            with self.mode:
                fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    @contextlib.contextmanager
    def swapped_into(self, model: torch.nn.Module) -> Iterator[None]:
        """Replace every parameter, buffer and tensor attribute of `model` by its fake copy; restore them at the end."""
        undo: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for module in model.modules():
                for slots in (module._parameters, module._buffers, module.__dict__):
                    for name, value in slots.items():
                        visited = name in ("_parameters", "_buffers", "_modules")  # in __dict__, too
                        fake = None if visited else self._copy_of(value)
                        if fake is not None:
                            undo.append((slots, name, value))
                            slots[name] = fake
            yield
        finally:
            for slots, name, value in undo:
                slots[name] = value

    def _copy_of(self, value: Any) -> Any:
        """A tensor, container of tensors (nn.LSTM has a list) or block mask as fake copies; None if `value` has no
        tensor."""
        if _is_block_mask(value):
            found = copy(value)
            vars(found).update({k: self.get(v) for k, v in vars(value).items() if isinstance(v, torch.Tensor)})
            return found
        if not isinstance(value, (torch.Tensor, list, tuple, dict)):
            return None
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            return None
        return pytree.tree_map_only(torch.Tensor, self.get, value)


def _is_block_mask(value: Any) -> bool:
    """Whether it is the `BlockMask` of `flex_attention`, which this process may not have imported."""
    kind = getattr(sys.modules.get("torch.nn.attention.flex_attention"), "BlockMask", None)
    return kind is not None and isinstance(value, kind)


def _restore(fakes: _FakeCopies, tensors: dict[str, Any]) -> None:
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = fakes.original(value)
