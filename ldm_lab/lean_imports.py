"""A start without libraries that nothing here asks for.

torchmetrics, which Lightning brings, imports transformers wherever that is installed, for metrics of texts: 1.5 s and
60 MB at every start, and in every process that trains. Imported before Lightning, as the packages `data` and `training`
do, this module has it do without; transformers itself is imported as ever.
"""

from lightning_utilities.core.imports import RequirementCache

LEFT_OUT = "transformers"
_is_met = RequirementCache.__bool__


def _unless_left_out(requirement: RequirementCache) -> bool:
    """Return whether a requirement is met: what is left out is not, all else is looked for."""
    return not (requirement.requirement or "").startswith(LEFT_OUT) and _is_met(requirement)


# torchmetrics has no option for this. What `if requirement:` means is public, how it is found out is not.
RequirementCache.__bool__ = _unless_left_out  # type: ignore[method-assign, assignment]
