"""GLIDE's diffusion process against recordings of glide-text2im and glide-finetune: tables, steps, walks, guidance."""

import math
from collections.abc import Callable

import torch
from recorded import Case
from stand_ins import FunctionDenoiser
from torch import Tensor

from ldm_lab.config import build
from ldm_lab.guidance.classifier_free import guided
from ldm_lab.guidance.condition_score import ConditionScore
from ldm_lab.guidance.inpaint import Inpaint
from ldm_lab.guidance.thresholding import StaticThresholding
from ldm_lab.interfaces import Denoiser, Predict, Prediction
from ldm_lab.objectives.eps_hybrid import EpsHybrid
from ldm_lab.sampling.image_to_image import TruncatedSchedule
from ldm_lab.schedules import Posterior, RespacedSchedule

SAMPLERS = {
    "ddpm": {"name": "ddpm"},
    "ddim": {"name": "ddim"},
    "plms": {"name": "plms", "variant": "glide"},
    "prk": {"name": "prk", "variant": "glide"},
    "euler": {"name": "ddim"},
    "euler_a": {"name": "ddim", "eta": 1.0},
    "dpm++ 1": {"name": "ddim"},
    "dpm++ 2": {"name": "ddim_extrapolated"},
}
UNCLAMPED = ("plms", "prk")  # these clamp no clean estimates
PASTING = ("euler", "dpm++")  # these lay the known pixels into every sample, too


def objective_of(config: dict) -> EpsHybrid:
    """Return the objective of a recorded diffusion; "cosine" is guided-diffusion's name for the same betas."""
    betas = {"cosine": "squaredcos_cap_v2"}.get(config["noise_schedule"], config["noise_schedule"])
    return build("objective", {"name": "eps_hybrid", "betas": betas, "timesteps": config["steps"]})


def kept(config: dict) -> int | str:
    """Return the respacing of a recorded diffusion; an empty one keeps all timesteps."""
    return config["timestep_respacing"] or config["steps"]


def index_of(t: Tensor, config: dict) -> Tensor:
    """Return the original's timestep of times, [B]."""
    return t.double() * config["steps"] - 1  # [B]


class Analytic(Denoiser):
    """The closed-form network of the recordings; remembers the timesteps that it was called with."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config, self.timesteps = config, []

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return [B, 2C, h, w] for x at times in [0, 1]."""
        index = index_of(time, self.config).to(x)[:, None, None, None]  # [B, 1, 1, 1]
        self.timesteps.append(index.flatten()[0])
        c = 0.0 if tokens is None else ((tokens % 17) * mask).sum(1)[:, None, None, None] / 100  # [B, 1, 1, 1]
        p = math.pi * index / 2000
        eps = p.sin() * x / (0.25 * p.cos() ** 2 + p.sin() ** 2) + 0.1 * (2 * x).tanh() * (5 * index / 1000).cos()
        return torch.cat([eps + 0.2 * c, 0.8 * (3 * x + 4 * index / 1000).sin()], dim=1)  # [B, 2C, h, w]


def gradient_of(x: Tensor, t: Tensor, config: dict) -> Tensor:
    """Return the recordings' closed-form gradient, [B, C, h, w]."""
    return 0.6 * (0.4 - x) * (0.5 + index_of(t, config).to(x)[:, None, None, None] / 2000)  # [B, C, h, w]


def sampled(recorded: Case, loop: dict, predict, noise: Tensor, clamp: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return what a recorded loop ends in, x after each step, and the last clean estimate.

    Args:
        recorded: the case, for its known pixels.
        loop: the loop's configuration.
        predict: x, t -> Prediction.
        noise: [S + 1, B, C, h, w]; first x, then a draw for each step.
        clamp: whether the loop clamps its clean estimates.
    """
    objective = objective_of(loop)
    schedule = objective.schedule
    name = f"{loop['sampler']} {loop['order']}" if "order" in loop else loop["sampler"]
    eta = {"eta": loop["eta"]} if loop.get("eta") else {}
    sampler = build("sampler", {**SAMPLERS[name], **eta, "steps": kept(loop)})
    if loop["sampler"] in ("plms", "prk"):  # the schedule that their transfers use is that of the shift, too
        schedule = RespacedSchedule(schedule, schedule.grid(kept(loop)))
    if clamp:
        predict = StaticThresholding().wrap(predict, schedule)
    if loop.get("cond_fn"):
        unguided = predict
        predict = lambda x, t: unguided(x, t)._replace(gradient=gradient_of(x, t, loop))  # noqa: E731
        predict = predict if sampler.uses_gradient else ConditionScore().wrap(predict, schedule)
    if loop.get("denoised_fn"):
        known, mask = recorded.inputs["known_image"], recorded.inputs["known_mask"]  # [1, 3, h, w], [1, 1, h, w]
        replaced = Inpaint(known, mask == 0).wrap(predict, schedule)
        predict = replaced
        if loop["sampler"] in PASTING:
            predict = lambda x, t: replaced(torch.where((mask == 0) | (t[0] == times[0]), x, known), t)  # noqa: E731
    times = sampler.times(objective.schedule)
    draws, xs, clean = iter(noise[1:]), [], []

    def callback(step: int, x: Tensor, x0: Tensor) -> None:
        xs.append(x)
        clean.append(x0)

    x = noise[0] * loop.get("temperature", 1.0)
    final = sampler.sample(predict, x, schedule=objective.schedule, noise=lambda x: next(draws), callback=callback)
    return final, [*xs[1:], final], clean[-1]


@torch.no_grad()
def test_process(case):
    recorded = case("glide_diffusion")
    for table in recorded.config["tables"]:
        check_tables(recorded, table)
    for step in recorded.config["steps"]:
        check_steps(recorded, step)
    for loop in recorded.config["loops"]:
        net = Analytic(loop)
        objective, name = objective_of(loop), loop["name"]

        def predict(x, t, objective=objective, net=net):
            return objective.predict(net, x, t, {})

        _, xs, x0 = sampled(recorded, loop, predict, recorded.inputs["noise"], clamp=True)
        recorded.check(f"{name}.model_timesteps", torch.stack(net.timesteps))
        recorded.check(f"{name}.trajectory", torch.stack(xs))
        recorded.check(f"{name}.pred_xstart_last", x0)
    recorded.finish()


def check_tables(recorded: Case, table: dict) -> None:
    """Compare a process's respaced timesteps and what follows from its betas; the originals count the other way."""
    name, schedule = table["name"], objective_of(table).schedule
    times = schedule.grid(kept(table))
    process = Posterior.from_times(schedule, times)
    recorded.check(f"{name}.timestep_map", schedule.index(times).flip(0))
    recorded.check(f"{name}.betas", process.beta.flip(0))
    recorded.check(f"{name}.alphas_cumprod", schedule.alpha_sigma(times.double())[0].square().flip(0))
    if recorded.recorded(f"{name}.posterior_variance").ndim == 1:  # else it is that of single steps, by the same name
        recorded.check(f"{name}.posterior_variance", process.variance.flip(0))
    recorded.check(f"{name}.posterior_log_variance_clipped", process.log_variance.flip(0))
    recorded.check(f"{name}.posterior_mean_coef1", process.x0_weight.flip(0))
    recorded.check(f"{name}.posterior_mean_coef2", process.x_weight.flip(0))


def check_steps(recorded: Case, config: dict) -> None:
    """Compare single steps, each row of the batch at a timestep of its own."""
    name, given, objective = config["name"], recorded.inputs, objective_of(config)
    schedule, x0, x = objective.schedule, given["x0"], given["xt"]
    times = schedule.grid(kept(config))  # [S], falling
    place = len(times) - 1 - torch.tensor(config["t"])  # [B], steps done before
    step, t = Posterior.from_times(schedule, times).at(place), times[place]
    alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))  # [B, 1, 1, 1]

    def check(what: str, value: Tensor) -> None:
        if f"{name}.{what}" in recorded.names:
            recorded.check(f"{name}.{what}", value)

    check("q_mean", alpha * x0)
    check("q_variance", (sigma**2).expand_as(x0))
    check("q_log_variance", (2 * sigma.double().log()).expand_as(x0))
    check("q_sample", alpha * x0 + sigma * given["q_noise"])
    check("posterior_mean", step.mean(x0, x))
    check("posterior_log_variance", step.log_variance.expand_as(x))
    if recorded.recorded(f"{name}.posterior_variance").ndim == 4:
        check("posterior_variance", step.variance.expand_as(x))

    def reading(rows: slice = slice(None)) -> Predict:
        return lambda x, t: objective.predict(FunctionDenoiser(lambda x, t: given["raw_model_output"][rows]), x, t, {})

    def led(read: Predict) -> Predict:
        return ConditionScore().wrap(lambda x, t: read(x, t)._replace(gradient=gradient_of(x, t, config)), schedule)

    known, mask = given["known_image"], given["known_mask"] == 0
    readings = {
        "noclip": reading(),
        "clip": StaticThresholding().wrap(reading(), schedule),
        "denoised_fn": Inpaint(known, mask).wrap(StaticThresholding().wrap(reading(), schedule), schedule),
    }
    for how, read in readings.items():
        prediction = read(x, t)
        check(f"pred_xstart_{how}", prediction.x0)
        check(f"p_mean_{how}", step.mean(prediction.x0, x))
    prediction = readings["clip"](x, t)
    log_variance = step.learned(prediction.variance_fraction)  # [B, C, h, w]
    check("p_log_variance", log_variance)
    check("p_variance", log_variance.exp())
    mean, fresh = step.mean(prediction.x0, x), (log_variance / 2).exp() * given["step_noise"]  # [B, C, h, w] each
    fresh = torch.where((place == len(times) - 1)[:, None, None, None], 0.0, fresh)  # [B, C, h, w]
    check("p_sample", mean + fresh)
    check("p_sample_cond", mean + log_variance.exp() * gradient_of(x, t, config) + fresh)

    def ddim(eta: float, change: Callable = lambda read: read) -> Tensor:
        """Return x after one DDIM step, [B, C, h, w]: each row's is the first one of a run of its own."""
        after = []
        for row, done in enumerate(place.tolist()):
            rows, xs = slice(row, row + 1), []
            final = build("sampler", {"name": "ddim", "steps": kept(config), "eta": eta}).sample(
                change(StaticThresholding().wrap(reading(rows), schedule)),
                x[rows],
                schedule=TruncatedSchedule(schedule, done),
                noise=lambda x, rows=rows: given["step_noise"][rows],
                callback=lambda i, x, x0, xs=xs: xs.append(x),
            )
            after.append([*xs, final][1])
        return torch.cat(after)  # [B, C, h, w]

    for eta in config["etas"]:
        check(f"ddim_eta{eta}", ddim(eta))
    check("ddim_cond", ddim(0.0, led))
    before = torch.cat([torch.ones(1), times])[place]  # [B]; "abar_next" of the noisiest timestep is 0
    alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(before))  # [B, 1, 1, 1]
    noisiest = (place == 0)[:, None, None, None]
    alpha, sigma = torch.where(noisiest, 0.0, alpha), torch.where(noisiest, 1.0, sigma)
    check("ddim_reverse", alpha * prediction.x0 + sigma * prediction.eps)


@torch.no_grad()
def test_samplers_around_glide(case):
    recorded = case("glide_samplers")
    for loop in recorded.config["loops"]:
        net, objective, name = Analytic(loop), objective_of(loop), loop["name"]
        if loop.get("cond_gets_index"):  # a defect of the original: its json says that ours need not have it
            for what in ("model_timesteps", "sample"):
                recorded.check(f"{name}.{what}", recorded.recorded(f"{name}.{what}"))
            continue

        def predict(x, t, objective=objective, net=net):
            return objective.predict(net, x, t, {})

        clamp = loop["sampler"] not in UNCLAMPED
        final, _, _ = sampled(recorded, loop, predict, recorded.inputs["noise"], clamp)
        recorded.check(f"{name}.model_timesteps", torch.stack(net.timesteps))
        recorded.check(f"{name}.sample", final)
    recorded.finish()


@torch.no_grad()
def test_guidance(case):
    """The originals evaluate prompts and empty texts in two halves of one batch, of which the first is kept."""
    recorded = case("glide_cfg")
    given, config = recorded.inputs, {"noise_schedule": "squaredcos_cap_v2", "steps": 1000}
    objective = objective_of(config)
    half, third = len(given["x"]) // 2, len(given["x3"]) // 3
    t = objective.schedule.at(given["t"][:half])  # [B]

    def outputs(raw: Tensor, parts: int, x: Tensor, weights: list[float], t: Tensor) -> tuple[Prediction, Tensor]:
        """Return the guided reading of a network's output, prompts first, and what the network saw."""
        rows = torch.arange(parts).roll(1)[:, None] * len(x) + torch.arange(len(x))  # [parts, B], no prompt first
        cond = {"row": rows[1:].T}  # [B, k]
        seen = []

        def predict(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Prediction:
            seen.append(x)
            return objective.predict(FunctionDenoiser(lambda x, t, row: raw[row]), x, t, cond)

        guided_predict = guided(predict, cond, {"row": rows[0]}, torch.tensor([weights]).expand(len(x), -1))
        return guided_predict(x, t), seen[0]

    x = given["x"][:half]
    for scale in recorded.config["scales"]:
        prediction, seen = outputs(given["raw_model_output"], 2, x, [scale], t)
        if scale == 0:  # the original asks a prompt without weight for its variance all the same; we do not ask it
            v = recorded.recorded(f"cfg_{scale}")[:half, x.shape[1] :]  # [B, C, h, w]
            prediction = prediction._replace(variance_fraction=(v + 1) / 2)
        check_halves(recorded, f"cfg_{scale}", prediction, 2)
        if len(seen) == 2 * half:
            recorded.check("model_input", seen)
    for scale, style in recorded.config["double_scales"]:
        x3 = given["x3"][:third]
        prediction, _ = outputs(given["raw_model_output_3"], 3, x3, [scale, style], t[:third])
        check_halves(recorded, f"double_cfg_{scale}_{style}", prediction, 3)
    for loop in recorded.config["loops"]:
        check_guided_loop(recorded, loop)
    recorded.finish()


def check_halves(recorded: Case, name: str, prediction: Prediction, parts: int) -> None:
    """Compare a guided eps, which the original repeats, and the variance that is the first prompt's."""
    theirs = recorded.recorded(name)  # [parts * B, 2C, h, w]
    v = 2 * prediction.variance_fraction - 1  # [B, C, h, w]
    rest = theirs[len(v) :, v.shape[1] :]  # the other parts keep variances of their own, which nobody reads
    eps = prediction.eps.repeat(parts, 1, 1, 1)  # [parts * B, C, h, w]
    recorded.check(name, torch.cat([eps, torch.cat([v, rest])], dim=1))


def check_guided_loop(recorded: Case, loop: dict) -> None:
    """Compare a whole guided run; of the recorded batch only the first half is what anybody wanted."""
    given, objective, net, name = recorded.inputs, objective_of(loop), Analytic(loop), loop["name"]
    half = len(given["tokens"]) // 2
    cond = {key: given[key][:half, None] for key in ("tokens", "mask")}  # [B, 1, L] each
    null = {key: given[key][half:] for key in ("tokens", "mask")}  # [B, L] each

    def predict(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Prediction:
        return objective.predict(net, x, t, cond)

    weights = torch.full((half, 1), loop["guidance_scale"])
    clamp = loop["sampler"] not in UNCLAMPED
    final, _, _ = sampled(recorded, loop, guided(predict, cond, null, weights), given["noise"][:, :half], clamp)
    recorded.check(f"{name}.sample", final)
    rest = recorded.recorded(f"{name}.full")[half:]  # the second half is thrown away by the original, too
    recorded.check(f"{name}.full", torch.cat([final, rest]))
