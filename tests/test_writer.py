"""The background writer: the copy is that of the call, one piece of work at a time, errors are told."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distplateau.training.saving.writer import BackgroundWriter, Staging, _allocate

CPU = torch.device("cpu")


@pytest.fixture
def writer():
    writer = BackgroundWriter(CPU)
    yield writer
    writer.close()


def make_tree():
    return {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "average": None,
        "buffers": [{"b": torch.ones(2)}],
    }


def slow_down(monkeypatch, seconds=0.1):
    room = Staging._room
    monkeypatch.setattr(Staging, "_room", lambda *args: (time.sleep(seconds), room(*args))[1])


def test_what_is_written_is_equal_and_apart(writer):
    tree, written = make_tree(), []
    writer.submit(tree, written.append)
    writer.wait()
    [copy] = written
    assert copy["optimizer"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99)}]
    assert copy["average"] is None
    for one, other in ((copy["model"]["w"], tree["model"]["w"]), (copy["buffers"][0]["b"], tree["buffers"][0]["b"])):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    assert copy["model"]["n"].dtype == torch.int64


@pytest.mark.parametrize("waits", [True, False])
def test_an_update_waits_for_the_copy(writer, monkeypatch, waits):
    """Negative control: one that does not wait changes what is written."""
    slow_down(monkeypatch)
    tree, written = make_tree(), []
    before = tree["model"]["w"].clone()
    writer.submit(tree, lambda copy: written.append(copy["model"]["w"].clone()))
    if waits:
        writer.wait_for_copy()
    tree["model"]["w"].add_(1)
    writer.wait()
    assert torch.equal(written[0], before) == waits


def test_training_goes_on_while_it_is_written(writer):
    gate, order = threading.Event(), []
    writer.submit(make_tree(), lambda _: (gate.wait(10), order.append("written")), lambda: order.append("told"))
    writer.wait_for_copy()
    writer.poll()
    assert order == []
    gate.set()
    while not order:
        time.sleep(0.001)
    assert order == ["written"]  # nobody is told from the thread
    writer.wait()
    assert order == ["written", "told"]
    writer.wait()
    assert order == ["written", "told"]


def test_one_at_a_time(writer):
    active, most = [], []

    def write(_):
        active.append(1)
        most.append(len(active))
        time.sleep(0.02)
        active.pop()

    for _ in range(5):
        writer.submit(make_tree(), write)
    writer.wait()
    assert most == [1] * 5


@pytest.mark.parametrize("call", ["poll", "wait", "submit"])
def test_an_error_is_raised_by_the_next_call_and_once(writer, call):
    def fail(_):
        raise OSError("the disk is full")

    told = []
    writer.submit(make_tree(), fail, lambda: told.append(1))
    while not writer._work.done():
        time.sleep(0.001)
    with pytest.raises(OSError, match="the disk is full"):
        writer.submit(make_tree(), lambda _: None) if call == "submit" else getattr(writer, call)()
    writer.wait()
    assert told == []


def test_an_error_of_the_copy_does_not_leave_training_waiting(writer, monkeypatch):
    def broken(*_args):
        raise ValueError("a tensor of another kind")

    monkeypatch.setattr(Staging, "_room", broken)
    writer.submit(make_tree(), lambda _: None)
    writer.wait_for_copy()
    with pytest.raises(ValueError, match="another kind"):
        writer.wait()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_without_memory_for_a_copy_the_tensors_are_written_while_the_update_waits(writer, monkeypatch, error):
    def broken(*_args):
        raise error

    monkeypatch.setattr(Staging, "_room", broken)
    writer.reserve(make_tree())
    writer.wait()
    tree, written = make_tree(), []
    before = tree["model"]["w"].clone()
    writer.submit(tree, lambda held: (time.sleep(0.1), written.append(held["model"]["w"].clone())))
    writer.wait_for_copy()
    tree["model"]["w"].add_(1)
    writer.wait()
    assert torch.equal(written[0], before)


def test_memory_that_cannot_be_pinned_is_not(monkeypatch):
    empty = torch.empty

    def unpinnable(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", unpinnable)
    assert _allocate(torch.ones(3), pinned=True).shape == (3,)
    with pytest.raises(RuntimeError):
        torch.empty(3, pin_memory=True)


def test_memory_is_kept_for_the_next_copy(writer):
    places = []
    writer.reserve(make_tree())
    for _ in range(2):
        writer.submit(make_tree(), lambda copy: places.append(copy["model"]["w"].data_ptr()))
    writer.wait()
    assert places[0] == places[1]
    other = {**make_tree(), "model": {"w": torch.zeros(5, dtype=torch.float64)}}
    writer.submit(other, lambda copy: places.append(copy["model"]["w"].dtype))
    writer.wait()
    assert places[2] == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_copies_from_a_gpu_are_pinned_and_of_the_call():
    writer, device = BackgroundWriter(torch.device("cuda")), torch.device("cuda")
    weights, written = torch.zeros(50_000_000, device=device), []
    for number in range(5):
        writer.submit({"w": weights}, lambda copy: written.append((copy["w"].unique().tolist(), copy["w"].is_pinned())))
        writer.wait_for_copy()
        weights.fill_(number + 1)
    writer.wait()
    writer.close()
    assert written == [([float(number)], True) for number in range(5)]
