"""What is computed from a network's outputs: the loss that is trained on, and the metrics of a validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distplateau.errors import InputError
from distplateau.training.parts.imports import import_function, short
from distplateau.training.parts.losses import build_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distplateau.config import TrainingSection
    from distplateau.training.parts.losses import Loss

_TOP_K = 5


def build_objective(section: TrainingSection, num_classes: int) -> Objective:
    """Make the loss and the metrics that a configuration names.

    Raises
    ------
    InputError
        For a name or setting that does not exist.
    """
    further = None if section.metrics is None else import_function("training.metrics", section.metrics)
    return Objective(build_loss(section.loss, section.loss_args), num_classes, further)


@dataclass(frozen=True)
class Objective:
    """Per-sample values of a batch, by name.

    Parameters
    ----------
    loss
        From (outputs, targets) to one value per sample.
    num_classes
        0 where the targets are no class labels: then there is no accuracy.
    further
        The user's own metrics: from (outputs, targets) to one value per sample, by name without ``val/``.
    """

    loss: Loss
    num_classes: int = 0
    further: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return what a validation measures of a batch: ``val/loss``, ``val/accuracy``, ``val/top5`` and the user's.

        Parameters
        ----------
        outputs
            float [n, ...] of the network.
        targets
            int64 [n] class labels, or whatever the loss takes.

        Returns
        -------
        dict of Tensor
            [n] each; the mean over all samples of all ranks is taken later, exactly.
        """
        values = {"val/loss": self.loss(outputs, targets)}
        if self.num_classes:
            values["val/accuracy"] = outputs.argmax(1) == targets
        if self.num_classes > _TOP_K:
            values["val/top5"] = (outputs.topk(_TOP_K).indices == targets[:, None]).any(1)
        if self.further:
            own = {
                f"val/{name}": self._checked(str(name), value, len(targets))
                for name, value in self._own(outputs, targets)
            }
            taken = own.keys() & {*values, "val/count"}
            if taken:
                name = min(taken).removeprefix("val/")
                raise InputError("training.metrics", f"the name {name} is taken", "give the metric another name")
            values |= own
        return values

    def _own(self, outputs: Tensor, targets: Tensor) -> list[tuple[str, Tensor]]:
        assert self.further is not None
        try:
            values = self.further(outputs, targets)
        except Exception as error:  # whatever the user's function raises
            problem = f"the function raised {type(error).__name__}: {short(error)}"
            raise InputError("training.metrics", problem, "mend the function") from error
        if not isinstance(values, dict):
            raise InputError(
                "training.metrics",
                f"the function returned {type(values).__name__}",
                "return a dict of one value per sample by name",
            )
        return list(values.items())

    @staticmethod
    def _checked(name: str, value: Tensor, samples: int) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != (samples,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                "training.metrics", f"{name} is {shape} for {samples} samples", "return one value per sample, [n]"
            )
        if not name or not name.isprintable():
            raise InputError("training.metrics", f"{name!r} is no name to print", "name the metric in letters")
        if value.layout != torch.strided:
            raise InputError("training.metrics", f"{name} is a sparse tensor", "return its to_dense()")
        if value.is_complex():
            raise InputError("training.metrics", f"{name} is complex", "return real numbers, such as its abs()")
        return value
