"""`python -m ldm_lab export`: a folder that a stranger samples from, its card, hostile folders."""

import json
import re
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiny_glide
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from tiny import CLOOB, DENOISER, ROOT, make_parts, make_run, run_fresh, run_program

import ldm_lab.sampling.beside
from ldm_lab.__main__ import main
from ldm_lab.checkpoints.named import check_named
from ldm_lab.checkpoints.native import save_model, save_part
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.evaluation.tables import Row
from ldm_lab.io.atomic import sha256
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.hub_folder import LARGEST, HubFolder, Origin
from ldm_lab.pretrained.own_runs import has_trained, note_own, note_weights
from ldm_lab.sampling import Pipeline, SamplingOptions
from ldm_lab.sampling.beside import ModelPlace
from ldm_lab.sampling.loading import load_model
from ldm_lab.sampling.options import ModelOptions
from ldm_lab.sharing import comfyui
from ldm_lab.sharing.card import Card, Network
from ldm_lab.sharing.checks import SourceModel
from ldm_lab.sharing.evaluation import Measured
from ldm_lab.sharing.facts import Facts
from ldm_lab.sharing.hub import check_license, origin_of_model
from ldm_lab.sharing.parts import OWN, SharedPart, copy_without_paths, origin_of
from ldm_lab.training.provenance import History, Session, provenance

OPTIONS = SamplingOptions(sampler={"name": "unipc", "steps": 3}, size=16)


def make_model(folder: Path, **changes: dict) -> Path:
    """Write a run's ema.safetensors with its frozen parts elsewhere; return its path."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    sections = make_parts(elsewhere)
    torch.manual_seed(3)
    net = build("denoiser", DENOISER, 4, build("conditioner", CLOOB).spec)
    config = {
        "task": "diffusion", "run": str(folder / "run"), "cache": {"folder": str(folder / "cache")},
        "autoencoder": {**sections["autoencoder"], "latent_mean": 0.1, "latent_std": 1.5},
        "conditioner": {**sections["conditioner"], "dropout": 0.2, "store": str(folder / "store")},
        "denoiser": DENOISER, "objective": {"name": "v_cosine"}, **changes,
    }  # fmt: skip
    sums = {role: sha256(its["weights"]) for role, its in sections.items()}
    path = folder / "run" / "ema.safetensors"
    facts = {"step": "123", "image_size": "16", "batch": "8", "hardware": "1 x CPU (x, 1 threads)", **sums}
    facts |= {"data": "folder", "images": "984", "begun_with": "nothing"}
    save_model(path, net.state_dict(), config, facts)
    note_own(folder / "run")  # as training does
    note_weights(path)
    (folder / "run" / "config.yaml").write_text(
        yaml.safe_dump({"run": str(folder / "run"), "data": {"name": "folder", "path": str(folder)}})
    )
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model, and the folder that it was exported to."""
    folder = tmp_path_factory.mktemp("someone")
    model = make_model(folder)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red | star\n<b>blue</b>\n")
    out = folder / "out"
    main(["export", str(model.parent), "--hub-folder", str(out), "--prompts", str(prompts), "--license", "mit"])
    return model, out


def pixels(checkpoint: str | Path) -> np.ndarray:
    (image,) = Pipeline.from_checkpoint(checkpoint)(["red"], OPTIONS)
    return np.asarray(image)


def card_of(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_a_stranger_samples_the_same_pixels(shared, tmp_path, monkeypatch, caplog):
    model, out = shared
    wanted = pixels(model)
    folder = copy(out, tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    for checkpoint in (folder, folder / "model.safetensors"):
        assert np.array_equal(pixels(checkpoint), wanted)
    assert not caplog.records
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "samples.png"),
        *("model.safetensors", "autoencoder.safetensors", "conditioner.safetensors"),
    }


def test_the_card_has_what_is_known_and_nothing_else(shared):
    _, out = shared
    front, text = card_of(out)
    assert front["license"] == "mit" and front["pipeline_tag"] == "text-to-image" and "ldm_lab" in front["tags"]
    for row in ("| optimizer steps | 123 |", "| images seen, repeats counted | 984 |", "| begun with | nothing |",
                "| data | a folder of images (how many: not recorded) |", "| arithmetic | not recorded |",
                "| hardware | 1 x CPU (x, 1 threads) |"):  # fmt: skip
        assert row in text
    assert "1. a red \\| star" in text and "\\<b\\>blue" in text and "No evaluation was given." in text
    assert re.search(r"\| autoencoder \| `autoencoder.safetensors` \| kl_f8 \| not recorded \| not recorded \|", text)
    assert "| denoiser | `model.safetensors` | ccld_unet | trained by who shares it | mit |" in text
    assert Image.open(out / "samples.png").size[0] > 0
    for name, checksum in HubFolder.read(out).files.items():
        assert checksum == sha256(out / name) and checksum in text


def test_nothing_tells_of_the_machine(shared):
    model, out = shared
    for path in out.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            data = json.dumps(safe_open(path, "pt").metadata()).encode()
        for secret in (str(model.parents[1]), str(Path.home()), str(ROOT), "elsewhere"):
            assert secret.encode() not in data, (path.name, secret)


def test_what_is_there_stays(shared, tmp_path, capsys):
    model, out = shared
    out = copy(out, tmp_path / "out")
    words = ["export", str(model), "--hub-folder", str(out)]
    with pytest.raises(UserError, match="is there already; --overwrite replaces it"):
        main(words)
    main([*words, "--overwrite"])
    assert "the card shows no samples: no prompts are known" in capsys.readouterr().err
    assert not (out / "samples.png").exists()
    (out / ".git").mkdir()
    with pytest.raises(UserError, match=r"with other things in it \(\.git\)"):
        main([*words, "--overwrite"])
    with pytest.raises(UserError, match="an id of the Hub's list"):
        main(["export", str(model), "--hub-folder", str(tmp_path / "new"), "--license", "My own!"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a file"):
        main(["export", str(model), "--hub-folder", str(tmp_path / "file")])


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch):
    model = make_model(tmp_path)
    monkeypatch.setattr("ldm_lab.sharing.card.Card.text", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="cannot be written"):
        main(["export", str(model), "--hub-folder", str(tmp_path / "out")])
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_an_upsampler_is_shared_with_its_base(tmp_path):
    base = tiny_glide.write(tmp_path / "base.safetensors")
    upsampler = tiny_glide.write(tmp_path / "up.safetensors", upsampler=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")
    out = tmp_path / "out"
    main(["export", str(base), "--upsampler", str(upsampler), "--hub-folder", str(out), "--prompts", str(prompts)])
    assert HubFolder.read(out).upsamplers == ("upsampler_1.safetensors",)
    small, large = Image.open(out / "samples.png"), tiny_glide.SIDE * tiny_glide.FACTOR
    assert small.width >= large and "--upsampler upsampler_1.safetensors" in card_of(out)[1]
    assert np.array_equal(
        np.asarray(Pipeline.from_checkpoint(out)(["a dog"], OPTIONS)[0]),
        np.asarray(Pipeline.from_checkpoint(base)(["a dog"], OPTIONS)[0]),
    )


def test_it_is_stored_in_half(tmp_path):
    model = make_model(tmp_path)
    main(["export", str(model), "--hub-folder", str(tmp_path / "out"), "--half"])
    assert (tmp_path / "out/model.safetensors").stat().st_size < 0.6 * model.stat().st_size
    assert pixels(tmp_path / "out").shape == (16, 16, 3)


# ------------------------------------------------------------------------------------------- parts beside a model file


def test_a_part_beside_a_model_is_known_by_its_content(tmp_path, caplog):
    """Whatever it is called, and though a wrong one has the right name, or lies where the config says."""
    model = make_model(tmp_path)
    wanted, place = pixels(model), tmp_path / "elsewhere"
    for role in ("autoencoder", "conditioner"):
        (place / f"{role}.safetensors").rename(model.parent / f"mine_{role}.safetensors")
    assert np.array_equal(pixels(model), wanted)
    torch.manual_seed(9)
    section = {"name": "cloob", **{key: its for key, its in CLOOB.items() if key != "name"}}
    for wrong in (model.parent / "conditioner.safetensors", place / "conditioner.safetensors"):
        save_part(wrong, build("conditioner", section), section)
        assert np.array_equal(pixels(model), wanted)
    assert not caplog.records
    (model.parent / "mine_conditioner.safetensors").unlink()
    pixels(model)
    assert "not the conditioner file that the model was trained with" in caplog.text


@pytest.mark.parametrize("is_said", [True, False], ids=["with_checksum", "without"])
def test_a_released_part_beside_a_model_is_not_downloaded(tmp_path, monkeypatch, is_said):
    """Whether the checkpoint says which one it was trained with, or, as of another program, the catalogue alone."""
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / catalogue()["kl-f8"].file
    file.write_bytes(b"the released one")
    right = replace(catalogue()["kl-f8"], sha256=sha256(file), size=file.stat().st_size)
    monkeypatch.setitem(catalogue(), "kl-f8", right)
    place, section = ModelPlace.of(tmp_path / "here" / "model.safetensors"), {"name": "kl_f8", "weights": "kl-f8"}
    said = {"autoencoder": right.sha256} if is_said else {}
    assert place.find("autoencoder", section, said) == file
    assert ModelPlace.of(tmp_path / "model.safetensors").find("autoencoder", section, said) is None  # another folder
    file.write_bytes(b"a replaced one..")
    assert place.find("autoencoder", section, said) is None


def test_few_files_beside_a_model_are_read(tmp_path, monkeypatch):
    """Those of another size than the checkpoint says, and those that say what else they are, are not."""
    model = make_model(tmp_path)
    right = tmp_path / "elsewhere" / "autoencoder.safetensors"
    rewrite_facts(model, autoencoder_bytes=str(right.stat().st_size))
    right.rename(model.parent / "zz.safetensors")
    for i in range(4):
        (model.parent / f"{i}.pt").write_bytes(b"x" * (1000 + i))
    shutil.copyfile(tmp_path / "elsewhere" / "conditioner.safetensors", model.parent / "b.safetensors")
    read = []
    checksum = ldm_lab.sampling.beside.weights_checksum
    monkeypatch.setattr(
        "ldm_lab.sampling.beside.weights_checksum", lambda path: read.append(path.name) or checksum(path)
    )
    pixels(model)
    assert set(read) == {"zz.safetensors", "conditioner.safetensors"}


def test_a_search_that_takes_long_is_shown(tmp_path, monkeypatch, capsys):
    model = make_model(tmp_path)
    (tmp_path / "elsewhere" / "autoencoder.safetensors").rename(model.parent / "zz.safetensors")
    pixels(model)
    assert "looking for" not in capsys.readouterr().err
    monkeypatch.setattr("ldm_lab.sampling.beside.LONG", 1)
    pixels(model)
    assert f"{model.parent}: looking for the autoencoder" in capsys.readouterr().err


# --------------------------------------------------------------------------------- what a model's config may lead to


def test_one_s_own_run_names_parts_elsewhere(tmp_path, monkeypatch):
    """At the place where it was trained: links lead there; a copy, or another folder at its place, is anybody's."""
    model = make_model(tmp_path)
    wanted = pixels(model)
    (tmp_path / "link.safetensors").symlink_to(model)
    assert np.array_equal(pixels(tmp_path / "link.safetensors"), wanted)
    (model.parent / "step=1").mkdir()
    shutil.copyfile(model, model.parent / "step=1" / "ema.safetensors")
    assert np.array_equal(pixels(model.parent / "step=1"), wanted)
    copied = copy(model.parent, tmp_path / "copied")
    with pytest.raises(
        UserError, match=r"copied/ema\.safetensors: refused: autoencoder\.weights: .*--autoencoder FILE"
    ):
        pixels(copied)
    model.parent.rename(tmp_path / "gone")
    copied.rename(model.parent)
    with pytest.raises(UserError, match=r"only models of your own runs"):
        pixels(model)
    parts = {role: tmp_path / "elsewhere" / f"{role}.safetensors" for role in ("autoencoder", "conditioner")}
    (image,) = Pipeline.from_checkpoint(model, ModelOptions(**parts))(["red"], OPTIONS)
    assert np.array_equal(np.asarray(image), wanted)
    for file in parts.values():
        shutil.copy(file, model.parent / f"my_{file.name}")
    assert np.array_equal(pixels(model), wanted)


def test_a_training_notes_its_folder(tmp_path, program, monkeypatch):
    """What it names anywhere on this machine is sampled with, from its folder, its averages and its checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    code, _, err = program("train", "--config", make_run(tmp_path, trainer={"max_steps": 2}))
    assert code == 0, err
    run = tmp_path / "runs" / "tiny"
    assert has_trained(run / "ema.safetensors") and not has_trained(run / "last.ckpt")
    for place in (run, run / "last.ckpt"):
        load_model(place, ModelOptions())
    with safe_open(run / "ema.safetensors", "pt") as file:
        assert file.metadata()["autoencoder_bytes"] == str((tmp_path / "autoencoder.safetensors").stat().st_size)
    shutil.copyfile(run / "ema.safetensors", tmp_path / "runs" / "ema.safetensors")
    with pytest.raises(UserError, match=r"autoencoder\.weights: refused|refused: autoencoder\.weights"):
        load_model(tmp_path / "runs" / "ema.safetensors", ModelOptions())


def test_a_folder_that_cannot_be_noted_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LDM_LAB_STATE", str(tmp_path / "file"))
    note_own(tmp_path)
    assert "cannot be noted as a run of yours" in capsys.readouterr().err


PLACES = {
    "absolute": "{there}/{role}.safetensors",
    "up": "../elsewhere/{role}.safetensors",
    "up_inside": "{here}/../elsewhere/{role}.safetensors",
    "home": "~/{role}.safetensors",
    "working_folder": "elsewhere/{role}.safetensors",
    "bare_in_the_working_folder": "{role}_of_mine.safetensors",
    "share": r"\\host\share\a.safetensors",
    "share_of_posix": "//host/share/a.safetensors",
    "drive": r"C:\a.safetensors",
    "device": "/dev/zero",
    "program": "pyproject.toml",
    "assets_and_up": "assets/../../elsewhere/{role}.safetensors",
}


@pytest.mark.parametrize("told", [True, False], ids=["with_checksum", "without"])
@pytest.mark.parametrize("role", ["autoencoder", "conditioner"])
@pytest.mark.parametrize("name", PLACES)
def test_a_stranger_s_model_reads_no_file_elsewhere(shared, tmp_path, monkeypatch, name, role, told):
    """Without a config.json, copied anywhere by hand, though the very file that it wants is there."""
    folder = copy(shared[1], tmp_path / "theirs")
    (folder / "config.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    own = tmp_path / "elsewhere" / f"{role}.safetensors"
    (folder / f"{role}.safetensors").rename(own)
    shutil.copyfile(own, tmp_path / f"{role}.safetensors")
    shutil.copyfile(own, tmp_path / f"{role}_of_mine.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = PLACES[name].format(role=role, here=folder, there=own.parent)
    rewrite(folder, lambda config: config[role].update(weights=text), {} if told else {role: None})
    with pytest.raises(UserError, match=rf"{role}\.weights: .*--{role} FILE|refused"):
        load_model(folder / "model.safetensors", ModelOptions())


def test_what_a_stranger_s_model_may_name(shared, tmp_path, monkeypatch):
    """Files in its own folder, by whatever path; the program's own files, wherever one works."""
    folder = copy(shared[1], tmp_path / "theirs")
    (folder / "config.json").unlink()
    wanted = pixels(shared[0])
    (folder / "sub").mkdir()
    (folder / "autoencoder.safetensors").rename(folder / "sub" / "ae.safetensors")
    rewrite(folder, lambda config: config["autoencoder"].update(weights=str(folder / "sub" / "ae.safetensors")))
    assert np.array_equal(pixels(folder / "model.safetensors"), wanted)
    (tmp_path / "assets" / "quickstart").mkdir(parents=True)  # ours are meant, and not what happens to be called so
    (tmp_path / "assets" / "quickstart" / "cloob.safetensors").write_bytes(b"another file")
    monkeypatch.chdir(tmp_path)
    place = ModelPlace.of(folder / "model.safetensors")
    asked = {"name": "cloob", "weights": "assets/quickstart/cloob.safetensors"}
    assert place.find("conditioner", asked, {}) == ROOT / "assets" / "quickstart" / "cloob.safetensors"


@pytest.mark.parametrize("name", ["/etc", "~", "../t5", "t5", "elsewhere/t5", r"\\host\t5", ".", ""])
def test_a_stranger_s_model_reads_no_language_model_elsewhere(tmp_path, monkeypatch, name):
    (tmp_path / "theirs").mkdir()
    model = tiny_if_model(tmp_path / "theirs" / "if.safetensors")
    for folder in (tmp_path / "t5", tmp_path / "elsewhere" / "t5"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    rewrite(model, lambda config: config["conditioner"].update(model=name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"conditioner\.model: .*--conditioner FOLDER"):
        load_model(model, ModelOptions())


# --------------------------------------------------------------------------------------------------- hostile folders


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../model.safetensors", "a/../../b", "", ".", "a/b/c", "..\\x", ".hidden", "a\n"],
    ids=["absolute", "up", "up_inside", "empty", "dot", "deep", "backslash", "hidden", "newline"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["model", "upsamplers", "files"])
def test_names_stay_in_the_folder(shared, tmp_path, key, name):
    folder = copy(shared[1], tmp_path / "theirs")
    edit(folder, **{key: {"model": name, "upsamplers": [name], "files": {name: "0" * 64}}[key]})
    with pytest.raises(UserError, match=r"refused: .* is no name of a file in this folder|damaged"):
        Pipeline.from_checkpoint(folder)


@pytest.mark.parametrize("weights", ["/etc/passwd", "../a.safetensors", "~/a.safetensors", "sub/a.safetensors"])
def test_weights_stay_in_the_folder(shared, tmp_path, weights):
    folder = copy(shared[1], tmp_path / "theirs")
    rewrite(folder, lambda config: config["autoencoder"].update(weights=weights))
    with pytest.raises(UserError, match=r"autoencoder\.weights: .* leads out of the folder"):
        Pipeline.from_checkpoint(folder)


def rewrite(folder: Path, change, facts: dict[str, str | None] | None = None) -> None:
    """Change the config in model.safetensors, or in a file; and what is said beside it, of which None takes away."""
    path = folder / "model.safetensors" if folder.is_dir() else folder
    with safe_open(path, "pt") as file:
        state, told = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    config = json.loads(told.pop("config"))
    change(config)
    told |= facts or {}
    kept = {key: its for key, its in told.items() if key not in ("format", "role") and its is not None}
    save_model(path, state, config, kept)
    write_checksums(path.parent)


def write_checksums(folder: Path) -> None:
    """Have config.json say what is there."""
    if (folder / "config.json").is_file():
        edit(folder, files={name: sha256(folder / name) for name in HubFolder.read(folder).files})


@pytest.mark.parametrize("link", ["named", "folder", "beside"])
def test_what_a_link_leads_out_to_is_not_read(tmp_path, monkeypatch, link):
    """Not even for its checksum, before it is refused."""
    model = make_model(tmp_path)
    folder = copy(model.parent, tmp_path / "theirs")
    elsewhere = tmp_path / "elsewhere"
    places = {
        "named": ("autoencoder.safetensors", "autoencoder.safetensors"), "folder": ("a", "a/autoencoder.safetensors"),
        "beside": ("zzz.safetensors", "gone.safetensors"),
    }  # fmt: skip
    name, weights = places[link]
    (folder / name).symlink_to(elsewhere if link == "folder" else elsewhere / "autoencoder.safetensors")
    monkeypatch.chdir(folder)
    read = []
    monkeypatch.setattr(ldm_lab.sampling.beside, "checksum_of", lambda path: read.append(path))
    place = ModelPlace.of(folder / "ema.safetensors")
    told = {"autoencoder": sha256(elsewhere / "autoencoder.safetensors")}
    for named in (weights, str(folder / weights)):
        with pytest.raises(UserError, match=r"refused: a link to|is not there; put it beside"):
            place.find("autoencoder", {"name": "kl_f8", "weights": named}, told)
    assert all(path.resolve().is_relative_to(folder) for path in read)


@pytest.mark.parametrize("name", ["model.safetensors", "autoencoder.safetensors"])
def test_links_do_not_lead_out(shared, tmp_path, name):
    folder = copy(shared[1], tmp_path / "theirs")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="refused: a link to"):
        Pipeline.from_checkpoint(folder)


@pytest.mark.parametrize("section", [
    {"name": "t5", "model": "evil-owner/evil"}, {"name": "clip", "model": "hf-hub:evil-owner/evil"},
], ids=["t5", "clip"])  # fmt: skip
@pytest.mark.parametrize("moved", [None, "conditioner.safetensors"], ids=["", "moved"])
def test_no_repository_of_a_stranger_is_downloaded(shared, tmp_path, monkeypatch, section, moved):
    """Whether the model's file names it, in a folder that is shared or not, or a part's own file."""

    def refuse(*_, **__):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("ldm_lab.conditioners.t5_models.fetched", refuse)
    monkeypatch.setattr("ldm_lab.conditioners.t5.fetched", refuse)
    monkeypatch.setattr("ldm_lab.conditioners.open_clip_config.download_from_hub", refuse)
    folder = copy(shared[1], tmp_path / "theirs")
    rewrite(folder, lambda config: config.update(conditioner=section))
    given = ModelOptions(conditioner=None if moved is None else folder / moved)
    for place in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=r"conditioner\.model: refused.* downloaded; `hf download evil-owner/evil`"):
            load_model(place, given)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"conditioner\.model: refused"):
        load_model(folder / "model.safetensors", given)


def test_known_and_cached_language_models_are_let_in(tmp_path, monkeypatch):
    for known in ({"name": "t5", "model": "google/t5-v1_1-xl"}, {"name": "t5"}, {"name": "t5", "model": "minilm"},
                  {"name": "clip", "model": "ViT-B-16", "pretrained": "openai"}):  # fmt: skip
        check_named("conditioner", known, "conditioner")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: str(tmp_path / name))
    check_named("conditioner", {"name": "t5", "model": "mine/own"}, "conditioner")
    check_named("conditioner", {"name": "clip", "model": "hf-hub:mine/own"}, "conditioner")
    for wrong in ("//host/share/a", r"\\host\share"):
        with pytest.raises(UserError, match="refused"):
            check_named("autoencoder", {"name": "kl_f8", "weights": wrong}, "autoencoder")


def test_a_part_s_own_file_has_nothing_downloaded(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from ldm_lab.checkpoints.parts import load_part

    told = {"format": "ldm_lab", "role": "conditioner"}
    config = json.dumps({"name": "clip", "model": "hf-hub:evil-owner/evil"})
    save_file({"x": torch.zeros(1)}, tmp_path / "part.safetensors", {**told, "config": config})
    with pytest.raises(UserError, match=r"conditioner\.model: refused"):
        load_part("conditioner", {"name": "clip", "weights": str(tmp_path / "part.safetensors")})


def test_what_was_fetched_reads_no_file_of_this_machine(shared, tmp_path):
    """Also where the stranger left config.json out; what lies beside the model takes the place."""
    folder = copy(shared[1], tmp_path / "models--a--b" / "snapshots" / "1")
    (folder / "config.json").unlink()
    own = shared[0].parents[1] / "elsewhere" / "autoencoder.safetensors"
    rewrite(folder, lambda config: config["autoencoder"].update(weights=str(own)))
    assert pixels(folder / "model.safetensors").shape == (16, 16, 3)
    (folder / "autoencoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"autoencoder\.weights: .* leads out of the folder, and no file beside it"):
        load_model(folder / "model.safetensors", ModelOptions())
    (folder / "autoencoder.safetensors").symlink_to(own)
    with pytest.raises(UserError, match="refused: a link to"):
        load_model(folder / "model.safetensors", ModelOptions())
    mine = copy(folder, tmp_path / "mine")  # from where it was fetched, which makes it nobody's own
    with pytest.raises(UserError, match=r"leads out of the folder|not beside it"):
        (mine / "autoencoder.safetensors").unlink()
        load_model(mine / "model.safetensors", ModelOptions())


@pytest.mark.parametrize("name", ["model.safetensors", "autoencoder.safetensors"])
def test_files_are_those_of_the_checksums(shared, tmp_path, name):
    folder = copy(shared[1], tmp_path / "theirs")
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    for place in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=rf"{name}: damaged or replaced: its sha256 is"):
            load_model(place, ModelOptions())


def test_a_config_names_registered_parts_alone(shared, tmp_path):
    folder = copy(shared[1], tmp_path / "theirs")
    rewrite(folder, lambda config: config["objective"].update(name="os.system"))
    with pytest.raises(UserError, match="no such objective"):
        Pipeline.from_checkpoint(folder)


def test_a_folder_that_is_not_whole_or_not_readable(shared, tmp_path):
    folder = copy(shared[1], tmp_path / "theirs")
    (folder / "conditioner.safetensors").unlink()
    with pytest.raises(UserError, match="the folder is not whole"):
        Pipeline.from_checkpoint(folder)
    edit(folder, version=2)
    with pytest.raises(UserError, match="of version 2, and this program reads version 1"):
        Pipeline.from_checkpoint(folder)
    (folder / "config.json").write_text("[" * (LARGEST + 1))
    with pytest.raises(UserError, match="refused: it is larger than"):
        Pipeline.from_checkpoint(folder)
    (folder / "config.json").write_text("[" * 10_000)
    with pytest.raises(UserError, match="a folder without"):
        Pipeline.from_checkpoint(folder)


# ------------------------------------------------------------------------------------------------------------ the Hub


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that huggingface_hub asks for a folder of a repository."""

    folder: Path
    commit = "1" * 40

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        names = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        if path.startswith("/api/models/owner/name/tree/"):
            files = [(name, self.folder / name) for name in names]
            content = json.dumps(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": sha256(file)[:40]}
                    for name, file in files
                ]
            ).encode()
        elif path.startswith("/api/models/owner/name"):
            content = json.dumps(
                {"id": "owner/name", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            ).encode()
        elif (name := path.rpartition(f"/owner/name/resolve/{self.commit}/")[2] or path) in names or (
            name := path.rpartition("/owner/name/resolve/main/")[2]
        ) in names:
            content = (self.folder / name).read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("ETag", f'"{sha256_of(content)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        return None


def sha256_of(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


@contextmanager
def hub_of(folder: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("One", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


HUB_SCRIPT = """
import sys
import numpy as np
from ldm_lab.sampling import Pipeline, SamplingOptions
options = SamplingOptions(sampler={"name": "unipc", "steps": 3}, size=16)
for address in sys.argv[2:]:
    (image,) = Pipeline.from_checkpoint(address)(["red"], options)
    np.save(sys.argv[1], np.asarray(image))
    print(np.asarray(image).astype(int).sum())
"""


@pytest.mark.slow
def test_a_shared_model_on_the_hub(shared, tmp_path):
    """All of it comes through the Hub's own library, and is there afterwards without a network."""
    folder = copy(shared[1], tmp_path / "theirs")
    (folder / "diffusers").mkdir()
    (folder / "diffusers" / "other.safetensors").write_bytes(b"not asked for")
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    with hub_of(folder) as url:
        env["HF_ENDPOINT"] = url
        script = ("-c", HUB_SCRIPT, tmp_path / "image.npy")
        first = run_program(*script, "hf://owner/name/model.safetensors", "hf://owner/name", cwd=tmp_path, **env)
        assert first.returncode == 0, first.stderr
    assert np.array_equal(np.load(tmp_path / "image.npy"), pixels(shared[0]))
    assert not list((tmp_path / "hf").rglob("other.safetensors"))
    words = ["hf://owner/name", "red", "--sampler", "unipc", "--steps", "3", "--size", "16", "-n", "1"]
    env["HF_HUB_OFFLINE"] = "1"
    again = run_fresh(ROOT / "sample.py", "--checkpoint", *words, cwd=tmp_path, **env)
    assert again.returncode == 0, again.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / "00000.png")), np.load(tmp_path / "image.npy"))


# --------------------------------------------------------------------------------------------------------- acceptance

OFFLINE = """
import runpy, socket, sys
def refuse(*_, **__):
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ccld", "glide", "if"])
def test_a_second_clone_without_network_or_cache(tmp_path, kind):
    """Byte for byte the pixels that the first one makes, from the folder alone."""
    first, second = tmp_path / "first", tmp_path / "second" / "clone"
    first.mkdir()
    model, upsampler = models(kind, first)
    more = ["--upsampler", str(upsampler)] if upsampler else []
    main(["export", str(model), *more, "--hub-folder", str(first / "out")])
    second.mkdir(parents=True)
    for name in ("sample.py", "train.py"):
        shutil.copyfile(ROOT / name, second / name)
    shutil.copytree(ROOT / "ldm_lab", second / "ldm_lab", ignore=shutil.ignore_patterns("__pycache__"))
    theirs = copy(first / "out", tmp_path / "second" / "given")
    words = ["a red star", "--sampler", "ddim", "--steps", "3", "-n", "2", "--out"]
    ours = run_program(ROOT / "sample.py", "--checkpoint", model, *more, *words, first / "samples", cwd=first)
    assert ours.returncode == 0, ours.stderr
    shutil.rmtree(first / "elsewhere", ignore_errors=True)
    more = ["--upsampler", theirs / "upsampler_1.safetensors"] if upsampler else []
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    home |= {"PYTHONPATH": str(second), "LDM_LAB_CACHE": ""}
    words = ["-c", OFFLINE, second / "sample.py", "--checkpoint", theirs, *more, *words, second / "samples"]
    again = run_program(*words, cwd=tmp_path / "second", **home)
    assert again.returncode == 0, again.stderr
    for name in ("00000.png", "00001.png"):
        one, other = (np.asarray(Image.open(folder / "samples" / name)) for folder in (first, second))
        assert np.array_equal(one, other)
        assert one.std() > 0


def models(kind: str, folder: Path) -> tuple[Path, Path | None]:
    """Write a tiny model of a kind, and what enlarges its pictures if there is something of its kind."""
    if kind == "ccld":
        return make_model(folder), None
    if kind == "glide":
        upsampler = tiny_glide.write(folder / "up.safetensors", upsampler=True)
        return tiny_glide.write(folder / "base.safetensors"), upsampler
    return tiny_if_model(folder / "if.safetensors"), None


def tiny_if_model(path: Path, model: str = "minilm", **more: str) -> Path:
    """Write a tiny stage I of IF, prompted through a language model that comes with a package."""
    torch.manual_seed(5)
    conditioner = {"name": "t5", "model": model, "text_size": 12, **more}
    denoiser = {
        "name": "if_unet", "base_channels": 32, "multipliers": [1, 2], "blocks_per_level": [1], "attention": [2],
        "head_width": 16, "text_width": 64, "pool_heads": 4,
    }  # fmt: skip
    net = build("denoiser", denoiser, 3, build("conditioner", conditioner).spec)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    config = {
        "autoencoder": {"name": "identity"}, "conditioner": {**conditioner, "dropout": 0.1}, "denoiser": denoiser,
        "objective": {"name": "eps_hybrid", "timesteps": 100},
    }  # fmt: skip
    save_model(path, net.state_dict(), config, {"image_size": "16"})
    return path


def test_a_run_tells_what_it_was_trained_on(tmp_path, program, monkeypatch):
    """All of its sessions: what was another in one of them, and how many images all have seen."""
    monkeypatch.chdir(tmp_path)
    yaml_file = make_run(tmp_path, trainer={"max_steps": 2})
    for more in ([], ["resume.checkpoint=last", "data.batch_size=2", "trainer.max_steps=3"]):
        code, _, err = program("train", "--config", yaml_file, *more)
        assert code == 0, err
    with safe_open(tmp_path / "runs/tiny/ema.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["data"], told["batch"], told["data_count"]) == ("webdataset", "4 to step 2, then 2", "4 shards")
    assert (told["images"], told["begun_with"]) == ("10", "nothing")
    assert told["hardware"].startswith("1 x CPU (") and re.fullmatch(r"\d{4}-\d\d-\d\d", told["date"])
    assert told["precision"] == "32-true"


def session(began: int, **told: str) -> Session:
    return Session(began=began, told=told)


@pytest.mark.parametrize(("sessions", "told"), [
    ([session(0, batch="8")], {"batch": "8"}),
    ([session(0, batch="8"), session(10, batch="8", precision="16")],
     {"batch": "8", "precision": "not recorded to step 10, then 16"}),
    ([session(0, batch="8"), session(1000, batch="4"), session(1200, batch="8")],
     {"batch": "8 to step 1,000, then 4 to step 1,200, then 8"}),
    ([session(0, batch="8"), session(0, batch="4")], {"batch": "4"}),
    ([session(0), session(7, hardware="A")], {"hardware": "not recorded to step 7, then A"}),
    ([session(0, begun_with="a.safetensors"), session(3)], {"begun_with": "a.safetensors"}),
], ids=["one", "a_new_key", "three", "none_of_the_first", "unknown_before", "begun"])  # fmt: skip
def test_sessions_are_told_in_order(sessions, told):
    found = provenance(sessions, 5)
    assert {key: its for key, its in found.items() if key not in ("images", "date")} == told and found["images"] == "5"


@pytest.mark.parametrize(
    "damaged", [None, [], "x", [3], [{"began": "0", "told": {}}], [{"began": 0, "told": {"a": 1}}]]
)
def test_sessions_that_a_checkpoint_does_not_tell_are_unknown(damaged):
    history = History()
    history.load(damaged, 5)
    assert history.before == [session(0)] and history.began == 5


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluation(folder: Path, **models: str | Path) -> Path:
    """Write what `python -m ldm_lab evaluate` writes, of models by their names: files, or checksums."""
    from ldm_lab.evaluation import origin as evaluation_origin
    from ldm_lab.evaluation.metrics import Value
    from ldm_lab.evaluation.settings import Models
    from ldm_lab.evaluation.tables import Table

    rows = [Row(its, 3.0, "unipc", 20, (0,), 96, {"fd": Value(0.25, 0.013, "bootstrap", 1000)}) for its in models]
    loaded = Models(ModelOptions())
    files = {its: one if isinstance(one, str) else sha256(one) for its, one in models.items()}
    whole = {its: one if isinstance(one, str) else loaded.identity(str(one)) for its, one in models.items()}
    facts = {"real images": "96", "embeddings": f"of {folder}/x.safetensors (in={folder}/y)"}
    origin = evaluation_origin.Origin(files, whole, data={"section": {"path": str(folder)}})
    folder.mkdir()
    (folder / "evaluation.json").write_text(Table(rows, facts, remarks=["few images"], origin=origin).to_json())
    return folder / "evaluation.json"


def test_an_evaluation_stands_in_the_card(tmp_path):
    """Known by its weights: whatever the model was called there, and however another one is called."""
    model = make_model(tmp_path)
    path = evaluation(tmp_path / "measured", best=model, run="0" * 64)
    words = ["export", str(model), "--hub-folder", str(tmp_path / "out"), "--evaluation"]
    main([*words, str(path.parent)])
    _, text = card_of(tmp_path / "out")
    assert "| fd (guidance 3, unipc 20, 96 pictures) | 0.25 ± 0.013 |" in text and text.count("| fd ") == 1
    assert "- embeddings: of x.safetensors (in=y" in text and "- few images" in text and "No evaluation" not in text
    assert str(tmp_path) not in text and "sha256 of the models" not in text
    stays = (tmp_path / "out" / "README.md").read_bytes()
    for number, (models, message) in enumerate((
        ({"run": "1" * 64, "b": "0" * 64}, r"is about other weights \(run, b\)"),
        ({}, "not an evaluation: evaluation.json of"),
    )):  # fmt: skip
        wrong = evaluation(tmp_path / f"wrong_{number}", **models)
        with pytest.raises(UserError, match=message):
            main([*words, str(wrong), "--overwrite"])
    content = json.loads(path.read_text())
    del content["facts"]["weights_sha256"]
    (tmp_path / "silent.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not say which weights it is about"):
        main([*words, str(tmp_path / "silent.json"), "--overwrite"])
    (tmp_path / "large.json").write_text(json.dumps({"rows": [{"model": "run", "values": 3}]}))
    with pytest.raises(UserError, match="not an evaluation"):
        main([*words, str(tmp_path / "large.json"), "--overwrite"])
    section = {"name": "kl_f8", "ch": 8, "norm_groups": 4, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    save_part(tmp_path / "ae.safetensors", build("autoencoder", section), section)
    with pytest.raises(UserError, match="is about this model with another autoencoder, conditioner or LoRA"):
        main([*words, str(path), "--overwrite", "--autoencoder", str(tmp_path / "ae.safetensors")])
    assert (tmp_path / "out" / "README.md").read_bytes() == stays


@pytest.mark.parametrize(("text", "shown"), [
    ("/home/alice/my pictures: few", "my pictures: few"), ("of /srv/alice smith/a.png", None),
    ("taken by alice", None), ("on BIGBOX", None), ("C:\\Users\\alice\\a.png", "a.png"), ("~alice/a.png", "a.png"),
    ("of file:///srv/x/a.png", "of a.png"), ("of runs/mine/a.png", "of a.png"),
    ("12 images/s, by cloob-laion-400m-vit-b-16-32-epochs", "12 images/s, by cloob-laion-400m-vit-b-16-32-epochs"),
    ("of hf://owner/name/a.safetensors", "of hf://owner/name/a.safetensors"), ("96", "96"),
], ids=lambda its: re.sub(r"\W+", "_", str(its))[:24])  # fmt: skip
def test_facts_that_name_this_machine_stay_out(tmp_path, capsys, monkeypatch, text, shown):
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setattr("platform.node", lambda: "bigbox.example.org")
    path = evaluation(tmp_path / "one", other="0" * 64)
    content = json.loads(path.read_text())
    content["facts"]["fact"] = text
    path.write_text(json.dumps(content))
    notes = Measured.read(path).of("0" * 64, lambda: "0" * 64).notes
    assert [note for note in notes if note.startswith("fact:")] == ([] if shown is None else [f"fact: {shown}"])
    assert ("1 facts stay out of the card" in capsys.readouterr().err) == (shown is None)


def test_remarks_that_name_files_stay_out(tmp_path, capsys):
    path = evaluation(tmp_path / "one", other="0" * 64)
    path.write_text(path.read_text().replace("few images", "/home/alice/my pictures: few"))
    assert not any("alice" in note for note in Measured.read(path).of("0" * 64, lambda: "0" * 64).notes)
    assert "1 remarks stay out of the card" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what a card may say


def test_a_folder_that_is_shared_again_says_the_same(shared, tmp_path):
    """Where all parts are from, their licenses, and how the model came about; a stranger's are not this user's own."""
    theirs = copy(shared[1], tmp_path / "theirs")
    content = json.loads((theirs / "config.json").read_text())
    content["origins"]["autoencoder.safetensors"] = {"what": "a friend", "license": "mit", "page": "https://a.org/b"}
    content["origins"]["conditioner.safetensors"] = {"what": "x" * 999, "license": 3, "page": "javascript:alert(1)"}
    (theirs / "config.json").write_text(json.dumps(content))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red | star\n<b>blue</b>\n")
    main(["export", str(theirs), "--hub-folder", str(tmp_path / "again"), "--prompts", str(prompts)])
    (front, text), (before, one) = card_of(tmp_path / "again"), card_of(shared[1])
    assert front["license"] == before["license"] == "mit"
    tables = [its.split("## Training")[1].split("## Evaluation")[0] for its in (text, one)]
    assert tables[0] == tables[1] and "| images seen, repeats counted | 984 |" in tables[0]
    assert "| autoencoder | `autoencoder.safetensors` | kl_f8 | [a friend](https://a.org/b) | mit |" in text
    assert "| conditioner | `conditioner.safetensors` | cloob | not recorded | not recorded |" in text
    assert "| denoiser | `model.safetensors` | ccld_unet | trained by who shares it | mit |" in text


def test_a_card_claims_nothing_of_a_stranger_s_model(tmp_path, capsys):
    """Neither that who shares it has trained it, nor lines of a file that a stranger's YAML names."""
    model = make_model(tmp_path)
    folder = copy(model.parent, tmp_path / "copied")
    for role in ("autoencoder", "conditioner"):
        shutil.copy(tmp_path / "elsewhere" / f"{role}.safetensors", folder)
    (tmp_path / "secret.txt").write_text("the password\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"demo": {"prompts": str(tmp_path / "secret.txt")}}))
    main(["export", str(folder), "--hub-folder", str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "password" not in text and "no prompts are known" in capsys.readouterr().err
    assert "| denoiser | `model.safetensors` | ccld_unet | not recorded | not recorded |" in text


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [(["-1 degree", " --steps", "a 'red' star"], "a 'red' star"), (["-x"], "your prompt"), ([], "your prompt")],
    ids=["some", "all", "none"],
)
def test_the_card_s_command_takes_its_prompt_for_one(tmp_path, prompts, shown):
    conditioner = SharedPart("conditioner", "cloob", {})
    network = Network("model.safetensors", "ccld_unet", 1, "v_cosine", "", Origin(), (conditioner,))
    assert Card("x", HubFolder(tmp_path, "model.safetensors"), (network,), Facts(), prompts=prompts).example == shown


def test_images_seen_are_not_made_up(tmp_path):
    """A step's number of images and the steps tell nothing of those before a run went on with other ones."""
    model = make_model(tmp_path)
    rewrite_facts(model, images="", batch="8 to step 100, then 4", data="folder to step 3, then webdataset")
    main(["export", str(model), "--hub-folder", str(tmp_path / "out")])
    _, text = card_of(tmp_path / "out")
    assert "| images seen, repeats counted | not recorded |" in text
    assert "| images in a step | 8 to step 100, then 4 |" in text
    assert "| data | a folder of images to step 3, then webdataset shards (how many: not recorded) |" in text


def test_parts_are_known_by_their_content(tmp_path):
    """Not by the name in the config, though another file was given in its place."""
    shipped = ROOT / "assets" / "quickstart" / "cloob.safetensors"
    model = make_model(tmp_path)
    shutil.copy(shipped, tmp_path / "renamed.safetensors")
    source = SourceModel.read(model)
    section = {"name": "cloob", "weights": str(tmp_path / "renamed.safetensors")}
    found = origin_of("conditioner", section, tmp_path / "renamed.safetensors", source.place)
    assert found.what == "the conditioner of ldm_lab's quickstart" and found.license == "MIT"
    other = tmp_path / "elsewhere" / "autoencoder.safetensors"
    assert origin_of("autoencoder", {"name": "kl_f8", "weights": str(other)}, other, source.place) == Origin()
    note_own(other.parent)  # where a stranger's may have been put, as this one
    assert origin_of("autoencoder", {"name": "kl_f8", "weights": str(other)}, other, source.place) == Origin()
    note_weights(other)
    assert origin_of("autoencoder", {"name": "kl_f8", "weights": str(other)}, other, source.place) == Origin(OWN)


def test_what_comfyui_loads_is_said(shared):
    """An autoencoder of Stable Diffusion's shapes alone, by the names that its loader asks for."""
    assert "ComfyUI loads none of these files" in card_of(shared[1])[1]
    with torch.device("meta"):
        usual = build("autoencoder", {"name": "kl_f8"}).state_dict()
    shapes = {name: its.shape for name, its in usual.items()}
    asked = {"encoder.down.2.downsample.conv.weight", "decoder.conv_in.weight", "quant_conv.weight"}  # comfy/sd.py
    assert asked <= shapes.keys() and "decoder.up_blocks.0.resnets.0.norm1.weight" not in shapes
    assert comfyui.is_usual_vae(shapes) and comfyui.is_usual_vae({**shapes, "more": (3,)})
    assert not comfyui.is_usual_vae({**shapes, "quant_conv.weight": (6, 6, 1, 1)})
    assert not comfyui.is_usual_vae(comfyui.shapes_in(shared[1] / "autoencoder.safetensors"))


def test_where_a_language_model_lay_is_not_told(tmp_path):
    content = {
        "name_or_path": "/home/a/x", "special_tokens_map_file": "/home/a/b.json", "vocab_file": "x", "cache": "/a/b/c",
        "eos_token": "</s>", "model_max_length": 512, "windows": r"C:\Users\a\b", "pad_token": "/",
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    copy_without_paths(tmp_path / "tokenizer_config.json", tmp_path / "out.json")
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"eos_token", "model_max_length", "pad_token"}


# ----------------------------------------------------------------------------------------------- checks before any work


@pytest.mark.parametrize(("more", "message"), [
    (["--diffusers", "out"], "each needs its own folder"),
    (["--diffusers", "out/inside"], "each needs its own folder"),
    (["--diffusers", "file/inside"], "cannot be written: .*file is a file"),
    (["--diffusers", "full"], r"full: is there, with other things in it"),
    (["--diffusers", "other", "--license", "My own!"], "an id of the Hub's list"),
    (["--diffusers", "other", "--prompts", "missing.txt"], "missing.txt"),
    (["--diffusers", "other", "--evaluation", "missing.json"], "missing.json: no such file"),
    (["--diffusers", "other", "--upsampler", "run"], "--upsampler run: is a base model"),
    (["--diffusers", "other", "--upsampler", "missing.safetensors"], "no such file"),
    (["--diffusers", "other", "--autoencoder", "missing.safetensors"], "no such file .--autoencoder"),
], ids=["same", "in", "below_a_file", "full", "license", "prompts", "evaluation", "base", "up", "part"])  # fmt: skip
def test_all_is_checked_before_anything_is_written(tmp_path, monkeypatch, more, message):
    make_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        main(["export", "run", "--hub-folder", "out", *more])
    assert sorted(tmp_path.iterdir()) == before


def test_an_upsampler_alone_and_a_model_in_the_folder(tmp_path):
    upsampler = tiny_glide.write(tmp_path / "up.safetensors", upsampler=True)
    with pytest.raises(UserError, match="is an upsampler, which enlarges pictures of a base model's"):
        main(["export", str(upsampler), "--upsampler", str(upsampler), "--hub-folder", str(tmp_path / "out")])
    with pytest.raises(UserError, match="lies in it, which is to be shared; name a new folder"):
        main(["export", str(upsampler), "--hub-folder", str(tmp_path), "--overwrite"])
    main(["export", str(upsampler), "--hub-folder", str(tmp_path / "out")])
    with pytest.raises(UserError, match="lies in it"):
        main(["export", str(tmp_path / "out"), "--hub-folder", str(tmp_path / "out"), "--overwrite"])


@pytest.mark.parametrize("place", ["elsewhere", "in_an_own_run", "hub"])
def test_a_shared_model_keeps_its_license(shared, tmp_path, place):
    """Whoever shares it again cannot give it another one, wherever it lies."""
    theirs = copy(shared[1], tmp_path / "theirs")
    if place == "in_an_own_run":
        note_own(tmp_path)
    model = SourceModel.read(theirs)
    if place == "hub":
        model = replace(model, asked="hf://someone/model")
    assert origin_of_model(model).license == "mit"
    for same in (None, "mit"):
        check_license(same, model)
    with pytest.raises(
        UserError, match=r"--license: apache-2\.0: .*theirs says .* shared under mit; leave --license out"
    ):
        check_license("apache-2.0", model)


def test_others_weights_keep_their_license(tmp_path, monkeypatch):
    model = make_model(tmp_path)
    entry = replace(catalogue()["kl-f8"], sha256=sha256(model), size=model.stat().st_size, license="MIT")
    monkeypatch.setitem(catalogue(), "kl-f8", entry)
    words = ["export", str(model), "--hub-folder", str(tmp_path / "out"), "--license"]
    with pytest.raises(UserError, match="these weights are kl-f8, published under MIT"):
        main([*words, "apache-2.0"])
    main([*words, "mit"])


@pytest.mark.parametrize(("more", "message"), [
    (["--half", "--name", "x"], "--half, --name: of --hub-folder"),
    (["--license", "My own!"], "an id of the Hub's list"),
], ids=["of_the_hub", "license"])  # fmt: skip
def test_diffusers_says_what_it_does_not_take(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(["export", "nothing", "--diffusers", str(tmp_path / "out"), *more])


# ------------------------------------------------------------------------------------------------- language models, BPE


def test_a_language_model_travels_along(tmp_path):
    """A folder of transformers' is copied, without where it lay."""
    import language_models

    note_own(tmp_path)
    source = language_models.write_language_model(tmp_path / "secret_place" / "t5")
    model = tiny_if_model(tmp_path / "if.safetensors", str(source))
    main(["export", str(model), "--hub-folder", str(tmp_path / "out")])
    (tmp_path / "secret_place").rename(tmp_path / "gone")
    with pytest.raises(UserError):
        Pipeline.from_checkpoint(model)(["red"], OPTIONS)
    moved = (tmp_path / "out").rename(tmp_path / "theirs")
    image = np.asarray(Pipeline.from_checkpoint(moved)(["red"], OPTIONS)[0])
    (tmp_path / "gone").rename(tmp_path / "secret_place")
    assert np.array_equal(image, np.asarray(Pipeline.from_checkpoint(model)(["red"], OPTIONS)[0]))
    for path in moved.rglob("*"):
        assert path.is_dir() or b"secret_place" not in path.read_bytes(), path


def test_gpt2_s_merges_travel_along(tmp_path, monkeypatch):
    """They are taken from beside the model where the cache has none, if they are the right ones."""
    from ldm_lab.conditioners import glide_text

    merges = tmp_path / "cache" / "gpt2" / "vocab.bpe" / "vocab.bpe"
    merges.parent.mkdir(parents=True)
    merges.write_text("#version: 0.2\nt h\nth e\n")
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LDM_LAB_OFFLINE", "1")
    entry = replace(catalogue()["gpt2/vocab.bpe"], sha256=sha256(merges), size=merges.stat().st_size)
    monkeypatch.setitem(catalogue(), "gpt2/vocab.bpe", entry)
    monkeypatch.setattr(tiny_glide, "TEXT", {"name": "glide_text", "vocab_size": 259, "text_size": 6})
    model = tiny_glide.write(tmp_path / "base.safetensors")
    main(["export", str(model), "--hub-folder", str(tmp_path / "out")])
    assert "vocab.bpe" in HubFolder.read(tmp_path / "out").files
    shutil.rmtree(tmp_path / "cache")
    glide_text.gpt2_encoding.cache_clear()
    Pipeline.from_checkpoint(tmp_path / "out")(["the"], OPTIONS)
    with pytest.raises(UserError, match="not in the cache"):  # what one model's folder has is not another's
        Pipeline.from_checkpoint(model)(["the"], OPTIONS)
    (tmp_path / "out" / "vocab.bpe").write_text("t h")
    write_checksums(tmp_path / "out")
    glide_text.gpt2_encoding.cache_clear()
    with pytest.raises(UserError, match="not in the cache"):
        Pipeline.from_checkpoint(tmp_path / "out")(["the"], OPTIONS)


def test_the_means_of_a_clip_travel_along(tmp_path):
    """They are beside the weights; the file that they were read from is not named any more."""
    from ldm_lab.checkpoints.files import GAP_PREFIX, read_safetensors

    model = make_model(tmp_path)
    state, told = read_safetensors(model)
    config = json.loads(told.pop("config"))
    config["conditioner"]["gap"] = {"means": str(tmp_path / "gap.safetensors"), "noise": 0.1}
    rows = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1) * 0.5
    state |= {f"{GAP_PREFIX}{name}": row for name, row in zip(("image_mean", "text_mean"), rows)}
    state[f"{GAP_PREFIX}noise"] = torch.tensor(0.1)
    save_model(model, state, config, {key: its for key, its in told.items() if key not in ("format", "role")})
    main(["export", str(model), "--hub-folder", str(tmp_path / "out"), "--half"])
    wanted = pixels(model).astype(int)
    assert np.abs(pixels(tmp_path / "out").astype(int) - wanted).max() <= 3  # of weights in float16
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "means" not in json.loads(file.metadata()["config"])["conditioner"]["gap"]
        kept = [name for name in file.keys() if name.startswith(GAP_PREFIX)]  # noqa: SIM118
        assert len(kept) == 3 and all(file.get_tensor(name).dtype == torch.float32 for name in kept)


def test_a_clip_travels_along(tmp_path):
    """Whatever its weights come as, it is a file of ours afterwards."""
    section = {"name": "clip", "architecture": {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }}  # fmt: skip
    torch.manual_seed(2)
    place = tmp_path / "clip.safetensors"
    save_part(place, build("conditioner", section), section)
    weights = {"name": "clip", "weights": str(place), "dropout": 0.1}
    model = make_model(tmp_path, conditioner=weights)
    rewrite_facts(model, conditioner=sha256(place))
    main(["export", str(model), "--hub-folder", str(tmp_path / "out")])
    wanted = pixels(model)
    place.unlink()
    assert np.array_equal(pixels(tmp_path / "out"), wanted)


def rewrite_facts(model: Path, **facts: str) -> None:
    from ldm_lab.checkpoints.files import read_safetensors, write_safetensors

    state, told = read_safetensors(model)
    write_safetensors(model, state, {**told, **facts})


def test_upsamplers_in_a_folder_are_told(tmp_path, capsys):
    from ldm_lab.sampling.needs import announce_models
    from ldm_lab.sampling.options import ModelOptions

    base = tiny_glide.write(tmp_path / "base.safetensors")
    upsampler = tiny_glide.write(tmp_path / "up.safetensors", upsampler=True)
    main(["export", str(base), "--upsampler", str(upsampler), "--hub-folder", str(tmp_path / "out")])
    capsys.readouterr()
    announce_models(str(tmp_path / "out"), [], ModelOptions(), OPTIONS)
    told = capsys.readouterr().err
    assert f"--upsampler {tmp_path / 'out' / 'upsampler_1.safetensors'} enlarges" in told
    announce_models(str(tmp_path / "out"), [tmp_path / "out" / "upsampler_1.safetensors"], ModelOptions(), OPTIONS)
    assert not capsys.readouterr().err


def test_what_a_killed_export_left_goes(tmp_path):
    model = make_model(tmp_path)
    left = tmp_path / ".out.abc123.part"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    main(["export", str(model), "--hub-folder", str(tmp_path / "out")])
    assert not left.exists() and (tmp_path / "out" / "model.safetensors").is_file()
