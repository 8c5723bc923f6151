"""AOTAutograd's run-time wrappers around compiled graphs, from metadata that a cache entry holds.

A capture ends with functions of PyTorch's own around the forward and the backward: an autograd.Function, which saves
tensors and gives gradients their layout; views of inputs, which are made anew; writes to inputs, which autograd has to
know of. They depend on a `ViewAndMutationMeta` alone. PyTorch's cache of AOTAutograd pickles it and builds them by
`GenericAOTAutogradResult`; here it is JSON, which runs nothing when it is read, and the same class builds them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch._dynamo import disable
from torch._functorch import aot_autograd
from torch._functorch._aot_autograd import aot_autograd_result, descriptors, functional_utils, schemas
from torch._functorch._aot_autograd.schemas import MutationType, OutputType, PlainTensorMeta, ViewAndMutationMeta
from torch._subclasses.functional_tensor import FunctionalTensor

from torch_rtx.errors import Uncacheable

Call = Callable[[list[Any]], Any]

_VIEWS: Any = torch._C._functionalization  # one class per view operator
_PLAIN = (type(None), bool, int, float, str)
_NAMED = (torch.device, torch.dtype, torch.memory_format)


@cache
def _classes() -> dict[str, type]:
    """The classes of metadata by name; reading an entry creates objects of these alone."""
    found: dict[str, type] = {c.__name__: c for c in (torch.Tensor, torch.nn.Parameter, FunctionalTensor, torch.SymInt)}
    found |= {c.__name__: c for c in (*_PLAIN, functional_utils.ViewMetaSequence)}
    for module in (schemas, descriptors):
        owned = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
        found |= {c.__name__: c for c in owned if dataclasses.is_dataclass(c) or issubclass(c, enum.Enum)}
    found["OutputType"] = OutputType
    found |= {name: c for name, c in vars(_VIEWS).items() if name.endswith("_ViewMeta") and isinstance(c, type)}
    return found | {"InverseReturnMode": _VIEWS.InverseReturnMode}


def needs_no_wrapper(meta: ViewAndMutationMeta) -> bool:
    """For inference: the wrappers do nothing."""
    classes = (*meta.subclass_inp_meta, *meta.subclass_fw_graph_out_meta)
    # The oldest supported PyTorch lacks some of these.
    work = ("tokens", "num_intermediate_bases", "act_input_indices", "num_graphsafe_rng_states")
    return (
        not any(getattr(meta, name, None) for name in work)
        and meta.grad_enabled_mutation is None
        and all(isinstance(item, PlainTensorMeta) for item in classes)
        and all(item.mutation_type is MutationType.NOT_MUTATED for item in meta.input_info)
        and all(o.output_type is OutputType.non_alias and not o.requires_grad for o in meta.output_info)
    )


def to_json(meta: ViewAndMutationMeta) -> object:
    """Metadata as nested lists, dicts and plain values.

    Raises:
        Uncacheable: the wrappers depend on objects of this process.
    """
    # What the trace was made with. Run-time wrappers need one item per tangent, which is None for a plain tensor; lines
    # of the source would be those of another model.
    traced: dict[str, Any] = {"traced_tangents": [], "tangent_source_stack_traces": None}
    traced["traced_tangent_metas"] = [None] * len(meta.subclass_tangent_meta)
    return {"class": type(meta).__name__, "fields": {k: _encode(v) for k, v in {**vars(meta), **traced}.items()}}


def from_json(content: Any) -> ViewAndMutationMeta:
    """The inverse of `to_json`; raises ValueError, KeyError, TypeError or AttributeError for other content."""
    meta = _decode(content)
    if not isinstance(meta, ViewAndMutationMeta):
        raise TypeError(f"the metadata is a {type(meta).__name__}")
    return meta


def _encode(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_encode(item) for item in value]
    if kind in (tuple, torch.Size):
        return {"tuple": [_encode(item) for item in value]}
    if kind is set:
        return {"set": sorted(map(_encode, value))}
    if kind is dict:
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, _NAMED):
        return {"named": [kind.__name__, str(value).removeprefix("torch.")]}
    if isinstance(value, type) and _classes().get(value.__name__) is value:
        return {"type": value.__name__}
    if _classes().get(kind.__name__) is kind:
        if isinstance(value, (enum.Enum, _VIEWS.InverseReturnMode)):
            return {"enum": [kind.__name__, value.name]}
        if isinstance(value, functional_utils.ViewMetaSequence):
            views: list[Any] = value.sequence
            return {"views": [[type(view).__name__, _encode(view.as_tuple())] for view in views]}
        if dataclasses.is_dataclass(kind):
            return {"class": kind.__name__, "fields": {name: _encode(item) for name, item in vars(value).items()}}
    raise Uncacheable(f"AOTAutograd's metadata has a {kind.__name__}")


def _decode(content: Any) -> Any:
    if type(content) in _PLAIN:
        return content
    if isinstance(content, list):
        return [_decode(item) for item in content]
    match content:
        case {"tuple": items}:
            return tuple(map(_decode, items))
        case {"set": items}:
            return set(items)
        case {"dict": items}:
            return {_decode(key): _decode(item) for key, item in items}
        case {"named": ["device", str(name)]}:
            return torch.device(name)
        case {"named": [_, str(name)]} if isinstance(named := getattr(torch, name, None), _NAMED):
            return named
        case {"type": str(name)}:
            return _classes()[name]
        case {"enum": [str(name), str(member)]}:
            return getattr(_classes()[name], member)
        case {"views": views}:
            made = functional_utils.ViewMetaSequence.__new__(functional_utils.ViewMetaSequence)
            made.sequence = [_classes()[name](_decode(args)) for name, args in views]
            return made
        case {"class": str(name), "fields": dict(fields)} if dataclasses.is_dataclass(_classes()[name]):
            # As pickle does: what `__post_init__` computes is among them.
            made = object.__new__(_classes()[name])
            if not fields.keys() >= {field.name for field in dataclasses.fields(made)}:
                raise ValueError(f"a {name} of the metadata is incomplete")
            made.__dict__.update({field: _decode(item) for field, item in fields.items()})
            return made
    raise ValueError(f"the metadata has {str(content)[:80]}")


def detached(backward: fx.GraphModule, meta: ViewAndMutationMeta) -> list[int]:
    """The inputs that get no gradient, which the wrappers detach so that autograd does not run on below them."""

    def detaches(gradient: object, info: schemas.InputAliasInfo) -> bool:
        replaced = info.mutation_type is MutationType.MUTATED_IN_GRAPH and info.mutates_storage_metadata
        return gradient is None and not replaced and info.requires_grad and not info.is_leaf

    gradients: Any = backward.graph.output_node().args[0]
    return [i for i, (g, info) in enumerate(zip(gradients, meta.input_info, strict=True)) if detaches(g, info)]


@dataclasses.dataclass
class _Compiled:
    """A compiled graph, as `GenericAOTAutogradResult` asks for it."""

    call: Call
    backward_state_indices: tuple[int, ...] = ()
    num_symints_saved_for_bw_: int = 0

    def load(self, example_inputs: object) -> Call:
        return self.call

    def post_compile(self, result: Call, fx_config: object) -> Call:
        return result


def wrap(
    meta: ViewAndMutationMeta,
    detached_inputs: list[int],
    forward: Call,
    backward: Call | None = None,
    backward_graph: Callable[[], fx.GraphModule] | None = None,
) -> Call:
    """The function that a capture with this metadata gives to Dynamo, with a list of inputs as its argument.

    Autocast has to be as it was for the capture.

    Args:
        backward_graph: is called by compiled autograd alone.
    """
    known: dict[str, Any] = {
        "compiled_fw": _Compiled(forward),
        "compiled_bw": None if backward is None else _Compiled(disable(backward, reason="do not trace compiled code")),
        "runtime_metadata": meta,
        "dispatch_wrappers": [],
        "indices_of_inps_to_detach": detached_inputs,
        "serialized_bw_module": backward_graph and SimpleNamespace(deserialize=backward_graph),
        "forward_time_taken_ns": 0,
        "backward_time_taken_ns": 0,
    }
    result_class: Any = aot_autograd_result.GenericAOTAutogradResult
    result = result_class(**{field.name: known.get(field.name) for field in dataclasses.fields(result_class)})
    config = schemas.AOTConfig(
        fw_compiler=None,
        bw_compiler=None,
        partition_fn=None,
        decompositions=None,
        num_params_buffers=0,
        aot_id=next(aot_autograd.AOT_COUNTER),
        keep_inference_input_mutations=True,
        enable_log=False,
    )
    call: Call = result.wrap_post_compile([], config, {})
    return call
