"""The whole state of a run on disk, so that it goes on bit for bit: nothing is ever pickled.

A state is a folder: safetensors with `NAME`, `NAME@exp_avg` and `NAME@exp_avg_sq`, a file a rank
with its rows (in the order of the ranks they are the tensor, however many wrote or read it), and
state.json, written last, with everything else and the sums of those files. It gets its name,
step-000120, when it is whole; 120 counts the updates of the run, pre-training included. All random
numbers are functions of (seed, phase, step, sample), so none of their state is kept.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nanoqstar import InputError, parallel
from nanoqstar.files import plain, read_json, sync, write_json

FORMAT = 1
STEP = "step-{:06d}"  # the name of a state, after the update
MOMENTS = ("exp_avg", "exp_avg_sq")
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PIECE = 2**24  # bytes that are written, or summed, at once
MAX_SKIPPED = 5  # non-finite gradients in a row that stop a run
WINDOW, SIGMAS = 128, 6  # a spike's gradient norm lies that far over the mean of so many before it


State = tuple[Path, dict[str, Any]]  # its folder, and what state.json says


@dataclass
class Progress:
    """Where a run stands, beside its tensors."""

    phase: str  # 'pretrain', 'think' or 'text'
    update: int  # of the phase; a run that goes on from another counts on
    pretrained: int = 0  # updates of pre-training before this phase
    skipped: int = 0  # updates that changed nothing: spikes, and gradients that were not finite
    spikes: int = 0
    in_a_row: int = 0  # gradients that were not finite, the latest
    norms: list[float] = field(default_factory=list)  # of the latest gradients, to know a spike by
    start_nll: float | None = None  # of the base on val, before this run's first update
    score: float | None = None  # of the evaluation at this update, if it has been: more is better

    @property
    def step(self) -> int:
        """Updates of the run in all."""
        return self.pretrained + self.update

    def note(self, norm: float, taken: bool) -> None:
        """An update more; norm: of its gradient. taken: whether it changed anything.

        Raises InputError where MAX_SKIPPED in a row were not finite.
        """
        finite = math.isfinite(norm)
        self.update, self.score = self.update + 1, None
        self.skipped += not taken
        self.spikes += finite and not taken
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.norms = [*self.norms, norm][-WINDOW:] if finite else self.norms
        if self.in_a_row == MAX_SKIPPED:
            raise InputError(
                f"the gradient was not finite {MAX_SKIPPED} updates in a row (update {self.update})"
                f": lower {'pretrain_' * (self.phase == 'pretrain')}learning_rate or policy_weight;"
                " these updates changed nothing")

    def spike(self) -> float:
        """The gradient norm above which an update is one; inf until WINDOW are known."""
        if len(self.norms) < WINDOW:
            return math.inf
        mean = math.fsum(self.norms) / WINDOW
        return mean + SIGMAS * math.sqrt(math.fsum((x - mean)**2 for x in self.norms) / WINDOW)


def named_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer
                  ) -> dict[str, torch.Tensor]:
    """{NAME: parameter, NAME@exp_avg: its moment, ..}, this rank's rows of each; names are free of
    wrappers' prefixes."""
    named = model.state_dict(keep_vars=True)
    moments = {f"{name}@{key}": optimizer.state[p][key] for name, p in named.items()
               for key in MOMENTS if p in optimizer.state}
    return {name: parallel.local(x) for name, x in (named | moments).items()}


def adam_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Updates that Adam has made of each parameter it has moments of."""
    return {name: int(optimizer.state[p]["step"]) for name, p in
            model.state_dict(keep_vars=True).items() if p in optimizer.state}


def in_host_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Copies of the tensors, or None where host memory would not hold them."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # that share it
    if sum(x.nbytes for x in tensors.values()) > 0.8 * free_memory() / ranks:
        return None
    try:
        return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}
    except (MemoryError, RuntimeError):
        return None


def free_memory() -> float:
    """Bytes of host memory that can be had without swapping; inf where the system does not say."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")
        with suppress(OSError, ValueError, KeyError):  # no limit, or "max"
            cached = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            free = min(free, int((group / "memory.max").read_text())
                       - int((group / "memory.current").read_text()) + int(cached["inactive_file"]))
        return free
    return math.inf


def in_words(size: float) -> str:
    """Bytes as '37.1 GB', say."""
    n = min(3, int(math.log10(max(1, size))) // 3)
    return f"{size / 1000**n:.1f} {('B', 'kB', 'MB', 'GB')[n]}"


# ---- one folder


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes a safetensors file, one tensor in host memory at a time; returns its size and sum.

    safetensors' own writer holds all of them a second time. Raises OSError.
    """
    header, end = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape),
                        "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        def write(data: memoryview) -> None:
            digest.update(data)
            while data:
                data = data[file.write(data[:PIECE]):]

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for x in tensors.values():
            raw: Any = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            write(memoryview(raw))
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def sum_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sound(info: Mapping[str, Any], at: Progress) -> bool:
    """Whether all is of its kind: the sum of a state.json is no secret."""
    counts = (at.update, at.pretrained, at.skipped, at.spikes, at.in_a_row,
              info["metrics"], *info["adam_step"].values())
    numbers = (*at.norms, *(x for x in (at.start_nll, at.score) if x is not None))
    return (all(re.fullmatch(r"rank-\d{5}\.safetensors", name) and isinstance(x["sha256"], str)
                for name, x in info["files"].items())
            and isinstance(info["config"], dict)
            and type(spent := info.get("seconds", 0.0)) is float and 0 <= spent < math.inf
            and all(isinstance(info[key], str) for key in ("data", "made_by"))
            and all(type(n) is int and 0 <= n < 2**63 for n in counts)
            and all(type(x) is float and math.isfinite(x) for x in numbers))


def read_info(folder: Path) -> dict[str, Any]:
    """What state.json says, its `progress` as Progress; InputError where it is not as written, or
    the folder is named after another update, whose state it would be taken for."""
    file = folder / "state.json"
    info = read_json(file)
    if info.pop("sha256", None) != sum_of(info) or info.get("format") != FORMAT:
        raise InputError(f"{file} is damaged, or of another version")
    with suppress(KeyError, TypeError, AttributeError):
        if sound(info, at := Progress(**info["progress"])):
            if folder.resolve().name != STEP.format(at.step):
                raise InputError(f"{folder} is {STEP.format(at.step)}, under another name: give it "
                                 "its own")
            return info | {"progress": at}
    raise InputError(f"{file} is not as this version writes it, or names files that are no state's")


def check_sums(folder: Path, info: Mapping[str, Any]) -> None:
    """InputError where a file of the state is missing or not as it was written; each rank sums its
    share of them."""
    files = list(info["files"].items())
    for name, expected in [files[i] for i in parallel.share(len(files))]:
        try:
            with open(plain(folder / name), "rb") as file:
                digest = hashlib.sha256()
                while piece := file.read(PIECE):
                    digest.update(piece)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            # another error may pass, and must not make a run go back to an earlier state
            raise InputError(f"{folder / name} cannot be read ({error.strerror})") from None
        if digest.hexdigest() != expected["sha256"]:
            raise InputError(f"{folder / name} is damaged: it is not as it was written")


def read(folder: Path) -> State:
    """A state whose files have the right sums; InputError where it is not as it was written."""
    info = read_info(folder)
    parallel.together(check_sums, folder, info)
    return folder, info


def load(folder: Path, info: Mapping[str, Any], model: torch.nn.Module,
         optimizer: torch.optim.Optimizer) -> None:
    """Fills model and optimizer from a state; moments that it lacks begin at zero, as in a new run.

    Raises InputError where it is not of this model.
    """
    where: dict[str, list[Any]] = {}  # the pieces of each tensor, in the order of the ranks
    try:
        for file in (safe_open(folder / name, "pt") for name in sorted(info["files"])):
            for name in file.keys():  # noqa: SIM118
                where.setdefault(name, []).append(file.get_slice(name))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder} cannot be read ({error})") from None
    learning = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.state_dict(keep_vars=True).items():
        for key in ("", *(f"@{moment}" for moment in MOMENTS)):
            if key and (p not in learning or name not in info["adam_step"]):
                continue
            pieces = where.get(name + key, [])
            found = read_rows(pieces, parallel.rows(p)) if pieces else None
            shape = [sum(x.get_shape()[0] for x in pieces), *p.shape[1:]]
            if found is None or shape != list(p.shape) or (
                    found.shape[1:], found.dtype) != (p.shape[1:], p.dtype):
                held = "nothing" if found is None else (
                    f"{[*shape[:1], *found.shape[1:]]} {found.dtype}")
                raise InputError(f"{folder} is the state of another model: {name + key} is {held} "
                                 f"there and {list(p.shape)} {p.dtype} here")
            target = p.detach() if not key else torch.empty_like(p, requires_grad=False)
            parallel.local(target).copy_(found)
            if key:
                step = torch.tensor(float(info["adam_step"][name]), device=p.device)
                optimizer.state[p] |= {"step": step, key[1:]: target}


def read_rows(pieces: Iterable[Any], rows: slice) -> torch.Tensor:
    """Rows of a tensor whose pieces (safetensors' slices) lie one below the other."""
    first, found = 0, list[torch.Tensor]()
    for piece in pieces:
        n = piece.get_shape()[0]
        start, stop = (min(max(x - first, 0), n) for x in (rows.start, rows.stop))
        if start < stop or not found:
            found.append(piece[start:stop])
        first += n
    return torch.cat(found) if len(found) > 1 else found[0]


# ---- all of a run


class States:
    """A run's states: the `keep` newest, and the one with the best score."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def folders(self) -> list[Path]:
        """Those that have their names, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted((x for x in found if re.fullmatch(r"step-\d{6,12}", x.name)),
                      key=lambda x: int(x.name[5:]))

    def path(self, progress: Progress) -> Path:
        return self.folder / STEP.format(progress.step)

    def scores(self) -> dict[Path, float]:
        """Of the states that were saved at an evaluation."""
        found = {}
        for folder in self.folders():
            with suppress(InputError):
                if (score := read_info(folder)["progress"].score) is not None:
                    found[folder] = score
        return found

    def best(self) -> Path | None:
        scores = self.scores()
        return max(scores, key=scores.__getitem__) if scores else None

    def check_room(self, size: int) -> str:
        """What states of `size` bytes will take, in words; InputError: not even two find room."""
        used = sum(x.stat().st_size for x in self.folder.glob("step-*/*"))
        free, most = shutil.disk_usage(self.folder).free + used, self.keep + 2
        room = f"{in_words(free)} are free in {self.folder}"
        if free < 2 * size:
            raise InputError(f"a state of this run takes {in_words(size)}, there must be room for "
                             f"two, and {room}: make room, or choose another --out_dir")
        return (f"a state takes {in_words(size)}, all together {in_words(most * size)} at most; "
                + room + (free < most * size) * ": warning, too little for all")

    def save(self, tensors: Mapping[str, torch.Tensor], progress: Progress,
             info: Mapping[str, Any], group: Any = None) -> None:
        """Writes a state, or nothing, and removes what is not to be kept. Raises OSError, on all
        ranks where one fails, which write a file each. group: in which they speak.

        One of this very step that is there already holds the same tensors: an evaluation since then
        is added to it.
        """
        folder = self.path(progress)
        partial, is_first = Path(f"{folder}.partial"), parallel.rank() == 0
        info = {"format": FORMAT, "progress": asdict(progress), **info}

        def begin() -> dict[str, Any] | None:
            if folder.exists():
                return read_info(folder)["files"]
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            return None

        def end() -> None:
            write_json(partial / "state.json", {**info, "sha256": sum_of(info)})
            partial.rename(folder)
            sync(self.folder)

        if files := parallel.first(begin, group=group):
            info["files"] = files
            if is_first:
                write_json(folder / "state.json", {**info, "sha256": sum_of(info)})
            return
        try:
            file = partial / f"rank-{parallel.rank():05d}.safetensors"
            written = parallel.together(write_tensors, file, tensors, group=group)
            info["files"] = dict(parallel.exchange([file.name, written], group))
            parallel.first(end, group=group)
        except BaseException:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if is_first:
            self.prune()

    def prune(self) -> None:
        folders, best = self.folders(), self.best()
        self.remove(x for x in folders[:-self.keep] if x != best)
        for left in self.folder.glob("step-*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def remove(self, folders: Iterable[Path]) -> None:
        """Takes their names first: half a state is none."""
        for folder in folders:
            gone = Path(f"{folder}.partial")
            shutil.rmtree(gone, ignore_errors=True)
            with suppress(OSError):  # the next save tries again
                folder.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def newest(self, say: Callable[[str], object]) -> State:
        """The newest whole state, its files summed; what is newer and damaged is said.

        Raises InputError where there is none.
        """
        for folder in reversed(self.folders()):
            try:
                return read(folder)
            except InputError as error:
                say(f"warning: {error}; an earlier state is looked for")
        raise InputError(f"{self.folder} holds no whole state to go on from: start anew, with "
                         "another --out_dir")
