"""A start without libraries that nothing here asks for.

torchmetrics, which Lightning brings, imports transformers wherever that is installed, for metrics of texts: 1.5 s and
60 MB at every start, and in every process that trains. Imported before Lightning, as the packages `data` and `training`
do, this module has it do without; transformers itself is imported as ever.
"""

from lightning_utilities.core.imports import RequirementCache

LEFT_OUT = "transformers"
_check_requirement = RequirementCache._check_requirement


def _unless_left_out(requirement: RequirementCache) -> None:
    """Say of what is left out that it is not installed; look for all else."""
    if not (requirement.requirement or "").startswith(LEFT_OUT):
        _check_requirement(requirement)
        return
    requirement.available = False
    requirement.message = f"{requirement.requirement}: left out by ldm_lab.lean_imports"


RequirementCache._check_requirement = _unless_left_out  # type: ignore[method-assign, assignment]
