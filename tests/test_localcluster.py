"""The local Slurm cluster itself, and what Slurm does that the package has to reckon with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slurm import SCRIPT

pytestmark = pytest.mark.cluster


def test_it_is_a_cluster(cluster, tmp_path):
    assert cluster.run("sinfo", "-h", "-p", "low", "-o", "%D").split() == ["4"]
    job = cluster.sbatch('srun bash -c \'echo "$SLURM_PROCID on $SLURMD_NODENAME"\'', "-N2", "--ntasks-per-node=2",
                         "-o", "out.txt", cwd=tmp_path)  # fmt: skip
    cluster.wait_for_state(job, "COMPLETED")
    lines = sorted(line.split(" on ") for line in (tmp_path / "out.txt").read_text().splitlines())
    assert [rank for rank, _ in lines] == ["0", "1", "2", "3"]
    assert lines[0][1] == lines[1][1] != lines[2][1] == lines[3][1]
    cluster.wait_for(lambda: "COMPLETED" in cluster.run("sacct", "-n", "-j", job, "-o", "State"))


def test_up_again_is_nothing_new(cluster):
    before = (cluster.folder / "slurm.conf").read_text()
    done = cluster.tool("up")
    assert done.returncode == 0
    assert f"SLURM_CONF={cluster.folder}/slurm.conf" in done.stdout
    assert (cluster.folder / "slurm.conf").read_text() == before
    assert "abrupt" in cluster.tool("status").stdout


@pytest.mark.parametrize(
    ("reaction", "state"), [("exit 0", "COMPLETED"), ("exit 75", "FAILED"), ("sleep 60", "PENDING")]
)
def test_what_slurm_does_with_a_job_that_is_preempted(cluster, tmp_path, reaction, state):
    """One that leaves on the signal never comes back by itself: the reason for distplateau.cluster.requeue."""
    script = f"srun --exclusive bash -c 'trap \"touch got; {reaction}\" TERM; touch up; while :; do sleep 0.1; done'"
    job = cluster.sbatch(script, "-N2", "-o", "/dev/null", cwd=tmp_path)
    cluster.wait_for((tmp_path / "up").exists)
    high = cluster.preempt(tmp_path)
    cluster.wait_for_state(job, state, "FAILED", "PENDING", seconds=60)
    assert (tmp_path / "got").exists()
    assert cluster.state(job) == state
    cluster.run("scancel", job)
    cluster.wait_for_state(high, "COMPLETED")


def test_mistakes_are_one_line(tmp_path):
    def refused(*arguments):
        done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.returncode, done.stderr

    code, line = refused("--dir", str(tmp_path / "none"), "status")
    assert code == 2 and "there is no cluster; start it with" in line
    (tmp_path / "file").write_text("")
    code, line = refused("--dir", str(tmp_path / "file" / "below"), "up")
    assert code == 2 and "cannot be written" in line


def test_down_leaves_nothing(tmp_path, cluster):
    """A second cluster beside the first: both live, and one goes without the other."""
    from slurm import LocalCluster

    second = LocalCluster(tmp_path / "second")
    assert second.tool("up").returncode == 0
    job = second.sbatch("sleep 600", "-N1", cwd=tmp_path)
    second.wait_for_state(job, "RUNNING")
    assert second.tool("down").returncode == 0
    assert not second.folder.exists()
    said = subprocess.run(["ps", "-wweo", "stat,args"], capture_output=True, text=True, check=True).stdout
    left = [line for line in said.splitlines() if str(second.folder) in line and not line.startswith("Z")]
    assert left == []
    assert cluster.run("sinfo", "-h", "-p", "low", "-o", "%D").split() == ["4"]
