"""Importers of other programs' formats, one file each (`ldm_lab.checkpoints.importer.Importer`).

`ccld`               cloob-latent-diffusion: U-Nets, and training checkpoints with all parts inside
`cloob_pickle`       cloob-training: pickles of JAX parameters
`compvis`            latent-diffusion: KL autoencoders, alone, zipped or within a diffusion model
`diffusers_vae`      diffusers: AutoencoderKL, a folder or a file; also written
`glide`              glide-text2im and its fine-tunes
`heads`              LAION's aesthetic predictors
`noised_clip`        the towers of GLIDE's noised CLIP
`open_clip_weights`  open_clip's and OpenAI's CLIPs

A new format is one file here, and for files that can be had by name an entry in `ldm_lab/pretrained/released.yaml`.
"""
