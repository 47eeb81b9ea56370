"""A learning rate that follows the validation metric, in lockstep on every rank.

The names below are loaded when they are first used, so that ``import distplateau`` costs nothing and the tools that
read a run work without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distplateau.lockstep.exact import ExactSum
    from distplateau.lockstep.metric import GlobalMean
    from distplateau.lockstep.plateau import Decision
    from distplateau.lockstep.sampler import ShardSampler
    from distplateau.lockstep.scheduler import ReduceLROnPlateau
    from distplateau.training.fit import fit
    from distplateau.training.parts.models import load_model

__version__ = "0.1.0"
__all__ = ["Decision", "ExactSum", "GlobalMean", "ReduceLROnPlateau", "ShardSampler", "fit", "load_model"]

_HOME = {
    "Decision": "lockstep.plateau",
    "ExactSum": "lockstep.exact",
    "GlobalMean": "lockstep.metric",
    "ReduceLROnPlateau": "lockstep.scheduler",
    "ShardSampler": "lockstep.sampler",
    "fit": "training.fit",
    "load_model": "training.parts.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
