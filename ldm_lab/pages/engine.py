"""The templates of pages: escaping, what a page may load, and scripts and styles inside of it."""

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ldm_lab.io.atomic import atomic_write

FOLDER = Path(__file__).parent / "templates"
REMOTE_IMAGES = ("http://", "https://", "data:image/jpeg;base64,", "data:image/png;base64,")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Values that scripts read; a subclass has fields of its own, which reach them as an object of JSON."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a template shows; a page of some kind is a subclass with fields of its own, `page.NAME` in its template.

    Attributes:
        template: file in `templates/`, which extends base.html.
        styles: further style sheets there, after base.css.
        scripts: script files there, which run in this order when the page is there; `data(name)` is defined by then.
        remote_images: whether images of the web are shown; otherwise nothing is loaded but from the page's own folder.
        title: the heading.
        data: what scripts read, by name; NaN and infinity reach them as null.
    """

    template: ClassVar[str]
    styles: ClassVar[Sequence[str]] = ()
    scripts: ClassVar[Sequence[str]] = ()
    remote_images: ClassVar[bool] = False
    title: str
    data: Mapping[str, Data] = field(default_factory=dict)


def render(page: Page) -> str:
    """Return the page as one HTML file."""
    script = "\n".join(map(_text, ("base.js", *page.scripts))) if page.scripts else ""
    return (
        _environment()
        .get_template(page.template)
        .render(
            page=page,
            style="\n".join(map(_text, ("base.css", *page.styles))),
            script=script,
            data={name: json_text(value) for name, value in page.data.items()},
            policy=_policy(script, page.remote_images),
        )
    )


def write_page(path: str | Path, page: Page) -> None:
    """Write the page in one step. Raises UserError if the file cannot be written."""
    content = render(page).encode(errors="replace")  # names of files may be bytes that are no text
    with atomic_write(path) as file:
        file.write(content)


def json_text(value: Data) -> str:
    """Return values as JSON that may stand between <script> tags, whatever texts are in it."""
    fields = asdict(value)
    try:
        text = json.dumps(fields, allow_nan=False)  # in ASCII: half a surrogate pair is an escape, too
    except ValueError:  # NaN and infinity, which JSON has not
        text = json.dumps(json.loads(json.dumps(fields), parse_constant=lambda _: None))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(script: str, remote_images: bool) -> str:
    """Return the content security policy: no script but the page's own, nothing from elsewhere unless it is said."""
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    images = "'self' file: data: blob:" + (" http: https:" if remote_images else "")
    allowed = f"'sha256-{digest}'" if script else "'none'"
    return (
        f"default-src 'none'; img-src {images}; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


def _image_address(address: str) -> str:
    """Return the address if it is one of an image that may be shown, otherwise an empty text."""
    return address if address.lower().startswith(REMOTE_IMAGES) else ""


def _text(name: str) -> str:
    """Return a style sheet or script of ours."""
    text = (FOLDER / name).read_text(encoding="utf-8").strip()
    assert "</script" not in text and "</style" not in text, name
    return text


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["image_address"] = _image_address
    return environment
