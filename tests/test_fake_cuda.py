"""Every part on a GPU that is not there: no tensors of two devices in one operation, and no wait in a training step."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, to_gpu
from test_clip import ARCHITECTURE
from tiny import AUTOENCODER, CLOOB, DENOISER, embedding, shipped
from tiny_glide import TEXT, UNET, conditions

from ldm_lab.condition_sources.if_low_res import IFLowRes
from ldm_lab.conditions import ConditionRequest, ImageCondition, Level, TokenStates
from ldm_lab.config import RunConfig, build
from ldm_lab.guidance.classifier_free import guided
from ldm_lab.interfaces import Batch, Denoiser
from ldm_lab.io.images import to_images
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.timesteps import SobolTimesteps

IMAGEN = {
    "name": "imagen_unet", "base_channels": 8, "multipliers": [1, 2], "blocks_per_level": [1], "heads": 2,
    "head_width": 4, "attention_levels": [1], "text_levels": [1],
}  # fmt: skip
IF = {"name": "if_unet", "base_channels": 32, "head_width": 16, "pool_heads": 4, "multipliers": [1, 2]}
IF |= {"blocks_per_level": [1], "attention": [2], "text_width": 64}
LATENT, PIXELS = (2, 4, 8, 8), (2, 3, 32, 32)
DENOISERS = {
    "ccld_unet": (DENOISER, embedding(16)),
    "glide_unet": (UNET, conditions()),
    "glide_unet upsampler": (UNET, conditions(upsampler=True)),
    "glide_unet inpaint": (UNET, conditions(inpaint=True)),
    "glide_unet clip": (UNET, conditions(clip_width=12)),
    "imagen_unet": (IMAGEN, {"token_states": TokenStates(12, 8)}),
    "imagen_unet upsampler": (
        {**IMAGEN, "memory_efficient": True},
        {"token_states": TokenStates(12, 8), "low_res": ImageCondition(3, 4, enlarged=True), "low_res_level": Level()},
    ),
    "if_unet": (IF, {"token_states": TokenStates(48, 8)}),
    "if_unet upsampler": (
        {**IF, "efficient": True, "cross_only": True}, {"token_states": TokenStates(48, 8), **IFLowRes().spec}
    ),
}  # fmt: skip
AUTOENCODERS = {"identity": {"name": "identity"}, "kl_f8": AUTOENCODER}
CONDITIONERS = {
    "cloob": CLOOB,
    "clip": {"name": "clip", "architecture": ARCHITECTURE},
    "glide_text": TEXT,
    "none": {"name": "none"},
}
SOURCES = {
    "low_res": {"noise": 0.1, "blur": 1.0},
    "noised_low_res": {},
    "if_low_res": {},
    "inpaint": {},
    "clip_embed": {"width": 12},
}
OBJECTIVES = {
    "v_cosine": {"weighting": "min_snr"},
    "flow_matching": {"weighting": "soft_min_snr"},
    "eps_hybrid": {"timesteps": 100, "weighting": "min_snr"},
    "continuous": {},
}


def given(taken: dict, batch: int = 2) -> dict[str, torch.Tensor]:
    """Return conditions of a spec on the GPU."""
    made = {}
    for name, kind in taken.items():
        if name == "token_ids":
            made[name] = torch.zeros(batch, kind.length, dtype=torch.int64, device=CUDA)
            made[f"{name}_mask"] = torch.ones(batch, kind.length, dtype=torch.bool, device=CUDA)
        elif name == "token_states":
            made[name] = torch.randn(batch, kind.length, kind.width, device=CUDA)
            made[f"{name}_mask"] = torch.ones(batch, kind.length, dtype=torch.bool, device=CUDA)
        elif name == "low_res_level":
            made[name] = torch.rand(batch, device=CUDA)
        elif name in ("embed", "clip_embed"):
            made[name] = torch.randn(batch, kind.width, device=CUDA)
        else:
            side = 16 if kind.enlarged else 16 // kind.scale_factor
            made[name] = torch.randn(batch, kind.channels, side, side, device=CUDA)
    return made


def on_gpu(role: str, section: dict, *runtime) -> torch.nn.Module:
    return to_gpu(build(role, section, *runtime).eval().requires_grad_(False))


def is_there(value: torch.Tensor) -> bool:
    return value.device.type == "cuda"


def test_no_part_is_left_out():
    """A new part has to be added to the tables above."""
    assert {name.split()[0] for name in DENOISERS} == shipped("denoiser")
    assert AUTOENCODERS.keys() == shipped("autoencoder")
    assert CONDITIONERS.keys() == shipped("conditioner") - {"t5"}  # whose weights are in no file of ours
    assert SOURCES.keys() == shipped("condition_source")
    assert OBJECTIVES.keys() == shipped("objective")


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers(name):
    section, taken = DENOISERS[name]
    channels = 4 if section is DENOISER else 3
    with fake_cuda() as gpu:
        net = on_gpu("denoiser", section, channels, taken)
        gpu.waits.clear()
        out = net(torch.randn(2, channels, 16, 16, device=CUDA), torch.rand(2, device=CUDA), **given(taken))
    assert is_there(out) and gpu.waits == []


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders(name):
    with fake_cuda() as gpu:
        autoencoder = on_gpu("autoencoder", AUTOENCODERS[name])
        gpu.waits.clear()
        image = torch.randn(*PIXELS, device=CUDA)
        z = autoencoder.encode(image, torch.randn_like(autoencoder.moments(image)[0]))
        assert is_there(z) and is_there(autoencoder.decode(z))
    assert gpu.waits == []


@pytest.mark.parametrize("name", CONDITIONERS)
def test_conditioners(name):
    picture = to_images(torch.zeros(1, 3, 32, 32))[0]
    with fake_cuda() as gpu:
        conditioner = on_gpu("conditioner", CONDITIONERS[name])
        gpu.waits.clear()
        batch = Batch(["a", "b"], ["a cat", "a dog"], image=torch.randn(*PIXELS, device=CUDA))
        made = conditioner.from_batch(batch)
        null = conditioner.null(made)
        assert gpu.waits == [], "a training step would wait"
        asked = conditioner.from_prompts(["a cat"], [] if name == "glide_text" else [picture])
        assert all(map(is_there, (*made.values(), *null.values(), *asked.values())))


@pytest.mark.parametrize("name", SOURCES)
def test_condition_sources(name):
    with fake_cuda() as gpu:
        source = on_gpu("condition_source", {"name": name, **SOURCES[name]})
        autoencoder = on_gpu("autoencoder", AUTOENCODERS["kl_f8"])  # a step waits once for whether z are pixels
        image = torch.randn(*PIXELS, device=CUDA)
        for _ in range(2):  # tables are copied to a device once
            gpu.waits.clear()
            made = source.from_batch(Batch(["a", "b"], ["", ""], image=image), image, autoencoder, None)
        assert gpu.waits == []
        x = torch.randn(*PIXELS, device=CUDA)
        asked = source.from_request(ConditionRequest(x, low_res=torch.randn(2, 3, 8, 8, device=CUDA)))
        assert all(map(is_there, (*made.values(), *asked.values(), *source.null(made).values())))


class Echo(Denoiser):
    """A denoiser of no size that heeds what it is told."""

    time_input = "timestep"

    def forward(self, x, time, embed):
        told = x * time[:, None, None, None] + embed[:, :1, None, None]
        return torch.cat([told, told], dim=1) if self.learns_variance else told


def echo(objective: dict) -> tuple[Denoiser, dict[str, torch.Tensor]]:
    """Return a denoiser that goes with an objective, and its conditions on the GPU."""
    net = Echo()
    if objective["name"] != "eps_hybrid":
        net.time_input, net.learns_variance = "t", False
    else:
        net.learns_variance = True
    return net, given(embedding(16))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    section = {"name": name, **OBJECTIVES[name]}
    objective = build("objective", section)
    with fake_cuda() as gpu:
        net, told = echo(section)
        for again in (False, True):  # tables are copied to a device once
            gpu.waits.clear()
            x0, t = torch.randn(*LATENT, device=CUDA), objective.times(torch.rand(2)).to(CUDA, non_blocking=True)
            terms = objective.loss_terms(net, x0, told, t, torch.randn_like(x0))
            predicted = objective.predict(net, x0, t, told)
            assert all(map(is_there, (*terms.values(), predicted.x0, predicted.eps)))
            assert not again or gpu.waits == []


@pytest.mark.parametrize("name", sorted(shipped("sampler")))
def test_samplers_and_guidance(name):
    """Two prompts for each image and a learned variance; the second half of the steps waits for nothing."""
    objective = {"name": "eps_hybrid", **OBJECTIVES["eps_hybrid"]}
    model, waits = build("objective", objective), []
    sampler = build("sampler", {"name": name, "steps": 4})
    with fake_cuda() as gpu:
        net, told = echo(objective)
        prompts = {key: torch.stack([value, value], dim=1) for key, value in told.items()}
        predict = guided(
            lambda x, t, given: model.predict(net, x, t, given), prompts, told, torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
            rescale=0.5, schedule=model.schedule,
        )  # fmt: skip
        x = sampler.sample(
            predict, torch.randn(*LATENT, device=CUDA), schedule=model.schedule, noise=torch.randn_like,
            callback=lambda i, x, x0: waits.append(len(gpu.waits)),
        )  # fmt: skip
    assert is_there(x)
    assert waits[-1] == waits[len(waits) // 2], gpu.waits


TASKS = {
    "ccld": {},
    "cached, flow matching": {"objective": {"name": "flow_matching"}},
    "glide inpainting": {
        "autoencoder": {"name": "identity"}, "conditioner": {**TEXT, "dropout": 0.2}, "denoiser": UNET,
        "objective": {"name": "eps_hybrid", "timesteps": 100}, "condition_sources": {"inpaint": {}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_training_step_waits_for_nothing(name):
    """Loss, optimizer and average; the backward pass needs a GPU, and so do the gradients, which are made up here."""
    config = {
        "data": {}, "autoencoder": AUTOENCODER, "conditioner": CLOOB, "denoiser": DENOISER,
        "objective": {"name": "v_cosine"}, "ema": {}, **TASKS[name],
    }  # fmt: skip
    task = DiffusionTask(RunConfig.from_dict(config), read_weights=False)
    task.timesteps = SobolTimesteps(0, 0, 1)
    task._trainer = SimpleNamespace(global_step=0, log_every_n_steps=50)
    task._device = torch.device("cuda", 0)
    names, side = ["a", "b"], 16 if "glide" in name else 64
    for source in task.sources.values():  # the first step asks once whether latents are pixels
        source.from_batch(Batch(names, names, image=torch.zeros(PIXELS)), torch.zeros(PIXELS), task.autoencoder, None)
    if task.autoencoder.pixel_range is not None:  # so does what looks at the spread of latents
        task.spread.watch(torch.zeros(PIXELS))
    with fake_cuda() as gpu:
        for module in (task, *task.frozen.values()):
            to_gpu(module)
        batch = Batch(names, names, image=torch.randn(2, 3, side, side, device=CUDA))
        if "cached" in name:
            mean, logvar = task.autoencoder.moments(batch.image)
            batch = Batch(names, names, mean=mean, logvar=logvar, conditions=task.conditioner.from_batch(batch))
        optimizer = task.optim.optimizer(task.model)
        for _ in range(2):  # tables are copied, and states made, in the first
            gpu.waits.clear()
            loss = task.training_step(batch, 0)
            for parameter in task.model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            optimizer.zero_grad()
            task.after_optimizer_step(1)
    assert is_there(loss)
    assert gpu.waits == []


def test_what_would_go_wrong_on_a_gpu_is_found():
    with fake_cuda() as gpu:
        x = torch.randn(3, device=CUDA)
        gpu.waits.clear()
        x.cpu()
        x.copy_(torch.zeros(3))
        x[torch.tensor([0])]
        torch.zeros(3).to(CUDA, non_blocking=True)
        assert len(gpu.waits) == 3, gpu.waits
        with pytest.raises(Exception, match="device"):
            x + torch.ones(3)
        for waiting in (x.sum().item, x.nonzero, lambda: bool(x.sum() == 0)):
            with pytest.raises(Exception, match="aten"):
                waiting()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_training_step_on_a_gpu_waits_for_nothing():
    config = {
        "data": {}, "autoencoder": AUTOENCODER, "conditioner": CLOOB, "denoiser": DENOISER,
        "objective": {"name": "v_cosine"}, "ema": {},
    }  # fmt: skip
    task = DiffusionTask(RunConfig.from_dict(config), read_weights=False).to(CUDA)
    task.timesteps = SobolTimesteps(0, 0, 1)
    task._trainer = SimpleNamespace(global_step=0, log_every_n_steps=50)
    for module in task.frozen.values():
        module.to(CUDA)
    batch = Batch(["a", "b"], ["", ""], image=torch.randn(2, 3, 64, 64, device=CUDA))
    optimizer = task.optim.optimizer(task.model)
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            task.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
            task.after_optimizer_step(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
