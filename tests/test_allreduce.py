"""The exchange itself: real gloo ranks, ranks that die, and torch's threaded process group."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distplateau import GlobalMean, ReduceLROnPlateau
from distplateau.lockstep import allreduce, consensus
from distplateau.lockstep.consensus import ConsensusTimeoutError, DisagreementError, Fingerprint
from distplateau.lockstep.exact import Partial
from ranks import RankError, run_ranks

SECOND = timedelta(seconds=1)


def _vectors(ranks, size=106):
    return torch.randint(-(2**48), 2**48, (ranks, size), generator=torch.Generator().manual_seed(ranks)).tolist()


def _sum(rank, vectors):
    return [allreduce.sum_over_ranks(vectors[rank], None, 20 * SECOND) for _ in range(3)][-1]


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_every_rank_gets_the_sum_of_integers(ranks):
    vectors = _vectors(ranks)
    expected = [sum(column) for column in zip(*vectors, strict=True)]
    assert run_ranks(_sum, ranks, vectors) == [expected] * ranks


def _sum_in_groups(rank, vectors):
    """Two groups at once, one of them in another order than the default group's."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3, 4])]
    return allreduce.sum_over_ranks(vectors[rank], groups[0 if rank in {0, 2} else 1], 20 * SECOND)


def test_groups_do_not_mix():
    vectors = _vectors(5)
    expected = [[sum(vectors[r][i] for r in members) for i in range(106)] for members in ((0, 2), (1, 3, 4))]
    assert run_ranks(_sum_in_groups, 5, vectors) == [expected[0 if rank in {0, 2} else 1] for rank in range(5)]


def _with_messages_of_the_user(rank, vectors):
    """The user's own message is under way while the sum is made."""
    peer, received = 1 - rank, torch.zeros(106, dtype=torch.int64)
    pending = [dist.isend(torch.full((106,), rank), peer), dist.irecv(received, peer)]
    total = allreduce.sum_over_ranks(vectors[rank], None, 20 * SECOND)
    for work in pending:
        assert work is not None
        work.wait()
    return total, received.unique().tolist()


def test_the_users_own_messages_are_left_alone():
    vectors = _vectors(2)
    expected = [sum(column) for column in zip(*vectors, strict=True)]
    assert run_ranks(_with_messages_of_the_user, 2, vectors) == [(expected, [1]), (expected, [0])]


def _survivor(rank, path):
    if rank == 1:
        time.sleep(0.3)
        os._exit(1)
    try:
        consensus.exchange([Partial()], Fingerprint(), timeout=8 * SECOND, label="validation 5")
    except ConsensusTimeoutError as error:
        path.write_text(str(error))


def test_the_survivor_of_a_dead_rank_is_told(tmp_path):
    with pytest.raises(RankError):
        run_ranks(_survivor, 2, tmp_path / "told", timeout=30)
    message = (tmp_path / "told").read_text()
    assert message.startswith("validation 5: rank 0 of 2 lost the connection to another rank")


class _Endless:
    """The work of a collective that one rank does not come to; as NCCL's, it does not end its wait by itself."""

    def is_completed(self):
        return False


def test_the_deadline_holds_where_waiting_takes_no_timeout(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_args, **_options: _Endless())
    monkeypatch.setattr(dist, "get_backend_config", lambda _group: "cuda:other")
    begin = time.monotonic()
    with pytest.raises(allreduce.ExchangeTimeoutError):
        allreduce.sum_over_ranks([1], None, 0.2 * SECOND)
    assert 0.2 <= time.monotonic() - begin < 2


def test_the_device_of_the_payload_is_chosen_by_the_group(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for config, device in (("cpu:gloo,cuda:gloo", "cpu"), ("cuda:nccl", "cuda:3"), ("cpu:gloo,cuda:nccl", "cuda:3")):
        monkeypatch.setattr(dist, "get_backend_config", lambda _group, config=config: config)
        assert str(allreduce.payload_device(None)) == device


@pytest.fixture
def threaded_ranks() -> Iterator[Callable[[int, Callable[[int], None]], None]]:
    """torch's own simulated process group: every rank is a thread."""
    threaded = pytest.importorskip("torch.testing._internal.distributed.multi_threaded_pg")
    world = threaded._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    errors: list[BaseException] = []

    def run(ranks: int, function: Callable[[int], None]) -> None:
        store = dist.HashStore()

        def work(rank: int) -> None:
            dist.init_process_group(backend="threaded", rank=rank, world_size=ranks, store=store)
            try:
                function(rank)
            except BaseException as error:
                errors.append(error)
                threaded.ProcessLocalGroup.exception_handle(error)
            finally:
                assert world == dist.distributed_c10d._world
                dist.destroy_process_group()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    yield run
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    threaded._uninstall_threaded_pg()


def _trace(shard: torch.Tensor) -> list[tuple[str, str]]:
    weight = torch.nn.Parameter(torch.zeros(1))
    scheduler = ReduceLROnPlateau(torch.optim.SGD([weight], lr=0.1), patience=1, factor=0.3)
    metric, result = GlobalMean(), []
    for scale in (1.0, 0.9, 0.95, 0.97, 0.93):
        metric.update(scale * shard)
        decision = scheduler.step(metric)
        result.append((decision.value.hex(), decision.lr_after[0].hex()))
    return result


def test_a_hundred_ranks_in_threads_step_as_one(threaded_ranks):
    """Through the whole scheduler, with uneven and empty shards."""
    ranks = 100
    losses = torch.rand(1_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    traces: dict[int, list[tuple[str, str]]] = {}

    def run(rank: int) -> None:
        traces[rank] = _trace(losses[rank * rank // 10 : (rank + 1) ** 2 // 10])

    alone = _trace(losses)
    assert len({lr for _, lr in alone}) == 2  # there was a reduction to agree on
    threaded_ranks(ranks, run)
    assert [traces[rank] for rank in range(ranks)] == [alone] * ranks


def test_a_changed_bit_among_sixty_four_threads_is_found(threaded_ranks):
    messages: dict[int, str] = {}

    def run(rank: int) -> None:
        weight = torch.nn.Parameter(torch.tensor([1.0 if rank != 41 else 1.0 + 2**-23]))
        scheduler = ReduceLROnPlateau(torch.optim.SGD([weight], lr=0.1))
        try:
            scheduler.step(1.0)
        except DisagreementError as error:
            messages[rank] = str(error)

    threaded_ranks(64, run)
    assert len(messages) == 64
    assert all("weights: rank 41" in message for message in messages.values())
