"""Frozen parts from their config: `{name, weights, ...}` -> a module with its weights in place."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.importer import DetectedFile, LoadedPart, Section, detect_format, find_weights, importers_of
from ldm_lab.checkpoints.initialization import no_initial_weights
from ldm_lab.checkpoints.named import check_named
from ldm_lab.checkpoints.sharded import weights_checksum, weights_files
from ldm_lab.checkpoints.stored_texts import encodes_missing, identity_in_store, store_folder
from ldm_lab.conditions import ConditionSpec
from ldm_lab.config import AutoencoderUse, PartConfig, build, check_section
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError, first_line
from ldm_lab.interfaces import Autoencoder
from ldm_lab.pretrained.resolve import to_download
from ldm_lab.sharded import load_shares

ROOM = 1_000_000  # numbers that a part may have beside those of its file: tables that are made, statistics


def load_part(
    role: str, config: PartConfig | Section, read_weights: bool = True, later: bool = False, draws: bool = True
) -> nn.Module:
    """Build a frozen part and load its weights: evaluation mode, no gradients.

    Args:
        role: of the part, such as "autoencoder".
        config: its section, or plain data of one. With `weights`, the file's own architecture is used, and options
            given here must agree with it. Without, a part may find its weights itself (`Part.pretrained_path`) or bring
            them along (`Part.load_pretrained`). `latent_mean` and `latent_std` (autoencoder) replace the stored ones.
        read_weights: False builds the architecture alone (on the meta device, for counting): that of a file of ours, if
            it is here, else what the section says and defaults; nothing is downloaded.
        later: weights that a part brings along itself may wait until it is used (`Part.load_later`).
        draws: draw random weights first, though a file's replace them, so that what is drawn next is as without them.

    Raises:
        UserError: missing or damaged file; weights of something else, or of another architecture.
    """
    config = as_part_config(role, config)
    path = weights_path(role, config) if read_weights else None
    if path is not None:
        module, _ = load_module(role, Section(config.architecture()), detect_format(path), draws)
    else:
        module = build(role, config.architecture() if read_weights else told_architecture(role, config))
        if read_weights and later:
            module.load_later()
        elif read_weights:
            module.load_pretrained()
    if isinstance(module, Autoencoder):
        use = config.use_as(AutoencoderUse)
        module.set_latent_statistics(use.latent_mean, use.latent_std)
    return module.eval().requires_grad_(False)


def told_architecture(role: str, config: PartConfig) -> Section:
    """Return what a part is as far as can be told without its weights: by its file's config, if it is ours and here."""
    own, weights = Section(config.architecture()), config.use.weights
    try:
        if not weights or to_download(weights, role) is not None:
            return own
        found = detect_format(weights)
        stored = found.importer.config(found.file).get(role) if found.kind == "part" else None
    except UserError:  # whoever needs the weights is told
        return own
    is_usable = isinstance(stored, dict) and stored.get("name") == config.name
    return Section({**stored, **own}) if is_usable and not check_section(role, stored, role) else own


def as_part_config(role: str, config: PartConfig | Section) -> PartConfig:
    """Return a section as typed values, also one of plain data."""
    return config if isinstance(config, PartConfig) else PartConfig.from_dict(role, config)


def load_module(role: str, overrides: Section, found: DetectedFile, draws: bool = True) -> tuple[nn.Module, Section]:
    """Return a part with its weights in place, and its config: that of its file and what is said besides.

    Args:
        role: of the part.
        overrides: its name, and options: those that the file does not tell, others have to agree with it.
        found: the file.
        draws: see `load_part`.

    Raises:
        UserError: damaged or another program's file; weights of another architecture.
    """
    state, config = read_part(found, role, overrides["name"])
    for key, value in overrides.items():
        if key in config and config[key] != value:
            raise UserError(f"{role}.{key}: {value!r} is asked for, but {found.path} holds {config[key]!r}")
    section = Section({**config, **overrides})
    if chosen := {key: config[key] for key in ("model", "pretrained") if key in config and key not in overrides}:
        check_named(role, Section({"name": overrides["name"], **chosen}), f"{found.path}: {role}")
    with no_initial_weights(follow=not draws):
        module = build_for(state, found.path, role, section)
    state = module.convert_state_dict(state)
    if isinstance(module, Autoencoder):
        _shape_statistics(module, state)
    load_strictly(module, state, found.path)
    return module, section


def build_for(
    state: Mapping[str, Tensor], path: str | Path, role: str, section: Section, *shape: int | ConditionSpec
) -> nn.Module:
    """Return a part as its config says, before a file's weights go into it.

    It is built without memory first: shapes, and configs in files, may ask for any size.

    Args:
        state: the weights, which are about as many as the part has to have.
        path: where they are from.
        role, section: of the part.
        shape: what it is constructed with beside its options.

    Raises:
        UserError: sizes that cannot be, or are far from those of the weights.
    """
    with_weights = sum(value.numel() for value in state.values())
    try:
        size = sum(value.numel() for value in build_on_meta(path, role, section, *shape).state_dict().values())
        if size > 2 * with_weights + ROOM:
            raise UserError(
                f"{path}: weights of another architecture: a {role} as its config and shapes say has {size:,} numbers, "
                f"the file {with_weights:,}"
            )
        return build(role, section, *shape)
    except RuntimeError as error:
        raise UserError(f"{path}: a {role} of these sizes cannot be built: {first_line(error)}") from None


def build_on_meta(path: str | Path, role: str, section: Section, *shape: int | ConditionSpec) -> nn.Module:
    """Return a part without memory for its tensors; arguments and errors are those of `build_for`."""
    try:
        with torch.device("meta"):
            return build(role, section, *shape)
    except RuntimeError as error:
        raise UserError(f"{path}: a {role} of these sizes cannot be built: {first_line(error)}") from None
    except UserError as error:
        first, *problems = str(error).splitlines()
        raise UserError(
            f"{path}: {'; '.join(problem.strip() for problem in problems)}" if problems else first
        ) from None


def _shape_statistics(module: Autoencoder, state: Mapping[str, Tensor]) -> None:
    """Give an autoencoder's latent mean and std the shape that a file's have: one number, or one for each channel."""
    for name, own in module.latent_statistics().items():
        if name in state and state[name].shape == (module.channels,):
            setattr(module, name, own.expand(module.channels).clone())  # [C]


def weights_path(role: str, config: PartConfig | Section) -> Path | None:
    """Return the file with the weights of a part; None if its config names none.

    A class may know where the weights are published, and download them (`Part.pretrained_path`).

    Raises:
        UserError: no such file, no such part, or the download failed.
    """
    config = as_part_config(role, config)
    if config.use.weights:
        return find_weights(config.use.weights)
    return config.load().pretrained_path(config.to_dict())


def part_downloads(role: str, config: PartConfig | Section, where: str) -> list[Download]:
    """Return what has to be downloaded for the weights of a part; nothing if they are here.

    Args:
        role, config: of the part.
        where: key path of its section, or whose part it is.

    Raises:
        UserError: its config names a file that is not there.
    """
    config = as_part_config(role, config)
    if not config.use.weights:
        if store_folder(config) is not None and not encodes_missing(config):
            return []
        return [replace(its, where=where) for its in config.load().downloads(config.to_dict())]
    found = to_download(config.use.weights, f"{where}.weights")
    return [found] if found else []


def read_part(found: DetectedFile | str | Path, role: str, name: str) -> LoadedPart:
    """Return weights and config of a part from a file: our own, or another program's that an importer reads.

    Args:
        found: the file, opened or not.
        role, name: of the part that is wanted.

    Raises:
        UserError: missing or damaged file, one that holds something else.
    """
    if not isinstance(found, DetectedFile):
        found = detect_format(found)
    importer = found.importer
    if importer.used_by:
        raise UserError(f"{found.path}: no {role} in it: it holds {found.title}")
    if found.kind != "part" and importer.parts.get(role) != name:
        readable = [other.title for other in importers_of(role, name)]
        if not readable:
            raise UserError(f"{found.path}: not a file of ldm_lab's, and no importer reads the {role} {name!r}")
        other = importer.parts.get(role)
        hint = f" ({role}.name: {other} takes it)" if other else ""
        raise UserError(f"{found.path}: not {' or '.join(readable)}: it holds {found.title}{hint}")
    part = importer.read(found.file, role)
    if part.config.get("name") != name:
        raise UserError(f"{found.path}: holds the {role} {part.config.get('name')!r}, but {role}.name is {name!r}")
    return part


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict, every name and shape as it should be.

    Raises:
        UserError: the first differences in names and shapes, or the first weight that is not finite.
    """
    check_strictly(module.state_dict(), state, path)
    check_finite(dict(module.named_parameters()), state, path)
    load_shares(module, state)


def check_finite(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise UserError if a file's tensor of one of these names is no floating-point one, or holds NaN or infinity."""
    for name in own:
        if name not in state:
            continue
        if not state[name].is_floating_point():
            kind = str(state[name].dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {name} is {kind}: weights that were quantized; those that they were made of are needed"
            )
        if not torch.isfinite(state[name].float()).all():  # there is no such function for 8 bits
            raise UserError(f"{path}: {name} holds numbers that are not finite; take an earlier checkpoint")


def check_strictly(own: dict[str, Tensor], state: dict[str, Tensor], path: str | Path) -> None:
    """Raise UserError with the first differences in names and shapes between a module's own tensors and a file's."""
    problems = []
    problems += [f"{name} is missing" for name in own if name not in state]
    problems += [
        f"{' '.join(str(name)[:100].split())} is not of this architecture" for name in state if name not in own
    ]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: weights of another architecture: {'; '.join(problems[:3])}{more}")


def load_fitting(
    module: nn.Module,
    state: dict[str, Tensor],
    path: str | Path,
    drawn: Callable[[], Mapping[str, Tensor]] | None = None,
) -> list[str]:
    """Load those tensors whose name and shape are the module's, and leave its others as they are.

    Args:
        module: the network.
        state: its weights, or those of a network of the same kind with, say, a wider embedding.
        path: where they are from, for the message.
        drawn: returns the weights of a module that was built without (`no_initial_weights`); for those that the file
            does not have.

    Returns:
        What was not loaded, and why, a line each.

    Raises:
        UserError: less than half of the module's numbers would come from the file: it is of another architecture.
    """
    own = module.state_dict()
    fits = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if sum(value.numel() for value in fits.values()) < 0.5 * sum(value.numel() for value in own.values()):
        load_strictly(module, state, path)  # says what is different
    check_finite(dict(module.named_parameters()), fits, path)
    initial = drawn() if drawn is not None and len(fits) < len(own) else own
    module.load_state_dict({**initial, **fits})
    missing = [f"{name} stays as initialized: the file does not have it" for name in own if name not in state]
    other = [
        f"{name} stays as initialized: {list(state[name].shape)} in the file, {list(own[name].shape)} here"
        for name in own
        if name in state and name not in fits
    ]
    return missing + other + [f"{name} of the file is not of this architecture" for name in state if name not in own]


def has_weights(role: str, config: PartConfig | Section) -> bool:
    """Return whether a part has trained weights: in a file that its config names, or brought along."""
    return weights_path(role, config) is not None or _identity(role, config) is not None


def weights_sha256(role: str, config: PartConfig | Section) -> str | None:
    """Return the checksum of the file with a part's weights (see `weights_path`).

    Of a part that brings its own along it is what pins them (`Part.weights_identity`); None if it is as initialized.
    """
    path = weights_path(role, config)
    return _identity(role, config) if path is None else weights_checksum(path)


def frozen_facts(sections: Mapping[str, PartConfig]) -> dict[str, str]:
    """Return what a checkpoint says of the weights of its frozen parts.

    Under the role their checksum (`weights_sha256`), under `size_key` the size of their file, for those that have some.
    """
    facts: dict[str, str] = {}
    for role, section in sections.items():
        if (checksum := weights_sha256(role, section)) is not None:
            facts[role] = checksum
        path = weights_path(role, section)
        if path is not None and len(weights_files(path)) == 1:
            facts[size_key(role)] = str(path.stat().st_size)
    return facts


def size_key(role: str) -> str:
    """Return the key under which a checkpoint has the size of the file with a part's weights, bytes."""
    return f"{role}_bytes"


def _identity(role: str, config: PartConfig | Section) -> str | None:
    config = as_part_config(role, config)
    identity: str | None = identity_in_store(config)
    return config.load().weights_identity(config.to_dict()) if identity is None else identity
