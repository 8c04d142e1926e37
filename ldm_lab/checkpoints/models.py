"""A trained diffusion model out of a file of any format."""

from pathlib import Path

from ldm_lab.checkpoints.importer import LoadedModel, Section, detect_format


def read_model(path: str | Path, ema: bool = True, overrides: Section | None = None) -> LoadedModel:
    """Return a trained model.

    Args:
        path: our `ema.safetensors` or a run's folder with it, a `.ckpt` of a run, or another program's file;
            `resolve_weights` finds it.
        ema: of a training checkpoint, take the averaged weights; else those as trained.
        overrides: of another program's file, what it does not say of its architecture.

    Raises:
        UserError: missing, damaged or unknown file, or one that holds no trained model.
    """
    found = detect_format(path, "checkpoint")
    return found.importer.read_model(found.file, ema, overrides or Section())
