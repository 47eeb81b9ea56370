"""What a cluster is like: a typed TOML file that is written once and serves every run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from distplateau.cluster.secrets import looks_secret
from distplateau.config import Positive, Section, parse_model, read_toml
from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d)(?::(?P<seconds>[0-5]\d))?")
_DELAY = re.compile(r"(?P<seconds>[1-9]\d*) ?s")
_NODES = re.compile(r"(?P<least>[1-9]\d*)-(?P<most>[1-9]\d*)")
_ASSIGNMENT = re.compile(r"(?<![\w$])(?:--)?(?P<name>[A-Za-z_][\w-]*)=(?P<value>[^\s\"'$]|[\"'][^$])")
_OPTION = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
# What this package has a word of its own for, or would be broken by.
_TAKEN = frozenset(
    "array cpus-per-task mincpus error gpus-per-node job-name nodes ntasks ntasks-per-node open-mode output requeue "
    "no-requeue "
    "signal time partition account qos constraint mem gres exclude reservation "
    # sbatch would answer, wait or run otherwise than submitit understands; --export=NONE takes the environment away
    "export export-file help hold parsable quiet test-only usage version wait wrap".split()
)


def _check_time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ValueError('write "HH:MM:SS" or "D-HH:MM:SS"')
    return text


def _check_delay(text: str) -> str:
    if not _DELAY.fullmatch(text):
        raise ValueError('write "90s"')
    return text


def _check_nodes(nodes: int | str) -> int | str:
    if isinstance(nodes, str):
        match = _NODES.fullmatch(nodes)
        if not match or int(match["least"]) > int(match["most"]):
            raise ValueError('write 2, or "2-4" for as many as there are')
    return nodes


class SlurmSection(Section):
    """What is asked of Slurm. Keys that are not set are left to the cluster."""

    nodes: Annotated[
        Positive | str, AfterValidator(_check_nodes), Field(description='2, or "2-4" for what there is')
    ] = 1
    tasks_per_node: Annotated[Positive, Field(description="ranks on a node, one for each GPU")] = 1
    gpus_per_node: Annotated[Annotated[int, Field(ge=0)] | None, Field(description="GPUs on a node")] = None
    cpus_per_task: Annotated[Positive | None, Field(description="cores for a rank and its data workers")] = None
    partition: Annotated[str | None, Field(description="partition, or several with commas")] = None
    account: Annotated[str | None, Field(description="account that pays")] = None
    qos: Annotated[str | None, Field(description="quality of service")] = None
    constraint: Annotated[str | None, Field(description="features that a node must have")] = None
    mem: Annotated[str | None, Field(description='memory of a node, such as "64G"')] = None
    gres: Annotated[str | None, Field(description="generic resources")] = None
    exclude: Annotated[str | None, Field(description="nodes to stay away from")] = None
    reservation: Annotated[str | None, Field(description="reservation to run in")] = None
    time: Annotated[str, AfterValidator(_check_time), Field(description='limit of one stretch, "HH:MM:SS"')] = (
        "02:00:00"
    )
    signal_delay: Annotated[
        str, AfterValidator(_check_delay), Field(description='"90s" before the limit the run saves and is requeued')
    ] = "90s"
    max_requeues: Annotated[int, Field(ge=0, description="how often a job comes back at most")] = 20
    array_parallelism: Annotated[Positive, Field(description="runs of a sweep at the same time")] = 8
    srun_args: Annotated[
        list[str], Field(default_factory=list, description="further arguments of srun, such as those of a container")
    ]
    extra: Annotated[
        dict[str, Any], Field(default_factory=dict, description="any other option of sbatch, by its long name")
    ]
    env: Annotated[
        dict[str, str], Field(default_factory=dict, description="environment variables of the job; no secrets")
    ]

    @property
    def minutes(self) -> int:
        """Return `time` in minutes, rounded up."""
        match = _TIME.fullmatch(self.time)
        assert match, "checked when it was read"
        days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
        return max(1, 60 * (24 * days + hours) + minutes + (seconds > 0))

    @property
    def signal_seconds(self) -> int:
        """Return `signal_delay` in seconds."""
        match = _DELAY.fullmatch(self.signal_delay)
        assert match, "checked when it was read"
        return int(match["seconds"])

    @property
    def most_nodes(self) -> int:
        """Return how many nodes the job may get."""
        return self.nodes if isinstance(self.nodes, int) else int(self.nodes.split("-")[1])

    @property
    def has_gpus(self) -> bool:
        """Return whether the ranks will find a GPU, as far as the profile says so."""
        on_cpu = self.env.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
        asked = self.gpus_per_node or "gpu" in (self.gres or "") or any(key.startswith("gpu") for key in self.extra)
        return bool(asked) and not on_cpu

    @property
    def most_ranks(self) -> int:
        """Return how many ranks the job may have."""
        return self.most_nodes * self.tasks_per_node


class Profile(Section):
    """A cluster."""

    setup: Annotated[
        list[str], Field(default_factory=list, description='shell commands before the run, such as "module load cuda"')
    ]
    slurm: Annotated[SlurmSection, Field(default_factory=lambda: parse_model(SlurmSection, {}))]


def load_profile(path: str | Path) -> Profile:
    """Read a cluster profile.

    Raises
    ------
    InputError
        For a missing or broken file, an unknown key, a wrong value, or a secret.
    """
    profile = parse_model(Profile, read_toml(Path(path), "a cluster profile, as in slurm/"))
    section = profile.slurm
    _check_extra(section.extra)
    _check_lines(section)
    _check_secrets(profile)
    if section.signal_seconds >= 60 * section.minutes:
        problem = f"is not shorter than the limit of {section.time}"
        raise InputError("slurm.signal_delay", problem, "ask for more time", value=section.signal_delay)
    return profile


def _check_extra(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        key = f"slurm.extra.{name}"
        if not _OPTION.fullmatch(name):
            raise InputError(key, "is no option of sbatch", "write the long name without --, such as mail-type")
        if name.startswith("slurm_"):  # as submitit calls it
            raise InputError(key, "is no option of sbatch", f"write {name.removeprefix('slurm_')}", value=value)
        if name.replace("_", "-") in _TAKEN:
            raise InputError(
                key, "is set by this package", f"use the keys of [slurm], or leave {name} out", value=value
            )
        # False would be written as --exclusive=False.
        if value is False or not isinstance(value, str | int):
            raise InputError(key, "is no option of sbatch", "give a string, a number or true", value=value)


def _check_lines(section: SlurmSection) -> None:
    """Refuse what would go on in the batch script's next line, as a command."""
    named = section.model_dump(exclude={"extra", "env", "srun_args"})
    values = {f"slurm.{key}": value for key, value in named.items()}
    values |= {f"slurm.extra.{key}": value for key, value in section.extra.items()}
    for key, value in values.items():
        if isinstance(value, str) and (not value.strip() or not value.isprintable()):
            raise InputError(key, "is empty or has a line break in it", "write it in one line", value=value)
    for name, value in section.env.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or "\0" in value:
            raise InputError(f"slurm.env.{name}", "is no environment variable", 'write NAME = "value"')


def _check_secrets(profile: Profile) -> None:
    section = profile.slurm
    texts = {"setup": profile.setup, "slurm.srun_args": section.srun_args}
    texts |= {f"slurm.extra.{key}": [value] for key, value in section.extra.items() if isinstance(value, str)}
    found = [f"slurm.env.{name}" for name in section.env if looks_secret(name)]
    for key, lines in texts.items():
        names = (match["name"] for line in lines for match in _ASSIGNMENT.finditer(line))
        found += [f"{key} ({name})" for name in names if looks_secret(name)]
    for key in found:
        # Without its value, which would go to a log.
        problem = "looks like a secret, and would be written into the batch script"
        raise InputError(key, problem, "leave it in the environment, which jobs inherit")
