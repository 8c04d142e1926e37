"""Samplers: from noise to a clean sample along a falling grid of times.

The contract is `ldm_lab.interfaces.Sampler`: `sample(predict, x, schedule=..., noise=..., callback=...) -> x0`. A
sampler uses nothing but the prediction, so that any objective and any guidance works with it; it knows no U-Net. Its
options (`steps`, `eta`, ...) are its keyword-only constructor arguments, so that a YAML says
`sampler: {name: plms, steps: 50}`. All arithmetic outside `predict` is float32, or what x is. What it does to one row
of x does not depend on the other rows.

`base` owns the loop; a family gives the step. A new sampler is one file in this folder with one
`@register("sampler", "name")` and a subclass of `GridSampler`:

`ddim`          DDIM and ddim_extrapolated
`ancestral`     ddpm
`edm`           euler and heun in x / alpha, with churn
`dpm_solver`    dpmpp_2m, dpmpp_2m_sde, unipc
`pndm`          prk, plms, pie, plms2, iplms
"""
