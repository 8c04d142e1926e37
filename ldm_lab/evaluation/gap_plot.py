"""A picture of two clouds of embeddings, as they are and without their means."""

from pathlib import Path

import torch
from torch import Tensor

from ldm_lab.conditioners.gap import Gap
from ldm_lab.io.atomic import atomic_write

SHOWN = 500  # points of each cloud
COLORS = {"images": "#2563a8", "texts": "#c2410c"}


def principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] and the two main directions [D, 2] of rows [n, D], always with the same signs."""
    mean = rows.mean(0)  # [D]
    _, _, v = torch.linalg.svd((rows - mean).double(), full_matrices=False)  # [k, D]
    axes = v[:2].T.float()  # [D, 2]
    strongest = axes.abs().argmax(0)  # [2]
    return mean, axes * axes[strongest, torch.arange(2)].sign()  # [D], [D, 2]


def plot_clouds(path: Path, images: Tensor, texts: Tensor, captions: Tensor, gap: Gap) -> None:
    """Write a picture (PNG) of both clouds in their two main directions (PCA): left as they are, right as shifted.

    Args:
        path: of the picture.
        images: embeddings [N, D], unit rows.
        texts: of no image in particular, [m, D].
        captions: of the images, [n, D]; none in place of `texts` without.
        gap: what shifts them.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second
    from matplotlib.figure import Figure

    said = captions if len(captions) > 1 else texts
    shown = (
        torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long(),
        torch.linspace(0, len(said) - 1, min(SHOWN, len(said))).long(),
    )
    figure = Figure(figsize=(8, 3.8), dpi=80)
    for place, (title, (image, text)) in enumerate(
        {"as they are": (images, said), "as the model is told them": (gap.images(images), gap.texts(said))}.items()
    ):
        image, text = image[shown[0]], text[shown[1]]  # [n, D] each
        mean, axes = principal(torch.cat([image, text]))
        plane = figure.add_subplot(1, 2, place + 1)
        for name, rows in (("images", image), ("texts", text)):
            xy = ((rows - mean) @ axes).numpy()  # [n, 2]
            plane.scatter(xy[:, 0], xy[:, 1], s=5, alpha=0.6, color=COLORS[name], label=name, linewidths=0)
        plane.set_title(title)
        plane.set_aspect("equal", "datalim")
        plane.set_xticks([])
        plane.set_yticks([])
    figure.axes[0].legend(loc="best", markerscale=3)
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        canvas.print_png(file)
