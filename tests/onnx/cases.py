"""The test cases of the onnx package, run eagerly. `python -m tests.onnx.cases` lists those that pass.

`python -m tests.onnx.cases Softmax Gather` runs the cases of these operators alone, and says why others fail;
`--write` adds what passes to `passing.txt`.
"""

from __future__ import annotations

import argparse
import collections
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, SequenceProto, TensorProto, TypeProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests
from torch import Tensor

from torch_rtx.backend.build import compile
from torch_rtx.onnx.dtypes import PACKED, SIGNED
from torch_rtx.onnx.module import LEARNT, from_onnx
from torch_rtx.onnx.reader import data, ir

RANDOM = ("test_bernoulli", "test_training_dropout")
PASSING = Path(__file__).with_name("passing.txt")


@dataclass(frozen=True)
class Case:
    """A model with inputs and results; `read` gives them."""

    model: ModelProto
    read: Callable[[], list[tuple[list[Any], list[Any]]]]
    rtol: float
    atol: float


@cache
def cases() -> dict[str, Case]:
    """All cases by name: those of nodes, and of models in files as `<kind>/<name>`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = collect_testcases(None)
    found = {c.name: Case(c.model, partial(list, c.data_sets), c.rtol, c.atol) for c in nodes}
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for case in load_model_tests(kind=kind):
            model = onnx.load(Path(case.model_dir) / "model.onnx")
            read = partial(_stored, Path(case.model_dir), model.graph)
            found[f"{kind}/{case.name}"] = Case(model, read, case.rtol, case.atol)
    for path in sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx")):
        model = onnx.load(path)
        found[f"light/{path.stem}"] = Case(model, partial(_light, path, model.graph), 1e-3, 1e-6)
    return found


def _light(path: Path, graph: GraphProto) -> list[tuple[list[Any], list[Any]]]:
    """A whole network with weights that follow a rule, for inputs that do, too."""
    inputs = []
    known = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        count = int(np.prod(shape))
        if value.name not in known:
            inputs.append((np.arange(count).reshape(shape) / count).astype(np.float32))
    outputs = [path.with_name(f"{path.stem}_output_{number}.pb") for number in range(len(graph.output))]
    return [(inputs, [TensorProto.FromString(file.read_bytes()) for file in outputs])]


def _stored(folder: Path, graph: GraphProto) -> list[tuple[list[Any], list[Any]]]:
    """The values of a case of a model, in the order of the model's inputs."""
    return [
        tuple(  # type: ignore[misc]
            [_value(file.read_bytes(), value.type) for value, file in zip(values, _numbered(data, kind), strict=False)]
            for values, kind in ((graph.input, "input"), (graph.output, "output"))
        )
        for data in sorted(folder.glob("test_data_set_*"))
    ]


def _numbered(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}_*.pb"), key=lambda path: int(path.stem.rpartition("_")[2]))


def _value(content: bytes, type: TypeProto) -> Any:
    if type.HasField("sequence_type"):
        return list(SequenceProto.FromString(content).tensor_values)
    return TensorProto.FromString(content)


def value_of(given: Any) -> Any:
    """A value of a case as a tensor, a list of them, or None."""
    if given is None:
        return None
    if isinstance(given, list | tuple):
        return [value_of(inner) for inner in given]
    if isinstance(given, TensorProto):
        return data(ir.serde.deserialize_tensor(given))
    array = np.asarray(given)
    return data(ir.serde.deserialize_tensor(numpy_helper.from_array(array)))


def compare(found: Any, wanted: Any, rtol: float, atol: float) -> None:
    """Raises AssertionError if values differ, in type or shape too."""
    if isinstance(wanted, list):
        assert isinstance(found, list)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            compare(one, other, rtol, atol)
        return
    if wanted is None:
        assert found is None
        return
    assert isinstance(found, Tensor), type(found)
    assert found.dtype == wanted.dtype, (found.dtype, wanted.dtype)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    if wanted.dtype in LEARNT and wanted.numel() and rtol:
        # The cases allow less than a rounding of their results.
        epsilon, largest = torch.finfo(wanted.dtype).eps, wanted.abs().nan_to_num(0, 0).max().item()
        rtol, atol = max(rtol, 2 * epsilon), max(atol, epsilon * largest)
    torch.testing.assert_close(_plain(found), _plain(wanted), rtol=rtol, atol=atol, equal_nan=True)


def _plain(x: Tensor) -> Tensor:
    """A tensor of a type that can be compared."""
    x = x.detach()
    if x.dtype in PACKED:
        return x.view(torch.int8 if x.dtype in SIGNED else torch.uint8)
    return x.float() if x.dtype.is_floating_point and x.element_size() == 1 else x


def check(name: str, compiled: bool = False) -> None:
    """Run a case, in an engine if it is `compiled`; raises what differs."""
    case = cases()[name]
    with torch.no_grad():
        module = from_onnx(case.model)
        for inputs, outputs in case.read():
            args = tuple(map(value_of, inputs))
            found = (compile(module, args) if compiled else module)(*args)
            found = found if isinstance(found, tuple) else (found,)
            assert len(found) == len(outputs)
            for one, other in zip(found, map(value_of, outputs), strict=True):
                if name.startswith(RANDOM) and "zero_ratio" not in name:  # types and shapes alone
                    compare(torch.zeros_like(one), torch.zeros_like(other), 0, 0)
                else:
                    exact = name.startswith("test_cast")
                    compare(one, other, 0 if exact else case.rtol, case.atol)


def operators(name: str) -> set[str]:
    """The operators of a case's model."""
    return {node.op_type for node in cases()[name].model.graph.node}


def passing() -> list[str]:
    """The names of the cases that pass."""
    return PASSING.read_text().split() if PASSING.exists() else []


def main() -> None:
    """Run the cases of the operators that the command line names, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("operators", nargs="*")
    parser.add_argument("--write", action="store_true", help="add what passes to passing.txt")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    chosen = [name for name in cases() if not options.operators or operators(name) & {*options.operators}]
    good, reasons = set(), collections.defaultdict(list)
    for name in chosen:
        try:
            check(name)
            good.add(name)
        except Exception as error:
            reasons[f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"].append(name)
    for reason, names in sorted(reasons.items(), key=lambda item: len(item[1])):
        print(f"{len(names):4} {reason}: {' '.join(names[:4])}")
    print(f"{len(good)} of {len(chosen)} pass; lost: {sorted({*passing()} & {*chosen} - good)}")
    if options.write:
        PASSING.write_text("\n".join(sorted({*passing(), *good})) + "\n")


if __name__ == "__main__":
    main()
