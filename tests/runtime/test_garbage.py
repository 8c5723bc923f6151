"""Pauses of garbage collection end with the last of them."""

import gc
import threading

import pytest
import torch

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
