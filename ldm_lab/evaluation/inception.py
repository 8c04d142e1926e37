"""The Inception network of FID and KID: TensorFlow's of 2015-12-05, by torchvision's blocks, and its way of resizing.

The weights are the file that pytorch-fid, torch-fidelity and torchmetrics share (`released.yaml`, or by hand). They are
no ImageNet classifier of torchvision's: averages leave the padding out, and the last block takes a maximum.
"""

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import inception
from torchvision.models.inception import BasicConv2d

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.initialization import no_initial_weights
from ldm_lab.checkpoints.parts import load_strictly
from ldm_lab.errors import UserError
from ldm_lab.pretrained.resolve import resolve_weights

SIDE, WIDTH, CLASSES = 299, 2048, 1008  # pixels, features, outputs of the layer behind them, which nothing here reads
RELEASED = "fid/inception_2015_12_05"
COUNTERS = "num_batches_tracked"  # end of the names of what batch norms count in training; the published file has none

log = logging.getLogger(__name__)


def average(x: Tensor) -> Tensor:
    """Return the mean of each 3x3 neighborhood of x [B, C, h, w]; at the edges of what is there."""
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # [B, C, h, w]


def largest(x: Tensor) -> Tensor:
    """Return the maximum of each 3x3 neighborhood of x [B, C, h, w]."""
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)  # [B, C, h, w]


class MixedA(inception.InceptionA):
    """torchvision's block with TensorFlow's average."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), twice, self.branch_pool(average(x))]


class MixedC(inception.InceptionC):
    """torchvision's block with TensorFlow's average."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return [self.branch1x1(x), once, twice, self.branch_pool(average(x))]


class MixedE(inception.InceptionE):
    """torchvision's block with TensorFlow's average, or in the last one its maximum."""

    def __init__(self, channels: int, is_last: bool) -> None:
        super().__init__(channels)
        self.pooled = largest if is_last else average

    def _forward(self, x: Tensor) -> list[Tensor]:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        once = torch.cat([self.branch3x3_2a(once), self.branch3x3_2b(once)], 1)
        twice = torch.cat([self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)], 1)
        return [self.branch1x1(x), once, twice, self.branch_pool(self.pooled(x))]


class Inception(nn.Module):
    """From pixels to the features of the last pooling (Szegedy et al. 2015, arXiv 1512.00567, table 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = MixedA(192, pool_features=32)
        self.Mixed_5c = MixedA(256, pool_features=64)
        self.Mixed_5d = MixedA(288, pool_features=64)
        self.Mixed_6a = inception.InceptionB(288)
        self.Mixed_6b = MixedC(768, channels_7x7=128)
        self.Mixed_6c = MixedC(768, channels_7x7=160)
        self.Mixed_6d = MixedC(768, channels_7x7=160)
        self.Mixed_6e = MixedC(768, channels_7x7=192)
        self.Mixed_7a = inception.InceptionD(768)
        self.Mixed_7b = MixedE(1280, is_last=False)
        self.Mixed_7c = MixedE(2048, is_last=True)
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, levels: Tensor) -> Tensor:
        """Return the features [B, 2048] of images [B, 3, 299, 299] with values 0 to 255."""
        x = (levels - 128) / 128  # [B, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))  # [B, 2048]


def load_inception(weights: str | Path | None = None) -> tuple[Inception, Path]:
    """Return the network with its weights, and their file.

    Args:
        weights: a file in the format of pytorch-fid and torch-fidelity; None takes the released one.

    Raises:
        UserError: no such file, the download failed, or the file has other weights.
    """
    path = resolve_weights(weights or RELEASED, "--inception")
    state = read_pickled(path)
    if odd := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: {odd[0][:60]!r} in it is no tensor; a file as pytorch-fid has it is needed")
    state = {str(name): value for name, value in state.items() if not str(name).endswith(COUNTERS)}
    with no_initial_weights():
        network = Inception()
    state |= {name: value for name, value in network.state_dict().items() if name.endswith(COUNTERS)}
    load_strictly(network, state, path)
    return network.eval().requires_grad_(False), path


def clean_resize(image: Image.Image) -> Tensor:
    """Return a picture as clean-fid hands it to Inception: float32 [3, 299, 299], 0 to 255.

    Each channel by itself as floating point, by Pillow's bicubic filter, which is antialiased, and never rounded
    (Parmar et al. 2021, arXiv 2104.11222, section 3); what overshoots is cut off, as in their program.
    """
    levels = np.asarray(image.convert("RGB"), dtype=np.float32)  # [H, W, 3]
    channels = [Image.fromarray(levels[..., i]) for i in range(3)]  # of mode F
    resized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).clamp_(0, 255)  # [3, 299, 299]
