"""The page: controls on one side, pictures on the other."""

import html
import json
import secrets
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
from gradio.components import Component

from ldm_lab.app.choices import Choice, FormValue, base_choices, of_sampler, upsampler_choices
from ldm_lab.app.choices import Kind as Ask
from ldm_lab.app.parts import MaskEditor, Painted, UploadedImage, UploadedPicture, escaped, telling
from ldm_lab.app.recall import recall
from ldm_lab.app.shelf import Kind
from ldm_lab.app.work import ImagePrompt, Pictures, Progress, Request, Workshop
from ldm_lab.errors import UserError
from ldm_lab.io.images import open_image, save_png
from ldm_lab.sampling.options import DEFAULT_SAMPLER, UPSAMPLER, OptionValues

IMAGE_PROMPTS, LORAS = 3, 3  # fields of the page; requests over HTTP have no such bound
# Where the options stand; those that are named nowhere here, such as new ones, are under "More choices".
FIRST = ("negative", "guidance", "steps", "sampler", "seed", "size")
WITH_IMAGE = ("strength", "mask_blur", "invert_mask", "resize")
QUEUE = "pictures"  # whatever makes some waits in this one
NO_MODEL = "no model is offered: put one into the folder of --models, or give one by --checkpoint"
FONTS = ["system-ui", "sans-serif"]
CSS = """
.gradio-container { max-width: 1400px !important; }
#status progress { width: 100%; height: 0.9em; }
#status p { margin: 0 0 0.3em 0; overflow-wrap: anywhere; }
footer { display: none !important; }
"""

Painting = tuple[str, list[str] | None, str | None, Request | None]  # status, gallery, archive, what was made last


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
    images: list[UploadedImage]
    weights: list[gr.Number]
    editor: MaskEditor
    fields: list[Field]

    @property
    def controls(self) -> list[Component]:
        """All of them."""
        first = [self.model, self.upsamplers, self.prompts, self.count]
        rest = [field.control for field in self.fields]
        return [*first, *self.loras, *self.strengths, *self.images, *self.weights, self.editor, *rest]

    def request(self, values: Sequence[FormValue | Painted]) -> Request:
        """Return what the controls' values ask for. Raises UserError."""
        left = iter(values)

        def take(count: int) -> list[FormValue | Painted]:
            return [next(left) for _ in range(count)]

        model, upsamplers, prompts, count = take(4)
        loras, strengths, images, weights = take(LORAS), take(LORAS), take(IMAGE_PROMPTS), take(IMAGE_PROMPTS)
        (painted,) = take(1)
        if not model:
            raise UserError(NO_MODEL)
        lines = [line.strip() for line in str(prompts or "").splitlines() if line.strip()]
        given = [(str(file), weight) for file, weight in zip(images, weights) if file]
        named = [(str(name), strength) for name, strength in zip(loras, strengths) if name]
        return Request(
            model=str(model),
            upsamplers=tuple(map(str, upsamplers)) if isinstance(upsamplers, list) else (),
            loras=tuple(name if weight in (None, 1) else f"{name}:{weight}" for name, weight in named),
            prompts=tuple(lines) if lines or given else ("",),
            images=tuple(ImagePrompt(Path(file), _weight(weight)) for file, weight in given),
            count=_whole(count),
            values=self._options(list(left), painted if isinstance(painted, Painted) else None, bool(upsamplers)),
        )

    def _options(self, values: Sequence[FormValue | Painted], painted: Painted | None, enlarged: bool) -> OptionValues:
        """Return the options that are given: of a sampler its own alone, of an image only beside one."""
        pairs = [(field.choice, value) for field, value in zip(self.fields, values) if not isinstance(value, Painted)]
        read = {choice.name: value for choice, form in pairs if (value := choice.read(form)) is not None}
        found = OptionValues({name: value for name, value in read.items() if enlarged or not _enlarges(name)})
        for prefix in ("", UPSAMPLER):
            sampler = found.get(f"{prefix}sampler")
            if sampler is not None or not prefix:
                own = of_sampler(str(sampler or DEFAULT_SAMPLER))
                for name in of_sampler(None) - own:
                    found.pop(prefix + name, None)
        if painted is None:
            return OptionValues({name: value for name, value in found.items() if name not in WITH_IMAGE})
        found["init_image"] = str(painted.image)
        if painted.mask is not None:
            found["mask"] = str(_saved_mask(painted))
        else:
            found.pop("invert_mask", None)
        return found


def build(workshop: Workshop, add_endpoints: Callable[[Workshop], None]) -> gr.Blocks:
    """Return the page of a workshop, with the endpoints of its HTTP interface."""
    with gr.Blocks(title="ldm_lab", analytics_enabled=False, delete_cache=(600, 6 * 3600)) as page:
        gr.Markdown("# ldm_lab")
        with gr.Row():
            with gr.Column(min_width=320):
                form, buttons, dropped = _controls(workshop)
            with gr.Column(min_width=320):
                status = gr.HTML(elem_id="status", value=_shown_status(Progress("ready")))
                gallery = gr.Gallery(
                    label="Pictures", elem_id="gallery", columns=2, object_fit="contain", height="auto",
                    interactive=False, format="png", buttons=["download", "fullscreen"],
                )  # fmt: skip
                archive = gr.DownloadButton("Download all", elem_id="archive", interactive=False)
        last = gr.State(None)
        _connect(workshop, page, form, buttons, dropped, (status, gallery, archive, last))
        add_endpoints(workshop)
    return page


@dataclass(frozen=True)
class Buttons:
    """What is pressed."""

    draw: gr.Button
    again: gr.Button
    stop: gr.Button
    look: gr.Button


def _controls(workshop: Workshop) -> tuple[Form, Buttons, UploadedPicture]:
    """Make the left side."""
    shelf, limits = workshop.shelf, workshop.limits
    models = shelf.names(Kind.MODEL)
    with gr.Row(equal_height=True):
        model = gr.Dropdown(models, value=next(iter(models), None), label="Model", elem_id="model", scale=5)
        look = gr.Button("Look again", elem_id="look", size="sm", scale=1, min_width=90)
    prompts = gr.Textbox(
        label="Prompts", elem_id="prompts", lines=3, placeholder="a red star on a blue background",
        info="One a line; they are mixed in every picture. A weight stands after a colon: watercolor:1.5, blurry:-0.5",
    )  # fmt: skip
    fields: dict[str, Field] = {}
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
        again = gr.Button("Same again, another seed", elem_id="again", min_width=100)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=60)
    with gr.Row():
        count = gr.Number(1, label="Count", elem_id="count", precision=None, min_width=90)
    base = {choice.name: choice for choice in base_choices() if choice.kind is not Ask.IMAGE}
    first = [base[name] for name in FIRST if name in base]
    with gr.Row():
        _add(first, fields, workshop)
    with gr.Accordion("Options of the sampler", open=False, elem_id="sampler-options"):
        own = [choice for name, choice in base.items() if name in of_sampler(None) and name not in FIRST]
        _add(own, fields, workshop)
    with gr.Accordion("Image prompts", open=False, elem_id="image-prompts"):
        images, weights = _image_prompts(workshop)
    with gr.Accordion("Begin with an image; paint a mask", open=False, elem_id="begin-with"):
        gr.Markdown("Where you paint, something new is drawn; all else stays. Without paint the whole image changes.")
        editor = MaskEditor(limits, "Image", "editor")
        _add([base[name] for name in WITH_IMAGE if name in base], fields, workshop)
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
        dropped = UploadedPicture("Drop a picture here to have its settings above", "dropped")
    form = Form(model, upsamplers, prompts, count, loras, strengths, images, weights, editor, list(fields.values()))
    return form, Buttons(draw, again, stop, look), dropped


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
        words = list(choice.choices) if choice.kind is Ask.CHOICE else workshop.shelf.names(Kind.OTHER)
        return gr.Dropdown([("default", ""), *((word, word) for word in words)], value=choice.preset or "", **its)
    if choice.kind is Ask.NUMBER:
        return gr.Number(choice.preset, precision=None, placeholder="default", **its)
    return gr.Textbox(choice.preset, placeholder="default", max_lines=3, **its)


def _image_prompts(workshop: Workshop) -> tuple[list[UploadedImage], list[gr.Number]]:
    images, weights = [], []
    with gr.Row():
        for number in range(1, IMAGE_PROMPTS + 1):
            with gr.Column(min_width=150):
                images.append(UploadedImage(workshop.limits, f"Image {number}", f"image-{number}"))
                weights.append(gr.Number(None, label="Weight", placeholder="guidance", elem_id=f"weight-{number}"))
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


# --------------------------------------------------------------------------------------------------------- what happens


def _connect(
    workshop: Workshop,
    page: gr.Blocks,
    form: Form,
    buttons: Buttons,
    dropped: UploadedPicture,
    outputs: tuple[gr.HTML, gr.Gallery, gr.DownloadButton, gr.State],
) -> None:
    """Say what happens when something is pressed, chosen or dropped."""
    status, _, _, last = outputs
    fields = {field.choice.name: field.control for field in form.fields}

    def draw(*values: FormValue | Painted) -> Iterator[Painting]:
        with telling():
            request = form.request(values)
        yield from paint(workshop, request)

    def again(request: Request | None, seed: int) -> Iterator[Painting]:
        with telling():
            if request is None:
                raise UserError("nothing was drawn yet: Draw makes the first pictures")
        values = OptionValues({**request.values, "seed": seed})
        yield from paint(workshop, replace(request, values=values))

    making = {"outputs": list(outputs), "api_visibility": "private", "show_progress_on": [status]}
    making |= {"concurrency_id": QUEUE, "concurrency_limit": 1, "trigger_mode": "once"}
    drawn = buttons.draw.click(draw, form.controls, **making)
    sent = form.prompts.submit(draw, form.controls, **making)
    new_seed = buttons.again.click(_new_seed, None, [fields["seed"]], api_visibility="private", queue=False)
    repeated = new_seed.then(again, [last, fields["seed"]], **making)
    buttons.stop.click(
        lambda: _shown_status(Progress("stopped")), None, [status], cancels=[drawn, sent, repeated],
        api_visibility="private", queue=False,
    )  # fmt: skip
    _connect_uploads(form)
    _connect_shelf(workshop, page, form, buttons.look)
    _connect_recall(workshop, form, dropped)


def _connect_uploads(form: Form) -> None:
    """Have a file that is not taken disappear again, with a word why."""
    for component in (*form.images, form.editor):
        refused = component.upload(
            lambda _: None, [component], None, api_visibility="private", queue=False, show_progress="hidden"
        )
        refused.failure(lambda: None, None, [component], api_visibility="private", queue=False)


def _connect_shelf(workshop: Workshop, page: gr.Blocks, form: Form, look: gr.Button) -> None:
    """Have new files offered when the page is opened, or asked for."""
    shelf = workshop.shelf
    files = [field.control for field in form.fields if field.choice.kind is Ask.FILE]
    targets = [form.model, form.upsamplers, *form.loras, *files]

    def offered(chosen: str | None) -> list[gr.Dropdown]:
        models = shelf.names(Kind.MODEL)
        model = chosen if chosen in models else next(iter(models), None)
        loras = [("none", ""), *((name, name) for name in shelf.names(Kind.LORA))]
        others = [("default", ""), *((name, name) for name in shelf.names(Kind.OTHER))]
        found = [gr.Dropdown(models, value=model), gr.Dropdown(shelf.names(Kind.UPSAMPLER))]
        return [*found, *(gr.Dropdown(loras) for _ in form.loras), *(gr.Dropdown(others) for _ in files)]

    quiet = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    page.load(offered, [form.model], targets, **quiet)
    look.click(offered, [form.model], targets, **quiet)


def _connect_recall(workshop: Workshop, form: Form, dropped: UploadedPicture) -> None:
    """Have the settings of a dropped picture in the controls."""
    choices = {field.choice.name: field.choice for field in form.fields}

    def recalled(path: str | None) -> list[gr.Dropdown | gr.Textbox | FormValue]:
        with telling():
            if path is None:
                raise UserError("no picture was dropped")
            found = recall(Path(path), workshop.shelf, list(choices))
            named = [written.rpartition(":") for written in found.loras][:LORAS]
        for line in found.remarks:
            gr.Warning(escaped(line))
        gr.Info("Its settings are in the controls")
        shown = [
            choice.shown(found.values[name])
            if name in found.values
            else choice.preset
            if choice.preset is not None
            else ""
            for name, choice in choices.items()
        ]
        empty = LORAS - len(named)
        return [
            found.model or gr.Dropdown(),
            gr.Dropdown() if found.upsamplers is None else found.upsamplers,
            "\n".join(found.prompts),
            *(name for name, _, _ in named), *[""] * empty,
            *(float(weight) for _, _, weight in named), *[1] * empty,
            *(None if value == "" and choice.kind is Ask.NUMBER else value for value, choice in zip(shown, choices.values())),
        ]  # fmt: skip

    targets = [form.model, form.upsamplers, form.prompts, *form.loras, *form.strengths]
    targets += [field.control for field in form.fields]
    dropped.upload(recalled, [dropped], targets, api_visibility="private", queue=False)


def paint(workshop: Workshop, request: Request) -> Iterator[Painting]:
    """Yield what the right side shows while pictures are made, and in the end the pictures."""
    with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as folder, telling():
        for said in workshop.work(request, Path(folder)):
            if isinstance(said, Progress):
                yield _shown_status(said), gr.skip(), gr.skip(), gr.skip()
                continue
            for line in said.remarks:
                gr.Warning(escaped(line))
            yield _shown_status(said), list(map(str, said.files)), _archive(Path(folder)), request


def _archive(folder: Path) -> gr.DownloadButton:
    """Return the button that gives all files of a folder away."""
    path = folder / "pictures.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.iterdir()):
            if file != path:
                archive.write(file, file.name)
    return gr.DownloadButton(value=str(path), interactive=True)


def _shown_status(said: Progress | Pictures) -> str:
    """Return the line above the pictures."""
    if isinstance(said, Pictures):
        seeds = said.seeds[0] if len(said.seeds) == 1 else f"{said.seeds[0]} to {said.seeds[-1]}"
        word = "picture" if len(said.files) == 1 else "pictures"
        return f"<p>{len(said.files)} {word}, seed {seeds}</p>"
    bar = f'<progress value="{said.done}" max="{said.total}"></progress>' if said.total else ""
    return f"<p>{html.escape(said.doing)}</p>{bar}"


def _new_seed() -> int:
    return secrets.randbelow(2**32)


def _saved_mask(painted: Painted) -> Path:
    """Return the file of a mask, at its image's size, beside the image."""
    assert painted.mask is not None, "the caller knows"
    path = painted.image.parent / f"mask-{secrets.token_hex(8)}.png"
    size = open_image(str(painted.image)).size  # upright, as the browser shows it
    save_png(path, painted.mask if painted.mask.size == size else painted.mask.resize(size))
    return path


def _whole(value: FormValue | Painted) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"count: a whole number from 1 on is needed, not {json.dumps(value, default=str)}")
    return value


def _weight(value: FormValue | Painted) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _enlarges(name: str) -> bool:
    return name.startswith(UPSAMPLER)
