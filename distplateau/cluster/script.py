"""The batch script: what submitit makes it of, and what its shell does before and after the ranks."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distplateau.cluster.profile import Profile


def run_parameters(name: str, profile: Profile, run_dirs: Sequence[Path]) -> dict[str, Any]:
    """Return submitit's parameters for a run, or an array of runs, that comes back when it is interrupted."""
    folder = _by_array_task(run_dirs)
    return {
        **parameters(name, profile),
        "setup": [
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


def parameters(name: str, profile: Profile) -> dict[str, Any]:
    """Return submitit's parameters for one job of the profile's size."""
    section = profile.slurm
    plain = ("partition", "account", "qos", "constraint", "mem", "gres", "exclude", "gpus_per_node", "cpus_per_task")
    given = {key: getattr(section, key) for key in plain if getattr(section, key) is not None}
    further = {"requeue": True, **section.extra}
    if section.reservation is not None:
        further["reservation"] = section.reservation
    if isinstance(section.nodes, str):
        further["nodes"] = section.nodes
    return {
        **given,
        "job_name": name,
        "time": section.minutes,
        "nodes": section.most_nodes,
        "ntasks_per_node": section.tasks_per_node,
        "signal_delay_s": section.signal_seconds,
        "array_parallelism": section.array_parallelism,
        "wckey": None,
        "additional_parameters": further,
        # One rank that dies must not leave the others waiting for it; the first one closes its trackers at the end.
        "srun_args": ["--wait=30", *section.srun_args],
        "setup": _setup(profile),
    }


def _setup(profile: Profile) -> list[str]:
    """Return what the batch shell does on the job's first node before the ranks start."""
    probe = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
    return [
        # The shell has to be alive when the ranks have saved; srun gets its own signals.
        "trap : TERM USR1 USR2",
        *profile.setup,
        *(f"export {key}={shlex.quote(value)}" for key, value in profile.slurm.env.items()),
        # Since Slurm 22.05 srun does not take it over from sbatch.
        'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then',
        "    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}",
        "fi",
        # This is the machine of rank 0: a port that is free here, another one in each job, step and requeue.
        f'export MASTER_PORT=${{MASTER_PORT:-$({_python()} -c "{probe}")}}',
    ]


def _by_array_task(run_dirs: Sequence[Path]) -> str:
    """Return the run folder as the shell of the job finds it: by the task's number in an array."""
    folders = [shlex.quote(str(run_dir)) for run_dir in run_dirs]
    if len(folders) == 1:
        return folders[0]
    return f'"$(RUNS=({" ".join(folders)}); echo "${{RUNS[$SLURM_ARRAY_TASK_ID]}}")"'


def _python() -> str:
    return shlex.quote(sys.executable)
