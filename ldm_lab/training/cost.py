"""What a task's training step costs: its own `training_step`, run on fake tensors."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm_lab.batch import Batch
from ldm_lab.conditioners.t5 import T5
from ldm_lab.conditions import TokenIds, TokenStates, blank_conditions
from ldm_lab.config import RunConfig
from ldm_lab.errors import first_line
from ldm_lab.estimate import StepCost, autocast_of_gpus, module_bytes, optimizer_bytes, step_cost
from ldm_lab.training.task import Task

T = TypeVar("T")
HALF = {"16": torch.float16, "bf16": torch.bfloat16}  # by what `trainer.precision` begins with


class RunCost:
    """What a training step of a run costs, counted when it is first asked for: that takes a moment.

    Attributes:
        image_size: pixels; known for good when the data are open.
        why_not: why it cannot be counted, in words; empty if it can, or nobody has asked.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.image_size: int | None = task.run_config["data"].option("image_size")
        self.why_not = ""

    @cached_property
    def step(self) -> StepCost | None:
        """The cost of a step; None if it cannot be counted."""
        if self.image_size is None:
            self.why_not = "nobody has said how large the images are"
            return None
        try:
            return task_cost(self.task, self.image_size)
        except Exception as error:  # whatever a part does with tensors that have no numbers: the run needs none of this
            self.why_not = first_line(error)
            return None

    def lasting(self) -> dict[str, int]:
        """Return what the run holds at all times, bytes by name: all but intermediate results."""
        task = self.task
        trained = [p for module in task.trained_modules() for p in module.parameters() if p.requires_grad]
        held = {
            "weights": module_bytes(*task.trained_modules()),
            "gradients": sum(p.nbytes for p in trained),
            "the optimizer": optimizer_bytes(trained, task.optim.state != "32bit"),
            "averages of the weights": average_bytes(task),
            "frozen parts": module_bytes(*task.frozen.values()),
            "the text encoder": postponed_bytes(task) or 0,
        }
        return {name: size for name, size in held.items() if size}


def config_cost(config: RunConfig) -> StepCost:
    """Return what a training step of a config costs. No weights are read: a frozen part counts as its file says.

    Where that is none of ours, or not here, as its section says.
    """
    with torch.device("meta"):
        task = config.task_class()(config, read_weights=False)
        task.insert_lora()
    return task_cost(task, config["data"].option("image_size"))


def task_cost(task: Task, image_size: int) -> StepCost:
    """Return what a training step of a task costs on one device; nothing of the task changes.

    Args:
        task: built; its weights may be on the meta device.
        image_size: of its images, pixels.

    Raises:
        RuntimeError: a part cannot be run without numbers, as it decides by them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds

    config, mode = task.run_config, FakeTensorMode(allow_non_fake_inputs=True)
    precision = str(config.part("trainer").option("precision"))
    with mode:
        twin = fake_copy(task, double=precision.startswith("64"))
        batch = example_batch(twin, image_size)
        trained = nn.ModuleList(twin.trained_modules())
        eight_bit = twin.optim.state != "32bit"
        state = optimizer_bytes(trained.parameters(), eight_bit) if eight_bit else twin.optim.optimizer(trained)

        def loss() -> Tensor:
            with ExitStack() as stack:
                if half := HALF.get(precision.partition("-")[0]):
                    stack.enter_context(torch.autocast("cpu", half))
                return twin.rehearse(batch)

        with autocast_of_gpus():
            cost = step_cost(trained, loss, state, len(batch), twin.frozen.values(), average_bytes(twin))
    return cost.beside(postponed_bytes(task) or 0)


def postponed_bytes(task: Task) -> int | None:
    """Return what the weights take that a conditioner loads when they are needed; None where nobody knows."""
    conditioner = task.frozen.get("conditioner")
    return conditioner.postponed_bytes if isinstance(conditioner, T5) else 0


def average_bytes(task: Task) -> int:
    """Return what the averages of a task's weights take: the one that is sampled, and those that snapshots are of."""
    snapshots = task.run_config.get("ema_snapshots")
    widths = snapshots.option("widths") if snapshots is not None else ()
    own = {id(parameter) for parameter in task.model.parameters()}
    averaged = task.model_ema.parameters() if task.model_ema is not None else ()
    shared = sum(parameter.nbytes for parameter in averaged if id(parameter) in own)  # of LoRA the base model's
    return module_bytes(task.model_ema) - shared + len(widths) * module_bytes(task.model)


def fake_copy(task: Task, double: bool = False) -> Task:
    """Return a task like another one, whose weights are fake ones on a CPU. For use under FakeTensorMode.

    Args:
        task: that is copied.
        double: whether the copy's weights are in double precision.
    """
    memo: dict[int, Tensor] = {}
    for module in (task, *task.frozen.values()):
        for tensor in (*module.parameters(), *module.buffers()):
            dtype = torch.float64 if double and tensor.is_floating_point() else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=dtype)  # [...]
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    with _SharedTensors():
        twin = copy.deepcopy(task, memo)
    twin._device = torch.device("cpu")
    return twin


class _SharedTensors(TorchFunctionMode):
    """Copies of objects share their tensors; of those on the meta device they get fake ones on a CPU."""

    def __torch_function__(
        self,
        func: Callable[..., T],
        types: Sequence[type],
        args: Sequence[T] = (),
        kwargs: Mapping[str, T] | None = None,
    ) -> T | Tensor:
        if func is Tensor.__deepcopy__ and isinstance(args[0], Tensor):
            there = args[0]
            return torch.empty(there.shape, dtype=there.dtype) if there.is_meta else there
        return func(*args, **(kwargs or {}))


def example_batch(task: Task, image_size: int) -> Batch:
    """Return a batch as the task's training gets them, images or what a cache has of them, without numbers."""
    config = task.run_config
    count = config["data"].option("batch_size")
    batch = Batch(key=["0"] * count, text=["a"] * count)
    is_cached = "cache" in config or config["data"].name == "cache"
    if is_cached:
        latent = task.latent_shape(image_size)
        batch.mean, batch.logvar = torch.zeros(count, *latent), torch.zeros(count, *latent)  # [B, C, h, w] each
    else:
        batch.image = torch.zeros(count, 3, image_size, image_size)  # [B, 3, H, W]
    if "conditioner" in task.frozen:
        spec = task.frozen["conditioner"].spec
        # Ids cost nothing to make; states are made once for each caption, or have been, in numbers that texts decide.
        if is_cached or all(isinstance(kind, TokenIds | TokenStates) for kind in spec.values()):
            batch.conditions = blank_conditions(spec, count)
    return batch
