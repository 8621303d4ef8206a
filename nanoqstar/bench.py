"""python -m nanoqstar.bench train|sample|prepare|all [--config NAME] [--device cpu|cuda] [--json FILE]

Measured speed against the floor.  Random weights of the config's real shape, synthetic tokens, warm-up left out; every
figure is a median with its quartiles.  On a CPU one thread is used and CPU seconds are counted, since other work on the
machine stretches the wall clock; on a GPU wall seconds between synchronisations.

  train    a step split into sampling, forward, backward, optimizer; useful FLOPs against the matrix rate measured in
           the same run (MFU); time and peak memory against the staged implementation in tests/; on a GPU other
           batches and less recomputation, as far as they fit; cost against n_ahead, n_passes and T
  sample   decoding with and without thoughts against the memory-bandwidth bound, measured by a copy in the same run
  prepare  data/prepare.py against the bare tokenizer on the same text and cores

Configs: a preset of configs.py, or one of the two CPU shapes `cpu` (vocabulary 4096) and `cpu_vocab` (151,936).
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanoqstar import InputError
from nanoqstar.attention import flex_for_shape
from nanoqstar.objective import Valid, quiet_star_loss
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.quietstar import QuietStar
from nanoqstar.device import autocast, pick_device, speed_up, speed_up_decoding
from nanoqstar.sampling import generate
from nanoqstar.thoughts import ThoughtLayout

STAGED = Path(__file__).parents[1] / "tests" / "staged.py"
COPIES = 4  # of the standard library's modules, as the text that prepare.py is timed on
REPEATS = 3  # steps timed in a run, after two of warm-up
ROUNDS = 3  # runs of each implementation
PREPARE = Path(__file__).parents[1] / "data" / "prepare.py"


@dataclass(frozen=True)
class Shape:
    """What is measured: a model, windows of T + A tokens, and how they think."""

    model: Qwen2Config
    batch: int
    n_ahead: int
    n_ahead_talk: int
    n_passes: int
    n_positions: int
    checkpointing: float = 0.0

    @property
    def layout(self):
        return ThoughtLayout(self.n_ahead, self.n_ahead_talk, self.n_passes, self.n_positions)


def qwen(hidden, layers, heads, kv_heads, intermediate, vocab, tied=True, bias=True, head_dim=None, theta=1e6):
    return Qwen2Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocab,
                       tie_word_embeddings=tied, attention_bias=bias, head_dim=head_dim or hidden // heads,
                       max_position_embeddings=32768, rope_theta=theta)


MODELS = {  # the shapes behind the presets' names, which are Hub ids
    "Qwen/Qwen2.5-0.5B": qwen(896, 24, 14, 2, 4864, 151936),
    "Qwen/Qwen2.5-3B": qwen(2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-7B": qwen(3584, 28, 28, 4, 18944, 152064, tied=False),
    "mistralai/Mistral-7B-v0.1": qwen(4096, 32, 32, 8, 14336, 32000, tied=False, bias=False, theta=1e4),
}
SHAPES = {
    "cpu": Shape(qwen(256, 6, 8, 2, 688, 4096, tied=False, bias=False), 2, 7, 4, 2, 127),
    "cpu_vocab": Shape(qwen(128, 2, 4, 2, 344, 151936, tied=False, bias=False), 1, 7, 4, 2, 31),
}


# ---- measuring


def spread(values):
    """{median, low, high}: the quartiles (the extremes of fewer than four values)."""
    if len(values) < 4:
        return {"median": statistics.median(values), "low": min(values), "high": max(values)}
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "low": low, "high": high}


def shown(s, form="{:.3g}"):
    return f"{form.format(s['median'])} ({form.format(s['low'])} .. {form.format(s['high'])})"


def clock(device):
    """Seconds so far: CPU seconds of this process, or wall seconds after the GPU has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def matrix_rate(device):
    """FLOP/s of large products in the dtype that training multiplies in, as a `spread`."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b, rates = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(12):
        start = clock(device)
        for _ in range(8):
            a @ b
        rates.append(8 * 2 * n**3 / (clock(device) - start))
    return spread(rates[2:])


def copy_rate(device):
    """Bytes per second that a large copy reads and writes, as a `spread`."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, rates = torch.empty_like(source), []
    for _ in range(12):
        start = clock(device)
        target.copy_(source)
        rates.append(2 * source.numel() / (clock(device) - start))
    return spread(rates[2:])


def flops(shape, live=1.0):
    """Useful FLOPs of a step: (sampling, learning).  Products with weights and visible attention pairs, nothing twice.

    Learning counts forward and backward (3 x forward), whatever is recomputed; only rows whose logits are used count
    for the LM head: of the thoughts, the share `live` that has an advantage.  Start is counted once for all passes, as
    it is computed.
    """
    m, layout = shape.model, shape.layout
    t, p, s, a = layout.n_positions, layout.n_passes, layout.n_sampled, layout.n_ahead_talk
    width = m.num_attention_heads * m.head_dim
    kv_width = m.num_key_value_heads * m.head_dim
    block = m.num_hidden_layers * m.hidden_size * (2 * width + 2 * kv_width + 3 * m.intermediate_size)
    head, pair = m.vocab_size * m.hidden_size, 4 * width * m.num_hidden_layers
    text_pairs = layout.n_text * (layout.n_text + 1) // 2
    seen = t * (t + 1) // 2  # text pairs of one token per position

    def forward(branch, rows):
        tokens = layout.n_text + t * (1 + p * branch)
        pairs = text_pairs + seen * (1 + p * branch) + t * (1 + p * (branch * (branch + 3) // 2))
        return 2 * (block * tokens + head * rows) + pair * pairs

    sampling = forward(s - 1, t * (1 + p * (s - 1)))
    learning = 3 * forward(s + a, layout.n_text + t * p * (s * live + a))
    return shape.batch * sampling, shape.batch * learning


# ---- train: one worker process per implementation, so that peak memory is its own


def make_model(shape, device):
    with torch.device(device):
        model = QuietStar(Qwen2(shape.model))
    model.lm.model.embed_tokens.weight.data.mul_(0.02)  # the rest as torch starts it, on the device
    model.init_thoughts([1], [2])
    torch.nn.init.normal_(model.mixing_head[4].weight, std=0.02)  # past the first step, where everything is zero
    return model


def synthetic(shape, device):
    text = torch.randint(shape.model.vocab_size, (shape.batch, shape.n_positions + shape.n_ahead_talk), device=device)
    return text, torch.zeros_like(text)


def our_step(shape, device, compile, optimize):
    """A function that does one step and returns its four times and the share of thoughts with an advantage.

    optimize: with an optimizer.
    """
    model = make_model(shape, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    speed_up(model, device, shape.checkpointing, compile)
    text, docs = synthetic(shape, device)
    valid = Valid.from_docs(docs, shape.n_ahead_talk)

    def step():
        u = torch.rand(shape.batch, shape.n_passes, shape.n_positions, shape.n_ahead - 2, device=device)
        times = [clock(device)]
        with autocast(device):
            thoughts, _ = model.rollout(text, docs, u)
        times.append(clock(device))
        with autocast(device):
            states = model.score(text, docs, thoughts)
            loss, parts = quiet_star_loss(
                states, model.lm.head_weight, text, thoughts, valid, valid.counts(), base_weight=0.5, mixed_weight=0.5,
                policy_weight=1e6, clamp_advantage=True, reinforce_temperature=3.0)
        times.append(clock(device))
        loss.backward()
        times.append(clock(device))
        if optimize:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(clock(device))
        return [b - a for a, b in zip(times, times[1:])], float((parts["advantage"] != 0).float().mean())
    return step


def staged_step(shape, device, compile, optimize):
    """The same for the staged implementation: sampling is part of its forward; it has no optimizer."""
    spec = importlib.util.spec_from_file_location("staged", STAGED)
    staged = sys.modules["staged"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(staged)
    model = make_model(shape, device)
    params = {name.removeprefix("lm."): p for name, p in model.named_parameters()}
    keys = staged.StagedConfig.__dataclass_fields__
    config = staged.StagedConfig(**{k: v for k, v in vars(shape.model).items() if k in keys})
    text, docs = synthetic(shape, device)

    def step():
        times = [clock(device)]
        with autocast(device):
            loss = staged.staged_step(params, config, text, docs, n_ahead=shape.n_ahead,
                                      n_ahead_talk=shape.n_ahead_talk, n_passes=shape.n_passes)["loss"]
        times.append(clock(device))
        loss.backward()
        times.append(clock(device))
        model.zero_grad(set_to_none=True)
        return [0.0, times[1] - times[0], times[2] - times[1], 0.0], None
    return step


def resident_bytes():  # Linux
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worker(which, shape, device, compile, repeats):
    """One implementation by itself: {times, live} of each step, {resident, peak}: bytes before steps and above in one.

    A GPU tells both at once; on a CPU repeats 0 asks for the memory, of the first step and without an optimizer.
    """
    step = {"ours": our_step, "staged": staged_step}[which](shape, device, compile, repeats > 0)
    if not repeats:
        resident = resident_bytes()
        step()
        return {"resident": resident, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident}
    step(), step()  # warm-up
    if device.type == "cuda":
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times, live = zip(*(step() for _ in range(repeats)))
    result = {"times": times, "live": live}
    if device.type == "cuda":
        result |= {"resident": resident, "peak": torch.cuda.max_memory_allocated() - resident}
    return result


def run_worker(which, shape, args, repeats):
    """`worker`'s result, or {failed: why}: on a CPU in a fresh process, whose peak memory is its own."""
    if args.device == "cuda":
        try:
            return worker(which, shape, torch.device("cuda"), args.compile or None, repeats)
        except RuntimeError as error:  # for want of memory, as a rule: the other figures are still worth having
            return {"failed": str(error).strip().splitlines()[0]}
        finally:
            free_gpu()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not repeats:
        env["MALLOC_MMAP_THRESHOLD_"] = "100000"  # freed blocks go back at once, for a peak that repeats
    job = json.dumps([which, {**vars(shape), "model": vars(shape.model)}, args.compile, repeats])
    command = [sys.executable, "-m", "nanoqstar.bench", "worker", "--device", args.device, "--job", job]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed, for want of memory perhaps"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def free_gpu():
    flex_for_shape.cache_clear()
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure(shape, args, names):
    """{name: {times, resident, peak} or {failed}}; on a CPU in turns: a change of the machine's speed meets all."""
    if args.device == "cuda":
        return {name: run_worker(name, shape, args, ROUNDS * REPEATS) for name in names}
    results = {name: {"times": [], "live": []} | run_worker(name, shape, args, 0) for name in names}
    for _ in range(ROUNDS):
        for name, result in results.items():
            if "failed" not in result:
                run = run_worker(name, shape, args, REPEATS)
                for key in ("times", "live"):
                    result[key] += run.pop(key, [])
                result |= run
    return results


def bench_train(shape, args, rate):
    """The step itself, and beside the staged implementation at the largest T at which both fit."""
    results = measure(shape, args, ["ours", "staged"] if STAGED.exists() else ["ours"])
    if failed := results["ours"].get("failed"):
        print(f"the step failed: {failed}")
        return {"failed": failed}
    times, peak = (results["ours"][k] for k in ("times", "peak"))
    phases = ("sampling", "forward", "backward", "optimizer")
    parts = {name: spread([t[i] for t in times]) for i, name in enumerate(phases)}
    step, (sampling, learning) = spread([sum(t) for t in times]), flops(
        shape, statistics.mean(results["ours"]["live"]))
    work = sampling + learning
    mfu = spread([work / sum(t) / rate["median"] for t in times])
    result = {"parts": parts, "step": step, "flops": work, "mfu": mfu, "floor_seconds": work / rate["median"],
              "tokens_per_second": shape.batch * shape.n_positions / step["median"], "peak_bytes": peak}
    print(f"step {shown(step)} s: " + ", ".join(f"{name} {shown(part)}" for name, part in parts.items()))
    print(f"{result['tokens_per_second']:.0f} text tokens/s; {work / 1e9:.1f} useful GFLOP "
          f"({sampling / 1e9:.1f} sampling), floor {result['floor_seconds']:.2f} s at the "
          f"measured {shown(rate, '{:.3g}')} FLOP/s: MFU {shown(mfu, '{:.0%}')}")
    print(f"peak memory {peak / 1e6:.0f} MB above the {results['ours']['resident'] / 1e6:.0f} MB resident before the "
          "step")
    if not STAGED.exists():
        print("the staged implementation is in tests/staged.py: this comparison needs a clone")
        return result
    while "failed" in results["staged"] and shape.n_positions > 16:
        shape = replace(shape, n_positions=shape.n_positions // 2)
        print(f"the staged implementation failed ({results['staged']['failed']}): trying T = {shape.n_positions}")
        results = measure(shape, args, ["staged"])
    if "ours" not in results:
        results |= measure(shape, args, ["ours"])
    if failed := next((r["failed"] for r in results.values() if "failed" in r), None):
        print(f"no comparison: {failed}")
        return result
    ours, staged = results["ours"], results["staged"]
    ratio = spread([sum(b) / sum(a[:3]) for a, b in zip(ours["times"], staged["times"], strict=True)])
    result |= {"compared_at": shape.n_positions, "speedup": ratio, "memory_ratio": staged["peak"] / ours["peak"],
               "staged": spread([sum(t) for t in staged["times"]]), "staged_peak_bytes": staged["peak"]}
    print(f"staged implementation, T = {shape.n_positions}: {shown(result['staged'])} s, "
          f"{staged['peak'] / 1e6:.0f} MB; ours (sampling, forward, backward) is {shown(ratio)} times as fast, "
          f"with {result['memory_ratio']:.2f} times less memory")
    return result


def bench_variants(shape, args, rate):
    """What else a GPU's memory holds: less recomputation, 4 windows, and 8 windows with 2 passes."""
    total, result = torch.cuda.get_device_properties(0).total_memory, {}
    for changes in ({"checkpointing": 0.5}, {"batch": 4}, {"n_passes": 2, "batch": 8}):
        variant, what = replace(shape, **changes), ", ".join(f"{k} {v}" for k, v in changes.items())
        run = run_worker("ours", variant, args, REPEATS)
        if "failed" not in run:
            step = spread([sum(t) for t in run["times"]])
            work = sum(flops(variant, statistics.mean(run["live"])))
            run = {"step": step, "mfu": work / step["median"] / rate["median"],
                   "bytes": run["resident"] + run["peak"]}
        result[what] = run
        print(f"{what:24}" + (run.get("failed") or f"{shown(run['step'])} s, MFU {run['mfu']:.0%}, "
                              f"{run['bytes'] / 2**30:.1f} of {total / 2**30:.1f} GiB"))
    return result


def bench_scaling(shape, args, step=None):
    """Seconds a step against one size at a time; step: those of the shape itself, where they are known."""
    print("seconds a step against one size at a time")
    result, steps = {}, {shape: step} if step else {}
    sizes = {"n_ahead": (3, 7, 11), "n_passes": (1, 2, 4), "n_positions": (64, 128, 256)}
    if args.device == "cuda":
        sizes = {"n_ahead": (4, 8, 12), "n_passes": (1, 2, 4), "n_positions": (256, 512, 1024)}
    for name, values in sizes.items():
        result[name] = {}
        for value in values:
            one = replace(shape, **{name: value})
            if one not in steps:
                times = run_worker("ours", one, args, REPEATS).get("times")
                steps[one] = times and spread([sum(t) for t in times])
            if steps[one]:
                result[name][value] = steps[one]
        print(f"{name:12}" + "   ".join(f"{value}: {shown(s)} s" for value, s in result[name].items()))
    return result


# ---- sample


def bench_sample(shape, device):
    result = {}
    model = make_model(shape, device)
    if device.type == "cuda":
        model.lm.to(torch.bfloat16)
        speed_up_decoding(model, device)
    weights = sum(p.numel() * p.element_size() for n, p in model.lm.named_parameters() if "embed_tokens" not in n)
    if shape.model.tie_word_embeddings:
        weights += model.lm.head_weight.numel() * model.lm.head_weight.element_size()
    mixing = sum(p.numel() * p.element_size() for p in model.mixing_head.parameters())  # read once a thought
    rate, n_tokens = copy_rate(device), 32 if device.type == "cpu" else 128
    for batch in (1, 8):
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
            bound = (forwards * weights + (mixing if n_ahead else 0)) / rate["median"]
            what = f"batch {batch}, " + (f"thoughts of {n_ahead}" if n_ahead else "no thoughts")
            result[what] = {"seconds_per_token": s, "tokens_per_second": batch / s["median"],
                            "bound": bound / s["median"]}
            print(f"{what:28}{batch / s['median']:9.1f} tokens/s   {shown(s)} s a step, "
                  f"{bound / s['median']:.0%} of the bandwidth bound "
                  f"({forwards} x {weights / 1e6:.0f} MB at {rate['median'] / 1e9:.1f} GB/s)")
    return result


# ---- prepare


def bench_prepare():
    """data/prepare.py as a user runs it, against encode_batch on the same documents, tokenizer and cores."""
    from tokenizers import Tokenizer

    if not PREPARE.exists():
        print("data/prepare.py is not here: this needs a clone")
        return None
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    with tempfile.TemporaryDirectory() as folder:
        text, first = Path(folder, "text"), Path(folder, "first")
        text.mkdir()
        (text / "all.jsonl").write_text("".join(json.dumps({"text": p.read_text(errors="replace")}) + "\n"
                                                for p in sources for _ in range(COPIES)))
        command = [sys.executable, str(PREPARE), "--input", str(text), "--val_fraction", "0.1"]
        subprocess.run([*command, "--tokenizer", "train:4096", "--out", str(first)], check=True, capture_output=True)
        tokenizer = Tokenizer.from_file(str(first / "tokenizer.json"))
        documents = [json.loads(line)["text"] for line in (text / "all.jsonl").read_text().splitlines()]
        ours, bare = [], []
        for i in range(5):
            start = time.perf_counter()
            n_tokens = sum(len(e.ids) for batch in range(0, len(documents), 1000)
                           for e in tokenizer.encode_batch(documents[batch:batch + 1000], add_special_tokens=False))
            bare.append(n_tokens / (time.perf_counter() - start))
            done = subprocess.run([*command, "--tokenizer", str(first), "--out", str(Path(folder, f"o{i}"))],
                                  check=True, capture_output=True, text=True)
            ours.append(float(done.stdout.split(" tokens/s")[0].split()[-1].replace(",", "")))
    result = {"ours": spread(ours), "bare": spread(bare), "ratio": spread([a / b for a, b in zip(ours, bare)])}
    print(f"prepare.py {shown(result['ours'])} tokens/s, bare encode_batch {shown(result['bare'])}: "
          f"{shown(result['ratio'])} of it")
    return result


def hardware(device):
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                     if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def shape_of(name):
    """The shape of a CPU benchmark or of a preset."""
    if name in SHAPES:
        return SHAPES[name]
    try:
        from configs import PRESETS
    except ImportError:
        sys.exit(f"error: presets are in configs.py, which needs a clone; here there are {', '.join(SHAPES)}")
    if name not in PRESETS:
        sys.exit(f"error: no config {name!r}: there are {', '.join([*SHAPES, *PRESETS])}")
    c = PRESETS[name].config
    vocab = {"tiny": 11, "small": 96, "text": 4096}.get(name)  # the corpora's; of text, as the README prepares it
    model = MODELS[c.model_path] if c.model_path else qwen(c.hidden_size, c.n_layers, c.n_heads, c.n_kv_heads,
                                                           c.intermediate_size, vocab)
    return Shape(model, c.batch_size, c.n_ahead, c.n_ahead_talk, c.n_passes, c.max_length, c.checkpointing)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "sample", "prepare", "all", "worker"))
    parser.add_argument("--config", help="default: both CPU shapes on a CPU, qwen2_5_3b on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, help="windows, instead of the config's")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU as well (a GPU always does)")
    parser.add_argument("--no_scaling", action="store_true", help="leave out cost against n_ahead, n_passes and T")
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of a worker process
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
    except InputError:
        parser.error("there is no CUDA GPU here: use --device cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if args.what == "worker":
        which, shape, compile, repeats = json.loads(args.job)
        shape = Shape(**{**shape, "model": Qwen2Config(**shape["model"])})
        print(json.dumps(worker(which, shape, device, compile or None, repeats)))
        return
    names = [args.config] if args.config else ["cpu", "cpu_vocab"] if device.type == "cpu" else ["qwen2_5_3b"]
    changes = {"batch": args.batch_size} if args.batch_size else {}
    shapes = {name: replace(shape_of(name), **changes) for name in names}
    start, results = time.perf_counter(), {"hardware": hardware(device)}
    print(results["hardware"])

    def section(name, function, *arguments):
        print(f"\n{name}", flush=True)
        results[name] = function(*arguments)
        if device.type == "cuda":
            free_gpu()
        results["seconds"] = round(time.perf_counter() - start)
        print(f"[{results['seconds']} s so far]", flush=True)
        if args.json:  # what is measured is kept, whatever comes after
            Path(args.json).write_text(json.dumps(results, indent=1))

    if args.what in ("train", "all"):
        results["matrix_rate"] = rate = matrix_rate(device)
        for name, shape in shapes.items():
            section(f"train {name}", bench_train, shape, args, rate)
            if device.type == "cuda":
                section(f"variants of {name}", bench_variants, shape, args, rate)
    if args.what in ("sample", "all"):
        for name, shape in shapes.items():
            section(f"sample {name}", bench_sample, shape, device)
    if args.what in ("train", "all") and not args.no_scaling:
        section(f"scaling of {names[0]}", bench_scaling, shapes[names[0]], args,
                results[f"train {names[0]}"].get("step"))
    if args.what in ("prepare", "all"):
        section("prepare", bench_prepare)


if __name__ == "__main__":
    main(sys.argv[1:])
