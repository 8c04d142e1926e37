"""Imagen's schedules, losses, sampling and noised low-resolution images against recordings of imagen-pytorch."""

import pytest
import torch
from recorded import Case
from stand_ins import FunctionDenoiser
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.checkpoints.formats import imagen
from ldm_lab.checkpoints.parts import load_strictly
from ldm_lab.condition_sources.noised_low_res import NoisedLowRes
from ldm_lab.conditions import ConditionRequest, ImageCondition
from ldm_lab.config import build
from ldm_lab.denoisers.imagen_unet import ImagenUNet
from ldm_lab.guidance.classifier_free import guided
from ldm_lab.guidance.thresholding import DynamicThresholding, StaticThresholding, quantile
from ldm_lab.interfaces import Conditioner
from ldm_lab.objectives.targets import as_prediction, target
from ldm_lab.sampling import Model, Pipeline, SamplingOptions, Stage, Stages, pipeline
from ldm_lab.schedules import LogSNR, Posterior


def wide(level: Tensor) -> Tensor:
    """Return a number for each row, [B], as images are calculated with, [B, 1, 1, 1]."""
    return level[:, None, None, None]


def test_schedule(case):
    recorded = case("imagen_schedule")
    given = recorded.inputs
    for curve in recorded.config["schedules"]:
        schedule = LogSNR(curve)

        def check(what: str, ours: Tensor, curve: str = curve) -> None:
            recorded.check(f"{curve}_{what}", ours)

        t, s, x0, eps, x = (given[name] for name in ("t", "s", "x0", "eps", "xt"))
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)  # [B] each
        levels = wide(alpha), wide(sigma)
        check("log_snr", schedule.log_snr(t))
        check("log_snr_edge", schedule.log_snr(given["t_edge"]))
        check("alpha", alpha)
        check("sigma", sigma)
        check("q_sample", levels[0] * x0 + levels[1] * eps)
        check("x0_from_eps", as_prediction("eps", eps, x, *levels).x0)
        check("x0_from_v", as_prediction("v", given["v"], x, *levels).x0)
        check("v_target", target("v", x0, eps, *levels))
        # The original's forward kernel, which subtracts standard deviations; ours is that of the posterior's beta.
        check("renoise_s_to_t", x * wide(alpha / alpha_s) + eps * wide((sigma * alpha_s - sigma_s * alpha) / alpha_s))
        count = recorded.config["num_timesteps"]
        grid = torch.cat([schedule.grid(count), torch.zeros(1)])  # [S + 1]
        check("sampling_times", torch.stack([grid[:-1], grid[1:]], dim=1))
        for name, later in (("posterior", s), ("posterior_default_step", (t - 1 / count).clamp(min=0))):
            steps = [Posterior.from_times(schedule, torch.stack(pair)) for pair in zip(t, later)]
            mean = [step.at(0).mean(x0[i], x[i]) for i, step in enumerate(steps)]
            check(f"{name}_mean", torch.stack(mean))
            check(f"{name}_log_variance", torch.stack([step.variance[0].log() for step in steps]))
    recorded.finish()


def objective_of(curve: str, prediction: str, **options: str | float) -> dict:
    """Return the section of an objective; the original begins at t = 1."""
    return {"name": "continuous", "curve": curve, "prediction": prediction, "last_time": 1.0, **options}


def losses(recorded: Case, section: dict) -> Tensor:
    """Return our loss of the recorded batch, [B]."""
    given = recorded.inputs
    net = FunctionDenoiser(lambda x, time: given["pred"], "log_snr")
    images = given["images"] * 2 - 1  # [B, 3, h, w]
    return build("objective", section).loss_terms(net, images, {}, given["t"], given["noise"])["loss"]


def test_loss(case):
    recorded = case("imagen_loss")
    gamma = float(recorded.config["min_snr_gamma"])
    for name in recorded.names:
        curve, *what = name.split("_")
        if what == ["snr"]:
            recorded.check(name, LogSNR(curve).log_snr(recorded.inputs["t"]).exp())
            continue
        prediction, weighting, error = what
        options = {"weighting": "min_snr", "gamma": gamma} if weighting == "minsnr" else {"weighting": "snr"}
        recorded.check(name, losses(recorded, objective_of(curve, prediction, error=error, **options)))
    recorded.finish()


def test_loss_with_p2_weights(case):
    recorded = case("imagen_loss_p2")
    for name in recorded.names:
        curve, prediction, _, gamma = name.split("_")
        recorded.check(name, losses(recorded, objective_of(curve, prediction, weighting="p2", gamma=float(gamma))))
    recorded.finish()


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "unet_sr", "unet_v1", "unet_v1_sr"])
def test_networks(case, name):
    recorded = case(f"imagen_{name}")
    given = recorded.inputs
    state, options, shape = imagen.unet(recorded.weights(), name)
    given_texts = shape.conditions["token_states"]
    net = ImagenUNet(*shape, **options).eval()
    load_strictly(net, state, name)
    check_options(recorded, options, given_texts.length)
    seen = watched(net)
    low_res = {}
    if "lowres_cond_img" in given:
        level = LogSNR("linear").t_of_sigma_over_alpha((-given["lowres_log_snr"].double() / 2).exp())  # [B]
        low_res = {"low_res": given["lowres_cond_img"], "low_res_level": level}
    states, mask = given["text_embeds"], given["text_mask"].bool()
    out, null, no_mask = (
        net(given["x"], given["log_snr"], states, text_mask, **low_res)
        for text_mask in (mask, torch.zeros_like(mask), None)
    )
    recorded.check("out", out)
    recorded.check("out_null", null)
    recorded.check("out_no_mask", no_mask)
    recorded.check("out_guided", null + recorded.config["cond_scale"] * (out - null))
    vector, tokens = net.encode_conditions(given["log_snr"], low_res.get("low_res_level"), states, mask)
    recorded.check("cond_vector", vector)
    recorded.check("cond_tokens", tokens)
    for place, value in seen.items():
        recorded.check(place, value)
    recorded.finish()


def check_options(recorded: Case, options: dict, text_size: int) -> None:
    """Compare the options that the shapes tell with the original's."""
    theirs = recorded.config
    blocks, levels = theirs["num_resnet_blocks"], range(len(theirs["dim_mults"]))
    blocks = blocks if isinstance(blocks, list) else [blocks]
    own = {
        "base_channels": theirs["dim"],
        "multipliers": theirs["dim_mults"],
        "blocks_per_level": blocks,
        "attention_levels": [i for i in levels if theirs["layer_attns"][i]],
        "text_levels": [i for i in levels if theirs["layer_cross_attns"][i]],
        "heads": theirs["attn_heads"],
        "head_width": theirs["attn_dim_head"],
        "feed_forward": theirs["ff_mult"],
        "text_width": theirs["cond_dim"],
        "text_latents": theirs["attn_pool_num_latents"],
        "memory_efficient": theirs["memory_efficient"],
        "layout": "group" if "cosine_sim_attn" in theirs else "rms",
    }
    recorded.expect("options", dict(options), own)
    recorded.expect("text_size", text_size, theirs["max_text_len"])


def watched(net: ImagenUNet) -> dict[str, Tensor]:
    """Return a dict that the first forward pass fills with what comes out of the recorded places."""
    seen: dict[str, Tensor] = {}
    places = {"init_conv": net.init_conv, "pooled_text": net.attn_pool, "mid": net.mid_block2}
    places["final_block"] = net.final_res_block
    levels = [(f"down_{i}", level[2], level[3]) for i, level in enumerate(net.downs)]
    levels += [(f"up_{i}", level[1], level[2]) for i, level in enumerate(net.ups)]
    for name, blocks, attention in levels:
        places[name] = blocks[-1] if isinstance(attention, nn.Identity) else attention
    for name, module in places.items():

        def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            seen.setdefault(name, out)

        module.register_forward_hook(keep)
    return seen


def test_low_resolution_images_are_noised(case):
    recorded = case("imagen_lowres_aug")
    given, config = recorded.inputs, recorded.config
    small, large = config["image_sizes"]
    curve, images = config["lowres_noise_schedule"], given["images"] * 2 - 1  # [B, 3, H, W]
    levels = {"shared": given["aug_time_shared"].expand(len(images)), "per_sample": given["aug_time_per_sample"]}
    level = torch.full((len(images),), config["lowres_sample_noise_level"])  # [B]
    for resize in (mode.partition(" ")[0] for mode in config["resize_modes"]):
        source = NoisedLowRes(scale_factor=config["image_size"] // small, resize=resize, curve=curve)
        clean = source.enlarge(source.reduce(images), (large, large))  # [B, 3, h, w]
        recorded.check(f"{resize}_train_clean", clean)
        for how, level_of_each in levels.items():
            noised = source.noised(clean, level_of_each, given["aug_noise"])
            recorded.check(f"{resize}_{how}_train_cond", noised["low_res"])
            recorded.check(f"{how}_train_log_snr", source.schedule.log_snr(noised["low_res_level"]))
        sampling = NoisedLowRes(scale_factor=large // small, resize=resize, curve=curve)
        x = torch.zeros(len(images), 3, large, large)
        stage1, noise = given["stage1_sample"] * 2 - 1, given["sample_noise"]
        asked = sampling.from_request(
            ConditionRequest(x, stage1, low_res_level=float(level[0]), noise=lambda x, noise=noise: noise)
        )
        recorded.check(f"{resize}_sample_cond", asked["low_res"])
        recorded.check("sample_log_snr", source.schedule.log_snr(asked["low_res_level"]))
    recorded.finish()


def test_thresholding(case):
    recorded = case("imagen_dynamic_threshold")
    x0 = recorded.inputs["x0"]
    recorded.check("static", StaticThresholding().bounded(x0))
    for percentile in recorded.config["percentiles"]:
        recorded.check(f"thresholded_{percentile}", DynamicThresholding(percentile=percentile).bounded(x0))
        recorded.check(f"s_{percentile}", quantile(x0.abs().flatten(1), percentile).clamp(min=1))
    recorded.finish()


def closed_formula(x: Tensor, log_snr: Tensor, c: Tensor, **low_res: Tensor) -> Tensor:
    """Return what the recordings' closed-form network says, [B, C, h, w]."""
    level = wide(log_snr)  # [B, 1, 1, 1]
    said = 0.8 * (-level).sigmoid() * x + (0.1 + 0.3 * (level / 2).sigmoid()) * c
    if low_res:
        of_low_res = LogSNR("linear").log_snr(low_res["low_res_level"])  # [B]
        said = said + 0.2 * low_res["low_res"] + 0.05 * (wide(of_low_res) / 4).sigmoid()
    return said


@torch.no_grad()
def test_sampling(case):
    """Whole runs with guidance and thresholding; `ddpm` with the posterior's variance is imagen-pytorch's sampler."""
    recorded = case("imagen_sampling")
    given, steps = recorded.inputs, recorded.config["steps"]
    for name, run in recorded.config["runs"].items():
        seen: list[Tensor] = []

        def network(x: Tensor, time: Tensor, c: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(time[0])
            return closed_formula(x, time, c)

        net = FunctionDenoiser(network, "log_snr")
        objective = build("objective", objective_of(run["schedule"], run["objective"]))
        schedule = objective.schedule
        conditions, null = {"c": given["cond"][:, None]}, {"c": given["null"].expand_as(given["cond"])}
        weights = torch.full((len(given["cond"]), 1), run["cond_scale"])  # [B, 1]

        def conditional(x: Tensor, t: Tensor, c: dict, net: FunctionDenoiser = net, objective=objective):
            return objective.predict(net, x, t, c)

        predict = guided(conditional, conditions, null, weights)
        dynamic = DynamicThresholding(percentile=run["percentile"])
        threshold = dynamic if run["dynamic_threshold"] else StaticThresholding()
        draws, xs, clean = iter(given["noise"][1:]), [], []

        def callback(step: int, x: Tensor, x0: Tensor, xs: list = xs, clean: list = clean) -> None:
            xs.append(x)
            clean.append(x0)

        sampler = build("sampler", {"name": "ddpm", "variance": "posterior", "steps": steps})
        predict = threshold.wrap(predict, schedule)
        last = sampler.sample(
            predict, given["noise"][0], schedule=schedule, noise=lambda x, draws=draws: next(draws), callback=callback
        )
        recorded.check(f"{name}_x", torch.stack([*xs[1:], last]))
        recorded.check(f"{name}_x0", torch.stack(clean))
        recorded.check(f"{name}_sample", (last.clamp(-1, 1) + 1) / 2)
        if name == "cosine_eps_dynamic":
            recorded.check("cosine_log_snr_after_first", torch.stack(seen)[1:])
    recorded.finish()


class Told(Conditioner):
    """What the recordings' network is told, whatever the prompts are."""

    def __init__(self, cond: Tensor, null: Tensor) -> None:
        super().__init__()
        self.cond, self.nothing = cond, null

    @property
    def spec(self) -> dict:
        return {"c": ImageCondition(3)}

    def from_prompts(self, texts: list[str], images: list) -> dict[str, Tensor]:
        return {"c": self.cond}

    def null(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"c": self.nothing.expand_as(conditions["c"])}


class Formula(FunctionDenoiser):
    """The recordings' network, of a model whose pictures are kept in range as Imagen's are."""

    sampling_defaults = ImagenUNet.sampling_defaults

    def __init__(self, spec: dict) -> None:
        super().__init__(lambda x, time, c, **low_res: closed_formula(x, time, c, **low_res), "log_snr")
        self.spec = spec
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)  # says where the network is


def test_cascade(case, monkeypatch):
    """Two stages as they are sampled by us, with the recorded numbers in place of each picture's own noise."""
    recorded = case("imagen_cascade")
    given, config = recorded.inputs, recorded.config
    small, large = config["image_sizes"]
    source = NoisedLowRes(
        scale_factor=large // small,
        resize=config["resize_mode"],
        curve=config["lowres_noise_schedule"],
        level=config["lowres_sample_noise_level"],
    )
    # The original draws the small picture's noise before that of the chain; here the chain begins.
    draws = iter([*given["noise1"][:-1], given["noise2"][0], given["lowres_noise"], *given["noise2"][1:]])
    monkeypatch.setattr(pipeline, "SeededNoise", lambda seeds: lambda x: next(draws))
    stages = []
    for i, side in enumerate(config["image_sizes"]):
        cond, null = (F.interpolate(given[name], size=(side, side), mode="nearest") for name in ("cond", "null"))
        sources = {"noised_low_res": source} if i else {}
        conditioner = Told(cond, null)
        model = Model(
            denoiser=Formula({"c": ImageCondition(3), **(source.spec if i else {})}),
            objective=build("objective", objective_of(config["schedules"][i], config["objectives"][i])),
            autoencoder=build("autoencoder", {"name": "identity"}),
            conditioner=conditioner,
            condition_sources=sources,
            dropout=0.1,
            image_size=(side, side),
        )
        options = SamplingOptions(
            sampler={"name": "ddpm", "variance": "posterior", "steps": config["steps"][i]},
            guidance=config["cond_scale"][i],
            threshold_percentile=config["percentile"],
        )
        stages.append(Stage(Pipeline(model), options))
    (rows,) = Stages(stages).samples(["one", "another"])
    for name, samples in zip(("stage1", "stage2"), zip(*rows)):
        recorded.check(name, (torch.stack([sample.pixels for sample in samples]).clamp(-1, 1) + 1) / 2)
    recorded.finish()
