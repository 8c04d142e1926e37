"""CLIP as a conditioner, on a tiny open_clip model: embeddings, preprocessing, weights of all kinds, a whole run."""

import json
import logging
import os
import pickle
import sys
import zipfile

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from tiny import make_run, run_program

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import read_safetensors
from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import load_part, weights_sha256
from ldm_lab.checkpoints.torchscript import read_torchscript
from ldm_lab.conditioners.clip import CLIP
from ldm_lab.config import build, check_section, describe_parts
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.io.images import to_tensor
from ldm_lab.sampling import ModelOptions, Pipeline, SamplingOptions

ARCHITECTURE = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
NAME = "tiny-clip-of-the-tests"
TAG = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 0.125), "interpolation": "bilinear", "resize_mode": "squash"}
TEXTS = ["a red circle", "", "Two Words & an ampersand"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model in open_clip's list, and random weights for it in `weights.pt`."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{NAME}.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(NAME).state_dict(), folder / "weights.pt")
    yield folder
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder / f"{NAME}.json")
    open_clip.factory._MODEL_CONFIGS.pop(NAME)


@pytest.fixture
def published(folder, monkeypatch):
    """The tiny model has published weights, `random`, which were trained with pixels of another kind."""
    cfg = {**TAG, "file": str(folder / "weights.pt")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"random": cfg})
    return {"name": "clip", "model": NAME, "pretrained": "random"}


@pytest.fixture(scope="module")
def theirs(folder):
    """open_clip's own model with these weights, loaded by itself, and its transform."""
    model, _, transform = open_clip.create_model_and_transforms(NAME, pretrained=str(folder / "weights.pt"))
    return model.eval().requires_grad_(False), transform


@pytest.fixture(scope="module")
def clip(folder):
    return load_part("conditioner", {"name": "clip", "model": NAME, "weights": str(folder / "weights.pt")})


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return coarse random patches with fine noise on them."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (6, 5, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(patches.numpy()).resize(size, Image.Resampling.NEAREST)
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.blend(image, Image.fromarray(noise.numpy()), 0.3)


def batch(*images: Image.Image) -> Batch:
    names = [""] * len(images)
    return Batch(names, names, torch.stack([to_tensor(image) for image in images]))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The rows differ by less than a millionth of their norm, which is 1."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm(dim=1).max() < 1e-6


# -------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_those_of_open_clip(clip, theirs):
    model, transform = theirs
    texts = model.encode_text(open_clip.get_tokenizer(NAME)(TEXTS), normalize=True)
    assert_close(clip.encode_text(TEXTS), texts)
    images = [picture((64, 64), 1), picture((50, 70), 2)]
    pixels = torch.stack([transform(image) for image in images])
    assert_close(clip.from_prompts([], images)["embed"], model.encode_image(pixels, normalize=True))
    # A batch of the size that the tower sees is not resized at all.
    small = [image.resize((32, 32)) for image in images]
    pixels = torch.stack([transform(image) for image in small])
    assert_close(clip.from_batch(batch(*small))["embed"], model.encode_image(pixels, normalize=True))
    assert (clip.encode_text(TEXTS)[0] - clip.encode_text(TEXTS)[1]).norm() > 1e-3


def test_embeddings_are_unit_rows_that_do_not_depend_on_each_other(clip):
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for together, alone in (
        (clip.encode_text(TEXTS), torch.cat([clip.encode_text([text]) for text in TEXTS])),
        (clip.encode_image(images), torch.cat([clip.encode_image(image[None]) for image in images])),
    ):
        assert together.shape == (3, 12)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_prompts_are_texts_then_images(clip):
    image = picture((60, 40))
    embed = clip.from_prompts(["a red circle", "a"], [image])["embed"]
    assert embed.shape == (3, 12) and clip.embed_dim == 12
    torch.testing.assert_close(embed[:2], clip.encode_text(["a red circle", "a"]))
    torch.testing.assert_close(embed[2:], clip.from_prompts([], [image])["embed"])
    assert clip.from_prompts([], [])["embed"].shape == (0, 12)
    assert not clip.null({"embed": embed})["embed"].any()
    hidden, strip = Image.new("RGBA", (40, 40), (255, 0, 0, 0)), Image.new("L", (5, 3000), 255)
    white = clip.from_prompts([], [Image.new("RGB", (32, 32), "white")])["embed"]
    torch.testing.assert_close(clip.from_prompts([], [hidden, strip])["embed"], white.expand(2, 12))


def test_a_long_prompt_is_cut_with_one_line_that_names_it(clip, caplog):
    with caplog.at_level(logging.WARNING):
        tokens = clip.tokenize(["a red circle and " * 30, "a cat"], warn=True)
    assert tokens.shape == (2, 10) and tokens.dtype == torch.int64
    assert tokens[0, 0] == 49406 and tokens[0, -1] == 49407
    (record,) = caplog.records
    assert "120 tokens, of which 8 fit" in record.getMessage()
    assert clip.tokenize([]).shape == (0, 10)


# ----------------------------------------------------------------------------------------------------- preprocessing

DISTANCES = {"bicubic": 1, "bilinear": 2}  # levels of 255


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(256, 256), (512, 512), (100, 180), (181, 97), (20, 30)])
def test_batches_are_prepared_as_open_clip_prepares_pillow_images(mode, interpolation, size, side):
    """Measured: the largest distance is 1 level of 255 (bicubic) or 2 (bilinear), the mean at most 0.14 levels; for
    256 to 224 pixels, bicubic, the mean is 0.001. What differs are values that lie between two levels."""
    cfg = {"mean": TAG["mean"], "std": TAG["std"], "interpolation": interpolation, "resize_mode": mode}
    cfg["fill_color"] = 100
    vision = {**ARCHITECTURE["vision_cfg"], "image_size": side}
    clip = CLIP(architecture={"model_cfg": {**ARCHITECTURE, "vision_cfg": vision}, "preprocess_cfg": cfg})
    expected = image_transform_v2(PreprocessCfg(size=side, **cfg), is_train=False)(picture(size))
    assert torch.equal(clip.image_transform(picture(size)), expected)
    ours = clip.normalize(clip.preprocessing.resize((batch(picture(size)).image + 1) / 2))[0]
    levels = (ours - expected).abs() * torch.tensor(cfg["std"])[:, None, None] * 255  # [3, S, S]
    assert ours.shape == (3, side, side)
    assert levels.max() < DISTANCES[interpolation] + 0.01 and levels.mean() < 0.15


def test_what_pixels_look_like_comes_from_the_weights(published, folder):
    clip = load_part("conditioner", published)
    expected = image_transform_v2(PreprocessCfg(size=32, **TAG), is_train=False)
    assert torch.equal(clip.image_transform(picture((50, 70))), expected(picture((50, 70))))
    torch.testing.assert_close(clip.pixel_mean.flatten(), torch.tensor(TAG["mean"]))
    local = load_part("conditioner", {**published, "weights": str(folder / "weights.pt")})
    assert local.preprocessing.config == clip.preprocessing.config


# ------------------------------------------------------------------------------------------------------------ weights


def test_published_weights(published, folder, clip):
    part = load_part("conditioner", published)
    assert_close(part.encode_text(TEXTS), clip.encode_text(TEXTS))
    assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert weights_sha256("conditioner", published) == sha256(folder / "weights.pt")


def test_weights_in_all_kinds_of_files(folder, clip, tmp_path):
    state = torch.load(folder / "weights.pt")
    training = {"epoch": 3, "name": "x", "state_dict": {f"module.{n}": v for n, v in state.items()}, "optimizer": {}}
    openai = {**{name: value.half() for name, value in state.items()}, "input_resolution": torch.tensor(32)}
    torch.save(training, tmp_path / "training.pt")
    torch.save({f"model.{name}": value for name, value in state.items()}, tmp_path / "wrapped.pt")
    torch.save(openai, tmp_path / "openai.pt")
    save_file(state, tmp_path / "plain.safetensors")
    save_part(tmp_path / "ours.safetensors", clip, {"name": "clip", "model": NAME})
    for path in sorted(tmp_path.iterdir()):
        part = load_part("conditioner", {"name": "clip", "model": NAME, "weights": str(path)})
        if path.name == "openai.pt":
            assert (part.encode_text(TEXTS) - clip.encode_text(TEXTS)).norm(dim=1).max() < 1e-2
        else:
            assert_close(part.encode_text(TEXTS), clip.encode_text(TEXTS))
            assert_close(
                part.from_batch(batch(picture((32, 32))))["embed"], clip.from_batch(batch(picture((32, 32))))["embed"]
            )
    ours = load_part("conditioner", {"name": "clip", "weights": str(tmp_path / "ours.safetensors")})
    assert_close(ours.encode_text(TEXTS), clip.encode_text(TEXTS))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_torchscript_archives_are_read_as_torch_reads_them(folder, clip, tmp_path):
    """OpenAI's files are such archives, of a traced model, in half precision."""
    model = open_clip.create_model(NAME, pretrained=str(folder / "weights.pt"))
    traced = torch.jit.trace_module(model, {"encode_text": torch.zeros(1, 10, dtype=torch.long)})
    for path, kind in ((tmp_path / "float.pt", torch.float32), (tmp_path / "half.pt", torch.float16)):
        traced.to(kind).save(path)
        tensors, expected = read_torchscript(path), torch.jit.load(path).state_dict()
        assert tensors.keys() >= expected.keys()
        assert all(tensors[name].dtype == kind and tensors[name].equal(expected[name]) for name in expected)
        part = load_part("conditioner", {"name": "clip", "model": NAME, "weights": str(path)})
        bound = 1e-6 if kind is torch.float32 else 1e-2
        assert (part.encode_text(TEXTS) - clip.encode_text(TEXTS)).norm(dim=1).max() < bound


def test_towers_in_modules_of_their_own_take_older_names(folder, tmp_path):
    """open_clip's CustomTextCLIP has the text tower below `text.`, older files have it on top."""
    architecture = {**ARCHITECTURE, "custom_text": True, "init_logit_bias": -10.0}
    section = {"name": "clip", "architecture": architecture, "weights": str(folder / "weights.pt")}
    plain = load_part("conditioner", {"name": "clip", "model": NAME, "weights": str(folder / "weights.pt")})
    assert_close(load_part("conditioner", section).encode_text(TEXTS), plain.encode_text(TEXTS))


@pytest.mark.parametrize("change", [{"embed_dim": 16}, {"vision_cfg": {**ARCHITECTURE["vision_cfg"], "layers": 3}}])
def test_weights_of_another_architecture(folder, change):
    section = {"name": "clip", "architecture": {**ARCHITECTURE, **change}, "weights": str(folder / "weights.pt")}
    with pytest.raises(UserError, match=r"weights.pt: weights of another architecture: clip\.[^\n]*$"):
        load_part("conditioner", section)


def test_the_architecture_alone_needs_no_weights(published):
    with torch.device("meta"):
        part = load_part("conditioner", {"name": "clip", "model": "ViT-L-14-quickgelu", "pretrained": "openai"}, False)
    assert part.embed_dim == 768 and all(p.is_meta for p in part.parameters())
    with pytest.raises(UserError, match=r"conditioner.pretrained: has to be given \(open_clip has random for tiny"):
        load_part("conditioner", {"name": "clip", "model": NAME})
    with pytest.raises(UserError, match=r"conditioner.weights: has to be given"):
        load_part("conditioner", {"name": "clip", "architecture": ARCHITECTURE})


def test_open_clip_keeps_quiet(folder, capfd, monkeypatch):
    """It would give the root logger a handler, and with it all warnings of ours another look."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    build("conditioner", {"name": "clip", "model": NAME}).encode_text(["red"])
    assert logging.getLogger().handlers == []
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------- bad input

MISTAKES = [
    ({}, "conditioner.model: has to be given"),
    ({"model": "ViT-B/32"}, "conditioner.model: open_clip has no 'ViT-B/32'. Nearest: ViT-B-32,"),
    ({"model": "ViT-B-23"}, "Nearest: ViT-B-32"),
    ({"model": "local-dir:/tmp"}, "Folders are not taken"),
    ({"model": "hf-hub:../secret"}, "is no repository"),
    ({"model": "hf-hub:laion/x", "pretrained": "openai"}, "conditioner.pretrained: hf-hub:laion/x brings its own"),
    ({"model": "ViT-B-32", "pretrained": "laion2b_s34b"}, "Nearest: laion2b_s34b_b79k"),
    ({"model": "ViT-B-32", "pretrained": "/etc/hostname"}, "open_clip has no weights '/etc/hostname'"),
    ({"model": "ViT-B-32", "pretrained": "openai"}, "trained with QuickGELU: take ViT-B-32-quickgelu"),
    ({"model": "ViT-B-32", "architecture": ARCHITECTURE}, "in place of model"),
    ({"architecture": ARCHITECTURE, "pretrained": "openai"}, "belongs to one of open_clip's models"),
    ({"architecture": {"embed_dim": 8}}, "vision_cfg and text_cfg have to be given"),
    ({"architecture": {**ARCHITECTURE, "embed_dim": "12"}}, "architecture.embed_dim: a positive whole number"),
    ({"architecture": {**ARCHITECTURE, "vision_cfg": {"widht": 3}}}, "vision_cfg.widht: open_clip's own towers have"),
    ({"architecture": {**ARCHITECTURE, "vision_cfg": {"timm_model_name": "x"}}}, "vision_cfg.timm_model_name:"),
    ({"architecture": {**ARCHITECTURE, "text_cfg": {"hf_model_name": "/x"}}}, "text_cfg.hf_model_name:"),
    ({"architecture": {**ARCHITECTURE, "text_cfg": {"tokenizer_kwargs": {}}}}, "text_cfg.tokenizer_kwargs:"),
    ({"architecture": {**ARCHITECTURE, "text_cfg": {"vocab_size": 100}}}, "CLIP's tokenizer needs 49408"),
    ({"architecture": {"model_cfg": ARCHITECTURE, "preprocess_cfg": {"x": 1}}}, "preprocess_cfg.x: no such key"),
    ({"model": "ViT-B-32", "tag": "x"}, "conditioner.tag: no such key"),
]


@pytest.mark.parametrize(("section", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_found_before_anything_is_built(section, message):
    (problem,) = check_section("conditioner", {"name": "clip", **section}, "conditioner")
    assert message in problem and "\n" not in problem and len(problem) < 400
    with pytest.raises(UserError, match="conditioner"):
        load_part("conditioner", {"name": "clip", **section})


def test_an_architecture_that_cannot_be_is_one_line():
    vision = {**ARCHITECTURE["vision_cfg"], "width": 7}
    with pytest.raises(UserError, match=r"^conditioner.architecture: open_clip cannot build it \([^\n]*\)$"):
        CLIP(architecture={**ARCHITECTURE, "vision_cfg": vision})


def test_all_that_open_clip_has_published_is_taken():
    """Each of its pairs of names, but for those that it would load with another activation than they were trained."""
    for model, tag in open_clip.list_pretrained():
        problems = CLIP.check(model=model, pretrained=tag, architecture=None)
        if problems:
            assert "QuickGELU" in problems[0]
            assert CLIP.check(model=f"{model}-quickgelu", pretrained=tag, architecture=None) == []


def test_a_download_that_fails_is_one_line(published, monkeypatch):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"random": {"url": "", "hf_hub": "a/b/"}})

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", offline)
    with pytest.raises(
        UserError, match=r"random cannot be downloaded \([^\n]*no route[^\n]*conditioner.weights takes a"
    ):
        load_part("conditioner", published)


class Hostile:
    """An object that makes a file when it is unpickled carelessly."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_hostile_files_are_refused_and_do_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    files = tmp_path / "files"
    files.mkdir()
    torch.save({"visual.x": Hostile(marker)}, files / "zipped.pt")
    (files / "plain.pt").write_bytes(pickle.dumps({"visual.x": Hostile(marker)}, protocol=2))
    with zipfile.ZipFile(files / "torchscript.pt", "w") as archive:
        archive.writestr("x/code/__torch__.py", "import os\n")
        archive.writestr("x/data.pkl", pickle.dumps(Hostile(marker), protocol=2))
    with zipfile.ZipFile(files / "compressed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/code/__torch__.py", "")
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
    with zipfile.ZipFile(files / "state_for_a_function.pt", "w") as archive:
        archive.writestr("x/code/__torch__.py", "")
        archive.writestr("x/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.")
    (files / "truncated.pt").write_bytes((folder / "weights.pt").read_bytes()[:-1000])
    torch.save({"encoder.weight": torch.zeros(1)}, files / "other.pt")
    for path in sorted(files.iterdir()):
        with pytest.raises(UserError, match=rf"{path.name}: (refused|not a (readable|CLOOB))[^\n]*$"):
            load_part("conditioner", {"name": "clip", "model": NAME, "weights": str(path)})
        assert not marker.exists(), path.name
    pickle.loads((files / "plain.pt").read_bytes())
    assert marker.exists(), "read carelessly, they do run"


# ------------------------------------------------------------------------------------------------------ repositories


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A repository `owner/name` with the tiny model; returns a function that writes its config."""
    repository = tmp_path / "hub"
    repository.mkdir()
    save_file(torch.load(folder / "weights.pt"), repository / "open_clip_model.safetensors")

    def download(repo_id, filename, **_):
        if repo_id != "owner/name" or not (repository / filename).exists():
            raise FileNotFoundError(f"{repo_id} has no {filename}")
        return str(repository / filename)

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", download)
    return lambda config: (repository / "open_clip_config.json").write_text(json.dumps(config))


def test_a_repository_brings_architecture_pixels_and_weights(hub, folder, clip):
    hub({"model_cfg": ARCHITECTURE, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}})
    section = {"name": "clip", "model": "hf-hub:owner/name"}
    part = load_part("conditioner", section)
    assert_close(part.encode_text(TEXTS), clip.encode_text(TEXTS))
    torch.testing.assert_close(part.pixel_mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert weights_sha256("conditioner", section) == sha256(folder.parent / CLIP.pretrained_path(section))
    with pytest.raises(UserError, match=r"conditioner.model: hf-hub:owner/other cannot be downloaded"):
        load_part("conditioner", {"name": "clip", "model": "hf-hub:owner/other"})


@pytest.mark.parametrize(
    ("tower", "change", "message"),
    [
        ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs: only clean and strip_sep"),
        ("text_cfg", {"hf_tokenizer_name": "/tmp/x"}, "hf_tokenizer_name: '/tmp/x' is no repository"),
        ("text_cfg", {"hf_model_name": "owner/model-with-code"}, "in none of open_clip's own models, and refused"),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp/x"}, "timm_model_name: 'local-dir:/tmp/x' is no model"),
        ("vision_cfg", {"code": "x"}, "vision_cfg.code:"),
    ],
)
def test_a_repository_cannot_name_code_or_folders(hub, tower, change, message):
    hub({"model_cfg": {**ARCHITECTURE, tower: {**ARCHITECTURE[tower], **change}}})
    with pytest.raises(UserError, match=rf"hf-hub:owner/name: open_clip_config.json: .*{message}"):
        load_part("conditioner", {"name": "clip", "model": "hf-hub:owner/name"})


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_from_training_to_pictures(folder, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = {"name": "clip", "architecture": ARCHITECTURE, "weights": str(folder / "weights.pt")}
    yaml = make_run(tmp_path, conditioner=section, trainer={"max_steps": 3})
    code, _, err = program("train", "--config", yaml)
    assert code == 0, err
    checkpoint = tmp_path / "runs" / "tiny" / "ema.safetensors"
    _, metadata = read_safetensors(checkpoint)
    assert json.loads(metadata["config"])["conditioner"] == {**section, "dropout": 0.2}
    assert metadata["conditioner"] == sha256(folder / "weights.pt")
    picture((40, 30)).save(tmp_path / "prompt.png")
    options = ("--sampler", "ddim", "--steps", "2", "--device", "cpu", "-n", "1")
    code, _, err = program("sample", "--checkpoint", checkpoint, *options, "a red circle", "--images", "prompt.png:0.5")
    assert code == 0, err
    assert (tmp_path / "samples" / "00000.png").exists()


def test_published_weights_in_training_sampling_and_caches(published, program, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    yaml = make_run(tmp_path, images=24, conditioner={**published, "weights": None}, trainer={"max_steps": 2})
    for run in ("first", "second"):
        code, out, err = program("train", "--config", yaml, f"run={run}", "cache.folder=cache")
        assert code == 0, err
        assert ("encoding" in out) == (run == "first")
    checkpoint = tmp_path / "runs" / "second" / "ema.safetensors"
    prompts, options = ["a", "b"], SamplingOptions(sampler={"name": "ddim", "steps": 2}, seed=1)
    images = Pipeline.from_checkpoint(checkpoint)(prompts, options)
    other = open_clip.create_model(NAME).state_dict()
    torch.save(other, tmp_path / "other.pt")
    assert "trained with" not in caplog.text
    moved = Pipeline.from_checkpoint(checkpoint, ModelOptions(conditioner=tmp_path / "other.pt"))(prompts, options)
    assert "other.pt: not the conditioner file that the model was trained with" in caplog.text
    assert images[0].tobytes() != moved[0].tobytes()
    architecture = {**ARCHITECTURE, "quick_gelu": True}
    section = {"name": "clip", "weights": open_clip.pretrained._PRETRAINED[NAME]["random"]["file"]}
    yaml = make_run(tmp_path, images=24, conditioner={**section, "architecture": architecture})
    code, _, err = program("train", "--config", yaml, "run=third", "cache.folder=cache")
    assert code == 2 and "this cache was made with another " in err and "conditioner.architecture" in err


def test_a_checkpoint_cannot_make_open_clip_read_folders(folder, program, tmp_path, monkeypatch):
    from ldm_lab.checkpoints.native import save_model

    for i, section in enumerate([{"model": f"local-dir:{folder}"}, {"model": NAME, "pretrained": str(folder)}]):
        config = {
            "task": "diffusion",
            "autoencoder": {"name": "identity"},
            "conditioner": {"name": "clip", **section},
            "denoiser": {"name": "ccld_unet", "base_channels": 16},
            "objective": {"name": "v_cosine"},
        }
        save_model(tmp_path / f"{i}.safetensors", {"x": torch.zeros(1)}, config, {})
        code, _, err = program("sample", "--checkpoint", tmp_path / f"{i}.safetensors", "red")
        assert code == 2 and "conditioner of the checkpoint: conditioner." in err


def test_clip_is_not_trained_here(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train_clip.yaml"
    (tmp_path / "x").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "x" / "one.png")
    data = "{name: folder, path: x, image_size: 32, batch_size: 1}"
    path.write_text(f"task: cloob\ndata: {data}\nconditioner: {{name: clip, model: RN50}}\n")
    code, _, err = program("train", "--config", path)
    assert code == 2 and "conditioner.name: 'clip' is used as published" in err


def test_it_is_listed_among_the_parts():
    assert "conditioner: clip  -- CLIP by open_clip" in describe_parts()


def test_listing_the_parts_does_not_import_open_clip(tmp_path):
    code = (
        "import sys, ldm_lab.config as c; c.parts('conditioner'); print({'open_clip', 'torchvision'} & {*sys.modules})"
    )
    done = run_program("-c", code, cwd=tmp_path)
    assert done.stdout == "set()\n", done.stderr
    assert "open_clip" in sys.modules  # this very file needs it
