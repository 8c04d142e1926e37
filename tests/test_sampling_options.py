"""What sampling offers beside prompts: negative prompts, reranking, films, tiles, precision, memory, autoguidance."""

from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops
from test_sampling import BOUND, CPU, latents, options, raw
from tiny import DENOISER, embedding, make_parts

from ldm_lab.checkpoints.native import save_model
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Autoencoder
from ldm_lab.sampling import Model, Pipeline, SamplingOptions, interpolate
from ldm_lab.sampling.decode import decode_in_tiles
from ldm_lab.sampling.interpolation import interpolate_conditions, slerp
from ldm_lab.sampling.output import save_gif
from ldm_lab.sampling.rerank import similarity


def again(pipeline, **changes):
    """A pipeline over the same model with other values."""
    return Pipeline(replace(pipeline.model, **changes))


def test_a_negative_prompt_takes_the_place_of_no_prompt(pipeline):
    written = raw(pipeline, [["red:3", "blue:-2"]], [5], 1)
    steps = {"name": "ddpm", "steps": 4}
    negative = latents(pipeline, ["red"], [5], negative="blue", sampler=steps)
    mixed = latents(pipeline, [["red:3"], ["red:1", "old:1", "new:1"]], [5, 6], negative="blue", sampler=steps)
    assert torch.allclose(negative, written, atol=1e-5)
    # Whatever an image's own number of prompts, the negative one has the weight that they leave.
    assert torch.allclose(mixed[:1], written, atol=1e-3)
    assert torch.equal(latents(pipeline, ["red"], [5], negative="", sampler=steps), raw(pipeline, ["red"], [5], 1))


def test_a_model_without_dropped_conditions_takes_a_negative_prompt(parts):
    plain = Pipeline(Model(**parts, dropout=0.0, image_size=(32, 32)))
    assert plain(["red"], options(negative="blue"))


def test_guidance_in_an_interval_of_times(pipeline):
    def made(guidance, **choices):
        return latents(pipeline, ["red"], guidance=guidance, sampler={"name": "ddim", "steps": 6}, **choices)

    assert torch.equal(made(3.0), made(3.0, guidance_interval=(0.0, 1.0)))
    assert torch.equal(made(3.0, guidance_interval=(0.0, 0.0)), made(1.0))  # never: the last time is above 0
    inside = made(3.0, guidance_interval=(0.3, 0.8))
    assert not torch.allclose(inside, made(3.0), atol=1e-4) and not torch.allclose(inside, made(1.0), atol=1e-4)
    for interval in ((0.5, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)):
        with pytest.raises(UserError, match="guidance_interval"):
            SamplingOptions(guidance_interval=interval)
    for rescale in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="guidance_rescale"):
            SamplingOptions(guidance_rescale=rescale)


def test_the_best_of_several_candidates(pipeline):
    conditioner = pipeline.model.conditioner
    candidates = pipeline(["red", "blue"] * 3, options(batch_size=4), seeds=[7, 8, 9, 10, 11, 12])
    assert [image.info["seed"] for image in candidates] == [7, 8, 9, 10, 11, 12]
    embeds = [conditioner.from_prompts([text], [])["embed"] for text in ("red", "blue")]
    scores = [similarity(pipeline.model, image, embeds[i % 2], torch.ones(1)) for i, image in enumerate(candidates)]
    batches = list(pipeline.samples(["red", "blue"], options(batch_size=4, rerank=3), seeds=[7, 8]))
    best = [sample for batch in batches for sample in batch]
    for i, sample in enumerate(best):
        mine = range(i, 6, 2)
        assert sample.similarity == pytest.approx(max(scores[j] for j in mine), abs=1e-5)
        chosen = max(mine, key=lambda j: scores[j])
        assert sample.seed == 7 + chosen
        assert sample.image.info == {"seed": sample.seed, "similarity": sample.similarity}
    # By hand: the cosine of the conditioner's own embeddings, of unit length.
    image_embed = conditioner.from_prompts([], [best[0].image])["embed"]
    assert best[0].similarity == pytest.approx((image_embed @ embeds[0].T).item(), abs=1e-5)
    with pytest.raises(UserError, match="rerank: at least 1"):
        SamplingOptions(rerank=0)
    blind = again(pipeline, conditioner=build("conditioner", {"name": "none", "embed_dim": 16}))
    with pytest.raises(UserError, match="this model is unconditional"):
        blind.check(["red"], options(rerank=2))


def test_a_compiled_denoiser_makes_the_same_pictures(parts, tmp_path, monkeypatch):
    config = {**make_parts(tmp_path), "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"]["dropout"] = 0.1
    save_model(tmp_path / "ema.safetensors", parts["denoiser"].state_dict(), config, {"image_size": "32"})
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend=count))
    path = tmp_path / "ema.safetensors"
    compiled, plain = (Pipeline.from_checkpoint(path, replace(CPU, compile=c)) for c in (True, False))
    assert compiled(["red"], options())[0].tobytes() == plain(["red"], options())[0].tobytes()
    assert graphs


def film(pipeline, keyframes, frames, **choices):
    batches = interpolate(pipeline, keyframes, frames, options(**choices))
    return [sample.image for batch in batches for sample in batch]


def test_a_film_begins_and_ends_with_its_keyframes(pipeline):
    frames = film(pipeline, ["red", "blue:2", "green"], 5, seed=4, batch_size=2)
    keyframes = pipeline(["red", "blue:2", "green"], options(), seeds=[4, 4, 4])
    for frame, keyframe in zip(frames[::2], keyframes):
        difference = torch.tensor(list(frame.tobytes())) - torch.tensor(list(keyframe.tobytes()))
        assert difference.abs().max() <= 1
    assert len({frame.tobytes() for frame in frames}) == 5
    with pytest.raises(UserError, match="4 frames are fewer than the 5"):
        film(pipeline, ["a", "b", "c", "d", "e"], 4)
    for prompts in (["red"], ["red", ["blue", "green"]]):
        with pytest.raises(UserError, match="two or more keyframes of one prompt each"):
            film(pipeline, prompts, 4)
    with pytest.raises(UserError, match="interpolation: does not go with negative"):
        film(pipeline, ["red", "blue"], 4, negative="old")


def test_slerp_goes_evenly_along_the_great_circle():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=-1) for _ in range(2))
    whole = (a * b).sum(-1).acos()
    for share in (0.0, 0.25, 0.5, 1.0):
        point = slerp(a, b, share)
        assert torch.allclose(point.norm(dim=-1), torch.ones(3), atol=1e-5)
        assert torch.allclose((a * point).sum(-1).clamp(-1, 1).acos(), share * whole, atol=1e-3)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a, atol=1e-5)
    assert slerp(a, -a, 0.5).isfinite().all() and slerp(torch.zeros(1, 4), torch.ones(1, 4), 0.3).isfinite().all()
    way = interpolate_conditions({"embed": torch.eye(3)}, 7)["embed"]
    assert torch.allclose(way[[0, 3, 6]], torch.eye(3), atol=1e-6) and torch.allclose(way.norm(dim=-1), torch.ones(7))


def test_a_gif_runs_there_and_back(tmp_path):
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
    save_gif(tmp_path / "film.gif", frames)
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.n_frames, film.info["loop"]) == (6, 0)


class Local(Autoencoder):
    """A decoder that sees no further than one element: tiles have to give the very picture."""

    channels, downscale = 4, 4

    def __init__(self):
        super().__init__()
        self.largest = 0

    def decode(self, z):
        self.largest = max(self.largest, *z.shape[2:])
        return torch.nn.functional.interpolate(z[:, :3], scale_factor=4, mode="nearest")


@pytest.mark.parametrize("size", [(8, 8), (9, 30), (31, 17), (64, 8)])
def test_tiles_cover_every_pixel_once_in_sum(size):
    z = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    local = Local()
    assert torch.allclose(decode_in_tiles(local, z, tile=8, overlap=2), Local().decode(z), atol=1e-5)
    assert local.largest <= 8


class Apart(Autoencoder):
    """A decoder whose norm sees a tile in place of the whole."""

    channels, downscale = 4, 1

    def decode(self, z):
        return z[:, :3] - z[:, :3].mean((2, 3), keepdim=True)


def test_colors_that_differ_from_tile_to_tile_are_told(caplog):
    z = torch.linspace(-1, 1, 32).expand(1, 4, 32, 32)
    decode_in_tiles(Apart(), z, tile=16, overlap=4)
    assert [r.getMessage() for r in caplog.records] == [
        "tile: colors of neighboring tiles differ by up to 99 of 255 levels; larger tiles less so"
    ]
    caplog.clear()
    decode_in_tiles(Apart(), z, tile=32, overlap=8)
    decode_in_tiles(Local(), z, tile=16, overlap=4)
    assert not caplog.records


@pytest.mark.parametrize(
    "config",
    [
        {"ch_mult": [1, 2, 4], "num_res_blocks": 1},
        {"ch_mult": [1, 2, 2], "norm_groups": 8, "attn_resolutions": [128]},
        {"ch_mult": [1], "use_post_quant_conv": False},
    ],
    ids=lambda config: str(config["ch_mult"]),
)
def test_tiles_of_the_kl_autoencoder_are_the_whole_picture_s(config):
    torch.manual_seed(0)
    autoencoder = build("autoencoder", {"name": "kl_f8", "ch": 8, "norm_groups": 4, **config}).eval()
    autoencoder.set_latent_statistics(0.3, [1.7, 0.4, 1.0, 2.0])
    for size in ((9, 13), (4, 30), (8, 8)):
        z = 3 * torch.randn(2, 4, *size)  # [2, 4, h, w]
        whole = autoencoder.decode(z).detach()  # [2, 3, H, W]
        for tile in (4, 5):
            tiled = decode_in_tiles(autoencoder, z, tile, overlap=1)  # [2, 3, H, W]
            assert (tiled - whole).abs().max() < 1e-4 * whole.std()


def test_tiled_pictures_are_the_whole_ones(pipeline):
    whole = pipeline(["red"], options(size=128))[0]
    for tile in (32, 64):
        tiled = pipeline(["red"], options(size=128, tile=tile))[0]
        assert tiled.size == whole.size == (128, 128)
        assert max(high for _, high in ImageChops.difference(tiled, whole).getextrema()) <= 1
    assert pipeline(["red"], options(size=128, tile=128))[0].tobytes() == whole.tobytes()
    for tile in (8, 60):
        with pytest.raises(UserError, match="tile: a multiple of 8 pixels from 32 on"):
            pipeline.check(["red"], options(tile=tile))


@pytest.mark.parametrize("name", ["thresholding", "threshold_percentile", "threshold_divisor"])
def test_latents_have_no_range_to_be_kept_in(pipeline, name):
    given = {name: {"thresholding": "static", "threshold_percentile": 0.9, "threshold_divisor": 1.5}[name]}
    with pytest.raises(UserError, match="thresholding: this model makes latents"):
        pipeline.check(["red"], options(**given))
    assert pipeline.check(["red"], options(**given, clip_denoised=True)).options.thresholding is not None
    checked = pipeline.check(["red"], options()).options
    assert checked.thresholding is None and pipeline.check(["red"], checked).options == checked


def test_half_precision_is_near_full_precision(pipeline):
    full = raw(pipeline, ["red", "blue"], [0, 1], 2, "ddim")
    half = raw(again(pipeline, dtype=torch.bfloat16), ["red", "blue"], [0, 1], 2, "ddim")
    distance = ((half - full).norm() / full.norm()).item()
    assert half.dtype == torch.float32 and 1e-5 < distance < 0.05


def test_offloading_has_one_part_on_the_device_at_a_time(parts):
    where, peak = {}, []
    for role in ("denoiser", "autoencoder", "conditioner"):
        where[role] = "cpu"

    class Watched(torch.nn.Module):
        def __init__(self, role):
            super().__init__()
            self.role, self.part = role, parts[role]

        def to(self, device):
            where[self.role] = "cpu" if device == "cpu" else "device"
            peak.append(sum(place == "device" for place in where.values()))
            return self

        def __call__(self, *args, **kwargs):
            assert where[self.role] == "device"
            return self.part(*args, **kwargs)

        def __getattr__(self, name):
            if name in ("role", "part"):
                return super().__getattr__(name)
            if name in ("decode", "encode", "from_prompts"):
                assert where[self.role] == "device", name
            return getattr(self.part, name)

    watched = {role: Watched(role) for role in where}
    common = {"objective": parts["objective"], "dropout": 0.2, "image_size": (32, 32)}
    cheap = Pipeline(Model(**watched, **common, run_device=torch.device("cpu:0"), offload=True))
    plain = Pipeline(Model(**parts, dropout=0.2, image_size=(32, 32)))
    assert cheap(["red"], options())[0].tobytes() == plain(["red"], options())[0].tobytes()
    assert max(peak) == 1 and set(where.values()) == {"cpu"}


def test_autoguidance_leads_away_from_the_worse_model(pipeline):
    torch.manual_seed(1)
    guide_model = build("denoiser", DENOISER, 4, embedding(16)).eval()
    plain = raw(pipeline, ["red"], [0], 1, "ddim", guidance=1.0)
    same = raw(again(pipeline, guide_model=pipeline.model.denoiser), ["red"], [0], 1, "ddim", guidance=4.0)
    assert torch.allclose(same, plain, atol=1e-3)  # w * D + (1 - w) * D
    other = raw(again(pipeline, guide_model=guide_model, dropout=0.0), ["red"], [0], 1, "ddim", guidance=4.0)
    assert ((other - plain).norm() / plain.norm()).item() > 10 * BOUND
