"""The CLOOB models of the paper's authors as conditioners: embeddings as their own code's.

The case was recorded with their code: three pictures, four texts, the weights that `parity.fill` gives.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.fill import fill
from PIL import Image

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.embed import Encoder, clip_config
from ldm_lab.errors import UserError

CASE = np.load(Path(__file__).parent / "data/cases/weights/cloob_jku.npz")
TEXTS = ["a lighthouse at night", "Two RED stars &amp; a dog!", "été à la mer 2021", ""]


@functools.cache
def state(tower: str) -> dict[str, torch.Tensor]:
    shapes = json.loads(CASE[f"{tower}_shapes"].tobytes())
    found = {name: fill(name, shape, 7).reshape(shape) for name, shape in shapes.items()}
    variances = {name: value.abs() + 1 for name, value in found.items() if name.endswith("running_var")}
    counts = {name: torch.tensor(0) for name in found if name.endswith("num_batches_tracked")}
    return {**found, **variances, **counts}


def checkpoint(tower: str, path: Path) -> Path:
    """What their training writes."""
    tensors = {f"module.{name}": value for name, value in state(tower).items()}
    tensors["module.logit_scale_hopfield"] = torch.tensor(2.0)
    whole = {"epoch": 28, "name": "a", "model_config_file": "RN50.json", "state_dict": tensors, "optimizer": {}}
    torch.save(whole, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("tower", ["resnet", "vit"])
def test_embeddings_are_those_of_their_own_code(tmp_path, tower):
    path = checkpoint(tower, tmp_path / "cloob.pt")
    part = load_part("conditioner", {"name": "clip", "weights": str(path)})
    images = [Image.fromarray(array) for array in CASE["images"]]
    found = part.from_prompts(TEXTS, images)["embed"]
    texts, pictures = torch.from_numpy(CASE[f"{tower}_text"]), torch.from_numpy(CASE[f"{tower}_image"])
    assert (found[: len(TEXTS)] - texts).abs().max() < 1e-5
    assert (found[len(TEXTS) :] - pictures).abs().max() < 1e-5
    assert torch.equal(part.tokenize(TEXTS).int(), torch.from_numpy(CASE[f"{tower}_tokens"]))


def test_what_is_known_of_it_and_where_it_goes(tmp_path, capsys):
    path = checkpoint("resnet", tmp_path / "cloob.pt")
    assert not main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "a CLOOB of ml-jku's" in out and "epoch       28" in out and "layers: [1, 2, 1, 1]" in out
    ours = tmp_path / "cloob.safetensors"
    assert not main(["convert", str(path), str(ours)])
    one, other = (load_part("conditioner", {"name": "clip", "weights": str(p)}) for p in (path, ours))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    with pytest.raises(UserError, match=r"it holds a CLOOB of ml-jku's \(conditioner.name: clip takes it\)"):
        load_part("conditioner", {"name": "cloob", "weights": str(path)})
    for file in (path, ours):
        assert Encoder(clip_config([f"weights={file}"], None)).embed_dim == 12, "no model's name is needed"


def test_one_that_is_not_whole(tmp_path):
    tensors = {name: value for name, value in state("resnet").items() if "attnpool.positional" not in name}
    torch.save(tensors, tmp_path / "a.pt")
    assert detect_format(tmp_path / "a.pt").kind == "cloob_jku"
    with pytest.raises(UserError, match="not a complete CLOOB"):
        load_part("conditioner", {"name": "clip", "weights": str(tmp_path / "a.pt")})
