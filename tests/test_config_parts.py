"""Parts by their text: the same as their classes' signatures; parts outside the package; nothing imported in vain."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm_lab import config
from ldm_lab.config import RunConfig, registry
from ldm_lab.config.bounds import describe
from ldm_lab.config.reading import ClassSource, ModuleSource, Unreadable
from ldm_lab.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
YFCC = ROOT / "configs" / "yfcc_cfg.yaml"
HEAVY = ("torch", "pytorch_lightning", "webdataset")
TIMES = 3  # as long as the import of omegaconf alone, at most


# ------------------------------------------------------------------------------------------- text and signature


@pytest.mark.parametrize("role", registry.ROLES)
def test_the_text_of_a_part_says_what_its_signature_says(role):
    infos = registry.infos(role)
    assert infos, f"no parts of the role {role}"
    for info in infos.values():
        if info.load().__module__.partition(".")[0] != "ldm_lab":
            continue  # another test's
        signature = registry.signature_options(info.load())
        assert list(info.options) == list(signature), info.label
        for name, read in info.options.items():
            known = signature[name]
            assert (read.annotation, read.default, read.required) == (
                known.annotation,
                known.default,
                known.required,
            ), f"{info.label}: {name}"
            assert read.meaning, f"{info.label}: {name} is not explained in the docstring"
        assert info.summary, f"{info.label} has no docstring for the listing"
    assert not registry.broken


@pytest.mark.parametrize("name", ["ROLES", "REQUIRED", "SECTIONS"])
def test_the_text_of_a_task_says_which_sections_it_has(name):
    for info in registry.infos("task").values():
        cls = info.load()
        assert info.constant(name) == {"ROLES": cls.ROLES, "REQUIRED": cls.REQUIRED, "SECTIONS": cls.SECTIONS}[name]


@pytest.mark.parametrize(
    ("annotation", "default"),
    [
        ("int", "len(open('/etc/passwd').read())"),
        ("int", "__import__('os').getpid()"),
        ("int", "[x for x in (1, 2)]"),
        ("NoSuchName", "1"),
        ("int", "os.sep"),
    ],
)
def test_what_cannot_be_read_without_running_it_is_refused_with_its_place(tmp_path, annotation, default):
    path = tmp_path / "strange.py"
    path.write_text(f"import os\n\n\nclass Strange:\n    def __init__(self, *, a: {annotation} = {default}): ...\n")
    module = ModuleSource("strange", path)
    with pytest.raises(Unreadable, match=r"strange\.py:5"):
        ClassSource(module, module.classes["Strange"]).options()


def test_what_can_be_read(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(
        "from typing import Annotated, Literal\nfrom annotated_types import Interval\n"
        "from ldm_lab.config import PositiveInt, Share\nNAMES = ('a', 'b')\nKind = Literal[NAMES]\n\n\n"
        'class Base:\n    """Base.\n\n    Args:\n        size: of it,\n            in pixels.\n    """\n\n'
        "    def __init__(self, *, size: PositiveInt = 2 * 8, share: Share | None = None): ...\n\n\n"
        "class Plain(Base):\n    def __init__(self, *, kind: Kind = 'a', share: Share,\n"
        "        many: list[Annotated[int, Interval(ge=-1, le=len(NAMES))]] = (-1, 2), **common): ...\n"
    )
    module = ModuleSource("plain", path)
    options = ClassSource(module, module.classes["Plain"]).options()
    assert list(options) == ["kind", "share", "many", "size"]
    assert options["size"].default == 16 and options["size"].meaning == "of it, in pixels."
    assert options["many"].default == (-1, 2) and options["share"].required
    assert describe(options["many"].annotation) == "list of whole numbers (from -1 to 2)"
    assert describe(options["kind"].annotation) == "one of 'a', 'b'"


# --------------------------------------------------------------------------------------- what a mistake costs

MISTAKES = {
    "unknown key": (["optim.lrr=1"], "optim.lrr: no such key"),
    "wrong type": (["optim.lr=fast"], "optim.lr: number (at least 0) is needed, not 'fast'"),
    "out of bounds": (["data.batch_size=0"], "data.batch_size: at least 1 is needed, not 0"),
    "unknown part": (["denoiser.name=dit"], "denoiser.name: no such denoiser: 'dit'"),
    "missing section": (["objective=null"], "objective"),
    "unknown sampler inside": (["demo.sampling.sampler.name=plsm"], "Did you mean 'plms'?"),
    "unknown rule inside": (["data.rules={punsave: {below: 1}}"], "data.rules.punsave: no such rule"),
}


def spied(words: list[str]) -> tuple[int, str, str]:
    """Return exit code, output and errors of train.py; the last line of the errors lists what heavy it imported."""
    code = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('heavy:', sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['train.py', *{words!r}]\nrunpy.run_path('train.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_without_importing_torch(mistake):
    words, message = MISTAKES[mistake]
    code, _, err = spied(["--config", str(YFCC), "data.shards=x", *words])
    assert code == 2 and message in err and err.count("\n") == 2
    assert err.endswith("heavy: []\n")


@pytest.mark.parametrize(("words", "shown"), [(["--help"], "key=value"), (["--parts"], "denoiser: ccld_unet")])
def test_help_and_parts_are_shown_without_importing_torch(words, shown):
    code, out, err = spied(words)
    assert code == 0 and shown in out and err == "heavy: []\n"


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--parts"], ["--config", str(YFCC), "data.shards=x", "optim.lrr=1"]],
    ids=["help", "parts", "mistake"],
)
def test_a_mistake_is_told_at_once(words, tmp_path):
    """In three times the time of importing omegaconf, from source: the least of several, as others use the machine."""
    from_source = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path)}

    def seconds(command: list[str]) -> float:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=from_source
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return used.ru_utime + used.ru_stime

    shares, until = [], time.monotonic() + 60
    while not shares or (min(shares) > TIMES and time.monotonic() < until and len(shares) < 15):
        shares.append(seconds(["train.py", *words]) / seconds(["-c", "import omegaconf"]))
    assert min(shares) <= TIMES


# --------------------------------------------------------------------------------------- parts outside the package

PART = '''
"""Parts of a user's own."""

from ldm_lab.config import PositiveInt, register


@register("optim", "mine")
class Mine:
    """Optimizer of the user's own."""

    def __init__(self, *, speed: PositiveInt = 3):
        self.speed = speed
'''
SAMPLER = '''
from ldm_lab.config import PositiveInt, register
from ldm_lab.interfaces import Sampler


@register("sampler", "lazy")
class Lazy(Sampler):
    """A sampler that makes no step.

    Args:
        steps: none of them is made.
    """

    def __init__(self, *, steps: PositiveInt = 5):
        self.steps = steps

    def times(self, schedule, size=None):
        return schedule.grid(self.steps)

    def sample(self, predict, x, *, schedule, noise=None, callback=None):
        return x
'''
OBJECTIVE = '''
from ldm_lab.config import register
from ldm_lab.interfaces import Objective


@register("objective", "lazy")
class Lazy(Objective):
    """An objective that reads its timestep_sampler and never sets it."""

    def __init__(self, *, shift: float = 0.0):
        self.schedule, self.shift = None, shift

    def loss_terms(self, denoiser, x0, conditions, t, noise):
        return {"loss": t, self.timestep_sampler: t}

    def predict(self, denoiser, x, t, conditions):
        return x
'''


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A folder for modules, which is the current one; the registry forgets them afterwards."""
    for role in registry.ROLES:  # a module registers its parts when it is imported first, and never again
        registry.parts(role)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "_read", registry._read - {registry.ENTRY_POINTS})
    monkeypatch.setattr(registry, "_imports", [])
    monkeypatch.setattr(registry, "broken", {})
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def test_imports_of_a_yaml_make_parts_known(own_modules):
    (own_modules / "lazy_parts.py").write_text(SAMPLER)
    run = own_modules / "run.yaml"
    run.write_text(YFCC.read_text().replace("???", "x.tar").replace("{name: plms, steps: 50}", "{name: lazy}"))
    with pytest.raises(UserError, match=r"no such sampler: 'lazy'.*--imports my_parts"):
        config.load(run)
    run.write_text("imports: [lazy_parts]\n" + run.read_text())
    loaded = config.load(run)
    assert loaded.imports == ("lazy_parts",) and "lazy_parts" not in sys.modules, "it is read, not imported"
    assert config.build("sampler", {"name": "lazy"}).steps == 5
    with pytest.raises(UserError, match=r"demo\.sampling\.sampler\.steps: at least 1 is needed, not 0"):
        config.load(run, ["demo.sampling.sampler.steps=0"])


def test_imports_of_a_command_line_make_parts_known(own_modules):
    (own_modules / "lazy_parts.py").write_text(SAMPLER)
    config.load(YFCC, ["data.shards=x", "imports=[lazy_parts]", "demo.sampling.sampler.name=lazy"])
    with pytest.raises(UserError, match="imports: no module 'lacy_parts'"):
        config.load(YFCC, ["data.shards=x", "imports=[lacy_parts]"])
    with pytest.raises(UserError, match=r"imports: '\.\./parts' is not the name of a module"):
        config.load(YFCC, ["data.shards=x", "imports=['../parts']"])


def test_a_flag_makes_parts_known(own_modules, program):
    (own_modules / "lazy_parts.py").write_text(SAMPLER)
    code, out, _ = program("train", "--imports", "lazy_parts", "--parts")
    assert code == 0 and "sampler: lazy  -- A sampler that makes no step." in out and "none of them is made." in out


def test_the_imports_of_a_checkpoint_s_config_are_ignored(own_modules):
    (own_modules / "hostile.py").write_text("open('executed', 'w')\n")
    hostile = {
        "imports": ["hostile"],
        "init_from": "hostile.ckpt",
        "data": {"name": "webdataset", "shards": "pipe:touch executed", "image_size": 64, "batch_size": 1},
        "sampler": {"name": "hostile"},
    }
    held = RunConfig.from_checkpoint(hostile)
    assert held.imports == () and held.init_from is None and "hostile" not in registry.imports()
    with pytest.raises(UserError, match="never as one inside a checkpoint does"):
        held["data"].build()
    with pytest.raises(UserError, match="no such sampler: 'hostile'"):
        held["sampler"].build()
    assert not (own_modules / "executed").exists() and "hostile" not in sys.modules
    with pytest.raises(UserError, match="os: no such key"):
        RunConfig.from_checkpoint({"os": {"system": "ls"}})


def test_an_installed_package_announces_its_parts(own_modules):
    (own_modules / "their_parts.py").write_text(SAMPLER)
    metadata = own_modules / "their_parts-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-parts\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ldm_lab.parts]\ntheirs = their_parts\n")
    assert "lazy" in registry.infos("sampler")
    assert config.build("sampler", {"name": "lazy"}).steps == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_library\n" + SAMPLER, "ModuleNotFoundError: No module named 'no_such_library'"),
        (SAMPLER + "\nraise RuntimeError('two\\nlines')\n", "RuntimeError: two"),
        (SAMPLER.replace("x, *, schedule", "x, *, *"), "is not readable: "),
        (SAMPLER.replace("def sample(", "def draw("), r"lacks sample\(\), which ldm_lab.interfaces.Sampler asks of"),
        (SAMPLER.replace("Lazy(Sampler)", "Lazy"), r"a sampler has to be derived from ldm_lab\.interfaces\.Sampler"),
        (SAMPLER.replace("self.steps = steps", "pass").replace("self.steps", "5"), "lacks steps, which"),
    ],
)
def test_a_file_that_fails_is_named_in_a_line_and_breaks_nothing_else(own_modules, capsys, text, said):
    (own_modules / "broken_parts.py").write_text(text)
    registry.add_imports(["broken_parts"])
    with pytest.raises(UserError, match=said) as error:
        config.build("sampler", {"name": "lazy"})
    assert "\n" not in str(error.value)
    assert config.build("sampler", {"name": "ddim", "steps": 3}).steps == 3
    assert "denoiser: ccld_unet" in config.describe_parts()
    assert "plms" in registry.parts("sampler") and "broken_parts" in capsys.readouterr().err


def test_a_file_with_a_mistake_is_named_once(own_modules):
    """Not with the word of the command line before it, as if that were what is wrong."""
    (own_modules / "torn.py").write_text('@register("objective", "mine")\nclass Mine(\n    pass\n')
    with pytest.raises(UserError, match=r"^objective\.name=mine: .*torn\.py is not readable: .* \(line \d\)$"):
        config.load(YFCC, ["data.shards=x.tar", "imports=torn", "objective={name: mine}"])


def test_to_read_an_attribute_is_not_to_have_it(own_modules):
    (own_modules / "lazy_objective.py").write_text(OBJECTIVE)
    registry.add_imports(["lazy_objective"])
    with pytest.raises(UserError, match=r"lacks timestep_sampler, which ldm_lab\.interfaces\.Objective asks"):
        config.build("objective", {"name": "lazy"})
    (own_modules / "able_objective.py").write_text(
        OBJECTIVE.replace("    def __init__", '    timestep_sampler = "sobol"\n\n    def __init__').replace(
            '"lazy"', '"able"'
        )
    )
    registry.add_imports(["able_objective"])
    assert config.build("objective", {"name": "able"}).timestep_sampler == "sobol"


def test_a_name_that_is_taken(own_modules):
    (own_modules / "again.py").write_text(SAMPLER.replace('"lazy"', '"ddim"'))
    registry.infos("sampler")
    registry.add_imports(["again"])
    assert "sampler.name=ddim is registered twice" in registry.broken[str(own_modules / "again.py")]
    assert config.build("sampler", {"name": "ddim", "steps": 3}).steps == 3


def test_a_check_is_given_the_options_that_it_names(own_modules):
    seen = []

    @registry.register("loss", "checked")
    class Checked:
        def __init__(self, *, low: float, high: float = 2.0, other: int = 0):
            pass

        @staticmethod
        def check(*, low: float, high: float, unheard: int = 7) -> list[str]:
            seen.append((low, high, unheard))
            return [f"low: {low:g} is above high, {high:g}"] if low > high else []

    assert config.check_section("loss", {"name": "checked", "low": 1}, "loss") == []
    assert config.check_section("loss", {"name": "checked", "low": 3}, "loss") == ["loss.low: 3 is above high, 2"]
    assert seen == [(1.0, 2.0, 7), (3.0, 2.0, 7)]


def test_a_check_that_asks_for_what_is_no_option_is_one_line(own_modules):
    @registry.register("loss", "curious")
    class Curious:
        def __init__(self, *, low: float = 0.0):
            pass

        @staticmethod
        def check(*, lwo: float) -> list[str]:
            return []

    with pytest.raises(UserError, match=r"^loss.name=curious: its check asks for 'lwo', [^\n]*$"):
        config.check_section("loss", {"name": "curious"}, "loss")


# ----------------------------------------------------------------------------------------------- options without effect

WITHOUT_EFFECT = {
    "guard.spike_factor": ({"guard": {"spike_factor": 3.0, "spike_window": 50}},
                           "guard.spike_factor, guard.spike_window: without effect: guard.on_spike looks for no "
                           "spikes"),
    "guard.snapshot_every": ({"guard": {"on_nonfinite": "skip", "snapshot_every": 5}},
                             "guard.snapshot_every: without effect: neither guard.on_nonfinite nor guard.on_spike is "
                             "rollback"),
    "guard.max_in_a_row": ({"guard": {"on_spike": "rollback", "max_in_a_row": 5, "max_rollbacks": 9}},
                           "guard.max_in_a_row: without effect: neither guard.on_nonfinite nor guard.on_spike is skip"),
    "checkpoint.keep_every": ({"checkpoint": {"keep": 0, "every": 10, "keep_every": 20}},
                              "checkpoint.keep_every: without effect: checkpoint.keep=0 keeps last.ckpt alone"),
    "resume.schedule": ({"resume": {"schedule": "restart"}},
                        "resume.schedule: without effect: a fresh run has no schedule to go on with"),
    "logging.project": ({"logging": {"project": "mine"}}, "logging.project: without effect: logging.wandb is none"),
    "optim.final_lr": ({"optim": {"lr": 1e-3, "warmup": "exponential", "final_lr": 1e-5}},
                       "optim.final_lr: without effect: optim.schedule is constant"),
    "trainer.ddp": ({"trainer": {"ddp": {"bucket_mb": 100.0}}}, "trainer.ddp: without effect: there is one device"),
    "objective.gamma": ({"objective": {"name": "v_cosine", "gamma": 3.0}},
                        "objective.gamma: without effect: objective.weighting is uniform"),
    "objective.gamma of continuous": ({"objective": {"name": "continuous", "gamma": 3.0}},
                                      "objective.gamma: without effect: objective.weighting is uniform"),
    "data.local": ({"data": {"name": "cache", "path": "/a", "batch_size": 1, "local": "/b"}},
                   "data.local: without effect: they are for caches on a server"),
    "held_out.data.local": ({"held_out": {"data": {"name": "cache", "path": "x", "local": "y", "batch_size": 1}}},
                            "held_out.data.local: without effect: they are for caches on a server"),
    "condition_sources.inpaint": ({"condition_sources": {"inpaint": {"strokes": 0.0, "thickest": 0.2}}},
                                  "condition_sources.inpaint.thickest: without effect: no strokes are drawn"),
    "conditioner.gap of a file": ({"conditioner": {"name": "clip", "gap": {"means": "a", "texts": "b", "images": 9}}},
                                  "conditioner.gap.texts, conditioner.gap.images: without effect: means names a file, "
                                  "and these are of means that a run measures itself"),
    "conditioner.gap.means": ({"conditioner": {"name": "clip", "weights": "w.pt", "gap": {
                                  "means": "a", "shift": False, "noise": 0.3, "map": "none"}}},
                              "conditioner.gap.means, conditioner.gap.map: without effect: shift=false with a noise "
                              "needs nothing that is measured"),
    "conditioner.gap.noise": ({"conditioner": {"name": "clip", "train_on": "text", "gap": {"noise": 0.3}}},
                              "conditioner.gap.noise: without effect: train_on=text trains on texts' embeddings, "
                              "which get none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_an_option_without_effect_is_said(case):
    sections, line = WITHOUT_EFFECT[case]
    assert line in RunConfig.from_dict(sections).unused_options()


def test_options_with_an_effect_and_defaults_are_passed_over():
    sections = {
        "guard": {"on_spike": "skip", "spike_factor": 3.0, "max_in_a_row": 2, "snapshot_every": 500},
        "optim": {"lr": 1e-3, "schedule": "cosine", "final_lr": 1e-5, "warmup_steps": 5, "warmup": "exponential"},
        "objective": {"name": "v_cosine", "weighting": "min_snr", "gamma": 3.0},
        "data": {"name": "cache", "path": "hf://datasets/a/b/c", "batch_size": 1, "local": "/b"},
        "trainer": {"devices": 2, "ddp": {"bucket_mb": 100.0}},
        "conditioner": {"name": "clip", "train_on": "mixed", "gap": {"texts": "b", "images": 9, "noise": 0.3}},
    }
    assert RunConfig.from_dict(sections).unused_options() == []
