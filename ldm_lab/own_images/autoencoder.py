"""The small autoencoder, trained on the images themselves where no released one can be had."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_lab.checkpoints.parts import load_part
from ldm_lab.config import PartConfig, load
from ldm_lab.data.beside import read_regular
from ldm_lab.data.samples import RawSample
from ldm_lab.data.shard_urls import expand
from ldm_lab.data.tar import read_shard
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Autoencoder
from ldm_lab.io.atomic import atomic_write
from ldm_lab.io.color import BadImage
from ldm_lab.io.decoding import decode_image
from ldm_lab.io.images import center_crop_to
from ldm_lab.own_images.choosing import HELD, SMALL_CHANNELS, SMALL_SIDE, Names, max_skipped, read_recipe, workers
from ldm_lab.own_images.commented import Setting, in_comment, laid_over, text, without_head
from ldm_lab.own_images.looking import FolderFacts
from ldm_lab.training.autoencoder import psnr

STEPS = 8_000  # on two cores of a CPU with nothing else to do a quarter of an hour, computed from the speed of one
BATCH = 2
DEMOS = 8  # images from which the grids of a run are drawn
BEGINNING = "assets/quickstart/autoencoder.safetensors"  # to begin with its weights takes half as many steps


def held_out_names(facts: FolderFacts) -> list[str]:
    """Return the images that the autoencoder is not trained on, evenly spread; none where there is one alone.

    Of images of the same content it is the first one; the others are not trained on, either.
    """
    names = [name for name in facts.names if name not in facts.copies]
    count = min(HELD, len(names) // 5 or len(names) - 1)
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


def shards_apart(facts: FolderFacts) -> tuple[list[str], list[str]]:
    """Return the shards to train on and those to measure on: the last one, or the only one."""
    shards = expand(list(facts.shards))
    return (shards[:-1] or shards), shards[-1:]


def measures_unseen(facts: FolderFacts) -> bool:
    """Return whether some images are kept to measure on; one image alone, or one shard, is trained and measured on."""
    return len(expand(list(facts.shards))) > 1 if facts.shards else bool(held_out_names(facts))


def autoencoder_text(facts: FolderFacts, names: Names, steps: int) -> str:
    """Return the text of the autoencoder's YAML."""
    if facts.shards:
        trained = shards_apart(facts)[0]
        kept = "the last one is kept to measure on" if measures_unseen(facts) else "the only one"
        data = [
            Setting("data.name", "webdataset", "tar files as img2dataset writes them"),
            Setting("data.shards", f"[{', '.join(map(text, trained))}]", kept),
        ]
    else:
        kept = "all but some that are kept to measure on" if measures_unseen(facts) else "the only one"
        data = [
            Setting("data.name", "image_list", "a text file with a path a line"),
            Setting("data.path", text(str(names.autoencoder_list)), kept),
        ]
    share = max_skipped(facts)
    settings = [
        Setting("run", text(names.autoencoder_run), f"its result is {names.autoencoder_file}"),
        Setting("init_from", BEGINNING, "the quickstart's; what has another shape begins anew"),
        Setting("data.folder", None), Setting("data.count", None), *data,
        Setting("data.image_size", str(SMALL_SIDE), "pixels"),
        Setting("data.crop", "random", "which square of the resized image"),
        Setting("data.flip", "true", "mirror half of them"),
        Setting("data.batch_size", str(BATCH)),
        Setting("data.workers", str(workers()), "loader processes"),
        *([Setting("data.max_skipped", f"{share:g}", "share of files that cannot be used")] if share else []),
        Setting("autoencoder.z_channels", str(SMALL_CHANNELS), "between encoder and decoder"),
        Setting("autoencoder.embed_dim", str(SMALL_CHANNELS), "channels of a latent, more than for shapes"),
        Setting("optim.lr", "1.0e-3"),
        Setting("loss.kl_weight", "1.0e-4", "on the KL divergence, summed over a latent"),
        Setting("trainer.max_steps", f"{steps:_}", "optimizer steps"),
        Setting("optim.warmup_steps", str(max(min(50, steps // 10), 1)), "optimizer steps"),
    ]  # fmt: skip
    head = [
        f"# A small autoencoder of {facts.images:,} images of {in_comment(facts.path)}: "
        f"3x{SMALL_SIDE}x{SMALL_SIDE} <-> {SMALL_CHANNELS}x{SMALL_SIDE // 8}x{SMALL_SIDE // 8};",
        "# after configs/quickstart_autoencoder.yaml.",
        f"#   python -m ldm_lab train --config {in_comment(names.autoencoder_config)}",
    ]
    return "\n".join([*head, laid_over(without_head(read_recipe("quickstart_autoencoder")), settings)])


def write_lists(facts: FolderFacts, names: Names) -> None:
    """Write the list of images that the autoencoder is trained on, and that of the demo's, of which it sees none.

    Raises:
        UserError: a list can hold none of the names.
    """
    held = set(held_out_names(facts))
    kept = [str(facts.path / name) for name in facts.names if facts.copies.get(name, name) not in held]
    lines = _lines(kept)
    if not lines:
        raise UserError(f"{facts.path}: its name has a line end or a tab, or the images' have; a list cannot hold them")
    if left_out := len(kept) - len(lines):
        print(f"{left_out:,} images have a line end, a tab or a blank at an end in their names: not trained on")
    with atomic_write(names.autoencoder_list) as file:
        file.write(b"\n".join(lines) + b"\n")
    unseen = _lines([str(facts.path / name) for name in held_out_names(facts)])
    with atomic_write(names.demo_list) as file:
        file.write(b"\n".join((unseen or lines)[:DEMOS]) + b"\n")


def _lines(names: Sequence[str]) -> list[bytes]:
    """Return the names that a list can hold: those without a line end, a tab or a blank at an end."""
    return [os.fsencode(name) for name in names if not any(mark in name for mark in "\n\r\t") and name == name.strip()]


def train(config: Path) -> int:
    """Train as the autoencoder's YAML says, on from where an interrupted run stopped. Returns the exit code."""
    from ldm_lab.training.runner import run

    return run(load(config, ["resume.checkpoint=last"]))


@torch.no_grad()
def measured_psnr(weights: Path, facts: FolderFacts, side: int = SMALL_SIDE) -> tuple[float, int]:
    """Return the mean peak signal-to-noise ratio of reconstructions, dB, and of how many images it is.

    Args:
        weights: of the autoencoder.
        facts: of the images, of which those are taken that it is not trained on, if there are any (`measures_unseen`).
        side: of the squares in their middle, pixels.
    """
    section = PartConfig.from_dict("autoencoder", {"name": "kl_f8", "weights": str(weights)})
    autoencoder = load_part("autoencoder", section)
    assert isinstance(autoencoder, Autoencoder)
    found: list[Tensor] = []
    for data in islice(_held_out(facts), HELD):
        try:
            image = center_crop_to(decode_image(data), side, side)
        except BadImage:
            continue
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1  # [1, 3, S, S]
        latent = autoencoder.normalize(autoencoder.moments(levels)[0])  # [1, C, h, w]
        found.append(psnr(levels, autoencoder.decode(latent)))  # [1]
    return float(torch.cat(found).mean()) if found else float("nan"), len(found)


def _held_out(facts: FolderFacts) -> Iterator[bytes]:
    """Yield the encoded images that the autoencoder is measured on."""
    if facts.shards:
        for address in shards_apart(facts)[1]:
            yield from (item.image for item in read_shard(address) if isinstance(item, RawSample) and item.image)
        return
    names: Sequence[str] = held_out_names(facts) or facts.names
    for name in names:
        yield read_regular(facts.path / name)
