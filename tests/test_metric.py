"""GlobalMean: each sample once, stale windows, padding by Accelerate."""

from __future__ import annotations

import math
import warnings
from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from distplateau import GlobalMean, ReduceLROnPlateau, ShardSampler
from distplateau.lockstep.exact import WeightError
from distplateau.lockstep.metric import StaleMetricError
from ranks import run_ranks


def test_mean_and_count_in_one_process():
    metric = GlobalMean()
    metric.update(torch.tensor([1.0, 2.0, 6.0]))
    assert (metric.compute(), metric.count) == (3.0, 3.0)
    metric.update(torch.tensor([10.0]))  # a new window
    assert (metric.compute(), metric.count) == (10.0, 1.0)


def test_a_metric_that_was_computed_can_be_stepped_on_once():
    metric = GlobalMean()
    scheduler = ReduceLROnPlateau(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    for value in (3.0, 2.0):
        metric.update(torch.full((4,), value))
        assert metric.compute() == metric.compute() == scheduler.step(metric).value == value
        assert (metric.compute(), metric.count) == (value, 4.0)  # free
    with pytest.raises(StaleMetricError):
        scheduler.step(metric)
    with pytest.raises(StaleMetricError):  # nor is the old value used by the next one
        scheduler.step(metric)


def _always_empty(rank, windows):
    """The same rank has no sample in any window, as the validation set is smaller than the number of ranks."""
    metric, means = GlobalMean(timeout=timedelta(seconds=20)), []
    for window in range(windows):
        if rank < 2:
            metric.update(float(window + rank))
        means.append((metric.compute(), metric.count))
    return means


def test_a_rank_without_samples_takes_part_in_every_window():
    assert run_ranks(_always_empty, 3, 3) == [[(0.5, 2.0), (1.5, 2.0), (2.5, 2.0)]] * 3


def _step_after_compute(rank):
    """The new window has samples on one rank only, the other still holds the old mean."""
    metric = GlobalMean(timeout=timedelta(seconds=20))
    scheduler = ReduceLROnPlateau(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    metric.update(1.0)
    first = metric.compute()
    if rank == 1:
        metric.update(5.0)
    return first, scheduler.step(metric).value, metric.compute(), metric.count


def test_a_computed_mean_does_not_leak_into_the_next_window():
    assert run_ranks(_step_after_compute, 2) == [(1.0, 5.0, 5.0, 1.0)] * 2


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


class _Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(torch.arange(self.samples, dtype=torch.float64))


def _other_loader(rank, kind, samples, dispatch_batches, split_batches):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    config = DataLoaderConfiguration(dispatch_batches=dispatch_batches, split_batches=split_batches)
    data = torch.arange(100, dtype=torch.float64)
    loader = {
        "subset": lambda: DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(samples))),
        "stream": lambda: DataLoader(_Stream(samples), batch_size=4),
        "map": lambda: DataLoader(data[:samples], batch_size=4),
    }[kind]()
    loader, metric = Accelerator(cpu=True, dataloader_config=config).prepare(loader), GlobalMean()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for values in loader:
            metric.update(values)
    return metric.compute(), metric.count, any("pads the last batch" in str(w.message) for w in caught)


@pytest.mark.parametrize("samples", [9, 16, 17, 23])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize(("kind", "dispatch_batches"), [("subset", None), ("stream", None), ("map", True)])
def test_padding_of_samplers_streams_and_dispatched_batches_is_left_out(kind, samples, dispatch_batches, split_batches):
    results = run_ranks(_other_loader, 2, kind, samples, dispatch_batches, split_batches)
    assert results == [((samples - 1) / 2, samples, False)] * 2


def test_padding_of_a_stream_that_every_rank_reads_is_told():
    (_, count, warned), _ = run_ranks(_other_loader, 2, "stream", 9, False, False)
    assert (count, warned) == (16, True)


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
