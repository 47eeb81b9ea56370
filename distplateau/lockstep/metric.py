"""GlobalMean: the exact mean over all samples of all ranks."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distplateau.lockstep import consensus
from distplateau.lockstep.exact import ExactSum, Partial, Values

if TYPE_CHECKING:
    from datetime import timedelta

    import torch.distributed as dist


class StaleMetricError(RuntimeError):
    """No rank has added a sample since the last step with this metric: the same validation would count twice."""


class GlobalMean:
    """Weighted mean over the whole validation set, rounded once, with the same bits on every rank.

    Parameters
    ----------
    process_group
        The ranks that share the metric; the default group if None, one rank if there is none.
    timeout
        How long `compute` waits for the other ranks; default 9 minutes.

    Notes
    -----
    `update` buffers on the device and communicates nothing. A window ends with ``scheduler.step(metric)``, `compute`
    or `reset`; the next `update` begins a new one. A rank without samples just makes no `update`; only where `compute`
    comes before the step with the same metric, it has to call `reset` at the start of a validation as well, because
    after a step `compute` is free and such a rank cannot know that the others have begun anew.

    Examples
    --------
    >>> metric = GlobalMean()
    >>> metric.update(torch.tensor([1.0, 2.0, 6.0]))
    >>> metric.compute(), metric.count
    (3.0, 3.0)
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, timeout: timedelta | None = None) -> None:
        self.process_group = process_group
        self.timeout = timeout
        self._sum = ExactSum()
        self._settled: Partial | None = None
        self._stepped = False  # whether a scheduler has used what is settled
        self._updated = False  # whether this rank has added anything since
        self._windows = 0

    def update(self, values: Values, weights: Values | None = None) -> None:
        """Add samples of this rank. Copies, does not wait for the device, does not communicate.

        Parameters
        ----------
        values
            One value per sample: a tensor of any shape and real dtype, or a number.
        weights
            One weight per value, or one number for all: ``update(loss.mean(), weights=len(batch))``. Default 1.

        Notes
        -----
        A loader prepared by Accelerate pads the last round of batches with samples that were seen before
        (``even_batches=True``). They are recognised through Accelerate's ``GradientState`` and left out, provided that
        `values` has one entry per sample along its first dimension.
        Where the validation runs inside a loop over a prepared training loader, prepare the validation loader as well:
        at the last batch of the outer one it could not be told from padding otherwise (nor can
        ``gather_for_metrics``).
        """
        keep = _unpadded(values)
        if keep is not None:
            assert isinstance(values, Tensor)
            if isinstance(weights, Tensor) and weights.shape == values.shape:
                weights = weights[:keep]
            values = values[:keep]
        self._sum.add(values, weights)
        self._updated = True

    def absorb(self, partial: Partial) -> None:
        """Add what `partial` gave before an interruption: on one rank, if it was summed over all of them."""
        self._sum.absorb(partial)
        self._updated = True

    def compute(self) -> float:
        """Return the global mean. Collective: every rank calls it, unless a step with the metric came since the update.

        Called again without an update in between it gives the same once more.

        Raises
        ------
        StaleMetricError
            If no rank has a sample.
        WeightError
            If a rank was given a negative, non-finite or extreme weight. Raised on all ranks alike.
        """
        if self._settled is None or self._updated or not self._stepped:
            # Also where this rank has added nothing: the others may have, and are waiting then.
            agreement = consensus.exchange(
                [self.partial()],
                consensus.Fingerprint(),
                group=self.process_group,
                timeout=self.timeout,
                label=f"compute() number {self._windows + 1} of a GlobalMean",
            )
            return self._settle(agreement.partials[0], stepped=False).mean()
        return self._settled.mean()

    @property
    def count(self) -> float:
        """Total weight over all ranks: the number of samples where no weights were given.

        Free after a step or `compute`, else collective as `compute` is.
        """
        if self._settled is None or self._updated:
            self.compute()
        assert self._settled is not None
        return self._settled.count()

    def reset(self) -> None:
        """Forget what was added and begin a new window."""
        self._sum, self._settled, self._stepped, self._updated = ExactSum(), None, False, False

    def partial(self) -> Partial:
        """Return this rank's part of the current window; nothing if the window was used up. For schedulers."""
        return self._sum.partial()

    def settle(self, partial: Partial) -> Partial:
        """Take over the global sum from the exchange of a step and end the window. For schedulers.

        Returns
        -------
        Partial
            The sum of the window. It is that of a `compute` that came before where nothing was added since.

        Raises
        ------
        StaleMetricError
            If no rank has a sample.
        """
        return self._settle(partial, stepped=True)

    def _settle(self, partial: Partial, *, stepped: bool) -> Partial:
        self._windows += 1
        if partial.weight == 0 and not partial.bad_weights:
            if self._settled is None or self._stepped:
                self.reset()
                raise StaleMetricError(
                    "no rank has added a sample to this GlobalMean since the last step() with it: "
                    "call update() during each validation"
                )
            partial = self._settled
        self._sum, self._settled, self._stepped, self._updated = ExactSum(), partial, stepped, False
        return partial


def _unpadded(values: Values) -> int | None:
    """Return how many of this rank's samples are real if Accelerate padded this batch, else None.

    Of the last round of batches (size b on each of n ranks) only the first so many samples are real; rank r keeps
    ``max(0, min(b, real - r * b))`` of them.
    """
    state = sys.modules.get("accelerate.state")
    shared = {} if state is None else state.GradientState._shared_state
    # Made for every batch: outside of a prepared loader, whose list of loaders has the one entry None, a look suffices.
    if state is None or not shared or len(shared.get("_dataloader_references_ref", ())) == 1:
        return None
    gradient = state.GradientState()
    if not gradient.end_of_dataloader:
        return None
    ranks = state.PartialState().num_processes
    last = _last_round(gradient, ranks) if ranks > 1 else None
    if last is None:
        return None
    batch, real = last
    if real is None:
        warnings.warn(
            "Accelerate pads the last batch of this iterable data set with samples seen before, and does not say how "
            "many: prepare it with dispatch_batches=True, or deal the samples out to the ranks yourself",
            stacklevel=3,
        )
        return None
    if not isinstance(values, Tensor) or values.ndim == 0 or values.shape[0] != batch:
        warnings.warn(
            "the last batch of a prepared loader is padded with samples seen before, and this update has no entry per "
            "sample to leave them out: pass per-sample values (reduction='none')",
            stacklevel=3,
        )
        return None
    return max(0, min(batch, real - state.PartialState().process_index * batch))


def _last_round(gradient: Any, ranks: int) -> tuple[int, int | None] | None:
    """Return the size of each rank's last batch and how many samples of all of them are real; None without padding."""
    from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard

    loader: Any = gradient.active_dataloader
    if isinstance(loader.dataset, IterableDatasetShard):
        return None if loader.dataset.drop_last else (0, None)
    if gradient.remainder < 0:  # the last round is dropped if it is not full
        return None
    if isinstance(loader, DataLoaderDispatcher):
        real = gradient.remainder  # here it counts the whole last round, which is cut into equal parts
        return None if loader._drop_last or real % ranks == 0 else (-(-real // ranks), real)
    batches = loader.batch_sampler
    if not getattr(batches, "even_batches", True):
        return None
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    total = loader.total_batch_size
    # Accelerate's remainder takes the length of the data set, also where a sampler draws fewer from it.
    real = len(batches.sampler) % total if hasattr(batches, "sampler") else gradient.remainder
    return (total // ranks, real) if real else None
