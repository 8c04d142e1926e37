"""The released weights that a recipe over images of one's own takes: here, to be downloaded, or out of reach."""

from dataclasses import dataclass, replace

from ldm_lab.checkpoints.parts import part_downloads
from ldm_lab.config import load
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError
from ldm_lab.io.http import HTTPError, open_url
from ldm_lab.own_images.choosing import CONFIGS, read_recipe
from ldm_lab.pretrained.resolve import offline

RECIPE = "own_images_8gb"  # the other sizes take the same weights
SERVER = "https://huggingface.co/robots.txt"  # a few bytes of the server that has them
SIZES = {"autoencoder": 335_000_000, "conditioner": 599_000_000}  # bytes, about, where nobody is asked


@dataclass(frozen=True)
class ReleasedWeights:
    """Released weights.

    Attributes:
        missing: files that are not on this machine.
        why_not: why they cannot be downloaded, in words; "" if they can, or need not.
    """

    missing: tuple[Download, ...] = ()
    why_not: str = ""

    @property
    def are_to_be_had(self) -> bool:
        """Whether they are here or can be downloaded."""
        return not self.why_not

    def in_words(self) -> str:
        """Return each missing file with its size."""
        return ", ".join(f"{its.name} (about {(its.size or 0) / 1e6:,.0f} MB)" for its in self.missing)


def released_weights(forbidden: bool) -> ReleasedWeights:
    """Return what has to be downloaded, and whether it can be.

    Args:
        forbidden: nothing is to be downloaded, whatever can be.
    """
    read_recipe(RECIPE)
    config = load(CONFIGS / f"{RECIPE}.yaml", ["data.path=somewhere"])
    missing: list[Download] = []
    for role in ("autoencoder", "conditioner"):
        missing += [replace(its, size=its.size or SIZES[role]) for its in part_downloads(role, config[role], role)]
    found = ReleasedWeights(tuple(missing))
    if not missing:
        return found
    if forbidden:
        return replace(found, why_not="--offline")
    if offline():
        return replace(found, why_not="downloads are switched off (LDM_LAB_OFFLINE, HF_HUB_OFFLINE)")
    try:
        with open_url(SERVER, tries=1) as file:
            file.read(1)
    except (HTTPError, UserError) as error:
        return replace(found, why_not=f"{SERVER.rpartition('/')[0]} cannot be reached: {error}")
    return found
