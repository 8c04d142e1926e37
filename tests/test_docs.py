"""README and docs: every command in them is run, or taken apart and checked; a new one that is neither fails here."""

import functools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from documented import PAGES, PARSED, ROOT, RUN_BY, Command, blocks, commands
from walks import NOT_RUN, way_of

from ldm_lab import __main__ as programs
from ldm_lab.commands import sample
from ldm_lab.commands._arguments import Parser
from ldm_lab.commands._sampling_flags import numbered
from ldm_lab.config import load
from ldm_lab.errors import UserError

ALL = list(commands())


def test_every_command_has_a_way_to_be_checked():
    """A command is run, by a test of its own or by tests/test_walks.py, or has a reason why it is not."""
    known = re.compile(r"(python|torchrun|curl) ")
    lost = [str(its) for its in ALL if (way := way_of(its)).text and not known.match(way.text)]
    assert not lost, "\n".join(
        [f"of no known program, nor in tests/walks.py (what a program prints stands in ```text): {len(lost)}", *lost]
    )
    assert len(ALL) > 150


def test_what_is_said_to_be_checked_elsewhere_is():
    for (page, language), test in RUN_BY.items():
        assert any(its[0] == page and its[2] == language for its in blocks()), f"{page} has no {language} block"
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not read {page}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for its in ALL:
        if match := re.match(r"make ([a-z-]+)( EXTRAS=\w+)?$", its.text):
            assert match[1] in targets, str(its)
    for start, why in NOT_RUN.items():
        assert why and (any(re.match(start, its.text) for its in ALL) or start.startswith(("pip ", "git "))), start


def test_blocks_of_python_are_run_or_said_to_be_read_alone():
    for page, line, language, body in blocks():
        if language == "python":
            assert (page, language) in RUN_BY or page in PARSED, (
                f"{page}:{line}: run by no test, see tests/documented.py"
            )
            compile(body, f"{page}:{line}", "exec")


@pytest.mark.parametrize("kind", ["bash", "sh"])
def test_blocks_of_a_shell_are_in_its_language(kind):
    for page, line, language, body in blocks():
        if language == kind:
            done = subprocess.run(["bash", "-n"], input=body, capture_output=True, text=True)
            assert done.returncode == 0, f"{page}:{line}: {done.stderr}"


sampling_parser = functools.cache(sample.parser)  # which has a hundred flags


def parser_of(command: str) -> Parser:
    """Return the parser of a command."""
    parser = Parser(prog=command)
    programs._module(command).add_arguments(parser)
    return parser


def check_train(words: Sequence[str]) -> None:
    """Compose the config that a training command names. Raises UserError, SystemExit."""
    parser = Parser(prog="train")
    parser.add_argument("--config")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--imports", action="append")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(list(words))
    if args.config:
        compose(args.config, args.overrides)


def compose(config: str, overrides: Sequence[str]) -> None:
    """Compose a config of the repository; what a shell would fill in is a number."""
    path = ROOT / config
    if path.is_file():
        load(path, [re.sub(r"\$\{?\w+\}?", "job" if word.startswith("run=") else "2", word) for word in overrides])


def check(command: Command) -> None:
    """Take a command apart, and compose its config. Raises UserError for what is wrong with it."""
    name, *words = command.program_words or [""]
    if "--help" in words:
        return
    if name == "train":
        check_train(words)
        return
    if name == "sample":
        parser = sampling_parser(tuple(numbered(words)))
        parser._given.clear()
        parser.parse_words(words)
        return
    args = parser_of(name).parse_args(words)
    config = next((value for key, value in args._get_kwargs() if key == "config"), None)
    if config and name != "select":  # whose YAML is none of a run
        compose(config, getattr(args, "overrides", []))


def test_every_command_of_this_program_parses_and_its_config_composes():
    wrong = []
    checked = [its for its in ALL if its.program_words and its.page != "docs/extending.md"]
    for its in checked:
        try:
            check(its)
        except (UserError, ModuleNotFoundError) as error:
            wrong.append(f"{its}\n    {error}")
    assert len(checked) > 100 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "python train.py --config configs/quickstart.yaml trainer.max_step=3",
        "python train.py --confg configs/quickstart.yaml",
        "torchrun --nproc-per-node=2 train.py --config configs/quickstart.yaml optim.lr=fast",
        "python sample.py --checkpoint a --guidence 3 red",
        "python -m ldm_lab plan --config configs/quickstart.yaml data.counts=3",
        "python -m ldm_lab strat photos",
    ],
)
def test_a_wrong_command_is_found(text):
    with pytest.raises((UserError, ModuleNotFoundError)):
        check(Command("docs/x.md", 1, "", text))


def test_a_command_that_nobody_knows_is_found():
    its = Command("docs/x.md", 1, "", "rclone copy a b")
    assert its.program_words is None and way_of(its).text == its.text


def test_the_guides_are_listed():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w.]+\.md)", index))
    assert linked == {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}


def test_links_between_pages_lead_somewhere():
    def anchors(path: Path) -> set[str]:
        heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
        return {re.sub(r"[^\w\- ]", "", re.sub(r"`", "", head).lower()).strip().replace(" ", "-") for head in heads}

    wrong = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            if not path.exists():
                wrong.append(f"{page}: {target}")
            elif anchor and path.suffix == ".md" and anchor not in anchors(path):
                wrong.append(f"{page}: {target}: no such section")
    assert not wrong, "\n".join(wrong)
