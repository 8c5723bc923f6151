"""Reads ONNX models from files that nobody vouches for.

`read` gives a checked model, whose external data stays on disk until `data` reads a tensor of it. Nothing outside of
the model's folder is opened: not by `..`, an absolute path, a symbolic link or a hard link.
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from torch_rtx.errors import OnnxError, RtxError
from torch_rtx.onnx import framed, wire
from torch_rtx.onnx.dtypes import PACKED, SIGNED, dtype_of

# In the meta data of a model from a file: the digest of its frame, or None; by name, the index and the bytes of
# initializers.
FRAME = "torch_rtx.frame"
NEWEST = 28  # the newest version of ONNX's own operators that is known here


def read(source: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> tuple[ir.Model, str | None]:
    """A model, checked, and its path if it comes from a file.

    Raises:
        OnnxError: it is damaged or breaks ONNX's rules; the message names the node.
        FileNotFoundError: there is no such file.
    """
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if path is None and not isinstance(source, ir.Model | onnx.ModelProto):
        hint = "pass a path, an onnx.ModelProto, such as onnx.load_from_string(data), or an onnx_ir.Model"
        raise OnnxError(f"an ONNX model can't be a {type(source).__name__}", hint=hint)
    with reading(path):
        if path is not None:
            model = _parsed(path)
        else:
            model = source if isinstance(source, ir.Model) else _deserialized(source, None)
        return _checked(model, path), path


class _Inner(ir.ExternalTensor):
    """A tensor whose data are in the file of the model itself."""


def _parsed(path: str) -> ir.Model:
    """The model in a file; the data of large initializers stay there."""
    proto = onnx.ModelProto()
    with open(path, "rb") as file:
        try:
            structure, places = wire.split(file)
            proto.ParseFromString(structure)
            frame, cut = framed.frame(file)
        except OSError:
            raise
        except Exception as error:  # the parser's class depends on protobuf's implementation
            raise OnnxError("the file is not an ONNX model, or it is damaged", file=path) from error
    if not proto.HasField("graph"):
        raise OnnxError("the file has no graph: it is not an ONNX model, or it is damaged", file=path)
    model = _deserialized(proto, path)
    named = {tensor.name: index for index, tensor in enumerate(proto.graph.initializer)}
    whole = not any(isinstance(tensor, ir.ExternalTensor) for tensor in _tensors(model))
    model.meta[FRAME] = (
        frame if whole else None,
        {name: (index, cut[index][1]) for name, index in named.items() if index in cut},
    )
    folder, name = os.path.split(os.path.abspath(path))
    for index, (offset, length) in places.items():
        stored = proto.graph.initializer[index]
        if stored.data_location != onnx.TensorProto.EXTERNAL:
            shape, dtype = ir.Shape(stored.dims), ir.DataType(stored.data_type)
            inner = _Inner(name, offset, length, dtype, shape=shape, name=stored.name, base_dir=folder)
            model.graph.initializers[stored.name].const_value = inner
    return model


def _deserialized(proto: Any, path: str | None) -> ir.Model:
    _check_names(proto.graph, path)
    model = ir.serde.deserialize_model(proto)
    folder = None if path is None else os.path.dirname(os.path.abspath(path))
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            if folder is None:
                problem = f"the data of {tensor.name!r} is in another file, and the folder of the model is not known"
                raise OnnxError(problem, hint="give the model's path instead")
            tensor.base_dir = folder
    return model


@contextmanager
def reading(path: str | None) -> Iterator[None]:
    """Turns whatever a damaged model makes onnx_ir or this package raise into an OnnxError with the first reason."""
    try:
        yield
    except OnnxError as error:
        if error.file is not None or path is None:
            raise
        raise OnnxError(error.message, file=path, node=error.node, op=error.op, hint=error.hint) from error
    except (RtxError, OSError, MemoryError):
        raise
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise OnnxError(f"the model can't be read: {reason}", file=path) from error


# ---- rules of a model ------------------------------------------------------------------------------------------------


def _check_names(graph: onnx.GraphProto, file: str | None) -> None:
    """A name has one meaning in a graph. (onnx_ir keeps the last of two initializers.)"""
    seen: set[str] = set()
    for kind, names in (
        ("input", [value.name for value in graph.input]),
        ("initializer", [tensor.name for tensor in graph.initializer]),
    ):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise OnnxError(f"two {kind}s have the name {twice[0]!r}", file=file)
        seen |= set(names)
    for node in graph.node:
        for name in filter(None, node.output):
            if name in seen:
                raise OnnxError(f"two values have the name {name!r}", file=file, node=node.name, op=node.op_type)
            seen.add(name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _check_names(inner, file)


def _checked(model: ir.Model, file: str | None) -> ir.Model:
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is not None and not 1 <= version <= NEWEST:
        hint = f"versions 1 to {NEWEST} are known; convert the model, or update torch_rtx"
        raise OnnxError(f"the model has version {version} of ONNX's operators", file=file, hint=hint)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        _check_graph(graph, file)
    for tensor in _tensors(model):
        _check_tensor(tensor, file)
    return model


def _check_graph(graph: ir.Graph, file: str | None) -> None:
    """Every value is made before it is used; nodes are put in such an order."""
    try:
        graph.sort()
    except ValueError as error:
        raise OnnxError("the graph has a cycle", file=file) from error
    for node in ir.traversal.RecursiveGraphIterator(graph):
        op = _op_name(node)
        for value in node.inputs:
            if value is not None and not _is_made(value):
                raise OnnxError(f"no node makes the input {value.name!r}", file=file, node=node.name, op=op)
    for value in graph.outputs:
        if not _is_made(value):
            raise OnnxError(f"no node makes the output {value.name!r}", file=file)


def _is_made(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.const_value is not None


def _op_name(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(model: ir.Model) -> Iterator[Any]:
    """The tensors of a model: of initializers and of attributes, in subgraphs and functions too."""
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.value
                elif attribute.type is ir.AttributeType.TENSORS and not attribute.is_ref():
                    yield from attribute.value


def _check_tensor(tensor: Any, file: str | None) -> None:
    """The shape is one, and external data is there. What is in the model itself, `data` checks."""
    dims = list(tensor.shape)
    if not all(isinstance(dim, int) and dim >= 0 for dim in dims):
        raise OnnxError(f"tensor {tensor.name!r} has the shape {dims}", file=file)
    if isinstance(tensor, ir.ExternalTensor):
        os.close(_opened(tensor, file)[0])


def _bytes(tensor: Any) -> int:
    return -(-math.prod(tensor.shape) * tensor.dtype.bitwidth // 8)


def _opened(tensor: ir.ExternalTensor, file: str | None) -> tuple[int, int]:
    """A descriptor of the file with a tensor's data, and the offset in bytes; the file is in the model's folder."""
    inner = isinstance(tensor, _Inner)
    what = f"the data of {tensor.name!r}, in {os.fspath(tensor.location)!r},"
    folder = os.path.realpath(tensor.base_dir or ".")
    path = os.path.realpath(os.path.join(folder, tensor.location))
    if not inner and (os.path.isabs(tensor.location) or os.path.commonpath([folder, path]) != folder):
        hint = "put the file itself into the folder, not a link"
        raise OnnxError(f"{what} is outside of the model's folder", file=file, hint=hint)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise OnnxError(f"{what} can't be opened: {error.strerror}", file=file) from error
    try:
        found, offset, needed = os.fstat(descriptor), tensor.offset or 0, _bytes(tensor)
        if not stat.S_ISREG(found.st_mode):
            raise OnnxError(f"{what} is not in a regular file", file=file)
        if found.st_nlink > 1 and not inner:
            hint = "it could be a file from outside of the model's folder: replace the link by a copy"
            raise OnnxError(f"{what} is in a file with {found.st_nlink} hard links", file=file, hint=hint)
        if offset < 0 or tensor.length not in (None, needed):
            shape = list(tensor.shape)
            raise OnnxError(f"{what} has {tensor.length} bytes, and its shape {shape} needs {needed}", file=file)
        if offset + needed > found.st_size:
            problem = f"{what} ends at byte {offset + needed}, and the file has {found.st_size}"
            raise OnnxError(problem, file=file)
    except OnnxError:
        os.close(descriptor)
        raise
    return descriptor, offset


def data(tensor: Any, file: str | None = None, mapped: bool = False) -> Tensor:
    """The values of an ONNX tensor, in memory of their own.

    Args:
        mapped: map large data from their file instead; they may begin at any byte, see `framed.tensor_at`.

    Raises:
        OnnxError: they do not fit its shape, or are of a type that PyTorch lacks.
    """
    dtype, shape = dtype_of(int(tensor.dtype)), list(tensor.shape)
    if isinstance(tensor, ir.ExternalTensor):
        if mapped and tensor.dtype.bitwidth % 8 == 0:
            return _mapped(tensor, dtype, file)
        return _values(_read(tensor, file), dtype, math.prod(shape)).reshape(shape)
    try:
        array = np.asarray(tensor.numpy())
        if math.prod(shape) != array.size:
            raise ValueError
    except Exception as error:
        raise OnnxError(f"the data of tensor {tensor.name!r} does not fit its shape {shape}", file=file) from error
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C")).reshape(shape)
    stored = array.astype(np.int8) if dtype in SIGNED else np.array(array, order="C").view(f"u{array.dtype.itemsize}")
    return torch.from_numpy(stored).reshape(shape).view(dtype)


def _values(stored: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Elements from their bytes in a file."""
    if dtype is torch.bool:
        return stored != 0
    if dtype not in PACKED:
        return stored.view(dtype)
    bits = PACKED[dtype]
    codes = (stored[:, None] >> torch.arange(0, 8, bits, dtype=torch.uint8)) & ((1 << bits) - 1)
    codes = codes.reshape(-1)[:count]
    if dtype in SIGNED:
        codes = codes.view(torch.int8)
        codes = torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    return codes.view(dtype)


def _mapped(tensor: ir.ExternalTensor, dtype: torch.dtype, file: str | None) -> Tensor:
    """External data as the file has them."""
    descriptor, offset = _opened(tensor, file)
    with os.fdopen(descriptor, "rb", buffering=0) as opened:
        return framed.tensor_at(framed.mapped(opened), offset, dtype, tensor.shape.numpy())


def _read(tensor: ir.ExternalTensor, file: str | None) -> Tensor:
    """The bytes of external data."""
    descriptor, offset = _opened(tensor, file)
    with os.fdopen(descriptor, "rb", buffering=0) as opened:
        opened.seek(offset)
        result = torch.empty(_bytes(tensor), dtype=torch.uint8)
        view = memoryview(result.numpy().data)
        done = 0
        while done < len(view):
            count = opened.readinto(view[done:])
            if not count:
                raise OnnxError(f"the file with the data of {tensor.name!r} was cut while it was read", file=file)
            done += count
    return result
