"""Sampling that begins with a picture: image to image, and inpainting, with random tiny parts."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_samplers import CALLS
from test_sampling import latents, options

from ldm_lab.errors import UserError
from ldm_lab.io.images import to_images, to_tensor
from ldm_lab.sampling import Model, Pipeline
from ldm_lab.sampling.image_to_image import InitImage

SIZE = 64


@pytest.fixture
def pipeline(parts):
    return Pipeline(Model(**parts, dropout=0.2, image_size=(SIZE, SIZE)))


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask():
    """White in a rectangle whose edges lie on no latent element's border."""
    picture = Image.new("L", (SIZE, SIZE), 0)
    picture.paste(255, (13, 21, 37, 50))
    return picture


def pixels(image):
    return np.asarray(image).astype(int)


def test_at_strength_0_the_picture_comes_back_as_the_autoencoder_gives_it(pipeline, photo):
    calls, autoencoder = [], pipeline.model.autoencoder
    choices = options(init_image=photo, strength=0.0, sampler="ddim")
    (image,) = pipeline(["red"], choices, progress=lambda *steps: calls.append(steps))
    with torch.no_grad():
        through = autoencoder.decode(autoencoder.encode(to_tensor(photo)[None]))
    assert image.tobytes() == to_images(through)[0].tobytes()
    assert not calls  # the denoiser was not asked


@pytest.mark.parametrize("name", CALLS)
def test_strength_is_the_share_of_the_steps(pipeline, photo, name):
    """More strength, more change; and the steps that are taken are reported one by one."""
    changes, counts = [], []
    with torch.no_grad():
        known = pipeline.model.autoencoder.encode(to_tensor(photo)[None])
    for strength in (0.1, 0.5, 1.0):
        seen = []
        choices = {"init_image": photo, "strength": strength, "sampler": {"name": name, "steps": 10}}
        changes.append((latents(pipeline, ["red"], **choices) - known).norm().item())
        pipeline(["red"], options(**choices), progress=lambda *steps, seen=seen: seen.append(steps))
        counts.append(seen)
    assert changes[0] < min(changes[1:])  # between the others, a random network's fresh noise may decide
    assert counts == [[(i + 1, n) for i in range(n)] for n in (1, 5, 10)]


@pytest.mark.parametrize("name", CALLS)
def test_inpainting_leaves_the_rest_as_it_was(pipeline, photo, mask, name):
    choices = {"init_image": photo, "mask": mask, "sampler": {"name": name, "steps": 6}}
    (image,) = pipeline(["red"], options(**choices))
    outside = pixels(mask) == 0
    assert (pixels(image)[outside] == pixels(photo)[outside]).all()
    assert abs(pixels(image)[~outside] - pixels(photo)[~outside]).mean() > 5
    with torch.no_grad():
        known = pipeline.model.autoencoder.encode(to_tensor(photo)[None])
    painted = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    painted[..., 2:7, 1:5] = True  # every element with a white pixel in it
    difference = (latents(pipeline, ["red"], **choices) - known).abs()
    assert difference.masked_select(~painted).max() < 2e-4  # rounding: eps is (x - alpha * x0) / sigma there
    # Of an element's four channels one may come out as it was by chance, hardly all of them.
    assert difference.amax(1, keepdim=True).masked_select(painted).min() > 1e-3


def test_a_picture_of_another_size_is_cut_to_its_middle(pipeline):
    wide = Image.new("RGB", (3 * SIZE, SIZE), "red")
    wide.paste((0, 0, 255), (SIZE, 0, 2 * SIZE, SIZE))
    mask = Image.new("L", wide.size, 0)
    mask.paste(255, (SIZE + 10, 10, SIZE + 30, 30))
    choices = {"init_image": wide, "mask": mask, "resize": "crop", "sampler": {"name": "ddim", "steps": 2}}
    (image,) = pipeline(["red"], options(**choices))
    assert (
        image.size == (SIZE, SIZE) and image.getpixel((0, 0)) == (0, 0, 255) and image.getpixel((63, 63)) == (0, 0, 255)
    )
    (tall,) = pipeline(["red"], options(**choices, strength=0.5, size=(128, 64)))
    assert tall.size == (64, 128)


def test_an_image_depends_on_its_seed_and_prompts_alone(pipeline, photo, mask):
    for start in ({"init_image": photo, "strength": 0.6}, {"init_image": photo, "mask": mask}):
        choices = {**start, "sampler": {"name": "ddpm", "steps": 5}}
        prompts, seeds = ["red", "blue", "red"], [3, 1, 4]
        together = pipeline(prompts, options(**choices, batch_size=3), seeds=seeds)
        alone = pipeline(prompts, options(**choices, batch_size=1), seeds=seeds)
        for one, other in zip(together, alone):
            assert abs(pixels(one) - pixels(other)).max() <= 1
        assert len({image.tobytes() for image in alone}) == 3


def test_files_stand_for_their_images(pipeline, photo, mask, tmp_path):
    photo.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    named = options(init_image=tmp_path / "photo.png", mask=str(tmp_path / "mask.png"))
    assert pipeline(["red"], named)[0].tobytes() == pipeline(["red"], options(init_image=photo, mask=mask))[0].tobytes()


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strengths_that_make_no_sense(photo, strength):
    with pytest.raises(UserError, match=r"strength: (a number|number)"):
        options(init_image=photo, strength=strength)


def test_masks_that_make_no_sense(photo):
    with pytest.raises(UserError, match="mask: it is 10x20 pixels, the image 64x64"):
        InitImage.from_options(options(init_image=photo, mask=Image.new("L", (10, 20), 255)))
    with pytest.raises(UserError, match="nothing in it is white"):
        InitImage.from_options(options(init_image=photo, mask=Image.new("L", photo.size, 0)))
