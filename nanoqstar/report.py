"""python -m nanoqstar.report RUN [--key value ..]

A run as one page to look at, RUN/report.html: held-out text coloured by what thoughts gained on it,
with the thoughts; how the thoughts before the same prompts changed; what they are worth, by
difficulty; the curves of training. It holds no script and needs no network, and is made of whatever
there is: the run may be going on, have ended early, or have no thoughts. `python docs/figure.py
page RUN` takes the README's picture of it.
"""

import sys

from nanoqstar import cli


def read(args: list[str]) -> tuple:
    """Command line -> the settings."""
    from configs import ReportConfig

    return (cli.settings(ReportConfig, args, str(__doc__), "run"),)


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    return cli.command(args, read, "nanoqstar.report:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanoqstar import InputError
from nanoqstar.charts import Line, bars, clean, histogram, lines, scatter, signed
from nanoqstar.device import pick_device
from nanoqstar.evaluate import standard_error
from nanoqstar.files import plain, read_json, read_small, write_whole
from nanoqstar.heatmap import HALF, Seen, heat_map, look, percent, visible

Row = dict[str, Any]  # of metrics.jsonl
MOST_ROWS = 12  # evaluations shown of a prompt's story
MOST_POINTS = 3000  # of the scatter
LACKING = "Its thoughts on text are not shown"

# ---- what the run has written


def read_rows(folder: Path) -> list[Row]:
    """The rows of metrics.jsonl; one that is just being written, or damaged, is left out."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise InputError(f"{folder} holds no metrics.jsonl: give the folder of a run of train.py")
    rows = []
    for line in read_small(file).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
            rows.append(row)
    return rows


def value(row: Row, path: str) -> float | None:
    """The finite number at `a.b.c` of a row, if there is one."""
    found: Any = row
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    good = type(found) in (int, float) and abs(found) < 1e300  # NaN is not
    return float(found) if good else None


def points(rows: Sequence[Row], kinds: Sequence[str], path: str) -> list[tuple[float, float]]:
    found = [(row["step"], value(row, path)) for row in rows if row.get("kind") in kinds]
    return [(step, y) for step, y in found if y is not None]


# ---- sections


def section(name: str, title: str, lead: str, body: str) -> str:
    return (f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{title}</h2>\n'
            f"<p>{lead}</p>\n{body}</section>\n") if body else ""


def heat_section(seen: Seen) -> str:
    page, low, high = heat_map(seen)
    n = sum(sum(w.valid) for w in seen.windows)
    half = f" {HALF} and a number is a part of a character, by its id." * (HALF in page)
    steps = "".join(
        f'<span class="t {kind}" style="--a:{depth}">{name}</span>' for kind, depth, name in (
            ("y", 1, f"−{high:.2g}"), ("y", 0.5, ""), ("y", 0, f"±{low:.2g}"), ("g", 0.5, ""),
            ("g", 1, f"+{high:.2g}")))
    key = f"""<aside class="card legend" aria-label="Legend"><b>Gain, nats a token</b>
<div class="scale" role="img" aria-label="yellow, {high:.2g} lost, to green, as much gained">
{steps}</div>
<p><span class="t g" style="--a:1">Green</span> tokens became likelier by the thought before them,
<span class="t y" style="--a:1">yellow</span> ones less likely. No colour up to the median |gain|,
full colour from the 95th percentile. · is a space, ↵ the end of a line.{half}</p>
<p class="hint">Point at a token, tap it, or go through them with Tab: its thoughts of all passes,
what each gained on this token and over its lookahead (reward), its mixing weight, and the likeliest
tokens without thoughts and with them.</p></aside>"""
    return section(
        "thoughts", "What it thought",
        f"Held-out text of the run, {n:,} tokens in {len(seen.windows)} "
        f"window{'s' * (len(seen.windows) > 1)}, by the model of update {seen.step}; each token is "
        'coloured by what the thoughts before it gained. <a href="#after">Skip it</a>',
        f'<div class="split"><div class="heat">{page}</div>{key}</div><p id="after"></p>')


def story_section(rows: Sequence[Row]) -> str:
    """The thoughts before the same prompts, evaluation by evaluation."""
    told: dict[tuple[str, str], list[tuple[int, Row]]] = {}
    for row in reversed([r for r in rows if r.get("kind") == "eval"]):  # as the last one has them
        for e in row["examples"] if isinstance(row.get("examples"), list) else []:
            if isinstance(e, dict) and all(type(e.get(k)) is str for k in
                                           ("context", "thought", "target")):
                told.setdefault((e["context"], e["target"]), []).insert(0, (row["step"], e))
    cards = []
    for (context, target), states in told.items():
        n, body, earlier = len(states), [], None
        for k in sorted({round(j * (n - 1) / (MOST_ROWS - 1)) for j in range(MOST_ROWS)}):
            step, e = states[k]
            base, mixed = value(e, "p_base") or 0.0, value(e, "p_mixed") or 0.0
            new = ' class="new"' if earlier not in (None, e["thought"]) else ""
            body.append(f"<tr><td>{step}</td><td{new}>{visible(e['thought'])}</td><td><span "
                        f'class="bar" style="--b:{min(base, 1):.1%};--m:{min(mixed, 1):.1%}">'
                        f"</span></td><td>{percent(base)} → {percent(mixed)}</td></tr>")
            earlier = e["thought"]
        cards.append(f'<div class="card story"><p><i>{visible(context[-24:])}</i> then '
                     f"<b>{visible(target)}</b></p><table><thead><tr><th>update</th><th>thought</th>"
                     f'<th colspan="2">probability of <b>{visible(target)}</b></th></tr></thead>'
                     f"<tbody>{''.join(body)}</tbody></table></div>\n")
    return section(
        "story", "How its thoughts changed",
        "The same prompts at every evaluation: the thought before the next token, bold where it is "
        "another one than before, and that token's probability without the thought (the mark) and "
        "with it (the bar).",
        f'<div class="cards wide">{"".join(cards)}</div>' if cards else "")


def worth_section(seen: Seen | None, last: Row) -> str:
    """Gain by decile of base NLL, its histogram, and against base NLL."""
    unit = "nats a token, easy to hard"
    if seen is None:
        deciles = last.get("gain_by_decile")
        good = isinstance(deciles, list) and deciles and all(
            value({"x": d}, "x") is not None for d in deciles)
        body = bars("Gain by decile of base NLL", unit, deciles, [None] * len(deciles)  # type: ignore
                    ) if good else ""
        return section("worth", "What they are worth", "Of the last evaluation.",
                       body and f'<div class="cards">{body}</div>')
    valid = seen.scores.valid
    base, mixed = (-x[valid].double() for x in (seen.scores.base_lp, seen.scores.mixed_lp))
    gain, window, order = base - mixed, valid.nonzero()[:, 0], base.argsort(stable=True)
    parts = order.tensor_split(10) if len(order) >= 10 else (order,)
    means = [gain[p].mean().item() for p in parts]
    errors = [standard_error(gain[p], window[p]) for p in parts]
    some = order[torch.arange(0, len(order), -(-len(order) // MOST_POINTS))]
    body = (bars("Gain by decile of base NLL", unit, means,
                 [None if e is None else 2 * e for e in errors])
            + histogram("Gains", "tokens by gain in nats, log scale", gain.tolist())
            + scatter("Gain against base NLL", "nats; dashed: certain",
                      list(zip(base[some].tolist(), gain[some].tolist())),
                      [(base[p].mean().item(), m) for p, m in zip(parts, means)]))
    return section("worth", "What they are worth",
                   f"{len(gain):,} held-out tokens of {len(valid)} windows, a thought before each; "
                   "intervals are 2 standard errors, clustered by window.",
                   f'<div class="cards">{body}</div>')


def curves_section(rows: Sequence[Row], thinks: bool) -> str:
    def of(name: str, kind: str, kinds: str, path: str) -> Line:
        return Line(name, kind, points(rows, kinds.split(), path))

    gain = of("held-out", "mixed", "eval", "gain")
    errors = [2 * y for _, y in points(rows, ["eval"], "gain_stderr")]
    gain.spread = errors if len(errors) == len(gain.points) else []
    loss = [of("training", "train", "think text", "nll_base"),
            of("without thoughts" if thinks else "held-out", "base", "eval", "nll_base")]

    def both(path: str) -> list[Line]:
        return [of("training", "train", "think", path), of("held-out", "mixed", "eval", path)]

    charts = [lines("NLL", "nats a token", loss + [
        of("with", "mixed", "eval", "nll_mixed")] * thinks)]
    if thinks:
        right = "answers.direct.accuracy_"
        charts += [
            lines("Direct answers right", "share, of seven letters", [
                of("without thoughts", "base", "eval", right + "base"),
                of("with", "mixed", "eval", right + "mixed")]),
            lines("Gain", "nats a token" + ", ± 2 standard errors" * bool(gain.spread), [gain]),
            lines("Gain on the hardest tenth", "nats a token",
                  [of("held-out", "mixed", "eval", "gain_hardest")]),
            lines("Reward", "nats a thought, over its lookahead", both("reward")),
            lines("Mixing weight", "mean, training: of the lookahead", both("mix")),
            lines("Entropy of thoughts", "nats a sampled token", both("entropy")),
            lines("Distinct thoughts", "share of an evaluation's",
                  both("distinct"))]
    charts += [lines("Speed", "training tokens a second", [
                   of("training", "train", "think text", "tokens_per_second")]),
               lines("NLL of pre-training", "nats a token",
                     [of("training", "train", "pretrain", "nll_base")]),
               lines("NLL of given thoughts", "nats a token",
                     [of("training", "train", "warm", "nll_given")])]
    body = "".join(charts)
    return section("curves", "How it trained",
                   "Lines with dots are held-out, the others of training, as far as it has come.",
                   body and f'<div class="cards">{body}</div>')


def settings_section(config: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{clean(k)}</th><td>"
                   f"{clean(json.dumps(v, ensure_ascii=False), 300)}</td></tr>"
                   for k, v in config.items() if k not in ("out_dir", "resume", "force", "plan"))
    return f"<details><summary>Settings</summary><table>{rows}</table></details>" if rows else ""


def verdict(rows: Sequence[Row], thinks: bool) -> str:
    """What the last evaluation says, in a sentence."""
    last = next((r for r in reversed(rows) if value(r, "nll_mixed") is not None), {})
    base, mixed, gain = (value(last, key) for key in ("nll_base", "nll_mixed", "gain"))
    if base is None or mixed is None or gain is None:
        return "Nothing has been evaluated yet."
    if not thinks:
        return (f"No thoughts (n_ahead 0): plain training of the base. Its held-out NLL is "
                f"<b>{base:.3f}</b> at update {last['step']}.")
    error = value(last, "gain_stderr")
    digits = 3 if abs(gain) >= 0.01 else 5
    spread = "" if error is None else f" ± {2 * error:.{digits}f}"
    doubt = ", not to be told from none" if error is not None and abs(gain) <= 2 * error else ""
    return (f"At update {last['step']}, a thought before every token takes held-out NLL from "
            f"<b>{base:.3f}</b> to <b>{mixed:.3f}</b>: a gain of <b>{signed(gain, digits)}{spread}"
            f"</b> nats a token{doubt}.")


PHASES = (("pretrain", "of pre-training ", "pretrain_steps"),
          ("warm", "of the warm start ", "warm_steps"))  # kind of row, in words, its setting


def state(rows: Sequence[Row], config: dict[str, Any]) -> str:
    """How far the run is."""
    last = rows[-1] if rows else {}
    if last.get("kind") == "end":
        took = value(last, "seconds")
        return f"ended at update {last['step']}" + (f" after {took:,.0f} s" if took else "")
    if not rows:
        return "has logged nothing yet"
    phase, steps = next((x[1:] for x in PHASES if x[0] == last.get("kind")), ("", "max_steps"))
    planned = config.get(steps)
    return (f"at update {last['step']} {phase}" + f"of {planned} " * (type(planned) is int)
            + "and without an end: it goes on, or ended early")


def page(folder: Path, rows: Sequence[Row], config: dict[str, Any], seen: Seen | None,
         why: str | None) -> str:
    """The whole page. why: there is nothing to be seen of the model."""
    thinks, last = any("reward" in r for r in rows), next(
        (r for r in reversed(rows) if r.get("kind") == "eval"), {})
    name = clean(folder.resolve().name or "a run")
    parts = [heat_section(seen) if seen else "", story_section(rows),
             worth_section(seen, last) if thinks else "", curves_section(rows, thinks)]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in (
        ("thoughts", "What it thought"), ("story", "How its thoughts changed"),
        ("worth", "What they are worth"), ("curves", "How it trained"))
        if any(f'<section id="{key}"' in part for part in parts))
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    lacking = f'<p class="note">{LACKING}: {clean(why)}.</p>' if why else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}: nanoqstar report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><style>
{style}</style></head><body>
<header><h1>{name}</h1><p class="state">A nanoqstar run, {clean(state(rows, config))}</p>
<p class="verdict">{verdict(rows, thinks)}</p>{lacking}<nav aria-label="Sections">{links}</nav>
</header><main>
{"".join(parts)}{settings_section(config)}</main><footer>Made by nanoqstar.report; no script, no
network.</footer></body></html>
"""


def run(cfg: Any) -> None:
    """Everything a command line asks for."""
    from configs import restored

    folder = Path(cfg.run)
    rows, config, seen, why = read_rows(folder), {}, None, None
    out = plain(Path(cfg.out) if cfg.out else folder / "report.html")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} for the page: make it, or choose --out")
    try:
        config = read_json(folder / "config.json")
        if config.get("n_ahead") != 0:
            made = restored(config, folder / "config.json")
            seen = look(folder, made, cfg.tokens, made.seed if cfg.seed is None else cfg.seed,
                        pick_device(cfg.device))
    except InputError as error:
        why = str(error)
        print(f"{LACKING}: {why}", file=sys.stderr)
    html = page(folder, rows, config, seen, why).encode("utf-8", "replace")
    write_whole(out, html)
    shown = f", {sum(sum(w.valid) for w in seen.windows):,} tokens thought about" if seen else ""
    print(f"{out}: {len(html) / 1e3:,.0f} kB{shown}")
