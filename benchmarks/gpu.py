"""What one GPU does with the 1.17-billion-parameter model and around it, part by part. `benchmarks/gpu.sh` runs all.

fp16, LoRA and sampling take the network of `own_images_24gb.yaml`: it starts and saves in a third of the time.

    python benchmarks/gpu.py matmul --out runs/gpu
    python benchmarks/gpu.py cached --out runs/gpu --tiny

Every row is printed as it is measured: what, precision, rate, time, peak memory, remarks. `--tiny` takes small networks
and few steps, so that the parts themselves can be tried on a CPU.
"""

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from train_step import EMBED, Way

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.checkpoints.native import save_model, save_part
from ldm_lab.conditions import Embedding
from ldm_lab.config import build, load
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import UserError, run_program
from ldm_lab.estimate import peak_flops, step_cost
from ldm_lab.interfaces import Denoiser
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import ModelOptions, Pipeline, SamplingOptions
from ldm_lab.sampling.options import Precision
from ldm_lab.training.compiling import Compile, compile_network

ROOT = Path(__file__).resolve().parents[1]
CONFIG, FAST = "configs/yfcc_cfg.yaml", "configs/yfcc_fast.yaml"
TINY_AUTOENCODER = {"name": "kl_f8", "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
TINY_CLOOB = {
    "name": "cloob", "image_size": 32, "patch_size": 16, "image_width": 32, "image_layers": 1, "image_heads": 2,
    "text_width": 32, "text_layers": 1, "text_heads": 2, "text_size": 24, "vocab_size": 600, "embed_dim": 16,
}  # fmt: skip
TINY = ["denoiser={name: ccld_unet, base_channels: 16, multipliers: [1, 2], mapping_width: 32, head_width: 16}"]
# The network of own_images_24gb.yaml, 403 million parameters.
MEDIUM = ["denoiser={name: ccld_unet, base_channels: 128, multipliers: [3, 4, 8, 8], mapping_width: 1024}"]


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        out: folder of all that is written.
        tiny: small networks, few steps.
        device: "cuda" or "cpu".
        profile: write what each kernel took, too.
    """

    out: Path
    tiny: bool
    device: str
    profile: bool = False

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return 64 if self.tiny else 256

    @property
    def medium(self) -> list[str]:
        """Settings that make the U-Net smaller, where it is not tiny anyway."""
        return [] if self.tiny else MEDIUM

    @property
    def batch_size(self) -> int:
        """Images per step."""
        return 4 if self.tiny else 64

    def row(self, name: str, precision: str, rate: str, each: str = "", remark: str = "") -> None:
        """Print a row."""
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if self.device == "cuda" else "not counted"
        print(f"| {name} | {precision} | {rate} | {each} | {peak} | {remark} |", flush=True)

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Return the seconds of one of several runs of some work, behind two that are not timed."""
        for _ in range(2):
            work()
        self.wait()
        began = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - began) / times

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def matmul(setting: Setting) -> None:
    """Measure what the card gives to matrix products and copies: the bounds of all that follows."""
    name = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    print(f"card: {name}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    torch.set_float32_matmul_precision("high")
    side = 256 if setting.tiny else 8192
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
        seconds = setting.seconds(lambda a=a, b=b: a @ b, 3 if setting.tiny else 30)
        what = "tf32" if dtype == torch.float32 and setting.device == "cuda" else str(dtype).removeprefix("torch.")
        setting.row(f"matmul {side}", what, f"{2 * side**3 / seconds / 1e12:.2f} TFLOP/s", f"{1000 * seconds:.2f} ms")
    source = torch.empty(2**20 if setting.tiny else 2**30, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = setting.seconds(lambda: target.copy_(source), 10)
    setting.row("copy", "bytes", f"{2 * source.numel() / seconds / 1e9:.0f} GB/s", f"{1000 * seconds:.2f} ms")


def unet(setting: Setting) -> Denoiser:
    """Return the U-Net with its initial weights."""
    section = load(ROOT / CONFIG, ["data.shards=none", *(TINY if setting.tiny else [])])["denoiser"].architecture()
    return build("denoiser", section, 4, {"embed": Embedding(EMBED)})


@functools.cache
def image_flops(setting: Setting) -> int:
    """Return what the U-Net computes of a latent, forward and backward."""
    side = setting.image_size // 8
    with FakeTensorMode():
        network = unet(setting)
        x0, embed, t = torch.randn(1, 4, side, side), torch.randn(1, EMBED), torch.rand(1)
        objective = build("objective", {"name": "v_cosine"})
        loss = lambda: objective.loss_terms(network, x0, {"embed": embed}, t, x0)["loss"].mean()  # noqa: E731
        return step_cost(network, loss, 0, 1).flops


def network_step(
    setting: Setting, name: str, precision: str, batch_size: int, compile: Compile, channels_last: bool
) -> None:
    """Time the parts of a step of the U-Net alone, on latents and embeddings that are there."""
    flops, side = batch_size * image_flops(setting), setting.image_size // 8
    torch.manual_seed(0)
    with torch.device(setting.device):  # a billion random numbers take a CPU ten seconds
        network = unet(setting)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    way = Way(network, False, argparse.Namespace(device=setting.device, precision=precision))
    if compile != "none":
        compile_network(network, compile)
    x0, noise = (torch.randn(batch_size, 4, side, side, device=setting.device) for _ in range(2))
    batch = (
        x0,
        torch.randn(batch_size, EMBED, device=setting.device),
        torch.rand(batch_size, device=setting.device),
        noise,
    )
    began = time.perf_counter()
    for _ in range(2):
        way.step(batch)
    wait = time.perf_counter() - began
    rounds = [way.step(batch) for _ in range(2 if setting.tiny else 8)]
    if setting.profile:
        profile(setting, f"{name} {precision} {batch_size}", lambda: way.step(batch))
    parts = [statistics.median(times) for times in zip(*rounds)]
    seconds = sum(parts)
    card = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    most = peak_flops(card, "bf16-mixed" if precision == "bf16" else "32-true")
    mfu = "MFU unknown" if most is None else f"MFU {flops / seconds / most:.1%}"
    if compile != "none":
        mfu += f", {wait:.0f} s before the first step"
    apart = ", ".join(f"{part} {1000 * each:.1f}" for part, each in zip(("forward", "backward", "AdamW", "EMA"), parts))
    done = f"{flops / seconds / 1e12:.2f} TFLOP/s, {mfu}; ms: {apart}"
    setting.row(
        f"{name}, batch {batch_size}",
        precision,
        f"{batch_size / seconds:.1f} images/s",
        f"{1000 * seconds:.1f} ms",
        done,
    )
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def profile(setting: Setting, name: str, work: Callable[[], object]) -> None:
    """Write a table of the kernels of three runs of some work, by their time, to `profile_NAME.txt`."""
    from torch.profiler import ProfilerActivity

    on_gpu = setting.device == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            work()
        setting.wait()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
    (setting.out / f"profile_{name.replace(' ', '_').replace(',', '')}.txt").write_text(table)


def eager(setting: Setting) -> None:
    """Time the U-Net's step as it is written."""
    for precision, size, last in (("fp32", 1, False), ("bf16", 1, False), ("bf16", 1, True), ("bf16", 2, False)):
        name = "step, channels last" if last else "step"
        network_step(setting, name, precision, size * setting.batch_size, compile="none", channels_last=last)


def compiled(setting: Setting) -> None:
    """Time the U-Net's step with its blocks compiled."""
    for size in (1, 2):
        compiled_step(setting, size)


def compiled_step(setting: Setting, size: int) -> None:
    """Time a step of `size` batches; the compiler keeps its results for the next process."""
    network_step(setting, "compiled step", "bf16", size * setting.batch_size, compile="blocks", channels_last=True)


def compile_both(setting: Setting) -> None:
    """Have the compiler do its work for both sizes at once, which on a CPU the parts do by themselves."""
    if setting.device != "cuda":
        return
    began = time.perf_counter()
    both = [get_context("spawn").Process(target=compile_quietly, args=(setting, size)) for size in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    if any(process.exitcode for process in both):
        raise UserError("the blocks could not be compiled")
    took = f"{time.perf_counter() - began:.0f} s"
    setting.row("compiling the blocks", "bf16", "", took, "once for a card and a version of torch")


def compile_quietly(setting: Setting, size: int) -> None:
    """Make the step without its row: others are at work on the card."""
    with redirect_stdout(StringIO()):
        compiled_step(setting, size)


def lora(setting: Setting) -> None:
    """Time the training of adapters alone, on the cache."""
    cache = f"cache.folder={setting.out / 'cache'}"
    base = f"init_from={model_file(setting)}"
    less = ["lora.rank=4", "trainer.compile=none", *setting.medium]
    train(setting, "lora", cache, base, *less, steps(setting, 18), config=FAST)


def prepare(setting: Setting) -> list[str]:
    """Write images and random weights of the frozen parts, once; return the settings that name them."""
    folder = setting.out / "prepared"
    images = 32 if setting.tiny else 1024
    if not (folder / "shards").is_dir():
        write_shards(folder / "shards", count=images, shards=4 if setting.tiny else 16, size=setting.image_size, seed=0)
    settings = [f"data.shards={folder}/shards/*.tar", f"data.image_size={setting.image_size}"]
    config = load(ROOT / CONFIG, settings)
    for role, tiny in (("autoencoder", TINY_AUTOENCODER), ("conditioner", TINY_CLOOB)):
        section = tiny if setting.tiny else config[role].architecture()
        path = folder / f"{role}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            save_part(path, build(role, section), section)
        settings.append(f"{role}={{name: {section['name']}, weights: {path.resolve()}}}")
    settings.append("autoencoder.latent_std=2.55")
    return settings + (TINY if setting.tiny else [])


def model_file(setting: Setting) -> Path:
    """Write a model of random weights, once; return its path."""
    path = setting.out / "prepared" / "model.safetensors"
    config = load(ROOT / CONFIG, [*prepare(setting), *setting.medium])
    if not path.exists():
        given = {"embed": Embedding(TINY_CLOOB["embed_dim"] if setting.tiny else EMBED)}
        with torch.device(setting.device):
            weights = build("denoiser", config["denoiser"].architecture(), 4, given).state_dict()
        cpu = {name: weight.cpu() for name, weight in weights.items()}
        save_model(path, cpu, config.to_dict(), {"step": "0", "image_size": str(setting.image_size)})
    return path


def train(
    setting: Setting, name: str, *settings: str, config: str = CONFIG, timed: bool = True, saves: bool = False
) -> None:
    """Run `train.py` in a process of its own with these settings; it prints the row, if it is timed.

    Args:
        setting: where and how large.
        name: of the row and the run's folder.
        settings: what replaces the config's.
        config: path of the config.
        timed: by `timed_training`.
        saves: go on to the end and its checkpoint, which of a large model takes long, behind the last timed step.
    """
    run, accelerator = setting.out / "runs" / name.replace(" ", "_"), "gpu" if setting.device == "cuda" else "cpu"
    common = [f"run={run}", "trainer.devices=1", f"trainer.accelerator={accelerator}", "logging.wandb=none"]
    if timed:
        common += ["imports=[timed_training]", "task=timed_diffusion"]
    if config in (CONFIG, FAST):
        workers = 0 if setting.tiny else 12
        common += [f"data.batch_size={setting.batch_size}", f"data.workers={workers}", "demo=null", "checkpoint.keep=0"]
        common += prepare(setting)
    few = {"TIMED_WARM_UP": "1", "TIMED_STEPS": "2"} if setting.tiny else {}
    few["TIMED_LEAVES"] = "" if saves else "1"
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / config), *common, *settings]
    environment = {**os.environ, "PYTHONPATH": path, "TIMED_NAME": name, **few}
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    print("\n".join(rows), flush=True)
    if done.returncode:
        raise UserError(f"{name}: train.py ended with {done.returncode}: {done.stdout.strip()[-800:]}")
    if saves:
        written = sum(file.stat().st_size for file in run.glob("*.*"))
        remark = f"all of train.py: its start, {f'{written / 1e9:.1f} GB' if written > 1e9 else 'few bytes'} written"
        setting.row(f"{name}, in all", "", "", f"{time.perf_counter() - began:.0f} s", remark)


def steps(setting: Setting, full: int) -> str:
    """Return the setting of the length of a run."""
    return f"trainer.max_steps={3 if setting.tiny else full}"


def cached(setting: Setting) -> None:
    """Time the training step under Lightning as `yfcc_fast.yaml` has it, on a cache, and online."""
    cache = f"cache.folder={setting.out / 'cache'}"
    fast = ["trainer.compile=none"] if setting.tiny else []  # a CPU's compiler takes minutes
    train(setting, "cached", cache, steps(setting, 18), *fast, config=FAST)
    train(setting, "online", steps(setting, 18), *fast, config=FAST)


def half_to_full(setting: Setting) -> None:
    """Train in fp16 with the loss scaler, resume in fp32."""
    cache = f"cache.folder={setting.out / 'cache'}"
    half = "16-mixed" if setting.device == "cuda" else "bf16-mixed"
    few = 3 if setting.tiny else 18
    plain = [cache, "trainer.compile=none", *setting.medium]
    begun = [f"trainer.precision={half}", f"trainer.max_steps={few}"]
    train(setting, "fp16 then fp32", *plain, *begun, config=FAST, saves=True)
    resumed = ["trainer.precision=32-true", "resume.checkpoint=last", f"trainer.max_steps={2 * few}"]
    train(setting, "fp16 then fp32", *plain, *resumed, config=FAST)
    shutil.rmtree(setting.out / "runs" / "fp16_then_fp32")


def encoders(setting: Setting) -> None:
    """Time the frozen autoencoder and CLOOB's image tower."""
    config = load(ROOT / CONFIG, prepare(setting))
    batch = torch.rand(setting.batch_size, 3, setting.image_size, setting.image_size, device=setting.device) * 2 - 1
    for role, call in (("autoencoder", "moments"), ("conditioner", "encode_image")):
        part = build(role, TINY_AUTOENCODER if setting.tiny and role == "autoencoder" else TINY_CLOOB if setting.tiny
                     else config[role].architecture()).to(setting.device).eval()  # fmt: skip
        encode: Callable[[Tensor], object] = part.moments if call == "moments" else part.encode_image
        for dtype in (torch.float32, torch.bfloat16):
            with torch.inference_mode(), torch.autocast(setting.device, dtype, enabled=dtype != torch.float32):
                seconds = setting.seconds(lambda encode=encode: encode(batch), 2 if setting.tiny else 10)
            rate = f"{len(batch) / seconds:.0f} images/s"
            setting.row(f"{role} {call}", str(dtype).removeprefix("torch."), rate, f"{1000 * seconds:.1f} ms")


def sampling(setting: Setting) -> None:
    """Time pictures of a model of random weights."""
    model = model_file(setting)
    number = 2 if setting.tiny else 16
    prompts = [Prompt("a red circle")] * number
    precisions: tuple[Precision, ...] = ("32-true", "bf16-mixed")
    for precision in precisions:
        pipeline = Pipeline.from_checkpoint(model, ModelOptions(device=setting.device, precision=precision))
        options = SamplingOptions(sampler={"name": "unipc", "steps": 2 if setting.tiny else 20})
        pipeline(prompts[:1], options)
        began = time.perf_counter()
        pipeline(prompts, options)
        setting.wait()
        seconds = time.perf_counter() - began
        setting.row("sampling, guided", precision, f"{number / seconds:.2f} pictures/s", f"{seconds:.1f} s")


def quickstart(setting: Setting) -> None:
    """Train the quickstart to its usual accuracy."""
    began = time.perf_counter()
    train(setting, "quickstart", *([steps(setting, 0), "data.count=64", f"data.folder={setting.out}/shapes",
          f"cache.folder={setting.out}/shapes_cache", "demo=null"] if setting.tiny else []),
          config="configs/quickstart.yaml", timed=False)  # fmt: skip
    setting.row("quickstart", "32-true", "", f"{time.perf_counter() - began:.0f} s", "with its start and its grids")
    model = setting.out / "runs" / "quickstart" / "ema.safetensors"
    command = [sys.executable, str(ROOT / "benchmarks" / "quickstart_accuracy.py"), "--checkpoint", str(model)]
    subprocess.run([*command, *(["--drawings", "8", "--steps", "2"] if setting.tiny else [])], check=True)


PARTS = {
    "matmul": matmul, "eager": eager, "compile": compile_both, "compiled": compiled, "cached": cached,
    "fp16": half_to_full, "encoders": encoders, "lora": lora, "sampling": sampling, "quickstart": quickstart,
}  # fmt: skip


def main() -> None:
    """Parse the command line, measure a part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("part", choices=[*PARTS])
    parser.add_argument("--out", default="runs/gpu", metavar="DIR", help="of all that is written; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--profile", action="store_true", help="of eager and compiled: write what each kernel took")
    args = parser.parse_args()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    PARTS[args.part](Setting(out, args.tiny, args.device, args.profile))


if __name__ == "__main__":
    run_program(main)
