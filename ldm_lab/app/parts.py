"""Components for files from strangers: what is uploaded is looked at before anything else decodes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from gradio.components.image_editor import EditorData
from gradio.data_classes import FileData, ImageData
from gradio.utils import LRUCache
from PIL import Image, ImageChops

from ldm_lab.app.folders import without_folders
from ldm_lab.app.limits import Limits
from ldm_lab.errors import UserError
from ldm_lab.io.images import to_rgb

CANVAS = 640  # pixels
MOST_CANVASES = 32  # that browsers have sent and not used yet


@contextmanager
def telling(as_html: bool = True) -> Iterator[None]:
    """Turn a user's mistake into what the page tells, or a program is told; without a traceback in the log."""
    try:
        yield
    except UserError as error:
        text = without_folders(str(error))
        raise gr.Error(escaped(text) if as_html else text, duration=30, print_exception=False) from None


def escaped(text: str) -> str:
    """Return a text for the page's messages, which take HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def preview(limits: Limits, path: str | None) -> Image.Image | None:
    """Return an uploaded image to be painted on: upright, RGB, its longer side of `CANVAS` pixels."""
    if path is None:
        return None
    with telling():
        image = to_rgb(limits.open_upload(Path(path)))
        scale = CANVAS / max(image.size)
        return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def uploaded_image(limits: Limits, label: str, elem_id: str) -> gr.Image:
    """Return a component whose image is handed on as the path of its file, once it is known to be one.

    It raises gr.Error for what is no image, too large, or was not uploaded. The component is changed rather than its
    class derived from, as Gradio writes a file beside every derived class.
    """
    made = gr.Image(label=label, elem_id=elem_id, type="filepath", sources=["upload", "clipboard"], height=200)

    def preprocess(payload: ImageData | None) -> str | None:
        return None if payload is None else str(_looked_at(limits, payload.path, payload.orig_name))

    made.preprocess = preprocess
    return made


def mask_editor(limits: Limits, label: str, elem_id: str) -> gr.ImageEditor:
    """Return a component on which a brush says what of an image is painted anew: white, L; None for nothing."""
    brush = gr.Brush(default_size=24, colors=["#ffffff"], color_mode="fixed")
    made = gr.ImageEditor(
        label=label, elem_id=elem_id, type="pil", format="png", brush=brush, layers=False, transforms=(),
        sources=(), height=420, buttons=["fullscreen"],
    )  # fmt: skip
    made.blob_storage = LRUCache(MOST_CANVASES)

    def preprocess(payload: EditorData | None) -> Image.Image | None:
        if payload is None:
            return None
        canvas = payload if payload.id is None else made.blob_storage.pop(payload.id, None)
        mask: Image.Image | None = None
        for layer in canvas.layers if canvas is not None else ():
            if layer is not None:
                painted = _alpha(limits, layer)
                mask = painted if mask is None or mask.size != painted.size else ImageChops.lighter(mask, painted)
        return mask if mask is not None and mask.getbbox() else None

    made.preprocess = preprocess
    return made


def _alpha(limits: Limits, layer: FileData | bytes) -> Image.Image:
    data = Path(layer.path).read_bytes() if isinstance(layer, FileData) else layer
    with telling():
        return limits.decode(data, "mask").convert("RGBA").getchannel("A")


def _looked_at(limits: Limits, path: str | None, name: str | None) -> Path:
    """Return the path of an uploaded image. Raises gr.Error."""
    with telling():
        if not path or "://" in path:
            raise UserError("an image is uploaded; addresses are not fetched")
        limits.open_upload(Path(path), name or "")
        return Path(path)
