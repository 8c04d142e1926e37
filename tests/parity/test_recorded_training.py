"""The training step, the average of the weights, the measured scale and the CLOOB loss against recordings."""

import torch
from PIL import Image
from torch import Tensor, nn

from ldm_lab import ema
from ldm_lab.autoencoders.kl_f8 import split_moments
from ldm_lab.checkpoints.formats import ccld
from ldm_lab.checkpoints.opened import open_weights
from ldm_lab.config import RunConfig, build
from ldm_lab.interfaces import Batch
from ldm_lab.io.images import to_tensor
from ldm_lab.io.squares import resize_and_crop
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.infoloob import CLOOBLoss, retrieve
from ldm_lab.training.scale import latent_scale


def test_training_step(case, tmp_path, monkeypatch):
    recorded = case("ccld_train")
    given, optimizer_config = recorded.inputs, recorded.json["optimizer"]
    torch.save(recorded.weights(), tmp_path / "unet.pth")
    state, sizes, shape = ccld.unet(open_weights(tmp_path / "unet.pth").read(), "unet.pth")
    config = RunConfig.from_dict(
        {
            "task": "diffusion",
            "data": {},
            "autoencoder": {"name": "kl_f8", "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
                            "embed_dim": shape.channels, "latent_std": recorded.config["autoencoder_scale"]},
            "conditioner": {"name": "none", "embed_dim": shape.conditions["embed"].width},
            "denoiser": {"name": "ccld_unet", **sizes},
            "objective": {"name": "v_cosine"},
            "optim": {key: optimizer_config[key] for key in ("lr", "weight_decay", "betas", "eps")},
        }
    )  # fmt: skip
    task = DiffusionTask(config, read_weights=False)
    task.model.load_state_dict(state)
    # In float64: a ReLU's input that is zero but for rounding has a gradient or none, as a CPU's kernels have it.
    task.model.double().register_forward_pre_hook(
        lambda _, args, kwargs: ([x.double() for x in args], {name: x.double() for name, x in kwargs.items()}),
        with_kwargs=True,
    )

    # The random numbers of the recording in place of fresh ones, in the order in which the step asks for them.
    normal, uniform = iter([given["ae_noise"], given["noise"]]), iter([given["p"].flatten()])
    monkeypatch.setattr(torch, "randn_like", lambda like: next(normal))
    monkeypatch.setattr(torch, "rand", lambda *size, device: next(uniform))
    task.timesteps = lambda samples_seen, count: given["t"]
    monkeypatch.setattr(task, "log_means", lambda values, batch_size: None)
    monkeypatch.setattr(task, "log_by_time", lambda loss, t: None)

    seen: dict[str, Tensor] = {}

    def watch(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], v: Tensor) -> None:
        v.retain_grad()
        seen.update(x=args[0], v=v, **kwargs)

    task.model.register_forward_hook(watch, with_kwargs=True)
    terms_of = task.objective.loss_terms

    def terms_watched(denoiser: nn.Module, x0: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        seen.update(latents=x0)
        return terms_of(denoiser, x0, *rest)

    monkeypatch.setattr(task.objective, "loss_terms", terms_watched)

    mean, logvar = split_moments(given["moments"])  # [B, C, h, w] each
    names = [""] * len(mean)
    batch = Batch(names, names, mean=mean, logvar=logvar, conditions={"embed": given["embed"]})
    loss = task.training_step(batch, 0)
    loss.backward()
    recorded.check("latents", seen["latents"])
    recorded.check("x", seen["x"])
    recorded.check("cond_kept", seen["embed"].any(dim=1).float())
    recorded.check("v", seen["v"])
    recorded.check("target", seen["v"] - seen["v"].grad * seen["v"].numel() / 2)  # d mean((v - target)^2) / dv
    recorded.check("loss", loss)

    parameters = dict(task.model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.grad is not None}
    recorded.expect(
        "parameters without gradient", sorted(parameters.keys() - trained), sorted(recorded.json["frozen_names"])
    )
    recorded.check("grad_norm", torch.stack([p.grad.norm() for p in trained.values()]).norm())
    for i, name in enumerate(recorded.json["grad_names"]):
        recorded.check(f"grad_{i}", parameters[name].grad)

    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = task.optim.optimizer(task.model)
    recorded.expect("optimizer", type(optimizer).__name__, optimizer_config["type"])
    optimizer.step()
    for i, name in enumerate(recorded.json["grad_names"]):
        recorded.check(f"step_delta_{i}", parameters[name] - before[name])
    moved = [name for name in recorded.json["frozen_names"] if not torch.equal(parameters[name], before[name])]
    recorded.expect("frozen parameters that moved", moved, [])

    check_average(recorded)
    recorded.check("autoencoder_scale", latent_scale(given["scale_latents"]))
    recorded.check("train_image", train_image(recorded.config["image"], recorded.recorded("train_image").shape[1]))
    recorded.finish()


def check_average(recorded) -> None:
    """Compare the moving average: its decay by steps, and what it does to parameters and buffers."""
    last = recorded.config["ema_decay_at"]
    # The original asks for "below 20000" first, so that a smaller ema_decay_at only removes the middle stage.
    schedule = build("ema", {"from_step": [0, 20_000, max(20_000, last)], "decay": [0.99, 0.999, 0.9999]})
    for step, decay in recorded.json["ema_decay_by_step"]:
        recorded.expect(f"decay after {step} steps", schedule.at(step), decay)
    values = recorded.inputs["ema_param"]  # [n, D]
    model = nn.Module()
    model.weight = nn.Parameter(values[0].clone())
    model.register_buffer("buffer", values[0].clone())
    average = ema.averaged_copy(model)
    for k, decay in zip(range(1, len(values)), schedule.decay):
        model.weight.data.copy_(values[k])
        model.buffer.copy_(values[k])
        ema.update(average, model, decay)
        recorded.check(f"ema_after_{k}", average.weight)
        recorded.check(f"ema_buffer_after_{k}", average.buffer)


def train_image(image: dict, side: int) -> Tensor:
    """Return every 8th row and column of the training transform of a formula's image, [3, side, side] in [0, 1]."""
    f0, f1, f2 = image["factors"]
    x = torch.arange(image["width"], dtype=torch.float64)[None, :, None]  # [1, W, 1]
    y = torch.arange(image["height"], dtype=torch.float64)[:, None, None]  # [H, 1, 1]
    channel = torch.arange(4, dtype=torch.float64)  # [4]
    levels = (127.5 + 127.5 * torch.sin(x / f0) * torch.cos(y / f1 + channel * f2)).floor().to(torch.uint8)  # [H, W, 4]
    # The original drops transparency, ours lays it over white: only the resize and the crop are compared.
    picture = Image.fromarray(levels.numpy(), "RGBA").convert("RGB")
    return (to_tensor(resize_and_crop(picture, 8 * side))[:, ::8, ::8] + 1) / 2  # [3, side, side]


def test_cloob_loss(case):
    recorded = case("cloob_loss")
    image, text = (recorded.inputs[f"{what}_features"] for what in ("image", "text"))  # [N, D] each
    temperatures = {key: recorded.config[key] for key in ("inv_tau", "scale_hopfield")}
    cases = {
        "": (temperatures, "cloob_training"),
        "_ml_jku": (temperatures, "ml_jku"),
        "_ml_jku_defaults": (recorded.config["ml_jku_defaults"], "ml_jku"),
    }
    for suffix, (options, convention) in cases.items():
        own_image, own_text = image.clone().requires_grad_(), text.clone().requires_grad_()
        loss = CLOOBLoss(**options, convention=convention)(own_image, own_text)
        loss.backward()
        recorded.check(f"loss{suffix}", loss)
        recorded.check(f"grad_image{suffix}", own_image.grad)
        recorded.check(f"grad_text{suffix}", own_text.grad)
    beta = temperatures["scale_hopfield"]
    recorded.check("p_xx", retrieve(image, image, beta))
    recorded.check("p_yy", retrieve(text, text, beta))
    recorded.check("p_xy", retrieve(image, text, beta))
    recorded.check("p_yx", retrieve(text, image, beta))
    recorded.finish()
