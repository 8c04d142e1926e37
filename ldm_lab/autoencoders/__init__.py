"""Autoencoders: images <-> the latents in which diffusion happens (`ldm_lab.interfaces.Autoencoder`).

Frozen during diffusion; trained by the task "autoencoder". All constructor arguments are keyword-only: the keys of the
config section. A new autoencoder is one file in this folder with one `@register("autoencoder", "name")`.

`identity`   pixels as latents
`kl_f8`      the KL autoencoder of latent diffusion
`tiled`      convolutions of feature maps in main memory, tile by tile
"""
