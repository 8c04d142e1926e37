"""From prompts to pictures.

    from ldm_lab.sampling import Sampler

    sampler = Sampler.from_checkpoint("runs/quickstart/ema.safetensors")
    images = sampler(["a red star on a blue background", ["watercolor", "blurry:-0.5"]], seeds=[0, 1], guidance=3.0)

`sampler`        conditioner, guided denoiser, sampler and autoencoder put together; `sample.py` and training's demo
                 grids are thin layers over it
`from_image`     where sampling begins or what it keeps: image to image, inpainting
`aesthetic`      prompts led to a rating, by mean embeddings of images of that rating
`interpolation`  from one prompt to another
`tiles`          decoding pictures that are too large to be decoded at once
"""

from ldm_lab.sampling.aesthetic import Aesthetic, RatingEmbeddings
from ldm_lab.sampling.from_image import Start
from ldm_lab.sampling.sampler import Sampler, as_mix

__all__ = ["Aesthetic", "RatingEmbeddings", "Sampler", "Start", "as_mix"]
