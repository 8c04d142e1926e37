"""Schedules, samplers, guidance and prompts against recordings of the originals."""

import math

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_lab import schedules
from ldm_lab.checkpoints.formats import ccld
from ldm_lab.checkpoints.opened import open_weights
from ldm_lab.conditioners.cloob import CLOOB
from ldm_lab.config import build
from ldm_lab.denoisers.ccld_unet import CCLDUNet
from ldm_lab.errors import UserError
from ldm_lab.guidance.classifier_free import guided, null_condition_weight
from ldm_lab.interfaces import Prediction
from ldm_lab.io.images import center_crop_to, to_images, to_tensor
from ldm_lab.objectives.v_cosine import VCosine
from ldm_lab.prompts import parse_prompt

SAMPLERS = {
    "prk_sample": "prk",
    "plms_sample": "plms",
    "pie_sample": "pie",
    "plms2_sample": "plms2",
    "iplms_sample": "iplms",
}
DEFAULT_WEIGHT = 3.0  # of the original's prompts
TIME = 1e-6  # the recorded times are rounded to six digits


def mixture(config: dict[str, list[float]]):
    """Return the exact denoiser of a one-dimensional Gaussian mixture in every scalar: x, t -> Prediction."""
    weight, mean, std = (torch.tensor(config[key]) for key in ("weights", "means", "stds"))  # [K] each

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (level.view(-1, *[1] * x.ndim) for level in schedules.Cosine().alpha_sigma(t))  # [B, 1, ...]
        variance = alpha**2 * std**2 + sigma**2  # [B, ..., K]
        gap = x[..., None] - alpha * mean  # [B, ..., K]
        share = torch.softmax(weight.log() - variance.log() / 2 - gap**2 / (2 * variance), dim=-1)  # [B, ..., K]
        x0 = (share * (mean + alpha * std**2 * gap / variance)).sum(-1)  # x's shape
        eps = (share * sigma * gap / variance).sum(-1)  # x's shape
        return Prediction(x0, eps)

    return predict


def test_samplers(case):
    recorded = case("ccld_samplers")
    schedule = schedules.Cosine()
    for steps in recorded.config["schedule_counts"]:
        recorded.check(f"schedule_{steps}", schedule.grid(steps))
    for name in recorded.names:
        if name.startswith("t_uniform_"):  # the building blocks of the schedule, among them one that is not offered
            points = name.removeprefix("t_uniform_")
            uniform = torch.linspace(1, 0, int(points))  # [points]
            recorded.check(name, uniform)
            recorded.check(f"ddpm_schedule_{points}", schedules.cosine._ddpm_time(uniform))
            recorded.check(f"spliced_{points}", torch.cat([schedule.grid(int(points) - 1), torch.zeros(1)]))
            log_snr = 20 * (1 - uniform) - 10  # [points]
            recorded.check(
                f"log_schedule_{points}", torch.atan2(log_snr.neg().exp().sqrt(), torch.ones(())) * 2 / math.pi
            )
    for method, how in recorded.json["methods"].items():
        for steps in recorded.config["step_counts"]:
            run_sampler(recorded, method, how, steps)
    recorded.finish()


def run_sampler(recorded, method: str, how: dict, steps: int) -> None:
    """Compare the samples, all that lies between, and the times at which the model was asked."""
    options = {"name": SAMPLERS.get(how["function"], "ddim"), "steps": steps}
    if options["name"] == "ddim":
        options = {"name": "ddpm", "steps": steps} if method == "ddpm" else {**options, "eta": how["eta"]}
    model, times, xs, preds = mixture(recorded.config["mixture"]), [], [], []
    noise = iter(recorded.inputs[f"noise_{steps}"])

    def predict(x: Tensor, t: Tensor) -> Prediction:
        times.append(float(t[0]))
        return model(x, t)

    def callback(step: int, x: Tensor, x0: Tensor) -> None:
        assert step == len(xs)
        xs.append(x)
        preds.append(x0)

    sampler = build("sampler", options)
    final = sampler.sample(
        predict, recorded.inputs["x"], schedule=schedules.Cosine(), noise=lambda x: next(noise), callback=callback
    )
    if options["name"] not in ("ddim", "ddpm"):  # recorded after each step instead of before
        xs = [*xs[1:], final]
    recorded.check(f"{method}_{steps}_final", final)
    recorded.check(f"{method}_{steps}_xs", torch.stack(xs))
    recorded.check(f"{method}_{steps}_preds", torch.stack(preds))
    recorded.expect(
        f"{method}, model calls for {steps} steps", len(times), recorded.json["model_calls"][method][str(steps)]
    )
    recorded_times = recorded.json.get("model_times", {}).get(method, [])
    if len(recorded_times) == len(times):
        recorded.expect(f"{method}, times", times, pytest.approx(recorded_times, abs=TIME))


@torch.no_grad()
def test_guidance(case, tmp_path):
    recorded = case("ccld_cfg")
    torch.save(recorded.weights(), tmp_path / "unet.pth")
    state, config, shape = ccld.unet(open_weights(tmp_path / "unet.pth").read(), "unet.pth")
    net = CCLDUNet(*shape, **config)
    net.load_state_dict(state)
    objective = VCosine()
    x, t = recorded.inputs["x"], recorded.inputs["t"]

    # The conditioner with towers that put out what was recorded of theirs.
    texts, images = recorded.inputs["text_embeds"], recorded.inputs["image_embeds"]
    cloob = CLOOB(
        embed_dim=texts.shape[1], image_size=4, patch_size=2, image_width=4, image_layers=1, image_heads=1,
        text_size=8, vocab_size=514, text_width=4, text_layers=1, text_heads=1,
    )  # fmt: skip
    cloob.text_encoder.forward = lambda tokens: texts
    cloob.image_encoder.forward = lambda pixels: images
    prompts = [parse_prompt(written) for written in recorded.config["prompts"] + recorded.config["images"]]
    pictures = [Image.new("RGB", (4, 4))] * len(images)
    embeds = cloob.from_prompts([prompt.text for prompt in prompts[: len(texts)]], pictures)  # {"embed": [k, D]}
    null = cloob.null({"embed": embeds["embed"][:1]})  # {"embed": [1, D]}
    recorded.check("target_embeds", torch.cat([null["embed"], embeds["embed"]]))

    weights = torch.tensor([[DEFAULT_WEIGHT if p.weight is None else p.weight for p in prompts]]).double()  # [1, k]
    recorded.check("weights", torch.cat([null_condition_weight(weights)[:, None], weights], dim=1)[0])

    def velocity(embed: Tensor, weights: Tensor) -> Tensor:
        """Return the guided v, [B, C, h, w], for embed [k, D] and weights [1, k]."""
        cond = {"embed": embed.expand(len(x), -1, -1)}  # [B, k, D]
        nulls = {"embed": null["embed"].expand(len(x), -1)}  # [B, D]
        predict = guided(lambda x, t, cond: objective.predict(net, x, t, cond), cond, nulls, weights.expand(len(x), -1))
        prediction = predict(x, t)
        alpha, sigma = (level[:, None, None, None] for level in objective.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        return alpha * prediction.eps - sigma * prediction.x0  # [B, C, h, w]

    recorded.check("v", velocity(embeds["embed"], weights))
    recorded.check("demo_v", velocity(texts[:1], torch.tensor([[DEFAULT_WEIGHT]])))

    (picture,) = to_images(recorded.inputs["decoded"][None])
    recorded.check("pixels", ((to_tensor(picture) + 1) * 127.5).round().permute(1, 2, 0))

    for row in recorded.json["parse_prompt"]:
        wanted = row.get("wanted", row["original"])
        try:
            prompt = parse_prompt(row["prompt"])
            ours = [prompt.text, DEFAULT_WEIGHT if prompt.weight is None else prompt.weight]
        except UserError:
            ours = "an error"
        if isinstance(wanted, str):  # of errors the wording is free
            wanted = "an error"
        recorded.expect(f"prompt {row['prompt']!r}", ours, wanted)
    recorded.finish()


def test_crop_of_image_prompts(case):
    """Where the original truncates a side to less than the crop, and pads, ours covers it."""
    rows = case("ccld_cfg").json["resize_and_center_crop_224"]
    for row in rows:
        picture = center_crop_to(Image.new("RGB", tuple(row["size"]), "white"), 224, 224)
        assert picture.size == (224, 224)
        assert picture.getextrema() == ((255, 255),) * 3, row
