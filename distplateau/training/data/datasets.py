"""Any data set by name, in memory or streamed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distplateau.errors import InputError
from distplateau.training.data.in_memory import load_data
from distplateau.training.data.sources import is_streamed, load_streamed

if TYPE_CHECKING:
    from distplateau.config import DataSection
    from distplateau.training.data.samples import DataSet


def load(section: DataSection, seed: int) -> DataSet:
    """Load the data set that a configuration names. Any rank may call it; no process group is used.

    Raises
    ------
    InputError
        As `load_data` and `load_streamed` do.
    """
    if is_streamed(section.name):
        root, size = Path(section.root), section.validation_size
        return load_streamed(section.name, root, section.args, size, seed, section.workers)
    if section.args:
        raise InputError("data.args", f"{section.name} takes none", "remove them", value=section.args)
    return load_data(section, seed)
