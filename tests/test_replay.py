"""replay: the rule on recorded curves, what it can know and what it cannot, and curves from other tools."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distplateau.cli import main
from distplateau.errors import InputError
from distplateau.lockstep import plateau
from distplateau.lockstep.plateau import PlateauRule
from distplateau.record.ledger import read_ledger
from distplateau.record.replay import curves
from distplateau.record.replay import figure as replay_figure
from distplateau.record.replay import rerun as module
from distplateau.record.replay.curves import Curve, read_curve
from distplateau.record.replay.rerun import noise_of, replay, suggest_patience
from distplateau.record.replay.table import print_replay
from ranks import run_ranks
from test_report import LOSSES, RULE, Run
from test_trainer import make_config
from test_verify import _train_config

CLIENTS = Path(__file__).parent / "clients"
property_test = settings(deadline=None, derandomize=True, max_examples=150)
values_of_a_run = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=40)


def make_curve(values, rates=None, **more) -> Curve:
    """Make a curve whose run kept its learning rate, or had `rates` after each validation."""
    places = tuple(float(place) for place in range(1, len(values) + 1))
    rates = [0.1] * len(values) if rates is None else rates
    shape = {"source": "made up", "monitor": "val_loss", "positions": places, "axis": "epoch", "start_lrs": (0.1,)}
    lr_after = tuple(None if rate is None else (rate,) for rate in rates)
    return Curve(**{**shape, "values": tuple(values), "lr_after": lr_after, "picture": Path("x"), **more})


def outcomes(curve, fixed=None, lr=None, **varied):
    return replay(curve, varied, fixed or {}, lr).outcomes


# The rule on a curve.


@pytest.mark.parametrize(
    ("schedule", "rule", "args"),
    [
        ("plateau", RULE, {}),
        ("plateau", PlateauRule(factor=(0.5, 0.1), patience=1, min_lr=(0.0, 1e-3), smoothing=0.4, warmup_steps=70), {}),
        ("greedy", PlateauRule(factor=0.8, patience=1, warmup_steps=30), {"raise_cooldown": 1, "max_lr": 0.03}),
    ],
    ids=["plateau", "groups", "greedy"],
)
def test_the_settings_of_a_run_decide_what_the_run_decided(tmp_path, schedule, rule, args):
    lrs = (0.01, 0.02) if isinstance(rule.factor, tuple) else (0.01,)
    Run(tmp_path, schedule=schedule, rule=rule, args=args, lrs=lrs).validate(*LOSSES).finish()
    curve = read_curve(str(tmp_path))
    [own] = [one for one in replay(curve, {}, {}, None).outcomes if one.as_recorded]
    assert own.lr_after == curve.lr_after
    assert (own.first_difference, own.hypothetical) == (None, 0)
    changed = [e["validation"] for e in read_ledger(tmp_path).validations if e["decision"] in {"reduced", "raised"}]
    assert [change.validation for change in own.changes] == changed


def test_a_trained_run_is_replayed(tmp_path):
    schedule = {"patience": 0, "factor": 0.5, "threshold": 0.1, "warmup_steps": 30, "smoothing": 0.2}
    run_ranks(_train_config, 1, make_config(tmp_path, schedule=schedule, training={"epochs": 8}))
    curve = read_curve(str(tmp_path / "run"))
    own, patient = outcomes(curve, patience=[0, 20])
    assert own.as_recorded and own.first_difference is None and own.reductions
    assert patient.first_difference == own.reductions[0].validation
    accuracy = read_curve(str(tmp_path / "run"), "val/accuracy")
    assert (accuracy.mode, replay(accuracy, {}, {}, None).rule.mode) == ("max", "max")
    assert not any(one.as_recorded for one in replay(accuracy, {}, {}, None).outcomes)


@property_test
@given(
    values_of_a_run, st.integers(0, 4), st.sampled_from([0.1, 0.5]), st.sampled_from([0.0, 1e-4, 0.1]),
    st.integers(0, 3), st.sampled_from(["min", "max"]),
)  # fmt: skip
def test_torchs_class_decides_the_same(values, patience, factor, threshold, cooldown, mode):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor, patience, threshold, cooldown=cooldown
    )
    expected = []
    for value in values:
        reference.step(value)
        expected.append((optimizer.param_groups[0]["lr"],))
    [outcome] = outcomes(
        make_curve(values), {"mode": mode}, patience=[patience], factor=[factor], threshold=[threshold],
        cooldown=[cooldown],
    )  # fmt: skip
    assert list(outcome.lr_after) == expected


def lived(seed: int, patience: int, validations: int = 40):
    """Live through a training whose loss depends on the learning rates it had: the curve that a run would measure."""
    rng = random.Random(seed)
    noise = [rng.gauss(0, 0.05) for _ in range(validations)]
    rule = PlateauRule(patience=patience, factor=0.5)
    state, loss, values, rates = plateau.start(rule, (0.1,)), 3.0, [], []
    for shock in noise:
        loss = max(0.2, loss - 2.0 * state.lrs[0] + 8 * state.lrs[0] ** 2)
        values.append(loss + shock * (1 + 10 * state.lrs[0]))
        state, decision = plateau.advance(rule, state, values[-1])
        rates.append(decision.lr_after[0])
    return values, rates


@pytest.mark.parametrize("seed", range(20))
def test_up_to_the_first_difference_a_replay_is_what_would_have_happened(seed):
    """The oracle is the other run itself, lived through with the other patience."""
    values, rates = lived(seed, 3)
    for patience in (0, 1, 2, 5, 8):
        other_values, other_rates = lived(seed, patience)
        [outcome] = outcomes(make_curve(values, rates), patience=[patience], factor=[0.5])
        known = len(values) if outcome.first_difference is None else outcome.first_difference
        assert [rate for (rate,) in outcome.lr_after[:known]] == other_rates[:known]
        assert other_values[:known] == values[:known]
        assert outcome.hypothetical == len(values) - known
        assert all(change.hypothetical == (change.validation > known) for change in outcome.changes)
        if known < len(values):
            assert other_values[known:] != values[known:]  # why it is called a guess


def test_differences_of_every_kind_in_words():
    values = [1.0, 0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0]
    curve = make_curve(values, [0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125])  # patience 1, factor 0.5
    table = printed(replay(curve, {"patience": [0, 1, 3], "factor": [0.5, 0.1]}, {}, None))
    rows = {tuple(line.split()[:2]): line for line in table.splitlines()[5:11]}
    assert "3: reduced" in rows["0", "0.5"]
    assert re.search(r"4, 6, 8 +0\.0125 +none +0 of 8$", rows["1", "0.5"])
    assert re.search(r"4, \(6\), \(8\) +\(0\.0001\) +4: to 0\.01, not 0\.05 +4 of 8$", rows["1", "0.1"])
    assert re.search(r"\(6\) +\(0\.05\) +4: waited +4 of 8$", rows["3", "0.5"])
    [other] = outcomes(curve, lr=0.2, patience=[1], factor=[0.5])
    assert (other.first_difference, other.hypothetical) == (0, 8)
    assert "from 0.2, not 0.1" in printed(replay(curve, {"patience": [1]}, {}, 0.2))


def test_a_curve_without_learning_rates_is_taken_as_constant():
    curve = make_curve([1.0, 1.1, 1.2, 1.3], [None] * 4, start_lrs=())
    [outcome] = outcomes(curve, patience=[1], factor=[0.5])
    assert (outcome.first_difference, outcome.final_lrs) == (3, (0.5,))
    assert "recorded: no learning rate; it is taken as constant" in printed(replay(curve, {}, {}, None))


def test_nan_stops_a_rule_that_says_so(tmp_path):
    rule = PlateauRule(patience=2, nonfinite="bad")
    Run(tmp_path, rule=rule).validate(1.0, 0.9, math.nan, 0.8)
    curve = read_curve(str(tmp_path))
    [bad] = outcomes(curve, patience=[2])
    assert (len(bad.lr_after), bad.stopped_at) == (4, None)
    [stopped] = outcomes(curve, {"nonfinite": "raise"}, patience=[2])
    assert (len(stopped.lr_after), stopped.stopped_at) == (2, 3)


def test_a_run_on_a_clock_is_a_guess_from_the_beginning(tmp_path):
    Run(tmp_path, schedule="cosine", rule=PlateauRule()).validate(*LOSSES)
    result = replay(read_curve(str(tmp_path)), {}, {}, None)
    assert {outcome.first_difference for outcome in result.outcomes} == {1}
    assert not any(outcome.as_recorded for outcome in result.outcomes)
    assert "moved all along" in result.suggestion.reason


# The suggestion.


def test_a_known_lull_is_the_suggestion():
    falling = [2 - 0.1 * k for k in range(8)]
    for length in (1, 2, 5, 9):
        values = [*falling, *[1.32] * length, *[1.2 - 0.1 * k for k in range(5)]]
        found = suggest_patience(make_curve(values), PlateauRule())
        assert (found.patience, found.lull) == (length, (9, 8 + length))
        assert f"was {length} validation" in found.reason
        waits, cuts = outcomes(make_curve(values), patience=[length, length - 1])
        assert not waits.reductions
        assert cuts.reductions[0].validation == 8 + length


def test_a_lull_that_a_drop_ended_does_not_count():
    values = [*(2 - 0.1 * k for k in range(8)), 1.32, 1.25, 1.32, 1.32, 1.32, 1.32, *(1.2 - 0.1 * k for k in range(5))]
    kept = suggest_patience(make_curve(values), PlateauRule())
    dropped = suggest_patience(make_curve(values, [0.1] * 13 + [0.01] * 6), PlateauRule())
    assert (kept.patience, dropped.patience) == (4, 1)


def test_a_lull_after_a_drop_is_left_to_the_cooldown():
    values = [*(2 - 0.1 * k for k in range(8)), 1.4, 1.4, 1.4, *(1.2 - 0.1 * k for k in range(5))]
    curve = make_curve(values, [0.1] * 7 + [0.01] * 9)
    assert suggest_patience(curve, PlateauRule()).patience == 3
    assert suggest_patience(curve, PlateauRule(cooldown=2)).patience == 1


def test_luck_on_a_flat_stretch_is_no_recovery(monkeypatch):
    """With negative control: counting every new best asks for several times the patience."""
    patiences = {}
    for margin in (module._SIGNIFICANT, 0.0):
        monkeypatch.setattr(module, "_SIGNIFICANT", margin)
        patiences[margin] = []
        for seed in range(30):
            rng = random.Random(seed)
            values = [2 * 0.7**k + 0.5 + rng.gauss(0, 0.01) for k in range(80)]
            patiences[margin].append(suggest_patience(make_curve(values), PlateauRule()).patience)
    significant, any_gain = patiences.values()
    assert sorted(significant)[15] <= 3
    assert sum(any_gain) > 3 * sum(significant)


def brute_force(curve: Curve, rule: PlateauRule) -> int:
    """The smallest patience whose reductions all lie where the curve had nothing more to gain at that rate."""
    cuts = [0, *(k + 1 for k in range(len(curve.values) - 1) if k and curve.lr_after[k] != curve.lr_after[k - 1])]
    for patience in range(len(curve.values)):
        state = plateau.start(PlateauRule(), (1.0,))
        early = False
        for place, value in enumerate(curve.values):
            if place in cuts:
                state = plateau.replace(state, num_bad=0)
            patient = plateau.replace(rule, patience=patience, factor=0.5, eps=0.0)
            best = min(curve.values[:place], default=math.inf)
            state, decision = plateau.advance(patient, state, value)
            end = min([cut for cut in cuts if cut > place], default=len(curve.values))
            begin = max(cut for cut in cuts if cut <= place)
            noise = noise_of([curve.values[begin:end]])
            later = curve.values[place + 1 : end]
            early |= decision.reduced and any(v < best - module._SIGNIFICANT * noise for v in later)
        if not early:
            return patience
    raise AssertionError("no patience is long enough")


@pytest.mark.parametrize("seed", range(40))
def test_the_suggestion_is_that_of_trying_every_patience(seed):
    rng = random.Random(seed)
    values = [3 * math.exp(-k / rng.uniform(5, 20)) + rng.gauss(0, 0.08) + 1 for k in range(50)]
    rates = [0.1] * 50 if seed % 2 else [0.1] * 20 + [0.01] * 30
    curve, rule = make_curve(values, rates), PlateauRule(threshold=0.0)
    assert suggest_patience(curve, rule).patience == max(1, brute_force(curve, rule))


def test_noise_is_measured_beside_a_trend_and_spikes():
    rng = random.Random(0)
    clean = [5 - 0.03 * k for k in range(1000)]
    noisy = [value + rng.gauss(0, 0.2) for value in clean]
    assert noise_of([clean]) < 1e-12
    assert noise_of([noisy]) == pytest.approx(0.2, rel=0.1)
    spiked = [value + (50 if k % 40 == 0 else 0) for k, value in enumerate(noisy)]
    assert noise_of([spiked]) == pytest.approx(0.2, rel=0.2)
    assert noise_of([[1.0, math.nan, 2.0, 3.0]]) == 0.0


def test_each_learning_rate_has_its_own_noise(monkeypatch):
    """A loud stretch before a drop, a quiet one after it: with one noise for both, luck in the loud one counts."""
    rng = random.Random(1)
    loud, quiet = [1 + rng.gauss(0, 0.1) for _ in range(12)], [0.5 + rng.gauss(0, 1e-4) for _ in range(40)]
    curve = make_curve([*loud, *quiet], [0.1] * 11 + [0.01] * 41)
    overall = noise_of([loud, quiet])
    assert overall < 1e-3
    assert suggest_patience(curve, PlateauRule()).patience == 1
    monkeypatch.setattr(module, "noise_of", lambda _stretches: overall)
    assert suggest_patience(curve, PlateauRule()).patience > 1


def test_too_few_validations_give_no_suggestion():
    found = suggest_patience(make_curve([1.0, 0.9, 0.8, 0.7, math.nan]), PlateauRule())
    assert (found.patience, found.reason) == (None, "4 validations are too few to tell noise from a plateau")
    table = printed(replay(make_curve([1.0, 0.9]), {}, {}, None))
    assert "No suggestion: 2 validations are too few" in table


def test_without_options_the_table_has_the_runs_own_patience_and_the_suggestion(tmp_path):
    Run(tmp_path, rule=PlateauRule(patience=7)).validate(*LOSSES)
    result = replay(read_curve(str(tmp_path)), {}, {}, None)
    assert {7, result.suggestion.patience} <= {outcome.settings["patience"] for outcome in result.outcomes}


# Other tools.

LOGGED = [1.0, 0.8, 0.7, 0.71, 0.72, 0.73, 0.6, 0.61, 0.62, 0.63, 0.64]


def client(script, folder):
    pytest.importorskip("transformers" if "huggingface" in script else "lightning")
    done = subprocess.run(
        [sys.executable, CLIENTS / script, folder, json.dumps(LOGGED)],
        capture_output=True, text=True, check=True, timeout=240, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("script", "place", "monitor"),
    [
        ("lightning_logged.py", "lightning_logs/version_0", "val_loss"),
        ("lightning_logged.py", "lightning_logs/version_0/metrics.csv", "val_loss"),
        ("huggingface_logged.py", ".", "eval_loss"),
        ("huggingface_logged.py", "trainer_state.json", "eval_loss"),
    ],
    ids=["lightning-folder", "lightning-csv", "huggingface-folder", "huggingface-file"],
)
def test_what_a_real_trainer_logged_is_read_and_decided_alike(logged, script, place, monitor):
    folder, rates = logged(script)
    curve = read_curve(str(folder / place))
    assert (curve.monitor, list(curve.values)) == (monitor, pytest.approx(LOGGED))
    assert curve.start_lrs == (0.1,)
    assert [rate for (rate,) in curve.lr_after[:-1]] == pytest.approx(rates[:-1])
    assert curve.lr_after[-1] is None  # nothing is logged after the last validation
    as_run, patient = outcomes(curve, patience=[1, 3], factor=[0.5])
    assert (as_run.first_difference, [rate for (rate,) in as_run.lr_after]) == (None, pytest.approx(rates))
    assert patient.first_difference == 5


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Run a trainer of another library once."""
    done = {}

    def run(script):
        if script not in done:
            folder = tmp_path_factory.mktemp(script.partition("_")[0])
            done[script] = folder, client(script, folder)
        return done[script]

    return run


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    wandb = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    run = wandb.init(mode="offline", dir=str(folder), project="p", settings=wandb.Settings(silent=True, console="off"))
    for epoch, value in enumerate(LOGGED, start=1):
        run.log({"epoch": epoch, "train/loss": 1.0, "lr": 0.1 if epoch < 6 else 0.05})
        run.log({"epoch": epoch, "val": {"loss": math.nan if epoch == 8 else value}, "note": "text"})
    run.finish()
    [found] = (folder / "wandb").glob("offline-run-*")
    return found


def test_an_offline_wandb_run_is_read(offline_run):
    for source in (offline_run, next(offline_run.glob("*.wandb"))):
        curve = read_curve(str(source))
        assert curve.monitor == "val.loss"
        expected = [math.nan if k == 7 else value for k, value in enumerate(LOGGED)]
        assert list(curve.values) == pytest.approx(expected, nan_ok=True)
        assert curve.positions == tuple(map(float, range(1, 12)))
        assert curve.lr_after == (((0.1,),) * 4 + ((0.05,),) * 6 + (None,))


def test_a_broken_wandb_file_is_one_line(tmp_path):
    (tmp_path / "run-x.wandb").write_bytes(b"no such format" * 100)
    with pytest.raises(InputError, match=r"run-x.wandb: wandb cannot read a history from it \(.*\); export the run"):
        read_curve(str(tmp_path))


def test_a_wandb_run_is_read_through_the_api(monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked = []

    class Api:
        def __init__(self, timeout):
            assert timeout <= 30

        def run(self, name):
            asked.append(name)
            return self

        def scan_history(self):
            return [{"epoch": k, "val/acc": v, "lr": None, "_step": k} for k, v in enumerate([0.5, "NaN", 0.7], 1)]

    monkeypatch.setattr(wandb, "Api", Api)
    curve = read_curve("wandb:me/mine/abc123")
    assert asked == ["me/mine/abc123"]
    assert (curve.monitor, curve.mode, curve.start_lrs) == ("val/acc", "max", ())
    assert list(curve.values) == pytest.approx([0.5, math.nan, 0.7], nan_ok=True)
    assert curve.picture == Path("abc123-replay")
    monkeypatch.setattr(Api, "scan_history", lambda self: [])
    with pytest.raises(InputError, match="holds no history"):
        read_curve("wandb:me/mine/abc123")


def test_a_wandb_server_that_cannot_be_reached_is_one_line(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import sys; from distplateau.record.replay import curves; from distplateau.cli import main; "
        "curves._API_SECONDS = 3; "
        "sys.exit(main(['replay', 'wandb:me/mine/abc123']))"
    )
    environment = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - begin < 60
    said = done.stderr.splitlines()[-1]
    assert re.match(r"distplateau: wandb:me/mine/abc123: cannot be read \(.*\); check the name, the network and", said)


# CSV files.


def write_csv(path: Path, columns: dict[str, list], delimiter=",", bom=False) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    path.write_text(("\ufeff" if bom else "") + buffer.getvalue(), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["epoch", "loss", "accuracy", "val_loss", "val_accuracy"], "val_loss"),
        (["epoch", "train_loss", "valid_loss", "error_rate", "time"], "valid_loss"),
        (["Step", "Training Loss", "Validation Loss"], "Validation Loss"),
        (["step", "loss"], "loss"),
        (["epoch", "train/acc", "val/acc"], "val/acc"),
        (["epoch", "val_loss_step", "val_loss_epoch", "test_loss"], "val_loss_epoch"),
        (["epoch", "train_loss", "test_loss"], "test_loss"),
        (["epoch", "lr", "lossy", "metric"], None),
        (["epoch", "val_loss/a", "val_loss/b"], None),
        (["epoch", "train_loss", "train_acc"], None),
    ],
)
def test_the_column_is_found_or_asked_for(tmp_path, names, expected):
    path = write_csv(tmp_path / "log.csv", {name: [k + 1 for k in range(3)] for name in names})
    if expected:
        assert read_curve(path).monitor == expected
        return
    others = [name for name in names if name not in {"epoch", "lr"}]
    with pytest.raises(InputError) as caught:
        read_curve(path)
    assert str(caught.value) == f"{path}: which column is the curve?; give --monitor NAME, one of: {', '.join(others)}"
    assert read_curve(path, others[0]).monitor == others[0]


@pytest.mark.parametrize(("delimiter", "bom"), [(",", False), (";", True), ("\t", True)])
def test_spreadsheets_write_it_their_way(tmp_path, delimiter, bom):
    columns = {"Epoch": [1, 2, 3], "val_loss": ["0.5", "nan", "4e-1"], "comment": ["a,b", "", 'say "x"']}
    curve = read_curve(write_csv(tmp_path / "my log.csv", columns, delimiter, bom))
    assert list(curve.values) == pytest.approx([0.5, math.nan, 0.4], nan_ok=True)
    assert (curve.axis, curve.positions) == ("epoch", (1.0, 2.0, 3.0))
    assert curve.picture == tmp_path / "my log-replay"


def test_a_learning_rate_in_the_row_of_the_validation(tmp_path):
    """It may have been logged before the decision or after it: a drop cannot have been decided at a new best."""
    after = {"epoch": range(1, 7), "val_loss": [1.0, 0.9, 0.95, 0.8, 0.7, 0.6], "lr": [1, 1, 0.5, 0.5, 0.5, 0.5]}
    before = {**after, "lr": [1, 1, 1, 0.5, 0.5, 0.5]}
    for columns in (after, before):
        curve = read_curve(write_csv(tmp_path / "log.csv", columns))
        assert [rate[0] for rate in curve.lr_after[:5]] == [1, 1, 0.5, 0.5, 0.5]
        [outcome] = outcomes(curve, patience=[0], factor=[0.5])
        assert outcome.first_difference is None


def test_groups_have_columns_of_their_own(tmp_path):
    columns = {"val_loss": [1.0, 1.0], "lr/group0": [0.1, 0.1], "lr/group10": [0.3, 0.3], "lr/group2": [0.2, 0.2]}
    curve = read_curve(write_csv(tmp_path / "log.csv", columns))
    assert curve.start_lrs == (0.1, 0.2, 0.3)
    assert (curve.axis, curve.positions) == ("validation", (1.0, 2.0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty or has no header line; give a CSV whose first line names its columns"),
        ("a.csv", "1,2\n3,4\n", "has no header line"),
        ("a.csv", "val_loss\n", "holds no column of numbers"),
        ("a.csv", "val_loss\nabc\n", "holds no column of numbers"),
        ("a.csv", b"val_loss\n\xff\xfe\n", "cannot be read"),
        ("a.csv", "val_loss\n\x00\n", "."),
        ("a.json", "{}", "is no trainer_state.json of the HF Trainer"),
        ("a.json", "[1", "is no trainer_state.json"),
        ("a.json", '{"log_history": [3]}', "is no trainer_state.json"),
        ("a.json", '{"log_history": []}', "holds no column of numbers"),
        ("a.parquet", "x", "is of a kind that is not known; give a run folder, a .csv"),
        ("ledger.jsonl", "{}", "holds no event"),
        ("ledger.jsonl", '{"event":"start"}\n', "holds no validation yet"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["replay", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing: there is no such file or folder"),
        (["."], "holds no ledger.jsonl and no record of another tool"),
        (
            ["log.csv", "--monitor", "val_los"],
            "--monitor = 'val_los': log.csv has no such column; did you mean 'val_loss'?",
        ),
        (["log.csv", "--patience", "x"], "argument --patience: 'x' is no list of numbers such as 3,5,10"),
        (["log.csv", "--patience", "1.5"], "is no list of numbers such as 3,5,10"),
        (["log.csv", "--patience", "-1"], "patience=-1 must not be negative"),
        (["log.csv", "--factor", "1.5"], "factor=1.5 must be at least 0 and below 1"),
        (["log.csv", "--smoothing", "1"], "smoothing=1.0 must be"),
        (["log.csv", "--lr", "0"], "argument --lr: '0' is no number above 0"),
        (["log.csv", "--lr", "1e-12"], "eps=1e-08 blocks every drop"),
        (
            ["log.csv", "--schedule", "greeedy"],
            "--schedule = 'greeedy': there is no such schedule; did you mean 'greedy'?",
        ),
        (["log.csv", "--schedule", "cosine"], "--schedule = 'cosine': it goes by the clock and decides nothing"),
        (["log.csv", "--patience", ",".join(map(str, range(501)))], "501 combinations are more than anybody reads"),
        (["log.csv", "--rate", "1"], "--rate: is no option of this command"),
        (["wandb:x"], "wandb:x: names no run; write wandb:ENTITY/PROJECT/RUN_ID"),
        (["log.csv", "--out", "log.csv"], "the picture cannot be written"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "log.csv", {"epoch": [1, 2], "val_loss": [0.5, 0.4]})
    assert main(["replay", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


# What a person sees.


def printed(result) -> str:
    stream = io.StringIO()
    print_replay(result, stream)
    return stream.getvalue()


def test_the_command_prints_a_table_and_draws_pictures(tmp_path, capsys):
    run_dir = tmp_path / "one run"
    run_dir.mkdir()
    Run(run_dir).validate(*LOSSES).finish()
    assert main(["replay", str(run_dir), "--patience", "1,3,10", "--factor", "0.5,0.1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "digits-baseline: val/loss (smaller is better), 30 validations",
        "recorded: plateau schedule, learning rate 0.01 to 0.00125, reduced at 13, 19, 26",
        "replayed: plateau schedule, threshold 0.0001 (rel), cooldown 1",
    ]
    assert [line.split()[:3] for line in said[5:11]] == [
        ["1", "0.5", "6"], ["1", "0.1", "6"], ["3", "0.5", "3"], ["3", "0.1", "3"], ["10", "0.5", "0"],
        ["10", "0.1", "0"],
    ]  # fmt: skip
    assert re.search(r"13, 19, 26 +0\.00125 +the run itself +0 of 30$", said[7])
    assert said[12].startswith("What this cannot know: up to its first difference a combination would have trained as")
    assert said[13].startswith("Suggestion: patience ")
    assert all(line == line.rstrip() and "\x1b" not in line for line in said)
    svg, png = run_dir / "replay.svg", run_dir / "replay.png"
    assert said[-1] == f"picture {svg}, {png}"
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text(encoding="utf-8")
    assert len(re.findall(r'id="row-\d+"', text)) > 6
    assert all(word in text for word in ("patience 3, factor 0.5 (the run)", "3 reductions", 'id="curve"'))
    before = svg.read_bytes()
    assert main(["replay", str(run_dir), "--patience", "1,3,10", "--factor", "0.5,0.1"]) == 0
    assert svg.read_bytes() == before  # the same record gives the same picture


def test_pictures_of_several_records_go_to_one_folder(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Run(tmp_path / name).validate(*LOSSES)
    assert main(["replay", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out" / "deep")]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "deep").iterdir()) == [
        "replay-1.png", "replay-1.svg", "replay-2.png", "replay-2.svg",
    ]  # fmt: skip
    assert not (tmp_path / "a" / "replay.svg").exists()
    assert capsys.readouterr().out.count("Suggestion:") == 2


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_the_table_fits(tmp_path, monkeypatch, width):
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    Run(tmp_path).validate(*LOSSES)
    options = {"patience": [1, 3], "factor": [0.5, 0.1], "schedule": ["plateau", "greedy"]}
    text = printed(replay(read_curve(str(tmp_path)), options, {}, None))
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert plain != text
    assert max(map(len, plain.splitlines())) <= width
    assert "thetical" in plain
    assert "\N{HORIZONTAL ELLIPSIS}" not in plain
    assert Console(width=width).width == width


@pytest.mark.parametrize(
    "values",
    [[1.0], [math.nan, math.nan], [1.0, math.inf, 2.0], [-3.0, -4.0, -4.1], [0.0, 0.0], [1e300, 1e-300] * 50],
    ids=["one", "nan", "inf", "negative", "zero", "extreme"],
)
def test_odd_curves_are_drawn(tmp_path, values):
    result = replay(make_curve(values), {"patience": list(range(45))}, {}, None)
    svg, png = replay_figure.save_replay(result, tmp_path / "replay")
    assert svg.stat().st_size and png.stat().st_size
    assert "5 more combinations in the table" in svg.read_text(encoding="utf-8")
    assert printed(result)


def test_a_long_curve_takes_moments(tmp_path):
    rng = random.Random(0)
    values = [1 / (1 + k / 100) + rng.gauss(0, 0.01) for k in range(5000)]
    begin = time.monotonic()
    result = replay(make_curve(values), {"patience": list(range(20))}, {}, None)
    replay_figure.save_replay(result, tmp_path / "replay")
    assert time.monotonic() - begin < 30


def test_names_of_other_tools_are_taken_as_they_are():
    for name in ("val/accuracy", "val_f1", "Dice", "mAP", "eval_exact_match", "top5"):
        assert curves._mode(name) == "max", name
    for name in ("val_loss", "val/loss", "perplexity", "error_rate", "mae", "wer"):
        assert curves._mode(name) == "min", name


def test_neither_command_imports_torch(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    Run(run_dir).validate(*LOSSES).finish()
    code = (
        "import sys; from distplateau.cli import main; "
        "sys.exit(main(sys.argv[1:]) or ('torch' in sys.modules and 'torch was imported'))"
    )
    for command in ("verify", "replay"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, run_dir], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
