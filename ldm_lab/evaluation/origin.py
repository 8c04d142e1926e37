"""What the numbers of an evaluation are of: which weights, images and prompts, so that they can be told again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm_lab.checkpoints.importer import Section
from ldm_lab.evaluation.real_images import RealImages
from ldm_lab.evaluation.settings import Models, checksum_of
from ldm_lab.io.atomic import sha256
from ldm_lab.prompts import Prompt


@dataclass(frozen=True)
class Origin:
    """What the numbers of a table are of.

    Attributes:
        weights_sha256: of each model's file, by the model's name in the table.
        identity_sha256: of each model with all the weights that it is used with (`Models.identity`).
        data: the real images: the section that they were read by, how many were taken and used, a checksum of what
            tells them apart (`Source.contents`); of a file of their features its name and checksum. Empty without any.
        prompts: where they are from, how many, their checksum; empty where no pictures were made.
    """

    weights_sha256: dict[str, str] = field(default_factory=dict)
    identity_sha256: dict[str, str] = field(default_factory=dict)
    data: Section = field(default_factory=Section)
    prompts: Section = field(default_factory=Section)

    def weights(self) -> str:
        """Return the checksums in short, for people."""
        told = [f"{name} {checksum[:12]}" for name, checksum in self.identity_sha256.items()]
        return f"sha256 of the models with all their parts: {', '.join(told)} (whole ones in evaluation.json)"


def origin_of(
    named: Sequence[tuple[str, str]], models: Models, data: Section, prompts: Sequence[Prompt], from_captions: bool
) -> Origin:
    """Return what the numbers are of.

    Args:
        named: (name in the table, checkpoint) of each model that was measured.
        models: the same ones.
        data: as `data_told` returns it.
        prompts: that pictures were made of.
        from_captions: whether these are captions of the real images.
    """
    source = "captions of the real images" if from_captions else "--prompts"
    texts = json.dumps([[prompt.text, prompt.weight] for prompt in prompts])
    told = Section({"from": source, "count": len(prompts), "sha256": _checksum(texts)})
    return Origin(
        weights_sha256={name: checksum_of(checkpoint) for name, checkpoint in named},
        identity_sha256={name: models.identity(checkpoint) for name, checkpoint in named},
        data=data,
        prompts=told if prompts else Section(),
    )


def data_told(real: RealImages | None, features: Path | None, used: int | None) -> Section:
    """Return what the real images are.

    Args:
        real: opened; None where there are none, or a file of features had to do.
        features: the file of their features that was named.
        used: how many of them could be used; None where that is not known.
    """
    told = Section(used=used) if real is not None or features is not None else Section()
    if real is not None:
        facts = real.facts([])
        section = json.loads(json.dumps(real.config.to_dict(), default=str))
        told |= {"section": section, "limit": real.limit, real.source.unit: real.source.count}
        told["sha256"] = _checksum(f"{facts['data']} {facts['options']}")
    if features is not None:
        told |= {"features": str(features), "features_sha256": sha256(features)}
    return told


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
