"""python -m nanoqstar.experiments paper --preset NAME [--key value ..] [-- OVERRIDES]

The paper's experiment from its beginning to its table: trains PRESET, trains as many FLOPs without
thoughts, and evaluates the model before, the one after plain training and the one that thinks on
GSM8K, CommonsenseQA and held-out text; beside them the paper's figures, and the run's report.
Whatever is done is not done again, and a run that was interrupted goes on: give the same command.
OVERRIDES are handed to both runs, as in `-- --max_steps 40`.
"""

import dataclasses
import json
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nanoqstar import InputError, cli
from nanoqstar.files import lock, read_json

TASKS = ("gsm8k", "commonsense_qa")
# Zelikman et al. 2024, table 1 and figure 2: Mistral 7B before and after training on OpenWebMath
PAPER = {("gsm8k", "answer_prob"): (5.9, 10.9), ("commonsense_qa", "answer_prob"): (36.3, 47.2),
         ("gsm8k --cot", "maj@8"): (40.6, 47.7)}
GIVEN = ("out_dir", "resume", "force", "plan", "push")  # set here, or of one run


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperConfig:
    preset: Literal["mistral_7b_paper", "qwen2_5_3b_math", "tiny"] = cli.setting(
        "mistral_7b_paper", "what is trained")
    out: str = cli.setting("out/paper", "folder of all of it", at_least=1)
    gsm8k: str | None = cli.setting(None, "its test set, .parquet or .jsonl; none: from the Hub",
                                    at_least=1)
    commonsense_qa: str | None = cli.setting(None, "its validation set; none: from the Hub",
                                             at_least=1)
    limit: int | None = cli.setting(None, "the first so many questions of each; none: all",
                                    at_least=1)
    samples: int = cli.setting(3, "thoughts of every answer", at_least=1, at_most=1000)
    votes: int = cli.setting(8, "chains of thought for a question of GSM8K; 0: none", at_least=0,
                             at_most=1000)
    batch_size: int = cli.setting(16, "texts of an evaluation's forward", at_least=1)

    def __post_init__(self) -> None:
        cli.check(self)


def read(args: list[str]) -> tuple[PaperConfig, list[str]]:
    """Command line -> (settings, overrides that suit the preset)."""
    cut = args.index("--") if "--" in args else len(args)
    cfg, overrides = cli.settings(PaperConfig, args[:cut], str(__doc__)), args[cut + 1:]
    try:
        from configs import PRESETS, TrainConfig
    except ModuleNotFoundError:  # installed without its scripts
        raise InputError("train.py is not here: run this from the root of a clone") from None
    cli.settings(TrainConfig, overrides, "Overrides:", base=PRESETS[cfg.preset].config)
    for name in cli.parse(TrainConfig, overrides):
        if name in GIVEN:
            raise InputError(f"--{name} is set by the experiment: leave it out after --")
    return cfg, overrides


def command(*words: str) -> None:
    """Runs a command of ours, which says what it does; InputError where it fails."""
    print(f"$ python {' '.join(words)}", flush=True)
    if code := subprocess.run([sys.executable, *words], check=False).returncode:
        raise InputError(f"python {words[0]} {' '.join(words[1:3])} ended with exit code {code}: "
                         "mend what it says, and give the same command again")


def train(out: Path, preset: str, options: Sequence[str]) -> None:
    """A run, from its newest state if it has one, unless it has come to its end."""
    file = out / "metrics.jsonl"
    rows = file.read_bytes().splitlines() if file.is_file() else []
    if not rows or b'"kind": "end"' not in rows[-1]:
        command("train.py", preset, f"--out_dir={out}", "--resume=auto", *options)


def suits(model: Path | str, name: str, file: str | None) -> str | None:
    """Why a task cannot be scored with a model's tokenizer, or None."""
    from nanoqstar import hf, tasks

    try:
        tasks.read_questions(name, hf.load_tokenizer(hf.resolve(model)), file)
    except InputError as error:
        return str(error)
    return None


def figures(file: Path, task: str) -> dict[str, tuple[float, float | None]]:
    """{what: (without thoughts, with thoughts or None)} of what `evaluate --json` has written."""
    found: dict[str, Any] = read_json(file)["found"]
    if task == "text":
        some = next(iter(found.values()))
        return {"NLL": (some["nll_base"], some["nll_mixed"] if "deciles" in some else None)}
    return {what: (100 * x["base"], 100 * x["thoughts"] if "thoughts" in x else None)
            for what, x in found.items() if what != "n"}


def table(rows: dict[tuple[str, str], dict[str, tuple[float, float | None]]]) -> str:
    """rows: {(task, what): {model: figures}}."""
    def cell(row, model, thoughts):
        x = row.get(model, (None, None))[thoughts]
        return "" if x is None else f"{x:.2f}"

    lines = ["| | before | plain training, as many FLOPs | after, base | after, with thoughts | "
             "paper, Mistral 7B |", "|---|---|---|---|---|---|"]
    for (task, what), row in rows.items():
        name = f"{task}, {what}" + " %" * (task != "text")
        paper = "{} -> {}".format(*PAPER[task, what]) if (task, what) in PAPER else ""
        lines.append(f"| {name.replace('_', ' ')} | {cell(row, 'before', 0)} | "
                     f"{cell(row, 'plain', 0)} | {cell(row, 'thoughts', 0)} | "
                     f"{cell(row, 'thoughts', 1)} | {paper} |")
    return "\n".join(lines)


def run(cfg: PaperConfig, overrides: list[str]) -> None:
    """All of it; InputError where a part fails, and then the rest goes on another time."""
    from configs import PRESETS, TrainConfig
    from nanoqstar import tasks
    from nanoqstar.flops import matched_steps

    key = f"-{zlib.crc32(' '.join(overrides).encode()):x}" if overrides else ""
    out = Path(cfg.out) / (cfg.preset + key)
    changed = dataclasses.replace(PRESETS[cfg.preset].config,
                                  **cli.parse(TrainConfig, overrides))
    before = changed.model_path or str(out / "thoughts" / "base")
    when = {f.name: f.metadata["when"] for f in dataclasses.fields(TrainConfig)}
    plain = {"n_ahead": 0, "max_steps": matched_steps(changed), "model_path": before}
    values = cli.parse(TrainConfig, overrides) | plain
    baseline = dataclasses.replace(changed, **values)  # refused now, not after a day of training
    for name in TASKS:
        if file := getattr(cfg, name):
            tasks.read_texts(name, file)
    with lock(out):
        if not (out / "thoughts").exists():
            command("train.py", cfg.preset, *overrides, "--plan")
        train(out / "thoughts", cfg.preset, overrides)
        train(out / "plain", cfg.preset, [
            f"--{name}={value}" for name, value in values.items()
            if when[name] is None or when[name].holds(baseline)])

        data = out / "thoughts" / "data" if changed.data == "fold" else Path(changed.data)
        jobs = [("text", [f"--input={data}", f"--max_length={changed.max_length}",
                          f"--sweep=n_ahead_talk={changed.n_ahead_talk}"])]  # the same tokens
        for name in TASKS:
            file = getattr(cfg, name)
            if reason := suits(before, name, file):
                print(f"left out: {reason}", flush=True)
                continue
            common = [*([f"--input={file}"] if file else []),
                      *([f"--limit={cfg.limit}"] if cfg.limit else [])]
            jobs.append((name, [*common, f"--samples={cfg.samples}"]))
            if name == "gsm8k" and cfg.votes:
                jobs.append(("gsm8k --cot", [*common, f"--votes={cfg.votes}"]))
        rows: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {}
        models = {"before": before, "plain": out / "plain", "thoughts": out / "thoughts"}
        for task, options in jobs:
            digest = zlib.crc32(json.dumps([options, cfg.batch_size]).encode())
            for name, model in models.items():
                file = out / f"{task.replace(' --', '-')}-{name}-{digest:x}.json"
                if not file.exists():
                    command("-m", "nanoqstar.evaluate", *task.split(), f"--model_path={model}",
                            *options, f"--batch_size={cfg.batch_size}", f"--json={file}")
                for what, x in figures(file, task).items():
                    rows.setdefault((task, what), {})[name] = x
        command("-m", "nanoqstar.report", str(out / "thoughts"))
        said = table(rows)
        (out / "table.md").write_text(said + "\n")
        print(f"\n{said}\n\n{out / 'table.md'}, {out / 'thoughts' / 'report.html'}")
