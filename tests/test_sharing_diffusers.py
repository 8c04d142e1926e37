"""`export --diffusers`: a folder that needs torch, diffusers and its own files gives the same pictures."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import regex
import tiny_glide
import torch
from einops import rearrange, repeat
from test_sharing import make_model, tiny_if_model
from tiny import AUTOENCODER, ROOT

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.files import read_safetensors, write_safetensors
from ldm_lab.checkpoints.gap_files import beside_weights
from ldm_lab.checkpoints.native import save_model, save_part
from ldm_lab.conditioners.gap import Gap, ResidualMap, RidgeMap
from ldm_lab.conditioners.glide_text import GPT2_WORDS, gpt2_ranks
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.pretrained.own_runs import note_own
from ldm_lab.sampling import Pipeline, SamplingOptions, Stage, Stages
from ldm_lab.sharing import stand_ins
from ldm_lab.sharing.standalone import Standalone

PROMPTS = ["a red star", "a blue  Ring, it's"]
CLOSE = 1e-4  # of pixels in [-1, 1]; a level of 8 bits is 0.008


def exported(folder: Path, model: Path, *more: str | Path) -> Path:
    main(["export", str(model), "--diffusers", str(folder / "out"), *map(str, more)])
    return folder / "out"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Load diffusers' pipeline of a folder, in this process; all tests share the folder of its modules."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    modules = str(tmp_path_factory.mktemp("modules"))

    def load(folder: Path) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", modules)
        patch.syspath_prepend(modules)
        yield load


def ours(model: Path, sampler: str, steps: int, **options) -> torch.Tensor:
    options = SamplingOptions(sampler={"name": sampler, "steps": steps}, seed=7, **options)
    batches = Pipeline.from_checkpoint(model).samples(PROMPTS, options)
    return torch.stack([sample.pixels for batch in batches for sample in batch])  # [N, 3, H, W]


def in_a_row(base: Path, upsampler: Path, steps: int) -> list[torch.Tensor]:
    """Return what we make with ddim, small and large, [N, 3, H, W] each."""
    options = [SamplingOptions(sampler={"name": "ddim", "steps": steps}, **more) for more in ({"seed": 7}, {})]
    stages = Stages([Stage(Pipeline.from_checkpoint(file), its) for file, its in zip((base, upsampler), options)])
    rows = [row for batch in stages.samples(PROMPTS) for row in batch]
    return [torch.stack([row[i].pixels for row in rows]) for i in range(2)]


@pytest.mark.parametrize("sampler", ["unipc", "ddim", "dpmpp_2m", "ddpm"])
def test_the_same_pictures(diffusers_folder, loaded, sampler):
    model, folder = diffusers_folder
    pipeline = loaded(folder)
    theirs = pipeline(PROMPTS, output_type="pt", sampler=sampler, num_inference_steps=4, seed=7).images
    assert (theirs - ours(model, sampler, 4)).abs().max() < CLOSE
    assert theirs.std() > 0.01
    (image,) = pipeline("a red star", num_inference_steps=2).images
    assert image.size == (16, 16) and image.mode == "RGB"


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    model = make_model(folder)
    return model, exported(folder, model)


def test_guidance_sizes_and_generators(diffusers_folder, loaded):
    model, folder = diffusers_folder
    pipeline = loaded(folder)
    options = {"output_type": "pt", "sampler": "ddim", "num_inference_steps": 3}
    wide = pipeline(PROMPTS, seed=7, guidance_scale=1.5, width=32, **options).images
    assert (wide - ours(model, "ddim", 3, guidance=1.5, size="32x16")).abs().max() < CLOSE
    generators = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    given = pipeline(PROMPTS, generator=generators, **options).images
    assert torch.equal(given, pipeline(PROMPTS, seed=7, **options).images)
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        pipeline(PROMPTS, width=20, **options)
    with pytest.raises(ValueError, match="one for each is needed"):
        pipeline(PROMPTS, generator=generators[:1], **options)
    with pytest.raises(ValueError, match="a base model takes none"):
        pipeline(PROMPTS, image=given, **options)


@pytest.mark.parametrize(
    "objective", [{"name": "flow_matching"}, {"name": "continuous", "curve": "linear", "prediction": "x0"}],
    ids=lambda its: its["name"],
)  # fmt: skip
def test_other_objectives(tmp_path, loaded, objective):
    model = make_model(tmp_path, objective=objective)
    pipeline = loaded(exported(tmp_path, model))
    theirs = pipeline(PROMPTS, output_type="pt", num_inference_steps=3, seed=7).images
    assert (theirs - ours(model, "unipc", 3)).abs().max() < CLOSE


def test_glide_with_an_upsampler(tmp_path, loaded):
    base = tiny_glide.write(tmp_path / "base.safetensors")
    upsampler = tiny_glide.write(tmp_path / "up.safetensors", upsampler=True)
    folder = exported(tmp_path, base, "--upsampler", upsampler)
    small, large = in_a_row(base, upsampler, 3)
    first, second = loaded(folder), loaded(folder / "upsampler_1")
    their_small = first(PROMPTS, output_type="pt", sampler="ddim", num_inference_steps=3, seed=7).images
    their_large = second(PROMPTS, their_small, output_type="pt", num_inference_steps=3, sampler="ddim", seed=7).images
    assert (their_small - small).abs().max() < CLOSE and (their_large - large).abs().max() < CLOSE
    assert second.config.factor == 2 and their_large.shape[2] == 2 * their_small.shape[2]
    again = first(PROMPTS, output_type="pt", sampler="ddim", num_inference_steps=3, seed=7).images
    assert torch.equal(again, their_small)  # whatever was loaded since
    with pytest.raises(ValueError, match="an upsampler needs what it is to enlarge"):
        second(PROMPTS)
    with pytest.raises(ValueError, match="1 for 2 prompts"):
        second(PROMPTS, their_small[:1])


def test_if_by_its_own_thresholds_and_a_language_model(tmp_path, loaded):
    model = tiny_if_model(tmp_path / "if.safetensors")
    pipeline = loaded(exported(tmp_path, model))
    theirs = pipeline(PROMPTS, output_type="pt", num_inference_steps=3, seed=7).images
    assert (theirs - ours(model, "unipc", 3)).abs().max() < CLOSE
    assert pipeline.scheduler.config.thresholding == "dynamic" and pipeline.scheduler.config.guidance == 7.0
    assert type(pipeline.text_encoder).__module__.startswith("transformers.")


@pytest.mark.parametrize("padding", ["masked", "read"])
def test_a_t5_of_one_s_own(tmp_path, loaded, padding):
    from language_models import write_language_model

    note_own(tmp_path)
    model = tiny_if_model(
        tmp_path / "if.safetensors", str(write_language_model(tmp_path / "secret_place")),
        padding=padding, dtype="fp32", lowercase=True,
    )  # fmt: skip
    folder = exported(tmp_path, model)
    pipeline = loaded(folder)
    theirs = pipeline(PROMPTS, output_type="pt", sampler="ddim", num_inference_steps=3, seed=7).images
    assert (theirs - ours(model, "ddim", 3)).abs().max() < CLOSE
    for path in folder.rglob("*"):
        assert path.is_dir() or b"secret_place" not in path.read_bytes(), path


def test_a_super_resolution_stage_of_if(tmp_path, loaded):
    torch.manual_seed(6)
    conditioner = {"name": "t5", "model": "minilm", "text_size": 8}
    denoiser = {
        "name": "if_unet", "base_channels": 32, "multipliers": [1, 2], "blocks_per_level": [1], "attention": [2],
        "head_width": 16, "text_width": 64, "pool_heads": 4, "efficient": True, "cross_only": True,
    }  # fmt: skip
    sources = {"if_low_res": {"scale_factor": 2}}
    source = build("condition_source", {"name": "if_low_res", "scale_factor": 2})
    spec = {**build("conditioner", conditioner).spec, **source.spec}
    net = build("denoiser", denoiser, 3, spec)
    config = {
        "autoencoder": {"name": "identity"}, "conditioner": {**conditioner, "dropout": 0.1}, "denoiser": denoiser,
        "condition_sources": sources, "objective": {"name": "eps_hybrid", "timesteps": 100},
    }  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(tmp_path / "up.safetensors", net.state_dict(), config, {"image_size": "32"})
    pipeline = loaded(exported(tmp_path, tmp_path / "up.safetensors"))
    low_res = torch.rand(2, 3, 16, 16) * 2 - 1
    theirs = pipeline(PROMPTS, low_res, output_type="pt", sampler="ddim", num_inference_steps=3, seed=7).images
    options = SamplingOptions(sampler={"name": "ddim", "steps": 3}, seed=7)
    batches = Pipeline.from_checkpoint(tmp_path / "up.safetensors").samples(PROMPTS, options, low_res=low_res)
    assert (theirs - torch.stack([sample.pixels for batch in batches for sample in batch])).abs().max() < CLOSE


def test_an_unconditional_model(tmp_path, loaded):
    model = make_model(tmp_path, conditioner={"name": "none", "embed_dim": 16, "dropout": 0.1})
    pipeline = loaded(exported(tmp_path, model))
    theirs = pipeline(["", ""], output_type="pt", num_inference_steps=3, seed=7).images
    assert (theirs - ours(model, "unipc", 3)).abs().max() < CLOSE


def test_statistics_of_latents_per_channel(tmp_path, loaded):
    section = {"name": "kl_f8", "latent_mean": [0.1, 0.2, -0.1, 0.0], "latent_std": [1.0, 2.0, 1.5, 0.5]}
    torch.manual_seed(0)
    save_part(tmp_path / "ae.safetensors", build("autoencoder", AUTOENCODER), AUTOENCODER)
    model = make_model(tmp_path, autoencoder={**section, "weights": str(tmp_path / "ae.safetensors")})
    pipeline = loaded(exported(tmp_path, model))
    theirs = pipeline(PROMPTS, output_type="pt", num_inference_steps=3, seed=7).images
    assert (theirs - ours(model, "unipc", 3)).abs().max() < CLOSE


@pytest.mark.parametrize(
    ("kind", "said"), [(None, True), ("ridge", True), ("residual", True), ("ridge", False)],
    ids=["means", "ridge", "residual", "in_the_weights_alone"],
)  # fmt: skip
def test_a_gap_goes_along(tmp_path, loaded, kind, said):
    """Means, and a map of texts, as they stand beside the model's weights."""
    model = make_model(tmp_path)
    torch.manual_seed(4)
    maps = {None: None, "ridge": RidgeMap(torch.randn(16, 16)), "residual": ResidualMap(16, 24)}
    if kind == "residual":
        torch.nn.init.normal_(maps[kind].last.weight)
    gap = Gap(0.5 * torch.randn(16), 0.5 * torch.randn(16), 0.1, maps[kind])
    state, told = read_safetensors(model)
    config = json.loads(told.pop("config"))
    if said:
        config["conditioner"]["gap"] = {"noise": 0.1}
    facts = {key: its for key, its in told.items() if key not in ("format", "role")}
    without = ours(model, "ddim", 3)
    save_model(model, {**state, **beside_weights(gap)}, config, facts)
    pipeline = loaded(exported(tmp_path, model))
    theirs = pipeline(PROMPTS, output_type="pt", sampler="ddim", num_inference_steps=3, seed=7).images
    assert (theirs - ours(model, "ddim", 3)).abs().max() < CLOSE < (theirs - without).abs().max()


def test_weights_in_half(tmp_path, loaded):
    model = make_model(tmp_path)
    state, told = read_safetensors(model)
    write_safetensors(model, {name: its.half() for name, its in state.items()}, told)
    pipeline = loaded(exported(tmp_path, model))
    theirs = pipeline(PROMPTS, output_type="pt", sampler="ddim", num_inference_steps=3, seed=7).images
    assert (theirs - ours(model, "ddim", 3)).abs().max() < CLOSE


@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
def test_guidance_of_a_few_prompts(diffusers_folder, loaded, guidance):
    """One, and an odd number of them, one or several at a time, in pictures that are no square."""
    model, folder = diffusers_folder
    pipeline, options = loaded(folder), SamplingOptions(sampler={"name": "unipc", "steps": 3}, seed=7)
    texts = ["", *PROMPTS]
    for count, batch in ((1, 16), (3, 1), (3, 2)):
        asked = dataclasses.replace(options, guidance=guidance, size="48x16", batch_size=batch)
        batches = Pipeline.from_checkpoint(model).samples(texts[:count], asked)
        wanted = torch.stack([sample.pixels for its in batches for sample in its])
        theirs = pipeline(texts[:count], output_type="pt", num_inference_steps=3, sampler="unipc", seed=7, width=48,
                          height=16, guidance_scale=guidance, batch_size=batch).images  # fmt: skip
        assert (theirs - wanted).abs().max() < CLOSE


def test_what_is_there_stays_and_what_cannot_be_is_said(diffusers_folder, tmp_path):
    model, folder = diffusers_folder
    with pytest.raises(UserError, match="is there already; --overwrite replaces it"):
        exported(folder.parent, model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"with other things in it \(thesis\.tex\)"):
        exported(tmp_path, model, "--overwrite")
    with pytest.raises(UserError, match="where does it go"):
        main(["export", str(model)])
    other = make_model(tmp_path / "other", conditioner={"name": "t5", "gap": {"noise": 0.1}})
    with pytest.raises(UserError, match=r"conditioner\.gap: is exported of cloob alone"):
        exported(tmp_path / "other", other)
    text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".py", ".json", ".md"))
    for secret in (str(folder.parent), str(Path.home()), str(ROOT)):
        assert secret not in text


def test_the_code_is_ours_without_the_program(diffusers_folder):
    _, folder = diffusers_folder
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [its.name for its in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            allowed = {"torch", "diffusers", "numpy", "PIL", "regex", "ftfy", "__future__"} | sys.stdlib_module_names
            assert {its.split(".")[0] for its in names} <= allowed, path
    (index,) = folder.glob("model_index.json")
    module, _ = json.loads(index.read_text())["unet"]
    assert (folder / "unet" / f"{module}.py").is_file() and (folder / "unet" / f"{module}_code.py").is_file()


# ----------------------------------------------------------------------------------------- code that leaves the program


def patterns() -> set[str]:
    """Return all patterns of axes in the code that may be exported."""
    files = [
        path
        for room in ("denoisers", "conditioners", "guidance", "sampling")
        for path in (ROOT / "ldm_lab" / room).glob("*.py")
    ]
    return {its for path in files for its in re.findall(r'"([\w ()]+ -> [\w ()]+)"', path.read_text())}


@pytest.mark.parametrize("pattern", sorted(patterns()))
def test_axes_move_as_with_einops(pattern):
    names = sorted(set(re.findall(r"[a-z]\w*", pattern)))
    sizes = {name: 2 + i for i, name in enumerate(names)}
    left, right = (stand_ins.axes_of(side) for side in pattern.split("->"))
    flat = [name for group in left for name in group]
    shape = [int(np.prod([sizes.get(name, 1) for name in group])) for group in left]
    new = {name for group in right for name in group if name not in flat and name != "1"}
    merged = {name for group in left if len(group) > 1 for name in group[1:]}
    given = {name: sizes[name] for name in new | merged}
    tensor = torch.randn(shape)
    function, mine = (repeat, stand_ins.repeat) if new else (rearrange, stand_ins.rearrange)
    assert torch.equal(mine(tensor, pattern, **given), function(tensor, pattern, **given))


def test_gpt2_s_encoding_without_tiktoken(monkeypatch):
    import tiktoken

    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("r", "e"), ("e", "d"), ("Ġ", "re"), ("Ġre", "d")]
    monkeypatch.setattr(stand_ins, "MERGES", merges)
    ranks = gpt2_ranks(" ".join(pair) for pair in merges)
    right = tiktoken.Encoding("test", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
    for text in ("the red theater's   réd", "thethe\n\nred é 12", "", " ", "日本 the"):
        assert stand_ins.GPT2(len(ranks) + 1).encode_ordinary(text) == right.encode_ordinary(text)
    assert regex.findall(GPT2_WORDS, "the red") == ["the", " red"]


def test_two_definitions_of_a_name_get_two():
    code = Standalone()
    assert code.add("ldm_lab.schedules.cosine", "FIRST_RATIO") == "FIRST_RATIO"
    assert code.add("ldm_lab.schedules.discrete", "FIRST_RATIO") == "FIRST_RATIO_2"
    module = types.ModuleType("both")
    exec(code.text("Both.", "nothing"), module.__dict__)
    from ldm_lab.schedules import cosine, discrete

    assert (module.FIRST_RATIO, module.FIRST_RATIO_2) == (cosine.FIRST_RATIO, discrete.FIRST_RATIO)


# --------------------------------------------------------------------------------------------------------- acceptance


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ccld", "glide", "if"])
def test_a_machine_without_ldm_lab(tmp_path, kind):
    """`stranger.py` cannot import the program, nor what diffusers does not need, and says so itself."""
    from test_sharing import models

    model, upsampler = models(kind, tmp_path)
    folder = exported(tmp_path, model, *(["--upsampler", upsampler] if upsampler else []))
    (tmp_path / "elsewhere").rename(tmp_path / "gone") if (tmp_path / "elsewhere").exists() else None
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    words = [sys.executable, "-P", ROOT / "tests" / "stranger.py", folder, tmp_path / "pixels", "ddim", "4", *PROMPTS]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    if (tmp_path / "gone").exists():
        (tmp_path / "gone").rename(tmp_path / "elsewhere")
    assert np.abs(np.load(tmp_path / "pixels.npy") - ours(model, "ddim", 4).numpy()).max() < CLOSE
    if upsampler:
        _, large = in_a_row(model, upsampler, 4)
        assert np.abs(np.load(tmp_path / "pixels_large.npy") - large.numpy()).max() < CLOSE
