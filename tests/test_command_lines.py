"""What all command lines have in common: flags that are given twice, parts of one's own, help that is told at once."""

import argparse
import ast
import functools
import re
import shlex
import subprocess
import sys

import pytest
from tiny import ROOT

from ldm_lab import __main__ as commands
from ldm_lab.commands import sample
from ldm_lab.commands._arguments import Parser
from ldm_lab.commands._sampling_flags import numbered
from ldm_lab.errors import UserError

REPEATED = {"lora", "imports", "head", "upsampler"}  # flags of which several are meant


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    if command == "sample":
        return sample.parser()
    parser = Parser(prog=command)
    commands._module(command).add_arguments(parser)
    return parser


@pytest.mark.parametrize(
    "command", ["sample", "cache", "gap", "scale", "score", "scores", "select", "statistics", "train-head"]
)
def test_a_flag_given_twice_is_refused(command):
    """Of `--checkpoint a --checkpoint b` the last one would win, unsaid."""
    parser = parser_of(command)
    for action in parser._actions:
        if not action.option_strings or action.dest in {"help", *REPEATED} or action.nargs == 0:
            continue
        flag = action.option_strings[-1]
        parser._given.clear()
        value = str(next(iter(action.choices))) if action.choices else "0.5"
        count = action.nargs if isinstance(action.nargs, int) else 1
        for words in ([value] * count, ["1"] * count, [value.upper()] * count):  # one of them is of its type
            try:
                parser._get_values(action, words)
                break
            except (argparse.ArgumentError, UserError):
                parser._given.clear()
        else:
            parser._given[action] = ["a"]
        with pytest.raises(UserError, match=rf"{flag}: is given twice, '.+' and 'again'; which one is meant\?"):
            parser._get_values(action, ["again"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "a.yaml", "--config=b.yaml"], "--config: is given twice, 'a.yaml' and 'b.yaml'"),
        (["sample", "--checkpoint", "a", "--checkpoint", "a", "red"], "--checkpoint: is given twice, 'a' and 'a'"),
        (["sample", "--checkpoint", "a", "--steps", "3", "red", "--steps=4"], "--steps: is given twice, '3' and '4'"),
        (["scale", "--config", "a", "--out", "a.safetensors", "--out", "b.safetensors"], "--out: is given twice"),
        (["score", "--shards", "a.tar", "--shards", "b.tar"], "--shards: is given twice, 'a.tar' and 'b.tar'"),
        (["downloads", "d", "--worst", "3", "--worst", "4"], "--worst: is given twice, '3' and '4'"),
    ],
)
def test_it_is_told_before_anything_else(program, words, message):
    code, out, err = program("ldm_lab.__main__", *words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--dry-run", "--check makes one step and one picture"),
        ("--lr=1e-4", "optim.lr=1e-4"),
        ("--Learning-Rate", "optim.lr=..."),
        ("--resume_from_checkpoint", "resume.checkpoint=..."),
        ("--colour", "written key=value"),
    ],
)
def test_flags_of_other_trainers_are_answered_with_what_they_are_called_here(program, flag, meant):
    code, out, err = program("train", "--config", ROOT / "configs/quickstart.yaml", flag)
    assert (code, out) == (2, "") and f"{flag.partition('=')[0]}: no such flag" in err and meant in err
    assert err.count("\n") == 1


def test_flags_that_say_the_opposite_are_refused():
    parser = Parser()
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--head", action="append")
    with pytest.raises(UserError, match="--compile/--no-compile: is given twice"):
        parser.parse_args(["--compile", "--no-compile"])
    parser._given.clear()
    assert parser.parse_args(["--json", "--json", "--head", "a", "--head", "b"]).head == ["a", "b"]


ALL = sorted(path.stem.replace("_", "-") for path in (ROOT / "ldm_lab/commands").glob("[!_]*.py"))


class ParsesError(Exception):
    """Carries the parser that a program would parse its words with."""


@pytest.mark.parametrize("command", ALL)
def test_no_command_takes_abbreviations(command, monkeypatch):
    """A flag that comes later would change what an abbreviation means."""

    def caught(parser, words=None, namespace=None):
        raise ParsesError(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", caught)
    with pytest.raises(ParsesError) as error:
        commands.main([command])
    parsers = [error.value.args[0]]
    for parser in parsers:
        assert parser.allow_abbrev is False, parser.prog
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    assert command in ("train", "sample") or len(parsers) > len(ALL)


def test_no_parser_takes_abbreviations():
    """Every parser of the programs, benchmarks and examples says that it takes none."""
    files = [path for folder in ("ldm_lab", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    made = 0
    for path in [*files, ROOT / "train.py", ROOT / "sample.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            words = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            is_parser = words.rpartition(".")[2] in ("ArgumentParser", "Parser", "add_parser")
            is_parser |= words == "super().__init__" and any(word.arg == "formatter_class" for word in node.keywords)
            if is_parser:
                made += 1
                assert any(ast.unparse(word) == "allow_abbrev=False" for word in node.keywords), f"{path}:{node.lineno}"
    assert made > 25


@pytest.mark.parametrize("command", ["score", "train-head", "statistics", "select"])
def test_parts_of_one_s_own_have_a_flag(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = parser_of(command)
    with pytest.raises(UserError, match="imports: no module 'my_rules_and_heads' here"):
        parser.parse_args(["--imports", "my_rules_and_heads"])


def test_help_needs_no_torch():
    code = (
        "import sys; from ldm_lab.__main__ import main\n"
        "for name in ('cache', 'scale', 'score', 'select', 'train-head'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'pytorch_lightning', 'webdataset'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--batch-size" in done.stdout, done.stderr


COMMAND = re.compile(r"(?:python -m ldm_lab ([a-z]+(?:-[a-z]+)*)|python (sample)\.py)((?: [^`]*)?)")
END = re.compile(r"\s{3,}|\s[|>#]\s|&&|;")  # of a command: an explanation behind it, a pipe, another command


def written_commands():
    """Yield where a command line is written, and its words: in docs, YAMLs and docstrings; a mere name is passed over.

    Those of docs/extending.md are run, as they stand, by a test of their own.
    """
    folders = ("docs/[!e]*.md", "README.md", "configs/**/*.yaml", "ldm_lab/commands/*.py")
    for path in sorted(path for pattern in folders for path in ROOT.glob(pattern)):
        text = path.read_text()
        text = (ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text
        for line in re.sub(r"\\+\n\s*(?:#\s*)?", "", text).splitlines():
            for match in COMMAND.finditer(line):
                words = shlex.split(END.split(match[3])[0].strip().rstrip(").,:"))
                if words and "--help" not in words and match[1] != "train":
                    yield f"{path.relative_to(ROOT)}: {match[0]}", match[1] or match[2], words


sampling_parser = functools.cache(sample.parser)  # which has a hundred flags


def test_every_command_that_is_written_somewhere_parses():
    wrong, count = [], 0
    for where, command, words in written_commands():
        parser = sampling_parser(tuple(numbered(words))) if command == "sample" else parser_of(command)
        parser._given.clear()
        count += 1
        try:
            parser.parse_words(words) if command == "sample" else parser.parse_args(words)
        except UserError as error:
            if len(words) > 1 or "required" not in str(error):  # "scores build" is a name
                wrong.append(f"{where}: {error}")
    assert count > 100 and not wrong, "\n".join(wrong)


def test_words_may_stand_behind_flags():
    """As docs have it: key=value at the end, whatever stands before it."""
    parser = Parser(prog="x")
    parser.add_argument("source")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args(["a.pt", "--half", "k=1", "--out", "b", "l=2"])
    assert (args.source, args.half, args.out, args.overrides) == ("a.pt", True, "b", ["k=1", "l=2"])
    with pytest.raises(UserError, match="--out: is given twice"):
        parser.parse_args(["a.pt", "--out", "b", "k=1", "--out", "c"])
    with pytest.raises(UserError, match="required: source"):
        parser.parse_args(["--half"])
    with pytest.raises(UserError, match="unrecognized arguments: --hlaf"):
        parser.parse_args(["a.pt", "--hlaf"])
