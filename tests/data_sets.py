"""Small data sets for the tests of ldm_lab.data: every image is of one color that tells its number."""

import io
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.config import build
from ldm_lab.data.cache_files import CacheMeta, Column, Rows, dtype_name
from ldm_lab.data.cache_files import write_shard as write_cache_shard
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.tar import write_shard
from ldm_lab.interfaces import Batch


def encoded(number: int, size: tuple[int, int] = (28, 20), kind: str = "png") -> bytes:
    """Return an image with a gradient along x, so that crops and flips show, and its number in red and green."""
    image = Image.new("RGB", size)
    image.putdata([(number % 256, number // 256, x * 255 // size[0]) for _ in range(size[1]) for x in range(size[0])])
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def samples(numbers: range) -> list[tuple[str, dict[str, bytes]]]:
    """Return shard samples: image, caption, metadata."""
    return [(f"{n:05d}", {"png": encoded(n), "txt": f"caption {n}".encode(), "json": b"{}"}) for n in numbers]


def write_shards(folder: Path, shards: int, per_shard: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        write_shard(folder / f"{shard:05d}.tar", samples(range(shard * per_shard, (shard + 1) * per_shard)))


def write_files(folder: Path, count: int) -> None:
    """Write images below `folder`, in two subfolders, with captions, and `list.txt` beside it."""
    for key, parts in samples(range(count)):
        for extension, data in parts.items():
            path = folder / f"sub{int(key) % 2}" / f"{key}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    names = sorted(str(path.relative_to(folder.parent)) for path in folder.rglob("*.png"))
    (folder.parent / "list.txt").write_text("\n".join(names) + "\n\n")


def write_cache(
    folder: Path, tensors: dict[str, Tensor], per_shard: int, variants: int = 1, texts: list[str] | None = None, **facts
) -> CacheMeta:
    """Write a cache of some columns [R, ...], `per_shard` samples in each shard; keys are numbers.

    A list of tensors in the place of one is a ragged column.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(tensors.values())))
    texts = texts or [f"caption {n}" for n in range(rows)]
    columns, shards = {}, []
    for name, values in tensors.items():
        ragged = isinstance(values, list)
        longest = max(map(len, values)) if ragged else 0
        shape = (longest, *values[0].shape[1:]) if ragged else tuple(values.shape[1:])
        columns[name] = Column(dtype_name(values[0].dtype), shape, ragged)
    for number, first in enumerate(range(0, rows, per_shard * variants)):
        part = slice(first, min(first + per_shard * variants, rows))
        packed = {n: torch.cat(v[part]) if columns[n].ragged else v[part] for n, v in tensors.items()}
        lengths = {n: torch.tensor([len(row) for row in v[part]]) for n, v in tensors.items() if columns[n].ragged}
        keys = [f"{n // variants:05d}" for n in range(part.start, part.stop, variants)]
        content = Rows(packed, lengths, keys, texts[part])
        shards.append(write_cache_shard(folder / f"{number:05d}.safetensors", content, columns))
    meta = CacheMeta({name: json.dumps(its) for name, its in facts.items()}, True, variants, columns, tuple(shards))
    meta.write(folder)
    return meta


def module(section: dict, rank: int = 0, world_size: int = 1, seed: int = 0, epochs: int | None = None) -> DataModule:
    """Return a data module that is ready to read; options that a section leaves out are small."""
    if section["name"] != "cache":
        section = {"image_size": 8, **section}
    section = {"batch_size": 4, "workers": 0, **section}
    data = DataModule(build("data", section), seed=seed, rank=rank, world_size=world_size, epochs=epochs)
    data.prepare_data()
    data.setup()
    return data


def take(data: DataModule, batches: int | None = None) -> list[Batch]:
    """Return the next batches, all of them consumed."""
    taken = []
    if batches == 0:
        return taken
    for batch in data.train_dataloader():
        data.consumed(batch)
        taken.append(batch)
        if len(taken) == batches:
            break
    return taken


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.key]
