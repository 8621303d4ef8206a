"""The depth law: how many steps of thought does a problem of how many steps take?

Folds of 2 to 8 operands in one text, models of 1, 2 and 4 layers, thoughts of 1 to 8 tokens, and
plain training of as many FLOPs and of four times as many. A table for each depth, and one picture.
"""

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from nanoqstar import InputError, cli
from nanoqstar.experiments import options_of, train
from nanoqstar.files import lock
from nanoqstar.flops import matched_steps
from nanoqstar.plot import DARK, LIGHT

LAYERS, OPERANDS, SAMPLED = (1, 2, 4), range(2, 9), range(1, 9)
TEXT = {"fold_shortest": OPERANDS[0], "fold_operands": OPERANDS[-1], "fold_worked_frac": 0.3,
        "fold_restated_frac": 0.1, "fold_tokens": 3_000_000, "pretrain_steps": 1500,
        "max_length": 94, "batch_size": 8, "max_steps": 80, "eval_windows": 384,  # S = 8
        "embedding_lr_factor": 1.0, "max_base_rise": None, "eval_every": 10**6, "save_every": 10**6}
PLAIN = {"plain": 1, "plain-4": 4}  # times the FLOPs of thinking
COLUMNS = ("base", *PLAIN, *map(str, SAMPLED))
CELL, LEFT, TOP = 25, 66, 78  # of the picture

Run = tuple[str, dict[str, Any]]  # its folder's name, and its settings
Cells = dict[tuple[int, str], float]  # (operands, column): share of right direct answers


def plan(n_layers: int, base: Path, common: dict[str, Any], preset: Any) -> list[Run]:
    """The runs of a depth, the one that makes the base of the others first.

    Shorter thoughts learn for more updates, so that all columns cost the same FLOPs.
    """
    cfg = replace(preset, **common)

    def plain_updates(sampled: int, updates: int) -> int:
        return matched_steps(replace(cfg, n_ahead=sampled + 2, max_steps=updates))

    start, flops = {"model_path": str(base)}, plain_updates(SAMPLED[-1], cfg.max_steps)
    return [("base", {"n_layers": n_layers, "n_ahead": 0, "max_steps": 1}),
            *((str(s), {**start, "n_ahead": s + 2,
                        "max_steps": round(1000 * flops / plain_updates(s, 1000))})
              for s in SAMPLED),
            *((name, {**start, "n_ahead": 0, "max_steps": n * flops})
              for name, n in PLAIN.items())]


def table(cells: Cells, counts: Mapping[int, int]) -> str:
    """In per cent; counts: answers of each length."""
    names = {"base": "before", "plain": "plain, as many FLOPs", "plain-4": "four times as many"}
    lines = ["| operands | answers | " + " | ".join(names.get(c, f"S = {c}") for c in COLUMNS)
             + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines += [f"| {n} | {counts[n]} | " + " | ".join(
        f"{100 * cells[n, c]:.0f}" if (n, c) in cells else "" for c in COLUMNS) + " |"
        for n in OPERANDS]
    return "\n".join(lines)


def panel(cells: Cells, title: str) -> list[str]:
    """A heat map, its corner at 0, 0: columns as COLUMNS without the base, rows are operands."""
    columns, top = COLUMNS[1:], TOP
    body = [f'<text x="{len(columns) * CELL / 2:g}" y="{top - 30}" class="mid">{escape(title)}'
            '</text>']
    names = {"plain": "1×", "plain-4": "4×"}
    body += [f'<text x="{(i + 0.5) * CELL:g}" y="{top - 8}" class="mid small">{names.get(c, c)}'
             '</text>' for i, c in enumerate(columns)]
    for row, n in enumerate(OPERANDS):
        for i, column in enumerate(columns):
            if (n, column) not in cells:
                continue
            right = cells[n, column]
            shade = max(0.0, (right - 1 / 7) / (6 / 7))  # chance is one letter in seven
            kind = "mid small" + " over" * (shade > 0.75)
            body.append(f'<rect x="{i * CELL}" y="{top + row * CELL}" width="{CELL}" '
                        f'height="{CELL}" class="cell" fill-opacity="{shade:.2f}"/>')
            body.append(f'<text x="{(i + 0.5) * CELL:g}" y="{top + (row + 0.5) * CELL + 4:g}" '
                        f'class="{kind}">{100 * right:.0f}</text>')
    x = len(PLAIN) + OPERANDS[0] - SAMPLED[0]  # cells left of the border in the first row
    steps = [f"H{(x + row) * CELL} V{top + (row + 1) * CELL}" for row in range(len(OPERANDS))]
    return [*body, f'<path d="M{x * CELL} {top} {" ".join(steps)}" class="border"/>']


def picture(depths: Mapping[int, Cells]) -> str:
    """Heat maps side by side as an SVG that follows light and dark mode, the border S = operands
    drawn in each."""
    gap = (len(COLUMNS) - 1) * CELL + 22
    width, height = LEFT + gap * len(depths), TOP + len(OPERANDS) * CELL + 34

    def palette(colours: Sequence[str], card: str, line: str) -> str:
        return f":root{{--c:{colours[0]};--ink:{colours[-1]};--card:{card};--line:{line}}}"

    body = [f'<text x="{width / 2:g}" y="22" class="mid">Held-out answers right, %, by operands '
            '(rows) and sampled thought tokens S (columns)</text>',
            *(f'<text x="{LEFT - 10}" y="{TOP + (row + 0.5) * CELL + 4:g}" class="end small">{n}'
              '</text>' for row, n in enumerate(OPERANDS)),
            f'<text transform="translate(20 {TOP + len(OPERANDS) * CELL / 2:g}) rotate(-90)" '
            'class="mid">operands</text>']
    for i, (n_layers, cells) in enumerate(depths.items()):
        body += [f'<g transform="translate({LEFT + i * gap} 0)">',
                 *panel(cells, f"{n_layers} layer" + "s" * (n_layers > 1)), "</g>"]
    body.append(f'<text x="{width / 2:g}" y="{height - 10}" class="mid small">1×, 4×: trained '
                'without thoughts for as many FLOPs, and for four times as many. '
                'Line: S = operands.</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Accuracy by operands, thought length and layers</title>",
        f"<style>{palette(LIGHT, '#ffffff', '#a85400')}",
        f"@media (prefers-color-scheme:dark){{{palette(DARK, '#0d1117', '#f0a04b')}}}",
        "svg{background:var(--card)} text{font:14px sans-serif;fill:var(--ink)}",
        ".small{font-size:11px} .mid{text-anchor:middle} .end{text-anchor:end}",
        ".cell{fill:var(--c)} text.over{fill:var(--card)}",
        ".border{fill:none;stroke:var(--line);stroke-width:2.5}</style>", *body, "</svg>\n"])


def run(cfg: Any, overrides: list[str]) -> None:
    """All runs, then the tables and the picture. InputError where some failed."""
    from configs import PRESETS, TrainConfig

    preset = PRESETS["tiny_learned"].config
    common = TEXT | cli.parse(TrainConfig, overrides)
    if not torch.cuda.is_available():
        common = {"threads": 1} | common
    key = f"-{zlib.crc32(' '.join(overrides).encode()):x}" if overrides else ""
    out, seeds = Path(cfg.out) / f"depth{key}", range(cfg.seeds)

    def folder(seed: int, n_layers: int) -> Path:
        return out / f"seed-{seed}" / f"layers-{n_layers}"

    def run_one(job: tuple[int, int, Run]) -> dict[str, Any] | None:
        seed, n_layers, (name, own) = job
        options = options_of({"seed": seed, **own}, common, preset)
        return train(folder(seed, n_layers) / name, "tiny_learned", options)

    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    based: set[tuple[int, int]] = set()  # seeds and layers whose base is there
    jobs = [(seed, n, one) for seed in seeds for n in LAYERS
            for one in plan(n, folder(seed, n) / "base" / "base", common, preset)]
    with lock(out), ThreadPoolExecutor(cfg.jobs) as pool:
        for bases in (True, False):
            group = [job for job in jobs if (job[2][0] == "base") == bases
                     and (bases or job[:2] in based)]
            for (seed, n, (name, _)), result in zip(group, pool.map(run_one, group), strict=True):
                if result is not None:
                    based.add((seed, n))
                    found.setdefault((n, name), []).append(result["answers"]["by_operands"])
        depths: dict[int, Cells] = {}
        for n_layers in LAYERS:
            own = {name: runs for (n, name), runs in found.items() if n == n_layers}
            direct = {(n, name): [r[str(n)]["direct"] for r in runs if "direct" in r[str(n)]]
                      for name, runs in own.items() for n in OPERANDS}  # few windows lack some
            cells = {cell: mean(d["accuracy_mixed"] for d in ds)
                     for cell, ds in direct.items() if ds}
            if own:
                counts = {n: max((ds[0]["n"] for (m, _), ds in direct.items() if m == n and ds),
                                 default=0) for n in OPERANDS}
                print(f"\nlayers: {n_layers}\n\n{table(cells, counts)}")
                depths[n_layers] = cells
        if depths:
            (out / "map.svg").write_text(picture(depths))
            print(f"\n{out / 'map.svg'}")
    if missing := len(jobs) - sum(map(len, found.values())):
        raise InputError(f"{missing} runs failed, or are of other settings: the same command tries "
                         "again what is not finished")
