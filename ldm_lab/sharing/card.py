"""The model card of a shared model: README.md with the front matter that the Hugging Face Hub reads.

It says what is known, and of everything else that it is not recorded.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from ldm_lab.pretrained.hub_folder import HubFolder, Origin
from ldm_lab.sharing import comfyui
from ldm_lab.sharing.facts import Facts
from ldm_lab.sharing.parts import SharedPart

UNKNOWN = "not recorded"
TEMPLATE = "card.md.jinja"
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")  # as the Hub's list of licenses has them


@dataclass(frozen=True)
class Network:
    """A denoiser in the folder.

    Attributes:
        file: its name.
        kind: of the denoiser.
        parameters: how many.
        objective: its name.
        license: of its weights, "" if that is not known.
        origin: where they are from.
        parts: what it needs.
    """

    file: str
    kind: str
    parameters: int
    objective: str
    license: str
    origin: Origin
    parts: tuple[SharedPart, ...]


@dataclass(frozen=True)
class Card:
    """What a model card is made of.

    Attributes:
        name: of the model.
        model: its folder.
        networks: its denoisers, the base model first.
        facts: how the base model came about.
        license: of the base model's weights, as an id of the Hub's; None if that is not known.
        prompts: of the samples.
        grid: file name of the picture with them; None without.
        evaluation: metric -> value, for people.
        notes: what is to be said of the evaluation.
    """

    name: str
    model: HubFolder
    networks: tuple[Network, ...]
    facts: Facts
    license: str | None = None
    prompts: Sequence[str] = ()
    grid: str | None = None
    evaluation: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default=())

    def text(self, folder: Path) -> str:
        """Return README.md; `folder` is where the files lie at this time."""
        from huggingface_hub import ModelCard, ModelCardData  # here, as it takes a second to import

        data = ModelCardData(
            license=self.license,
            pipeline_tag="text-to-image" if self.reads_text else "unconditional-image-generation",
            tags=["ldm_lab", "diffusion", *sorted({network.kind for network in self.networks})],
            library_name="ldm_lab",
        )
        prompts = [plain(prompt) for prompt in self.prompts]
        card = ModelCard.from_template(
            data,
            template_str=files("ldm_lab.sharing").joinpath(TEMPLATE).read_text(encoding="utf-8"),
            name=plain(self.name),
            summary=self.summary(),
            model=self.model,
            grid=self.grid,
            prompts=prompts,
            example=shlex.quote(self.example),
            needs=list(dict.fromkeys(part.needs for network in self.networks for part in network.parts if part.needs)),
            training=self.training(),
            evaluation=[(plain(key), plain(value)) for key, value in self.evaluation],
            evaluation_notes=[plain(line) for line in self.notes],
            parts=self.rows(),
            comfyui=comfyui.told(self.autoencoder(folder)),
            files=[
                (f"`{name}`", f"{(folder / name).stat().st_size:,}", checksum)
                for name, checksum in self.model.files.items()
            ],
        )
        return f"{card}\n"

    def autoencoder(self, folder: Path) -> Path | None:
        """Return the file of the base model's autoencoder; None for a model of pixels."""
        files = [file for part in self.networks[0].parts if part.role == "autoencoder" for file in part.files]
        return folder / files[0] if files else None

    @property
    def reads_text(self) -> bool:
        """Whether it is prompted with text."""
        return any(part.role == "conditioner" and part.name != "none" for part in self.networks[0].parts)

    @property
    def example(self) -> str:
        """A prompt that can be typed as it is, without what a command line takes for a flag."""
        prompts = [one_line(prompt) for prompt in self.prompts]
        typed = [prompt for prompt in prompts if not prompt.startswith("-")]
        return typed[0] if typed else "your prompt" if self.reads_text else ""

    def summary(self) -> str:
        """Return what kind of a model it is, in a sentence."""
        base = self.networks[0]
        names = {part.role: part.name for part in base.parts}
        what = "pixels" if names["autoencoder"] == "identity" else f"latents of {names['autoencoder']}"
        told = "without prompts" if names["conditioner"] == "none" else f"prompted through {names['conditioner']}"
        size = f", {self.facts.image_size} pixels a side" if self.facts.image_size else ""
        return f"A diffusion model of {what}{size}, {told}: `{base.kind}` of {base.parameters:,} parameters."

    def training(self) -> list[tuple[str, str]]:
        """Return the rows of the table about the training."""
        facts = self.facts
        count = f" ({facts.count})" if facts.count else f" (how many: {UNKNOWN})"
        known = {
            "data": facts.data and facts.data + count,
            "image size": facts.image_size and f"{facts.image_size} pixels",
            "optimizer steps": facts.step,
            "images in a step": facts.batch,
            "images seen, repeats counted": facts.images,
            "begun with": facts.begun_with,
            "objective": self.networks[0].objective,
            "arithmetic": facts.precision,
            "hardware": facts.hardware,
            "finished": facts.finished,
        }
        rows = [(key, plain(value) if value else UNKNOWN) for key, value in known.items()]
        return rows + ([("merged LoRAs", plain(facts.merged))] if facts.merged else [])

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table of parts."""
        rows = []
        for network in self.networks:
            what = "denoiser" if network is self.networks[0] else "upsampler"
            its, license = told_origin(network.origin), plain(network.license) or UNKNOWN
            rows.append((what, f"`{network.file}`", network.kind, its, license))
            for part in network.parts:
                if not part.files and part.identity is None:
                    rows.append((part.role, "", part.name, "no weights", ""))
                    continue
                named = ", ".join(f"`{file}`" for file in part.files[:3]) + (", ..." if len(part.files) > 3 else "")
                its, license = told_origin(part.origin), plain(part.origin.license) or UNKNOWN
                rows.append((part.role, named or "not in the folder", part.name, its, license))
        return list(dict.fromkeys(rows))


def told_origin(origin: Origin) -> str:
    """Return where weights are from, as Markdown."""
    its = plain(origin.what)
    return f"[{its}]({origin.page})" if its and origin.page else its or UNKNOWN


def one_line(text: str) -> str:
    """Return a text without line breaks and other characters that do not print."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def plain(text: str) -> str:
    """Return a text as Markdown shows it as it is, in one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", one_line(text))
