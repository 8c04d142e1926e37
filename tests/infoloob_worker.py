"""One of two processes that compute the CLOOB loss of a batch together: `python infoloob_worker.py RANK MEETING OUT`.

Rank 0 writes the loss and the gradients that DDP leaves; `test_infoloob.py` compares them with one process's.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm_lab.training.infoloob import CLOOBLoss, gather_rows

OPTIONS = {"learn_inv_tau": True, "convention": "ml_jku"}


class Towers(nn.Module):
    """Two linear towers and the loss, as one module for DDP."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.loss = nn.Linear(5, 4), nn.Linear(3, 4), CLOOBLoss(**options)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        image, text = F.normalize(self.image(pixels), dim=1), F.normalize(self.text(tokens), dim=1)  # [B, 4] each
        return self.loss(gather_rows(image), gather_rows(text))


def batch() -> tuple[Tensor, Tensor]:
    """Return what the towers see of six pairs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)


def main(rank: int, meeting: str, out: str) -> None:
    """Compute loss and gradients on this rank's share."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model = DistributedDataParallel(Towers(**OPTIONS))
    loss = model(*(part.chunk(2)[rank] for part in batch()))
    loss.backward()
    if rank == 0:
        gradients = {name: p.grad for name, p in model.module.named_parameters()}
        torch.save({"loss": loss.detach(), "gradients": gradients}, out)
    del model, loss  # what DDP holds of the group goes before the group
    dist.barrier()  # nobody leaves while another one still sends
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
