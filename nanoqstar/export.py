"""python -m nanoqstar.export RUN DIR [--push OWNER/NAME] [--key value ..]: a model to share.

RUN is a run's folder, a checkpoint, a model folder or a Hub id, also in the official checkpoint's
layout (with --tokenizer). DIR becomes a folder that transformers, and whatever reads Qwen2 or
Mistral, loads: adapters are merged, start, end and mixing head lie beside in quietstar.safetensors,
and README.md, a model card, says what is known of it. DIR is whole or not there.
"""

import sys
from typing import Any

from nanoqstar import InputError, cli


def read(args: list[str]) -> tuple[Any]:
    """Command line -> (its ExportConfig,)."""
    try:
        from configs import ExportConfig
    except ModuleNotFoundError:  # installed without its scripts
        raise InputError("configs.py is not here: run this from the root of a clone") from None
    n = next((n for n, word in enumerate(args[:2]) if word.startswith("-")), len(args[:2]))
    named = [x for name, word in zip(("run", "folder"), args[:n]) for x in (f"--{name}", word)]
    return (cli.settings(ExportConfig, named + args[n:], str(__doc__)),)


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    return cli.command(args, read, "nanoqstar.export:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache

from nanoqstar import hf, hub
from nanoqstar.files import plain, read_json, read_small

PATHS = ("model_path", "tokenizer", "data", "out_dir")  # settings that may name a folder
LICENSE = ("license", "license_name", "license_link")
LOADS = '''\
```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from nanoqstar.transformers import generate  # `pip install -e .` in a clone of nanoqstar

name = NAME
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
inputs = tokenizer("PROMPT", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, custom_generate=generate, max_new_tokens=40)[0]))
```'''


def origin(config: Mapping[str, Any]) -> str | None:
    """What training began from, through earlier runs: a Hub id or a folder; None: a new model."""
    source = config.get("model_path")
    for _ in range(10):
        with suppress(InputError):
            if isinstance(source, str) and os.path.isdir(source):
                source = hf.read_info(hf.resolve(source))[1].get("model_path") or source
    return source if isinstance(source, str) else None


def front_matter(source: str | None, config: Mapping[str, Any], thinks: bool) -> ModelCardData:
    """What is known for the Hub's search. source: the folder or Hub id that it is made from. An id
    that nobody can confirm here is left out, like a license that its card does not state."""
    known: dict[str, Any] = {}
    with suppress(Exception):  # no card, no network, or one whose front matter is broken
        if os.path.isdir(str(source)):
            card = Path(str(source), "README.md")
        else:
            if isinstance(try_to_load_from_cache(str(source), "config.json"), str):
                known["base_model"] = source
            card = Path(hub.fetch(hf_hub_download, hub.hub_id(str(source)), "README.md"))
            known["base_model"] = source
        said = ModelCard(read_small(card, 2**20).decode()).data.to_dict()
        known |= {key: said[key] for key in LICENSE if isinstance(said.get(key), str)}
    with suppress(InputError):
        data = read_json(Path(str(config.get("data")), "meta.json")).get("source")
        if isinstance(data, dict) and isinstance(name := data.get("dataset_name"), str):
            known["datasets"] = [name]
    return ModelCardData(library_name="transformers", pipeline_tag="text-generation",
                         tags=["nanoqstar", *["quiet-star"] * thinks], **known)


def evaluations(folder: Path, step: int) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl that evaluate updates up to `step`, oldest first."""
    rows = []
    with suppress(OSError, InputError):
        for line in plain(folder / "metrics.jsonl").read_bytes().splitlines():
            with suppress(ValueError, RecursionError):  # the last one may be cut short
                row = json.loads(line)
                if (isinstance(row, dict) and row.get("kind") == "eval" and row.get("step") in
                        range(step + 1) and numbers(row, "nll_base", "nll_mixed", "gain")):
                    rows.append(row)
    return rows


def numbers(row: Any, *keys: str) -> bool:
    return isinstance(row, dict) and all(
        isinstance(row.get(key), float) and math.isfinite(row[key]) for key in keys)


def figures(rows: list[dict[str, Any]], thinks: bool) -> list[str]:
    """The newest evaluation as lines of Markdown, beside the first one."""
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    columns = ["base", "with thoughts"][:1 + thinks]
    table = [[f"held-out text, after update {last['step']}", *columns],
             ["---"] * (1 + len(columns)),
             ["NLL, nats a token", *(f"{last[f'nll_{x}']:.4f}" for x in ("base", "mixed"))],
             [f"the same after update {first['step']}",
              *(f"{first[f'nll_{x}']:.4f}" for x in ("base", "mixed"))]]
    answers = last.get("answers")
    for name, found in answers.items() if isinstance(answers, dict) else ():
        if numbers(found, "accuracy_base", "accuracy_mixed"):
            table.append([f"{name} answers right, n={found.get('n')}",
                          *(f"{found[f'accuracy_{x}']:.1%}" for x in ("base", "mixed"))])
    lines = ["", "## Measured", "",
             *("| " + " | ".join(row[:1 + len(columns)]) + " |" for row in table)]
    if thinks:
        spread = (f" ± {2 * last['gain_stderr']:.4f} (2 standard errors, by window)"
                  if numbers(last, "gain_stderr") else "")
        lines += ["", f"Mean gain by thinking: {last['gain']:+.4f}{spread} nats a token."]
    return lines


def card(name: str, data: ModelCardData, settings: hf.Settings, rows: list[dict[str, Any]],
         dtype: str, has_report: bool) -> str:
    """README.md of an exported model."""
    thinking, config = settings.thinking, settings.config
    thinks, known = thinking.n_ahead > 0, data.to_dict()
    lines = [f"# {name.rpartition('/')[2]}", ""]
    if thinks:
        lines += ["A language model that thinks before every token: "
                  "[Quiet-STaR](https://arxiv.org/abs/2403.09629). A thought has "
                  f"{thinking.n_ahead} tokens, start and end included.", "",
                  "**vLLM, llama.cpp (GGUF) and plain `generate` run the base part and do not "
                  "think**: they know nothing of `quietstar.safetensors`. This does, in "
                  "transformers 4.56 or later:", "", LOADS.replace("NAME", json.dumps(name))]
    else:
        lines += ["A language model without thoughts: transformers, vLLM and whatever else reads "
                  "this architecture run all of it."]
    data_used = "made-up arithmetic, nanoqstar's demo" if config.get("data") == "fold" else (
        ", ".join(known.get("datasets", [])) or None)
    facts = {"base model": known.get("base_model"), "data": data_used,
             "updates": settings.step or None, "seed": config.get("seed"),
             "learning rate": config.get("learning_rate"),
             "LoRA rank": config.get("lora_rank") or None,
             "thoughts a position": config.get("n_passes") if thinks else None,
             "tokens predicted after a thought": thinking.n_ahead_talk if thinks else None,
             "weights": dtype}
    lines += ["", "## Training", "",
              *(f"- {what}: {x}" for what, x in facts.items() if isinstance(x, str | int | float)),
              "", "Every setting is in `nanoqstar.json`."]
    lines += figures(rows, thinks)
    if has_report:
        lines += ["", "Curves, and what it thinks where: `report.html`."]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def run(cfg: Any) -> None:
    """Everything a command line asks for."""
    target, taught = Path(cfg.folder), Path(cfg.run)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} holds something already: choose another folder, or delete it")
    if cfg.push:
        hub.check_push(cfg.push)  # before the work
    model, tokenizer, settings = hf.load_thinker(
        cfg.run, dtype=torch.bfloat16 if cfg.save_dtype == "bf16" else torch.float32,
        tokenizer=cfg.tokenizer)
    if not (taught / "metrics.jsonl").exists():
        taught = settings.folder.parent  # of a run's checkpoint
    thinks, beside = settings.thinking.n_ahead > 0, {}
    if settings.step and (taught / "report.html").is_file():  # a run's base is not what it shows
        beside["report.html"] = read_small(taught / "report.html").decode(errors="replace")
    source = origin(settings.config) if settings.config else cfg.run
    data = front_matter(source, settings.config, thinks)
    beside["README.md"] = card(cfg.push or target.absolute().name, data, settings,
                               evaluations(taught, settings.step), cfg.save_dtype, bool(beside))
    # what others need not know of this machine
    config = {key: Path(x).name if key in PATHS and isinstance(x, str) and os.path.isabs(x) else x
              for key, x in settings.config.items()}
    hf.save(target, model, tokenizer, thinking=settings.thinking if thinks else None,
            step=settings.step, config=config, source=settings.folder, beside=beside)
    unknown = [key for key in ("license", "base_model", "datasets") if key not in data.to_dict()]
    print(f"{target}: {sum(x.stat().st_size for x in target.iterdir()) / 1e6:,.1f} MB"
          + f"; {', '.join(unknown)} not known: fill in README.md" * bool(unknown))
    if cfg.push:
        try:
            hub.push(target, cfg.push, f"Update {settings.step}")
        except InputError as error:
            raise InputError(f"{error}; {target} is written, `hf upload {cfg.push} {target}` sends "
                             "it") from None
        print(f"pushed to {cfg.push}")
