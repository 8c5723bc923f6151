"""`from_onnx`: an ONNX model as a PyTorch module that runs node by node."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, fx, nn

from torch_rtx.errors import InputError
from torch_rtx.onnx import extras, host  # noqa: F401  # the former first: it says which package is missing
from torch_rtx.onnx.dtypes import dtype_of
from torch_rtx.onnx.outline import Outline, digest_of, outline
from torch_rtx.onnx.plan import Weight, in_dtype, plan
from torch_rtx.onnx.products import Product, products_of
from torch_rtx.onnx.reader import FRAME, read, reading
from torch_rtx.onnx.run import Runner

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Source = Union[str, os.PathLike[str], "onnx.ModelProto", "ir.Model"]
COUNTED = (torch.int64, torch.bool)  # indices and masks: in a Constant node they are part of the program
# Names that the module's own attributes have, or that PyTorch's code of a capture can't have or can't spell.
TAKEN = {"self", "_weights", "_steps", "_float", "_runner", "_outlined", "_framed", "_traced"} | {*dir(fx.GraphModule)}
UNSPEAKABLE = r'["\\\r\n\0]'
LEARNT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def from_onnx(source: Source, fixed: Mapping[str, Any] | None = None) -> OnnxModule:
    """An ONNX model as a module, in evaluation mode.

    It runs eagerly, below `torch.compile` and `torch.export`, and can be trained. Its inputs are positional or have
    ONNX's names; its results are a tensor, or a tuple of the model's outputs.

    Args:
        source: a path, an `onnx.ModelProto` or an `onnx_ir.Model`.
        fixed: values of inputs by ONNX's names, such as a sampling rate: they become part of the program, and what
            the model decides by them is decided now.

    Raises:
        OnnxError: the model is damaged, or has what is not supported; names the file, the node and the operator.
        InputError: `fixed` has what is no input, or no value of its type and shape.
        IntegrationError: the package onnx_ir is missing.
        FileNotFoundError: there is no such file.
    """
    module = read_module(source, fixed)
    module.__class__ = _class([(given.argument, given.optional) for given in module.inputs])
    module.make_traceable()
    return module


def read_module(source: Source, fixed: Mapping[str, Any] | None = None, mapped: bool = False) -> OnnxModule:
    """As `from_onnx`; but the module can't be compiled, and Dynamo, which takes long, is not loaded.

    Args:
        mapped: the module is there for its tensors alone, see `reader.data`.
    """
    model, file = read(source)
    with reading(file):
        return OnnxModule(model, file, fixed or {}, mapped)


class OnnxInput:
    """What a model says of an input.

    Attributes:
        name: ONNX's name; `argument`: the same as a parameter of `forward`.
        kind: Tensor; list for a sequence; None: any, such as an optional.
        dtype: None: any, or not a tensor.
        shape: a number or a name for each axis, or None for an axis of any size; None: any rank.
        optional: the model has a default.
    """

    def __init__(self, value: ir.Value, argument: str, optional: bool) -> None:
        self.name, self.argument, self.optional = str(value.name), argument, optional
        kinds = {"TensorType": Tensor, "SequenceType": list}
        self.kind: type | None = kinds.get(type(value.type).__name__)
        self.dtype = dtype_of(int(value.dtype)) if value.dtype is not None else None
        self.shape = None if value.shape is None else tuple(_dim(dim) for dim in value.shape)

    def check(self, given: Any) -> None:
        """Raises InputError if a value is of another kind, or a tensor has another dtype, rank or fixed size."""
        if self.kind is not None and not isinstance(given, self.kind) and not (given is None and self.optional):
            kind = "a tensor" if self.kind is Tensor else "a list of tensors"
            raise InputError(f"input {self.name!r} is {kind}, not of type {type(given).__name__}")
        if not isinstance(given, Tensor):
            return
        if self.dtype is not None and given.dtype != self.dtype:
            raise InputError(f"input {self.name!r} has dtype {given.dtype}, not {self.dtype}")
        sizes = self.shape
        if sizes is not None and len(sizes) != given.dim():
            raise InputError(f"input {self.name!r} has {given.dim()} axes, not {len(sizes)}")
        for axis, size in enumerate(sizes or ()):
            if isinstance(size, int) and given.shape[axis] != size:
                raise InputError(f"input {self.name!r} has size {given.shape[axis]} on axis {axis}, not {size}")


def _dim(dim: Any) -> int | str | None:
    """The size or its name. Exporters write -1 and `?`, too, for a size that varies."""
    size = dim if isinstance(dim, int) else dim.value
    known = size >= 0 if isinstance(size, int) else bool(re.search(r"\w", size or ""))
    return size if known else None


class OnnxModule(nn.Module):
    """An ONNX model that runs node by node.

    `state_dict()` has ONNX's names: a name with dots is that of a tensor in nested modules. Floats are parameters,
    other tensors are buffers. Numbers that Constant nodes hold, and tensors from which shapes are computed, are part of
    the program: buffers that are not in the state dict.

    Attributes:
        inputs: what the model says of its inputs.
        output_names: ONNX's names of the results.
        onnx_names: ONNX's names of the tensors that could not keep theirs, by their names here.
        file: the path of the model, if it came from one.
        copies: names of ONNX's that are other names of tensors, with their slots.
    """

    def __init__(self, model: ir.Model, file: str | None, fixed: Mapping[str, Any], mapped: bool = False) -> None:
        super().__init__()
        steps = plan(model, file, _fixed(model, fixed), mapped)
        self.file, self.copies = file, steps.copies
        self.onnx_names: dict[str, str] = {}
        self.output_names = tuple(str(value.name) for value in model.graph.outputs)
        free = [value for value in model.graph.inputs if value.name not in fixed]
        given = [value for value in free if value.const_value is None]
        optional = [value for value in free if value.const_value is not None]
        slots = dict(zip(model.graph.inputs, steps.inputs, strict=True))
        arguments = _arguments([str(value.name) for value in (*given, *optional)])
        self.inputs = [
            OnnxInput(value, argument, value.const_value is not None)
            for value, argument in zip((*given, *optional), arguments, strict=True)
        ]
        numbers: dict[str, tuple[nn.Module, str]] = {}
        where = [(weight.slot, *self._add(weight, numbers)) for weight in steps.weights]
        # Not the module itself, which would be a cycle: its memory would be freed late.
        self._weights = [(slot, None if owner is self else owner, name) for slot, owner, name in where]
        known = {weight.slot: host.of_tensor(weight.tensor) for weight in steps.weights if weight.known}
        inputs = tuple(slots[value] for value in (*given, *optional))
        self._steps, self._float = steps.steps, torch.float32
        self._runner = Runner(steps.steps, inputs, tuple(steps.outputs), known, tuple(w.slot for w in steps.weights))
        called = [slots[v] for v in model.graph.inputs if v.const_value is None or v.name in fixed]
        self._outlined = steps.steps, steps.outputs, called
        frame, stored = model.meta.get(FRAME, (None, {}))
        own = {weight.slot: (weight, *stored[weight.name]) for weight in steps.weights if weight.name in stored}
        self._framed = frame, {slot: (index, size, weight.tensor.dtype) for slot, (weight, index, size) in own.items()}
        self.eval()

    def make_traceable(self) -> None:
        """Have Dynamo trace what the steps do, not the code that runs them; nor that code, where this fails and the
        module runs eagerly."""
        from torch._dynamo import disable, nonstrict_trace  # takes long to import

        self._traced = nonstrict_trace(disable(self._runner.traced))

    def outline(self) -> Outline:
        """What makes the program besides its weights."""
        return outline(*self._outlined)

    def frame(self) -> tuple[str | None, dict[int, int]]:
        """The digest of the file's frame, see `framed`, and the indexes of the initializers, by slot. None: the module
        does not come from a file, or its tensors are not as they are there."""
        frame, stored = self._framed
        for slot, owner, name in self._weights:
            tensor = getattr(owner or self, name)
            index, size, dtype = stored.get(slot, (None, tensor.nbytes, tensor.dtype))
            if tensor.nbytes != size or tensor.dtype != dtype:
                return None, {}
        return frame, {slot: index for slot, (index, *_) in stored.items()}

    def products(self) -> dict[int, Product]:
        """What is known of the matrices among the tensors, by slot."""
        ranks = {slot: getattr(owner or self, name).dim() for slot, owner, name in self._weights}
        return products_of(self._outlined[0], ranks)

    def places(self) -> dict[int, tuple[str, Tensor, bool]]:
        """For the slot of each tensor: its name in this module, the tensor, and whether it is part of the program."""
        prefixes = {id(module): f"{path}." if path else "" for path, module in self.named_modules()}
        kept = self.state_dict(keep_vars=True).keys()
        found = {}
        for slot, owner, name in self._weights:
            path = prefixes[id(owner or self)] + name
            found[slot] = path, getattr(owner or self, name).detach(), path not in kept
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnnxModule:
        """Inputs, and casts to float32, change their dtype with the weights, by `half()` or `to(torch.bfloat16)`."""
        for given in self.inputs:
            if given.dtype is not None and given.dtype.is_floating_point:
                given.dtype = fn(torch.empty(0, dtype=given.dtype)).dtype
        self._float = self._runner.dtype = fn(torch.empty(0, dtype=self._float)).dtype
        self._runner.steps = self._steps if self._float is torch.float32 else in_dtype(self._steps, self._float)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_traced"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.make_traceable()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model."""
        inputs = self._bound(args, kwargs)
        tensors = [getattr(owner or self, name) for _, owner, name in self._weights]
        run = self._traced if torch.compiler.is_dynamo_compiling() else self._runner.run
        results = run(tensors, inputs)
        return results[0] if len(results) == 1 else tuple(results)

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The inputs in their order; None for those that have their default."""
        if len(args) > len(self.inputs):
            raise InputError(f"the model has {len(self.inputs)} inputs, not {len(args)}")
        values = list(args)
        names = [given.argument for given in self.inputs]
        for given in self.inputs[len(args) :]:
            if given.argument not in kwargs and not given.optional:
                raise InputError(f"the input {given.name!r} is missing", hint=f"the inputs are {', '.join(names)}")
            values.append(kwargs.get(given.argument))
        unknown = [name for name in kwargs if name not in names[len(args) :]]
        if unknown:
            raise InputError(f"there is no input {unknown[0]!r}", hint=f"the inputs are {', '.join(names)}")
        for given, value in zip(self.inputs, values, strict=True):
            given.check(value)
        return values

    def _add(self, weight: Weight, numbers: dict[str, tuple[nn.Module, str]]) -> tuple[nn.Module, str]:
        """Register a tensor, in nested modules for the dots of its name; where it is then. Equal numbers of Constants
        are one: a file may have hundreds, and each costs time in a capture."""
        if not weight.constant or weight.tensor.numel() != 1:
            return self._place(weight)
        key = digest_of(weight.tensor)
        if key not in numbers:
            numbers[key] = self._place(weight)
        return numbers[key]

    def _place(self, weight: Weight) -> tuple[nn.Module, str]:
        learnt = weight.tensor.dtype in LEARNT and not weight.state
        number = weight.constant and (weight.tensor.numel() == 1 or weight.tensor.dtype in COUNTED)
        owner: nn.Module = self
        *path, leaf = weight.name.split(".")
        fits = all((*path, leaf)) and (path or [leaf])[0] not in TAKEN and not re.search(UNSPEAKABLE, weight.name)
        for part in path if fits else ():
            inner = owner._modules.get(part)
            if inner is None:
                if hasattr(owner, part):
                    break
                inner = nn.Module()
                owner.add_module(part, inner)
            owner = inner
        else:
            if fits and not hasattr(owner, leaf):
                return self._register(owner, leaf, weight, learnt, number)
        leaf = re.sub(rf"\.|{UNSPEAKABLE}", "_", weight.name)
        while not leaf or leaf in TAKEN or hasattr(self, leaf):
            leaf += "_"
        self.onnx_names[leaf] = weight.name
        return self._register(self, leaf, weight, learnt, number)

    def _register(
        self, owner: nn.Module, name: str, weight: Weight, learnt: bool, number: bool
    ) -> tuple[nn.Module, str]:
        if learnt and not weight.known and not number:
            owner.register_parameter(name, nn.Parameter(weight.tensor))
        else:
            owner.register_buffer(name, weight.tensor, persistent=not weight.known and not number)
        return owner, name


def _fixed(model: ir.Model, fixed: Mapping[str, Any]) -> dict[str, Tensor]:
    """The values of inputs that are fixed, as tensors."""
    inputs = {str(value.name): OnnxInput(value, str(value.name), False) for value in model.graph.inputs}
    unknown = [name for name in fixed if name not in inputs]
    if unknown:
        raise InputError(f"there is no input {unknown[0]!r}", hint=f"the inputs are {', '.join(inputs)}")
    found = {}
    for name, value in fixed.items():
        try:
            found[name] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=inputs[name].dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"input {name!r} can't be fixed to {value!r}: {error}") from None
        inputs[name].check(found[name])
    return found


def _arguments(names: Sequence[str]) -> list[str]:
    """Names of parameters of a Python function: ONNX's, with `_` for what a name can't have."""
    found: list[str] = []
    for name in names:
        argument = re.sub(r"\W", "_", name) or "input"
        argument = f"_{argument}" if argument[0].isdigit() else argument
        while argument in found or iskeyword(argument) or argument == "self":
            argument += "_"
        found.append(argument)
    return found


def _class(inputs: Sequence[tuple[str, bool]]) -> type[OnnxModule]:
    def forward(self: OnnxModule, *args: Tensor, **kwargs: Tensor) -> Any:
        return OnnxModule.forward(self, *args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    for name, optional in inputs:
        parameters.append(inspect.Parameter(name, kind, default=None if optional else inspect.Parameter.empty))
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def reduce(self: OnnxModule, protocol: int) -> Any:
        return _blank, (tuple(inputs),), self.__getstate__()

    return type("OnnxModule", (OnnxModule,), {"forward": forward, "__reduce_ex__": reduce})


def _blank(inputs: Sequence[tuple[str, bool]]) -> OnnxModule:
    """A module without a state: copies and pickles restore theirs."""
    cls = _class(inputs)
    return cls.__new__(cls)
