"""The one way in which frozen parts encode images: while a denoiser is trained, and for a cache."""

from pathlib import Path

import pytest
import torch
from tiny import AUTOENCODER, CLOOB, DENOISER

from ldm_lab.batch import Batch
from ldm_lab.config import PartConfig, RunConfig, build
from ldm_lab.training import encoders
from ldm_lab.training.cost import config_cost
from ldm_lab.training.diffusion import DiffusionTask, trains_on_cpu
from ldm_lab.training.encoders import Encoders
from ldm_lab.training.encoding import CacheJob, CacheTarget, Variants


def task_of(precision: str | None = None) -> DiffusionTask:
    own = {} if precision is None else {"precision": precision}
    torch.manual_seed(0)
    return DiffusionTask(
        RunConfig.from_dict(
            {
                "data": {}, "denoiser": DENOISER, "objective": {"name": "v_cosine"},
                "autoencoder": {**AUTOENCODER, **own}, "conditioner": {**CLOOB, **own},
            }
        ),
        read_weights=False,
    )  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """What the autoencoder is given of a batch: how many images, and whether their channels come last."""
    given = []
    moments = build("autoencoder", AUTOENCODER).moments.__func__

    def looks(self, image):
        given.append((len(image), image.stride(1) == 1))
        return moments(self, image)

    monkeypatch.setattr("ldm_lab.autoencoders.kl_f8.KLAutoencoder.moments", looks)
    return given


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_training_on_images_and_making_a_cache_encode_by_the_same_code(precision, seen, monkeypatch):
    monkeypatch.setattr(encoders, "CHUNK_PIXELS", 2 * 32 * 32)
    task, image = task_of(precision), torch.rand(5, 3, 32, 32) * 2 - 1
    batch = Batch(list("abcde"), [""] * 5, image=image)
    with torch.no_grad():
        plain = task.autoencoder.moments(image)  # ([B, C, h, w], [B, C, h, w])
    seen.clear()
    torch.manual_seed(1)
    x0, conditions = task.encode(batch)
    assert seen == [(2, True), (2, True), (1, True)]
    source = build("data", {"name": "folder", "path": "nowhere", "image_size": 32, "batch_size": 1})
    job = CacheJob(task.encoders, source, Variants(), CacheTarget(Path("nowhere"), {}, 0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # whatever the pass's precision is
        cached = job.encode(batch)
    mean, logvar = (cached[name].float() for name in ("mean", "logvar"))
    exact = task.encoders.moments(image)
    assert torch.equal(exact[0].half(), cached["mean"]) and torch.equal(exact[1].half(), cached["logvar"])
    assert torch.equal(conditions["embed"].half(), cached["embed"])
    assert exact[0].is_contiguous() and exact[0].dtype == conditions["embed"].dtype == torch.float32
    torch.manual_seed(1)
    assert torch.allclose(x0, task.autoencoder.sample(mean, logvar, torch.randn_like(mean)), atol=2e-3)
    for ours, theirs in zip(exact, plain):
        assert torch.allclose(ours, theirs, atol=1e-5) == (precision is None)


def test_a_gpu_encodes_whole_batches_in_the_order_of_the_weights(seen):
    """As far as a CPU can tell: what `in_chunks` says counts."""
    parts = Encoders(build("autoencoder", AUTOENCODER).eval(), build("conditioner", CLOOB).eval())
    parts.in_chunks = False
    parts.moments(torch.zeros(40, 3, 64, 64))
    assert seen == [(40, False)]
    assert all(weight.is_contiguous() for weight in parts.autoencoder.parameters())


def test_what_encoding_takes_is_counted_for_the_device_of_the_run(monkeypatch):
    monkeypatch.setattr(encoders, "CHUNK_PIXELS", 128 * 128)
    config = RunConfig.from_dict(
        {
            "data": {"name": "folder", "path": "x", "image_size": 128, "batch_size": 8},
            "autoencoder": {**AUTOENCODER, "ch": 64}, "conditioner": CLOOB, "denoiser": DENOISER,
            "objective": {"name": "v_cosine"},
        }
    )  # fmt: skip
    peaks = {}
    for accelerator in ("cpu", "gpu"):
        options = PartConfig("trainer", "trainer", {"accelerator": accelerator})
        peaks[accelerator] = config_cost(config.with_part("trainer", options)).peak
    assert trains_on_cpu(config) == (not torch.accelerator.is_available())
    one = 64 * 128 * 128 * 4  # bytes of an image's widest feature maps
    assert peaks["gpu"] - peaks["cpu"] > 2 * 7 * one
