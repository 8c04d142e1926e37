"""A Chromium for the browser tests: the one that is there, Debian's package as root, or npm's @sparticuz/chromium.

    python tests/browser/chromium.py    finds it, or sets it up, and prints where it is

Exit code 1 without one. CHROMIUM names another.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / ".tools" / "chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PACKAGE = "@sparticuz/chromium"
# It unpacks into TMPDIR, and brings the libraries along that a bare machine lacks only where it believes to be on AWS.
UNPACK = "import('@sparticuz/chromium').then(async (m) => console.log(await m.default.executablePath()))"
AS_ON_AWS = {"AWS_EXECUTION_ENV": "AWS_Lambda_nodejs22.x", "AWS_LAMBDA_JS_RUNTIME": "nodejs22.x"}


class NoBrowserError(Exception):
    """There is no Chromium, and none could be set up."""


def find() -> Path | None:
    """Return the Chromium that is here: the one that CHROMIUM names, one on the path, or our own; None without."""
    if named := os.environ.get("CHROMIUM"):
        if not shutil.which(named):
            raise NoBrowserError(f"CHROMIUM={named}: no such program")
        return Path(named)
    found = next(filter(None, map(shutil.which, NAMES)), None)
    own = TOOLS / "unpacked" / "chromium"
    return Path(found) if found else own if own.exists() else None


def environment(browser: Path) -> dict[str, str]:
    """Return the environment that a Chromium starts in: npm's brings libraries with it."""
    folders = sorted((TOOLS / "unpacked").glob("al*/lib")) if browser.is_relative_to(TOOLS) else []
    paths = [*map(str, folders), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}


def check(browser: Path) -> str:
    """Return the version of a Chromium that starts. Raises NoBrowserError."""
    command = [str(browser), "--version", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    try:
        ended = subprocess.run(command, env=environment(browser), capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoBrowserError(f"{browser}: does not start: {error}") from None
    if ended.returncode or not ended.stdout.strip():
        said = (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
        raise NoBrowserError(f"{browser}: does not start: {said}")
    return ended.stdout.strip()


def set_up() -> Path:
    """Return a Chromium that starts; install one where there is none. Raises NoBrowserError."""
    browser = find()
    if browser is None:
        ways = [from_debian] if os.geteuid() == 0 and shutil.which("apt-get") else []
        problems = []
        for way in [*ways, from_npm]:
            try:
                way()
            except NoBrowserError as error:
                problems.append(str(error))
            else:
                break
        browser = find()
        if browser is None:
            raise NoBrowserError("; ".join(problems) or "it was installed, and is not to be found")
    print(f"browser: {browser} ({check(browser)})", flush=True)
    return browser


def from_debian() -> None:
    """Install Debian's package. Raises NoBrowserError."""
    install = ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]
    try:
        run(install)
    except NoBrowserError:  # a new machine has no list of packages, or one whose versions are gone
        run(["apt-get", "update"])
        run(install)


def from_npm() -> None:
    """Install npm's package into .tools, and unpack its browser there. Raises NoBrowserError."""
    if not shutil.which("npm") or not shutil.which("node"):
        raise NoBrowserError("no Chromium on the path, and no npm to install one with (as root: apt-get)")
    unpacked = TOOLS / "unpacked"
    partial = TOOLS / "unpacked.part"  # it has its name only when all of it is there
    for folder in (partial, unpacked):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", str(TOOLS), PACKAGE])
    run(["node", "-e", UNPACK], cwd=TOOLS, env={**os.environ, **AS_ON_AWS, "TMPDIR": str(partial)})
    partial.rename(unpacked)


def run(command: list[str], **options) -> None:
    """Run a command and show what it says. Raises NoBrowserError."""
    print("+", " ".join(command), flush=True)
    environment = {**(options.pop("env", None) or os.environ), "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(command, env=environment, **options).returncode:
        raise NoBrowserError(f"{' '.join(command[:3])}: failed")


if __name__ == "__main__":
    try:
        set_up()
    except NoBrowserError as error:
        sys.exit(f"error: no browser for the tests: {error}")
