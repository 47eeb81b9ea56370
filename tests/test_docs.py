"""README and recipes: links that exist, commands and figures that hold."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from distplateau.lockstep.schedules import SCHEDULES

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "runs", "data"} & set(path.relative_to(ROOT).parts))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_readme_names_only_files_that_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:launch|benchmarks)/[\w./-]+\.(?:toml|yaml|py)", text)):
        assert (ROOT / name).exists(), name


def test_readme_lists_every_schedule():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in SCHEDULES)


def test_readme_mistake_is_what_the_command_says(capsys, monkeypatch):
    from distplateau.cli import main

    monkeypatch.chdir(ROOT)
    assert main(["train", "launch/demo.toml", "--schedule.patiance", "3"]) == 2
    said = capsys.readouterr().err.strip()
    shown = re.search(r"^distplateau: schedule.patiance.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown
    assert said.startswith(shown.group().removesuffix(", ..."))


def test_readme_loop_runs(capsys):
    """The loop of the README, with a model and data around it."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    model = torch.nn.Linear(3, 2)
    loader = DataLoader(TensorDataset(torch.randn(20, 3), torch.zeros(20, dtype=torch.long)), batch_size=8)

    class Accelerator:
        def prepare(self, *parts):
            return parts

    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "accelerator": Accelerator(),
        "validation_loader": loader,
        "train_one_epoch": lambda model, optimizer: None,
        "epochs": 5,
    }
    exec(code.group(1), names)
    assert names["decision"].validation == 5
    assert names["metric"].count == 20


def test_version_is_the_same_everywhere():
    import distplateau

    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == distplateau.__version__
