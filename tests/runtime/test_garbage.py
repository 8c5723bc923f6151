"""Pauses of garbage collection end with the last of them."""

import gc
import threading

import pytest
import torch

import torch_rtx
from torch_rtx.backend import capture
from torch_rtx.runtime.garbage import uncollected


def test_the_last_pause_ends_it():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with uncollected():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with uncollected():
        thread.start()
        assert inside.wait(10)
        assert not gc.isenabled()
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_what_was_off_stays_off():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("fails", [False, True])
def test_captures_are_not_interrupted(fails):
    seen = []

    def compiler(graph, inputs):
        seen.append(gc.isenabled())
        if fails:
            raise ValueError
        return graph.forward

    def backend(gm, inputs):
        return capture.capture(gm, inputs, compiler, compiler, compiler)

    call = torch.compile(lambda x: x + 1, backend=backend)
    if fails:
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
            call(torch.ones(2))
    else:
        call(torch.ones(2))
    assert seen == [False]
    assert gc.isenabled()


def test_builds_are_not_interrupted_between_their_stages():
    seen = []

    class Nothing:
        """A cache that has no entries; it is asked between capture and lowering."""

        def get(self, name, size=None):
            seen.append(gc.isenabled())

        def put(self, name, data):
            seen.append(gc.isenabled())

        def delete(self, name):
            pass

        def entries(self):
            return ()

    torch_rtx.compile(torch.nn.ReLU(), (torch.ones(2),), engine_cache=Nothing())
    assert seen
    assert not any(seen)
    assert gc.isenabled()
