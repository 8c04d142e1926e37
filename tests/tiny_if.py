"""Tiny U-Nets of DeepFloyd IF, as files of both released layouts, with random weights."""

import json
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ldm_lab.condition_sources.if_low_res import IFLowRes
from ldm_lab.conditions import TokenStates
from ldm_lab.denoisers.if_unet import IFUNet

WIDTH, LENGTH = 48, 8  # of the text's states


def tiny_if(upsampler: bool = False) -> IFUNet:
    """Return a network of stage I, or II, all of whose weights are drawn."""
    torch.manual_seed(0)
    spec = {"token_states": TokenStates(WIDTH, LENGTH), **(IFLowRes().spec if upsampler else {})}
    options = {"base_channels": 32, "head_width": 16, "pool_heads": 4}
    if upsampler:
        options |= {"multipliers": [1, 2, 2], "blocks_per_level": [1, 2, 1], "attention": [4], "text_width": 64}
        options |= {"efficient": True, "cross_only": True}
    else:
        options |= {"multipliers": [1, 2], "blocks_per_level": [1], "attention": [2], "text_width": 64}
    net = IFUNet(3, spec, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def write_own(folder: Path, net: IFUNet) -> Path:
    """Write `pytorch_model.bin` and `config.yml` as IF's own loader has them; return the folder."""
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    upsampler = "low_res" in net.spec
    params = {"activation": "gelu", "num_head_channels": 16, "att_pool_heads": 4, "image_size": 64 if upsampler else 16,
              "use_scale_shift_norm": True, "resblock_updown": True}  # fmt: skip
    if upsampler:
        params |= {"efficient_activation": True, "scale_skip_connection": True}
    (folder / "config.yml").write_text(yaml.safe_dump({"params": params}))
    return folder


def diffusers_unet(upsampler: bool = False):
    """Return diffusers' network of the same architecture, with weights of its own."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    plain, attended = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "SimpleCrossAttn{}Block2D"
    depth = 3 if upsampler else 2
    options = {
        "sample_size": 64 if upsampler else 16, "in_channels": 6 if upsampler else 3, "out_channels": 6,
        "block_out_channels": (32, 64, 64)[:depth], "layers_per_block": (1, 2, 1) if upsampler else 1,
        "down_block_types": (*[plain[0]] * (depth - 1), attended.format("Down")),
        "up_block_types": (attended.format("Up"), *[plain[1]] * (depth - 1)),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_dim": 64, "encoder_hid_dim": WIDTH,
        "attention_head_dim": 16, "addition_embed_type": "text", "addition_embed_type_num_heads": 4,
        "cross_attention_norm": "group_norm", "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu",
        "time_embedding_dim": 64,
    }  # fmt: skip
    if upsampler:
        options |= {"class_embed_type": "timestep", "time_embedding_act_fn": "gelu", "resnet_skip_time_act": True}
        options |= {"resnet_out_scale_factor": 1 / 0.7071, "mid_block_scale_factor": 1 / 0.7071}
        options |= {"only_cross_attention": True}
    net = UNet2DConditionModel(**options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def edit_json(path: Path, **changes: Tensor | str | int | list | None) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
