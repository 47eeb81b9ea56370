"""One stretch of a run, from the command line or in a job: train, say how it ended, write the report."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from distplateau.record.private import keep_others_out
from distplateau.record.report.page import write_report
from distplateau.training.interruption import RESUMABLE, Interrupted
from distplateau.training.trainer import train

if TYPE_CHECKING:
    from distplateau.config import Config

DONE = 0


def train_and_report(config: Config, *, override: bool = False) -> int:
    """Train a run to its end, or until it is interrupted; return the exit code. Every rank calls it.

    Raises
    ------
    InputError
        For anything wrong in the configuration.
    """
    with keep_others_out():
        return _train_and_report(config, override=override)


def _train_and_report(config: Config, *, override: bool) -> int:
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        run_dir = train(config, override=override)
    except Interrupted as stop:
        if is_first:
            sys.stderr.write(
                f"interrupted by {stop.reason} after step {stop.step}; the same command goes on from there\n"
            )
        return RESUMABLE
    except KeyboardInterrupt:
        if is_first:
            sys.stderr.write("interrupted; the same command continues from the newest checkpoint\n")
        # At its end Python would wait for a thread that may be writing gigabytes. What it leaves is no checkpoint yet.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RESUMABLE)
    if is_first:
        sys.stdout.write(f"report {write_report(run_dir).resolve()}\n")
    return DONE
