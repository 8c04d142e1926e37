"""The gap between text and image embeddings: its arithmetic, its place in training, in files and in sampling."""

import contextlib
import csv
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import CLOOB, DENOISER, embedding, make_parts, make_run
from torch.nn import functional as F

from ldm_lab.__main__ import main
from ldm_lab.batch import Batch
from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.files import read_pickled, read_safetensors
from ldm_lab.checkpoints.gap_files import GapFile, read_gap
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.native import save_part
from ldm_lab.conditioners.gap import Gap, ResidualMap, RidgeMap
from ldm_lab.config import PartConfig, build
from ldm_lab.errors import UserError
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Aesthetic, Model, Pipeline, RatingEmbeddings, SamplingOptions, interpolate
from ldm_lab.sampling.rerank import similarity
from ldm_lab.training.conditioning import Conditioning
from ldm_lab.training.gap import resumed_gap, stored_gap

D = 16


def units(rows, seed=0, width=D):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def some_gap(seed=0, noise=0.5, map=None, width=D):
    means = 0.6 * units(2, seed, width)
    return Gap(means[0], means[1], noise, map)


def maps():
    torch.manual_seed(3)
    residual = ResidualMap(D, 8)
    torch.nn.init.normal_(residual.last.weight)
    return [None, RidgeMap(torch.randn(D, D)), residual]


# --------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("text_map", maps(), ids=["shift", "ridge", "residual"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_have_length_one_and_zeros_stay_zeros(text_map, seed):
    gap, rows, z = some_gap(seed, map=text_map), units(9, seed + 10), torch.randn(9, D)
    rows[[2, 5]] = 0
    for found in (gap.images(rows), gap.images(rows, z), gap.texts(rows)):
        assert found.isfinite().all()
        lengths = found.norm(dim=1)
        assert torch.allclose(lengths[[0, 1, 3, 4, 6, 7, 8]], torch.ones(7), atol=1e-5)
        assert not found[[2, 5]].any()


@pytest.mark.parametrize("seed", range(4))
def test_what_all_embeddings_share_changes_nothing(seed):
    """Shift invariance: a constant in all embeddings is in their mean, too."""
    gap, rows, constant = some_gap(seed), units(7, seed + 20), 0.7 * units(1, seed + 30)
    moved = Gap(gap.image_mean + constant[0], gap.text_mean + constant[0])
    assert torch.allclose(moved.images(rows + constant), gap.images(rows), atol=1e-5)
    assert torch.allclose(moved.texts(rows + constant), gap.texts(rows), atol=1e-5)


def test_pairs_that_differ_by_a_constant_alone_meet():
    images = units(50, 1)
    texts = images + 2 * units(1, 2)
    gap = Gap(images.mean(0), texts.mean(0))
    assert F.cosine_similarity(images, texts).mean() < 0.6
    assert torch.allclose(gap.images(images), gap.texts(texts), atol=1e-5)


@pytest.mark.parametrize("width", [16, 512])
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_length_of_the_noise_does_not_depend_on_the_width(width, noise):
    gap, rows = Gap(torch.zeros(width), torch.zeros(width), noise), units(2000, 4, width)
    z = torch.randn(2000, width, generator=torch.Generator().manual_seed(5))
    cosines = (gap.images(rows, z) * rows).sum(1)
    assert float(cosines.mean()) == pytest.approx((1 + noise**2) ** -0.5, abs=0.03)
    assert torch.allclose(Gap(torch.zeros(width), torch.zeros(width)).images(rows, z), gap.images(rows), atol=1e-6)


def test_no_means_leave_embeddings_as_they_are():
    gap = Gap(torch.zeros(D), torch.zeros(D), 0.4)
    rows = units(5)
    assert not gap.shifts and torch.allclose(gap.texts(rows), rows) and torch.allclose(gap.images(rows), rows)


# ---------------------------------------------------------------------------------------------------------- its files


def gap_file(folder, gap=None, **facts):
    """Write the means of the tiny CLOOB; return the path."""
    section = {"name": "cloob", "weights": str(folder / "conditioner.safetensors")}
    GapFile(gap or some_gap(), embedder_of(section), Section(facts)).save(folder / "gap.safetensors")
    return folder / "gap.safetensors"


@pytest.mark.parametrize("text_map", maps(), ids=["shift", "ridge", "residual"])
def test_a_file_comes_back_as_it_was(tmp_path, text_map):
    make_parts(tmp_path)
    gap = some_gap(map=text_map)
    read = read_gap(gap_file(tmp_path, gap, images=7))
    assert read.facts == {"images": 7} and read.gap.noise_length == 0.5 and read.gap.map_name == gap.map_name
    assert torch.equal(read.gap.texts(units(4)), gap.texts(units(4)))
    assert all(torch.equal(read.gap.state_dict()[name], value) for name, value in gap.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": torch.zeros(D, D)}, "make no sense"),
        ({"text_mean": torch.zeros(D + 1)}, "make no sense"),
        ({"image_mean": torch.full((D,), torch.nan)}, "make no sense"),
        ({"image_mean": torch.zeros(D, dtype=torch.int64)}, "make no sense"),
        ({"noise": torch.tensor(-1.0)}, "make no sense"),
        ({"map.weight": torch.zeros(D, 2)}, "make no sense"),
        ({"map.first.bias": torch.zeros(4)}, "make no sense"),
        ({"more": torch.zeros(1)}, "make no sense"),
        ({}, "holds something else"),
    ],
    ids=["matrix", "width", "nan", "integers", "negative noise", "map", "half a map", "more", "not ours"],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, change, message):
    make_parts(tmp_path)
    path = gap_file(tmp_path)
    tensors, metadata = read_safetensors(path)
    save_file({**tensors, **change}, path, metadata if change else {})
    with pytest.raises(UserError, match=message):
        read_gap(path)


def test_inspect_says_what_a_file_holds(tmp_path, capsys):
    make_parts(tmp_path)
    assert not main(["inspect", str(gap_file(tmp_path, images=7))])
    out = capsys.readouterr().out
    assert "means of images and texts of ldm_lab's" in out and "gap: means of 16 numbers, " in out
    with pytest.raises(UserError, match=r"which conditioner\.gap\.means=FILE takes as it is"):
        main(["convert", str(tmp_path / "gap.safetensors"), str(tmp_path / "out.safetensors"), "name=cloob"])


def test_means_of_another_conditioner_are_refused(tmp_path):
    sections = make_parts(tmp_path)
    path = gap_file(tmp_path)
    torch.manual_seed(8)
    save_part(tmp_path / "conditioner.safetensors", build("conditioner", CLOOB), CLOOB)
    with pytest.raises(
        UserError, match=r"conditioner.gap.means: .*gap.safetensors: belongs to the embeddings of cloob"
    ):
        read_gap(path, embedder_of(sections["conditioner"]))
    with pytest.raises(UserError, match=r"no such file .*conditioner\.gap\.means"):
        read_gap(tmp_path / "nothing.safetensors")


# -------------------------------------------------------------------------------------------------- what training sees


def conditioning(conditioner, **use):
    gap = use.pop("of", None)
    made = Conditioning(PartConfig.from_dict("conditioner", {"name": "cloob", **use}), conditioner)
    made.gap = gap
    return made


@pytest.fixture
def batch():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = ["a red star", "", "a blue ring", "white", "  ", "a green square on black"]
    return Batch([f"k{i}" for i in range(6)], texts, image=images)


def test_images_are_shifted_and_noised_and_never_the_zeros_of_dropping(parts, batch):
    conditioner, gap = parts["conditioner"], some_gap()
    raw = conditioner.from_batch(batch)
    told = conditioning(conditioner, of=gap)
    torch.manual_seed(1)
    noisy = told(batch, raw)["embed"]
    torch.manual_seed(1)
    assert torch.equal(noisy, gap.images(raw["embed"], torch.randn(6, D)))
    assert torch.equal(told(batch, raw, noisy=False)["embed"], gap.images(raw["embed"]))
    torch.manual_seed(2)
    assert not torch.equal(told(batch, raw)["embed"], noisy)
    assert conditioning(conditioner)(batch, raw) is raw


def test_captions_stand_for_the_condition_where_they_are(parts, batch, capsys):
    conditioner, gap = parts["conditioner"], some_gap()
    raw = conditioner.from_batch(batch)
    there = [0, 2, 3, 5]
    for shift in (None, gap):
        told = conditioning(conditioner, train_on="text", of=shift)
        found = told(batch, {} if shift is None else raw)["embed"]  # a cache has the images' in any case
        texts = conditioner.encode_text([batch.text[i] for i in there])
        assert not told.reads_images
        assert torch.allclose(found[there], texts if shift is None else shift.texts(texts), atol=1e-6)
        assert not found[[1, 4]].any() and told.without == 2
        line = "conditioner.train_on: text: 2 of 6 samples of the first process had no caption and were trained on"
        assert told.summary()[0].startswith(line)
    assert "conditioner.train_on: k1 has no caption" in capsys.readouterr().out


def test_either_by_chance(parts, batch):
    conditioner, gap = parts["conditioner"], some_gap(noise=0.0)
    batch = replace(batch, text=["a red star"] * 6)
    raw, text = conditioner.from_batch(batch), gap.texts(conditioner.encode_text(["a red star"]))[0]
    told = conditioning(conditioner, train_on="mixed", text_share=0.3, of=gap)
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        found = told(batch, raw)["embed"]
        is_text = (found - text).norm(dim=1) < 1e-5
        assert torch.allclose(found[~is_text], gap.images(raw["embed"])[~is_text], atol=1e-6)
        shares.append(float(is_text.float().mean()))
    assert sum(shares) / 60 == pytest.approx(0.3, abs=0.08)
    assert conditioning(conditioner, train_on="mixed").text_share == 0.5


def test_captions_that_nobody_has_end_the_run(parts, batch):
    batch = replace(batch, text=[""] * 6)
    told = conditioning(parts["conditioner"], train_on="text")
    told.seen = told.without = 996
    with pytest.raises(UserError, match="needs captions, and none of 1,002 samples has one"):
        told(batch, {})


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"gap": {}}, "conditioner.gap: is of conditioners that embed images and texts alike, and none does not"),
        ({"train_on": "text"}, "conditioner.train_on: is of conditioners"),
        ({"text_share": 0.1}, "conditioner.text_share: is of conditioner.train_on=mixed alone"),
    ],
    ids=["gap", "train_on", "share"],
)
def test_what_other_conditioners_cannot_do(use, message):
    none = build("conditioner", {"name": "none"})
    with pytest.raises(UserError, match=message):
        Conditioning(PartConfig.from_dict("conditioner", {"name": "none", **use}), none)


# ----------------------------------------------------------------------------------------------------- a run with it


def losses(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file)]


def gap_run(folder, gap=None, **sections):
    yaml = make_run(folder, images=32, **sections)
    path = gap_file(folder, gap)
    return [f"conditioner.gap.means={path}"], yaml


def test_a_run_keeps_its_means_and_goes_on_bit_for_bit(tmp_path, capsys):
    words, yaml = gap_run(tmp_path, some_gap(map=maps()[1]), conditioner={"train_on": "mixed"})
    train = ["train", "--config", str(yaml), *words]
    with contextlib.chdir(tmp_path):
        assert not main([*train, "run=whole"])
        assert not main([*train, "run=parts", "trainer.max_steps=3"])
        gap_file(tmp_path, some_gap(seed=9, map=maps()[1]))  # other means, meanwhile
        capsys.readouterr()
        assert not main([*train, "run=parts", "resume.checkpoint=last"])
        assert "means other than the checkpoint's are named; the checkpoint's hold" in capsys.readouterr().out
        whole, part = (read_pickled(f"runs/{name}/last.ckpt")["state_dict"] for name in ("whole", "parts"))
        assert losses(tmp_path / "runs/whole") == losses(tmp_path / "runs/parts")
        assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
        assert torch.equal(whole["conditioner.gap.image_mean"], some_gap().image_mean)
        for file in ("ema.safetensors", "last.ckpt"):
            pipeline = Pipeline.from_checkpoint(f"runs/whole/{file}")
            assert pipeline.model.gap.map_name == "ridge"
            assert torch.equal(pipeline.model.gap.text_mean, some_gap().text_mean)
        assert not main(["inspect", "runs/whole/ema.safetensors"])
        out = capsys.readouterr().out
        assert "gap: means of 16 numbers, " in out and "noise 0.500; ridge map of texts" in out
        assert "map: ridge" in out and "noise: 0.5" in out
        assert not main(["convert", "runs/whole/ema.safetensors", "half.safetensors", "--half"])
        assert Pipeline.from_checkpoint("half.safetensors").model.gap.image_mean.equal(some_gap().image_mean)


def test_a_cache_trains_as_its_images_do(tmp_path, capsys):
    """Raw embeddings are kept; means and noise come in training, and are of the same random numbers."""
    data = {"crop": "center", "flip": False}
    words, yaml = gap_run(tmp_path, data=data, conditioner={"train_on": "mixed"}, trainer={"max_steps": 3})
    train = ["train", "--config", str(yaml), "seed=3", *words]
    with contextlib.chdir(tmp_path):
        assert not main(["cache", "--config", str(yaml), "seed=3", "--out", "cache"])
        batches = []
        for options in ([], ["data={name: cache, path: cache, batch_size: 32, workers: 0}"]):
            from ldm_lab.config import load
            from ldm_lab.data.datamodule import DataModule
            from ldm_lab.training.runner import build_task

            config = load(yaml, ["seed=3", "data.batch_size=32", *words, *options])
            task, module = build_task(config), DataModule(config["data"].build(), seed=3)
            module.prepare_data()
            module.setup()
            found = next(iter(module.train_dataloader()))
            order = sorted(range(32), key=lambda i: found.key[i])
            rows = torch.tensor(order)
            change = {"image": None if found.image is None else found.image[rows]}
            for name in ("mean", "logvar"):
                value = getattr(found, name)
                change[name] = None if value is None else value[rows]
            change["conditions"] = {name: value[rows] for name, value in found.conditions.items()}
            found = replace(found, key=[found.key[i] for i in order], text=[found.text[i] for i in order], **change)
            torch.manual_seed(0)
            batches.append(task.encode(found))
        (x_online, online), (x_cached, cached) = batches
        assert torch.allclose(online["embed"], cached["embed"], atol=5e-3)
        assert torch.allclose(x_online, x_cached, atol=2e-2)
        assert not main([*train, "data={name: cache, path: cache, batch_size: 4, workers: 0}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["conditioner.gap.map=residual"], "residual is asked for, and .* was made with --map none"),
        (["conditioner.gap.nose=1"], "Did you mean 'noise'"),
        (["conditioner.gap.noise=-1"], "at least 0 is needed"),
        (["conditioner.gap={shift: false, map: ridge, noise: 1}"], "shift=false leaves those in"),
        (["conditioner.train_on=texts"], "one of 'image', 'text', 'mixed' or null is needed"),
        (["conditioner={name: none}", "conditioner.gap={}"], "embed images and texts alike"),
    ],
    ids=["map", "key", "noise", "no shift", "train_on", "none"],
)
def test_mistakes_are_told(tmp_path, capsys, options, message):
    words, yaml = gap_run(tmp_path)
    with contextlib.chdir(tmp_path), pytest.raises((UserError, SystemExit), match=message):
        main(["train", "--config", str(yaml), *words, *options])


def test_lora_and_other_weights_to_begin_with(tmp_path, capsys):
    words, yaml = gap_run(tmp_path, trainer={"max_steps": 1})
    train = ["train", "--config", str(yaml)]
    with contextlib.chdir(tmp_path):
        assert not main([*train, *words, "run=base"])
        assert not main([*train, "run=plain"])
        capsys.readouterr()
        assert not main([*train, "run=other", "init_from=runs/base"])
        assert "were trained with conditioner.gap, and this config has none" in capsys.readouterr().out
        assert not main([*train, *words, "run=more", "init_from=runs/plain"])
        assert "were trained without conditioner.gap" in capsys.readouterr().out
        assert not main([*train, "run=lora", "init_from=runs/base", "lora={rank: 2}", "optim.weight_decay=0"])
        assert "conditioner.gap: as of runs/base: means of 16 numbers" in capsys.readouterr().out
        with pytest.raises(UserError, match="lora adds to runs/plain, which was trained without"):
            main([*train, *words, "run=refused", "init_from=runs/plain", "lora={rank: 2}", "optim.weight_decay=0"])
        capsys.readouterr()
        own = ["conditioner.gap={noise: 0.2, images: 9}", "lora={rank: 2}", "optim.weight_decay=0"]
        assert not main([*train, *own, "run=noisy", "init_from=runs/base"])
        out = capsys.readouterr().out
        assert "conditioner.gap.images: without effect: lora keeps the gap of the model that it adds to" in out
        assert "measured" not in out and not list((tmp_path / "runs/noisy").glob("gap.safetensors*"))
        state, base = (read_pickled(f"runs/{name}/last.ckpt")["state_dict"] for name in ("noisy", "base"))
        assert torch.equal(state["conditioner.gap.text_mean"], base["conditioner.gap.text_mean"])
        assert float(state["conditioner.gap.noise"]) == pytest.approx(0.2)
        with pytest.raises(UserError, match="lora adds to runs/plain, which was trained without"):
            main([*train, *own, "run=refused", "init_from=runs/plain"])


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.fixture
def shifted(parts):
    """A pipeline of the tiny parts with means, and the means."""
    gap = some_gap(map=maps()[1])
    return Pipeline(Model(**parts, dropout=0.2, image_size=(32, 32), gap=gap)), gap


def rows_of(pipeline, prompts, **options):
    """Return the encoded prompts and the conditioner's own embeddings of them, [U, D] each."""
    batch = pipeline.encode(pipeline.check(prompts, SamplingOptions(sampler={"name": "plms2", "steps": 2}, **options)))
    return batch.conditions["embed"]


def picture(color):
    return Image.new("RGB", (32, 32), color)


def test_each_prompt_loses_its_own_mean(shifted):
    pipeline, gap = shifted
    conditioner = pipeline.model.conditioner
    mix = [[Prompt("a red star", 1.0), Prompt("image", 2.0, image=picture("red"))]]
    found = rows_of(pipeline, mix, negative="a ring")
    image = conditioner.from_prompts([], [picture("red")])["embed"]
    texts = [gap.texts(conditioner.encode_text([text])) for text in ("a red star", "a ring")]
    assert torch.allclose(found, torch.cat([texts[0], gap.images(image), texts[1]]), atol=1e-6)


def test_a_rating_is_a_direction_of_the_conditioner_s_own_space(parts, shifted, monkeypatch):
    pipeline, gap = shifted
    rating = units(1, 5)[0]
    aesthetic = Aesthetic(RatingEmbeddings({9: rating}, {"name": "cloob", "sha256": "0"}), 9, 0.5)
    request = replace(pipeline.check(["a red star"], SamplingOptions(negative="a ring")), aesthetic=aesthetic)
    found = pipeline.encode(request).conditions["embed"]
    raw = parts["conditioner"].encode_text(["a red star"])
    led = F.normalize(raw + 0.5 * rating, dim=-1)
    assert torch.allclose(found[:1], gap.texts(led), atol=1e-6), "led first, shifted then"
    assert torch.allclose(found[1:], gap.texts(parts["conditioner"].encode_text(["a ring"])), atol=1e-6)


def test_no_prompt_stays_zeros(parts, shifted):
    shifted_pipeline, _ = shifted
    options = SamplingOptions(sampler={"name": "plms2", "steps": 2})
    seen = []
    denoiser = parts["denoiser"]
    hook = denoiser.register_forward_pre_hook(lambda *args: seen.append(args[2]["embed"]), with_kwargs=True)
    shifted_pipeline(["a red star"], options)
    hook.remove()
    rows = torch.cat(seen)
    assert (rows.norm(dim=1) == 0).any() and ((rows.norm(dim=1) - 1).abs() < 1e-5).any()
    assert ((rows.norm(dim=1) == 0) | ((rows.norm(dim=1) - 1).abs() < 1e-5)).all()


def test_films_go_along_the_sphere_without_means(shifted):
    pipeline, gap = shifted
    conditioner = pipeline.model.conditioner
    from ldm_lab.sampling.interpolation import interpolate_prompts

    ends = ["a red star", picture("blue")]
    request = pipeline.check(ends, SamplingOptions())
    film = interpolate_prompts(pipeline.encode(request), 5).conditions["embed"]
    assert torch.allclose(film.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(film[0], gap.texts(conditioner.encode_text([ends[0]]))[0], atol=1e-6)
    assert torch.allclose(film[-1], gap.images(conditioner.from_prompts([], [ends[1]])["embed"])[0], atol=1e-6)
    frames = interpolate(pipeline, ends, 2, SamplingOptions(sampler={"name": "plms2", "steps": 2}))
    assert sum(len(batch) for batch in frames) == 2


def test_the_best_of_several_is_the_nearest_without_means(shifted):
    pipeline, gap = shifted
    model = pipeline.model
    prompts = rows_of(pipeline, ["a red star"])
    own = model.conditioner.from_prompts([], [picture("red")])["embed"]
    expected = float(F.cosine_similarity(gap.images(own), prompts))
    assert similarity(model, picture("red"), prompts, torch.ones(1)) == pytest.approx(expected, abs=1e-6)


def test_clip_guidance_lives_in_a_space_of_its_own(shifted, monkeypatch):
    pipeline, _ = shifted
    from ldm_lab.sampling.prompts import parse_prompts, target_embeddings

    class Noised(torch.nn.Module):
        def text_embedding(self, texts):
            return torch.ones(len(texts), 4)

    model = replace(pipeline.model, noised_clip=Noised())
    found = target_embeddings(model, parse_prompts(["a red star"]), 3.0)
    assert torch.equal(found, torch.ones(1, 4))


def test_a_model_that_lost_its_means_is_refused(tmp_path):
    from ldm_lab.checkpoints.native import save_model

    sections = make_parts(tmp_path)
    config = {"task": "diffusion", **sections, "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"] = {**sections["conditioner"], "gap": {"noise": 0.5}}
    state = build("denoiser", DENOISER, 4, embedding(D)).state_dict()
    for means, message in (({}, "does not hold its means"), (some_gap(width=8).state_dict(), "means of 8 numbers")):
        beside = {f"conditioner.gap.{name}": value for name, value in means.items()}
        save_model(tmp_path / "m.safetensors", {**state, **beside}, config, {"image_size": "32"})
        with pytest.raises(UserError, match=message):
            Pipeline.from_checkpoint(tmp_path / "m.safetensors")


def test_hostile_means_are_refused_before_anything_is_allocated():
    width = 4_000_000
    wide = {"image_mean": torch.zeros(width), "text_mean": torch.zeros(width), "noise": torch.tensor(0.1)}
    with pytest.raises(UserError, match="no readable means"):
        Gap.from_state({**wide, "map.weight": torch.zeros(1, 1)}, "file")
    huge = {"image_mean": torch.full((4,), 1e300, dtype=torch.float64), "text_mean": torch.zeros(4)}
    with pytest.raises(UserError, match="no readable means"):
        Gap.from_state({**huge, "noise": torch.tensor(0.1)}, "file")


def test_additions_to_a_model_take_its_means_and_the_noise_of_their_own_config(tmp_path):
    """As a resumed run of theirs does, too."""
    its = dict(Gap(torch.ones(16) / 8, torch.zeros(16), 0.5).state_dict())
    section = PartConfig.from_dict("conditioner", {**CLOOB, "gap": {"noise": 0.1}})
    began, resumed = stored_gap(its, "base", section), resumed_gap(stored_gap(its, "base", section), its, section)
    assert began.noise_length == resumed.noise_length == 0.1
    assert torch.equal(began.image_mean, resumed.image_mean) and began.shifts
