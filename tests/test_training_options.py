"""What [training] and [schedule] offer beyond the plain loop, on real ranks: each with what it would be without."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from distplateau.errors import InputError
from distplateau.record.ledger import read_ledger
from distplateau.record.report.page import write_report
from distplateau.record.story import find_warnings
from distplateau.training.evaluate import evaluate
from distplateau.training.parts.averaging import WeightAverage
from distplateau.training.setup import prepare_parts
from distplateau.training.step import TrainStep
from distplateau.training.trainer import Trainer, train
from ranks import RankError, run_ranks
from test_trainer import _train, _train_until, make_config, same_tensors

REDUCING = {"patience": 0, "factor": 0.5, "threshold": 0.9}  # every validation but the first is bad


def decisions(folder):
    return [event["decision"] for event in read_ledger(folder / "run").validations]


# Early stop.


@pytest.mark.parametrize("ranks", [1, 2])
def test_early_stop_after_reductions(tmp_path, ranks):
    config = make_config(tmp_path, schedule=REDUCING, training={"epochs": 50, "early_stop": "2 reductions"})
    run_ranks(_train, ranks, config)
    history = read_ledger(tmp_path / "run")
    assert decisions(tmp_path) == ["improved", "reduced", "reduced"]
    assert (history.finished["reductions"], history.finished["ended_after"]) == (2, "2 reductions")
    before = history.events
    run_ranks(_train, ranks, config)  # stays at its end
    assert read_ledger(tmp_path / "run").events == before


def test_early_stop_at_min_lr(tmp_path):
    schedule = {**REDUCING, "min_lr": 0.004}
    run_ranks(_train, 1, make_config(tmp_path, schedule=schedule, training={"epochs": 50, "early_stop": "min_lr"}))
    history = read_ledger(tmp_path / "run")
    assert [event["lr_after"] for event in history.validations] == [[0.01], [0.005], [0.004]]
    assert history.finished["ended_after"] == "min_lr"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"early_stop": "min_lr"}}, "training.early_stop = 'min_lr': schedule.min_lr is 0"),
        (
            {"training": {"early_stop": "1 reduction"}, "schedule": {"name": "cosine"}},
            "training.early_stop = '1 reduction': the 'cosine' schedule makes no reductions",
        ),
        (
            {"training": {"early_stop": "min_lr"}, "schedule": {"min_lr": 0.01}, "optimizer": {"lr": 0.01}},
            "training.early_stop = 'min_lr': schedule.min_lr is no lower than the rate at the start, 0.01",
        ),
        ({"training": {"early_stop": "soon"}}, "training.early_stop = 'soon': write \"3 reductions\""),
    ],
)
def test_an_early_stop_that_cannot_come_is_refused(tmp_path, sections, message):
    with pytest.raises(InputError) as caught:
        prepare_parts(make_config(tmp_path, **sections))
    assert message in str(caught.value)


# The best weights put back.

# Training makes the accuracy better, which counts as worse here: the first validation stays the best.
WORSENING = {"monitor": "val/accuracy", "mode": "min", "patience": 0, "factor": 0.5}


def _watch_reductions(rank, config):
    """Return for each reduction whether the weights are the best ones afterwards, and whether Adam remembers."""
    seen = []
    validate = Trainer._validate

    def watched(self):
        before = [p.detach().clone() for p in self.replica.network.parameters()]
        event = validate(self)
        if event["decision"] == "improved":
            best[:] = before
        elif event["decision"] == "reduced":
            now, state = list(self.replica.network.parameters()), self.replica.optimizer.optimizer.state
            seen.append((same_tensors(now, best), same_tensors(now, before), len(state) > 0))
        return event

    best: list[torch.Tensor] = []
    Trainer._validate = watched
    try:
        train(config)
    finally:
        Trainer._validate = validate
    return seen


@pytest.mark.parametrize(
    ("wish", "restored", "remembers"), [(False, False, True), (True, True, True), ("reset", True, False)]
)
def test_restore_best_at_a_reduction(tmp_path, wish, restored, remembers):
    config = make_config(tmp_path, schedule={**WORSENING, "restore_best": wish}, training={"epochs": 4})
    for seen in run_ranks(_watch_reductions, 2, config):
        assert seen == [(restored, not restored, remembers)] * 3


def test_restore_best_survives_a_resume(tmp_path):
    sections = {"schedule": {**WORSENING, "restore_best": True}, "training": {"epochs": 5}}
    whole = run_ranks(_train, 2, make_config(tmp_path / "whole", **sections))
    config = make_config(tmp_path / "cut", **sections)
    run_ranks(_train_until, 2, config, 1)
    resumed = run_ranks(_train, 2, config)
    assert same_tensors(resumed[0][1], whole[0][1])


# The moving average.


def test_the_average_is_the_recurrence():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = WeightAverage(network, 0.5)
    expected = [p.detach().double() for p in network.parameters()]
    for step in range(1, 30):
        for p in network.parameters():
            p.data.add_(torch.randn_like(p))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.double() for e, p in zip(expected, network.parameters(), strict=True)]
    for held, reference in zip(average.network.parameters(), expected, strict=True):
        torch.testing.assert_close(held.double(), reference, rtol=1e-5, atol=1e-6)
    network[1].running_mean.fill_(3.0)
    average.copy_buffers()
    assert average.network[1].running_mean.tolist() == [3.0, 3.0]
    assert not any(p.requires_grad for p in average.network.parameters())


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_average_is_validated_saved_and_resumed(tmp_path, ranks):
    sections = {"training": {"epochs": 4, "ema": 0.9}, "schedule": {"patience": 10}}
    whole = run_ranks(_train, ranks, make_config(tmp_path / "whole", **sections))
    config = make_config(tmp_path / "cut", **sections)
    run_ranks(_train_until, ranks, config, 2)
    resumed = run_ranks(_train, ranks, config)
    assert resumed[0][0] == whole[0][0][2:]  # the same values, rates and decisions: the average went on as well
    plain = run_ranks(_train, ranks, make_config(tmp_path / "plain", training={"epochs": 4}, schedule={"patience": 10}))
    assert same_tensors(plain[0][1], whole[0][1])  # the training itself knows nothing of it
    assert [value for value, *_ in plain[0][0]] != [value for value, *_ in whole[0][0]]
    best = load_file(tmp_path / "whole" / "run" / "model.safetensors")
    assert not same_tensors(best.values(), whole[0][1])


# Micro-batches, a loss that is NaN, compilation, memory layout.


@pytest.mark.parametrize("ranks", [1, 3])
def test_micro_batches_are_a_matter_of_memory(tmp_path, ranks):
    sizes = []
    for size in (None, 5):
        training = {"epochs": 1, **({} if size is None else {"micro_batch_size": size})}
        config = make_config(tmp_path / str(size), training=training, optimizer={"name": "sgd", "lr": 0.1})
        sizes.append(run_ranks(_largest_batch, ranks, config))
    (whole, weights), (most, other) = sizes[0][0], sizes[1][0]
    assert whole == 48 // ranks
    assert most <= 5 < whole
    for a, b in zip(weights, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _largest_batch(rank, config):
    from accelerate import Accelerator

    trainer = Trainer(config, prepare_parts(config), Accelerator(cpu=True))
    sizes: list[int] = []
    trainer.replica.network.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    trainer.train_step.begin(0)
    for step in range(3):
        trainer.train_step(step)
    return max(sizes), [p.detach() for p in trainer.replica.network.parameters()]


def _poison(rank, config, step, victim):
    call = TrainStep.__call__

    def poisoned(self, at):
        if rank == victim and at == step:
            loss = self.loss
            self.loss = lambda outputs, targets: loss(outputs, targets) * math.nan
        return call(self, at)

    TrainStep.__call__ = poisoned
    try:
        train(config)
    finally:
        TrainStep.__call__ = call


def test_a_nan_loss_is_told_with_its_step_and_rank(tmp_path):
    run_ranks(_poison, 3, make_config(tmp_path, training={"epochs": 2}), 7, 2)
    events = read_ledger(tmp_path / "run").validations
    assert events[0]["nonfinite_loss"] == {"step": 7, "rank": 2}
    assert math.isnan(events[0]["train_loss"])
    [warning] = [text for text in find_warnings(read_ledger(tmp_path / "run")) if "training loss" in text]
    assert warning.endswith("first at step 7 on rank 2.")


def _modes(rank, config):
    seen = []
    forward = torch.nn.Conv2d.forward

    def watched(self, inputs):
        last = torch.channels_last
        laid_out = self.weight.is_contiguous(memory_format=last) and inputs.is_contiguous(memory_format=last)
        seen.append((laid_out, torch.are_deterministic_algorithms_enabled()))
        return forward(self, inputs)

    torch.nn.Conv2d.forward = watched
    try:
        train(config)
    finally:
        torch.nn.Conv2d.forward = forward
    assert not torch.are_deterministic_algorithms_enabled()
    return seen[-1]


@pytest.mark.parametrize("wanted", [False, True])
def test_channels_last_and_deterministic(tmp_path, wanted):
    config = make_config(
        tmp_path,
        model={"name": "resnet18", "args": {}},
        data={"validation_size": 1400, "global_batch_size": 18},
        training={"epochs": 1, "channels_last": wanted, "deterministic": wanted},
    )
    assert run_ranks(_modes, 2, config) == [(wanted, wanted)] * 2


def _compiled(rank, config):
    compiled = []
    compile_model = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **_: (
        compiled.append(type(self).__name__),
        compile_model(self, backend="eager"),
    )
    try:
        return _train(rank, config)[0], compiled
    finally:
        torch.nn.Module.compile = compile_model


def test_compiled_it_trains_alike(tmp_path):
    """With the eager backend: the machine may have no compiler for kernels."""
    plain = run_ranks(_train, 2, make_config(tmp_path / "plain", training={"epochs": 2}))
    results = run_ranks(_compiled, 2, make_config(tmp_path / "compiled", training={"epochs": 2, "compile": True}))
    assert results == [(plain[0][0], ["MLP"])] * 2
    names = load_file(tmp_path / "compiled" / "run" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "plain" / "run" / "model.safetensors").keys()


class HalfUsed(torch.nn.Module):
    """As a pretrained network of which one head is used."""

    def __init__(self):
        super().__init__()
        self.head, self.other = torch.nn.Linear(64, 10), torch.nn.Linear(64, 10)

    def forward(self, images):
        return self.head(images.flatten(1))


def build_half_used(num_classes, **_):
    torch.manual_seed(0)
    return HalfUsed()


@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_a_static_graph_gives_the_same_bits(tmp_path, micro_batch_size):
    training = {"epochs": 2, "micro_batch_size": micro_batch_size}
    plain = run_ranks(_train, 3, make_config(tmp_path / "plain", training=training))
    static = run_ranks(_train, 3, make_config(tmp_path / "static", training={**training, "static_graph": True}))
    assert static[0][0] == plain[0][0]
    assert same_tensors(static[0][1], plain[0][1])


def test_unused_parameters_are_named_and_a_static_graph_can_have_them(tmp_path):
    sections = {"model": {"name": f"{__name__}:build_half_used", "args": {}}}
    message = "model.name = '.*': does not use its parameter other.weight and 1 more; .*static_graph = true"
    with pytest.raises(RankError, match=message) as caught:
        run_ranks(_train, 2, make_config(tmp_path / "plain", **sections))
    assert "InputError" in str(caught.value)
    static = make_config(tmp_path / "static", **sections, training={"epochs": 2, "static_graph": True})
    [(two, _), _] = run_ranks(_train, 2, static)
    one, _ = _train(0, make_config(tmp_path / "one", **sections, training={"epochs": 2}))
    assert [event[1] for event in two] == [event[1] for event in one]


# Loss, metrics and augmentation by name.


def test_loss_metrics_and_augmentation_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text(
        "def confidence(outputs, targets):\n    return {'confidence': outputs.softmax(1).max(1).values}\n"
    )
    monkeypatch.chdir(tmp_path)
    sections = {
        "data": {"augment": ["flip", {"name": "crop", "padding": 1}]},
        "schedule": {"monitor": "val/confidence", "mode": "max"},
        "training": {
            "epochs": 4,
            "loss_args": {"label_smoothing": 0.1},
            "metrics": "my_metrics:confidence",
            "grad_accumulation": 2,
        },
    }
    whole = run_ranks(_in_folder, 2, tmp_path, make_config(tmp_path / "whole", **sections))
    config = make_config(tmp_path / "cut", **sections)
    run_ranks(_in_folder, 2, tmp_path, config, 2)
    resumed = run_ranks(_in_folder, 2, tmp_path, config)
    assert same_tensors(resumed[0][1], whole[0][1])  # the same flips and crops again
    events = read_ledger(tmp_path / "whole" / "run").validations
    assert all(event["value"] == event["metrics"]["val/confidence"] for event in events)
    result = evaluate(tmp_path / "whole" / "run")
    assert set(result) == {"loss", "accuracy", "top5", "confidence", "count"}
    assert result["count"] == 360
    plain = {**sections, "data": {}}
    assert not same_tensors(
        run_ranks(_in_folder, 2, tmp_path, make_config(tmp_path / "plain", **plain))[0][1], whole[0][1]
    )


def _in_folder(rank, folder, config, validations=None):
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    return _train(rank, config) if validations is None else _train_until(rank, config, validations)


def own_metrics(outputs, targets):
    """Depends on the precision, and has no value for a class."""
    products = outputs @ outputs.T
    return {"gram": products.mean(1), "first": torch.where(targets == 0, torch.nan, outputs[:, 0])}


def test_evaluation_measures_as_training_does_and_writes_json(tmp_path):
    sections = {
        "training": {"epochs": 1, "precision": "bf16", "metrics": "test_training_options:own_metrics"},
        "data": {"validation_size": 0.2},
    }
    run_ranks(_train, 1, make_config(tmp_path, **sections))
    measured = read_ledger(tmp_path / "run").validations[-1]["metrics"]
    result = evaluate(tmp_path / "run", split="validation")
    assert result["gram"] == measured["val/gram"]
    assert math.isnan(result["first"])
    text = (tmp_path / "run" / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["validation"]["first"] == "nan"
    page = write_report(tmp_path / "run").read_text()
    assert "validation accuracy" in page and "gram " in page
