"""A folder that looks like a checkout, in which the commands of README and docs run in seconds: recipes with small
networks and two steps, drawn images where a page has its own, random weights where it has released ones.

`tests/walks.py` says what is changed in the commands themselves.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import tiny_glide
import torch
from laion_rows import write_rows
from language_models import write_language_model
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from test_ccld_models import train_original, write_layouts
from test_glide_models import SMALL as GLIDE
from test_own_images import picture
from tiny import CLOOB, KL_F8, ROOT, run_program
from tiny_if import diffusers_unet
from walks import RELEASED

from ldm_lab.checkpoints.native import save_part
from ldm_lab.config import build
from ldm_lab.config.overrides import overlaid
from ldm_lab.data.tar import write_shard
from ldm_lab.denoisers.glide_unet import GlideUNet
from ldm_lab.evaluation.inception import Inception
from ldm_lab.training.discriminator import Discriminator

# In place of a recipe's network, by its name.
NETWORKS = {
    "ccld_unet": {"base_channels": 64, "multipliers": [1, 1], "blocks_per_level": 1, "mapping_width": 32},
    "glide_unet": {"base_channels": 32, "multipliers": [1, 1], "blocks_per_level": 1, "attention": [2],
                   "head_width": 32, "norm_groups": 8, "text_width": 32, "text_layers": 1, "text_heads": 2},
    "imagen_unet": {"base_channels": 16, "multipliers": [1, 2], "blocks_per_level": [1], "attention_levels": [],
                    "text_levels": [1], "heads": 2, "head_width": 16, "text_width": 32, "text_latents": 4},
}  # fmt: skip
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SIDE = 32  # pixels of a recipe's images that are larger
# Where pages have shards, folders of images, and tables; /data is there.
SHARDS = (
    *("there/yfcc", "there/shards", "there/mine", "there/images", "there/cc12m", "data/photos", "data/rated"),
    *("data/laion_art", "data/laion2B-en", "data/improved_aesthetics", "data/cc12m/images"),
)
FOLDERS = ("there/my_images", "there/my_pairs", "there/held_out", "data/images")
TABLES = {"laion2B-en-joined": (), "laion2B-en-aesthetic": (), "laion1B-nolang-aesthetic": (),
          "laion2B-en-aesthetic-tags": ("hash", "aesthetic")}  # fmt: skip


def scratch(folder: Path) -> Path:
    """Make a folder that looks like a checkout, with photographs in it."""
    for name in ("configs", "assets", "train.py", "sample.py"):
        (folder / name).symlink_to(ROOT / name)
    write_photos(folder / "photos", 6)
    return folder


def write_photos(folder: Path, count: int, captions: bool = False) -> Path:
    """Write JPEGs, with captions beside them if asked; return their folder."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(picture(number, kind="JPEG"))
        if captions:
            (folder / f"{number:05}.txt").write_text(f"photo {number} of a red star")
    return folder


# -------------------------------------------------------------------------------------------------------------- recipes


def small_recipe(path: Path) -> DictConfig:
    """Return a recipe with what makes it small; what its users have to fill stays open."""
    recipe = whole_recipe(path)
    quick = "quickstart" in path.stem
    data, trainer = recipe.data, recipe.get("trainer", {})
    data.update({"batch_size": 2, "workers": 0})
    if "count" in data:
        data.count = 16
    if not quick:
        shrink(recipe)
    trainer.update({"max_steps": 2, "threads": 1, "devices": 1})
    for key in ("accumulate_grad_batches", "compile"):
        trainer.pop(key, None)
    recipe.checkpoint = {"every": 2, "keep": 1}
    recipe.logging = {"every": 1}
    recipe.optim.update({"warmup_steps": 1, "state": "32bit"} if "state" in recipe.optim else {"warmup_steps": 1})
    for name in ("demo", "enlargements", "inpaintings", "reconstructions"):
        if recipe.get(name):
            recipe[name].update({"every": 2} if name == "demo" else {"every": 2, "images": 2})
            if "sampling" in recipe[name]:
                recipe[name].sampling.sampler.steps = 2
    return recipe


def whole_recipe(path: Path) -> DictConfig:
    """Return a recipe with those that it is laid over."""
    content = OmegaConf.load(path)
    below = content.pop("defaults", None)
    return overlaid(whole_recipe(path.parent / below), content, path.name) if below else content


def shrink(recipe: DictConfig) -> None:
    """Make networks, images and frozen parts of a recipe small."""
    data = recipe.data
    for key in ("image_size", "min_size", "resize_to"):
        if isinstance(OmegaConf.to_container(data).get(key), int):
            data[key] = min(data[key], 2 * SIDE if "low_res" in recipe.get("condition_sources", {}) else SIDE)
    if "denoiser" in recipe and recipe.denoiser.name in NETWORKS:
        told = ("name", "memory_efficient", "gradient_checkpointing")
        kept = {key: recipe.denoiser[key] for key in told if key in recipe.denoiser}
        recipe.denoiser = {**kept, **NETWORKS[recipe.denoiser.name]}
    if "init_from" in recipe:
        recipe.init_from = stand_in(recipe.init_from)
    if "weights" in recipe.get("autoencoder", {}):
        recipe.autoencoder.weights = stand_in(recipe.autoencoder.weights)
    elif recipe.get("autoencoder", {}).get("name") == "kl_f8":
        recipe.autoencoder = KL_F8
        recipe.perceptual = None
        recipe.discriminator.update({"start": 1, "base_channels": 8})
    name = recipe.get("conditioner", {}).get("name")
    if name == "clip":
        recipe.conditioner.update({"model": None, "pretrained": None, "weights": "released/clip.safetensors"})
    elif name == "cloob" and "weights" in recipe.conditioner:
        recipe.conditioner.weights = stand_in(recipe.conditioner.weights)
    elif name == "cloob":
        recipe.conditioner = CLOOB
        recipe.optim.schedule_steps = 2
    elif name == "t5":
        recipe.conditioner.update({"model": "released/t5", "text_size": 24})
    elif name == "glide_text":
        data.image_size = 2 * SIDE if "low_res" in recipe.get("condition_sources", {}) else SIDE // 2
        recipe.conditioner.update({"vocabulary": "clip", "vocab_size": 600, "text_size": 24})


def stand_in(name: str) -> str:
    """Return what stands for a released name; another name stays."""
    return RELEASED.get(name, name)


# -------------------------------------------------------------------------------------------------------------- a store


class Store:
    """What pages begin with, each thing made when it is first asked for, and then copied.

    Attributes:
        folder: a checkout with small recipes in which runs are made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("assets", "train.py", "sample.py"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "configs" / "select", folder / "configs" / "select")
        for path in (ROOT / "configs").glob("*.txt"):
            first = path.read_text(encoding="utf-8").splitlines()[:4]
            (folder / "configs" / path.name).write_text("\n".join(first) + "\n", encoding="utf-8")
        for path in (ROOT / "configs").glob("*.yaml"):
            OmegaConf.save(small_recipe(path), folder / "configs" / path.name)
        write_data(folder / "given")
        shutil.copytree(folder / "given", folder, dirs_exist_ok=True)
        write_parts(folder / "released")

    def world(self, folder: Path, *needs: str) -> Path:
        """Make a folder for the commands of a page, with what it needs in it; return it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("configs", "assets", "train.py", "sample.py", "released"):
            (folder / name).symlink_to(self.folder / name)  # what is released is nobody's to change
        shutil.copytree(self.folder / "given", folder, dirs_exist_ok=True)
        write_photos(folder / "photos", 6)
        for name in needs:
            self.take(name, folder)
        return folder

    def take(self, name: str, folder: Path) -> None:
        """Put a file or a run into a folder."""
        path, target = self.take_here(self.folder, name), folder / name
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            target.hardlink_to(path)  # a link that leads elsewhere would be refused of a stranger's model

    @staticmethod
    def take_here(folder: Path, name: str) -> Path:
        """Make what is not there yet in the folder of a store; return its path."""
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            MADE[name](folder, path)
        return path


def run_in(folder: Path, *words: str) -> None:
    """Run a command of the program. Raises AssertionError with what it said."""
    done = run_program("-m", "ldm_lab", *words, cwd=folder, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def train_in(folder: Path, recipe: str, *words: str) -> None:
    """Train a small recipe for a step or two."""
    run_in(folder, "train", "--config", f"configs/{recipe}.yaml", *words)


def of_recipe(recipe: str, *words: str) -> Callable[[Path, Path], None]:
    """Return what makes a run of a recipe, under the name of its folder or of a folder of the store."""

    def make(folder: Path, path: Path) -> None:
        name = f"{path.parent.name}_{path.name}" if path.parent.name != "runs" else path.name
        train_in(folder, recipe, f"run={name}", *words)
        if path != folder / "runs" / name:
            shutil.copytree(folder / "runs" / name, path)
            for part in ("autoencoder", "cloob"):  # a model that is nobody's run has its parts beside it
                shutil.copy(folder / "released" / f"{part}.safetensors", path)

    return make


SHARD = "data.shards=there/shards/*.tar"
PAIRS = "data.path=there/my_pairs"


def write_data(folder: Path) -> None:
    """Write images, shards and tables under the names that pages have for them."""
    for name in FOLDERS:
        write_photos(folder / name, 6, captions=True)
    for name in SHARDS:
        write_shards(folder / name)
    for name, columns in TABLES.items():
        (folder / name).mkdir()
        path = folder / name / "part-00000.parquet"
        write_rows(path, 400)
        if columns:
            whole = path.rename(path.with_suffix(".whole"))
            kept = f"from read_parquet('{whole}') where hash is not null and isfinite(aesthetic)"
            duckdb.sql(f"copy (select {', '.join(columns)} {kept}) to '{path}' (format parquet)")


def write_shards(folder: Path) -> None:
    """Write two shards of six images each (16 where ratings are learned), captions, and what LAION says of them."""
    each = 16 if folder.name in ("rated", "photos") else 6
    score = "AESTHETIC_SCORE" if folder.name == "improved_aesthetics" else "aesthetic"
    folder.mkdir(parents=True)
    for shard in range(2):
        samples = []
        for number in range(each * shard, each * shard + each):
            facts = {
                "key": f"{number:05}", "url": f"https://example.com/{number}.jpg", score: 8.5, "pwatermark": 0.1,
                "original_width": 1024, "original_height": 1024, "rating": number % 6,
            }  # fmt: skip
            parts = {"jpg": picture(number, kind="JPEG"), "txt": b"a red star", "json": json.dumps(facts).encode()}
            samples.append((f"{number:05}", parts))
        write_shard(folder / f"{shard:05}.tar", samples)


def write_parts(folder: Path) -> None:
    """Write parts with random weights."""
    folder.mkdir()
    torch.manual_seed(0)
    clip = {"name": "clip", "architecture": ARCHITECTURE}
    cloob = {**CLOOB, "image_width": 64, "image_heads": 1, "text_width": 64, "text_heads": 1}
    for name, role, section in (
        ("autoencoder", "autoencoder", KL_F8), ("vae", "autoencoder", KL_F8), ("cloob", "conditioner", cloob),
        ("clip", "conditioner", clip),
    ):  # fmt: skip
        save_part(folder / f"{name}.safetensors", build(role, section), section)
    write_language_model(folder / "t5", width=48)


def write_shared(folder: Path, path: Path) -> None:
    """Export a model with its upsampler."""
    for name in ("runs/glide_quickstart", "runs/glide_quickstart_upsampler"):
        Store.take_here(folder, name)
    given = ("--upsampler", "runs/glide_quickstart_upsampler", "--prompts", "configs/quickstart_prompts.txt")
    run_in(folder, "export", "runs/glide_quickstart", *given, "--hub-folder", str(path))


def write_if(folder: Path, path: Path) -> None:
    """Write a stage of DeepFloyd IF in diffusers' layout."""
    diffusers_unet(upsampler=path.name == "if_ii").save_pretrained(path)


def write_t5(folder: Path, path: Path) -> None:
    """Write a language model where a converted file has it: beside itself."""
    write_language_model(path, width=48)


def write_vit(folder: Path, path: Path) -> None:
    """Write a ViT-B/32 of open_clip's with random weights, in half precision."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu")
    torch.save({name: value.half() for name, value in model.state_dict().items()}, path)


def write_aesthetic(folder: Path, path: Path) -> None:
    """Take LAION's released head."""
    shutil.copy(ROOT / "tests" / "data" / "golden" / "aesthetic_heads" / "sa_0_4_vit_b_32_linear.pth", path)


def write_rating_embeddings(folder: Path, path: Path) -> None:
    """Write a folder as LAION's of mean embeddings by rating, of ViT-B/32, with random ones."""
    path.mkdir()
    for rating in range(10):
        torch.manual_seed(rating)
        np.save(path / f"rating{rating}.npy", torch.nn.functional.normalize(torch.randn(1, 512)).numpy())


def write_inception(folder: Path, path: Path) -> None:
    """Write the Inception network of FID with random weights."""
    torch.manual_seed(0)
    torch.save(Inception().state_dict(), path)


def write_released_autoencoder(folder: Path, path: Path) -> None:
    """Write an autoencoder with its discriminator, as CompVis's training left it."""
    torch.manual_seed(0)
    state = build("autoencoder", KL_F8).state_dict()
    judge = Discriminator(layers=3, base_channels=8).state_dict()
    torch.save({**state, **{f"loss.discriminator.{name}": value for name, value in judge.items()}}, path)


def write_zip(folder: Path, path: Path) -> None:
    """Write an autoencoder as CompVis gave it out."""
    write_original(folder, folder / "original")
    with zipfile.ZipFile(path, "w") as packed:
        packed.write(folder / "kl-f8.ckpt", "model.ckpt")


def write_original(folder: Path, path: Path) -> None:
    """Write a run's model as cloob-latent-diffusion would have written it."""
    if not (folder / "trained").is_dir():
        (folder / "trained").mkdir()
        write_layouts(train_original(folder / "trained"), folder)
    if path.suffix == ".ckpt":
        shutil.copy(folder / "training.ckpt", path)


def write_picture(folder: Path, path: Path) -> None:
    """Write a picture as somebody has it; of a mask a white square on black."""
    if path.name == "mask.png":
        mask = Image.new("L", (64, 64))
        mask.paste(255, (16, 16, 48, 48))
        mask.save(path)
    else:
        path.write_bytes(picture(3, side=64, kind="JPEG" if path.suffix == ".jpg" else "PNG"))


def write_samples(folder: Path, path: Path) -> None:
    """Draw what `make demo` draws."""
    Store.take_here(folder, "runs/quickstart")
    prompts = ("--prompts", "configs/quickstart_prompts.txt")
    run_in(folder, "sample", "--checkpoint", "runs/quickstart", "-n", "1", *prompts, "--steps", "2", "--out", str(path))


def train_lora(folder: Path, path: Path) -> None:
    """Train a LoRA of the quickstart's model."""
    Store.take_here(folder, "runs/quickstart")
    of_recipe("quickstart", "init_from=runs/quickstart", "lora.rank=2", "cache=null")(folder, path)


def write_lora(folder: Path, path: Path) -> None:
    """Copy its file."""
    shutil.copy(Store.take_here(folder, "runs/style") / "lora.safetensors", path)


def write_text(text: str) -> Callable[[Path, Path], None]:
    """Return what writes a text."""
    return lambda folder, path: path.write_text(text) and None


def write_urls(folder: Path, path: Path) -> None:
    """Write a table of urls and captions."""
    duckdb.sql(f"copy (select 'https://example.com/' || i || '.jpg' as url, 'a star' as caption from range(3) t(i)) "
               f"to '{path}' (format parquet)")  # fmt: skip


def write_votes(folder: Path, path: Path) -> None:
    """Write votes as a page saves them."""
    votes = {"format": "ldm_lab votes", "comparison": "0" * 16, "title": "two", "columns": ["a", "b"], "rows": 2,
             "voter": path.stem, "saved": "2026-01-02T03:04:05+00:00", "votes": [{"row": 0, "choice": 1}]}  # fmt: skip
    path.write_text(json.dumps(votes))


def write_dogglide(folder: Path, path: Path) -> None:
    """Write a state dict of GLIDE's kind."""
    torch.manual_seed(0)
    torch.save(GlideUNet(3, tiny_glide.conditions(261, 5), **GLIDE).state_dict(), path)


def write_head(folder: Path, path: Path) -> None:
    """Write a head of another program's: two layers on embeddings of 512 numbers."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(512, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, path)


def write_clip_model(folder: Path, path: Path) -> None:
    """Train a model that is conditioned on ViT-B/32."""
    Store.take_here(folder, "checkpoints/ViT-B-32.pt")
    section = "{name: clip, model: ViT-B-32-quickgelu, pretrained: openai, weights: checkpoints/ViT-B-32.pt}"
    train_in(folder, "quickstart", "run=clip", "cache=null", f"conditioner={section}", "demo=null")
    shutil.copy(folder / "runs" / "clip" / "ema.safetensors", path)


# What makes the things that a page begins with, by where they lie.
MADE: dict[str, Callable[[Path, Path], None]] = {
    "runs/quickstart": of_recipe("quickstart"),
    "runs/a": of_recipe("quickstart"),
    "runs/b": of_recipe("quickstart", "seed=1"),
    "runs/mine": of_recipe("quickstart"),
    "runs/yfcc_cfg": of_recipe("yfcc_cfg", SHARD, "ema_snapshots.every=1", "ema_snapshots.widths=[0.05,0.1]"),
    "runs/style": train_lora,
    "runs/ae": of_recipe("quickstart_autoencoder"),
    "runs/glide_quickstart": of_recipe("glide_quickstart"),
    "runs/glide_quickstart_upsampler": of_recipe("glide_quickstart_upsampler"),
    "runs/sf_v1_1": of_recipe("sf_v1_1", SHARD),
    "released/ccld": of_recipe("yfcc_cfg", SHARD),
    "released/glide_base": of_recipe("glide_finetune_base", "init_from=null", PAIRS),
    "released/glide_upsample": of_recipe("glide_finetune_upsampler", "init_from=null", PAIRS),
    "released/shared": write_shared,
    "released/if_i": write_if,
    "released/if_ii": write_if,
    "t5": write_t5,
    "checkpoints/t5": write_t5,
    "released/aesthetic.pth": write_aesthetic,
    "released/inception.pth": write_inception,
    "vit_b_32_embeddings": write_rating_embeddings,
    "released/kl-f8.ckpt": write_released_autoencoder,
    "checkpoints/ViT-B-32.pt": write_vit,
    "checkpoints/kl-f8.zip": write_zip,
    "epoch=2-step=249999.ckpt": write_original,
    "epoch=9-step=250000.ckpt": write_original,
    "out/quickstart": write_samples,
    "b.safetensors": write_lora,
    "secret.txt": write_text("a long password\n"),
    "ratings.csv": write_text("key,stars\n" + "".join(f"{n:05},{n % 5}\n" for n in range(32))),
    "urls.parquet": write_urls,
    "votes-a.json": write_votes,
    "votes-b.json": write_votes,
    "ViT-B-32.pt": write_vit,
    "dogGLIDE.pt": write_dogglide,
    "nsfw.pth": write_head,
    "model.safetensors": write_clip_model,
    **dict.fromkeys(("dog.png", "sea.jpg", "mask.png"), write_picture),
}
