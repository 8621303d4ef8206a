"""A run's folder: config.json, metrics.jsonl, what is saved and said; signals that end a run."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

import torch
from huggingface_hub.utils import disable_progress_bars
from tokenizers import Tokenizer
from tqdm import tqdm

from nanoqstar import InputError, hf, hub, lora, parallel
from nanoqstar.cli import OUT_OF_MEMORY, Interrupted, is_out_of_memory
from nanoqstar.files import LOCK, lock, plain, write_json
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2
from nanoqstar.state import Progress, States, adam_steps, in_host_memory, named_tensors

MADE = ("config.json", "config.json.new", "metrics.jsonl", "data", "data.partial")  # by a start
SILENCE = 5.0  # seconds after which a line of pre-training is shown


class Signals:
    """SIGINT and SIGTERM are noted, and obeyed at an update's end: then `check` raises Interrupted.

    Within `at_once`, where nothing can be lost, they are obeyed immediately, unless other processes
    would wait for this one; so is a second one. One that reaches one rank, all obey at `check`.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.now = False
        self.agreed = False  # whether all ranks end here

    def handle(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number is not None, number
        if (self.now and parallel.size() == 1) or again:
            raise Interrupted(number)
        with suppress(OSError, RuntimeError):  # of a closed stderr, or one that is being written to
            tqdm.write("ending after this update", file=sys.stderr)

    def check(self) -> None:
        if number := max(parallel.exchange(self.number or 0)):
            self.agreed = True
            raise Interrupted(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        self.now = True
        try:
            self.check()
            yield
        finally:
            self.now = False

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        tqdm.get_lock()  # made now, since a handler may raise where it would be made later
        try:
            before = {n: signal.signal(n, self.handle) for n in numbers}
        except ValueError:  # not in the main thread, which alone gets signals
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def run_folder(out_dir: str | None, name: str, resume: str | None = None) -> Iterator[Path]:
    """The run's folder, made now and held by this process; never one that holds anything already.

    A start that fails leaves nothing behind: what was made is removed where nothing was learned.
    resume: the folder of a run, which goes on there, or 'auto': `out_dir`, else out/NAME, where
    that holds a state; what a start was killed in, before it had saved any, is made anew.
    """
    if resume == "auto":
        out_dir = str(Path("out") / name) if out_dir is None else out_dir
    elif resume is not None and not States(Path(out_dir := resume) / "state", 1).folders():
        raise InputError(f"{resume} holds no state to go on from: name the folder of a run that "
                         "has saved one")
    with ExitStack() as held:
        for n in count(1):
            out = Path("out") / (name if n == 1 else f"{name}-{n}") if out_dir is None else Path(
                out_dir)
            missing = [p for p in (out, *out.parents) if not p.exists()]
            if out_dir is None and out not in missing:
                continue
            try:
                make_and_hold(held, out)
                break
            except InputError:
                if out_dir is not None:
                    raise  # else another run has just taken it
        if resume and (out / "state").is_dir():  # made first of all
            if not States(out / "state", 1).folders():
                remove(out / name for name in MADE)
            yield out
            return
        if any(p.name != LOCK for p in out.iterdir()):
            raise InputError(f"{out} already holds a run or other files: choose another "
                             "--out_dir, or delete it")
        try:
            yield out
        except BaseException:
            if not has_learned(out):
                remove_made(out, missing)
            raise


def remove_made(out: Path, missing: list[Path]) -> None:
    """Empties a folder that was empty, and removes those that were missing before."""
    remove(out.iterdir())
    for folder in missing:
        with suppress(OSError):  # somebody else's by now
            folder.rmdir()


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def has_learned(out: Path) -> bool:
    """Whether a run's folder holds a model, or the log of an update."""
    metrics = out / "metrics.jsonl"
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    return ((out / "base").exists() or (out / "checkpoint").exists()
            or bool(States(out / "state", 1).folders())
            or any('"kind": "eval"' not in row for row in rows))


def make_and_hold(held: ExitStack, out: Path) -> None:
    try:
        held.enter_context(lock(out))
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made ({error.strerror}): choose another "
                         "--out_dir") from None


class RunLog:
    """Writes metrics and says lines, on the first rank; nothing that fails here ends a run."""

    def __init__(self, folder: Path, config: dict[str, Any], wandb: Any = None,
                 peak: float | None = None, keep: int = 2) -> None:
        """config: the run's settings, kept with it. peak: FLOP/s of a device, where known.
        keep: so many states. A run that goes on writes nothing here before `go_on`."""
        self.folder, self.config, self.wandb = folder, config, wandb
        self.peak = peak and peak * parallel.size()
        self.pretrained = 0  # updates
        self.advice = OUT_OF_MEMORY
        self.saved: tuple[Path, int] | None = None  # the newest of what is saved, and its update
        self.saving: Future | None = None
        self.pushed, self.pushing = 0, cast(threading.Thread | None, None)  # update, by whom
        self.states = States(folder / "state", keep)
        self.start = self.said = time.perf_counter()
        self.is_first, self.group = parallel.rank() == 0, parallel.another_group()
        self.unwritten = b""  # of metrics.jsonl, on a full disk: later, or never
        if self.is_first:
            self.states.folder.mkdir(exist_ok=True)
            if not self.states.folders():
                write_json(folder / "config.json", config)
        metrics = plain(folder / "metrics.jsonl") if self.is_first else os.devnull
        self.metrics = open(metrics, "ab", buffering=0)  # noqa: SIM115

    def go_on(self, state: Path, info: Mapping[str, Any]) -> None:
        """From a state: what was logged and saved after it never was."""
        self.saved = state, info["progress"].update
        if not self.is_first:
            return
        write_json(self.folder / "config.json", self.config)
        states = self.states.folders()
        newer = states[states.index(state) + 1:]
        for folder in newer:
            self.say(f"removed: {folder}, which is newer than what the run goes on from")
        self.states.remove(newer)
        if os.path.getsize(self.metrics.name) < info["metrics"]:
            write(f"warning: {self.metrics.name} lacks rows that were in it", sys.stderr)
        else:
            os.truncate(self.metrics.name, info["metrics"])

    def write(self, kind: str, step: int, **values: Any) -> None:
        """A row of metrics.jsonl; W&B counts on from pre-training."""
        self.guard(f"{kind} {step} could not be logged", self.write_row, kind, step, values)

    def write_row(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self.unwritten += json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n"
        self.write_rows()
        if self.wandb:
            try:
                self.wandb.log({f"{kind}/{k}": v for k, v in values.items()},
                               step=self.pretrained + step)
            except Exception as error:  # W&B has many
                raise OSError(f"W&B: {error}") from error

    def write_rows(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.metrics.write(self.unwritten):]

    def start_clock(self, step: int) -> None:
        self.clock = step, time.perf_counter()

    def update(self, phase: str, done: int, last: int, n_tokens: int, work: float,
               thoughts: torch.Tensor | None, stats: dict[str, Any]) -> None:
        """Logs and shows an update's statistics and the speed since the clock was started.

        n_tokens, work: an update's text tokens and useful FLOPs. thoughts: (B, P, T, S), some of
        them: the share of `distinct` ones shows a collapse first.
        """
        step, start = self.clock
        seconds = (time.perf_counter() - start) / max(1, done - step)
        self.start_clock(done)
        values = {k: float(v) for k, v in stats.items()}
        if thoughts is not None:
            flat = thoughts.flatten(0, 2)
            values["distinct"] = len(flat.unique(dim=0)) / len(flat)
        values |= {"seconds": seconds, "tokens_per_second": n_tokens / seconds,
                   "tflops": work / seconds / 1e12}
        if self.peak:
            values["mfu"] = work / seconds / self.peak
        self.write(phase, done, **values)
        shown = ("nll_base", "nll_talk", "nll_given", "policy", "reward", "gain", "positive",
                 "mix", "entropy", "distinct")
        parts = [f"{phase} {done:5d}/{last}",
                 *(f"{k.removeprefix('nll_')} {values[k]:.3f}" for k in shown if k in values),
                 f"gnorm {values['grad_norm']:.2f}", f"lr {values['learning_rate']:.1e}",
                 f"{seconds * 1e3:.0f} ms", f"{n_tokens / seconds:.0f} tok/s",
                 f"{values['tflops']:.3g} TFLOP/s"]
        parts += [f"MFU {values['mfu']:.0%}"] if self.peak else []
        parts += [f"skipped {values['skipped']:.0f}"] if values["skipped"] else []
        self.say("  ".join(parts), unless_recent=phase == "pretrain")

    def save(self, at: Progress, model: QuietStar, optimizer: torch.optim.Optimizer | None,
             tokenizer: Tokenizer, thinking: hf.Thinking | None, source: Path | None,
             info: Mapping[str, Any], background: bool = False) -> None:
        """The state, where there is an optimizer; and the model for others, into base/
        (pre-training) or checkpoint/. What went wrong is said, and the run goes on with what was
        saved before.

        info: what goes into state.json besides. background: only the copy into host memory is
        waited for, if it fits; nothing is saved as long as the save before is not done. Many ranks
        write a file each of the state; the first one the model, gathered in its host memory.
        """
        busy = background and self.saving is not None and not self.saving.done()
        if any(parallel.exchange(busy)):
            self.say(f"update {at.update} is not saved: the save before it is still being written")
            return
        parallel.together(self.wait)
        finite = all(bool(parallel.local(p).isfinite().all()) for p in model.parameters())
        if not all(parallel.exchange(finite)):
            write(f"warning: update {at.update} is not saved: its weights are not finite",
                  sys.stderr)
            return
        failure = f"the state of update {at.update} could not be saved"
        known: dict[str, Any] = {}
        tensors = named = dict(model.state_dict(keep_vars=True))
        if optimizer and all(parallel.exchange(self.guard(failure, self.write_rows))):
            tensors = named_tensors(model, optimizer)
            known = {**info, "config": self.config, "adam_step": adam_steps(model, optimizer),
                     "metrics": os.path.getsize(self.metrics.name)}
        copies = in_host_memory(tensors) if background else None
        whole = parallel.on_first(named) if parallel.is_sharded(model) else None

        def save_both(tensors: Mapping[str, torch.Tensor], at: Progress) -> None:
            if known and self.guard(failure, self.save_state, tensors, at, known):
                self.saved = self.states.path(at), at.update
            if not self.is_first:
                return
            first = at.phase == "pretrain"
            folder = self.folder / ("base" if first else "checkpoint")
            if self.guard(f"update {at.update} could not be saved", hf.save, folder,
                          stand_in(model, whole or tensors, self.config.get("lora_rank", 0)),
                          tokenizer, thinking=thinking, step=0 if first else at.update,
                          config=self.config, source=source,
                          dtype=self.config.get("save_dtype", "fp32")):
                self.saved = folder, at.update
                if not first:
                    self.back_up(at.update)

        thread = ThreadPoolExecutor(1)
        self.saving = thread.submit(save_both, copies or tensors, dataclasses.replace(at))
        thread.shutdown(wait=False)
        if copies is None:
            self.wait()

    def back_up(self, update: int, last: bool = False) -> None:
        """Pushes checkpoint/ to the Hub, where that is due, without waiting for it; last: due
        unless it has been, and waited for. What fails is said, and the run goes on."""
        name = self.config.get("push")
        if not name or not self.is_first:
            return
        if last and self.pushing:
            self.pushing.join()
        due = update > self.pushed if last else update - self.pushed >= self.config["push_every"]
        if due and not (self.pushing and self.pushing.is_alive()):
            # the next save may replace checkpoint/ meanwhile, never a file in it
            copy, self.pushed = self.folder / "checkpoint.push", update

            def push() -> None:
                try:
                    hub.push(copy, name, f"Update {update}")
                    self.say(f"update {update} is backed up to {name}")
                except InputError as error:
                    write(f"warning: update {update} is not backed up: {error}; the run goes on",
                          sys.stderr)
                shutil.rmtree(copy, ignore_errors=True)

            shutil.rmtree(copy, ignore_errors=True)
            if self.guard(f"update {update} is not backed up", shutil.copytree,
                          self.folder / "checkpoint", copy, copy_function=link):
                disable_progress_bars()
                self.pushing = threading.Thread(target=push, daemon=True)  # none waits at the exit
                self.pushing.start()
                if last:
                    self.pushing.join()

    def wait(self) -> None:
        """Until nothing is being saved."""
        if self.saving:
            self.saving.result()
            self.saving = None

    def save_state(self, tensors: Mapping[str, torch.Tensor], at: Progress, known: dict[str, Any]
                   ) -> None:
        parallel.first(os.fsync, self.metrics.fileno(), group=self.group)  # the rows it counts
        self.states.save(tensors, at, known, self.group)

    @property
    def kept(self) -> str:
        """What a run that ends now leaves, in words."""
        self.wait()
        if self.saved is None:
            return "nothing is saved"
        return f"update {self.saved[1]} is saved in {self.saved[0]}"

    @property
    def how_to_go_on(self) -> str:
        if self.saved is None:
            return ""
        return ": go on with " + (f"--resume {self.folder}" if self.states.folders() else
                                  f"--model_path {self.saved[0]}")

    @contextmanager
    def saying_what_is_kept(self) -> Iterator[None]:
        """Where a signal or the memory ends a run."""
        try:
            yield
        except Interrupted as end:
            raise Interrupted(end.number, f"{end}; {self.kept}{self.how_to_go_on}") from None
        except (MemoryError, RuntimeError) as error:
            if parallel.is_lost(error):
                with suppress(Exception):  # of a save that waits for the others
                    self.wait()
                self.saving = None
            elif not is_out_of_memory(error):
                raise
            what = parallel.LOST if parallel.is_lost(error) else self.advice
            raise InputError(f"{what}; {self.kept}{self.how_to_go_on}") from None

    def say(self, line: str, unless_recent: bool = False) -> None:
        """unless_recent: only where nothing has been said for some seconds."""
        now = time.perf_counter()
        if unless_recent and now - self.said < SILENCE:
            return
        self.said = now
        write(line, sys.stdout)

    def sign_of_life(self, phase: str, done: int, last: int) -> None:
        """A line, where nothing has been said for long and no progress bar is to be seen."""
        if time.perf_counter() - self.said > 2 * SILENCE and not sys.stderr.isatty():
            self.say(f"{phase} {done:5d}/{last} ..")

    def guard(self, failure: str, function: Any, *args: Any, **options: Any) -> bool:
        """Whether function(*args) came to its end; a full disk, say, is reported and no more."""
        try:
            function(*args, **options)
            return True
        except OSError as error:
            write(f"warning: {failure} ({error.strerror or error}); the run goes on", sys.stderr)
            return False

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def link(source: str, target: str) -> None:
    """A second name for a file, or where the disk has none a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def stand_in(model: QuietStar, tensors: Mapping[str, torch.Tensor], lora_rank: int) -> QuietStar:
    """A model of these tensors, which may be copies of the model's own."""
    with torch.device("meta"):
        copy = QuietStar(Qwen2(model.lm.config), model.thought_temperature, reread=model.reread)
    if lora_rank:
        lora.add(copy.lm, lora_rank, cast(int, model.lm.lora_alpha))
    copy.load_state_dict({name: x.detach() for name, x in tensors.items() if "@" not in name},
                         assign=True)
    return copy


def write(line: str, stream: TextIO) -> None:
    """A line above the progress bar; where nobody reads on (`| head -1`), or the log's disk is
    full, the run is worth finishing all the same. Of many processes the first one speaks."""
    if parallel.rank():
        return
    try:
        tqdm.write(line, file=stream)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:
        pass


def start_wandb(name: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise InputError("wandb is not installed: pip install -e '.[wandb]', or leave --wandb out"
                         ) from None
    try:
        return wandb.init(project="nanoqstar", name=name, config=config)
    except Exception as error:  # W&B has many
        raise InputError(f"W&B does not start: {' '.join(str(error).split())}; log in with `wandb "
                         "login`, or leave --wandb out") from None
