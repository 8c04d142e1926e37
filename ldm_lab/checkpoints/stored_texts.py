"""What a store of text states is to a run: whose states they are, and whether the text encoder is needed beside it."""

from pathlib import Path

from ldm_lab.config import ConditionerUse, PartConfig
from ldm_lab.data.cache_files import META
from ldm_lab.data.text_store import store_weights, store_width
from ldm_lab.errors import UserError


def store_folder(config: PartConfig) -> Path | None:
    """Return the folder of the store that a section names (`conditioner.store`); None without one."""
    use = config.use
    return Path(use.store).expanduser() if isinstance(use, ConditionerUse) and use.store is not None else None


def is_here(config: PartConfig) -> bool:
    """Return whether the weights that a part brings along are on this machine."""
    try:
        return not config.load().downloads(config.to_dict())
    except UserError:
        return False


def encodes_missing(config: PartConfig) -> bool:
    """Return whether texts that a section's store lacks are encoded, for which the text encoder is needed."""
    folder, use = store_folder(config), config.use_as(ConditionerUse)
    if folder is None or use.missing is not None:
        return use.missing != "skip"
    return is_here(config) or not (folder / META).is_file()


def identity_in_store(config: PartConfig) -> str | None:
    """Return what pins the weights that a section's store was made by; None where they are asked themselves."""
    folder = store_folder(config)
    return None if folder is None or encodes_missing(config) or is_here(config) else store_weights(folder)


def with_known_width(config: PartConfig) -> PartConfig:
    """Return a section that says how wide its store's states are, where the model that made them is not here.

    Raises:
        UserError: the section says another width.
    """
    folder = store_folder(config)
    width = None if folder is None or is_here(config) else store_width(folder)
    if width is None:
        return config
    if (given := config.options.get("width")) not in (None, width):
        raise UserError(f"conditioner.width: {given}, and the states in {folder} are {width} wide; leave it out")
    return PartConfig(config.role, config.name, {**config.options, "width": width}, config.use)
