"""What a training step costs, counted without making it: parameters, floating-point operations, bytes of memory.

The step is run on fake tensors, which have shapes and storage sizes and no numbers: no weights are read, no device is
needed, and a network of a billion parameters takes seconds. What the libraries of a device take for themselves (about
half a gigabyte of CUDA's, the work space of its convolutions) is not in it.
"""

import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

T = TypeVar("T")
FEW = 4096  # parameters: the averages of smaller tensors are kept in 32 bits always
SINGLE = (nn.GroupNorm, nn.LayerNorm, nn.Softmax, nn.Upsample)  # layers that GPUs do not compute in half precision
BLOCK = 256  # parameters that share one scale in 8 bits


@dataclass(frozen=True)
class StepCost:
    """What one batch forward and backward, and the optimizer's step behind it, cost on one device.

    Attributes:
        batch_size: samples of the batch.
        parameters: of the network.
        trained: those of them that have a gradient.
        flops: floating-point operations of forward and backward pass; a multiplication and an addition are two.
        recomputed: what gradient checkpointing computes once more besides.
        weights, gradients, optimizer, average, frozen: bytes of the network's weights, their gradients, the optimizer's
            state, the moving averages, the frozen parts.
        peak: the most bytes of all of these and of intermediate results that are held at one time.
        text_encoder: bytes of the weights of a language model that is loaded when a text has to be encoded.
    """

    batch_size: int
    parameters: int
    trained: int
    flops: int
    recomputed: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    peak: int
    text_encoder: int = 0

    @property
    def lasting(self) -> int:
        """What is held at all times, whatever the size of a batch; bytes."""
        return self.weights + self.gradients + self.optimizer + self.average + self.frozen + self.text_encoder

    @property
    def activations(self) -> int:
        """What the batch adds at the peak, bytes: intermediate results, copies in half precision."""
        return max(self.peak - self.lasting, 0)

    @property
    def parts(self) -> dict[str, int]:
        """What takes how many bytes, by its name in words; the parts that there are."""
        named = {
            "weights": self.weights,
            "gradients": self.gradients,
            "the optimizer": self.optimizer,
            "averages of the weights": self.average,
            "frozen parts": self.frozen,
            "the text encoder": self.text_encoder,
            f"intermediate results of {self.batch_size} images": self.activations,
        }
        return {name: size for name, size in named.items() if size >= 1000}

    def shared_by(self, devices: int) -> "StepCost":
        """Return what each of some devices holds that share the network; without the block that is at work."""
        own = {name: part // devices for name, part in (
            ("weights", self.weights), ("gradients", self.gradients), ("optimizer", self.optimizer),
            ("average", self.average),
        )}  # fmt: skip
        beside = self.frozen + self.text_encoder + self.activations
        return replace(self, **own, peak=sum(own.values()) + beside)

    def beside(self, text_encoder: int) -> "StepCost":
        """Return the same with a language model of so many bytes beside it all."""
        return replace(self, text_encoder=text_encoder, peak=self.peak + text_encoder)

    def in_words(self) -> str:
        """Return "about 24.8 GB: weights 4.7 GB, ..."."""
        return f"about {in_units(self.peak)}: {listed(self.parts)}"

    def batch_that_fits(self, room: int) -> int:
        """Return about how many samples of a batch go into so many bytes; 0 if not even one does."""
        each = self.activations / self.batch_size
        return max(int((room - self.lasting) / each), 0) if each else 0


def listed(parts: Mapping[str, int]) -> str:
    """Return "weights 4.7 GB, gradients 4.7 GB, ..."."""
    return ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())


def in_units(size: float) -> str:
    """Return a number of bytes in words: "512 MB", "16.2 GB"."""
    power = min(max(int(math.log10(max(size, 1)) // 3), 2), 4)
    return f"{size / 1000**power:.3g} {['kB', 'MB', 'GB', 'TB'][power - 1]}"


def in_short(count: float) -> str:
    """Return a large number in words: "2.79 M", "1.17 B"."""
    power = min(int(math.log10(max(count, 1)) // 3), 4)
    return f"{count / 1000**power:.3g} {['', 'k', 'M', 'B', 'T'][power]}".strip()


# ---------------------------------------------------------------------------------------------------------- counting


class Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, and of those it is told of; and operations.

    Attributes:
        live: bytes held now.
        peak: the most that was held at one time.
        flops: of matrix products and convolutions.
        recomputed: those of them that repeat what the forward pass has computed.
        is_backward: whether what follows belongs to a backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.recomputed = 0
        self.is_backward = False
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already; their storage counts once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            self._known.add(storage)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self,
        func: OpOverload[..., T],
        types: Sequence[type],
        args: Sequence[T] = (),
        kwargs: Mapping[str, T] | None = None,
    ) -> T:
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if count := flop_registry.get(func.overloadpacket):
            flops = count(*args, **(kwargs or {}), out_val=result)
            self.flops += flops
            if self.is_backward and torch.is_grad_enabled():  # gradient checkpointing runs a block once more
                self.recomputed += flops
        return result


@contextmanager
def autocast_of_gpus() -> Iterator[None]:
    """Make a CPU's autocast compute in single precision what that of GPUs does besides: the layers of `SINGLE`.

    Their results are what a backward pass has to keep. Hooks of modules are at work in gradient checkpointing, too.
    """
    hook = register_module_forward_pre_hook(_in_single_precision)  # type: ignore[arg-type]  # it may change the inputs
    try:
        yield
    finally:
        hook.remove()


def _in_single_precision(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if not isinstance(module, SINGLE) or not torch.is_autocast_enabled("cpu"):
        return None
    return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in inputs)


def step_cost(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer | int,
    batch_size: int,
    frozen: Iterable[nn.Module] = (),
    average: int = 0,
) -> StepCost:
    """Return what a training step costs. The modules' tensors may be fake ones; then no arithmetic is done.

    The order is that of Lightning: the gradients of the step before are there until the backward pass begins.

    Args:
        model: the trained network.
        loss: runs the forward pass, with all that belongs to a step before it; a 0-dim tensor.
        optimizer: of the model's parameters; or how many bytes its state takes, where it cannot be run.
        batch_size: samples that the loss is of.
        frozen: modules that are there beside it.
        average: bytes of its moving averages.
    """
    frozen = list(frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    with Counter() as counter:
        for module in (model, *frozen):
            counter.add(_tensors(module))
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.step()  # makes its state
            kept = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
        counter.peak, counter.flops = counter.live, 0
        value = loss()
        model.zero_grad()
        counter.is_backward = True
        value.backward()
        counter.is_backward = False
        del value
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.step()
    state = optimizer if isinstance(optimizer, int) else _bytes(kept)
    return StepCost(
        batch_size=batch_size,
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in trained),
        flops=counter.flops - counter.recomputed,
        recomputed=counter.recomputed,
        weights=_bytes(_tensors(model)),
        gradients=_bytes(p.grad for p in trained if p.grad is not None),
        optimizer=state,
        average=average,
        frozen=sum(_bytes(_tensors(module)) for module in frozen),
        peak=counter.peak + average + (optimizer if isinstance(optimizer, int) else 0),
    )


def optimizer_bytes(parameters: Iterable[nn.Parameter], eight_bit: bool) -> int:
    """Return what AdamW's two averages of trained parameters take, in 32 or (those of large tensors) 8 bits."""
    total = 0
    for count in (p.numel() for p in parameters if p.requires_grad):
        total += 2 * (count + 4 * math.ceil(count / BLOCK)) if eight_bit and count >= FEW else 8 * count
    return total


def module_bytes(*modules: nn.Module | None) -> int:
    """Return what the parameters and buffers of modules take."""
    return sum(_bytes(_tensors(module)) for module in modules if module is not None)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; storage that several share counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


# ------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Card:
    """The most that a GPU does by its maker's data sheet, dense, accumulated in single precision, in TFLOPS.

    Attributes:
        half: in fp16.
        tf32: of matrix products in fp32 through its tensor cores; None where it has none for that.
        has_bf16: whether bf16 is as fast as fp16.
    """

    half: float
    tf32: float | None
    has_bf16: bool = True


# By what is left of the device's name without its maker, its line and the size of its memory.
CARDS = {
    "B200": Card(2250, 1125),
    "GH200": Card(989, 495),
    "H200": Card(989, 495),
    "H100": Card(989, 495),
    "H100 PCIe": Card(756, 378),
    "H100 NVL": Card(835, 418),
    "A100": Card(312, 156),
    "A40": Card(150, 74.8),
    "A30": Card(165, 82),
    "A10": Card(125, 62.5),
    "A10G": Card(70, 35),
    "L40S": Card(362, 183),
    "L40": Card(181, 90.5),
    "L4": Card(121, 60),
    "V100": Card(125, None, has_bf16=False),
    "T4": Card(65, None, has_bf16=False),
    "RTX 6000 Ada Generation": Card(364, 182),
    "RTX A6000": Card(155, 77.4),
    "RTX A5000": Card(111, 55.6),
    "RTX 5090": Card(210, 105),
    "RTX 4090": Card(165, 82.6),
    "RTX 4080": Card(97.5, 48.7),
    "RTX 4070 Ti": Card(80.2, 40.1),
    "RTX 4070": Card(58.3, 29.1),
    "RTX 3090 Ti": Card(80, 40),
    "RTX 3090": Card(71, 35.6),
    "RTX 3080 Ti": Card(68.2, 34.1),
    "RTX 3080": Card(59.5, 29.8),
    "RTX 3070": Card(40.6, 20.3),
    "RTX 3060": Card(25.5, 12.7),
}


def images_per_second(cost: StepCost, flops: float, used: float) -> float:
    """Return how many images a second a device trains on.

    Args:
        cost: of a step.
        flops: what the device does at most in a second.
        used: the share of it that is made use of.
    """
    return flops * used * cost.batch_size / (cost.flops + cost.recomputed)


def peak_flops(device: str, precision: str, tf32: bool = True) -> float | None:
    """Return what a card can do at most in a second, or None if it is not known.

    Args:
        device: the name that its driver gives, such as "NVIDIA H100 80GB HBM3".
        precision: of `trainer.precision`.
        tf32: whether products in single precision may be rounded to TF32.
    """
    name = re.sub(r"\b(NVIDIA|GeForce|Tesla)\b|-?\b(SXM\d?|HBM\w*|\d+GB)\b", " ", device).replace("-", " ")
    card = CARDS.get(" ".join(name.split()))
    if card is None and re.fullmatch(r"(A100|V100|A40|T4) PCI[eE]", " ".join(name.split())):
        card = CARDS[name.split()[0]]
    if card is None:
        return None
    if precision.startswith("bf16"):
        return card.half * 1e12 if card.has_bf16 else None
    if precision.startswith("16"):
        return card.half * 1e12
    return card.tf32 * 1e12 if precision.startswith("32") and tf32 and card.tf32 else None
