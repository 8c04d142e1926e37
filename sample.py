"""Make pictures with a trained model: see `python sample.py --help`, and `ldm_lab/commands/sample.py`."""

from ldm_lab.__main__ import start

if __name__ == "__main__":
    start("sample")
