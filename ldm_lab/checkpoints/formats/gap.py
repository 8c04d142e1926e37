"""Files of the means of a conditioner's images and texts, which `conditioner.gap.means` names."""

from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.checkpoints.gap_files import ROLE, read_gap
from ldm_lab.checkpoints.importer import Importer, Section, register_importer
from ldm_lab.checkpoints.opened import OpenedFile


@register_importer
class NativeGap(Importer):
    """What `python -m ldm_lab gap` writes."""

    kind = ROLE
    title = "means of images and texts of ldm_lab's"
    used_by = "conditioner.gap.means=FILE"
    precedence = 4  # before our own parts, of which it is none

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the metadata is of such a file."""
        return file.metadata.get("format") == FORMAT and file.metadata.get("role") == ROLE

    def config(self, file: OpenedFile) -> Section:
        """Return no config: nothing is rebuilt of it."""
        return Section()

    def problems(self, config: Section) -> list[str]:
        """Return nothing: `facts` has read all of it."""
        return []

    def facts(self, file: OpenedFile) -> Section:
        """Return what it holds, in words. Raises UserError for one that is damaged."""
        return Section(holds={"gap": read_gap(file.path, where="inspect").gap.describe()})
