"""LPIPS: how different two images look, by the features of VGG16."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics.functional.image as torchmetrics_image
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.config import register
from ldm_lab.downloads import MIB, Download
from ldm_lab.errors import UserError

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
        learned = read_pickled(LINEAR_WEIGHTS)
        self.weights = nn.ParameterList(
            nn.Parameter(learned[f"lin{i}.model.1.weight"].view(1, width, 1, 1)) for i, width in enumerate(GROUP_WIDTHS)
        )  # [1, width, 1, 1] each
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
        UserError: the weights are not in torch's cache and cannot be downloaded, or are damaged.
    """
    released = VGG16_Weights.IMAGENET1K_V1
    place = _place_of_features()
    try:
        state = released.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; a download with another checksum
        raise UserError(
            f"perceptual: LPIPS needs torchvision's VGG16, which could not be downloaded ({error}): "
            f"put {released.url} at {place}, or say perceptual=null to train without LPIPS"
        ) from None
    network = vgg16()
    network.load_state_dict(state)
    return network.features
