"""The published files that metrics read: names and shapes of their tensors, pinned; foreign files are one line.

Inception: pytorch-fid's pt_inception-2015-12-05-6726825d.pth (`tests/data/inception_tensors.txt`, of the network that
reads it). VGG16: torchvision's vgg16-397923af.pth. LPIPS: the linear layers of version 0.1.
"""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torchvision.models import VGG16_Weights

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.errors import UserError
from ldm_lab.evaluation import inception, perceptual

NORM = ("weight", "bias", "running_mean", "running_var")
# Place in `features` -> channels in and out of VGG16's convolutions, 3x3 each.
VGG = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
       17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}  # fmt: skip
CLASSIFIER = {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}
LPIPS_SUMS = (6.925992, 8.858334, 17.515006, 51.521323, 47.034854)  # of the weights of each layer


def inception_tensors() -> dict[str, list[int]]:
    found = {}
    for line in (Path(__file__).parent / "data" / "inception_tensors.txt").read_text().splitlines():
        name, _, shape = line.partition(" ")
        sizes = [int(size) for size in shape.split("x")] if not line.startswith("#") else []
        if name.startswith("fc."):
            found[name] = sizes
        elif sizes:
            found[f"{name}.conv.weight"] = sizes
            found |= {f"{name}.bn.{part}": sizes[:1] for part in NORM}
    return found


def vgg_tensors() -> dict[str, list[int]]:
    found = {f"features.{i}.weight": [after, before, 3, 3] for i, (before, after) in VGG.items()}
    found |= {f"features.{i}.bias": [after] for i, (_, after) in VGG.items()}
    found |= {f"classifier.{i}.weight": list(shape) for i, shape in CLASSIFIER.items()}
    return found | {f"classifier.{i}.bias": [shape[0]] for i, shape in CLASSIFIER.items()}


def convolutions() -> dict[str, list[int]]:
    return {name: shape for name, shape in vgg_tensors().items() if name.startswith("features.")}


def test_inceptions_tensors_are_those_of_the_published_file():
    expected = inception_tensors()
    assert len(expected) == 94 * 5 + 2 and sum(torch.Size(its).numel() for its in expected.values()) == 23_885_392
    state = inception.Inception().state_dict()
    ours = {name: list(its.shape) for name, its in state.items() if not name.endswith("num_batches_tracked")}
    assert ours == expected


@pytest.mark.parametrize("counters", [True, False], ids=["with-counters", "without"])
def test_a_file_of_these_tensors_is_read(tmp_path, counters):
    """Batch norms' counters are there in some conversions, and in others they are not."""
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(inception_tensors().items())}
    more = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(5) for name in state if "mean" in name}
    torch.save({**state, **(more if counters else {})}, tmp_path / "i.pth", _use_new_zipfile_serialization=counters)
    network, _ = inception.load_inception(tmp_path / "i.pth")
    assert all(torch.equal(its, network.state_dict()[name]) for name, its in state.items())


def test_vggs_tensors_are_those_of_the_published_file():
    sizes = vgg_tensors()
    assert len(sizes) == 32 and sum(torch.Size(its).numel() for its in sizes.values()) == 138_357_544
    state = {name: torch.rand(shape) for name, shape in convolutions().items()}
    features = perceptual.load_features({**state, "classifier.0.weight": torch.zeros(1)}, Path("v"))
    assert all(torch.equal(its, features.state_dict()[name[9:]]) for name, its in state.items())
    assert VGG16_Weights.IMAGENET1K_V1.url.endswith("/vgg16-397923af.pth")
    del state["features.28.bias"]
    with pytest.raises(UserError, match=r"^v: weights of another architecture: 28\.bias is missing$"):
        perceptual.load_features(state, Path("v"))


def test_lpips_linear_layers_are_those_of_version_0_1():
    learned = read_pickled(perceptual.LINEAR_WEIGHTS)
    shapes = {name: list(its.shape) for name, its in learned.items()}
    assert shapes == {f"lin{i}.model.1.weight": [1, width, 1, 1] for i, width in enumerate((64, 128, 256, 512, 512))}
    sums = [float(its.double().sum()) for its in learned.values()]
    assert sums == pytest.approx(LPIPS_SUMS, rel=1e-6) and all(its.min() >= 0 for its in learned.values())


class Code:
    def __reduce__(self):
        return os.system, ("touch run",)


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "code": lambda path: path.write_bytes(pickle.dumps(Code(), 2)),
    "list": lambda path: torch.save([torch.zeros(1)], path),
    "numbers": lambda path: torch.save({"features.0.weight": 3, "fc.bias": 4}, path),
    "number-names": lambda path: torch.save({3: torch.zeros(1)}, path),
    "long-name": lambda path: torch.save({"features.a\nb" * 999: torch.zeros(1)}, path),
    "other": lambda path: torch.save({"features.0.weight": torch.zeros(2), "fc.bias": torch.zeros(1)}, path),
    "whole-numbers": lambda path: torch.save(
        {name: torch.zeros(its, dtype=torch.int8) for name, its in {**convolutions(), **inception_tensors()}.items()},
        path,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    FOREIGN[kind](tmp_path / "w.pth")
    monkeypatch.setattr(perceptual, "LINEAR_WEIGHTS", tmp_path / "w.pth")
    for read in (
        lambda: inception.load_inception(tmp_path / "w.pth"),
        perceptual.learned_weights,
        lambda: perceptual.load_features(read_pickled(tmp_path / "w.pth"), tmp_path / "w.pth"),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1 and "w.pth" in str(caught.value)
        assert len(str(caught.value)) < len(str(tmp_path)) * 2 + 600
    assert not (tmp_path / "run").exists()


def test_another_file_in_the_place_of_vgg_is_refused(tmp_path, monkeypatch):
    """torch looks at the checksum of what it downloads, not of what is there."""
    place = tmp_path / "vgg16-397923af.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, place)
    monkeypatch.setattr(perceptual, "_place_of_features", lambda: place)
    with pytest.raises(UserError, match="not torchvision's VGG16, whose sha256 begins with 397923af; delete it"):
        perceptual.pretrained_features()
    monkeypatch.setattr(perceptual, "LINEAR_WEIGHTS", tmp_path / "none.pth")
    with pytest.raises(UserError, match="no such file"):
        perceptual.learned_weights()
