"""The benchmark for one GPU, at its tiny size on a CPU. All of its parts run in `.ci/run`."""

import re
import sys

import pytest
from tiny import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu

ROW = re.compile(r"\| .+ \| .+ \| .* \| .* \| not counted \| .* \|")


@pytest.mark.parametrize(("part", "rows"), [("matmul", 4), ("encoders", 4)])
def test_parts_print_a_row_for_each_thing(tmp_path, capsys, part, rows):
    gpu.PARTS[part](gpu.Setting(tmp_path, tiny=True, device="cpu"))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == rows and all(ROW.fullmatch(line) for line in printed)


def test_the_script_runs_every_part():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    assert set(re.findall(r"^gpu \d+ (\w+) ", script, re.MULTILINE)) == set(gpu.PARTS)
    in_turn = [line for line in script.splitlines() if line.startswith("gpu ") and "&" not in line]
    assert sum(int(line.split()[1]) for line in in_turn) <= 360
