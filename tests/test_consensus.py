"""The one all-reduce: simulated at any number of ranks through the same pure functions, and on real ones."""

from __future__ import annotations

import os
import random
import time
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distplateau.lockstep import consensus
from distplateau.lockstep.consensus import ConsensusTimeoutError, DisagreementError, Fingerprint, decode, digest, encode
from distplateau.lockstep.exact import ExactSum, Partial
from ranks import RankError, run_ranks


def simulate(parts):
    """Add up the vectors as an all-reduce does, within int64."""
    vectors = [encode(*part) for part in parts]
    total = [sum(column) for column in zip(*vectors, strict=True)]
    assert all(-(2**63) <= number < 2**63 for number in total)
    return decode(total, len(vectors), len(parts[0][0]))


def fingerprint(text: str) -> Fingerprint:
    return Fingerprint({"weights": digest(text.encode())})


def test_payload_is_at_most_one_kibibyte_and_of_fixed_size():
    small = encode([Partial()], Fingerprint())
    large = ExactSum()
    large.add(torch.full((1000,), torch.finfo(torch.float64).max, dtype=torch.float64), 2.0**256)
    assert len(small) == len(encode([large.partial()], fingerprint("x"), (True, True)))
    assert 8 * len(small) <= 1024


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 40))
def test_the_sum_over_ranks_is_the_sum_of_the_partials(seed, ranks):
    rng = random.Random(seed)
    partials = [
        Partial(rng.randrange(-(2**2600), 2**2600), rng.randrange(2**500), *(rng.randrange(9) for _ in range(4)))
        for _ in range(ranks)
    ]
    expected = Partial()
    for partial in partials:
        expected += partial
    assert simulate([([p], Fingerprint(), ()) for p in partials]).partials == (expected,)


@pytest.mark.parametrize("ranks", [1024, 4096])
def test_thousands_of_simulated_ranks(ranks):
    values = torch.rand(10_007, generator=torch.Generator().manual_seed(3))
    whole = ExactSum()
    whole.add(values)
    parts = []
    for rank in range(ranks):
        shard = ExactSum()
        shard.add(values[rank::ranks])
        parts.append(([shard.partial()], fingerprint("same"), (rank % 3 == 0, False)))
    agreement = simulate(parts)
    assert agreement.partials == (whole.partial(),)
    assert agreement.differing == ()
    assert agreement.votes == (len(range(0, ranks, 3)), 0)
    parts[ranks // 2] = (parts[ranks // 2][0], fingerprint("other"), ())
    assert simulate(parts).differing == ("weights",)


def test_a_rank_exactly_at_the_mean_sees_the_disagreement():
    """Of the digests 1, 2, 3 the middle one fulfils sum == n * mine; sums of squares still tell."""
    digests = [bytes([value]) + bytes(8) for value in (1, 2, 3)]
    total = sum(value[0] for value in digests)
    assert total == 3 * digests[1][0]  # the negative control: the weaker test sees no fault
    parts = [([], Fingerprint({"step": value}), ()) for value in digests]
    assert simulate(parts).differing == ("step",)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(min_size=9, max_size=9), min_size=1, max_size=20))
def test_verdict_is_equality(digests):
    parts = [([], Fingerprint({"step": value}), ()) for value in digests]
    assert bool(simulate(parts).differing) == (len(set(digests)) > 1)


def _exchange(rank, odd_rank, values):
    shard = ExactSum()
    shard.add(values[rank :: torch.distributed.get_world_size()])
    print_of = Fingerprint({"weights": digest(b"other" if rank == odd_rank else b"same")}, {"weights": f"w{rank}"})
    try:
        agreement = consensus.exchange([shard.partial()], print_of, (rank == 0,), label="validation 7")
    except DisagreementError as error:
        return str(error)
    return agreement.partials[0].mean().hex(), agreement.votes, agreement.ranks


@pytest.mark.parametrize("samples", [9, 10_007])
def test_real_ranks_get_the_same_bits_as_one_process(samples):
    values = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(samples))
    whole = ExactSum()
    whole.add(values)
    for ranks in (1, 2, 3, 4, 8):
        assert run_ranks(_exchange, ranks, None, values) == [(whole.mean().hex(), (1, 0), ranks)] * ranks


def test_a_disagreement_names_the_ranks_on_every_rank():
    messages = run_ranks(_exchange, 4, 2, torch.ones(8))
    assert len(set(messages)) == 1
    assert "validation 7" in messages[0]
    assert "weights: rank 2 (w2) against ranks 0, 1, 3" in messages[0]


def _late(rank):
    if rank == 1:
        time.sleep(2.5)
        return "late"
    begin = time.monotonic()
    try:
        consensus.exchange([Partial()], Fingerprint(), timeout=timedelta(seconds=0.5), label="validation 3")
    except ConsensusTimeoutError as error:
        return str(error), time.monotonic() - begin
    return "no error", 0.0


def test_a_rank_that_does_not_arrive_is_a_clear_error():
    (message, seconds), _ = run_ranks(_late, 2)
    assert message.startswith("validation 3: rank 0 of 2 waited 0.5 s")
    assert seconds < 2


def _in_subgroup(rank):
    group = torch.distributed.new_group([0, 2])
    if rank == 1:
        return None
    shard = ExactSum()
    shard.add(float(rank))
    return consensus.exchange([shard.partial()], Fingerprint(), group=group).partials[0].mean()


def test_subgroups():
    assert run_ranks(_in_subgroup, 3) == [1.0, None, 1.0]


def _disagreement_in_subgroup(rank):
    group = torch.distributed.new_group([1, 2, 3])
    if rank == 0:
        with pytest.raises(ValueError, match="validation 1: this process is not in the process group"):
            consensus.exchange([], Fingerprint(), group=group, label="validation 1")
        return None
    with pytest.raises(DisagreementError) as caught:
        consensus.exchange([], fingerprint("odd" if rank == 3 else "same"), group=group)
    return str(caught.value)


def test_a_subgroup_names_its_ranks_as_the_launcher_does_and_refuses_others():
    nobody, *messages = run_ranks(_disagreement_in_subgroup, 4)
    assert nobody is None
    assert all("weights: rank 3 (" in message and "against ranks 1, 2 (" in message for message in messages)


def _gone_before_it_says_what_it_holds(rank, path):
    if rank == 1:
        consensus._describe = lambda *_: os._exit(1)
    with pytest.raises(DisagreementError) as caught:
        consensus.exchange([], fingerprint(str(rank)), label="validation 4")
    path.write_text(str(caught.value))


def test_a_disagreement_is_told_without_the_rank_that_went_away(tmp_path):
    with pytest.raises(RankError, match="rank 1: died"):
        run_ranks(_gone_before_it_says_what_it_holds, 2, tmp_path / "told")
    assert (
        (tmp_path / "told").read_text().startswith("validation 4: the replicas disagree, training stops. They differ")
    )


def test_more_ranks_than_the_sums_are_exact_for_are_refused(monkeypatch):
    monkeypatch.setattr(consensus, "world_size", lambda _group: consensus.MAX_RANKS + 1)
    with pytest.raises(ValueError, match="at most 32767"):
        consensus.exchange([], Fingerprint())
    for number in (2**48 - 1, (2**24 - 1) ** 2):  # a limb, the square of a chunk
        assert consensus.MAX_RANKS * number < 2**63


def _late_for_its_group(rank):
    """The second rank comes too late for a group whose own timeout is two seconds, and for nobody else."""
    group = torch.distributed.new_group(timeout=timedelta(seconds=2))
    slow = torch.distributed.new_group(timeout=timedelta(seconds=60))
    begin = time.monotonic()
    if rank == 1:
        time.sleep(3)
    try:
        consensus.exchange([Partial()], Fingerprint(), group=group, label="validation 4")
    except ConsensusTimeoutError as error:
        waited = time.monotonic() - begin
        said = str(error)
    else:
        waited, said = 0.0, ""
    if rank == 1:
        time.sleep(1)
    return waited, said, consensus.exchange([Partial()], Fingerprint(), group=slow).ranks


def test_the_default_patience_is_that_of_the_group():
    (waited, said, ranks), _ = run_ranks(_late_for_its_group, 2)
    assert 1.5 < waited < 2.5
    assert "validation 4" in said and "1.8 s" in said
    assert ranks == 2
