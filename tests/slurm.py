"""The local Slurm cluster for tests: brought up once, and down again if it was not there before."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "slurm" / "localcluster"


def why_not() -> str | None:
    """Return why there can be no cluster on this machine, None if there can."""
    if os.geteuid() != 0:
        return "the local Slurm cluster needs root"
    programs = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
    missing = [name for name in programs if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} missing, and there is no apt-get"
    return None


@dataclass
class LocalCluster:
    """Slurm's commands on the local cluster."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str | Path, check: bool = True, **options) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def tool(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [SCRIPT, "--dir", self.folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    @contextmanager
    def setting(self, line: str) -> Iterator[None]:
        """Run with one more line in slurm.conf."""
        path = self.folder / "slurm.conf"
        before = path.read_text()
        try:
            path.write_text(f"{before}\n{line}\n")
            self.run("scontrol", "reconfigure")
            yield
        finally:
            path.write_text(before)
            self.run("scontrol", "reconfigure")

    def sbatch(self, script: str, *options: str, cwd: Path) -> str:
        said = self.run("sbatch", *options, input=f"#!/bin/bash\n{script}\n", cwd=cwd)
        return said.split()[-1]

    def state(self, job_id: str) -> str:
        said = self.run("scontrol", "show", "job", "-o", job_id)
        return said.partition("JobState=")[2].split()[0]

    def restarts(self, job_id: str) -> int:
        said = self.run("scontrol", "show", "job", "-o", job_id)
        return int(said.partition("Restarts=")[2].split()[0])

    def wait_for(self, what, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.run("squeue", "--all") + self.run("sinfo", "--all")
            time.sleep(0.2)

    def wait_for_state(self, job_id: str, *states: str, seconds: float = 120.0) -> None:
        self.wait_for(lambda: self.state(job_id) in states, seconds)

    def clear(self) -> None:
        """Cancel every job and wait until all nodes are free."""
        self.run("scancel", "--user", "root")
        self.wait_for(lambda: self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").split() == ["4"])

    def preempt(self, cwd: Path, seconds: int = 2) -> str:
        """Take all nodes for a moment, with the higher priority."""
        return self.sbatch(f"sleep {seconds}", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", cwd=cwd)
