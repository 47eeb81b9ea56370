"""The report page: what the ledger says is what the page shows, whatever the ledger holds."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from distplateau.errors import InputError
from distplateau.lockstep import schedules
from distplateau.lockstep.plateau import PlateauRule
from distplateau.record import story
from distplateau.record import words as wording
from distplateau.record.ledger import Ledger, read_ledger
from distplateau.record.report import figures, levels
from distplateau.record.report import page as report

if TYPE_CHECKING:
    from pathlib import Path

RULE = PlateauRule(factor=0.5, patience=3, cooldown=1)
STEPS = 20
# Falls, then hovers: better at 1..9, then a plateau with some noise, then lower again.
LOSSES = [2.1, 1.5, 1.1, 0.85, 0.7, 0.6, 0.52, 0.47, 0.45, 0.46, 0.451, 0.455, 0.46, 0.41, 0.40, 0.402, 0.401]
LOSSES += [0.404, 0.401, 0.403, 0.39, 0.385, 0.391, 0.388, 0.39, 0.386, 0.387, 0.389, 0.386, 0.388]
HOSTILE = '<script>alert("x")</script> & \'"> $name $$ </title> http://evil.example'


class Run:
    """A run made up through the real decisions, so that ledger and schedule agree as they do in training."""

    def __init__(self, folder: Path, *, name="digits-baseline", schedule="plateau", rule=RULE, lrs=(0.01,), args=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.ledger = folder, Ledger(folder)
        length = schedules.Length(STEPS * 30, STEPS)
        self.schedule = schedules.build(schedule, rule, args or {}, length)
        self.state = self.schedule.start(lrs)
        self.ledger.append(
            "start", run=name, world_size=2, device="NVIDIA H100 80GB HBM3", hostname="node017", slurm_job_id="48123",
            versions={"python": "3.12.3", "torch": "2.9.0", "accelerate": "1.11.0", "distplateau": "0.1.0"},
            restart_count=0, monitor="val/loss", lrs=lrs, image_shape=(1, 8, 8), num_classes=10,
            classes=[str(i) for i in range(10)], samples={"train": 1294, "validation": 143, "test": 360},
            schedule={
                "name": schedule, "rule": {key: getattr(rule, key) for key in PlateauRule.__slots__},
                "args": args or {}, "total_steps": STEPS * 30, "steps_per_epoch": STEPS,
            },
        )  # fmt: skip

    def validate(self, *losses, ranks=2, **more):
        """Take an epoch and a validation for each loss."""
        for loss in losses:
            self.state = schedules.replace(self.state, step=self.state.step + STEPS)
            self.state, decision = self.schedule.advance(self.state, loss)
            accuracy = 1 / (1 + loss / 3) if math.isfinite(loss) else 0.1
            metrics = {"val/loss": loss, "val/accuracy": accuracy, "val/top5": accuracy**0.25}
            event = {
                "validation": decision.validation, "epoch": self.state.step / STEPS, "step": self.state.step,
                "monitor": "val/loss", "value": loss, "count": 143, "decision": decision.kind,
                "lr_before": decision.lr_before, "lr_after": decision.lr_after, "best": decision.best,
                "num_bad": decision.num_bad, "cooldown": decision.cooldown, "ranks": ranks,
                "digest": f"{decision.validation:04x}a7c3e1f09b52", "metrics": metrics, "seconds": 3.25,
                "samples_per_second": 5120.4 + 10 * decision.validation,
                "train_loss": loss * 0.93 ** (self.state.step / STEPS),
            }  # fmt: skip
            self.ledger.append("validation", **{**event, **more})
        return self

    def finish(self):
        validations = read_ledger(self.folder).validations
        best = min(validations, key=lambda e: e["value"])
        self.ledger.append(
            "finished", epoch=self.state.step / STEPS, step=self.state.step, validations=len(validations),
            best=best["value"], best_validation=best["validation"], best_step=best["step"],
            reductions=sum(e["decision"] == "reduced" for e in validations), seconds=97.5,
        )  # fmt: skip
        return self

    def report(self) -> str:
        path = report.write_report(self.folder)
        assert path == self.folder / "report.html"
        text = path.read_text(encoding="utf-8")
        check_page(text)
        return text


class Page(HTMLParser):
    """Checks that tags nest, ids are unique and nothing is fetched."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._check(attrs)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self._check(attrs)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def _check(self, attrs):
        for key, value in attrs:
            assert not key.startswith("on"), "a script"
            if key == "id":
                self.ids.append(value)
            if key in {"src", "href", "xlink:href", "data", "srcset", "action"}:
                # A comparison leads to the reports of its runs, in folders beside it.
                beside = key == "href" and re.fullmatch(r"(?!\w+:|//|/)[^?#]*/report\.html", value)
                assert value.startswith("#") or beside, f"{key}={value} leaves the page"


def check_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.seen)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"@import|url\((?!#)", text)
    targets = {name for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text) for name in pair if name}
    assert targets <= set(page.ids), "a reference inside an SVG lost its target"
    return page


def words(text: str) -> str:
    return " ".join(" ".join(check_page(text).words).split())


def marked(text: str, kind: str = "drop", figure: str = "run") -> list[int]:
    return [int(number) for number in re.findall(rf'id="{figure}-{kind}-(\d+)"', text)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "a run"
    path.mkdir(parents=True)
    return path


def test_every_reduction_of_the_ledger_is_marked_and_no_other(folder):
    text = Run(folder).validate(*LOSSES).finish().report()
    reduced = [e["validation"] for e in read_ledger(folder).validations if e["decision"] == "reduced"]
    assert len(reduced) >= 3
    assert marked(text) == reduced
    assert marked(text, figure="run-narrow") == reduced
    assert [int(n) for n in re.findall(r'id="run-drop-(\d+)-lr"', text)] == reduced
    assert text.count("without beating") == len(reduced)


def test_the_sentence_the_tiles_and_the_reasons(folder):
    run = Run(folder).validate(*LOSSES).finish()
    (folder / "evaluation.json").write_text(
        json.dumps({"test": {"loss": 0.4, "accuracy": 0.9125, "top5": 0.99, "count": 360}})
    )
    (folder / "config.toml").write_text('[run]\nname = "<b>"\n')
    text = run.report()
    said = words(text)
    assert (
        "Best val/loss 0.385 at validation 22 (epoch 22); the learning rate was reduced 3 times, "
        "from 0.01 to 0.00125, on 2 ranks." in said
    )
    assert "4 validations in a row without beating 0.45 by 0.01 % (patience 3)" in said
    assert "91.25 %" in said and "360 samples" in said
    assert "Finished" in said and "All 30 validations agreed on 2 ranks, over 143 samples" in said
    assert "001ea7c3e1f09b52" in said
    assert 'name = "<b>"' in said
    assert "Worth knowing" not in said
    assert not list(folder.glob(".partial*"))


def test_the_same_ledger_gives_the_same_bytes(folder):
    run = Run(folder).validate(*LOSSES[:12])
    assert run.report() == run.report()


def test_text_of_the_run_stays_text(folder):
    run = Run(folder, name=HOSTILE, rule=PlateauRule(patience=0))
    run.validate(1.0, 2.0, monitor=HOSTILE, metrics={HOSTILE: 1.0}, digest=HOSTILE)
    run.ledger.append("interrupted", step=40, reason=HOSTILE)
    (folder / "config.toml").write_text(HOSTILE)
    (folder / "evaluation.json").write_text(json.dumps({HOSTILE: {"loss": 1.0, "accuracy": 1, "count": 1}}))
    said = words(run.report())
    assert said.count(HOSTILE) > 8


def test_half_a_surrogate_pair_does_not_stop_the_page(folder):
    run = Run(folder, name="half")
    run.ledger.path.write_text(run.ledger.path.read_text().replace("half", "half \\ud83d"))
    assert "half &#55357;" in run.report()


def test_no_validation_yet(folder):
    said = words(Run(folder).report())
    assert "has not been validated yet" in said and "holds no validation" in said


def test_a_ledger_without_a_start(folder):
    run = Run(folder).validate(*LOSSES[:15])
    lines = run.ledger.path.read_text().splitlines(keepends=True)
    run.ledger.path.write_text("".join(lines[1:]))
    text = run.report()
    assert marked(text) == [13]
    assert "a run" in words(text)


def test_one_validation(folder):
    assert "Best val/loss 2.1 at validation 1" in words(Run(folder).validate(2.1).report())


def test_values_that_are_no_numbers(folder):
    losses = [math.nan, 2.0, math.inf, 1.5, math.nan, -math.inf, math.nan, math.nan]
    text = Run(folder).validate(*losses).report()
    said = words(text)
    assert "was NaN or infinite and was counted as bad: validations 1, 3, 5, 6, 7, 8" in said
    assert 'id="run-nonfinite"' in text
    assert marked(text) == [8]
    assert "Best val/loss 1.5" in said


def test_nothing_but_nan(folder):
    assert "No validation gave a finite val/loss" in words(Run(folder).validate(math.nan, math.nan).report())


@pytest.mark.parametrize("lr", [1e300, 1e-300, 1.0])
@pytest.mark.parametrize("losses", [(1e308, 1e-308, 5.0), (-1.0, -2.0, -1.0), (0.0, 0.0, 0.0)])
def test_numbers_of_any_size(folder, lr, losses):
    Run(folder, rule=PlateauRule(patience=1, eps=0.0), lrs=(lr,)).validate(*losses).report()


def test_a_group_each(folder):
    rule = PlateauRule(factor=(0.1, 0.5, 0.5, 0.5, 0.5), patience=0)
    text = Run(folder, rule=rule, lrs=(0.1, 0.01, 0.001, 1e-4, 1e-5)).validate(1.0, 2.0).report()
    assert [f'id="run-lr-group-{group}"' in text for group in range(6)] == [True] * 5 + [False]
    assert "\N{MULTIPLICATION SIGN}0.1 / \N{MULTIPLICATION SIGN}0.5" in words(text)
    assert "0.01 / 0.005 / 0.0005 / 5e-5 / 5e-6" in words(text)


def test_a_hundred_groups(folder):
    rule = PlateauRule(factor=tuple(0.3 + 0.005 * i for i in range(100)), patience=0, eps=0.0)
    text = Run(folder, rule=rule, lrs=tuple(1e-4 * 1.05**i for i in range(100))).validate(1.0, 2.0, 3.0).report()
    assert 'id="run-lr-group-99"' in text
    assert "to 0.0125 (100 groups)" in words(text)


def test_a_cosine_is_not_a_fence_of_markers(folder):
    text = Run(folder, schedule="cosine").validate(*LOSSES).report()
    assert len(story.lr_changes(read_ledger(folder))) == 30
    assert marked(text, "scheduled") == []
    assert "took the learning rate from 0.01 to 0," in words(text)
    assert "The cosine schedule changed it at 30 of 30 validations" in words(text)


def test_the_steps_of_a_step_schedule_are_marked(folder):
    text = Run(folder, schedule="step", args={"step_size": 10}).validate(*LOSSES).report()
    assert marked(text, "scheduled") == [10, 20, 30]
    assert "the step schedule took the learning rate from 0.01 to 1e-5" in words(text)


def test_a_schedule_that_raises(folder):
    rule = PlateauRule(factor=0.5, patience=1)
    text = Run(folder, schedule="greedy", rule=rule).validate(3.0, 2.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0).report()
    events = read_ledger(folder).validations
    for kind, name in (("raised", "raise"), ("reduced", "drop")):
        assert marked(text, name) == [e["validation"] for e in events if e["decision"] == kind] != []
    assert "2 validations in a row better than before" in words(text)


def test_warmup_is_no_change_of_the_learning_rate(folder):
    rule = PlateauRule(patience=3, warmup_steps=50)
    run = Run(folder, rule=rule).validate(*LOSSES[:5])
    assert story.lr_changes(read_ledger(folder)) == []
    epochs, rates = figures.lr_path(read_ledger(folder), 0)
    assert (epochs[0], rates[0]) == (0.0, 0.01 / 50)
    assert (2.5, 0.01) in zip(epochs, rates, strict=True)
    run.report()


def test_accuracy_as_the_monitor(folder):
    run = Run(folder, rule=PlateauRule(mode="max", patience=2))
    for accuracy in (0.5, 0.8, 0.7, 0.7, 0.7):
        metrics = {"val/loss": 1 - accuracy, "val/accuracy": accuracy}
        run.validate(accuracy, monitor="val/accuracy", metrics=metrics)
    text = run.report()
    assert "Best val/accuracy 80.00 % at validation 2 (epoch 2)" in words(text)
    assert 'id="run-best"' in text and 'id="metrics-best"' in text


def test_requeues_are_drawn_and_what_they_took_back_is_gone(folder):
    run = Run(folder).validate(*LOSSES[:12])
    before = run.state
    run.validate(9.0, 9.0)
    run.state = before
    run.ledger.append("resumed", last_validation=12, step=12 * STEPS, world_size=4, restart_count=1, slurm_job_id="1")
    text = run.validate(*LOSSES[12:], ranks=4).finish().report()
    said = words(text)
    assert "Best val/loss 0.385" in said and "on 4 ranks" in said and "2 then 4 ranks" in said
    assert "Continued once from a checkpoint: after validation 12 on 4 ranks" in said
    assert 'id="run-requeue-1"' in text and 'id="run-requeue-2"' not in text
    assert len(read_ledger(folder).validations) == 30


def test_the_status(folder):
    run = Run(folder).validate(*LOSSES[:3])
    assert "Running or interrupted" in words(run.report())
    run.ledger.append("interrupted", step=60, reason="SIGTERM")
    assert "Interrupted at step 60: SIGTERM" in words(run.report())


def test_what_is_worth_knowing(folder):
    run = Run(folder, rule=PlateauRule(patience=5)).validate(*LOSSES[:12], count=140).validate(1.0, count=143)
    with run.ledger.path.open("a") as file:
        file.write('{"event": "valid')
    (folder / "evaluation.json").write_text("[]")
    said = words(run.report())
    assert "patience 5 was never reached" in said and "the longest such row was 4, in 13 validations" in said
    assert "torn lines (the machine died while writing); they were left out: 15" in said
    assert "not over the same number of samples: 140, 143" in said
    assert "evaluation.json cannot be read" in said


def test_a_young_run_is_not_scolded(folder):
    run = Run(folder).validate(*LOSSES[:3])
    assert "never reached" not in run.report()
    assert "patience 3 was never reached" in run.finish().report()


def test_the_floor(folder):
    said = words(Run(folder, rule=PlateauRule(patience=0, min_lr=0.004)).validate(1.0, 2.0, 3.0).report())
    assert "at its floor (min_lr 0.004) since validation 2" in said
    assert "never reduced" not in said


def test_a_reduction_that_eps_blocks(folder):
    rule = PlateauRule(patience=0, eps=0.004, factor=0.5)
    run = Run(folder, rule=rule).validate(1.0, 2.0)
    assert "smaller than eps" not in words(run.report()), "0.01 to 0.005 is more than eps"
    said = words(run.validate(3.0, 4.0).report())
    assert "smaller than eps 0.004: validations 3, 4, at a learning rate of 0.005" in said


def test_requeues_that_come_before_a_plateau_can(folder):
    def interrupted_every(count):
        run = Run(folder / str(count), rule=PlateauRule(patience=3))
        for begin in range(0, 12, count):
            run.validate(*LOSSES[begin : begin + count])
            run.ledger.append("resumed", last_validation=begin + count, step=(begin + count) * STEPS, world_size=2)
        return words(run.validate(0.4).report())

    assert "requeued 4 times, after 3 validations in the median: fewer than the 4 in a row" in interrupted_every(3)
    assert "in the median" not in interrupted_every(4)


def test_settings_after_a_resume_are_told_and_used(folder):
    run = Run(folder, rule=PlateauRule(patience=1)).validate(1.0, 2.0, 3.0)
    before = dict(read_ledger(folder).start["schedule"])
    changed = {**before, "rule": {**before["rule"], "patience": 0, "factor": 0.5}}
    run.ledger.append("resumed", last_validation=3, step=3 * STEPS, world_size=2, schedule=changed)
    rule = PlateauRule(patience=0, factor=0.5)
    run.schedule = schedules.build("plateau", rule, {}, schedules.Length(STEPS * 30, STEPS))
    said = words(run.validate(4.0).report())
    assert "From validation 4 on with other settings: factor 0.1 → 0.5, patience 1 → 0." in said
    assert "2 validations in a row without beating 1 by 0.01 % (patience 1)" in said
    assert "1 validation without beating 1 by 0.01 % (patience 0)" in said


def test_time_at_each_learning_rate(folder):
    rule = PlateauRule(patience=0, factor=0.5, warmup_steps=2 * STEPS - 1)
    run = Run(folder, rule=rule).validate(5.0, 4.0, 3.0, seconds=1800.0).validate(3.5, 3.2, 2.0, 2.5, seconds=3600.0)
    history = read_ledger(run.folder)
    found = [
        (level.warmup, level.lrs, level.first, level.last, level.seconds, level.device_seconds, level.best)
        for level in levels.levels(history)
    ]
    assert sum(level[4] for level in found) == 3 * 1800 + 4 * 3600
    assert sum(level[5] for level in found) == 2 * (3 * 1800 + 4 * 3600)
    assert found[0][:4] == (True, [found[0][1][0]], 1, 1)
    assert [(level[1], level[2], level[3]) for level in found[1:]] == [
        ([0.01], 2, 4), ([0.005], 5, 5), ([0.0025], 6, 7)
    ]  # fmt: skip
    assert [level.best for level in levels.levels(history)] == [5.0, 3.0, 3.2, 2.0]
    assert [level.is_better for level in levels.levels(history)] == [True, True, False, True]
    assert "came after the best" not in words(run.report())
    said = words(run.finish().report())
    assert "11 GPU hours. 1 h 00 min of it (18 %) came after the best validation" in said


def test_a_schedule_of_the_clock_has_no_levels(folder):
    assert "The cosine schedule changed it all the time" in words(
        Run(folder, schedule="cosine").validate(*LOSSES).report()
    )


def test_hours_of_a_cpu_are_not_those_of_a_gpu(folder):
    run = Run(folder).validate(1.0)
    assert levels.device_unit(read_ledger(folder)) == "GPU hours"
    text = run.ledger.path.read_text().replace("NVIDIA H100 80GB HBM3", "CPU")
    run.ledger.path.write_text(text)
    assert levels.device_unit(read_ledger(folder)) == "rank hours"


def test_figures_for_slides_and_papers(folder):
    run = Run(folder).validate(*LOSSES)
    run.report()
    names = ["curves.png", "curves.svg", "metrics.png", "metrics.svg"]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == names
    first = {name: (folder / "figures" / name).read_bytes() for name in names}
    assert first["curves.png"][:4] == b"\x89PNG" and b"validation loss" in first["curves.svg"]
    run.report()
    assert {name: (folder / "figures" / name).read_bytes() for name in names} == first, "the same ledger, the same file"


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="has no ledger"):
        report.write_report(tmp_path)


def test_a_long_run_stays_a_small_page(folder):
    run = Run(folder, rule=PlateauRule(factor=0.97, patience=0))
    # The ledger syncs each line to the disk; written at once, two thousand take no time.
    run.validate(1.0, 2.0)
    start, *events = run.ledger.path.read_text().splitlines()
    last = json.loads(events[-1])
    more = [json.dumps({**last, "validation": n, "epoch": n * 1.0, "step": n * STEPS}) for n in range(3, 2001)]
    run.ledger.path.write_text("\n".join([start, *events, *more]) + "\n")
    assert len(run.report()) < 9_000_000


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.01, "0.01"), (1e-5, "1e-5"), (1.25e-10, "1.25e-10"), (1e300, "1e300"), (1200, "1,200"), (23.0, "23"),
        (2.5, "2.5"), (0.0, "0"), (math.nan, "nan"), (math.inf, "inf"), (-3.0, "-3"),
    ],
)  # fmt: skip
def test_numbers_read_well(number, text):
    assert wording.short(number) == text


def test_neither_torch_nor_matplotlib_until_it_draws(folder):
    Run(folder).validate(*LOSSES[:3])
    code = (
        "import sys; from distplateau.record.report import page as report\n"
        "assert 'matplotlib' not in sys.modules, 'matplotlib at import'\n"
        f"report.write_report({str(folder)!r})\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert not {'torch', 'matplotlib.pyplot', 'numpy.random._pickle_torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_drawing_leaves_the_settings_of_matplotlib_alone(folder):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    Run(folder).validate(*LOSSES[:3]).report()
    assert dict(mpl.rcParams) == before


def test_a_figure_can_be_saved_as_a_picture(folder, tmp_path):
    Run(folder).validate(*LOSSES)
    figures.draw_run(read_ledger(folder)).savefig(tmp_path / "run.png", dpi=60)
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium): the page is not rendered")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_renders_it(folder, tmp_path, width):
    assert CHROMIUM
    Run(folder).validate(*LOSSES).finish().report()
    shot = tmp_path / "page.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [CHROMIUM, *flags.split(), "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1800", f"--screenshot={shot}"]
    subprocess.run([*command, (folder / "report.html").as_uri()], check=True, timeout=120, capture_output=True)

    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (1800, width)
    background = pixels[2, 2]
    drawn = (abs(pixels - background) > 0.02).any(axis=-1)
    # A page without its style or its figures would be far emptier.
    assert drawn.mean() > 0.3
    # The page does not run out of the screen on the right.
    assert not drawn[:, -6:].any()
