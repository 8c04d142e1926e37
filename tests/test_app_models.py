"""The files that the app offers: told apart, chosen, replaced and deleted while it runs."""

import gc
import io
import json
import os
import shutil
import threading
import time
import weakref

import numpy as np
import pytest
import requests
import tiny_app
import torch
from PIL import Image
from tiny_app import Refused, ask, begin, events

from ldm_lab.app import shelf as shelves
from ldm_lab.app import work
from ldm_lab.app.recall import recall
from ldm_lab.app.shelf import Kind, Shelf
from ldm_lab.checkpoints.files import write_safetensors
from ldm_lab.io.atomic import sha256
from ldm_lab.sampling.names import FileRecord, model_name

FAST = {"sampler": "plms2", "steps": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tiny_app.make_models(tmp_path_factory.mktemp("models"))
    tiny_app.make_additions(folder)
    return folder


@pytest.fixture(scope="module")
def address(models):
    with tiny_app.served(models) as address:
        yield address


def picture(answer):
    with Image.open(io.BytesIO(requests.get(answer["pictures"][0]["url"], timeout=60).content)) as image:
        image.load()
        return image


def same_as_sample_py(answer, program, folder, *words):
    """Check that the first picture is the one that sample.py makes."""
    program("sample", "a red star", "-n", "1", "--device", "cpu", "--sampler", "plms2", "--steps", "2", *words,
            "--out", folder)  # fmt: skip
    ours = picture(answer)
    with Image.open(folder / "00000.png") as theirs:
        assert ours.tobytes() == theirs.tobytes() and ours.text == theirs.text
    return ours


def test_a_lora_is_added_for_one_request_alone(address, models, program, tmp_path):
    plain = picture(ask(address, model="tiny", prompts=["a red star"], **FAST))
    answer = ask(address, model="tiny", prompts=["a red star"], loras=["lora.safetensors:0.5"], **FAST)
    ours = same_as_sample_py(
        answer, program, tmp_path / "out", "--checkpoint", models / "tiny", "--lora", f"{models}/lora.safetensors:0.5"
    )
    assert ours.tobytes() != plain.tobytes()
    assert picture(ask(address, model="tiny", prompts=["a red star"], **FAST)).tobytes() == plain.tobytes()
    with pytest.raises(Refused, match="no such LoRA: 'lora'"):
        ask(address, model="tiny", prompts=["a"], loras=["lora:0.5"], **FAST)
    with pytest.raises(Refused, match="no such LoRA: 'ratings"):
        ask(address, model="tiny", prompts=["a"], loras=["ratings.safetensors"], **FAST)


def test_rating_embeddings_lead_a_text(address, models, program, tmp_path):
    given = {"aesthetic": 9, "aesthetic_embeddings": "ratings.safetensors", "aesthetic_weight": 0.7}
    answer = ask(address, model="tiny", prompts=["a red star"], **given, **FAST)
    ours = same_as_sample_py(
        answer, program, tmp_path / "out", "--checkpoint", models / "tiny", "--aesthetic", "9", "--aesthetic-weight",
        "0.7", "--aesthetic-embeddings", models / "ratings.safetensors",
    )  # fmt: skip
    assert ours.tobytes() != picture(ask(address, model="tiny", prompts=["a red star"], **FAST)).tobytes()
    found = recall(tmp_path / "out" / "00000.png", Shelf(folder=models), list(given))
    assert {name: found.values[name] for name in given} == given
    with pytest.raises(Refused, match=r"aesthetic: no such rating: 5"):
        ask(address, model="tiny", prompts=["a"], **{**given, "aesthetic": 5}, **FAST)
    with pytest.raises(Refused, match=r"autoencoder\.safetensors: not offered: no model of pictures: autoencoder of"):
        ask(
            address, model="tiny", prompts=["a"], **{**given, "aesthetic_embeddings": "autoencoder.safetensors"}, **FAST
        )
    with pytest.raises(Refused, match=r"requests download nothing|does not say|no rating embeddings are released"):
        ask(address, model="tiny", prompts=["a"], aesthetic=9, **FAST)


def test_files_are_told_apart_by_what_they_hold(models, tmp_path, caplog):
    """Whatever they are called; what is not offered is named with the reason."""
    tiny_app.make_stages(tmp_path)
    for number, name in enumerate(("ratings", "lora", "autoencoder", "conditioner", "other")):
        shutil.copy(models / f"{name}.safetensors", tmp_path / f"{number}.safetensors")
    (tmp_path / "notes.safetensors").write_bytes(b"no weights")
    (tmp_path / "optimizer.pt").write_bytes(b"\x80\x02}q\x00.")
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "unknown.pth")
    write_safetensors(tmp_path / "evil.safetensors", {"a": torch.zeros(1)}, {"format": "ldm_lab", "role": "x" * 5000})
    (tmp_path / "vit_l_14_embeddings").mkdir()
    rows = np.eye(768, dtype=np.float32)
    np.save(tmp_path / "vit_l_14_embeddings" / "rating0.npy", rows[:1])
    for name, written in (("x", b"x"), ("whose", (tmp_path / "vit_l_14_embeddings" / "rating0.npy").read_bytes())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rating0.npy").write_bytes(written)
    (tmp_path / "vit_b_32_embeddings").mkdir()
    np.save(tmp_path / "vit_b_32_embeddings" / "rating0.npy", rows)
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.ckpt").mkdir()
    contents = Shelf(folder=tmp_path).contents()
    assert {kind: contents.names(kind) for kind in Kind} == {
        Kind.MODEL: ["4.safetensors", "base.safetensors"], Kind.UPSAMPLER: ["larger.safetensors"],
        Kind.LORA: ["1.safetensors"], Kind.RATINGS: ["0.safetensors", "vit_l_14_embeddings"],
    }  # fmt: skip
    assert set(contents.left_out) == {
        "2.safetensors", "3.safetensors", "notes.safetensors", "optimizer.pt", "unknown.pth", "evil.safetensors",
        "gone.safetensors", "x", "whose", "vit_b_32_embeddings",
    }  # fmt: skip
    assert contents.left_out["x"].startswith(("rating0.npy: not a readable .npy file", "does not say whose"))
    assert contents.left_out["whose"] == "does not say whose embeddings these are: they are none of LAION's"
    assert contents.left_out["vit_b_32_embeddings"].endswith("too large for an embedding")
    assert contents.left_out["2.safetensors"] == "no model of pictures: autoencoder of ldm_lab's"
    assert "unknown" in contents.left_out["unknown.pth"] and len(contents.left_out["evil.safetensors"]) < 200
    assert str(tmp_path) not in " ".join(contents.left_out.values())
    damaged = {"notes.safetensors", "gone.safetensors", "x", "whose", "vit_b_32_embeddings"}
    assert {name for name in contents.left_out if f"{name}: not offered" in caplog.text} == damaged


def test_shared_models_are_called_by_their_folders(models, tmp_path):
    """As runs are; what enlarges has a name of its own, and so has a file that config.json does not name."""
    for name in ("sh", "sh5"):
        folder = tmp_path / "shelf" / name
        folder.mkdir(parents=True)
        for file in ("model.safetensors", "extra.safetensors"):
            shutil.copy(models / "other.safetensors", folder / file)
        said = {"format": "ldm_lab", "version": 1, "model": "model.safetensors", "upsamplers": [],
                "files": {"model.safetensors": sha256(folder / "model.safetensors")}}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(said))
    (tmp_path / "shelf" / "plain").mkdir()
    shutil.copy(models / "other.safetensors", tmp_path / "shelf" / "plain" / "model.safetensors")
    shelf = Shelf(folder=tmp_path / "shelf")
    wanted = ["plain/model.safetensors", "sh", "sh/extra.safetensors", "sh5", "sh5/extra.safetensors"]
    assert sorted(shelf.names(Kind.MODEL)) == wanted
    folders = [tmp_path / "shelf" / name for name in ("sh", "sh5")]
    assert Shelf([folder / "model.safetensors" for folder in folders]).names(Kind.MODEL) == ["sh", "sh5"]
    assert Shelf(folders).path(Kind.MODEL, "sh5") == folders[1] / "model.safetensors"
    assert model_name(folders[0]) == model_name(folders[0] / "model.safetensors") == "sh"
    record = FileRecord(model_name(folders[1]), sha256(folders[1] / "model.safetensors"))
    assert shelf.find(Kind.MODEL, record) == "sh5"
    assert record.find([tmp_path / "shelf"]) == folders[1] / "model.safetensors"


def test_an_upsampler_of_anothers_is_known_without_reading_its_weights(models, tmp_path, monkeypatch):
    from ldm_lab.checkpoints.opened import OpenedFile

    tiny_app.make_stages(tmp_path)
    shelves._look_at.cache_clear()
    monkeypatch.setattr(OpenedFile, "read", lambda self: pytest.fail(f"{self.path} was read"))
    assert Shelf(folder=tmp_path).names(Kind.UPSAMPLER) == ["larger.safetensors"]


@pytest.mark.parametrize(("flag", "name", "said"), [
    ("checkpoint", "autoencoder.safetensors", "no model of pictures: autoencoder of ldm_lab's"),
    ("checkpoint", "lora.safetensors", "no model: what it holds is: LoRA"),
    ("upsampler", "other.safetensors", "no upsampler: what it holds is: model"),
    ("lora", "ratings.safetensors", "no LoRA: what it holds is: set of rating embeddings"),
])  # fmt: skip
def test_a_file_of_the_command_line_has_to_be_what_its_flag_says(program, models, flag, name, said):
    words = ["--models", models] if flag != "checkpoint" else []
    code, _, err = program("ldm_lab.__main__", "app", *words, f"--{flag}", models / name)
    assert code == 2 and err.splitlines()[-1] == f"error: --{flag} {models / name}: {said}"


def test_five_hundred_models_are_looked_at_quickly(models, tmp_path):
    for number in range(500):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "config.yaml").touch()
        os.link(models / "tiny" / "ema.safetensors", tmp_path / f"run{number}" / "ema.safetensors")
    shelf, begun = Shelf(folder=tmp_path), time.process_time()
    assert len(shelf.names(Kind.MODEL)) == 500
    first, begun = time.process_time() - begun, time.process_time()
    assert len(shelf.names(Kind.MODEL)) == 500
    again = time.process_time() - begun
    print(f"500 models: {first:.2f} s, again {again:.3f} s")
    assert first < 10 and again < 0.5
    with pytest.raises(work.UserError, match=r"no such model: 'run5000'\. Did you mean 'run500?'\? 500 are offered$"):
        shelf.path(Kind.MODEL, "run5000")


def test_requests_download_nothing(address, monkeypatch):
    """Nor does what a request asks for by a default of its own."""
    from ldm_lab.checkpoints.embedders import OPENAI
    from ldm_lab.sampling import Model

    monkeypatch.setattr(Model, "embedder", lambda self: OPENAI["vit_b_32"])
    monkeypatch.setattr("ldm_lab.pretrained.resolve.download", lambda *_: pytest.fail("a download"))
    with pytest.raises(Refused, match="aesthetic/vit_b_32/rating9: not in the cache, and downloads are switched off"):
        ask(address, model="tiny", prompts=["a"], aesthetic=9, **FAST)


# ------------------------------------------------------------------------------------------------- while it runs


def test_one_set_of_models_is_in_memory(models):
    with tiny_app.served(models) as address:
        seen = []
        inner = work.Workshop.pipelines

        def pipelines(self, files):
            found = inner(self, files)
            seen.append(weakref.ref(found[0].model.denoiser))
            return found

        work.Workshop.pipelines = pipelines
        try:
            for model in ("tiny", "other.safetensors", "other.safetensors"):
                ask(address, model=model, prompts=["a"], **FAST)
        finally:
            work.Workshop.pipelines = inner
        gc.collect()
        assert seen[0]() is None and seen[1]() is seen[2]() is not None


def drawing(stream):
    """Wait until the first step is made: the model is loaded then."""
    assert any(data[0]["step"] for kind, data in stream if kind == "generating")


def test_a_model_that_is_replaced_or_deleted(models, tmp_path):
    """While a job draws with it, and before the next one; in one step, in place, or cut short."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in ("autoencoder", "conditioner"):
        shutil.copy(models / f"{name}.safetensors", folder)
    shutil.copy(models / "other.safetensors", folder / "model.safetensors")
    file = folder / "model.safetensors"
    with tiny_app.served(folder) as address:
        first = picture(ask(address, prompts=["a"], **FAST)).tobytes()
        stream = events(address, begin(address, prompts=["a"], steps=60, sampler="ddim"))
        drawing(stream)
        shutil.copy(models / "tiny" / "ema.safetensors", folder / "new")
        (folder / "new").replace(file)
        assert [kind for kind, _ in stream][-1] == "complete"
        second = picture(ask(address, prompts=["a"], **FAST)).tobytes()
        assert second != first
        stream = events(address, begin(address, prompts=["a"], steps=60, sampler="ddim"))
        drawing(stream)
        file.write_bytes(b"")  # in place: what was read of it must not be looked at there again
        assert [kind for kind, _ in stream][-1] == "complete"
        with pytest.raises(Refused, match=r"model\.safetensors: not offered"):
            ask(address, model="model.safetensors", prompts=["a"], **FAST)
        file.unlink()
        with pytest.raises(Refused, match="no such model: 'model"):
            ask(address, model="model.safetensors", prompts=["a"], **FAST)
        shutil.copy(models / "other.safetensors", file)
        assert picture(ask(address, prompts=["a"], **FAST)).tobytes() == first


def test_a_model_that_goes_while_its_request_waits(models, tmp_path, monkeypatch):
    shutil.copy(models / "other.safetensors", tmp_path / "model.safetensors")
    inner = work.Workshop.pipelines

    def late(self, files):
        files[0].unlink()
        return inner(self, files)

    monkeypatch.setattr(work.Workshop, "pipelines", late)
    with (
        tiny_app.served(tmp_path) as address,
        pytest.raises(Refused, match=r"^model\.safetensors: is not there any more"),
    ):
        ask(address, prompts=["a"], **FAST)


def test_two_users_with_two_models(address):
    """One at a time, each with their own, whatever the other one does."""
    answers = {}

    def user(model):
        answers[model] = [picture(ask(address, model=model, prompts=["a"], **FAST)).tobytes() for _ in range(3)]

    threads = [threading.Thread(target=user, args=(model,)) for model in ("tiny", "other.safetensors")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {len(set(made)) for made in answers.values()} == {1} and len({made[0] for made in answers.values()}) == 2
