"""LoRA training: small trained additions to the layers of a network whose own weights stay as they are.

Hu et al. 2021 (arXiv 2106.09685), by peft. Only the additions have gradients, optimizer state and an average, and only
they are saved.
"""

import fnmatch
import re
from collections.abc import Mapping
from typing import Annotated

from annotated_types import Interval
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm_lab.checkpoints.lora import BaseModel
from ldm_lab.config import PositiveFloat, ShareBelowOne, register
from ldm_lab.errors import UserError, install, unknown
from ldm_lab.interfaces import Denoiser

ADAPTER = "default"  # peft's name of the one set of additions
INNER = re.compile(rf"\.lora_[AB]\.{ADAPTER}\.")  # in the names of their weights
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SHOWN = 3  # names in a line
WITHOUT_PEFT = f"lora: needs peft, which is not installed: {install('lora')}"


@register("lora")
class LoraOptions:
    """LoRA: train small additions to the layers of the network that init_from names, and nothing else."""

    def __init__(
        self,
        *,
        rank: Annotated[int, Interval(ge=1, le=4096)],
        alpha: PositiveFloat | None = None,
        targets: list[str] = (),
        dropout: ShareBelowOne = 0.0,
    ) -> None:
        """Set which layers get an addition, and its size.

        Args:
            rank: of the two factors that make an addition; parameters and strength grow with it.
            alpha: an addition is multiplied by alpha / rank; by default alpha is the rank.
            targets: layers by name: a part of the network (as optim.freeze has them), a run of the parts of a layer's
                name, such as qkv or input_blocks.3, or a pattern with *; by default all linear layers and
                convolutions but those that read x and write the output.
            dropout: share of an addition's inputs that training drops.
        """
        self.rank, self.alpha, self.targets, self.dropout = rank, alpha or float(rank), list(targets), dropout

    def insert(self, network: Denoiser) -> list[str]:
        """Add the additions to a network, and freeze the rest of it. Returns what to say of it, a line each.

        Raises:
            UserError: peft is not installed; targets that are no layers, or that LoRA is not for.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UserError(WITHOUT_PEFT) from None
        unfit = unfit_layers(network)
        chosen = self.chosen(network, unfit)
        total = sum(p.numel() for p in network.parameters())
        names = "|".join(re.escape(name) for name in chosen)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=f"(?:{names})"
        )
        inject_adapter_in_model(config, network, ADAPTER)
        added = sum(p.numel() for p in network.parameters() if p.requires_grad)
        lines = [f"lora: {added:,} parameters in {len(chosen)} layers, {added / total:.2%} of the network's {total:,}"]
        if unfit and not self.targets:
            reasons = [f"{name} ({why})" for name, why in unfit.items()]
            more = f", and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
            lines.append(f"lora: left as they are: {', '.join(reasons[:SHOWN])}{more}")
        return lines

    def chosen(self, network: Denoiser, unfit: Mapping[str, str]) -> list[str]:
        """Return the names of the layers that get an addition. Raises UserError for targets that are none."""
        layers = {name: module for name, module in network.named_modules() if isinstance(module, KINDS)}
        if not self.targets:
            left = {*unfit, *network.outer_layers()}
            chosen = [name for name in layers if name not in left]
            if not chosen:
                raise UserError("lora: this network has no layer that LoRA is for: linear ones and convolutions")
            return chosen
        groups = network.freeze_groups()
        wanted: dict[str, None] = {}
        for target in self.targets:
            owned = {id(p) for p in groups.get(target, ())}
            found = [name for name, module in layers.items() if id(module.weight) in owned or is_named(target, name)]
            if not found and any(f".{target}." in f".{name}." for name, _ in network.named_parameters()):
                raise UserError(f"lora.targets: {target}: is neither a linear layer nor a convolution")
            if not found:
                parts = {part for name in layers for part in name.split(".") if not part.isdigit()}
                raise UserError(f"lora.targets: {unknown('layer of this network', target, [*groups, *parts])}")
            fit = [name for name in found if name not in unfit]
            if not fit:
                raise UserError(f"lora.targets: {target}: LoRA is not for {found[0]}: {unfit[found[0]]}")
            wanted.update(dict.fromkeys(fit))
        return list(wanted)


def is_named(target: str, layer: str) -> bool:
    """Return whether a target names a layer: by a pattern, or by a run of the parts of its name."""
    if any(letter in target for letter in "*?["):
        return fnmatch.fnmatchcase(layer, target)
    return f".{target}." in f".{layer}."


def unfit_layers(network: nn.Module) -> dict[str, str]:
    """Return the linear layers and convolutions that an addition to the weight cannot be trained for -> why."""
    places: dict[int, list[str]] = {}
    weights: dict[int, int] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, KINDS):
            places.setdefault(id(module), []).append(name)
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            weights[id(parameter)] = weights.get(id(parameter), 0) + 1
    found = {}
    for name, module in network.named_modules():
        parent = network.get_submodule(name.rpartition(".")[0])
        if isinstance(module, KINDS):
            shared = len(places[id(module)]) > 1 or weights.get(id(module.weight), 1) > 1
            why = "it is used at several places" if shared else why_not(module, parent)
        else:
            why = None
        if isinstance(module, nn.MultiheadAttention):
            found[name] = "torch's MultiheadAttention keeps its weights to itself"
        elif why is not None:
            found[name] = why
    return found


def why_not(layer: nn.Module, parent: nn.Module) -> str | None:
    """Return why a layer's weight cannot have an addition; None if it can."""
    if type(parent).__module__.startswith("torch.nn.") and not isinstance(parent, CONTAINERS):
        return f"torch's {type(parent).__name__} reads its weight itself"
    if parametrize.is_parametrized(layer) or "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed"
    if not any(type(layer).forward is kind.forward for kind in KINDS):
        return f"{type(layer).__name__} is no plain layer"
    if isinstance(layer, nn.Linear):
        return None
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d), "the caller knows"
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    if any(step != 1 for step in layer.dilation):
        return "a dilated convolution"
    return None if layer.padding_mode == "zeros" else f"a convolution with {layer.padding_mode} padding"


def additions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return of a network's state dict the additions, as a file names them: layer.lora_A.weight and B."""
    return {name.replace(f".{ADAPTER}.", "."): value for name, value in state.items() if INNER.search(name)}


def frozen_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return all other weights of a network with additions, by name."""
    return {name: value for name, value in network.state_dict().items() if not INNER.search(name)}


def check_base(stored: str | None, base: BaseModel) -> None:
    """Raise UserError if a checkpoint was not trained on this base model, by the fingerprint of its own."""
    if stored != base.weights:
        raise UserError(
            f"resume.checkpoint: was trained on another model than init_from ({base.name}) names; sha256 of its "
            f"weights {str(stored)[:12]}..., of these {base.weights[:12]}..."
        )


def leave_out_base(task: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Tensor]) -> None:
    """Take all but the additions out of a state dict: the rest is the base model's, which is in a file already."""
    for name in [name for name in state if not INNER.search(name)]:
        del state[name]
