"""Engine files of one call with hostile arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import torch

from tests.fuzz import samples
from tests.fuzz.files import engine_of
from tests.fuzz.mutants import DTYPE_NAMES, INTS
from tests.fuzz.samples import Sample
from tests.fuzz.trial import HOSTILE_FLOATS, values
from torch_rtx import aten
from torch_rtx.engine_header import DTYPES
from torch_rtx.ir import COPY, Attr, Graph, Node, Parameter, ScalarType, TensorType, Type, Value, Weight, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.optable import FILE_OPS, NUMBERS

STRINGS = ("", "mean", "sum", "none", "tanh", "reflect", "zeros", "floor", "trunc", "\x00", "x" * 1000, "main", "cuda")
MEMORY_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
PLACES = {"node": 65, "body": 25, "recipe": 10}  # shares; a recipe runs as soon as the engine has weights
OPS = frozenset(filter(aten.exists, FILE_OPS))


@cache
def known() -> dict[str, list[Sample]]:
    """Valid calls, or nearly valid ones, of each operator that a file may name."""
    found = samples.read(OPS)
    return {name: found.get(name) or [_derived(name)] for name in sorted(OPS)}


def _derived(name: str) -> Sample:
    """Arguments by their types alone."""
    tensor = {"t": "f32", "s": [2, 3, 4, 4]}
    kinds = {"Tensor": tensor, "List[Tensor]": [tensor, tensor], "int": 1, "float": 0.5, "number": 1, "bool": False}
    kinds |= {"str": "none", "List[int]": [1, 1], "List[bool]": [True], "List[float]": [1.0]}
    kinds |= {"ScalarType": "f32", "Device": "main", "MemoryFormat": "contiguous_format"}
    arguments = aten.overload(name)._schema.arguments
    return {arg.name: copy.deepcopy(kinds.get(str(arg.real_type))) for arg in arguments if not arg.has_default_value()}


def hostile_call(rng: Random, infer: bool = True, ops: Sequence[str] = ()) -> tuple[str, bytes]:
    """The operator of a file, and the file.

    Args:
        infer: the types of the results are those that PyTorch infers, where it infers any.
        ops: the operators to choose from; none: all that a file may name.
    """
    name = rng.choice(ops or list(known()))
    sample = copy.deepcopy(rng.choice(known()[name]))
    given = copy.deepcopy(sample)
    for _ in range(rng.choices((0, 1, 2, 3), (5, 60, 25, 10))[0]):
        _mutate(name, given, rng)
    (place,) = rng.choices(list(PLACES), list(PLACES.values()))
    return name, _Maker(name, place, rng, infer).make(given, sample)


def _mutate(name: str, given: Sample, rng: Random) -> None:
    """Make one argument hostile, drop one, or add one."""
    schema = aten.schema(aten.overload(name))
    choice = rng.random()
    if choice < 0.03 and given:
        del given[rng.choice(list(given))]
    elif choice < 0.06:
        given["extra"] = 1
    elif choice < 0.25 and (absent := [arg for arg in schema if arg not in given]):
        arg = rng.choice(absent)
        given[arg] = _hostile(_example(schema[arg][0]), schema[arg][0], rng)
    elif given:
        arg = rng.choice(list(given))
        given[arg] = _hostile(given[arg], schema[arg][0] if arg in schema else "", rng)


def _example(kind: str) -> Any:
    examples = {"Tensor": {"t": "i64", "s": [2]}, "List[int]": [1, 1], "float": 1.0, "bool": True, "str": "none"}
    return examples.get(kind, 1)


def _hostile(value: Any, kind: str, rng: Random) -> Any:
    if rng.random() < 0.05:
        return rng.choice((None, [], 1, True, "x", 0.5, {"t": "f32", "s": []}))
    if isinstance(value, dict):
        return _hostile_tensor(dict(value), rng)
    if isinstance(value, list):
        found, choice = list(value), rng.random()
        if choice < 0.15:
            return []
        if choice < 0.3:
            return found * rng.choice((2, 3, 70))
        if choice < 0.4:
            return found[1:]
        for at in range(len(found)):
            if rng.random() < 0.5:
                found[at] = _hostile(found[at], kind, rng)
        return found
    if kind in ("ScalarType", "MemoryFormat", "Device"):
        return rng.choice((*DTYPE_NAMES, *MEMORY_FORMATS, *INTS, "cpu", "cuda", "meta", "main"))
    if isinstance(value, bool):
        return rng.choice((not value, 2, -1))
    if isinstance(value, int) or value is None:
        return rng.choice((*INTS, 4, 5, 100, -2, 10**6, True, 0.5))
    if isinstance(value, float):
        return rng.choice((*HOSTILE_FLOATS, 0, 10**30))
    return rng.choice(STRINGS)


def _hostile_tensor(spec: Sample, rng: Random) -> Sample:
    """Another shape, dtype, or values."""
    shape, choice = list(spec["s"]), rng.random()
    spec.pop("v", None)
    if choice < 0.35:
        spec["t"] = rng.choice(("i64", "i32")) if rng.random() < 0.1 else spec["t"]  # other values alone
    elif choice < 0.6 and shape:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 17, 1000))
    elif choice < 0.7:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((1, 2)))
    elif choice < 0.8:
        shape = shape[1:]
    elif choice < 0.85:
        shape = [math.prod(shape)]
    elif choice < 0.95:
        spec["t"] = rng.choice(DTYPE_NAMES)
    else:
        shape = [1] * rng.choice((5, 25, 64))
    return {**spec, "s": shape if math.prod(shape) <= 1 << 16 else [0]}


class _Maker:
    """Makes the file of one call."""

    def __init__(self, name: str, place: str, rng: Random, infer: bool) -> None:
        self.name, self.place, self.rng, self.infer = name, place, rng, infer
        self.inputs: list[Value] = []
        self.parameters: list[Parameter] = []
        self.tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

    def make(self, given: Sample, sample: Sample) -> bytes:
        """The file of the call `given`, which was made of the valid call `sample`."""
        args = tuple((key, self.attr(value)) for key, value in given.items())
        types = _types(self.name, args) if self.infer else ()
        if not types:  # as if the arguments were those of the sample: the reader has to find out
            types = _types(self.name, tuple((key, _attr(value)) for key, value in sample.items())) or (_F32,)
        results = tuple(Value(f"y{index}", type_) for index, type_ in enumerate(types))
        if not aten.overload(self.name)._schema.returns or self.name == COPY:
            results = ()
        return engine_of(self.graph(args, results), self.tensors)

    def graph(self, args: tuple[tuple[str, Attr], ...], results: tuple[Value, ...]) -> Graph:
        """The graph of the call, where it is to stand; results after the first may be unused."""
        unused = self.rng.random() < 0.3
        outputs = tuple(None if unused and index else value for index, value in enumerate(results))
        results = results[:1] if unused else results
        inputs, parameters = tuple(self.inputs), tuple(self.parameters)
        weights = tuple(Weight(Value(p.name, p.type), (p.name,)) for p in parameters)
        values = (*inputs, *(weight.value for weight in weights))
        body = Graph("import", values, nodes=(Node("op", self.name, args, outputs),), outputs=results)
        if self.place == "recipe" and results:
            recipe = replace(body, outputs=results[:1])
            made = Weight(results[0], tuple(p.name for p in parameters), recipe)
            return Graph("fused", (), parameters, (made,), (), results[:1])
        if self.place == "body" and results:
            node = Node("kernel", "k", tuple((value.name, value) for value in values), results, body)
        else:
            node = Node("view" if aten.is_view(aten.overload(self.name)) else "extern", self.name, args, outputs)
        return Graph("fused", inputs, parameters, weights, (node,), results or inputs)

    def attr(self, value: Any) -> Attr:
        """An argument: a tensor is an input or a constant, with the values that it asks for."""
        if isinstance(value, list):
            return tuple(map(self.attr, value))
        if self.name in NUMBERS and type(value) in (bool, int, float) and self.rng.random() < 0.5:
            self.inputs.append(Value(f"x{len(self.inputs)}", ScalarType(type(value).__name__)))
            return self.inputs[-1]
        if not isinstance(value, dict):
            return value
        made = Value(f"x{len(self.inputs) + len(self.parameters)}", _type(value))
        stored = DTYPES[value["t"]][0] is not None and value["t"] in aten.DTYPES
        if self.place != "recipe" and (not stored or self.rng.random() < 0.5):
            self.inputs.append(made)
            return made
        if not stored:
            return None
        data = values(aten.DTYPES[value["t"]], value["s"], self.rng)
        if "v" in value:
            data = torch.tensor(value["v"], dtype=data.dtype).reshape(value["s"])
        content = data.reshape(-1).view(torch.uint8).numpy().tobytes()
        self.parameters.append(Parameter(made.name, _type(value), constant=True))
        self.tensors[f"constant/{made.name}"] = value["t"], tuple(value["s"]), content
        return made


_F32 = TensorType("f32", (2,), (1,))


def _types(name: str, args: tuple[tuple[str, Attr], ...]) -> tuple[Type, ...]:
    """What PyTorch infers for the results; nothing where it can't."""
    try:
        if name in NUMBERS:
            return (ScalarType(type(aten.overload(name)(**dict(args))).__name__),)
        return tuple(type_ for type_ in Inference()(name, args) if isinstance(type_, TensorType))
    except Exception:
        return ()


def _attr(value: Any) -> Attr:
    """An argument of a sample, for its type alone."""
    if isinstance(value, list):
        return tuple(map(_attr, value))
    return Value("x", _type(value)) if isinstance(value, dict) else value


def _type(spec: Sample) -> TensorType:
    shape = tuple(spec["s"])
    return TensorType(spec["t"], shape, contiguous(shape))
