"""Files of every format in which a tensor has another shape, rank or type, or claims to be huge: one line for each.

What a config in a file asks for is not built before it is known to be about as large as the weights.
"""

import functools
import random

import pytest
import test_diffusers_vae
import test_imagen_unet
import test_importers
import torch
from tiny import DENOISER, embedding
from tiny_glide import pipeline
from tiny_if import diffusers_unet, tiny_if

from ldm_lab.checkpoints.importer import Section, config_problems, detect_format
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.native import save_model
from ldm_lab.checkpoints.parts import build_for, build_on_meta, check_strictly, load_module, load_strictly
from ldm_lab.commands.inspect import describe
from ldm_lab.config import build
from ldm_lab.errors import UserError

FORMATS = {
    "ccld": lambda: {**test_importers.unet().state_dict(), "autoencoder_scale": torch.tensor(2.5)},
    "compvis": lambda: test_importers.released(test_importers.autoencoder()),
    "diffusers_vae": lambda: test_diffusers_vae.theirs(block_out_channels=(32, 32), norm_num_groups=32).state_dict(),
    "glide": lambda: pipeline(upsampler=True).model.denoiser.state_dict(),
    "imagen": lambda: test_imagen_unet.theirs(test_imagen_unet.stages()[0]),
    "imagen 1.7": lambda: test_imagen_unet.theirs(test_imagen_unet.stages("group")[1], True),
    "if": lambda: tiny_if(True).state_dict(),
    "diffusers_if": lambda: diffusers_unet(True).state_dict(),
    "head": lambda: {"weight": torch.randn(1, 6), "bias": torch.zeros(1)},
}
CHANGES = {
    "scalar": lambda value: torch.tensor(1.0),
    "nothing": lambda value: torch.zeros(0),
    "no rows": lambda value: torch.zeros([0] * value.ndim),
    "flat": lambda value: torch.cat([value.flatten(), torch.zeros(1)]),
    "deeper": lambda value: value[None],
    "longer": lambda value: torch.cat([value, value], -1) if value.ndim else torch.zeros(2),
    "whole": lambda value: torch.zeros(3, *value.shape, dtype=torch.int64),
    "huge": lambda value: torch.zeros(1, dtype=torch.float16).expand(1 << 20, 1 << 20),
    "tall": lambda value: torch.zeros(1, dtype=torch.float16).expand(1 << 33, *[1] * max(value.ndim - 1, 0)),
}
# (format, tensor, change): shapes that everything else is read off, and those that ended in a traceback once.
CASES = [
    ("ccld", "net.0.main.0.weight", "no rows"),
    ("ccld", "mapping.0.main.0.weight", "tall"),
    ("ccld", "mapping_timestep_embed.weight", "nothing"),
    ("compvis", "encoder.conv_in.weight", "flat"),
    ("compvis", "encoder.conv_in.weight", "deeper"),
    ("diffusers_vae", "encoder.conv_in.weight", "tall"),
    ("imagen 1.7", "ups.0.2.layers.0.1.1.weight", "no rows"),
    ("diffusers_if", "add_embedding.norm1.weight", "scalar"),
    ("diffusers_if", "mid_block.attentions.0.add_k_proj.weight", "scalar"),
    ("if", "out.2.weight", "huge"),
]


@functools.cache
def base(form: str) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in FORMATS[form]().items()}


def use(path) -> None:
    """Do with a file what `inspect`, `convert`, `weights:` and `--checkpoint` do."""
    found = detect_format(path)
    describe(found)
    if not (found.importer.holds_model or found.importer.parts):
        raise UserError(f"{path}: holds {found.title}")
    if found.importer.holds_model:
        loaded = found.importer.read_model(found.file, True, Section())
        if problems := config_problems(loaded.config):
            raise UserError(problems[0])
        shape = found.importer.denoiser_shape(found.file, True)
        assert shape is not None
        section = loaded.config["denoiser"]
        check_strictly(build_on_meta(path, "denoiser", section, *shape).state_dict(), loaded.state, path)
        load_strictly(build_for(loaded.state, path, "denoiser", section, *shape), loaded.state, path)
    for role, name in found.importer.parts.items():
        embedder = {"embedder": {"name": "clip", "model": "ViT-B-32", "pretrained": "openai"}}
        load_module(role, Section({"name": name, **(embedder if role == "head" else {})}), found)


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        use(path)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(("form", "name", "change"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_tensor_of_another_shape_is_one_line(form, name, change, tmp_path):
    state = base(form)
    torch.save({**state, name: CHANGES[change](state[name])}, tmp_path / "w.pt")
    said = refused(tmp_path / "w.pt")
    assert change not in ("huge", "tall") or "the file has fewer numbers than that" in said


@pytest.mark.parametrize("form", FORMATS)
def test_any_tensor_of_any_other_shape_is_one_line(form, tmp_path):
    """A draw of all pairs of tensors and changes."""
    state, draw = base(form), random.Random(form)
    for _ in range(4):
        name, change = draw.choice(sorted(state)), draw.choice(sorted(CHANGES))
        torch.save({**state, name: CHANGES[change](state[name])}, tmp_path / "w.pt")
        refused(tmp_path / "w.pt")


def test_a_config_in_a_file_that_asks_for_more_than_its_weights_is_not_built(tmp_path):
    network = build("denoiser", DENOISER, 3, embedding(8))
    config = {"denoiser": {**DENOISER, "base_channels": 1 << 16, "mapping_width": 1 << 16}}
    save_model(tmp_path / "m.safetensors", network.state_dict(), config, {"step": "3"})
    loaded = read_model(tmp_path / "m.safetensors")
    with pytest.raises(
        UserError, match=r"a denoiser as its config and shapes say has [\d,]+ numbers, the file [\d,]+$"
    ):
        build_for(loaded.state, "m", "denoiser", loaded.config["denoiser"], 3, embedding(8))
