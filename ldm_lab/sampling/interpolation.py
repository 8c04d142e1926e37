"""From one prompt to the next: conditions on the way between keyframes, with the noise held fixed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.conditions import Conditions
from ldm_lab.errors import UserError
from ldm_lab.sampling.decode import Sample
from ldm_lab.sampling.options import NOT_INTERPOLATED, SamplingOptions
from ldm_lab.sampling.pipeline import Draw, Pipeline, Progress
from ldm_lab.sampling.prompts import PromptBatch, PromptMix
from ldm_lab.sampling.request import Request


def interpolate(
    pipeline: Pipeline,
    keyframes: list[PromptMix],
    frames: int,
    options: SamplingOptions | None = None,
    progress: Progress | None = None,
) -> Iterator[list[Sample]]:
    """Return an iterator over pictures on the way from each prompt to the next, all of the noise of `options.seed`.

    Args:
        pipeline: of a base model.
        keyframes: two or more, each one prompt; their weights are interpolated, too.
        frames: pictures in all, evenly spread, at least as many as keyframes.
        options: all choices.
        progress: as for `Pipeline.samples`.

    Raises:
        UserError: too few keyframes or frames, an option that makes no sense here (`NOT_INTERPOLATED`), a model whose
            conditioner has no embeddings, what `Pipeline.check` raises.
    """
    request = check(pipeline, keyframes, frames, options)
    batch = interpolate_prompts(pipeline.encode(request), frames)
    draws = [Draw(frame, request.seeds[0]) for frame in range(frames)]
    return pipeline.draw(request, batch, draws, progress)


def check(
    pipeline: Pipeline, keyframes: list[PromptMix], frames: int, options: SamplingOptions | None = None
) -> Request:
    """Return the request for the keyframes. Raises UserError as `interpolate` does, before any work."""
    options = options or SamplingOptions()
    given = options.given()
    if unfit := [name for name in NOT_INTERPOLATED if name in given]:
        raise UserError(f"interpolation: does not go with {unfit[0]}")
    request = pipeline.check(keyframes, options)
    if len(request.mixes) < 2 or any(len(mix) != 1 for mix in request.mixes):
        raise UserError("interpolation: two or more keyframes of one prompt each are needed")
    if frames < len(request.mixes):
        raise UserError(f"interpolation: {frames} frames are fewer than the {len(request.mixes)} prompts")
    if pipeline.model.embed_width is None:
        raise UserError("interpolation: this model's conditioner has no embeddings to interpolate")
    return request


def interpolate_prompts(keyframes: PromptBatch, frames: int) -> PromptBatch:
    """Return the prompts of `frames` pictures, one each, evenly spread over those of the keyframes."""
    rows, null = (
        {name: value[keyframes.index[:, 0].to(value.device)] for name, value in conditions.items()}
        for conditions in (keyframes.conditions, keyframes.null)
    )  # [S, ...] each
    weights = F.interpolate(keyframes.weights.T[None], frames, mode="linear", align_corners=True)[0].T  # [frames, 1]
    film, null = interpolate_conditions(rows, frames), interpolate_conditions(null, frames)  # [frames, ...] each
    return PromptBatch(film, torch.arange(frames)[:, None], weights, null)


def interpolate_conditions(keyframes: Conditions, frames: int) -> Conditions:
    """Return the conditions of a film that goes through all given ones in turn.

    Args:
        keyframes: tensors of [S, ...] with S >= 2.
        frames: in all, at least S >= 2; they are spread evenly over the S - 1 segments.

    Returns:
        Tensors of [frames, ...], the first and the last frame those of the first and the last keyframe.
    """
    segments = len(next(iter(keyframes.values()))) - 1
    film: dict[str, list[Tensor]] = {name: [] for name in keyframes}
    for frame in range(frames):
        place = frame * segments / (frames - 1)
        segment = min(math.floor(place), segments - 1)
        for name, value in keyframes.items():
            film[name].append(slerp(value[segment].float(), value[segment + 1].float(), place - segment))
    return {name: torch.stack(values) for name, values in film.items()}


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return what lies `share` of the way from a to b, [..., D], along the great circle (Shoemake 1985).

    Lengths are interpolated evenly; opposite or zero vectors, which have no great circle, are interpolated straight.
    """
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)  # [..., 1] each
    unit_a, unit_b = a / length_a.clamp(min=1e-12), b / length_b.clamp(min=1e-12)  # [..., D] each
    angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).acos()  # [..., 1]
    sine = angle.sin()  # [..., 1]
    round_way = ((1 - share) * angle).sin() / sine * unit_a + (share * angle).sin() / sine * unit_b  # [..., D]
    direction = torch.where(sine > 1e-4, round_way, torch.lerp(unit_a, unit_b, share))  # [..., D]
    return direction * torch.lerp(length_a, length_b, share)  # [..., D]
