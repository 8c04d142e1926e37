"""DDIM and its kin: first-order steps, deterministic or with fresh noise in each of them."""

from torch import Tensor

from ldm_lab.config import Share, register
from ldm_lab.samplers.base import GridSampler, Run, Step
from ldm_lab.schedules import Steps


@register("sampler", "ddim")
class DDIM(GridSampler):
    """DDIM (Song et al. 2021, arXiv 2010.02502): one model call a step; eta 0 is deterministic, eta 1 is DDPM.

    The result is the clean estimate at the last time of the grid; there is no step to t = 0.
    """

    def __init__(self, *, steps: Steps = 50, eta: Share = 0.0) -> None:
        """Set the grid and the fresh noise.

        Args:
            steps: model calls.
            eta: how much of the noise is fresh in each step, from 0 (none) to 1 (as much as the DDPM posterior has).
        """
        super().__init__(steps)
        self.eta = eta

    def step(self, run: Run, i: int, x: Tensor) -> Step:
        """Return a step by equation 12 of Song et al. 2021, the root of their alpha_t being alpha here."""
        prediction = run.model(x, run.times[i])
        if i + 1 == len(run):
            return Step(prediction.x0, prediction.x0)
        # Equation 16: eta times the standard deviation of the DDPM posterior.
        fresh = self.eta * run.posterior.variance[i].item() ** 0.5
        kept = (run.sigma[i + 1] ** 2 - fresh**2) ** 0.5
        x = run.alpha[i + 1] * prediction.x0 + kept * self.direction(run, prediction.eps)  # [B, C, h, w]
        if self.eta:
            x = x + fresh * run.noise(x)  # [B, C, h, w]
        return Step(x, prediction.x0, prediction.eps)

    def direction(self, run: Run, eps: Tensor) -> Tensor:
        """Return the noise that is put in again, [B, C, h, w], of the step's own."""
        return eps


@register("sampler", "ddim_extrapolated")
class ExtrapolatedDDIM(DDIM):
    """DDIM whose noise, not its clean estimate, is extrapolated from the step before: "dpm++" of glide-finetune.

    It does not belong to the DPM-Solver++ family (`dpmpp_2m` does), and with any number of steps it does not converge
    to what the model says: samples come out too smooth. It is here for those who know its pictures.
    """

    history = 1

    def __init__(self, *, steps: Steps = 30) -> None:
        """Set the grid.

        Args:
            steps: model calls.
        """
        super().__init__(steps=steps)

    def direction(self, run: Run, eps: Tensor) -> Tensor:
        """Return the noise at the middle of the step, [B, C, h, w]; of the first step its own."""
        before = run.past[0].eps if run.past else None
        return eps if before is None else 1.5 * eps - 0.5 * before  # [B, C, h, w]
