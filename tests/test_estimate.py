"""What a training step costs: estimates against what torch's profiler counts, and the words that are made of them."""

import gc
import itertools
from contextlib import contextmanager

import pytest
import torch
from tiny import AUTOENCODER, CLOOB, DENOISER
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from ldm_lab.config import PartConfig, RunConfig, register
from ldm_lab.estimate import StepCost, autocast_of_gpus, in_short, module_bytes, optimizer_bytes, peak_flops
from ldm_lab.interfaces import Denoiser
from ldm_lab.training import encoders
from ldm_lab.training.cost import config_cost, example_batch, task_cost


@register("denoiser", "transformer_of_test_estimate")
class Transformer(Denoiser):
    """A denoiser of another make: attention over the pixels, layer norms, no convolutions."""

    def __init__(
        self, channels: int, conditions: dict, *, width: int, depth: int, gradient_checkpointing: bool
    ) -> None:
        super().__init__()
        self.spec = dict(conditions)
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.told = nn.Linear(conditions["embed"].width + 1, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.checkpointing = gradient_checkpointing

    def forward(self, x: Tensor, time: Tensor, embed: Tensor) -> Tensor:
        h = self.enter(x.flatten(2).transpose(1, 2))  # [B, hw, width]
        h = h + self.told(torch.cat([embed, time[:, None]], 1))[:, None]  # [B, hw, width]
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.checkpointing else block(h)  # [B, hw, width]
        return self.leave(h).transpose(1, 2).reshape(x.shape)  # [B, C, h, w]


def made(denoiser: dict, batch_size: int, image_size: int = 128, **sections: dict) -> RunConfig:
    """Return a run of a denoiser; without weights, and without a cache as it stands."""
    glide = denoiser["name"] == "glide_unet"
    text = {"name": "glide_text", "vocabulary": "clip", "vocab_size": 600, "text_size": 6}
    return RunConfig.from_dict(
        {
            "data": {"name": "folder", "path": "x", "image_size": image_size, "batch_size": batch_size},
            "autoencoder": {"name": "identity"} if glide else AUTOENCODER,
            "conditioner": text if glide else CLOOB,
            "cache": {"folder": "x"},
            "denoiser": denoiser,
            "objective": {"name": "eps_hybrid", "betas": "linear"} if glide else {"name": "v_cosine"},
            **sections,
        }
    )


CCLD = {**DENOISER, "base_channels": 64, "multipliers": [1, 2], "blocks_per_level": 1}
GLIDE = {
    "name": "glide_unet", "base_channels": 32, "multipliers": [1], "blocks_per_level": 1, "attention": [1],
    "head_width": 16, "text_width": 32, "text_layers": 1, "text_heads": 2,
}  # fmt: skip
TRANSFORMER = {"name": "transformer_of_test_estimate", "width": 64, "depth": 3}


@contextmanager
def without_collection():
    """Keep the garbage collector from running meanwhile."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measured_peak(config: RunConfig) -> int:
    """Return the most bytes that torch's profiler counts during two training steps on a CPU."""
    torch.manual_seed(0)
    gc.collect()  # what other tests have left must not go away meanwhile: it would be taken off the peak
    with without_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task = config.task_class()(config, read_weights=False)
        task.insert_lora()
        batch = example_batch(task, config["data"].option("image_size"))
        optimizer = torch.optim.AdamW(nn.ModuleList(task.trained_modules()).parameters(), fused=True)
        for number in range(2):
            with record_function(f"step {number}"):
                loss = task.rehearse(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                del loss
    events = profiler.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "step 1")
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live) if event.start_ns() >= begin else peak
    return peak


ONCE = [(CCLD, 2, False), (CCLD, 8, True), (GLIDE, 2, True), (TRANSFORMER, 2, False)]  # the others are slow


@pytest.mark.parametrize(
    ("denoiser", "batch_size", "checkpointing"),
    [
        pytest.param(*case, marks=[] if case in ONCE else pytest.mark.slow, id=f"{case[0]['name']}-{case[1]}-{case[2]}")
        for case in itertools.product([CCLD, GLIDE, TRANSFORMER], [2, 8], [False, True])
    ],
)
def test_the_peak_is_within_a_tenth_of_what_torch_s_profiler_counts(denoiser, batch_size, checkpointing):
    size = 16 if denoiser is GLIDE else 128  # latents of 16
    config = made({**denoiser, "gradient_checkpointing": checkpointing}, batch_size, size)
    cost, measured = config_cost(config), measured_peak(config)
    assert cost.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("chunk", [1, 8], ids=["one_by_one", "whole"])
def test_so_is_that_of_a_step_that_encodes_its_images(chunk, monkeypatch):
    monkeypatch.setattr(encoders, "CHUNK_PIXELS", chunk * 128 * 128)
    wide = {**AUTOENCODER, "ch": 64}
    config = made({**CCLD, "base_channels": 16, "gradient_checkpointing": False}, 8, autoencoder=wide, cache=None)
    cost, measured = config_cost(config), measured_peak(config)
    assert cost.peak == pytest.approx(measured, rel=0.1)


def test_counting_changes_nothing_and_knows_the_trained_parts():
    config = made(
        {**CCLD, "base_channels": 32}, 2, ema={}, ema_snapshots={"widths": [0.05, 0.1]}, optim={"state": "8bit"}
    )
    with torch.device("meta"):
        task = config.task_class()(config, read_weights=False)
    before = torch.random.get_rng_state()
    cost = task_cost(task, 64)
    assert torch.equal(before, torch.random.get_rng_state()) and not task.rehearsing
    assert {parameter.device.type for parameter in task.parameters()} == {"meta"}
    assert cost.parameters == sum(p.numel() for p in task.model.parameters()) > cost.trained
    assert cost.weights == 4 * cost.parameters and cost.gradients == 4 * cost.trained
    assert cost.average == 3 * cost.weights, "the one that is sampled, and two that snapshots are made of"
    assert cost.optimizer == optimizer_bytes(task.model.parameters(), eight_bit=True) < 3 * cost.trained
    assert cost.frozen == module_bytes(*task.frozen.values()) and cost.recomputed == 0
    half = config_cost(config.with_part("trainer", PartConfig("trainer", "trainer", {"precision": "bf16-mixed"})))
    assert half.weights == cost.weights
    assert half.flops == pytest.approx(cost.flops * 4, rel=0.05), "four times the pixels"


def test_half_precision_keeps_what_gpus_normalize_in_single_precision():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(1, 8)

    net, x = Net(), torch.randn(2, 8, 16, 16)
    with autocast_of_gpus(), torch.autocast("cpu", torch.bfloat16):
        y = net.conv(x)
        assert (y.dtype, net.norm(y).dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.norm(net.conv(x)).dtype is torch.bfloat16


@pytest.mark.parametrize("task", ["autoencoder", "cloob"])
def test_the_other_tasks_are_counted_too(task):
    own = {
        "autoencoder": {"autoencoder": AUTOENCODER, "discriminator": {"start": 100, "base_channels": 8, "layers": 2}}
    }
    own["cloob"] = {"conditioner": CLOOB}
    data = {"name": "folder", "path": "x", "image_size": 32, "batch_size": 4}
    cost = config_cost(RunConfig.from_dict({"task": task, "data": data, **own[task]}))
    assert cost.flops > 1e6 and cost.trained == cost.parameters - 1 and cost.frozen == 0, (
        "but for the factor of the loss"
    )


def test_a_cost_in_words():
    cost = StepCost(4, 10, 8, 100, 0, 40_000_000, 32_000_000, 64_000_000, 0, 4_000_000, 240_000_000)
    assert cost.in_words() == (
        "about 240 MB: weights 40 MB, gradients 32 MB, the optimizer 64 MB, frozen parts 4 MB, intermediate results of "
        "4 images 100 MB"
    )
    assert (cost.batch_that_fits(300_000_000), cost.batch_that_fits(150_000_000)) == (6, 0)
    assert [in_short(n) for n in (999, 2_793_476, 1_174_321_228)] == ["999", "2.79 M", "1.17 B"]


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989),
        ("NVIDIA H100 PCIe", "16-mixed", 756),
        ("NVIDIA A100-SXM4-80GB", "32-true", 156),
        ("NVIDIA A100-PCIE-40GB", "bf16-mixed", 312),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165),
        ("Tesla V100-SXM2-16GB", "16-mixed", 125),
        ("Tesla V100-SXM2-16GB", "bf16-mixed", None),
        ("Tesla T4", "32-true", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", None),
        ("NVIDIA H100 80GB HBM3", "64-true", None),
        ("cpu", "bf16-mixed", None),
    ],
)
def test_what_a_card_can_do_is_known_by_its_exact_name(device, precision, tera):
    assert peak_flops(device, precision) == (tera and tera * 1e12)


def test_without_tf32_single_precision_has_no_known_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3", "32-true", tf32=False) is None
