"""What a model's parts make of real images: the loss by noise level, reconstructions, retrieval. Nothing is sampled."""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm_lab.batch import Batch
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.conditions import Conditions
from ldm_lab.data.jobs import Fingerprint
from ldm_lab.data.source import Item, Source
from ldm_lab.data.work_items import WorkItem
from ldm_lab.errors import UserError
from ldm_lab.evaluation.feature_files import FEATURES, SUMS, VALUES, PictureRows
from ldm_lab.evaluation.features import Features, rows_of
from ldm_lab.evaluation.held_out import QUARTERS, HeldOutBatch, loss_sums, noise_of
from ldm_lab.evaluation.jobs import ImagesJob
from ldm_lab.evaluation.metrics import RealSet, Value, by_bootstrap, distance
from ldm_lab.evaluation.perceptual import LPIPS
from ldm_lab.evaluation.reading import FromSource, PictureBatch
from ldm_lab.io.images import to_images
from ldm_lab.metrics import METRICS, of_kind
from ldm_lab.sampling import Model

RECONSTRUCTED = ("psnr", "lpips", "rfid", "rfd")
LEVELS = 4  # times at which each image is looked at, as `held_out.levels`
LOSS = SUMS + "loss"
IMAGE_EMBED, TEXT_EMBED = "embeds.image", "embeds.text"
RANKS = (1, 5)


class PartsJob(ImagesJob[Item]):
    """Measures a model's parts on the images of a data source."""

    def __init__(
        self, model: Model, identity: str, names: Sequence[str], networks: Sequence[Features], source: Source,
        lpips: LPIPS | None, tells: bool,
    ) -> None:  # fmt: skip
        """Take what is measured.

        Args:
            model: whose parts; they go to the device of the pass.
            identity: of the model and its parts' weights (`Models.identity`).
            names: of metrics of the kind "data".
            networks: those that look at reconstructions.
            source: opened.
            lpips: the perceptual distance, if that is asked for.
            tells: whether to say at the start what the data are.
        """
        super().__init__(networks, source)
        self.preparation = FromSource(source, ())  # no network looks at the images as they are
        self.model, self.names, self.lpips = model, list(of_kind(names, "data")), lpips
        self.identity, self.tells = identity, tells
        parts = [model.autoencoder, model.conditioner, model.denoiser, *model.condition_sources.values()]
        self.parts = nn.ModuleList(parts)

    def describe(self, items: Sequence[WorkItem[Item]]) -> list[str]:
        return super().describe(items) if self.tells else []

    def fingerprint(self, precision: str) -> Fingerprint:
        made_with = {"model": self.identity, "metrics": " ".join(sorted(self.names))}
        return {**super().fingerprint(precision), **made_with}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {FEATURES + its.space: (its.width,) for its in self.features()}
        found |= {VALUES + name: () for name in self.names if name in ("psnr", "lpips")}
        if isinstance(self.model.conditioner, EmbeddingConditioner) and "retrieval" in self.names:
            found |= dict.fromkeys((IMAGE_EMBED, TEXT_EMBED), (self.model.conditioner.embed_dim,))
        return {**found, LOSS: (2, QUARTERS)} if "loss" in self.names else found

    @torch.no_grad()
    def process(self, batch: PictureBatch) -> PictureRows:
        device = batch.image.device
        assert self.source is not None, "parts are measured on a data source"
        made = self.source.to_device_format(Batch(batch.key, batch.text, image=batch.image))
        tensors: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            if any(name in RECONSTRUCTED for name in self.names):
                tensors |= self.reconstructed(made.require_image("reconstruct them"))
            if "retrieval" in self.names:
                tensors |= self.embedded(made)
            if "loss" in self.names:
                tensors[LOSS] = self.losses(made)[None]  # [1, 2, 4]
        return PictureRows({name: value.cpu() for name, value in tensors.items()}, batch.text)

    def reconstructed(self, image: Tensor) -> dict[str, Tensor]:
        """Return how near reconstructions come to images [B, 3, H, W] in [-1, 1], and their features."""
        autoencoder, found = self.model.autoencoder, {}
        again = autoencoder.decode(autoencoder.encode(image)).float().clamp(-1, 1)  # [B, 3, H, W]
        if "psnr" in self.names:
            error = (again - image).double().square().mean((1, 2, 3))  # [B]
            found[VALUES + "psnr"] = 10 * torch.log10(4 / error.clamp(min=1e-12))  # [B]
        if self.lpips is not None:
            found[VALUES + "lpips"] = self.lpips(image, again)  # [B]
        pictures = to_images(again)
        return found | {FEATURES + its.space: rows_of(its, pictures, image.device) for its in self.features()}

    def embedded(self, batch: Batch) -> dict[str, Tensor]:
        """Return the conditioner's embeddings of a batch's images and captions, [B, D] each."""
        conditioner = self.model.conditioner
        assert isinstance(conditioner, EmbeddingConditioner), "it is looked at when the job is made"
        image = conditioner.encode_image(batch.require_image("embed them"))  # [B, D]
        return {IMAGE_EMBED: image.float(), TEXT_EMBED: conditioner.encode_text(batch.text).float()}

    def losses(self, batch: Batch) -> Tensor:
        """Return sums and counts of the losses of a batch by quarter of t, float64 [2, 4].

        Noise and times follow from a sample's name, whatever batch it is in; no condition is dropped.
        """
        model, image = self.model, batch.require_image("measure the loss")
        numbers = torch.tensor([zlib.crc32(key.encode()) for key in batch.key])  # [B]
        shape = model.autoencoder.moments(image[:1])[0]  # [1, C, h, w]
        rows = [noise_of(shape[0], 0, int(number), LEVELS) for number in numbers]  # not that of a level
        x0 = model.autoencoder.encode(image, torch.stack(rows).to(image))  # [B, C, h, w]
        conditions = model.shifted(model.conditioner.from_batch(batch), are_images=True)  # name -> [B, ...]
        if model.condition_sources:
            conditions = conditions | self.drawn(batch, x0, numbers)
        held_out = HeldOutBatch(x0, conditions, 0, len(x0), numbers)
        return loss_sums(model.denoiser, model.objective, [held_out], LEVELS, 0)

    def drawn(self, batch: Batch, x0: Tensor, numbers: Tensor) -> Conditions:
        """Return what condition sources give of images, each by itself, as its random numbers are to be its own."""
        found: dict[str, list[Tensor]] = {}
        for row, number in enumerate(numbers.tolist()):
            generator = torch.Generator(x0.device).manual_seed(number)
            image = None if batch.image is None else batch.image[row : row + 1]  # [1, 3, H, W]
            one = Batch(batch.key[row : row + 1], batch.text[row : row + 1], image=image)
            for source in self.model.condition_sources.values():
                given = source.from_batch(one, x0[row : row + 1], self.model.autoencoder, generator)
                for name, value in given.items():  # [1, ...]
                    found.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in found.items()}  # [B, ...]


def check_parts(model: Model, names: Sequence[str], checkpoint: str) -> None:
    """Raise UserError if a model lacks the part that a metric is about."""
    if "retrieval" in names and not isinstance(model.conditioner, EmbeddingConditioner):
        raise UserError(f"{checkpoint}: retrieval: the conditioner {model.conditioner.part_name} embeds no images")
    if model.pixel_bound is not None and (asked := [name for name in names if name in RECONSTRUCTED]):
        raise UserError(
            f"{checkpoint}: {asked[0]}: this model makes pixels, and has no autoencoder that could lose anything"
        )


def part_values(names: Sequence[str], real: RealSet | None, made: PictureRows, times: int) -> dict[str, Value]:
    """Return the values of metrics of the kind "data" by column, with margins by bootstrap of the images.

    What was measured has been looked at (`checks.check_measured`).
    """
    found: dict[str, Value] = {}
    for name in of_kind(names, "data"):
        if name == "loss":
            sums, counts = made.tensors[LOSS].double().sum(0)  # [4], [4]
            found["loss"] = Value(float(sums.sum() / counts.sum()))
            for quarter in range(QUARTERS):
                if counts[quarter]:
                    found[f"loss_t{quarter / QUARTERS:.2f}"] = Value(float(sums[quarter] / counts[quarter]))
        elif name == "retrieval":
            found |= retrieval(made)
        elif space := METRICS[name].space:
            assert real is not None, f"{name} compares features with those of real images"
            features = made.features(space)  # [N, D]
            is_finite = bool(features.isfinite().all())
            found[name] = Value(distance(name, real, features, space) if is_finite else math.nan)
        else:
            values = made.tensors[VALUES + name].double()  # [N]
            found[name] = by_bootstrap(
                float(values.mean()), lambda rows, v=values: float(v[rows].mean()), len(values), times
            )
    return found


def retrieval(made: PictureRows) -> dict[str, Value]:
    """Return how often the right caption of an image is among the nearest 1 and 5, and an image of a caption.

    Images that share a caption are all right for it, and it is one text among the others. Images without a caption are
    left out.
    """
    rows = caption_rows(made.texts)
    kept, texts = torch.tensor(rows, dtype=torch.long), [made.texts[row] for row in rows]
    firsts = {text: row for row, text in reversed(list(enumerate(texts)))}  # text -> its first place
    names = list(firsts)
    of_image = torch.tensor([names.index(text) for text in texts])  # [N], number of its text
    images = made.tensors[IMAGE_EMBED][kept].double()  # [N, D]
    told = made.tensors[TEXT_EMBED][kept][list(firsts.values())].double()  # [T, D]
    alike = images @ told.T  # [N, T]
    found = {}
    for rank in RANKS:
        right = (alike.topk(min(rank, len(names)), dim=1).indices == of_image[:, None]).any(1)  # [N]
        found[f"image_to_text_r{rank}"] = Value(float(right.double().mean()))
        nearest = of_image[alike.topk(min(rank, len(texts)), dim=0).indices]  # [rank, T]
        right = (nearest == torch.arange(len(names))).any(0)  # [T]
        found[f"text_to_image_r{rank}"] = Value(float(right.double().mean()))
    return found


def caption_rows(texts: Sequence[str]) -> list[int]:
    """Return the numbers of the images with a caption. Raises UserError for fewer than two different captions."""
    rows = [row for row, text in enumerate(texts) if text]
    if (count := len({texts[row] for row in rows})) < 2:
        raise UserError(f"retrieval: needs images with at least 2 different captions, not {count}")
    return rows


def lpips_network() -> LPIPS:
    """Return the perceptual distance with its weights. Raises UserError if they cannot be had."""
    from ldm_lab.evaluation.perceptual import pretrained_features

    return LPIPS(pretrained_features())
