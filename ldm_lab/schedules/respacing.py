"""Respacing: which timesteps of a discrete schedule a sampler visits, in the notation of guided-diffusion and GLIDE.

27             evenly spread over all T timesteps, the first and the last among them
10,10,3,2,2    T cut into equal sections, so many of each, evenly spread
fast27         GLIDE's schedule for upsampling: 10,10,3,2,2, but for the last timestep, T - 1, which becomes T - 3
ddim50         every (whole number)-th timestep from 0 on
"""

import re

from ldm_lab.errors import UserError

# A number of steps, or a respacing as above.
Steps = int | str

FAST27 = "10,10,3,2,2"
EVEN_STEPS = re.compile(r"ddim(\d{1,9})")
SECTIONS = re.compile(r"\d{1,9}(,\d{1,9})*")


def num_steps(steps: Steps) -> int:
    """Return how many timesteps a respacing keeps. Raises UserError for what is no respacing."""
    if isinstance(steps, int):
        kept = steps
    elif steps == "fast27":
        kept = 27
    elif match := EVEN_STEPS.fullmatch(steps):
        kept = int(match[1])
    elif SECTIONS.fullmatch(steps):
        kept = sum(map(int, steps.split(",")))
    else:
        raise UserError(
            f"steps: a number, or a respacing such as fast27, ddim50 or 10,10,3,2,2 is needed, not {steps!r}"
        )
    if kept < 1:
        raise UserError(f"steps: at least 1 is needed, not {steps}")
    return kept


def kept_timesteps(timesteps: int, steps: Steps) -> list[int]:
    """Return the timesteps, of 0 .. timesteps - 1, that a respacing keeps, rising.

    As `space_timesteps` in guided-diffusion's respace.py, but for a single step in all, which is the noisiest one there
    is: the original takes timestep 0, from which there is nothing to sample.

    Raises:
        UserError: there are not that many timesteps in a section, or no whole stride leads to that many.
    """
    if num_steps(steps) == 1:
        return [timesteps - 1]
    if steps == "fast27":
        return sorted({*kept_timesteps(timesteps, FAST27), timesteps - 3} - {timesteps - 1})
    if isinstance(steps, str) and (match := EVEN_STEPS.fullmatch(steps)):
        return _strided(timesteps, int(match[1]))
    counts = [steps] if isinstance(steps, int) else [int(part) for part in steps.split(",")]
    size, more = divmod(timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for i, wanted in enumerate(counts):
        section = size + (i < more)
        if wanted > section:
            where = f"section {i + 1} of {len(counts)} has" if len(counts) > 1 else "the model has"
            raise UserError(f"steps {steps}: {where} {section} timesteps, of which {wanted} cannot be taken")
        stride = (section - 1) / (wanted - 1) if wanted > 1 else 1.0
        place = 0.0
        for _ in range(wanted):  # summed up, and rounded half to even, as in the original: it shows in e.g. 19 or 55
            kept.append(start + round(place))
            place += stride
        start += section
    return kept


def _strided(timesteps: int, wanted: int) -> list[int]:
    """Return the timesteps 0, stride, 2 stride, ..., exactly `wanted` of them."""
    possible = {len(range(0, timesteps, stride)): stride for stride in range(timesteps, 0, -1)}
    if wanted not in possible:
        below = max((n for n in possible if n < wanted), default=None)
        above = min((n for n in possible if n > wanted), default=None)
        near = " and ".join(f"ddim{n}" for n in (below, above) if n is not None)
        raise UserError(
            f"steps ddim{wanted}: no whole stride through {timesteps} timesteps makes {wanted}; the nearest are {near}"
        )
    return list(range(0, timesteps, possible[wanted]))
