"""What img2dataset managed to download: the sums of the `NNNNN_stats.json` files beside its shards."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_lab.errors import UserError

COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


@dataclass
class Downloads:
    """Attributes:
    shards: shard -> its stats: the counts, `status_dict` (message -> images) and `duration` in seconds.
    unfinished: shards without stats, which img2dataset writes last.
    unreadable: stats files that are damaged.
    """

    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def total(self) -> dict[str, Any]:
        """Return the sums over all shards, the share of successes, and the errors, the commonest first."""
        total: dict[str, Any] = {key: sum(stats[key] for stats in self.shards.values()) for key in COUNTS}
        total["success_rate"] = share(total)
        errors = Counter[str]()
        for stats in self.shards.values():
            errors.update(stats["status_dict"])
        total["status_dict"] = dict(errors.most_common())
        return total

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        shards = {name: {**stats, "success_rate": share(stats)} for name, stats in self.shards.items()}
        return {
            "total": self.total(),
            "shards": shards,
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
        count = total["count"]
        lines = [f"{len(self.shards):,} shards, {count:,} urls, {total['successes']:,} images ({share(total):.2%})"]
        for key in ("failed_to_download", "failed_to_resize"):
            lines.append(f"  {key:20} {total[key]:12,}  {total[key] / max(count, 1):7.2%}")
        if batch_size:
            lines.append(f"  whole batches of {batch_size}: {total['successes'] // batch_size:,}")
        errors = {message: number for message, number in total["status_dict"].items() if message != "success"}
        failed = max(count - total["successes"], 1)
        lines.append(f"errors{'':38} {'images':>12}  of urls  of failures" if errors else "no errors")
        for message, number in list(errors.items())[:20]:
            text = "".join(c if c.isprintable() else "?" for c in message)[:40]
            lines.append(f"  {text:42} {number:12,}  {number / max(count, 1):7.2%}  {number / failed:11.2%}")
        told = sum(errors.values())
        if told < count - total["successes"]:
            lines.append(f"  (rarer ones, which img2dataset does not list: {count - total['successes'] - told:,})")
        if worst and len(self.shards) > 1:
            lines.append("shards with the fewest successes")
            for name, stats in sorted(self.shards.items(), key=lambda pair: share(pair[1]))[:worst]:
                lines.append(f"  {name:20} {stats['successes']:8,} of {stats['count']:8,}  {share(stats):7.2%}")
        for names, what in (
            (self.unfinished, "without stats: not finished"),
            (self.unreadable, "with unreadable stats"),
        ):
            if names:
                lines.append(f"{len(names):,} shards {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
        return "\n".join(lines)


def share(stats: dict[str, Any]) -> float:
    """Return successes / count, 0 without any."""
    return stats["successes"] / stats["count"] if stats["count"] else 0.0


def read_stats(folder: str | Path) -> Downloads:
    """Return the stats of a folder of img2dataset's output. Raises UserError if it holds none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; that of img2dataset's output is needed")
    found = Downloads()
    for path in sorted(folder.glob("*_stats.json")):
        name = path.name.removesuffix("_stats.json")
        try:
            stats = json.loads(path.read_text(encoding="utf-8"))
            kept = {key: int(stats[key]) for key in COUNTS}
            errors = {str(message): int(number) for message, number in stats["status_dict"].items()}
            found.shards[name] = {**kept, "status_dict": errors, "duration": float(stats.get("duration", 0.0))}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found.unreadable.append(name)
    for path in sorted(folder.glob("*.tar")):
        if path.stem not in found.shards and path.stem not in found.unreadable:
            found.unfinished.append(path.stem)
    if not found.shards:
        raise UserError(f"{folder}: no readable *_stats.json, which img2dataset writes beside its shards")
    return found
