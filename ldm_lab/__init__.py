"""ldm_lab: train and sample text-to-image diffusion models on a small budget."""
