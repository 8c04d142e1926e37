"""The Inception network of FID: its layers, its file, its way of resizing."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import inception_v3

from ldm_lab.errors import UserError
from ldm_lab.evaluation import inception
from ldm_lab.evaluation.features import InceptionFeatures
from ldm_lab.pretrained.catalogue import catalogue


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Weights under the published file's names, small enough that features stay of one size; no batch counters."""
    torch.manual_seed(0)
    state = inception.Inception().state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif name.endswith("bn.running_var"):
            value.uniform_(0.8, 1.2)
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def test_names_are_those_of_torchvisions_network_without_the_auxiliary_one():
    theirs = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=1008).state_dict()
    ours = inception.Inception().state_dict()
    assert {n: v.shape for n, v in theirs.items()} == {n: v.shape for n, v in ours.items()}


def test_what_differs_from_torchvisions_is_the_pooling(weights, monkeypatch):
    """With torchvision's pooling in place of TensorFlow's the features are torchvision's."""
    theirs = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=1008).eval()
    theirs.load_state_dict(weights, strict=False)
    theirs.fc = torch.nn.Identity()
    levels = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        expected = theirs((levels - 128) / 128)  # [1, 2048]
        ours = inception.Inception()
        ours.load_state_dict(weights, strict=False)
        found = ours(levels)
        monkeypatch.setattr(inception, "average", lambda x: F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        ours.Mixed_7b.pooled = ours.Mixed_7c.pooled = inception.average
        alike = ours(levels)
    torch.testing.assert_close(alike, expected, rtol=1e-3, atol=1e-4)
    assert (found - expected).abs().max() > 1e-2


def test_pooling_is_tensorflows():
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(inception.average(ones), ones)  # torchvision's has 4/9 in the corners
    assert inception.Inception().Mixed_7c.pooled is inception.largest


def test_the_published_file_is_read_and_a_wrong_one_refused(weights, tmp_path):
    torch.save(weights, tmp_path / "inception.pth")
    network, path = inception.load_inception(tmp_path / "inception.pth")
    assert path == tmp_path / "inception.pth"
    torch.testing.assert_close(network.fc.weight, weights["fc.weight"])
    features = InceptionFeatures(str(path))
    assert features.identity["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        inception.load_inception(tmp_path / "other.pth")
    with pytest.raises(UserError, match="no such file"):
        inception.load_inception(tmp_path / "none.pth")


def test_the_released_file_can_be_put_in_place_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("LDM_LAB_OFFLINE", "1")
    entry = catalogue()[inception.RELEASED]
    with pytest.raises(UserError, match=rf"put {entry.file} .* at {tmp_path}"):
        inception.load_inception()
    place = tmp_path / "fid" / "inception_2015_12_05" / entry.file
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"a": torch.zeros(2)}, place)
    with pytest.raises(UserError, match="not fid/inception_2015_12_05: its sha256 is"):
        inception.load_inception()


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (299, 299)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_resizing_is_bicubic_antialiased_and_not_rounded(size):
    """As clean-fid's: channel by channel as floating point; torch's antialiased bicubic filter is another's of it."""
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = inception.clean_resize(Image.fromarray(levels))
    assert found.shape == (3, 299, 299) and found.dtype == torch.float32
    if size == (299, 299):
        assert torch.equal(found, torch.from_numpy(levels).permute(2, 0, 1).float())
        return
    image = torch.from_numpy(levels).permute(2, 0, 1)[None].double()
    expected = F.interpolate(image, size=(299, 299), mode="bicubic", antialias=True, align_corners=False)[0].clamp(
        0, 255
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    assert (found - found.round()).abs().max() > 0.1
