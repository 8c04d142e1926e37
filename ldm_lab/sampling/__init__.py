"""From prompts to pictures.

    from ldm_lab.sampling import Pipeline, SamplingOptions

    pipeline = Pipeline.from_checkpoint("runs/quickstart/ema.safetensors")
    pictures = pipeline(["a red star", ["watercolor", "blurry:-0.5"]], SamplingOptions(guidance=3.0))

Three values come first, and everything else is a function of them:

`options`         SamplingOptions: every choice about how pictures are made; ModelOptions: how a model is loaded
`model`           Model: the parts of a trained model, and where they run; `loading` takes them out of a checkpoint
`prompts`         PromptBatch: weighted prompts, encoded

`request`         what is asked, checked against the model before any work
`pipeline`        from prompts to pictures, in numbered steps
`image_to_image`  images to begin with: img2img, inpainting
`loras`           LoRAs in a model's weights, added and taken out again
`stages`          models in a row: a base model and upsamplers
`interpolation`   from one prompt to the next
`rerank`          the best of several pictures
`aesthetic`       prompts guided toward a rating, by mean embeddings of images of that rating
`decode`          from latents to pictures, at once or in tiles
`output`          a folder of numbered pictures, their settings, grids, films

What imports torch is not imported before it is asked for: `options` is readable without it.
"""

from typing import TYPE_CHECKING

from ldm_lab.sampling.options import ModelOptions, SamplingOptions

if TYPE_CHECKING:
    from ldm_lab.sampling._public import Public
    from ldm_lab.sampling.aesthetic import Aesthetic, RatingEmbeddings
    from ldm_lab.sampling.decode import Sample
    from ldm_lab.sampling.interpolation import interpolate
    from ldm_lab.sampling.loras import applied_loras
    from ldm_lab.sampling.model import Model
    from ldm_lab.sampling.pipeline import Pipeline
    from ldm_lab.sampling.stages import Stage, Stages

__all__ = [
    "Aesthetic", "Model", "ModelOptions", "Pipeline", "RatingEmbeddings", "Sample", "SamplingOptions", "Stage",
    "Stages", "applied_loras", "interpolate",
]  # fmt: skip


def __getattr__(name: str) -> "Public":
    """Return a public name whose module imports torch (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from ldm_lab.sampling._public import PUBLIC

    return PUBLIC[name]
