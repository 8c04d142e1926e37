"""The last line of a test run: which kinds of tests were left out, and the command that runs them."""

from collections import Counter

import pytest

COMMANDS = {"slow": "make test-all", "browser": "make test-browser"}


class LeftOut:
    """Counts what `-m` takes out, also on the processes of pytest-xdist, and says it at the very end."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        if items[0].config.option.keyword:  # what -k takes out is no secret
            return
        for item in items:
            self.counts.update([next((kind for kind in reversed(COMMANDS) if item.get_closest_marker(kind)), "other")])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if (output := getattr(session.config, "workeroutput", None)) is not None:
            output["left_out"] = dict(self.counts)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        """Take the counts of a process; all of them collected, and left out, the same tests."""
        for kind, count in getattr(node, "workeroutput", {}).get("left_out", {}).items():
            self.counts[kind] = max(self.counts[kind], count)

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        if hasattr(config, "workerinput") or not self.counts.keys() & COMMANDS:
            return
        counts = {kind: self.counts[kind] for kind in COMMANDS if self.counts[kind]}
        named = [f"{n} {kind} test{'s' if n != 1 else ''} ({COMMANDS[kind]})" for kind, n in counts.items()]
        print(f"left out: {', '.join(named)}")
