"""Noise schedules: t -> (alpha, sigma), and the grids of times that samplers visit. t runs from 1 (noise) to 0 (data).

A noised sample is x = alpha * x0 + sigma * eps; the contract is `ldm_lab.predictions.Schedule`. With most schedules
alpha^2 + sigma^2 = 1 (variance preserving), but no sampler and no guidance takes it for granted.

`cosine`      continuous, of cloob-latent-diffusion
`discrete`    tables of betas, of GLIDE, guided-diffusion and latent diffusion
`linear`      of rectified flow and flow matching; variance is not preserved
`log_snr`     continuous, said by the log SNR: Imagen's cosine and linear ones
`continuous`  the grids that the last two share
`respacing`   which of a table's timesteps are visited: "27", "fast27", "ddim50", "10,10,3,2,2"
`spacing`     grids that only the noise levels decide
`posterior`   the steps of ancestral sampling between the times of a grid
`respaced`    a schedule known at the times of a grid alone
"""

from ldm_lab.schedules.cosine import Cosine
from ldm_lab.schedules.discrete import Betas, Discrete
from ldm_lab.schedules.linear import Linear
from ldm_lab.schedules.log_snr import LogSNR, LogSNRCurve
from ldm_lab.schedules.posterior import Posterior
from ldm_lab.schedules.respaced import RespacedSchedule
from ldm_lab.schedules.respacing import Steps, num_steps
from ldm_lab.schedules.spacing import NoiseLevel, Spacing, default_sigma_max

__all__ = [
    "Betas",
    "Cosine",
    "Discrete",
    "Linear",
    "LogSNR",
    "LogSNRCurve",
    "NoiseLevel",
    "Posterior",
    "RespacedSchedule",
    "Spacing",
    "Steps",
    "default_sigma_max",
    "num_steps",
]
