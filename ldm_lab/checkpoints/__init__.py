"""Weights in and out: safe reading, our own safetensors format, importers of released checkpoints.

`files`      atomic writing, checksums, reading tensor files without executing anything
`parts`      a frozen part (autoencoder, conditioner) from its config section, whoever wrote its weights
`models`     a trained diffusion model: `ema.safetensors` (weights and config) and `last.ckpt` (everything to go on)
`formats`    what a file is, by its container and its tensors' names
`compvis`, `diffusers_vae`, `cloob_pickle`, `ccld`, `open_clip_weights`  importers, each
           `read(path) -> (state_dict, config, extra)`, keyed by the originals' names

Every file that is read is treated as hostile: safetensors, `weights_only=True`, a restricted unpickler.
"""
