"""Objectives: what the denoiser's output means, how it is trained, how clean data is read off it.

The contract is `ldm_lab.interfaces.Objective`: a noise schedule (`ldm_lab.schedules`), a way to draw t, the loss per
sample, and the prediction that samplers use. All are pure: the random numbers are handed in, so that a resumed run
repeats them and a test can fix them. A new objective is one file with one `@register("objective", "name")`.

`v_cosine`            v on the cosine schedule, of cloob-latent-diffusion
`eps_hybrid`          eps and a learned variance by a table of betas, of guided-diffusion and GLIDE
`continuous`          eps, x0 or v on Imagen's continuous schedules
`flow_matching`       the velocity of the straight path, of rectified flow and Stable Diffusion 3
`variational_bound`   what trains the learned variance
`targets`             eps, x0 and v made of one another
`weighting`           what noise levels count in the loss
"""
