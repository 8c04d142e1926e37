"""What img2dataset managed to download: the sums of the `NNNNN_stats.json` files beside its shards."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Json, read_json

COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


@dataclass(frozen=True)
class ShardStats:
    """What img2dataset says of a shard.

    Attributes:
        count: urls.
        successes, failed_to_download, failed_to_resize: images.
        status_dict: message -> images.
        duration: seconds.
    """

    count: int
    successes: int
    failed_to_download: int
    failed_to_resize: int
    status_dict: dict[str, int]
    duration: float = 0.0

    @classmethod
    def of(cls, content: dict[str, Json]) -> "ShardStats":
        """Return the stats in a stats file. Raises ValueError if they are damaged."""
        statuses, counts = content.get("status_dict"), [content.get(key) for key in COUNTS]
        if not isinstance(statuses, dict):
            raise ValueError("status_dict is missing")
        duration = content.get("duration", 0.0)
        if not all(isinstance(number, int | float) for number in (*counts, duration, *statuses.values())):
            raise ValueError("a number is missing")
        errors = {message: int(number) for message, number in statuses.items()}
        count, successes, failed_to_download, failed_to_resize = map(int, counts)
        return cls(count, successes, failed_to_download, failed_to_resize, errors, float(duration))

    @property
    def success_rate(self) -> float:
        """Successes / count, 0 without any."""
        return self.successes / self.count if self.count else 0.0


@dataclass
class Downloads:
    """The stats of a folder.

    Attributes:
        shards: shard -> its stats.
        unfinished: shards without stats, which img2dataset writes last.
        unreadable: stats files that are damaged.
    """

    shards: dict[str, ShardStats] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def total(self) -> ShardStats:
        """Return the sums over all shards, the errors with the commonest first."""
        errors = Counter[str]()
        for stats in self.shards.values():
            errors.update(stats.status_dict)
        return ShardStats(
            count=sum(stats.count for stats in self.shards.values()),
            successes=sum(stats.successes for stats in self.shards.values()),
            failed_to_download=sum(stats.failed_to_download for stats in self.shards.values()),
            failed_to_resize=sum(stats.failed_to_resize for stats in self.shards.values()),
            status_dict=dict(errors.most_common()),
            duration=sum(stats.duration for stats in self.shards.values()),
        )

    def as_dict(self) -> dict[str, Json]:
        """Return the report as JSON values."""

        def described(stats: ShardStats) -> dict[str, Json]:
            return {**asdict(stats), "success_rate": stats.success_rate}

        total = described(self.total())
        del total["duration"]  # shards are downloaded side by side
        return {
            "total": total,
            "shards": {name: described(stats) for name, stats in self.shards.items()},
            "unfinished": self.unfinished,
            "unreadable": self.unreadable,
        }

    def as_text(self, worst: int, batch_size: int | None = None) -> str:
        """Return the report for people.

        Args:
            worst: how many shards to list, those with the lowest share of successes.
            batch_size: also say how many whole batches of this size there are.
        """
        total = self.total()
        count, successes = total.count, total.successes
        lines = [f"{len(self.shards):,} shards, {count:,} urls, {successes:,} images ({total.success_rate:.2%})"]
        failures = {"failed_to_download": total.failed_to_download, "failed_to_resize": total.failed_to_resize}
        lines += [f"  {what:20} {number:12,}  {number / max(count, 1):7.2%}" for what, number in failures.items()]
        if batch_size:
            lines.append(f"  whole batches of {batch_size}: {successes // batch_size:,}")
        lines += _errors(total)
        if worst and len(self.shards) > 1:
            lines.append("shards with the fewest successes")
            for name, stats in sorted(self.shards.items(), key=lambda pair: pair[1].success_rate)[:worst]:
                lines.append(f"  {name:20} {stats.successes:8,} of {stats.count:8,}  {stats.success_rate:7.2%}")
        for names, what in (
            (self.unfinished, "without stats: not finished"),
            (self.unreadable, "with unreadable stats"),
        ):
            if names:
                lines.append(f"{len(names):,} shards {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
        return "\n".join(lines)


def _errors(total: ShardStats) -> list[str]:
    """Return the lines about the commonest errors."""
    errors = {message: number for message, number in total.status_dict.items() if message != "success"}
    failed = total.count - total.successes
    lines = [f"errors{'':38} {'images':>12}  of urls  of failures" if errors else "no errors"]
    for message, number in list(errors.items())[:20]:
        text = "".join(c if c.isprintable() else "?" for c in message)[:40]
        of_urls, of_failures = number / max(total.count, 1), number / max(failed, 1)
        lines.append(f"  {text:42} {number:12,}  {of_urls:7.2%}  {of_failures:11.2%}")
    listed = sum(errors.values())
    if listed < failed:
        lines.append(f"  (rarer ones, which img2dataset does not list: {failed - listed:,})")
    return lines


def read_stats(folder: str | Path) -> Downloads:
    """Return the stats of a folder of img2dataset's output. Raises UserError if it holds none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; that of img2dataset's output is needed")
    found = Downloads()
    for path in sorted(folder.glob("*_stats.json")):
        name = path.name.removesuffix("_stats.json")
        try:
            found.shards[name] = ShardStats.of(read_json(path))
        except (ValueError, OverflowError):
            found.unreadable.append(name)
    for path in sorted(folder.glob("*.tar")):
        if path.stem not in found.shards and path.stem not in found.unreadable:
            found.unfinished.append(path.stem)
    if not found.shards:
        raise UserError(f"{folder}: no readable *_stats.json, which img2dataset writes beside its shards")
    return found
