"""The HTTP interface: what the page does, for programs. Every option of sampling is a parameter of `sample`."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from ldm_lab.app.choices import Choice, Chosen, FormValue, Kind, base_choices, upsampler_choices
from ldm_lab.app.line import QUEUE, Line
from ldm_lab.app.parts import telling
from ldm_lab.app.recall import recall
from ldm_lab.app.shelf import Kind as File
from ldm_lab.app.work import ImagePrompt, Progress, Request, Workshop
from ldm_lab.config.bounds import TypeForm, describe
from ldm_lab.errors import UserError, unknown
from ldm_lab.io.json_files import Json, JsonObject
from ldm_lab.sampling.options import UPSAMPLER, OptionValues, stage_prefix

# Parameters of `sample` that are no options -> their types.
OTHERS: dict[str, TypeForm] = {
    "prompts": list[str], "image_prompts": list[dict], "image_weights": list[float], "count": int, "model": str,
    "upsamplers": list[str], "each_upsampler": list[dict], "loras": list[str],
}  # fmt: skip


class Arguments(JsonObject):
    """What a request gives, by the names of the parameters. What is of another type raises UserError."""

    def text(self, name: str) -> str:
        """Return a text; an empty one if it is not given."""
        value = self.get(name)
        if not isinstance(value, str | None):
            raise UserError(f"{name}: a text is needed, not {str(value)[:60]}")
        return value or ""

    def texts(self, name: str) -> list[str]:
        """Return a list of texts."""
        return [str(entry) for entry in self._entries(name, "texts", lambda entry: isinstance(entry, str))]

    def numbers(self, name: str) -> list[float]:
        """Return a list of finite numbers."""
        return [float(entry) for entry in self._entries(name, "finite numbers", _is_number)]

    def listed(self, name: str) -> "list[Arguments]":
        """Return a list of objects."""
        return [Arguments(entry) for entry in self._entries(name, "objects", lambda entry: isinstance(entry, dict))]

    def _entries(self, name: str, what: str, fits: Callable[[FormValue], bool]) -> list[FormValue]:
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(map(fits, value)):
            raise UserError(f"{name}: a list of {what} is needed, not {str(value)[:60]}")
        return value

    def option(self, name: str, choice: Choice) -> Chosen:
        """Return the value of an option as it came; an image as the path of its uploaded file."""
        given = self[name]
        if choice.kind is Kind.IMAGE:
            return str(Arguments(given if isinstance(given, dict) else {}).upload(name))
        if choice.kind is Kind.NUMBERS and isinstance(given, list) and all(map(_is_number, given)):
            return tuple(given)
        if isinstance(given, str | int | float | bool):
            return given
        raise UserError(f"{name}: {describe(choice.option.annotation)} is needed, not {str(given)[:60]}")

    def upload(self, name: str) -> Path:
        """Return the uploaded file that this stands for; no other file of the server's is one, and no address."""
        path = self.get("path")
        if isinstance(path, str):
            file, folder = Path(path).resolve(), Path(get_upload_folder()).resolve()
            if file.is_relative_to(folder) and file.is_file():
                return file
        raise UserError(f"{name}: an uploaded file is needed; paths and addresses are not opened here")


class Reply(JsonObject):
    """What is answered."""


def sample_types() -> dict[str, TypeForm]:
    """Return the parameters of `sample` with their types."""
    choices = (*base_choices(), *upsampler_choices())
    return OTHERS | {choice.name: choice.json_type for choice in choices}


def names() -> dict[str, list[str]]:
    """Return the endpoints with the names of their parameters."""
    return {"sample": list(sample_types()), "settings": ["picture"], "options": [], "models": []}


def add(workshop: Workshop, line: Line) -> None:
    """Add the endpoints to the page that is being built: `sample`, `options`, `models`, `settings`."""
    choices = {choice.name: choice for choice in (*base_choices(), *upsampler_choices())}

    def sample(*values: Json) -> Iterator[Reply]:
        """Make pictures. Yields how far it is, and in the end the files, their seeds, and what should be known."""
        given = Arguments(zip(types, values))
        with telling(as_html=False):
            for said in workshop.work(request_of(given, choices, workshop), line.of_this_job()):
                if isinstance(said, Progress):
                    yield Reply(doing=said.doing, step=said.done, steps=said.total)
                else:
                    files = [_file(path) for path in said.files]
                    yield Reply(pictures=files, seeds=[*said.seeds], remarks=[*said.remarks])

    def options() -> list[Reply]:
        """Tell each option: its name, what it may be, and what it means."""
        return [
            Reply(name=name, type=describe(choice.option.annotation), meaning=choice.meaning)
            for name, choice in choices.items()
        ]

    def models() -> Reply:
        """Tell the names of what is offered, and why the other files of weights are not."""
        contents = workshop.shelf.contents()
        return Reply(
            models=[*contents.names(File.MODEL)],
            upsamplers=[*contents.names(File.UPSAMPLER)],
            loras=[*contents.names(File.LORA)],
            ratings=[*contents.names(File.RATINGS)],
            left_out={**contents.left_out},
        )

    def settings(picture: Arguments) -> Reply:
        """Tell the settings in a picture, as `sample` takes them, and what should be known of them."""
        with telling(as_html=False):
            found = recall(
                Arguments(picture if isinstance(picture, dict) else {}).upload("picture"), workshop.shelf, list(choices)
            )
        asked = Reply(prompts=[*found.prompts], upsamplers=[*found.upsamplers], loras=[*found.loras])
        if found.model is not None:
            asked["model"] = found.model
        asked |= {name: list(value) if isinstance(value, tuple) else value for name, value in found.values.items()}
        return Reply(settings=asked, remarks=[*found.remarks])

    types = sample_types()
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in types]
    _describe(sample, parameters, types)
    gr.api(sample, api_name="sample", concurrency_id=QUEUE, concurrency_limit=1)
    for function in (options, models, settings):
        gr.api(function, api_name=function.__name__, queue=False)


def request_of(given: Arguments, choices: Mapping[str, Choice], workshop: Workshop) -> Request:
    """Return what the arguments of `sample` ask for. Raises UserError; what options may be is checked later."""
    values = OptionValues()
    for name, choice in choices.items():
        if given.get(name) is not None:
            values[name] = given.option(name, choice)
    known = {key.removeprefix(UPSAMPLER): its for key, its in choices.items() if key.startswith(UPSAMPLER)}
    for number, each in enumerate(given.listed("each_upsampler"), start=1):
        for name in each:
            if name not in known:
                raise UserError(f"each_upsampler: {unknown('option', name[:100], known)}")
            values[stage_prefix(number) + name] = each.option(name, known[name])
    files = [entry.upload("image_prompts") for entry in given.listed("image_prompts")]
    weights = given.numbers("image_weights")
    if len(weights) > len(files):
        raise UserError(f"image_weights: {len(weights)} for {len(files)} image_prompts")
    images = [ImagePrompt(file, weight) for file, weight in zip(files, [*weights, *[None] * len(files)])]
    count = given.get("count")
    return Request(
        model=given.text("model") or next(iter(workshop.shelf.names(File.MODEL)), ""),
        upsamplers=tuple(given.texts("upsamplers")),
        loras=tuple(given.texts("loras")),
        prompts=tuple(given.texts("prompts")),
        images=tuple(images),
        count=1 if count is None else count,  # checked with the limits
        values=values,
    )


def _is_number(value: FormValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _file(path: Path) -> Reply:
    """Return a file as Gradio hands it out."""
    return Reply(path=str(path), orig_name=path.name, meta={"_type": "gradio.FileData"})


def _describe(
    function: Callable[..., Iterator[Reply]], parameters: list[inspect.Parameter], types: dict[str, TypeForm]
) -> None:
    """Give a function the parameters that Gradio is to see."""
    function.__signature__ = inspect.Signature(parameters, return_annotation=dict)  # type: ignore[attr-defined]
    function.__annotations__ = {**types, "return": dict}
