"""python sample.py [--prompt TEXT] [--key value ..]: writes on from a prompt, with thoughts.

    python sample.py                                       asks for prompts, one after the other
    python sample.py --chat                                a conversation with an instruct model
    python sample.py --prompts FILE.txt --out FILE.jsonl   writes on from many
"""

import sys

from configs import SampleConfig
from nanoqstar import cli


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    return cli.command(args, lambda a: (cli.settings(SampleConfig, a, str(__doc__)),), "sample:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from data import fold
from nanoqstar import InputError, hf
from nanoqstar.continuation import ChatML, Continuation
from nanoqstar.device import pick_device, pick_threads, speed_up_decoding
from nanoqstar.files import alone, plain
from nanoqstar.quietstar import QuietStar, uniforms
from nanoqstar.sampling import Decoder
from nanoqstar.tokenizer import beginning_ids, encode, end_of_text_id

# ---- which model, and what suits it


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
    for name in ("n_ahead", "show_thoughts", "thought_temperature"):
        if not taught and getattr(cfg, name) not in (None, False):
            raise InputError(f"this model was never taught to think: leave --{name} out")
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
    family = config.get("fold_family", "fold")
    if config.get("data") == "fold" and operands in range(2, 9) and operations in range(1, 5) \
            and family in fold.FAMILIES:
        prompt = fold.example_prompt(operands, operations, 0, family)
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


# ---- writing


@dataclass
class Writer:
    """A model and how to write with it."""

    model: QuietStar
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    n_ahead: int
    cfg: SampleConfig

    def __post_init__(self) -> None:
        self.chat = ChatML(self.tokenizer) if self.cfg.chat else None
        self.opening = self.chat.turn("system", self.cfg.system) if (
            self.chat and self.cfg.system) else []

    def ids(self, prompt: str) -> list[int]:
        """A prompt's ids; in a chat those of a conversation that it begins."""
        if self.chat:
            return self.opening + self.chat.ask(prompt)
        return prompt_ids(self.tokenizer, prompt)

    def decoder(self, prompts: Sequence[Sequence[int]], earlier: Decoder | None = None) -> Decoder:
        """A decoder with room for them, and what follows; InputError: there is none for so much."""
        n_text = max(map(len, prompts)) + self.cfg.max_new_tokens
        hf.check_context(self.model.lm.config, n_text + self.n_ahead)
        return Decoder(self.model, len(prompts), n_text, self.n_ahead, self.cfg.thought_temperature,
                       earlier)

    def follow(self, decoder: Decoder, prompts: Sequence[Sequence[int]], turn: int = 0,
               first: int = 0) -> Iterator[list[Continuation]]:
        """What follows each prompt, as far as it is written, after each token.

        turn, and first: the number of the first prompt: what the noise is drawn by.
        """
        cfg, ended = self.cfg, set[int]()
        rows = [Continuation(self.tokenizer, ids, self.end_ids, cfg.stop, cfg.show_thoughts)
                for ids in prompts]
        noise = uniforms(cfg.seed, "sample", turn, range(first, first + len(prompts)),
                         (cfg.max_new_tokens, max(0, self.n_ahead - 2) + 1))
        for step in decoder.write(prompts, cfg.max_new_tokens, cfg.temperature, cfg.top_k,
                                  cfg.top_p, uniforms=noise, ended=ended):
            new = (x.tolist() for x in (step.tokens, step.thoughts, step.mix))
            for at, token, thought, mix in zip(step.rows, *new):
                if at not in ended:
                    rows[at].add(token, thought, mix)
                    if rows[at].stop:
                        ended.add(at)
            if len(ended) < len(rows):
                yield rows
        for row in rows:
            if not row.stop:
                row.finish("length")
        yield rows


def show(head: str, written: Iterable[list[Continuation]]) -> list[Continuation]:
    """Prints continuations after what they follow, one after the other; the one at hand as it is
    written. Returns them."""
    at = n_shown = 0
    print(head, end="", flush=True)
    for rows in written:
        while True:
            print(rows[at].shown[n_shown:], end="", flush=True)
            n_shown = len(rows[at].shown)
            if not rows[at].stop or at == len(rows) - 1:
                break
            print(f"\n---\n{head}", end="")
            at, n_shown = at + 1, 0
    print(flush=True)
    return rows


# ---- asking for prompts


def ask(answer: Callable[[int, str], None]) -> None:
    """Answers lines of standard input, given with their numbers, until it ends."""
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no UTF-8 are refused with their prompt
        sys.stdin.reconfigure(errors="surrogateescape")
    for turn in count():
        try:
            answer(turn, input("> "))
        except InputError as error:  # the next prompt may be better
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            print()
            return


class Conversation:
    """One with an instruct model: what it has read once it does not read again."""

    def __init__(self, writer: Writer, chat: ChatML) -> None:
        self.writer, self.chat = writer, chat
        self.ids: list[int] = []
        self.decoder: Decoder | None = None

    def answer(self, turn: int, message: str) -> None:
        """Prints the answer to a message, the next turn; an empty one begins anew."""
        if not message:
            self.ids, self.decoder = [], None
            return
        ids = (self.ids or self.writer.opening) + self.chat.ask(message)
        try:
            decoder = self.writer.decoder([ids], self.decoder)
        except InputError as error:
            begun = "; an empty line begins a new conversation" if self.ids else ""
            raise InputError(f"{error}{begun}") from None
        (said,) = show("", self.writer.follow(decoder, [ids], turn))
        if said.stop == "length":
            print(f"cut off after {len(said.tokens)} tokens: raise --max_new_tokens",
                  file=sys.stderr)
        tokens = said.tokens[:-1] if said.stop == "end" else said.tokens
        self.ids, self.decoder = [*ids, *tokens, *self.chat.after], decoder


# ---- from a file into a file


def read_prompts(file: str) -> list[tuple[str, str]]:
    """(where, prompt) of each prompt in a .txt or .jsonl. Raises InputError, OSError."""
    prompts, is_json = [], Path(file).suffix.lower() == ".jsonl"
    for n, line in enumerate(plain(file).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")):
        where = f"{file}, line {n + 1}"
        try:
            prompt = line.decode().removesuffix("\r")
        except UnicodeDecodeError:
            raise InputError(f"{where}: holds bytes that are no UTF-8 text") from None
        if not prompt.strip():
            continue
        if is_json:
            try:
                row = json.loads(prompt)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: is not JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise InputError(f"{where}: must be an object with a text called prompt")
            prompt = row["prompt"]
        prompts.append((where, prompt))
    if not prompts:
        raise InputError(f"{file} holds no prompts")
    return prompts


def fingerprint(writer: Writer) -> str:
    """Of all that a row depends on but its prompt: weights, tokenizer, settings."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = [int(p.detach().contiguous().view(bits[p.itemsize]).sum(dtype=torch.int64))
               for p in writer.model.parameters()]  # exact, in whatever order it is summed
    elsewhere = ("prompt", "prompts", "out", "batch_size", "n_samples", "model_path", "tokenizer",
                 "compile", "device", "n_ahead")
    said = {k: v for k, v in asdict(writer.cfg).items() if k not in elsewhere}
    everything = [weights, writer.tokenizer.to_str(), writer.n_ahead, writer.end_ids, said]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


def rows_there(out: str, prompts: list[str], made_by: str) -> int:
    """How many rows an earlier run of the same command has left; half of a row is cut off.

    InputError where the file holds anything else: nobody's file is changed.
    """
    if not os.path.lexists(out):
        return 0
    data = plain(out).read_bytes()
    *lines, rest = data.split(b"\n")
    begins = json.dumps({"settings": made_by}).encode()[:-1]
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or row.get("settings") != made_by or (
                [row.get("prompt")] != prompts[n:n + 1]):
            raise InputError(f"{out}, line {n + 1}: not written by this command with these "
                             "prompts, settings and weights: choose another --out")
    if not rest.startswith(begins) and not begins.startswith(rest):
        raise InputError(f"{out}, line {len(lines) + 1}: not written by this command: choose "
                         "another --out")
    if rest:
        os.truncate(out, len(data) - len(rest))
    return len(lines)


def fill(writer: Writer, prompts: list[tuple[str, str]], out: str) -> None:
    """Writes on from all prompts into a JSONL, a row each, in their order, as they come."""
    made_by, ids = fingerprint(writer), []
    for where, prompt in prompts:  # all of them before the first is written on
        try:
            ids.append(writer.ids(prompt))
            hf.check_context(writer.model.lm.config,
                             len(ids[-1]) + writer.cfg.max_new_tokens + writer.n_ahead)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    with alone(Path(out)), open(out, "ab") as file, tqdm(total=len(ids), disable=None) as bar:
        n_rows = n_there = rows_there(out, [prompt for _, prompt in prompts], made_by)
        bar.update(n_there)
        while n_rows < len(ids):
            first, batch = n_rows, ids[n_rows:n_rows + writer.cfg.batch_size]
            for rows in writer.follow(writer.decoder(batch), batch, first=first):
                while n_rows < first + len(batch) and rows[n_rows - first].stop:
                    said = rows[n_rows - first]
                    row = {"settings": made_by, "prompt": prompts[n_rows][1], "text": said.text,
                           "tokens": said.tokens, "stop": said.stop}
                    if writer.cfg.show_thoughts:
                        row |= {"thoughts": said.thoughts, "mix": [round(x, 4) for x in said.mix]}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    n_rows += 1
                    bar.update()
    there = f", {n_there} of which were there" if n_there else ""
    print(f"{out}: {n_rows} rows{there}")


def run(cfg: SampleConfig) -> None:
    """Everything a command line asks for."""
    device = pick_device(cfg.device)
    prompts = read_prompts(cfg.prompts) if cfg.prompts else []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # weights cost most to read
    model, tokenizer, settings = hf.load_thinker(cfg.model_path or newest_run(), device, dtype,
                                                 tokenizer=cfg.tokenizer)
    pick_threads(None, model.lm.config.hidden_size)
    n_ahead = thought_length(cfg, settings.thinking.n_ahead)
    writer = Writer(model, tokenizer, settings.end_ids, n_ahead, cfg)
    if cfg.compile:
        speed_up_decoding(model, device)

    def write(turn: int, prompt: str) -> None:
        ids = [writer.ids(prompt)] * cfg.n_samples
        decoder = writer.decoder(ids)
        show("" if cfg.chat else prompt, writer.follow(decoder, ids, turn))

    if cfg.prompts and cfg.out:
        fill(writer, prompts, cfg.out)
    elif cfg.prompt is not None:
        write(0, cfg.prompt)
    elif writer.chat:
        print("one message a line, an empty one begins a new conversation, Ctrl-D ends")
        ask(Conversation(writer, writer.chat).answer)
    else:
        print(hint(tokenizer, settings.config))
        ask(write)
