"""The HTTP interface: what the page does, for programs. Every option of sampling is a parameter of `sample`."""

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from ldm_lab.app.choices import Choice, Kind, base_choices, upsampler_choices
from ldm_lab.app.page import QUEUE
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
    """What a request gives, by the names of the parameters."""


def add(workshop: Workshop) -> None:
    """Add the endpoints to the page that is being built: `sample`, `options`, `models`, `settings`."""
    choices = {choice.name: choice for choice in (*base_choices(), *upsampler_choices())}

    def sample(*values: Json) -> Iterator[JsonObject]:
        """Make pictures. Yields how far it is, and in the end the files, their seeds, and what should be known."""
        given = Arguments(zip((*OTHERS, *choices), values))
        with tempfile.TemporaryDirectory() as folder, telling():
            for said in workshop.work(request_of(given, choices, workshop), Path(folder)):
                if isinstance(said, Progress):
                    yield JsonObject(doing=said.doing, step=said.done, steps=said.total)
                else:
                    files: list[Json] = [_file(path) for path in said.files]
                    yield JsonObject(pictures=files, seeds=[*said.seeds], remarks=[*said.remarks])

    def options() -> list[JsonObject]:
        """Tell each option: its name, what it may be, and what it means."""
        return [
            JsonObject(name=name, type=describe(choice.option.annotation), meaning=choice.meaning)
            for name, choice in choices.items()
        ]

    def models() -> JsonObject:
        """Tell the names of what is offered."""
        return JsonObject({f"{kind.name.lower()}s": [*workshop.shelf.names(kind)] for kind in File})

    def settings(picture: dict) -> JsonObject:  # type: ignore[type-arg]
        """Tell the settings in a picture, as `sample` takes them."""
        with telling():
            found = recall(_uploaded(picture, "picture"), workshop.shelf, list(choices))
        asked = {"prompts": found.prompts, "model": found.model, "upsamplers": found.upsamplers, "loras": found.loras}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in found.values.items()}
        return JsonObject({**asked, **values, "remarks": found.remarks})

    types = OTHERS | {name: choice.json_type for name, choice in choices.items()}
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in types]
    _describe(sample, parameters, types)
    gr.api(sample, api_name="sample", concurrency_id=QUEUE, concurrency_limit=1)
    for function in (options, models, settings):
        gr.api(function, api_name=function.__name__, queue=False)


def request_of(given: Arguments, choices: Mapping[str, Choice], workshop: Workshop) -> Request:
    """Return what the arguments of `sample` ask for. Raises UserError; types of options are checked with them."""
    models = workshop.shelf.names(File.MODEL)
    values = OptionValues()
    for name, choice in choices.items():
        if given.get(name) is not None:
            values[name] = _value(choice, given[name])
    known = {key.removeprefix(UPSAMPLER): its for key, its in choices.items() if key.startswith(UPSAMPLER)}
    for number, each in enumerate(_entries(given, "each_upsampler"), start=1):
        if not isinstance(each, dict):
            raise UserError("each_upsampler: options by name are needed for each, or {}")
        for name, value in each.items():
            if name not in known:
                raise UserError(f"each_upsampler: {unknown('option', name[:100], known)}")
            values[stage_prefix(number) + name] = _value(known[name], value)
    weights = _entries(given, "image_weights")
    files = [_uploaded(entry, "image_prompts") for entry in _entries(given, "image_prompts")]
    if len(weights) > len(files) or not all(_is_number(weight) for weight in weights if weight is not None):
        raise UserError("image_weights: a number for each of image_prompts is needed, at most")
    images = [ImagePrompt(file, weight) for file, weight in zip(files, [*weights, *[None] * len(files)])]
    count = given.get("count")
    return Request(
        model=_text(given, "model") or next(iter(models), ""),
        upsamplers=tuple(_texts(given, "upsamplers")),
        loras=tuple(_texts(given, "loras")),
        prompts=tuple(_texts(given, "prompts")),
        images=tuple(images),
        count=1 if count is None else count,  # type: ignore[arg-type]  # checked with the limits
        values=values,
    )


def _value(choice: Choice, given: Json) -> str | int | float | bool | tuple[float, ...]:
    """Return the value of an option as it came; an image as the path of its uploaded file."""
    if choice.kind is Kind.IMAGE:
        return str(_uploaded(given, choice.name))
    if isinstance(given, list) and choice.kind is Kind.NUMBERS and all(map(_is_number, given)):
        return tuple(given)  # type: ignore[arg-type]
    if isinstance(given, str | int | float | bool):
        return given
    raise UserError(f"{choice.name}: {describe(choice.option.annotation)} is needed, not {str(given)[:60]}")


def _uploaded(given: Json, name: str) -> Path:
    """Return the file that was uploaded. Raises UserError for a path of the server's, an address, or anything else."""
    path = given.get("path") if isinstance(given, dict) else None
    if isinstance(path, str):
        file, folder = Path(path).resolve(), Path(get_upload_folder()).resolve()
        if file.is_relative_to(folder) and file.is_file():
            return file
    raise UserError(f"{name}: a file that was uploaded to this server is needed; paths and addresses are not opened")


def _entries(given: Arguments, name: str) -> list[Json]:
    value = given.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{name}: a list is needed, not {str(value)[:60]}")
    return value


def _texts(given: Arguments, name: str) -> list[str]:
    entries = _entries(given, name)
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{name}: a list of texts is needed, not {str(entries)[:60]}")
    return list(map(str, entries))


def _text(given: Arguments, name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str | None):
        raise UserError(f"{name}: a text is needed, not {str(value)[:60]}")
    return value or ""


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _file(path: Path) -> JsonObject:
    """Return a file as Gradio hands it out."""
    return JsonObject(path=str(path), orig_name=path.name, meta={"_type": "gradio.FileData"})


def _describe(
    function: Callable[..., Iterator[JsonObject]], parameters: list[inspect.Parameter], types: dict[str, TypeForm]
) -> None:
    """Give a function the parameters that Gradio is to see."""
    function.__signature__ = inspect.Signature(parameters, return_annotation=dict)  # type: ignore[attr-defined]
    function.__annotations__ = {**types, "return": dict}
