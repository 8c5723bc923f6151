"""`MutableModule`: a model that is compiled and stays itself, for users of Torch-TensorRT's class of that kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.eval_frame import OptimizedModule

from torch_rtx.errors import InputError
from torch_rtx.settings import from_options


class MutableModule(OptimizedModule):
    """What `torch.compile(model, backend="rtx", options=options)` returns; the options are checked at once.

    Attributes are those of `model`, to read and to set, and so are parameters and modules, under their names there. The
    next call sees what has changed: values of parameters, other tensors as parameters, other modules, plain attributes.
    New values cost nothing; for another program torch.compile captures the model again, and finds it again later.

    Args:
        options: fields of `CompilationSettings` and `RuntimeSettings`.

    Raises:
        SettingsError: an option is unknown, or has the wrong type.
    """

    # As class attributes, since OptimizedModule sets all others on the model.
    _ranges: tuple[Any, Any] = None, None
    _options: Mapping[str, Any] = {}

    def __init__(self, model: nn.Module, **options: Any) -> None:
        from_options(options)
        compiled: Any = torch.compile(model, backend="rtx", options=options)
        super().__init__(model, compiled.dynamo_ctx)
        self._torchdynamo_orig_callable, self._torchdynamo_wrapper_id = model.forward, id(self)  # as on `compiled`
        self.get_compiler_config = compiled.get_compiler_config
        self.__dict__["_orig_mod"] = model  # no child, which would be part of every name in a state dict
        for slots in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[slots] = model.__dict__[slots]
        self._options = options

    def set_expected_dynamic_shape_range(
        self, args_dynamic_shape: Sequence[Any] | None, kwargs_dynamic_shape: Mapping[str, Any] | None = None
    ) -> None:
        """Compile these axes for any sizes from the first call on; otherwise the second size that occurs does that.

        Args:
            args_dynamic_shape, kwargs_dynamic_shape: for each argument, as in `dynamic_shapes` of torch.export, such as
                `{0: Dim("batch", min=1, max=8)}`. The bounds have no effect: no size is refused.
        """
        self._ranges = args_dynamic_shape, kwargs_dynamic_shape

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result.

        Raises:
            InputError: the arguments do not have the structure that `set_expected_dynamic_shape_range` got.
        """
        if torch.compiler.is_compiling():
            return self._orig_mod(*args, **kwargs)  # a part of what is being compiled
        for given, ranges in zip((args, kwargs), self._ranges, strict=True):
            _mark(given, ranges)
        return super().__call__(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the model does."""
        return self._orig_mod.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._orig_mod._load_from_state_dict(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._orig_mod, self._options, self._ranges)


def _again(model: nn.Module, options: Mapping[str, Any], ranges: tuple[Any, Any]) -> MutableModule:
    """A copy, also in another process."""
    module = MutableModule(model, **options)
    module._ranges = ranges
    return module


def _mark(given: Any, ranges: Any) -> None:
    """Mark the axes of tensors that `ranges` give a Dim."""
    if ranges is None:
        return
    if isinstance(given, torch.Tensor) and isinstance(ranges, Mapping | Sequence):
        axes = ranges.items() if isinstance(ranges, Mapping) else enumerate(ranges)
        maybe_mark_dynamic(given, [axis for axis, dim in axes if dim is not None and not isinstance(dim, int)])
    elif isinstance(given, Mapping) and isinstance(ranges, Mapping):
        for name, inner in given.items():
            _mark(inner, ranges.get(name))
    elif isinstance(given, list | tuple) and isinstance(ranges, list | tuple) and len(ranges) >= len(given):
        for inner, of_inner in zip(given, ranges, strict=False):
            _mark(inner, of_inner)
    else:
        hint = "write them as dynamic_shapes of torch.export: {axis: Dim} for a tensor, the same containers around it"
        raise InputError(f"the dynamic shapes of a {type(given).__name__} can't be {ranges!r}", hint=hint)
