"""What stands beside each shard of a cache while it is made, and afterwards: that it is done, and what of."""

from dataclasses import dataclass
from pathlib import Path

from ldm_lab.data.cache_files import Columns, ShardFacts, read_columns
from ldm_lab.data.counts import Counts
from ldm_lab.data.jobs import Finished
from ldm_lab.io.json_files import Json, JsonObject, read_json, write_json

DONE = ".json"  # ending of the file


@dataclass(frozen=True)
class ItemDone:
    """What the file beside a shard says.

    Attributes:
        finished: what of, and what was skipped.
        columns: of the shard.
        shard: None if no sample could be used.
    """

    finished: Finished
    columns: Columns
    shard: ShardFacts | None

    def write(self, path: Path) -> None:
        """Write it. Raises UserError if it cannot be written."""
        fingerprint, content, counts = self.finished
        state = counts.state()
        of_counts = JsonObject(read=counts.read, judged=counts.judged)
        for name in ("skipped", "filtered", "captions"):
            of_counts[name] = {**state.get(name, {})}
        of_counts["examples"] = {reason: [*keys] for reason, keys in counts.examples.items()}
        whole = JsonObject(content=content, counts=of_counts)
        whole["fingerprint"] = {**fingerprint}
        whole["columns"] = {name: column.to_json() for name, column in self.columns.items()}
        whole["shard"] = None if self.shard is None else self.shard.to_json()
        write_json(path, whole)

    @classmethod
    def read(cls, path: Path) -> "ItemDone | None":
        """Return what a file says; None if it is not there or not readable."""
        content = read_json(path)
        fingerprint, of_item = content.get("fingerprint"), content.get("content")
        columns, counts = read_columns(content.get("columns")), _counts(content.get("counts"))
        shard = ShardFacts.of(content.get("shard"))
        if columns is None or counts is None or not isinstance(fingerprint, dict) or not isinstance(of_item, str):
            return None
        if shard is None and content.get("shard") is not None:
            return None
        texts = {name: value for name, value in fingerprint.items() if isinstance(value, str)}
        return cls(Finished(texts, of_item, counts), columns, shard)


def _counts(content: Json) -> Counts | None:
    """Return the counts in a JSON object; None if they are not readable."""
    if not isinstance(content, dict):
        return None
    numbers = {name: _numbers(content.get(name)) for name in ("skipped", "filtered", "captions")}
    examples, read, judged = content.get("examples"), content.get("read"), content.get("judged")
    if not isinstance(examples, dict) or not isinstance(read, int) or not isinstance(judged, int):
        return None
    keys = {reason: [str(key) for key in its] for reason, its in examples.items() if isinstance(its, list)}
    return Counts(read, numbers["skipped"], keys, numbers["filtered"], judged, numbers["captions"])


def _numbers(content: Json) -> dict[str, int]:
    found = content if isinstance(content, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, int)}
