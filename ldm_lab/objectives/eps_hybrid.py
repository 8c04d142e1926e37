"""Prediction of the noise, with a learned variance, by a table of betas: the objective of guided-diffusion, GLIDE."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from ldm_lab.conditions import Conditions
from ldm_lab.config import PositiveFloat, register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Denoiser, Objective, Prediction, TimestepSampler
from ldm_lab.objectives.variational_bound import variational_bound
from ldm_lab.objectives.weighting import Weighting, loss_weight
from ldm_lab.schedules import Betas, Discrete, Posterior

NO_VARIANCE = "objective.bound: this denoiser has no channels for a learned variance; set objective.bound=false"
BOUND = 1 / 1000  # weight of the whole bound, the sum over its T terms, beside the mean squared error


@register("objective", "eps_hybrid")
class EpsHybrid(Objective):
    """Mean squared error of eps, plus the variational bound for the learned variance (Nichol & Dhariwal 2021).

    The denoiser puts out eps and, in as many channels more, where the log variance lies between its two bounds, as a
    number in [-1, 1] (arXiv 2102.09672, equation 15). The bound trains the variance alone: eps is detached in it
    (L_hybrid, section 3.1; "RESCALED_MSE" in guided-diffusion). Denoisers of eps alone are welcome without the bound.
    """

    schedule: Discrete

    def __init__(
        self,
        *,
        betas: Betas = "squaredcos_cap_v2",
        timesteps: Annotated[int, Ge(2)] = 1000,
        bound: bool = True,
        weighting: Weighting = "uniform",
        gamma: PositiveFloat | None = None,
        timestep_sampler: TimestepSampler = "sobol",
    ) -> None:
        """Set what is trained.

        Args:
            betas: the noise schedule (`ldm_lab.schedules.Discrete`).
            timesteps: T of the schedule; training draws all of them, 0 to T - 1.
            bound: train the variance; otherwise its channels get no gradient, as in glide-finetune.
            weighting: what noise levels count in the error of eps (`ldm_lab.objectives.weighting`): with min_snr and
                soft_min_snr timesteps with hardly any noise weigh less.
            gamma: of the weighting: the SNR above which a level counts no more, 5 by default; of p2 the exponent, 0.5.
            timestep_sampler: how training draws them (`training/timesteps.py`): evenly spread Sobol points, or
                independently.
        """
        self.schedule = Discrete(betas, timesteps)
        self.bound, self.timestep_sampler = bound, timestep_sampler
        self.weighting, self.gamma = weighting, gamma
        self.posterior = Posterior.from_times(self.schedule, self.schedule.grid(timesteps))
        self._posteriors: dict[torch.device, Posterior] = {}  # the same on the devices that it was needed on

    @staticmethod
    def check(*, betas: Betas, timesteps: int) -> list[str]:
        """Return what is wrong across the options."""
        if betas == "linear" and timesteps < 21:
            return [f"timesteps: at least 21 are needed for linear betas, which reach 1 with fewer, not {timesteps}"]
        return []

    @staticmethod
    def unused(*, weighting: str) -> dict[str, str]:
        """Return which options have no effect, and why."""
        return {"gamma": "objective.weighting is uniform"} if weighting == "uniform" else {}

    def check_denoiser(self, denoiser: Denoiser | type[Denoiser]) -> None:
        """Raise UserError for a denoiser that has no timesteps, or no channels for the variance that is trained."""
        super().check_denoiser(denoiser)
        if self.bound and denoiser.learns_variance is False:
            raise UserError(NO_VARIANCE)

    def loss_terms(
        self, denoiser: Denoiser, x0: Tensor, conditions: Conditions, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return the loss per sample, and with the bound its two terms, [B] each.

        Args:
            denoiser: the network; it makes [B, 2C, h, w], or [B, C, h, w] without the bound.
            x0: clean samples, [B, C, h, w].
            conditions: of the rows.
            t: in [0, 1], [B]; each stands for the timestep that is next above it or at it.
            noise: standard normal, [B, C, h, w].

        Returns:
            "loss" = "mse" + timesteps / 1000 * "bound"; mse is the (weighted) mean squared error of eps, bound the
            timestep's term of the variational bound, in bits per element.
        """
        index = self.schedule.index(t)  # [B]
        t = self.schedule.at(index)  # [B]
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        x = alpha * x0 + sigma * noise  # [B, C, h, w]
        output = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions)  # [B, C or 2C, h, w]
        eps, fraction = self.read(output, x.shape[1])  # [B, C, h, w] each
        mse = (eps - noise).square().flatten(1).mean(1)  # [B]
        if self.weighting != "uniform":
            mse = mse * loss_weight(self.weighting, self.gamma, self.schedule.log_snr(t), "eps")  # [B]
        if not self.bound:
            return {"loss": mse}
        if fraction is None:
            raise UserError(NO_VARIANCE)
        if x.device not in self._posteriors:
            self._posteriors[x.device] = self.posterior.on(x.device)
        step = self._posteriors[x.device].at(self.schedule.timesteps - 1 - index)
        predicted = (x - sigma * eps.detach()) / alpha  # [B, C, h, w]
        bound = variational_bound(step, x0, x, predicted, fraction, index == 0)  # [B]
        return {"loss": mse + BOUND * self.schedule.timesteps * bound, "mse": mse, "bound": bound}

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Return clean sample, noise and the learned variance, if there is one, [B, C, h, w] each, for x at t [B]."""
        alpha, sigma = (level[:, None, None, None] for level in self.schedule.alpha_sigma(t))  # [B, 1, 1, 1]
        output = denoiser(x, self.schedule.time(t, denoiser.time_input), **conditions)  # [B, C or 2C, h, w]
        eps, fraction = self.read(output, x.shape[1])  # [B, C, h, w] each
        return Prediction(x0=(x - sigma * eps) / alpha, eps=eps, variance_fraction=fraction)

    @staticmethod
    def read(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Return eps and the fraction of the variance (None without), [B, C, h, w] each, of a denoiser's output.

        Raises:
            UserError: an output of neither C nor 2C channels.
        """
        if output.shape[1] not in (channels, 2 * channels):
            raise UserError(
                f"objective eps_hybrid: the denoiser puts out {output.shape[1]} channels; of {channels} channels it "
                f"should make {2 * channels}, or {channels} without a learned variance"
            )
        output = output.float()
        if output.shape[1] == channels:
            return output, None
        eps, v = output.chunk(2, dim=1)  # [B, C, h, w] each
        return eps, (v + 1) / 2
