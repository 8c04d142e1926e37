"""From a folder of images to a run: what lies there, a recipe that fits, and a small autoencoder where no other is."""
