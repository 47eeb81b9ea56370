"""The local Slurm cluster itself, and what Slurm does that the package has to reckon with."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from slurm import SCRIPT, LocalCluster, why_not

HOSTS = Path("/etc/hosts")


@pytest.fixture
def idle(cluster):
    """The cluster without what the test before left in its queue."""
    cluster.clear()
    return cluster


@pytest.fixture
def other(short_folder):
    """A second cluster beside the first, to be brought up by the test."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    cluster = LocalCluster(short_folder / "other")
    yield cluster
    cluster.tool("down")


@pytest.fixture
def script():
    """The tool as a module."""
    loader = SourceFileLoader("localcluster", str(SCRIPT))
    spec = importlib.util.spec_from_loader("localcluster", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def assert_gone(cluster):
    """No process, no name, no folder."""
    assert processes_of(cluster) == []
    assert str(cluster.folder) not in HOSTS.read_text()
    assert not cluster.folder.exists()


def processes_of(cluster):
    said = subprocess.run(["ps", "-wweo", "stat,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if str(cluster.folder) in line and not line.startswith("Z")]


def is_alive(pid):
    return Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()


# A cluster.


@pytest.mark.cluster
def test_it_is_a_cluster(idle, tmp_path):
    assert idle.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").split() == ["4"]
    job = idle.sbatch('srun bash -c \'echo "$SLURM_PROCID on $SLURMD_NODENAME"\'', "-N2", "--ntasks-per-node=2",
                      "-o", "out.txt", cwd=tmp_path)  # fmt: skip
    idle.wait_for_state(job, "COMPLETED")
    assert sorted((tmp_path / "out.txt").read_text().splitlines()) == ["0 on n1", "1 on n1", "2 on n2", "3 on n2"]
    idle.wait_for(lambda: "COMPLETED" in idle.run("sacct", "-n", "-j", job, "-o", "State"))


@pytest.mark.cluster
def test_its_nodes_resolve(cluster):
    said = cluster.run("getent", "hosts", "n1", "n2", "n3", "n4")
    assert {tuple(line.split()) for line in said.splitlines()} == {("127.0.0.1", f"n{i}") for i in (1, 2, 3, 4)}


@pytest.mark.cluster
def test_up_again_is_nothing_new(cluster):
    before = (cluster.folder / "slurm.conf").read_text()
    done = cluster.tool("up")
    assert done.returncode == 0
    assert done.stdout == cluster.tool("env").stdout == f"export SLURM_CONF={cluster.folder}/slurm.conf\n"
    assert "it is up already" in done.stderr
    assert (cluster.folder / "slurm.conf").read_text() == before
    assert "abrupt" in cluster.tool("status").stdout


@pytest.mark.cluster
def test_an_option_that_it_does_not_have(cluster):
    done = cluster.tool("up", "--option", "KillWait=77")
    assert done.returncode == 2
    assert done.stderr == "localcluster: it is up, without KillWait=77; take it down first\n"


# What Slurm does.


@pytest.mark.cluster
@pytest.mark.parametrize(("reaction", "states"), [("exit 0", {"COMPLETED"}), ("exit 75", {"COMPLETED", "FAILED"})])
def test_a_preempted_job_that_saves_and_leaves_may_not_come_back(idle, tmp_path, reaction, states):
    """The reason for distplateau.cluster.requeue. Slurm 24.11 queues it again, 22.05 does not."""
    script = f"srun --exclusive bash -c 'trap \"touch got; {reaction}\" TERM; touch up; while :; do sleep 0.1; done'"
    job = idle.sbatch(script, "-N2", "-o", "/dev/null", cwd=tmp_path)
    idle.wait_for((tmp_path / "up").exists)
    high = idle.preempt(tmp_path)
    idle.wait_for_state(high, "COMPLETED")
    assert (tmp_path / "got").exists()
    if idle.restarts(job):
        assert "slurm-wlm 22." not in idle.run("sinfo", "--version")
    else:
        assert idle.state(job) in states


@pytest.mark.cluster
def test_a_preempted_job_that_saves_and_waits_comes_back(idle, tmp_path):
    """After the grace time, which Slurm looks at every 30 seconds."""
    script = (
        'echo "start ${SLURM_RESTART_COUNT:-0}" >>told; [ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0\n'
        "srun --exclusive bash -c 'trap \"echo saved >>told; sleep 60\" TERM; touch up; while :; do sleep 0.1; done'"
    )
    job = idle.sbatch(script, "-N2", "-n2", "-o", "/dev/null", cwd=tmp_path)
    idle.wait_for((tmp_path / "up").exists)
    idle.preempt(tmp_path)
    idle.wait_for_state(job, "COMPLETED")
    told = (tmp_path / "told").read_text().splitlines()
    assert told[0] == "start 0" and "saved" in told[: told.index("start 1")]


@pytest.mark.cluster
def test_a_dead_node_takes_all_processes_along_and_its_job_comes_back(idle, tmp_path):
    # The second process is no child of the job's any more and has none of Slurm's variables: nothing says whose it is.
    # Its output goes nowhere: Slurm waits a minute for one who holds the job's.
    script = (
        '[ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0\nsrun --exclusive bash -c \''
        '(setsid env -i /bin/sh -c "echo \\$\\$ >$SLURMD_NODENAME; exec /bin/sleep 600" >/dev/null 2>&1 &); sleep 600\''
    )
    job = idle.sbatch(script, "-N2", "-n2", "-w", "n1,n2", "-o", "/dev/null", cwd=tmp_path)
    idle.wait_for(lambda: all((tmp_path / node).exists() and (tmp_path / node).read_text() for node in ("n1", "n2")))
    pids = {node: int((tmp_path / node).read_text()) for node in ("n1", "n2")}
    assert Path(f"/proc/{pids['n2']}/environ").read_bytes().count(b"SLURM") == 0
    assert idle.tool("kill-node", "n2").returncode == 0
    assert not is_alive(pids["n2"]) and is_alive(pids["n1"])
    status = idle.tool("status")
    assert status.returncode == 1 and f"n2 does not run; its log: {idle.folder}/logs/n2.log" in status.stdout
    idle.wait_for(lambda: idle.restarts(job) == 1)
    assert idle.tool("start-node", "n2").returncode == 0
    idle.wait_for_state(job, "COMPLETED")


# Up and down.


@pytest.mark.cluster
def test_two_clusters_and_three_at_once_who_want_the_second(cluster, other, tmp_path):
    """Both live, and one goes without the other."""
    command = [sys.executable, SCRIPT, "--dir", other.folder, "up"]
    ups = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [up.communicate(timeout=120)[1] for up in ups]
    assert [up.returncode for up in ups] == [0, 0, 0], said
    assert sorted(text.count("it is up already") for text in said) == [0, 1, 1]
    assert len([line for line in processes_of(other) if "slurmctld" in line]) == 1
    script = "(setsid env -i /bin/sh -c 'echo $$ >pid; exec /bin/sleep 600' &); sleep 600"
    other.sbatch(script, "-N1", "-o", "/dev/null", cwd=tmp_path)
    other.wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    assert other.tool("down").returncode == 0
    assert_gone(other)
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert HOSTS.read_text().count(f"{cluster.folder}\n") == 4
    assert cluster.tool("status").returncode == 0


@pytest.mark.cluster
def test_up_mends(other, tmp_path):
    """A node alone, with the jobs going on; everything after the controller is gone; a folder that was deleted."""
    assert other.tool("up").returncode == 0
    job = other.sbatch("sleep 600", "-N1", "-w", "n1", "-o", "/dev/null", cwd=tmp_path)
    other.wait_for_state(job, "RUNNING")
    other.tool("kill-node", "n3")
    assert "up after" in other.tool("up").stderr
    assert other.state(job) == "RUNNING"
    assert other.tool("status").returncode == 0

    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    [controller] = [pid for pid in pids if re.match(f"slurmctld .*{other.folder}/", _command_line(pid))]
    os.kill(controller, signal.SIGKILL)
    other.wait_for(lambda: not is_alive(controller))
    assert other.tool("status").returncode == 1
    assert other.tool("up").returncode == 0
    assert other.run("squeue", "-h") == ""

    shutil.rmtree(other.folder)
    assert processes_of(other)
    assert other.tool("down").returncode == 0
    assert_gone(other)


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@pytest.mark.cluster
@pytest.mark.parametrize("program", ["mariadb-install-db", "slurmctld"])
def test_up_that_is_ended_leaves_nothing(other, program):
    up = subprocess.Popen([sys.executable, SCRIPT, "--dir", other.folder, "up"], stderr=subprocess.PIPE, text=True)
    other.wait_for(lambda: any(program in line for line in processes_of(other)), seconds=30)
    time.sleep(0.2)
    up.terminate()
    assert up.communicate(timeout=30)[1] == "localcluster: interrupted\n"
    assert up.returncode == 130
    assert_gone(other)


@pytest.mark.cluster
def test_on_a_host_whose_name_does_not_resolve_and_for_as_long_as_a_process_lives(other):
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine's host name cannot be changed for one process")
    name = "login-01.no-such-cluster.example"
    with subprocess.Popen(["sleep", "600"]) as owner:
        script = f"""hostname {name} && ! getent hosts {name} &&
            {sys.executable} {SCRIPT} --dir {other.folder} up --no-accounting --while {owner.pid} &&
            SLURM_CONF={other.folder}/slurm.conf timeout 60 srun -N2 --ntasks-per-node=2 hostname"""
        done = subprocess.run(["unshare", "--uts", "bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[1:] == [name] * 4, done.stderr
        assert other.run("sacct", check=False) == ""
        owner.kill()
    other.wait_for(lambda: not other.folder.exists(), seconds=20)
    assert_gone(other)


# What goes wrong.


def refused(*arguments, **environment):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    return line


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="without root it says just that")


def test_no_cluster(tmp_path):
    assert "there is no cluster" in refused("--dir", tmp_path / "none", "status")


@pytest.mark.cluster
@needs_root
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("file/below", "cannot be used ("),
        ("file", "cannot be used (Not a directory)"),
        ("my cluster", "slurm.conf cannot name a folder with [' ']"),
        ("x" * 80, "and a socket's path leaves 76"),
        ("precious", "is there and no local cluster; choose another folder with --dir"),
    ],
)
def test_folder_that_is_of_no_use(short_folder, name, line):
    (short_folder / "file").touch()
    (short_folder / "precious").mkdir()
    (short_folder / "precious" / "thesis.tex").touch()
    assert line in refused("--dir", short_folder / name, "up")
    assert sorted(path.name for path in short_folder.rglob("*")) == ["file", "precious", "thesis.tex"]


@needs_root
def test_down_removes_no_folder_of_others(short_folder):
    (short_folder / "thesis.tex").touch()
    assert "is there and no local cluster" in refused("--dir", short_folder, "down")
    assert (short_folder / "thesis.tex").exists()


@pytest.mark.cluster
@needs_root
def test_no_space(short_folder):
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", short_folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        line = refused("--dir", short_folder / "c", "up")
        assert "20 MiB are free and 300 needed" in line
        assert list(short_folder.iterdir()) == []
    finally:
        subprocess.run(["umount", short_folder], check=True)


@pytest.mark.cluster
def test_option_that_slurm_does_not_know(other):
    line = refused("--dir", other.folder, "up", "--option", "KilWait=5")
    assert "--option: Slurm does not accept it" in line and "KilWait" in line
    assert_gone(other)


@pytest.mark.cluster
def test_daemon_that_fails_is_named_with_its_last_words(other, tmp_path):
    fake = tmp_path / "slurmctld"
    fake.write_text("#!/bin/sh\necho 'fatal: the state is from another version'\nexit 1\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, SCRIPT, "--dir", other.folder, "up"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"localcluster: slurmctld has ended; {other.folder}/logs/slurmctld.out ends with:",
        "fatal: the state is from another version",
    ]
    assert processes_of(other) == [] and str(other.folder) not in HOSTS.read_text()


# Packages; without any.


def test_without_apt_the_missing_programs_are_named(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(script.ImpossibleError, match=r"slurmctld, .*missing, and there is no apt-get"):
        script.install_packages(script.PROGRAMS)


@pytest.fixture
def fake_apt(script, monkeypatch, tmp_path):
    """An apt-get that fails, and says which policy for daemons it saw."""
    monkeypatch.setattr(script, "POLICY", tmp_path / "policy-rc.d")
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(
        f"#!/bin/sh\n. {tmp_path}/policy-rc.d\n".replace(". ", "/bin/cat ")
        + f"/bin/sh {tmp_path}/policy-rc.d; echo $? >{tmp_path}/asked\n"
        "echo 'W: whatever' >&2; echo 'E: Unable to locate package slurm-wlm' >&2; exit 100\n"
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(apt.parent))
    return script


@pytest.mark.parametrize("before", [None, "#!/bin/sh\nexit 0\n"])
def test_packages_start_no_daemons_and_the_machine_is_as_before(fake_apt, before, tmp_path, capsys):
    policy = tmp_path / "policy-rc.d"
    if before is not None:
        policy.write_text(before)
    message = "apt-get update failed: E: Unable to locate package slurm-wlm$"
    with pytest.raises(fake_apt.ImpossibleError, match=message):
        fake_apt.install_packages(fake_apt.PROGRAMS)
    assert (tmp_path / "asked").read_text() == "101\n"
    assert (policy.read_text() if policy.exists() else None) == before
    assert "installing slurm-wlm slurmdbd mariadb-server munge" in capsys.readouterr().err


# Names.


def test_names_come_and_go_beside_those_of_others(script, monkeypatch, tmp_path):
    hosts = tmp_path / "hosts"
    monkeypatch.setattr(script, "HOSTS", hosts)
    monkeypatch.setattr(script, "_is_here", lambda name: True)
    hosts.write_text("127.0.0.1\tlocalhost\n10.0.0.7 n1 # mine\n")
    before = hosts.read_text()
    for folder in ("/a", "/ab"):
        script._name_nodes(Path(folder), ("n1", "n2"))
        script._name_nodes(Path(folder), ("n1", "n2"))
    assert hosts.read_text().count("127.0.0.1 n1 # distplateau localcluster /a\n") == 1
    script._name_nodes(Path("/a"), ())
    assert hosts.read_text() == before + "".join(
        f"127.0.0.1 {n} # distplateau localcluster /ab\n" for n in ("n1", "n2")
    )
    script._name_nodes(Path("/ab"), ())
    assert hosts.read_text() == before


def test_name_of_another_machine(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "HOSTS", tmp_path / "hosts")
    (tmp_path / "hosts").touch()
    monkeypatch.setattr(script.socket, "gethostbyname", lambda name: "10.0.0.7")
    with pytest.raises(script.ImpossibleError, match="n1 is another machine here"):
        script._name_nodes(tmp_path, ("n1",))


def test_names_that_cannot_be_written(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "HOSTS", tmp_path / "no" / "hosts")
    monkeypatch.setattr(script, "_is_here", lambda name: False)
    with pytest.raises(script.ImpossibleError, match=r"cannot be written .No such file or directory.: n1 to n4"):
        script._name_nodes(tmp_path, ("n1",))
