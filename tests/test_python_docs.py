"""docs/python.md: its blocks run one after the other, as they stand."""

import re
from pathlib import Path

import pytest
import tiny_glide
import torch
from tiny import DENOISER, ROOT, embedding, make_parts, make_run

from ldm_lab.checkpoints.native import save_model
from ldm_lab.config import build, registry

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


def write_models(folder: Path) -> None:
    """Write what the page takes for granted: a quickstart run, the two of GLIDE, and a run's YAML."""
    run = folder / "runs" / "quickstart"
    run.mkdir(parents=True)
    config = {"task": "diffusion", **make_parts(run), "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"]["dropout"] = 0.2
    torch.manual_seed(0)
    state = build("denoiser", DENOISER, 4, embedding(16)).state_dict()
    save_model(run / "ema.safetensors", state, config, {"image_size": "32"})
    for name, form in (("glide_quickstart", {}), ("glide_quickstart_upsampler", {"upsampler": True})):
        (folder / "runs" / name).mkdir()
        tiny_glide.write(folder / "runs" / name / "ema.safetensors", **form)
    make_run(folder, images=16)


@pytest.mark.slow
def test_the_blocks_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    namespace: dict[str, object] = {}
    try:
        for block in BLOCKS:
            exec(compile(block, "docs/python.md", "exec"), namespace)
    finally:
        registry._registry.pop(("sampler", "plain_euler"), None)  # the page's own
    assert (tmp_path / "star.png").exists() and (tmp_path / "film.gif").exists()
    assert "size 100x100: this model takes multiples of 16 pixels" in capsys.readouterr().out
