"""`python -m ldm_lab evaluate`: models and folders of pictures in one table, on the tests' tiny model."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_inpainting_training import TEXT, UNET
from tiny import DENOISER, embedding, make_parts, run_program

from ldm_lab.checkpoints.native import save_model
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.config import PartConfig, build
from ldm_lab.data.samples import UNREACHABLE, SkippedSample
from ldm_lab.data.shapes import write_shards
from ldm_lab.data.work_items import SourceItem
from ldm_lab.errors import UserError
from ldm_lab.evaluation import tables
from ldm_lab.evaluation.distances import Moments, cmmd, frechet
from ldm_lab.evaluation.feature_files import FEATURES, PictureRows, read_part, read_rows, write_rows
from ldm_lab.evaluation.metrics import CLIP_SCORE
from ldm_lab.evaluation.model_parts import IMAGE_EMBED, TEXT_EMBED, retrieval
from ldm_lab.evaluation.own_files import is_plot, listed_pictures
from ldm_lab.evaluation.settings import SEED_STEP, picture_seeds, row_names
from ldm_lab.sampling import Pipeline, SamplingOptions
from ldm_lab.training.evaluate import Evaluate


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models of one kind, with random weights, and 24 real images with captions."""
    folder = tmp_path_factory.mktemp("models")
    config = {"task": "diffusion", **make_parts(folder), "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"]["dropout"] = 0.2
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        state = build("denoiser", DENOISER, 4, embedding(16)).state_dict()
        save_model(folder / f"{name}.safetensors", state, config, {"image_size": "32"})
    write_shards(folder / "shards", count=24, shards=3, size=32, seed=1)
    return folder


@pytest.fixture
def evaluate(models, program, tmp_path, monkeypatch):
    """Run the command on model a, unless another one is named: `evaluate("--steps", 2)` -> (exit code, out, err)."""

    monkeypatch.setattr(tables, "plot", lambda table, path: path.touch())  # half a second each

    def call(
        *args: str | Path, data: bool = True, out: Path = tmp_path / "out", batch: int = 4
    ) -> tuple[int, str, str]:
        named = any(str(word) in ("--checkpoint", "--images") for word in args)
        model = [] if named else ["--checkpoint", models / "a.safetensors"]
        real = ["--data", f"shards={models}/shards/*.tar", "image_size=32"] if data else []
        few = ["--accelerator", "cpu", "--workers", 0, "--batch-size", batch, "--bootstrap", 2, "--out", out]
        return program("ldm_lab.__main__", "evaluate", *model, *real, *few, *args)

    call.plain = lambda *args: program("ldm_lab.__main__", "evaluate", *args)
    return call


def table(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


PLOT = tables.plot
SHORT = ("--pictures", 6, "--steps", 2)


def test_models_and_choices_in_one_table(evaluate, models, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "plot", PLOT)
    checkpoints = ["--checkpoint", models / "a.safetensors", "--checkpoint", models / "b.safetensors"]
    code, out, err = evaluate(*checkpoints, "--guidance", 1, "--guidance", 3, "--pictures", 4, "--steps", 2)
    assert code == 0, err
    rows = table(tmp_path / "out")["rows"]
    assert [(row["model"], row["guidance"], row["sampler"], row["steps"]) for row in rows] == [
        ("a", 1, "unipc", 2), ("a", 3, "unipc", 2), ("b", 1, "unipc", 2), ("b", 3, "unipc", 2),
    ]  # fmt: skip
    assert list(rows[0]["values"]) == ["fd", "cmmd", "precision", "recall", "clip_score"]
    assert rows[0]["values"]["cmmd"]["margin_of"] == "bootstrap" and rows[0]["values"]["cmmd"]["margin"] > 0
    assert rows[0]["values"]["fd"] != rows[1]["values"]["fd"] != rows[2]["values"]["fd"]
    with open(tmp_path / "out" / "evaluation.csv") as file:
        read = list(csv.DictReader(file))
    assert [float(row["cmmd"]) for row in read] == [row["values"]["cmmd"]["value"] for row in rows]
    markdown = (tmp_path / "out" / "evaluation.md").read_text()
    assert markdown.count("| a |") == 2 and markdown.count("**") >= 10 and markdown in out
    assert "covariances are singular" in markdown
    assert Image.open(tmp_path / "out" / "evaluation.png").size[0] > 400


def test_values_are_those_of_the_pictures_that_sampling_makes(evaluate, models, tmp_path):
    """By hand: the pictures of `Pipeline`, the conditioner's embeddings, the distances."""
    (tmp_path / "p.txt").write_text("a red star\na blue circle: round\n")
    code, _, err = evaluate(*SHORT, "--prompts", tmp_path / "p.txt", "--guidance", 2, "--sampler", "ddim")
    assert code == 0, err
    values = table(tmp_path / "out")["rows"][0]["values"]
    pipeline = Pipeline.from_checkpoint(models / "a.safetensors")
    options = SamplingOptions(guidance=2.0, sampler={"name": "ddim", "steps": 2}, batch_size=4)
    prompts = ["a red star", "a blue circle: round"] * 3
    pictures = pipeline(prompts, options)
    conditioner = pipeline.model.conditioner
    made = conditioner.from_prompts([], pictures)["embed"]  # [6, 16]
    real = read_rows(tmp_path / "out" / "real.safetensors")[0]
    assert len(real) == 24 and all(real.texts)
    rows = real.features("embedding")
    assert values["fd"]["value"] == pytest.approx(frechet(Moments.of(rows), Moments.of(made)), abs=1e-4)
    assert values["cmmd"]["value"] == pytest.approx(cmmd(rows, made), abs=1e-4)
    told = conditioner.encode_text(prompts)
    assert values["clip_score"]["value"] == pytest.approx(float(100 * (made * told).sum(1).mean()), abs=1e-3)


def test_other_pictures_and_other_data_in_the_same_place_are_measured_anew(evaluate, models, tmp_path):
    """Also where the folder of the evaluation has what was measured before under the same names."""
    write_shards(tmp_path / "own", count=12, shards=1, size=32, seed=2)
    data = ("--data", f"shards={tmp_path}/own/*.tar", "image_size=32")
    folder = tmp_path / "samples"
    folder.mkdir()
    found = []
    for turn in range(2):
        for number in range(5):
            Image.new("RGB", (32, 32), (number * 40, turn * 250, 0)).save(folder / f"{number}.png")
        (folder / "samples.json").write_text(json.dumps([{"file": f"{number}.png"} for number in range(5)]))
        Image.new("RGB", (90, 90)).save(folder / "grid.png")
        asked = ("--images", folder, "--checkpoint", models / "a.safetensors", "--metric", "loss", "--metric", "cmmd")
        code, _, err = evaluate(*asked, *SHORT, *data, data=False)
        assert code == 0, err
        content = table(tmp_path / "out")
        found.append([row["values"] for row in content["rows"]])
        shutil.rmtree(tmp_path / "own")
        write_shards(tmp_path / "own", count=12, shards=1, size=32, seed=3)
    assert found[0][0]["loss"] != found[1][0]["loss"] and found[0][1]["cmmd"] != found[1][1]["cmmd"]
    assert content["rows"][1]["pictures"] == 5 and any("samples.json lists" in line for line in content["remarks"])


def test_several_seeds_give_margins_and_share_no_noise(evaluate, tmp_path):
    code, _, err = evaluate(*SHORT, "--seeds", 0, 1, 2, "--metric", "cmmd")
    assert code == 0, err
    [row] = table(tmp_path / "out")["rows"]
    assert row["seeds"] == [0, 1, 2] and row["values"]["cmmd"]["margin_of"] == "seeds"
    assert "6 x 3 seeds" in (tmp_path / "out" / "evaluation.md").read_text()
    assert picture_seeds(0, 3) == [0, 1, 2] and picture_seeds(2, 2) == [2 * SEED_STEP, 2 * SEED_STEP + 1]


def test_an_interrupted_command_goes_on_and_gives_the_same(evaluate, tmp_path, monkeypatch):
    code, _, err = evaluate(*SHORT)
    assert code == 0, err
    whole = (tmp_path / "out" / "evaluation.json").read_bytes()
    parts = sorted((tmp_path / "out" / "parts").rglob("*.safetensors"))
    assert len(parts) == 2  # 4 pictures and 2
    parts[1].unlink()
    made = []
    monkeypatch.setattr(
        Pipeline, "samples", lambda self, *a, _was=Pipeline.samples, **k: made.append(1) or _was(self, *a, **k)
    )
    assert evaluate(*SHORT)[0] == 0
    assert len(made) == 1 and (tmp_path / "out" / "evaluation.json").read_bytes() == whole
    parts[0].write_bytes(b"damaged")
    assert evaluate(*SHORT)[0] == 0 and len(made) == 2
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == whole


def test_features_of_real_images_are_kept_and_know_what_they_are_of(evaluate, models, tmp_path):
    assert evaluate(*SHORT, "--metric", "cmmd")[0] == 0
    kept = tmp_path / "out" / "real.safetensors"
    before, written = kept.read_bytes(), kept.stat().st_mtime_ns
    assert evaluate(*SHORT, "--metric", "cmmd")[0] == 0 and kept.stat().st_mtime_ns == written  # not made anew

    code, out, _ = evaluate(*SHORT, "--metric", "cmmd", "--limit", 12)
    assert code == 0 and "real.safetensors: of something else, made anew" in out
    assert len(read_rows(kept)[0]) == 12 and kept.read_bytes() != before

    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(before)
    code, _, err = evaluate(*SHORT, "--metric", "cmmd", "--features", mine, data=False, out=tmp_path / "two")
    assert code == 0, err
    code, _, err = evaluate(*SHORT, "--metric", "cmmd", "--features", mine, "--limit", 12)
    assert code == 2 and "mine.safetensors: features of something else: images (10000 there, 12 here)" in err
    mine.write_bytes(before[:-50])
    code, _, err = evaluate(*SHORT, "--metric", "cmmd", "--features", mine)
    assert code == 2 and "mine.safetensors: not a readable safetensors file" in err


def test_captions_and_images_of_the_same_size_are_noticed(evaluate, tmp_path):
    """Also for what is measured of a model's parts. Copies of the files may have other times."""
    real = tmp_path / "real"
    pictures_in(real, 8)
    for number in range(8):
        Image.new("RGB", (32, 32), (number * 20, 0, 99)).save(real / f"{number}.bmp")
        (real / f"{number}.png").unlink()
        (real / f"{number}.txt").write_text(f"a red cat {number}")
    data = ("--data", f"path={real}", "image_size=32", "--metric", "rfd", "--metric", "retrieval")
    found = []
    for turn in range(4):
        if turn == 1:
            for number in range(8):
                (real / f"{number}.txt").write_text(f"a tan dog {7 - number}")
        if turn == 2:
            for number in range(8):
                Image.new("RGB", (32, 32), (0, number * 30, 9)).save(real / f"{number}.bmp")
        code, out, err = evaluate(*data, data=False)
        assert code == 0 and ("of something else, made anew" in out) == (turn in (1, 2)), (out, err)
        rows = read_rows(tmp_path / "out" / "real.safetensors")[0]
        parts = len([*(tmp_path / "out" / "parts").glob("model-*")])
        found.append((rows.texts, rows.features("embedding").tolist(), parts))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1] != found[2][1] and found[2] == found[3]
    assert [parts for *_, parts in found] == [1, 2, 3, 3]
    (tmp_path / "out" / "real.safetensors").rename(tmp_path / "mine.safetensors")
    os.utime(real / "3.bmp", (1e9, 1e9))
    code, out, err = evaluate(*data, "--features", tmp_path / "mine.safetensors", data=False)
    assert code == 0 and "written at another time; taken as they are" in out, err


@pytest.mark.parametrize(("metric", "limit"), [("fd", ()), ("loss", ("--limit", 12))], ids=["fd", "loss-of-some"])
def test_what_cannot_be_reached_is_not_left_out_silently(evaluate, unsampled, tmp_path, monkeypatch, metric, limit):
    """Nothing counts as whole meanwhile; the same command goes on."""
    samples, is_down = SourceItem.samples, [True]

    def broken(item):
        return iter([SkippedSample(UNREACHABLE, "00001.tar")]) if is_down and item.first == 1 else samples(item)

    monkeypatch.setattr(SourceItem, "samples", broken)
    asked = ("--metric", metric, *limit)
    code, _, err = evaluate(*asked)
    assert code == 2 and "--data: 1 of 3 shards could not be read, such as " in err and "00001.tar; what was" in err
    assert not (tmp_path / "out" / "real.safetensors").exists() and len([*tmp_path.rglob("0000[02].safetensors")]) == 2
    is_down.clear()
    if metric == "loss":
        assert evaluate(*asked)[0] == 0
        assert sum(len(read_rows(path)[0]) for path in (tmp_path / "out").rglob("0*.safetensors")) == (
            12 if limit else 24
        )


def test_an_option_of_some_samplers_counts_for_these(evaluate, tmp_path):
    """As in `compare`; one that none of them has is refused."""
    asked = ("--pictures", 2, "--steps", 2, "--metric", "clip_score", "--sampler", "ddim", "--sampler", "unipc")
    code, _, err = evaluate(*asked, "--eta", 0.5)
    assert code == 0 and "note: --eta is of ddim alone" in err, err
    rows = table(tmp_path / "out")["rows"]
    assert [row["settings"].get("eta") for row in rows] == [0.5, None]
    code, _, err = evaluate(*asked, "--variance", "beta")
    assert code == 2 and "no such key: 'variance' of sampler.name=ddim" in err.splitlines()[-1]


def test_a_models_parts_on_real_images(evaluate, tmp_path):
    code, _, err = evaluate("--metric", "loss", "--metric", "psnr", "--metric", "rfd", "--metric", "retrieval")
    assert code == 0, err
    [row] = table(tmp_path / "out")["rows"]
    values = {name: its["value"] for name, its in row["values"].items()}
    assert row["guidance"] is None and row["pictures"] == 0
    quarters = [values[f"loss_t{t}"] for t in ("0.00", "0.25", "0.50", "0.75")]
    assert min(quarters) < values["loss"] < max(quarters)
    assert 0 < values["psnr"] < 40 and values["rfd"] > 0 and row["values"]["psnr"]["margin"] > 0
    assert 0 <= values["image_to_text_r1"] <= values["image_to_text_r5"] <= 1


def test_the_loss_does_not_depend_on_the_batches(evaluate, tmp_path):
    found = []
    for size in (24, 5):
        assert evaluate("--metric", "loss", batch=size, out=tmp_path / str(size))[0] == 0
        found.append(table(tmp_path / str(size))["rows"][0]["values"]["loss"]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_pictures_in_a_folder_with_captions_beside(evaluate, models, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (40, 30), (number * 40, 0, 0)).save(folder / f"{number}.png")
        if number:
            (folder / f"{number}.txt").write_text("a red circle")
    clip = ("--clip", "name=cloob", f"weights={models / 'conditioner.safetensors'}")
    code, _, err = evaluate("--images", folder, *clip)
    assert code == 0, err
    content = table(tmp_path / "out")
    assert content["rows"][0]["model"] == "samples" and content["rows"][0]["pictures"] == 6
    assert any("clip_score of 5 of 6 pictures" in line for line in content["remarks"])

    for caption in folder.glob("*.txt"):
        caption.unlink()
    code, _, err = evaluate("--images", folder, *clip, out=tmp_path / "other")
    assert code == 2 and f"--images {folder}: clip_score needs captions, in a .txt beside each picture" in err
    code, _, err = evaluate("--images", folder)
    assert code == 2 and "--metric fd: --clip has to say whose embeddings are compared" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--metric", "fidd"], "--metric: no such metric: 'fidd'. Did you mean 'fid'?"),
        (["--seeds", "1", "1"], "--seeds: each has to be another one"),
        (["--guidance", "1", "--guidance", "1"], "--guidance: each has to be another one"),
        (["--sampler", "unipcc"], "sampler"),
        (["--inception", "x.pth"], "--inception: belongs to --metric fid"),
        (["--inception", "x.pth", "--metric", "fid"], "x.pth: no such file"),
        (["--checkpoint", "none.safetensors"], "none.safetensors: no such file"),
        (["--pictures", "0"], "--pictures: at least 1 is needed"),
        (["--prompts", "none.txt"], "none.txt: no such prompts file"),
    ],
    ids=["metric", "seeds", "guidance", "sampler", "inception", "no-inception", "checkpoint", "zero", "prompts"],
)
def test_requests_that_make_no_sense_are_one_line(evaluate, args, message):
    code, _, err = evaluate(*args)
    assert code == 2 and message in err and "Traceback" not in err


def test_what_is_missing_is_said(evaluate, models, tmp_path):
    code, _, err = evaluate(*SHORT, data=False)
    assert code == 2 and "--metric fd: --data has to say what the real images are" in err
    code, _, err = evaluate("--pictures", 3, "--steps", 2, "--metric", "recall")
    assert code == 2 and "recall: pictures: at least 4 images are needed, not 3" in err
    code, _, err = evaluate("--metric", "psnr", data=False)
    assert code == 2 and "--metric psnr: --data has to say what images it is measured on" in err
    (tmp_path / "bare").mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32)).save(tmp_path / "bare" / f"{number}.png")
    code, _, err = evaluate(*SHORT, "--data", tmp_path / "bare", data=False)
    assert code == 2 and "--prompts: has to be given, as the real images have no captions" in err
    code, _, err = evaluate(*SHORT, "--data", tmp_path / "none", data=False)
    assert code == 2 and "--data" in err and "none" in err
    code, _, err = evaluate(*SHORT, "--data", "name=folder", f"path={tmp_path / 'bare'}", "sizee=3", data=False)
    assert code == 2 and "--data: sizee: no such key" in err


def test_the_same_name_twice():
    assert row_names(["runs/x/a.safetensors", "b.ckpt"]).models == ["a", "b"]
    assert row_names(["runs/x/ema.safetensors", "runs/y/ema.safetensors"]).models == ["x/ema", "y/ema"]
    assert row_names(["a/x/ema.safetensors", "b/x/ema.safetensors"]).models == ["a/x/ema", "b/x/ema"]
    assert row_names([], ["runs/A/samples", "runs/B/samples/", "."]) == (
        [],
        ["A/samples", "B/samples", Path.cwd().name],
    )
    assert row_names(["runs/a.ckpt"], ["/out/a", "/out/b/c"]) == (["runs/a"], ["out/a", "c"])
    (models, folders) = row_names(["m/a.ckpt", "m/a.safetensors"], ["m/a"])  # of one folder
    assert models == ["m/a.ckpt", "m/a.safetensors"] and folders != models[:1] and folders[0].endswith("m/a (pictures)")
    with pytest.raises(UserError, match="--checkpoint runs/x: is given twice"):
        row_names(["runs/x", "runs/x"])


def test_grids_are_left_out_in_every_folder_that_lists_its_pictures(tmp_path):
    names = ["a/0.png", "a/grid.png", "b/0.png", "b/deep/1.png", "b/grid.png", "c/grid.png", "top.png"]
    assert listed_pictures(tmp_path, names) is None
    for folder, files in {"a": ["0.png"], "b": ["0.png", "./deep/1.png"]}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "samples.json").write_text(json.dumps([{"file": file} for file in files]))
    assert listed_pictures(tmp_path, names) == {"a/0.png", "b/0.png", "b/deep/1.png", "c/grid.png", "top.png"}
    assert listed_pictures(tmp_path / "a", ["0.png", "grid.png"]) == {"0.png"}


def test_every_prompt_is_looked_at_before_pictures_are_made(evaluate, unsampled, models, tmp_path):
    """As one that cannot be guided: a model without dropped conditions takes prompts of weight 1 alone."""
    checkpoint = models / "undropped.safetensors"  # its parts lie beside it
    state = load_file(models / "a.safetensors")
    with safe_open(models / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    config = {**json.loads(metadata["config"])}
    config["conditioner"]["dropout"] = 0.0
    save_file(state, checkpoint, {**metadata, "config": json.dumps(config)})
    (tmp_path / "p.txt").write_text("a star:1\na star:1\na cat:2\na dog:3\n")
    asked = ("--checkpoint", checkpoint, "--guidance", 1, "--metric", "clip_score", "--prompts", tmp_path / "p.txt")
    code, _, err = evaluate(*asked, data=False)
    assert code == 2 and f"{checkpoint}: prompt 'a cat:2': guidance needs a model that was trained with dropped" in err


def test_retrieval_counts_images_of_one_caption_alike():
    images = torch.eye(6)[[0, 0, 1, 2]]  # two of the first caption
    texts = torch.eye(6)[[0, 0, 1, 3]]  # the last caption is like no image
    found = retrieval(PictureRows({IMAGE_EMBED: images, TEXT_EMBED: texts}, ["a", "a", "b", "c"]))
    values = {name: its.value for name, its in found.items()}
    assert values["image_to_text_r1"] >= 0.75 and values["image_to_text_r5"] == values["text_to_image_r5"] == 1
    with pytest.raises(UserError, match="at least 2 different captions"):
        retrieval(PictureRows({IMAGE_EMBED: images, TEXT_EMBED: texts}, ["a", "a", "", "a"]))


def test_files_of_others_are_refused(tmp_path):
    rows = PictureRows({FEATURES + "embedding": torch.zeros(2, 3), CLIP_SCORE: torch.zeros(2)}, ["", "é"])
    write_rows(tmp_path / "a.safetensors", rows, {"data": "x"})
    again, facts = read_rows(tmp_path / "a.safetensors")
    assert again.texts == ["", "é"] and facts == {"data": "x"} and len(again.taken(torch.tensor([1]))) == 1
    assert read_part(tmp_path / "a.safetensors") is None  # a set, no part of a pass
    write_rows(tmp_path / "b.safetensors", PictureRows({CLIP_SCORE: torch.zeros(3)}, ["a"]), {})
    with pytest.raises(UserError, match="different numbers of pictures"):
        read_rows(tmp_path / "b.safetensors")


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(models, tmp_path):
    """Also where shards of other sizes have to make up for one that has too few images."""
    write_shards(tmp_path / "few", count=2, shards=1, size=32, seed=5)
    metrics = [
        word
        for name in ("fd", "cmmd", "precision", "recall", "clip_score", "loss", "psnr", "rfd", "retrieval")
        for word in ("--metric", name)
    ]
    common = [
        "-m",
        "ldm_lab",
        "evaluate",
        "--checkpoint",
        models / "a.safetensors",
        "--checkpoint",
        models / "b.safetensors",
    ]
    common += [
        "--data",
        f"shards=['{tmp_path}/few/*.tar','{models}/shards/*.tar']",
        "image_size=32",
        "--limit",
        "20",
        *SHORT,
        "--batch-size",
        "2",
        "--accelerator",
        "cpu",
        "--workers",
        "0",
        *metrics,
    ]
    for out, more in (("one", []), ("two", ["--devices", "2"])):
        done = run_program(*common, "--out", tmp_path / out, *more, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("evaluation.json, evaluation.csv") == 1
    assert table(tmp_path / "one") == table(tmp_path / "two")
    assert table(tmp_path / "one")["facts"]["real images"] == "20"


def test_other_weights_beside_the_model_are_measured_anew(evaluate, models, tmp_path):
    """Another guide model, another autoencoder's file, the same one with other weights: other pictures, other rows."""
    parts = make_parts(tmp_path)
    other = Path(parts["autoencoder"]["weights"])
    with safe_open(other, "pt") as file:
        metadata = file.metadata()
    asked = (*SHORT, "--guidance", 3, "--metric", "cmmd", "--metric", "psnr", "--metric", "loss")
    found = []
    for turn, more in enumerate(
        [(), ("--guide-model", models / "b.safetensors"), ("--autoencoder", other), ("--autoencoder", other)]
    ):
        if turn >= 2:
            state = load_file(other)
            save_file({name: value * (1 + 0.5 * turn) for name, value in state.items()}, other, metadata)
        code, _, err = evaluate(*asked, *more)
        assert code == 0, err
        content = table(tmp_path / "out")
        found.append([content["rows"][0]["values"]["cmmd"]["value"], content["rows"][0]["values"]["psnr"]["value"]])
        assert "sha256 of the models with all their parts: a " in content["facts"]["weights"]
    assert len({row[0] for row in found}) == 4 and len({row[1] for row in found}) == 3


def test_the_loss_of_a_model_that_draws_conditions_does_not_depend_on_the_batches(evaluate, tmp_path):
    """Of an inpainting model: what is erased of an image is the same in every batch."""
    parts = {**make_parts(tmp_path), "conditioner": TEXT, "condition_sources": {"inpaint": {"channels": 4}}}
    objective = {"name": "eps_hybrid", "betas": "linear_latent", "timesteps": 100}
    config = {"task": "diffusion", **parts, "denoiser": UNET, "objective": objective}
    conditioner = PartConfig.from_dict("conditioner", TEXT).build()
    torch.manual_seed(0)
    denoiser = build("denoiser", UNET, 4, given_conditions(conditioner, build_sources(config["condition_sources"])))
    for weight in denoiser.parameters():  # what is initialized with 0 would not look at the conditions
        torch.nn.init.normal_(weight, std=0.1)
    save_model(tmp_path / "i.safetensors", denoiser.state_dict(), config, {"image_size": "32"})
    found = []
    for size in (8, 3):
        asked = ("--checkpoint", tmp_path / "i.safetensors", "--metric", "loss")
        code, _, err = evaluate(*asked, batch=size, out=tmp_path / str(size))
        assert code == 0, err
        found.append(table(tmp_path / str(size))["rows"][0]["values"]["loss"]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_images_that_cannot_be_used_are_said_also_where_features_are_kept(evaluate, models, tmp_path):
    for folder in ("real", "made"):
        (tmp_path / folder).mkdir()
        for number in range(6):
            Image.new("RGB", (32, 32), (number * 40, 0, 0)).save(tmp_path / folder / f"{number}.png")
        (tmp_path / folder / "broken.png").write_bytes(b"no picture")
    asked = ("--images", tmp_path / "made", "--checkpoint", models / "a.safetensors", *SHORT, "--metric", "cmmd")
    for metrics in ((), ("--metric", "loss")):
        data = ("--data", f"path={tmp_path}/real", "image_size=32", "max_skipped=0.5")
        code, _, err = evaluate(*asked, *metrics, *data, "--prompts", prompts(tmp_path), data=False)
        assert code == 0, err
        told = (tmp_path / "out" / "evaluation.md").read_text()
        assert "real images: 7 samples read, 1 skipped" in told and "made: 7 samples read, 1 skipped" in told


def test_folders_of_pictures_are_looked_at_before_anything_is_measured(evaluate, models, tmp_path):
    (tmp_path / "made").mkdir()
    made = ("--images", tmp_path / "made", "--checkpoint", models / "a.safetensors")
    for words, told in (
        ((*made, "--images", tmp_path / "nope"), "nope: no such folder"),
        ((*made, "--images", tmp_path / "other" / ".." / "made"), "made: named twice"),
        ((*made, "--metric", "loss"), "--images: pictures are not looked at by --metric loss"),
    ):
        code, _, err = evaluate(*words)
        assert code == 2 and told in err and "Traceback" not in err, err
        assert not (tmp_path / "out" / "parts").exists()


def prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("a red circle\n")
    return folder / "prompts.txt"


@pytest.fixture
def unsampled(monkeypatch):
    """Have the test fail if a picture is made."""
    monkeypatch.setattr(Pipeline, "samples", lambda *args, **more: pytest.fail("a picture was made"))


def pictures_in(folder: Path, count: int, caption: str = "") -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (32, 32), (number * 20, 0, 250 - number * 9)).save(folder / f"{number}.png")
        if caption:
            (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.mark.parametrize(
    ("words", "count", "caption", "message"),
    [
        (["--metric", "recall", "--pictures", 3], 9, "a", "recall: pictures: at least 4 images are needed, not 3"),
        (["--metric", "fd", "--pictures", 1], 9, "a", "fd: pictures: at least 2 images are needed, not 1"),
        (["--metric", "precision", "--limit", 3], 9, "a", "precision: real images: at least 4 images are needed"),
        (["--metric", "precision"], 3, "a", "precision: real images: at least 4 images are needed, not 3"),
        (["--metric", "cmmd"], 1, "a", "cmmd: real images: at least 2 images are needed, not 1"),
        (["--metric", "cmmd", "--metric", "rfd"], 1, "a", "real images: at least 2 images are needed, not 1"),
        (["--metric", "clip_score"], 9, "", "--prompts: has to be given, as the real images have no captions"),
        (["--metric", "clip_score"], 9, "  ", "--prompts: has to be given, as the real images have no captions"),
        (["--metric", "cmmd", "--metric", "retrieval"], 9, "a", "at least 2 different captions, not 1"),
        (["--metric", "cmmd", "--sampler", "ddim", "--steps", "fast27"], 9, "a", "fast27"),
    ],
    ids=["pictures", "one", "limit", "few-real", "one-real", "one-rfd", "no-caption", "blank", "same-caption", "steps"],
)  # fmt: skip
def test_what_can_be_known_is_said_before_pictures_are_made(
    evaluate, unsampled, tmp_path, words, count, caption, message
):
    real = pictures_in(tmp_path / "real", count, caption)
    code, _, err = evaluate(*words, "--data", f"path={real}", "image_size=32", data=False)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err


def test_folders_and_models_are_looked_at_before_pictures_are_made(evaluate, unsampled, models, tmp_path):
    few, bare = pictures_in(tmp_path / "few", 2, "a star"), pictures_in(tmp_path / "bare", 6)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "not_a_model.safetensors").write_bytes(b"nothing")
    (tmp_path / "file").write_text("")
    (tmp_path / "p.txt").write_text("a star\n:2\n")
    again = models / ".." / models.name / "a.safetensors"
    asked = ("--checkpoint", models / "a.safetensors", *SHORT)
    for words, told in (
        ((*asked, "--images", few, "--metric", "recall"), "few: recall: at least 4 images are needed, not 2"),
        ((*asked, "--images", bare, "--metric", "clip_score"), "bare: clip_score needs captions"),
        ((*asked, "--images", tmp_path / "broken", "--metric", "fd"), "broken: no usable image"),
        ((*asked, "--checkpoint", tmp_path / "not_a_model.safetensors"), "not_a_model.safetensors"),
        ((*asked, "--checkpoint", again), f"{again}: is given twice"),
        ((*asked, "--prompts", tmp_path / "p.txt"), "--prompts: ':2' has no words that clip_score could compare"),
        ((*asked, "--out", tmp_path / "file"), "file: this is a file, not a folder"),
        ((*asked, "--bootstrap", 1), "--bootstrap"),
        ((*asked, "--seeds", 2**32), "--seeds: at most 4294967295 is needed"),
    ):  # fmt: skip
        out = () if "--out" in words else ("--out", tmp_path / "out")
        real = ("--data", f"shards={models}/shards/*.tar", "image_size=32", "--accelerator", "cpu", "--workers", 0)
        code, _, err = evaluate.plain(*words, *real, *out)
        assert code == 2 and told in err.splitlines()[-1] and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "loss", "--seeds", 0, 1], "--seeds: without effect, as no pictures are made for --metric loss"),
        (["--metric", "loss", "--metric", "psnr", "--guidance", 1, "--guidance", 3, "--steps", 2, "--pictures", 6],
         "--pictures, --guidance, --steps: without effect, as no pictures are made for --metric loss --metric psnr"),
        (["--metric", "psnr", "--sampler", "ddim", "--eta", 0.5], "--sampler, --eta: without effect"),
        (["--metric", "loss", "--guidance", 0], "--guidance: without effect"),
        (["--metric", "loss", "--no-clip-denoised"], "--clip-denoised: without effect"),
        (["--metric", "loss", "--guide-model", "b"], "--guide-model: without effect"),
        (["--metric", "loss", "--prompts", "none.txt"], "--prompts: without effect"),
        (["--metric", "loss", "--features", "f"], "--features: without effect, as nothing is compared with real"),
        (["--metric", "loss", "--clip", "name=cloob"], "--clip: without effect, as no embeddings are compared by"),
        (["--metric", "psnr", "--lora", "x"], "--lora: without effect, as the denoiser is not looked at by"),
        (["--metric", "retrieval", "--autoencoder", "x"], "--autoencoder: without effect, as the autoencoder is not"),
        (["--metric", "clip_score", "--prompts", "p.txt"], "--data: real images are not looked at by"),
        (["--images", "made", "--metric", "fd", "--seeds", 1, "--offload"],
         "--seeds, --offload: without effect, as no model is measured: --checkpoint names none"),
    ],
    ids=["seeds", "swept", "sampler", "zero", "no", "guide", "prompts", "features", "clip", "lora", "codec", "data",
         "images"],
)  # fmt: skip
def test_flags_without_effect_are_said(evaluate, tmp_path, words, message):
    code, _, err = evaluate(*words)
    assert code == 2 and message in err and not (tmp_path / "out").exists(), err


def test_draws_for_margins_that_are_not_made_are_said(evaluate, tmp_path):
    code, _, err = evaluate("--metric", "loss")
    assert code == 0 and "note: --bootstrap: without effect, as --metric loss has no margin" in err
    code, _, err = evaluate("--limit", 8, "--metric", "psnr", "--features", "f", data=False)
    assert code == 2 and "--metric psnr: is" not in err and "--features: without effect" in err


def test_an_evaluations_own_plot_is_no_picture(evaluate, models, tmp_path):
    """Neither one of the folder that is measured, nor a real image; also on the second time, when it is there."""
    folder = pictures_in(tmp_path / "all", 6, "a star")
    data = ("--data", f"path={folder}", "image_size=32", "--metric", "cmmd", "--images", folder)
    clip = ("--clip", "name=cloob", f"weights={models / 'conditioner.safetensors'}")
    found = []
    for out in (folder, folder, folder / "inside", folder / "inside", folder / "another"):
        code, told, err = evaluate(*data, *clip, data=False, out=out)
        assert code == 0, err
        shutil.copy(folder / "0.png", out / "evaluation.png")  # the plot is not drawn in these tests
        content = table(out)
        found.append((content["rows"][0]["pictures"], content["facts"]["real images"], content["rows"][0]["values"]))
    assert all(its == found[0] for its in found) and found[0][:2] == (6, "6") and "made anew" not in told
    assert "evaluation.png is the plot of an evaluation, and none of the pictures" in told
    pictures_in(tmp_path / "mine", 1)
    (tmp_path / "mine" / "0.png").rename(tmp_path / "mine" / "evaluation.png")  # a picture of that name
    assert not is_plot(tmp_path / "mine" / "evaluation.png")


@pytest.mark.parametrize("flag", ["--checkpoint", "--images", "--features", "--prompts", "--out", "--inception"])
def test_an_empty_text_is_no_path(evaluate, models, flag):
    """As a shell makes it of a variable that is not set."""
    code, _, err = evaluate.plain("--checkpoint", models / "a.safetensors", flag, "")
    assert code == 2 and f"{flag}: an empty text names nothing" in err


def test_damaged_features_of_the_evaluation_itself_are_made_anew(evaluate, tmp_path):
    """Those of real images, and those of pictures; with the same result."""
    asked = (*SHORT, "--metric", "cmmd", "--metric", "loss")
    assert evaluate(*asked)[0] == 0
    whole = (tmp_path / "out" / "evaluation.json").read_bytes()
    for pattern in ("real.safetensors", "parts/pictures-*/*/*.safetensors", "parts/model-*/*.safetensors"):
        path = next((tmp_path / "out").glob(pattern))
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        state = load_file(path)
        name = next(name for name in state if name.startswith(("features.", "sums.")))
        save_file({**state, name: state[name][:, :1].contiguous()}, path, metadata)
        code, out, err = evaluate(*asked)
        assert code == 0 and f"{path}: {name} " in out and "damaged" in out and "made anew" in out, (out, err)
        assert (tmp_path / "out" / "evaluation.json").read_bytes() == whole


def test_a_limit_is_reached_over_shards_of_other_sizes(evaluate, models, tmp_path):
    """Two images and 24, of which ten are asked for: also the parts of a model are measured on ten."""
    for name, count in (("few", 2), ("many", 20)):
        write_shards(tmp_path / name, count=count, shards=1, size=32, seed=count)
    data = ("--data", f"shards=['{tmp_path}/few/*.tar','{tmp_path}/many/*.tar']", "image_size=32", "--limit", 10)
    code, _, err = evaluate(*data, "--metric", "rfd", "--metric", "loss", data=False)
    assert code == 0, err
    assert table(tmp_path / "out")["facts"]["real images"] == "10"
    parts = [read_rows(path)[0] for path in (tmp_path / "out").glob("parts/model-*/*.safetensors")]
    assert sorted(map(len, parts)) == [2, 3, 5]


@pytest.mark.parametrize("judge", ["conditioner", "clip"])
def test_weights_mean_the_same_to_evaluate_and_compare(evaluate, models, program, tmp_path, judge):
    """Led away from a text, a picture is scored the other way round; without a weight of its text not at all."""
    (tmp_path / "p.txt").write_text("a red star:2\na red star:-2\na red star:0\na red star\n")
    asked = ("--checkpoint", models / "a.safetensors", "--prompts", tmp_path / "p.txt", "--steps", 2)
    asked += ("--clip", "name=cloob", f"weights={models / 'conditioner.safetensors'}") if judge == "clip" else ()
    code, _, err = evaluate(*asked, "--pictures", 4, "--metric", "clip_score", data=False)
    assert code == 0, err
    (part,) = (tmp_path / "out" / "parts").rglob("*.safetensors")
    found = read_rows(part)[0].tensors[CLIP_SCORE] / 100  # [4]
    code, _, err = program(
        "ldm_lab.__main__", "compare", *asked, "--out", tmp_path / "page", "--batch-size", 4, "--device", "cpu"
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "page" / "comparison.json").read_text())["rows"]
    assert found.tolist() == pytest.approx([row["cells"][0]["score"] for row in rows], abs=1e-4)
    assert found[2] == 0 and found.abs().min(0).values == 0 and (found[[0, 1, 3]] != 0).all()


def test_a_prompt_without_words_is_refused_while_training(tmp_path):
    (tmp_path / "p.txt").write_text("a star\n:2\n")
    data = {"name": "folder", "path": str(tmp_path), "image_size": 32, "batch_size": 4}
    with pytest.raises(UserError, match=r"evaluate\.prompts: ':2' has no words that clip_score"):
        Evaluate(tmp_path, data=data, prompts=str(tmp_path / "p.txt"))
    Evaluate(tmp_path, data=data, prompts=str(tmp_path / "p.txt"), metrics=["fd"])
