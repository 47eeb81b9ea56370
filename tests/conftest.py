"""No test leaves processes, a process group or a launcher's environment behind (after Lightning Fabric's fixture)."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

_LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "ACCELERATE_")


@pytest.fixture(scope="session", autouse=True)
def _no_leaked_processes():
    yield
    if "ranks" in sys.modules:
        sys.modules["ranks"].shut_down()


@pytest.fixture(autouse=True)
def _no_leaks(request):
    """Fail a test that leaves a process group or a changed launcher variable, and clean up for the next one."""
    before = _launcher_variables()
    yield
    leaks = _restore_environment(before)
    # A test that never imported torch must not pay for it here.
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        leaks.append("an initialised process group")
    if leaks:
        pytest.fail(f"{request.node.nodeid} left behind: {', '.join(leaks)}", pytrace=False)


def _launcher_variables() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith(_LAUNCHER_KEYS)}


def _restore_environment(before: dict[str, str]) -> list[str]:
    after = _launcher_variables()
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    for key in changed:
        os.environ.pop(key, None)
        if key in before:
            os.environ[key] = before[key]
    return changed


@pytest.fixture(scope="session")
def cluster():
    """Give a real Slurm cluster of four nodes on this machine, $DISTPLATEAU_LOCALCLUSTER if that is up."""
    import slurm

    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    running = slurm.LocalCluster(Path(os.environ.get("DISTPLATEAU_LOCALCLUSTER") or os.devnull))
    if running.tool("status").returncode == 0:
        yield running
        return
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/var/tmp") as folder:
        own = slurm.LocalCluster(Path(folder, "cluster"))
        # If the tests are killed, it goes down all the same.
        done = own.tool("up", "--while", str(os.getpid()))
        if done.returncode == 2:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        yield own
        own.tool("down")


@pytest.fixture
def short_folder():
    """Give an empty folder whose path leaves room for the name of a socket, as that of `tmp_path` may not."""
    with tempfile.TemporaryDirectory(prefix="dp-", dir="/var/tmp") as folder:
        yield Path(folder)
