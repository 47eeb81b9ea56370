"""Data that is read by workers, in whole runs: image folders and a user's function."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from torchvision.io import write_png

from distplateau.errors import InputError
from distplateau.record.ledger import read_ledger
from distplateau.training.evaluate import evaluate
from distplateau.training.setup import prepare_parts
from ranks import run_ranks
from test_interruption import _signalled, trace
from test_trainer import _train, make_config, same_tensors


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Bright and dark pictures, 40 to train on and 12 to test."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 6)):
        for label, level in (("bright", 180), ("dark", 20)):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 60, (3, 20, 24), generator=generator, dtype=torch.uint8)
                write_png(noise + level, str(root / part / label / f"{number}.png"))
    return root


def _train_with_workers(rank, config):
    return _train(rank, config)


def sections(root, **training):
    return {
        "data": {
            "name": "image-folder", "root": str(root), "args": {"size": 16, "resize": 18}, "global_batch_size": 6,
            "eval_batch_size": 4, "validation_size": 8, "workers": 1,
        },
        "schedule": {"patience": 10},
        "training": {"epochs": 4, **training},
    }  # fmt: skip


def test_an_image_folder_is_trained_on_interrupted_and_evaluated(tmp_path, pictures):
    whole = run_ranks(_train_with_workers, 2, make_config(tmp_path / "whole", **sections(pictures)))
    events = read_ledger(tmp_path / "whole" / "run").validations
    assert {event["count"] for event in events} == {8}
    assert events[-1]["metrics"]["val/accuracy"] == 1.0
    cut = sections(pictures)
    cut["data"]["workers"] = 0  # what is read does not depend on who reads it
    config = make_config(tmp_path / "cut", **cut)
    assert run_ranks(_signalled, 2, config, 8, [1], signal.SIGTERM)[0][0] == 75
    resumed = run_ranks(_train, 2, config)
    assert same_tensors(resumed[0][1], whole[0][1])
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    result = evaluate(tmp_path / "whole" / "run")
    assert (result["count"], result["accuracy"]) == (12, 1.0)


def test_other_workers_do_not_make_another_run(pictures, tmp_path):
    from distplateau.training.setup import differences

    one, other = sections(pictures), sections(pictures)
    other["data"]["workers"] = 7
    assert differences(make_config(tmp_path, **one), make_config(tmp_path, **other)) == []


FUNCTION = """
import torch
def make(root, size=40):
    inputs = torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return [[(x, int(x.mean() > 0)) for x in part] for part in (inputs, inputs[:12])]
"""


def test_a_function_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(FUNCTION.replace("return [[", "parts = [[").rstrip() + CLASSES)
    monkeypatch.chdir(tmp_path)
    section = {
        "data": {"name": "my_data:make", "args": {"size": 50}, "validation_size": 10, "global_batch_size": 8},
        "training": {"epochs": 2},
    }
    results = run_ranks(_in_folder, 2, tmp_path, make_config(tmp_path, **section))
    assert results[0][0] == results[1][0]
    start = read_ledger(tmp_path / "run").start
    assert start["samples"] == {"train": 40, "validation": 10, "test": 12}
    assert start["image_shape"] == [1, 6, 6]


CLASSES = """
    class Samples(list):
        classes = ("low", "high")
    return tuple(Samples(part) for part in parts)
"""


def _in_folder(rank, folder, config):
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    return _train(rank, config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "image-folder", "root": "nowhere"}, "data.root = 'nowhere'"),
        ({"name": "digits", "args": {"x": 1}}, "data.args = {'x': 1}: digits takes none"),
        ({"name": "image-foldr"}, "data.name = 'image-foldr': there is no such data set; did you mean 'image-folder'"),
        ({"name": "nowhere:make"}, "data.name = 'nowhere:make'"),
        ({"workers": -1}, "data.workers = -1"),
    ],
)
def test_mistakes_are_named(tmp_path, data, message):
    with pytest.raises(InputError) as caught:
        prepare_parts(make_config(tmp_path, data=data))
    assert message in str(caught.value)
