"""What an evaluation is asked for."""

from dataclasses import dataclass, field
from pathlib import Path

from ldm_lab.config import PartConfig
from ldm_lab.evaluation.settings import RowNames, row_names
from ldm_lab.metrics import of_kind
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import SamplingOptions


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        metrics: their names.
        out: folder of the results, and of what is kept on the way.
        checkpoints: of models.
        choices: how each is asked; `batch_size` is that of the passes.
        images: folders of pictures that are there.
        data: section of the real images; None for none.
        features: a file with their features in place of the one in `out`.
        limit: real images that are taken; None takes all.
        prompts: None takes captions of the real images.
        pictures: that are made of each seed.
        seeds: of pictures.
        clip: section of the conditioner whose embeddings are compared; None takes the first model's.
        inception: file of Inception's weights; None takes the released one.
        bootstrap: how often pictures are drawn again for a margin, where there is one seed.
    """

    metrics: list[str]
    out: Path
    checkpoints: list[str] = field(default_factory=list)
    choices: list[SamplingOptions] = field(default_factory=lambda: [SamplingOptions()])
    images: list[str] = field(default_factory=list)
    data: PartConfig | None = None
    features: Path | None = None
    limit: int | None = None
    prompts: list[Prompt] | None = None
    pictures: int = 1000
    seeds: tuple[int, ...] = (0,)
    clip: PartConfig | None = None
    inception: str | None = None
    bootstrap: int = 20

    @property
    def names(self) -> RowNames:
        """What models and folders are called in the table. Raises UserError for one that is given twice."""
        return row_names(self.checkpoints, self.images)

    @property
    def named_models(self) -> list[tuple[str, str]]:
        """(name, checkpoint) of each model."""
        return list(zip(self.names.models, self.checkpoints, strict=True))

    @property
    def of_pictures(self) -> list[str]:
        """The metrics that look at pictures."""
        return of_kind(self.metrics, "pictures", "captions")

    @property
    def makes_pictures(self) -> bool:
        """Whether models are asked for pictures."""
        return bool(self.of_pictures and self.checkpoints)
