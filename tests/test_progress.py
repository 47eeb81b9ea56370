"""What is printed while a run goes on."""

import re

import pytest

from distplateau.config import parse_config
from distplateau.training import progress
from distplateau.training.progress import ProgressReport

EVENT = {
    "epoch": 1.0, "step": 10, "train_loss": 0.5, "metrics": {"val/loss": 0.4}, "lr_before": [0.1], "lr_after": [0.1],
    "decision": "bad", "num_bad": 2, "best": 0.3, "samples_per_second": 1000.0,
}  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def follow(log_every, *, main=True, patience=5):
    config = parse_config({
        "tracking": {"log_every": log_every}, "data": {"global_batch_size": 64}, "training": {"epochs": 3}
    })  # fmt: skip
    return ProgressReport(config, main=main, total_steps=30, done_steps=0, steps_per_epoch=10, patience=patience)


def asked():
    raise AssertionError("it waited for the device although no line was due")


def test_a_line_every_so_many_steps_says_where_the_run_stands(clock, capsys):
    report = follow("4 steps")
    for step in range(1, 4):
        report.stepped(step, asked, asked)
    clock.now += 8
    report.stepped(4, lambda: 0.25, lambda: [0.05, 0.1])
    line = "epoch 0.40/3  step 4/30  loss 0.2500  lr 0.05  32 samples/s  0:52 left\n"
    assert capsys.readouterr().out == line
    report.validated(EVENT)
    assert "bad 2/5" in capsys.readouterr().out
    clock.now += 1
    report.stepped(12, lambda: 0.25, lambda: [0.05])
    assert "lr 0.05  best 0.3000  bad 2/5  128 samples/s" in capsys.readouterr().out


def test_a_line_every_so_many_seconds(clock, capsys):
    report = follow("1 min")
    report.stepped(1, asked, asked)
    clock.now += 59
    report.stepped(2, asked, asked)
    clock.now += 1
    report.stepped(3, lambda: 1.0, lambda: [0.1])
    report.stepped(4, asked, asked)
    assert capsys.readouterr().out.count("\n") == 1
    clock.now += 50
    report.validated(EVENT)
    clock.now += 50  # the line of the validation has just been said
    report.stepped(11, asked, asked)


def test_only_the_main_rank_talks(clock, capsys):
    report = follow("1 steps", main=False)
    report.stepped(1, asked, asked)
    report.validated(EVENT)
    report.say("hello")
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar(clock, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with follow("1 steps") as report:
        report.stepped(1, asked, asked)
        clock.now += 1
        report.stepped(2, lambda: 0.25, lambda: [0.05])
        report._bar.refresh()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "2/30 steps  loss 0.2500  lr 0.05  128 samples/s" in said


def test_a_schedule_without_patience(clock, capsys):
    report = follow("1 steps", patience=None)
    report.validated({**EVENT, "decision": "scheduled"})
    clock.now += 1
    report.stepped(11, lambda: 0.25, lambda: [0.05])
    assert "best 0.3000  64 samples/s" in capsys.readouterr().out


def test_only_shares_are_told_in_percent(clock, capsys):
    metrics = {"val/loss": 0.4, "val/accuracy": 0.75, "val/top5": 1.0, "val/margin": 2.345678}
    follow("1 min").validated({**EVENT, "metrics": metrics})
    assert "val 0.4000  accuracy 75.00 %  top5 100.00 %  margin 2.346  lr" in capsys.readouterr().out
