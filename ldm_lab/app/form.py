"""The controls of the page, and the request that their values stand for."""

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.components import Component
from PIL import Image

from ldm_lab.app.choices import Choice, FormValue, base_choices, upsampler_choices
from ldm_lab.app.choices import Kind as Ask
from ldm_lab.app.parts import mask_editor, uploaded_image
from ldm_lab.app.shelf import Kind
from ldm_lab.app.work import ImagePrompt, Request, Workshop
from ldm_lab.errors import UserError
from ldm_lab.io.images import open_image, save_png
from ldm_lab.sampling import flat
from ldm_lab.sampling.options import BELONGS, OptionValues

IMAGE_PROMPTS, LORAS = 3, 3  # fields of the page; requests over HTTP have no such bound
# Where the options stand; those that are named nowhere here, such as new ones, are under "More choices".
FIRST = ("negative", "guidance", "steps", "sampler", "seed", "size")
NO_MODEL = "no model is offered: put one into the folder of --models, or give one by --checkpoint"


@dataclass(frozen=True)
class Field:
    """An option and its control."""

    choice: Choice
    control: Component


@dataclass(frozen=True)
class Form:
    """All controls that say what is to be made, in the order in which `request` takes their values."""

    model: gr.Dropdown
    upsamplers: gr.Dropdown
    prompts: gr.Textbox
    count: gr.Number
    loras: list[gr.Dropdown]
    strengths: list[gr.Number]
    images: list[gr.Image]
    weights: list[gr.Textbox]
    begin: gr.Image
    editor: gr.ImageEditor
    fields: list[Field]

    @property
    def controls(self) -> list[Component]:
        """All of them."""
        first = [self.model, self.upsamplers, self.prompts, self.count]
        rest = [field.control for field in self.fields]
        return [*first, *self.loras, *self.strengths, *self.images, *self.weights, self.begin, self.editor, *rest]

    def values(
        self,
        options: list[FormValue],
        *,
        model: gr.Dropdown | str,
        upsamplers: list[str],
        prompts: str,
        loras: list[str],
        strengths: list[float],
    ) -> list[gr.Dropdown | FormValue]:
        """Return a value for each of `controls`: one picture, without images.

        Args:
            options: what the control of each shows, in the order of `fields`.
            model: its name, or what leaves it as it is.
            upsamplers: their names.
            prompts: one a line.
            loras, strengths: one for each of the controls.
        """
        images = [*[None] * len(self.images), *[""] * len(self.weights), None, None]  # with the mask
        return [model, upsamplers, prompts, 1, *loras, *strengths, *images, *options]

    def request(self, values: Sequence[FormValue | Image.Image]) -> Request:
        """Return what the controls' values ask for. Raises UserError."""
        left = iter(values)

        def take(count: int) -> list[FormValue | Image.Image]:
            return [next(left) for _ in range(count)]

        model, upsamplers, prompts, count = take(4)
        loras, strengths, images, weights = take(LORAS), take(LORAS), take(IMAGE_PROMPTS), take(IMAGE_PROMPTS)
        begin, mask = take(2)
        if not model:
            raise UserError(NO_MODEL)
        lines = [line.strip() for line in str(prompts or "").splitlines() if line.strip()]
        given = [(str(file), weight) for file, weight in zip(images, weights) if file]
        named = [(str(name), strength) for name, strength in zip(loras, strengths) if name]
        options = self._options(list(left), str(begin) if begin else None, mask)
        without = flat.idle(options, len(upsamplers or ()))
        return Request(
            model=str(model),
            upsamplers=tuple(map(str, upsamplers)) if isinstance(upsamplers, list) else (),
            loras=tuple(name if weight in (None, 1) else f"{name}:{weight}" for name, weight in named),
            prompts=tuple(lines) if lines or given else ("",),
            images=tuple(ImagePrompt(Path(file), _weight(weight)) for file, weight in given),
            count=_whole(count),
            values=OptionValues({name: value for name, value in options.items() if name not in without}),
            remarks=(
                *(f"{name}: without effect: {why}" for name, why in without.items()),
                *_alone("strength: without effect: LoRA", loras, strengths, (None, 1)),
                *_alone("weight: without effect: image", images, weights, (None, "")),
            ),
        )

    def _options(
        self, values: Sequence[FormValue | Image.Image], begin: str | None, mask: FormValue | Image.Image
    ) -> OptionValues:
        """Return the options that are given, whether they have an effect or not."""
        pairs = [(field.choice, value) for field, value in zip(self.fields, values)]
        found = OptionValues({choice.name: value for choice, form in pairs if (value := choice.read(form)) is not None})
        if begin is not None:
            found["init_image"] = begin
        if isinstance(mask, Image.Image):
            found["mask"] = str(_saved_mask(Path(begin), mask)) if begin is not None else "painted"
        return found


@dataclass(frozen=True)
class Buttons:
    """What is pressed."""

    draw: gr.Button
    again: gr.Button
    stop: gr.Button
    look: gr.Button


def controls(workshop: Workshop) -> tuple[Form, Buttons, gr.File]:
    """Make the controls."""
    models = workshop.shelf.names(Kind.MODEL)
    with gr.Row(equal_height=True):
        model = gr.Dropdown(models, value=next(iter(models), None), label="Model", elem_id="model", scale=5)
        look = gr.Button("Look again", elem_id="look", size="sm", scale=1, min_width=90)
    prompts = gr.Textbox(
        label="Prompts", elem_id="prompts", lines=3, placeholder="a red star on a blue background",
        info="One a line; they are mixed in every picture. A weight stands after a colon: watercolor:1.5, blurry:-0.5",
    )  # fmt: skip
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=70)
        again = gr.Button("Another seed", elem_id="again", min_width=130)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=60)
    with gr.Column(elem_id="rest"):
        form, dropped = _rest(workshop, model, prompts)
    return form, Buttons(draw, again, stop, look), dropped


def _rest(workshop: Workshop, model: gr.Dropdown, prompts: gr.Textbox) -> tuple[Form, gr.File]:
    """Make what stands below the buttons, on a narrow page below the pictures; return all controls."""
    shelf, limits, fields = workshop.shelf, workshop.limits, dict[str, Field]()
    with gr.Row():
        most = f"{limits.pictures} at most; pictures x steps x megapixels x prompts: {limits.work} at most"
        count = gr.Number(1, label="Count", info=most, elem_id="count", precision=None, min_width=90)
    base = {choice.name: choice for choice in base_choices() if choice.kind is not Ask.IMAGE}
    first = [base[name] for name in FIRST if name in base]
    with gr.Row():
        _add(first, fields, workshop)
    with gr.Accordion("Options of the sampler", open=False, elem_id="sampler-options"):
        own = [choice for name, choice in base.items() if name in flat.sampler_names() and name not in FIRST]
        _add(own, fields, workshop)
    with gr.Accordion("Image prompts", open=False, elem_id="image-prompts"):
        images, weights = _image_prompts(workshop)
    with gr.Accordion("Begin with an image; paint a mask", open=False, elem_id="begin-with"):
        gr.Markdown("Where you paint, something new is drawn; all else stays. Without paint the whole image changes.")
        begin = uploaded_image(limits, "Image to begin with", "begin")
        editor = mask_editor(limits, "Mask", "editor")
        _add([choice for name, choice in base.items() if _is_of_image(name)], fields, workshop)
    with gr.Accordion("LoRA", open=False, elem_id="loras"):
        loras, strengths = _loras(workshop)
    with gr.Accordion("Upsamplers", open=False, elem_id="upsamplers"):
        upsamplers = gr.Dropdown(
            shelf.names(Kind.UPSAMPLER), multiselect=True, label="Upsamplers", elem_id="upsampler",
            info="In the order in which they enlarge",
        )  # fmt: skip
        _add(upsampler_choices(), fields, workshop)
    with gr.Accordion("More choices", open=False, elem_id="more"):
        _add([choice for name, choice in base.items() if name not in fields], fields, workshop)
    with gr.Accordion("Settings of a picture", open=False, elem_id="recall"):
        dropped = gr.File(
            label="Drop a picture here to have its settings above", elem_id="dropped", type="filepath", height=110
        )
    given = list(fields.values())
    form = Form(model, upsamplers, prompts, count, loras, strengths, images, weights, begin, editor, given)
    return form, dropped


def _add(choices: Sequence[Choice], fields: dict[str, Field], workshop: Workshop) -> None:
    """Make the controls of some options."""
    for choice in choices:
        fields[choice.name] = Field(choice, _control(choice, workshop))


def _control(choice: Choice, workshop: Workshop) -> Component:
    """Return the control of an option."""
    its = {"label": choice.label, "info": choice.meaning, "elem_id": f"option-{choice.name}", "min_width": 150}
    if choice.kind is Ask.CHECK:
        return gr.Checkbox(bool(choice.preset), **its)
    if choice.kind in (Ask.CHOICE, Ask.FILE):
        words = list(choice.choices) if choice.kind is Ask.CHOICE else workshop.shelf.names(Kind.RATINGS)
        return gr.Dropdown([("default", ""), *((word, word) for word in words)], value=choice.preset or "", **its)
    preset = None if choice.preset is None else str(choice.preset)  # a field of numbers would show 0 for nothing
    return gr.Textbox(preset, placeholder="default", max_lines=3, **its)


def _image_prompts(workshop: Workshop) -> tuple[list[gr.Image], list[gr.Textbox]]:
    images, weights = [], []
    with gr.Row():
        for number in range(1, IMAGE_PROMPTS + 1):
            with gr.Column(min_width=150):
                images.append(uploaded_image(workshop.limits, f"Image {number}", f"image-{number}"))
                weights.append(gr.Textbox(label="Weight", placeholder="guidance", elem_id=f"weight-{number}"))
    return images, weights


def _loras(workshop: Workshop) -> tuple[list[gr.Dropdown], list[gr.Number]]:
    names, strengths = [], []
    for number in range(1, LORAS + 1):
        with gr.Row():
            offered = [("none", ""), *((name, name) for name in workshop.shelf.names(Kind.LORA))]
            names.append(
                gr.Dropdown(offered, value="", label=f"LoRA {number}", elem_id=f"lora-{number}", min_width=150)
            )
            strengths.append(gr.Number(1, label="Strength", elem_id=f"strength-{number}", min_width=90))
    return names, strengths


def _saved_mask(image: Path, mask: Image.Image) -> Path:
    """Return the file of a mask, at its image's size, beside the image."""
    path = image.parent / f"mask-{secrets.token_hex(8)}.png"
    size = open_image(str(image)).size  # upright, as it was shown to be painted on
    save_png(path, mask if mask.size == size else mask.resize(size))
    return path


def _whole(value: FormValue | Image.Image) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"count: a whole number from 1 on is needed, not {json.dumps(value, default=str)}")
    return value


def _weight(value: FormValue | Image.Image) -> float | None:
    """Return the weight of an image prompt; None for none. Raises UserError for anything but a number."""
    text = str(value or "").strip()
    try:
        weight = float(text) if text else None
    except ValueError:
        weight = math.nan
    if weight is not None and not math.isfinite(weight):
        raise UserError(f"weight of an image: a finite number is needed, not {text[:60]!r}")
    return weight


def _alone(
    what: str,
    chosen: Sequence[FormValue | Image.Image],
    beside: Sequence[FormValue | Image.Image],
    presets: Sequence[FormValue],
) -> list[str]:
    """Return a line for each number that is set beside a field in which nothing is chosen."""
    pairs = enumerate(zip(chosen, beside), start=1)
    return [f"{what} {place} is not chosen" for place, (one, value) in pairs if not one and value not in presets]


def _is_of_image(name: str) -> bool:
    """Return whether an option means nothing without an image to begin with."""
    other = BELONGS.get(name)
    return other == "init_image" or (other is not None and _is_of_image(other))
