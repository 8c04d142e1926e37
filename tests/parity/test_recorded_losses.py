"""The losses of eps models and their gradients against recordings of guided-diffusion, miniGLIDE and glide-finetune."""

import pytest
import torch
from glide_networks import glide_network
from recorded import Case
from stand_ins import FunctionDenoiser
from test_recorded_diffusion import kept, objective_of
from torch import Tensor

from ldm_lab.objectives.eps_hybrid import BOUND, EpsHybrid
from ldm_lab.objectives.variational_bound import level_log_likelihood, normal_kl, variational_bound
from ldm_lab.schedules import Posterior


def test_hybrid_loss(case):
    recorded = case("hybrid_loss")
    given = recorded.inputs
    for diffusion in recorded.config["diffusions"]:
        for kind in recorded.config["loss_types"]:
            check_loss(recorded, diffusion, kind)
    ours = level_log_likelihood(given["x0"], given["ll_means"], given["ll_log_scales"])
    recorded.check("discretized_log_likelihood", ours)
    first, second = (given["x0"], given["ll_log_scales"]), (given["ll_means"], 0.7 * given["ll_log_scales"])
    recorded.check("normal_kl", normal_kl(*first, *second))
    recorded.finish()


def check_loss(recorded: Case, diffusion: dict, kind: str) -> None:
    """Compare one of guided-diffusion's four losses; our objective is "RESCALED_MSE" of all timesteps."""
    given, name = recorded.inputs, diffusion["name"]
    objective = objective_of(diffusion)
    times = objective.schedule.grid(kept(diffusion))  # [S], falling
    place = len(times) - 1 - torch.tensor(diffusion["t"])  # [B], steps done before
    t, last = times[place], place == len(times) - 1  # [B] each
    output = given["raw_model_output"].clone().requires_grad_()  # [B, 2C, h, w]
    called = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        called.append(objective.schedule.index(t))
        return output

    if kind == "RESCALED_MSE" and len(times) == objective.schedule.timesteps:
        terms = objective.loss_terms(FunctionDenoiser(denoiser), given["x0"], {}, t, given["noise"])
        terms["bound"] = BOUND * len(times) * terms["bound"]
    else:
        alpha, sigma = (level[:, None, None, None] for level in objective.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        x = alpha * given["x0"] + sigma * given["noise"]  # [B, C, h, w]
        eps, fraction = EpsHybrid.read(denoiser(x, t), x.shape[1])  # [B, C, h, w] each
        seen = eps if kind.endswith("KL") else eps.detach()  # [B, C, h, w]
        step = Posterior.from_times(objective.schedule, times).at(place)
        bound = variational_bound(step, given["x0"], x, (x - sigma * seen) / alpha, fraction, last)  # [B]
        scale = {"MSE": 1, "RESCALED_MSE": len(times) * BOUND, "KL": 1, "RESCALED_KL": len(times)}[kind]
        mse = (eps - given["noise"]).square().flatten(1).mean(1)  # [B]
        terms = {"mse": mse, "bound": scale * bound, "loss": scale * bound + (0 if kind.endswith("KL") else mse)}
    terms["loss"].mean().backward()
    recorded.check(f"{name}.{kind}.loss", terms["loss"])
    if not kind.endswith("KL"):
        recorded.check(f"{name}.{kind}.mse", terms["mse"])
        recorded.check(f"{name}.{kind}.vb", terms["bound"])
    recorded.check(f"{name}.{kind}.grad", output.grad)
    recorded.check(f"{name}.model_timesteps", called[0])


def test_miniglide_loss(case):
    """miniGLIDE's loss, with what its authors did otherwise put together from our parts."""
    recorded = case("miniglide_loss")
    given, config = recorded.inputs, {**recorded.config, "steps": recorded.config["timesteps"]}
    objective = objective_of(config)
    times = objective.schedule.grid(kept(config))  # [S], falling
    place = len(times) - 1 - given["t"]  # [B]
    t = times[place]  # [B]
    for kind in ("hybrid", "simple"):
        output = given["raw_model_output"].clone().requires_grad_()  # [B, 2C, h, w]
        seen = []

        def denoiser(x: Tensor, t: Tensor, output=output, seen=seen) -> Tensor:
            seen.append(x)
            return output

        objective.bound = False
        loss = objective.loss_terms(FunctionDenoiser(denoiser), given["x0"], {}, t, given["noise"])["loss"].mean()
        x = seen[0]
        if kind == "hybrid":
            alpha, sigma = (level[:, None, None, None] for level in objective.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
            eps, fraction = objective.read(output, x.shape[1])  # [B, C, h, w] each
            step = Posterior.from_times(objective.schedule, times).at(place)
            predicted = ((x - sigma * eps) / alpha).clamp(-1, 1)  # [B, C, h, w]
            theirs = (step.mean(given["x0"], x), step.log_variance)
            divergence = normal_kl(*theirs, step.mean(predicted, x), step.learned(fraction))  # [B, C, h, w]
            loss = loss + config["vlb_weight"] * divergence.mean()
        loss.backward()
        recorded.check(f"{kind}.loss", loss[None])
        recorded.check(f"{kind}.reported_epoch_loss", loss[None] / len(x))
        recorded.check(f"{kind}.grad", output.grad)
        recorded.check("x_t", x)
    recorded.finish()


@pytest.mark.parametrize("part", ["base", "upsample"])
def test_glide_finetune_loss(case, part, tmp_path):
    """A training step of glide-finetune, with the network out of a file laid out as a released one."""
    recorded = case("glide_finetune_loss")
    recorded.names = [name for name in recorded.names if name.startswith(part)]
    given, config = recorded.inputs, recorded.config[part]
    net = glide_network(recorded.part(f"{part}/"), config["model"], tmp_path)
    objective = objective_of(config["diffusion"])
    objective.bound = False
    cond = {"token_ids": given["tokens"], "token_ids_mask": given["mask"].bool()}
    if part == "upsample":
        cond["low_res"] = given["upsample.low_res"]
    t = objective.schedule.at(given[f"{part}.t"])  # [B]
    terms = objective.loss_terms(net, given[f"{part}.images"], cond, t, given[f"{part}.noise"])
    loss = terms["loss"].mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    recorded.check(f"{part}.loss", loss[None])
    recorded.check(f"{part}.grad_norm_total", torch.stack([g.norm() for g in gradients.values()]).norm()[None])
    recorded.check(f"{part}.grad_norms", torch.stack([gradients[name].norm() for name in config["grad_names"]]))
    recorded.check(f"{part}.grad_out_bias", gradients["out.2.bias"])
    recorded.finish()
