"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from distplateau.arguments import build_parser
from distplateau.errors import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import FrameType

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 75


_AFTERWARDS = {
    "train": "; the same command continues from the newest checkpoint",
    "submit": "; what has been submitted goes on: see distplateau jobs",
    "jobs": "; the jobs go on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong input, 75 interrupted and resumable."""
    command = ""
    try:
        options, rest = build_parser().parse_known_args(argv)
        command = options.command
        return _COMMANDS[options.command](options, rest)
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        _print_once(f"interrupted{_AFTERWARDS.get(command, '')}")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); flushing at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _init(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.recipes import FOLDERS, write_recipes

    written = write_recipes(options.folder)
    for folder in FOLDERS:
        count = sum(path.parent.name == folder for path in written)
        told = f"{count} files written" if count else "all there already"
        sys.stdout.write(f"{options.folder / folder}: {told}\n")
    sys.stdout.write(f"next: distplateau train {options.folder / 'launch' / 'demo.toml'}\n")
    return DONE


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from distplateau.config import load_config, read_overrides

    config = load_config(options.config, read_overrides(rest))
    with _leaving_at_signals():
        from distplateau.training.session import train_and_report

        return train_and_report(config, override=options.resume == "override")


@contextlib.contextmanager
def _leaving_at_signals() -> Iterator[None]:
    """Let a job that is preempted while it starts end as one that can be continued, as there is nothing to save yet."""

    def leave(number: int, _frame: FrameType | None) -> None:
        _print_once(f"interrupted by {signal.Signals(number).name} outside of training; the same command goes on")
        raise SystemExit(INTERRUPTED)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        return _cancel(jobs.find_runs(options.cancel))
    if options.follow is not None:
        return jobs.follow(options.follow, lambda text: (sys.stdout.write(text), sys.stdout.flush()))
    jobs.print_table(jobs.overview(options.folder))
    return DONE


def _cancel(run_dirs: list[Path]) -> int:
    """Cancel the jobs of all runs; one that cannot be cancelled keeps no other alive."""
    from distplateau.cluster import jobs

    refused = None
    cancelled = set()
    for run_dir in run_dirs:
        try:
            job = jobs.cancel(run_dir, cancelled)
            sys.stdout.write(f"cancelled job {job.job_id} of {run_dir}\n")
            cancelled.add(job)
        except InputError as error:
            sys.stderr.write(f"distplateau: {error}\n")
            refused = error
    return WRONG_INPUT if refused else DONE


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
    """Read ``section.key=a,b,c``; a list, an inline table or a quoted string is one value."""
    grid = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip()
        parts = _split(values)
        if not equals or "." not in key or not all(parts):
            raise InputError("--grid", "is no key with values", "write --grid section.key=a,b,c", value=text)
        if key in grid:
            raise InputError("--grid", f"has {key} twice", f"write --grid {key}=a,b,c once", value=text)
        grid[key] = list(dict.fromkeys(parts))
    return grid


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'" and parts[-1].rstrip()[-1:] in {"", "=", "[", "{", ","}:  # not the one in it's
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


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
    from distplateau.record.report.comparison import expand, write_comparison

    if options.wandb:
        from distplateau.record.tracking.hosted import check_installed

        check_installed()
    run_dirs = expand(options.run_dirs)
    for run_dir in run_dirs:
        _write_report(run_dir)
    if len(run_dirs) > 1:
        sys.stdout.write(f"comparison {write_comparison(run_dirs, options.out).resolve()}\n")
    return _host_report(options, run_dirs) if options.wandb else DONE


def _host_report(options: argparse.Namespace, run_dirs: list[Path]) -> int:
    from distplateau.record.tracking.backend import Unavailable
    from distplateau.record.tracking.hosted import host_report

    sys.stdout.flush()
    [folder, *others] = options.run_dirs
    try:
        hosted = host_report(run_dirs, options.out, None if others or folder in run_dirs else folder)
    except Unavailable as problem:
        sys.stderr.write(f"distplateau: the hosted report was not saved: {problem}; run the same command again later\n")
        return FAILED
    for remark in hosted.remarks:
        sys.stderr.write(f"distplateau: {remark}\n")
    sys.stdout.write(f"{'created' if hosted.created else 'updated'} {hosted.url}\n")
    return DONE


def _sync(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.record.tracking.sync import Outcome, sync

    def say(outcome: Outcome) -> None:
        print(outcome, file=sys.stdout if outcome.complete else sys.stderr, flush=True)

    outcomes = sync(options.run_dirs, say)
    return DONE if all(outcome.complete for outcome in outcomes) else FAILED


def _write_report(run_dir: Path) -> None:
    from distplateau.record.report.page import write_report

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
    from distplateau.record.replay.curves import read_curve
    from distplateau.record.replay.figure import save_replay
    from distplateau.record.replay.rerun import VARIED, replay
    from distplateau.record.replay.table import print_replay

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


def _no_rest(rest: list[str]) -> None:
    if rest:
        raise InputError(rest[0], "is no option of this command", "see distplateau --help")


def _refuse(error: InputError) -> int:
    """Print the one line once, not once per rank, and wait with the others until it is out."""
    if os.environ.get("RANK", "0") == str(error.rank or 0):
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


_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
    "init": _init,
    "train": _train,
    "submit": _submit,
    "jobs": _jobs,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "report": _report,
    "verify": _verify,
    "replay": _replay,
    "sync": _sync,
}
