"""Denoisers: the networks that are trained (`ldm_lab.interfaces.Denoiser`).

A denoiser is constructed with `(channels, conditions, *, options)`: C of the latents, the `ConditionSpec` that
conditioner and condition sources give, and the keys of its config section. What its output means (v, eps, ...) is the
objective's business: a denoiser knows no noise schedule. A new denoiser is one file in this folder with one
`@register("denoiser", "name")`.

`ccld_unet`   of cloob-latent-diffusion: takes an embedding
`glide_unet`  of GLIDE: reads token ids; with a low-resolution image, an image to be filled in, or a CLIP vector, too
`if_unet`     of DeepFloyd IF: GLIDE's, told a text by token states
`imagen_unet` of Imagen: token states; with a noised small image a super-resolution stage
`unet`        what they have in common; `glide_levels`, what GLIDE's and IF's have; others hold layers
"""
