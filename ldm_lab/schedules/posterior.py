"""The steps of ancestral sampling between the times of a grid: q(x at the next time | x, x0).

Every pair of neighboring times of a schedule makes a step of a diffusion process x = kept * x_next + sqrt(beta) * eps
with kept = alpha / alpha_next and beta = sigma^2 - kept^2 * sigma_next^2 (Kingma et al. 2021, arXiv 2107.00630, section
3.1), so that a table of betas is "respaced" to any grid (Nichol & Dhariwal 2021, arXiv 2102.09672, section 4), and a
continuous schedule has ancestral steps, too. Where variance is preserved, beta is 1 - kept^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.interfaces import Schedule


@dataclass(frozen=True)
class Posterior:
    """What belongs to the steps of a grid; step i leads from time i to time i + 1, the last one to t = 0.

    Attributes, each [S], float64, or of the shape that `at` gives them:
        beta: variance that the forward step adds.
        variance: of the posterior (Ho et al. 2020, arXiv 2006.11239, equation 7); of the last step 0
            where t = 0 is the clean sample.
        log_beta: logarithm of beta.
        log_variance: logarithm of the variance; in the last step that of the step before in place of that of 0 or so.
        x0_weight, x_weight: of x0 and x in the posterior's mean.
    """

    beta: Tensor
    variance: Tensor
    log_beta: Tensor
    log_variance: Tensor
    x0_weight: Tensor
    x_weight: Tensor

    @classmethod
    def from_times(cls, schedule: Schedule, times: Tensor) -> "Posterior":
        """Return the steps between falling times [S] of a schedule."""
        alpha, sigma = schedule.alpha_sigma(times.double())  # [S] each
        end_alpha, end_sigma = schedule.alpha_sigma(torch.zeros_like(alpha[:1]))  # [1] each; mostly 1 and 0
        next_alpha, next_sigma = torch.cat([alpha[1:], end_alpha]), torch.cat([sigma[1:], end_sigma])  # [S] each
        kept2 = (alpha / next_alpha) ** 2  # [S]
        beta = 1 - kept2 if schedule.variance_preserving else sigma**2 - kept2 * next_sigma**2  # [S]
        clean = (next_sigma / sigma) ** 2  # [S]
        variance = beta * clean  # [S]
        positive = torch.cat([variance[:-1], variance[-2:-1] if len(times) > 1 else beta])  # [S]
        return cls(
            beta=beta,
            variance=variance,
            log_beta=beta.log(),
            log_variance=positive.log(),
            x0_weight=beta * next_alpha / sigma**2,
            x_weight=kept2.sqrt() * clean,
        )

    def on(self, device: torch.device) -> "Posterior":
        """Return the same in float32 on a device, so that `at` with steps that are there waits for nothing."""
        return Posterior(*(table.float().to(device) for table in self._tables()))  # [S] each

    def at(self, step: int | Tensor) -> "Posterior":
        """Return what belongs to one step, [], on the CPU; or to a step per row, [B, 1, 1, 1], where the tables are.

        All in float32.
        """
        if isinstance(step, int):
            return Posterior(*(table[step].float().cpu() for table in self._tables()))  # [] each
        return Posterior(*(table[step].float()[:, None, None, None] for table in self._tables()))  # [B, 1, 1, 1] each

    def _tables(self) -> tuple[Tensor, ...]:
        return self.beta, self.variance, self.log_beta, self.log_variance, self.x0_weight, self.x_weight

    def mean(self, x0: Tensor, x: Tensor) -> Tensor:
        """Return the posterior's mean, [B, C, h, w], of x0 and x [B, C, h, w] (Ho et al. 2020, equation 7)."""
        return self.x0_weight * x0 + self.x_weight * x  # [B, C, h, w]

    def learned(self, fraction: Tensor) -> Tensor:
        """Return the log variance at a fraction [B, C, h, w] of the way from the posterior's to beta, on a log scale.

        Nichol & Dhariwal 2021, equation 15.
        """
        return fraction * self.log_beta + (1 - fraction) * self.log_variance  # [B, C, h, w]
