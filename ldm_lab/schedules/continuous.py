"""What the grids of continuous schedules share: steps even in t unless another spacing is asked for."""

import torch
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Schedule
from ldm_lab.schedules.spacing import LAST_RATIO, ratios


class ContinuousSchedule(Schedule):
    """A schedule without timesteps.

    Attributes:
        name: as messages call it.
        first_time: where its own grid begins, at most 1.
    """

    name: str
    first_time: float

    def grid(self, steps: int | str, spacing: str | None = None, sigma_max: float | None = None) -> Tensor:
        """Return the times to visit, float32 [steps], falling; the final 0 is not among them.

        By default evenly spread in t, from `first_time`; the other grids begin at `sigma_max` or where the schedule's
        own limit is.

        Raises:
            UserError: steps or a spacing that other schedules have.
        """
        if isinstance(steps, str) or spacing in ("spliced", "respaced"):
            raise UserError(
                f"{f'steps {steps!r}' if isinstance(steps, str) else f'spacing {spacing}'}: this model's noise "
                f"schedule is {self.name}; give a number of steps, and spacing uniform, log_snr or karras"
            )
        if spacing is None:
            return torch.linspace(1, 0, steps + 1)[:-1] * self.first_time  # [steps]
        first = self.sigma_max if sigma_max is None else min(sigma_max, self.sigma_max)
        if spacing == "uniform":
            start = self.t_of_sigma_over_alpha(torch.tensor(first, dtype=torch.float64))  # []
            return (torch.linspace(1, 0, steps + 1)[:-1] * start).float()  # [steps]
        visited = ratios(first, LAST_RATIO, steps, spacing)  # [steps]
        return self.t_of_sigma_over_alpha(visited).float()  # [steps]
