"""A gate keeps calls and writes apart, on the host and on streams."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from tests.doubles.streams import FakeCuda, FakeStream
from torch_rtx.runtime.gate import Gate

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TIMEOUT = 20.0


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(*threads: threading.Thread) -> bool:
    for thread in threads:
        thread.join(TIMEOUT)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.quick
def test_calls_pass_together() -> None:
    gate, inside = Gate(CPU), threading.Barrier(3)

    def call() -> None:
        with gate:
            inside.wait(TIMEOUT)

    assert ended(*[started(call) for _ in range(3)])
    assert not inside.broken


def test_a_write_waits_for_calls_and_holds_back_others() -> None:
    gate, log = Gate(CPU), list[str]()
    inside, leave, writing, go_on = (threading.Event() for _ in range(4))

    def first() -> None:
        with gate:
            inside.set()
            leave.wait(TIMEOUT)
            log.append("first")

    def write() -> None:
        with gate.writing():
            log.append("write")
            writing.set()
            go_on.wait(TIMEOUT)
            log.append("written")

    def second() -> None:
        with gate:
            log.append("second")

    threads = [started(first)]
    assert inside.wait(TIMEOUT)
    threads.append(started(write))
    assert not writing.wait(0.05)
    leave.set()
    assert writing.wait(TIMEOUT)
    threads.append(started(second))
    threads[2].join(0.05)
    go_on.set()
    assert ended(*threads)
    assert log == ["first", "write", "written", "second"]


def test_a_call_within_a_call_passes_a_writer_that_waits() -> None:
    gate = Gate(CPU)
    with gate:
        writer = started(lambda: gate.writing().__enter__())
        while gate._writer is None:
            pass
        with gate:
            pass
    assert ended(writer)


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_may_write_and_a_write_may_fail(fails: bool) -> None:
    gate = Gate(CPU)
    with gate:
        try:
            with gate.writing(), gate:
                assert not fails, "on purpose"
        except AssertionError:
            assert fails
    with gate:
        pass
    assert gate._calls == []
    with gate.writing():
        pass


def test_threads_that_call_and_write() -> None:
    """No call sees two parts of a pair that were not written together."""
    gate, pair, torn = Gate(CPU), [0, 0], list[tuple[int, int]]()
    turn = threading.Lock()

    def work(index: int) -> None:
        for step in range(200):
            if index < 2:
                with turn, gate.writing():
                    pair[0] = step
                    pair[1] = step
            else:
                with gate:
                    a, b = pair
                    if a != b:
                        torn.append((a, b))

    assert ended(*[started(lambda index=index: work(index)) for index in range(6)])  # type: ignore[misc]
    assert torn == []
    assert gate._calls == []


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: id(fake.current), raising=False)
    return fake


def on(cuda: FakeCuda, stream: FakeStream, gate: Gate) -> dict[str, int]:
    """A call on `stream`; returns what comes before it."""
    cuda.current = stream
    with gate:
        return stream.run()


def test_streams_are_ordered(cuda: FakeCuda) -> None:
    gate = Gate(CUDA, cuda)
    a, b, writer, later = (FakeStream(name) for name in ("a", "b", "writer", "later"))
    for _ in range(2):
        on(cuda, a, gate)
        assert "a" not in on(cuda, b, gate)  # calls do not wait for each other
    cuda.current = writer
    with gate.writing():
        assert writer.run() == {"a": 2, "b": 2, "writer": 1}
    for stream in (a, later):
        assert on(cuda, stream, gate)["writer"] == 1
        waited = len(stream.waited)
        on(cuda, stream, gate)
        assert len(stream.waited) == waited == 1
    on(cuda, writer, gate)
    cuda.current = a
    with gate.writing():
        assert a.run()["writer"] == 2
        assert a.run()["later"] == 2
        assert a.clock["b"] == 2


def test_nothing_waits_in_a_capture(cuda: FakeCuda) -> None:
    gate, stream, captured = Gate(CUDA, cuda), FakeStream("stream"), FakeStream("captured")
    on(cuda, stream, gate)
    cuda.current, cuda.capturing = captured, True
    with gate.writing():
        pass
    on(cuda, captured, gate)
    assert captured.waited == []
    cuda.current, cuda.capturing = FakeStream("writer"), False
    with gate.writing():
        assert "captured" not in cuda.current.clock
