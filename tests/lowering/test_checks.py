"""Checks of numbers and sizes that the data decides raise where eager raises, and let pass what eager lets pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import torch_rtx
from tests.helpers.ahead import Function, through_file
from tests.helpers.compiled import compile_rtx, same

check = torch._check


def number(x):
    n = x[0].item()
    check(n == 3, lambda: "three")
    return x.new_ones(n) + n


def range_of_numbers(x):
    n = x[0].item()
    check(n >= 0)
    check(n < 5, lambda: "below five")
    check(n != 2, lambda: "not two")
    check(n % 3 == 0, lambda: "a multiple of three")
    return torch.arange(10)[:n]


def two_numbers(x):
    n, m = x[:2].tolist()
    check(m >= 0)
    check(n == 2 * m + 1, lambda: "one more than twice the other")
    return torch.arange(m) + n


def equal_numbers(x):
    n, m = x[:2].tolist()
    check(n >= 0)
    check(m >= 0)
    check(n == m, lambda: "equal")
    return torch.arange(n) + torch.arange(m)


def size(x):
    found = x.nonzero()
    check(found.shape[0] == 2, lambda: "two of them")
    return found.view(2) * 2


def equal_sizes(x):
    zeros, ones = (x == 0).nonzero(), (x == 1).nonzero()
    check(ones.shape[0] == zeros.shape[0], lambda: "as many")
    return zeros * 2 + ones


def real(x):
    value = x.double().sum().item()
    check(value * 2 == 8.0, lambda: "half of eight")
    return x + value


def truth(x):
    found = (x[0] == 3).item()
    check(torch.sym_not(found), lambda: "not three")
    return x + 1


def all_elements(x):
    torch._check_tensor_all(x < 5, lambda: "below five")
    return x + 1


def on_the_device(x):
    torch._assert_async(x[0] == 3, "three")
    return x + 1


# By function: data that pass, and data that do not, each with the message.
CHECKS: dict[Callable[[Any], Any], tuple[list[int], dict[str, list[int]]]] = {
    number: ([3, 1], {"three": [7, 1]}),
    range_of_numbers: ([3, 1], {"below five": [6, 1], "not two": [2, 1], "a multiple of three": [4, 1]}),
    two_numbers: ([5, 2], {"one more than twice the other": [5, 3]}),
    equal_numbers: ([2, 2], {"equal": [1, 2]}),
    size: ([4, 0, 4], {"two of them": [4, 4, 4]}),
    equal_sizes: ([1, 0, 1, 0], {"as many": [1, 0, 0, 0]}),
    real: ([3, 1], {"half of eight": [3, 2]}),
    truth: ([1, 3], {"not three": [3, 3]}),
    all_elements: ([3, 1], {"below five": [3, 7]}),
    on_the_device: ([3, 1], {"three": [1, 3]}),
}


@pytest.fixture(autouse=True)
def numbers_in_graphs():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


def holds(call, f, own_messages=True):
    """`call` does what `f` does; torch.export replaces some messages by the condition."""
    good, bad = CHECKS[f]
    same(call(torch.tensor(good)), f(torch.tensor(good)))
    for message, data in bad.items():
        with pytest.raises(RuntimeError, match=message):
            f(torch.tensor(data))
        with pytest.raises(RuntimeError, match=message if own_messages else f"{message}|Runtime assertion failed"):
            call(torch.tensor(data))


@pytest.mark.parametrize("f", CHECKS)
def test_checks_under_torch_compile(f):
    holds(compile_rtx(f), f)


@pytest.mark.parametrize("f", CHECKS)
def test_checks_in_an_engine(f, tmp_path):
    module = torch_rtx.compile(Function(f), (torch.tensor(CHECKS[f][0]),))
    holds(module, f, own_messages=False)
    holds(through_file(module, tmp_path), f, own_messages=False)
