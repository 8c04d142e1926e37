"""Latents and embeddings computed once and kept, so that training skips the frozen networks."""

import os
from pathlib import Path
from typing import Any, Literal

import torch

from ldm_lab.checkpoints.parts import has_weights, load_part, weights_sha256
from ldm_lab.config import PartConfig, RunConfig, register, signature_options
from ldm_lab.data.cache import ENCODERS, META, CacheWriter, complete, read_meta
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.file_facts import Files, differences, digest, facts_of, read_facts, write_facts
from ldm_lab.data.samples import as_utf8
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.progress import Bar
from ldm_lab.training.logs import print_rank_zero

PATHS = ("path", "shards", "folder")  # options that say where data are


@register("cache")
class CacheOptions:
    """Encode the data once, at the first start, and train on what was encoded."""

    def __init__(self, *, folder: str, check: Literal["time", "size", "none"] = "time") -> None:
        """Set where it lies.

        Args:
            folder: made at first use, and read from then on.
            check: how images are told from those that it was made of: by names, sizes and times of the last change;
                without the times, as copies have others; or not at all.
        """
        self.folder, self.check = Path(folder).expanduser(), check


def training_data(config: RunConfig) -> PartConfig:
    """Return the data section to train with: the config's own, or that of its cache, which is made if need be.

    Raises:
        UserError: the folder holds a cache of other data or other weights, or several processes would write one.
    """
    if "cache" not in config:
        return config.part("data")
    folder = cache_options(config).folder
    if not is_complete(folder, config):
        if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"cache.folder: {folder} is not complete; one process makes it: python -m ldm_lab cache")
        print(f"encoding the data once, into {folder}/")
        print(make_cache(config, folder))
    data = config["data"]
    loading = {key: data[key] for key in ("batch_size", "workers", "timeout") if key in data}
    return PartConfig("data", "cache", {"path": str(folder), **loading})


def cache_options(config: RunConfig) -> CacheOptions:
    """Return the section `cache` of a config; one that says nothing if there is none."""
    options: CacheOptions = config["cache"].build() if "cache" in config else CacheOptions(folder="")
    return options


def is_complete(folder: Path, config: RunConfig) -> bool:
    """Return whether a folder holds the whole cache of this config. Raises UserError if it is that of another one."""
    if not (folder / META).is_file() or not read_meta(folder).complete:
        return False
    data = config["data"].build()
    try:
        data.prepare()
        data.open()
    except UserError as error:
        print_rank_zero(f"cache: {folder} is taken as it is, the images cannot be compared with it: {error}")
        files = read_facts(folder) or {}
    else:
        files = facts_of(data.files())
    check_cache(folder, config, files)
    return True


def check_cache(folder: Path, config: RunConfig, files: Files) -> None:
    """Raise UserError if a folder has a cache of another config or of other files."""
    there, wanted = read_meta(folder).description, description(config, files)
    remedy = "delete it, or take another folder"
    other = [key for key in wanted if key not in ("workers", "files") and there.get(key) != wanted[key]]
    if other:
        raise UserError(f"{folder}: this cache was made with another {', '.join(other)}; {remedy}")
    check, before = cache_options(config).check, read_facts(folder)
    if check == "none" or before is None:
        return
    if found := differences(before, files, times=check == "time"):
        only_times = check == "time" and not differences(before, files, times=False)
        hint = "; cache.check=size if they are mere copies" if only_times else ""
        raise UserError(f"{folder}: this cache was made of other files: {as_utf8(found)}; {remedy}{hint}")


@told_in_one_line(lambda: "encoding the data", "a smaller data.batch_size needs less")
@torch.no_grad()
def make_cache(config: RunConfig, folder: Path, device: str | None = None) -> str:
    """Encode the data of a diffusion config, with a progress bar; return a line that says what was done.

    An interrupted one goes on behind its last whole shard.

    Raises:
        UserError: frozen parts without weights, data that are a cache already or without a usable image, a folder that
            holds something else.
    """
    for role in ENCODERS:
        if role not in config or not has_weights(role, config[role]):
            raise UserError(f"{role}.weights: has to be given; a cache is made with trained parts")
    if "image_size" not in config["data"]:
        raise UserError("data: images are needed to make a cache, and this is one already")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder, conditioner = (load_part(role, config[role]).to(device) for role in ENCODERS)
    data = DataModule(config["data"].build(), seed=config.seed, epochs=1)
    data.prepare_data()
    data.setup()
    files = facts_of(data.source.files())
    if (folder / META).is_file():
        check_cache(folder, config, files)
    writer = CacheWriter(folder, description(config, files))
    write_facts(folder, files)
    if writer.state:
        data.load_rank_states([writer.state], 0)
    with Bar("encode", "image", initial=writer.written) as bar:
        for batch in data.train_dataloader():
            data.consumed(batch)
            batch.image = batch.require_image("make a cache").to(device)  # [B, 3, H, W]
            mean, logvar = autoencoder.moments(batch.image)  # [B, C, h, w] each
            tensors = {"mean": mean, "logvar": logvar, **conditioner.from_batch(batch)}
            # Half precision is finer than the posterior's noise; token ids stay whole.
            half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
            writer.add(half, batch.text, batch.key, data.rank_state())
            bar.update(len(batch))
    if not writer.close():
        raise UserError(f"{folder}: no image to encode. {data.summary()}")
    return f"{folder}: {complete(folder):,} samples. {data.summary()}"


def description(config: RunConfig, files: Files) -> dict[str, Any]:
    """Return what a cache is made with: the images, the parts that encode them, and the checksums of their weights.

    Args:
        config: of the run.
        files: of its data, which tell more than how their folder is written.
    """
    data = config["data"]
    left_out = {"batch_size", "max_skipped", "workers", "timeout", *(PATHS if files else ())}
    options = {f"data.{key}": data.option(key) for key in signature_options(data.load()) if key not in left_out}
    architecture = {  # a file need not say it all: the same CLIP with another activation gives other embeddings
        f"{role}.{key}": value for role in ENCODERS for key, value in config[role].options.items()
    }
    return {
        "image_size": data["image_size"],
        "data.name": data.name,
        **options,
        "files": digest(files),
        "seed": config.seed,
        "workers": data.get("workers"),  # the order, and so the place to go on from, depends on it
        **architecture,
        **{role: weights_sha256(role, config[role]) for role in ENCODERS},
    }
