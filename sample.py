"""python sample.py [--prompt TEXT] [--key value ..]: writes on from a prompt, with thoughts."""

import sys

from configs import SampleConfig
from nanoqstar import cli


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    return cli.command(args, lambda a: (cli.settings(SampleConfig, a, str(__doc__)),), "sample:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from data import fold
from nanoqstar import InputError, hf
from nanoqstar.device import pick_device, pick_threads, speed_up_decoding
from nanoqstar.quietstar import QuietStar
from nanoqstar.sampling import generate
from nanoqstar.tokenizer import beginning_ids, encode, end_of_text_id


def newest_run() -> Path:
    """The checkpoint written last under out/, or put aside where a save ended midway."""
    written = [file for name in ("checkpoint", "checkpoint.partial/nanoqstar.old")
               for file in Path("out").glob(f"**/{name}/nanoqstar.json")]
    if not written:
        raise InputError("there is no finished run under out/: train one (python train.py), or "
                         "give --model_path")
    return max(written, key=lambda file: file.stat().st_mtime).parent


def thought_length(cfg: SampleConfig, taught: int) -> int:
    """K of the thoughts to write with, 0: none; taught: K of those that it was trained with."""
    if not taught and (cfg.n_ahead or cfg.show_thoughts):
        raise InputError("this model was never taught to think: leave --n_ahead and "
                         "--show_thoughts out")
    if not taught and not cfg.no_thoughts:
        print("this model was never taught to think: writing without thoughts", file=sys.stderr)
    if cfg.no_thoughts or not taught:
        return 0
    if cfg.n_ahead not in (None, taught):
        print(f"the thoughts were trained with n_ahead {taught}: with {cfg.n_ahead} they may be "
              "worth less", file=sys.stderr)
    return cfg.n_ahead or taught


def known_characters(tokenizer: Tokenizer) -> str | None:
    """All that a tokenizer of single characters knows, quoted; None of any other."""
    ids = tokenizer.get_vocab()
    characters = "".join(sorted(ids, key=ids.__getitem__))
    return repr(characters) if all(len(token) == 1 for token in ids) else None


def hint(tokenizer: Tokenizer, config: dict[str, Any]) -> str:
    """Which prompts suit the model; config: the settings of its training."""
    lines, known = ["one prompt a line, Ctrl-D ends"], known_characters(tokenizer)
    if known:
        lines.append(f"the model knows the characters {known}")
    operands, operations = config.get("fold_operands", 0), config.get("fold_operations", 0)
    if config.get("data") == "fold" and operands in range(2, 9) and operations in range(1, 5):
        prompt = fold.example_prompt(operands, operations, 0)
        lines.append(f"the demo's lines begin like {prompt}")
    return "; ".join(lines)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids, after those that the tokenizer puts before a text, as in training."""
    ids, end = beginning_ids(tokenizer), end_of_text_id(tokenizer)
    if prompt != prompt.encode(errors="ignore").decode():  # Python has surrogates for such bytes
        raise InputError("the prompt holds bytes that are no UTF-8 text: leave them out")
    if prompt:
        try:
            return ids + encode(tokenizer, prompt, "the prompt")
        except InputError as error:
            known = known_characters(tokenizer)
            raise InputError(f"{error}; it knows {known}" if known else str(error)) from None
    if not ids and end is None:
        raise InputError("the prompt is empty, and the tokenizer has no token to start from: give "
                         "some text")
    return ids or [end]  # type: ignore[list-item]


def write(model: QuietStar, tokenizer: Tokenizer, prompt: str, n_ahead: int, cfg: SampleConfig,
          end_ids: tuple[int, ...], generator: torch.Generator) -> None:
    """Prints the prompt and what follows it, token by token, up to one of end_ids."""
    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False)

    ids = prompt_ids(tokenizer, prompt)
    hf.check_context(model.lm.config, len(ids) + cfg.max_new_tokens + n_ahead)
    text = decode(ids)
    shown = len(text)
    print(prompt, end="", flush=True)
    for step in generate(model, [tuple(ids)], cfg.max_new_tokens, n_ahead, cfg.temperature,
                         cfg.top_k, cfg.top_p, generator):
        ids.append(int(step.tokens))
        if ids[-1] in end_ids:
            break
        if cfg.show_thoughts:
            thought = decode(step.thoughts[0].tolist())
            print(f"⟨{thought!r:.60} {step.mix.item():+.2f}⟩", end="")
        text = decode(ids)
        if not text.endswith("\ufffd"):  # half of a character waits for the other half
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(text[shown:], flush=True)


def run(cfg: SampleConfig) -> None:
    """Everything a command line asks for."""
    device = pick_device(cfg.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # weights cost most to read
    model, tokenizer, settings = hf.load_thinker(cfg.model_path or newest_run(), device, dtype,
                                                 tokenizer=cfg.tokenizer)
    pick_threads(None, model.lm.config.hidden_size)
    n_ahead = thought_length(cfg, settings.thinking.n_ahead)
    if cfg.compile:
        speed_up_decoding(model, device)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    if cfg.prompt is not None:
        write(model, tokenizer, cfg.prompt, n_ahead, cfg, settings.end_ids, generator)
        return
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no UTF-8 are refused with their prompt
        sys.stdin.reconfigure(errors="surrogateescape")
    print(hint(tokenizer, settings.config))
    while True:
        try:
            write(model, tokenizer, input("> "), n_ahead, cfg, settings.end_ids, generator)
        except InputError as error:  # the next prompt may be better
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            print()
            return
