"""The one all-reduce of a validation: sums, agreement and votes in a single integer SUM.

Every rank packs its exact sums, a fingerprint of what must be equal (learning rates, scheduler state, step, weights)
and its votes into one fixed-size vector of int64 and all ranks add them up. Integer addition is associative, so ring,
tree, 1 or 4,096 ranks give the same bits.

Agreement is read off the sums: a digest travels as 24-bit chunks ``d`` together with ``d * d``, and by Cauchy-Schwarz
``n * sum(d * d) == sum(d) ** 2`` holds just when all n chunks are equal. (``sum(d) == n * mine`` alone does not do: of
1, 2, 3 the middle one sees no fault.) The verdict follows from the reduced vector, so that all ranks reach the same
one, and the second exchange that names the ranks cannot deadlock.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from distplateau.lockstep.allreduce import ExchangeTimeoutError, patience, sum_over_ranks
from distplateau.lockstep.exact import VALUE_BITS, WEIGHT_BITS, Partial

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

# A sum over n ranks of limbs below 2**48 fits int64 for n < 2**15, and so does one of squares of 24-bit chunks.
MAX_RANKS = 2**15 - 1
_LIMB_BITS = 48
_VALUE_LIMBS = -(-VALUE_BITS // _LIMB_BITS)
_WEIGHT_LIMBS = -(-WEIGHT_BITS // _LIMB_BITS)
_PARTIAL_SIZE = _VALUE_LIMBS + _WEIGHT_LIMBS + 4
_CHUNK_BITS = 24
_CHUNKS = 3
_DIGEST_BYTES = _CHUNKS * _CHUNK_BITS // 8

ITEMS = ("learning rates", "scheduler state", "step", "weights", "metric")
"""What is compared. ``metric`` may differ: it is the local number given to ``step(float)``, told but not fatal."""

VOTES = 2


class DisagreementError(RuntimeError):
    """The replicas are no longer the same: they hold other weights, learning rates or scheduler states."""


class ConsensusTimeoutError(RuntimeError):
    """A rank did not come to the exchange of a validation in time."""


@dataclass(frozen=True)
class Fingerprint:
    """What this rank holds of the things that must be equal.

    Parameters
    ----------
    digests
        `digest` of each item of `ITEMS`; a missing one counts as equal.
    details
        How to show an item to a person, in case it differs.
    """

    digests: Mapping[str, bytes] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)

    def combined(self) -> str:
        """Return one hexadecimal digest over all items, as the ledger records it."""
        parts = (self.digests.get(item, b"") for item in ITEMS if item != "metric")
        return hashlib.blake2b(b"|".join(parts), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after the exchange; the same on every one of them.

    Parameters
    ----------
    partials
        The global sums, in the order they were given.
    votes
        How many ranks voted for each thing.
    differing
        Items of `ITEMS` in which the ranks are not all equal.
    ranks
        How many took part.
    """

    partials: tuple[Partial, ...]
    votes: tuple[int, ...]
    differing: tuple[str, ...]
    ranks: int


def digest(content: bytes) -> bytes:
    """Return the 72-bit digest that travels in the payload."""
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def exchange(
    partials: Sequence[Partial],
    fingerprint: Fingerprint,
    votes: Sequence[bool] = (),
    *,
    group: dist.ProcessGroup | None = None,
    timeout: timedelta | None = None,
    label: str = "this validation",
) -> Agreement:
    """Run the one collective of a validation. Every rank of `group` must call it, with as many `partials`.

    Parameters
    ----------
    votes
        At most two yes/no votes of this rank.
    group
        Process group; the default one if None. Without an initialised process group there is one rank.
    timeout
        How long to wait for the other ranks; default nine tenths of the group's own timeout.
    label
        Names the validation in error messages.

    Raises
    ------
    DisagreementError
        On every rank alike, naming the ranks and what differs.
    ConsensusTimeoutError
        If a rank does not arrive, or goes away meanwhile.
    ValueError
        On a rank that is not in `group`.
    """
    ranks = world_size(group)
    if ranks < 1:
        raise ValueError(f"{label}: this process is not in the process group: only its ranks may step() or compute()")
    vector = encode(partials, fingerprint, votes)
    if ranks > 1:
        if ranks > MAX_RANKS:
            raise ValueError(f"{ranks} ranks: the sums are exact for at most {MAX_RANKS}")
        vector = _sum(vector, group, timeout or patience(group), label)
    agreement = decode(vector, ranks, len(partials))
    fatal = [item for item in agreement.differing if item != "metric"]
    if fatal:
        raise DisagreementError(_describe(fatal, fingerprint, group, label))
    return agreement


def encode(partials: Sequence[Partial], fingerprint: Fingerprint, votes: Sequence[bool] = ()) -> list[int]:
    """Pack one rank's part of the exchange into a vector of integers below 2**48 in size. Pure."""
    if len(votes) > VOTES:
        raise ValueError(f"{len(votes)} votes, there is room for {VOTES}")
    vector: list[int] = []
    for partial in partials:
        vector += _to_limbs(partial.numerator, _VALUE_LIMBS) + _to_limbs(partial.weight, _WEIGHT_LIMBS)
        vector += [partial.nan, partial.pos_inf, partial.neg_inf, partial.bad_weights]
    for item in ITEMS:
        chunks = _chunks(fingerprint.digests.get(item, bytes(_DIGEST_BYTES)))
        vector += chunks + [chunk * chunk for chunk in chunks]
    return vector + [int(vote) for vote in votes] + [0] * (VOTES - len(votes))


def decode(vector: Sequence[int], ranks: int, partial_count: int) -> Agreement:
    """Read the sum of the vectors of `ranks` ranks. Pure: the same vector gives the same verdict everywhere."""
    partials = []
    for begin in range(0, partial_count * _PARTIAL_SIZE, _PARTIAL_SIZE):
        part = vector[begin : begin + _PARTIAL_SIZE]
        numerator = _from_limbs(part[:_VALUE_LIMBS])
        weight = _from_limbs(part[_VALUE_LIMBS : _VALUE_LIMBS + _WEIGHT_LIMBS])
        partials.append(Partial(numerator, weight, *part[-4:]))
    differing = []
    for place, item in enumerate(ITEMS):
        begin = partial_count * _PARTIAL_SIZE + place * 2 * _CHUNKS
        sums, squares = vector[begin : begin + _CHUNKS], vector[begin + _CHUNKS : begin + 2 * _CHUNKS]
        if any(ranks * square != total * total for total, square in zip(sums, squares, strict=True)):
            differing.append(item)
    return Agreement(tuple(partials), tuple(vector[-VOTES:]), tuple(differing), ranks)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in the group; 1 without an initialised process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in the group; 0 without an initialised process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def _sum(vector: list[int], group: dist.ProcessGroup | None, timeout: timedelta, label: str) -> list[int]:
    try:
        return sum_over_ranks(vector, group, timeout)
    except RuntimeError as error:
        if isinstance(error, ExchangeTimeoutError):
            reason = f"waited {timeout.total_seconds():g} s and not all ranks arrived"
        else:
            reason = f"lost the connection to another rank ({(str(error).strip() or repr(error)).splitlines()[-1]})"
        raise ConsensusTimeoutError(
            f"{label}: rank {rank(group)} of {world_size(group)} {reason}; every rank has to call step() or compute() "
            f"once per validation - look at the logs of the other ranks"
        ) from error


def _describe(fatal: list[str], fingerprint: Fingerprint, group: dist.ProcessGroup | None, label: str) -> str:
    """Ask all ranks what they hold and name those that differ from the majority. Rare; all ranks get here alike."""
    mine = {item: (fingerprint.digests.get(item, b""), fingerprint.details.get(item, "")) for item in fatal}
    gathered: list[Any] = [None] * world_size(group)
    lines = [f"{label}: the replicas disagree, training stops."]
    try:
        dist.all_gather_object(gathered, mine, group=group)
    except RuntimeError:  # the verdict stands without it
        return f"{lines[0]} They differ in {', '.join(fatal)}; a rank went away before it said what it holds."
    for item in fatal:
        held = [by_item[item] for by_item in gathered]
        common, _ = Counter(value for value, _ in held).most_common(1)[0]
        odd = [r for r, (value, _) in enumerate(held) if value != common]
        same = [r for r, (value, _) in enumerate(held) if value == common]
        lines.append(
            f"{item}: {_ranks(odd, group)} {_shown(held, odd)} against {_ranks(same, group)} {_shown(held, same)}"
        )
    return "\n  ".join(lines)


def _ranks(places: list[int], group: dist.ProcessGroup | None) -> str:
    """Name ranks of a group by the numbers that the launcher and the logs know them by."""
    numbers = places if group is None else [dist.get_global_rank(group, place) for place in places]
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def _shown(held: list[tuple[bytes, str]], numbers: list[int]) -> str:
    texts = dict.fromkeys(held[r][1] or held[r][0].hex() for r in numbers[:8])
    return f"({'; '.join(texts)})"


def _to_limbs(number: int, limbs: int) -> list[int]:
    """Write a signed integer as 48-bit limbs in two's complement, lowest first."""
    wrapped = number % (1 << (_LIMB_BITS * limbs))
    mask = (1 << _LIMB_BITS) - 1
    return [(wrapped >> (_LIMB_BITS * place)) & mask for place in range(limbs)]


def _from_limbs(limbs: Sequence[int]) -> int:
    """Read limbs that may have grown beyond 48 bits by addition."""
    span = _LIMB_BITS * len(limbs)
    total = sum(limb << (_LIMB_BITS * place) for place, limb in enumerate(limbs)) % (1 << span)
    return total - (1 << span) if total >> (span - 1) else total


def _chunks(value: bytes) -> list[int]:
    width = _CHUNK_BITS // 8
    return [int.from_bytes(value[begin : begin + width], "little") for begin in range(0, _DIGEST_BYTES, width)]
