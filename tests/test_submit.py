"""Submission without a cluster: profiles, grids, frozen code, the batch script, and who comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distplateau.cluster import jobs, queue, requeue
from distplateau.cluster.freeze import freeze
from distplateau.cluster.job import rank_environment
from distplateau.cluster.profile import load_profile
from distplateau.cluster.queue import JobState
from distplateau.cluster.requeue import Failure, verdict
from distplateau.cluster.script import run_parameters
from distplateau.cluster.submit import expand_grid
from distplateau.config import load_config, parse_config
from distplateau.errors import InputError
from distplateau.record.ledger import Ledger

ROOT = Path(__file__).parent.parent
SMALL = ["--model.args", "{hidden = [8]}", "--training.epochs", "1", "--tracking.wandb", "disabled"]


def profile_of(tmp_path, text):
    path = tmp_path / "profile.toml"
    path.write_text(text)
    return load_profile(path)


def distplateau(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "distplateau", *map(str, arguments)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=200)


# Profiles.


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.toml")), ids=lambda path: path.name)
def test_the_profiles_of_the_repository_are_valid(path):
    assert load_profile(path).slurm.tasks_per_node >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[slurm]\nnode = 2", "slurm.node = 2: unknown key; did you mean 'nodes'?"),
        ("[slurm]\nnodes = 0", 'slurm.nodes = 0: .*expected: 2, or "2-4"'),
        ('[slurm]\nnodes = "4-2"', "slurm.nodes = '4-2': write 2, or \"2-4\""),
        ('[slurm]\ntime = "two hours"', "slurm.time = 'two hours': write \"HH:MM:SS\""),
        ('[slurm]\nsignal_delay = "1 min"', "slurm.signal_delay = '1 min': write \"90s\""),
        ('[slurm]\ntime = "00:01:00"', "slurm.signal_delay = '90s': is not shorter than the limit of 00:01:00"),
        ("[slurm.extra]\nnodes = 3", "slurm.extra.nodes = 3: is set by this package"),
        ("[slurm.extra]\ngpus_per_node = 3", "slurm.extra.gpus_per_node = 3: is set by this package"),
        ("[slurm.extra]\ncomment = [1]", "slurm.extra.comment"),
        ('[slurm.env]\nWANDB_API_KEY = "secret-value"', "slurm.env.WANDB_API_KEY: looks like a secret"),
        ("setup = 3", "setup = 3: "),
        ("[slurm", "is not valid TOML"),
        ("[cluster]\na = 1", "cluster = .*unknown key; .*valid: setup, slurm"),
    ],
)
def test_a_wrong_profile_is_one_line_with_the_fix(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        profile_of(tmp_path, text)
    assert "\n" not in str(error.value)
    assert "secret-value" not in str(error.value)


def test_a_missing_profile_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.toml: there is no such file; give the path of a cluster profile"):
        load_profile(tmp_path / "none.toml")


@pytest.mark.parametrize(("time", "minutes"), [("00:20:00", 20), ("01:00", 60), ("2-01:00:01", 2941), ("00:00:59", 1)])
def test_times(tmp_path, time, minutes):
    assert profile_of(tmp_path, f'[slurm]\ntime = "{time}"\nsignal_delay = "10s"').slurm.minutes == minutes


# The batch script.


def script_of(tmp_path, text, run_dirs=None):
    from submitit.slurm.slurm import _make_sbatch_string

    run_dirs = run_dirs or [tmp_path / "a run"]
    return _make_sbatch_string(
        command="true", folder=tmp_path, **run_parameters("n", profile_of(tmp_path, text), run_dirs)
    )


def test_everything_of_the_profile_is_in_the_script(tmp_path):
    script = script_of(tmp_path, """
        setup = ["module load cuda"]
        [slurm]
        nodes = 3
        tasks_per_node = 8
        gpus_per_node = 8
        cpus_per_task = 4
        partition = "p"
        account = "a"
        qos = "q"
        constraint = "c"
        mem = "64G"
        gres = "g:1"
        exclude = "n7"
        reservation = "r"
        time = "1-00:00:00"
        signal_delay = "120s"
        srun_args = ["--container-image=x y"]
        [slurm.extra]
        mail-type = "END"
        [slurm.env]
        SOME = "it's"
        """)  # fmt: skip
    for option in ("nodes=3", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=4", "partition=p", "account=a",
                   "qos=q", "constraint=c", "mem=64G", "gres=g:1", "exclude=n7", "reservation=r", "time=1440",
                   "signal=USR2@120", "mail-type=END", "open-mode=append"):  # fmt: skip
        assert f"#SBATCH --{option}\n" in script, option
    assert "#SBATCH --requeue\n" in script
    assert "wckey" not in script
    assert "module load cuda\nexport SOME='it'\"'\"'s'\n" in script
    assert "--wait=30 '--container-image=x y' true" in script


def test_of_a_range_of_nodes_only_srun_knows_the_ranks(tmp_path):
    """Or Slurm would want as many tasks, and so nodes, at each requeue as it gave at the first start."""
    script = script_of(tmp_path, '[slurm]\nnodes = "2-4"\ntasks_per_node = 8\ncpus_per_task = 4')
    assert "#SBATCH --nodes=2-4\n#SBATCH" in script
    assert "#SBATCH --mincpus=32\n" in script
    assert "#SBATCH --ntasks" not in script and "#SBATCH --cpus-per-task" not in script
    assert "--wait=30 --ntasks-per-node=8 --cpus-per-task=4 true" in script
    assert "export SRUN_CPUS_PER_TASK=4 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}\n" in script


def test_an_array_task_finds_its_own_folder(tmp_path):
    """The shell's line, run by a shell."""
    folders = [tmp_path / "it's one", tmp_path / "two"]
    script = script_of(tmp_path, "[slurm]", folders)
    [line] = [line for line in script.splitlines() if "cluster.requeue" in line]
    shown = line.replace(f"{sys.executable} -m distplateau.cluster.requeue", "printf '%s|'").replace("$code", "7")
    for task, folder in enumerate(folders):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
        said = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True, env=env).stdout
        assert said == f"{folder}|7|20|"


# Grids.


def test_a_grid_names_its_points():
    points = dict(expand_grid({"schedule.patience": ["3", "5"], "schedule.factor": ["0.1"]}))
    assert points == {
        "patience=3,factor=0.1": {"schedule.patience": "3", "schedule.factor": "0.1"},
        "patience=5,factor=0.1": {"schedule.patience": "5", "schedule.factor": "0.1"},
    }
    assert [name for name, _ in expand_grid({"data.name": ["a/b"], "model.name": ["mlp"]})] == [
        "data.name=a_b,model.name=mlp"
    ]


@pytest.mark.parametrize("text", ["patience=3", "schedule.patience", "schedule.patience=", "schedule.patience=1,,2"])
def test_a_wrong_grid_is_refused(tmp_path, text):
    done = distplateau("submit", ROOT / "launch/demo.toml", "--cluster", "local", "--grid", text, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"--grid = {text!r}: is no key with values; write --grid section.key=a,b,c" in line


# What is frozen.


def test_code_settings_and_git_state_are_frozen(tmp_path, monkeypatch):
    source = tmp_path / "mine"
    source.mkdir()
    monkeypatch.chdir(source)
    git = ["git", "-c", "user.email=a@b", "-c", "user.name=c"]
    (source / "model.py").write_text("x = 1\n")
    (source / "ignored.txt").write_text("secret\n")
    (source / ".gitignore").write_text("ignored.txt\nruns\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (source / "model.py").write_text("x = 2\n")
    (source / "new.py").write_text("y = 1\n")
    config = parse_config({"model": {"name": "model:build"}, "run": {"dir": "runs", "name": "r"}})
    path = freeze(config, config.run_dir.absolute(), source)
    frozen = path.parent
    assert (frozen / "code" / "model.py").read_text() == "x = 2\n"
    assert (frozen / "code" / "new.py").exists()
    assert not (frozen / "code" / "ignored.txt").exists()
    assert (frozen / "code" / "distplateau" / "cli.py").exists()
    assert "-x = 1\n+x = 2\n" in (frozen / "diff.patch").read_text()
    assert len((frozen / "commit.txt").read_text().strip()) == 40
    assert load_config(path).run_dir == source / "runs" / "r"
    assert load_config(path).data.root == str(source / "data")
    assert not any(folder.stat().st_mode & 0o002 for folder in [frozen, frozen / "code"])


def test_without_own_code_the_folder_is_not_copied(tmp_path):
    (tmp_path / "huge.py").write_text("x")
    config = parse_config({"run": {"dir": str(tmp_path / "runs")}})
    frozen = freeze(config, config.run_dir, tmp_path).parent
    assert [path.name for path in (frozen / "code").iterdir()] == ["distplateau"]


def test_a_folder_without_git_is_copied_without_byproducts(tmp_path):
    for name in ("a.py", "pkg/b.py", "runs/c.py", ".hidden/d.py", "__pycache__/e.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    config = parse_config({"model": {"name": "a:build"}, "run": {"dir": str(tmp_path / "runs")}})
    code = freeze(config, config.run_dir, tmp_path).parent / "code"
    copied = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert {name for name in copied if not name.startswith("distplateau/")} == {"a.py", "pkg/b.py"}


# Who comes back.


@pytest.mark.parametrize(
    ("code", "restarts", "interrupted", "times", "stays"),
    [
        (0, 0, False, 1, "it is done"),
        (2, 0, False, 1, "its input is wrong"),
        (75, 0, True, 1, None),
        (75, 4, True, 9, None),  # interruptions may be alike
        (1, 0, True, 3, None),  # accelerate's agent makes 1 of 75
        (1, 0, False, 1, None),
        (1, 0, False, 2, "it failed 2 times in a row with code 1 after step-00000010"),
        (137, 2, False, 1, None),
        (75, 5, True, 1, "it came back 5 times already"),
        (1, 5, False, 1, "it came back 5 times already"),
    ],
)
def test_verdict(code, restarts, interrupted, times, stays):
    failure = Failure(code, "step-00000010", times)
    said = verdict(code, restarts, 5, interrupted=interrupted, failure=failure)
    assert said is None if stays is None else said.startswith(stays)


def test_failures_are_counted_at_the_same_checkpoint(tmp_path):
    def count(code=1):
        return requeue.count_failure(tmp_path, code).times

    assert (count(), count()) == (1, 2)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert (count(), count(), count(137), count()) == (1, 2, 1, 1)
    (tmp_path / "submission" / "failures.json").write_text("{torn")
    assert count() == 1


def test_an_interruption_is_the_last_word_of_the_ledger(tmp_path):
    assert not requeue.was_interrupted(tmp_path)
    ledger = Ledger(tmp_path)
    ledger.append("start", run="r")
    assert not requeue.was_interrupted(tmp_path)
    ledger.append("interrupted", reason="SIGTERM", step=3, epoch=0.1)
    assert requeue.was_interrupted(tmp_path)


@pytest.mark.parametrize(
    ("state", "accounted", "wanted"),
    [
        (None, None, True),  # nobody to ask: the ranks say they were interrupted
        (JobState("RUNNING"), None, True),
        (JobState("TIMEOUT"), None, True),
        (JobState("CANCELLED"), None, False),
        (JobState("COMPLETING", reason="TimeLimit"), None, True),
        (JobState("COMPLETING", reason="None"), JobState("CANCELLED"), False),
        (JobState("COMPLETING", reason="None"), JobState("TIMEOUT"), True),
        (JobState("COMPLETING", reason="None"), None, False),
        (JobState("PREEMPTED"), None, False),
    ],
)
def test_a_cancelled_job_is_told_from_an_interrupted_one(monkeypatch, state, accounted, wanted):
    monkeypatch.setattr(queue, "job_state", lambda _: state)
    monkeypatch.setattr(queue, "_accounted", lambda _: accounted)
    assert queue.is_wanted("1") == wanted


def test_without_slurms_tools_there_is_an_answer(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert queue.job_state("1") is None
    assert queue.requeue("1") == "there is no scontrol here"


def test_what_slurm_says_is_read():
    line = "JobId=5 JobName=x JobState=PENDING Reason=BeginTime Requeue=1 Restarts=2 ExitCode=0:0 NodeList=(null)"
    assert queue._read_scontrol(line) == JobState("PENDING", "", "BeginTime", 2, None)
    assert queue._read_sacct("CANCELLED by 0|n[1-2]|75:0", 1) == JobState("CANCELLED", "n[1-2]", "", 1, 75)


# The ranks.


def test_a_head_node_that_does_not_resolve_is_an_error(monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for key, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NODELIST": "no-such-host[1-2]",
    }.items():
        monkeypatch.setenv(key, value)  # fmt: skip
    with pytest.raises(InputError, match="MASTER_ADDR = 'no-such-host1': the first node does not resolve from"):
        rank_environment({"MASTER_PORT": "1234"}, ["no-such-host1", "no-such-host2"], None)
    found = rank_environment({"MASTER_PORT": "1234", "MASTER_ADDR": "localhost"}, ["no-such-host1"], None)
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                     "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}  # fmt: skip
    with pytest.raises(InputError, match="MASTER_PORT: is not set"):
        rank_environment({"MASTER_ADDR": "localhost"}, ["n1"], None)


# The command.


def test_on_this_machine_it_runs_to_its_end(tmp_path):
    marker = "5e" * 20
    done = distplateau("submit", ROOT / "launch/demo.toml", "--cluster", "local", "--wait", "--run.name", "it's here",
                       *SMALL, cwd=tmp_path, WANDB_API_KEY=marker)  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    run_dir = tmp_path / "runs" / "it's here"
    assert done.stdout.split(maxsplit=2)[2].strip() == str(run_dir)
    assert (run_dir / "report.html").exists()
    # No key in pickles, scripts or logs.
    assert not [path for path in run_dir.rglob("*") if path.is_file() and marker.encode() in path.read_bytes()]
    table = distplateau("jobs", cwd=tmp_path).stdout.splitlines()
    assert table[0].split("\t") == list(jobs.COLUMNS)
    assert table[1].split("\t")[:3:2] == ["it's here", "finished"]
    followed = distplateau("jobs", "--follow", run_dir, cwd=tmp_path)
    assert followed.returncode == 0
    assert "epoch 1/1" in followed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule.patience", "-1"], "schedule.patience = -1"),
        (["--data.name", "image-folder", "--data.root", "nowhere"], "nowhere"),
        (["--data.global_batch_size", "2"], "data.global_batch_size = 2: is smaller than the 4 ranks of the profile"),
        (["--model.name", "no_such:model"], "model.name = 'no_such:model'"),
        (["--run.name", "x", "--grid", "run.name=a,b"], "run.name: cannot vary in a grid"),
    ],
)
def test_what_is_wrong_is_said_before_the_queue(tmp_path, arguments, message):
    """A stand-in for sbatch that must never be called."""
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("sbatch", "srun"):
        (fake / name).write_text("#!/bin/sh\ntouch called\n")
        (fake / name).chmod(0o755)
    (tmp_path / "p.toml").write_text("[slurm]\nnodes = 2\ntasks_per_node = 2\n")
    done = distplateau("submit", ROOT / "launch/demo.toml", "--cluster", "p.toml", *arguments, cwd=tmp_path,
                       PATH=f"{fake}:{os.environ['PATH']}")  # fmt: skip
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "called").exists()
    assert not list(tmp_path.glob("runs/*/submission"))


def test_without_sbatch_the_way_out_is_named(tmp_path):
    (tmp_path / "p.toml").write_text("")
    done = distplateau("submit", ROOT / "launch/demo.toml", "--cluster", "p.toml", cwd=tmp_path, PATH="/nowhere")
    assert done.returncode == 2
    assert "sbatch: is not on this machine; submit from a login node, or use --cluster local" in done.stderr


def test_jobs_of_a_folder_without_runs(tmp_path):
    assert jobs.overview(tmp_path) == []
    done = distplateau("jobs", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere: there is no such folder" in done.stderr
    done = distplateau("jobs", "--cancel", ".", cwd=tmp_path)
    assert done.returncode == 0


def test_a_damaged_list_of_jobs_is_no_traceback(tmp_path):
    (tmp_path / "r" / "submission").mkdir(parents=True)
    line = json.dumps({"job_id": "7", "cluster": "local"})
    (tmp_path / "r" / "submission" / "jobs.jsonl").write_text(f"{line}\n{{torn")
    assert jobs.submissions(tmp_path / "r") == [jobs.Job("7", "local")]


def test_a_process_of_this_machine_has_a_state(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    job = jobs.Job(str(process.pid), "local")
    assert job.state().name == "RUNNING"
    assert job.cancel() is None
    process.wait()
    assert job.state().has_ended
    assert job.cancel() == "it is not running"
