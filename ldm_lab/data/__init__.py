"""Data: where samples come from, in which order, and how they become batches.

A *source* is a part of role "data": shards, an image list, a folder, a cache, ... One YAML section describes it. It is
a subclass of `source.ImageSource` (samples are images, with or without a caption) or of `source.Source`, and gives

    prepare()                                  make what has to be on disk first (draw, download); one process per node
    open()                                     list the units; UserError where there are none
    found() -> lines                           what `open` found, in words, for the start of a run
    files() -> (name, path) ...                what it found on the disk: by them a cache is known to be stale
    contents() -> text                         what stands for all of it: by it a resume notices that data were replaced
    count, unit                                how many units are dealt out to the readers, and their name ("shards")
    shuffle_buffer                             where a unit has several items, how many are held to draw from; else None
    items(unit) -> item ...                    what is in a unit, undecoded, always the same
    decode(item, order) -> Sample              raises `samples.SkippedSample` for a sample that cannot be used
    collate(samples) -> Batch                  in the loader process
    to_device_format(batch) -> batch           in the training process, on the device

and everything else is common: `order.py` and `shares.py` decide who reads what and when, `loader.py` reads, counts and
remembers the position, `rank_state.py` is how a checkpoint has it, `datamodule.py` hands it to Lightning.
`loader_processes.py` and `waiting.py` tell what the loader processes are reading and how they ended, and end a wait for
a batch that does not come. Shards: `shard_urls.py` finds them, `streams.py` opens them, `tar.py` reads and writes them,
`shard_source.py` is what sources of shards share, `webdataset.py` is the part. Files: `folders.py` walks,
`image_lists.py` reads lists, `beside.py` knows what lies beside an image. Captions: `captions.py` says where they are
and which one of several is drawn, `text.py` reads their bytes, `caption_tables.py` tables of them.

A *pass* (`passes.py`) is the other way through data: every sample of some shards or images once, in no order that
matters, on any number of devices and nodes, restartable; its results are files.

A batch is a `ldm_lab.batch.Batch`: `image` float32 [B, 3, H, W] in [-1, 1], `text` and `key`; of a cache `mean`,
`logvar` [B, C, h, w] and `conditions` in the place of `image`. With them rides `state`, the reader's position after
this batch, for `DataModule.consumed(batch)`.

The order is a function of (seed, epoch, position) alone: no global random state is read, crops and flips included. The
readers are all loader processes of all ranks (world size x workers); each one has its own share of every epoch and goes
from epoch to epoch without end, so that no rank ever waits for another one at an epoch's end. Another number of readers
shares what is left of an epoch anew (`shares.py`).

Only images, captions and `.json` members of a shard are looked at; nothing is unpickled. A `pipe:` shard address is a
shell command, which is why a data section is only ever built from the user's own config, never from a checkpoint.

A new source is one file with one `@register("data", "name")`. A `**common` in its constructor stands for the options of
its base class (see `source.Source`).
"""

import ldm_lab.lean_imports  # noqa: F401  # before Lightning
