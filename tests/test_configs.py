"""Every recipe in configs/ loads and builds: small ones as they are, big ones on the meta device."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm_lab import config
from ldm_lab.config import PartConfig, RunConfig, build, load
from ldm_lab.config.checks import check_rules_of
from ldm_lab.errors import UserError
from ldm_lab.estimate import images_per_second, peak_flops
from ldm_lab.training.cost import config_cost

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
IMAGEN = CONFIGS.parent / "docs" / "imagen.md"
BUILT_BY_OTHERS = ("sf_v1_1", "sf_v1_2")  # networks that sf_v1_3 has, too


def load_filled(path: Path, *changes: str) -> RunConfig:
    """Load a recipe with something in the places that its users have to fill, and other changes."""
    missing, files = set(), [path]
    for file in files:  # which grows by what each is an addition to
        content = OmegaConf.load(file)
        missing |= OmegaConf.missing_keys(content)
        below = content.get("defaults") or []
        files += [file.parent / name for name in ([below] if isinstance(below, str) else below)]
    return load(path, [*(f"{key}=somewhere" for key in sorted(missing)), *changes])


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in BUILT_BY_OTHERS), id=p.stem) for p in RECIPES]
)
def test_a_recipe_loads_and_builds(path):
    loaded = load_filled(path)
    with torch.device("meta"):
        task = loaded.task_class()(loaded, read_weights=False)
    assert sum(p.numel() for p in task.model.parameters()) > 1000
    assert loaded.run == path.stem, "a recipe's runs go where its name says"
    for section in ("optim", "ema", "checkpoint", "logging"):
        if section in loaded:
            assert not config.check_section(section, loaded[section], section)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_explains_itself(path):
    lines = path.read_text().splitlines()
    assert any(f"train.py --config configs/{path.name}" in line for line in lines[:6]), (
        "the launch command stands on top"
    )


SAID = re.compile(
    r"# Memory: (?P<all>[\d.]+) GB counted, of which (?P<batch>[\d.]+) GB are intermediate results of (?P<images>\d+) "
)
SPEED = re.compile(
    r"# Speed on a (?P<card>[\w ]+): (?P<rate>\d+) images/s, (?P<hours>[\d.]+) hours in all; computed at 35 %"
)


@pytest.mark.parametrize(
    ("recipe", "room"),
    [
        ("own_images_8gb", 8),
        pytest.param("own_images_12gb", 12, marks=pytest.mark.slow),
        pytest.param("own_images_24gb", 24, marks=pytest.mark.slow),
        pytest.param("ccld_finetune", 32, marks=pytest.mark.slow),
        pytest.param("ccld_finetune_24gb", 24, marks=pytest.mark.slow),
    ],
)
def test_what_a_recipe_says_of_memory_and_speed_is_what_is_counted(recipe, room):
    text, loaded = (CONFIGS / f"{recipe}.yaml").read_text(), load_filled(CONFIGS / f"{recipe}.yaml")
    cost, said = config_cost(loaded), SAID.search(text)
    assert float(said["all"]) == pytest.approx(cost.peak / 1e9, rel=0.01)
    assert float(said["batch"]) == pytest.approx(cost.activations / 1e9, rel=0.01)
    assert int(said["images"]) == cost.batch_size == loaded["data"]["batch_size"]
    assert cost.peak + 1e9 < room * 2**30, "with what CUDA and the demo pictures need"
    if speed := SPEED.search(text):
        rate = images_per_second(cost, peak_flops(speed["card"], "bf16-mixed"), 0.35)
        assert float(speed["rate"]) == pytest.approx(rate, rel=0.02)
        batches = loaded["trainer"]["max_steps"] * loaded["trainer"].get("accumulate_grad_batches", 1)
        assert float(speed["hours"]) == pytest.approx(batches * cost.batch_size / rate / 3600, rel=0.02)
    if f"{cost.parameters:,} parameters" not in text:
        assert "defaults:" in text


def imagen_sizes() -> dict[str, tuple[str, str, float, float, float, int]]:
    """Return the rows of the table in docs/imagen.md: recipe, base_channels, parameters, operations, memory, images."""
    rows = re.findall(r"^\| `(imagen_\w+)`[^|]*((?:\|[^|\n]+){5})\|$", IMAGEN.read_text(), re.M)
    found = {}
    for recipe, cells in rows:
        names, *columns, memory = [cell.strip() for cell in cells.split("|")[1:]]
        gigabytes, images = re.fullmatch(r"(.+) GB for (\d+)", memory).groups()
        numbers = [[float(n) for n in column.removesuffix(" M").split(", ")] for column in (*columns[1:], gigabytes)]
        names = names.replace(" and ", ", ").split(", ")
        widths = columns[0].split(", ")
        assert {*map(len, numbers)} == {len(widths)} and len(names) >= len(widths)
        for width, name, parameters, operations, peak in zip(widths, names, *numbers):
            found[f"{recipe} {name}"] = recipe, width, parameters, operations, peak, int(images)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("row", imagen_sizes())
def test_what_the_table_of_imagen_says_of_a_size_is_what_is_counted(row):
    recipe, width, parameters, operations, peak, images = imagen_sizes()[row]
    cost = config_cost(load_filled(CONFIGS / f"{recipe}.yaml", f"denoiser.base_channels={width}"))
    assert cost.batch_size == images
    assert parameters == pytest.approx(cost.parameters / 1e6, abs=0.5)
    for said, counted in ((operations, cost.flops / images / 1e12), (peak, (cost.peak - cost.text_encoder) / 1e9)):
        assert said == pytest.approx(counted, rel=0.05), "two digits"


def test_the_table_of_imagen_has_all_recipes_and_sizes():
    sizes: dict[str, set[str]] = {}
    for row in imagen_sizes():
        recipe, name = row.split()
        sizes.setdefault(recipe, set()).add(name)
    assert sizes.keys() == {path.stem for path in RECIPES if re.fullmatch(r"imagen_(sr)?\d+", path.stem)}
    assert sizes["imagen_64"] == {"small", "medium", "large", "paper"}


def test_yfcc_cfg_is_the_original_run():
    recipe = load_filled(CONFIGS / "yfcc_cfg.yaml")
    with torch.device("meta"):
        task = recipe.task_class()(recipe, read_weights=False)
    assert sum(p.numel() for p in task.model.parameters()) == 1_174_321_228
    cloob = task.frozen["conditioner"]
    assert sum(p.numel() for p in cloob.image_encoder.parameters()) == 86_190_080
    assert sum(p.numel() for p in cloob.text_encoder.parameters()) == 63_427_584
    assert sum(p.numel() for p in task.frozen["autoencoder"].parameters()) == 83_653_863
    assert recipe["optim"] == {"lr": 3e-5, "weight_decay": 0.01, "betas": [0.9, 0.999], "eps": 1e-8}
    assert recipe["ema"] == {"from_step": [0, 20_000, 200_000], "decay": [0.99, 0.999, 0.9999]}
    assert recipe["denoiser"]["base_channels"] == 192 and recipe["denoiser"]["multipliers"] == [4, 4, 8, 8]
    assert recipe["conditioner"]["dropout"] == 0.2
    assert recipe["autoencoder"]["latent_std"] == 2.55
    assert recipe["data"]["image_size"] == 256 and recipe["data"]["batch_size"] == 64
    assert recipe["data"]["resize"] == "exact"
    assert recipe["trainer"]["max_steps"] == 250_000 and recipe["trainer"]["devices"] == 8
    demo = recipe["demo"]
    assert (demo["every"], demo["sampling"]) == (2000, {"guidance": 3.0, "sampler": {"name": "plms", "steps": 50}})
    assert recipe["checkpoint"]["keep_every"] == 50_000


def test_yfcc_clip_differs_from_yfcc_cfg_in_nothing_but_the_frozen_parts():
    clip, cloob = load_filled(CONFIGS / "yfcc_clip.yaml"), load_filled(CONFIGS / "yfcc_cfg.yaml")
    assert {key for key in {*clip, *cloob} if clip.get(key) != cloob.get(key)} == {"autoencoder", "conditioner"}
    assert clip["conditioner"] == {
        "name": "clip", "model": "ViT-B-16", "pretrained": "laion2b_s34b_b88k", "dropout": 0.2,
        "gap": {"noise": None},
    }  # fmt: skip
    other = PartConfig("conditioner", "clip", {"model": "ViT-L-14-quickgelu", "pretrained": "openai"})
    clip = clip.with_part("conditioner", other)
    with torch.device("meta"):
        task = clip.task_class()(clip, read_weights=False)
    assert task.frozen["conditioner"].embed_dim == 768, "the denoiser takes any width"
    assert task.model.mapping[0].main[0].in_features == 768 + 128


@pytest.mark.parametrize("recipe", ["yfcc_clip", "own_images_8gb", "own_images_12gb", "own_images_24gb"])
def test_recipes_without_captions_take_parts_that_everyone_can_fetch(recipe):
    """From the Hub, with the spread of its autoencoder; the models in the comments are open_clip's, as they stand."""
    import open_clip

    loaded, text = load_filled(CONFIGS / f"{recipe}.yaml"), (CONFIGS / f"{recipe}.yaml").read_text()
    assert loaded["autoencoder"]["weights"] == "hf://stabilityai/sd-vae-ft-mse"
    assert loaded["autoencoder"]["latent_std"] == pytest.approx(1 / 0.18215, rel=1e-3)
    assert loaded["conditioner"]["name"] == "clip"
    assert build("gap", loaded["conditioner"]["gap"]).needs_means, "texts and images are brought together"
    mentioned = re.findall(r"# model: (\S+).*\n *# pretrained: (\w+)", text) + re.findall(r"(ViT-\S+) with (\w+)", text)
    assert "defaults: own" in text or {"dfn2b", "webli"} <= {pretrained for _, pretrained in mentioned}
    for model, pretrained in [(loaded["conditioner"]["model"], loaded["conditioner"]["pretrained"]), *mentioned]:
        assert open_clip.get_pretrained_cfg(model, pretrained)["hf_hub"], "of the Hub"
        section = {"name": "clip", "model": model, "pretrained": pretrained}
        assert not config.check_section("conditioner", section, "conditioner")
        assert not check_rules_of("conditioner", section, "conditioner")


def test_ccld_finetune_goes_on_with_the_released_model():
    finetune, released = load_filled(CONFIGS / "ccld_finetune.yaml"), load_filled(CONFIGS / "yfcc_cfg.yaml")
    assert finetune["denoiser"] == {**released["denoiser"], "gradient_checkpointing": True}
    for section in ("autoencoder", "conditioner", "objective"):
        assert finetune[section] == released[section]


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("glide_finetune_base", 385_030_726),
        ("glide_finetune_upsampler", 398_361_286),
        ("glide_finetune_inpaint", 385_037_638),
        ("miniglide", 156_947_494),
        ("miniglide_1m5", 1_495_814),
        ("dogglide", 156_947_494),
        ("if_finetune_I", 371_605_830),
        ("if_finetune_II", 351_076_102),
        ("glide_quickstart", 3_637_254),
        ("glide_quickstart_upsampler", 1_210_886),
        ("glide_quickstart_inpaint", 3_638_406),
    ],
)
def test_parameter_counts_of_the_recipes_of_glide(recipe, parameters):
    with torch.device("meta"):
        loaded = load_filled(CONFIGS / f"{recipe}.yaml")
        task = loaded.task_class()(loaded, read_weights=False)
    assert sum(p.numel() for p in task.model.parameters()) == parameters
    assert f"{parameters:,} parameters" in (CONFIGS / f"{recipe}.yaml").read_text()


def test_the_recipes_of_glide_are_laionide_s_and_miniglide_s():
    base, upsampler = (load_filled(CONFIGS / f"glide_finetune_{form}.yaml") for form in ("base", "upsampler"))
    assert base["optim"]["lr"] == 1e-5 and base["optim"]["weight_decay"] == 0.05
    assert base["conditioner"]["dropout"] == 0.2 and upsampler["conditioner"]["dropout"] == 0.0
    assert (base["objective"]["betas"], upsampler["objective"]["betas"]) == ("squaredcos_cap_v2", "linear")
    assert base["data"]["require_text"] and base["objective"]["bound"] is False
    low_res = {"scale_factor": 4, "noise": 0.0, "blur": 0.0}
    assert upsampler.condition_sources == {"low_res": {"name": "low_res", **low_res}} and "demo" not in upsampler
    mini, dog = (load_filled(CONFIGS / f"{name}.yaml") for name in ("miniglide", "dogglide"))
    assert mini["checkpoint"] == {"seconds": 3600, "keep": 3} and mini["data"]["limit"] == 100_000
    assert mini["objective"]["timesteps"] == 100 and dog["objective"]["timesteps"] == 1000
    assert mini["denoiser"] == dog["denoiser"]


def test_ema_stages_are_the_original_s():
    ema = build("ema", load_filled(CONFIGS / "yfcc_cfg.yaml")["ema"])
    steps = {0: 0.99, 19_999: 0.99, 20_000: 0.999, 199_999: 0.999, 200_000: 0.9999, 10**9: 0.9999}
    assert {step: ema.at(step) for step in steps} == steps


def test_the_learning_rate_over_time():
    optim = build("optim", {"lr": 1.0, "warmup_steps": 10, "schedule": "cosine", "final_lr": 0.1})
    factors = [optim.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[100] == pytest.approx(0.1)
    assert factors[50] == pytest.approx(0.1 + 0.9 * 0.5)
    slow = build("optim", {"warmup": "exponential", "warmup_steps": 2000})
    assert slow.factor(999, -1) == pytest.approx(1 - 0.9995**1000)
    with pytest.raises(UserError, match="lr: at least 0 is needed, not -1"):
        build("optim", {"lr": -1})
