"""Uploading to a stand-in server with the real wandb client."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from wandb_server import API_KEY, WandbServer

pytest.importorskip("wandb")

CLIENT = """
import sys, wandb
settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_meta=True, x_disable_stats=True)
run = wandb.init(id="abcd1234", resume="allow", project="p", dir=sys.argv[1], settings=settings)
for number in map(int, sys.argv[2:]):
    run.log({"validation": number, "value": float("nan") if number == 2 else 1 / number})
run.summary["best"] = 0.25
run.finish()
"""


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def client(server, folder, *numbers):
    words = [sys.executable, "-c", CLIENT, str(folder), *map(str, numbers)]
    subprocess.run(words, env={**os.environ, **server.environment}, check=True, timeout=60, capture_output=True)


def test_the_stand_in_server_holds_what_the_real_client_sends(server, tmp_path):
    client(server, tmp_path, 1, 2)
    client(server, tmp_path, 3)
    assert server.run.validations == [1, 2, 3]
    assert [row["_step"] for row in server.run.history] == [0, 1, 2]
    assert server.run.history[1]["value"] != server.run.history[1]["value"]
    assert server.run.summary["best"] == 0.25
    assert "config.yaml" in server.run.files
    assert not server.unknown_operations
    assert API_KEY.encode() not in server.received()
