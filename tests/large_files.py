"""`python tests/large_files.py FILE ...`: refuse files that do not belong into a repository (a pre-commit hook)."""

import subprocess
import sys
from pathlib import Path

LIMIT = 512 * 1024
ALLOWED = (  # larger ones, each with its reason
    "assets/quickstart/autoencoder.safetensors",  # the quickstart works without a download
    "assets/quickstart/cloob.safetensors",
)


def too_large(paths: list[str]) -> list[str]:
    """Return a line for each file over the limit that is not an allowed one."""
    return [
        f"{path}: {size:,} bytes; at most {LIMIT:,} are allowed"
        for path in paths
        if path not in ALLOWED and Path(path).is_file() and (size := Path(path).stat().st_size) > LIMIT
    ]


if __name__ == "__main__":
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    lines = too_large(sys.argv[1:] or listed)
    print("\n".join(lines), end="\n" if lines else "")
    sys.exit(bool(lines))
