"""Sessions of torch.compile: found by the parameters of a call, dropped with them, and in nobody's way."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from tests.helpers.compiled import Recorder, compile_rtx, same
from torch_rtx.backend import sessions
from torch_rtx.backend.sessions import Sessions, drop_orphans

X = torch.linspace(-1, 1, 6).view(2, 3)


class Net(nn.Module):
    """A weight that is the parameter, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) @ self.b.sin()


@pytest.fixture(autouse=True)
def _inference(fresh_dynamo):
    with torch.no_grad():
        yield


def test_parameters_can_be_swapped() -> None:
    model = Net()
    compiled = compile_rtx(model)
    compiled(X)
    other = nn.Parameter(torch.randn(3, 3))
    for mine in (model.a.weight, model.b):
        torch.utils.swap_tensors(mine, other)
        same(compiled(X), model(X))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
        same(compiled(X), model(X))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Template:
    """Stands for a session and its store."""

    def __init__(self) -> None:
        self.updates = 0

    @property
    def store(self) -> Template:
        return self

    def sibling(self) -> Template:
        return Template()

    def update(self, parameters: tuple[torch.Tensor, ...]) -> None:
        self.updates += 1


def test_one_session_per_set_of_parameters() -> None:
    found = Sessions(Template())  # type: ignore[arg-type]
    a, b, c = (torch.ones(2) for _ in range(3))
    one, other = found.of((a, b)), found.of((b, a))
    assert one is not other
    assert found.of((a, b)) is one
    assert found.of((c,)) is not found.of(())
    drop_orphans()
    assert found.of((a, b)) is one
    assert one.updates == 3  # type: ignore[attr-defined]


def test_sessions_are_dropped_with_the_first_of_their_parameters() -> None:
    """However many sessions have a parameter, and how often."""
    first, second = (Sessions(Template()) for _ in range(2))  # type: ignore[arg-type]
    shared, own, left = torch.ones(2), torch.ones(2), torch.ones(2)
    refs = []
    for found in (first, second):
        refs += [
            weakref.ref(found.of(tensors)) for tensors in ((shared, own), (shared, shared), (shared, left), (left,))
        ]
    gone = [weakref.ref(own)]
    del own, found
    drop_orphans()
    assert [ref() is None for ref in (*gone, *refs)] == [True] + [True, False, False, False] * 2
    gone.append(weakref.ref(shared))
    del shared
    gc.collect()  # drops them, too
    assert [ref() is None for ref in (*gone, *refs)] == [True] * 2 + [True, True, True, False] * 2
    assert left.sum() == 2
    assert weakref.ref(first) in sessions._ALL
    del first
    assert len([ref for ref in sessions._ALL if ref() is None]) == 0


def test_parameters_of_each_call_do_not_gather(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.func.functional_call` gives them. All are dropped but the last ones."""
    model, made = Net(), list[Sessions]()
    init = Sessions.__init__
    monkeypatch.setattr(Sessions, "__init__", lambda self, template: (made.append(self), init(self, template))[1])
    compiled = compile_rtx(lambda parameters, x: torch.func.functional_call(model, parameters, (x,)))
    for scale in range(1, 5):
        parameters = {name: scale * p for name, p in model.named_parameters()}
        same(compiled(parameters, X), torch.func.functional_call(model, parameters, (X,)))
    del parameters
    assert len(recorder) == 1
    assert len(made[0]._found) <= 2
