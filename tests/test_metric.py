"""GlobalMean: each sample once, stale windows, padding by Accelerate."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from distplateau import GlobalMean, ShardSampler
from distplateau.lockstep.exact import WeightError
from distplateau.lockstep.metric import StaleMetricError
from ranks import run_ranks


def test_mean_and_count_in_one_process():
    metric = GlobalMean()
    metric.update(torch.tensor([1.0, 2.0, 6.0]))
    assert (metric.compute(), metric.count) == (3.0, 3.0)
    metric.update(torch.tensor([10.0]))  # a new window
    assert (metric.compute(), metric.count) == (10.0, 1.0)


def test_a_metric_without_an_update_is_stale():
    metric = GlobalMean()
    with pytest.raises(StaleMetricError):
        metric.compute()
    metric.update(1.0)
    metric.compute()
    metric.reset()
    with pytest.raises(StaleMetricError):
        metric.compute()


def _uneven(rank, values):
    ranks = torch.distributed.get_world_size()
    metric = GlobalMean()
    shares = [values[: len(values) // 3], values[:0], values[len(values) // 3 :]]
    if rank < 3:
        for part in shares[rank].split(5):
            metric.update(part)
    return metric.compute().hex(), metric.count, ranks


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_uneven_and_empty_shares(ranks):
    values = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    alone = GlobalMean()
    alone.update(values)
    assert run_ranks(_uneven, ranks, values) == [(alone.compute().hex(), 1001.0, ranks)] * ranks


def _bad_weight(rank):
    metric = GlobalMean()
    metric.update(1.0, weights=-1.0 if rank == 1 else 1.0)
    try:
        return metric.compute()
    except WeightError:
        return "refused"


def test_a_bad_weight_on_one_rank_is_refused_on_all():
    assert run_ranks(_bad_weight, 2) == ["refused", "refused"]


def _stale_everywhere(rank):
    metric = GlobalMean()
    if rank == 0:
        metric.update(1.0)
    first = metric.compute()
    metric.reset()
    try:
        metric.compute()
    except StaleMetricError:
        return first, "stale"
    return first, "counted twice"


def test_stale_is_agreed_on_by_all_ranks():
    assert run_ranks(_stale_everywhere, 2) == [(1.0, "stale")] * 2


def _prepared_loader(rank, samples, batch, split_batches, even_batches, per_sample):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches, even_batches=even_batches),
    )
    loader = accelerator.prepare(DataLoader(torch.arange(samples, dtype=torch.float64) ** 2, batch_size=batch))
    metric = GlobalMean()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for values in loader:
            if per_sample:
                metric.update(values)
            else:
                metric.update(values.mean(), weights=len(values))
    return metric.compute(), metric.count, any("padded" in str(w.message) for w in caught)


@pytest.mark.parametrize("samples", [9, 16, 17, 23, 64])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("even_batches", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_padding_of_a_prepared_loader_is_left_out(samples, split_batches, even_batches, ranks):
    expected = sum(i * i for i in range(samples)) / samples
    results = run_ranks(_prepared_loader, ranks, samples, 4, split_batches, even_batches, True)
    assert results == [(expected, samples, False)] * ranks


def test_padding_that_cannot_be_left_out_is_told():
    """Negative control: batch means count the padding, and a warning says so."""
    (mean, count, warned), _ = run_ranks(_prepared_loader, 2, 9, 4, False, True, False)
    assert count == 16
    assert mean != sum(i * i for i in range(9)) / 9
    assert warned


@pytest.mark.parametrize(("samples", "ranks"), [(10, 3), (2, 4), (0, 2)])
def test_shard_sampler_has_every_sample_once(samples, ranks):
    shares = [list(ShardSampler(range(samples), rank, ranks)) for rank in range(ranks)]
    assert sorted(index for share in shares for index in share) == list(range(samples))
    assert [len(ShardSampler(range(samples), rank, ranks)) for rank in range(ranks)] == [len(s) for s in shares]


def test_distributed_sampler_repeats_samples():
    """Negative control: torch's sampler counts some samples twice."""
    from torch.utils.data import DistributedSampler

    indices = [i for rank in range(3) for i in DistributedSampler(range(10), 3, rank, shuffle=False)]
    assert len(indices) == 12


def test_nan_is_seen():
    metric = GlobalMean()
    metric.update(torch.tensor([1.0, math.nan]))
    assert math.isnan(metric.compute())
