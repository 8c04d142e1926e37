"""Aesthetics in sampling: prompts guided toward a rating, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import DENOISER, embedding, make_parts
from torch.nn import functional as F

from ldm_lab.checkpoints.embedders import OPENAI, embedder_of
from ldm_lab.checkpoints.native import save_model
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.sampling import Aesthetic, Model, Pipeline, RatingEmbeddings, SamplingOptions, interpolate
from ldm_lab.sampling.prompts import PromptBatch, parse_prompts

FAST = {"sampler": {"name": "plms2", "steps": 2}, "size": 16}
WORDS = ("--sampler", "plms2", "--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with a tiny CLOOB, and rating embeddings for that CLOOB: (folder, RatingEmbeddings)."""
    folder = tmp_path_factory.mktemp("model")
    parts = make_parts(folder)
    config = {"task": "diffusion", **parts, "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"]["dropout"] = 0.2
    torch.manual_seed(1)
    denoiser = build("denoiser", DENOISER, 4, embedding(16))
    save_model(folder / "ema.safetensors", denoiser.state_dict(), config, {"image_size": "16"})
    rows = F.normalize(torch.randn(3, 16), dim=1)
    ratings = RatingEmbeddings(dict(zip((0, 5, 9), rows)), embedder_of(parts["conditioner"]), {"counts": [1, 2, 3]})
    ratings.save(folder / "ratings.safetensors")
    return folder, ratings


@pytest.fixture(scope="module")
def pipeline(model):
    return Pipeline.from_checkpoint(model[0] / "ema.safetensors")


def images_of(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


# ---------------------------------------------------------------------------------------------------------- the formula


def test_guided_embeddings(model):
    ratings = model[1]
    queries = F.normalize(torch.randn(4, 16), dim=1)
    for weight in (0.5, 1.0, -0.5):
        guided = Aesthetic(ratings, 9, weight).guide(queries)
        moved = queries + weight * ratings.embeds[9]
        assert torch.allclose(guided, torch.stack([row / row.norm() for row in moved]), atol=1e-6), "row by row"
        closer = (guided @ ratings.embeds[9]) > (queries @ ratings.embeds[9])
        assert closer.all() if weight > 0 else not closer.any()
    assert torch.allclose(Aesthetic(ratings, 9, 0.0).guide(queries), queries, atol=1e-6)


def test_texts_are_led_images_and_the_negative_are_not(pipeline, model):
    from PIL import Image

    ratings, picture = model[1], Image.new("RGB", (40, 30), "red")
    aesthetic = Aesthetic(ratings, 9, 1.0)
    mixes = parse_prompts(["a fox", picture, "a dog"])
    plain = PromptBatch.encode(pipeline.model, mixes, 3.0, "a fox", None)
    led = PromptBatch.encode(pipeline.model, mixes, 3.0, "a fox", aesthetic)
    before = plain.conditions["embed"][plain.index]  # [3, 2, D]
    after = led.conditions["embed"][led.index]  # [3, 2, D]
    assert torch.allclose(after[0, 0], aesthetic.guide(before[0, 0][None])[0])
    assert torch.allclose(after[2, 0], aesthetic.guide(before[2, 0][None])[0])
    assert torch.equal(after[1, 0], before[1, 0]), "an image is as it is"
    assert torch.equal(after[:, 1], before[:, 1]), "so is the negative prompt, even if it is a prompt as well"


def test_pictures_change_with_rating_and_weight(pipeline, model):
    def options(rating=None, weight=None):
        file = None if rating is None else model[0] / "ratings.safetensors"
        return SamplingOptions(**FAST, seed=3, aesthetic=rating, aesthetic_weight=weight, aesthetic_embeddings=file)

    def make(*rating):
        return images_of(pipeline(["a fox"], options(*rating)))

    plain = make()
    assert torch.equal(make(9, 0.0), plain)
    assert torch.equal(make(9), make(9, 0.5))
    pictures = [make(k, w) for k, w in ((9, 0.5), (9, 2.0), (9, -0.5), (0, 0.5))]
    for i, picture in enumerate(pictures):
        assert not torch.equal(picture, plain)
        assert all(not torch.equal(picture, other) for other in pictures[:i])
    (film,) = interpolate(pipeline, ["a fox", "a dog"], 2, options(9))
    assert (images_of([film[0].image]).int() - pictures[0].int()).abs().max() <= 1  # of 255; a batch of another size


# ------------------------------------------------------------------------------------------------------ what is refused


def test_another_network_or_width_is_refused(pipeline, model, tmp_path):
    embeds = model[1].embeds
    for ratings, message in (
        (
            RatingEmbeddings(embeds, {"name": "cloob", "sha256": "0" * 64}),
            "aesthetic: belongs to the embeddings of clo",
        ),
        (RatingEmbeddings(embeds, OPENAI["vit_b_32"]), "of clip ViT-B-32-quickgelu openai, these are of cloob"),
        (
            RatingEmbeddings({9: torch.ones(8) / 8**0.5}, model[1].embedder),
            "embeddings of width 8 .*the model's have 16",
        ),
    ):
        ratings.save(tmp_path / "ratings.safetensors")
        options = SamplingOptions(**FAST, aesthetic=9, aesthetic_embeddings=tmp_path / "ratings.safetensors")
        with pytest.raises(UserError, match=message):
            pipeline.check(["a fox"], options)


def test_a_model_of_parts_knows_the_width_alone(parts, model, tmp_path):
    pipeline = Pipeline(Model(**parts, dropout=0.2, image_size=(16, 16)))
    options = SamplingOptions(**FAST, aesthetic=9, aesthetic_embeddings=model[0] / "ratings.safetensors")
    assert len(pipeline(["a fox"], options)) == 1
    RatingEmbeddings({9: torch.ones(8) / 8**0.5}, model[1].embedder).save(tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match="width 8"):
        pipeline.check(["a fox"], SamplingOptions(aesthetic=9, aesthetic_embeddings=tmp_path / "narrow.safetensors"))
    with pytest.raises(UserError, match="aesthetic_embeddings has to"):
        pipeline.check(["a fox"], SamplingOptions(aesthetic=9))


def test_ratings_and_weights_that_are_none(model):
    with pytest.raises(UserError, match=r"no such rating: 7\. Known: 0, 5, 9"):
        Aesthetic(model[1], 7, 0.5)
    with pytest.raises(UserError, match=r"no such rating: 12\..* Known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"):
        RatingEmbeddings.load("aesthetic/vit_b_32", [12])
    with pytest.raises(UserError, match="a finite number is needed, not nan"):
        Aesthetic(model[1], 9, float("nan"))


# ------------------------------------------------------------------------------------------------------------ the files


def test_our_file_and_laions_folders(model, tmp_path, golden_heads, monkeypatch):
    folder, ratings = model
    again = RatingEmbeddings.load(folder / "ratings.safetensors")
    assert again.embedder == ratings.embedder and again.facts == {"counts": [1, 2, 3]}
    assert list(again.embeds) == [0, 5, 9] and all(again.embeds[k].equal(ratings.embeds[k]) for k in (0, 5, 9))
    released = golden_heads / "vit_b_32_embeddings"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in released.glob("*.npy"):
        (moved / path.name).write_bytes(path.read_bytes())
    assert RatingEmbeddings.load(moved).embedder == OPENAI["vit_b_32"], "known by its content"
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LDM_LAB_OFFLINE", "1")
    with pytest.raises(UserError, match="aesthetic/vit_b_32/rating9: not in the cache"):
        RatingEmbeddings.load("aesthetic/vit_b_32", [9])
    target = tmp_path / "cache" / "aesthetic" / "vit_b_32" / "rating9"
    target.mkdir(parents=True, exist_ok=True)
    (target / "rating9.npy").write_bytes((released / "rating9.npy").read_bytes())
    named = RatingEmbeddings.load("aesthetic/vit_b_32", [9])
    assert list(named.embeds) == [9] and named.embedder == OPENAI["vit_b_32"]


def test_files_that_are_none(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    metadata = {"format": "ldm_lab", "role": "rating_embeddings", "embedder": json.dumps(OPENAI["vit_b_32"])}
    save_file({"rating": torch.tensor([9])}, tmp_path / "c.safetensors", metadata)
    save_file({"rating": torch.tensor([9]), "embed": torch.ones(1, 8)}, tmp_path / "d.safetensors", metadata)
    save_file({"rating": torch.tensor([9]), "embed": torch.ones(1, 8) / 8**0.5}, tmp_path / "e.safetensors", {
        **metadata, "embedder": json.dumps({"name": "clip", "weights": "/etc/passwd"})
    })  # fmt: skip
    for folder, array in (("f", np.ones((1, 8), np.float32)), ("g", np.full((1, 8), np.nan, np.float32))):
        (tmp_path / f"{folder}_embeddings").mkdir()
        np.save(tmp_path / f"{folder}_embeddings" / "rating9.npy", array)
    (tmp_path / "vit_b_32_embeddings").mkdir()
    np.save(tmp_path / "vit_b_32_embeddings" / "rating9.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, message in (
        ("a.safetensors", "it holds something else"),
        ("b.safetensors", "not a readable safetensors file"),
        ("c.safetensors", "without ratings, embeddings or embedder"),
        ("d.safetensors", "a vector of length 1"),
        ("e.safetensors", "embedder.weights: no such key"),
        ("f_embeddings", "they are none of LAION's"),
        ("g_embeddings", "they are none of LAION's"),
        ("vit_b_32_embeddings", "not a readable .npy file"),
        ("missing", "no such file"),
        (".", "a folder has to hold rating0.npy"),
    ):
        with pytest.raises(UserError, match=message):
            RatingEmbeddings.load(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ sample.py


def test_sample_py(model, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = model[0]
    call = ("--checkpoint", folder / "ema.safetensors", *WORDS, "a fox", "-n", "1")
    ratings = ("--aesthetic-embeddings", folder / "ratings.safetensors")
    for out, more in (
        ("plain", ()),
        ("zero", ("--aesthetic", 9, "--aesthetic-weight", 0, *ratings)),
        ("nine", ("--aesthetic", 9, *ratings)),
        ("half", ("--aesthetic", 9, "--aesthetic-weight", 0.5, *ratings)),
    ):
        code, _, err = program("sample", *call, *more, "--out", out)
        assert code == 0, err
    pictures = {out: (tmp_path / out / "grid.png").read_bytes() for out in ("plain", "zero", "nine", "half")}
    assert pictures["plain"] == pictures["zero"] != pictures["nine"] == pictures["half"]
    entry = json.loads((tmp_path / "half" / "samples.json").read_text())[0]
    assert (entry["aesthetic"], entry["aesthetic_weight"]) == (9, 0.5)
    assert "aesthetic" not in json.loads((tmp_path / "plain" / "samples.json").read_text())[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--aesthetic", "9"], "no rating embeddings are released for cloob with weights of sha256"),
        (["--aesthetic-weight", "1"], "--aesthetic-weight: belongs to aesthetic"),
        (["--aesthetic", "4", "--aesthetic-embeddings", "ratings"], "no such rating: 4"),
        (["--aesthetic", "9", "--aesthetic-embeddings", "laion"], "belongs to the embeddings of clip ViT-B-32"),
        (["--aesthetic", "nine"], "--aesthetic: "),
    ],
)
def test_sample_py_in_one_line(model, program, tmp_path, monkeypatch, golden_heads, args, message):
    monkeypatch.chdir(tmp_path)
    places = {"ratings": model[0] / "ratings.safetensors", "laion": golden_heads / "vit_b_32_embeddings"}
    args = [places.get(arg, arg) for arg in args]
    code, _, err = program("sample", "--checkpoint", model[0] / "ema.safetensors", *WORDS, "a fox", *args)
    assert code == 2 and message in err
    assert not (tmp_path / "samples").exists()
