"""Submission without a cluster: profiles, grids, frozen code, the batch script, and who comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distplateau.cli import _grid, main
from distplateau.cluster import doctor, jobs, queue, requeue, submit
from distplateau.cluster.freeze import freeze, make_private
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
        ('[slurm.env]\nAWS_SECRET_ACCESS_KEY = "secret-value"', "AWS_SECRET_ACCESS_KEY: looks like a secret"),
        ('setup = ["export HF_TOKEN=secret-value"]', "setup .HF_TOKEN.: looks like a secret"),
        ('[slurm]\nsrun_args = ["--export=ALL,MY_TOKEN=secret-value"]', "slurm.srun_args .MY_TOKEN.: looks like a sec"),
        ('[slurm.extra]\ncomment = "PASSWORD=secret-value"', "slurm.extra.comment .PASSWORD.: looks like a secret"),
        ('[slurm.extra]\nexport = "NONE"', "slurm.extra.export = 'NONE': is set by this package"),
        (
            '[slurm.extra]\nslurm_mem_per_gpu = "4G"',
            "slurm_mem_per_gpu = .*; write mem_per_gpu",
        ),
        ("[slurm]\nextra = 3", r"slurm.extra = 3: .*by its long name$"),
        ("[slurm.extra]\nexclusive = false", "slurm.extra.exclusive = False: is no option of sbatch"),
        ('[slurm.extra]\n"a\\nb" = 1', "is no option of sbatch"),
        ('[slurm]\npartition = "a\\ntouch /tmp/x"', "slurm.partition = .*: is empty or has a line break in it"),
        ('[slurm.extra]\ncomment = "a\\ntouch /tmp/x"', "slurm.extra.comment = .*: is empty or has a line break"),
        ('[slurm]\nmem = ""', "slurm.mem = '': is empty"),
        ('[slurm.env]\n"A B" = "c"', "slurm.env.A B: is no environment variable"),
        ("[cluster]\na = 1", "cluster = .*unknown key; .*valid: setup, slurm"),
    ],
)
def test_a_wrong_profile_is_one_line_with_the_fix(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        profile_of(tmp_path, text)
    assert "\n" not in str(error.value)
    assert "secret-value" not in str(error.value)


def test_what_only_sounds_like_a_secret_is_allowed(tmp_path):
    profile = profile_of(tmp_path, '''
        setup = ["export WANDB_API_KEY=$(cat ~/.key)", "module load key"]
        [slurm.env]
        TOKENIZERS_PARALLELISM = "false"
        NCCL_IB_PKEY = "0x1"
        ''')  # fmt: skip
    assert len(profile.slurm.env) == 2


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


def test_a_list_a_table_and_a_quoted_string_are_one_value():
    assert _grid(["a.b=1, 2,1", "a.c=[1,2],[3]", 'a.d="x,y",z', "a.e={h=[8], d=0.2},{h=[8,16], d={}}"]) == {
        "a.b": ["1", "2"],
        "a.c": ["[1,2]", "[3]"],
        "a.d": ['"x,y"', "z"],
        "a.e": ["{h=[8], d=0.2}", "{h=[8,16], d={}}"],
    }
    with pytest.raises(InputError, match=r"--grid = 'a.b=3': has a.b twice"):
        _grid(["a.b=1,2", "a.b=3"])


@pytest.mark.parametrize("text", ["patience=3", "schedule.patience", "schedule.patience=", "schedule.patience=1,,2"])
def test_a_wrong_grid_is_refused(tmp_path, text):
    done = distplateau("submit", ROOT / "launch/demo.toml", "--cluster", "local", "--grid", text, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"--grid = {text!r}: is no key with values; write --grid section.key=a,b,c" in line


def prepare(tmp_path, monkeypatch, grid, **overrides):
    """As far as a submission looks at names and numbers, without sbatch."""
    monkeypatch.chdir(tmp_path)
    return submit._prepare(ROOT / "launch/demo.toml", "local", overrides, grid)[1]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        # Two jobs in one folder would destroy each other's checkpoints.
        ({"tracking.project": ["a/b", "a_b"]}, "--grid: has two points with the folder 'project=a_b'"),
        ({"tracking.project": ["x" * 300, "y"]}, "makes a folder name of 308 bytes, above 255"),
        ({"tracking.project": ["100%j"], "run.seed": ["1", "2"]}, None),
        (
            {key: [str(1 + n) for n in range(11)] for key in ("run.seed", "training.epochs", "schedule.patience")},
            "--grid: makes 1,331 runs, above the 1,000 of this machine; split it",
        ),
    ],
)
def test_a_grid_that_makes_no_sweep_is_refused(tmp_path, monkeypatch, grid, message):
    if message is None:
        assert len(prepare(tmp_path, monkeypatch, grid)) == 2  # only the sweep's own folder is named to Slurm
        return
    with pytest.raises(InputError, match=message):
        prepare(tmp_path, monkeypatch, grid)


def test_a_key_of_the_grid_is_not_overridden_as_well(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--run\.seed: is in the grid as well"):
        prepare(tmp_path, monkeypatch, {"run.seed": ["1", "2"]}, **{"run.seed": "3"})


def test_a_run_is_no_folder_of_a_sweep(tmp_path, monkeypatch):
    (tmp_path / "runs" / "demo" / "submission").mkdir(parents=True)
    with pytest.raises(InputError, match="holds a run, and can be no folder of a sweep"):
        prepare(tmp_path, monkeypatch, {"run.seed": ["1", "2"]})


@pytest.mark.parametrize("name", ["100%j", "back\\slash"])
def test_folders_that_slurm_would_call_something_else_are_refused(tmp_path, monkeypatch, name):
    """With --output=.../100%j/... the logs of job 7 would lie in the folder of a run that is called 1007."""
    with pytest.raises(InputError, match="in its path, which Slurm reads as something else"):
        prepare(tmp_path, monkeypatch, {}, **{"run.name": name})
    prepare(tmp_path, monkeypatch, {}, **{"run.name": 'it\'s "ün" $HOME `id` #1'})


def test_the_largest_array_is_slurms_own(monkeypatch):
    monkeypatch.setattr(queue, "ask", lambda _: "MailProg = x\nMaxArraySize            = 11\nMaxDBDMsgs = 3")
    assert queue.largest_array() == 10
    with pytest.raises(InputError, match=r"makes 11 runs, above the 10 of the cluster \(MaxArraySize\)"):
        submit._check_size(11, "p.toml")
    monkeypatch.setattr(queue, "ask", lambda _: None)
    submit._check_size(1000, "p.toml")


# What a job finds.


def test_a_launch_that_shards_is_refused_before_the_queue(tmp_path):
    profile = profile_of(tmp_path, '[slurm.env]\nACCELERATE_USE_FSDP = "true"')
    config = parse_config({"run": {"dir": str(tmp_path)}})
    with pytest.raises(InputError, match="FSDP is not served"):
        submit.check(config, profile)


@pytest.mark.parametrize("asked", ["gpus_per_node = 1", 'gres = "gpu:a100:2"', "[slurm.extra]\ngpus-per-task = 1"])
def test_a_login_node_without_a_gpu_sends_fp16_to_those_that_have_one(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = parse_config({"training": {"precision": "fp16"}, "run": {"dir": str(tmp_path)}})
    submit.check(config, profile_of(tmp_path, f"[slurm]\n{asked}"))
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        submit.check(config, profile_of(tmp_path, f'[slurm]\n{asked}\n[slurm.env]\nACCELERATE_USE_CPU = "true"'))
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        submit.check(config, profile_of(tmp_path, "[slurm]"))


def test_a_secret_in_the_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    config = parse_config({"tracking": {"project": "x-0123456789abcdef"}, "run": {"dir": str(tmp_path)}})
    with pytest.raises(InputError, match="MY_API_KEY: is in the configuration") as error:
        submit.check(config, profile_of(tmp_path, "[slurm]"))
    assert "0123456789" not in str(error.value)


@pytest.mark.parametrize(
    "text", ['setup = ["client login 0123456789abcdef"]', '[slurm.env]\nINNOCENT = "0123456789abcdef"']
)
def test_a_secret_in_the_profile_is_refused_whatever_it_is_called(tmp_path, monkeypatch, text):
    config = parse_config({"run": {"dir": str(tmp_path)}})
    profile = profile_of(tmp_path, text)
    submit._check_secrets(config, profile)  # of another shell
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    with pytest.raises(InputError, match="MY_API_KEY: is in the cluster profile") as error:
        submit._check_secrets(config, profile)
    assert "0123456789" not in str(error.value)


def test_a_secret_in_own_code_or_in_what_was_changed_there_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "model.py").write_text("KEY = '0123456789abcdef'\n")
    config = parse_config({"model": {"name": "model:build"}, "run": {"dir": str(tmp_path / "runs")}})
    freeze(config, config.run_dir, source)
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    with pytest.raises(InputError, match=r"model.py: holds the value of MY_API_KEY") as error:
        freeze(config, config.run_dir, source)
    assert "0123456789" not in str(error.value)
    git = ["git", "-C", str(source), "-c", "user.email=a@b", "-c", "user.name=c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (source / "model.py").write_text("KEY = None\n")
    with pytest.raises(InputError, match=r"git diff in .*: holds the value of MY_API_KEY"):
        freeze(config, config.run_dir, source)


def test_address_and_port_of_another_job_are_not_taken_over(tmp_path):
    """Those of the profile are."""

    def found(text):
        lines = script_of(tmp_path, text).split("# setup\n")[1].splitlines()
        end = max(number for number, line in enumerate(lines) if line.startswith("export MASTER_PORT"))
        shell = "\n".join([*lines[: end + 1], 'echo "$MASTER_ADDR|$MASTER_PORT"'])
        env = {**os.environ, "MASTER_ADDR": "stale", "MASTER_PORT": "29500"}
        said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True, env=env).stdout
        return said.strip().split("|")

    address, port = found("[slurm]")
    assert address == "" and port.isdigit() and port != "29500"
    assert found('[slurm.env]\nMASTER_ADDR = "head"\nMASTER_PORT = "4"') == ["head", "4"]


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


def test_submodules_are_frozen_and_runs_are_not(tmp_path):
    git = ["git", "-c", "user.email=a@b", "-c", "user.name=c", "-c", "protocol.file.allow=always"]

    def run(folder, *command):
        subprocess.run([*git, "-C", folder, *command], check=True, capture_output=True)

    part, whole = tmp_path / "part", tmp_path / "whole"
    for folder in (part, whole):
        folder.mkdir()
        run(folder, "init", "-q")
        (folder / "a.py").write_text("")
        run(folder, "add", ".")
        run(folder, "commit", "-qm", "first")
    run(whole, "submodule", "add", part, "part")
    run(whole, "commit", "-qm", "second")
    for name in (
        "out/before/ledger.jsonl",
        "out/before/x.py",
        "old/submission/config.toml",
        "old/submission/code/y.py",
    ):
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text("")
    config = parse_config({"model": {"name": "a:build"}, "run": {"dir": str(whole / "out"), "name": "now"}})
    code = freeze(config, config.run_dir, whole).parent / "code"
    copied = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert {name for name in copied if not name.startswith("distplateau/")} == {".gitmodules", "a.py", "part/a.py"}


def test_files_that_hold_keys_are_not_frozen(tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    git = ["git", "-C", source, "-c", "user.email=a@b", "-c", "user.name=c"]
    (source / "a.py").write_text("")
    (source / ".env").write_text("KEY=old")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    for name in (".env", ".env.local", ".netrc", "my.pem", "a.py"):
        (source / name).write_text("marker")
    config = parse_config({"model": {"name": "a:build"}, "run": {"dir": str(tmp_path / "runs")}})
    frozen = freeze(config, config.run_dir, source).parent
    held = {path.name for path in frozen.rglob("*") if path.is_file() and path.read_text().strip() == "marker"}
    assert held == {"a.py"}
    assert (frozen / "diff.patch").read_text().count("+marker") == 1
    # Submitted again from where there is no git: the commit is not that of the submission before.
    freeze(config, config.run_dir, tmp_path)
    assert not (frozen / "commit.txt").exists() and not (frozen / "diff.patch").exists()


def test_nothing_of_a_run_can_be_written_by_everybody(tmp_path):
    """The job unpickles and imports what lies there. The shell has no umask at all."""
    (tmp_path / "mine.py").write_text("from distplateau.training.parts.losses import *\n")
    (tmp_path / "mine.py").chmod(0o666)
    planted = tmp_path / "runs" / "open" / "logs" / "1_submitted.pkl"
    planted.parent.mkdir(parents=True)
    planted.write_text("")
    for path in (planted, planted.parent, planted.parent.parent):
        path.chmod(0o777)
    command = [sys.executable, "-m", "distplateau", "submit", str(ROOT / "launch/demo.toml"), "--cluster", "local",
               "--wait", "--run.name", "open", *SMALL]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=env, umask=0, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "open"
    paths = [run_dir, *run_dir.rglob("*")]
    assert len(paths) > 100
    assert not [path for path in paths if path.lstat().st_mode & 0o002 and not path.is_symlink()]


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        make_private(tmp_path)


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    done = distplateau("submit", ROOT / "launch/demo.toml", "--cluster", "local", *SMALL, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert "cannot be written" in line


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


def test_a_failure_that_cannot_be_counted_stops_nothing(tmp_path, capsys):
    (tmp_path / "submission").write_text("no folder")
    assert requeue.count_failure(tmp_path, 1).times == 1
    assert "not counted among the failures" in capsys.readouterr().err


def test_a_controller_that_restarts_is_asked_again(monkeypatch, capsys):
    answers = ["Unable to contact slurm controller", "Unable to contact slurm controller", None]
    monkeypatch.setattr(requeue.shutil, "which", lambda _: "scontrol")
    monkeypatch.setattr(queue, "requeue", lambda _: answers.pop(0))
    monkeypatch.setattr(queue, "is_wanted", lambda _: True)
    monkeypatch.setattr(requeue, "_TRY_SECONDS", 0)
    assert requeue._requeue("7") is None
    assert capsys.readouterr().err.count("not queued again yet: Unable to contact") == 2
    # Not for ever, and not once somebody has cancelled it.
    answers.extend(["no"] * 9)
    assert requeue._requeue("7") == "no" and len(answers) == 5
    monkeypatch.setattr(queue, "is_wanted", lambda _: False)
    assert requeue._requeue("7") == "no" and len(answers) == 4


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--resume", "override", "--run.name", "auto"], "auto"),
        (["--run.name", "override", "--resume=auto"], "override"),
        ([], "demo"),
    ],
)
def test_the_run_folder_of_the_arguments_of_train(tmp_path, monkeypatch, capsys, words, name):
    monkeypatch.chdir(tmp_path)
    assert requeue.print_folder([str(ROOT / "launch/demo.toml"), *words]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/runs/{name}\n"


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


def test_slurm_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    for name in ("scontrol", "sacct", "scancel"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(queue, "_TIMEOUT_S", 0.2)
    began = time.monotonic()
    assert queue.job_state("1") is None
    assert "timed out" in (queue.cancel("1") or "")
    [found] = list(doctor._slurm_settings(profile_of(tmp_path, "[slurm]")))
    assert (found.name, found.good) == ("controller", False)
    assert time.monotonic() - began < 10


def test_what_ended_before_the_ledger_was_written_is_no_interruption(tmp_path, monkeypatch):
    """The ledger's last word is that of the stretch before, which was interrupted."""
    (tmp_path / "submission").mkdir()
    ledger = Ledger(tmp_path)
    ledger.append("start", run="r")
    ledger.append("interrupted", reason="SIGUSR2", step=1, epoch=1.0)
    monkeypatch.setattr(queue, "is_wanted", lambda _: False)
    said = []
    monkeypatch.setattr(requeue, "_say", said.append)
    for code in (75, 1, 1):
        requeue.main([str(tmp_path), str(code), "9"])
    assert ["it failed 2 times in a row with code 1" in text for text in said] == [False, False, True]


@pytest.mark.parametrize("code", [138, 140, 143])
def test_a_signal_before_the_handlers_are_there_is_no_failure(code):
    assert verdict(code, 2, 20, interrupted=False, failure=Failure(code, "", 5)) is None
    assert verdict(code, 20, 20, interrupted=False, failure=Failure(code, "", 5)) is not None


def test_failures_of_another_submission_do_not_count(tmp_path):
    config = parse_config({"run": {"dir": str(tmp_path)}})
    requeue.count_failure(config.run_dir, 1)
    freeze(config, config.run_dir, tmp_path)
    assert requeue.count_failure(config.run_dir, 1).times == 1


def test_a_job_that_slurm_brings_back_too_often_ends(tmp_path):
    lines = script_of(tmp_path, "[slurm]\nmax_requeues = 3").split("# setup\n")[1].splitlines()

    def ends(count):
        env = {**os.environ, "SLURM_RESTART_COUNT": str(count), "SLURM_JOB_ID": "7"}
        return subprocess.run(["bash", "-c", lines[0]], capture_output=True, text=True, check=False, env=env)

    assert ends(3).returncode == 0
    assert ends(4).returncode == 1
    assert "job 7 ends: it came back more than 3 times" in ends(4).stderr


def test_options_of_the_shell_do_not_beat_the_profile(tmp_path, monkeypatch):
    for name in ("SBATCH_NO_REQUEUE", "SBATCH_PARTITION", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "1")
    with submit._without_options_of_the_shell(profile_of(tmp_path, '[slurm]\npartition = "low"')):
        assert [name for name in os.environ if name.startswith("SBATCH_")] == ["SBATCH_ACCOUNT"]
    assert os.environ["SBATCH_PARTITION"] == "1"


def test_two_submissions_at_once_do_not_meet(tmp_path):
    first, second, later = (submit._submitted_once(tmp_path) for _ in range(3))
    with first, pytest.raises(InputError, match="is being submitted by another process"):
        second.__enter__()
    with later:
        pass


# The doctor.


@pytest.mark.parametrize(
    ("partition", "said", "good", "text"),
    [
        ("gone", None, False, "there is no partition gone"),
        (None, "PartitionName=a Default=NO PreemptMode=OFF", False, "there is no default partition"),
        (None, "PartitionName=a Default=NO\nPartitionName=b Default=YES PreemptMode=OFF", True, "b is not preempted"),
        ("a", "PartitionName=a GraceTime=5 PreemptMode=REQUEUE", False, "a: PreemptMode = REQUEUE, 5 s of grace"),
        ("a", "PartitionName=a GraceTime=UNLIMITED PreemptMode=REQUEUE", True, "UNLIMITED s of grace"),
        ("a", "PartitionName=a GraceTime=60 PreemptMode=CANCEL", False, "ends a job for good"),
        ("a", "PartitionName=a GraceTime=60 PreemptMode=GANG,SUSPEND", False, "halts ranks in the middle of a step"),
    ],
)
def test_the_doctor_looks_at_the_partition(monkeypatch, partition, said, good, text):
    monkeypatch.setattr(queue, "ask", lambda _: said)
    found = doctor._preemption(partition, {"PreemptMode": "REQUEUE"})
    assert found.good is good
    assert text in found.text
    assert good or found.fix


def test_the_doctor_judges_what_the_ranks_found():
    versions = {"torch": "2", "distplateau": "1"}
    one = {"node": "n1", "token": True, "device": "H200", "versions": versions, "nccl": "2.1", "clock": 100.0}
    good = {"ranks": [one, one], "latency": 1e-3, "bandwidth": 1e9, "lrs": [0.25, 0.25]}
    assert all(finding.good for finding in doctor.judge(good))
    other = {**one, "node": "n2", "token": False, "device": "cpu", "nccl": "2.2", "clock": 102.0}
    bad = {finding.name: finding for finding in doctor.judge({**good, "ranks": [one, other], "lrs": [0.25, 0.5]})}
    assert [name for name, finding in bad.items() if finding.good] == ["all-reduce"]
    assert bad["shared folder"].text == "not seen by n2"
    assert bad["learning rate"].text == "they come to [0.25, 0.5]"
    assert all(finding.fix for finding in bad.values() if not finding.good)


def test_the_doctors_job_does_not_outlive_the_doctor(tmp_path, monkeypatch):
    import submitit

    class Executor:
        def __init__(self, folder):
            pass

        def update_parameters(self, **_):
            pass

        def submit(self, *_):
            return type("Job", (), {"job_id": "7"})

    def stop(_):
        raise KeyboardInterrupt

    cancelled = []
    monkeypatch.setattr(submitit, "SlurmExecutor", Executor)
    monkeypatch.setattr(queue, "job_state", stop)
    monkeypatch.setattr(queue, "cancel", cancelled.append)
    with pytest.raises(KeyboardInterrupt):
        doctor._run_probe(tmp_path, profile_of(tmp_path, "[slurm]"))
    assert cancelled == ["7"]


def test_the_doctor_in_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("")
    [found] = list(doctor._allocation(tmp_path / "runs", profile_of(tmp_path, "[slurm]")))
    assert found.good is False and "cannot be written" in found.text


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


def test_a_sweep_on_this_machine_trains_every_run(tmp_path):
    """One after the other in the same process; the one in the middle fails and keeps none from its turn."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef build(num_classes, width):\n"
        "    layers = torch.nn.Flatten(), torch.nn.Linear(64, num_classes)\n"
        "    if width == 2:\n"
        "        layers[1].register_forward_hook(fail)\n"
        "    return torch.nn.Sequential(*layers)\n\n\n"
        "def fail(module, *_):\n"
        "    if module.training and torch.distributed.is_initialized():\n"  # not when it is tried before the queue
        "        raise RuntimeError('broken on purpose')\n"
    )
    done = distplateau("submit", ROOT / "launch/demo.toml", "--cluster", "local", "--wait", "--model.name",
                       "mine:build", "--training.epochs", "1", "--tracking.wandb", "disabled",
                       "--model.args", "{width=1}", "--grid", "model.args.width=1,2,3", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1, done.stderr
    states = {row.run: row.state for row in jobs.overview(tmp_path / "runs")}
    assert {name.rpartition("=")[2]: state == "finished" for name, state in states.items()} == {
        "1": True,
        "2": False,
        "3": True,
    }, done.stderr


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


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands: sbatch gives a job, or refuses it; scontrol says what the test wrote down."""
    folder = tmp_path / "bin"
    folder.mkdir()
    answers = {
        "sbatch": "[ -e ../refuse ] && { echo 'invalid account' >&2; exit 1; }; echo Submitted batch job 7",
        "srun": "exit 1",
        "scontrol": f"cat {tmp_path}/state",
        "sacct": "exit 1",
    }
    for name, line in answers.items():
        (folder / name).write_text(f"#!/bin/sh\n{line.replace('..', str(tmp_path))}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "state").write_text("JobId=7 JobState=PENDING Restarts=0 ExitCode=0:0")
    (tmp_path / "p.toml").write_text("[slurm]\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_queued_once(slurm, capsys):
    command = ["submit", str(ROOT / "launch/demo.toml"), "--cluster", "p.toml", *SMALL]
    assert main(command) == 0
    assert capsys.readouterr().out == f"job 7  {slurm}/runs/demo\n"
    assert main(command) == 2
    assert "demo: is being trained by job 7 (PENDING); choose another run.name" in capsys.readouterr().err
    assert main([*command, "--dry-run"]) == 2
    (slurm / "state").write_text("JobId=7 JobState=FAILED Restarts=0 ExitCode=1:0")
    assert main(command) == 0
    assert jobs.submissions(slurm / "runs" / "demo") == [jobs.Job("7", "p.toml")] * 2


def test_what_sbatch_refuses_is_one_line(slurm, capsys):
    (slurm / "refuse").touch()
    assert main(["submit", str(ROOT / "launch/demo.toml"), "--cluster", "p.toml", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "invalid account" in said and "mend the cluster profile" in said
    assert [line for line in said.splitlines() if line.startswith("distplateau: sbatch: refused the job")]
    assert jobs.submissions(slurm / "runs" / "demo") == []


def test_a_dry_run_prints_the_script_and_writes_nothing(slurm, capsys):
    before = sorted(slurm.rglob("*"))
    command = ["submit", str(ROOT / "launch/demo.toml"), "--cluster", "p.toml", "--dry-run", *SMALL]
    assert main(command) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert f"export PYTHONPATH={slurm}/runs/demo/submission/code" in script and "export PYTHONSAFEPATH=1\n" in script
    assert main([*command, "--grid", "schedule.patience=1,2", "--grid", "run.seed=1,2"]) == 0
    assert "#SBATCH --array=0-3%4\n" in capsys.readouterr().out
    assert sorted(slurm.rglob("*")) == before


@pytest.mark.parametrize(
    ("code", "state", "said"),
    [
        (0, "RUNNING", "not queued again: it is done"),
        (1, "RUNNING", "is queued again (3 of 9), from the newest whole checkpoint"),
        (75, "CANCELLED", "not queued again: it was cancelled"),
    ],
)
def test_the_end_of_a_batch_script(slurm, monkeypatch, capsys, code, state, said):
    (slurm / "state").write_text(f"JobId=7 JobState={state} Restarts=2 ExitCode=0:0")
    monkeypatch.setattr(requeue, "_KILL_SECONDS", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert requeue.main([str(slurm / "run"), str(code), "9"]) == code
    assert said in capsys.readouterr().err


def test_a_task_of_an_array_is_queued_again_on_its_own(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert requeue.own_job_id() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert requeue.own_job_id() == "9_0"


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


def test_a_process_of_this_machine_has_a_state():
    process = subprocess.Popen(["bash", "-c", "read", "submitit.local._local"], stdin=subprocess.PIPE)
    job = jobs.Job(str(process.pid), "local")
    assert job.state().name == "RUNNING"
    assert job.cancel() is None
    process.wait()
    assert job.state().has_ended
    assert job.cancel() == "it is not running"


def test_another_process_that_has_the_number_by_now_is_left_alone():
    process = subprocess.Popen(["sleep", "60"])
    job = jobs.Job(str(process.pid), "local")
    try:
        assert job.state().has_ended
        assert job.cancel() == "it is not running"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def note(run_dir, job_id, cluster="p.toml"):
    (run_dir / "submission").mkdir(parents=True, exist_ok=True)
    line = json.dumps({"job_id": job_id, "cluster": cluster})
    (run_dir / "submission" / "jobs.jsonl").write_text(line + "\n")


@pytest.mark.parametrize("job_id", ["--user=root", "-1", "0", "7;x", "", "7_", "abc"])
def test_what_is_no_job_id_never_becomes_an_argument(tmp_path, job_id):
    note(tmp_path / "r", job_id)
    assert jobs.submissions(tmp_path / "r") == []


@pytest.mark.parametrize(
    "line",
    [
        "{" * 100_000,
        '{"event":"resumed","last_validation":1,"restart_count":"many"}',
        '{"event":"validation","validation":1,"epoch":1,"step":1,"monitor":"m","value":1,"decision":"","lr_before":[],'
        '"lr_after":[],"best":1,"num_bad":0,"cooldown":0}',
        '{"event":"start","schedule":3}\n{"event":"validation","validation":1,"epoch":1,"step":1,"monitor":"m","value":1,'
        '"decision":"","lr_before":[1],"lr_after":[1],"best":1,"num_bad":0,"cooldown":0}',
        "\0\udcff",
    ],
)
def test_a_damaged_ledger_hides_no_other_run(tmp_path, line, monkeypatch):
    monkeypatch.setattr(queue, "job_state", lambda _: JobState("RUNNING", "n1", "", 2))
    for name in ("a", "b"):
        note(tmp_path / name, "7")
    (tmp_path / "a" / "ledger.jsonl").write_bytes(line.encode("utf-8", "surrogateescape") + b"\n")
    first, second = jobs.overview(tmp_path)
    assert (first.state, second.state) == ("running", "running")
    assert second.requeues == "2"


def test_slurm_is_not_asked_for_runs_that_are_finished_nor_for_ever(tmp_path, monkeypatch):
    asked = []

    def hangs(job_id):
        asked.append(job_id)
        time.sleep(0.05)

    monkeypatch.setattr(queue, "job_state", hangs)
    monkeypatch.setattr(jobs, "_ASK_SECONDS", 0.12)
    for number in range(100, 300):
        note(tmp_path / str(number), str(number))
    Ledger(tmp_path / "100").append("start")
    Ledger(tmp_path / "100").append("finished")
    rows = jobs.overview(tmp_path)
    assert len(rows) == 200 and rows[0].state == "finished" and {row.state for row in rows[1:]} == {"unknown"}
    assert "100" not in asked and 8 <= len(asked) <= 40


def test_one_job_that_cannot_be_cancelled_keeps_no_other_alive(tmp_path, monkeypatch, capsys):
    states = {"1": JobState("COMPLETED"), "2": JobState("RUNNING"), "3": JobState("PENDING")}
    told = []
    monkeypatch.setattr(queue, "job_state", states.get)
    monkeypatch.setattr(queue, "cancel", told.append)
    for name, job_id in (("a", "1"), ("b", "2"), ("c", "3"), ("d", "3")):
        note(tmp_path / name, job_id)
    assert main(["jobs", "--cancel", str(tmp_path)]) == 2
    assert told == ["2", "3"]
    said = capsys.readouterr()
    assert "a: job 1 cannot be cancelled (it has ended: COMPLETED)" in said.err
    assert said.out.count("cancelled job") == 3


def test_a_job_is_followed_over_a_requeue_and_a_silent_controller(tmp_path, monkeypatch):
    answers = [JobState("RUNNING"), JobState("COMPLETED"), JobState("PENDING"), None, None, JobState("RUNNING"),
               *[JobState("FAILED", exit_code=3)] * 3]  # fmt: skip
    note(tmp_path, "7")
    log = tmp_path / "logs" / "7_0_log.out"
    log.parent.mkdir()
    text = ["1 ü\n".encode()[:3], "1 ü\n".encode()[3:]]  # a letter of two bytes, half of it at a time

    def answer(_):
        with log.open("ab") as file:
            file.write(text[-len(answers) % 2 - 1])
        return answers.pop(0)

    monkeypatch.setattr(queue, "job_state", answer)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0)
    written = []
    assert jobs.follow(tmp_path, written.append) == 3
    assert answers == []
    assert "".join(written).startswith("1 ü\n1 ü\n") and "�" not in "".join(written)


def test_ctrl_c_says_what_goes_on(monkeypatch, capsys, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "overview", stop)
    assert main(["jobs", str(tmp_path)]) == 75
    assert capsys.readouterr().err == "interrupted; the jobs go on\n"
