"""verify: real runs follow, and no change of one escapes."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import struct
from pathlib import Path

import pytest

from distplateau.cli import main
from distplateau.errors import InputError
from distplateau.record import verify as module
from distplateau.record.ledger import FILE_NAME, Ledger, encode, read_lines
from distplateau.record.verify import verify
from ranks import run_ranks
from test_trainer import StoppedError, _train_until, make_config

PLATEAU = {
    "schedule": {"patience": 0, "factor": 0.5, "threshold": 0.05, "cooldown": 1, "smoothing": 0.3, "warmup_steps": 30},
    "training": {"epochs": 10},
}
RUNS = {
    "plateau": PLATEAU,
    "groups": {
        "optimizer": {"groups": [{"match": "bias", "lr": 0.1}]},
        "schedule": {"factor": [0.5, 0.1], "threshold": 0.5, "min_lr": [0.004, 0.0], "eps": 1e-3, "start_after": 1},
        "training": {"validate_every": "7 steps", "epochs": 3},
    },
    "accuracy": {"schedule": {"monitor": "val/accuracy", "threshold": 0.01, "threshold_mode": "abs"}},
    "greedy": {
        "schedule": {"name": "greedy", "factor": 0.8, "warmup_steps": 10, "args": {"raise_cooldown": 1}},
        "training": {"epochs": 8},
    },
    "constant": {"schedule": {"name": "constant", "warmup_steps": 50}},
    "step": {"schedule": {"name": "step", "args": {"step_size": 2}}},
    "exponential": {"schedule": {"name": "exponential"}},
    "cosine": {"schedule": {"name": "cosine", "warmup_steps": 10}, "training": {"validate_every": "5 steps"}},
    "cosine_restarts": {"schedule": {"name": "cosine_restarts", "args": {"t_0": 1, "t_mult": 2}}},
    "onecycle": {"schedule": {"name": "onecycle"}},
}  # fmt: skip


def _train_config(rank, config, override=False):
    from distplateau.training.trainer import train

    train(config, override=override)


def _diverge(rank, config):
    """Train with a loss that becomes NaN at validation 3, and once more in the training."""
    from distplateau.training import trainer

    decide = trainer.Trainer._validate

    def poisoned(self):
        if self.replica.scheduler.state.validations == 2:
            next(self.replica.network.parameters()).data.fill_(float("nan"))
        return decide(self)

    trainer.Trainer._validate = poisoned
    try:
        trainer.train(config)
    finally:
        trainer.Trainer._validate = decide


def _die_after(rank, config, validations):
    """Train and die when a validation is recorded, before it is covered by a checkpoint."""
    from distplateau.training import trainer

    validate = trainer.Trainer._validate

    def last(self):
        event = validate(self)
        if event["validation"] == validations:
            raise StoppedError
        return event

    trainer.Trainer._validate = last
    try:
        trainer.train(config)
    except StoppedError:
        return "died"
    finally:
        trainer.Trainer._validate = validate
    return "finished"


def _skip_steps(rank, config, override, skipping):
    """Train with every seventh optimizer step left out, as a gradient scaler does that found an overflow."""
    from distplateau.lockstep.scheduler import LockstepScheduler
    from distplateau.training import trainer

    count, calls = LockstepScheduler._count_step, [0]

    def lagging(self):
        calls[0] += 1
        if calls[0] % 7 or not skipping:
            count(self)

    LockstepScheduler._count_step = lagging
    try:
        return _train_until(rank, config, 3) if override is None else trainer.train(config, override=override)
    finally:
        LockstepScheduler._count_step = count


def _train_until_step(rank, config, step):
    """Train and be interrupted after a step, as by a signal."""
    from distplateau.training import interruption, trainer

    agreed, left = interruption.Interruption.agreed, [step]

    def after(_self, _request):
        left[0] -= 1
        return interruption.Call.SIGTERM if left[0] == 0 else interruption.Call.NOTHING

    interruption.Interruption.agreed = after
    try:
        trainer.train(config)
    except interruption.Interrupted:
        return "interrupted"
    finally:
        interruption.Interruption.agreed = agreed
    return "finished"


def problems(run_dir):
    return [str(finding) for finding in verify(run_dir).findings]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every kind of run once: trained for real, on one process."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, sections in RUNS.items():
        run_ranks(_train_config, 1, make_config(folder / name, **sections))
        made[name] = folder / name / "run"
    made["resumed"] = resumed_run(folder / "resumed")
    return made


def resumed_run(folder):
    """A run that was killed after a validation, interrupted in mid-epoch, torn in a line, and went on each time."""
    config = make_config(folder, **PLATEAU, checkpoint={"every": "2 epochs"})
    assert run_ranks(_die_after, 1, config, 3) == ["died"]  # its checkpoint covers validation 2
    assert run_ranks(_train_until_step, 1, config, 30) == ["interrupted"]
    with (folder / "run" / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write('{"event":"validation","validation":4,"epo')
    run_ranks(_train_config, 2, config)
    return folder / "run"


# What follows.


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_a_real_run_follows(runs, name):
    verdict = verify(runs[name])
    assert verdict.findings == ()
    assert verdict.validations > 0
    assert (verdict.sealed, verdict.finished) == (True, True)


def test_the_runs_hold_what_they_are_for(runs):
    kinds = {name: {e["decision"] for e in lines(run) if e["event"] == "validation"} for name, run in runs.items()}
    assert {"warmup", "improved", "bad", "cooldown", "reduced"} & kinds["plateau"] >= {"warmup", "improved", "reduced"}
    assert "raised" in kinds["greedy"]
    assert {"waiting", "reduced"} <= kinds["groups"]
    assert "scheduled" in kinds["cosine"]
    verdict = verify(runs["resumed"])
    assert (verdict.resumed, verdict.superseded, len(module.read_ledger(runs["resumed"]).torn_lines)) == (2, 1, 1)
    assert re.fullmatch(
        r"verified: 10 validations, \d reductions?, every learning rate follows "
        r"\(resumed 2 times, 1 validation made again\)",
        verdict.summary,
    )


def lines(run_dir):
    return [line.event for line in read_lines(run_dir / FILE_NAME) if line.event]


def test_a_run_that_diverged_follows(tmp_path):
    run_ranks(_diverge, 1, make_config(tmp_path))
    values = [event["value"] for event in lines(tmp_path / "run") if event["event"] == "validation"]
    assert sum(map(math.isnan, values)) == 4
    assert verify(tmp_path / "run").findings == ()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"schedule": {"patience": 3, "factor": 0.1, "threshold": 0.0}}),
        ({}, {"optimizer": {"lr": 0.5}}),
        ({}, {"schedule": {"warmup_steps": 100}}),
        ({}, {"data": {"validation_size": 300}}),
        ({"schedule": {"name": "cosine"}}, {"schedule": {"name": "cosine"}, "training": {"epochs": 9}}),
        ({"schedule": {"name": "onecycle"}}, {"schedule": {"name": "step"}}),
        ({"schedule": {"name": "cosine"}}, {"schedule": {"name": "plateau", "patience": 0, "threshold": 0.3}}),
    ],
    ids=["patience", "lr", "warmup", "validation-size", "longer-cosine", "onecycle-to-step", "cosine-to-plateau"],
)
def test_other_settings_of_a_resumed_run_are_no_false_alarm(tmp_path, before, after):
    sections = {"schedule": {"patience": 0, "threshold": 0.05}} if not before else {}
    run_ranks(_train_until, 1, config := make_config(tmp_path, **{**sections, **before}), 3)
    changed = make_config(tmp_path, **{**sections, **after})
    assert changed != config
    run_ranks(_train_config, 1, changed, True)
    assert problems(tmp_path / "run") == []


@pytest.mark.parametrize("name", ["plateau", "cosine"])
def test_optimizer_steps_that_were_left_out_are_recorded(tmp_path, name):
    schedule = {"name": name, "warmup_steps": 50}
    config = make_config(tmp_path, schedule=schedule)
    assert run_ranks(_skip_steps, 1, config, None, True) == ["stopped"]
    run_ranks(_skip_steps, 1, config, False, True)
    assert problems(tmp_path / "run") == []
    steps = [(e["step"], e.get("schedule_step")) for e in lines(tmp_path / "run") if "step" in e]
    assert steps[:3] == [(22, 19), (44, 38), (66, 57)]
    texts = [re.sub(r'"schedule_step":\d+,', "", line.content) for line in read_lines(tmp_path / "run" / FILE_NAME)]
    write(tmp_path / "run", texts)
    assert "lr_after" in problems(tmp_path / "run")[0]  # negative control


def test_a_run_that_went_on_beyond_its_end_follows(tmp_path):
    run_ranks(_train_config, 1, make_config(tmp_path))
    run_ranks(_train_config, 1, make_config(tmp_path, training={"epochs": 8}), True)
    verdict = verify(tmp_path / "run")
    assert (verdict.findings, verdict.validations, verdict.resumed) == ((), 8, 1)
    run_ranks(_train_config, 1, make_config(tmp_path, training={"epochs": 8}, schedule={"patience": 7}), True)
    assert verify(tmp_path / "run").findings == ()  # nothing was trained: config.toml stays that of the run


def test_a_run_without_a_checkpoint_starts_anew_and_follows(tmp_path):
    config = make_config(tmp_path, checkpoint={"every": "5 epochs"})
    assert run_ranks(_die_after, 1, config, 2) == ["died"]
    run_ranks(_train_config, 1, make_config(tmp_path, optimizer={"lr": 0.02}), True)
    verdict = verify(tmp_path / "run")
    assert (verdict.findings, verdict.superseded) == ((), 2)


def test_a_run_that_died_in_its_first_line_starts(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE_NAME).write_text('{"event":"sta')
    run_ranks(_train_config, 1, make_config(tmp_path))
    assert verify(tmp_path / "run").findings == ()


def test_a_run_that_was_cut_short_follows_as_far_as_it_goes(runs, copy):
    text = (runs["plateau"] / FILE_NAME).read_bytes()
    begin = text.index(b"\n") + 1
    shutil.rmtree(copy / "checkpoints", ignore_errors=True)
    for length in range(begin, len(text), 97):
        (copy / FILE_NAME).write_bytes(text[:length])
        assert problems(copy) == []
    assert "not finished" in verify(copy).summary


# Damage.


@pytest.fixture
def copy(runs, tmp_path):
    """A run folder to damage: settings, ledger and what the checkpoints say, without their weights."""
    return copied(runs["plateau"], tmp_path / "copy")


def copied(run_dir: Path, target: Path) -> Path:
    shutil.copytree(run_dir, target, ignore=shutil.ignore_patterns("*.safetensors", "*.pt"))
    return target


def one_bit(value: float, rng: random.Random) -> float:
    bits = struct.unpack("<Q", struct.pack("<d", value))[0] ^ (1 << rng.randrange(64))
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def change_number(event, rng):
    """Change one number of an event, by one bit or one unit."""
    places = [
        (event, key)
        for key in ("value", "best", "num_bad", "cooldown", "step", "epoch", "count", "ranks", "train_loss", "seconds")
        if isinstance(event.get(key), int | float)
    ]
    places += [
        (event[key], place) for key in ("lr_before", "lr_after", "lrs") for place in range(len(event.get(key, ())))
    ]
    places += [(event["metrics"], name) for name in event.get("metrics", ())]
    holder, key = rng.choice(places)
    old = holder[key]
    holder[key] = one_bit(old, rng) if isinstance(old, float) else old + rng.choice([-1, 1])
    return f"{key} {old!r} -> {holder[key]!r}"


def change_decision(event, rng):
    kinds = {"improved", "bad", "cooldown", "reduced", "scheduled", "warmup"} - {event.get("decision")}
    old, event["decision"] = event.get("decision"), rng.choice(sorted(kinds))
    return f"decision {old} -> {event['decision']}"


def damage(texts: list[str], rng: random.Random) -> tuple[list[str], str]:
    """Damage a ledger once; what was done is returned as well."""
    texts = list(texts)
    whole = [i for i, text in enumerate(texts) if text.endswith("}")]  # a torn line records nothing
    place = rng.choice(whole)
    how = rng.choice(["number", "number", "number", "decision", "bit", "delete", "duplicate", "swap"])
    if how in {"number", "decision"}:
        [place] = rng.sample([i for i, text in enumerate(texts) if re.match(r'{"event":"val.*}$', text)], 1)
        event = json.loads(texts[place])
        told = (change_number if how == "number" else change_decision)(event, rng)
        texts[place] = encode(event)  # with the seal that it had
    elif how == "bit":
        raw = bytearray(texts[place].encode())
        at = rng.randrange(len(raw))
        raw[at] ^= 1 << rng.randrange(8)
        texts[place], told = raw.decode("utf-8", errors="surrogateescape"), f"byte {at}"
    elif how == "delete":
        place = rng.choice(whole[:-1])  # without its last line a ledger is that of a run that goes on
        told = texts.pop(place)[:60]
    elif how == "duplicate":
        other = rng.randrange(len(texts) + 1)
        texts.insert(other, texts[place])
        told = f"again at line {other + 1}"
    else:
        other = rng.choice([i for i in range(len(texts)) if texts[i] != texts[place]])
        texts[place], texts[other], told = texts[other], texts[place], f"with line {other + 1}"
    return texts, f"{how} of line {place + 1}: {told}"


def write(run_dir: Path, texts: list[str]) -> None:
    content = "".join(f"{text}\n" for text in texts).encode("utf-8", errors="surrogateescape")
    (run_dir / FILE_NAME).write_bytes(content)


def missed(run_dir: Path, target: Path, seeds: range) -> list[str]:
    """Damage a ledger once for each seed and return what `verify` did not see."""
    folder = copied(run_dir, target)
    texts = (run_dir / FILE_NAME).read_text(encoding="utf-8").splitlines()
    escaped = []
    for seed in seeds:
        damaged, told = damage(texts, random.Random(seed))
        write(folder, damaged)
        try:
            if not verify(folder).findings:
                escaped.append(f"seed {seed}: {told}")
        except InputError as error:
            escaped.append(f"seed {seed}: {told}: {error}")
    return escaped


DAMAGED = ("plateau", "groups", "greedy", "cosine", "resumed")


@pytest.mark.parametrize("place", range(len(DAMAGED)), ids=DAMAGED)
def test_each_of_a_thousand_damaged_ledgers_is_found(runs, tmp_path, place):
    escaped = missed(runs[DAMAGED[place]], tmp_path / "copy", range(200 * place, 200 * (place + 1)))
    assert escaped == []


def test_without_seals_a_change_that_decides_nothing_escapes(runs, tmp_path, monkeypatch):
    """Negative control: the decisions alone do not see each change, but every one of a decision or a learning rate."""
    monkeypatch.setattr(module, "_broken_seals", lambda _lines: iter(()))
    escaped = missed(runs["plateau"], tmp_path / "copy", range(300))
    assert escaped
    assert not [
        told for told in escaped if re.search(r"lr_|decision|num_bad|best|cooldown|value|step|epoch|count", told)
    ]


def test_without_the_derivation_a_forged_ledger_escapes(runs, tmp_path, monkeypatch):
    """Negative control: seals prove that nothing was changed, not that the learning rate was right to begin with."""
    forged = copied(runs["plateau"], tmp_path / "forged")
    events = lines(forged)
    drop = next(e for e in events if e.get("decision") == "reduced")
    drop["lr_after"] = [drop["lr_after"][0] * 0.9]
    (forged / FILE_NAME).unlink()
    shutil.rmtree(forged / "checkpoints")
    ledger = Ledger(forged)
    for event in events:
        ledger.append(**{key: value for key, value in event.items() if key != "time"})
    [first, *_] = problems(forged)
    assert re.search(rf"validation {drop['validation']}: lr_after is .* follows$", first)
    monkeypatch.setattr(module._Audit, "_validation", lambda _self, _event: iter(()))
    monkeypatch.setattr(module._Audit, "_finished", lambda _self, _event: iter(()))
    assert problems(forged) == []


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("decision", lambda _: "bad", r"decision is 'bad', 'improved' follows"),
        ("lr_after", lambda old: [old[0] / 2], r"lr_after is [\d.e-]+, [\d.e-]+ follows"),
        ("lr_after", lambda old: [*old, 0.1], r"lr_after is [\d.e-]+ / 0.1, [\d.e-]+ follows"),
        ("lr_before", lambda old: [old[0] / 2], r"lr_before is [\d.e-]+, [\d.e-]+ follows"),
        ("best", lambda old: old + 1e-9, r"best is [\d.]+, [\d.]+ follows"),
        ("num_bad", lambda old: old + 1, r"num_bad is 1, 0 follows"),
        ("cooldown", lambda old: old + 1, r"cooldown is 1, 0 follows"),
        ("value", lambda old: old * (1 + 1e-15), r"value is [\d.]+, metrics\['val/loss'\] is [\d.]+"),
        ("metrics", lambda _: 3, r"cannot be followed"),
        ("step", lambda old: old + 1, r"epoch is 4.0, 4.045\d* follows"),
        ("step", lambda _: 0, r"step is 0, after step 66"),
        ("step", lambda _: 10_000, r"step is 10000, after step 66 of 220"),
        ("count", lambda old: old - 1, r"count is 399, 400 follows"),
        ("ranks", lambda old: old + 1, r"ranks is 2, 1 follows"),
        ("digest", lambda old: old[:-1], r"digest is '\w{15}', which is not of the form of the others"),
        ("digest", lambda old: "", r"digest is '', which is not of the form"),
        ("train_loss", lambda _: "nan", r"train_loss is nan, without nonfinite_loss"),
        ("monitor", lambda _: "val/accuracy", r"monitor is 'val/accuracy', 'val/loss' follows"),
        ("samples_per_second", lambda _: 1.0, r"its seal does not fit: the line was changed"),
        ("metrics", None, r"has no 'metrics'"),
    ],
)  # fmt: skip
def test_a_finding_says_where_and_how(copy, key, change, message):
    texts = (copy / FILE_NAME).read_text(encoding="utf-8").splitlines()
    place = next(i for i, t in enumerate(texts) if '"validation":4,' in t)
    event = json.loads(texts[place])
    if change is None:
        del event[key]
    else:
        event[key] = change(event[key])
    write(copy, [*texts[:place], encode(event), *texts[place + 1 :]])
    found = problems(copy)
    assert found[0].startswith(f"line {place + 1}, validation 4: ")
    assert re.search(message, found[0]), found[0]
    if key not in {"metrics"} and change is not None and not isinstance(event[key], str):
        assert len(found) == 1, found  # what follows on a damaged line is judged by the sound one


def test_lines_that_are_gone_repeated_or_unreadable(copy):
    texts = (copy / FILE_NAME).read_text(encoding="utf-8").splitlines()
    write(copy, [*texts[:4], *texts[6:]])
    assert "line 5, validation 6: validation 4, 5 missing before it" in problems(copy)[0]
    write(copy, [*texts[:4], texts[3], *texts[4:]])
    [repeated] = problems(copy)
    assert repeated.startswith("line 5, validation 3: validation 3 comes after validation 3")
    assert repeated.endswith("was moved or repeated: its seal fits elsewhere")
    write(copy, [*texts[:4], texts[4][:-1], *texts[5:]])
    assert problems(copy)[0] == "line 5: is no event: it was damaged"
    write(copy, texts[1:])
    assert "there is no start before it" in problems(copy)[0]
    write(copy, [texts[0], *texts])
    assert "a second start" in problems(copy)[0]


def test_validations_that_are_missing_at_the_end_are_told_by_the_checkpoints(copy):
    texts = (copy / FILE_NAME).read_text(encoding="utf-8").splitlines()
    write(copy, texts[:-3])
    assert problems(copy) == [
        "ledger.jsonl ends at validation 8, step-00000198 was saved after validation 9",
        "ledger.jsonl ends at validation 8, step-00000220 was saved after validation 10",
    ]


def test_a_changed_config_is_found(copy):
    path = copy / "config.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("patience = 0", "patience = 1"), encoding="utf-8")
    assert problems(copy) == ["config.toml: schedule.patience is 1, the ledger says 0"]
    path.write_text("[run", encoding="utf-8")
    assert re.match(r"config.toml: .* is not valid TOML", problems(copy)[0])
    path.unlink()
    assert problems(copy) == []


def test_a_ledger_of_an_older_version_has_no_seals(copy):
    texts = [line.content for line in read_lines(copy / FILE_NAME)]
    write(copy, texts)
    verdict = verify(copy)
    assert verdict.findings == ()
    assert verdict.summary.endswith("(lines without seals: a changed value that decided nothing would not be seen)")
    ledger = Ledger(copy)  # goes on with seals
    ledger.append("note")
    ledger.append("note")
    assert verify(copy).findings == ()
    write(copy, [*(line.text for line in read_lines(copy / FILE_NAME)), '{"event":"note"}'])
    assert problems(copy)[0].endswith("has no seal")


# The command.


def test_the_command(runs, copy, capsys):
    assert main(["verify", str(runs["plateau"]), str(runs["cosine"])]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all(line.startswith("verified: ") for line in said)
    texts = (copy / FILE_NAME).read_text(encoding="utf-8").splitlines()
    write(copy, [*texts[:3], *texts[4:]])
    assert main(["verify", str(copy)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("line 4, validation 4: validation 3 missing before it; ")
    assert re.fullmatch(rf"{re.escape(str(copy))}/ledger.jsonl: \d lines? that (do|does) not follow", said[-1])


def test_a_folder_without_a_run_is_wrong_input(tmp_path, capsys):
    for folder in (tmp_path / "none", tmp_path):
        assert main(["verify", str(folder)]) == 2
        assert capsys.readouterr().err == (
            f"distplateau: {folder}: has no ledger.jsonl; give a run folder, <run.dir>/<run.name>\n"
        )
    (tmp_path / FILE_NAME).write_text("")
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no event" in capsys.readouterr().err
