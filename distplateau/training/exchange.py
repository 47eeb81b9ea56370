"""How ranks on the CPUs of one machine add up their gradients: through memory that they share.

gloo sends 2 MB of gradients through the loopback device in 3.5 ms between two processes, which is half of a small step;
through shared memory it takes a tenth of that. Each rank copies its gradients into its slot, adds up its part of all
slots, and copies the result back: a reduce-scatter and an all-gather (Thakur, Rabenseifner and Gropp, 2005). Every
element is added by one rank, in the order of the ranks, so that all get the same bits however DDP arranges its buckets.

Where ranks are on several machines or on GPUs, DDP's own exchange stays.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distplateau.lockstep.allreduce import patience

if TYPE_CHECKING:
    from torch import nn

# A slot: small enough to stay in a cache, large enough that two barriers of some 50 us do not matter.
_SLOT_BYTES = 4 << 20
_SETUP_SECONDS = 10.0
_TOKEN_BYTES = 16


class LostRankError(RuntimeError):
    """Another rank went away in the middle of an exchange, or did not come in time."""


def share_gradients(model: nn.Module) -> SharedMemory | None:
    """Exchange the gradients of a model through shared memory where that is possible. Collective; returns None if not.

    Parameters
    ----------
    model
        As Accelerate prepared it, before its first backward pass; anything but DDP on several CPU ranks is left alone.
    """
    if not isinstance(model, DistributedDataParallel) or dist.get_world_size() == 1:
        return None
    shared = _open(on_cpu=all(parameter.device.type == "cpu" for parameter in model.parameters()))
    if shared is not None:
        model.register_comm_hook(shared, _average_bucket)
    return shared


def _average_bucket(shared, bucket):  # noqa: ANN001, ANN202 - DDP accepts no annotations that are strings
    gradients: Tensor = bucket.buffer()
    shared.average_(gradients)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients)
    return done


class SharedMemory:
    """Memory of all ranks on a machine, and a connection between each two of them.

    Parameters
    ----------
    memory
        One slot per rank and one for the result.
    peers
        Connections to the other ranks.
    """

    def __init__(self, rank: int, ranks: int, memory: mmap.mmap, peers: list[socket.socket]) -> None:
        self.rank, self.ranks, self._peers = rank, ranks, peers
        slots = torch.frombuffer(memory, dtype=torch.uint8).split(_SLOT_BYTES)
        self._slots, self._result = slots[:ranks], slots[ranks]
        for peer in peers:
            peer.settimeout(patience(None).total_seconds())

    def average_(self, tensor: Tensor) -> None:
        """Replace a flat CPU tensor by its mean over the ranks. Collective: as long, and of one dtype, on every rank.

        Raises
        ------
        LostRankError
            If another rank goes away, or does not come within the process group's timeout.
        """
        for piece in tensor.split(_SLOT_BYTES // tensor.element_size()):
            self._average_piece(piece)

    def _average_piece(self, piece: Tensor) -> None:
        *slots, result = (slot.view(piece.dtype)[: len(piece)] for slot in (*self._slots, self._result))
        slots[self.rank].copy_(piece)
        self._meet()
        mine = slice(len(piece) * self.rank // self.ranks, len(piece) * (self.rank + 1) // self.ranks)
        total = torch.add(slots[0][mine], slots[1][mine], out=result[mine])
        for slot in slots[2:]:
            total.add_(slot[mine])
        total.div_(self.ranks)
        self._meet()
        # Nobody writes to a slot or the result before all have come to the next meeting: no third one is needed.
        piece.copy_(result)

    def _meet(self) -> None:
        """Return when every rank has come here."""
        try:
            for peer in self._peers:
                peer.send(b".")
            arrived = [peer.recv(1) for peer in self._peers]
        except OSError as error:
            raise LostRankError(f"rank {self.rank} waited for the gradients of the others: {error}") from error
        if not all(arrived):
            raise LostRankError(f"rank {self.rank} waited for the gradients of the others: one of them has gone")


# How the ranks find each other. Each step is agreed on: where one cannot do it, none does.


@dataclass(frozen=True)
class _Offer:
    """What a rank tells the others: where it is, and how to reach it."""

    machine: str | None
    address: str
    process: int
    descriptor: int
    token: bytes


def _open(*, on_cpu: bool) -> SharedMemory | None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        machine = _machine() if on_cpu and sys.platform == "linux" else None
        offer = _Offer(machine, "", os.getpid(), -1, secrets.token_bytes(_TOKEN_BYTES))
        if machine is not None:
            offer = _make_offer(offer, listener, stack, ranks if rank == 0 else 0)
        offers: list[_Offer] = [offer] * ranks
        dist.all_gather_object(offers, offer)
        if None in (machines := {one.machine for one in offers}) or len(machines) > 1:
            return None
        opened: tuple[mmap.mmap, list[socket.socket]] | None
        try:
            opened = _map(offers[0], ranks), _connect(listener, offers, rank)
        except OSError:
            opened = None
        votes = [opened is not None] * ranks
        dist.all_gather_object(votes, votes[rank])
        return SharedMemory(rank, ranks, *opened) if opened is not None and all(votes) else None


def _machine() -> str:
    """Name this machine and what of it can be seen from here: containers share a kernel, but nothing else."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return " ".join([boot, *(str(Path(f"/proc/self/ns/{space}").readlink()) for space in ("pid", "net"))])


def _make_offer(offer: _Offer, listener: socket.socket, stack: ExitStack, slots: int) -> _Offer:
    """Begin to listen; the first rank also makes the memory, which the kernel frees when the last process has gone."""
    address = f"\0distplateau-{secrets.token_hex(8)}"
    listener.bind(address)
    listener.listen()
    descriptor = -1
    if slots:
        descriptor = os.memfd_create("distplateau")
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, (slots + 1) * _SLOT_BYTES + _TOKEN_BYTES)
        os.pwrite(descriptor, offer.token, (slots + 1) * _SLOT_BYTES)
    return _Offer(offer.machine, address, offer.process, descriptor, offer.token)


def _map(offer: _Offer, ranks: int) -> mmap.mmap:
    with Path(f"/proc/{offer.process}/fd/{offer.descriptor}").open("r+b") as file:
        memory = mmap.mmap(file.fileno(), (ranks + 1) * _SLOT_BYTES + _TOKEN_BYTES)
    if memory[-_TOKEN_BYTES:] != offer.token:
        raise OSError("this is not the memory of the first rank")
    return memory


def _connect(listener: socket.socket, offers: list[_Offer], rank: int) -> list[socket.socket]:
    """Call those before this rank and answer those behind it; who does not know the token is turned away."""
    peers = []
    for offer in offers[:rank]:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(_SETUP_SECONDS)
        peer.connect(offer.address)
        peer.sendall(offer.token)
        peers.append(peer)
    listener.settimeout(_SETUP_SECONDS)
    while len(peers) < len(offers) - 1:
        peer, _ = listener.accept()
        peer.settimeout(_SETUP_SECONDS)
        if peer.recv(_TOKEN_BYTES, socket.MSG_WAITALL) == offers[rank].token:
            peers.append(peer)
    return peers
