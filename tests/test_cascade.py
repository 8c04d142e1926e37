"""Base and upsampler in a row, inpainting models, clamped estimates: the Python side and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_glide
import torch
from PIL import Image
from tiny_glide import FACTOR, SIDE

from ldm_lab.commands import sample
from ldm_lab.commands._sampling_flags import base_options, fill_in_stages, numbered, upsampler_options
from ldm_lab.conditions import ImageCondition
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.io.images import round_to_uint8, to_tensor
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Pipeline, SamplingOptions, Stage, Stages, interpolate

FAST = {"name": "ddim", "steps": 3}


@pytest.fixture(scope="module")
def base():
    return tiny_glide.pipeline()


@pytest.fixture(scope="module")
def upsampler():
    return tiny_glide.pipeline(upsampler=True)


def options(**choices):
    return SamplingOptions(**{"sampler": FAST, **choices})


def stages(base, upsampler, of_upsampler=None, **choices):
    return Stages([Stage(base, options(**choices)), Stage(upsampler, of_upsampler or options())])


def watch(monkeypatch, pipeline):
    """Return a list that every call of the denoiser adds its arguments to."""
    seen, forward = [], pipeline.model.denoiser.forward

    def watched(x, t, **cond):
        seen.append({"x": x, "t": t, **cond})
        return forward(x, t, **cond)

    monkeypatch.setattr(pipeline.model.denoiser, "forward", watched)
    return seen


def levels(image):
    return np.array(image).astype(int)


def test_small_and_large_pictures_of_each_prompt(base, upsampler, monkeypatch):
    seen = watch(monkeypatch, upsampler)
    pairs = stages(base, upsampler)(["a cat", "a dog"], seeds=[3, 9])
    alone = base(["a cat", "a dog"], options(), seeds=[3, 9])
    for (small, large), image, seed in zip(pairs, alone, (3, 9)):
        assert np.array_equal(levels(small), levels(image)), "the base's picture does not depend on the upsampler"
        assert small.size == (SIDE, SIDE) and large.size == (SIDE * FACTOR, SIDE * FACTOR)
        assert small.info["seed"] == large.info["seed"] == seed
    assert len(seen) == 3
    for call in seen:  # no guidance: each prompt once, on what the base made, in whole levels
        assert len(call["x"]) == 2 and call["token_ids_mask"].any(dim=1).all()
        given = torch.stack([to_tensor(small) for small, _ in pairs])
        assert torch.allclose(call["low_res"], given, atol=1e-6)


def test_a_picture_does_not_depend_on_its_batch(base, upsampler):
    both = stages(base, upsampler, options(batch_size=2), guidance=2.0, batch_size=2)
    together = both(["a cat", "a dog", "a hat"], seeds=[0, 1, 2])
    alone = stages(base, upsampler, guidance=2.0)(["a hat"], seeds=[2])
    for ours, theirs in zip(together[2], alone[0]):
        assert abs(levels(ours) - levels(theirs)).max() <= 1


def test_noise_of_the_upsampler_is_its_own_and_its_temperature(base, upsampler, monkeypatch):
    seen_base, seen = watch(monkeypatch, base), watch(monkeypatch, upsampler)
    for temperature in (1.0, 0.5):
        stages(base, upsampler, options(temperature=temperature), guidance=1.0)(["a cat"])
    first, cooler = seen[0]["x"], seen[3]["x"]
    assert torch.allclose(cooler, 0.5 * first)
    small = seen_base[0]["x"].flatten()
    correlation = torch.corrcoef(torch.stack([small, first.flatten()[: len(small)]]))[0, 1]
    assert correlation.abs() < 0.15


def test_other_sizes_are_enlarged_by_the_same_factor(base, upsampler):
    ((small, large),) = stages(base, upsampler, size=(12, 20))(["a cat"])
    assert small.size == (20, 12) and large.size == (40, 24)


def test_sizes_that_do_not_meet_are_refused(base, upsampler):
    """The upsampler was trained to enlarge pictures of 16 px to 32."""
    large = tiny_glide.pipeline()
    large.model.image_size = (32, 32)
    with pytest.raises(UserError) as error:
        stages(large, upsampler).check(["a cat"])
    assert str(error.value) == (
        "upsampler: it was trained to enlarge 16 px to 32, and gets 32x32 of a model of 32 px; take an upsampler of "
        "32 px, or make the small pictures at 16 (size)"
    )
    with pytest.raises(UserError, match="gets 32x48 of a model of 32 px"):
        stages(large, upsampler, size=(48, 32)).check(["a cat"])
    with pytest.raises(UserError, match="enlarge 16 px to 32, and gets 32x32 of a model of 32 px"):
        Stages([Stage(base, options()), Stage(upsampler, options()), Stage(upsampler, options())]).check(["a cat"])
    stages(large, upsampler, size=16).check(["a cat"])
    stages(large, upsampler, size=(16, 24)).check(["a cat"])
    stages(base, upsampler, size=64).check(["a cat"])  # models of one another make larger ones than they were shown
    large.model.image_size = None
    stages(large, upsampler, size=32).check(["a cat"])  # nobody says


def test_channels_that_do_not_meet_are_refused(base, upsampler, monkeypatch):
    odd = {**upsampler.model.denoiser.spec, "low_res": ImageCondition(4, FACTOR)}
    monkeypatch.setattr(upsampler.model.denoiser, "spec", odd)
    with pytest.raises(UserError, match=r"upsampler: it enlarges images of 4 channels, and gets pictures of 3 \(RGB\)"):
        stages(base, upsampler).check(["a cat"])


def test_three_stages(base, upsampler, monkeypatch):
    further = tiny_glide.pipeline(upsampler=True)
    seen = [watch(monkeypatch, pipeline) for pipeline in (upsampler, further)]
    reports = []
    three = Stages([Stage(base, options(size=8)), Stage(upsampler, options(batch_size=1)), Stage(further, options())])
    made = three(["a cat", "a dog"], seeds=[3, 9], progress=lambda *steps: reports.append(steps))
    assert [[image.size for image in row] for row in made] == [[(8, 8), (16, 16), (32, 32)]] * 2
    assert [[image.info["seed"] for image in row] for row in made] == [[3] * 3, [9] * 3]
    two = Stages([three.base, three.upsamplers[0]])(["a cat", "a dog"], seeds=[3, 9])
    assert np.array_equal(levels(made[1][1]), levels(two[1][1])), "no stage depends on those after it"
    second, third = seen[0][0], seen[1][0]
    assert torch.allclose(third["low_res"][0], to_tensor(made[0][1]), atol=1e-6)
    assert not torch.allclose(second["x"][0], third["x"][0, :, :16, :16], atol=0.1), "each stage has noise of its own"
    assert reports == [(i + 1, 3 + 2 * 3 + 3) for i in range(12)]


def test_offloading_has_one_part_of_one_stage_on_the_device_at_a_time(base, upsampler, monkeypatch):
    """Text encoders, denoisers and autoencoders of all stages come and go: what is resident is the one that works."""
    resident, most, moves = set(), [], []

    def watched(pipeline, stage):
        model = replace(pipeline.model, run_device=torch.device("cpu:0"), offload=True)
        for role in ("denoiser", "autoencoder", "conditioner"):
            part = getattr(model, role)

            def to(device, part=part, name=(stage, role)):
                (resident.discard if str(device) == "cpu" else resident.add)(name)
                most.append(len(resident))
                moves.append(name)
                return part

            monkeypatch.setattr(part, "to", to)

        def forward(*args, call=model.denoiser.forward, **conditions):
            assert resident == {(stage, "denoiser")}
            return call(*args, **conditions)

        monkeypatch.setattr(model.denoiser, "forward", forward)
        return Pipeline(model)

    plain = stages(base, upsampler, batch_size=1)(["a cat", "a dog"])
    cheap = stages(watched(base, 0), watched(upsampler, 1), batch_size=1)(["a cat", "a dog"])
    assert [image.tobytes() for row in cheap for image in row] == [image.tobytes() for row in plain for image in row]
    assert max(most) == 1 and not resident
    assert {(stage, role) for stage in (0, 1) for role in ("denoiser", "autoencoder", "conditioner")} == set(moves)


def test_prompts_of_the_upsampler_count_in_proportion(base, upsampler, monkeypatch):
    mix = [Prompt("cat", 3.0), Prompt("hat", 1.0), Prompt("ugly", -1.0)]
    for guidance, rows, weights in ((None, 2, [0.75, 0.25]), (4.0, 3, [3.0, 1.0])):
        both = stages(base, upsampler, options(guidance=guidance))
        (given,) = both.check([mix]).upsampling[0].mixes
        assert [prompt.text for prompt in given] == ["cat", "hat"]
        assert [prompt.weight for prompt in given] == pytest.approx(weights)
        seen = watch(monkeypatch, upsampler)
        both([mix])
        assert len(seen[0]["x"]) == rows  # with guidance also without a prompt
        assert all(torch.equal(call["low_res"][0], call["low_res"][-1]) for call in seen)  # which is never dropped
        monkeypatch.undo()
    (given,) = stages(base, upsampler).check([[Prompt("cat", 0.0)]]).upsampling[0].mixes
    assert [prompt.text for prompt in given] == [""]


def test_progress_counts_both_models(base, upsampler):
    reports = []
    both = stages(base, upsampler, options(sampler={"name": "ddim", "steps": 4}, batch_size=2), batch_size=2)
    both(["a"] * 5, progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (3 * 3 + 3 * 4, 21)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert {total for _, total in reports} == {21}


def test_the_upsampler_s_own_sampler_fits_its_timesteps(base, upsampler):
    def sampler(choices):
        return stages(base, upsampler, choices).check(["a"]).upsampling[0].options.sampler

    assert sampler(SamplingOptions()) == {"name": "ddim", "steps": "fast27"}
    assert sampler(SamplingOptions(sampler="unipc")) == {"name": "unipc"}


@pytest.mark.parametrize("name", ["ddpm", "ddim", "plms", "euler", "heun", "dpmpp_2m", "unipc"])
def test_every_way_of_sampling_makes_pictures_of_pixels(base, upsampler, name):
    steps = {"name": name, "steps": 4}
    ((small, large),) = stages(base, upsampler, options(sampler=steps), sampler=steps)(["a cat"])
    assert levels(small).std() > 0 and levels(large).std() > 0


def test_clean_estimates_of_pixels_are_clamped_unless_told_otherwise(base):
    seen = {}
    for clip_denoised in (None, False):
        choices = options(sampler={"name": "ddim", "steps": 6}, guidance=6.0, clip_denoised=clip_denoised)
        (batch,) = base.samples(["a cat"], choices)
        seen[clip_denoised] = batch[0].pixels.abs().max().item()
    assert seen[None] <= 1 < seen[False]


def test_mistakes(base, upsampler):
    unconditional = tiny_glide.pipeline(upsampler=True)
    unconditional.model.conditioner = build("conditioner", {"name": "none"})
    blunt = tiny_glide.pipeline(upsampler=True)
    blunt.model.dropout = 0.0
    low_res = [Image.new("RGB", (SIDE, SIDE))]
    guided = options(guidance=3.0)
    for call, message in (
        (lambda: stages(upsampler, upsampler), "base model: this is an upsampler"),
        (lambda: stages(base, base), "upsampler: this is a base model"),
        (lambda: upsampler(["a"]), "this model is an upsampler: it enlarges the pictures of a base model"),
        (lambda: base(["a"], low_res=low_res), "this model is no upsampler"),
        (lambda: upsampler(["a", "b"], low_res=low_res), "low_res: 1 images to enlarge for 2 pictures"),
        (lambda: upsampler(["a", "b"], low_res=[*low_res, Image.new("RGB", (8, 8))]), "have to be of one size"),
        (lambda: SamplingOptions(temperature=float("nan")), "temperature: "),
        (lambda: SamplingOptions(guidance=float("inf")), "guidance: number or null is needed"),
        (lambda: stages(base, upsampler, guided).samples([""]), "needs a text that it guides to"),
        (lambda: stages(base, unconditional, guided).samples(["a"]), "it was trained without any"),
        (lambda: stages(base, blunt, guided).samples(["a"]), "guidance needs a model"),
        (
            lambda: stages(base, upsampler, options(sampler={"name": "ddim", "steps": 200})).samples(["a"]),
            "100 timesteps",
        ),
        (lambda: stages(base, upsampler, sampler={"name": "ddim", "steps": "ddim33"}).samples(["a"]), "34"),
        (lambda: interpolate(base, ["a", "b"], 3), "no embeddings to interpolate"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value), message
    assert stages(base, blunt)(["a"])  # without guidance it is as good as any


# ------------------------------------------------------------------------------------------------- inpainting


@pytest.fixture
def start():
    """The options of an inpainting."""
    picture = Image.effect_noise((SIDE * FACTOR, SIDE * FACTOR), 80).convert("RGB")
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, SIDE, SIDE * FACTOR))  # the left half is painted anew
    return {"init_image": picture, "mask": mask}


@pytest.mark.parametrize("form", [{}, {"inpaint": True}])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "plms", "unipc"])
def test_inpainting_small_and_large_keeps_what_is_known(start, form, name, monkeypatch):
    base, upsampler = tiny_glide.pipeline(**form), tiny_glide.pipeline(upsampler=True, **form)
    seen = {model: watch(monkeypatch, model) for model in (base, upsampler)}
    steps = {"name": name, "steps": 4}
    ((small, large),) = stages(base, upsampler, options(sampler=steps), sampler=steps, **start)(["a cat"])
    assert np.array_equal(levels(large)[:, SIDE:], levels(start["init_image"])[:, SIDE:])
    assert abs(levels(large)[:, :SIDE] - levels(start["init_image"])[:, :SIDE]).mean() > 5
    for calls in seen.values():
        for call in calls:
            assert ("inpaint_mask" in call) == bool(form)
            if form:  # 1 where the picture is known: the right half
                half = call["x"].shape[3] // 2
                assert (call["inpaint_mask"][..., half:] == 1).all() and (call["inpaint_mask"][..., :half] == 0).all()
                assert call["inpaint_mask"].shape == (len(call["x"]), 1, *call["x"].shape[2:])
    given = seen[upsampler][0]["low_res"]
    assert torch.allclose(given, round_to_uint8(to_tensor(small)[None]).expand_as(given), atol=1e-6)


def test_an_inpainting_model_without_a_picture_paints_all():
    assert tiny_glide.pipeline(inpaint=True)(["a cat"], options())


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glide")
    return {
        "base": tiny_glide.write(folder / "base.safetensors"),
        "upsampler": tiny_glide.write(folder / "upsampler.safetensors", upsampler=True),
        "large_base": tiny_glide.write(folder / "large_base.safetensors", side=64),
    }


def test_the_command_keeps_both_sizes(program, files, tmp_path):
    code, _, err = program(
        "sample", "--checkpoint", files["base"], "--upsampler", files["upsampler"], "a cat", "-n", 2, "--steps", 3,
        "--sampler", "ddpm", "--variance", "posterior", "--upsampler-steps", "2,2,2", "--upsampler-temperature", 0.9,
        "--upsampler-guidance", 2, "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    entries = json.loads((tmp_path / "out/samples.json").read_text())
    assert len(entries) == 2
    for i, entry in enumerate(entries):
        for name, side in ((entry["file"], SIDE * FACTOR), (entry["base"]["file"], SIDE)):
            with Image.open(tmp_path / "out" / name) as image:
                assert image.size == (side, side)
        assert entry["file"] == f"0000{i}.png" and entry["base"]["file"] == f"0000{i}_base.png"
        assert entry["base"]["width"] == SIDE and entry["width"] == SIDE * FACTOR and entry["seed"] == i
        assert entry["upsampler_steps"] == "2,2,2" and entry["upsampler_temperature"] == 0.9
        assert entry["upsampler_guidance"] == 2 and len(entry["upsampler_sha256"]) == 64
        assert entry["variance"] == "posterior"
    assert (tmp_path / "out/grid.png").exists()
    # a second run goes on behind the first one
    options = ("--upsampler", files["upsampler"], "--steps", 2, "--out", tmp_path / "out", "--device", "cpu")
    code, _, err = program("sample", "--checkpoint", files["base"], "a cat", "-n", 1, *options)
    assert code == 0, err
    assert (tmp_path / "out/00002_base.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--checkpoint", "{upsampler}"),
            "error: this model is an upsampler: it enlarges the pictures of a base model",
        ),
        (("--checkpoint", "{upsampler}", "--upsampler", "{upsampler}"), "error: base model: this is an upsampler"),
        (("--checkpoint", "{base}", "--upsampler", "{base}"), "error: upsampler: this is a base model"),
        (("--checkpoint", "{base}", "--upsampler", "none.pt"), "none.pt"),
        (
            ("--checkpoint", "{large_base}", "--upsampler", "{upsampler}"),
            "upsampler: it was trained to enlarge 16 px to 32, and gets 64x64 of a model of 64 px",
        ),
        (
            ("--checkpoint", "{base}", "--upsampler-temperature", "1"),
            "--upsampler-temperature belongs to an --upsampler",
        ),
        (("--checkpoint", "{base}", "--noised-clip", "a", "b"), "--noised-clip belongs to --clip-guidance"),
        (("--checkpoint", "{base}", "--steps", "300", "--sampler", "ddim"), "steps 300: the model has 100 timesteps"),
        (("--checkpoint", "{base}", "--steps", "fast"), "such as fast27, ddim50 or 10,10,3,2,2 is needed, not 'fast'"),
        (
            ("--checkpoint", "{base}", "--spacing", "spliced"),
            "spacing spliced: that grid belongs to the cosine schedule",
        ),
        (
            ("--checkpoint", "{base}", "--upsampler", "{upsampler}", "--upsampler-steps", "60,0"),
            "steps 60,0: section 1 of 2 has 50 timesteps",
        ),
        (
            ("--checkpoint", "{base}", "--upsampler", "{upsampler}", "--interpolate", "3", "another"),
            "--interpolate does not go with --upsampler",
        ),
    ],
)
def test_one_line_for_each_mistake(program, files, tmp_path, options, message):
    options = [option.format(**files) for option in options]
    code, _, err = program("sample", "a cat", *options, "--out", tmp_path / "out", "--device", "cpu")
    (line,) = err.splitlines()
    assert code == 2 and message in line and not (tmp_path / "out").exists()


def test_the_command_guides_an_empty_upsampling_by_nothing(program, files, tmp_path):
    code, _, err = program(
        "sample", "", "--guidance", 1, "--checkpoint", files["base"], "--upsampler", files["upsampler"],
        "--upsampler-guidance", 2, "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert code == 2 and "guidance of the upsampler needs a text" in err and len(err.splitlines()) == 1


# --------------------------------------------------------------------------------------------- options of each stage


def stage_options(*words, upsamplers=2):
    words = ["a cat", "--checkpoint", "base", *["--upsampler", "up"] * upsamplers, *map(str, words)]
    return upsampler_options(sample.parser(numbered(words)).parse_words(words), 4)


def test_each_upsampler_may_have_options_of_its_own():
    first, second = stage_options(
        "--upsampler-guidance", 2, "--upsampler-sampler", "ddim", "--upsampler-eta", 0.5, "--upsampler.2.steps", 40,
        "--upsampler.2.low-res-level=0.1", "--upsampler.1.guidance", 1.5,
    )  # fmt: skip
    assert first.sampler == {"name": "ddim", "eta": 0.5} and first.guidance == 1.5 and first.low_res_level is None
    assert second.sampler == {"name": "ddim", "eta": 0.5, "steps": 40}
    assert (second.guidance, second.low_res_level, second.batch_size) == (2, 0.1, 4)
    _, other = stage_options("--upsampler-steps", 8, "--upsampler-eta", 0.5, "--upsampler.2.sampler", "heun")
    assert other.sampler == {"name": "heun", "steps": 8}  # ddim's eta is not heun's


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--upsampler.3.steps", 4), "--upsampler.3.steps: there are upsamplers 1 to 2"),
        (("--upsampler.0.steps", 4), "--upsampler.0.steps: there are upsamplers 1 to 2"),
        (("--upsampler.2.stepz", 4), r"unknown flag: --upsampler\.2\.stepz; is --upsampler\.2\.steps meant"),
        (("--upsampler.two.steps", 4), r"unknown flag: --upsampler\.two\.steps"),
        (("--upsampler.2.seed", 4), r"unknown flag: --upsampler\.2\.seed"),
        (
            ("--upsampler.2.eta", 0.5, "--upsampler.2.sampler", "heun"),
            r"--upsampler\.2\.eta: no such key: 'eta' of sampler",
        ),
        (("--upsampler.2.low-res-level", 1.5), r"--upsampler\.2\.low-res-level: a number from 0 to 1"),
        (("--upsampler.2.steps", "fast"), r"--upsampler\.2\.steps: .*is needed, not 'fast'"),
        (("--upsampler.2.threshold-percentile", -1), r"--upsampler\.2\.threshold-percentile: a number from 0 to 1"),
    ],
)
def test_options_of_an_upsampler_that_are_wrong(words, message):
    with pytest.raises(UserError, match=message):
        stage_options(*words)


def test_which_of_several_upsamplers_is_meant_is_said(base, upsampler):
    with pytest.raises(UserError, match=r"^low_res_level: this model is told of no noise"):
        stages(base, upsampler, options(low_res_level=0.1)).check(["a cat"])
    with pytest.raises(UserError, match=r"^upsampler 2: it was trained to enlarge 16 px to 32, and gets 32x32"):
        Stages([Stage(base, options()), *[Stage(upsampler, options())] * 2]).check(["a cat"])


def test_the_stages_of_a_yaml(tmp_path):
    path = tmp_path / "cascade.yaml"
    path.write_text(
        "stages:\n- {checkpoint: base, guidance: 5, steps: 30}\n- {checkpoint: sr256, steps: 40}\n"
        "- {checkpoint: sr1024, sampler: ddpm, low_res_level: 0.1}\n"
    )
    words = ["a cat", "--stages", str(path), "--upsampler.1.steps", "20"]
    args = sample.parser(numbered(words)).parse_words(words)
    fill_in_stages(args)
    assert args.checkpoint == "base" and args.upsampler == ["sr256", "sr1024"]
    options = base_options(args)
    assert options.guidance == 5 and options.sampler == {"name": "unipc", "steps": 30}
    first, second = upsampler_options(args, 4)
    assert first.sampler == {"name": "ddim", "steps": 20}, "the command line goes before the file"
    assert second.sampler == {"name": "ddpm"} and second.low_res_level == 0.1
    words = ["a cat", "--stages", str(path), "--upsampler-steps", "10"]
    args = sample.parser(numbered(words)).parse_words(words)
    fill_in_stages(args)
    assert upsampler_options(args, 4)[0].sampler["steps"] == 10, "also where it speaks of all stages"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3", "stages: a list is needed"),
        ("stages: []", "stages: a list is needed"),
        ("stages: [base]", "stages: a list is needed"),
        ("stages: [{guidance: 3}]", "stages.0.checkpoint: the file of a model is needed"),
        ("stages: [{checkpoint: a, stepz: 3}]", "stages.0.stepz: no such option: 'stepz'. Did you mean 'steps'"),
        ("stages: [{checkpoint: a}, {checkpoint: b, seed: 3}]", "stages.1.seed: no such option: 'seed'"),
        (
            "stages: [{checkpoint: a}, {checkpoint: b, low_res_level: 3}]",
            r"--upsampler\.1\.low-res-level: .*a number from 0 to 1",
        ),
        ("stages: [{checkpoint: a, sampler: {name: ddim, steps: 7}}]", "stages.0.sampler: a name is needed"),
        ("stages: [{checkpoint: a}, {checkpoint: b, sampler: [ddim]}]", "stages.1.sampler: a name is needed"),
        ("stages: [{checkpoint: a}, {checkpoint: b, guidance: much}]", r"--upsampler\.1\.guidance: number or null"),
    ],
)
def test_stages_of_a_yaml_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "cascade.yaml"
    path.write_text(text)
    args = sample.parser().parse_words(["a cat", "--stages", str(path)])
    with pytest.raises(UserError, match=message):
        fill_in_stages(args)
        upsampler_options(args, 4)


def test_stages_name_the_models_themselves(tmp_path):
    args = sample.parser().parse_words(["a cat", "--stages", "a.yaml", "--checkpoint", "b"])
    with pytest.raises(UserError, match="--stages: names the models"):
        fill_in_stages(args)


def test_the_command_with_options_of_each_stage_and_once_more(program, files, tmp_path):
    """Base and two upsamplers, of which the last picture alone is written; `--from` makes it again."""
    out = tmp_path / "out"
    large = tiny_glide.write(tmp_path / "large.safetensors", upsampler=True, side=SIDE * FACTOR**2)
    models = ("--checkpoint", files["base"], "--upsampler", files["upsampler"], "--upsampler", large)
    code, _, err = program(
        "sample", *models, "a cat", "-n", 1, "--steps", 2, "--upsampler-steps", 3, "--upsampler.2.steps", 2,
        "--upsampler.2.guidance", 1.5, "--only-last", "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert sorted(path.name for path in out.glob("*.png")) == ["00000.png", "grid.png"]
    (entry,) = json.loads((out / "samples.json").read_text())
    assert entry["width"] == SIDE * FACTOR**2 and entry["base"] == {"width": SIDE, "height": SIDE}
    assert (entry["upsampler_steps"], entry["upsampler.2.steps"], entry["upsampler.2.guidance"]) == (3, 2, 1.5)
    again = ("--from", out / "00000.png", *models, "--out", tmp_path / "again", "--device", "cpu")
    code, _, err = program("sample", *again)
    assert code == 0 and "left out" not in err, err
    with Image.open(out / "00000.png") as then, Image.open(tmp_path / "again/00000.png") as now:
        assert np.array_equal(np.asarray(then), np.asarray(now))
    assert len(list((tmp_path / "again").glob("00000*.png"))) == 3
