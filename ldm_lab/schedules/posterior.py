"""The steps of ancestral sampling between the times of a grid: q(x at the next time | x, x0).

Every pair of neighbouring times of a variance-preserving schedule makes a step of a diffusion process with the beta
1 - (alpha / alpha_next)^2 (Nichol & Dhariwal 2021, arXiv 2102.09672, section 4), so that a table of betas is "respaced"
to any grid, and a continuous schedule has ancestral steps, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """What belongs to the steps of a grid; step i leads from time i to time i + 1, the last one to t = 0.

    Attributes, each [S], float64, or of the shape that `at` gives them:
        beta: variance that the forward step adds.
        variance: of the posterior (Ho et al. 2020, arXiv 2006.11239, equation 7); of the last step 0.
        log_beta: logarithm of beta.
        log_variance: logarithm of the variance; in the last step that of the step before in place of that of 0.
        x0_weight, x_weight: of x0 and x in the posterior's mean.
    """

    beta: Tensor
    variance: Tensor
    log_beta: Tensor
    log_variance: Tensor
    x0_weight: Tensor
    x_weight: Tensor

    @classmethod
    def between(cls, schedule: Any, times: Tensor) -> "Posterior":
        """Return the steps between falling times [S] of a schedule."""
        alpha, sigma = schedule.alpha_sigma(times.double())  # [S] each
        next_alpha = torch.cat([alpha[1:], torch.ones_like(alpha[:1])])  # [S]
        next_sigma = torch.cat([sigma[1:], torch.zeros_like(sigma[:1])])  # [S]
        kept = (alpha / next_alpha) ** 2  # [S], 1 - beta
        beta, clean = 1 - kept, (next_sigma / sigma) ** 2  # [S] each
        variance = beta * clean  # [S]
        positive = torch.cat([variance[:-1], variance[-2:-1] if len(times) > 1 else beta])  # [S]
        return cls(
            beta=beta,
            variance=variance,
            log_beta=beta.log(),
            log_variance=positive.log(),
            x0_weight=beta * next_alpha / sigma**2,
            x_weight=kept.sqrt() * clean,
        )

    def on(self, device: torch.device) -> "Posterior":
        """Return the same in float32 on a device, so that `at` with steps that are there waits for nothing."""
        return self._each(lambda table: table.float().to(device))  # [S]

    def at(self, step: int | Tensor) -> "Posterior":
        """Return what belongs to one step, [], on the CPU; or to a step per row, [B, 1, 1, 1], where the tables are.

        All in float32.
        """
        if isinstance(step, int):
            return self._each(lambda table: table[step].float().cpu())  # []
        return self._each(lambda table: table[step].float()[:, None, None, None])  # [B, 1, 1, 1]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Posterior":
        return Posterior(*(change(getattr(self, field.name)) for field in fields(self)))

    def mean(self, x0: Tensor, x: Tensor) -> Tensor:
        """Return the posterior's mean, [B, C, h, w], of x0 and x [B, C, h, w] (Ho et al. 2020, equation 7)."""
        return self.x0_weight * x0 + self.x_weight * x  # [B, C, h, w]

    def learned(self, fraction: Tensor) -> Tensor:
        """Return the log variance at a fraction [B, C, h, w] of the way from the posterior's to beta, on a log scale.

        Nichol & Dhariwal 2021, equation 15.
        """
        return fraction * self.log_beta + (1 - fraction) * self.log_variance  # [B, C, h, w]
