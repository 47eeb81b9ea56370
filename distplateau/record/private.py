"""What a run writes is not for everybody to write into, whatever the umask of the shell is."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def keep_others_out() -> Iterator[None]:
    """Make no file or folder that others may write into; processes that are started meanwhile take it over.

    A job loads code, a pickle and checkpoints: who may write into them may run what they like as its user.
    """
    before = os.umask(0o077)
    os.umask(before | stat.S_IWOTH)
    try:
        yield
    finally:
        os.umask(before)
