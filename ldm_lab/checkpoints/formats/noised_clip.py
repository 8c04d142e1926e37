"""Importer of GLIDE's noised CLIP: `clip_image_enc.pt` and `clip_text_enc.pt` of openai/glide-text2im."""

from pathlib import Path

from ldm_lab.checkpoints.importer import Importer, detect_format, register_importer, say_once
from ldm_lab.checkpoints.opened import OpenedFile, Shapes
from ldm_lab.checkpoints.parts import load_strictly
from ldm_lab.errors import UserError
from ldm_lab.guidance.noised_clip import IMAGE_ONLY, TEXT_ONLY, NoisedCLIP

RELEASED = ("glide/clip-image-enc", "glide/clip-text-enc")  # names of `ldm_lab.pretrained.resolve`
HEAD_WIDTH, RELEASED_WIDTHS = 64, (768, 512)  # of a head; of both towers


@register_importer
class NoisedCLIPTower(Importer):
    """One of the two files."""

    kind = "noised_clip"
    title = "a tower of GLIDE's noised CLIP"
    used_by = "CLIP guidance"

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are those of a tower."""
        return tower(file.tensors) is not None


def tower(tensors: Shapes) -> str | None:
    """Return which tower a file's tensors are, "image" or "text"; None if neither."""
    return "image" if IMAGE_ONLY in tensors else "text" if TEXT_ONLY in tensors else None


def load(image: str | Path = RELEASED[0], text: str | Path = RELEASED[1], head_width: int | None = None) -> NoisedCLIP:
    """Return the noised CLIP with the weights of two files, frozen, on the CPU.

    Args:
        image: the image tower's file, or its name in `ldm_lab.pretrained.resolve`.
        text: the text tower's.
        head_width: channels of an attention head, which no shape tells; None: as the released ones, and of towers of
            other widths that is said.

    Raises:
        UserError: missing or damaged file, one that is not that tower, towers that do not belong together, a width that
            such heads do not divide.
    """
    states = {}
    for wanted, name in (("image", image), ("text", text)):
        detected = detect_format(str(name), f"noised CLIP, {wanted} tower")
        found = tower(detected.file.tensors)
        if found != wanted:
            what = f"holds the {found} tower" if found else "is no noised CLIP of GLIDE's"
            raise UserError(f"{detected.path}: {what}; the {wanted} tower is needed here")
        states[wanted] = detected.file.read()
    try:
        config = infer_config(**states)
        net = NoisedCLIP(**config, head_width=_head_width(config, head_width))
    except UserError as error:
        raise UserError(f"{image}, {text}: {error}") from None
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{image}, {text}: no complete noised CLIP ({error} is missing or misshapen)") from None
    load_strictly(net.image_encoder, states["image"], image)
    load_strictly(net.text_encoder, states["text"], text)
    return net.eval().requires_grad_(False)


def _head_width(config: dict[str, int], said: int | None) -> int:
    """Return the channels of an attention head. Raises UserError for a width that they do not divide."""
    widths = {f"{tower} tower": config[f"{tower}_width"] for tower in ("image", "text")}
    width = said or HEAD_WIDTH
    for name, channels in widths.items():
        if channels % width:
            raise UserError(
                f"the {name} is {channels} channels wide, which heads of {width} do not divide; how wide they are "
                "stands in no file: --noised-clip-head-width says it"
            )
    if said is None and tuple(widths.values()) != RELEASED_WIDTHS:
        heads = ", ".join(f"{channels // width} in the {name}" for name, channels in widths.items())
        say_once(f"noised CLIP: attention heads of {width} channels are assumed: {heads}; no file tells that")
    return width


def infer_config(image: Shapes, text: Shapes) -> dict[str, int]:
    """Return the keyword arguments of `NoisedCLIP` that follow from the towers' shapes."""
    image_width, _, patch_size, _ = image["blocks.input.patch_proj"].shape
    places = image["blocks.input.w_pos"].shape[0] - 1
    vocab_size, text_width = text[TEXT_ONLY].shape
    return {
        "image_size": patch_size * round(places**0.5),
        "patch_size": patch_size,
        "image_width": image_width,
        "image_layers": sum(name.endswith(".f_attn.f_q.w") for name in image),
        "text_width": text_width,
        "text_layers": sum(name.endswith(".f_attn.f_q.w") for name in text),
        "embed_dim": image["blocks.output.f.w"].shape[0],
        "vocab_size": vocab_size,
        "text_size": text["blocks.input.w_pos"].shape[0],
        "timesteps": image[IMAGE_ONLY].shape[0],
    }
