"""The Sampler class: prompts to images with random tiny parts."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DENOISER, make_parts

from ldm_lab.checkpoints.files import write_safetensors
from ldm_lab.checkpoints.native import save_model
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Sampler as SamplerPart
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Picture, Sampler, as_mix

BOUND = 1e-4  # relative, of a latent in batches of different sizes; see Sampler
FAST = {"name": "plms2", "steps": 3}
BLANK = Picture(Image.new("RGB", (8, 8)), torch.zeros(3, 8, 8))


def pixels(images):
    return np.stack([np.array(image) for image in images]).astype(int)


def raw(sampler, mixes, seeds, batch_size, name="ddpm", guidance=3.0):
    """The latents [N, C, h, w] behind images."""
    latents = []
    sampler.decode = lambda batch, tile=None: latents.append(batch) or [BLANK] * len(batch)
    sampler(mixes, seeds=seeds, batch_size=batch_size, guidance=guidance, sampler={"name": name, "steps": 4})
    return torch.cat(latents)


def test_images_in_the_order_of_their_prompts(sampler):
    seen = []
    images = sampler(
        ["red", "blue:2", ["red", "blue:-1"]], batch_size=2, sampler=FAST, progress=lambda *steps: seen.append(steps)
    )
    assert [(image.size, image.mode) for image in images] == [((32, 32), "RGB")] * 3
    assert seen == [(i, 6) for i in range(1, 7)]
    assert len({image.tobytes() for image in images}) == 3
    assert sampler([], sampler=FAST) == []


MIXES = ["red", ["red:2", "blue:-1", "old:0"], "blue:1", ["red:0.5", "blue:0.5"], "red:0", "a green star"]


@pytest.mark.parametrize("name", ["plms", "ddpm"])
def test_an_image_depends_on_its_seed_and_prompts_alone(sampler, name):
    seeds = [3, 1, 4, 1, 5, 9]
    alone = raw(sampler, MIXES, seeds, 1, name)
    for batch_size in (4, 6):
        together = raw(sampler, MIXES, seeds, batch_size, name)
        assert ((together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)).max() < BOUND
    order = [5, 0, 3]
    shuffled = raw(sampler, [MIXES[i] for i in order], [seeds[i] for i in order], 3, name)
    assert ((shuffled - alone[order]).norm() / alone.norm()) < BOUND


def test_pixels_do_not_depend_on_the_batch_size(sampler):
    one, four = (pixels(sampler(MIXES[:4], batch_size=size, sampler=FAST)) for size in (1, 4))
    assert abs(one - four).max() <= 1


def test_seeds_make_images_and_repeat_them(sampler):
    latents = raw(sampler, ["red"] * 4, [7, 8, 7, 2**62], 4)
    assert torch.equal(latents[0], latents[2])
    assert not torch.allclose(latents[0], latents[1], atol=0.1)
    assert torch.equal(raw(sampler, ["red"] * 2, range(2), 2), raw(sampler, ["red"] * 2, None, 2))


def test_noise_is_fresh_in_every_step(parts, sampler):
    drawn = []

    class Drawing(SamplerPart):
        steps = 2

        def sample(self, predict, x, *, schedule, noise, callback):
            drawn.extend([x, noise(x), noise(x)])
            return x

    cond = parts["conditioner"].from_prompts(["red"], [])
    latents = sampler.latents(Drawing(), (4, 4), {"embed": cond["embed"][None]}, torch.ones(1, 1), [5])
    assert latents.shape == (1, 4, 4, 4)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(torch.cat(drawn), torch.stack([torch.randn(4, 4, 4, generator=generator) for _ in range(3)]))


def test_guidance_is_the_weight_of_prompts_without_one(sampler):
    written = raw(sampler, ["red:2", ["red:2", "blue:1.5"]], [0, 1], 2)
    default = raw(sampler, ["red", [Prompt("red"), Prompt("blue", 1.5)]], [0, 1], 2, guidance=2.0)
    assert torch.equal(written, default)
    unguided = raw(sampler, ["red:0"], [0], 1)
    assert torch.allclose(unguided, raw(sampler, ["blue:0"], [0], 1))
    assert not torch.allclose(unguided, written[:1], atol=1e-3)


def test_image_prompts(parts, sampler):
    picture = Image.effect_noise((40, 30), 60)
    prompt = Prompt("noise.png", 2.0, picture)
    by_prompt = raw(sampler, [[prompt, "red:1"]], [0], 1)
    assert torch.equal(by_prompt, raw(sampler, [[picture, "red:1"]], [0], 1, guidance=2.0))
    embed = parts["conditioner"].from_prompts(["red"], [picture])["embed"]
    table, index = sampler._encode([[prompt, Prompt("red", 1.0)], [Prompt("red")]])
    assert torch.allclose(table["embed"][index[0]], embed[[1, 0]], atol=1e-6)
    assert len(table["embed"]) == 2  # "red" was encoded once
    assert index[1].tolist() == [index[0, 1], 0]


def test_a_mix_may_be_written_in_many_ways():
    picture = Image.new("L", (2, 2))
    assert as_mix("a:b") == [Prompt("a:b")]
    assert as_mix(["a", Prompt("b:3"), picture]) == [Prompt("a"), Prompt("b:3"), Prompt("image", image=picture)]
    with pytest.raises(UserError, match="at least one prompt"):
        as_mix([])


def test_other_sizes(sampler):
    (image,) = sampler(["red"], size=(16, 48), sampler=FAST)
    assert image.size == (48, 16)
    assert sampler(["red"], size=64, sampler=FAST)[0].size == (64, 64)


@pytest.mark.parametrize("size", [40, 0, -32, (32, 40)])
def test_a_size_that_the_levels_do_not_divide(sampler, size):
    with pytest.raises(UserError, match="this model takes multiples of 16 pixels, such as"):
        sampler(["red"], size=size)


def test_no_size_is_known(parts):
    with pytest.raises(UserError, match="does not say what size"):
        Sampler(**parts, dropout=0.2)(["red"])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["red"], {"sampler": "plsm"}, "no such sampler: 'plsm'. Did you mean 'plms'?"),
        (["red"], {"sampler": {"name": "plms", "eta": 1.0}}, "no such key: 'eta'"),
        (["red"], {"seeds": [1, 2]}, "2 for 1 images"),
        (["red"], {"batch_size": 0}, "at least 1 is needed"),
        (["red"], {"guidance": float("nan")}, "finite"),
        (["red:inf"], {}, "finite"),
        ([[]], {}, "at least one prompt"),
    ],
)
def test_wrong_requests(sampler, prompts, options, message):
    with pytest.raises(UserError) as error:
        sampler.batches(prompts, **options)  # before the first image is asked for
    assert message in str(error.value)


def test_guidance_needs_a_model_that_was_trained_for_it(parts):
    plain = Sampler(**parts, dropout=0.0, size=(32, 32))
    for mix in ("red", "red:2", ["red:1", "blue:1"], "red:0"):
        with pytest.raises(UserError, match="trained with dropped conditions"):
            plain.batches([mix])
    assert len(plain(["red:1", ["red:0.75", "blue:0.25"]], sampler=FAST)) == 2


def test_the_parts_are_left_as_they_were(parts, sampler):
    denoiser = parts["denoiser"].train()
    trained = [parameter.requires_grad for parameter in denoiser.parameters()]
    before = torch.random.get_rng_state()
    sampler(["red"], sampler={"name": "ddpm", "steps": 2})
    assert denoiser.training
    assert [parameter.requires_grad for parameter in denoiser.parameters()] == trained
    assert torch.equal(torch.random.get_rng_state(), before)


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
    sampler = Sampler.from_checkpoint(path)
    assert (sampler.dropout, sampler.size) == (0.1, (32, 32))
    images = sampler(["red"], sampler=FAST)
    for role in ("autoencoder", "conditioner"):
        (tmp_path / f"{role}.safetensors").rename(tmp_path / f"moved_{role}.safetensors")
    with pytest.raises(UserError, match=r"autoencoder of the checkpoint: .* --autoencoder FILE"):
        Sampler.from_checkpoint(path)
    moved = {role: tmp_path / f"moved_{role}.safetensors" for role in ("autoencoder", "conditioner")}
    again = Sampler.from_checkpoint(path, **moved)(["red"], sampler=FAST)
    assert np.array_equal(pixels(images), pixels(again))
    assert not caplog.records


def test_other_frozen_weights_than_in_training_are_told(checkpoint, caplog):
    Sampler.from_checkpoint(checkpoint(extra={"autoencoder": "0" * 64}))
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
        Sampler.from_checkpoint(path)
    assert message in str(error.value)


def test_unreadable_checkpoints(checkpoint, tmp_path):
    path = checkpoint()
    with pytest.raises(UserError, match="no such file"):
        Sampler.from_checkpoint(tmp_path / "missing.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a readable"):
        Sampler.from_checkpoint(path)
    write_safetensors(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="not a trained model"):
        Sampler.from_checkpoint(path)
