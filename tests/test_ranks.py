"""The tool that the multi-rank tests stand on: values by rank, errors with their traceback, no hang, no poison."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

import ranks
from ranks import RankError, run_ranks


def _all_reduce(rank, base):
    total = torch.tensor([base + rank])
    dist.all_reduce(total)
    return rank, dist.get_world_size(), total.item(), torch.get_num_threads()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_come_back_by_rank(size):
    total = sum(10 + rank for rank in range(size))
    assert run_ranks(_all_reduce, size, 10) == [(rank, size, total, 1) for rank in range(size)]


def test_a_warm_pool_answers_within_a_second():
    run_ranks(_all_reduce, 2, 0)
    begin = time.monotonic()
    run_ranks(_all_reduce, 2, 0)
    assert time.monotonic() - begin < 1


def _accelerator(rank):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    total = accelerator.reduce(torch.tensor(float(rank)), "sum").item()
    return accelerator.process_index, accelerator.num_processes, accelerator.device.type, total


def test_accelerate_joins_the_group_in_every_call():
    for _ in range(2):
        assert run_ranks(_accelerator, 2) == [(0, 2, "cpu", 1.0), (1, 2, "cpu", 1.0)]


def _raise_on(rank, who):
    if rank == who:
        raise ValueError(f"a broken rank, {rank}")
    dist.barrier()


def test_an_error_is_raised_here_with_its_traceback_while_the_others_wait_for_it():
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*in _raise_on\n.*ValueError: a broken rank, 1"):
        run_ranks(_raise_on, 2, 1)
    assert time.monotonic() - begin < 30
    assert [value[0] for value in run_ranks(_all_reduce, 2, 0)] == [0, 1]


def _skip_barrier(rank, who):
    """Leave the others waiting, while this rank has an answer but keeps its connections open."""
    if rank == who:
        time.sleep(60)
    dist.barrier()


def test_a_hang_is_ended_and_named_and_the_next_call_works():
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"ranks 0, 1 gave no answer within 0\.5 s"):
        run_ranks(_skip_barrier, 2, 0, timeout=0.5)
    assert time.monotonic() - begin < 10
    assert [value[0] for value in run_ranks(_all_reduce, 2, 0)] == [0, 1]


def _die(rank, who):
    if rank == who:
        os._exit(7)
    return rank


def test_a_dead_worker_is_named_and_the_next_call_works():
    with pytest.raises(RankError, match=r"rank 1: died \(exit code 7\)"):
        run_ranks(_die, 2, 1)
    assert run_ranks(_die, 2, None) == [0, 1]


def _return_a_function(rank):
    return lambda: rank


def test_what_cannot_be_pickled_is_told():
    with pytest.raises(RankError, match=r"rank 0: Traceback.*(?s:.*)_return_a_function"):
        run_ranks(_return_a_function, 1)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        run_ranks(lambda rank: rank, 1)


def _change_environment(rank):
    before = os.environ.get("ACCELERATE_MIXED_PRECISION")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    torch.set_num_threads(2)
    return before


def test_a_call_leaves_nothing_to_the_next():
    assert run_ranks(_change_environment, 2) == [None, None]
    assert run_ranks(_change_environment, 2) == [None, None]
    assert [value[3] for value in run_ranks(_all_reduce, 2, 0)] == [1, 1]


def test_shut_down_leaves_no_process():
    run_ranks(_all_reduce, 2, 0)
    processes = [process for pool in ranks._POOLS.values() for process in pool._processes]
    ranks.shut_down()
    assert processes
    assert not any(process.is_alive() for process in processes)


_LEAKY = """
import os
import torch.distributed as dist

def test_leaks(tmp_path):
    os.environ["MASTER_ADDR"] = "elsewhere"
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)

def test_monkeypatch_is_no_leak(monkeypatch):
    assert not dist.is_initialized() and "MASTER_ADDR" not in os.environ
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
"""


def test_the_leak_fixture_catches_a_leak(tmp_path):
    """Negative control of tests/conftest.py."""
    (tmp_path / "conftest.py").write_text((ranks._TESTS / "conftest.py").read_text())
    (tmp_path / "test_leaky.py").write_text(_LEAKY)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clean)
    assert "test_leaks left behind: MASTER_ADDR, an initialised process group" in result.stdout
    assert "2 passed, 1 error" in result.stdout
