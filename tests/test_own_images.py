"""`python -m ldm_lab start`: what lies in a folder is found, and the YAML that comes of it trains."""

import builtins
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import ROOT, run_program

from ldm_lab.checkpoints.parts import load_part
from ldm_lab.commands import start
from ldm_lab.config import build, load
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError
from ldm_lab.estimate import StepCost, module_bytes
from ldm_lab.own_images import autoencoder, weights, writing
from ldm_lab.own_images.choosing import Machine, Names, Recipe, Road, batch_for, machine_of, max_skipped, small
from ldm_lab.own_images.commented import Setting, laid_over, settings_of, text, without_head
from ldm_lab.own_images.looking import look
from ldm_lab.own_images.weights import ReleasedWeights
from ldm_lab.training.cost import config_cost


def picture(number: int, side: int = 80, kind: str = "PNG") -> bytes:
    """Return an encoded picture of its own: a slope of colors and a square."""
    across, down = np.meshgrid(np.linspace(0, 1, side + number % 7), np.linspace(0, 1, side))  # [H, W] each
    levels = np.stack([across, down, 0.5 + 0.5 * np.sin(number + 6 * across * down)], -1)  # [H, W, 3]
    levels[side // 4 : side // 2, : side // 3] = (number % 11) / 10
    file = io.BytesIO()
    Image.fromarray((255 * levels).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def fill(folder: Path, count: int, captions: bool = False, side: int = 80) -> Path:
    """Write so many pictures, with captions if they are asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        below = folder / f"{number // 1000:02}" if count > 1000 else folder
        below.mkdir(exist_ok=True)
        (below / f"{number:05}.png").write_bytes(picture(number, side))
        if captions:
            (below / f"{number:05}.txt").write_text(f"picture number {number}, a slope with a square")
    return folder


def spoil(folder: Path) -> None:
    """Put files beside the pictures that are no use."""
    (folder / "broken.jpg").write_bytes(picture(0, kind="JPEG")[:500])
    (folder / "empty.png").write_bytes(b"")
    (folder / "dot.png").write_bytes(picture(0, side=9))
    (folder / "notes.docx").write_bytes(b"PK")
    (folder / ".hidden.jpg").write_bytes(picture(1))
    (folder / "again.png").write_bytes((folder / "00001.png").read_bytes())


@pytest.fixture
def begin(program, monkeypatch, tmp_path):
    """Run `start` in a folder of its own, on a CPU, and without released weights unless it is told otherwise."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        return program("ldm_lab.__main__", "start", *words)

    return call


def released(monkeypatch: pytest.MonkeyPatch, *missing: Download, why_not: str = "") -> None:
    monkeypatch.setattr(weights, "released_weights", lambda forbidden: ReleasedWeights(missing, why_not))


# ------------------------------------------------------------------------------------------------ YAMLs with comments


RECIPE = """# on top
task: diffusion                       # what

data:
  name: shapes                        # drawn
  image_size: 64                      # pixels

cache:                                # once
  folder: data/x

conditioner:
  gap:                                # apart
    noise: null                       # measured
  dropout: 0.2

checkpoint: {every: 500, keep: 0}     # saved
"""


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting("data.name", "folder"), {"data.name": "folder"}),
        (Setting("data.path", text("/a b/c: #d'é")), {"data.path": "/a b/c: #d'é"}),
        (Setting("data.name", None), {"data.name": None}),
        (Setting("checkpoint.every", "7"), {"checkpoint.every": 7, "checkpoint.keep": 0}),
        (Setting("checkpoint.keep", None), {"checkpoint.keep": None, "checkpoint.every": 500}),
        (Setting("conditioner.gap", None), {"conditioner.gap": None, "conditioner.dropout": 0.2}),
        (Setting("conditioner.gap.noise", "0.3"), {"conditioner.gap.noise": 0.3}),
        (Setting("data.captions.endings", ".caption"), {"data.captions.endings": ".caption", "data.image_size": 64}),
        (Setting("optim.lr", "1e-3", "why"), {"optim.lr": "1e-3", "checkpoint.keep": 0}),
        (Setting("init_from", "a.safetensors"), {"init_from": "a.safetensors", "task": "diffusion"}),
        (Setting("cache", None), {"cache": None, "data.image_size": 64}),
    ],
    ids=lambda value: value.path if isinstance(value, Setting) else "",
)
def test_a_setting_changes_its_key_alone(setting, expected):
    before, after = yaml.safe_load(RECIPE), yaml.safe_load(laid_over(without_head(RECIPE), [setting]))

    def at(tree: dict, path: str):
        for key in path.split("."):
            tree = tree.get(key) if isinstance(tree, dict) else None
        return tree

    assert {path: at(after, path) for path in expected} == expected
    untouched = {"task", "data", "cache", "conditioner", "checkpoint"} - {setting.path.split(".")[0]}
    assert all(after[key] == before[key] for key in untouched)


def test_comments_stay_and_paths_are_no_interpolations(tmp_path):
    written = laid_over(without_head(RECIPE), [Setting("data.name", "folder"), Setting("data.image_size", "32", "new")])
    assert "name: folder                        # drawn" in written and "# new" in written and "# on top" not in written
    assert [its.path for its in settings_of(RECIPE)][:2] == ["task", "data.name"]
    for odd in ("${oc.env:HOME}", 'tab"\t${x}', "yes", "1_0", "- a", "~", "日本"):
        (tmp_path / "x.yaml").write_text(f"a: {text(odd)}\n")
        from omegaconf import OmegaConf

        assert OmegaConf.to_container(OmegaConf.load(tmp_path / "x.yaml"), resolve=True) == {"a": odd}


# ------------------------------------------------------------------------------------------------- what lies there


def test_what_lies_in_a_folder_is_found(tmp_path):
    spoil(fill(tmp_path / "photos", 12, captions=True))
    os.symlink(tmp_path / "gone.jpg", tmp_path / "photos" / "dangling.jpg")
    facts = look(tmp_path / "photos")
    told = "\n".join(facts.in_words())
    assert (facts.images, len(facts.names)) == (17, 13)
    assert {problem: len(names) for problem, names in facts.unusable.items()} == {
        "truncated image": 1, "undecodable image": 1, "too small": 1, "unreadable file (No such file or directory)": 1,
    }  # fmt: skip
    for words in ("captions of 12", "short sides of 80 to 80", "1 .docx", "1 hidden", "duplicates: 1 files"):
        assert words in told, told
    assert max_skipped(facts) == pytest.approx(0.45) and max_skipped(look(fill(tmp_path / "good", 3))) is None


def test_damaged_images_are_counted_among_those_decoded(tmp_path):
    """Not among all, of most of which the header alone is read: a run decodes every one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    whole = picture(0, kind="JPEG")
    for number in range(300):  # every second one is decoded
        (folder / f"{number:03d}.jpg").write_bytes(whole[:-99] if number // 2 % 10 < 3 else whole)
    for number in range(100):
        (folder / f"x{number:02d}.jpg").write_bytes(picture(0, 9, "JPEG") if number % 2 else b"")
    facts = look(folder)
    assert facts.decoded == 150 and facts.examined == 400 and facts.damaged == {"truncated image": 45}
    assert facts.unusable_share == pytest.approx(1 - 0.75 * 0.7) and facts.usable == 210
    assert max_skipped(facts) > 0.7
    told = "\n".join(facts.in_words())
    assert "45 of 150 decoded, truncated image" in told and "50 of 400 looked at, too small" in told
    for number in range(300):
        (folder / f"{number:03d}.jpg").write_bytes(whole[:-99])
    with pytest.raises(UserError, match=r"none of the 150 of its images that were decoded .*150 truncated image"):
        look(folder)


def test_a_broken_sample_of_a_shard_is_one_of_all_its_samples(tmp_path):
    """Of which not all are decoded."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(250):
            content = picture(0, 9) if number == 100 else picture(0, kind="JPEG")[:500] if number < 50 else picture(0)
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    facts = look(tmp_path)
    assert (facts.images, facts.examined, facts.decoded) == (250, 250, 200)
    assert facts.unusable_share == pytest.approx(51 / 200)
    assert "cannot be used: 50 of 200 decoded, truncated image (e.g. 000)" in facts.in_words()


def beside(folder: Path, ending: str) -> None:
    for path in folder.glob("*.png"):
        path.with_name(path.stem + ending.replace("*", "png")).write_text("a slope")


@pytest.mark.parametrize("place", ["txt", "caption", "double", "json", "json_key", "jsonl", "csv", "parquet"])
def test_captions_are_found_where_people_keep_them(tmp_path, place):
    folder = fill(tmp_path / "photos", 4)
    rows = [{"file_name": path.name, "text": "a slope"} for path in sorted(folder.glob("*.png"))]
    if place in ("txt", "caption", "double"):
        beside(folder, {"txt": ".txt", "caption": ".caption", "double": ".*.txt"}[place])
    elif place.startswith("json") and place != "jsonl":
        for path in folder.glob("*.png"):
            path.with_suffix(".json").write_text(json.dumps({"caption" if place == "json" else "prompt": "a slope"}))
    elif place == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif place == "csv":
        (folder / "captions.csv").write_text(
            "\n".join(["file_name,text", *(f"{r['file_name']},a slope" for r in rows)])
        )
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    facts = look(folder)
    settings = {
        "caption": {"endings": ".caption"}, "double": {"endings": ".*.txt"}, "json_key": {"json_key": "prompt"},
        "jsonl": {"metadata": "metadata.jsonl"}, "csv": {"metadata": "captions.csv"},
        "parquet": {"metadata": "metadata.parquet"},
    }  # fmt: skip
    assert facts.captions.images == 4 and facts.captions.settings == settings.get(place, {})


def test_empty_captions_are_none(tmp_path):
    folder = fill(tmp_path / "photos", 4, captions=True)
    for path in list(folder.glob("*.txt"))[:3]:
        path.write_text(" \n")
    assert look(folder).captions.images == 1


def alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"x" * 2000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder. Did you mean"),
        (lambda path: path.mkdir(), "the folder is empty"),
        (lambda path: path.write_text("a.jpg"), "not a folder of images, but a file"),
        (lambda path: (path.mkdir(), (path / "a.docx").write_bytes(b"x")), "no image below"),
        (lambda path: (path.mkdir(), (path / "a.png").write_bytes(b"x")), "none of its 1 images can be used"),
        (
            lambda path: (path.mkdir(), (path / "a.tar").write_bytes(b"x" * 2000)),
            "no image of the first shard can be used",
        ),
    ],
    ids=["absent", "empty", "file", "documents", "broken", "broken shard"],
)
def test_what_is_no_folder_of_images_is_told_in_one_line(begin, tmp_path, make, message):
    (tmp_path / "photo").mkdir()
    make(tmp_path / "photos")
    code, _out, err = begin("photos", "--memory", "cpu", "--offline")
    assert code == 2 and message in err and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not list(tmp_path.glob("*.yaml"))


# ------------------------------------------------------------------------------------------------------ what is chosen


def test_memory_in_words():
    assert machine_of("8gb").memory == machine_of(" 8 GiB ").memory == machine_of("8").memory == 8 * 2**30
    assert machine_of("CPU").is_gpu is False
    for wrong in ("much", "0gb", "-8", "8tb", "nan"):
        with pytest.raises(UserError, match="such as 8gb, or cpu"):
            machine_of(wrong)
    assert [batch_for(count) for count in (1, 5, 63, 64, 20_000)] == [1, 4, 32, 64, 64]


def test_small_recipes_count_their_own_small_parts(tmp_path, monkeypatch):
    """Not the sizes of Stable Diffusion's autoencoder and of a CLOOB ViT-B/16: 0.9 GB of 1.3."""
    monkeypatch.chdir(tmp_path)
    facts = look(fill(tmp_path / "photos", 40))
    cost = writing.counted(small(facts, Names("photos", tmp_path / "photos.yaml")))
    whole = load(ROOT / "configs" / "quickstart_autoencoder.yaml")["autoencoder"].architecture()
    cloob = load_part("conditioner", load(ROOT / "configs" / "quickstart.yaml")["conditioner"])
    own = build("autoencoder", {**whole, "z_channels": 16, "embed_dim": 16})
    assert cost.frozen == module_bytes(cloob, own) < 2e7


def test_a_gpu_gets_its_recipe(begin, tmp_path, monkeypatch):
    """The 8 GB recipe, on a card with somewhat less and without bf16."""
    fill(tmp_path / "photos", 70, captions=True, side=260)
    released(monkeypatch, Download("a", "vae", tmp_path, 335_000_000))
    card = Machine("Tesla P4", int(7.6 * 2**30), True, has_bf16=False)
    monkeypatch.setattr("ldm_lab.own_images.choosing.machine_at_hand", lambda: card)
    code, out, err = begin("photos", "--captions", "ignore")
    assert code == 0, err
    config, written = load("photos.yaml"), Path("photos.yaml").read_text()
    assert "vae (about 335 MB)" in out and "python -m ldm_lab train --config photos.yaml" in out and "Tesla P4" in out
    assert (config["data"]["image_size"], config["data"]["batch_size"], config.run) == (256, 64, "photos")
    assert config["conditioner"].get("train_on") is None and config["trainer"]["precision"] == "16-mixed"
    assert "65,126,092 parameters" in written and "Memory: 5.98 GB counted" in written


@pytest.mark.slow
def test_a_small_gpu_gets_smaller_batches(begin, tmp_path, monkeypatch):
    fill(tmp_path / "photos", 70, captions=True, side=260)
    released(monkeypatch)
    code, _, err = begin("photos", "--memory", "4gb")
    config = load("photos.yaml")
    together = config["trainer"]["accumulate_grad_batches"]
    assert code == 0 and together > 1 and together * config["data"]["batch_size"] == 64, err
    assert config_cost(config).peak + 1e9 < 4 * 2**30 and config["conditioner"]["train_on"] == "text"
    code, _, err = begin("photos", "--memory", "1gb", "--out", "least.yaml")
    assert code == 2 and "--memory cpu writes a recipe of the quickstart's size" in err


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["12gb", "24gb", "80gb", "cpu"])
def test_larger_memory_gets_larger_recipes(begin, tmp_path, monkeypatch, memory):
    fill(tmp_path / "photos", 70, side=260)
    released(monkeypatch)
    assert begin("photos", "--memory", memory)[0] == 0
    cost = config_cost(load("photos.yaml"))
    assert cost.parameters == {"12gb": 145_980_940, "24gb": 402_888_524, "80gb": 402_888_524}.get(
        memory, cost.parameters
    )
    assert memory != "cpu" or (cost.parameters < 5e6 and load("photos.yaml")["conditioner"].name == "clip")


def test_nothing_is_overwritten_unasked(begin, tmp_path):
    fill(tmp_path / "photos", 2)
    (tmp_path / "photos.yaml").write_text("mine")
    code, _out, err = begin("photos", "--memory", "cpu", "--offline", "--write-only")
    assert code == 2 and "--overwrite replaces it" in err and (tmp_path / "photos.yaml").read_text() == "mine"
    assert begin("photos", "--memory", "cpu", "--offline", "--write-only", "--overwrite")[0] == 0
    (tmp_path / "photos.yaml").unlink()
    (tmp_path / "photos_autoencoder.yaml").write_text("mine")
    code, _out, err = begin("photos", "--memory", "cpu", "--offline", "--write-only")
    assert code == 2 and "photos_autoencoder.yaml: is there already" in err
    assert begin("photos", "--out", "a b.yaml")[0] == 2 and begin("photos", "--out", "a.txt")[0] == 2


def test_a_terminal_is_asked(begin, tmp_path, monkeypatch):
    fill(tmp_path / "photos", 2, captions=True)
    released(monkeypatch, why_not="no network")
    answers = iter(["cpu", "y"])
    monkeypatch.setattr(start, "asks", lambda: True)
    monkeypatch.setattr(builtins, "input", lambda question: next(answers))
    code, out, _err = begin("photos")
    assert code == 0 and "a small GLIDE" in out and load("photos.yaml")["denoiser"].name == "glide_unet"


def test_released_weights_out_of_reach_are_named_with_sizes(monkeypatch):
    monkeypatch.setenv("LDM_LAB_OFFLINE", "1")
    found = weights.released_weights(False)
    assert not found.are_to_be_had and "switched off" in found.why_not
    assert "sd-vae-ft-mse (about 335 MB)" in found.in_words() and "(about 599 MB)" in found.in_words()


# --------------------------------------------------------------------------------------------------------- it trains


def train(tmp_path: Path, *words: str) -> str:
    """Train 20 steps; what was printed."""
    done = run_program(
        "-m", "ldm_lab", "train", *words, "trainer.max_steps=20", "trainer.threads=1", "data.workers=0",
        "checkpoint.every=20", cwd=tmp_path, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("count", "captions"),
    [
        pytest.param(5, False, id="5"),
        pytest.param(5, True, id="5 captioned", marks=pytest.mark.slow),
        pytest.param(200, False, id="200", marks=pytest.mark.slow),
        pytest.param(200, True, id="200 captioned", marks=pytest.mark.slow),
        pytest.param(20_000, False, id="20000", marks=pytest.mark.slow),
        pytest.param(20_000, True, id="20000 captioned", marks=pytest.mark.slow),
    ],
)
def test_a_written_config_trains(begin, tmp_path, count, captions):
    fill(tmp_path / "photos", count, captions, side=80 if count < 1000 else 20)
    spoil(tmp_path / "photos") if count < 1000 else (tmp_path / "photos" / "empty.png").write_bytes(b"")
    steps = "20" if count > 5 else "3"
    road = ["--captions", "use"] if captions else ["--steps", steps]
    code, out, err = begin("photos", "--memory", "cpu", "--offline", *road)
    assert code == 0, err
    if captions:
        assert "a small GLIDE of 32 px" in out
        train(tmp_path, "--config", "photos.yaml", "demo=null")
        return
    assert "knows drawn shapes and" in out and "--images" in out and "dB PSNR on" in out and "latent std" in out
    train(tmp_path, "--config", "photos.yaml")
    assert (tmp_path / "runs" / "photos" / "ema.safetensors").exists()
    if count > 5:
        code, out, err = begin("photos", "--memory", "cpu", "--offline", "--steps", steps, "--overwrite")
        assert code == 0 and "nothing was left to do" in out, "the autoencoder is there"


@pytest.mark.slow
def test_shards_train(begin, tmp_path):
    from ldm_lab.data.shapes import write_shards

    write_shards(tmp_path / "shards", count=64, shards=2, size=80, seed=0)
    code, out, err = begin("shards", "--memory", "cpu", "--offline", "--steps", "4")
    assert code == 0 and "64 images in shards, captions of 64 of them" in out and "dB PSNR on 32 images" in out, err
    train(tmp_path, "--config", "shards.yaml")


def test_images_that_are_measured_on_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = look(fill(tmp_path / "photos", 40))
    held = autoencoder.held_out_names(facts)
    assert len(held) == len(set(held)) == 8
    names = Names("run", tmp_path / "run.yaml")
    autoencoder.write_lists(facts, names)
    listed, shown = names.autoencoder_list.read_text().splitlines(), names.demo_list.read_text().splitlines()
    assert shown == [str(tmp_path / "photos" / name) for name in held]
    assert len(listed) == 32 and not {str(tmp_path / "photos" / name) for name in held} & set(listed)
    one = look(fill(tmp_path / "one", 1))
    assert autoencoder.held_out_names(one) == []
    assert len(autoencoder.held_out_names(look(fill(tmp_path / "two", 2)))) == 1


def test_a_copy_of_an_image_that_is_measured_on_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "photos", 12)
    for path in sorted(folder.glob("*.png")):
        shutil.copyfile(path, folder / f"again_{path.name}")
    facts, names = look(folder), Names("run", tmp_path / "run.yaml")
    autoencoder.write_lists(facts, names)
    listed, held = (
        [Path(line).read_bytes() for line in its.read_text().splitlines()]
        for its in (names.autoencoder_list, names.demo_list)
    )
    assert len(held) == len(set(held)) == 2 and len(listed) == 20 and not set(held) & set(listed)
    alike = fill(tmp_path / "alike", 1)
    shutil.copyfile(alike / "00000.png", alike / "again.png")
    facts = look(alike)
    assert not autoencoder.measures_unseen(facts)
    autoencoder.write_lists(facts, names)
    assert len(names.autoencoder_list.read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------- other images, odd names


OFFLINE = ("--memory", "cpu", "--offline")


COST = StepCost(64, 10, 10, 0, 0, 100 * 10**6, 0, 0, 0, 0, 420 * 10**6)  # 5 MB an image


@pytest.fixture
def uncounted(monkeypatch):
    """Have no step counted, which takes seconds."""
    monkeypatch.setattr(writing, "counted", lambda body: COST)


def trained_for_nothing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Have the autoencoder's training leave a run's folder, and no more; the configs that were trained."""
    trained: list[Path] = []

    def train(config: Path) -> int:
        run = Path("runs") / str(load(config).run)
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_bytes(config.read_bytes())
        trained.append(config)
        return 0

    monkeypatch.setattr(autoencoder, "train", train)
    monkeypatch.setattr(autoencoder, "measured_psnr", lambda weights, facts: (30.0, 1))
    return trained


@pytest.mark.parametrize("words", [("--steps", "5"), ()], ids=["steps", "none"])
def test_steps_of_no_autoencoder_are_said(begin, uncounted, tmp_path, monkeypatch, words):
    released(monkeypatch)
    fill(tmp_path / "photos", 3)
    code, out, err = begin("photos", "--memory", "8gb", *words)
    assert code == 0 and ("--steps: without effect: no small autoencoder" in out) == bool(words), err


def test_an_autoencoder_of_other_images_is_not_taken(begin, uncounted, tmp_path, monkeypatch):
    trained = trained_for_nothing(monkeypatch)
    for folder in ("one", "two", "below/one"):
        fill(tmp_path / folder, 5)
    assert begin("one", *OFFLINE, "--out", "t.yaml")[0] == 0
    assert begin("one", *OFFLINE, "--out", "t.yaml", "--overwrite")[0] == 0 and len(trained) == 2, "goes on"
    before = Path("runs/t_autoencoder/images.txt").read_bytes(), Path("t_autoencoder.yaml").read_bytes()
    for other in ("two", "below/one"):
        code, _out, err = begin(other, *OFFLINE, "--out", "t.yaml", "--overwrite")
        assert code == 2 and err.splitlines()[-1].startswith("error: runs/t_autoencoder: trained on other images"), err
    (tmp_path / "one" / "00001.png").write_bytes(picture(9, side=90))
    code, _out, err = begin("one", *OFFLINE, "--out", "t.yaml", "--overwrite")
    assert code == 2 and "--out NAME.yaml takes another name" in err and len(trained) == 2
    assert before == (Path("runs/t_autoencoder/images.txt").read_bytes(), Path("t_autoencoder.yaml").read_bytes())
    assert begin("two", *OFFLINE)[0] == 0 and len(trained) == 3


def test_an_autoencoder_of_other_shards_is_not_taken(begin, uncounted, tmp_path, monkeypatch):
    from ldm_lab.data.shapes import write_shards

    trained = trained_for_nothing(monkeypatch)
    for seed, folder in enumerate(("a", "b")):
        write_shards(tmp_path / folder, count=4, shards=1, size=80, seed=seed)
    code, out, _err = begin("a", *OFFLINE, "--out", "t.yaml")
    assert code == 0 and "images that it was trained on; no others are there" in out
    assert "kept to measure on" not in Path("t_autoencoder.yaml").read_text()
    code, _out, err = begin("b", *OFFLINE, "--out", "t.yaml", "--overwrite")
    assert code == 2 and "trained on other images" in err and len(trained) == 1


def test_a_run_and_a_cache_of_others_are_not_taken(begin, uncounted, tmp_path, monkeypatch):
    from ldm_lab.data.file_facts import LIST, facts_of, write_facts

    fill(tmp_path / "photos", 2)
    own = tmp_path / "runs" / "photos" / "config.yaml"
    own.parent.mkdir(parents=True)
    for other in ("data: {name: folder, path: /data/my_images}", "data: {name: shapes}", "- [", "7"):
        own.write_text(other)
        code, _out, err = begin("photos", *OFFLINE, "--write-only")
        assert code == 2 and "error: runs/photos: is a run on " in err and not Path("photos.yaml").exists(), err
    own.write_text("data: {name: folder, path: photos}")
    cache = tmp_path / "data" / "photos_cache"
    cache.mkdir(parents=True)
    write_facts(cache, facts_of([("other.png", tmp_path / "photos" / "00000.png")]))
    assert (cache / LIST).exists()
    code, _out, err = begin("photos", *OFFLINE, "--write-only")
    assert code == 2 and "data/photos_cache: this cache was made of other files: 2 new" in err
    write_facts(cache, facts_of((path.name, path) for path in (tmp_path / "photos").iterdir()))
    assert begin("photos", *OFFLINE, "--write-only")[0] == 0


def test_one_image_is_measured_as_one_that_was_trained_on(begin, uncounted, tmp_path, monkeypatch):
    trained_for_nothing(monkeypatch)
    fill(tmp_path / "one", 1)
    fill(tmp_path / "two", 2)
    assert "dB PSNR on 1 images that it was trained on; no others are there" in begin("one", *OFFLINE)[1]
    assert "dB PSNR on 1 images that it was not trained on" in begin("two", *OFFLINE)[1]


def test_a_name_that_is_not_utf8_is_one_line(begin, uncounted, tmp_path):
    folder = fill(tmp_path / os.fsdecode(b"caf\xe9"), 2)
    code, _out, err = begin(folder, *OFFLINE, "--write-only")
    assert (
        code == 2
        and err.startswith("error: ")
        and "has a name that is not UTF-8; rename it" in err
        and err.count("\n") == 1
    )
    fine = fill(tmp_path / "photos", 2)
    (fine / "00000.png").rename(fine / os.fsdecode(b"caf\xe9.png"))
    code, out, err = begin(fine, *OFFLINE, "--write-only")
    assert code == 0, err
    out.encode()
    assert b"caf\xe9.png" in b"".join(os.fsencode(name) for name in os.listdir(os.fsencode(fine)))


@pytest.mark.parametrize("mark", ["\n", "\r", "\x85", "\u2028", "\t", "\x07"], ids=ascii)
def test_a_line_end_in_a_name_becomes_no_yaml(begin, uncounted, tmp_path, monkeypatch, mark):
    folder = fill(tmp_path / f"a{mark}run: evil", 2)
    with monkeypatch.context() as patch:
        released(patch)
        code, _out, err = begin(folder, "--memory", "cpu", "--out", "x.yaml")
    assert code == 0, err
    config = load("x.yaml")
    assert (config.run, config["data"]["path"]) == ("x", str(folder))
    assert yaml.safe_load(f"a: {text(mark)}\nb: 1") == {"a": mark, "b": 1}
    if mark in "\n\r\t":
        code, _out, err = begin(folder, *OFFLINE, "--out", "y.yaml")
        assert code == 2 and "its name has a line end or a tab" in err and not list(tmp_path.glob("y*.yaml"))
    else:
        facts = look(folder)
        written = autoencoder.autoencoder_text(facts, writing.names_of(folder, Path("y.yaml")), 7)
        assert yaml.safe_load(written)["run"] == "y_autoencoder"


def test_no_broken_config_stays(tmp_path):
    with pytest.raises(UserError):
        writing.write(tmp_path / "x.yaml", "run: [")
    with pytest.raises(UserError, match="not UTF-8"):
        writing.write(tmp_path / "x.yaml", "run: caf\udce9")
    assert not list(tmp_path.iterdir())


def test_the_end_of_the_input_is_the_default(begin, uncounted, tmp_path, monkeypatch):
    def ended(question: str) -> str:
        raise EOFError

    fill(tmp_path / "photos", 2, captions=True)
    released(monkeypatch, why_not="no network")
    monkeypatch.setattr(start, "asks", lambda: True)
    monkeypatch.setattr(builtins, "input", ended)
    code, out, err = begin("photos", "--write-only")
    assert code == 0 and "a small autoencoder of your images" in out, err


def test_a_cpu_of_little_memory_gets_smaller_batches_or_is_told(uncounted):
    recipe = Recipe(Road.SMALL, "quickstart", "data:\n  batch_size: 64\n", 128, 64, 100)

    def fit(memory: int | None) -> writing.Fitted:
        return writing.fitted(recipe, Machine("this machine's CPU", memory, False))

    assert not fit(None).said and not fit(10**9).said
    less = fit(600 * 10**6)
    assert less.said == "batches of 16, 4 for each optimizer step" and "batch_size: 16" in less.recipe.body
    assert "does not fit the memory that is free now" in fit(300 * 10**6).said
