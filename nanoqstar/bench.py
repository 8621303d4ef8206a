"""python -m nanoqstar.bench train|sample|prepare|all [--config NAME] [--device cpu|cuda]
                            [--json FILE]

Measured speed against the floor. Random weights of the config's real shape, synthetic tokens,
warm-up left out; every figure is a median with its quartiles. On a CPU one thread is used and CPU
seconds are counted, since other work on the machine stretches the wall clock; on a GPU wall seconds
between synchronisations.

  train    train.py's own step, split into sampling, forward, backward, optimizer; useful FLOPs
           against the matrix rate measured in the same run (MFU); time and peak memory against the
           staged implementation in tests/; on a GPU other batches and less recomputation, as far as
           they fit; cost against n_ahead, n_passes and max_length
  sample   decoding with and without thoughts against the memory-bandwidth bound, measured in the
           same run; on a CPU also at Qwen2.5-0.5B's shape, and without thoughts beside the generate
           of transformers, where that is installed, on the same weights
  prepare  data/prepare.py against the bare tokenizer on the same text and cores

Configs: a preset of configs.py, or one of the CPU shapes `cpu` (vocabulary 4096), `cpu_vocab`
(151,936) and `cpu_0_5b`. All but `sample` of these needs a clone.
"""

import dataclasses
import json
import sys
from typing import Literal

from nanoqstar import InputError, cli

SHAPED = cli.When("train, sample and all", lambda c: c.what != "prepare")
TRAIN = cli.When("train and all", lambda c: c.what in ("train", "all"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    what: Literal["train", "sample", "prepare", "all"] = cli.setting(
        dataclasses.MISSING, "what to measure")
    config: str | None = cli.setting(
        None, "none: the CPU shapes on a CPU, qwen2_5_3b on a GPU", when=SHAPED)
    device: Literal["auto", "cpu", "cuda"] = cli.setting("auto", "auto: cuda if there is one")
    batch_size: int | None = cli.setting(
        None, "windows; none: the config's", at_least=1, when=TRAIN)
    compile: bool = cli.setting(False, "compile on a CPU as well (a GPU always does)", when=TRAIN)
    no_scaling: bool = cli.setting(
        False, "leave out cost against n_ahead, n_passes and max_length", when=TRAIN)
    json: str | None = cli.setting(None, "write every figure to this file")

    def __post_init__(self) -> None:
        cli.check(self)


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    if args[:1] == ["worker"]:  # a process that `run_worker` has started
        return cli.command(args, lambda a: tuple(json.loads(a[1])), "nanoqstar.bench:serve")
    return cli.command(args, lambda a: (cli.settings(BenchConfig, a, str(__doc__), "what"),),
                       "nanoqstar.bench:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

import ctypes
import gc
import importlib
import importlib.util
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from nanoqstar import cpu
from nanoqstar.attention import tiles_for_shape
from nanoqstar.device import autocast, pick_device, speed_up, speed_up_decoding
from nanoqstar.files import write_json
from nanoqstar.flops import MODELS, qwen, thinking_flops
from nanoqstar.objective import Objective
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.sampling import generate
from nanoqstar.thoughts import ThoughtLayout

ROOT = Path(__file__).parents[1]
STAGED, PREPARE = ROOT / "tests" / "staged.py", ROOT / "data" / "prepare.py"
COPIES = 4  # of the standard library's modules, as the text that prepare.py is timed on
REPEATS = 3  # steps timed in a run, after two of warm-up
ROUNDS = 3  # runs of each implementation
PHASES = ("sampling", "forward", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is measured: a model, and settings of TrainConfig by their names."""

    model: Qwen2Config
    batch_size: int
    n_ahead: int
    n_ahead_talk: int
    n_passes: int
    max_length: int
    checkpointing: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "model"}

    @property
    def layout(self) -> ThoughtLayout:
        return ThoughtLayout(self.n_ahead, self.n_ahead_talk, self.n_passes, self.max_length)


SHAPES = {
    "cpu": Shape(qwen(256, 6, 8, 2, 688, 4096, tied=False, bias=False), 2, 7, 4, 2, 127),
    "cpu_vocab": Shape(qwen(128, 2, 4, 2, 344, 151936, tied=False, bias=False), 1, 7, 4, 2, 31),
    "cpu_0_5b": Shape(MODELS["Qwen/Qwen2.5-0.5B"], 1, 8, 4, 2, 127),  # for `sample`
}
# of text, as the README prepares it
VOCABULARIES = {"tiny": 11, "tiny_learned": 11, "small": 96, "text": 4096}


def of_clone(module: str) -> ModuleType:
    """A script of the clone whose root this runs in; InputError where there is none."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise InputError(f"there is no {module}.py here: run this from the root of a clone, or "
                         f"measure sample --config {' or '.join(SHAPES)}") from None


def shape_of(name: str) -> Shape:
    """The shape of a CPU benchmark or of a preset."""
    if name in SHAPES:
        return SHAPES[name]
    presets = of_clone("configs").PRESETS
    if name not in presets:
        raise InputError(f"no config {name!r}{cli.nearest(name, [*SHAPES, *presets])}; there are "
                         f"{', '.join([*SHAPES, *presets])}")
    cfg = presets[name].config
    model = MODELS.get(cfg.model_path) or qwen(
        cfg.hidden_size, cfg.n_layers, cfg.n_heads, cfg.n_kv_heads, cfg.intermediate_size,
        VOCABULARIES[name])
    return Shape(model, **{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Shape)[1:]})


# ---- measuring


def spread(values: Sequence[float]) -> dict[str, float]:
    """{median, low, high}: the quartiles (the extremes of fewer than four values)."""
    if len(values) < 4:
        low, high = min(values), max(values)
    else:
        low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "low": low, "high": high}


def shown(s: dict[str, float], form: str = "{:.3g}") -> str:
    return f"{form.format(s['median'])} ({form.format(s['low'])} .. {form.format(s['high'])})"


def clock(device: torch.device) -> float:
    """Seconds so far: CPU seconds of this process, or wall seconds after the GPU has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def rate_of(action: Callable[[], Any], work: float, device: torch.device) -> dict[str, float]:
    """Work per second of an action, as a `spread` of ten, after two of warm-up."""
    rates = []
    for _ in range(12):
        start = clock(device)
        action()
        rates.append(work / (clock(device) - start))
    return spread(rates[2:])


def repeated(function: Callable[..., Any], *args: torch.Tensor) -> None:
    for _ in range(8):
        function(*args)


def matrix_rate(device: torch.device) -> dict[str, float]:
    """FLOP/s of large products in the dtype that training multiplies in; on a CPU by the faster of
    torch's own and oneDNN, whichever a model then uses."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    ways: list[Callable[..., Any]] = [torch.matmul]
    if device.type == "cpu" and cpu.has_onednn():
        ways.append(cpu.by_onednn)
    rates = [rate_of(partial(repeated, way, a, b), 8 * 2 * n**3, device) for way in ways]
    return max(rates, key=lambda rate: rate["median"])


def read_rate(device: torch.device) -> dict[str, float]:
    """Bytes per second that a product of a matrix and a vector reads: what decoding does.

    The matrix is larger than any cache. A copy, which reads and writes, is slower by the byte where
    a core has few requests in flight, and what decoding is measured against should not be beaten.
    """
    columns, dtype = (4096, torch.bfloat16 if device.type == "cuda" else torch.float32)
    matrix = torch.ones(2**29 // columns // dtype.itemsize, columns, device=device, dtype=dtype)
    return rate_of(lambda: torch.mv(matrix, matrix[0]), 2**29, device)


# ---- train: on a CPU a process per implementation, so that peak memory is its own


def make_model(shape: Shape, device: torch.device) -> QuietStar:
    with torch.device(device):
        model = QuietStar(Qwen2(shape.model))
    # the rest as torch starts it, on the device
    model.lm.model.embed_tokens.weight.data.mul_(0.02)
    model.init_thoughts([1], [2])
    last: Any = model.mixing_head[4]
    torch.nn.init.normal_(last.weight, std=0.02)  # past the first step, where everything is zero
    return model


def synthetic(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and documents, one a window: (batch, max_length + n_ahead_talk)."""
    size = (shape.batch_size, shape.max_length + shape.n_ahead_talk)
    text = torch.randint(shape.model.vocab_size, size, generator=torch.Generator().manual_seed(0))
    return text, torch.zeros_like(text)


def timed(function: Callable, name: str, seconds: dict[str, float], device: torch.device
          ) -> Callable:
    """The same function, which adds to seconds[name] what it takes."""
    def measured(*args, **options):
        start = clock(device)
        result = function(*args, **options)
        seconds[name] += clock(device) - start
        return result
    return measured


def our_step(shape: Shape, device: torch.device, compile: bool | None, optimize: bool) -> Callable:
    """A function that does one `train_step` and returns its four times and the share of thoughts
    with an advantage.

    optimize: False leaves out the optimizer's step, and with it the moments it makes.
    """
    train, cfg = of_clone("train"), of_clone("configs").TrainConfig(**shape.settings)
    model, seconds = make_model(shape, device), dict.fromkeys(PHASES[:3], 0.0)
    optimizer = train.make_optimizer(model, cfg)
    speed_up(model, device, cfg.checkpointing, compile)
    data = SimpleNamespace(batch=lambda *_: synthetic(shape))
    if not optimize:
        optimizer.step = lambda: None
    loss_of = timed(model.loss, "forward", seconds, device)

    def loss_with_a_timed_backward(*args):
        loss, stats = loss_of(*args)

        def backward():
            del loss.backward  # which holds the loss that holds it
            timed(loss.backward, "backward", seconds, device)()
        loss.backward = backward
        return loss, stats
    model.rollout = timed(model.rollout, "sampling", seconds, device)  # type: ignore
    model.loss = loss_with_a_timed_backward  # type: ignore

    def step(n: int) -> tuple[list[float], float]:
        batches, counts = train.load_batches(data, "think", n, cfg, device.type == "cuda")
        seconds.update(dict.fromkeys(seconds, 0.0))
        start = clock(device)
        stats, _, _, finite = train.train_step(model, optimizer, batches, counts, Objective(),
                                               cfg.learning_rate, cfg)
        whole = clock(device) - start
        assert finite  # else the optimizer had nothing to do
        return [*seconds.values(), whole - sum(seconds.values())], float(stats["live"])
    return step


def staged_step(shape: Shape, device: torch.device, compile: bool | None, optimize: bool
                ) -> Callable:
    """The same for the staged implementation: its forward samples; it has no optimizer."""
    spec: Any = importlib.util.spec_from_file_location("staged", STAGED)
    staged: Any = importlib.util.module_from_spec(spec)
    sys.modules["staged"] = staged
    spec.loader.exec_module(staged)
    model, (text, docs) = make_model(shape, device), (x.to(device) for x in synthetic(shape))
    params = {name.removeprefix("lm."): p for name, p in model.named_parameters()}
    keys = staged.StagedConfig.__dataclass_fields__
    config = staged.StagedConfig(**{k: v for k, v in vars(shape.model).items() if k in keys})

    def step(n: int) -> tuple[list[float], float]:
        start = clock(device)
        with autocast(device):
            loss = staged.staged_step(
                params, config, text, docs, n_ahead=shape.n_ahead, n_ahead_talk=shape.n_ahead_talk,
                n_passes=shape.n_passes)["loss"]
        middle = clock(device)
        loss.backward()
        stop = clock(device)
        model.zero_grad(set_to_none=True)
        return [0.0, middle - start, stop - middle, 0.0], 1.0
    return step


def resident_bytes() -> int:  # Linux
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that training keeps is not in use yet
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worker(which: str, shape: Shape, device: torch.device, compile: bool | None, repeats: int
           ) -> dict[str, Any]:
    """One implementation by itself: {times, live} of each step, {resident, peak}: bytes before
    steps and above in one.

    A GPU tells both at once; on a CPU repeats 0 asks for the memory, of the first step and without
    an optimizer.
    """
    make = {"ours": our_step, "staged": staged_step}[which]
    step = make(shape, device, compile, repeats > 0)
    if not repeats:
        resident = resident_bytes()
        step(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"resident": resident, "peak": peak - resident}
    step(0), step(1)  # warm-up
    if device.type == "cuda":
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times, live = zip(*(step(2 + n) for n in range(repeats)), strict=True)
    result: dict[str, Any] = {"times": times, "live": live}
    if device.type == "cuda":
        result |= {"resident": resident, "peak": torch.cuda.max_memory_allocated() - resident}
    return result


def serve(which: str, shape: dict[str, Any], compile: bool | None, repeats: int) -> None:
    """`worker` on a CPU, in a process of its own: prints its result as JSON."""
    torch.set_num_threads(1)
    shape["model"] = Qwen2Config(**shape["model"])
    print(json.dumps(worker(which, Shape(**shape), torch.device("cpu"), compile, repeats)))


def run_worker(which: str, shape: Shape, cfg: BenchConfig, repeats: int) -> dict[str, Any]:
    """`worker`'s result, or {failed: why}: on a CPU in a fresh process with its own peak memory."""
    compile = cfg.compile or None
    if cfg.device == "cuda":
        try:
            return worker(which, shape, torch.device("cuda"), compile, repeats)
        except RuntimeError as error:  # no memory, as a rule: the other figures are worth having
            return {"failed": str(error).strip().splitlines()[0]}
        finally:
            free_gpu()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not repeats:
        env["MALLOC_MMAP_THRESHOLD_"] = "100000"  # freed blocks go back at once
    job = json.dumps([which, {**vars(shape), "model": vars(shape.model)}, compile, repeats])
    done = subprocess.run([sys.executable, "-m", "nanoqstar.bench", "worker", job], env=env,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        killed = ["killed, for want of memory perhaps"]
        return {"failed": (done.stderr.strip().splitlines() or killed)[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def free_gpu() -> None:
    tiles_for_shape.cache_clear()
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure(shape: Shape, cfg: BenchConfig, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{name: {times, live, resident, peak} or {failed}}; on a CPU in turns: a change of the
    machine's speed meets all."""
    if cfg.device == "cuda":
        return {name: run_worker(name, shape, cfg, ROUNDS * REPEATS) for name in names}
    results = {name: {"times": [], "live": []} | run_worker(name, shape, cfg, 0) for name in names}
    for _ in range(ROUNDS):
        for name, result in results.items():
            if "failed" not in result:
                run = run_worker(name, shape, cfg, REPEATS)
                for key in ("times", "live"):
                    result[key] += run.pop(key, [])
                result |= run
    return results


def step_seconds(run: dict[str, Any]) -> dict[str, float]:
    return spread([sum(t) for t in run["times"]])


def useful_flops(shape: Shape, run: dict[str, Any]) -> tuple[int, int]:
    """Of (sampling, learning) in a step of this run."""
    live = statistics.mean(run["live"])
    return thinking_flops(shape.model, shape.layout, shape.batch_size, live)


def bench_train(shape: Shape, cfg: BenchConfig, rate: dict[str, float]) -> dict[str, Any]:
    """The step itself, and beside the staged one at the largest max_length at which both fit."""
    results = measure(shape, cfg, ["ours", "staged"])
    ours = results["ours"]
    if failed := ours.get("failed"):
        print(f"the step failed: {failed}")
        return {"failed": failed}
    parts = {name: spread([t[i] for t in ours["times"]]) for i, name in enumerate(PHASES)}
    step, (sampling, learning) = step_seconds(ours), useful_flops(shape, ours)
    work = sampling + learning
    mfu = spread([work / sum(t) / rate["median"] for t in ours["times"]])
    result = {"parts": parts, "step": step, "flops": work, "mfu": mfu,
              "floor_seconds": work / rate["median"], "peak_bytes": ours["peak"],
              "tokens_per_second": shape.batch_size * shape.max_length / step["median"]}
    print(f"step {shown(step)} s: "
          + ", ".join(f"{name} {shown(part)}" for name, part in parts.items()))
    print(f"{result['tokens_per_second']:.0f} text tokens/s; {work / 1e9:.1f} useful GFLOP "
          f"({sampling / 1e9:.1f} sampling), floor {result['floor_seconds']:.2f} s at the "
          f"measured {shown(rate)} FLOP/s: MFU {shown(mfu, '{:.0%}')}")
    print(f"peak memory {ours['peak'] / 1e6:.0f} MB above the {ours['resident'] / 1e6:.0f} MB "
          "resident before the step")
    while "failed" in results["staged"] and shape.max_length > 16:
        shape = replace(shape, max_length=shape.max_length // 2)
        print(f"the staged implementation failed ({results['staged']['failed']}): "
              f"trying max_length {shape.max_length}")
        results = measure(shape, cfg, ["staged"])
    if "ours" not in results:
        results |= measure(shape, cfg, ["ours"])
    if failed := next((r["failed"] for r in results.values() if "failed" in r), None):
        print(f"no comparison: {failed}")
        return result
    ours, staged = results["ours"], results["staged"]
    ratio = spread([sum(b) / sum(a[:3])
                    for a, b in zip(ours["times"], staged["times"], strict=True)])
    result |= {"compared_at": shape.max_length, "speedup": ratio, "staged": step_seconds(staged),
               "memory_ratio": staged["peak"] / ours["peak"], "staged_peak_bytes": staged["peak"]}
    print(f"staged implementation, max_length {shape.max_length}: {shown(result['staged'])} s, "
          f"{staged['peak'] / 1e6:.0f} MB; ours (sampling, forward, backward) is {shown(ratio)} "
          f"times as fast, with {result['memory_ratio']:.2f} times less memory")
    return result


def bench_sizes(shape: Shape, cfg: BenchConfig, rate: dict[str, float], known: dict[str, Any]
                ) -> dict[str, Any]:
    """Seconds a step and MFU where something is changed; known: `bench_train`'s of the shape."""
    sizes = {"n_ahead": (3, 7, 11), "n_passes": (1, 2, 4), "max_length": (64, 128, 256)}
    changes: list[dict[str, Any]] = []
    if cfg.device == "cuda":
        sizes |= {"n_ahead": (4, 8, 12), "max_length": (256, 512, 1024)}
        # what else its memory may hold
        changes = [{"checkpointing": 0.5}, {"batch_size": 4}, {"n_passes": 2, "batch_size": 8}]
    changes += [{name: value} for name, values in sizes.items() for value in values]
    result: dict[str, Any] = {}
    for change in changes:
        one, what = replace(shape, **change), ", ".join(f"{k} {v}" for k, v in change.items())
        if one == shape and "step" in known:
            row = {"step": known["step"], "mfu": known["mfu"]["median"]}
        elif "failed" in (run := run_worker("ours", one, cfg, REPEATS)):
            row = run
        else:
            step, work = step_seconds(run), sum(useful_flops(one, run))
            row = {"step": step, "mfu": work / step["median"] / rate["median"]}
            if "peak" in run:
                row["bytes"] = run["resident"] + run["peak"]
        result[what] = row
        memory = f", {row['bytes'] / 2**30:.1f} GiB" if "bytes" in row else ""
        print(f"{what:26}" + (row.get("failed") or (
            f"{shown(row['step'])} s, MFU {row['mfu']:.0%}{memory}")))
    return result


# ---- sample


def bench_sample(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Decoding at batches 1 and 8, with thoughts and without, against the bandwidth bound.

    The bound counts every weight that a forward multiplies as read once from memory, the head too,
    at `read_rate`. Keys and values, a hundredth of it here, do not count. Where all weights fit
    into a cache (`cpu`, `cpu_vocab`), it is no limit but a yardstick. On a CPU a model of a
    gigabyte takes seconds a token: batch 1 alone.
    """
    def size(parameters):
        return sum(p.numel() * p.element_size() for p in parameters)
    model, result = make_model(shape, device), dict[str, Any]()
    on_cpu = device.type == "cpu"
    if device.type == "cuda":
        model.lm.to(torch.bfloat16)
        speed_up_decoding(model, device)
    weights = size(p for n, p in model.lm.named_parameters() if "embed_tokens" not in n)
    if shape.model.tie_word_embeddings:
        weights += size([model.lm.head_weight])
    mixing = size(model.mixing_head.parameters())  # read once a thought
    rate, is_slow = read_rate(device)["median"], on_cpu and weights > 1e9
    n_tokens = 8 if is_slow else 32 if on_cpu else 128
    for batch in (1,) if is_slow else (1, 8):
        for n_ahead in (shape.n_ahead, 0):
            prompts = torch.randint(shape.model.vocab_size, (batch, 64)).tolist()
            seconds = []
            for _ in range(4):
                steps = generate(model, prompts, n_tokens + 2, n_ahead)
                next(steps), next(steps)  # the prompt, and a warm first token
                start = clock(device)
                for _ in steps:
                    pass
                seconds.append((clock(device) - start) / n_tokens)
            s, forwards = spread(seconds[1:]), max(1, n_ahead - 1)
            bound = (forwards * weights + (mixing if n_ahead else 0)) / rate / s["median"]
            what = f"batch {batch}, " + (f"thoughts of {n_ahead}" if n_ahead else "no thoughts")
            result[what] = {"seconds_per_token": s, "tokens_per_second": batch / s["median"],
                            "bound": bound}
            print(f"{what:28}{batch / s['median']:9.1f} tokens/s   {shown(s)} s a step, "
                  f"{bound:.0%} of the bandwidth bound ({forwards} x {weights / 1e6:.0f} MB at "
                  f"{rate / 1e9:.1f} GB/s)", flush=True)
    if on_cpu:
        result["transformers"] = beside_transformers(model)
    return result


def beside_transformers(model: QuietStar, n_tokens: int = 64) -> dict[str, Any]:
    """Our decoding without thoughts and transformers' generate on the same weights, in turns.

    A prompt of 64 tokens and n_tokens more, greedily, batch 1, prompt included.
    """
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: no comparison with its generate")
        return {"skipped": "transformers is not installed"}
    config, transformers = model.lm.config, importlib.import_module("transformers")
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        **vars(config), attn_implementation="sdpa")).eval()
    if not config.attention_bias:  # theirs has biases always
        for layer in theirs.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).bias = None
    loaded = theirs.load_state_dict(model.lm.state_dict(), assign=True, strict=False)
    theirs.tie_weights()
    assert set(loaded.missing_keys) <= {"lm_head.weight"} and not loaded.unexpected_keys, loaded
    prompt = torch.randint(config.vocab_size, (1, 64))
    settings = transformers.GenerationConfig(max_new_tokens=n_tokens, do_sample=False,
                                             use_cache=True)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    tokens: dict[str, list[int]] = {}
    for _ in range(6):
        for name, times in seconds.items():
            start = clock(prompt.device)
            if name == "ours":
                tokens[name] = [step.tokens.item() for step in generate(  # type: ignore[misc]
                    model, prompt.tolist(), n_tokens, 0, temperature=0)]
            else:
                tokens[name] = theirs.generate(
                    prompt, attention_mask=torch.ones_like(prompt),
                    generation_config=settings)[0, 64:].tolist()
            times.append(clock(prompt.device) - start)
    ours, other = seconds["ours"][1:], seconds["transformers"][1:]  # the first is warm-up
    ratio = spread([b / a for a, b in zip(ours, other, strict=True)])
    same = tokens["ours"] == tokens["transformers"]
    print(f"{n_tokens} tokens, no thoughts: ours {shown(spread(ours))} s, transformers "
          f"{transformers.__version__} {shown(spread(other))} s: ours is {shown(ratio)} times as "
          f"fast, {'the same' if same else 'other'} tokens")
    return {"ours": spread(ours), "transformers": spread(other), "speedup": ratio,
            "same_tokens": same}


# ---- prepare


def prepared(text: Path, tokenizer: str, out: Path) -> float:
    """data/prepare.py as a user runs it; its tokens per second."""
    done = subprocess.run(
        [sys.executable, str(PREPARE), "--input", str(text), "--val_fraction", "0.1",
         "--tokenizer", tokenizer, "--out", str(out)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"data/prepare.py failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split(" tokens/s")[0].split()[-1].replace(",", ""))


def bench_prepare() -> dict[str, Any]:
    """data/prepare.py against encode_batch on the same documents, tokenizer and cores."""
    from tokenizers import Tokenizer

    documents = [p.read_text(errors="replace")
                 for p in sorted(Path(os.__file__).parent.glob("*.py")) for _ in range(COPIES)]
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        text, first = Path(folder, "all.jsonl"), Path(folder, "first")
        text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        prepared(text, "train:4096", first)
        tokenizer = Tokenizer.from_file(str(first / "tokenizer.json"))
        for i in range(5):
            start = time.perf_counter()
            n_tokens = sum(
                len(encoding.ids) for n in range(0, len(documents), 1000)
                for encoding in tokenizer.encode_batch(documents[n:n + 1000],
                                                       add_special_tokens=False))
            bare.append(n_tokens / (time.perf_counter() - start))
            ours.append(prepared(text, str(first), Path(folder, f"out-{i}")))
    result = {"ours": spread(ours), "bare": spread(bare),
              "ratio": spread([a / b for a, b in zip(ours, bare, strict=True)])}
    print(f"prepare.py {shown(result['ours'])} tokens/s, bare encode_batch "
          f"{shown(result['bare'])}: {shown(result['ratio'])} of it")
    return result


# ---- the command


def hardware(device: torch.device) -> str:
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif info.exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines()
                  if line.startswith("model name")]
        name = models[0] if models else name
    return (f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, "
            f"torch {torch.__version__}")


def run(cfg: BenchConfig) -> None:
    """Everything that is to be measured; what is measured is kept, whatever comes after."""
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = pick_device(wanted if cfg.device == "auto" else cfg.device)
    cfg = replace(cfg, device=device.type)  # type: ignore[arg-type]
    parts = ("train", "sample", "prepare") if cfg.what == "all" else (cfg.what,)
    if parts != ("sample",):
        of_clone("train")
    if device.type == "cpu":
        torch.set_num_threads(1)
    names = ["cpu", "cpu_vocab"] if device.type == "cpu" else ["qwen2_5_3b"]
    shapes = {name: shape_of(name) for name in ([cfg.config] if cfg.config else names)}
    if cfg.batch_size:
        shapes = {name: replace(s, batch_size=cfg.batch_size) for name, s in shapes.items()}
    begin, results = time.perf_counter(), dict[str, Any](hardware=hardware(device))

    def section(name, function, *arguments):
        print(f"\n{name}", flush=True)
        results[name] = function(*arguments)
        if device.type == "cuda":
            free_gpu()
        results["seconds"] = round(time.perf_counter() - begin)
        print(f"[{results['seconds']} s so far]", flush=True)
        save()

    def save():
        if cfg.json:
            write_json(cfg.json, results)
    save()  # a file that cannot be written is known at once
    print(results["hardware"])
    if "train" in parts:
        results["matrix_rate"] = rate = matrix_rate(device)
        for name, shape in shapes.items():
            section(f"train {name}", bench_train, shape, cfg, rate)
    if "sample" in parts:
        more = [] if cfg.config or device.type == "cuda" else ["cpu_0_5b"]
        for name, shape in (shapes | {name: SHAPES[name] for name in more}).items():
            section(f"sample {name}", bench_sample, shape, device)
    if "train" in parts and not cfg.no_scaling:
        name, shape = next(iter(shapes.items()))
        section(f"sizes of {name}", bench_sizes, shape, cfg, rate, results[f"train {name}"])
    if "prepare" in parts:
        section("prepare", bench_prepare)
    if failed := [name for name, r in results.items() if isinstance(r, dict) and "failed" in r]:
        raise InputError(f"{' and '.join(failed)} failed, as said above: take a smaller "
                         "--batch_size or --config")
