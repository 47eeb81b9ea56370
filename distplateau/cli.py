"""The command line: parse, call, print.

argparse rather than a generated interface, because a mistake in ``--section.key value`` has to come out as one line
that names the dotted key, and because ``--help`` must not import torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distplateau.errors import InputError, closest

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    from distplateau.config import load_config

    config = load_config(options.config, _overrides(rest))
    from distplateau.training.interruption import Interrupted
    from distplateau.training.trainer import train

    try:
        run_dir = train(config, override=options.resume == "override")
    except Interrupted as stop:
        _print_once(f"interrupted by {stop.reason} after step {stop.step}; the same command goes on from there")
        return INTERRUPTED
    if _is_first_rank():
        _write_report(run_dir)
    return DONE


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
    for run_dir in options.run_dirs:
        _write_report(run_dir)
    return DONE


def _sync(options: argparse.Namespace, rest: list[str]) -> int:
    _no_rest(rest)
    from distplateau.record.sync import Outcome, sync

    def say(outcome: Outcome) -> None:
        print(outcome, file=sys.stdout if outcome.complete else sys.stderr, flush=True)

    outcomes = sync(options.run_dirs, say)
    return DONE if all(outcome.complete for outcome in outcomes) else FAILED


def _write_report(run_dir: Path) -> None:
    from distplateau.record.report import write_report

    sys.stdout.write(f"report {write_report(run_dir).resolve()}\n")


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

    command = commands.add_parser("evaluate", help="test loss and accuracy of a run's best weights")
    command.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--split", choices=["test", "validation"], default="test")
    command.add_argument("--data-root", help="where the data lies, if not where the run found it")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("report", help="write report.html of runs")
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")
    command.set_defaults(run=_report)

    command = commands.add_parser(
        "sync",
        help="upload runs to Weights & Biases from their ledgers",
        description="Upload runs to Weights & Biases from their ledgers. Safe to repeat at any time: the server is "
        "asked what it holds, and asked again afterwards. A run that is still training is uploaded up to its last "
        "checkpoint.",
    )
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")
    command.set_defaults(run=_sync)
    return parser


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


def _overrides(rest: list[str]) -> dict[str, str]:
    """Read ``--section.key value`` and ``--section.key=value``."""
    overrides: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise InputError(word, "is no option of train", _option_hint(word))
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise InputError(key, "has no value", f"write --{key} VALUE")
        overrides[key] = value
    return overrides


def _option_hint(word: str) -> str:
    from distplateau.config import dotted_keys

    name = word.removeprefix("--")
    matching = [key for key in dotted_keys() if key.endswith(f".{name}")]
    return f"did you mean --{matching[0]}?" if matching else closest(name, ["--section.key VALUE", "--resume"])


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
