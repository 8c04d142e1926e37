"""The page: controls on one side, pictures on the other, and what happens when something is pressed."""

import html
import json
import secrets
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
from PIL import Image

from ldm_lab.app.choices import Choice, Chosen, FormValue
from ldm_lab.app.choices import Kind as Ask
from ldm_lab.app.followers import Followers
from ldm_lab.app.form import LORAS, Buttons, Form, controls
from ldm_lab.app.line import QUEUE, Line
from ldm_lab.app.parts import escaped, preview, telling
from ldm_lab.app.recall import recall
from ldm_lab.app.shelf import Contents, Kind
from ldm_lab.app.work import Pictures, Progress, Request, Workshop
from ldm_lab.errors import UserError
from ldm_lab.sampling.options import OptionValues

MOST_TOLD = 50  # files that are not offered
FONTS = ["system-ui", "sans-serif"]
CSS = """
.gradio-container { max-width: 1400px !important; }
#status progress { width: 100%; height: 0.9em; border: 0; background: #ddd; }
#status progress::-webkit-progress-bar { background: #ddd; }
#status progress::-webkit-progress-value { background: #ea580c; }
#status progress::-moz-progress-bar { background: #ea580c; }
#status { scroll-margin-top: 1em; }
#status p { margin: 0 0 0.3em 0; overflow-wrap: anywhere; }
#status li { font-size: 0.9em; overflow-wrap: anywhere; }
#draw, #again, #stop { font-size: 1rem; white-space: nowrap; padding-left: 0.5em; padding-right: 0.5em; }
footer { display: none !important; }
@media (max-width: 700px) {  /* pictures right below what draws them */
  #sides { flex-direction: column; }
  #left { display: contents; }
  #right { order: 1; }
  #rest { order: 2; }
  #gallery { height: 24rem !important; }
}
"""

Painting = tuple[str, list[str] | None, str | None, Request | None]  # status, gallery, archive, what was made last


def build(
    workshop: Workshop, followers: Followers, add_endpoints: Callable[[Workshop, Line], None]
) -> tuple[gr.Blocks, Line]:
    """Return the page of a workshop, with the endpoints of its HTTP interface, and the queue of its requests."""
    with gr.Blocks(title="ldm_lab", analytics_enabled=False, delete_cache=(600, 6 * 3600)) as page:
        gr.Markdown("# ldm_lab")
        with gr.Row(elem_id="sides"):
            with gr.Column(min_width=320, elem_id="left"):
                form, buttons, dropped = controls(workshop)
            with gr.Column(min_width=320, elem_id="right"):
                status = gr.HTML(elem_id="status", value=_shown_status(Progress("ready")))
                gallery = gr.Gallery(
                    label="Pictures", elem_id="gallery", columns=2, object_fit="contain", height=560,
                    interactive=False, format="png", buttons=["download", "fullscreen"],
                )  # fmt: skip
                archive = gr.DownloadButton("Download all", elem_id="archive", interactive=False)
                left_out = gr.HTML(elem_id="left-out", visible=False)
        last = gr.State(None)
        line = Line(page, workshop.limits.waiting, followers)
        _connect(workshop, line, form, buttons, (status, gallery, archive, last))
        _connect_uploads(workshop, form)
        _connect_shelf(workshop, page, form, buttons.look, left_out)
        _connect_recall(workshop, form, dropped)
        add_endpoints(workshop, line)
    return page, line


# --------------------------------------------------------------------------------------------------------- what happens


def _connect(
    workshop: Workshop,
    line: Line,
    form: Form,
    buttons: Buttons,
    outputs: tuple[gr.HTML, gr.Gallery, gr.DownloadButton, gr.State],
) -> None:
    """Say what happens when a button is pressed."""
    status, _, _, last = outputs
    fields = {field.choice.name: field.control for field in form.fields}

    def draw(*values: FormValue | Image.Image) -> Iterator[Painting]:
        with telling():
            request = form.request(values)
        yield from paint(workshop, line, request)

    def again(request: Request | None, seed: str) -> Iterator[Painting]:
        with telling():
            if request is None:
                raise UserError("nothing was drawn yet: Draw makes the first pictures")
        values = OptionValues({**request.values, "seed": int(seed)})
        yield from paint(workshop, line, replace(request, values=values))

    making = {
        "outputs": list(outputs),
        "api_visibility": "private",
        "show_progress_on": [status],
        "scroll_to_output": True,
    }
    making |= {"concurrency_id": QUEUE, "concurrency_limit": 1, "trigger_mode": "once"}
    here = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    for asking in (buttons.draw.click, form.prompts.submit, buttons.again.click):
        asking(None, None, [status], js=f"() => {json.dumps(_shown_status(Progress('waiting for its turn')))}", **here)
    drawn = buttons.draw.click(draw, form.controls, **making)
    sent = form.prompts.submit(draw, form.controls, **making)
    new_seed = buttons.again.click(_new_seed, None, [fields["seed"]], api_visibility="private", queue=False)
    repeated = new_seed.then(again, [last, fields["seed"]], **making)
    for event in (drawn, sent, repeated):
        event.failure(None, None, [status], js=f"() => {json.dumps(_shown_status(Progress('not drawn')))}", **here)
    ended = buttons.stop.click(None, None, None, cancels=[drawn, sent, repeated], api_visibility="private", queue=False)
    ended.then(lambda: _shown_status(Progress("stopped")), None, [status], api_visibility="private")


def _connect_uploads(workshop: Workshop, form: Form) -> None:
    """Have a file that is not taken disappear again, with a word why, and an image to begin with be painted on."""
    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    for image in form.images:
        image.upload(_nothing, [image], None, **quiet).failure(_nothing, None, [image], **quiet)
    begun = form.begin.upload(lambda path: preview(workshop.limits, path), [form.begin], [form.editor], **quiet)
    begun.failure(lambda: (None, None), None, [form.begin, form.editor], **quiet)
    form.begin.clear(_nothing, None, [form.editor], **quiet)


def _nothing(*_: FormValue) -> None:
    """Return what empties a component."""


def _connect_shelf(workshop: Workshop, page: gr.Blocks, form: Form, look: gr.Button, left_out: gr.HTML) -> None:
    """Have new files offered when the page is opened, or asked for."""
    shelf = workshop.shelf
    files = [field.control for field in form.fields if field.choice.kind is Ask.FILE]
    targets = [form.model, form.upsamplers, *form.loras, *files, left_out]

    def offered(chosen: str | None) -> list[gr.Dropdown | gr.HTML]:
        contents = shelf.contents()
        models = contents.names(Kind.MODEL)
        model = chosen if chosen in models else next(iter(models), None)
        if chosen is not None and chosen != model:
            gr.Warning(escaped(f"{chosen} is not offered any more; chosen is {model or 'none'}"))
        loras = [("none", ""), *((name, name) for name in contents.names(Kind.LORA))]
        others = [("default", ""), *((name, name) for name in contents.names(Kind.RATINGS))]
        found = [gr.Dropdown(models, value=model), gr.Dropdown(contents.names(Kind.UPSAMPLER))]
        lists = [*(gr.Dropdown(loras) for _ in form.loras), *(gr.Dropdown(others) for _ in files)]
        return [*found, *lists, _left_out(contents)]

    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    page.load(offered, [form.model], targets, **quiet)
    look.click(offered, [form.model], targets, **quiet)


def _left_out(contents: Contents) -> gr.HTML:
    """Return what says which files of weights are not offered, and why; nothing is shown where there are none."""
    lines = [f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in contents.left_out.items()]
    more = f"<li>and {len(lines) - MOST_TOLD} more</li>" if len(lines) > MOST_TOLD else ""
    word = "file is" if len(lines) == 1 else "files are"
    entries = "".join([*lines[:MOST_TOLD], more])
    text = f"<details><summary>{len(lines)} {word} not offered</summary><ul>{entries}</ul></details>"
    return gr.HTML(text, visible=bool(lines))


def _connect_recall(workshop: Workshop, form: Form, dropped: gr.File) -> None:
    """Have the settings of a dropped picture in the controls."""
    choices = {field.choice.name: field.choice for field in form.fields}

    def recalled(path: str | None) -> list[gr.Dropdown | FormValue]:
        with telling():
            if path is None:
                raise UserError("no picture was dropped")
            found = recall(Path(path), workshop.shelf, list(choices))
            named = [written.rpartition(":") for written in found.loras]
            if left := [name for name, _, _ in named[LORAS:]]:
                found.remarks.append(f"not taken: more than {LORAS} LoRAs: {', '.join(left)[:200]}")
            named = named[:LORAS]
        for line in found.remarks:
            gr.Warning(escaped(line))
        gr.Info("Its settings are in the controls; no image is chosen, and the count is 1")
        empty = LORAS - len(named)
        return form.values(
            [_shown(choice, found.values.get(name)) for name, choice in choices.items()],
            model=found.model or gr.Dropdown(),
            upsamplers=found.upsamplers,
            prompts="\n".join(found.prompts),
            loras=[*(name for name, _, _ in named), *[""] * empty],
            strengths=[*(float(weight) for _, _, weight in named), *[1] * empty],
        )

    dropped.upload(recalled, [dropped], form.controls, api_visibility="private")


def paint(workshop: Workshop, line: Line, request: Request) -> Iterator[Painting]:
    """Yield what the right side shows while pictures are made, and in the end the pictures."""
    with telling():
        for said in workshop.work(request, line.of_this_job()):
            if isinstance(said, Progress):
                yield _shown_status(said), gr.skip(), gr.skip(), gr.skip()
                continue
            yield _shown_status(said), list(map(str, said.files)), _archive(said.folder), request


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
        remarks = "".join(f"<li>{html.escape(line)}</li>" for line in said.remarks)
        return f"<p>{len(said.files)} {word}, seed {seeds}</p>" + (f"<ul>{remarks}</ul>" if remarks else "")
    bar = f'<progress value="{said.done}" max="{said.total}"></progress>' if said.total else ""
    return f"<p>{html.escape(said.doing)}</p>{bar}"


def _shown(choice: Choice, value: Chosen | None) -> FormValue:
    """Return what the control of an option shows for a value; None is its default."""
    if value is not None:
        return choice.shown(value)
    return bool(choice.preset) if choice.kind is Ask.CHECK else "" if choice.preset is None else str(choice.preset)


def _new_seed() -> str:
    return str(secrets.randbelow(2**32))
