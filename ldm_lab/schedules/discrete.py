"""Schedules made for a number of timesteps, by a table of betas: DDPM, guided-diffusion, GLIDE, latent diffusion."""

from typing import Literal

import torch
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Schedule
from ldm_lab.schedules.respacing import Steps, kept_timesteps
from ldm_lab.schedules.spacing import LAST_RATIO, ratios

Betas = Literal["squaredcos_cap_v2", "linear", "linear_latent"]
FIRST_RATIO = 148.4  # sigma / alpha where the grids that divide by alpha begin; the cosine schedule's begin there, too
WHOLE = 1e-3  # of a timestep: float32 rounds t by less


def step_of_level(level: Tensor, steps: int) -> Tensor:
    """Return the step, int64 0 .. steps - 1, that noise levels in [0, 1] stand for: the whole one not above them."""
    return (level.float() * steps + WHOLE).floor().long().clamp(0, steps - 1)  # level's shape


class Discrete(Schedule):
    """alpha^2 = product of (1 - beta) over the timesteps so far; timestep i, 0 .. T - 1, is at t = (i + 1) / T.

    At t = 0 is the clean sample. Between two timesteps alpha^2 is interpolated linearly, as GLIDE's PLMS has it.

    Attributes:
        timesteps: T.
    """

    variance_preserving = True
    timesteps: int

    def __init__(self, betas: Betas = "squaredcos_cap_v2", timesteps: int = 1000) -> None:
        """Make the tables, in float64.

        Args:
            betas: squaredcos_cap_v2 (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17: GLIDE's base model), linear
                (Ho et al. 2020, scaled to T: GLIDE's upsampler), or linear_latent (linear in the root: latent
                diffusion).
            timesteps: T.
        """
        self.timesteps = timesteps
        with torch.device("cpu"):  # whatever torch's default is: networks are built without memory on "meta"
            alpha2 = torch.cumprod(1 - beta_table(betas, timesteps), 0)  # [T]
            one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)  # [1] each
            self._squares = torch.stack([torch.cat([one, alpha2]), torch.cat([zero, 1 - alpha2])])  # [2, 1 + T]
        self._on: dict[torch.device, Tensor] = {}  # the same on the devices that it was asked for on
        self.sigma_max = min(((1 - alpha2[-1]) / alpha2[-1]).sqrt().item(), FIRST_RATIO)

    def index(self, t: Tensor) -> Tensor:
        """Return the timestep, int64 0 .. T - 1 of t's shape, that t in [0, 1] belongs to: the next one not below it.

        So t drawn evenly from [0, 1) is a timestep drawn evenly, and the t of a timestep is that timestep's.
        """
        return (t * self.timesteps - WHOLE).ceil().long().sub(1).clamp(0, self.timesteps - 1)

    def at(self, index: Tensor) -> Tensor:
        """Return the t of timesteps, float32 of their shape."""
        return (index + 1) / self.timesteps  # index's shape

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape and dtype, for t in [0, 1]; exact at timesteps."""
        if t.device not in self._on:
            dtype = torch.float32 if t.device.type == "mps" else torch.float64  # there is no float64 there
            self._on[t.device] = self._squares.to(t.device, dtype)
        squares = self._on[t.device]  # [2, 1 + T]
        place = (t.to(squares.dtype) * self.timesteps).clamp(0, self.timesteps)  # t's shape
        place = torch.where((place - place.round()).abs() < WHOLE, place.round(), place)  # t's shape
        below = place.long().clamp(max=self.timesteps - 1)  # t's shape
        alpha2, sigma2 = torch.lerp(squares[:, below], squares[:, below + 1], place - below)  # t's shape each
        return alpha2.sqrt().to(t.dtype), sigma2.sqrt().to(t.dtype)

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the t, of any shape, at which sigma / alpha is `ratio`, 0 or above; at most 1."""
        sigma2 = self._squares[1]  # [1 + T]
        wanted = (ratio.double() ** 2 / (1 + ratio.double() ** 2)).clamp(max=sigma2[-1])  # ratio's shape
        above = torch.searchsorted(sigma2, wanted).clamp(1, self.timesteps)  # ratio's shape
        low, high = sigma2[above - 1], sigma2[above]  # ratio's shape each
        return ((above - 1 + (wanted - low) / (high - low)) / self.timesteps).to(ratio.dtype)

    def grid(self, steps: Steps, spacing: str | None = None, sigma_max: float | None = None) -> Tensor:
        """Return the times to visit, float32 [steps], falling; the final 0 is not among them.

        By default whole timesteps, evenly spread from T - 1 to 0. A respacing (`ldm_lab.schedules.respacing`) says by
        itself which timesteps they are, whatever the spacing. The other grids begin at `sigma_max`, or where alpha is
        0.0067, or at the last timestep if that has more, and end no earlier than timestep 0: below it no network was
        trained.

        Raises:
            UserError: more steps than there are timesteps, or a respacing that does not divide them.
        """
        if spacing == "spliced":
            raise UserError(
                "spacing spliced: that grid belongs to the cosine schedule; this model has timesteps: respaced, "
                "log_snr, karras or uniform"
            )
        if isinstance(steps, str) or spacing in (None, "respaced"):
            return self.at(torch.tensor(kept_timesteps(self.timesteps, steps)).flip(0))  # [steps]
        first = self.sigma_max if sigma_max is None else min(sigma_max, self.sigma_max)
        alpha, sigma = self.alpha_sigma(torch.tensor(1 / self.timesteps, dtype=torch.float64))  # [], []
        last = max((sigma / alpha).item(), LAST_RATIO)
        if spacing == "uniform":
            start = self.t_of_sigma_over_alpha(torch.tensor(first, dtype=torch.float64))  # []
            return torch.linspace(start.item(), 1 / self.timesteps, steps)  # [steps]
        return self.t_of_sigma_over_alpha(ratios(first, last, steps, spacing)).float()  # [steps]


def beta_table(betas: Betas, timesteps: int) -> Tensor:
    """Return the variances of the forward steps, float64 [T]."""
    if betas == "squaredcos_cap_v2":
        u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps  # [T + 1]
        alpha2 = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2  # [T + 1]
        return (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)  # [T]
    if betas == "linear":
        scale = 1000 / timesteps
        return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)  # [T]
    return torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64) ** 2  # [T]
