"""Autoencoders: images <-> the latents in which diffusion happens. Frozen there; trained by the task "autoencoder".

An autoencoder is an `nn.Module` with

    channels, downscale                                   C of a latent; pixels per side of one of its elements
    scale                                                 0-dim buffer that raw latents are divided by: their standard
                                                          deviation on the user's images, so that z has unit variance
    moments(image [B,3,H,W]) -> (mean, logvar)            posterior of the raw (undivided) latent, [B,C,h,w] each;
                                                          logvar is clamped to [-30, 20]
    sample(mean, logvar, noise=None) -> z [B,C,h,w]       (mean + exp(logvar/2) * noise) / scale; without noise the mean
    encode(image [B,3,H,W], noise=None) -> z [B,C,h,w]    the two together
    decode(z [B,C,h,w]) -> image [B,3,H,W]                not clamped

One whose latents are pixels has the attribute `limit`, their largest magnitude: samplers keep clean estimates within.

Images are RGB in [-1, 1]; H and W are multiples of `downscale`, or `moments` raises UserError. All constructor
arguments are keyword-only: the keys of the config section. A new autoencoder is one file in this folder with one
`@register("autoencoder", "name")`.
"""
