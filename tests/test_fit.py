"""fit(): objects instead of names."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from distplateau import fit
from distplateau.errors import InputError
from distplateau.record.ledger import read_ledger
from ranks import run_ranks


def settings(folder, **training):
    return {
        "run": {"name": "run", "dir": str(folder)},
        "data": {"global_batch_size": 16, "eval_batch_size": 32},
        "optimizer": {"lr": 0.05},
        "schedule": {"patience": 0},
        "training": {"epochs": 8, **training},
        "tracking": {"wandb": "disabled"},
    }


def points(count, seed):
    inputs = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs @ torch.arange(5.0)


def absolute(outputs, targets):
    return (outputs[:, 0] - targets).abs()


def _regress(rank, folder, kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1)
    train, validation = points(200, 0), points(50, 1)
    if kind == "dataset":
        train, validation = list(zip(*train, strict=True)), TensorDataset(*validation)
    run_dir = fit(model, "mse" if kind == "name" else absolute, train, validation, settings(folder))
    events = read_ledger(run_dir).validations
    return [event["value"] for event in events], [event["count"] for event in events], model.weight.detach()


@pytest.mark.parametrize("kind", ["name", "tensors", "dataset"])
def test_a_regression_on_two_ranks(tmp_path, kind):
    (values, counts, weight), second = run_ranks(_regress, 2, tmp_path, kind)
    assert values == second[0]
    assert counts == [50] * 8
    assert values[-1] < 0.5 * values[0]
    assert torch.equal(weight, second[2])
    assert read_ledger(tmp_path / "run").validations[0]["metrics"].keys() == {"val/loss"}


def _classify(rank, folder):
    torch.manual_seed(0)
    inputs, values = points(300, 0)
    labels = (values > 0).long() + (values > 3).long()
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    run_dir = fit(model, "cross_entropy", (inputs[:200], labels[:200]), (inputs[200:], labels[200:]), settings(folder))
    return read_ledger(run_dir).validations[-1]["metrics"]


def test_labels_bring_an_accuracy(tmp_path):
    [metrics] = run_ranks(_classify, 1, tmp_path)
    assert metrics.keys() == {"val/loss", "val/accuracy"}
    assert metrics["val/accuracy"] > 0.7


def test_mistakes_are_named(tmp_path):
    model, good = torch.nn.Linear(5, 1), points(20, 0)
    with pytest.raises(InputError, match="train_data: has 20 inputs and 19 targets"):
        fit(model, "mse", (good[0], good[1][:19]), good, settings(tmp_path))
    with pytest.raises(InputError, match="val_data: cannot be read as"):
        fit(model, "mse", good, [1, 2, 3], settings(tmp_path))
    with pytest.raises(InputError, match=r"training.loss = 'msee'"):
        fit(model, "msee", good, good, settings(tmp_path))
    with pytest.raises(InputError, match=r"training.loss = 'test_mistakes_are_named.*: gave shape \(\)"):
        fit(model, lambda outputs, targets: outputs.mean(), good, good, settings(tmp_path))
    with pytest.raises(InputError, match=r"training.epoks = 3: unknown key"):
        fit(model, "mse", good, good, settings(tmp_path, epoks=3))
    assert not (tmp_path / "run").exists()
