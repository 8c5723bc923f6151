"""Engines for all ranks of a mesh, built in one process: without other ranks, and without GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_rtx.backend.build import compile
from torch_rtx.engine import Engine
from torch_rtx.errors import SettingsError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def compile_ranks(
    make: Callable[[DeviceMesh], nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    mesh: Mapping[str, int],
    device: str = "cuda",
    **options: Any,
) -> list[Engine]:
    """Build the engines of all ranks of a mesh, one after the other.

    Args:
        make: gets a DeviceMesh of this process, which stands for one of the ranks, and returns the model of that rank,
            as `parallelize_module(model, mesh, plan)` does. The model may be on the `meta` device.
        args, kwargs, dynamic_shapes: as for `compile`.
        mesh: the number of ranks by the name of each dimension, such as `{"tp": 4}`; `load` binds groups to the names.
        device: "cuda" or "cpu", for which the engines are.
        options: as for `compile`.

    Returns:
        One engine if all ranks run the same program, which any of them can load. Else one per rank, in their order.

    Raises:
        SettingsError: this process is a rank of something already, or `mesh` is no number of ranks by name.
        CaptureError, PartitionError, LoweringError, InputError: see `compile`.
    """
    distributed = torch.distributed
    if not distributed.is_available() or distributed.is_initialized():
        hint = "build before init_process_group, or in another process"
        raise SettingsError("compile_ranks plays all ranks itself, and this process is one already", hint=hint)
    if not isinstance(mesh, Mapping) or not mesh or not all(type(n) is int and n > 0 for n in mesh.values()):
        raise SettingsError(f"mesh={mesh!r} is no number of ranks by name", hint='write mesh={"tp": 2}')
    engines = []
    for rank in range(math.prod(mesh.values())):
        _become(rank, mesh)
        try:
            model = make(distributed.device_mesh.init_device_mesh(device, (*mesh.values(),), mesh_dim_names=(*mesh,)))
            engines.append(compile(model, args, kwargs, dynamic_shapes, device=device, **options).engine)
        finally:
            distributed.destroy_process_group()
    return [_for_any_rank(engines[0])] if all(_same(engines[0], other) for other in engines[1:]) else engines


def _become(rank: int, mesh: Mapping[str, int]) -> None:
    """Make this process a rank whose collectives do nothing. DTensor remembers what operations result in, and with it
    a mesh, which is equal to that of other ranks, but has their process groups."""
    from torch.distributed.tensor import debug
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it declares the backend

    size = math.prod(mesh.values())
    getattr(debug, "_clear_sharding_prop_cache", lambda: None)()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def _for_any_rank(engine: Engine) -> Engine:
    groups = {name: {**facts, "rank": None} for name, facts in engine.manifest.groups.items()}
    return replace(engine, manifest=replace(engine.manifest, groups=groups))


def _same(one: Engine, other: Engine) -> bool:
    """Both ranks run the same program on the same constants; weights are given when it is loaded."""
    if str(one.graph) != str(other.graph) or one.constants.keys() != other.constants.keys():
        return False
    return one.weights is None and all(torch.equal(one.constants[n], other.constants[n]) for n in one.constants)
