"""Runs on a real Slurm cluster: submitted, interrupted in every way, and the same as if left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distplateau.record.ledger import read_ledger

ROOT = Path(__file__).parent.parent
KEYS = ("validation", "step", "value", "decision", "lr_before", "lr_after", "best", "num_bad")
# Fashion-MNIST from Debian's package, the digits of scikit-learn where there is none.
HAS_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist").is_dir()
DATA, BATCH, PIXELS = ("fashion-mnist", 1024, 784) if HAS_FASHION_MNIST else ("digits", 32, 64)
# On the cluster a run takes a third of a minute, so that there is time to disturb it.
CONFIG = f"""
[run]
name = "run"
[data]
name = "{DATA}"
global_batch_size = {BATCH}
eval_batch_size = 500
validation_size = 400
[model.args]
hidden = [64]
dropout = 0.2
[schedule]
patience = 1
factor = 0.5
threshold = 0.02
[training]
epochs = {{epochs}}
[checkpoint]
every = "10 steps"
[tracking]
wandb = "disabled"
"""
PROFILE = """
[slurm]
nodes = {nodes}
tasks_per_node = 2
cpus_per_task = 1
partition = "{partition}"
time = "{time}"
signal_delay = "{delay}"
max_requeues = {max_requeues}
[slurm.extra]
exclusive = true
[slurm.env]
ACCELERATE_USE_CPU = "true"
GLOO_SOCKET_IFNAME = "lo"
{env}
"""
DEFAULTS = {
    "nodes": 2, "partition": "low", "time": "00:10:00", "delay": "20s", "max_requeues": 5, "env": "",
}  # fmt: skip
EPOCHS, LONG, SWEEP_EPOCHS = 30, 100, 4


class Runs:
    """Submits from a folder whose name has a space and a quote in it."""

    def __init__(self, cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder / "it's mine"
        self.folder.mkdir()

    def submit(self, name: str, *options: str, epochs: int = EPOCHS, **profile) -> str:
        (self.folder / "run.toml").write_text(CONFIG.format(epochs=epochs))
        (self.folder / "profile.toml").write_text(PROFILE.format(**{**DEFAULTS, **profile}))
        command = [sys.executable, "-m", "distplateau", "submit", "run.toml", "--cluster", "profile.toml",
                   "--run.name", name, *options]  # fmt: skip
        said = self.cluster.run(*command, cwd=self.folder)
        return said.split()[1]

    def events(self, name: str) -> list[dict]:
        path = self.folder / "runs" / name / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_validation(self, name: str, number: int) -> None:
        def is_there():
            return any(e["event"] == "validation" and e["validation"] >= number for e in self.events(name))

        self.cluster.wait_for(is_there)

    def trace(self, name: str) -> list[list]:
        return [[event[key] for key in KEYS] for event in read_ledger(self.folder / "runs" / name).validations]

    def finish(self, name: str, job: str, seconds: float = 200.0) -> list[str]:
        """Wait for the end, return the events that are no validations."""
        self.cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=seconds)
        assert self.cluster.state(job) == "COMPLETED", self.logs(name)
        return [event["event"] for event in self.events(name) if event["event"] != "validation"]

    def logs(self, name: str) -> str:
        paths = sorted((self.folder / "runs" / name / "logs").glob("*_log.*"))
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in paths)


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    return Runs(cluster, tmp_path_factory.mktemp("submitted"))


@pytest.fixture(scope="module")
def whole(runs):
    """The run that is left alone."""
    assert runs.finish("whole", runs.submit("whole")) == ["start", "finished"]
    return runs.trace("whole")


def assert_survived(runs, whole, name, job, *, ranks=4, epochs=EPOCHS, seconds=200.0):
    events = runs.finish(name, job, seconds)
    assert events[0] == "start" and events[-1] == "finished"
    assert "resumed" in events, events
    assert runs.trace(name) == whole
    assert len(whole) == epochs
    history = read_ledger(runs.folder / "runs" / name)
    resumed = [event for event in history.events if event["event"] == "resumed"]
    # A stretch that is interrupted while it starts leaves no word in the ledger.
    # The last signal may come when all is done but the report, which the job comes back for.
    assert len(resumed) <= resumed[-1]["restart_count"] <= runs.cluster.restarts(job)
    assert resumed[-1]["slurm_job_id"] == job
    assert {event["ranks"] for event in history.validations} == {ranks}


def test_preempted_with_grace_it_ends_as_if_nothing_had_been(runs, whole):
    job = runs.submit("preempted")
    runs.wait_for_validation("preempted", 5)
    runs.cluster.preempt(runs.folder)
    assert_survived(runs, whole, "preempted", job)
    [stop] = [event for event in runs.events("preempted") if event["event"] == "interrupted"]
    assert stop["reason"] == "SIGTERM"
    [back] = [event for event in runs.events("preempted") if event["event"] == "resumed"]
    assert back["step"] == stop["step"]  # nothing was done twice
    assert "queued again (1 of 5)" in runs.logs("preempted")


@pytest.mark.cluster
class TestSurvives:
    """Every other way to lose a job."""

    def test_preemption_without_grace(self, runs, whole):
        job = runs.submit("abrupt", partition="abrupt")
        runs.wait_for_validation("abrupt", 5)
        runs.cluster.preempt(runs.folder)
        assert_survived(runs, whole, "abrupt", job)

    @pytest.mark.parametrize("partition", ["low", "abrupt"])
    def test_preemption_with_the_users_signal(self, runs, whole, partition):
        """It comes at once, and SIGTERM only after the grace time; without grace Slurm does not heed the setting."""
        old = int(runs.cluster.run("scontrol", "--version").split()[1].split(".")[0]) < 23
        send = "SlurmctldParameters=preempt_send_user_signal" if old else "PreemptParameters=send_user_signal"
        name = f"told-{partition}"
        with runs.cluster.setting(send):
            job = runs.submit(name, partition=partition)
            runs.wait_for_validation(name, 5)
            runs.cluster.preempt(runs.folder)
            assert_survived(runs, whole, name, job)
        stops = [event["reason"] for event in runs.events(name) if event["event"] == "interrupted"]
        assert stops == ["SIGUSR2"] if partition == "low" else set(stops) <= {"SIGTERM"}

    def test_the_time_limit(self, runs):
        """A run of several minutes' worth of limits; the signal comes half a minute before each."""
        job = runs.submit("long", epochs=LONG)
        assert runs.finish("long", job) == ["start", "finished"]
        # On a machine that does other things as well a stretch does not come far.
        job = runs.submit("limited", epochs=LONG, time="00:01:00", delay="25s", max_requeues=15)
        assert_survived(runs, runs.trace("long"), "limited", job, epochs=LONG, seconds=500.0)
        stops = [event["reason"] for event in runs.events("limited") if event["event"] == "interrupted"]
        assert stops and set(stops) == {"SIGUSR2"}

    def test_a_requeue_by_hand(self, runs, whole):
        job = runs.submit("requeued")
        runs.wait_for_validation("requeued", 5)
        runs.cluster.run("scontrol", "requeue", job)
        assert_survived(runs, whole, "requeued", job)

    def test_a_node_that_dies(self, runs, whole):
        job = runs.submit("bereft")
        runs.wait_for_validation("bereft", 5)
        listed = runs.cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
        nodes = runs.cluster.run("scontrol", "show", "hostnames", listed)
        node = nodes.split()[-1]
        assert runs.cluster.tool("kill-node", node).returncode == 0
        try:
            assert_survived(runs, whole, "bereft", job)
        finally:
            runs.cluster.tool("start-node", node)

    def test_a_rank_that_dies(self, runs, whole):
        job = runs.submit("wounded")
        runs.wait_for_validation("wounded", 5)
        _kill_a_rank(runs.folder / "runs" / "wounded")
        assert_survived(runs, whole, "wounded", job)

    def test_fewer_nodes_than_before(self, runs):
        """Two of the four nodes are taken when it comes back."""
        job = runs.submit("shrunk", nodes='"2-4"')
        runs.wait_for_validation("shrunk", 5)
        high = runs.cluster.sbatch("sleep 1000", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", cwd=runs.folder)
        events = runs.finish("shrunk", job)
        runs.cluster.run("scancel", high)
        assert "resumed" in events
        ranks = [event["ranks"] for event in read_ledger(runs.folder / "runs/shrunk").validations]
        assert ranks[0] == 8 and ranks[-1] == 4 and len(ranks) == EPOCHS


@pytest.mark.cluster
class TestGivesUp:
    def test_a_job_that_is_cancelled_stays_away(self, runs):
        job = runs.submit("cancelled")
        runs.wait_for_validation("cancelled", 3)
        runs.cluster.run("scancel", job)
        runs.cluster.wait_for_state(job, "CANCELLED")
        time.sleep(8)
        assert runs.cluster.state(job) == "CANCELLED"
        assert runs.cluster.restarts(job) == 0

    def test_requeues_are_capped(self, runs):
        job = runs.submit("capped", max_requeues=0)
        runs.wait_for_validation("capped", 3)
        runs.cluster.preempt(runs.folder)
        runs.cluster.wait_for_state(job, "FAILED", "COMPLETED", "PREEMPTED")
        assert "it came back 0 times already (slurm.max_requeues = 0)" in runs.logs("capped")

    def test_the_same_error_twice_is_the_end(self, runs):
        (runs.folder / "bad_model.py").write_text(
            "import torch\n\nclass Bad(torch.nn.Linear):\n"
            "    def forward(self, x):\n"
            "        if self.training and torch.distributed.is_initialized():\n"
            "            raise RuntimeError('broken on purpose')\n"
            "        return super().forward(x.flatten(1))\n\n\n"
            f"def build(num_classes=10, **_):\n    return Bad({PIXELS}, num_classes)\n"
        )
        job = runs.submit("broken", "--model.name", "bad_model:build", "--model.args", "{}")
        runs.cluster.wait_for_state(job, "FAILED", seconds=180)
        assert runs.cluster.restarts(job) == 1
        assert "it failed 2 times in a row with code 1 after its start" in runs.logs("broken")
        assert "broken on purpose" in runs.logs("broken")


@pytest.mark.cluster
def test_a_sweep_is_an_array_with_a_folder_for_each_run(runs):
    job = runs.submit("sweep", "--grid", "schedule.patience=0,1,3", "--grid", "schedule.factor=0.1,0.5",
                      "--training.epochs", str(SWEEP_EPOCHS), nodes=1)  # fmt: skip
    folders = sorted(path.name for path in (runs.folder / "runs" / "sweep").iterdir() if "=" in path.name)
    assert folders == [f"patience={p},factor={f}" for p in (0, 1, 3) for f in (0.1, 0.5)]
    assert job.endswith("_0")
    task = job.removesuffix("0") + "3"
    runs.wait_for_validation(f"sweep/{folders[3]}", 1)
    runs.cluster.run("scontrol", "requeue", task)
    runs.cluster.wait_for(lambda: all(_is_done(runs.folder / "runs/sweep" / name) for name in folders), 240)
    restarts = [runs.cluster.restarts(f"{job.removesuffix('0')}{number}") for number in range(6)]
    assert restarts == [0, 0, 0, 1, 0, 0]  # a task of its own
    assert len(runs.trace(f"sweep/{folders[3]}")) == SWEEP_EPOCHS


@pytest.mark.cluster
def test_nobody_finds_a_key_and_nobody_writes_into_a_run(runs, monkeypatch):
    """Submitted by a shell without any umask, with a key in its environment."""
    marker = "c0ffee" * 7
    monkeypatch.setenv("WANDB_API_KEY", marker)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host")  # of another job
    monkeypatch.setenv("MASTER_PORT", "1")
    before = os.umask(0)
    try:
        job = runs.submit("closed", epochs=10)
    finally:
        os.umask(before)
    for key in ("WANDB_API_KEY", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key)
    runs.wait_for_validation("closed", 1)
    commands = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    said = runs.cluster.run("scontrol", "show", "job", "--details", job)
    script = runs.cluster.run("scontrol", "write", "batch_script", job, "-")
    for text in (commands, said, script):
        assert str(runs.folder.parent) in text and marker not in text
    assert runs.finish("closed", job) == ["start", "finished"]
    paths = list((runs.folder / "runs" / "closed").rglob("*"))
    assert len([path for path in paths if path.suffix == ".pkl"]) >= 4
    assert not [path for path in paths if path.is_file() and marker.encode() in path.read_bytes()]
    assert not [path for path in paths if path.lstat().st_mode & 0o002 and not path.is_symlink()]


@pytest.mark.cluster
def test_the_recipe_with_accelerate_launch_survives_a_preemption(runs, whole):
    """slurm/train.sbatch as it stands, with options for a cluster without GPUs."""
    launch = (ROOT / "launch" / "many_nodes.yaml").read_text()
    (runs.folder / "many_nodes.yaml").write_text(launch.replace("use_cpu: false", "use_cpu: true"))
    (runs.folder / "run.toml").write_text(CONFIG.format(epochs=EPOCHS))
    exports = {"PYTHON": sys.executable, "LAUNCH_CONFIG": "many_nodes.yaml", "RANKS_PER_NODE": "2",
               "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # fmt: skip
    options = [
        "--gpus-per-node=0",
        "--cpus-per-task=2",
        "--time=10",
        "--signal=B:USR2@30",
        "--exclusive",
        "-o",
        "out.txt",
    ]
    command = ["sbatch", *options, ROOT / "slurm" / "train.sbatch", "run.toml", "--run.name", "recipe"]
    said = subprocess.run(command, cwd=runs.folder, env={**runs.cluster.env, **exports}, capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    job = said.split()[-1]
    runs.wait_for_validation("recipe", 5)
    runs.cluster.preempt(runs.folder)
    assert_survived(runs, whole, "recipe", job)
    assert "queued again (1 of 20)" in (runs.folder / "out.txt").read_text()


@pytest.mark.cluster
def test_the_doctor_looks_into_the_allocation(runs):
    (runs.folder / "profile.toml").write_text(PROFILE.format(**{**DEFAULTS, "partition": "high"}))
    command = [sys.executable, "-m", "distplateau", "doctor", "--cluster", "profile.toml"]
    done = subprocess.run(command, cwd=runs.folder, env=runs.cluster.env, capture_output=True, text=True, check=False)
    found = {line[6:22].strip(): (line[:4].strip(), line[22:]) for line in done.stdout.splitlines()}
    for name in ("Slurm", "allocation", "shared folder", "ranks", "versions", "clocks", "all-reduce", "learning rate"):
        assert found[name][0] == "good", done.stdout
    assert found["preemption"] == ("good", "high is not preempted")
    assert found["learning rate"][1] == "all 4 ranks come to 0.25"
    assert not list((runs.folder / "runs").glob(".doctor-*"))
    (runs.folder / "profile.toml").write_text(PROFILE.format(**{**DEFAULTS, "partition": "nowhere"}))
    done = subprocess.run(command, cwd=runs.folder, env=runs.cluster.env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BAD   allocation" in done.stdout and "invalid partition" in done.stdout


@pytest.mark.cluster
def test_the_code_is_that_of_the_submission(runs):
    """What is edited after the submission is not what a job runs that was waiting."""
    module = runs.folder / "my_model.py"
    module.write_text(
        "import torch\n\ndef build(num_classes=10, **_):\n"
        f"    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear({PIXELS}, num_classes))\n"
    )
    high = runs.cluster.sbatch("sleep 100", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", cwd=runs.folder)
    runs.cluster.wait_for_state(high, "RUNNING")
    job = runs.submit("frozen", "--model.name", "my_model:build", "--model.args", "{}", epochs=2)
    module.write_text("raise SystemExit('edited')\n")
    runs.cluster.run("scancel", high)
    assert runs.finish("frozen", job) == ["start", "finished"]


def _is_done(run_dir: Path) -> bool:
    try:
        return read_ledger(run_dir).finished is not None
    except ValueError:
        return False


def _kill_a_rank(run_dir: Path) -> None:
    """SIGKILL to one process of submitit's that trains that run."""
    said = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout
    ranks = [line.split()[0] for line in said.splitlines()
             if "submitit.core._submit" in line and str(run_dir) in line and "srun" not in line]  # fmt: skip
    assert len(ranks) == 4
    subprocess.run(["kill", "-9", ranks[2]], check=True)
