"""A diffusion run small enough for tests: random frozen parts, a handful of drawn images, a network of a few thousand
parameters. The training programs are started on it as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import warm

from ldm_lab.checkpoints.native import save_part
from ldm_lab.conditions import ConditionSpec, Embedding
from ldm_lab.config import build, parts, to_yaml
from ldm_lab.data.shapes import write_shards

ROOT = Path(__file__).resolve().parents[1]
WARM = sys.platform == "linux"  # whether programs can be copies of a process that has imported torch
AUTOENCODER = {"name": "kl_f8", "ch": 8, "norm_groups": 4, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
KL_F8 = {
    "name": "kl_f8",
    "ch": 32,
    "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
}  # 32 norm groups, as original files have
CLOOB = {
    "name": "cloob", "image_size": 32, "patch_size": 16, "image_width": 32, "image_layers": 1, "image_heads": 2,
    "text_width": 32, "text_layers": 1, "text_heads": 2, "text_size": 24, "vocab_size": 600, "embed_dim": 16,
}  # fmt: skip
DENOISER = {
    "name": "ccld_unet", "base_channels": 16, "multipliers": [1, 2], "blocks_per_level": 1, "mapping_width": 32,
    "head_width": 16,
}  # fmt: skip


def shipped(role: str) -> set[str]:
    """Return the names of the package's own parts of a role: other tests may have registered more."""
    return {name for name, cls in parts(role).items() if cls.__module__.partition(".")[0] == "ldm_lab"}


def embedding(width: int) -> ConditionSpec:
    """Return the conditions of a denoiser that takes an embedding alone."""
    return {"embed": Embedding(width)}


def make_parts(folder: Path) -> dict[str, dict]:
    """Write random weights of the frozen parts; return the config sections that load them."""
    torch.manual_seed(0)
    sections = {}
    for role, section in (("autoencoder", AUTOENCODER), ("conditioner", CLOOB)):
        path = folder / f"{role}.safetensors"
        save_part(path, build(role, section), section)
        sections[role] = {"name": section["name"], "weights": str(path)}
    return sections


def make_run(folder: Path, images: int = 64, **sections: dict) -> Path:
    """Write everything that a tiny run needs below `folder`; return the path of its YAML. `sections` replace keys."""
    write_shards(folder / "shards", count=images, shards=4, size=64, seed=0)
    (folder / "prompts.txt").write_text("a red circle\na blue square\na green star\n")
    config = {
        "task": "diffusion", "run": "tiny", "seed": 1,
        "data": {"name": "webdataset", "shards": str(folder / "shards" / "*.tar"), "image_size": 64, "batch_size": 4,
                 "workers": 0, "crop": "random", "flip": True},
        **make_parts(folder),
        "denoiser": DENOISER, "objective": {"name": "v_cosine"}, "optim": {"lr": 1e-3},
        "ema": {"from_step": [0, 5], "decay": [0.5, 0.9]},
        "trainer": {"accelerator": "cpu", "max_steps": 6, "threads": 1},
        "checkpoint": {"every": 3, "keep": 2}, "logging": {"every": 1},
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(config))
    return path


def run_program(*args: str | Path, cwd: Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess:
    """Run `python ARGS...` in a process of its own, from the folder `cwd`, with the repository's packages.

    A script or a module runs in a copy of a process that has imported torch (`warm`), where there can be one.
    """
    words = list(map(str, args))
    if not WARM or (words[0].startswith("-") and words[0] != "-m"):
        return run_fresh(*words, cwd=cwd, timeout=timeout, **env)
    with warm.Program(words, cwd, program_environment(env)) as program:
        return subprocess.CompletedProcess(words, program.wait(timeout), *program.printed())


def run_fresh(*args: str | Path, cwd: Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess:
    """Run `python ARGS...` as a user would: the interpreter has nothing imported at first."""
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env=program_environment(env),
    )  # fmt: skip


def program_environment(more: dict[str, str]) -> dict[str, str]:
    """Return the environment of a program that a test starts."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", **more}
