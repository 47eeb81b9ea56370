"""The configuration: what is written comes back, and whatever is wrong is one line with the key, the value, the fix."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distplateau.config import Config, dotted_keys, dump_config, interval_in_steps, load_config, parse_config
from distplateau.errors import InputError
from distplateau.lockstep.schedules import SCHEDULES

property_test = settings(deadline=None, derandomize=True, max_examples=200)

finite = st.floats(0, 1e6, exclude_min=True)
share = st.floats(0, 1, exclude_min=True, exclude_max=True)
count = st.integers(1, 10**9)
names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=20
).filter(lambda name: name not in {".", ".."})  # fmt: skip
intervals = st.builds(lambda n, unit: f"{n} {unit}", count, st.sampled_from(["epoch", "epochs", "step", "steps"]))
plain = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


def section(**fields):
    return st.fixed_dictionaries({}, optional=fields)


TREES = section(
    run=section(name=names, dir=names, seed=st.integers(0, 2**63 - 1)),
    data=section(name=names, root=names, global_batch_size=count, eval_batch_size=count, validation_size=share | count),
    model=section(name=names, args=st.dictionaries(names, plain, max_size=3)),
    optimizer=section(
        name=names,
        lr=finite,
        weight_decay=finite,
        momentum=share,
        betas=st.tuples(share, share).map(list),
        groups=st.lists(st.fixed_dictionaries({"match": names}, optional={"lr": finite}), max_size=2),
    ),
    schedule=section(
        name=st.just("plateau"),
        monitor=st.sampled_from(["val/loss", "val/accuracy", "val/top5"]),
        mode=st.sampled_from(["min", "max"]),
        factor=share | st.lists(share, min_size=1, max_size=3),
        patience=count,
        threshold=finite,
        threshold_mode=st.sampled_from(["rel", "abs"]),
        cooldown=count,
        min_lr=finite | st.lists(finite, min_size=1, max_size=3),
        eps=finite,
        warmup_steps=count,
        start_after=count,
        smoothing=share,
        nonfinite=st.sampled_from(["bad", "ignore", "raise"]),
    ),
    training=section(
        epochs=count,
        precision=st.sampled_from(["no", "bf16", "fp16"]),
        grad_accumulation=count,
        max_grad_norm=finite,
        validate_every=intervals,
    ),
    checkpoint=section(every=intervals, keep=count),
    tracking=section(
        wandb=st.sampled_from(["online", "offline", "disabled"]),
        project=names,
        entity=names,
        group=names,
        tags=st.lists(names, max_size=3),
    ),
)


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(call, *parts):
    """Return the error's text, which is one line and has all the parts."""
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    assert text.isprintable()
    for part in parts:
        assert part in text
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


@property_test
@given(tree=TREES)
def test_what_is_dumped_loads_to_the_same(folder, tree):
    config = parse_config(tree)
    text = dump_config(config)
    assert load_config(write(folder, text)) == config
    assert dump_config(load_config(folder / "run.toml")) == text
    assert config.schedule.without_effect == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_dump_of_every_schedule_loads_and_has_nothing_without_effect(tmp_path, name):
    config = parse_config({"schedule": {"name": name, "args": dict(SCHEDULES[name].args)}})
    loaded = load_config(write(tmp_path, dump_config(config)))
    assert loaded == config
    assert loaded.schedule.without_effect == []


def test_an_empty_file_is_the_default_run(tmp_path):
    config = load_config(write(tmp_path, ""))
    assert config == Config() == parse_config({})
    assert config.run_dir.as_posix() == "runs/run"


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3


# What is wrong.


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"rum": {"name": "x"}}, ["rum = {'name': 'x'}", "did you mean 'run'?"]),
        ({"schedule": {"patiense": 3}}, ["schedule.patiense = 3", "unknown key", "did you mean 'patience'?"]),
        ({"training": {"epoch": 3}}, ["training.epoch = 3", "did you mean 'epochs'?", "validate_every"]),
        ({"optimizer": {"groups": [{"match": "a"}, {"match": "b", "lrr": 1}]}}, ["optimizer.groups.1.lrr", "'lr'?"]),
        ({"schedule": {"name": "plato"}}, ["schedule.name = 'plato'", "did you mean 'plateau'?", "cosine"]),
        ({"schedule": {"args": {"gamma": 1}}}, ["schedule.args.gamma = 1", "'plateau' schedule takes none"]),
        ({"schedule": {"name": "step", "args": {"gama": 1}}}, ["schedule.args.gama = 1", "did you mean 'gamma'?"]),
    ],
)
def test_an_unknown_name_comes_with_a_suggestion(tree, parts):
    refused(lambda: parse_config(tree), *parts)


WRONG = [
    ("run", 5, "is a table, not a value; write [run]"),
    ("run", [{}], "is a table, not a value; write [run]"),
    ("run.name", 7, "valid string; expected: folder name"),
    ("run.name", "a/b", "expected: folder name of the run, without /"),
    ("run.name", "..", "folder name"),
    ("run.name", "a\nb", "folder name"),
    ("run.seed", True, "valid integer"),
    ("run.seed", 2.0, "valid integer"),
    ("run.seed", -1, "greater than or equal to 0"),
    ("run.seed", 2**63, "less than"),
    ("data.global_batch_size", 0, "greater than 0; expected: samples per optimizer step"),
    ("data.validation_size", 1.5, "less than 1; expected: samples (or share)"),
    ("data.validation_size", "10 %", "expected: samples (or share)"),
    ("model.args", 5, "valid dictionary"),
    ("optimizer.lr", 0, "greater than 0; expected: peak learning rate"),
    ("optimizer.lr", "1e-3", "valid number"),
    ("optimizer.lr", math.inf, "finite"),
    ("optimizer.lr", math.nan, "finite"),
    ("optimizer.groups", 5, "valid list"),
    ("schedule.mode", "up", "'min' or 'max'"),
    ("schedule.factor", 1.0, "less than 1; expected: number above 0 and below 1"),
    ("schedule.factor", "half", "expected: number above 0 and below 1"),
    ("schedule.patience", 2.5, "valid integer; expected: bad validations that are tolerated"),
    ("schedule.threshold", -1e-4, "greater than or equal to 0"),
    ("schedule.smoothing", 1, "less than 1"),
    ("schedule.nonfinite", "skip", "'bad', 'ignore' or 'raise'"),
    ("training.precision", "fp8", "'no', 'bf16' or 'fp16'"),
    ("training.max_grad_norm", 0, "greater than 0; expected: clip"),
    ("training.validate_every", "0 epochs", 'write "1 epoch" or "500 steps"'),
    ("training.validate_every", 3, "valid string"),
    ("checkpoint.every", "10 parsecs", 'write "1 epoch", "500 steps" or "10 min"'),
    ("checkpoint.keep", 0, "greater than 0; expected: newest checkpoints"),
    ("tracking.wandb", True, "expected: offline needs no account"),
    ("tracking.tags", "a,b", "valid list; expected: list of W&B tags"),
]


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("key", "value", "fix"), WRONG)
def test_a_wrong_value_is_named_with_its_key_and_the_fix(key, value, fix):
    refused(lambda: parse_config(nested(key, value)), f"{key} = {value!r}: ", fix)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("schedule.factor", [0.5, 2.0], "schedule.factor.1 = 2.0: input should be less than 1"),
        ("schedule.min_lr", [0.1, -1.0], "schedule.min_lr.1 = -1.0: input should be greater than or equal to 0"),
        ("tracking.tags", ["a", 1], "tracking.tags.1 = 1: input should be a valid string"),
        ("optimizer.groups", [{"match": "a", "lr": -1.0}], "optimizer.groups.0.lr = -1.0"),
        ("optimizer.groups", [{"lr": 1.0}], "optimizer.groups.0.match"),
    ],
)
def test_the_entry_of_a_list_is_named(key, value, named):
    refused(lambda: parse_config(nested(key, value)), named)


@property_test
@given(key=st.sampled_from(sorted(dotted_keys())), value=plain | st.floats())
def test_any_value_at_any_key_is_taken_or_refused_in_one_line(key, value):
    config, message = None, ""
    try:
        config = parse_config(nested(key, value))
    except InputError as error:
        message = str(error)
    if config is None:
        assert message.startswith(key)
        assert "\n" not in message
    else:
        dump_config(config)


@pytest.mark.parametrize(
    "text", ["[run", "a = ", "[run]\nname = 'x\n", "x = 1\nx = 2", "lr = 1e", "\x00", "a = " + "9" * 10_000]
)
def test_broken_toml_is_named_with_its_path(tmp_path, text):
    path = write(tmp_path, text)
    refused(lambda: load_config(path), str(path), "is not valid TOML", "mend that line")


def test_a_file_that_is_none(tmp_path):
    refused(lambda: load_config(tmp_path / "none.toml"), f"{tmp_path}/none.toml", "there is no such file")
    refused(lambda: load_config(tmp_path), str(tmp_path), "cannot be read")
    (tmp_path / "latin.toml").write_bytes(b"[run]\nname = '\xe9'\n")
    refused(lambda: load_config(tmp_path / "latin.toml"), "latin.toml", "cannot be read")


# Overrides: text as typed on a command line.


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("run.name", "007", "007"),
        ("run.name", "1e5", "1e5"),
        ("run.name", "true", "true"),
        ("run.name", "2026-01-01", "2026-01-01"),
        ("run.name", '"quoted"', '"quoted"'),
        ("run.name", "Übung №1", "Übung №1"),
        ("run.dir", "/tmp/a b", "/tmp/a b"),
        ("run.seed", "12", 12),
        ("data.validation_size", "0.25", 0.25),
        ("data.validation_size", "1000", 1000),
        ("optimizer.lr", "1e-3", 1e-3),
        ("optimizer.lr", "3", 3.0),
        ("schedule.factor", "[0.5, 0.1]", [0.5, 0.1]),
        ("schedule.min_lr", "1e-6", 1e-6),
        ("schedule.mode", "max", "max"),
        ("schedule.name", "plateau", "plateau"),
        ("schedule.monitor", "val/accuracy", "val/accuracy"),
        ("training.validate_every", "500 steps", "500 steps"),
        ("training.max_grad_norm", "1.5", 1.5),
        ("tracking.tags", '["a", "2"]', ["a", "2"]),
        ("tracking.entity", "123", "123"),
        ("tracking.group", "false", "false"),
        ("model.args", "{depth = 3}", {"depth": 3}),
        ("model.args.depth", "3", {"depth": 3}),
        ("model.args.shift", "-3", {"shift": -3}),
        ("model.args.name", "three", {"name": "three"}),
    ],
)
def test_an_override_has_the_type_of_its_key(tmp_path, key, text, value):
    config = load_config(write(tmp_path, "[model]\nname = 'mlp'\n"), {key: text})
    section, name, *_ = key.split(".")
    held = getattr(getattr(config, section), name)
    assert held == value
    assert type(held) is type(value)


def test_overrides_of_what_an_optimizer_takes(tmp_path):
    overrides = {
        "optimizer.momentum": "-0.5",
        "optimizer.betas": "[0.8, 0.99]",
        "optimizer.nesterov": "true",
        "optimizer.how": "fast",
    }
    config = load_config(write(tmp_path, "[optimizer]\nmomentum = 0.9\n"), overrides)
    assert config.optimizer.args == {"momentum": -0.5, "betas": [0.8, 0.99], "nesterov": True, "how": "fast"}


def test_an_override_wins_over_the_file_and_leaves_the_rest(tmp_path):
    path = write(tmp_path, "[schedule]\npatience = 3\nfactor = 0.5\n")
    config = load_config(path, {"schedule.patience": "7"})
    assert (config.schedule.patience, config.schedule.factor) == (7, 0.5)


@pytest.mark.parametrize(
    ("key", "text", "parts"),
    [
        ("optimizer.lr", "-0.1", ["optimizer.lr = -0.1", "greater than 0"]),
        ("schedule.patience", "-3", ["schedule.patience = -3", "greater than or equal to 0"]),
        ("schedule.patience", "many", ["schedule.patience = 'many'", "valid integer"]),
        ("schedule.patience", "", ["schedule.patience = ''", "valid integer"]),
        ("schedule.patience", "9" * 10_000, ["schedule.patience = '999", "valid integer"]),
        ("schedule.patiense", "3", ["schedule.patiense = 3", "did you mean 'patience'?"]),
        ("patience", "3", ["patience = 3", "unknown key", "schedule"]),
        ("schedule", "3", ["schedule = 3", "is a table"]),
        ("schedule.patience.x", "3", ["schedule.patience.x = 3", "is a value, not a table"]),
        ("optimizer.groups.0.lr", "3", ["optimizer.groups.0.lr = 3", "is a value, not a table"]),
    ],
)
def test_a_wrong_override_is_named(tmp_path, key, text, parts):
    path = write(tmp_path, "[schedule]\npatience = 3\n[[optimizer.groups]]\nmatch = 'bias'\n")
    refused(lambda: load_config(path, {key: text}), *parts)


# What is derived.


def test_settings_without_effect_are_named():
    assert parse_config({"schedule": {"patience": 3, "min_lr": 0.1}}).schedule.without_effect == []
    tree = {
        "schedule": {"name": "cosine", "patience": 3, "factor": 0.5, "min_lr": 0.1, "warmup_steps": 4, "mode": "min"}
    }
    assert parse_config(tree).schedule.without_effect == ["factor", "patience"]
    assert "patience" not in dump_config(parse_config(tree))


@pytest.mark.parametrize(
    ("tree", "mode"),
    [({}, "min"), ({"monitor": "val/accuracy"}, "max"), ({"monitor": "val/top5"}, "max"),
     ({"monitor": "val/accuracy", "mode": "min"}, "min"), ({"monitor": "val/f1", "mode": "max"}, "max")],
)  # fmt: skip
def test_the_monitored_metric_implies_the_mode(tree, mode):
    assert parse_config({"schedule": tree}).schedule.resolved_mode == mode


@pytest.mark.parametrize(("text", "steps"), [("1 epoch", 7), ("3 epochs", 21), ("1 step", 1), ("500 steps", 500)])
def test_intervals(text, steps):
    assert interval_in_steps(text, 7) == steps


def test_every_key_has_a_description():
    assert [key for key, text in dotted_keys().items() if not text.split("  [")[0]] == []
