"""The job script of docs/slurm.md, with stand-ins for SLURM's programs: what it does at each end of a run."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > {folder}/args
trap 'sleep 0.1; exit 75' USR1
trap 'sleep 0.1; exit 75' TERM
touch {folder}/started
for _ in $(seq {tenths}); do sleep 0.1; done
exit {code}
"""


def script() -> str:
    """Return the first bash block below the heading SLURM."""
    text = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8").split("\n## SLURM\n")[1]
    return re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.skipif(os.name != "posix", reason="bash and signals")
@pytest.mark.parametrize(
    ("code", "sent", "restarts", "ends", "queued"),
    [
        (0, None, 0, 0, False),
        (2, None, 0, 2, False),
        (75, None, 3, 75, True),
        (75, None, 100, 75, False),
        (0, signal.SIGUSR1, 0, 75, True),
        (0, signal.SIGTERM, 0, 75, True),
    ],
)
def test_the_job_is_queued_again_where_it_should_be(tmp_path, code, sent, restarts, ends, queued):
    (tmp_path / "job.sh").write_text(script())
    programs = {
        "srun": SRUN.format(folder=tmp_path, tenths=100 if sent else 0, code=code),
        "scontrol": f'#!/bin/bash\necho "$@" >> {tmp_path}/queued\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a b",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    with subprocess.Popen(["bash", tmp_path / "job.sh", "optim.lr=1e-4"], env=environment, cwd=tmp_path) as job:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if sent is not None:
            time.sleep(0.1)
            job.send_signal(sent)
        assert job.wait(30) == ends
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"
    args = (tmp_path / "args").read_text().splitlines()
    assert args[:2] == ["python", "train.py"]
    assert {"run=a b", "trainer.num_nodes=2", "trainer.devices=8", "resume.checkpoint=last", "optim.lr=1e-4"} < set(
        args
    )


def test_the_script_asks_for_what_its_text_says():
    header = re.findall(r"^#SBATCH (\S+)$", script(), re.MULTILINE)
    assert "--signal=B:USR1@120" in header and "--requeue" in header and "--open-mode=append" in header
