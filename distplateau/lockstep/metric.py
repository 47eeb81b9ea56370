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
    """No rank has added a sample since the metric was last used: the same validation would count twice."""


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
    or `reset`; the next `update` begins a new one. A rank without samples just makes no `update`.

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
        """
        if self._settled is not None:
            self.reset()
        keep = _unpadded(values)
        if keep is not None:
            assert isinstance(values, Tensor)
            if isinstance(weights, Tensor) and weights.shape == values.shape:
                weights = weights[:keep]
            values = values[:keep]
        self._sum.add(values, weights)

    def absorb(self, partial: Partial) -> None:
        """Add what `partial` gave before an interruption: on one rank, if it was summed over all of them."""
        if self._settled is not None:
            self.reset()
        self._sum.absorb(partial)

    def compute(self) -> float:
        """Return the global mean. Collective: every rank calls it, unless a `step` or `compute` came since the update.

        Raises
        ------
        StaleMetricError
            If no rank has a sample.
        WeightError
            If a rank was given a negative, non-finite or extreme weight. Raised on all ranks alike.
        """
        if self._settled is None:
            agreement = consensus.exchange(
                [self.partial()],
                consensus.Fingerprint(),
                group=self.process_group,
                timeout=self.timeout,
                label=f"compute() number {self._windows + 1} of a GlobalMean",
            )
            self.settle(agreement.partials[0])
        assert self._settled is not None
        return self._settled.mean()

    @property
    def count(self) -> float:
        """Total weight over all ranks: the number of samples where no weights were given. Collective as `compute`."""
        self.compute()
        assert self._settled is not None
        return self._settled.count()

    def reset(self) -> None:
        """Forget what was added and begin a new window."""
        self._sum, self._settled = ExactSum(), None

    def partial(self) -> Partial:
        """Return this rank's part of the current window; nothing if the window was used up. For schedulers."""
        return Partial() if self._settled is not None else self._sum.partial()

    def settle(self, partial: Partial) -> None:
        """Take over the global sum from an exchange and end the window. For schedulers.

        Raises
        ------
        StaleMetricError
            If no rank has a sample.
        """
        self._windows += 1
        if partial.weight == 0 and not partial.bad_weights:
            self.reset()
            raise StaleMetricError(
                "no rank has added a sample to this GlobalMean since its last step() or compute(): "
                "call update() during each validation"
            )
        self._sum, self._settled = ExactSum(), partial


def _unpadded(values: Values) -> int | None:
    """Return how many of this rank's samples are real if Accelerate padded this batch, else None.

    Of the last round of batches (size b on each of n ranks) only the first ``remainder`` samples are real; rank r
    keeps ``max(0, min(b, remainder - r * b))`` of them.
    """
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return None
    gradient = state.GradientState()
    if not gradient.end_of_dataloader or gradient.remainder <= 0:
        return None
    loader: Any = gradient.active_dataloader
    ranks = state.PartialState().num_processes
    if ranks == 1 or not getattr(loader.batch_sampler, "even_batches", True):
        return None
    batch = loader.total_batch_size // ranks
    if not isinstance(values, Tensor) or values.ndim == 0 or values.shape[0] != batch:
        warnings.warn(
            "the last batch of a prepared loader is padded with samples seen before, and this update has no entry per "
            "sample to leave them out: pass per-sample values (reduction='none')",
            stacklevel=3,
        )
        return None
    return max(0, min(batch, gradient.remainder - state.PartialState().process_index * batch))
