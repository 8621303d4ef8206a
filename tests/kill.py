"""python tests/kill.py [--kills 30] [--seed 0]: `kill -9` at random moments, and what is left.

A small run is started with --resume auto again and again and killed while it prepares, trains,
evaluates and saves; in some of its lives the disk is full: a tmpfs of its own where we may mount
one (root), else a limit on the size of a file. Each restart must go on from the newest whole state,
and what the run comes to in the end must be, byte for byte, what it comes to undisturbed: weights,
moments, counters, rows of metrics.jsonl (but for the clock's). Exit 0, or 1 where it was not so.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file  # noqa: E402

from nanoqstar import InputError  # noqa: E402
from nanoqstar.state import States  # noqa: E402

SIZES = dict(hidden_size=64, intermediate_size=192, pretrain_steps=400, pretrain_batch_size=4,
             fold_tokens=3_000_000, max_length=20, batch_size=2, grad_accum=2, eval_windows=4,
             fold_thoughts=200, warm_steps=60, max_steps=200, eval_every=8, save_every=3,
             log_every=2, threads=1)
ROOM = 16 << 20  # bytes of the tmpfs
CLOCK = ("seconds", "tokens_per_second", "tflops")


def command(out: Path) -> list[str]:
    options = [f"--{key}={value}" for key, value in SIZES.items()]
    return [sys.executable, "train.py", *options, f"--out_dir={out}", "--resume=auto"]


def result(out: Path) -> dict[str, object]:
    """All that a run has come to."""
    state = States(out / "state", 1).folders()[-1]
    info = json.loads((state / "state.json").read_text())
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    own = load_file(out / "checkpoint" / "quietstar.safetensors")
    return {
        "state's tensors": (state / "rank-00000.safetensors").read_bytes(),
        "state's counters": (state.name, info["progress"], info["adam_step"]),
        "model": (out / "checkpoint" / "model.safetensors").read_bytes(),
        "thought parameters": {name: x.numpy().tobytes() for name, x in own.items()},
        "metrics": [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]}


def newest(out: Path) -> Path | None:
    with suppress(InputError):
        return States(out / "state", 1).newest(lambda line: None)[0]
    return None


def moment(out: Path, log: str) -> str:
    """What a run is at, by what it has left lying."""
    if any((out / "state").glob("*.partial")):
        return "saving a state"
    for name in ("data.partial", "base.partial", "checkpoint.partial"):
        if (out / name).exists():
            return "preparing" if name == "data.partial" else "saving the model"
    said = [word for word in ("s in all", "think ", "eval at", "warm ", "pretrain ",
                              "goes on from", "parameters,") if word in log]
    return {"s in all": "ending", "think ": "thinking", "eval at": "thinking",
            "warm ": "warming", "pretrain ": "pre-training", "goes on from": "going on",
            "parameters,": "beginning", "": "starting"}[said[0] if said else ""]


class Disk:
    """A folder whose disk can be filled: a tmpfs, where we may mount one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)],
                              capture_output=True, check=False)
        self.mounted = done.returncode == 0
        self.limit = resource.RLIM_INFINITY

    def fill(self, free: int) -> None:
        if not self.mounted:
            self.limit = free
            return
        with suppress(OSError), open(self.ballast, "wb", buffering=0) as file:
            for _ in range(max(0, shutil.disk_usage(self.folder).free - free) >> 12):
                file.write(bytes(4096))

    def empty(self) -> None:
        self.ballast.unlink(missing_ok=True)
        self.limit = resource.RLIM_INFINITY

    def limits(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=False)


def live(disk: Disk, out: Path, log: Path, rng: random.Random, seconds: float, deadly: bool
         ) -> tuple[int, str]:
    """A life of the run: (exit code, what it was at when it was killed).

    At any moment of the `seconds` a life takes; or at the first after it when it saves, or prepares
    (which it does but once).
    """
    wanted = rng.choice(["any", "any", "saving a state", "saving the model", "preparing"])
    with open(log, "w") as file:
        child = subprocess.Popen(command(out), cwd=ROOT, stdout=file, stderr=file,
                                 preexec_fn=disk.limits)
    begun, where = time.monotonic(), ""
    after = 0 if wanted == "preparing" else rng.uniform(0, seconds)
    while child.poll() is None:
        time.sleep(0.0005)
        late = time.monotonic() - begun - after
        if deadly and late > 0:
            where = moment(out, log.read_text())
            if wanted in ("any", where) or late > seconds:
                child.kill()
                break
    return child.wait(), where


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=(
        argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    rng, counts, where = random.Random(given.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as temporary:
        log, disk = Path(temporary) / "log", Disk(Path(temporary) / "disk")
        try:
            begun = time.monotonic()
            code, _ = live(disk, disk.folder / "straight", log, rng, 0, deadly=False)
            seconds = time.monotonic() - begun
            assert code == 0, log.read_text()
            expected = result(disk.folder / "straight")
            shutil.rmtree(disk.folder / "straight")
            size = len(expected["state's tensors"])  # type: ignore[arg-type]
            out, wrong = disk.folder / "run", []
            while True:
                before, deadly = newest(out), counts["kills"] < given.kills
                full = deadly and rng.random() < 0.25
                if full:
                    disk.fill(rng.randrange(3 * size))
                begun = time.monotonic()
                code, place = live(disk, out, log, rng, seconds, deadly)
                disk.empty()
                if code == 0:  # others may have slowed the first
                    seconds = min(seconds, time.monotonic() - begun)
                said = log.read_text()
                counts["lives with a full disk"] += full
                counts["saves that failed and were reported"] += said.count("could not be saved")
                begins = "goes on from" if before else "parameters, "
                counts["restarts from a state" if before else "starts"] += begins in said
                if before and "goes on from" in said and f"goes on from {before}:" not in said:
                    wrong.append(f"went on from another state than {before}:\n{said}")
                if "Traceback" in said:
                    wrong.append(said)
                if code == -9:
                    counts["kills"] += 1
                    print(f"\rkills: {counts['kills']}", end="", file=sys.stderr, flush=True)
                    where[place + full * ", disk full"] += 1
                    if before and not newest(out):
                        wrong.append(f"killed while {place}: no whole state is left")
                elif code == 0 and not full:  # else what it saved last may not be all of it
                    counts["runs that came to their end"] += 1
                    found = result(out)
                    wrong += [f"{key} differ" for key, x in expected.items() if found[key] != x]
                    if not deadly:
                        break
                    shutil.rmtree(out)  # and once more
                elif full:
                    counts["lives with a full disk that ended"] += 1
                else:
                    wrong.append(f"exit code {code}:\n{said}")
                    break
        finally:
            disk.close()
    print(file=sys.stderr)
    how = "a tmpfs, filled" if disk.mounted else "RLIMIT_FSIZE"
    print(f"a full disk is {how}; a state takes {size:,} bytes; undisturbed {seconds:.1f} s")
    for count in (counts, where):
        print("\n".join(f"{n:5d} {what}" for what, n in count.most_common()), end="\n\n")
    print("\n".join(wrong) or "every end is the undisturbed run's, byte for byte")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
