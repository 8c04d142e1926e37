"""Names in configs that strangers have made: what they may have downloaded, and read."""

import re

from ldm_lab.checkpoints.importer import Section
from ldm_lab.conditioners.t5_models import MINILM, WIDTHS
from ldm_lab.config import PartConfig
from ldm_lab.errors import UserError
from ldm_lab.pretrained.resolve import check_untrusted

OPEN_CLIP_HUB = "hf-hub:"
NETWORK_PLACES = ("//", "\\\\")  # a path that begins so is on another machine


def check_named(role: str, config: Section, where: str) -> None:
    """Refuse a part that would have something downloaded which the maker of a file chose.

    Let in are files and folders, names of what is known to be published (the catalogue's, language models that
    `t5_models` lists, open_clip's own tags), and of the Hub what is in this machine's cache.

    Args:
        role: of the part.
        config: its section, out of a checkpoint or out of the part's own file.
        where: what names it, for the message.

    Raises:
        UserError: anything else.
    """
    check_untrusted(config.get("weights"), f"{where}.weights")
    for key in ("weights", "model", "pretrained"):
        text = config.get(key)
        if text is None:
            continue
        if not isinstance(text, str) or "://" in text.removeprefix("hf://") or text.startswith(NETWORK_PLACES):
            raise UserError(f"{where}.{key}: refused: {str(text)[:100]!r} is neither a file here nor a published name")
    model = config.get("model")
    if not isinstance(model, str) or model in (MINILM, *WIDTHS):
        return
    repository = model.removeprefix(OPEN_CLIP_HUB)
    if not re.fullmatch(r"[^/\\~.][^/\\]*/[^/\\]+", repository):
        return  # no repository's: a name of open_clip's, or a path
    without = Section({key: its for key, its in config.items() if key != "weights"})
    part = PartConfig.from_dict(role, without)
    if part.load().downloads(part.to_dict()):
        raise UserError(
            f"{where}.model: refused: the file must not have {model[:100]!r} downloaded; "
            f"`hf download {repository[:100]}` does if you trust it"
        )
