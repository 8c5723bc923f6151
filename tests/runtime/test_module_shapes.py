"""Engines ahead of time with free dims: right in the whole range, and an error that names what is outside of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import torch_rtx
from tests.helpers.ahead import through_file
from tests.helpers.compiled import same
from torch_rtx.errors import InputError

X = torch.linspace(-2, 2, 6).view(2, 3)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def dynamic(model, args, dynamic_shapes, folder):
    """`model`, and its engine in this process and from a file."""
    here = torch_rtx.compile(model, args, dynamic_shapes=dynamic_shapes)
    return model, [here, through_file(here, folder)]


def test_range_of_a_dim(tmp_path):
    class Model(nn.Module):
        def forward(self, x):
            return x.flatten(1) @ x.flatten(1).t(), x.shape[0]

    model, modules = dynamic(Model(), (torch.randn(4, 3, 2),), {"x": {0: Dim("batch", min=1, max=9)}}, tmp_path)
    for module in modules:
        for size in (1, 2, 5, 9, 4):
            x = torch.randn(size, 3, 2)
            same(module(x), model(x))
        for size in (0, 10, 100):
            with pytest.raises(InputError, match=f"dimension 0 of input 'x' is {size}, outside its range batch = 1..9"):
                module(torch.randn(size, 3, 2))
        with pytest.raises(InputError, match="dimension 2 of input 'x' is 3, the engine was built for 2"):
            module(torch.randn(4, 3, 3))


def test_names_of_dims(tmp_path):
    """In whatever form dynamic_shapes has, and in the file."""

    class Model(nn.Module):
        def forward(self, x, pair, *, z):
            return x.sum() + pair["a"][0].sum() + z.sum()

    rows, half = Dim("rows", max=64), Dim("half", min=2, max=8)
    args, kwargs = (torch.ones(3, 4), {"a": [torch.ones(5, 2)]}), {"z": torch.ones(6)}
    forms = (
        {"x": {0: rows}, "pair": {"a": [(Dim("n", max=99), Dim.STATIC)]}, "z": {0: 2 * half}},
        ((rows, Dim.STATIC), {"a": [{0: Dim("n", max=99)}]}, [2 * half]),
    )
    for form in forms:
        here = torch_rtx.compile(Model(), args, kwargs, dynamic_shapes=form)
        for module in (here, through_file(here, tmp_path)):
            for other, message in (
                ((torch.ones(65, 4), *args[1:], torch.ones(6)), "outside its range rows = 0..64"),
                ((args[0], {"a": [torch.ones(100, 2)]}, torch.ones(6)), "outside its range n = 0..99"),
                ((*args, torch.ones(18)), r"is 18 = \(2 \* half\), so that half is 9, outside its range half = 2..8"),
            ):
                with pytest.raises(InputError, match=message):
                    module(*other[:2], z=other[2])
    path = tmp_path / "named.rtx"
    torch_rtx.save(here, path)
    assert sorted(torch_rtx.inspect(path).sizes.values()) == ["half", "n", "rows"]
    assert "size rows: " in str(torch_rtx.inspect(path))


def test_two_inputs_share_a_dim(tmp_path):
    class Model(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, y * 2], 1)

    n = Dim("n", min=1, max=64)
    model, modules = dynamic(Model(), (torch.ones(3, 2), torch.ones(3, 4)), {"x": {0: n}, "y": {0: n}}, tmp_path)
    for module in modules:
        for size in (1, 2, 64):
            args = torch.randn(size, 2), torch.randn(size, 4)
            same(module(*args), model(*args))
        match = r"dimension 0 of input 'y' is 4, but dimension 0 of input 'x' is 5 and both are n$"
        with pytest.raises(InputError, match=match):
            module(torch.ones(5, 2), torch.ones(4, 4))


def test_derived_dims(tmp_path):
    class Model(nn.Module):
        def forward(self, x, y):
            return x + y[1:]

    n = Dim("n", min=2, max=16)
    model, modules = dynamic(Model(), (torch.ones(5), torch.ones(6)), {"x": {0: n}, "y": {0: n + 1}}, tmp_path)
    for module in modules:
        for size in (2, 7, 16):
            args = torch.randn(size), torch.randn(size + 1)
            same(module(*args), model(*args))
        with pytest.raises(InputError, match=r"dimension 0 of input 'y' is 9, expected .* = 8"):
            module(torch.ones(7), torch.ones(9))
        with pytest.raises(InputError, match="outside its range"):
            module(torch.ones(17), torch.ones(18))


def test_a_dim_that_only_a_multiple_gives(tmp_path):
    class Model(nn.Module):
        def forward(self, x):
            return x.view(-1, 2).sum(1)

    shapes = {"x": {0: 2 * Dim("half", min=1, max=8)}}
    model, modules = dynamic(Model(), (torch.ones(6),), shapes, tmp_path)
    for module in modules:
        for size in (4, 6, 16):
            same(module(torch.arange(float(size))), model(torch.arange(float(size))))
        for size in (2, 3, 18, 0):  # torch.export takes the half of a size to be at least 2
            with pytest.raises(InputError, match=f"dimension 0 of input 'x' is {size}"):
                module(torch.ones(size))


def test_several_free_dims(tmp_path):
    class Model(nn.Module):
        def forward(self, x, w):
            return F.pad(F.linear(x, w), (1, 1)).mean(-1), x.shape[1] * 2

    shapes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "w": None}
    model, modules = dynamic(Model(), (torch.ones(3, 5, 4), torch.ones(6, 4)), shapes, tmp_path)
    for module in modules:
        for a, b in ((2, 2), (7, 3), (3, 9)):
            args = torch.randn(a, b, 4), torch.randn(6, 4)
            same(module(*args), model(*args))


def test_integer_inputs(tmp_path):
    class Model(nn.Module):
        def forward(self, x, n):
            return x * n

    model, modules = dynamic(Model(), (X, 5), {"x": None, "n": Dim.DYNAMIC}, tmp_path)
    for module in modules:
        for n in (2, 5, 1000):
            same(module(X, n), model(X, n))
        for n in (2.0, "2", None, torch.tensor(2)):
            with pytest.raises(InputError, match="input 'n' is a .*, expected int"):
                module(X, n)
