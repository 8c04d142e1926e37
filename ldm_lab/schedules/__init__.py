"""Noise schedules: t -> (alpha, sigma), and the time grids that samplers walk. t runs from 1 (noise) to 0 (data).

A noised sample is x = alpha * x0 + sigma * eps, with alpha^2 + sigma^2 = 1 (variance preserving). A schedule has

    alpha_sigma(t) -> alpha, sigma           of t's shape and dtype, for t in [0, 1]
    time(level) -> t                         where sigma / alpha is `level`, of any shape
    grid(steps, spacing=None) -> [steps]     the times to visit, float32, falling; the final 0 is not among them

`cosine`      continuous, of cloob-latent-diffusion
`discrete`    tables of betas, of GLIDE, guided-diffusion and latent diffusion
`respacing`   which of a table's timesteps are visited: "27", "fast27", "ddim50", "10,10,3,2,2"
`spacing`     grids that only the noise levels decide
`posterior`   the steps of ancestral sampling between the times of a grid
`between`     a schedule known at the times of a grid alone
"""

from ldm_lab.schedules.between import Between
from ldm_lab.schedules.cosine import Cosine
from ldm_lab.schedules.discrete import BETAS, Discrete
from ldm_lab.schedules.posterior import Posterior
from ldm_lab.schedules.respacing import Steps, count
from ldm_lab.schedules.spacing import SPACING

__all__ = ["BETAS", "SPACING", "Between", "Cosine", "Discrete", "Posterior", "Steps", "count"]
