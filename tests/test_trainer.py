"""The main job on real data (digits) and real processes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distplateau.config import Config, load_config, parse_config
from distplateau.errors import InputError
from distplateau.lockstep.metric import GlobalMean
from distplateau.record.ledger import read_ledger
from distplateau.training.data.order import epoch_order
from distplateau.training.data.samples import Split
from distplateau.training.setup import differences, prepare_parts
from distplateau.training.step import TrainStep
from distplateau.training.trainer import Trainer, train, train_parts
from distplateau.training.validation import measure
from ranks import run_ranks

# One hidden layer and few samples: a run of a second that still has every part.
TREE = {
    "data": {"name": "digits", "global_batch_size": 48, "validation_size": 400, "eval_batch_size": 64},
    "model": {"args": {"hidden": [32]}},
    "optimizer": {"lr": 0.01},
    "schedule": {"patience": 0, "factor": 0.5, "threshold": 0.05},
    "training": {"epochs": 6},
    "tracking": {"wandb": "disabled"},
}


def make_config(folder: Path, **sections) -> Config:
    tree = {name: {**values, **sections.pop(name, {})} for name, values in TREE.items()}
    return parse_config({**tree, **sections, "run": {"name": "run", "dir": str(folder), **sections.get("run", {})}})


def _train(rank, config):
    """Train and return what this rank saw: decisions, learning rates, metric bits, final weights."""
    seen = []
    validate = Trainer._validate

    def watched(self):
        event = validate(self)
        seen.append((event["value"].hex(), event["decision"], event["lr_after"], self.replica.scheduler.get_last_lr()))
        seen_weights[:] = [p.detach().clone() for p in self.replica.model.parameters()]
        return event

    seen_weights: list[torch.Tensor] = []
    Trainer._validate = watched
    try:
        train(config)
    finally:
        Trainer._validate = validate
    return seen, seen_weights


def same_tensors(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_has_the_same_bits(tmp_path, ranks):
    results = run_ranks(_train, ranks, make_config(tmp_path))
    history = read_ledger(tmp_path / "run")
    assert [event["value"].hex() for event in history.validations] == [value for value, *_ in results[0][0]]
    assert history.finished["reductions"] >= 1
    for seen, weights in results[1:]:
        assert seen == results[0][0]
        assert same_tensors(weights, results[0][1])
    for event in history.validations:
        assert event["ranks"] == ranks
        assert event["count"] == 400
        assert event["metrics"]["val/loss"] == event["value"]


def _measure_fixed_weights(rank, config):
    from accelerate import Accelerator

    torch.set_num_threads(1)
    parts = prepare_parts(config)
    metrics = {name: GlobalMean() for name in parts.metrics}
    measure(Accelerator(cpu=True), parts.model, parts.data, "validation", 64, parts.objective, metrics)
    return {name: metric.compute().hex() for name, metric in metrics.items()}


def test_fixed_weights_have_the_same_metric_bits_at_any_number_of_ranks(tmp_path):
    config = make_config(tmp_path)
    results = [run_ranks(_measure_fixed_weights, ranks, config) for ranks in (1, 2, 3, 4, 8)]
    assert all(result == results[0][0] for by_rank in results for result in by_rank)


def reference_loop(config: Config) -> list[torch.Tensor]:
    """The same training in plain torch, for one process."""

    parts = prepare_parts(config)
    data, model, size = parts.data, parts.model, config.data.global_batch_size
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=config.schedule.factor, patience=config.schedule.patience, threshold=config.schedule.threshold
    )
    for epoch in range(config.training.epochs):
        for indices in epoch_order(len(data.train), config.run.seed, epoch).split(size):
            logits = model(data.normalize(data.train.images[indices]))
            losses = torch.nn.functional.cross_entropy(logits, data.train.labels[indices], reduction="none")
            (losses.sum() * (1 / len(indices))).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(model(data.normalize(images)), labels, reduction="none")
                for images, labels in zip(
                    data.validation.images.split(64), data.validation.labels.split(64), strict=True
                )
            ]
        scheduler.step(math.fsum(torch.cat(losses).tolist()) / len(data.validation))
    return list(model.parameters())


def _against_reference(rank, config):
    torch.set_num_threads(1)
    return _train(rank, config)[1], [p.detach() for p in reference_loop(config)]


def test_one_process_is_bit_identical_to_a_plain_loop(tmp_path):
    [(ours, plain)] = run_ranks(_against_reference, 1, make_config(tmp_path))
    assert same_tensors(ours, plain)


def _watch_steps(rank, config):
    """Train and return, of the first 50 steps, the images that this rank read and the sum of its losses."""
    torch.set_num_threads(1)
    images, totals = [], []
    add, batches = TrainStep._add_gradient, Split.batches

    def watched_batches(self, *arguments):
        for read in batches(self, *arguments):
            images.append(read[0].clone())
            yield read

    def watched_add(self, *arguments):
        add(self, *arguments)
        totals.append(float(self._losses[-1][2]))

    parts = prepare_parts(config)  # its trial of model and loss reads as well
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "_add_gradient", watched_add)
        patch.setattr(Split, "batches", watched_batches)
        patch.setattr(TrainStep, "settle_buckets", lambda self: None)  # it reads as well, but learns nothing
        train_parts(config, parts)
    return images[:50], totals[:50]


def _reference_steps(rank, config):
    """Do in plain torch, in one process, what `_watch_steps` watches."""
    torch.set_num_threads(1)
    parts = prepare_parts(config)
    data, model, size = parts.data, parts.model, config.data.global_batch_size
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.lr, fused=True)
    orders = [epoch_order(len(data.train), config.run.seed, epoch) for epoch in range(config.training.epochs)]
    images, totals = [], []
    for indices in [indices for order in orders for indices in order.split(size)][:50]:
        images.append(data.train.images[indices])
        losses = torch.nn.functional.cross_entropy(
            model(data.normalize(images[-1])), data.train.labels[indices], reduction="none"
        )
        totals.append(float(losses.sum()))
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return images, totals


@pytest.mark.parametrize("ranks", [2, 4])
def test_more_processes_read_the_same_samples_and_have_the_same_losses(tmp_path, ranks):
    # No step is cut by a validation, and the learning rate stays: what is compared is the training alone.
    config = make_config(tmp_path, training={"epochs": 3, "validate_every": "3 epochs"})
    [(images, totals)] = run_ranks(_reference_steps, 1, config)
    by_rank = run_ranks(_watch_steps, ranks, config)
    assert len(images) == 50
    for step in range(50):
        assert torch.equal(torch.cat([seen[step] for seen, _ in by_rank]), images[step])
        assert sum(losses[step] for _, losses in by_rank) == pytest.approx(totals[step], rel=1e-4)


class StoppedError(Exception):
    """Stands for whatever ends a job."""


def _train_until(rank, config, validations):
    save = Trainer._save

    def stop_after(self, *, wait=False):
        save(self, wait=wait)
        if self.replica.scheduler.state.validations == validations:
            raise StoppedError

    Trainer._save = stop_after
    try:
        train(config)
    except StoppedError:
        return "stopped"
    finally:
        Trainer._save = save
    return "finished"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("schedule", ["plateau", "cosine_restarts"])
def test_resume_at_a_validation_gives_the_bits_of_an_uninterrupted_run(tmp_path, ranks, schedule):
    plateau = TREE["schedule"] if schedule == "plateau" else {}
    sections = {
        "schedule": {**plateau, "name": schedule, "warmup_steps": 7},
        "model": {"args": {"hidden": [32], "dropout": 0.2}},
    }
    whole = run_ranks(_train, ranks, make_config(tmp_path / "whole", **sections))
    config = make_config(tmp_path / "cut", **sections)
    for validations in (2, 3):
        assert run_ranks(_train_until, ranks, config, validations) == ["stopped"] * ranks
    resumed = run_ranks(_train, ranks, config)
    assert same_tensors(resumed[0][1], whole[0][1])
    histories = [read_ledger(tmp_path / name / "run") for name in ("whole", "cut")]
    keys = (
        "validation",
        "step",
        "value",
        "decision",
        "lr_before",
        "lr_after",
        "best",
        "num_bad",
        "digest",
        "train_loss",
    )
    lines = [[[event[key] for key in keys] for event in history.validations] for history in histories]
    assert lines[0] == lines[1]
    assert [e["event"] for e in histories[1].events].count("resumed") == 2
    best = [load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "cut")]
    assert same_tensors(best[0].values(), best[1].values())
    assert {k: v for k, v in histories[0].finished.items() if k not in {"time", "seconds"}} == {
        k: v for k, v in histories[1].finished.items() if k not in {"time", "seconds"}
    }


def test_a_run_on_other_ranks_continues_the_same_sequence(tmp_path):
    config = make_config(tmp_path)
    run_ranks(_train_until, 2, config, 2)
    run_ranks(_train_until, 1, config, 4)
    run_ranks(_train, 4, config)
    history = read_ledger(tmp_path / "run")
    assert [event["validation"] for event in history.validations] == list(range(1, 7))
    assert [event["ranks"] for event in history.validations] == [2, 2, 1, 1, 4, 4]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = make_config(tmp_path)
    run_ranks(_train, 1, config)
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    run_ranks(_train, 1, config)
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    config = make_config(tmp_path)
    run_ranks(_train_until, 1, config, 1)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        (checkpoint / "manifest.json").write_text("{}")
    run_ranks(_train, 1, config)
    assert [e["validation"] for e in read_ledger(tmp_path / "run").validations] == list(range(1, 7))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_configuration_that_shards_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=r"accelerate launch = '(FSDP|DEEPSPEED)': .* is not served .*; use plain DDP"):
        train(make_config(tmp_path))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(variable, "false")
    prepare_parts(make_config(tmp_path))


def test_two_processes_do_not_train_one_run(tmp_path, monkeypatch):
    """As when a launcher starts so many single processes; those of one process group have one that holds the lock."""
    from distplateau.training.saving import lock

    monkeypatch.setattr(lock, "_SECONDS", 0.2)
    config = make_config(tmp_path)
    config.run_dir.mkdir()
    with lock.only_one(config.run_dir):
        with pytest.raises(InputError, match=rf"run: is being trained by process {os.getpid()} on \S+; wait for it"):
            train(config)
        assert not (config.run_dir / "ledger.jsonl").exists()
        monkeypatch.setenv("RANK", "1")
        with lock.only_one(config.run_dir):
            pass
        monkeypatch.delenv("RANK")
    train(config)


def test_other_settings_are_refused_and_can_be_forced(tmp_path):
    config = make_config(tmp_path)
    run_ranks(_train_until, 1, config, 2)
    changed = make_config(tmp_path, optimizer={"lr": 0.02}, checkpoint={"keep": 5})
    with pytest.raises(InputError, match=r"optimizer.lr 0.01 -> 0.02\).*--resume override"):
        train(changed)
    assert differences(config, make_config(tmp_path, tracking={"project": "x"}, data={"root": "elsewhere"})) == []


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (4, {"data": {"global_batch_size": 5, "validation_size": 1400}}),  # slices of 1 and 2, the last batch of 2
        (3, {"data": {"global_batch_size": 32, "validation_size": 1300}, "training": {"grad_accumulation": 4}}),
        (2, {"training": {"max_grad_norm": 0.5, "epochs": 2, "validate_every": "7 steps"}}),
        (2, {"training": {"precision": "bf16", "epochs": 2}}),
    ],
    ids=["tiny-slices", "accumulation", "clipping-and-steps", "bf16"],
)
def test_uneven_slices_accumulation_clipping_precision(tmp_path, ranks, sections):
    results = run_ranks(_train, ranks, make_config(tmp_path, **sections))
    assert all(seen == results[0][0] for seen, _ in results)
    losses = [event["train_loss"] for event in read_ledger(tmp_path / "run").validations]
    assert losses[-1] < losses[0]


def _first_step_gradient(rank, config):
    """The weights after one SGD step: an oracle for how gradients of uneven slices are weighted."""
    from accelerate import Accelerator

    trainer = Trainer(config, prepare_parts(config), Accelerator(cpu=True))
    trainer.train_step.begin(0)
    trainer.train_step(0)
    return [p.detach() for p in trainer.replica.model.parameters()]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_are_weighted_by_samples(tmp_path, accumulation):
    def config(name, **training):
        return make_config(
            tmp_path / name,
            data={"global_batch_size": 7},
            optimizer={"name": "sgd", "lr": 1.0},
            training=training,
        )

    [expected] = run_ranks(_first_step_gradient, 1, config("one"))
    for ranks in (2, 3, 4):
        for weights in run_ranks(_first_step_gradient, ranks, config(f"{ranks}", grad_accumulation=accumulation)):
            for ours, reference in zip(weights, expected, strict=True):
                torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "broadcast"])
def test_batchnorm_ranks_validate_the_same_network(tmp_path, how):
    config = make_config(
        tmp_path,
        data={"validation_size": 1400, "global_batch_size": 9},
        model={"name": "resnet18", "args": {}},
        training={"epochs": 1, "sync_batchnorm_stats": how},
    )
    results = run_ranks(_batchnorm_buffers, 2, config)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _batchnorm_buffers(rank, config):
    buffers = []
    validate = Trainer._validate

    def watched(self):
        event = validate(self)
        buffers[:] = [b.clone() for b in self.replica.model.buffers()]
        return event

    Trainer._validate = watched
    try:
        train(config)
    finally:
        Trainer._validate = validate
    return buffers


def test_batch_smaller_than_the_ranks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = make_config(tmp_path, data={"global_batch_size": 3})
    with pytest.raises(InputError, match=r"data.global_batch_size = 3: is smaller than the 4 ranks; use at least 4"):
        prepare_parts(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"name": "adamm"}}, r"optimizer.name = 'adamm'.*'adam'"),
        ({"optimizer": {"beta": 0.9}}, r"optimizer.beta = 0.9: unknown key.*'betas'"),
        ({"optimizer": {"name": "adam", "betas": [0.9]}}, r"optimizer: adam refuses its settings"),
        ({"optimizer": {"name": "sgd", "momentum": -1.0}}, r"optimizer: sgd refuses its settings"),
        ({"optimizer": {"groups": [{"match": "nothing"}]}}, r"optimizer.groups.0.match = 'nothing'"),
        ({"schedule": {"monitor": "val/los"}}, r"schedule.monitor = 'val/los'"),
        ({"schedule": {"eps": 1.0}}, r"schedule.eps: eps=1.0 blocks every drop"),
        ({"schedule": {"name": "step", "args": {"gamma": 3}}}, r"schedule.args.gamma = 3"),
        ({"training": {"precision": "fp16"}}, r"training.precision = 'fp16': fp16 needs a GPU"),
        ({"model": {"name": "resnet81"}}, r"model.name = 'resnet81'"),
        ({"data": {"name": "digit"}}, r"data.name = 'digit'"),
    ],
)
def test_wrong_settings_are_named_before_there_is_a_process_group(tmp_path, monkeypatch, sections, message):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(InputError, match=message) as caught:
        prepare_parts(make_config(tmp_path, **sections))
    assert "\n" not in str(caught.value)


def test_the_run_folder_reproduces_its_configuration(tmp_path):
    config = make_config(tmp_path, schedule={"name": "cosine"})
    run_ranks(_train, 1, config)
    assert differences(load_config(tmp_path / "run" / "config.toml"), config) == []
    start = read_ledger(tmp_path / "run").start
    assert start["samples"] == {"train": 1037, "validation": 400, "test": 360}
    json.dumps(start, allow_nan=False)


def test_parameter_groups_have_rates_of_their_own(tmp_path):
    config = make_config(
        tmp_path,
        optimizer={"groups": [{"match": "bias", "lr": 0.1, "weight_decay": 0.0}]},
        schedule={"factor": [0.5, 0.1], "threshold": 0.9},
    )
    run_ranks(_train, 2, config)
    history = read_ledger(tmp_path / "run")
    drops = [e for e in history.validations if e["decision"] == "reduced"]
    assert drops[0]["lr_before"] == [0.01, 0.1]
    assert drops[0]["lr_after"] == [0.005, pytest.approx(0.01)]
