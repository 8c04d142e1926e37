"""WebDataset shards, filtered by rules on what is known of each sample."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from ldm_lab.config import PartMapping, Plain, part_class, register
from ldm_lab.data.contents import contents_of, file_entries
from ldm_lab.data.sample_metadata import metadata_of, read_scores, scores_path
from ldm_lab.data.samples import UNREADABLE_SCORES, FilteredOut, Judged, RawSample, SkippedSample
from ldm_lab.data.shard_source import ShardSource
from ldm_lab.data.shard_urls import expand
from ldm_lab.data.source import Unusable
from ldm_lab.data.tar_files import KeyUntil
from ldm_lab.errors import UserError, install
from ldm_lab.rules.names import ASK, Names, check_names
from ldm_lab.rules.rule import build_rules
from ldm_lab.rules.sample import SampleRow, violated_rules


@register("data", "webdataset")
class WebDataset(ShardSource):
    """WebDataset shards: jpg/png/webp + txt + json in tar files.

    Args:
        shards: addresses: paths, `{00000..00012}` braces, globs, http(s), cloud addresses that webdataset knows, or
            `pipe:` and a shell command that writes a tar file to its standard output.
        rules: {name: options}, as in `python -m ldm_lab select`: which samples are left out, by their json. They are
            counted by rule, apart from the skipped ones.
        names: {aesthetic: aesthetic_score_laion_v2, ...}: which name of the json, or column of the scores, holds which
            quantity, where there are several for one, or one of another name than the public tables.
        scores: the ending of a Parquet file beside each shard, in the place of `.tar`, with columns such as `key` and
            `aesthetic`: what it says of a sample goes before what its json says.
        key_until: which dot of a file's name ends the key that a sample's files share: 1.5.jpg is the file 5.jpg of
            sample 1, or by the last dot the image of sample 1.5.
    """

    def __init__(
        self,
        *,
        shards: str | list[str],
        rules: Annotated[dict[str, Any] | None, PartMapping("rule")] = None,
        names: dict[str, str | None] | None = None,
        scores: str | None = None,
        key_until: KeyUntil = "first_dot",
        **common: Any,
    ):
        super().__init__(**common)
        self.key_until = key_until
        self.shards = [shards] if isinstance(shards, str) else shards
        self.rules, self.scores = build_rules(rules or {}), scores
        self.said = json.dumps([rules, names, scores], sort_keys=True, default=str)
        self.scored = ""  # stands for the files of scores
        self.names = Names.of(names, f"data.{ASK}")

    @staticmethod
    def check(
        *,
        rules: Mapping[str, Mapping[str, Plain] | None] | None,
        names: Mapping[str, str | None] | None,
        scores: str | None,
    ) -> list[str]:
        """Return what is wrong across the options."""
        used = [name for name, its in (rules or {}).items() if its is not None]
        across = [name for name in used if part_class("rule", name).compares_rows]
        problems = [f"rules.{name}: compares samples with each other, which a stream cannot" for name in across]
        if scores is not None and not rules:
            problems.append("scores: only rules ask for them, and there are none")
        if (names or {}).get("caption") is not None:
            problems.append(
                "names.caption: rules judge the caption that is trained on; captions.json_key takes it from the json"
            )
        problems += check_names(names)
        return problems

    @property
    def items_key(self) -> str:
        return hashlib.sha256(f"{super().items_key} {self.said} {self.scored}".encode()).hexdigest()[:16]

    def list_shards(self) -> list[str]:
        addresses = expand(self.shards)
        if self.scores is not None:
            if find_spec("pyarrow") is None:
                raise UserError(f"data.scores: pyarrow has to be installed for it: {install('curation')}")
            missing = [path for path in (scores_path(a, self.scores) for a in addresses) if not os.path.isfile(path)]
            if missing:
                raise UserError(
                    f"data.scores: no such file: {missing[0]}; {len(missing)} of {len(addresses)} are missing"
                )
            paths = [Path(scores_path(address, self.scores)) for address in addresses]
            self.beside_shards += [(f"data.scores/{number}/{path.name}", path) for number, path in enumerate(paths)]
            self.scored = contents_of("scores", file_entries([(path.name, str(path)) for path in paths]))
        return addresses

    def samples(self, address: str) -> Iterator[RawSample | Unusable]:
        """Yield the samples of a shard, with FilteredOut in the place of those that violate a rule."""
        if not self.rules:
            yield from self.read_shard(address)
            return
        try:
            scores = read_scores(scores_path(address, self.scores)) if self.scores is not None else {}
        except OSError:
            yield SkippedSample(UNREADABLE_SCORES, address)
            return
        judged = 0  # since the last one that was left out
        for item in self.read_shard(address):
            if isinstance(item, RawSample):
                judged += 1
                row = SampleRow(metadata_of(item, self.captions), before=scores.get(item.key), names=self.names)
                if violated := violated_rules(self.rules, row):
                    rule, reason = violated[0]
                    item = FilteredOut(f"rule {rule}" if reason == rule else f"rule {rule}: {reason}", item.key, judged)
                    judged = 0
            yield item
        if judged:
            yield Judged(judged)
