"""Options that others leave without effect, guidance far above what was tried, other programs' syntax: each is said."""

from dataclasses import replace

import pytest
import tiny_glide
import torch
from PIL import Image
from tiny import DENOISER, embedding

from ldm_lab.checkpoints.formats import noised_clip
from ldm_lab.checkpoints.importer import say_once
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.guidance.noised_clip import NoisedCLIP
from ldm_lab.sampling import ModelOptions, Pipeline, SamplingOptions, Stage, Stages, request
from ldm_lab.sampling.aliases import SYNTAX, syntax_hints


@pytest.fixture
def said(caplog):
    """Return what a request is answered with: its lines in the log."""

    def lines(pipeline, prompts, **choices):
        request._tell_once.cache_clear()
        caplog.clear()
        pipeline.check(prompts, SamplingOptions(**{"sampler": {"name": "ddim", "steps": 4}, **choices}))
        return [record.getMessage() for record in caplog.records]

    return lines


def with_parts(pipeline, **changes):
    return Pipeline(replace(pipeline.model, **changes))


def test_what_is_asked_for_and_has_effect_is_not_talked_about(said, pipeline):
    for prompts, choices in (
        ("a fox", {}),
        ("a fox:1", {}),
        ("a fox", {"negative": "blurry", "guidance_interval": (0.2, 0.8), "guidance_rescale": 0.5}),
        (["a fox", ["a fox:2", "blurry:-1"]], {"guidance_interval": (0.2, 0.8), "guidance_rescale": 0.5}),
        (["a fox:1", "a dog"], {"negative": "blurry", "guidance": 4.0}),
        (["a fox:1", "a dog:3"], {"negative": "blurry", "tile": 32, "size": 64}),
    ):
        assert said(pipeline, prompts, **choices) == []


IDLE = [
    ("a fox", {"guidance": 1.0, "negative": "blurry"}, "negative: without effect: where the weights"),
    ("a fox:1", {"negative": "blurry"}, "negative: without effect"),
    ([["a fox:2", "old:-1"]], {"negative": "blurry"}, "negative: without effect"),
    ("a fox", {"guidance": 1.0, "guidance_interval": (0.2, 0.8)}, "guidance_interval: without effect: with a guidance"),
    ("a fox", {"guidance": 1.0, "guidance_rescale": 0.7}, "guidance_rescale: without effect"),
    ("a fox", {"guidance_interval": (0.5, 0.5)}, "guidance_interval: no step begins between 0.5 and 0.5"),
    ("a fox", {"guidance_interval": (0.0, 0.9999)}, "guidance_interval: without effect: every step begins"),
    ("a fox", {"guidance": 0.0}, "prompts: without effect at a weight of 0"),
    ([["a fox:0", "a dog:0"]], {}, "prompts: without effect at a weight of 0"),
    ("a fox:2", {"guidance": 5.0}, "guidance: 5 is without effect, since every prompt has a weight of its own"),
    ("a fox", {"tile": 32}, "tile: without effect: 32x32 pixels fit into one of 32"),
    ("a fox", {"init_image": Image.new("RGB", (32, 32)), "mask_blur": 2.0}, "mask_blur: without effect"),
    ("a fox", {"init_image": Image.new("RGB", (32, 32)), "strength": 0.1}, "strength: 0.1 of 4 steps is none"),
    (
        "a fox",
        {"init_image": Image.new("RGBA", (32, 32), (9, 9, 9, 0)), "mask": Image.linear_gradient("L").resize((32, 32))},
        "init_image: its transparent part is laid over white",
    ),
    (
        "a fox",
        {"init_image": Image.new("RGB", (32, 32)), "mask": Image.new("L", (32, 32), 255)},
        "mask: without effect: it is white all over",
    ),
    (
        "a fox",
        {"init_image": Image.new("RGB", (32, 32)), "strength": 0.9},
        "init_image: without effect but for the size: strength 0.9 of 4 steps is all of them",
    ),
    (
        "a fox",
        {"init_image": Image.new("RGB", (32, 32)), "strength": 0.0, "mask": Image.new("L", (32, 32), 255)},
        "strength: 0 paints nothing where the mask is white",
    ),
]


@pytest.mark.parametrize(("prompts", "choices", "line"), IDLE, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_an_option_without_effect_is_said(said, pipeline, prompts, choices, line):
    (found,) = said(pipeline, prompts, **choices)
    assert found.startswith(line)
    request_again = pipeline.check(prompts, SamplingOptions(sampler={"name": "ddim", "steps": 4}, **choices))
    assert request_again.mixes  # it is carried out, and what was said once is not said again


def test_it_is_said_once(said, pipeline, caplog):
    options = SamplingOptions(guidance=1.0, negative="blurry")
    said(pipeline, "a fox", guidance=1.0, negative="blurry")
    caplog.clear()
    pipeline.check("a dog", options)
    assert not caplog.records


def test_autoguidance_beside_a_negative_prompt_is_refused(said, pipeline):
    guide_model = build("denoiser", DENOISER, 4, embedding(16)).eval()
    led = with_parts(pipeline, guide_model=guide_model)
    with pytest.raises(UserError, match=r"negative: does not go with a guide model .*'blurry:-0\.5'"):
        led.check(["a fox"], SamplingOptions(negative="blurry"))
    assert said(led, [["a fox", "blurry:-0.5"]]) == []
    (line,) = said(led, "a fox", guidance=1.0)
    assert line.startswith("guide_model: without effect")


def test_a_model_without_prompts_says_that_they_say_nothing(said, parts):
    nothing = build("conditioner", {"name": "none", "embed_dim": 16})
    pipeline = Pipeline(replace(Pipeline_model(parts), conditioner=nothing))
    assert said(pipeline, "", guidance=1.0) == []
    (line,) = said(pipeline, "a fox", guidance=1.0)
    assert line == "prompts: without effect: this model was trained without any"


def Pipeline_model(parts):
    from ldm_lab.sampling import Model

    return Model(**parts, dropout=0.2, image_size=(32, 32))


@pytest.mark.parametrize("prompts", ["a fox:17", "a fox:-17", [["a fox:9", "a dog:9"]], ["a fox", "a dog:20"]])
def test_guidance_far_above_what_was_tried(said, pipeline, prompts):
    (line,) = said(pipeline, prompts)
    assert "far above what such models were tried with (16 at most)" in line
    assert said(pipeline, "a fox", guidance=16.0) == []


def test_a_spacing_beside_a_respacing(said):
    options = {"sampler": {"name": "unipc", "steps": "fast27", "spacing": "karras"}}
    (line,) = said(tiny_glide.pipeline(), "a fox", **options)
    assert line.startswith("spacing: without effect: steps fast27 say themselves")


def test_an_upsampler_is_not_asked_for_what_is_the_base_s():
    base, upsampler = tiny_glide.pipeline(), tiny_glide.pipeline(upsampler=True)
    for choices in ({"negative": "old"}, {"size": 64}, {"seed": 3}, {"rerank": 2}, {"clip_guidance": 3.0}):
        (name,) = choices
        with pytest.raises(UserError, match=f"upsampler: {name} belongs to the base model's options"):
            Stages([Stage(base), Stage(upsampler, SamplingOptions(**choices))])


@pytest.mark.parametrize(
    "prompts", [5, None, b"a fox", {"a fox": 3}, [5], ["a fox", None], [["a fox", b"x"]], [{"a": 1}]]
)
def test_what_is_no_prompt_is_refused(pipeline, prompts):
    with pytest.raises(UserError, match="a prompt is a text, a Prompt, a Pillow image, or a list of these, not "):
        pipeline.check(prompts)


@pytest.mark.parametrize("seed", [1.5, "1", 2**64, -(2**70), None])
def test_what_is_no_seed_is_refused(pipeline, seed):
    with pytest.raises(UserError, match="seeds: whole numbers of at most 64 bits are needed"):
        pipeline.check(["a fox"], seeds=[seed])


def test_guidance_of_an_upsampler(caplog):
    base, upsampler = tiny_glide.pipeline(), tiny_glide.pipeline(upsampler=True)
    for choices, line in (
        ({"guidance": 6.0}, "upsampler: guidance: weights of 6 in sum are far above"),
        ({"guidance_rescale": 0.5}, "upsampler: guidance_rescale: without effect"),
        ({"tile": 32}, "upsampler: tile: without effect: this model makes pixels"),
        ({}, None),
    ):
        request._tell_once.cache_clear()
        caplog.clear()
        fast = {"name": "ddim", "steps": 1}
        stages = Stages([Stage(base, SamplingOptions(sampler=fast)), Stage(upsampler, SamplingOptions(**choices))])
        stages.check(["a fox"])
        found = [record.getMessage() for record in caplog.records]
        assert len(found) == (line is not None) and (line is None or found[0].startswith(line)), found
    stages = Stages([Stage(base, SamplingOptions(sampler=fast)), Stage(upsampler, SamplingOptions(sampler=fast))])
    caplog.clear()
    stages(["a fox:3"])
    assert not caplog.records  # nothing that is a default is taken for the user's


# ----------------------------------------------------------------------------------------------------- CLIP guidance


def tiny_clip(width=32, head_width=16):
    torch.manual_seed(0)
    return NoisedCLIP(
        image_size=tiny_glide.SIDE, patch_size=4, image_width=width, image_layers=1, text_width=width, text_layers=1,
        embed_dim=8, head_width=head_width, vocab_size=49408, text_size=77, timesteps=100,
    )  # fmt: skip


def test_clip_guidance_by_an_empty_prompt(said):
    led = with_parts(tiny_glide.pipeline(), noised_clip=tiny_clip().eval())
    for prompts in ("", "  ", [["a fox", ""]], [["a fox:-1", ":1"]]):
        with pytest.raises(UserError, match="CLIP guidance: it leads to a text, and this prompt is empty"):
            led.check(prompts, SamplingOptions(clip_guidance=3.0))
    with pytest.raises(UserError, match="each picture needs a text with a weight above 0"):
        led.check(Image.new("RGB", (8, 8)), SamplingOptions(clip_guidance=3.0))
    assert said(led, "a fox", clip_guidance=3.0) == []
    assert "clip_guidance: 0 leads nowhere" in said(led, "a fox", clip_guidance=0.0)[0]
    assert "clip_guidance: 40 is far above" in said(led, "a fox", clip_guidance=40.0)[0]


def test_a_noised_clip_of_other_heads(tmp_path, capsys):
    def files(clip, name):
        paths = [tmp_path / f"{name}_{tower}.pt" for tower in ("image", "text")]
        for path, tower in zip(paths, (clip.image_encoder, clip.text_encoder)):
            torch.save(tower.state_dict(), path)
        return paths

    narrow, wide = files(tiny_clip(32, 16), "narrow"), files(tiny_clip(128, 32), "wide")
    with pytest.raises(
        UserError, match=r"image tower is 32 channels wide, which heads of 64 do not divide; how .* says"
    ):
        noised_clip.load(*narrow)
    with pytest.raises(UserError, match="heads of 24 do not divide"):
        noised_clip.load(*narrow, head_width=24)
    assert noised_clip.load(*narrow, head_width=16).image_encoder.blocks["block_0"].f_attn.heads == 2
    say_once.cache_clear()
    noised_clip.load(*wide)
    err = capsys.readouterr().err
    assert "attention heads of 64 channels are assumed: 2 in the image tower, 2 in the text tower" in err
    clip = noised_clip.load(*wide, head_width=32)
    assert not capsys.readouterr().err
    assert torch.equal(clip.text_embedding(["a fox"]), tiny_clip(128, 32).eval().text_embedding(["a fox"]))
    with pytest.raises(UserError, match="noised_clip_head_width: belongs to noised_clip"):
        ModelOptions(noised_clip_head_width=16)


def test_how_a_model_is_loaded_is_checked_from_python_too():
    assert ModelOptions(noised_clip=("a", "b"), precision="16-mixed", device="cpu").noised_clip == ("a", "b")
    for choices, message in (
        ({"precision": "fp16"}, "precision: one of '32-true', '16-mixed', 'bf16-mixed' is needed, not 'fp16'"),
        ({"noised_clip": ("a",)}, "noised_clip: "),
        ({"offload": "yes"}, "offload: true or false is needed"),
        ({"device": 0}, "device: text or null is needed"),
    ):
        with pytest.raises(UserError, match=message):
            ModelOptions(**choices)


# ------------------------------------------------------------------------------------------- other programs' syntax


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(red:1.3) fox", "(red:1.3) (a weight inside a prompt"),
        ("a ( red fox : .8 ) here", "here a whole prompt has a weight: 'red fox:.8'"),
        ("a (red)1.3 fox", "(red)1.3 (a weight inside"),
        ("a (red)++ fox", "(red)++ (a weight inside"),
        ("a fluffy++ fox", "a weight inside"),
        ("((masterpiece)), fox", "((masterpiece)) (stress"),
        ("{{masterpiece}}, fox", "{{masterpiece}} (stress"),
        ("a [blurry] fox", "[blurry] (less stress"),
        ("a [fox:dog:0.5]", "[fox:dog:0.5] (a prompt that changes"),
        ("a [fox::0.5]", "a prompt that changes"),
        ("a [fox|dog]", "[fox|dog] (prompts in turn"),
        ("a fox <lora:fur_v2:0.7>", "<lora:fur_v2:0.7> (an addition to the model"),
        ("a fox <hypernet:x:1>", "an addition"),
        ("a fox BREAK a dog", "BREAK (a new part"),
        ("a fox AND a dog", "AND (several prompts in one"),
        ("embedding:easynegative, fox", "embedding:easynegative (a learned word"),
        ("a __color__ fox", "__color__ (a word from a list"),
        ("a {red|blue} fox", "{red|blue} (one of several words"),
        ("a {2$$red|blue} fox", "one of several words"),
        ("a fox --ar 16:9 --v 6", "--ar 16:9 --v 6 (options"),
        ("hot::2 dog", "weights of parts"),
        ('--prompt "a fox" --steps 20', "options"),
    ],
)
def test_other_programs_syntax_is_noticed(text, found):
    hints = syntax_hints([text])
    assert len(hints) == 1 and found in hints[0] and "is taken as plain words" in hints[0], hints


@pytest.mark.parametrize(
    "text",
    [
        "a red fox", "a fox (in winter), 1920s", "the sign says (A)", "A FOX AND A DOG", "fox and dog", "C++ code",
        "a well-known fox -- in the snow", "ratio 16:9", "meet at 12:30", "a fox (2019)", "lora the fox", "foo_bar_baz",
        "salt&pepper; 50% grey", "fox: a study", "a {fox}", "mother-in-law", "(blue)-green fox", "",
    ],
)  # fmt: skip
def test_plain_english_is_not(text):
    assert syntax_hints([text]) == []


def test_each_kind_is_said_once_and_also_of_the_negative_prompt(said, pipeline):
    lines = said(pipeline, ["(a:1.2) fox", "(b:1.3) dog", "((c)) owl"], negative="(bad:1.4), [worse]")
    assert len(lines) == 3 and "(a:1.2)" in lines[0]
    assert len(syntax_hints(["x " * 9 + f"<lora:{'y' * 500}>"])[0]) < 200
    assert len(SYNTAX) > 10
