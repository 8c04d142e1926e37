"""What stands for the condition in training: the embedding of a sample's image, of its caption, or of either."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import GAP_PREFIX
from ldm_lab.checkpoints.gap_files import beside_weights, split_gap
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.conditioners.gap import Gap
from ldm_lab.conditions import Conditions
from ldm_lab.config import ConditionerUse, PartConfig
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Conditioner
from ldm_lab.training.gap import gap_in_training, resumed_gap, stored_gap
from ldm_lab.training.logs import print_rank_zero

TEXT_SHARE = 0.5  # of "mixed" unless the config says otherwise
SURE = 1000  # samples without a caption among them that tell that there is none


class Conditioning:
    """Makes what the denoiser is told of what the conditioner, or a cache, says of a batch's images.

    Random numbers come from torch's global generators, which are seeded for every batch: a resumed run repeats them,
    and ranks differ.

    Attributes:
        gap: what embeddings are shifted by; None for nothing.
        seen, without: samples whose caption was asked for, and those that had none, on this rank.
    """

    def __init__(self, config: PartConfig, conditioner: Conditioner, read_means: bool = True) -> None:
        """Take a conditioner and how it is used.

        Args:
            config: its section.
            conditioner: built, frozen.
            read_means: False leaves them unread: those of a model come that is added to, or nothing is trained.

        Raises:
            UserError: texts and images of this conditioner share no space; what `gap_in_training` raises.
        """
        self.config, self.conditioner = config, conditioner
        self.gap: Gap | None = None
        use = config.use_as(ConditionerUse)
        self.train_on = use.train_on or "image"
        self.text_share = {"image": 0.0, "text": 1.0, "mixed": TEXT_SHARE}[self.train_on]
        if use.text_share is not None and self.train_on != "mixed":
            raise UserError("conditioner.text_share: is of conditioner.train_on=mixed alone")
        self.text_share = self.text_share if use.text_share is None else use.text_share
        self.seen = self.without = 0
        key = "gap" if use.gap is not None else "train_on" if self.train_on != "image" else None
        if key is not None and not isinstance(conditioner, EmbeddingConditioner):
            raise UserError(
                f"conditioner.{key}: is of conditioners that embed images and texts alike, and "
                f"{conditioner.part_name} does not"
            )
        if use.gap is not None and read_means:
            self.gap = gap_in_training(config, conditioner.spec)

    @property
    def reads_images(self) -> bool:
        """Whether images' embeddings are needed."""
        return self.text_share < 1

    def __call__(self, batch: Batch, conditions: Conditions, noisy: bool = True) -> Conditions:
        """Return what the denoiser is told, name -> [B, ...].

        Args:
            batch: with captions.
            conditions: what the conditioner gives of the images, unit rows; {} if they are not needed.
            noisy: add the noise of training to images' embeddings.

        Raises:
            UserError: captions are asked for, and there is none.
        """
        conditioner = self.conditioner
        if not isinstance(conditioner, EmbeddingConditioner) or (self.gap is None and not self.text_share):
            return conditions
        if self.reads_images:
            embeds = conditions["embed"].float()  # [B, D]
            if self.gap is not None:
                self.gap.to(embeds.device)
                z = torch.randn_like(embeds) if noisy and self.gap.noise_length else None  # [B, D]
                embeds = self.gap.images(embeds, z)  # [B, D]
        else:
            embeds = torch.zeros(len(batch), conditioner.embed_dim, device=conditioner.device)  # [B, D]
        chosen = self.texts_chosen(batch, counted=noisy)
        if chosen:
            texts = self.text_embeddings([batch.text[i] for i in chosen]).to(embeds)  # [n, D]
            embeds = embeds.index_copy(0, torch.tensor(chosen, device=embeds.device), texts)  # [B, D]
        return {**conditions, "embed": embeds}

    def texts_chosen(self, batch: Batch, counted: bool = True) -> list[int]:
        """Return the rows for which the caption stands. Those without one keep what they have: "mixed" their image's
        embedding, "text" the zeros of no condition.
        """
        if not self.text_share:
            return []
        drawn = torch.rand(len(batch)) < self.text_share  # [B]
        asked = [i for i, is_asked in enumerate(drawn.tolist()) if is_asked]
        there = [i for i in asked if batch.text[i].strip()]
        if not counted:  # held-out images, which are not trained on
            return there
        if len(there) < len(asked) and not self.without:
            key = next(batch.key[i] for i in asked if not batch.text[i].strip())
            print_rank_zero(f"conditioner.train_on: {key} has no caption; such samples are {self.instead}")
        self.seen, self.without = self.seen + len(asked), self.without + len(asked) - len(there)
        if self.seen >= SURE and self.seen == self.without:
            raise UserError(
                f"conditioner.train_on: {self.train_on} needs captions, and none of {self.seen:,} samples has one; "
                "data.captions says where they are"
            )
        return there

    @property
    def instead(self) -> str:
        """What becomes of samples without a caption, in words."""
        return (
            "trained on without a condition" if self.train_on == "text" else "trained on with their image's embedding"
        )

    def text_embeddings(self, texts: list[str]) -> Tensor:
        """Return the embeddings of captions as the denoiser is told them, [n, D], unit rows; long ones are cut."""
        conditioner = self.conditioner
        assert isinstance(conditioner, EmbeddingConditioner)
        tokens = conditioner.tokenize(texts).to(conditioner.device)  # [n, L]
        embeds = F.normalize(conditioner.encode_tokens(tokens).float(), dim=-1)  # [n, D]
        return embeds if self.gap is None else self.gap.texts(embeds)  # [n, D]

    # ----------------------------------------------------------------------------------------- beside the weights

    def put_into(self, state: dict[str, Tensor]) -> None:
        """Put the means beside a model's weights."""
        state.update(beside_weights(self.gap))

    def take_from(self, state: dict[str, Tensor]) -> None:
        """Take the means out of a checkpoint's weights, and go on with them; what is otherwise is said."""
        _, its = split_gap(state)
        for name in its:
            del state[GAP_PREFIX + name]  # they are no weights
        self.gap = resumed_gap(self.gap, its, self.config)

    def begin_with(self, path: str, state: dict[str, Tensor], adds: bool) -> dict[str, Tensor]:
        """Return the weights of a model to begin with, and say where its means differ from these.

        Args:
            path: of the model.
            state: its weights, with what stands beside them.
            adds: whether additions to it are trained (LoRA), which need its own means.

        Raises:
            UserError: additions to a model that knows no means.
        """
        state, its = split_gap(state)
        asked = self.config.use_as(ConditionerUse).gap
        if adds and its:
            if others := [f"conditioner.gap.{key}" for key in asked or {} if key != "noise"]:
                print_rank_zero(f"{', '.join(others)}: without effect: lora keeps the gap of the model that it adds to")
            self.gap = stored_gap(its, path, self.config)
            print_rank_zero(f"conditioner.gap: as of {path}: {self.gap.describe()}")
        elif adds and asked is not None:
            raise UserError(f"conditioner.gap: lora adds to {path}, which was trained without; leave it out")
        elif its and self.gap is not None:
            theirs = Gap.from_state(its, path).describe()
            print_rank_zero(f"init_from: {path}: its conditioner.gap: {theirs}; this run's: {self.gap.describe()}")
        elif its or self.gap is not None:
            trained = "with conditioner.gap, and this config has none" if its else "without conditioner.gap"
            print_rank_zero(f"init_from: {path}: these weights were trained {trained}")
        return state

    def facts(self) -> dict[str, str]:
        """Return what is told of the means in a model's file."""
        return {} if self.gap is None else {"gap": self.gap.describe()}

    def stored(self, section: PartConfig) -> PartConfig:
        """Return the conditioner's section for a model's file, where the means stand beside the weights."""
        gap = self.gap
        if gap is None:
            return section
        return section.with_use(gap={"shift": gap.shifts, "noise": gap.noise_length, "map": gap.map_name})

    def summary(self) -> list[str]:
        """Return what was counted, a line; nothing where no caption was asked for, or none was missing."""
        if not self.without:
            return []
        counted = f"{self.without:,} of {self.seen:,} samples of the first process had no caption"
        return [f"conditioner.train_on: {self.train_on}: {counted} and were {self.instead}"]
