"""LPIPS: how different two images look, by the features of VGG16."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics.functional.image as torchmetrics_image
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.initialization import no_initial_weights
from ldm_lab.checkpoints.parts import check_finite, check_strictly, load_strictly
from ldm_lab.config import register
from ldm_lab.downloads import MIB, Download
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256

# Layers of torchvision's `vgg16().features` behind which its five groups of convolutions end.
GROUP_ENDS = (4, 9, 16, 23, 30)
GROUP_WIDTHS = (64, 128, 256, 512, 512)
# Mean and standard deviation of ImageNet's channels, carried over from [0, 1] to [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LINEAR_WEIGHTS = Path(torchmetrics_image.__file__).parent / "lpips_models" / "vgg.pth"


@register("perceptual")
class LPIPS(nn.Module):
    """Learned perceptual image patch similarity on VGG16, version 0.1 (Zhang et al. 2018, arXiv 1801.03924, eq. 1)."""

    def __init__(self, features: nn.Sequential, *, weight: float = 1.0) -> None:
        """Put the learned weights of the features' differences, which torchmetrics brings, on the features.

        Args:
            features: `vgg16().features`; `pretrained_features` gives the trained ones.
            weight: factor on the distance in the autoencoder's loss.
        """
        super().__init__()
        self.weight = weight
        self.groups = nn.ModuleList(features[a:b] for a, b in zip((0, *GROUP_ENDS), GROUP_ENDS))
        self.weights = nn.ParameterList(nn.Parameter(its) for its in learned_weights())  # [1, width, 1, 1] each
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))  # [1, 3, 1, 1]
        self.register_buffer("divisor", torch.tensor(SCALE).view(1, 3, 1, 1))  # [1, 3, 1, 1]
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance per pair, [B], of images [B, 3, H, W] in [-1, 1]; 0 is equal, 1 very different."""
        x = (torch.cat([a, b]) - self.shift) / self.divisor  # [2B, 3, H, W]
        distance = x.new_zeros(len(a))  # [B]
        for group, weight in zip(self.groups, self.weights):
            x = group(x)  # [2B, width, h, w]
            # Not F.normalize: LPIPS has its epsilon below the root.
            unit = x * (x.square().sum(1, keepdim=True) + 1e-8).rsqrt()  # [2B, width, h, w]
            difference = (unit[: len(a)] - unit[len(a) :]).square()  # [B, width, h, w]
            distance = distance + F.conv2d(difference, weight).mean((1, 2, 3))  # [B]
        return distance


def learned_weights() -> list[Tensor]:
    """Return the weights of the features' differences, [1, width, 1, 1] each. Raises UserError for a damaged file."""
    names = {f"lin{i}.model.1.weight": torch.empty(1, width, 1, 1) for i, width in enumerate(GROUP_WIDTHS)}
    if not LINEAR_WEIGHTS.is_file():
        raise UserError(f"{LINEAR_WEIGHTS}: no such file (LPIPS), which the package torchmetrics brings")
    state = read_pickled(LINEAR_WEIGHTS)
    check_strictly(names, state, LINEAR_WEIGHTS)
    check_finite(names, state, LINEAR_WEIGHTS)
    return [state[name] for name in names]


def features_download() -> list[Download]:
    """Return what `pretrained_features` would download, if it is not in torch's cache."""
    released = VGG16_Weights.IMAGENET1K_V1
    place = _place_of_features()
    size = int(released.meta["_file_size"] * MIB)  # to a tenth of a MiB
    return [] if place.is_file() else [Download("perceptual", "torchvision's VGG16", place, size, (released.url,))]


def _place_of_features() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]


def pretrained_features() -> nn.Sequential:
    """Return the convolutions of torchvision's VGG16, trained on ImageNet; downloaded once, 528 MB.

    Raises:
        UserError: the weights are not in torch's cache and cannot be downloaded, or are others.
    """
    released = VGG16_Weights.IMAGENET1K_V1
    place = _place_of_features()
    if place.is_file():  # torch looks at the checksum of what it downloads alone
        begins = place.stem.rpartition("-")[2]
        if not sha256(place).startswith(begins):
            raise UserError(f"{place}: not torchvision's VGG16, whose sha256 begins with {begins}; delete it")
        state = read_pickled(place)
    else:
        try:
            state = released.get_state_dict(check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # no network; a download with another checksum
            raise UserError(
                f"perceptual: LPIPS needs torchvision's VGG16, which could not be downloaded ({error}): "
                f"put {released.url} at {place}, or say perceptual=null to train without LPIPS"
            ) from None
    return load_features(state, place)


def load_features(state: dict[str, Tensor], path: Path) -> nn.Sequential:
    """Return the convolutions of VGG16 with the weights of a file of torchvision's; its classifier is left out.

    Raises:
        UserError: the file has other tensors.
    """
    prefix = "features."
    kept = {name.removeprefix(prefix): its for name, its in state.items() if str(name).startswith(prefix)}
    with no_initial_weights():
        features = vgg16().features
    if odd := [str(name) for name, its in kept.items() if not isinstance(its, Tensor)]:
        raise UserError(f"{path}: {prefix}{odd[0]} is no tensor")
    load_strictly(features, kept, path)
    return features
