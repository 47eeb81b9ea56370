"""The recipes and the two commands, as far as they can be checked without training."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from distplateau.config import load_config
from distplateau.record.ledger import read_ledger

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
RUNS = sorted(LAUNCH.glob("*.toml"))
LAUNCHERS = sorted(LAUNCH.glob("*.yaml"))
TARGETS = "help demo test lint slow-test cluster-test crash-test bench install clean".split()


def make(*args, cwd=ROOT, **environment):
    # The variables of a `make test` around this must not reach the make inside.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS")) and k != "DATA"}
    return subprocess.run(
        ["make", *args],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def fresh_tree(tmp_path):
    """A checkout without .venv, in a folder with a space in its name."""
    tree = tmp_path / "fresh tree"
    tree.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    return tree


def fake_python(tmp_path, answers):
    """Write a python3 that exits with 1 for every program text in which one of `answers` occurs."""
    python = tmp_path / "fake-python3"
    cases = "".join(f"*{word}*) exit 1;; " for word in answers)
    python.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && {{ echo Python 3.9.9; exit; }}\ncase "$2" in {cases}esac\nexit 0\n'
    )
    python.chmod(0o755)
    return python


# Recipes.


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_run_loads(path):
    config = load_config(path)
    assert not config.schedule.without_effect


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launcher_is_accepted_by_accelerate(path):
    assert load_config_from_file(str(path)).mixed_precision == "no"


def test_unknown_launcher_key_is_refused_by_accelerate(tmp_path):
    path = tmp_path / "cpu.yaml"
    path.write_text((LAUNCH / "cpu.yaml").read_text() + "num_procs: 2\n")
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(path))


def test_cpu_launcher_starts_two_processes_that_see_no_gpu():
    config = load_config_from_file(str(LAUNCH / "cpu.yaml"))
    assert (config.num_processes, config.use_cpu, config.gpu_ids) == (2, True, "-1,-1")


@pytest.mark.parametrize("name", ["one_node.yaml", "many_nodes.yaml"])
def test_launcher_asks_for_the_number_of_processes(name):
    assert load_config_from_file(str(LAUNCH / name)).num_processes == -1


def test_mnist_is_the_example_of_the_article():
    config = load_config(LAUNCH / "mnist.toml")
    assert (config.data.name, config.data.global_batch_size) == ("mnist", 64)
    assert (config.model.name, config.model.args) == ("mlp", {"hidden": [512, 256]})
    assert (config.optimizer.name, config.optimizer.lr) == ("adam", 0.01)
    assert (config.schedule.name, config.schedule.patience, config.training.epochs) == ("plateau", 10, 100)


def test_mnist_is_784_512_256_10_with_relu():
    torch = pytest.importorskip("torch")
    from distplateau.training.parts.models import build_model

    model = build_model(load_config(LAUNCH / "mnist.toml").model, (1, 28, 28), 10)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.in_features for m in linear] + [linear[-1].out_features] == [784, 512, 256, 10]
    assert sum(isinstance(m, torch.nn.ReLU) for m in model.modules()) == 2


def test_fashion_mnist_differs_from_mnist_in_the_data_alone():
    mnist, fashion = (load_config(LAUNCH / name).model_dump() for name in ("mnist.toml", "fashion_mnist.toml"))
    for config in (mnist, fashion):
        del config["run"]["name"], config["data"]["name"]
    assert mnist == fashion


def test_readme_has_a_line_for_every_recipe():
    linked = re.findall(r"^\| \[(\S+)\]\(\1\) \| \S", (LAUNCH / "README.md").read_text(), re.MULTILINE)
    assert sorted(linked) == sorted(path.name for path in [*RUNS, *LAUNCHERS, LAUNCH / "fit.py"])


def launched(*arguments, cwd):
    command = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", LAUNCH / "cpu.yaml", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_own_code_by_name(tmp_path):
    """As a user has it: a copy of the module in the current folder, two ranks."""
    for name in ("own_code.py", "own_code.toml"):
        shutil.copy(LAUNCH / name, tmp_path)
    done = launched("-m", "distplateau", "train", "own_code.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    validations = read_ledger(tmp_path / "runs" / "own-code").validations
    assert len(validations) == 15
    assert validations[-1]["monitor"] == "val/margin"
    assert validations[-1]["metrics"]["val/accuracy"] > 0.9  # it has learned something
    assert validations[-1]["best"] == max(event["value"] for event in validations)


def test_objects_of_a_script(tmp_path):
    done = launched(LAUNCH / "fit.py", "--training.epochs", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    validations = read_ledger(tmp_path / "runs" / "fit").validations
    assert [event["ranks"] for event in validations] == [2] * 4
    assert validations[-1]["metrics"]["val/accuracy"] > 0.85


# make.


@pytest.mark.parametrize("args", [[], ["help"]])
def test_help_lists_each_target_with_its_line(args):
    done = make(*args)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  ([a-z-]+) +\S", done.stdout, re.MULTILINE)
    assert listed == TARGETS


@pytest.mark.parametrize("data", ["mnist", "", "digits fashion-mnist"])
def test_unknown_demo_is_one_line_and_exit_2_before_anything_is_installed(fresh_tree, data):
    done = make("demo", f"DATA={data}", cwd=fresh_tree)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"DATA={data}: there is no such demo; use DATA=digits or DATA=fashion-mnist" in done.stderr
    assert not (fresh_tree / ".venv").exists()


@pytest.mark.parametrize("data", ["digits", "fashion-mnist"])
def test_known_demo_names_a_config_that_exists(data):
    done = make("--dry-run", "demo", f"DATA={data}")
    assert done.returncode == 0, done.stderr
    (config,) = re.findall(r"distplateau train (\S+)", done.stdout)
    assert load_config(ROOT / config).data.name == data


@pytest.mark.parametrize(
    ("fails_at", "message"),
    [
        ("version_info", "Python 3.9.9 is too old; name a Python 3.11 or newer: make PYTHON=python3.11"),
        ("ensurepip", "comes without venv; install it, e.g. apt-get install python3-venv"),
    ],
)
@pytest.mark.parametrize("target", ["demo", "test"])
def test_unfit_python_is_named_with_the_fix(fresh_tree, tmp_path, target, fails_at, message):
    done = make(target, f"PYTHON={fake_python(tmp_path, [fails_at])}", cwd=fresh_tree)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[0]
    assert not (fresh_tree / ".venv").exists()


def test_missing_python_is_named_with_the_fix(fresh_tree):
    done = make("test", "PYTHON=no-such-python", cwd=fresh_tree)
    assert done.returncode == 2
    assert "there is no no-such-python; install Python 3.11 or newer" in done.stderr.splitlines()[0]


@pytest.fixture
def tree_with_pip(fresh_tree):
    """A fresh tree whose .venv is there and whose pip only writes down what it is asked for."""
    scripts = fresh_tree / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "pip").touch()
    (scripts / "python").write_text('#!/bin/sh\necho "$@" >>asked\n')
    (scripts / "python").chmod(0o755)
    return fresh_tree


def asked(tree):
    lines = (tree / "asked").read_text().splitlines() if (tree / "asked").exists() else []
    (tree / "asked").unlink(missing_ok=True)
    return [line.rsplit(maxsplit=1)[-1] for line in lines if line.startswith("-m pip")]


def test_packages_are_installed_once_and_again_when_pyproject_changes(tree_with_pip):
    def install(target):
        done = make(target, cwd=tree_with_pip)
        assert done.returncode == 0, done.stderr
        return asked(tree_with_pip)

    demo, test = ".venv/.installed-demo", ".venv/.installed-test"
    assert install(demo) == ["."]
    assert install(demo) == []
    assert install(test) == [".[test]"]
    assert install(test) == install(demo) == []
    newer = (tree_with_pip / test).stat().st_mtime + 10
    os.utime(tree_with_pip / "pyproject.toml", (newer, newer))
    assert install(demo) == ["."]


def test_installation_that_was_cut_short_is_done_again(tree_with_pip):
    python = tree_with_pip / ".venv" / "bin" / "python"
    working = python.read_text()
    python.write_text(working + "exit 1\n")
    assert make("install", cwd=tree_with_pip).returncode == 2
    asked(tree_with_pip)
    python.write_text(working)
    assert make("install", cwd=tree_with_pip).returncode == 0
    assert asked(tree_with_pip) == [".[test]"]


def test_pip_args_reach_pip(tree_with_pip):
    make("install", "PIP_ARGS=--index-url https://packages.example", cwd=tree_with_pip)
    assert "--index-url https://packages.example -e .[test]" in (tree_with_pip / "asked").read_text()
