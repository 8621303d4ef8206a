"""python sample.py [--prompt "..."] [--key value ..]: writes on from a prompt, with a thought before every token."""

import sys
from pathlib import Path

import torch

from configs import ConfigError, SampleConfig, help_text, parse_options
from nanoqstar import InputError, hf
from nanoqstar.files import read_json
from nanoqstar.quietstar import QuietStar
from nanoqstar.device import pick_device, speed_up_decoding
from nanoqstar.sampling import generate
from nanoqstar.tokenizer import end_of_text_id, load_tokenizer, unknown_ids

OFFICIAL_N_AHEAD = 7  # of the published 8-ahead checkpoint, whose n_ahead counts the base step as well


def newest_run():
    """The checkpoint written last under out/."""
    written = sorted(Path("out").glob("**/checkpoint/nanoqstar.json"), key=lambda p: p.stat().st_mtime)
    if not written:
        raise InputError("there is no finished run under out/: train one (python train.py), or give --model_path")
    return written[-1].parent


def load(cfg, device):
    """(model, tokenizer, n_ahead) as the settings ask for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # reading the weights is what decoding costs
    lm, thoughts, folder = hf.load(cfg.model_path or newest_run(), device, dtype)
    tokenizer = load_tokenizer(folder)
    info = folder / "nanoqstar.json"
    trained = (read_json(info).get("config") or {}) if info.exists() else {}
    banned = unknown_ids(tokenizer, lm.config.vocab_size)
    model = QuietStar(lm, trained.get("thought_temperature", 1.0), banned).to(device)
    if thoughts is None:
        if not cfg.no_thoughts:
            print("this model was never taught to think: writing without thoughts", file=sys.stderr)
        return model, tokenizer, 0
    model.load_state_dict(thoughts, strict=False)  # start, end and mixing head stay fp32
    return model, tokenizer, 0 if cfg.no_thoughts else cfg.n_ahead or trained.get("n_ahead") or OFFICIAL_N_AHEAD


def write(model, tokenizer, n_ahead, cfg, prompt, generator):
    """Prints the prompt and its continuation token by token."""
    try:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(f"the model's tokenizer cannot encode this prompt ({error}): "
                         "use the characters it knows") from None
    end = end_of_text_id(tokenizer)
    ids = ids or ([] if end is None else [end])
    if not ids:
        raise InputError("the prompt is empty, and the tokenizer has no end-of-text token to start from: "
                         "give some text")
    hf.check_context(model.lm.config, len(ids) + cfg.max_new_tokens + n_ahead)
    written, shown = [], len(tokenizer.decode(ids, skip_special_tokens=False))
    print(prompt, end="", flush=True)
    for step in generate(model, [ids], cfg.max_new_tokens, n_ahead, cfg.temperature, cfg.top_k, cfg.top_p, generator):
        if step.tokens.item() == end:
            break
        written.append(step.tokens.item())
        if cfg.show_thoughts and n_ahead:
            thought = tokenizer.decode(step.thoughts[0].tolist(), skip_special_tokens=False)
            print(f"⟨{thought!r:.60} {step.mix.item():+.2f}⟩", end="")
        text = tokenizer.decode(ids + written, skip_special_tokens=False)
        if not text.endswith("\ufffd"):  # half of a character waits for the other half
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()


def main(args):
    if "--help" in args or "-h" in args:
        print(help_text(SampleConfig, __doc__.strip()))
        return
    try:
        cfg = SampleConfig(**parse_options(SampleConfig, args))
        device = pick_device(cfg.device)
        model, tokenizer, n_ahead = load(cfg, device)
        if cfg.compile:
            speed_up_decoding(model, device)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        if cfg.prompt is not None:
            write(model, tokenizer, n_ahead, cfg, cfg.prompt, generator)
            return
        while True:
            try:
                write(model, tokenizer, n_ahead, cfg, input("> "), generator)
            except InputError as error:  # the next prompt may be better
                print(f"error: {error}", file=sys.stderr)
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
