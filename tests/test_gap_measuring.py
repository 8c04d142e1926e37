"""Measuring the gap: the command, runs that do it themselves, noise, maps, the texts that come with the program."""

import contextlib
import hashlib
import math
import os
import shutil

import pytest
import torch
from PIL import Image
from tiny import CLOOB, ROOT, make_run, run_program
from torch.nn import functional as F

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.files import read_pickled, read_safetensors
from ldm_lab.checkpoints.gap_files import read_gap
from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.conditioners.gap import unit
from ldm_lab.config import build, load
from ldm_lab.data.shapes import write_shards
from ldm_lab.data.varied_texts import SLOT, texts_of, varied_texts
from ldm_lab.errors import UserError
from ldm_lab.training.gap_maps import fit, retrieval, ridge
from ldm_lab.training.gap_measuring import noise_of
from ldm_lab.training.gap_runs import needs_means, prepare_means, with_own_means
from ldm_lab.training.scale import image_batches

DATA = {"crop": "center", "flip": False, "image_size": 64}


@pytest.fixture
def run(tmp_path):
    """The folder of a tiny run with 40 captioned images, and the words that measure its gap."""
    yaml = make_run(tmp_path, images=40, data=DATA, trainer={"max_steps": 2})
    return tmp_path, ["gap", "--config", str(yaml), "--out", str(tmp_path / "gap.safetensors")]


def embeddings(folder):
    """Return the embeddings of all images, and their captions, without a pass."""
    config = load(folder / "tiny.yaml")
    conditioner = load_part("conditioner", config["conditioner"])
    images = torch.cat([conditioner.encode_image(batch) for batch in image_batches(config["data"], 0, 40, 8)])
    return conditioner, images


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_means_are_those_of_all_images_and_of_texts(run, capsys):
    folder, words = run
    (folder / "texts.txt").write_text("a red star\n\n  a cat on a sofa  \nthe harbor of Lisbon at night\n")
    with contextlib.chdir(folder):
        assert not main([*words, "--texts", "texts.txt"])
    out = capsys.readouterr().out
    conditioner, images = embeddings(folder)
    found = read_gap(folder / "gap.safetensors")
    texts = conditioner.encode_text(["a red star", "a cat on a sofa", "the harbor of Lisbon at night"])
    assert torch.allclose(found.gap.image_mean, images.mean(0), atol=1e-5) and len(images) == 40
    assert torch.allclose(found.gap.text_mean, texts.mean(0), atol=1e-5)
    assert found.facts["images"] == found.facts["captions"] == 40
    assert f"gap: the means are {found.gap.distance:.3f} apart" in out
    assert "gap: pairs as they are: cosine of a pair" in out and "at 1, " in out and "at 5 (of 40)" in out
    assert f"suggested noise: {found.gap.noise_length:.3f} (as far as captions are from their images)" in out
    assert Image.open(folder / "gap.png").size == (640, 304)
    assert not list(folder.glob("*.parts"))


def test_a_cache_gives_what_its_images_do(run, capsys):
    folder, words = run
    with contextlib.chdir(folder):
        assert not main(["cache", "--config", str(folder / "tiny.yaml"), "--out", "cache"])
        assert not main([*words, "--texts", "captions"])
        online = read_gap("gap.safetensors").gap
        for data in ("data={name: cache, path: cache, batch_size: 8, workers: 0}", "cache.folder=cache"):
            assert not main([*words, "--texts", "captions", data])
            cached = read_gap("gap.safetensors").gap
            assert torch.allclose(online.image_mean, cached.image_mean, atol=1e-3)
            assert torch.allclose(online.text_mean, cached.text_mean, atol=1e-5)
        assert not main([*words, "--images", "10"])
        assert read_gap("gap.safetensors").facts["images"] == 10
    assert "text mean of 4,000 texts of our own" in capsys.readouterr().out


def interrupted(run, monkeypatch) -> list[str]:
    """Begin to measure, and break off behind two shards; return their addresses."""
    from ldm_lab.training.gap_measuring import GapJob

    folder, words = run
    write, seen = GapJob.write, []

    def breaks(job, item, rows, done):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(item.address)
        write(job, item, rows, done)

    with contextlib.chdir(folder), monkeypatch.context() as patch:
        patch.setattr(GapJob, "write", breaks)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(words)
    return seen


def test_a_pass_that_was_interrupted_goes_on(run, monkeypatch):
    from ldm_lab.training.gap_measuring import GapJob

    folder, words = run
    write, seen = GapJob.write, interrupted(run, monkeypatch)
    with contextlib.chdir(folder):
        assert len(list((folder / "gap.safetensors.parts").rglob("*.json"))) == 2
        monkeypatch.setattr(
            GapJob, "write", lambda job, item, *rest: (seen.append(item.address), write(job, item, *rest))
        )
        assert not main(words)
    assert len(seen) == len(set(seen)) == 4
    assert read_gap(folder / "gap.safetensors").facts["images"] == 40


def test_images_without_captions(run, capsys):
    folder, words = run
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 10, 200)).save(pictures / f"{i}.png")
    data = f"data={{name: folder, path: {pictures}, image_size: 64, batch_size: 2, workers: 0}}"
    with contextlib.chdir(folder):
        assert not main([*words, data])
        out = capsys.readouterr().out
        assert "no captions: how pairs meet is not known" in out and "(usual; no captions tell)" in out
        for option, message in (
            (["--texts", "captions"], "the data have none"),
            (["--map", "ridge"], "0 images with captions are too few"),
        ):
            with pytest.raises(UserError, match=message):
                main([*words, data, *option])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["conditioner={name: none}"], "conditioner.name: none does not embed images and texts alike"),
        (
            ["conditioner.weights=null", "conditioner.image_layers=1"],
            "an untrained conditioner's embeddings say nothing",
        ),
        (["--texts", "nothing.txt"], "nothing.txt: no such file"),
        (["--texts", "empty.txt"], "empty.txt: holds no text"),
        (["--texts", "latin.txt"], "latin.txt: texts in UTF-8"),
    ],
    ids=["none", "untrained", "no texts", "empty", "latin"],
)
def test_what_cannot_be_measured(run, options, message):
    folder, words = run
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    options = [str(folder / word) if word.endswith(".txt") else word for word in options]
    with contextlib.chdir(folder), pytest.raises(UserError, match=message):
        main([*words, *options])


@pytest.mark.slow
def test_two_processes_find_the_same(run):
    folder, words = run
    results = []
    for devices in ("1", "2"):
        done = run_program("-m", "ldm_lab", *words, "--devices", devices, "--accelerator", "cpu", cwd=folder)
        assert done.returncode == 0, done.stderr
        results.append(read_gap(folder / "gap.safetensors").gap)
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(results[0].state_dict().values(), results[1].state_dict().values())
    )


# -------------------------------------------------------------------------------------- runs that measure by themselves


def test_a_run_without_means_measures_them_and_keeps_them(run, capsys):
    folder, _ = run
    train = ["train", "--config", str(folder / "tiny.yaml"), "conditioner.gap={}"]
    means = folder / "runs/tiny/gap.safetensors"
    with contextlib.chdir(folder):
        assert not main([*train, "--check"])
        assert "check: the run would measure conditioner.gap's means first" in capsys.readouterr().out
        assert not (folder / "runs").exists()
        with pytest.raises(UserError, match=r"nothing\.txt: no such file"):
            main([*train, "conditioner.gap.texts=nothing.txt"])
        assert not main([*train, "run=tiny"])
        out = capsys.readouterr().out
        assert "conditioner.gap: no means are named; they are measured, into runs/tiny/gap.safetensors" in out
        assert "gap: suggested noise" in out
        before = read_gap(means)
        state = read_pickled("runs/tiny/last.ckpt")["state_dict"]
        assert torch.equal(state["conditioner.gap.image_mean"], before.gap.image_mean)
        assert not main([*train, "resume.checkpoint=last", "--check"])
        assert "would measure" not in capsys.readouterr().out
        means.unlink()
        assert not main([*train, "resume.checkpoint=last", "--check"])
        out = capsys.readouterr().out
        assert "would measure" not in out and "measured, into" not in out and not means.exists()
        assert not main([*train, "run=another", "resume.checkpoint=last", "--check"])
        assert "the run would measure conditioner.gap's means first" in capsys.readouterr().out, (
            "there is no checkpoint"
        )
        assert not main([*train, "resume.checkpoint=last", "trainer.max_steps=3"])
        out = capsys.readouterr().out
        assert "measured" not in out and "conditioner.gap" not in out.partition("resuming from")[2]
        assert torch.equal(read_gap(means).gap.image_mean, before.gap.image_mean)
        (folder / "runs/tiny/last.ckpt").unlink()
        for path in (folder / "runs/tiny").glob("*.ckpt"):
            path.unlink()
        assert not main([*train, "conditioner.gap.images=8"])
        assert "gap.safetensors is of other images or texts; it is measured anew" in capsys.readouterr().out
        assert not main([*train[:-1], "run=noise", "conditioner.gap={shift: false, noise: 0.3}"])
        assert not (folder / "runs/noise/gap.safetensors").exists()


NOTES = """
import os
from safetensors.torch import save_file
from ldm_lab.training import conditioning

own = conditioning.gap_in_training


def noted(*args):
    gap = own(*args)
    save_file(gap.state_dict(), f"rank{os.environ.get('LOCAL_RANK', '0')}.safetensors")
    return gap


conditioning.gap_in_training = noted
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes_train_with_the_same_means(run, launcher):
    """Lightning starts the second process when training begins; torchrun has both measure."""
    folder, _ = run
    (folder / "notes.py").write_text(NOTES)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    program = (*(torchrun if launcher == "torchrun" else ()), ROOT / "train.py", "--config", folder / "tiny.yaml")
    words = ["conditioner.gap={}", "trainer.devices=2", "trainer.strategy=ddp", "imports=[notes]"]
    for again in range(2):  # the second run finds the means of the first
        done = run_program(*program, *words, cwd=folder, PYTHONPATH=f"{ROOT}{os.pathsep}{folder}")
        assert done.returncode == 0, done.stderr
        assert ("are measured, into runs/tiny/gap.safetensors" in done.stdout) == (not again), done.stdout
        means = [read_safetensors(folder / f"rank{rank}.safetensors")[0] for rank in range(2)]
        found = read_gap(folder / "runs/tiny/gap.safetensors")
        assert found.facts["images"] == 40
        for rank in means:
            assert all(torch.equal(rank[name], value) for name, value in found.gap.state_dict().items())
        for path in [*(folder / "runs/tiny").glob("*.ckpt"), *folder.glob("rank*")]:
            path.unlink()


def drawn_anew(folder):
    """Put other images in the place of a run's."""
    shutil.rmtree(folder / "shards")
    write_shards(folder / "shards", count=40, shards=4, size=64, seed=7)


def test_means_of_what_has_changed_are_measured_anew(run, capsys):
    folder, _ = run
    texts, means = folder / "texts.txt", folder / "run/gap.safetensors"
    texts.write_text("a red star\na cat on a sofa")
    config = load(folder / "tiny.yaml", [f"conditioner.gap={{texts: {texts}, images: 8}}"])
    config = with_own_means(config, folder / "run")

    def measured():
        """Measure if need be; return what was said, and the means."""
        needed = needs_means(config, folder / "run", None) == "measured"
        prepare_means(config, folder / "run", None)
        said = capsys.readouterr().out
        assert needed == ("are measured, into" in said) and not needs_means(config, folder / "run", None)
        return said, read_gap(means).gap

    said, first = measured()
    assert "are measured, into" in said and "anew" not in said
    assert not measured()[0], "nothing has changed"
    texts.write_text("a red star\na cat on a sofa\nthe sea")
    said, second = measured()
    assert f"conditioner.gap: {means} is of other images or texts; it is measured anew" in said
    assert not torch.equal(first.text_mean, second.text_mean) and torch.equal(first.image_mean, second.image_mean)
    drawn_anew(folder)
    said, third = measured()
    assert "is of other images or texts" in said and not torch.equal(second.image_mean, third.image_mean)
    torch.manual_seed(5)
    save_part(folder / "conditioner.safetensors", build("conditioner", CLOOB), CLOOB)
    said, fourth = measured()
    assert "is of another conditioner" in said and not torch.equal(third.text_mean, fourth.text_mean)


def test_what_was_begun_with_other_data_is_not_gone_on_with(run, monkeypatch):
    folder, words = run
    interrupted(run, monkeypatch)
    with contextlib.chdir(folder):
        drawn_anew(folder)
        assert not main(words)
    assert torch.allclose(read_gap(folder / "gap.safetensors").gap.image_mean, embeddings(folder)[1].mean(0), atol=1e-5)
    assert not list(folder.glob("*.parts"))


# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("cosine", [0.3, 0.7, 0.95])
def test_noise_takes_an_image_as_far_as_its_text_is(cosine):
    z = torch.randn(4000, 512, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(512)
    image[0] = 1
    noised = unit(image + noise_of(cosine) / math.sqrt(512) * z)
    assert float(noised[:, 0].mean()) == pytest.approx(cosine, abs=0.02)
    assert noise_of(1.0) == 0 and noise_of(-0.4) == noise_of(0.1)


def test_retrieval_counts_those_that_are_nearer():
    images = torch.eye(8)
    texts = images.clone()
    texts[0] = unit(images[0] + 2 * images[1])  # one is nearer
    texts[7] = unit(images[7] + 2 * images[:6].sum(0))  # six are
    found = retrieval(texts, images)
    assert (found.at_1, found.at_5, found.among) == (6 / 8, 7 / 8, 8)


def pairs(count, noise, seed=0):
    """Texts that are their images after a turn, and noise: [n, 16] each."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(9)))[0]
    images = F.normalize(torch.randn(count, 16, generator=generator), dim=1)
    texts = F.normalize(images @ turn + noise * torch.randn(count, 16, generator=generator), dim=1)
    return texts, images


def test_ridge_is_the_least_of_its_sum():
    texts, images = pairs(50, 0.1)
    weight = ridge(texts, images, 3.0).weight.double().requires_grad_()
    texts, images = texts.double(), images.double()
    (((texts @ weight - images) ** 2).sum() + 3 * ((weight - torch.eye(16)) ** 2).sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    assert torch.allclose(ridge(texts[:3], images[:3], 1e6).weight, torch.eye(16), atol=1e-4), "the shift alone"


@pytest.mark.parametrize("kind", ["ridge", "residual", "best"])
def test_a_map_finds_what_the_shift_alone_does_not(kind):
    texts, images = pairs(400, 0.02)
    none, found = fit("none", texts, images), fit(kind, texts, images)
    assert none.held_out.at_1 < 0.2 and found.held_out.at_1 > 0.6 and found.held_out.cosine > 0.7
    fresh_texts, fresh_images = pairs(100, 0.02, seed=5)
    assert retrieval(unit(found.map(fresh_texts)), fresh_images).at_1 > 0.6
    again = fit(kind, texts, images)
    assert all(torch.equal(a, b) for a, b in zip(found.map.state_dict().values(), again.map.state_dict().values()))


def test_the_best_is_the_simplest_where_nothing_is_gained():
    images = F.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    assert fit("best", images, images).name == "none"
    with pytest.raises(UserError, match="9 images with captions are too few, 10 are needed"):
        fit("ridge", images[:9], images[:9])


# --------------------------------------------------------------------------------------------------------------- texts


def test_the_texts_are_many_varied_and_always_the_same(tmp_path):
    texts = varied_texts()
    assert len(texts) == len(set(texts)) == 4000 and varied_texts(50) == texts[:50]
    assert not [text for text in texts if SLOT.search(text) or "{" in text or text != text.strip()]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) == 1 and max(lengths) > 20
    assert len({word for text in texts for word in text.lower().replace(",", "").split()}) > 800
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == SHA256
    (tmp_path / "own.txt").write_bytes(b"\xef\xbb\xbfone\r\n two \r\n")
    assert texts_of(tmp_path / "own.txt") == ["one", "two"] and texts_of(None) == texts


SHA256 = "c96d4ca4bfc720eab4e4d40326871df6bba6ad37ab1f3938eb6780361513e06f"
