"""What can be said on the command line.

argparse rather than a generated interface, because a mistake in ``--section.key value`` has to come out as one line
that names the dotted key, and because ``--help`` must not import torch.
"""

from __future__ import annotations

import argparse
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    Commands = argparse._SubParsersAction["_Parser"]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; its result names the command as ``command``."""
    parser = _Parser(
        prog="distplateau",
        description="A learning rate that follows the validation metric, in lockstep on every rank.",
        epilog="Exit codes: 0 done, 1 failed, 2 the input is wrong, 75 interrupted and resumable.",
    )
    parser.add_argument("--version", action="version", version=f"distplateau {_version()}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for add in (_init, _train, _submit, _jobs, _doctor, _evaluate, _report, _verify, _replay, _sync):
        add(commands)
    return parser


def _init(commands: Commands) -> None:
    command = commands.add_parser("init", help="write recipes to start from: launch/ and slurm/")
    command.add_argument("folder", type=Path, metavar="DIR", help="where they go")


def _train(commands: Commands) -> None:
    command = commands.add_parser(
        "train",
        help="train a run to its end, from its newest checkpoint if there is one",
        description="Train a run to its end, from its newest checkpoint if there is one. On several processes: "
        "accelerate launch --config_file launch/cpu.yaml -m distplateau train CONFIG.toml",
        with_keys=True,
    )
    command.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run; any key can be given as an option")
    command.add_argument(
        "--resume", choices=["auto", "override"], default="auto", help="override: continue with other settings"
    )


def _submit(commands: Commands) -> None:
    command = commands.add_parser(
        "submit",
        help="send a run, or a sweep of runs, to a Slurm cluster",
        description="Send a run to a Slurm cluster: it survives time limits, preemption and dead nodes, and goes on "
        "with the code and the settings of the submission. Any configuration key can be given as an option.",
    )
    command.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run")
    command.add_argument(
        "--cluster", required=True, metavar="PROFILE.toml", help='the cluster; "local" for processes on this machine'
    )
    command.add_argument(
        "--grid", action="append", default=[], metavar="KEY=A,B,C", help="a run for each value, and each combination"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the batch script, send nothing"
    )
    command.add_argument("--wait", action="store_true", help="return when the run is done, with its exit code")


def _jobs(commands: Commands) -> None:
    command = commands.add_parser(
        "jobs", help="runs and their jobs: state, nodes, epoch, LR, best, requeues, time left"
    )
    command.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="default: runs")
    action = command.add_mutually_exclusive_group()
    action.add_argument("--follow", type=Path, metavar="RUN", help="print what a run prints, until it is done")
    action.add_argument(
        "--cancel", type=Path, metavar="RUN", help="end the job of a run, or those of a sweep, for good"
    )


def _doctor(commands: Commands) -> None:
    command = commands.add_parser("doctor", help="is this machine, and a cluster, fit for a run that must survive?")
    command.add_argument("--cluster", metavar="PROFILE.toml", help="look at Slurm as well, in a short job")
    command.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs will lie [runs]")


def _evaluate(commands: Commands) -> None:
    command = commands.add_parser("evaluate", help="test loss and accuracy of a run's best weights")
    command.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--split", choices=["test", "validation"], default="test")
    command.add_argument("--data-root", help="where the data lies, if not where the run found it")


def _report(commands: Commands) -> None:
    command = commands.add_parser(
        "report",
        help="write report.html of runs, and a comparison of several",
        description="Write report.html of runs, and a comparison of several. With --wandb also as a hosted report in "
        "the runs' W&B project: made once, updated at the same address by the same command.",
    )
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder, or the folder of a sweep")
    command.add_argument("--out", type=Path, metavar="DIR", help="where the comparison goes; default: beside the runs")
    command.add_argument("--wandb", action="store_true", help="also as a hosted W&B report (pip install with [report])")


def _verify(commands: Commands) -> None:
    command = commands.add_parser(
        "verify",
        help="derive every learning rate of runs again from the recorded values",
        description="Derive every decision and learning rate again from the values in the ledger, and say which line "
        "does not follow. Exit code 1 if there is one.",
    )
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")


def _replay(commands: Commands) -> None:
    command = commands.add_parser(
        "replay",
        help="what another patience, factor, ... would have decided on a recorded curve",
        description="Run the rule again on a recorded curve, with every combination of the values given; without any, "
        "with several patiences. Reads a run folder, a CSV of any tool, a Lightning metrics.csv, an HF "
        "trainer_state.json, an offline wandb run, or wandb:ENTITY/PROJECT/RUN_ID. Writes a picture beside it.",
    )
    command.add_argument("sources", nargs="+", metavar="RUN|FILE", help="what recorded the curve")
    for name, kind in (("patience", int), ("factor", float), ("threshold", float), ("cooldown", int)):
        command.add_argument(f"--{name}", type=_values(kind), metavar="A,B,...", help=f"values of schedule.{name}")
    command.add_argument("--smoothing", type=_values(float), metavar="A,B,...", help="values of schedule.smoothing")
    command.add_argument("--min-lr", type=_values(float), metavar="A,B,...", help="values of schedule.min_lr")
    command.add_argument("--schedule", type=_values(str), metavar="A,B", help="plateau, greedy")
    command.add_argument("--mode", choices=["min", "max"], help="default: as recorded, or by the metric's name")
    command.add_argument("--threshold-mode", choices=["rel", "abs"], help="default: as recorded, or rel")
    command.add_argument("--monitor", "--column", metavar="NAME", help="metric or column that is the curve")
    command.add_argument("--lr", type=_positive, help="learning rate at the start; default: as recorded")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="where the pictures go; default: beside the record")


def _sync(commands: Commands) -> None:
    command = commands.add_parser(
        "sync",
        help="upload runs to Weights & Biases from their ledgers",
        description="Upload runs to Weights & Biases from their ledgers. Safe to repeat at any time: the server is "
        "asked what it holds, and asked again afterwards. A run that is still training is uploaded up to its last "
        "checkpoint.",
    )
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")


def _values(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Read ``3,5,10``."""

    def read(text: str) -> list[Any]:
        words = [word.strip() for word in text.split(",")]
        try:
            return [kind(word) for word in words]
        except ValueError:
            example = "3,5,10" if kind is int else "0.1,0.5"
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as {example}") from None

    return read


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; lists the configuration keys in its help where they are options."""

    def __init__(self, *args: Any, with_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._with_keys = with_keys

    def error(self, message: str) -> NoReturn:
        raise InputError("command line", message, f"see {self.prog} --help")

    def format_help(self) -> str:
        return super().format_help() + (_describe_keys() if self._with_keys else "")


def _describe_keys() -> str:
    from distplateau.config import dotted_keys

    keys = dotted_keys()
    width = max(map(len, keys)) + 2
    lines = [f"  --{key:<{width}}{text}" for key, text in keys.items()]
    return "\nconfiguration keys, each also an option:\n" + "\n".join(lines) + "\n"


def _version() -> str:
    try:
        return version("distplateau")
    except PackageNotFoundError:
        return "0 (not installed)"
