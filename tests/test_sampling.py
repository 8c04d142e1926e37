"""The pipeline: prompts to pictures with random tiny parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DENOISER, make_parts

from ldm_lab.checkpoints.files import write_safetensors
from ldm_lab.checkpoints.native import save_model
from ldm_lab.devices import pick_device
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Sampler
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Model, ModelOptions, Pipeline, SamplingOptions
from ldm_lab.sampling.image_to_image import InitImage
from ldm_lab.sampling.pipeline import Draw
from ldm_lab.sampling.prompts import PromptBatch, parse_mix, parse_prompts

BOUND = 1e-4  # relative, of a latent in batches of different sizes; see Pipeline
FAST = {"name": "plms2", "steps": 3}
CPU = ModelOptions(device="cpu")


def options(**choices):
    return SamplingOptions(**{"sampler": FAST, **choices})


def pixels(images):
    return np.stack([np.array(image) for image in images]).astype(int)


def latents(pipeline, prompts, seeds=None, **choices):
    """The latents [N, C, h, w] behind images."""
    request = pipeline.check(prompts, SamplingOptions(**choices), seeds=seeds)
    batch, size = pipeline.encode(request), request.options.batch_size
    draws = [Draw(picture, seed) for picture, seed in enumerate(request.seeds)]
    return torch.cat([pipeline.latents(request, batch, draws[i : i + size]) for i in range(0, len(draws), size)])


def raw(pipeline, prompts, seeds, batch_size, name="ddpm", guidance=3.0):
    """The latents behind images by four steps of a sampler."""
    sampler = {"name": name, "steps": 4}
    return latents(pipeline, prompts, seeds, sampler=sampler, batch_size=batch_size, guidance=guidance)


def test_images_in_the_order_of_their_prompts(pipeline):
    seen = []
    images = pipeline(
        ["red", "blue:2", ["red", "blue:-1"]], options(batch_size=2), progress=lambda *steps: seen.append(steps)
    )
    assert [(image.size, image.mode) for image in images] == [((32, 32), "RGB")] * 3
    assert seen == [(i, 6) for i in range(1, 7)]
    assert len({image.tobytes() for image in images}) == 3
    assert pipeline([], options()) == []


def test_a_prompt_by_itself_is_one_picture_and_not_its_letters(pipeline):
    (image,) = pipeline("red", options())
    assert image.tobytes() == pipeline(["red"], options())[0].tobytes()
    assert image.info["seed"] == 0
    assert parse_prompts(Prompt("red", 2.0)) == [[Prompt("red", 2.0)]]


def test_seeds_count_on_from_the_first_one(pipeline):
    assert [image.info["seed"] for image in pipeline(["red"] * 3, options(seed=7))] == [7, 8, 9]
    drawn = [pipeline(["red"] * 2, options(seed=-1)) for _ in range(2)]
    seeds = [[image.info["seed"] for image in images] for images in drawn]
    assert seeds[0] != seeds[1] and all(second == first + 1 >= 1 for first, second in seeds)


MIXES = ["red", ["red:2", "blue:-1", "old:0"], "blue:1", ["red:0.5", "blue:0.5"], "red:0", "a green star"]


@pytest.mark.parametrize("name", ["plms", "ddpm"])
def test_an_image_depends_on_its_seed_and_prompts_alone(pipeline, name):
    seeds = [3, 1, 4, 1, 5, 9]
    alone = raw(pipeline, MIXES, seeds, 1, name)
    for batch_size in (4, 6):
        together = raw(pipeline, MIXES, seeds, batch_size, name)
        assert ((together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)).max() < BOUND
    order = [5, 0, 3]
    shuffled = raw(pipeline, [MIXES[i] for i in order], [seeds[i] for i in order], 3, name)
    assert ((shuffled - alone[order]).norm() / alone.norm()) < BOUND


def test_pixels_do_not_depend_on_the_batch_size(pipeline):
    one, four = (pixels(pipeline(MIXES[:4], options(batch_size=size))) for size in (1, 4))
    assert abs(one - four).max() <= 1


def test_seeds_make_images_and_repeat_them(pipeline):
    latents = raw(pipeline, ["red"] * 4, [7, 8, 7, 2**62], 4)
    assert torch.equal(latents[0], latents[2])
    assert not torch.allclose(latents[0], latents[1], atol=0.1)
    assert torch.equal(raw(pipeline, ["red"] * 2, range(2), 2), raw(pipeline, ["red"] * 2, None, 2))


def test_noise_is_fresh_in_every_step(pipeline):
    drawn = []

    class Drawing(Sampler):
        steps = 2

        def sample(self, predict, x, *, schedule, noise, callback):
            drawn.extend([x, noise(x), noise(x)])
            return x

    request = replace(pipeline.check(["red"], options()), sampler=Drawing())
    (batch,) = pipeline.draw(request, pipeline.encode(request), [Draw(0, 5)])
    assert batch[0].seed == 5
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(torch.cat(drawn), torch.stack([torch.randn(4, 4, 4, generator=generator) for _ in range(3)]))


def test_guidance_is_the_weight_of_prompts_without_one(pipeline):
    written = raw(pipeline, ["red:2", ["red:2", "blue:1.5"]], [0, 1], 2)
    default = raw(pipeline, ["red", [Prompt("red"), Prompt("blue", 1.5)]], [0, 1], 2, guidance=2.0)
    assert torch.equal(written, default)
    unguided = raw(pipeline, ["red:0"], [0], 1)
    assert torch.allclose(unguided, raw(pipeline, ["blue:0"], [0], 1))
    assert not torch.allclose(unguided, written[:1], atol=1e-3)


def test_image_prompts(parts, pipeline):
    picture = Image.effect_noise((40, 30), 60)
    prompt = Prompt("noise.png", 2.0, picture)
    by_prompt = raw(pipeline, [[prompt, "red:1"]], [0], 1)
    assert torch.equal(by_prompt, raw(pipeline, [[picture, "red:1"]], [0], 1, guidance=2.0))
    embed = parts["conditioner"].from_prompts(["red"], [picture])["embed"]
    batch = PromptBatch.encode(pipeline.model, [[prompt, Prompt("red", 1.0)], [Prompt("red")]], 3.0, None, None)
    assert torch.allclose(batch.conditions["embed"][batch.index[0]], embed[[1, 0]], atol=1e-6)
    assert len(batch.conditions["embed"]) == 2  # "red" was encoded once
    assert batch.index[1].tolist() == [batch.index[0, 1], 0]
    assert batch.weights.tolist() == [[2.0, 1.0], [3.0, 0.0]]


def test_a_mix_may_be_written_in_many_ways():
    picture = Image.new("L", (2, 2))
    assert parse_mix("a:b") == [Prompt("a:b")]
    assert parse_mix(["a", Prompt("b:3"), picture]) == [Prompt("a"), Prompt("b:3"), Prompt("image", image=picture)]
    with pytest.raises(UserError, match="at least one prompt"):
        parse_mix([])


def test_other_sizes(pipeline):
    (image,) = pipeline(["red"], options(size=(16, 48)))
    assert image.size == (48, 16)
    assert pipeline(["red"], options(size="48x16"))[0].tobytes() == image.tobytes()
    assert pipeline(["red"], options(size=64))[0].size == (64, 64)


@pytest.mark.parametrize("size", [40, 0, -32, (32, 40)])
def test_a_size_that_the_levels_do_not_divide(pipeline, size):
    with pytest.raises(UserError, match="this model takes multiples of 16 pixels, such as"):
        pipeline(["red"], options(size=size))


def test_no_size_is_known(parts):
    with pytest.raises(UserError, match="does not say what size"):
        Pipeline(Model(**parts, dropout=0.2))(["red"])


@pytest.mark.parametrize(
    ("prompts", "choices", "message"),
    [
        (["red"], {"sampler": "plsm"}, "no such sampler: 'plsm'. Did you mean 'plms'?"),
        (["red"], {"sampler": {"name": "plms", "eta": 1.0}}, "'eta'"),
        (["red"], {"sampler": {"name": "ddim", "eta": 2.0}}, "sampler.eta: a number from 0 to 1 is needed, not 2.0"),
        (["red"], {"batch_size": 0}, "batch_size: at least 1 is needed"),
        (["red"], {"guidance": float("nan")}, "guidance: number or null is needed, not nan"),
        (["red"], {"temperature": 3.0}, "temperature: a number from 0 to 2 is needed"),
        (["red"], {"strength": 0.5}, "strength: belongs to init_image"),
        (["red"], {"size": "big"}, "write pixels as 256 or as WIDTHxHEIGHT"),
        (["red:inf"], {}, "finite"),
        ([[]], {}, "at least one prompt"),
    ],
)
def test_wrong_requests(pipeline, prompts, choices, message):
    with pytest.raises(UserError) as error:
        pipeline.samples(prompts, options(**choices))  # before the first image is asked for
    assert message in str(error.value)


def test_a_seed_for_each_picture(pipeline):
    with pytest.raises(UserError, match="2 for 1 pictures"):
        pipeline.check(["red"], seeds=[1, 2])


def test_guidance_needs_a_model_that_was_trained_for_it(parts):
    plain = Pipeline(Model(**parts, dropout=0.0, image_size=(32, 32)))
    for mix in ("red", "red:2", ["red:1", "blue:1"], "red:0"):
        with pytest.raises(UserError, match="trained with dropped conditions"):
            plain.check([mix])
    assert len(plain(["red:1", ["red:0.75", "blue:0.25"]], options())) == 2


def test_the_parts_are_left_as_they_were(parts, pipeline):
    denoiser = parts["denoiser"].train()
    trained = [parameter.requires_grad for parameter in denoiser.parameters()]
    before = torch.random.get_rng_state()
    pipeline(["red"], options(sampler={"name": "ddpm", "steps": 2}))
    assert denoiser.training
    assert [parameter.requires_grad for parameter in denoiser.parameters()] == trained
    assert torch.equal(torch.random.get_rng_state(), before)


def test_options_that_depend_on_others():
    plain, upsampler = SamplingOptions().resolved(), SamplingOptions().resolved(upsampler=True, timesteps=100)
    assert (plain.guidance, plain.temperature, plain.sampler) == (3.0, 1.0, {"name": "unipc"})
    assert (upsampler.guidance, upsampler.temperature) == (1.0, 0.997)
    assert upsampler.sampler == {"name": "ddim", "steps": "fast27"}
    assert SamplingOptions().resolved(upsampler=True).sampler == {"name": "ddim", "steps": 27}
    assert SamplingOptions(clip_guidance=3.0).resolved().guidance == 1.0
    assert SamplingOptions(guidance=2.0, clip_guidance=3.0).resolved().guidance == 2.0
    image = Image.new("RGB", (8, 8), "white")
    assert InitImage.from_options(SamplingOptions(init_image=image)).strength == 0.7
    assert InitImage.from_options(SamplingOptions(init_image=image, mask=image)).strength == 1.0
    assert InitImage.from_options(SamplingOptions(init_image=image, mask=image, strength=0.2)).strength == 0.2
    assert SamplingOptions(negative="").negative is None
    assert SamplingOptions(guidance=2.0, sampler="ddim").given() == {"guidance": 2.0, "sampler": "ddim"}
    assert plain.resolved() == plain


@pytest.fixture
def checkpoint(tmp_path, parts):
    config = {
        "task": "diffusion", **make_parts(tmp_path), "denoiser": DENOISER, "objective": {"name": "v_cosine"},
    }  # fmt: skip
    config["conditioner"]["dropout"] = 0.1

    def write(changes=(), extra=()):
        path = tmp_path / "ema.safetensors"
        changed = {k: v for k, v in {**config, **dict(changes)}.items() if v is not None}
        save_model(path, parts["denoiser"].state_dict(), changed, {"step": "7", "image_size": "32", **dict(extra)})
        return path

    return write


def test_a_checkpoint_is_all_that_is_needed(checkpoint, tmp_path, caplog):
    path = checkpoint()
    pipeline = Pipeline.from_checkpoint(path, CPU)
    assert (pipeline.model.dropout, pipeline.model.image_size) == (0.1, (32, 32))
    images = pipeline(["red"], options())
    for role in ("autoencoder", "conditioner"):
        (tmp_path / f"{role}.safetensors").rename(tmp_path / f"moved_{role}.safetensors")
    with pytest.raises(UserError, match=r"autoencoder of the checkpoint: .* --autoencoder FILE"):
        Pipeline.from_checkpoint(path)
    moved = {role: tmp_path / f"moved_{role}.safetensors" for role in ("autoencoder", "conditioner")}
    again = Pipeline.from_checkpoint(path, ModelOptions(**moved))(["red"], options())
    assert np.array_equal(pixels(images), pixels(again))
    assert not caplog.records


@pytest.mark.parametrize("name", ["autoencoder.safetensors", "mine.safetensors"])
def test_a_friend_s_folder_has_it_all(checkpoint, tmp_path, caplog, name):
    """Files that are not where the checkpoint says are looked for beside it; a folder stands for its model."""
    path = checkpoint({"autoencoder": {"name": "kl_f8", "weights": f"/somewhere/else/{name}"}})
    (tmp_path / "autoencoder.safetensors").rename(tmp_path / name)
    folder = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name} of a friend"))
    assert Pipeline.from_checkpoint(folder)(["red"], options())
    assert not caplog.records
    path = folder / path.name
    path.rename(folder / "other.safetensors")
    with pytest.raises(UserError, match=r"a folder without ema\.safetensors"):
        Pipeline.from_checkpoint(folder)


def test_other_frozen_weights_than_in_training_are_told(checkpoint, caplog):
    Pipeline.from_checkpoint(checkpoint(extra={"autoencoder": "0" * 64}))
    (record,) = caplog.records
    assert "not the autoencoder file that the model was trained with" in record.getMessage()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": None}, "no section 'denoiser'"),
        ({"autoencoder": "kl_f8"}, "no section 'autoencoder'"),
        ({"denoiser": {"name": "os.system"}}, "no such denoiser: 'os.system'"),
        ({"denoiser": {**DENOISER, "base_channels": 32}}, "weights of another architecture"),
        ({"objective": {"name": "v_cosine", "evil": 1}}, "no such key: 'evil'"),
    ],
)
def test_checkpoints_of_something_else(checkpoint, changes, message):
    path = checkpoint(changes)
    with pytest.raises(UserError) as error:
        Pipeline.from_checkpoint(path)
    assert message in str(error.value)


def test_unreadable_checkpoints(checkpoint, tmp_path):
    path = checkpoint()
    with pytest.raises(UserError, match="no such file"):
        Pipeline.from_checkpoint(tmp_path / "missing.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a readable"):
        Pipeline.from_checkpoint(path)
    write_safetensors(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="not a trained model"):
        Pipeline.from_checkpoint(path)


def test_without_a_name_the_device_is_the_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device(None) == torch.device("cpu") == pick_device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert pick_device(None) == torch.device("meta") and ModelOptions().device is None
