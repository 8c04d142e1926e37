"""Batches on their way to the device: as bytes, pinned where a GPU is, made float there; freed memory that is kept."""

import resource
from types import SimpleNamespace

import pytest
import torch
from data_sets import module, write_shards
from torch.utils.data import DataLoader

from ldm_lab import processes
from ldm_lab.batch import Batch, ReaderState
from ldm_lab.data import loader
from ldm_lab.data.datamodule import DataModule


def with_trainer(data: DataModule, device: str) -> DataModule:
    """Return a data module that believes in a Trainer on a device."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    return data


@pytest.fixture
def section(tmp_path):
    write_shards(tmp_path / "shards", 1, 8)
    return {"name": "webdataset", "shards": str(tmp_path / "shards" / "*.tar")}


def test_a_trainer_gets_bytes_and_makes_them_float_on_its_device(section):
    plain = next(iter(module(section).train_dataloader()))
    data = with_trainer(module(section), "cpu")
    made = next(iter(data.train_dataloader()))
    assert made.image.dtype == torch.uint8 and plain.image.dtype == torch.float32
    there = data.on_after_batch_transfer(data.transfer_batch_to_device(made, torch.device("cpu"), 0), 0)
    assert torch.equal(there.image, plain.image) and (there.key, there.text) == (plain.key, plain.text)
    assert there.state == plain.state is not None
    again = data.on_after_batch_transfer(there, 0)  # as the held-out images, which come as floats
    assert torch.equal(again.image, plain.image)
    assert data.on_after_batch_transfer(Batch(["a"], [""], mean=torch.zeros(1, 4, 1, 1)), 0).image is None


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_for_a_gpu_alone(section, device, pinned, workers, monkeypatch):
    asked = []

    def stand_in(*args, pin_memory: bool, **options) -> DataLoader:
        asked.append(pin_memory)
        return DataLoader(*args, **options)

    monkeypatch.setattr(loader, "SharedSignalsLoader", stand_in)
    next(iter(with_trainer(module({**section, "workers": workers}), device).train_dataloader()))
    next(iter(module(section).train_dataloader()))
    assert asked == [pinned, False]


def test_all_tensors_of_a_batch_are_moved_and_pinned(monkeypatch):
    state = ReaderState((0, 0, 0, 0))
    batch = Batch(
        ["a"], ["b"], torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.ones(1), None, {"embed": torch.ones(1)}, state
    )
    options = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **o: options.append(o) or to(tensor, *a, **o))
    moved = batch.to(torch.device("meta"))
    assert options == [{"non_blocking": True}] * 3
    assert moved.image.is_meta and moved.mean.is_meta and moved.logvar is None and moved.conditions["embed"].is_meta
    assert (moved.key, moved.text, moved.state) == (["a"], ["b"], state) and not batch.image.is_meta
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = batch.pin_memory()
    assert (pinned.image == 1).all() and pinned.mean == 2 and pinned.conditions["embed"] == 2


def test_large_blocks_are_used_again():
    """After a few times no page of them is new. (The process of the tests stays like this: it does no harm.)"""
    if processes.platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc's allocator")
    assert processes.keep_freed_memory(torch.device("cpu"))

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12 * 2**20)  # 48 MiB, 12,288 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(8)) < 1000


@pytest.mark.parametrize(("device", "libc"), [("cuda", "glibc"), ("cpu", "musl"), ("cpu", "")])
def test_elsewhere_the_allocator_is_left_alone(device, libc, monkeypatch):
    monkeypatch.setattr(processes.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(processes, "ctypes", None)
    assert not processes.keep_freed_memory(torch.device(device))
