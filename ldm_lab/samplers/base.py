"""The loop that all samplers share: one step after another along a falling grid of times. A family gives the step."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Callback, Noise, Predict, Prediction, Sampler, Schedule
from ldm_lab.schedules import NoiseLevel, Posterior, Spacing, Steps, default_sigma_max, num_steps

OWN_GRIDS = (None, "spliced", "respaced")  # of schedules: they begin where the original programs' do


class Step(NamedTuple):
    """What one step makes, [B, C, h, w] each.

    Attributes:
        x: where it leads; after the last step the result.
        x0: the clean estimate in it.
        eps: the noise that a later step may want to know of it; None where no later one does.
        start: where it began, for samplers that correct x before they go on from it; None: where it was handed x.
    """

    x: Tensor
    x0: Tensor
    eps: Tensor | None = None
    start: Tensor | None = None


class Run:
    """One run of a sampler: the model, the noise, the grid with its values, and the steps done so far.

    Attributes:
        schedule: of the model.
        times: float32 [S + 1], falling; step i leads from time i to time i + 1.
        alpha, sigma: at these times, S + 1 numbers each, of float64.
        past: the steps before, newest first, as many as the sampler's `history`.
    """

    def __init__(self, predict: Predict, schedule: Schedule, times: Tensor, noise: Noise | None) -> None:
        self.predict, self.schedule, self.times = predict, schedule, times
        alpha, sigma = self.levels(times.double())  # [S + 1], [S + 1]
        self.alpha, self.sigma = alpha.tolist(), sigma.tolist()
        self.past: list[Step] = []
        self._noise = noise

    def __len__(self) -> int:
        return len(self.times) - 1

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times of any shape; at t = 0 those of the clean sample, in which a run ends."""
        alpha, sigma = self.schedule.alpha_sigma(t)  # t's shape each
        return torch.where(t == 0, 1.0, alpha), torch.where(t == 0, 0.0, sigma)

    def model(self, x: Tensor, t: Tensor) -> Prediction:
        """Return the prediction for x [B, C, h, w], all of it at a time t []."""
        return self.predict(x, t.to(x.device, non_blocking=True).expand(len(x)))

    def noise(self, x: Tensor) -> Tensor:
        """Return fresh standard normal noise of x's shape."""
        if self._noise is None:
            raise ValueError("a stochastic sampler needs a source of noise")
        return self._noise(x)

    @cached_property
    def posterior(self) -> Posterior:
        """The ancestral steps between the times."""
        return Posterior.from_times(self.schedule, self.times[:-1])

    @cached_property
    def lambdas(self) -> list[float]:
        """log(alpha / sigma) at the times, half the log SNR, S + 1 numbers; at t = 0 infinite."""
        alpha, sigma = self.levels(self.times.double())  # [S + 1], [S + 1]
        return (alpha / sigma).log().tolist()


class GridSampler(Sampler):
    """A sampler that visits the times of its schedule's grid, and t = 0 in the end.

    Attributes:
        steps: how many steps there are.
        respacing: what the schedule's grid is asked for: a number, or a respacing (`ldm_lab.schedules.respacing`).
        spacing: of the grid; None is the schedule's own.
        sigma_max: sigma / alpha of the first time; None: by the size of x (`ldm_lab.schedules.default_sigma_max`). The
            schedule's own grids keep theirs.
        history: how many past steps a step looks back on.
    """

    history: int = 0

    def __init__(self, steps: Steps, spacing: Spacing | None = None, sigma_max: NoiseLevel | None = None) -> None:
        self.respacing, self.steps = steps, num_steps(steps)
        self.spacing, self.sigma_max = spacing, sigma_max

    @staticmethod
    def check(*, steps: Steps = 1, spacing: str | None = None, sigma_max: float | None = None) -> list[str]:
        """Return what is wrong: `steps` may be a text that is no respacing, and not every grid can begin anywhere."""
        try:
            num_steps(steps)
        except UserError as error:
            return [str(error)]
        own = f"steps {steps}" if isinstance(steps, str) else f"spacing {spacing}" if spacing in OWN_GRIDS else None
        if sigma_max is not None and own is not None:
            return [f"sigma_max: {own} says by itself where it begins; spacing log_snr, karras or uniform goes with it"]
        return []

    def times(self, schedule: Schedule, size: Sequence[int] | None = None) -> Tensor:
        """Return the times at which the steps begin, falling, float32 [steps]; see `ldm_lab.interfaces.Sampler`.

        Raises:
            UserError: steps, a spacing or a noise level that the schedule does not have.
        """
        if self.sigma_max is not None and self.sigma_max > schedule.sigma_max * 1.001:
            most = f"{schedule.sigma_max:.1f}"
            raise UserError(f"sigma_max: {self.sigma_max:g} is more noise than this model begins with; up to {most}")
        first = default_sigma_max(size, schedule.sigma_max) if self.sigma_max is None else self.sigma_max
        return schedule.grid(self.respacing, self.spacing, first)

    def sample(
        self,
        predict: Predict,
        x: Tensor,
        *,
        schedule: Schedule,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return x0 [B, C, h, w]; see `ldm_lab.interfaces.Sampler`."""
        run = self.begin(predict, schedule, x.shape[2:], noise)
        state = self.to_state(run, x)  # [B, C, h, w]
        for i in range(len(run)):
            step = self.step(run, i, state)
            if callback:
                callback(i, self.to_x(run, i, state), step.x0)
            run.past = [step, *run.past][: self.history]
            state = step.x  # [B, C, h, w]
        return state

    def begin(self, predict: Predict, schedule: Schedule, size: Sequence[int], noise: Noise | None) -> Run:
        """Return a new run along the grid for x of a height and width, and on to t = 0."""
        return Run(predict, schedule, torch.cat([self.times(schedule, size), torch.zeros(1)]), noise)

    def step(self, run: Run, i: int, x: Tensor) -> Step:
        """Return step i, from x [B, C, h, w] at `run.times[i]` to `run.times[i + 1]`; the last one makes the result."""
        raise NotImplementedError

    def to_state(self, run: Run, x: Tensor) -> Tensor:
        """Return what the steps change, [B, C, h, w], of x at the first time: x itself unless a family says else."""
        return x

    def to_x(self, run: Run, i: int, state: Tensor) -> Tensor:
        """Return x at time i, [B, C, h, w], of what the steps change."""
        return state
