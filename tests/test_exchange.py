"""Gradients through shared memory: the same bits on every rank; DDP's own exchange where there is none."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distplateau.training import exchange
from ranks import RankError, run_ranks


def _values(rank, dtype, size):
    generator = torch.Generator().manual_seed(1000 * size + rank)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * 10.0**rank).to(dtype)


def _average(rank, dtype, sizes, slot_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_SLOT_BYTES", slot_bytes)
        shared = exchange._open(on_cpu=True)
        tensors = [_values(rank, dtype, size) for size in sizes]
        for tensor in tensors:
            shared.average_(tensor)
    return tensors


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_mean_added_in_the_order_of_the_ranks(ranks, dtype):
    sizes = [1, 2, 7, 0, 64, 1000, 513]  # with 64 bytes to a slot most take several pieces, and some parts are empty
    by_rank = run_ranks(_average, ranks, dtype, sizes, 64)
    for place, size in enumerate(sizes):
        total = _values(0, dtype, size)
        for rank in range(1, ranks):
            total = total + _values(rank, dtype, size)
        expected = total / ranks
        assert all(torch.equal(results[place], expected) for results in by_rank)


def _gradients(rank, bucket_mb, through_memory):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(50, 300), nn.Tanh(), nn.Linear(300, 40), nn.Tanh(), nn.Linear(40, 3))
    model = DistributedDataParallel(network, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
    shared = exchange.share_gradients(model) if through_memory else None
    assert (shared is not None) == through_memory
    inputs = torch.randn(20, 50, generator=torch.Generator().manual_seed(rank))
    found = []
    for _ in range(3):  # DDP arranges its buckets anew after the first
        model.zero_grad()
        model(inputs).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]).clone())
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_do_not_depend_on_the_buckets(ranks):
    one_bucket, many = run_ranks(_gradients, ranks, 25, True), run_ranks(_gradients, ranks, 0.01, True)
    everything = [gradients for by_rank in (one_bucket, many) for found in by_rank for gradients in found]
    assert all(torch.equal(gradients, everything[0]) for gradients in everything)
    own = run_ranks(_gradients, ranks, 25, False)[0][0]
    torch.testing.assert_close(everything[0], own, rtol=1e-5, atol=1e-7)


def _one_leaves(rank, how):
    shared = exchange._open(on_cpu=True)
    for peer in shared._peers:
        peer.settimeout(1.0)
    if rank == 1:
        if how == "gone":
            for peer in shared._peers:
                peer.close()
        else:
            time.sleep(2.5)
        return ""
    begin = time.monotonic()
    with pytest.raises(exchange.LostRankError) as error:
        shared.average_(torch.zeros(5))
    assert time.monotonic() - begin < 2.0
    return str(error.value)


@pytest.mark.parametrize(("how", "says"), [("gone", ""), ("late", "timed out")])
def test_a_rank_that_does_not_come_is_an_error(how, says):
    told = run_ranks(_one_leaves, 2, how)[0]
    assert told.startswith("rank 0 waited for the gradients of the others") and says in told


def _cannot(rank, obstacle, patched, seconds=1.0):
    substitute = {"_machine": lambda: "elsewhere", "_map": _refused, "_connect": _refused}[obstacle]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_SETUP_SECONDS", seconds)
        if rank == patched:
            patch.setattr(exchange, obstacle, substitute)
        model = DistributedDataParallel(nn.Linear(3, 2))
        return exchange.share_gradients(model) is None


def _refused(*_arguments):
    raise PermissionError("no")


@pytest.mark.parametrize("obstacle", ["_machine", "_map"])
@pytest.mark.parametrize("rank", [0, 2])
def test_where_one_rank_cannot_none_does(obstacle, rank):
    assert run_ranks(_cannot, 3, obstacle, rank) == [True] * 3
    assert run_ranks(_cannot, 3, obstacle, None) == [False] * 3


def test_a_rank_that_does_not_call_is_given_up():
    assert run_ranks(_cannot, 3, "_connect", 2) == [True] * 3


def _alone(rank):
    plain = nn.Linear(3, 2)
    return exchange.share_gradients(plain) is None


def test_models_that_are_not_distributed_are_left_alone():
    assert run_ranks(_alone, 2) == [True, True]


def test_strangers_are_turned_away():
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as stranger:
        mine = exchange._Offer("here", f"\0test-{os.getpid()}", os.getpid(), -1, b"t" * 16)
        listener.bind(mine.address)
        listener.listen()
        stranger.connect(mine.address)
        stranger.sendall(b"f" * 16)
        friend = socket.socket(socket.AF_UNIX)
        friend.connect(mine.address)
        friend.sendall(mine.token)
        (peer,) = exchange._connect(listener, [mine, mine], 0)
        friend.sendall(b"hello")
        assert peer.recv(5) == b"hello"
        friend.close(), peer.close()


def test_other_memory_is_not_taken_for_the_first_ranks(tmp_path):
    descriptor = os.memfd_create("other")
    os.ftruncate(descriptor, 3 * exchange._SLOT_BYTES + 16)
    offer = exchange._Offer("here", "", os.getpid(), descriptor, b"t" * 16)
    with pytest.raises(OSError, match="not the memory of the first rank"):
        exchange._map(offer, 2)
    os.pwrite(descriptor, offer.token, 3 * exchange._SLOT_BYTES)
    assert len(exchange._map(offer, 2)) == 3 * exchange._SLOT_BYTES + 16
    os.close(descriptor)


def _raise_in_the_middle(rank):
    model = DistributedDataParallel(nn.Linear(3, 2))
    shared = exchange.share_gradients(model)
    if rank:
        for peer in shared._peers:
            peer.close()
        dist.barrier()
        return
    dist.barrier()
    model(torch.ones(1, 3)).sum().backward()


def test_a_lost_rank_ends_the_backward_pass_of_the_others():
    with pytest.raises(RankError, match="LostRankError: rank 0 waited"):
        run_ranks(_raise_in_the_middle, 2)
