"""GLIDE's pictures from end to end: base and upsampler together, and what becomes of pixels on the way."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from glide_networks import glide_network
from PIL import Image
from recorded import Case
from test_recorded_diffusion import SAMPLERS, UNCLAMPED, kept, objective_of
from torch import Tensor

from ldm_lab.autoencoders.identity import IdentityAutoencoder
from ldm_lab.condition_sources import build_sources
from ldm_lab.condition_sources.low_res import shrink
from ldm_lab.conditioners.glide_text import GlideText, gpt2_encoding
from ldm_lab.io.images import round_to_uint8, to_images, to_tensor
from ldm_lab.sampling import Model, Pipeline, SamplingOptions

SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"  # where GPT-2's merges may lie


@pytest.fixture
def merges(golden, tmp_path, monkeypatch):
    """GPT-2's merges in the cache of released files."""
    packed = [path for folder in (golden, SHARED) if (path := folder / "gpt2_bpe" / "vocab.bpe.gz").is_file()]
    if not packed:
        pytest.skip("GPT-2's merges are not here; they are not kept in the repository")
    (tmp_path / "gpt2/vocab.bpe").mkdir(parents=True)
    (tmp_path / "gpt2/vocab.bpe/vocab.bpe").write_bytes(gzip.decompress(packed[0].read_bytes()))
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path))
    gpt2_encoding.cache_clear()


class Tape:
    """Recorded noise in the place of the seeds'."""

    def __init__(self, noise: Tensor) -> None:
        """Take noise [1 + steps, B, C, h, w] of one batch."""
        self.noise = iter(noise)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the next noise, [B, C, h, w]."""
        return next(self.noise)


def stage(recorded: Case, part: str, folder: Path) -> Pipeline:
    """Return one of the two models as a pipeline."""
    config = recorded.config[part]
    (folder / part).mkdir()
    net = glide_network(recorded.part(f"{part}/"), config["model"], folder / part)
    model = Model(
        net,
        objective_of(config["diffusion"]),
        IdentityAutoencoder(),
        GlideText(text_size=config["model"]["text_ctx"]),
        build_sources({"low_res": {}} if "low_res" in net.spec else {}),
        dropout=0.1,
        image_size=(config["side"], config["side"]),
    )
    return Pipeline(model)


@torch.no_grad()
def test_base_and_upsampler(case, merges, tmp_path, monkeypatch):
    recorded = case("glide_pipeline")
    config, given, prompt = recorded.config, recorded.inputs, recorded.config["prompt"]
    count = config["batch_size"]
    base, upsampler = (stage(recorded, part, tmp_path) for part in ("base", "upsample"))
    tokens = [base.model.conditioner.from_prompts([text] * count, []) for text in (prompt, "")]
    recorded.check("tokens", torch.cat([cond["token_ids"] for cond in tokens]))
    recorded.check("mask", torch.cat([cond["token_ids_mask"] for cond in tokens]).long())

    def made(part: str, pipeline: Pipeline, noise: Tensor, guidance: float, low_res: Tensor | None = None) -> Tensor:
        """Return the pictures of a model, [B, 3, H, W]."""
        monkeypatch.setattr("ldm_lab.sampling.pipeline.SeededNoise", lambda seeds: Tape(noise))
        name = config[part]["sampler"]
        sampler = {**SAMPLERS[name], "steps": kept(config[part]["diffusion"])}
        unclamped = name in UNCLAMPED
        options = SamplingOptions(sampler=sampler, clip_denoised=not unclamped, guidance=guidance, temperature=1.0)
        (samples,) = pipeline.samples([prompt] * count, options, low_res=low_res)
        return torch.stack([sample.pixels for sample in samples])

    base_noise = given["base_noise"][:, :count]  # the rest is the unguided half's
    pixels = made("base", base, base_noise, config["guidance_scale"])  # [B, 3, h, w]
    recorded.check("base_sample", pixels)
    recorded.check("low_res", round_to_uint8(pixels))
    low_res = round_to_uint8(given["low_res_in"])
    recorded.check("upsampled", made("upsample", upsampler, given["upsample_noise"], 1.0, low_res))
    recorded.finish()


def test_pixels(case):
    """What the original programs make of pictures before training and after sampling.

    Ours squeeze no picture (`data.crop` is centre or random): where theirs do, the same libraries are called here with
    their settings, so that what is compared is our conversions.
    """
    recorded = case("glide_image_prep")
    side, factor = recorded.config["side"], recorded.config["upscale_factor"]
    for name in recorded.config["images"]:
        picture = Image.fromarray(recorded.inputs[name].numpy().astype(np.uint8))
        short = min(picture.size)
        left, top = ((side - short) // 2 for side in picture.size)
        square = picture.crop((left, top, left + short, top + short))

        def made(image: Image.Image, side: int, how: Image.Resampling) -> Tensor:
            return to_tensor(image.resize((side, side), how))  # [3, side, side]

        resampling = Image.Resampling
        recorded.check(f"{name}.folder_base", made(square, side, resampling.BILINEAR))
        high = made(square, side * factor, resampling.BILINEAR)  # [3, factor * side, factor * side]
        recorded.check(f"{name}.folder_high_res", high)
        recorded.check(f"{name}.folder_low_res", shrink(high[None], factor)[0])
        recorded.check(f"{name}.wds_low_res", made(picture, side, resampling.BICUBIC))
        recorded.check(f"{name}.wds_high_res", made(picture, side * factor, resampling.BICUBIC))
        recorded.check(f"{name}.laionide_base", made(square, side, resampling.LANCZOS))
        recorded.check(f"{name}.miniglide_base", (made(picture, side, resampling.BILINEAR) + 1) / 2)
    samples = recorded.inputs["samples"]
    for output, rounded in (("uint8_rounded", True), ("uint8_truncated", False)):
        images = to_images(samples, rounded)
        recorded.check(output, torch.from_numpy(np.stack([np.array(image) for image in images]).astype(np.int64)))
    recorded.check("low_res_quantised", round_to_uint8(samples))
    recorded.finish()
