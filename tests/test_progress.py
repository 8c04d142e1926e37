"""Progress: bars on terminals, lines now and then elsewhere."""

import io
import itertools
import os
import sys

import pytest

from ldm_lab import __main__ as commands
from ldm_lab import progress
from ldm_lab.progress import Bar, print_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_file_gets_few_lines_and_the_last_state(clock, capsys):
    """A day of steps, a state each second: 16 MB as a bar."""
    bar = Bar("train", "step", 90_000)
    told = []
    for second in range(86_400):
        clock.now += 1
        bar.n += 1
        bar.set_postfix_str("loss=0.1", refresh=False)
        bar.display()
        if capsys.readouterr().err:
            told.append(second + 1)
    assert told[:3] == [30, 60, 90] and 100 < len(told) < 200
    assert max(later - before for before, later in itertools.pairwise(told)) <= 600
    bar.advance(90_000)
    bar.close()
    bar.close()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "\r" not in err and "\x1b" not in err
    assert err.startswith("train: 100% 90000/90000 [") and err.endswith("loss=0.1]\n")


def test_without_a_terminal_a_short_one_is_one_line(capsys):
    with Bar("a", "B", 2048) as outer, Bar("b", "row", scaled=True) as inner:
        inner.update(3)
        print_line("said between")
        outer.update(2048)
    out, err = capsys.readouterr()
    assert out == "said between\n"
    assert [line.partition(" [")[0] for line in err.splitlines()] == ["b: 3.00row", "a: 100% 2.00k/2.00k"]
    with Bar("hidden", "row", shown=False) as bar:
        bar.update(1)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Bar("draw", "step", 4) as bar:
        assert bar.is_bar
        bar.advance(4)
    assert "\r" in screen.getvalue() and "100%|" in screen.getvalue()


def test_bars_of_other_libraries_are_rare_without_a_terminal(monkeypatch):
    """huggingface_hub and open_clip bring their own; tqdm reads the environment when it is imported."""
    monkeypatch.setattr(commands, "run_program", lambda main: None)
    for screen, pause in ((Terminal(), None), (io.StringIO(), "60")):
        monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
        monkeypatch.delenv("TQDM_MAXINTERVAL", raising=False)
        monkeypatch.setattr(sys, "stderr", screen)
        commands.start("train")
        assert os.environ.get("TQDM_MININTERVAL") == pause
