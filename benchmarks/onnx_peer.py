"""ONNX Runtime as a peer: exported, loaded, and called on the tensors' own memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch.utils import _pytree as pytree

from benchmarks.peers import Prepared, Subject

_TYPES = {  # onnx.TensorProto.DataType
    torch.float32: 1,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


def prepare(subject: Subject) -> Prepared:
    """Export the model, or take the file of an earlier export, and load it."""
    path = subject.folder / "model.onnx"
    if not path.exists():
        program = torch.onnx.export(
            subject.model, subject.args, kwargs=subject.kwargs, dynamic_shapes=subject.dynamic, dynamo=True
        )
        assert program is not None
        program.save(str(path), external_data=True)
    return load(path, subject.device)


def load(path: Path, device: str) -> Prepared:
    """A file, called with tensors in the order of its inputs."""
    provider: Any = "CPUExecutionProvider"
    if device == "cuda":  # on PyTorch's stream, so that nobody waits for the other
        stream = str(torch.cuda.current_stream().cuda_stream)
        provider = ("CUDAExecutionProvider", {"user_compute_stream": stream, "use_tf32": "0"})
    options = onnxruntime.SessionOptions()
    # Idle threads that spin would take the processor from the peers whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))

    def call(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        binding = session.io_binding()
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        held = [tensor.contiguous() for tensor in given]
        for name, tensor in zip(inputs, held, strict=True):
            type_ = _TYPES[tensor.dtype]
            binding.bind_input(name, device, 0, type_, tuple(tensor.shape), tensor.data_ptr())
        for name in outputs:
            binding.bind_output(name, device)
        session.run_with_iobinding(binding)
        return [torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()) for value in binding.get_outputs()]

    return call
