"""Losses by name, one value per sample."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from distplateau.errors import InputError
from distplateau.training.parts.losses import build_loss
from distplateau.training.parts.objective import Objective

OUTPUTS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])
ONE_HOT = functional.one_hot(LABELS, 4).float()


def by_sample(function):
    return torch.stack([function(OUTPUTS[i : i + 1], LABELS[i : i + 1]) for i in range(len(OUTPUTS))]).flatten()


@pytest.mark.parametrize(
    ("name", "args", "oracle"),
    [
        ("cross_entropy", {}, lambda: torch.nn.CrossEntropyLoss(reduction="none")(OUTPUTS, LABELS)),
        (
            "cross_entropy",
            {"label_smoothing": 0.2},
            lambda: -((0.8 * ONE_HOT + 0.05) * OUTPUTS.log_softmax(1)).sum(1),
        ),
        ("mse", {}, lambda: (OUTPUTS - ONE_HOT).square().mean(1)),
        ("bce", {}, lambda: -(ONE_HOT * OUTPUTS.sigmoid().log() + (1 - ONE_HOT) * (-OUTPUTS).sigmoid().log()).mean(1)),
    ],
)
def test_values_and_their_independence_of_the_batch(name, args, oracle):
    loss = build_loss(name, args)
    losses = loss(OUTPUTS, LABELS)
    assert losses.shape == (7,)
    torch.testing.assert_close(losses, oracle())
    torch.testing.assert_close(by_sample(loss), losses)


def test_regression_targets():
    torch.testing.assert_close(build_loss("mse", {})(OUTPUTS, OUTPUTS + 2), torch.full((7,), 4.0))
    torch.testing.assert_close(build_loss("mse", {})(OUTPUTS[:, :1], OUTPUTS[:, 0] + 3), torch.full((7,), 9.0))


def test_whole_numbers_are_targets_where_there_is_one_for_each_output():
    numbers = torch.arange(7)
    torch.testing.assert_close(build_loss("mse", {})(numbers[:, None] + 3.0, numbers), torch.full((7,), 9.0))
    torch.testing.assert_close(build_loss("bce", {})(OUTPUTS, ONE_HOT.bool()), build_loss("bce", {})(OUTPUTS, LABELS))


def test_labels_in_many_places_give_one_value_per_sample():
    outputs, labels = OUTPUTS.view(7, 2, 2), LABELS.view(7, 1).expand(7, 2) // 2
    expected = torch.stack([functional.cross_entropy(outputs[i].T, labels[i]) for i in range(7)])
    torch.testing.assert_close(build_loss("cross_entropy", {})(outputs, labels.int()), expected)


def test_a_function_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "def absolute(outputs, targets, scale=1.0):\n    return scale * outputs.abs().sum(1)\n"
        "def mean(outputs, targets):\n    return outputs.mean()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.testing.assert_close(
        build_loss("my_losses:absolute", {"scale": 2.0})(OUTPUTS, LABELS), 2 * OUTPUTS.abs().sum(1)
    )
    with pytest.raises(InputError, match=r"training.loss = 'my_losses:mean': gave shape \(\) for 7 samples"):
        build_loss("my_losses:mean", {})(OUTPUTS, LABELS)
    with pytest.raises(InputError, match=r"training.loss_args.scael = 2: unknown argument"):
        build_loss("my_losses:absolute", {"scael": 2})


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cross_entropi", {}, "training.loss = 'cross_entropi': there is no such loss; did you mean 'cross_entropy'"),
        ("cross_entropy", {"smoothing": 0.1}, "training.loss_args.smoothing = 0.1: unknown argument"),
        ("cross_entropy", {"label_smoothing": 1.0}, "training.loss_args.label_smoothing = 1.0: must lie in"),
        ("cross_entropy", {"label_smoothing": "a"}, "training.loss_args.label_smoothing = 'a': must lie in"),
        ("mse", {"x": 1}, "training.loss_args.x = 1: unknown argument of mse; mse takes none"),
        ("nowhere:f", {}, "training.loss = 'nowhere:f': 'nowhere' cannot be imported"),
    ],
)
def test_mistakes_are_named(name, args, message):
    with pytest.raises(InputError) as caught:
        build_loss(name, args)
    assert message in str(caught.value)


def test_metrics_of_a_batch():
    objective = Objective(
        build_loss("cross_entropy", {}), 4, lambda outputs, targets: {"margin": outputs.max(1).values}
    )
    values = objective.metrics(OUTPUTS, LABELS)
    assert list(values) == ["val/loss", "val/accuracy", "val/margin"]
    assert values["val/accuracy"].tolist() == [int(o.argmax()) == int(t) for o, t in zip(OUTPUTS, LABELS, strict=True)]
    wide = torch.eye(9)[LABELS]
    assert list(Objective(build_loss("mse", {}), 9).metrics(wide, LABELS)) == ["val/loss", "val/accuracy", "val/top5"]
    assert list(Objective(build_loss("mse", {})).metrics(OUTPUTS, OUTPUTS)) == ["val/loss"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda o, t: o.mean(), "the function returned Tensor; return a dict"),
        (lambda o, t: {"x": o.mean()}, r"x is \(\) for 7 samples"),
        (lambda o, t: {"x": 1.0}, "x is float for 7 samples"),
    ],
)
def test_metrics_that_are_none_per_sample_are_refused(returned, message):
    with pytest.raises(InputError, match=message):
        Objective(build_loss("cross_entropy", {}), 4, returned).metrics(OUTPUTS, LABELS)
