"""Make pictures with a trained model: see `python sample.py --help`, and `ldm_lab/commands/sample.py`."""

from ldm_lab.commands.sample import main
from ldm_lab.errors import run_program

if __name__ == "__main__":
    run_program(main)
