"""The command line: parse, call, print.

argparse rather than a generated interface, because a mistake in ``--section.key value`` has to come out as one line
that names the dotted key, and because ``--help`` must not import torch.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong input, 75 interrupted and resumable."""
    try:
        options, rest = _parser().parse_known_args(argv)
        return options.run(options, rest)
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        _print_once("interrupted; the same command continues from the newest checkpoint")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); flushing at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from distplateau.config import load_config, read_overrides

    config = load_config(options.config, read_overrides(rest))
    from distplateau.training.session import train_and_report

    return train_and_report(config, override=options.resume == "override")


def _submit(options: argparse.Namespace, rest: list[str]) -> int:
    from distplateau.cluster import submit
    from distplateau.config import read_overrides

    overrides, grid = read_overrides(rest), _grid(options.grid)
    if options.dry_run:
        sys.stdout.write(submit.dry_run(options.config, options.cluster, overrides, grid))
        return DONE
    submitted = submit.submit(options.config, options.cluster, overrides, grid)
    for one in submitted:
        sys.stdout.write(f"job {one.job.job_id}  {one.run_dir}\n")
    sys.stdout.flush()
    return submit.wait(submitted) if options.wait else DONE


def _jobs(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.cluster import jobs

    if options.cancel is not None:
        for run_dir in jobs.find_runs(options.cancel):
            sys.stdout.write(f"cancelled job {jobs.cancel(run_dir)} of {run_dir}\n")
        return DONE
    if options.follow is not None:
        return jobs.follow(options.follow, lambda text: (sys.stdout.write(text), sys.stdout.flush()))
    jobs.print_table(jobs.overview(options.folder))
    return DONE


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.cluster.doctor import examine
    from distplateau.cluster.profile import load_profile

    profile = load_profile(options.cluster) if options.cluster else None
    bad = 0
    for finding in examine(options.runs, profile):
        mark = {True: "good", False: "BAD ", None: "-   "}[finding.good]
        fix = f"; {finding.fix}" if finding.good is False else ""
        sys.stdout.write(f"{mark}  {finding.name:<14}  {finding.text}{fix}\n")
        sys.stdout.flush()
        bad += finding.good is False
    return FAILED if bad else DONE


def _grid(texts: list[str]) -> dict[str, list[str]]:
    """Read ``section.key=a,b,c``; a list in brackets is one value."""
    grid = {}
    for text in texts:
        key, equals, values = text.partition("=")
        parts = [part.strip() for part in re.split(r",(?![^\[]*\])", values)]
        if not equals or "." not in key or not all(parts):
            raise InputError("--grid", "is no key with values", "write --grid section.key=a,b,c", value=text)
        grid[key] = list(dict.fromkeys(parts))
    return grid


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.training.evaluate import evaluate

    result = evaluate(options.run_dir, options.split, options.data_root)
    top5 = f", top-5 {100 * result['top5']:.2f} %" if "top5" in result else ""
    own = "".join(f", {k} {v:.4g}" for k, v in result.items() if k not in {"loss", "accuracy", "top5", "count"})
    _print_once(
        f"{options.split}: loss {result['loss']:.6g}, accuracy {100 * result['accuracy']:.2f} %{top5}{own} "
        f"over {result['count']:,} samples (best weights of {options.run_dir})",
        stream=sys.stdout,
    )
    return DONE


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.record.comparison import expand, write_comparison

    run_dirs = expand(options.run_dirs)
    for run_dir in run_dirs:
        _write_report(run_dir)
    if len(run_dirs) > 1:
        sys.stdout.write(f"comparison {write_comparison(run_dirs, options.out).resolve()}\n")
    return DONE


def _write_report(run_dir: Path) -> None:
    from distplateau.record.report import write_report

    sys.stdout.write(f"report {write_report(run_dir).resolve()}\n")


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.record.verify import verify

    verdicts = [verify(run_dir) for run_dir in options.run_dirs]
    for verdict in verdicts:
        sys.stdout.writelines(f"{line}\n" for line in (*verdict.findings, verdict.summary))
    return FAILED if any(verdict.findings for verdict in verdicts) else DONE


def _replay(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.record.curves import read_curve
    from distplateau.record.replay import VARIED, replay
    from distplateau.record.replay_figure import save_replay
    from distplateau.record.replay_table import print_replay

    varied = {name: getattr(options, name) for name in VARIED}
    fixed = {"mode": options.mode, "threshold_mode": options.threshold_mode}
    for place, source in enumerate(options.sources):
        curve = read_curve(source, options.monitor)
        result = replay(curve, varied, fixed, options.lr)
        if place:
            sys.stdout.write("\n")
        print_replay(result)
        number = f"-{place + 1}" if options.out and len(options.sources) > 1 else ""
        target = (options.out / f"replay{number}") if options.out else curve.picture
        paths = save_replay(result, target)
        sys.stdout.write(f"picture {', '.join(str(path) for path in paths)}\n")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="distplateau",
        description="A learning rate that follows the validation metric, in lockstep on every rank.",
        epilog="Exit codes: 0 done, 1 failed, 2 the input is wrong, 75 interrupted and resumable.",
    )
    parser.add_argument("--version", action="version", version=f"distplateau {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

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
    command.set_defaults(run=_train)

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
    command.set_defaults(run=_submit)

    command = commands.add_parser(
        "jobs", help="runs and their jobs: state, nodes, epoch, LR, best, requeues, time left"
    )
    command.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="default: runs")
    action = command.add_mutually_exclusive_group()
    action.add_argument("--follow", type=Path, metavar="RUN", help="print what a run prints, until it is done")
    action.add_argument(
        "--cancel", type=Path, metavar="RUN", help="end the job of a run, or those of a sweep, for good"
    )
    command.set_defaults(run=_jobs)

    command = commands.add_parser("doctor", help="is this machine, and a cluster, fit for a run that must survive?")
    command.add_argument("--cluster", metavar="PROFILE.toml", help="look at Slurm as well, in a short job")
    command.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs will lie [runs]")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("evaluate", help="test loss and accuracy of a run's best weights")
    command.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--split", choices=["test", "validation"], default="test")
    command.add_argument("--data-root", help="where the data lies, if not where the run found it")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("report", help="write report.html of runs, and a comparison of several")
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder, or the folder of a sweep")
    command.add_argument("--out", type=Path, metavar="DIR", help="where the comparison goes; default: beside the runs")
    command.set_defaults(run=_report)

    command = commands.add_parser(
        "verify",
        help="derive every learning rate of runs again from the recorded values",
        description="Derive every decision and learning rate again from the values in the ledger, and say which line "
        "does not follow. Exit code 1 if there is one.",
    )
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")
    command.set_defaults(run=_verify)

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
    command.set_defaults(run=_replay)
    return parser


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


def _no_rest(rest: list[str]) -> None:
    if rest:
        raise InputError(rest[0], "is no option of this command", "see distplateau --help")


def _refuse(error: InputError) -> int:
    """Print the one line once, not once per rank, and wait with the others until it is out."""
    if _is_first_rank():
        sys.stderr.write(f"distplateau: {error}\n")
        sys.stderr.flush()
    else:
        # A launcher ends all ranks when the first one fails: let that be the one that speaks.
        time.sleep(5)
    return WRONG_INPUT


def _print_once(text: str, stream: Any = None) -> None:
    if _is_first_rank():
        (stream or sys.stderr).write(f"{text}\n")


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _version() -> str:
    try:
        return version("distplateau")
    except PackageNotFoundError:
        return "0 (not installed)"
