"""python -m nanoqstar.experiments NAME [--seeds N] [--jobs N] [--out FOLDER] [--data FOLDER]
                                  [-- OVERRIDES]
python -m nanoqstar.experiments delimiters --model_path MODEL --data FOLDER [--key value ..]
python -m nanoqstar.experiments paper [--preset NAME] [--key value ..] [-- OVERRIDES]
python -m nanoqstar.experiments depth [--seeds N] [--jobs N] [--out FOLDER] [-- OVERRIDES]

The first runs every row of a table over seeds and prints it: mean and 95% interval per row. A run
that is finished is never repeated, so an interrupted table goes on where it stopped. The second
ranks pairs of tokens for start_init_text and end_init_text: for each pair the mixing head alone is
trained on the untrained thoughts between them; with --reread, lengths of thoughts whose delimiters
re-read. The third trains, evaluates and compares as the paper does. The fourth maps how long a
thought has to be, by steps and layers, beside plain training of as many FLOPs and four times as
many; tables and map.svg. NAME is one of

  controls    is it the thoughts, and is it REINFORCE? the demo against what would explain it away,
              and what its thoughts do when they are changed
  learned     the same with the paper's delimiters, begun at ( and ), and at a newline; the tables
              from here to `given` are with these, too
  recipe      what each choice of the official recipe is worth on this task, one factor at a time
  questions   from a neutral start embedding, without any help
  families    other text: where steps pay (pointers to follow, sums) and where not (a table)
  rarity      ever rarer useful text, from a base that has seen enough of it, both delimiters
  given       no useful text, but thoughts given to a few lines: how many suffice
  small       the demo scaled up for one GPU: six operands, a larger model (overrides can shrink it)
  text        real text (--data FOLDER from data/prepare.py), against continued training without
              thoughts

Everything after `--` is handed to every run that it applies to, as in `-- --max_steps 40`; a row's
own settings win.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

from nanoqstar import InputError, cli, paper

# Student's t, two-sided 95%, by number of runs
T95 = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
MAIN = "thoughts, policy on"
CONTROLS = {
    MAIN: "",
    "policy weight 0: NLL terms only": "--policy_weight 0",
    "sign of the policy term turned round": "--policy_weight -20",
    "advantages of other thoughts (shuffled)": "--shuffle_advantage true",
    "mixing head alone trained, thoughts untrained": "--policy_weight 0 --trainable mixing_head",
    "random thoughts (uniform letters)": "--policy_weight 0 --thoughts_from abcdefg",
    "fixed thoughts (newlines, as pause tokens)": "--policy_weight 0 --thoughts_from \\n",
    "no thoughts, as many updates": "--n_ahead 0",
    "no thoughts, as many FLOPs": "--n_ahead 0 --max_steps MATCHED",
}
LEARNED = CONTROLS | {
    "sign of the policy term turned round": "--policy_weight -10",
    "start `(`, end from newline": "--end_init_text \\n",
    "start from newline, end `)`": "--start_init_text \\n",
}
OFFICIAL = ("--policy_weight 1e6 --clamp_advantage true --reinforce_temperature 3 "
            "--embedding_lr_factor 100 --n_ahead_talk 4")
ALL_CHARACTERS = "--start_init_text abcdefg=()\\n --end_init_text abcdefg=()\\n"
NEWLINE = "--start_init_text \\n --end_init_text \\n"
RECIPE = {
    MAIN: "",
    "policy weight 0": "--policy_weight 0",
    "policy weight 1": "--policy_weight 1",
    "policy weight 100": "--policy_weight 100",
    "policy weight 1e6 *": "--policy_weight 1e6",
    "clamped advantages *": "--clamp_advantage true",
    "reinforce temperature 3 *": "--reinforce_temperature 3",
    "normalized advantages, policy weight 0.3":
        "--normalize_advantage true --policy_weight 0.3",
    "embedding learning rate x1": "--embedding_lr_factor 1",
    "embedding learning rate x100 *": "--embedding_lr_factor 100",
    "4 passes, half the windows": "--n_passes 4 --batch_size 8",
    "LoRA of rank 8": "--lora_rank 8",
    "lookahead 1": "--n_ahead_talk 1",
    "lookahead 3": "--n_ahead_talk 3",
    "lookahead 4 *": "--n_ahead_talk 4",
    "start and end from newline": NEWLINE,
    "start and end from the mean of all characters": ALL_CHARACTERS,
    "all official values (*) at once": OFFICIAL,
    "the same, official learning rate 1e-6": OFFICIAL + " --learning_rate 1e-6",
}
QUESTIONS = {
    "newline start, 4 passes, twice as long":
        NEWLINE + " --n_passes 4 --batch_size 8 --max_steps 240",
    "newline start, thoughts 2 tokens longer": NEWLINE + " --n_ahead 8 --max_steps 180",
    "newline start, three operands": NEWLINE + " --fold_operands 3 --n_ahead 5",
    "three operands, usual start": "--fold_operands 3 --n_ahead 5",
}
FAMILY = ("--fold_worked_frac 0.3 --fold_restated_frac 0.1 --fold_tokens 3000000 --max_length 94 "
          "--batch_size 8 --max_steps 80 --fold_family ")
KINDS = {"chase": "chase --pretrain_steps 2000", "sum, one layer": "sum --pretrain_steps 1000 "
         "--n_layers 1", "sum": "sum --pretrain_steps 1000", "table": "table --pretrain_steps 600"}
FAMILIES = {f"{kind}: {name}": FAMILY + text + more for kind, text in KINDS.items()
            for name, more in ((MAIN, ""), ("policy weight 0", " --policy_weight 0"))}
REREAD = ("--delimiters reread --n_ahead_talk 1 --batch_size 32 --max_steps 200 "
          "--warmup_steps 40 --embedding_lr_factor 30 --policy_weight ")  # and 20: as in tiny
RARITY = {
    f"{share} worked lines{name}": f"{base} {own}".strip() for share, base in (
        ("10%", ""), ("3%", "--fold_worked_frac 0.03 --pretrain_steps 1800"),
        ("1%", "--fold_worked_frac 0.01 --pretrain_steps 6000 --fold_tokens 4500000"))
    for name, own in (
        ("", ""), (", policy weight 0", "--policy_weight 0"), (", re-reading", REREAD + "20"),
        (", re-reading, policy weight 0", REREAD + "0"))}
UNSEEN = "--fold_worked_frac 0"
GIVEN = {
    "no worked lines, usual start": UNSEEN,
    "no worked lines, newline start": f"{UNSEEN} {NEWLINE}",
    **{f"{n} thoughts given, newline start{name}":
       f"{UNSEEN} {NEWLINE} --fold_thoughts {n} --warm_steps 300{own}"
       for n in (30, 100, 300, 1000) for name, own in (
           ("", ""), (", policy weight 0", " --policy_weight 0"),
           (", warm start alone", " --max_steps 1"))}}
TEXT = {
    MAIN: "",
    "policy weight 0: NLL terms only": "--policy_weight 0",
    "delimiters that re-read": "--delimiters reread",
    "delimiters that re-read, policy weight 0": "--delimiters reread --policy_weight 0",
    "no thoughts, as many updates": "--n_ahead 0",
    "no thoughts, as many FLOPs": "--n_ahead 0 --max_steps MATCHED",
}
TABLES = {  # rows, preset
    "controls": (CONTROLS, "tiny"), "learned": (LEARNED, "tiny_learned"),
    "recipe": (RECIPE, "tiny_learned"), "questions": (QUESTIONS, "tiny_learned"),
    "families": (FAMILIES, "tiny_learned"), "rarity": (RARITY, "tiny_learned"),
    "given": (GIVEN, "tiny_learned"), "small": (TEXT, "small"), "text": (TEXT, "text")}
OWN_BASE = ("--fold_", "--pretrain_")  # rows that share these share a base: of the row with no more
BY_TABLE = ("data", "out_dir", "seed", "resume", "plan")  # by the table to every run
BY_MAP = (*BY_TABLE, "model_path", "n_layers", "n_ahead", "fold_family", "fold_shortest",
          "fold_operands")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    name: Literal["controls", "learned", "recipe", "questions", "families", "rarity", "given",
                  "small", "text"] = cli.setting(
        dataclasses.MISSING, "the table")
    seeds: int = cli.setting(2, "runs of each row", at_least=1, at_most=max(T95))
    jobs: int = cli.setting(2, "runs at a time", at_least=1)
    out: str = cli.setting("out/experiments", "folder of all runs")
    data: str | None = cli.setting(None, "prepared folder", when=cli.When(
        "the table text", lambda c: c.name == "text"))

    def __post_init__(self) -> None:
        cli.check(self)
        if self.name == "text" and self.data is None:
            raise InputError("the table text needs --data FOLDER, made by data/prepare.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig:
    seeds: int = cli.setting(1, "runs of each cell", at_least=1, at_most=max(T95))
    jobs: int = cli.setting(2, "runs at a time", at_least=1)
    out: str = cli.setting("out/experiments", "folder of all runs")

    def __post_init__(self) -> None:
        cli.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    model_path: str = cli.setting(dataclasses.MISSING, "folder or Hub id of the model", at_least=1)
    data: str = cli.setting(dataclasses.MISSING, "prepared folder", at_least=1)
    candidates: str | None = cli.setting(
        None, "a text whose tokens are tried; none: the 8 most frequent without letters and digits",
        at_least=1, escapes=True, when=cli.When("pairs of tokens", lambda c: not c.reread))
    reread: bool = cli.setting(
        False, "delimiters re-read; not tokens are tried but every n_ahead from 3 to the one given")
    n_ahead: int = cli.setting(8, "tokens of a thought, start and end included", at_least=3)
    n_passes: int = cli.setting(2, "thoughts per position", at_least=2)
    max_length: int = cli.setting(64, "positions of a window that think", at_least=1)
    windows: int = cli.setting(256, "of training, and as many of val to judge by; with few, heads "
                               "learn nothing that holds elsewhere", at_least=2, at_most=10**6)
    batch_size: int = cli.setting(8, "windows per forward", at_least=1)
    seed: int = cli.setting(0, "of thoughts and heads", at_least=0, below=2**63)

    def __post_init__(self) -> None:
        cli.check(self)


def read(args: list[str]) -> tuple[TableConfig, list[str]]:
    """Command line -> (the table, overrides that suit its preset)."""
    names = (*TABLES, "delimiters", "paper", "depth")
    if args and not args[0].startswith("-") and args[0] not in names:
        raise InputError(f"no experiment {args[0]!r}{cli.nearest(args[0], names)}; there are "
                         + ", ".join(names))
    cut = args.index("--") if "--" in args else len(args)
    table = cli.settings(TableConfig, args[:cut], str(__doc__), "name")
    return table, checked(args[cut + 1:], TABLES[table.name][1])


def read_depth(args: list[str]) -> tuple[DepthConfig, list[str]]:
    """Command line -> (the map, overrides that suit its preset)."""
    cut = args.index("--") if "--" in args else len(args)
    return (cli.settings(DepthConfig, args[:cut], str(__doc__)),
            checked(args[cut + 1:], "tiny_learned", BY_MAP))


def checked(overrides: list[str], preset: str, taken: Sequence[str] = BY_TABLE) -> list[str]:
    """Overrides that suit a preset, and none of `taken`; or InputError."""
    try:
        from configs import PRESETS, TrainConfig
    except ModuleNotFoundError:  # installed without its scripts
        raise InputError("train.py is not here: run this from the root of a clone") from None
    cli.settings(TrainConfig, overrides, "Overrides:", base=PRESETS[preset].config)
    for name in cli.parse(TrainConfig, overrides):
        if name in taken:
            raise InputError(f"--{name} is set by the table: leave it out after --")
    return overrides


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    if args[:1] == ["paper"]:
        return cli.command(args[1:], paper.read, "nanoqstar.paper:run")
    if args[:1] == ["depth"]:
        return cli.command(args[1:], read_depth, "nanoqstar.depth:run")
    if args[:1] == ["delimiters"]:
        return cli.command(args[1:], lambda a: (cli.settings(SearchConfig, a, str(__doc__)),),
                           "nanoqstar.experiments:search")
    return cli.command(args, read, "nanoqstar.experiments:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

import json
import shutil
import statistics
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from nanoqstar import delimiters, hf, interventions
from nanoqstar.dataset import TokenDataset
from nanoqstar.device import pick_device, pick_threads
from nanoqstar.files import LOCK, lock, read_json, read_small
from nanoqstar.flops import matched_steps
from nanoqstar.tokenizer import encode, load_tokenizer


def finished(out: Path) -> dict[str, Any] | None:
    """The last evaluation of a run that came to its end, else None."""
    try:
        rows = read_small(out / "metrics.jsonl").decode().splitlines()
        records = [json.loads(line) for line in rows]
        if records[-1]["kind"] != "end":
            return None
        result = [r for r in records if r["kind"] == "eval"][-1]
        row_text("", [result])
        return result
    except (OSError, InputError, RecursionError, ValueError, LookupError, TypeError,
            AttributeError, ArithmeticError):  # it may hold anything
        return None


def train(out: Path, preset: str, options: list[str], alone: list[str] | None = None
          ) -> dict[str, Any] | None:
    """One run in a process of its own, unless it is finished; its last evaluation, or None.

    alone: the options without a base, where `options` start from one.
    """
    result = finished(out)
    if result is not None and (others := other_settings(out, preset, alone or options)):
        print(cli.one_line(f"{out}: a finished run of other settings ({others}): remove it, or "
                           "give another --out"), flush=True)
        return None
    if result is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            clear(out)
        except InputError as error:
            print(f"{out}: {error}", flush=True)
            return None
        command = [sys.executable, str(script()), preset, f"--out_dir={out}", *options]
        with open(out.with_suffix(".log"), "w") as log:
            subprocess.run(command, stdout=log, stderr=log, check=False)
        result = finished(out)
        how = summary(result) if result else f"failed, see {out.with_suffix('.log')}"
        print(f"{out}: {how}", flush=True)
    return result


def other_settings(out: Path, preset: str, options: list[str]) -> str:
    """In which settings that change what is learned a run differs from what is asked for.

    options: without a base of the table's; a run that started from one has the preset's sizes.
    """
    from configs import NEW_MODEL, PRESETS, TrainConfig, changes, restored

    saved, base = out / "config.json", PRESETS[preset].config
    try:
        before = restored(read_json(saved), saved)
    except InputError as error:
        return str(error)
    now = cli.settings(TrainConfig, options, "", base=base)
    same: dict[str, Any] = {"threads": before.threads}  # the table sets them where no GPU is
    if before.model_path is not None:  # base or its copy: a folder may be moved
        same |= {f.name: getattr(base, f.name) for f in dataclasses.fields(base)
                 if f.metadata["when"] is NEW_MODEL} | {"model_path": before.model_path}
    harmless, serious = changes(before, replace(now, **same))
    return ", ".join([*(x for x in harmless if x.startswith("max_steps ")), *serious])


def script() -> Path:
    """train.py, beside the configs.py that its settings came from."""
    return Path(str(sys.modules["configs"].__file__)).with_name("train.py")


def clear(out: Path) -> None:
    """Deletes what an unfinished run left; InputError where it is still going on."""
    if out.exists():
        with lock(out):
            for path in out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()


def summary(r: dict[str, Any]) -> str:
    direct = r.get("answers", {}).get("direct")
    return f"nll {r['nll_base']:.3f} -> {r['nll_mixed']:.3f}" + (
        f", direct {direct['accuracy_base']:.0%} -> {direct['accuracy_mixed']:.0%}"
        if direct else "")


def options_of(row: dict[str, Any], common: dict[str, Any], preset: Any) -> list[str]:
    """A row's command line: its own settings, and of the common ones those that apply beside them.

    InputError where one of its own does not apply.
    """
    cfg = replace(preset, **common | row)
    when = {f.name: f.metadata["when"] for f in dataclasses.fields(cfg)}
    given = [f"--{name}={value}" for name, value in (common | row).items()
             if name in row or when[name] is None or when[name].holds(cfg)]
    cli.settings(type(cfg), given, "", base=preset)
    return given


def interval(values: Sequence[float], form: str) -> str:
    if len(values) < 3:
        return " / ".join(form.format(v) for v in values)
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{form.format(statistics.mean(values))} ± {form.format(half)}"


def row_text(name: str, results: list[dict[str, Any]]) -> str:
    """One row of the table: direct answers where the corpus has them, and NLL over all tokens."""
    columns = [interval([r["nll_base"] for r in results], "{:.3f}"),
               interval([r["nll_mixed"] for r in results], "{:.3f}"),
               interval([r["gain"] for r in results], "{:+.4f}")]
    if "answers" in results[0]:
        direct = [r["answers"]["direct"] for r in results]
        kinds = [r["answers"]["thoughts"] for r in results]
        useful = interval([100 * (k["worked"] + k["useful"]) for k in kinds], "{:.1f}")
        columns = [interval([100 * d["accuracy_base"] for d in direct], "{:.1f}"),
                   interval([100 * d["accuracy_mixed"] for d in direct], "{:.1f}"),
                   interval([d["nll_mixed"] for d in direct], "{:.2f}"),
                   useful if any(sum(k.values()) for k in kinds) else "-", *columns[:2]]
    return "| " + " | ".join((name, str(len(results)), *columns)) + " |"


def measured(runs: Sequence[Path]) -> str:
    """A table of what interventions on finished runs come to."""
    found = [interventions.measure(run) for run in runs]
    lines = ["", "| measured on the finished runs | seeds | % |\n|---|---|---|"]
    lines += [f"| {name} | {len(found)} | {interval([100 * x[name] for x in found], '{:.1f}')} |"
              for name in found[0] if name not in ("answers", "problems")]
    counts = ", ".join(f"{x['answers']:.0f} of {x['problems']:.0f}" for x in found)
    return "\n".join([*lines, f"\nDirect answers, of so many different problems: {counts}"])


def header(has_answers: bool) -> str:
    answers = ["base right %", "right with thoughts %", "NLL of answers", "useful thoughts %"]
    columns = ["run", "seeds", *answers * has_answers, "base NLL", "mixed NLL",
               *["gain"] * (not has_answers)]
    return "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|"


def search(cfg: SearchConfig) -> None:
    """Ranks pairs of delimiters, or lengths, the best first."""
    device = pick_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer, _ = hf.load_thinker(cfg.model_path, device, dtype)
    pick_threads(None, model.lm.config.hidden_size)
    hf.check_context(model.lm.config, cfg.max_length + 1 + cfg.n_ahead)
    splits = [TokenDataset(cfg.data, name) for name in ("train", "val")]
    if load_tokenizer(splits[0].tokenizer_path.parent).to_str() != tokenizer.to_str():
        raise InputError(f"the tokenizer of {cfg.data} is not the model's: prepare the data with "
                         "--tokenizer of this model")
    train, val = (split.evenly(cfg.windows, cfg.max_length + 1) for split in splits)
    if cfg.reread:
        n, names = cfg.n_ahead - 2, "n_ahead"
        found = delimiters.lengths(model, train, val, cfg.n_ahead, cfg.n_passes, cfg.seed,
                                   cfg.batch_size)
    else:
        if cfg.candidates is None:
            ids = delimiters.frequent_marks(splits[0], tokenizer, 8)
        else:
            ids = list(dict.fromkeys(encode(tokenizer, cfg.candidates, "candidates")))
        if not ids:
            raise InputError(f"{cfg.data} holds no token without letters and digits: give "
                             "--candidates")
        n, names = len(ids)**2, "start | end"
        found = delimiters.search(model, train, val, ids, cfg.n_ahead, cfg.n_passes, cfg.seed,
                                  cfg.batch_size)
    outcomes = list(tqdm(found, total=n, disable=None))
    names = f"| {names} | gain, millinats | spread of advantages, millinats |"
    print(names + "\n" + "|---" * (names.count("|") - 1) + "|")
    for outcome in sorted(outcomes, key=lambda x: -x.gain):
        written = (repr(tokenizer.decode([i], skip_special_tokens=False)).replace("|", "\\|")
                   for i in outcome.choice)
        chosen = str(outcome.choice[0]) if cfg.reread else " | ".join(f"`{x}`" for x in written)
        error = "" if outcome.stderr is None else f" ± {2000 * outcome.stderr:.2f}"
        print(f"| {chosen} | {1000 * outcome.gain:+.2f}{error} | {1000 * outcome.spread:.1f} |")


def run(table: TableConfig, overrides: list[str]) -> None:
    """All runs of a table, then the table. InputError where some failed."""
    from configs import PRESETS, TrainConfig

    rows, name = TABLES[table.name]
    preset, common = PRESETS[name].config, cli.parse(TrainConfig, overrides)
    if table.data:
        common["data"] = table.data
        overrides = [*overrides, "--data", table.data]
    common = {"max_base_rise": None} | common  # a base that is ruined is a result
    matched = str(matched_steps(replace(preset, **common)))
    settings = {row: cli.parse(TrainConfig, text.replace("MATCHED", matched).split())
                for row, text in rows.items()}
    if not torch.cuda.is_available():
        common = {"threads": 1} | common
    for row in rows:  # nothing is run where a row does not go with the overrides
        try:
            options_of(settings[row], common, preset)
        except InputError as error:
            raise InputError(f"the row {row!r} does not go with these overrides: {error}") from None
    key = f"-{zlib.crc32(' '.join(overrides).encode()):x}" if overrides else ""
    out = Path(table.out) / (name + key)

    def run_one(job: tuple[str, int]) -> dict[str, Any] | None:
        row, seed = job
        own, late = settings[row], {"eval_every": 1_000_000} if rows[row] else {}
        folder, alone = out / slug(rows[row]) / f"seed-{seed}", options_of(
            {"seed": seed, **own}, common | late, preset)
        makes = of_base(rows[row])  # the row that makes the base
        base = out / slug(makes) / f"seed-{seed}"
        if rows[row] == makes or not (base / "base").is_dir():
            return train(folder, name, alone)
        if finished(folder) is None and other_settings(base, name, options_of(
                {"seed": seed, **cli.parse(TrainConfig, makes.split())}, common, preset)):
            print(f"{folder}: not run, as the run of its base, {base}, is of other settings")
            return None
        own = {k: v for k, v in own.items() if not k.startswith("pretrain_")}  # has been
        return train(folder, name, options_of(
            {"seed": seed, "model_path": str(base / "base"), **own}, common | late, preset), alone)

    results: dict[str, list[dict[str, Any]]] = {}
    mains = []
    with lock(out), ThreadPoolExecutor(table.jobs) as pool:
        # first those that make the bases
        for group in ([r for r in rows if rows[r] == of_base(rows[r])],
                      [r for r in rows if rows[r] != of_base(rows[r])]):
            jobs = [(row, seed) for seed in range(table.seeds) for row in group]
            for (row, seed), result in zip(jobs, pool.map(run_one, jobs), strict=True):
                if result is not None:
                    results.setdefault(row, []).append(result)
                    if row == MAIN:
                        mains.append(out / slug("") / f"seed-{seed}")
    complete = [r for rs in results.values() for r in rs]
    if complete:
        print(header("answers" in complete[0]))
        print("\n".join(row_text(row, results[row]) for row in rows if row in results))
    if table.name in ("controls", "learned") and mains:
        print(measured(mains))
    if missing := len(rows) * table.seeds - len(complete):
        raise InputError(f"{missing} runs failed, or are of other settings: the same command tries "
                         "again what is not finished")


def of_base(settings: str) -> str:
    """Those of a row's settings that its base is pre-trained with."""
    words = settings.split()
    return " ".join(f"{name} {value}" for name, value in zip(words[::2], words[1::2])
                    if name.startswith(OWN_BASE) and name != "--fold_thoughts")


def slug(settings: str) -> str:
    """A row's folder."""
    name = settings.replace("--", "").replace("\\n", "newline").replace("=()", "")
    return "-".join(name.split()) or "main"
