"""What conditioner and condition sources give and a denoiser takes: the check, its message, the sources' conditions."""

import pytest
import torch
from torch import Tensor, nn

from ldm_lab.batch import Batch
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.condition_sources.inpaint import Inpaint
from ldm_lab.condition_sources.low_res import LowRes, shrink
from ldm_lab.conditioners.glide_text import GlideText
from ldm_lab.conditioners.none import NoConditioner
from ldm_lab.conditions import (
    ConditionRequest,
    ConditionSpec,
    Embedding,
    ImageCondition,
    Level,
    TokenIds,
    TokenStates,
    condition_tensors,
    describe_conditions,
    is_upsampler,
    required_condition,
)
from ldm_lab.config import build
from ldm_lab.denoisers.ccld_unet import CCLDUNet
from ldm_lab.denoisers.glide_unet import GlideUNet
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Denoiser, check_conditions

TINY_GLIDE = {"base_channels": 32, "multipliers": [1, 1], "blocks_per_level": 1, "attention": [2], "head_width": 16,
              "text_width": 16, "text_layers": 1, "text_heads": 2}  # fmt: skip


class Told(Denoiser):
    """A denoiser of one convolution that is told token states, their mask, a pooled embedding and a noise level."""

    part_name = "told"
    time_input = "log_snr"

    def __init__(self, channels: int, conditions: ConditionSpec, *, width: int = 8) -> None:
        super().__init__()
        states = required_condition(conditions, "token_states", TokenStates, self.part_name)
        embed = required_condition(conditions, "embed", Embedding, self.part_name)
        level = required_condition(conditions, "level", Level, self.part_name)
        self.spec = {"token_states": states, "embed": embed, "level": level}
        self.text, self.pooled = nn.Linear(states.width, width), nn.Linear(embed.width, width)
        self.numbers, self.out = nn.Linear(2, width), nn.Conv2d(channels + width, channels, 3, padding=1)

    def forward(
        self, x: Tensor, time: Tensor, token_states: Tensor, token_states_mask: Tensor, embed: Tensor, level: Tensor
    ) -> Tensor:
        text = (self.text(token_states) * token_states_mask[..., None]).sum(1)  # [B, width]
        told = text + self.pooled(embed) + self.numbers(torch.stack([time, level], dim=1))  # [B, width]
        planes = told[:, :, None, None].expand(-1, -1, *x.shape[2:])  # [B, width, h, w]
        return self.out(torch.cat([x, planes], dim=1))  # [B, C, h, w]


def test_a_denoiser_takes_its_widths_from_the_spec():
    spec = {"token_states": TokenStates(width=5, length=7), "embed": Embedding(3), "level": Level()}
    assert condition_tensors(spec) == ["token_states", "token_states_mask", "embed", "level"]
    net = Told(4, spec)
    check_conditions(net, spec)
    conditions = {"token_states": torch.randn(2, 7, 5), "token_states_mask": torch.ones(2, 7, dtype=torch.bool),
                  "embed": torch.randn(2, 3), "level": torch.rand(2)}  # fmt: skip
    assert sorted(conditions) == sorted(condition_tensors(spec))
    x, time = torch.randn(2, 4, 6, 6), torch.randn(2)
    out = net(x, time, **conditions)
    assert out.shape == x.shape
    masked = {**conditions, "token_states_mask": torch.zeros(2, 7, dtype=torch.bool)}
    other = {**masked, "token_states": torch.randn(2, 7, 5)}
    assert torch.equal(net(x, time, **masked), net(x, time, **other)) and not torch.equal(out, net(x, time, **masked))


def test_what_is_given_and_taken_has_to_be_the_same():
    given = {"embed": Embedding(16), "low_res": ImageCondition(3, 4)}
    net = CCLDUNet(4, given, base_channels=16, multipliers=[1, 1], head_width=16, mapping_width=8)
    assert net.spec == {"embed": Embedding(16)}
    with pytest.raises(UserError) as error:
        check_conditions(net, given)
    assert str(error.value) == (
        "denoiser.name: ccld_unet takes embed (embedding of 16), and the conditioner and condition sources give embed "
        "(embedding of 16) and low_res (image of 3 channels, 1/4 of the size)"
    )
    with pytest.raises(UserError, match=r"takes embed \(embedding of 16\), and .* give embed \(embedding of 8\)$"):
        check_conditions(net, {"embed": Embedding(8)})
    with pytest.raises(UserError, match=r"ccld_unet takes embed \(Embedding\), and .* give nothing$"):
        CCLDUNet(4, {}, base_channels=16)
    ids = {"token_ids": TokenIds(6, 600)}
    with pytest.raises(
        UserError, match=r"takes embed \(Embedding\), .* give token_ids \(6 token ids of a vocabulary of"
    ):
        CCLDUNet(4, ids, base_channels=16)
    with pytest.raises(
        UserError, match=r"glide_unet takes token_ids \(TokenIds\), .* give token_ids \(token states, up"
    ):
        GlideUNet(3, {"token_ids": TokenStates(5, 7)}, **TINY_GLIDE)
    check_conditions(GlideUNet(3, ids, **TINY_GLIDE), {**ids})
    odd = {**ids, "low_res": Level()}
    with pytest.raises(UserError, match=r"and low_res \(noise level\)$"):
        check_conditions(GlideUNet(3, odd, **TINY_GLIDE), odd)


def test_conditioner_and_sources_give_their_union():
    text = GlideText(vocabulary="clip", vocab_size=600, text_size=6)
    sources = build_sources({"low_res": {"scale_factor": 2}, "inpaint": {}, "clip_embed": None})
    given = given_conditions(text, sources)
    assert given == {
        "token_ids": TokenIds(6, 600),
        "low_res": ImageCondition(3, 2),
        "inpaint_image": ImageCondition(3),
        "inpaint_mask": ImageCondition(1),
    }
    assert is_upsampler(given) and not is_upsampler(text.spec)
    assert describe_conditions(given_conditions(NoConditioner(embed_dim=4), {})) == "embed (embedding of 4)"
    check_conditions(GlideUNet(3, given, **TINY_GLIDE), given)
    with pytest.raises(UserError, match=r"condition_sources.low_res: gives low_res, and another part gives it, too"):
        given_conditions(text, {"other": LowRes(), "low_res": LowRes()})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"low_rse": {}}, "condition_sources.low_rse: no such condition source: 'low_rse'"),
        ({"low_res": {"factor": 2}}, "condition_sources.low_res.factor: no such key: 'factor'"),
        ({"low_res": {"scale_factor": 1}}, "condition_sources.low_res.scale_factor: "),
        ({"low_res": {"noise": -1.0}}, "condition_sources.low_res.noise: "),
        ({"low_res": 4}, "condition_sources.low_res: "),
        ({"low_res": {"name": "inpaint"}}, "condition_sources.low_res.name: "),
        ({"inpaint": {"rectangle": -1.0}}, "condition_sources.inpaint.rectangle: "),
        ({"inpaint": {"thickest": 1.5}}, "condition_sources.inpaint.thickest: "),
        ([1], "condition_sources: "),
    ],
)
def test_sources_that_cannot_be(section, message):
    with pytest.raises(UserError) as error:
        build_sources(section)
    assert str(error.value).startswith(message)


# ------------------------------------------------------------------------------------------------------ the sources

PIXELS = build("autoencoder", {"name": "identity"})


def batch(image: Tensor | None) -> Batch:
    count = 3 if image is None else len(image)
    return Batch([str(i) for i in range(count)], [""] * count, image=image)


def test_a_low_res_condition_is_made_with_the_random_numbers_that_are_handed_in():
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(
        LowRes(scale_factor=2).from_batch(batch(image), image, PIXELS, None)["low_res"], shrink(image, 2)
    )
    source = LowRes(scale_factor=2, noise=0.3, blur=2.0)
    made = [
        source.from_batch(batch(image), image, PIXELS, torch.Generator().manual_seed(seed))["low_res"]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    torch.manual_seed(1)
    assert torch.equal(source.from_batch(batch(image), image, PIXELS, None)["low_res"], made[0]), "or with torch's own"
    with pytest.raises(UserError, match="data: images are needed to train an upsampler, and a cache holds none"):
        source.from_batch(batch(None), torch.zeros(3, 4, 2, 2), PIXELS, None)


def test_what_is_enlarged_comes_from_the_request():
    x, low = torch.zeros(2, 3, 8, 8), torch.rand(2, 3, 4, 4)
    source = LowRes(scale_factor=2)
    given = source.from_request(ConditionRequest(x, low_res=low))
    assert torch.equal(given["low_res"], low) and source.null(given) == given, "it is never dropped"
    with pytest.raises(UserError, match="this model is an upsampler"):
        source.from_request(ConditionRequest(x))


def test_what_is_kept_comes_from_the_request():
    x, known = torch.zeros(2, 3, 4, 4), torch.randn(1, 3, 4, 4)
    anew = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    anew[..., :2] = True
    given = Inpaint().from_request(ConditionRequest(x, known=known, mask=anew))
    assert torch.equal(given["inpaint_image"], (known * ~anew).expand(2, -1, -1, -1)), "nothing under the mask"
    assert torch.equal(given["inpaint_mask"], (~anew).float().expand(2, -1, -1, -1))
    whole = Inpaint(channels=4).from_request(ConditionRequest(torch.zeros(2, 4, 4, 4)))
    assert whole["inpaint_image"].shape == (2, 4, 4, 4) and not whole["inpaint_mask"].any()
