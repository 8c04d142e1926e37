"""Train a model as a YAML describes it: see `python train.py --help`, and `ldm_lab/commands/train.py`."""

from ldm_lab.__main__ import start

if __name__ == "__main__":
    start("train")
