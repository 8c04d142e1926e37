"""How several devices that each hold the whole network add up their gradients (DDP)."""

from typing import Literal

from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy

from ldm_lab.config import PositiveFloat, register


@register("ddp")
class DDPOptions:
    """Torch's DistributedDataParallel (Li et al. 2020, arXiv 2006.15704)."""

    def __init__(
        self,
        *,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        bucket_mb: PositiveFloat = 25.0,
        gradient_compression: Literal["none", "bf16"] = "none",
    ) -> None:
        """Set how gradients travel.

        Args:
            gradient_as_bucket_view: gradients lie in the buckets that are sent: no copy, and less memory by their size.
            static_graph: every step uses the same parameters in the same order, which saves looking for them; true of
                denoisers, false of an autoencoder whose discriminator starts later. Not with accumulate_grad_batches.
            bucket_mb: megabytes of gradients that are sent at once, while the backward pass goes on; more than 25 may
                pay on fast links, as 100 of a billion parameters.
            gradient_compression: "bf16" sends half the bytes; sums of gradients are then rounded to 8 bits.
        """
        self.options = {
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "static_graph": static_graph,
            "bucket_cap_mb": bucket_mb,
        }
        self.gradient_compression = gradient_compression

    def apply(self, trainer: Trainer) -> None:
        """Set them in a Trainer, if DDP is its strategy; what the strategy's own name says goes before."""
        strategy = trainer.strategy
        if not isinstance(strategy, DDPStrategy):
            return
        strategy._ddp_kwargs = {**self.options, **strategy._ddp_kwargs}
        if self.gradient_compression == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            strategy._ddp_comm_hook = bf16_compress_hook
