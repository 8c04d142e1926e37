"""How a run uses a frozen part: the keys of its section beside its constructor's, which say what it is."""

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal, get_type_hints

from annotated_types import Len

from ldm_lab.config.bounds import PartSection, Plain, PositiveFloat, Share, TypeForm

EncoderPrecision = Literal["fp32", "bf16"]
MissingText = Literal["encode", "skip"]
TrainOn = Literal["image", "text", "mixed"]


@dataclass(frozen=True)
class PartUse:
    """The use of a part: nothing more than its weights.

    Attributes:
        weights: a file, a released name or an hf:// address; None builds it as initialized.
    """

    weights: str | None = None

    OF_WEIGHTS: ClassVar[tuple[str, ...]] = ("weights",)  # keys that make no sense for another part's weights

    def unused(self) -> dict[str, str]:
        """Return which keys are given and have no effect beside the others, each with the reason."""
        return {}


@dataclass(frozen=True)
class AutoencoderUse(PartUse):
    """The use of a frozen autoencoder.

    Attributes:
        latent_mean, latent_std: z = (raw - latent_mean) / latent_std, numbers or one per channel; None takes what is
            stored in the weights.
        precision: of its arithmetic while training images are encoded; None is fp32.
    """

    latent_mean: float | Annotated[list[float], Len(1)] | None = None
    latent_std: PositiveFloat | Annotated[list[PositiveFloat], Len(1)] | None = None
    precision: EncoderPrecision | None = None

    OF_WEIGHTS: ClassVar[tuple[str, ...]] = ("weights", "latent_mean", "latent_std")


@dataclass(frozen=True)
class ConditionerUse(PartUse):
    """The use of a frozen conditioner.

    Attributes:
        dropout: share of conditions that training replaces by the null condition; None is the task's default.
        precision: of its arithmetic while training images are encoded; None is fp32.
        gap: how embeddings of texts and images are brought into one space (`ldm_lab.training.gap`); None leaves them
            as they are.
        train_on: whose embedding stands for the condition in training: the image's, its caption's, or either; None is
            the image's.
        text_share: of "mixed", how often it is the caption's; None is half.
        store: folder with the states of captions, which `embed-text` makes; None encodes them anew in each step.
        missing: what becomes of captions that the store lacks: encode adds them to it, skip leaves their images out;
            None encodes where the model is here, or there is no store yet.
    """

    dropout: Share | None = None
    precision: EncoderPrecision | None = None
    gap: Annotated[dict[str, Plain] | None, PartSection("gap")] = None
    train_on: TrainOn | None = None
    text_share: Share | None = None
    store: str | None = None
    missing: MissingText | None = None

    def unused(self) -> dict[str, str]:
        if self.train_on == "text" and self.gap is not None and self.gap.get("noise"):
            return {"gap.noise": "train_on=text trains on texts' embeddings, which get none"}
        return {}


def keys_of(use: type[PartUse] | None) -> dict[str, TypeForm]:
    """Return key -> type and bounds of a kind of use; no keys for None."""
    if use is None:
        return {}
    hints = get_type_hints(use, include_extras=True)
    return {field.name: hints[field.name] for field in fields(use)}
