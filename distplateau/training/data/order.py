"""The order in which ranks see the samples, and which of them become the validation set.

The order is a pure function of (seed, epoch), cut into global batches of which each rank takes its slice: it does not
depend on the number of ranks, and a run resumes at any step without reading what it skips.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from distplateau.errors import InputError


def split_validation(samples: int, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide the indices of the training set: what stays, and what becomes the validation set.

    Parameters
    ----------
    samples
        Size of the official training set. The test set is never part of it.
    size
        Number of validation samples, or their share if it is a float (rounded to whole samples).

    Returns
    -------
    tuple of Tensor
        Indices of the training and of the validation samples: two int64 tensors, each ascending, disjoint, together
        every index once. A pure function of the arguments.

    Raises
    ------
    InputError
        If one of them would be empty.
    """
    count = validation_count(samples, size)
    order = torch.randperm(samples, generator=seeded("validation", seed))
    return order[count:].sort().values, order[:count].sort().values


def validation_count(samples: int, size: float) -> int:
    """Return how many samples become the validation set.

    Raises
    ------
    InputError
        If that would leave one of the sets empty.
    """
    count = size if isinstance(size, int) else round(size * samples)
    if not 0 < count < samples:
        raise InputError(
            "data.validation_size",
            f"leaves no {'training' if count >= samples else 'validation'} sample of the {samples:,} there are",
            f"use a number from 1 to {samples - 1}, or a share between 0 and 1" if samples > 1 else "add samples",
            value=size,
        )
    return count


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch goes through the training samples.

    A pure function of the arguments: it knows no rank, no world size and no position, so a run continues at step k by
    cutting the k-th global batch out of it, on any number of ranks, and reads nothing of what it skips. Seed and epoch
    are hashed rather than added, or epoch 2 of seed 1 would be epoch 1 of seed 2.

    Returns
    -------
    Tensor
        int64, [samples], on the CPU: every index of ``0:samples`` once. torch's global random state is not used. The
        bits are those of the CPU generator of the installed torch, which does not promise them across its versions.
    """
    return torch.randperm(samples, generator=seeded("epoch", seed, epoch))


def rank_slice(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the part of the global batch ``start:stop`` that a rank takes.

    Laid end to end in the order of the ranks, the slices are the batch. Their sizes are at most one apart, and some
    are empty where there are fewer samples than ranks: no sample is dropped and none is repeated for padding, so the
    ranks must weight their gradients by sample count.

    Returns
    -------
    tuple of int
        First position and the position behind the last, ``start <= first <= last <= stop``.
    """
    assert start <= stop and 0 <= rank < world_size
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


def deal_batches(samples: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return the batches of ``0:samples`` that a rank evaluates.

    The cuts are made in global order, before anything is known of ranks, and only the last batch may be short; whole
    batches are then dealt out in turn. So a sample shares its batch with the same others at any number of ranks and
    its loss is computed in the same shape: kernels round differently at other batch sizes.

    Returns
    -------
    list of tuple of int
        ``(first, position behind the last)`` of each batch, ascending; empty for a rank that gets none.
    """
    assert batch_size > 0 and 0 <= rank < world_size
    starts = range(rank * batch_size, samples, world_size * batch_size)
    return [(start, min(start + batch_size, samples)) for start in starts]


def derived_seed(*parts: str | int) -> int:
    """Return a seed below 2**63 that follows from all the parts."""
    # Python's hash() of a text changes from process to process; the ranks must agree.
    mixed = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1


def seeded(*seed: str | int) -> torch.Generator:
    """Return a generator on the CPU whose numbers follow from all the parts."""
    return torch.Generator().manual_seed(derived_seed(*seed))
