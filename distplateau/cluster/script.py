"""The batch script: what submitit makes it of, and what its shell does before and after the ranks."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distplateau.cluster.profile import Profile, SlurmSection


def run_parameters(name: str, profile: Profile, run_dirs: Sequence[Path]) -> dict[str, Any]:
    """Return submitit's parameters for a run, or an array of runs, that comes back when it is interrupted."""
    folder = _by_array_task(run_dirs)
    return {
        **parameters(name, profile),
        "setup": [
            _cap(profile.slurm.max_requeues),
            *_setup(profile),
            f"export PYTHONPATH={folder}/submission/code${{PYTHONPATH:+:$PYTHONPATH}}",
            # Or the current folder would come before it, with code that may have been edited since.
            "export PYTHONSAFEPATH=1",
        ],
        "teardown": [
            "code=$?",
            f"{_python()} -m distplateau.cluster.requeue {folder} $code {profile.slurm.max_requeues}",
            "exit $?",
        ],
    }


def _cap(most: int) -> str:
    """Return the line that ends a job which Slurm itself has brought back too often: nobody asks the teardown then."""
    said = f"distplateau: job $SLURM_JOB_ID ends: it came back more than {most} times (slurm.max_requeues)"
    return f'if [ "${{SLURM_RESTART_COUNT:-0}}" -gt {most} ]; then echo "{said}" >&2; exit 1; fi'


def parameters(name: str, profile: Profile) -> dict[str, Any]:
    """Return submitit's parameters for one job of the profile's size."""
    section = profile.slurm
    plain = ("partition", "account", "qos", "constraint", "mem", "gres", "exclude", "gpus_per_node")
    given = {key: getattr(section, key) for key in plain if getattr(section, key) is not None}
    further = {"requeue": True, **section.extra}
    if section.reservation is not None:
        further["reservation"] = section.reservation
    per_node, srun_args = _tasks(section)
    if isinstance(section.nodes, str):
        further |= {"nodes": section.nodes, "mincpus": section.tasks_per_node * (section.cpus_per_task or 1)}
    return {
        **given,
        **per_node,
        "job_name": name,
        "time": section.minutes,
        "nodes": section.most_nodes,
        "signal_delay_s": section.signal_seconds,
        "array_parallelism": section.array_parallelism,
        "wckey": None,
        "additional_parameters": further,
        # One rank that dies must not leave the others waiting for it; the first one closes its trackers at the end.
        "srun_args": ["--wait=30", *srun_args, *section.srun_args],
        "setup": _setup(profile),
    }


def _tasks(section: SlurmSection) -> tuple[dict[str, Any], list[str]]:
    """Return how many ranks a node has, for sbatch and for srun.

    Told to sbatch, it would fix the number of tasks, and with it that of the nodes, at the first start: a job of "2-4"
    nodes that got four would wait for four when it comes back. So then only srun is told.
    """
    asked = {"ntasks_per_node": section.tasks_per_node, "cpus_per_task": section.cpus_per_task}
    asked = {key: value for key, value in asked.items() if value is not None}
    if not isinstance(section.nodes, str):
        return asked, []
    return {}, [f"--{key.replace('_', '-')}={value}" for key, value in asked.items()]


def _setup(profile: Profile) -> list[str]:
    """Return what the batch shell does on the job's first node before the ranks start."""
    probe = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
    return [
        # The shell has to be alive when the ranks have saved; srun gets its own signals.
        "trap : TERM USR1 USR2",
        # Of another job, or of the shell that submitted: Slurm hands its environment on.
        "unset MASTER_ADDR MASTER_PORT",
        *profile.setup,
        *(f"export {key}={shlex.quote(value)}" for key, value in profile.slurm.env.items()),
        *_cores(profile.slurm.cpus_per_task),
        # This is the machine of rank 0: a port that is free here, another one in each job, step and requeue.
        f'export MASTER_PORT=${{MASTER_PORT:-$({_python()} -c "{probe}")}}',
    ]


def _cores(cpus_per_task: int | None) -> list[str]:
    """Give each rank its cores: since Slurm 22.05 srun does not take their number over from sbatch."""
    if cpus_per_task is None:
        return []
    threads = f"OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus_per_task}}}"
    return [f"export SRUN_CPUS_PER_TASK={cpus_per_task} {threads}"]


def _by_array_task(run_dirs: Sequence[Path]) -> str:
    """Return the run folder as the shell of the job finds it: by the task's number in an array."""
    folders = [shlex.quote(str(run_dir)) for run_dir in run_dirs]
    if len(folders) == 1:
        return folders[0]
    return f'"$(RUNS=({" ".join(folders)}); echo "${{RUNS[$SLURM_ARRAY_TASK_ID]}}")"'


def _python() -> str:
    return shlex.quote(sys.executable)
