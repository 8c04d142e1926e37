"""Guidance: wrappers `predict -> predict` around what the denoiser says, one a file."""
