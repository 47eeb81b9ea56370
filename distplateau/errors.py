"""The one kind of error that is the reader's to mend: it names the key or path, the value and the fix, on one line."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class InputError(ValueError):
    """Something the user wrote is wrong. The command line prints it as one line and exits with code 2.

    Parameters
    ----------
    where
        The dotted key (``schedule.factor``) or the path.
    value
        What stands there, shown with `repr`; leave it out where the path says it all.
    problem, fix
        What is wrong, and what to write instead.

    Attributes
    ----------
    rank
        The one that has to tell it, where it was met in the middle of the work; None if all have met it alike.
    """

    def __init__(self, where: str, problem: str, fix: str, *, value: object = ...) -> None:
        self.where, self.value, self.problem, self.fix = where, value, problem, fix
        self.rank: int | None = None
        subject = where if value is ... else f"{where} = {value!r}"
        super().__init__(" ".join(f"{subject}: {problem}; {fix}".split()))


def closest(name: str, valid: Iterable[str]) -> str:
    """Say which of the `valid` names was probably meant, and list them all."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid: {', '.join(names)}"
