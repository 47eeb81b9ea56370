"""A few kill points of crash.py; `make crash-test` runs a hundred."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_killed_run_ends_as_if_nothing_had_been():
    script = Path(__file__).with_name("crash.py")
    done = subprocess.run([sys.executable, script, "6", "3"], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 runs ended differently" in done.stdout
