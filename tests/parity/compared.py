"""Networks with a recorded case's weights in them, compared with what the originals made of its inputs."""

import torch
from recorded import Case
from torch import nn

from ldm_lab.autoencoders.kl_f8 import kl, split_moments
from ldm_lab.batch import Batch


def check_unet(recorded: Case, net: nn.Module) -> None:
    """Compare a CCLD U-Net."""
    for name in recorded.suffixes("x_"):
        x, t, embed = (recorded.inputs[f"{what}_{name}"] for what in ("x", "t", "embed"))
        recorded.check(f"v_{name}", net(x, t, embed))
        if f"mapping_{name}" in recorded.names:
            recorded.check(f"mapping_{name}", net.conditioning(t, embed))


def check_glide(recorded: Case, net: nn.Module) -> None:
    """Compare a GLIDE U-Net of any form, with and without what may be left out, and its text transformer."""
    given, channels = recorded.inputs, net.channels

    def run(suffix: str, t: torch.Tensor, x: torch.Tensor, **cond: torch.Tensor) -> None:
        text = {"token_ids": given["tokens"][: len(x)], "token_ids_mask": given["mask"][: len(x)]}
        out = net(x, t[: len(x)], **text, **cond)  # [B, 2C, h, w]
        recorded.check(f"eps{suffix}", out[:, :channels])
        if f"var{suffix}" in recorded.names:
            recorded.check(f"var{suffix}", out[:, channels:])

    cond = {name: given[name] for name in ("low_res", "inpaint_image", "inpaint_mask") if name in given}
    if "clip_emb" in given:
        cond["clip_embed"] = given["clip_emb"]
    run("", given["t"], given["x"], **cond)
    if "t_fractional" in given:
        run("_fractional", given["t_fractional"], given["x"], **cond)
    if "x_wide" in given:
        run("_wide", given["t"], given["x_wide"], low_res=given["low_res_wide"])
    if "inpaint_image" in net.spec:
        run("_no_inpaint", given["t"], given["x"], **{name: cond[name] for name in cond if name == "low_res"})
    if "clip_emb" in given:
        run("_without_clip", given["t"], given["x"])
        run("_zero_clip", given["t"], given["x"], clip_embed=torch.zeros_like(given["clip_emb"]))
    if "xf_proj" in recorded.names:
        pooled, sequence = net.encode_text(given["tokens"], given["mask"])
        recorded.check("xf_proj", pooled)
        recorded.check("xf_out", sequence)
        recorded.check("time_emb", net.time_embedding(given["t"]))


def check_autoencoder(recorded: Case, net: nn.Module) -> None:
    """Compare a KL autoencoder; its latent std is set to the case's."""
    for name in recorded.suffixes("image_"):
        image, latent, noise = (recorded.inputs[f"{what}_{name}"] for what in ("image", "latent", "noise"))
        net.latent_std.fill_(1.0)
        recorded.check(f"moments_{name}", net.raw_moments(image))
        recorded.check(f"sample_{name}", net.encode(image, noise))
        recorded.check(f"decoded_{name}", net.decode(latent))
        net.latent_std.fill_(recorded.config["autoencoder_scale"])
        recorded.check(f"scaled_{name}", net.encode(image, noise))
        if f"decoded_scaled_{name}" in recorded.names:
            recorded.check(f"decoded_scaled_{name}", net.decode(recorded.recorded(f"scaled_{name}")))
    net.latent_std.fill_(1.0)
    for name in recorded.suffixes("moments_"):
        mean, logvar = split_moments(recorded.inputs[f"moments_{name}"])
        recorded.check(f"mean_{name}", mean)
        recorded.check(f"logvar_{name}", logvar)
        recorded.check(f"std_{name}", net.sample(torch.zeros_like(mean), logvar, torch.ones_like(mean)))
        recorded.check(f"kl_{name}", kl(mean, logvar))


def check_cloob(recorded: Case, cloob: nn.Module) -> None:
    """Compare a CLOOB's preprocessing and its two towers."""
    pixels, tokens = recorded.inputs["pixels"], recorded.inputs["tokens"].long()
    recorded.check("resized", cloob.resize(pixels))
    recorded.check("normalized", cloob.normalize(recorded.recorded("resized")))
    recorded.check("image_prenorm", cloob.image_encoder(recorded.recorded("normalized")))
    batch = Batch([""] * len(pixels), [""] * len(pixels), pixels * 2 - 1)
    recorded.check("image_embed", cloob.from_batch(batch)["embed"])
    recorded.check("text_prenorm", cloob.text_encoder(tokens))
    cloob.tokenize = lambda texts, warn: tokens  # the case has no texts for its tiny vocabulary
    recorded.check("text_embed", cloob.encode_text(["a text"] * len(tokens)))
