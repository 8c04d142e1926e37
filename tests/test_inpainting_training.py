"""Training an inpainting model: what is erased, what the network is told of it, grids, resume, the recipe."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_glide_training import INPAINT, glide_config, write
from tiny import AUTOENCODER
from tiny_glide import TEXT, UNET

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.models import read_model
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.condition_sources.inpaint import Inpaint
from ldm_lab.condition_sources.random_masks import rectangles, strokes
from ldm_lab.config import RunConfig, build
from ldm_lab.errors import UserError
from ldm_lab.sampling import Model, Pipeline, SamplingOptions
from ldm_lab.training.diffusion import DiffusionTask

CPU = torch.device("cpu")
PIXELS = build("autoencoder", {"name": "identity"})
KINDS = ("rectangle", "strokes", "whole", "outside")
UNGUIDED = {**INPAINT, "conditioner": {"dropout": 0.0}}
GRIDS = {"every": 2, "images": 6, "sampling": {"sampler": {"name": "ddim", "steps": 2}}}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def only(kind, **options):
    """Return a source that erases one kind of region."""
    return Inpaint(**{**dict.fromkeys(KINDS, 0.0), kind: 1.0}, **options)


def is_box(mask):
    """Return for each mask [B, h, w] whether it is a filled rectangle, bool [B]."""
    return (mask == (mask.any(2)[:, :, None] & mask.any(1)[:, None])).flatten(1).all(1)


# ----------------------------------------------------------------------------------------------------------- regions


def test_kinds_come_in_their_shares():
    image = torch.zeros(600, 3, 12, 16)
    whole, outside = (only(kind).erased(image, seeded())[:, 0] for kind in ("whole", "outside"))
    assert whole.all() and is_box(~outside).all() and not outside.all(2).all(1).any()
    rectangle, stroke = (only(kind).erased(image, seeded())[:, 0] for kind in ("rectangle", "strokes"))
    assert is_box(rectangle).all() and is_box(stroke).float().mean() < 0.2
    mixed = Inpaint(rectangle=2, strokes=0, whole=1, outside=1).erased(image, seeded())[:, 0]
    assert 0.2 < mixed.flatten(1).all(1).float().mean() < 0.35, "a quarter whole, and a few large rectangles"
    assert 0.65 < is_box(mixed).float().mean() < 0.85, "half rectangles, a quarter whole"


@pytest.mark.parametrize("kind", KINDS)
def test_something_is_always_erased_and_follows_from_the_generator(kind):
    image = torch.zeros(100, 3, 9, 7)
    source = only(kind, smallest=0.001, largest=0.01, thinnest=0.001, thickest=0.001, most_strokes=1)
    made = [source.erased(image, seeded(seed)) for seed in (1, 1, 2)]
    assert made[0].shape == (100, 1, 9, 7) and made[0].flatten(1).any(1).all(), "a pixel at least"
    assert torch.equal(made[0], made[1])
    assert kind == "whole" or not torch.equal(made[0], made[2])


def test_sizes_are_kept_within_their_bounds():
    boxes = rectangles(400, 20, 40, (0.25, 0.5), CPU, seeded())
    heights, widths = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (5, 10, 10, 20)
    assert boxes.any(0).any(0).all() and boxes.any(0).any(1).all(), "anywhere"
    thin, thick = (strokes(60, 32, 32, 1, (width, width), CPU, seeded()).float().mean() for width in (0.05, 0.3))
    assert 3 * thin < thick
    few, many = (strokes(60, 32, 32, most, (0.1, 0.1), CPU, seeded()).float().mean() for most in (1, 6))
    assert 1.5 * few < many


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict.fromkeys(KINDS, 0.0), "whole: at least one of whole, rectangle, strokes and outside has to be above 0"),
        ({"smallest": 0.6, "largest": 0.5}, "smallest: 0.6 is above largest, 0.5"),
        ({"thinnest": 0.4}, "thinnest: 0.4 is above thickest, 0.3"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError) as error:
        build_sources({"inpaint": options})
    assert str(error.value) == f"condition_source.{message}"


# -------------------------------------------------------------------------------------------------- what it is told


def test_pixels_under_the_mask_are_not_told():
    image = torch.rand(8, 3, 16, 16) + 1.0
    given = Inpaint().from_batch(Batch(["a"] * 8, [""] * 8, image=image), image, PIXELS, seeded())
    mask, known = given["inpaint_mask"], given["inpaint_image"]
    assert set(mask.unique().tolist()) == {0.0, 1.0} and torch.equal(known, image * mask)
    assert torch.equal(mask == 0, Inpaint().erased(image, seeded()))
    cached = Inpaint().from_batch(Batch(["a"] * 8, [""] * 8), image, PIXELS, seeded())
    assert torch.equal(cached["inpaint_image"], known), "of a cache of pixels, too"


def test_latents_are_those_of_an_image_without_what_is_erased():
    torch.manual_seed(0)
    autoencoder = build("autoencoder", AUTOENCODER).eval().requires_grad_(False)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    source = only("rectangle", channels=4, largest=0.5)
    erased = source.erased(image, seeded())  # [2, 1, 32, 32]
    other = torch.where(erased, -image, image)  # another picture, the same outside of the region
    x0 = torch.zeros(2, 4, 4, 4)
    given, same = (
        source.from_batch(Batch(["a", "b"], ["", ""], image=each), x0, autoencoder, seeded()) for each in (image, other)
    )
    assert torch.equal(given["inpaint_image"], same["inpaint_image"]) and given["inpaint_image"].any()
    wanted = torch.nn.functional.max_pool2d(erased.float(), 8) == 0
    assert torch.equal(given["inpaint_mask"], wanted.float()), "an element with any erased pixel is not known"
    assert not given["inpaint_image"][~wanted.expand(-1, 4, -1, -1)].any()
    with pytest.raises(UserError, match="images are needed to train an inpainting model of latents, and a cache holds"):
        source.from_batch(Batch(["a", "b"], ["", ""]), x0, autoencoder, seeded())


def test_a_model_of_latents_is_told_the_same_when_it_paints(monkeypatch):
    torch.manual_seed(0)
    autoencoder = build("autoencoder", AUTOENCODER).eval().requires_grad_(False)
    sources = build_sources({"inpaint": {"channels": 4}})
    text = build("conditioner", TEXT)
    denoiser = build("denoiser", UNET, 4, given_conditions(text, sources)).eval()
    objective = build("objective", {"name": "eps_hybrid", "betas": "linear_latent", "timesteps": 100})
    model = Model(denoiser, objective, autoencoder, text, sources, dropout=0.2, image_size=(32, 32))
    seen, forward = [], denoiser.forward
    monkeypatch.setattr(denoiser, "forward", lambda x, t, **given: (seen.append(given), forward(x, t, **given))[1])
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    other = picture.copy()
    other.paste((255, 0, 0), (0, 0, 16, 32))  # what lies under the mask is of no account
    options = SamplingOptions(mask=mask, init_image=picture, sampler={"name": "ddim", "steps": 2})
    for image in (picture, other):
        Pipeline(model)(["a cat"], SamplingOptions(**{**options.given(), "init_image": image}))
    told = [given["inpaint_image"] for given in seen]
    assert torch.equal(told[0], told[-1]) and told[0][..., 2:].any() and not told[0][..., :2].any()
    assert (seen[0]["inpaint_mask"][..., 2:] == 1).all() and not seen[0]["inpaint_mask"][..., :2].any()


def test_captions_are_dropped_and_what_is_known_is_not(tmp_path, monkeypatch):
    config = RunConfig.from_dict(glide_config(tmp_path, **INPAINT, conditioner={"dropout": 0.5}))
    task = DiffusionTask(config)
    seen = {}

    def loss_terms(model, x0, conditions, t, noise):
        seen.update(conditions)
        return {"loss": torch.zeros(len(x0))}

    monkeypatch.setattr(task.objective, "loss_terms", loss_terms)
    monkeypatch.setattr(task, "timesteps", lambda seen, count: torch.rand(count), raising=False)
    for quiet in ("log_means", "log_by_time"):
        monkeypatch.setattr(task, quiet, lambda *_: None)
    torch.manual_seed(0)
    task.training_step(Batch(["a"] * 32, ["a cat"] * 32, image=torch.rand(32, 3, 16, 16)), 0)
    has_text, has_known = seen["token_ids_mask"].any(1), seen["inpaint_mask"].flatten(1).any(1)
    for with_text in (True, False):
        assert (has_known & (has_text == with_text)).any(), "each for itself"


# ----------------------------------------------------------------------------------------------------------- a run


def test_a_run_draws_what_it_paints_and_resumes_exactly(tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yaml = write(tmp_path, **INPAINT, inpaintings=GRIDS, checkpoint={"every": 2})
    assert program("train", "--config", yaml, "run=whole", "trainer.max_steps=4")[0] == 0
    assert program("train", "--config", yaml, "run=part", "trainer.max_steps=2")[0] == 0
    assert program("train", "--config", yaml, "run=part", "trainer.max_steps=4", "resume.checkpoint=last")[0] == 0
    whole, part = (read_pickled(tmp_path / "runs" / run / "last.ckpt")["state_dict"] for run in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole), "the same regions, too"
    grids = {run: Image.open(tmp_path / f"runs/{run}/inpaintings/step=00000004.png") for run in ("whole", "part")}
    assert grids["whole"].size == (6 * 16, 3 * 16), "known, painted, images"
    assert grids["whole"].tobytes() == grids["part"].tobytes(), "of the same images"
    known, painted, image = (grids["whole"].crop((0, top, 96, top + 16)) for top in (0, 16, 32))
    known, painted, image = (np.array(row) for row in (known, painted, image))  # [16, 96, 3] each
    grey = (known == 127).all(2) | (known == 128).all(2)  # [16, 96]
    assert grey.any() and not grey.all()
    assert (painted[~grey] == image[~grey]).all() and (known[~grey] == image[~grey]).all()
    config = read_model(tmp_path / "runs/whole/ema.safetensors")[0]
    assert "inpaintings" not in config and config["condition_sources"] == {"inpaint": {}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"inpaintings": {}}, "inpaintings: are an inpainting model's, which condition_sources.inpaint makes"),
        ({**INPAINT, "inpaintings": {"images": 0}}, "inpaintings.images: at least 1 is needed, not 0"),
        ({**INPAINT, "inpaintings": {"sampling": {"seed": -1}}}, "inpaintings.sampling.seed: the grids of a run share"),
        ({**UNGUIDED, "inpaintings": {}}, "inpaintings: guidance needs a model that was trained with dropped"),
    ],
    ids=["no_inpainting", "no_images", "seed", "guidance"],
)
def test_grids_that_cannot_be(tmp_path, program, monkeypatch, sections, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = program("train", "--config", write(tmp_path, **sections))
    assert code == 2 and message in err


def test_an_inpainting_upsampler_draws_grids_too(tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = {"condition_sources": {"inpaint": {}, "low_res": {"scale_factor": 2}}}
    yaml = write(tmp_path, **both, inpaintings={**GRIDS, "images": 2}, trainer={"max_steps": 1})
    code, _, err = program("train", "--config", yaml)
    assert code == 0, err
    assert Image.open(tmp_path / "runs/tiny/inpaintings/step=00000001.png").size == (2 * 16, 3 * 16)


def test_a_grid_whose_images_are_erased_as_a_whole(tmp_path, program, monkeypatch, caplog):
    """The masks are the run's own: there is nothing that a user should be told about them."""
    monkeypatch.chdir(tmp_path)
    sections = {
        "condition_sources": {"inpaint": {"rectangle": 0, "strokes": 0, "outside": 0}},
        "inpaintings": {**GRIDS, "images": 2},
    }
    code, out, err = program("train", "--config", write(tmp_path, **sections, trainer={"max_steps": 1}))
    assert code == 0, err
    assert "without effect" not in out + err + caplog.text
    assert Image.open(tmp_path / "runs/tiny/inpaintings/step=00000001.png").size == (2 * 16, 3 * 16)
