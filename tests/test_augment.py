"""Augmentation against torchvision, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as vision

from distplateau.errors import InputError
from distplateau.training.data.augment import build_augment

SHAPES = [(1, 8, 8), (3, 32, 32), (3, 5, 9)]


def images(shape, count=40, dtype=torch.uint8):
    return torch.randint(1, 256, (count, *shape), generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("mode", ["reflect", "zero"])
def test_crop_is_one_of_torchvisions_crops_for_each_image(shape, dtype, mode):
    batch, padding = images(shape, dtype=dtype), 3
    result = build_augment([{"name": "crop", "padding": padding, "mode": mode}])(batch, 0)
    assert (result.shape, result.dtype) == (batch.shape, dtype)
    found = set()
    for before, after in zip(batch, result, strict=True):
        padded = vision.pad(before, [padding] * 4, padding_mode="reflect" if mode == "reflect" else "constant")
        places = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if torch.equal(vision.crop(padded, top, left, *shape[1:]), after)
        ]
        assert places
        found.add(places[0])
    assert len(found) > 10  # each image has its own place


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_is_torchvisions_for_about_half_the_images(shape):
    batch = images(shape, count=400)
    result = build_augment(["flip"])(batch, 5)
    flipped = [torch.equal(vision.horizontal_flip(b), a) for b, a in zip(batch, result, strict=True)]
    kept = [torch.equal(b, a) for b, a in zip(batch, result, strict=True)]
    assert all(f or k for f, k in zip(flipped, kept, strict=True))
    assert 150 < sum(flipped) < 250


def test_erase_sets_a_square_to_zero():
    batch = images((1, 20, 20), count=300)
    result = build_augment([{"name": "erase", "p": 0.5, "size": 0.5}])(batch, 2)
    erased = (result == 0).flatten(1).sum(1)
    assert 100 < int((erased > 0).sum()) < 200
    assert int(erased.max()) == 100
    unchanged = result == batch
    assert bool((unchanged | (result == 0)).all())


@pytest.mark.parametrize("specs", [["flip"], ["crop"], ["erase"], ["crop", "flip", "erase"]])
def test_a_pure_function_of_images_and_seed(specs):
    augment, batch = build_augment(specs), images((3, 16, 16))
    held = batch.clone()
    torch.manual_seed(0)
    first = augment(batch, 4)
    torch.manual_seed(1)
    assert torch.equal(augment(batch, 4), first)
    assert not torch.equal(augment(batch, 5), first)
    assert torch.equal(batch, held)


def test_nothing_to_do():
    batch = images((1, 8, 8))
    assert build_augment([])(batch, 0) is batch
    assert build_augment(["crop", "flip", "erase"])(batch[:0], 0).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["flop"], "data.augment.0 = 'flop': there is no such augmentation; did you mean 'flip'"),
        (["flip", {"name": "crop", "pading": 2}], "data.augment.1.pading = 2: unknown setting of crop"),
        ([{"name": "crop", "padding": 0}], "data.augment.0.padding = 0: must be a whole number above 0"),
        ([{"name": "crop", "mode": "wrap"}], "data.augment.0.mode = 'wrap': must be 'reflect' or 'zero'"),
        ([{"name": "flip", "p": 2}], "data.augment.0.p = 2: must lie between 0 and 1"),
        ([{"p": 0.5}], "data.augment.0 = None: there is no such augmentation"),
        (["Transform"], "data.augment.0 = 'Transform': there is no such augmentation"),
        (["ColourJitter"], "there is no such augmentation; did you mean 'ColorJitter'"),
        (["RandomRotation"], "data.augment.0 = {}: RandomRotation does not take these settings ("),
        (
            [{"name": "ColorJitter", "hue": 2}],
            "data.augment.0 = {'hue': 2}: ColorJitter does not take these settings (hue",
        ),
    ],
)
def test_mistakes_are_named(specs, message):
    with pytest.raises(InputError) as caught:
        build_augment(specs)
    assert message in str(caught.value)


# torchvision's own, by the name of the class.

OWN = [
    {"name": "RandomRotation", "degrees": 30},
    {"name": "RandAugment", "magnitude": 5},
    {"name": "ColorJitter", "brightness": 0.5},
    "TrivialAugmentWide",
    "RandomVerticalFlip",
]


@pytest.mark.parametrize("spec", OWN)
def test_torchvisions_transforms_are_drawn_for_each_image(spec):
    batch = images((3, 16, 16), count=1).expand(40, -1, -1, -1)
    augment = build_augment([spec])
    augment.check(batch[:1])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = augment(batch, 4)
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws what it would draw without
    assert (first.shape, first.dtype) == (batch.shape, batch.dtype)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 1
    torch.manual_seed(1)
    assert torch.equal(augment(batch, 4), first)
    assert not torch.equal(augment(batch, 5), first)


def test_it_is_what_torchvision_does():
    batch = images((3, 16, 16))
    assert torch.equal(build_augment([{"name": "RandomInvert", "p": 1.0}])(batch, 0), vision.invert(batch))


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ({"name": "Resize", "size": 4}, (1, 8, 8), "turns torch.uint8 of [1, 8, 8] into torch.uint8 of [1, 4, 4]"),
        ({"name": "ToDtype", "dtype": torch.float32}, (1, 8, 8), "turns torch.uint8 of [1, 8, 8] into torch.float32"),
        ({"name": "RandomCrop", "size": 16}, (1, 8, 8), "cannot be applied to images of [1, 8, 8] ("),
        ("flip", (30,), "cannot be applied to images of [30] ("),
    ],
)
def test_what_does_not_fit_the_images_is_refused(spec, shape, message):
    with pytest.raises(InputError) as caught:
        build_augment([spec]).check(images(shape))
    assert str(caught.value).startswith(f"data.augment.0: {message}")
