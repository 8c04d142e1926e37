"""The written config: its name, the comment on top of it, the memory that it takes."""

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from ldm_lab.config import RunConfig, load
from ldm_lab.data.samples import as_utf8
from ldm_lab.errors import UserError
from ldm_lab.estimate import StepCost, in_short
from ldm_lab.io.atomic import atomic_write
from ldm_lab.own_images.choosing import Machine, Names, Recipe
from ldm_lab.own_images.commented import Setting, in_comment, laid_over
from ldm_lab.own_images.looking import FolderFacts
from ldm_lab.training.cost import config_cost

OWN = 10**9  # bytes that CUDA and the demo pictures want beside what is counted
OWN_ON_CPU = 4 * 10**8  # bytes of Python and its libraries
LEAST_BATCH = 4


@dataclass(frozen=True)
class Fitted:
    """A recipe whose batch goes into the memory at hand.

    Attributes:
        recipe: with this batch.
        cost: of its step.
        said: what was changed for it, in words; "" for nothing.
    """

    recipe: Recipe
    cost: StepCost
    said: str = ""


def names_of(folder: Path, out: Path | None) -> Names:
    """Return the names of the run and its config. Raises UserError for a name that is none."""
    if out is None:
        stem = re.sub(r"[^\w-]+", "_", folder.expanduser().resolve().name).strip("_") or "my_images"
        out = Path(f"{stem}.yaml")
    if out.suffix not in (".yaml", ".yml") or not re.fullmatch(r"[\w-]+", out.stem):
        raise UserError(f"--out: {out}: a name of letters, digits, _ and - that ends in .yaml is needed")
    return Names(out.stem, out.expanduser())


def refuse_other_encodings(folder: Path) -> None:
    """Raise UserError for a folder whose name a YAML cannot hold."""
    try:
        os.path.abspath(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{as_utf8(str(folder))}: it, or a folder above, has a name that is not UTF-8; rename it"
        ) from None


def refuse_overwriting(path: Path) -> None:
    """Raise UserError if a file is there."""
    if path.exists():
        raise UserError(f"{path}: is there already; --overwrite replaces it, --out NAME.yaml writes another one")


def fitted(recipe: Recipe, machine: Machine) -> Fitted:
    """Return the recipe with the largest batch, up to its own, that goes into the memory; a CPU's is what is free now.

    Raises:
        UserError: not even a small one does, on a GPU; of a CPU that is said alone.
    """
    cost = counted(recipe)
    if machine.memory is None:
        return Fitted(recipe, cost)
    own = OWN if machine.is_gpu else OWN_ON_CPU
    room = machine.memory - own
    fits = cost.batch_that_fits(room)
    if cost.peak <= room or fits >= recipe.batch_size:
        return Fitted(recipe, cost)
    size = 2 ** (fits.bit_length() - 1) if fits else 0
    if size < LEAST_BATCH:
        needed = (cost.lasting + LEAST_BATCH * cost.activations / cost.batch_size + own) / 2**30
        if not machine.is_gpu:  # what is free now may be more later
            told = f"does not fit the memory that is free now: about {needed:.3g} GiB with batches of {LEAST_BATCH}"
            return Fitted(recipe, cost, f"{told}, and these are of {recipe.batch_size}; close other programs")
        raise UserError(
            f"--memory: {machine.in_words()}: the smallest recipe, {recipe.origin}, takes {needed:.3g} GiB with "
            f"batches of {LEAST_BATCH}; --memory cpu writes a recipe of the quickstart's size"
        )
    together = recipe.batch_size // size
    settings = [
        Setting("data.batch_size", str(size), "what this memory holds"),
        Setting(
            "trainer.accumulate_grad_batches", str(together), f"{size} x {together} images for each optimizer step"
        ),
    ]
    smaller = replace(recipe, body=recipe.with_settings(settings))
    return Fitted(smaller, counted(smaller), f"batches of {size}, {together} for each optimizer step")


def counted(recipe: Recipe) -> StepCost:
    """Return what a step of a recipe costs; no weights are read."""
    return config_cost(loaded(laid_over(recipe.body, recipe.counted_with)))


def loaded(body: str) -> RunConfig:
    """Return the config that a text holds."""
    with tempfile.TemporaryDirectory(prefix="ldm_lab-start-") as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(body, encoding="utf-8")
        return load(path)


def config_text(fit: Fitted, facts: FolderFacts, names: Names, machine: Machine) -> str:
    """Return the whole text of a config."""
    recipe, cost = fit.recipe, fit.cost
    memory = f"{cost.peak / 1e9:.3g} GB counted, of which {cost.activations / 1e9:.3g} GB are"
    network = [Setting("denoiser.name", _denoiser(recipe.body), f"{cost.parameters:,} parameters")]
    head = [
        f"# {facts.images:,} images of {in_comment(facts.path)}, at {recipe.side} px;",
        f"# after configs/{recipe.origin}.yaml, for {machine.in_words()}. Memory: {memory}",
        f"# intermediate results of {cost.batch_size} images.",
        f"#   python -m ldm_lab train --config {in_comment(names.config)}",
        "# With --check behind it the same command tries all out and writes nothing; any key can be given on the",
        "# command line, such as trainer.max_steps=20; `python train.py --parts` explains all of them.",
    ]
    return "\n".join([*head, recipe.with_settings(network)])


def _denoiser(body: str) -> str:
    match = re.search(r"^denoiser:\n(?:.+\n)*?  name: (\w+)", body, re.M)
    assert match is not None
    return match[1]


def write(path: Path, text: str) -> None:
    """Write a config, which is read once before: what is written here has to be one. Raises UserError."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: a name below the folder is not UTF-8, and a YAML holds no other; rename it") from None
    loaded(text)
    with atomic_write(path) as file:
        file.write(encoded)


def summary(cost: StepCost, recipe: Recipe, facts: FolderFacts) -> str:
    """Return what will be trained, in one line."""
    times = recipe.steps * recipe.batch_size / facts.usable
    length = f"{recipe.steps:,} steps of {recipe.batch_size} images, each comes about {times:,.0f} times"
    return f"{in_short(cost.parameters)} parameters at {recipe.side} px; {length}"
