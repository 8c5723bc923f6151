"""Valid calls of the operators that a file may make, one a line of `samples.txt`.

`python -m tests.fuzz samples` writes it, from PyTorch's own samples and, for operators that these do not reach, from
`samples_by_hand.txt`. Tensors are `{"t": dtype, "s": shape, "v": values of integers}`.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rtx import aten
from torch_rtx.errors import RtxError, Unsupported

LIST, BY_HAND = (Path(__file__).with_name(name) for name in ("samples.txt", "samples_by_hand.txt"))
PER_OP, MAX_ELEMENTS = 3, 256
Sample = dict[str, Any]  # arguments by name


def read(names: frozenset[str]) -> dict[str, list[Sample]]:
    """The samples of the operators `names`."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for line in LIST.read_text().splitlines():
        name, _, text = line.partition(" ")
        if name in names:
            found[name].append(json.loads(text))
    return dict(found)


def write(names: frozenset[str]) -> None:
    """Record samples of the operators `names`, and say which have none."""
    from torch.testing._internal.common_methods_invocations import op_db

    warnings.simplefilter("ignore")
    recorder = _Recorder(names)
    for info in op_db:
        for dtype in (torch.float32, torch.int64, torch.bool, torch.complex64):
            if dtype in info.dtypes:
                for call in _calls(info, dtype):
                    recorder.direct(info, call)
                    try:
                        with recorder:
                            info.op(call.input, *call.args, **call.kwargs)
                    except Exception:
                        continue
    for line in BY_HAND.read_text().splitlines():
        op, _, arguments = line.partition(" ")
        recorder.found[f"aten.{op}"].append(_parsed(arguments))
    lines = [f"{name} {json.dumps(sample)}" for name in sorted(recorder.found) for sample in recorder.found[name]]
    LIST.write_text("\n".join(lines) + "\n")
    lacking = sorted(names - recorder.found.keys())
    print(f"{len(recorder.found)} operators, {len(lines)} samples; without: {' '.join(lacking)}")


def _parsed(arguments: str) -> Sample:
    """The arguments of a line such as `self=f32[2, 3], dim=0`."""
    tensors = re.sub(r"\b([a-z]+\d+|bool)\[([^\]]*)\]", r"{'t': '\1', 's': [\2]}", arguments)
    call = ast.parse(f"f({tensors})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def _calls(info: Any, dtype: torch.dtype) -> Iterator[Any]:
    try:
        for number, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=False)):
            if number < 8:
                yield sample
    except Exception:
        return


class _Recorder(TorchDispatchMode):
    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names, self.found = names, defaultdict[str, list[Sample]](list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.record(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def direct(self, info: Any, call: Any) -> None:
        """Composite operators are not dispatched under their names: call them."""
        packet = getattr(torch.ops.aten, info.name.rpartition(".")[2], None)
        for overload in () if packet is None else packet.overloads():
            func = getattr(packet, overload)
            if f"aten.{func.__name__}" in self.names and len(self.found[f"aten.{func.__name__}"]) < PER_OP:
                try:
                    func(call.input, *call.args, **call.kwargs)
                except Exception:
                    continue
                self.record(func, (call.input, *call.args), call.kwargs)

    def record(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        name = str(func)
        if name not in self.names or len(self.found[name]) >= PER_OP:
            return
        given = dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)) | dict(kwargs)
        try:
            sample = {key: _spec(value) for key, value in given.items() if key not in ("layout", "pin_memory")}
        except (Unsupported, RtxError, TypeError):
            return
        if sample not in self.found[name]:
            self.found[name].append(sample)


def _spec(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() > MAX_ELEMENTS or value.layout != torch.strided:
            raise TypeError("too large")
        spec: Sample = {"t": aten.dtype_name(value.dtype), "s": list(value.shape)}
        if not value.dtype.is_floating_point and not value.dtype.is_complex:
            spec["v"] = value.flatten().tolist()
        return spec
    if isinstance(value, torch.dtype):
        return aten.dtype_name(value)
    if isinstance(value, torch.device):
        return "main"
    if isinstance(value, torch.memory_format):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [_spec(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(type(value).__name__)
