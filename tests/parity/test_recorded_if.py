"""DeepFloyd IF: its networks, tiny ones by what they compute and full-size ones by their tensors, and its cascade."""

import hashlib
import json

import pytest
import torch
from recorded import Case
from torch import Tensor

from ldm_lab.checkpoints.if_layouts import infer_config, infer_shape
from ldm_lab.condition_sources.if_low_res import IFLowRes
from ldm_lab.conditions import ConditionRequest, Conditions, ConditionSpec, TokenStates
from ldm_lab.config import build
from ldm_lab.denoisers.if_unet import IFUNet
from ldm_lab.guidance.classifier_free import guided
from ldm_lab.guidance.thresholding import DynamicThresholding
from ldm_lab.objectives.eps_hybrid import EpsHybrid
from ldm_lab.predictions import Prediction

STAGES = ["if_stage_1", "if_stage_2", "if_stage_3"]


def listed(value) -> list[int]:
    return [int(number) for number in value.split(",")] if isinstance(value, str) else value


def options_of(config: dict) -> dict:
    """Return our options for the original's config."""
    blocks, sides = config["num_res_blocks"], config["attention_resolutions"]
    scales = [config["image_size"] // int(s) for s in listed(sides)] if isinstance(sides, str) else sides
    return {
        "base_channels": config["model_channels"], "multipliers": listed(config["channel_mult"]),
        "blocks_per_level": [blocks] if isinstance(blocks, int) else blocks, "attention": scales,
        "head_width": config["num_head_channels"], "pool_heads": config["att_pool_heads"],
        "text_width": config["encoder_channels"], "efficient": config.get("efficient_activation", False),
        "cross_only": bool(config.get("disable_self_attentions")),
    }  # fmt: skip


def spec_of(config: dict, length: int) -> ConditionSpec:
    spec: ConditionSpec = {"token_states": TokenStates(config["encoder_dim"], length)}
    return {**spec, **IFLowRes().spec} if config["in_channels"] == 6 else spec


def network(config: dict, weights: dict[str, Tensor], length: int = 7) -> IFUNet:
    net = IFUNet(3, spec_of(config, length), **options_of(config)).eval()
    net.load_state_dict(weights)
    return net


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_forward(case, name):
    recorded: Case = case(name)
    config, given = recorded.config, recorded.inputs
    net = network(config, recorded.weights())
    assert sum(p.numel() for p in net.parameters()) == recorded.json["parameters"]
    low_res = {}
    if "low_res" in given:
        request = ConditionRequest(
            given["x"], given["low_res"], low_res_level=config["aug_level"], noise=lambda like: given["aug_noise"]
        )
        low_res = IFLowRes().from_request(request)
    known = torch.ones(given["text"].shape[:2], dtype=torch.bool)  # [B, L]
    recorded.check("output", net(given["x"], given["timestep"], given["text"], known, **low_res))
    recorded.finish()


@pytest.mark.parametrize("form", ["I-M", "I-L", "I-XL", "II-small", "II-large", "III"])
def test_full_sizes_have_the_original_s_tensors(golden, form):
    """Names, shapes and counts, on the meta device; and the shapes tell the options again."""
    theirs = json.loads((golden / "if_sizes.json").read_text())[form]
    config = theirs["config"]
    with torch.device("meta"):
        net = IFUNet(3, spec_of(config, 77), **options_of(config))
    state = net.state_dict()
    lines = sorted(f"{name} {list(value.shape)}" for name, value in state.items())
    assert (len(lines), sum(p.numel() for p in net.parameters())) == (theirs["tensors"], theirs["parameters"])
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == theirs["sha256"]
    options = options_of(config)
    if len(set(options["blocks_per_level"])) == 1:
        options["blocks_per_level"] = options["blocks_per_level"][:1]
    read = infer_config(state)
    assert read == {key: options[key] for key in read}
    assert dict(infer_shape(state, 4, 77).conditions) == dict(spec_of(config, 77))


@pytest.mark.parametrize("key", ["stage_1", "stage_2"])
@torch.no_grad()
def test_cascade(case, key):
    """Guidance, the learned variance, dynamic thresholding and respaced steps, with the recorded noise."""
    recorded: Case = case("if_cascade")
    config, given, tiny = recorded.config[key], recorded.inputs, case(f"if_{key}")
    net, objective = network(config["model"], tiny.weights()), EpsHybrid()
    known = torch.ones(1, 7, dtype=torch.bool)  # [1, L]
    null = {"token_states": given["zero_text"], "token_states_mask": known}
    conditions = {"token_states": given["text"][:, None], "token_states_mask": known[:, None]}
    if config["aug_level"] is not None:
        small = recorded.recorded("stage_1_sample").clamp(-1, 1)
        noise = given[f"{key}_aug_noise"][:, 0]  # [1, 3, h, w]
        request = ConditionRequest(noise, small, low_res_level=config["aug_level"], noise=lambda like: noise)
        low_res = IFLowRes().from_request(request)
        null |= low_res
        conditions |= {name: value[:, None] for name, value in low_res.items()}

    def predict(x: Tensor, t: Tensor, rows: Conditions) -> Prediction:
        return objective.predict(net, x, t, rows)

    with_guidance = guided(predict, conditions, null, torch.tensor([[config["guidance_scale"]]]))
    bounds = config["dynamic_thresholding_p"], config["dynamic_thresholding_c"]
    defaults, upsampler = IFUNet.sampling_defaults, key == "stage_2"
    assert bounds == (defaults.percentile, defaults.upsampler_most if upsampler else defaults.most)
    assert config["guidance_scale"] == (defaults.upsampler_guidance if upsampler else defaults.guidance)
    within = DynamicThresholding(1.0, *bounds).wrap(with_guidance, objective.schedule)
    sampler, draws = build("sampler", {"name": "ddpm", "steps": config["respacing"]}), iter(given[f"{key}_step_noise"])
    times = sampler.times(objective.schedule)
    assert [int(i) for i in objective.schedule.index(times)] == config["timesteps"][::-1]
    x = given[f"{key}_noise"]
    sample = sampler.sample(within, x, schedule=objective.schedule, noise=lambda x: next(draws))
    recorded.check(f"{key}_sample", sample)
    assert not [line for line in recorded._report if line.startswith(f"{key}_sample")], recorded._report
