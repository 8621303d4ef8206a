"""python -m nanoqstar.experiments NAME [--seeds N] [--jobs N] [--out FOLDER] [--data FOLDER] [-- OVERRIDES]

Runs every row of a table over seeds and prints it: mean and 95% interval per row.  A run that is finished is never
repeated, so an interrupted table goes on where it stopped.  NAME is one of

  controls    is it the thoughts, and is it REINFORCE?  the demo against what would explain it away
  recipe      what each choice of the official recipe is worth on this task, one factor at a time
  questions   from a neutral start embedding; with ever rarer useful text
  small       the demo scaled up for one GPU: six operands, a larger model (overrides can shrink it)
  text        real text (--data FOLDER from data/prepare.py), against continued training without thoughts

Everything after `--` is handed to every run, as in `-- --max_steps 40`; a row's own settings win.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from nanoqstar.thoughts import ThoughtLayout

# Student's t, two-sided 95%, by number of runs
T95 = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
MAIN = "thoughts, policy on"
CONTROLS = {
    MAIN: "",
    "policy weight 0: NLL terms only": "--policy_weight 0",
    "mixing head alone trained, thoughts untrained": "--policy_weight 0 --trainable mixing_head",
    "random thoughts (uniform letters)": "--policy_weight 0 --thoughts_from abcdefg",
    "fixed thoughts (newlines, as pause tokens)": "--policy_weight 0 --thoughts_from \\n",
    "no thoughts, as many updates": "--n_ahead 0",
    "no thoughts, as many FLOPs": "--n_ahead 0 --max_steps MATCHED",
}
RECIPE = {
    MAIN: "",
    "policy weight 0": "--policy_weight 0",
    "policy weight 1": "--policy_weight 1",
    "policy weight 100": "--policy_weight 100",
    "policy weight 1e6 *": "--policy_weight 1e6",
    "clamped advantages *": "--clamp_advantage true",
    "reinforce temperature 3 *": "--reinforce_temperature 3",
    "normalized advantages, policy weight 0.3": "--normalize_advantage true --policy_weight 0.3",
    "embedding learning rate x1": "--embedding_lr_factor 1",
    "embedding learning rate x100 *": "--embedding_lr_factor 100",
    "4 passes, half the windows": "--n_passes 4 --batch_size 8",
    "lookahead 1": "--n_ahead_talk 1",
    "lookahead 3": "--n_ahead_talk 3",
    "lookahead 4 *": "--n_ahead_talk 4",
    "start and end from newline": "--start_init_text \\n --end_init_text \\n",
    "start and end from the mean of all characters": "--start_init_text abcdefg=()\\n --end_init_text abcdefg=()\\n",
    "all official values (*) at once": "--policy_weight 1e6 --clamp_advantage true --reinforce_temperature 3 "
                                       "--embedding_lr_factor 100 --n_ahead_talk 4",
    "the same, official learning rate 1e-6": "--policy_weight 1e6 --clamp_advantage true --reinforce_temperature 3 "
                                             "--embedding_lr_factor 100 --n_ahead_talk 4 --learning_rate 1e-6",
}
NEWLINE = "--start_init_text \\n --end_init_text \\n"
QUESTIONS = {
    "newline start, 4 passes, twice as long": NEWLINE + " --n_passes 4 --batch_size 8 --max_steps 320",
    "newline start, thoughts 2 tokens longer": NEWLINE + " --n_ahead 8 --max_steps 240",
    "newline start, three operands": NEWLINE + " --fold_operands 3 --n_ahead 5",
    "three operands, usual start": "--fold_operands 3 --n_ahead 5",
    "3% worked lines": "--fold_worked_frac 0.03",
    "3% worked lines, pre-trained three times as long":
        "--fold_worked_frac 0.03 --pretrain_steps 1800 --fold_tokens 4500000",
    "1% worked lines": "--fold_worked_frac 0.01",
    "1% worked lines, pre-trained three times as long":
        "--fold_worked_frac 0.01 --pretrain_steps 1800 --fold_tokens 4500000",
}
TEXT = {MAIN: "", "policy weight 0: NLL terms only": "--policy_weight 0", "no thoughts, as many updates": "--n_ahead 0"}
TABLES = {  # rows, preset
    "controls": (CONTROLS, "tiny"), "recipe": (RECIPE, "tiny"), "questions": (QUESTIONS, "tiny"),
    "small": (TEXT, "small"), "text": (TEXT, "text")}
OWN_TEXT = ("fold_", "pretrain_")  # a row that changes these pre-trains its own base


def finished(out):
    """The last evaluation of a run that came to its end, else None."""
    try:
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError):
        return None
    if not records or records[-1]["kind"] != "end":
        return None
    return [r for r in records if r["kind"] == "eval"][-1]


def train(out, preset, seed, settings):
    """One run in a process of its own, one CPU thread unless a GPU does the work; its last evaluation, or None."""
    result = finished(out)
    if result is None:
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "train.py", preset, "--seed", str(seed), "--out_dir", str(out), *settings]
        if not torch.cuda.is_available():
            command += ["--threads", "1"]
        with open(out.with_suffix(".log"), "w") as log:
            subprocess.run(command, stdout=log, stderr=log, check=False)
        result = finished(out)
        print(f"{out}: " + (summary(result) if result else f"failed, see {out.with_suffix('.log')}"), flush=True)
    return result


def summary(r):
    direct = r.get("answers", {}).get("direct")
    return f"nll {r['nll_base']:.3f} -> {r['nll_mixed']:.3f}" + (
        f", direct {direct['accuracy_base']:.0%} -> {direct['accuracy_mixed']:.0%}" if direct else "")


def matched_steps(cfg):
    """Plain updates that cost the FLOPs of the thinking ones: tokens x 6 to learn, x 2 to sample; parameters cancel."""
    layout = ThoughtLayout(cfg.n_ahead, cfg.n_ahead_talk, cfg.n_passes, cfg.max_length)
    rollout = layout.rollout_packing
    return round(cfg.max_steps * (6 * layout.packing.n_packed + 2 * rollout.n_packed) / (6 * cfg.max_length))


def interval(values, form):
    mean = statistics.mean(values)
    if len(values) < 3:
        return " / ".join(form.format(v) for v in values)
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{form.format(mean)} ± {form.format(half)}"


def row_text(name, results):
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


def header(has_answers):
    columns = ["run", "seeds"] + (["base right %", "right with thoughts %", "NLL of answers", "useful thoughts %"]
                                  if has_answers else []) + ["base NLL", "mixed NLL"] + ["gain"] * (not has_answers)
    return "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|"


def main(args):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", default="out/experiments")
    parser.add_argument("--data", help="prepared folder of the text experiment")
    cut = args.index("--") if "--" in args else len(args)
    options, overrides = parser.parse_args(args[:cut]), args[cut + 1:]
    if not Path("train.py").exists():
        parser.error("there is no train.py here: run this from the root of a clone")
    if (options.name == "text") != (options.data is not None):
        parser.error("text, and only text, needs --data FOLDER (made by data/prepare.py)")
    if not 1 <= options.seeds <= max(T95):
        parser.error(f"--seeds must lie between 1 and {max(T95)}")
    from configs import PRESETS, ConfigError, TrainConfig, parse_options
    rows, preset = TABLES[options.name]
    try:
        cfg = replace(PRESETS[preset].config, **parse_options(TrainConfig, overrides))
    except ConfigError as error:
        parser.error(str(error))
    common = overrides + (["--data", options.data] if options.data else [])
    out = Path(options.out) / (f"{preset}-{zlib.crc32(' '.join(common).encode()):x}" if common else preset)

    def run(job):
        name, seed = job
        settings, folder = rows[name].split(), out / slug(rows[name]) / f"seed-{seed}"
        settings = [str(matched_steps(cfg)) if s == "MATCHED" else s for s in settings]
        base = out / slug("") / f"seed-{seed}" / "base"
        if settings and base.is_dir() and not any(s.startswith(tuple("--" + o for o in OWN_TEXT)) for s in settings):
            settings = ["--model_path", str(base), *settings]
        late = ["--eval_every", "1000000"] if settings else []
        return train(folder, preset, seed, common + late + settings)

    results = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        # first those that make the bases
        for group in ([n for n in rows if not rows[n]], [n for n in rows if rows[n]]):
            jobs = [(name, seed) for seed in range(options.seeds) for name in group]
            for (name, seed), result in zip(jobs, pool.map(run, jobs), strict=True):
                if result is not None:
                    results.setdefault(name, []).append(result)
    complete = [r for rs in results.values() for r in rs]
    if complete:
        print(header("answers" in complete[0]))
        print("\n".join(row_text(name, results[name]) for name in rows if name in results))
    if len(complete) < len(rows) * options.seeds:
        sys.exit(f"{len(rows) * options.seeds - len(complete)} runs failed; the same command tries them again")


def slug(settings):
    return "-".join(settings.replace("--", "").replace("\\n", "newline").split()).replace("=()", "") or "main"


if __name__ == "__main__":
    main(sys.argv[1:])
