"""From prompts to pictures.

    from ldm_lab.sampling import Sampler

    sampler = Sampler.from_checkpoint("runs/quickstart/ema.safetensors")
    images = sampler(["a red star on a blue background", ["watercolor", "blurry:-0.5"]], seeds=[0, 1], guidance=3.0)

`sampler`        conditioner, guided denoiser, sampler and autoencoder put together; `sample.py` and training's demo
                 grids are thin layers over it
`cascade`        a base model and the upsampler that enlarges its pictures
`clip_guidance`  a noised CLIP that leads towards a text
`limits`         clean estimates kept where pixels can be
`from_image`     where sampling begins or what it keeps: image to image, inpainting
`aesthetic`      prompts led to a rating, by mean embeddings of images of that rating
`interpolation`  from one prompt to another
`tiles`          decoding pictures that are too large to be decoded at once
"""

from ldm_lab.guidance.clip import ClipGuidance
from ldm_lab.sampling.aesthetic import Aesthetic, RatingEmbeddings
from ldm_lab.sampling.image_to_image import Start
from ldm_lab.sampling.pipeline import Picture, Sampler, as_mix
from ldm_lab.sampling.stages import Cascade, Upsampling

__all__ = [
    "Aesthetic",
    "Cascade",
    "ClipGuidance",
    "Picture",
    "RatingEmbeddings",
    "Sampler",
    "Start",
    "Upsampling",
    "as_mix",
]
