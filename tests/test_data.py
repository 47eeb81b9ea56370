"""Data sets on disk, and the order in which ranks see them."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import pickle
import shutil
import socket
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distplateau.config import DataSection
from distplateau.errors import InputError
from distplateau.training.data import in_memory as data_module
from distplateau.training.data.in_memory import DEBIAN_FASHION_MNIST, check_data, load_data
from distplateau.training.data.order import deal_batches, epoch_order, rank_slice, split_validation

IDX_NAMES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
needs_debian = pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed"
)


@pytest.fixture(scope="session")
def idx_gz(tmp_path_factory):
    """Four packed files of MNIST's exact format, with labels 0..9 in turn and images as dark as their label."""
    folder = tmp_path_factory.mktemp("idx")
    for name, shape in IDX_NAMES.items():
        content = (np.arange(shape[0]) % 10).astype(np.uint8)
        if len(shape) == 3:
            content = np.broadcast_to(content[:, None, None], shape)
        header = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + content.tobytes(), compresslevel=1))
    return folder


@pytest.fixture
def no_internet(monkeypatch):
    """Fail every request at once, and count them."""
    requests = []

    def refuse(request, *args, **kwargs):
        requests.append(request)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return requests


@pytest.fixture
def no_debian(monkeypatch, tmp_path):
    monkeypatch.setattr(data_module, "DEBIAN_FASHION_MNIST", tmp_path / "not installed")


def section(name: str, root: Path, **settings) -> DataSection:
    return DataSection(name=name, root=str(root), **settings)


def refusal(*args, call=check_data) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# The order of samples.


@given(samples=st.integers(0, 500), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000))
def test_an_epoch_holds_every_sample_once(samples, seed, epoch):
    order = epoch_order(samples, seed, epoch)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(samples))


def test_the_order_follows_from_seed_and_epoch_alone():
    first = epoch_order(1000, 1, 2)
    torch.manual_seed(5)
    torch.rand(7)
    assert torch.equal(epoch_order(1000, 1, 2), first)
    orders = {tuple(epoch_order(1000, seed, epoch).tolist()) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


def test_adding_seed_and_epoch_would_repeat_orders():
    """Negative control for the hash: what a sum in its place would do."""

    def naive(seed, epoch):
        return torch.randperm(1000, generator=torch.Generator().manual_seed(seed + epoch))

    assert torch.equal(naive(1, 2), naive(2, 1))
    assert not torch.equal(epoch_order(1000, 1, 2), epoch_order(1000, 2, 1))


def test_the_order_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    epoch_order(100, 3, 4)
    split_validation(100, 10, 3)
    assert torch.equal(torch.get_rng_state(), before)


@given(start=st.integers(0, 10_000), size=st.integers(0, 300), world_size=st.integers(1, 64))
def test_slices_laid_end_to_end_are_the_batch(start, size, world_size):
    slices = [rank_slice(start, start + size, rank, world_size) for rank in range(world_size)]
    assert [position for begin, end in slices for position in range(begin, end)] == list(range(start, start + size))
    sizes = [end - begin for begin, end in slices]
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1


def test_fewer_samples_than_ranks_leave_some_ranks_without():
    sizes = [end - begin for begin, end in (rank_slice(96, 99, rank, 5) for rank in range(5))]
    assert sorted(sizes) == [0, 0, 1, 1, 1]


@given(samples=st.integers(0, 300), batch_size=st.integers(1, 50), seed=st.integers(0, 9))
def test_a_global_batch_is_the_same_at_any_number_of_ranks(samples, batch_size, seed):
    order = epoch_order(samples, seed, 0).tolist()
    for start in range(0, samples, batch_size):
        stop = min(start + batch_size, samples)
        for world_size in (1, 2, 3, 7):
            slices = [rank_slice(start, stop, rank, world_size) for rank in range(world_size)]
            assert [index for begin, end in slices for index in order[begin:end]] == order[start:stop]


@given(samples=st.integers(0, 500), batch_size=st.integers(1, 80), world_size=st.integers(1, 20))
def test_dealt_batches_are_those_of_one_rank(samples, batch_size, world_size):
    alone = deal_batches(samples, batch_size, 0, 1)
    dealt = [deal_batches(samples, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(batch for batches in dealt for batch in batches) == alone
    assert all(stop - start == batch_size for start, stop in alone[:-1])
    assert [position for start, stop in alone for position in range(start, stop)] == list(range(samples))
    counts = [len(batches) for batches in dealt]
    assert max(counts) - min(counts) <= 1
    assert [dealt[number % world_size][number // world_size] for number in range(len(alone))] == alone


# The validation set.


@given(samples=st.integers(2, 400), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_the_split_holds_every_sample_once(samples, seed, data):
    count = data.draw(st.integers(1, samples - 1))
    train, validation = split_validation(samples, count, seed)
    assert len(validation) == count
    for indices in (train, validation):
        assert indices.dtype == torch.int64
        assert indices.tolist() == sorted(indices.tolist())
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(samples))
    again = split_validation(samples, count, seed)
    assert torch.equal(again[0], train)
    assert torch.equal(again[1], validation)


def test_a_share_is_rounded_and_the_seed_decides():
    assert len(split_validation(1437, 0.1, 0)[1]) == 144
    assert torch.equal(split_validation(1437, 0.1, 0)[1], split_validation(1437, 144, 0)[1])
    assert not torch.equal(split_validation(1437, 0.1, 0)[1], split_validation(1437, 0.1, 1)[1])


@pytest.mark.parametrize(
    ("size", "missing"), [(1437, "training"), (99_999, "training"), (0.9999, "training"), (0.0001, "validation")]
)
def test_a_split_without_samples_is_refused(size, missing, tmp_path):
    for message in (
        refusal(section("digits", tmp_path, validation_size=size)),
        refusal(section("digits", tmp_path, validation_size=size), 0, call=load_data),
        refusal(1437, size, 0, call=split_validation),
    ):
        assert message.startswith(f"data.validation_size = {size!r}: leaves no {missing} sample")


@pytest.mark.parametrize("size", [1, 1436, 0.1])
def test_a_split_with_samples_is_accepted(size, tmp_path):
    check_data(section("digits", tmp_path, validation_size=size))


# Digits.


def test_digits():
    data = load_data(DataSection(), 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (1293, 144, 360)
    assert data.image_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert data.classes == tuple("0123456789")
    for split in (data.train, data.validation, data.test):
        assert split.images.dtype == torch.uint8
        assert split.images.shape[1:] == (1, 8, 8)
        assert split.labels.dtype == torch.int64
        assert int(split.images.max()) == 16


def test_digits_hold_every_sample_once():
    from sklearn.datasets import load_digits

    data = load_data(DataSection(), 3)
    splits = (data.train, data.validation, data.test)
    seen = sorted(tuple(image.flatten().tolist()) for split in splits for image in split.images)
    assert seen == sorted(tuple(int(value) for value in image) for image in load_digits().data)


def test_the_seed_moves_the_validation_set_and_nothing_else():
    one, other = (load_data(DataSection(), seed) for seed in (1, 2))
    assert torch.equal(one.test.images, other.test.images)
    assert not torch.equal(one.validation.images, other.validation.images)
    assert (one.mean, one.std) == (other.mean, other.std)


def test_statistics_are_those_of_the_whole_training_set_and_normalize_uses_them():
    data = load_data(DataSection(), 0)
    images = torch.cat([data.train.images, data.validation.images]).double()
    assert data.mean[0] == pytest.approx(float(images.mean()), rel=1e-14)
    assert data.std[0] == pytest.approx(float(images.std(correction=0)), rel=1e-14)
    normalized = data.normalize(torch.cat([data.train.images, data.validation.images]))
    assert normalized.dtype == torch.float32
    assert float(normalized.double().mean()) == pytest.approx(0, abs=1e-6)
    assert float(normalized.double().std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert data.train.images.dtype == torch.uint8  # the source is left as it is


def test_statistics_per_channel_and_of_a_constant_channel():
    images = torch.stack([torch.arange(32, dtype=torch.uint8).view(2, 4, 4), torch.full((2, 4, 4), 7)], dim=1)
    mean, std = data_module._statistics(images.to(torch.uint8))
    assert mean == (15.5, 7.0)
    assert std == (pytest.approx(float(np.arange(32).std()), rel=1e-15), 1.0)


def test_to_moves_every_split():
    moved = load_data(DataSection(), 0).to(torch.device("meta"))
    for split in (moved.train, moved.validation, moved.test):
        assert split.images.device.type == split.labels.device.type == "meta"


def test_an_unknown_name_is_refused(tmp_path):
    for message in (
        refusal(section("fashon-mnist", tmp_path)),
        refusal(section("fashon-mnist", tmp_path), 0, call=load_data),
    ):
        assert message.startswith(
            "data.name = 'fashon-mnist': there is no such data set; did you mean 'fashion-mnist'?"
        )


# Fashion-MNIST as Debian packages it.


@needs_debian
def test_debian_fashion_mnist(tmp_path, no_internet):
    root = tmp_path / "never made"
    check_data(section("fashion-mnist", root))
    data = load_data(section("fashion-mnist", root, validation_size=5000), 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert data.image_shape == (1, 28, 28)
    assert data.classes[0] == "T-shirt/top"
    assert data.num_classes == 10
    assert data.mean[0] / 255 == pytest.approx(0.2860, abs=5e-5)
    assert data.std[0] / 255 == pytest.approx(0.3530, abs=5e-5)
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert not no_internet
    assert not root.exists()


# Files in data.root.


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("place", [".", "raw"])
def test_idx_files_in_data_root(name, folder, place, idx_gz, tmp_path, no_internet, no_debian):
    target = tmp_path / folder / "raw" if place == "raw" else tmp_path
    shutil.copytree(idx_gz, target, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    check_data(section(name, tmp_path))
    data = load_data(section(name, tmp_path, validation_size=10_000), 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (50_000, 10_000, 10_000)
    for split in (data.train, data.test):
        assert torch.equal(split.images[:, 0, 14, 14].long(), split.labels)
    assert data.mean == (4.5,)
    assert sorted(tmp_path.rglob("*")) == before
    assert not no_internet


def test_idx_files_that_are_unpacked(idx_gz, tmp_path, no_internet):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_NAMES:
        (raw / name).write_bytes(gzip.decompress((idx_gz / f"{name}.gz").read_bytes()))
    assert len(load_data(section("mnist", tmp_path), 0).test) == 10_000


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _garble(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = b"\xff" * 50
    path.write_bytes(bytes(content))


def _no_deflate(path):
    """Break the compressed data where zlib notices it, not the checksum at the end."""
    content = bytearray(path.read_bytes())
    content[10] = 0b111  # a block of the type that does not exist
    path.write_bytes(bytes(content))
    with pytest.raises(zlib.error):
        gzip.decompress(bytes(content))


def _no_gzip(path):
    path.write_bytes(b"<html>not found</html>")


def _another_file(path):
    shutil.copy(path.with_name("train-labels-idx1-ubyte.gz"), path)


@pytest.mark.parametrize("damage", [_truncate, _garble, _no_deflate, _no_gzip, _another_file])
def test_a_damaged_idx_file_is_named(damage, idx_gz, tmp_path, no_internet):
    shutil.copytree(idx_gz, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    damage(path)
    assert refusal(section("mnist", tmp_path), 0, call=load_data).startswith(f"{path}: ")
    assert not no_internet


def test_idx_files_with_a_wrong_header_or_labels_are_refused(idx_gz, tmp_path):
    shutil.copytree(idx_gz, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    for wrong in (b"\xff" * 8 + content[8:], content[:-1] + b"\x0a"):
        path.write_bytes(gzip.compress(wrong))
        assert refusal(section("mnist", tmp_path), 0, call=load_data).startswith(f"{tmp_path}: holds ")


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """A small CIFAR-10 of torchvision's layout, whose MD5 sums torchvision is told to expect."""
    from torchvision.datasets import CIFAR10

    root = tmp_path / "cifar"
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]
    sums = []
    for name in names:
        size = 1000 if name == "test_batch" else 10_000
        labels = (np.arange(size) % 10).tolist()
        images = np.zeros((size, 3, 32, 32), np.uint8)
        images[:, 1] = 5  # the green channel
        images[:, 2, :, 0] = np.array(labels, np.uint8)[:, None]  # the left column of the blue one
        content = (
            {"label_names": list("abcdefghij")}
            if name == "batches.meta"
            else {"data": images.reshape(size, -1), "labels": labels}
        )
        (folder / name).write_bytes(pickle.dumps(content))
        sums.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums[6][1]})
    return root


def test_cifar10(cifar_root, no_internet):
    data = load_data(section("cifar10", cifar_root, validation_size=5000), 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 1_000)
    assert data.image_shape == (3, 32, 32)
    assert data.classes == tuple("abcdefghij")
    assert data.mean[:2] == (0.0, 5.0)
    assert torch.equal(data.train.images[:, 2, 17, 0].long(), data.train.labels)
    assert not no_internet


def test_cifar10_archive(cifar_root, no_internet, monkeypatch, capfd):
    from torchvision.datasets import CIFAR10

    archive = cifar_root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(cifar_root / "cifar-10-batches-py", "cifar-10-batches-py")
    shutil.rmtree(cifar_root / "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load_data(section("cifar10", cifar_root), 0).test) == 1000
    assert list(cifar_root.iterdir()) == [archive]
    _truncate(archive)
    assert refusal(section("cifar10", cifar_root), 0, call=load_data).startswith(f"{archive}: is damaged")
    assert not no_internet
    assert capfd.readouterr() == ("", "")


def test_a_damaged_or_missing_cifar10_file_is_named(cifar_root, no_internet):
    path = cifar_root / "cifar-10-batches-py" / "data_batch_3"
    _truncate(path)
    assert refusal(section("cifar10", cifar_root), 0, call=load_data).startswith(f"{path}: is damaged")
    path.unlink()
    assert refusal(section("cifar10", cifar_root), 0, call=load_data).startswith(f"{path}: is missing")
    assert not no_internet


# Downloads.


def test_nowhere_to_be_had_gives_one_line_with_the_three_ways(tmp_path, no_internet, no_debian, capfd):
    for message in (
        refusal(section("fashion-mnist", tmp_path)),
        refusal(section("fashion-mnist", tmp_path), 0, call=load_data),
    ):
        assert message.startswith(f"data.root = {str(tmp_path)!r}: fashion-mnist is not there, and the download failed")
        assert "Name or service not known" in message
        for way in ("(1) put the four *-ubyte.gz files", "(2) apt-get install dataset-fashion-mnist", "(3) run once"):
            assert way in message
    assert no_internet
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == [".fashion-mnist.lock"]


@pytest.mark.parametrize(("name", "way"), [("mnist", "*-ubyte.gz files of mnist"), ("cifar10", "cifar-10-python.tar")])
def test_nowhere_to_be_had_gives_both_ways(name, way, tmp_path, no_internet, capfd):
    message = refusal(section(name, tmp_path))
    assert message.startswith(f"data.root = {str(tmp_path)!r}: {name} is not there, and the download failed")
    assert way in message
    assert "(2) run once where the internet" in message
    assert capfd.readouterr() == ("", "")


def test_a_network_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    timeouts = []

    def hang(request, *args, **kwargs):
        timeouts.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    assert "timed out" in refusal(section("mnist", tmp_path))
    assert set(timeouts) == {data_module._NETWORK_TIMEOUT_S}
    assert socket.getdefaulttimeout() is None


def test_a_root_that_is_a_file_matters_only_to_a_download(tmp_path, no_internet, no_debian, monkeypatch, idx_gz):
    root = tmp_path / "file"
    root.write_text("")
    message = refusal(section("fashion-mnist", root))
    assert message.startswith(f"data.root = {str(root)!r}: ")
    assert "nothing can be written there" in message
    assert not no_internet
    check_data(section("digits", root))
    monkeypatch.setattr(data_module, "DEBIAN_FASHION_MNIST", idx_gz)
    check_data(section("fashion-mnist", root))


def test_a_root_that_cannot_be_made_is_refused(no_internet):
    message = refusal(section("mnist", Path("/proc/distplateau/data")))  # refused even to the superuser
    assert message.startswith("data.root = '/proc/distplateau/data': mnist is not there, and nothing can be written")
    assert not no_internet


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_root_matters_only_to_a_download(tmp_path, no_internet, idx_gz):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal(section("mnist", tmp_path))
    tmp_path.chmod(0o700)
    shutil.copytree(idx_gz, tmp_path, dirs_exist_ok=True)
    tmp_path.chmod(0o500)
    assert len(load_data(section("mnist", tmp_path), 0).test) == 10_000
    tmp_path.chmod(0o700)


def _fake_mnist(files: Path, seconds: float, log: Path):
    """Stand in for torchvision's MNIST: its download takes a while and prints."""

    class Fake:
        def __init__(self, root, download):
            with log.open("a") as lines:
                lines.write(f"{os.getpid()}\n")
            print("Downloading")  # noqa: T201
            sys.stderr.write("100%\n")
            raw = Path(root) / "MNIST" / "raw"
            raw.mkdir(parents=True)
            time.sleep(seconds)
            if not files.is_dir():
                raise urllib.error.URLError("no route to host")
            for file in files.iterdir():
                shutil.copy(file, raw)

    return Fake


def test_a_download_arrives_whole_and_in_silence(tmp_path, idx_gz, monkeypatch, capfd):
    from torchvision import datasets

    root = tmp_path / "a new" / "folder"
    monkeypatch.setattr(datasets, "MNIST", _fake_mnist(idx_gz, 0, tmp_path / "log"))
    check_data(section("mnist", root))
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in root.iterdir()} == {".mnist.lock", "MNIST"}
    assert {path.name for path in (root / "MNIST" / "raw").iterdir()} == {f"{name}.gz" for name in IDX_NAMES}
    check_data(section("mnist", root))
    assert len((tmp_path / "log").read_text().split()) == 1


def _check_in_a_process(root, files, log, start, results):
    from torchvision import datasets

    datasets.MNIST = _fake_mnist(files, 0.5, log)
    start.wait()
    try:
        check_data(section("mnist", root))
        results.put("")
    except InputError as error:
        results.put(str(error))


@pytest.mark.parametrize("succeeds", [True, False])
def test_one_process_downloads_while_the_others_wait(succeeds, tmp_path, idx_gz):
    fork = multiprocessing.get_context("fork")
    start, results, log = fork.Barrier(3), fork.Queue(), tmp_path / "log"
    files = idx_gz if succeeds else tmp_path / "nothing"
    args = (tmp_path / "data", files, log, start, results)
    processes = [fork.Process(target=_check_in_a_process, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert len(log.read_text().split()) == 1
    if succeeds:
        assert outcomes == [""] * 3
    else:
        assert all("no route to host" in outcome for outcome in outcomes)


def test_a_later_start_tries_again_after_a_failed_download(tmp_path, no_internet, idx_gz, monkeypatch):
    from torchvision import datasets

    root = tmp_path / "data"
    lock = root / ".mnist.lock"
    refusal(section("mnist", root))
    assert "Name or service not known" in lock.read_text()
    monkeypatch.setattr(datasets, "MNIST", _fake_mnist(idx_gz, 0, tmp_path / "log"))
    check_data(section("mnist", root))
    # The old reason is gone: those who wait now would take it for this attempt's if its process died.
    assert not lock.read_text()
