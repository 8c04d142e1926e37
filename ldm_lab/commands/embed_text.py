"""Store the states of captions once: a text encoder's, apart from the images, so that training need not load it.

    python -m ldm_lab embed-text --config configs/imagen_64.yaml --out data/cc12m_t5xl --devices 8 \\
        data.shards='/data/cc12m/{00000..01242}.tar'

Then train with `conditioner.store=data/cc12m_t5xl`: the images stream from where they are, the states come from there,
and the language model is not loaded. Stored are all captions that an epoch may draw, those of the held-out images, the
prompts that the config draws (`demo`), and no text at all. Each text is stored once, at its own number of tokens:
100,000 captions of 20 tokens of T5-XL take 8 GB. What is there already is not encoded again: interrupted, the same
command goes on, and other data add to the same store. Images are not decoded.
"""

import argparse

from ldm_lab.commands._arguments import add_config_arguments, add_pass_arguments, pass_options
from ldm_lab.config import load
from ldm_lab.errors import UserError

BATCH = 1024  # captions, so that there are enough of each number of tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser, "a diffusion config: its data, its conditioner, its prompts")
    parser.add_argument("--out", metavar="DIR", help="folder of the store (default: conditioner.store)")
    add_pass_arguments(parser, whose=None, of_config=True, batch=BATCH, what="captions")


def run(args: argparse.Namespace) -> int:
    """Encode, with a progress bar; say what was skipped. Returns 1 if some shards could not be reached."""
    from ldm_lab.config import ConditionerUse
    from ldm_lab.training.embed_texts import embed_texts, summary  # not before: it imports torch, which takes seconds
    from ldm_lab.training.start import check_encoding

    config = load(args.config, args.overrides)
    if "conditioner" not in config or "data" not in config:
        raise UserError(f"{args.config}: the sections data and conditioner are needed: captions, and what encodes them")
    section = config["conditioner"]
    folder = args.out or section.use_as(ConditionerUse).store
    if folder is None:
        raise UserError("--out: the folder of the store has to be given, here or as conditioner.store")
    config = config.with_part("conditioner", section.with_use(store=folder, missing="encode"))
    check_encoding(config, ["conditioner"])
    store, report = embed_texts(config, pass_options(args, config["data"]))
    if report is None:  # another process of several
        return 0
    print(summary(store, report))
    if report.unreached:
        print(f"{len(report.unreached)} of {report.items} shards could not be read, such as {report.unreached[0]}; "
              "the same command tries again")  # fmt: skip
    return 1 if report.unreached else 0
