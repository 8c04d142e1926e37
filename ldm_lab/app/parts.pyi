"""Components for files from strangers: what is uploaded is looked at before anything else decodes it."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.components.image_editor import EditorData
from gradio.data_classes import FileData, ImageData
from PIL import Image, ImageChops

from ldm_lab.app.limits import Limits
from ldm_lab.app.work import without_folders
from ldm_lab.errors import UserError

MOST_CANVASES = 32  # that browsers have sent and not used yet

def told(error: UserError) -> gr.Error:
    """Return a user's mistake as the page tells it: escaped, without a traceback in the log."""
    return gr.Error(escaped(without_folders(str(error))), duration=30, print_exception=False)

@contextmanager
def telling() -> Iterator[None]:
    """Turn a user's mistake into what the page tells."""
    try:
        yield
    except UserError as error:
        raise told(error) from None

def escaped(text: str) -> str:
    """Return a text for the page's messages, which take HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

@dataclass(frozen=True)
class Painted:
    """An image to begin with, and what is painted on it.

    Attributes:
        image: the uploaded file.
        mask: where something is painted: white, L; None: nowhere.
    """

    image: Path
    mask: Image.Image | None

class UploadedImage(gr.Image):
    """An image that is handed on as the path of its file, once it is known to be one."""

    is_template = True  # its looks are gr.Image's; so is its constructor, out of whose text Gradio takes what they are
    limits = Limits()

    def preprocess(self, payload: ImageData | None) -> str | None:
        """Return the path. Raises gr.Error: no image, too large a one, one that was not uploaded."""
        if payload is None:
            return None
        return str(_looked_at(self.limits, payload.path, payload.orig_name))
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

class UploadedPicture(gr.File):
    """A file that may hold a picture's settings, handed on as its path."""

    is_template = True

    def __init__(self, label: str, elem_id: str) -> None:
        super().__init__(label=label, elem_id=elem_id, type="filepath", height=110)
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

class MaskEditor(gr.ImageEditor):
    """A picture of the image to begin with, on which a brush says what is painted anew."""

    is_template = True
    limits = Limits()

    def preprocess(self, payload: EditorData | None) -> Image.Image | None:  # type: ignore[override]
        """Return where something is painted, L, white; None for nowhere. Raises gr.Error for too large a picture."""
        if payload is None:
            return None
        canvas = payload if payload.id is None else self.blob_storage.pop(payload.id, None)
        mask: Image.Image | None = None
        for layer in canvas.layers if canvas is not None else ():
            if layer is not None:
                painted = self._alpha(layer)
                mask = painted if mask is None or mask.size != painted.size else ImageChops.lighter(mask, painted)
        return mask if mask is not None and mask.getbbox() else None

    def _alpha(self, layer: FileData | bytes) -> Image.Image:
        data = Path(layer.path).read_bytes() if isinstance(layer, FileData) else layer
        with telling():
            return self.limits.decode(data, "mask").convert("RGBA").getchannel("A")
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

def _looked_at(limits: Limits, path: str | None, name: str | None) -> Path:
    """Return the path of an uploaded image. Raises gr.Error."""
    with telling():
        if not path or "://" in path:
            raise UserError("an image is uploaded; addresses are not fetched")
        limits.open_upload(Path(path), name or "")
        return Path(path)
