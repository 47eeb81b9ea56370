"""Is this machine, and this cluster, fit for a run that must survive? Each finding says what to do about it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from distplateau.cluster import probe, queue
from distplateau.cluster.script import parameters
from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distplateau.cluster.profile import Profile

_LEAST_FREE = 10 * 2**30
_REACH_SECONDS = 2.0
_MOST_SKEW = 1.0
_LEAST_GRACE = 30
_PROBE_MINUTES = 5
_PROBE_WAIT_S = 900


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Parameters
    ----------
    name
        What was looked at.
    good
        True, False, or None where it does not matter here.
    text
        What was found.
    fix
        What to do, if it is not good.
    """

    name: str
    good: bool | None
    text: str
    fix: str = ""


def examine(runs: Path, profile: Profile | None) -> Iterator[Finding]:
    """Look at this machine, and with a profile at its cluster, in a short job on it.

    Parameters
    ----------
    runs
        Folder that will hold the runs.
    """
    yield from _software()
    yield _disk(runs)
    yield _wandb()
    if profile is None:
        return
    tools = list(_slurm_tools())
    yield from tools
    if tools[0].good:
        yield from _slurm_settings(profile)
        yield from _allocation(runs, profile)


def _software() -> Iterator[Finding]:
    import accelerate
    import torch

    import distplateau

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, accelerate {accelerate.__version__}"
    yield Finding("software", True, f"distplateau {distplateau.__version__}, {versions}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
        yield Finding("devices", True, f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}, NCCL {nccl}")
    else:
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Finding("devices", None, f"no GPU on this machine ({built})")


def _disk(runs: Path) -> Finding:
    folder = next(path for path in [runs.absolute(), *runs.absolute().parents] if path.exists())
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:,.1f} GiB free below {folder}"
    return Finding("disk", free >= _LEAST_FREE, text, "free space, or set run.dir to another disk")


def _wandb() -> Finding:
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=_REACH_SECONDS):
            return Finding("wandb", True, f"{url} answers")
    except OSError as error:
        fix = 'tracking.wandb = "offline" needs no network'
        return Finding("wandb", None, f"{url} does not answer from here ({error}); {fix}")


def _slurm_tools() -> Iterator[Finding]:
    missing = [tool for tool in ("sbatch", "scontrol") if shutil.which(tool) is None]
    fix = "run this on a login node, or put Slurm's bin folder into PATH"
    yield Finding("Slurm", not missing, f"{', '.join(missing)} missing" if missing else _version(), fix)
    if not missing and shutil.which("sacct") is None:
        text = "there is no sacct: the state of old jobs comes from the ledger alone"
        yield Finding("accounting", None, text)


def _version() -> str:
    return (queue.ask(["sbatch", "--version"]) or "").strip() or "sbatch says nothing"


def _slurm_settings(profile: Profile) -> Iterator[Finding]:
    """Look for settings that would lose work."""
    config = _pairs(queue.ask(["scontrol", "show", "config"]) or "")
    if not config:
        yield Finding("controller", False, "scontrol show config gives no answer", "is slurmctld up? try sinfo")
        return
    requeue = config.get("JobRequeue", "1") == "1"
    yield Finding("requeue", requeue or None, f"JobRequeue = {config.get('JobRequeue')}; jobs ask for it themselves")
    wanted = profile.slurm.partition.split(",") if profile.slurm.partition else [None]
    for name in wanted:
        yield _preemption(name, config)
    kill_wait = int(re.sub(r"\D", "", config.get("KillWait", "30")) or 0)
    delay = profile.slurm.signal_seconds
    text = f"signal {delay} s before the limit, KillWait = {kill_wait} s"
    yield Finding("time limit", delay >= _LEAST_GRACE, text, f'set slurm.signal_delay to "{_LEAST_GRACE}s" or more')


def _preemption(name: str | None, config: dict[str, str]) -> Finding:
    """Look at one partition, the default one for None."""
    found = queue.ask(["scontrol", "show", "partition", "--oneliner", *([name] if name else [])])
    partition = _pairs(found or "")
    if not partition or (name is None and partition.get("Default") != "YES"):
        text = f"there is no partition {name}" if name else "there is no default partition"
        return Finding("partition", False, text, "set slurm.partition to one that `sinfo -s` shows")
    name = partition["PartitionName"]
    mode = partition.get("PreemptMode") or config.get("PreemptMode", "OFF")
    if mode.startswith("OFF"):
        return Finding("preemption", True, f"{name} is not preempted")
    if "SUSPEND" in mode:
        text = f"{name}: PreemptMode = {mode} halts ranks in the middle of a step; the other ranks then time out"
        return Finding("preemption", False, text, "ask for PreemptMode=REQUEUE, or use another partition")
    if "CANCEL" in mode:
        text = f"{name}: PreemptMode = {mode} ends a job for good that has not left within the grace time"
        return Finding("preemption", False, text, "ask for PreemptMode=REQUEUE, or use another partition")
    grace = partition.get("GraceTime", "0")
    text = f"{name}: PreemptMode = {mode}, {grace} s of grace"
    fix = f'below {_LEAST_GRACE} s a large checkpoint is not whole in time: set checkpoint.every = "10 min"'
    enough = grace == "UNLIMITED" or int(re.sub(r"\D", "", grace) or 0) >= _LEAST_GRACE
    return Finding("preemption", enough, text, fix)


def _allocation(runs: Path, profile: Profile) -> Iterator[Finding]:
    """Run the probe in an allocation of the profile's size and read what it found."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=runs.absolute()))
    except OSError as error:
        fix = "name a folder that you may write to: --runs DIR"
        yield Finding("allocation", False, f"{runs} cannot be written ({error.strerror})", fix)
        return
    try:
        begin = time.monotonic()
        problem = _run_probe(folder, profile)
        path = folder / "findings.json"
        if not path.exists():
            fix = f"look into {folder} for what the ranks say"
            yield Finding("allocation", False, problem or "the job left no findings", fix)
            return
        text = f"{profile.slurm.nodes} nodes x {profile.slurm.tasks_per_node}, after {time.monotonic() - begin:.0f} s"
        yield Finding("allocation", True, text)
        yield from judge(json.loads(path.read_text(encoding="utf-8")))
        shutil.rmtree(folder, ignore_errors=True)
    except InputError as error:
        shutil.rmtree(folder, ignore_errors=True)
        yield Finding("allocation", False, error.problem, error.fix)


def judge(found: dict[str, Any]) -> Iterator[Finding]:
    """Say of the probe's findings what is good."""
    ranks = found["ranks"]
    nodes = sorted({rank["node"] for rank in ranks})
    blind = sorted({rank["node"] for rank in ranks if not rank["token"]})
    text = f"not seen by {', '.join(blind)}" if blind else f"seen by {', '.join(nodes)}"
    yield Finding("shared folder", not blind, text, "put run.dir on a file system that all nodes mount")
    devices = sorted({rank["device"] for rank in ranks})
    yield Finding("ranks", len(devices) == 1, f"{len(ranks)} on {', '.join(devices)}", "ask for nodes of one kind")
    versions = {json.dumps({**rank["versions"], "nccl": rank.get("nccl")}, sort_keys=True) for rank in ranks}
    yield Finding("versions", len(versions) == 1, " | ".join(sorted(versions)), "use one environment on all nodes")
    clocks = [rank["clock"] for rank in ranks]
    skew = max(clocks) - min(clocks)
    yield Finding("clocks", skew <= _MOST_SKEW, f"at most {skew:.3f} s apart", "ask for NTP on the nodes")
    if len(ranks) > 1:
        text = f"{1e3 * found['latency']:.2f} ms for 4 bytes, {found['bandwidth'] / 1e9:.2f} GB/s at 25 MiB"
        yield Finding("all-reduce", True, text)
    same = len(set(found["lrs"])) == 1
    text = f"all {len(ranks)} ranks come to {found['lrs'][0]:g}" if same else f"they come to {found['lrs']}"
    yield Finding("learning rate", same, text, "this is a fault of distplateau: please tell us")


def _run_probe(folder: Path, profile: Profile) -> str | None:
    """Submit the probe and wait for it; return what went wrong."""
    import submitit
    from submitit.core.utils import FailedJobError

    minutes = min(profile.slurm.minutes, _PROBE_MINUTES)
    try:
        executor = submitit.SlurmExecutor(folder)
        executor.update_parameters(
            **{**parameters("distplateau-doctor", profile), "time": minutes, "signal_delay_s": 1}
        )
        job_id = executor.submit(probe.run, str(folder)).job_id
    except (FailedJobError, subprocess.CalledProcessError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())
        raise InputError("sbatch", f"refused the job ({said})", "mend the cluster profile") from None
    ended = False
    try:
        ended = _wait(lambda: _is_over(job_id, folder))
    finally:
        if not ended:  # Ctrl-C among the reasons
            queue.cancel(job_id)
    if not ended:
        return f"job {job_id} did not end within {_PROBE_WAIT_S // 60} minutes"
    return f"job {job_id} failed"


def _is_over(job_id: str, folder: Path) -> bool:
    """Return whether the job has left; where nobody can be asked, whether its findings are there."""
    state = queue.job_state(job_id)
    return (folder / "findings.json").exists() if state is None else state.has_ended


def _wait(is_over: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PROBE_WAIT_S
    while time.monotonic() < deadline:
        if is_over():
            return True
        time.sleep(1)
    return False


def _pairs(text: str) -> dict[str, str]:
    """Read ``Key = value`` lines, or ``Key=value`` words of the first line that is the default partition's."""
    lines = text.splitlines()
    if lines and " = " not in text:
        chosen = next((line for line in lines if "Default=YES" in line), lines[0])
        return dict(re.findall(r"(\w+)=(\S*)", chosen))
    return {key.strip(): value.strip() for key, _, value in (line.partition(" = ") for line in lines) if value}
