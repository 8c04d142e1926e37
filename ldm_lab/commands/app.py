"""Serve a web page to sample from, and the same over HTTP.

    python -m ldm_lab app --checkpoint runs/quickstart              http://127.0.0.1:7860
    python -m ldm_lab app --models runs --port 8000                 the models that lie there, also new ones
    python -m ldm_lab app --models runs --host 0.0.0.0 --password-file secret.txt

It listens on this machine alone unless --host says otherwise. docs/app.md tells what is on the page, and the HTTP
interface with a line for curl.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import add_imports_argument, whole_number
from ldm_lab.commands._flags import add_flags, given
from ldm_lab.config.reading import Option
from ldm_lab.config.registry import part_info
from ldm_lab.errors import UserError
from ldm_lab.sampling.options import ModelOptions

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from ldm_lab.app.shelf import Shelf

LARGEST_PORT = 65_535
LEAST_PASSWORD = 4  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", action="append", default=[], help="a model that is offered; may be given again")
    add("--upsampler", metavar="FILE", action="append", default=[], help="an upsampler that is offered, too")
    add("--lora", metavar="FILE", action="append", default=[], help="a LoRA that is offered, too")
    add("--models", metavar="DIR", help="a folder whose models, upsamplers and LoRAs are offered, also new ones")
    add("--host", default="127.0.0.1", metavar="NAME", help="where to listen (%(default)s: here alone; 0.0.0.0: all)")
    add(
        "--allow-host", metavar="NAME", action="append", default=[],
        help="a name by which it is reached besides, such as that of a server in front of it; may be given again",
    )  # fmt: skip
    add("--port", type=whole_number(0), default=7860, metavar="N", help="(%(default)s; 0 takes a free one)")
    add("--password", metavar="TEXT", help="that the page asks for; it can be read in the list of processes")
    add("--password-file", metavar="FILE", help="a file with the password in its first line")
    _add_limits(parser)
    add_imports_argument(parser)
    add_flags(parser.add_argument_group("the models"), _loading())


def _add_limits(parser: argparse.ArgumentParser) -> None:
    from ldm_lab.app.limits import Limits

    words = {
        "pictures": "pictures", "side": "pixels of a side of a picture", "steps": "steps of a sampler",
        "work": "pictures x steps x megapixels of a picture x prompts, all stages together",
        "megapixels": "megapixels of an uploaded image", "upload": "MiB of an uploaded file",
        "stored": "MiB of uploads and pictures of all users; the oldest are deleted",
        "waiting": "requests in the queue",
    }  # fmt: skip
    group = parser.add_argument_group("the most that one request may ask for")
    for limit in fields(Limits):
        group.add_argument(
            f"--max-{limit.name}", type=whole_number(1), default=limit.default, metavar="N",
            help=f"{words[limit.name]} (%(default)s)",
        )  # fmt: skip


def _loading() -> dict[str, Option]:
    """Return the options of loading that hold for all requests: LoRAs are chosen in each."""
    return {name: option for name, option in part_info("model_options", None).options.items() if name != "lora"}


def run(args: argparse.Namespace) -> None:
    """Serve until a signal ends it. Raises UserError."""
    if not (args.checkpoint or args.models):
        raise UserError("--checkpoint FILE or --models DIR is needed (--help explains)")
    if args.port > LARGEST_PORT:
        raise UserError(f"--port: up to {LARGEST_PORT}, not {args.port}")
    password = _password(args)
    loading = ModelOptions(**given(args, _loading()))

    from ldm_lab.app.limits import Limits
    from ldm_lab.app.server import HERE, Settings, gradio
    from ldm_lab.app.server import run as serve

    gradio()
    words = dict(args._get_kwargs())
    limits = Limits(**{limit.name: words[f"max_{limit.name}"] for limit in fields(Limits)})
    if args.host not in HERE and password is None:
        print(f"note: --host {args.host} without --password-file: everybody who reaches it can draw", flush=True)
    shelf = _shelf(args)
    _fetch_parts(args, loading)
    serve(shelf, Settings(args.host, args.port, password, loading, limits, args.allow_host))


def _shelf(args: argparse.Namespace) -> "Shelf":
    """Return what is offered. Raises UserError for files that are not there, and if no model is among it."""
    from ldm_lab.app.shelf import Kind, Shelf, look_at
    from ldm_lab.checkpoints.importer import find_weights
    from ldm_lab.sampling.loading import locate_model

    given = [
        (flag, kind, name, locate_model(name))
        for flag, kind, names in (
            ("checkpoint", Kind.MODEL, args.checkpoint),
            ("upsampler", Kind.UPSAMPLER, args.upsampler),
        )
        for name in names
    ]
    given += [("lora", Kind.LORA, name, find_weights(name, "lora")) for name in args.lora]
    for flag, kind, name, path in given:
        looked = look_at(path)
        if looked.kind is not kind:
            what = looked.reason if looked.kind is None else f"no {kind.value}: what it holds is: {looked.kind.value}"
            raise UserError(f"--{flag} {name}: {what}")
    named = [path for _, _, _, path in given]
    folder = Path(args.models).expanduser() if args.models else None
    shelf = Shelf(named, folder)
    if not shelf.names(Kind.MODEL):
        where = f"--models {folder}" if folder else "--checkpoint"
        print(f"note: {where}: no model of pictures there yet; the page offers one as soon as there is", flush=True)
    return shelf


def _fetch_parts(args: argparse.Namespace, loading: ModelOptions) -> None:
    """Download what the models of the command line need and is not here: requests download nothing."""
    from ldm_lab.sampling import Pipeline
    from ldm_lab.sampling.needs import announce_models
    from ldm_lab.sampling.options import SamplingOptions

    for checkpoint in args.checkpoint:
        if announce_models(checkpoint, args.upsampler, loading, SamplingOptions()):
            pipelines = [Pipeline.from_checkpoint(checkpoint, loading)]
            for upsampler in args.upsampler:
                pipelines.append(Pipeline.from_checkpoint(upsampler, loading.of_upsampler(), pipelines))


def _password(args: argparse.Namespace) -> str | None:
    """Return the password that the page asks for. Raises UserError for one that is empty or short."""
    if args.password is not None and args.password_file is not None:
        raise UserError("--password and --password-file: one of them is enough")
    password = args.password
    if args.password_file is not None:
        path = Path(args.password_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"--password-file {path}: not a text in UTF-8") from None
        except OSError as error:
            raise UserError(f"--password-file {path}: cannot be read: {error.strerror}") from None
        password = lines[0].strip() if lines else ""
    if password is not None and len(password) < LEAST_PASSWORD:
        raise UserError(f"--password: {LEAST_PASSWORD} characters at least are needed, not {len(password)}")
    return password
