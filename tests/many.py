"""python tests/many.py: runs of 1, 2 and 4 processes that are stopped, killed and gone on with.

Processes that die, hang or end by a signal, and what is left; longer than the suite should take. It
also holds what test_parallel.py has several processes do: `launch` starts them as torchrun does.
Exit 0, or 1 where something was not as it must be.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import train  # noqa: E402
from configs import PRESETS  # noqa: E402
from nanoqstar import evaluate, hf, lora, parallel, weights  # noqa: E402
from nanoqstar.objective import Objective  # noqa: E402
from nanoqstar.quietstar import QuietStar  # noqa: E402
from nanoqstar.qwen2 import Qwen2, Qwen2Config  # noqa: E402
from nanoqstar.state import States  # noqa: E402

# rows that neither 2 nor 4 divide, and a matrix of one row
SHAPE = dict(vocab_size=61, hidden_size=22, intermediate_size=42, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=1, head_dim=6, max_position_embeddings=64)
CFG = dataclasses.replace(
    PRESETS["tiny"].config, batch_size=1, grad_accum=4, max_length=7, n_ahead=4, n_ahead_talk=2,
    grad_clip=0.5, learning_rate=1e-2, warmup_steps=0, schedule="constant")
RUN = dict(device="cpu", threads=1, hidden_size=32, intermediate_size=64, n_heads=2, n_kv_heads=1,
           pretrain_steps=4, pretrain_batch_size=4, fold_tokens=5000, max_length=16, batch_size=2,
           grad_accum=2, eval_windows=5, max_steps=20, eval_every=7, save_every=5, log_every=1,
           warmup_steps=5, schedule="constant", fold_thoughts=30, warm_steps=3)
CLOCK = ("seconds", "tokens_per_second", "tflops", "distinct")  # or of one rank's thoughts
# what a curve is: a thought that rounding turns into another shows in the rest
CURVE = ("nll_base", "nll_given", "nll_talk", "nll_mixed")


class Texts:
    """Windows that are functions of their index; some hold two documents."""

    def batch(self, seed, phase, step, indices, length):
        text, docs = [], []
        for i in indices:
            draw = torch.Generator().manual_seed(1000 * step + i)
            text.append(torch.randint(61, (length,), generator=draw))
            docs.append((torch.arange(length) >= 3 + i).long() + 2 * i)
        return torch.stack(text), torch.stack(docs)


def make_model(tied, dtype):
    model = QuietStar(Qwen2(Qwen2Config(**SHAPE, tie_word_embeddings=tied)),
                      banned=torch.arange(61) == 7).to(dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64)
            p.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    return model


class Calls(TorchDispatchMode):
    """Counts what ranks do together, by the names of torch's operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._opname] += function.namespace == "c10d"
        return function(*args, **kwargs or {})


def updates(tied, dtype, n):
    """{name: tensor}: thoughts, gradients, scores and parameters of n updates; how often ranks
    gathered and reduced in the last one."""
    cfg, found, model = CFG, {}, make_model(tied, dtype)
    parallel.shard(model, torch.device("cpu"))
    optimizer, thoughts, gathers = train.make_optimizer(model, cfg), [], []
    parallel.follow(model)

    def counted(function, kept):
        def call(*args):
            result = function(*args)
            gathers.append(calls.counts["_allgather_base_"])
            kept.append(result[0])
            return result
        return call

    rollout, model.loss = counted(model.rollout, thoughts), counted(model.loss, [])
    objective = Objective(policy_weight=3.0, reinforce_temperature=1.0, clamp_advantage=False)
    for step in range(n):
        batches, counts = train.load_batches(Texts(), "think", step, cfg)
        thoughts.clear()

        def keep(*_, step=step):
            for name, p in model.named_parameters():
                found[f"{name}@grad{step}"] = parallel.whole(p.grad)
        hook = optimizer.register_step_pre_hook(keep)
        calls = Calls()
        with calls if step == n - 1 else contextlib.nullcontext():
            stats, _, norm, taken = train.train_step(
                model, optimizer, batches, counts, objective, 1e-2, cfg, rollout)
        hook.remove()
        assert taken
        found.update({f"{k}{step}": x.double() for k, x in parallel.summed(stats).items()})
        found.update({f"norm{step}": norm.double(),
                      f"thoughts{step}": parallel.collect(torch.cat(thoughts), 4)})
        text, docs = Texts().batch(0, "eval", 99, range(7), cfg.max_length + cfg.n_ahead_talk)
        with parallel.gathered(model):
            scores = evaluate.score_text(model, text, docs, cfg.n_ahead, cfg.n_ahead_talk,
                                         batch_size=2)
        found.update({f"{name}@eval{step}": getattr(scores, name)
                      for name in ("base_lp", "mixed_lp", "thoughts")})
    found.update({n: parallel.whole(p.detach()) for n, p in model.named_parameters()})
    return found | {"gathers": torch.tensor(gathers[-2 * len(batches):]),
                    "reduced": torch.tensor(calls.counts["_reduce_scatter_base_"])}


def next_port():
    """A group of the same processes that follows another one meets elsewhere."""
    os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", 0)) + 1)


def compute(folder):
    """What `updates` finds, tied and untied, in fp32 and fp64, into files; by all ranks."""
    next_port()
    with parallel.joined("cpu"):
        for tied, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
            found = updates(tied, dtype, 20 if tied and dtype == torch.float64 else 2)
            if parallel.rank() == 0:
                name = f"{'' if tied else 'un'}tied-{str(dtype)[6:]}-{parallel.size()}.safetensors"
                save_file({k: x.contiguous().clone() for k, x in found.items()}, folder / name)


class Slices:
    """A safetensors file of which no whole tensor may be read."""

    def __init__(self, *args):
        self.file = safe_open(*args)
        self.get_slice, self.keys, self.metadata = (
            getattr(self.file, name) for name in ("get_slice", "keys", "metadata"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def read_rows(folder):
    """A model folder, with fresh adapters, read by rows; ranks compare theirs to the whole."""
    whole, _, _ = hf.load_thinker(folder)
    lora.add(whole.lm, 2, 4, seed=3)
    next_port()
    with parallel.joined("cpu"):
        weights.safe_open = Slices

        def shard(model):
            lora.add(model.lm, 2, 4)
            parallel.shard(model, torch.device("cpu"))
        model, _, _ = hf.load_thinker(folder, shard=shard)
        weights.safe_open = safe_open
        lora.init(model.lm, seed=3)
        ours, n_rows = dict(model.named_parameters()), 0
        for name, p in whole.named_parameters():
            mine = ours[name].to_local()
            assert torch.equal(mine, p[parallel.rows(ours[name])]), name
            n_rows += len(mine)
            assert torch.equal(parallel.whole(ours[name].detach()), p), name
        assert sum(parallel.exchange(n_rows)) == sum(len(p) for p in whole.parameters())


def options(**changes):
    return [f"--{key}={value}" for key, value in (RUN | changes).items()]


def run(out, stop=None, *args, **changes):
    """A run in this process; stop: (rank, call of train_step) before which it gets SIGTERM."""
    step, calls = train.train_step, itertools.count(1)
    next_port()

    def hooked(*args):
        if stop and parallel.rank() == stop[0] and next(calls) == stop[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    train.train_step = hooked
    try:
        return train.main([*(args or options(out_dir=out, **changes))])
    except SystemExit as end:  # of a rank that says nothing
        return end.code
    finally:
        train.train_step = step


def environment(n, rank, port):
    return os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                         "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def start(n, code, log):
    """n processes that run this code, after `import many`; what they write goes into log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"""import faulthandler, sys
faulthandler.dump_traceback_later(280, exit=True)
sys.path.insert(0, {str(Path(__file__).parent)!r})
import many
{code}"""
    with open(log, "w") as file:
        return [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=file, stderr=file,
                                 env=environment(n, rank, port)) for rank in range(n)]


def launch(n, code, log, timeout=300):
    """Their exit codes; nobody is left behind."""
    children = start(n, code, log)
    try:
        return [child.wait(timeout) for child in children]
    finally:
        for child in children:
            child.kill()


def rows(out):
    read = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read]


def apart(one, other):
    """The largest difference of two runs' curves, nats; inf where they have other rows."""
    one, other = rows(one), rows(other)
    if [(x["kind"], x["step"]) for x in one] != [(x["kind"], x["step"]) for x in other]:
        return float("inf")
    return max(abs(a[key] - b[key]) for a, b in zip(one, other, strict=True) for key in CURVE
               if key in a)


# ---- what takes long


def state_of(out):
    """Names and bytes of the newest state."""
    newest = States(Path(out) / "state", 1).folders()[-1]
    return newest.name, [(x.name, x.read_bytes()) for x in sorted(newest.glob("rank-*"))]


def killed(work, number, wait):
    """One of two processes gets a signal in mid-run: (exit codes, seconds until the other ended,
    what it said). wait: the group's timeout, seconds."""
    out, log = work / f"signal-{number}", work / f"log-{number}"
    children = start(2, f"from datetime import timedelta\n"
                     f"many.parallel.TIMEOUT = timedelta(seconds={wait})\n"
                     f"sys.exit(many.run({str(out)!r}, max_steps=60))", log)
    try:
        while "think    13/60" not in log.read_text():
            assert children[0].poll() is None, log.read_text()
            time.sleep(0.02)
        children[1].send_signal(number)
        begun = time.monotonic()
        code = children[0].wait(120)
        return code, time.monotonic() - begun, log.read_text()
    finally:
        for child in children:
            child.kill()
            child.wait()


def main():
    wrong = []

    def check(holds, what):
        print("ok   " if holds else "WRONG", what, flush=True)
        if not holds:
            wrong.append(what)

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                    "--master-port", "29611", "train.py"]

        def by_torchrun(*args):
            return subprocess.run([*torchrun, *args], cwd=ROOT, capture_output=True, text=True,
                                  check=False, timeout=300,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})

        done = by_torchrun(*options(out_dir=work / "run"))
        check(done.returncode == 0 and done.stdout.count("s in all") == 1, "torchrun: a run")
        done = by_torchrun(*options(out_dir=work / "odd", grad_accum=3, batch_size=1))
        check(done.returncode == 1 and done.stderr.count("cannot share the 3 windows") == 1
              and not (work / "odd").exists(), "torchrun: what N does not divide, said once")
        done = by_torchrun("--resume", str(work / "run"), "--max_steps", "10")
        check(done.stderr.count("nothing is left to do") == 1, "torchrun: a finished run, once")

        straight = f"sys.exit(many.run({str(work / 'straight')!r}, max_steps=60))"
        check(launch(2, straight, work / "log") == [0, 0], "60 updates on 2, undisturbed")
        for number, wait in ((signal.SIGKILL, 600), (signal.SIGSTOP, 8)):
            code, seconds, said = killed(work, number, wait)
            out = work / f"signal-{number}"
            check(code == 2 and "another process of this run" in said and seconds < 30,
                  f"{number.name} to one: the other ends after {seconds:.1f} s, timeout {wait} s")
            again = f"sys.exit(many.run(None, None, '--resume', {str(out)!r}))"
            check(launch(2, again, work / "log") == [0, 0]
                  and state_of(out) == state_of(work / "straight")
                  and rows(out) == rows(work / "straight"), f"{number.name}: gone on, bit for bit")
        out = work / "second"
        stopped = f"sys.exit(many.run({str(out)!r}, (1, 9), max_steps=60))"
        again = f"sys.exit(many.run(None, None, '--resume', {str(out)!r}))"
        check(launch(2, stopped, work / "log") == [143, 143], "SIGTERM to one: both exit with 143")
        check(launch(2, again, work / "log") == [0, 0]
              and state_of(out) == state_of(work / "straight"), "SIGTERM: gone on, bit for bit")
        ends = [launch(4, "with many.parallel.joined('cpu'): many.parallel.first(list)",
                       work / "log") for _ in range(10)]
        check(ends == [[0] * 4] * 10, f"10 groups of 4 come and go: {Counter(map(str, ends))}")
    return bool(wrong)


if __name__ == "__main__":
    if len(sys.argv) > 1:  # --help among them: it takes no options
        sys.exit(print(__doc__))
    sys.exit(main())
