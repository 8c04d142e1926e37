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
from ldm_lab.sampling import Sampler

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


class Tape(Sampler):
    """A Sampler that starts from recorded noise and draws recorded noise."""

    noise: Tensor  # [1 + steps, B, C, h, w], of one batch

    def latents(self, walk, latent_size, *args, **options):
        """Return what `Sampler.latents` does, with the tape in place of the seeds."""
        tape, randn = iter(self.noise.flatten(0, 1)), torch.randn  # the draws of all pictures in turn
        torch.randn = lambda *size, generator=None: next(tape) if generator is not None else randn(*size)
        try:
            return super().latents(walk, latent_size, *args, **options)
        finally:
            torch.randn = randn


def stage(recorded: Case, part: str, folder: Path, noise: Tensor) -> Tape:
    """Return one of the pipeline's two models as a Sampler."""
    config = recorded.config[part]
    (folder / part).mkdir()
    net = glide_network(recorded.part(f"{part}/"), config["model"], folder / part)
    sampler = Tape(
        net,
        objective_of(config["diffusion"]),
        IdentityAutoencoder(),
        GlideText(text_size=config["model"]["text_ctx"]),
        sources=build_sources({"low_res": {}} if "low_res" in net.spec else {}),
        dropout=0.1,
        size=(config["side"], config["side"]),
    )
    sampler.noise = noise
    return sampler


@torch.no_grad()
def test_base_and_upsampler(case, merges, tmp_path):
    recorded = case("glide_pipeline")
    config, given, prompt = recorded.config, recorded.inputs, recorded.config["prompt"]
    count = config["batch_size"]
    base = stage(recorded, "base", tmp_path, given["base_noise"][:, :count])  # the rest is the unguided half's
    tokens = [base.conditioner.from_prompts([text] * count, []) for text in (prompt, "")]
    recorded.check("tokens", torch.cat([cond["token_ids"] for cond in tokens]))
    recorded.check("mask", torch.cat([cond["token_ids_mask"] for cond in tokens]).long())

    def sampling(part: str) -> dict:
        name = config[part]["sampler"]
        sampler = {**SAMPLERS[name], "steps": kept(config[part]["diffusion"])}
        return {"sampler": sampler, "clamp": name not in UNCLAMPED}

    (pictures,) = base.pictures([prompt] * count, guidance=config["guidance_scale"], **sampling("base"))
    pixels = torch.stack([picture.pixels for picture in pictures])  # [B, 3, h, w]
    recorded.check("base_sample", pixels)
    recorded.check("low_res", round_to_uint8(pixels))

    upsampler = stage(recorded, "upsample", tmp_path, given["upsample_noise"])
    low_res = round_to_uint8(given["low_res_in"])
    (pictures,) = upsampler.pictures([prompt] * count, low_res=low_res, guidance=1.0, **sampling("upsample"))
    recorded.check("upsampled", torch.stack([picture.pixels for picture in pictures]))
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
