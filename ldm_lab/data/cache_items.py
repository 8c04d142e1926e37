"""What stands beside each shard of a cache while it is made, and afterwards: that it is done, and what of."""

from dataclasses import asdict, dataclass
from pathlib import Path

from ldm_lab.data.cache_files import Columns, ShardFacts, read_columns
from ldm_lab.data.counts import Counts
from ldm_lab.data.jobs import Finished
from ldm_lab.io.json_files import Fields, read_json, write_json

DONE = ".json"  # ending of the file


@dataclass(frozen=True)
class ItemDone:
    """What the file beside a shard says.

    Attributes:
        finished: what of, and what was skipped.
        columns: of the shard.
        shard: None if no sample could be used.
        drawn: whether a crop, a mirror image or a caption of it was drawn at random.
    """

    finished: Finished
    columns: Columns
    shard: ShardFacts | None
    drawn: bool = True

    def write(self, path: Path) -> None:
        """Write it. Raises UserError if it cannot be written."""
        write_json(
            path,
            {
                "content": self.finished.content,
                "fingerprint": {**self.finished.fingerprint},
                "counts": asdict(self.finished.counts),
                "columns": {name: asdict(column) for name, column in self.columns.items()},
                "shard": None if self.shard is None else asdict(self.shard),
                "drawn": self.drawn,
            },
        )

    @classmethod
    def read(cls, path: Path) -> "ItemDone | None":
        """Return what a file says; None if it is not there or not readable."""
        fields = Fields(read_json(path))
        content, fingerprint, counts = fields.text("content"), fields.inside("fingerprint"), fields.inside("counts")
        columns, shard = read_columns(fields.named("columns")), fields.inside("shard")
        facts = None if shard is None else ShardFacts.of(shard)
        if (
            columns is None
            or content is None
            or fingerprint is None
            or counts is None
            or fields.has("shard") != bool(facts)
        ):
            return None
        texts = {name: text for name in ("description", "precision") if (text := fingerprint.text(name)) is not None}
        read = Counts(
            counts.count("read") or 0,
            counts.numbers("skipped"),
            counts.texts("examples"),
            counts.numbers("filtered"),
            counts.count("judged") or 0,
            counts.numbers("captions"),
        )
        return cls(Finished(texts, content, read), columns, facts, fields.flag("drawn") is not False)
