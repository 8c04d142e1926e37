"""Released weights: which there are, and how a name, a path or an hf:// address becomes a file on this machine."""
