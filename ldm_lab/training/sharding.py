"""Training of a network that need not fit one device: FSDP2, by torch's `fully_shard` below Lightning.

Each process holds a share of every parameter, gradient, average and optimizer state, and of a whole block only while it
runs. Checkpoints hold whole tensors, as those of every other strategy, so that a run may change over to any other.
"""

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Denoiser
from ldm_lab.sharded import load_shares, shared_like, whole_state, whole_tensors
from ldm_lab.training.run_state import Checkpoint, OptimizerState

FSDP2 = "fsdp2"


class Sharded(ModelParallelStrategy):
    """All devices share one network; the file of a checkpoint is that of every other strategy."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # as with the other strategies: when it is read the network is shared out already

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def share_out(self, network: Denoiser) -> None:
        """Leave this process its share of a network, which runs only where all processes run it from here on.

        Raises:
            UserError: a parameter that cannot be shared out.
        """
        for name, parameter in network.named_parameters():
            if not parameter.ndim:
                raise UserError(
                    f"trainer.strategy: {FSDP2} cannot share out {name} of {network.part_name}, a single number; "
                    "a parameter of shape [1] can be"
                )
        mesh = self.device_mesh["data_parallel"]
        blocks = [block for block in network.block_modules() if any(True for _ in block.parameters())]
        for module in (*blocks, network):
            # Also the outermost goes back to shares at once: averages and checkpoints are made of them.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Return the whole weights, on the first process; all take part."""
        return whole_state(self.lightning_module)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """Return the whole state of an optimizer, on the first process; all take part."""
        own = Strategy.optimizer_state(self, optimizer)
        return OptimizerState(
            state={place: whole_tensors(tensors) for place, tensors in own["state"].items()},
            param_groups=own["param_groups"],
        )

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> Checkpoint:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Checkpoint, strict: bool = True) -> None:
        load_shares(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Checkpoint) -> None:
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                place: {name: _shared(value, parameters[place]) for name, value in tensors.items()}
                for place, tensors in whole["state"].items()
            }
            optimizer.load_state_dict({**whole, "state": state})


def _shared(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a process's share of what an optimizer keeps of a parameter; a count of steps is everyone's."""
    return shared_like(value, parameter) if value.shape == parameter.shape else value.clone()
