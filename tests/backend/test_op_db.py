"""PyTorch's own operator samples (`op_db`) through the backend, against eager.

An operator passes for a dtype when the whole graph of each chosen sample runs in the engine, nothing left to PyTorch,
and gives what eager gives: values, dtypes, shapes, strides, and the same changes of its inputs. Where the data decides
a size or a number, a tensor is sparse or the operator is not ATen's, PyTorch has to run a part: the results have to be
eager's all the same, and op_db_in_pytorch.txt names these operators. op_db_failing.txt names those that fail. Both say
why and may only get shorter: what they do not name, and a line that is no longer true, are errors here.
`python -m tests.backend.test_op_db --write` writes them anew, and with NAMES for an argument it shows what becomes of
these operators.

Each operator is tried in float32, and every fourth one, told by its name, in float16 too; `pytest --all-dtypes` tries
all of them in both. The samples of a dtype are calls of one graph, since what captures a graph takes longest; where
that does not pass, each has a graph of its own.
"""

from __future__ import annotations

import copy
import math
import random
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from keyword import iskeyword
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from tests.helpers.releases import RELEASE
from torch_rtx import aten
from torch_rtx.backend.entry import rtx
from torch_rtx.collectives import REDUCE_IN_PLACE
from torch_rtx.errors import PartitionError
from torch_rtx.ir import COPY, UPDATES

# What of the lists a release of PyTorch mends; operators that not all releases have.
MENDED = {
    (2, 15): (
        *(f"nn.functional.max_unpool2d{kind}" for kind in (" float32", ".grad float32", ".grad float16")),
        *(f"combinations {dtype}" for dtype in ("float32", "float16")),
    )
}
CHANGING = {f"aten.{name}.default" for name in ("cholesky", "linalg_matrix_sqrth", "linalg_polar")}
FAILING, IN_PYTORCH = (Path(__file__).with_name(f"op_db_{name}.txt") for name in ("failing", "in_pytorch"))
CHUNKS = 48
OPTIONS = {"require_full_compilation": True, "fallback_on_error": False}
OPTIONS |= {"cache_built_engines": False, "reuse_cached_engines": False}  # thousands of graphs, each met once
# What no engine holds: what the data decides, sparse tensors, custom operators.
OUTSIDE = re.compile(r"depends on the data|the host|sparse|^operator (?!aten|prims)")
# How many samples to try per dtype. The second line is for operators that take neither dtype of the first.
SAMPLES = {torch.float32: 3, torch.float16: 2}
OTHERWISE = {torch.int64: 2, torch.bool: 2, torch.complex64: 2}
# Operators that draw are compared value by value: op_db sets this seed where it calls them, so we set it before ours.
SEED = 42
GROUP = 6  # how many operators share a graph where they can
# What comes out is whatever was in memory.
UNDEFINED = frozenset(("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"))

T = TypeVar("T")


@cache
def operators() -> dict[str, Any]:
    """The OpInfos by name. Imported late: it takes seconds, and forbids to set flags of torch.backends."""
    allowed = torch.backends.__allow_nonbracketed_mutation_flag
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo import core

    torch.backends.__allow_nonbracketed_mutation_flag = allowed
    # For each sample it looks for a unittest in all frames of the stack, which takes as long as all the rest.
    common_utils.extract_test_fn = core.extract_test_fn = lambda: None
    common_utils.set_rng_seed = reseed
    return {op.full_name: op for op in op_db}


def reseed(value: int = SEED) -> None:
    """What op_db does before each sample, but on the CPU alone: for other devices torch writes down the stack."""
    import numpy as np

    torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def pick(name: str, choices: Sequence[T]) -> T:
    """One of the choices, always the same for a name."""
    return choices[zlib.crc32(name.encode()) % len(choices)]


def dtypes(op: Any, every: bool) -> dict[torch.dtype, int]:
    """The dtypes to try, each with the number of samples."""
    for group in (SAMPLES, OTHERWISE):
        found = {dtype: count for dtype, count in group.items() if op.supports_dtype(dtype, "cpu")}
        if found:
            several = group is SAMPLES and (every or pick(op.full_name, (True, False, False, False)))
            return found if several else dict([next(iter(found.items()))])
    return {}


def chosen(op: Any, dtype: torch.dtype, count: int) -> list[Any]:
    """`count` samples spread from the first to the last; those between them are made non-contiguous."""
    samples = list(op.sample_inputs("cpu", dtype))
    steps = [round((len(samples) - 1) * step / (count - 1)) for step in range(count)]
    picked = [samples[i] for i in sorted(set(steps))] if samples else []
    return [spaced(x) if 0 < i < len(picked) - 1 else x for i, x in enumerate(picked)]


def spaced(sample: Any) -> Any:
    """`sample` with gaps in the memory of its tensors."""
    tensors = [x for x in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(x, torch.Tensor)]
    return sample.noncontiguous() if all(x.layout == torch.strided for x in tensors) else sample


class EagerRefuses(Exception):
    """The sample is not one for this machine."""


class InPyTorch(Exception):
    """PyTorch runs a part, rightly; the message says why."""


class GraphBreak(InPyTorch):
    """PyTorch runs a part, and captures no graph of the whole."""


class Flat:
    """Calls of operators on samples as a function of their tensors alone, with a flat list of results."""

    def __init__(self, calls: Sequence[tuple[Any, Any]]) -> None:
        self.ops, self.copies = [op.op for op, _ in calls], False
        calls = [((sample.input, *sample.args), sample.kwargs) for _, sample in calls]
        self.leaves, self.spec = pytree.tree_flatten(calls)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = [self.leaves[i] for i in self.places]

    def run(self, *tensors: torch.Tensor) -> list[Any]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        calls = pytree.tree_unflatten(leaves, self.spec)
        results = pytree.tree_leaves([op(*args, **kwargs) for op, (args, kwargs) in zip(self.ops, calls, strict=True)])
        return [x.clone() if self.copies and isinstance(x, torch.Tensor) else x for x in results]

    def traced(self) -> fx.GraphModule:
        """What Dynamo would hand to the backend, without the time it takes."""
        graph = fx.Graph()
        graph.output(graph.call_function(self.run, tuple(graph.placeholder(f"x{i}") for i in range(len(self.tensors)))))
        return fx.GraphModule(torch.nn.Module(), graph)


def check_samples(*calls: tuple[Any, Any]) -> None:
    """Raises what keeps the backend from doing what eager does with operators on samples, in one graph."""
    call = Flat(calls)
    eager_inputs, inputs = copy.deepcopy(call.tensors), copy.deepcopy(call.tensors)
    reseed()
    try:
        expected = call.run(*eager_inputs)
    except Exception as error:
        raise EagerRefuses(f"eager does not run it here: {reason(error)}") from None
    if views(eager_inputs, expected) and not changed(call.tensors, eager_inputs):
        # A view of an input is made again outside of the engine, whatever the engine returns: have it return copies.
        call.copies = True
        expected = call.run(*eager_inputs)
    outside: InPyTorch | None = None
    try:
        assert all(x.layout == torch.strided for x in call.tensors), "a sparse tensor as an input"
        compiled = rtx(call.traced(), inputs, options=OPTIONS)
    except Exception as error:
        if not OUTSIDE.search(reason(error)):
            raise
        compiled, outside = partly(call, inputs, reason(error))
    reseed()
    results = compiled(*inputs)
    assert len(results) == len(expected), f"{len(results)} results, not {len(expected)}"
    for result, wanted in zip(results, expected, strict=True):
        compare(result, wanted, values=UNDEFINED.isdisjoint(op.name for op, _ in calls))
    for result, wanted in zip(inputs, eager_inputs, strict=True):
        compare(result, wanted, values=True)
    if outside is not None:
        raise outside


def partly(call: Flat, inputs: list[torch.Tensor], why: str) -> tuple[Callable[..., Any], InPyTorch]:
    """The call with what no engine holds left to PyTorch: as one graph, or by graph breaks where PyTorch has none."""
    options = {**OPTIONS, "require_full_compilation": False}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    try:
        with tracing(TracingContext(mode)):
            fakes = [mode.from_tensor(x, static_shapes=True) for x in inputs]
            return rtx(call.traced(), fakes, options=options), InPyTorch(why)
    except Exception:
        torch._dynamo.reset()
        return torch.compile(call.run, backend=partial(rtx, options=options)), GraphBreak(why)


def views(inputs: list[torch.Tensor], results: list[Any]) -> bool:
    """Whether a result is in the memory of an input."""
    memory = {x.untyped_storage().data_ptr() for x in inputs if x.layout == torch.strided}
    tensors = [x for x in results if isinstance(x, torch.Tensor) and x.layout == torch.strided]
    return any(x.untyped_storage().data_ptr() in memory for x in tensors)


def changed(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return any(a._version != b._version for a, b in zip(before, after, strict=True))


def compare(result: Any, wanted: Any, values: bool) -> None:
    """Asserts that eager's result and ours are the same; strides where eager's memory has no gaps."""
    if not isinstance(wanted, torch.Tensor):
        assert type(result) is type(wanted), f"a {type(result).__name__}, not a {type(wanted).__name__}"
        same = result == wanted or (isinstance(wanted, float) and math.isnan(result) and math.isnan(wanted))
        assert same, f"{result}, not {wanted}"
        return
    assert isinstance(result, torch.Tensor), f"a {type(result).__name__}, not a tensor"
    assert result.dtype == wanted.dtype, f"dtype {result.dtype}, not {wanted.dtype}"
    assert result.shape == wanted.shape, f"shape {list(result.shape)}, not {list(wanted.shape)}"
    if wanted.layout == torch.strided and torch.ops.aten.is_non_overlapping_and_dense(wanted):
        pairs = zip(wanted.shape, result.stride(), wanted.stride(), strict=True)
        same = wanted.numel() == 0 or all(a == b for size, a, b in pairs if size > 1)
        assert same, f"strides {list(result.stride())}, not {list(wanted.stride())}"
    if values:
        torch.testing.assert_close(result, wanted, equal_nan=True, msg=lambda text: "values: " + text.splitlines()[0])


def failure(op: Any, dtype: torch.dtype, count: int) -> Exception | None:
    """Why `op` does not pass for `dtype`; None if it passes, or if eager runs none of its samples here."""
    found, samples = None, chosen(op, dtype, count)
    if len(samples) > 1 and keyed(op.full_name, dtype) not in named():
        with suppress(Exception):  # which of them, and why, the loop below says
            check_samples(*((op, sample) for sample in samples))
            return None
    for sample in samples:
        try:
            check_samples((op, sample))
        except EagerRefuses:
            continue
        except GraphBreak as error:
            return error  # one sample is enough: tracing Python takes long
        except InPyTorch as error:
            found = error
        except Exception as error:
            return error
    return found


def keyed(name: str, dtype: torch.dtype) -> str:
    """What the files call an operator of a dtype."""
    return f"{name} {str(dtype).removeprefix('torch.')}"


def reason(error: Exception) -> str:
    if isinstance(error, PartitionError):  # its first line says that nodes must fall back, the others which
        return error.message.splitlines()[1].strip().removesuffix(" (at None)").split(": ", 1)[1]
    if isinstance(error, DataDependentOutputException):
        return f"the host needs a number of {error.func}"
    if isinstance(error, DynamicOutputShapeException):
        return f"the size of what {error.func} returns depends on the data"
    kind = "" if isinstance(error, AssertionError | InPyTorch) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0][:160]


def results(names: list[str], every: bool = True) -> Iterator[tuple[str, Path | None, str]]:
    """Per `OPERATOR DTYPE`, the file that has to name it, and why; None if it passes."""
    cases = [(op, *case) for name in names for op in (operators()[name],) for case in dtypes(op, every).items()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passing = together(cases)
        for op, dtype, count in cases:
            key = keyed(op.full_name, dtype)
            error = None if key in passing else failure(op, dtype, count)
            file = IN_PYTORCH if isinstance(error, InPyTorch) else FAILING
            yield (key, None, "passes") if error is None else (key, file, reason(error))


def together(cases: list[tuple[Any, torch.dtype, int]]) -> set[str]:
    """The keys of those that pass beside others in one graph: half of the time of a small graph is the graph's, not
    its operators'. Of the others nothing is known."""
    plain: dict[str, list[tuple[Any, Any]]] = {}
    for op, dtype, count in cases:
        key = keyed(op.full_name, dtype)
        calls = [] if key in named() or op.name in UNDEFINED else [(op, one) for one in chosen(op, dtype, count)]
        if calls and is_plain(calls):
            plain[key] = calls
    passing: set[str] = set()
    keys = sorted(plain)
    for group in (keys[start : start + GROUP] for start in range(0, len(keys), GROUP)):
        with suppress(Exception):  # which of them, and why, each alone says
            check_samples(*(call for key in group for call in plain[key]))
            passing.update(group)
    return passing


def is_plain(calls: list[tuple[Any, Any]]) -> bool:
    """Eager runs the calls, which draw no numbers, write to no input and return no view of one: what others are checked
    for in the same graph is as if they were alone."""
    call = Flat(calls)
    inputs = copy.deepcopy(call.tensors)
    state, versions = torch.get_rng_state(), [x._version for x in inputs]
    try:
        with patch.object(torch, "manual_seed", wraps=torch.manual_seed) as seeds:  # op_db's, around those that draw
            found = call.run(*inputs)
    except Exception:
        return False
    draws = seeds.called or not torch.equal(state, torch.get_rng_state())
    return not draws and not views(inputs, found) and versions == [x._version for x in inputs]


def listed(file: Path) -> dict[str, str]:
    """The lines `OPERATOR DTYPE: REASON` of a file, but for those that this PyTorch has mended."""
    lines = (line.split(": ", 1) for line in file.read_text().splitlines() if not line.startswith("#"))
    mended = {key for release, keys in MENDED.items() if release <= RELEASE for key in keys}
    return {key: why for key, why in lines if key not in mended}


@cache
def named() -> frozenset[str]:
    """The keys of both files: their samples do not pass in one graph."""
    return frozenset(key for file in (FAILING, IN_PYTORCH) for key in listed(file))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_operators(chunk, all_dtypes):
    found = list(results(list(operators())[chunk::CHUNKS], all_dtypes))
    for file in (FAILING, IN_PYTORCH):
        known = listed(file)
        new = [f"{key}: {why}" for key, where, why in found if where == file and key not in known]
        stale = [key for key, where, _ in found if where != file and key in known]
        assert not new, f"these are not in {file.name}:\n" + "\n".join(new)
        assert not stale, f"remove the lines of these from {file.name}:\n" + "\n".join(stale)


def test_few_operators_fail():
    assert len(listed(FAILING)) <= 20


def test_list_names_operators_that_exist():
    unknown = {key.split()[0] for file in (FAILING, IN_PYTORCH) for key in listed(file)} - operators().keys()
    assert not unknown


def test_allowed_operators_exist_and_are_functional_but_for_writes():
    found = {name: aten.overload(name) for name in aten.ALLOWED if name not in CHANGING or aten.exists(name)}
    assert {name for name, op in found.items() if op._schema.is_mutable} == {COPY, REDUCE_IN_PLACE, *UPDATES}


def test_generated_code_passes_arguments_called_like_keywords_by_position():
    """`from` of aten.uniform is one: it follows `self`, which is always given."""
    for name in filter(aten.exists, aten.ALLOWED):
        for position, (argument, (_, keyword_only)) in enumerate(aten.schema(aten.overload(name)).items()):
            assert not iskeyword(argument) or (position == 1 and not keyword_only), name


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if arguments != ["--write"]:
        for key, file, why in results(arguments):
            print(f"{key}: {'in PyTorch: ' if file == IN_PYTORCH else ''}{why}")
        return
    found = list(results(sorted(operators())))
    for file in (FAILING, IN_PYTORCH):
        lines = [f"{key}: {why}" for key, where, why in found if where == file]
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        file.write_text("\n".join([*head, *lines]) + "\n")
        print(f"{file.name}: {len(lines)} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
