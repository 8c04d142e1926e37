"""Going on with a run in another precision, as the guard has asked for it."""

from dataclasses import replace

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.config import PartConfig, Plain, RunConfig
from ldm_lab.training.guard import Guard
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.resume import Resume


def with_options(config: RunConfig, section: str, options: dict[str, Plain]) -> RunConfig:
    """Return a run with other options of a section."""
    part = config.part(section)
    return config.with_part(section, replace(part, options={**part.options, **options}))


def gone_on(config: RunConfig, precision: str) -> RunConfig:
    """Return the run that goes on from its own last checkpoint in another precision."""
    schedule = config.part("resume").option("schedule")  # without it the same command would begin a schedule twice
    config = config.with_part("resume", PartConfig("resume", "resume", {"checkpoint": "last", "schedule": schedule}))
    return with_options(config, "trainer", {"precision": precision})


def in_changed_precision(config: RunConfig, resume: Resume) -> RunConfig:
    """Return the run in the precision that its guard had changed to when the checkpoint was saved, which is said.

    So the command that started a run goes on with it, too. Without `guard.precision` the config's precision holds.
    """
    wanted = config.part("guard").option("precision")
    if resume.path is None or wanted is None:
        return config
    state = read_pickled(resume.path, mmap=True).get("callbacks", {}).get(Guard.__qualname__, {})
    changed = state.get("precision")
    if changed is None or changed == config.part("trainer").option("precision"):
        return config
    print_rank_zero(f"guard: this run has gone over to trainer.precision={changed} (guard.precision), and stays there")
    return with_options(config, "trainer", {"precision": changed})
