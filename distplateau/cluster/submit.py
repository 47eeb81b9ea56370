"""Submission: everything that can be wrong is said before the queue, everything a job needs is frozen, then sbatch."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distplateau.cluster import job, queue
from distplateau.cluster.freeze import freeze, make_private
from distplateau.cluster.jobs import JOBS_FILE, LOCAL, Job, exit_code, states, submissions
from distplateau.cluster.profile import Profile, load_profile
from distplateau.cluster.script import run_parameters
from distplateau.cluster.secrets import secret_in
from distplateau.config import dump_config, load_config, parse_model
from distplateau.errors import InputError
from distplateau.record.private import keep_others_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from submitit import Executor

    from distplateau.config import Config

_LOCK = ".submission.lock"
_LONGEST_NAME = 255
# Slurm's own default, where it cannot be asked; a sweep on one machine runs one after the other.
_USUAL_POINTS, _LOCAL_POINTS = 1000, 1000


@dataclass(frozen=True)
class Submitted:
    """A run and the job that trains it."""

    run_dir: Path
    job: Job


def submit(
    config_path: Path,
    cluster: str,
    overrides: Mapping[str, str],
    grid: Mapping[str, Sequence[str]],
) -> list[Submitted]:
    """Submit a run, or one for each point of a grid as a job array.

    Parameters
    ----------
    cluster
        Path of a profile, or ``local`` for processes on this machine.
    overrides
        Dotted key -> text, as for ``distplateau train``.
    grid
        Dotted key -> texts; every combination is a run of its own.

    Raises
    ------
    InputError
        For whatever is wrong with configuration, data, profile or run folder, and for what sbatch refuses.
    """
    profile, configs = _prepare(config_path, cluster, overrides, grid)
    # The job takes the umask over: Slurm hands it on.
    with keep_others_out():
        return _submit(profile, configs, cluster)


def _submit(profile: Profile, configs: Sequence[Config], cluster: str) -> list[Submitted]:
    for config in configs:
        check(config, profile)
        make_private(config.run_dir)
    with contextlib.ExitStack() as held:
        for config in configs:
            held.enter_context(_submitted_once(config.run_dir))
            _check_not_queued(config.run_dir)  # another submission may have been faster
        return _freeze_and_send(profile, configs, cluster)


def _freeze_and_send(profile: Profile, configs: Sequence[Config], cluster: str) -> list[Submitted]:
    payloads = []
    for config in configs:
        frozen = freeze(config, config.run_dir.absolute(), Path.cwd())
        payloads.append((str(frozen), str(frozen.parent / "code")))
    executor = _executor(_home(configs), cluster, profile, configs)
    with _without_options_of_the_shell(profile):
        jobs = _send(executor, payloads, local=cluster == LOCAL)
    submitted = [
        Submitted(config.run_dir.absolute(), Job(job_id, cluster)) for config, job_id in zip(configs, jobs, strict=True)
    ]
    for one in submitted:
        _note(one)
    return submitted


@contextlib.contextmanager
def _submitted_once(run_dir: Path) -> Iterator[None]:
    """Hold a run folder from the look at its jobs until the new one is noted there.

    Raises
    ------
    InputError
        If another process is submitting the same run.
    """
    with (run_dir / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for that one, or choose another run.name"
            raise InputError(str(run_dir), "is being submitted by another process", fix) from None
        except OSError:  # a file system without locks
            pass
        yield


def dry_run(config_path: Path, cluster: str, overrides: Mapping[str, str], grid: Mapping[str, Sequence[str]]) -> str:
    """Check everything and return the batch script; nothing is written or submitted.

    Raises
    ------
    InputError
        As `submit`.
    """
    profile, configs = _prepare(config_path, cluster, overrides, grid)
    for config in configs:
        check(config, profile)
    if cluster == LOCAL:
        return f"{profile.slurm.most_ranks} processes on this machine, no batch script\n"
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = _parameters(profile, configs)
    if len(configs) > 1:
        parameters["map_count"] = len(configs)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(_logs(configs)))}"
    return _make_sbatch_string(command=command, folder=_logs(configs), **parameters) + "\n"


def check(config: Config, profile: Profile) -> None:
    """Say before the queue what would fail behind it: data, model, settings, ranks, another job of the same run.

    Raises
    ------
    InputError
        For the first thing that is wrong.
    """
    ranks = profile.slurm.most_ranks
    if config.data.global_batch_size < ranks:
        problem = f"is smaller than the {ranks} ranks of the profile"
        raise InputError(
            "data.global_batch_size", problem, f"use at least {ranks}", value=config.data.global_batch_size
        )
    _check_not_queued(config.run_dir)
    from distplateau.training.processes import check_launcher
    from distplateau.training.setup import check_run_folder, prepare_parts

    check_launcher(profile.slurm.env)
    _check_secrets(config, profile)
    if config.run_dir.exists():
        check_run_folder(config, override=False)
    prepare_parts(_as_here(config, profile))


def _check_not_queued(run_dir: Path) -> None:
    for one in submissions(run_dir):
        state = one.state()
        if state is not None and not state.has_ended:
            problem = f"is being trained by job {one.job_id} ({state.name})"
            fix = f"choose another run.name, or end that job: distplateau jobs --cancel {run_dir}"
            raise InputError(str(run_dir), problem, fix)


def _check_secrets(config: Config, profile: Profile) -> None:
    """Refuse the value of a secret of this shell: the one is frozen into the run folder, the other a batch script."""
    texts = {"configuration, which lies in the run folder": dump_config(config)}
    texts["cluster profile, which is written into the batch script"] = "\n".join(_strings(profile.model_dump()))
    for where, text in texts.items():
        name = secret_in(text.encode())
        if name is not None:
            fix = "read it from the environment instead, which jobs inherit"
            raise InputError(name, f"is in the {where}", fix)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)
    else:
        yield str(value)


def _as_here(config: Config, profile: Profile) -> Config:
    """Return what can be built on this machine: a login node has no GPU, whatever the nodes have."""
    if config.training.precision != "fp16" or not profile.slurm.has_gpus:
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": "no"})})


def _check_folders(configs: Sequence[Config]) -> None:
    """Refuse folders that Slurm would call something else, that are no folder, or that two runs would share."""
    home = _home(configs)
    if wrong := sorted({sign for sign in str(home) if sign in "%\\:" or not sign.isprintable()}):
        problem = f"has {', '.join(map(repr, wrong))} in its path, which Slurm reads as something else"
        raise InputError(str(home), problem, "choose another run.name or run.dir")
    if len(configs) == 1:
        return
    if (home / "ledger.jsonl").exists() or (home / "submission").exists():
        raise InputError(str(home), "holds a run, and can be no folder of a sweep", "choose another run.name")
    seen: dict[Path, Config] = {}
    for config in configs:
        if config.run_dir in seen:
            fix = "give each value once, and values that differ in more than a /"
            raise InputError("--grid", f"has two points with the folder {config.run.name!r}", fix)
        seen[config.run_dir] = config
    longest = max((config.run.name for config in configs), key=lambda name: len(name.encode()))
    if len(longest.encode()) > _LONGEST_NAME:
        problem = f"makes a folder name of {len(longest.encode())} bytes, above {_LONGEST_NAME}"
        raise InputError("--grid", problem, "vary fewer keys at a time, or shorter values", value=longest)


def _check_size(points: int, cluster: str) -> None:
    """Refuse a sweep that Slurm would refuse, before a thousand models are built to check it."""
    most = _LOCAL_POINTS if cluster == LOCAL else queue.largest_array() or _USUAL_POINTS
    if points > most:
        where = "this machine" if cluster == LOCAL else "the cluster (MaxArraySize)"
        raise InputError("--grid", f"makes {points:,} runs, above the {most:,} of {where}", "split it")


def wait(submitted: Sequence[Submitted]) -> int:
    """Return when all jobs are done, with the largest exit code; a requeue is no end."""
    return max(_wait_for(one) for one in submitted)


def expand_grid(grid: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Return name and overrides of each point: ``patience=3,factor=0.5``.

    The last part of a key names it, more of it where that is not enough.
    """
    shorts = {key: key.rpartition(".")[2] for key in grid}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        parts = [
            f"{key if list(shorts.values()).count(shorts[key]) > 1 else shorts[key]}={value}"
            for key, value in point.items()
        ]
        yield ",".join(parts).replace("/", "_").replace(":", "."), point


def _prepare(
    config_path: Path, cluster: str, overrides: Mapping[str, str], grid: Mapping[str, Sequence[str]]
) -> tuple[Profile, list[Config]]:
    profile = _local_profile() if cluster == LOCAL else load_profile(cluster)
    if cluster != LOCAL and shutil.which("sbatch") is None:
        raise InputError("sbatch", "is not on this machine", "submit from a login node, or use --cluster local")
    config = load_config(config_path, dict(overrides))
    if not grid:
        _check_folders([config])
        return profile, [config]
    home = config.run_dir
    for key in grid:
        if key in {"run.name", "run.dir"}:
            raise InputError(
                key, "cannot vary in a grid", "each point gets a folder of its own below <run.dir>/<run.name>"
            )
        if key in overrides:
            raise InputError(f"--{key}", "is in the grid as well", f"say it once, here or in --grid {key}=...")
    _check_size(math.prod(len(values) for values in grid.values()), cluster)
    points = []
    for name, point in expand_grid(grid):
        named = {"run.dir": str(home), "run.name": name}
        points.append(load_config(config_path, {**overrides, **point, **named}))
    _check_folders(points)
    return profile, points


def _local_profile() -> Profile:
    import torch

    ranks = max(1, torch.cuda.device_count())
    return parse_model(Profile, {"slurm": {"tasks_per_node": ranks}})


def _home(configs: Sequence[Config]) -> Path:
    """Return the folder of the run, or of the sweep that the runs belong to."""
    first = configs[0].run_dir.absolute()
    return first if len(configs) == 1 else first.parent


def _logs(configs: Sequence[Config]) -> Path:
    return _home(configs) / "logs"


def _executor(home: Path, cluster: str, profile: Profile, configs: Sequence[Config]) -> Executor:
    import submitit

    logs = home / "logs"
    make_private(home)
    make_private(logs)
    if cluster == LOCAL:
        executor: Executor = submitit.LocalExecutor(logs)
        executor.update_parameters(tasks_per_node=profile.slurm.tasks_per_node, timeout_min=60 * 24 * 365)
        return executor
    executor = submitit.SlurmExecutor(logs)
    executor.update_parameters(**_parameters(profile, configs))
    return executor


def _parameters(profile: Profile, configs: Sequence[Config]) -> dict[str, Any]:
    return run_parameters(_home(configs).name, profile, [config.run_dir.absolute() for config in configs])


def _send(executor: Executor, payloads: Sequence[tuple[str, str]], *, local: bool) -> list[str]:
    from submitit.core.utils import FailedJobError

    try:
        if local:
            one = executor.submit(job.run_in_turn, list(payloads), _free_port())
            return [one.job_id] * len(payloads)
        if len(payloads) == 1:
            return [executor.submit(job.run, *payloads[0]).job_id]
        with executor.batch():
            jobs = [executor.submit(job.run, *payload) for payload in payloads]
        return [one.job_id for one in jobs]
    except (FailedJobError, subprocess.CalledProcessError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())
        raise InputError("sbatch", f"refused the job ({said})", "mend the cluster profile") from None


@contextlib.contextmanager
def _without_options_of_the_shell(profile: Profile) -> Iterator[None]:
    """Take SBATCH_... away where the script says the same: sbatch heeds them before the script's own lines."""
    ours = {"EXPORT", "NO_REQUEUE", "REQUEUE", "SIGNAL", "TIMELIMIT", "OPEN_MODE", "OUTPUT", "ERROR", "INPUT",
            "JOB_NAME", "ARRAY_INX", "WAIT", "TEST_ONLY", "HOLD"}  # fmt: skip
    named = {"partition": "PARTITION", "account": "ACCOUNT", "qos": "QOS", "constraint": "CONSTRAINT", "gres": "GRES",
             "mem": "MEM_PER_NODE", "gpus_per_node": "GPUS_PER_NODE", "reservation": "RESERVATION"}  # fmt: skip
    ours |= {name for key, name in named.items() if getattr(profile.slurm, key) is not None}
    taken = {name: os.environ.pop(name) for name in [f"SBATCH_{one}" for one in ours] if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _note(one: Submitted) -> None:
    line = {**asdict(one.job), "time": round(time.time(), 3)}
    with (one.run_dir / "submission" / JOBS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _wait_for(one: Submitted) -> int:
    """Wait until the job has ended for good; the ledger says whether the run is done where Slurm cannot tell."""
    *_, last = states(one.job)
    return exit_code(one.run_dir, last)
