"""Hugging Face folders in and out: JSON, safetensors, tokenizer.json; nothing is ever pickled.

Our own additions lie beside them in `quietstar.safetensors`, so that any Qwen2 loader still reads
what we save.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer

from nanoqstar import InputError, lora, parallel
from nanoqstar.files import lock, read_json, shown, sync, write_json
from nanoqstar.hub import fetch, hub_id
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.tokenizer import (
    END_OF_TURN,
    beginning_ids,
    end_of_text_id,
    load_tokenizer,
    unknown_ids,
)
from nanoqstar.weights import (
    Stored,
    check,
    check_sizes,
    copy,
    find_weights,
    from_official,
    read_config,
    read_header,
    special_ids,
)

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
              "chat_template.json", "generation_config.json")  # for transformers: taken along
OURS = ("config.json", "tokenizer.json", "model.safetensors", "quietstar.safetensors",
        "nanoqstar.json", "adapter", *COMPANIONS)
FILES = [*OURS, "model-*.safetensors", "model.safetensors.index.json"]
TRIES = 5  # to read a folder that is replaced meanwhile


@dataclass(frozen=True)
class Thinking:
    """How the thoughts were trained; stored in quietstar.safetensors' metadata."""

    n_ahead: int = 0  # thought tokens, start and end included; 0: never taught to think
    n_ahead_talk: int = 0
    thought_temperature: float = 1.0
    delimiters: str = "learned"  # or reread


THINKING_BOUNDS = {"n_ahead": (3, 2**16), "n_ahead_talk": (1, 2**16),
                   "thought_temperature": (1e-3, 1e300)}
OFFICIAL = Thinking(7, 4)  # of the published 8-ahead checkpoint, which counts the base step as well


@dataclass(frozen=True)
class Settings:
    """What a folder says beside its weights."""

    thinking: Thinking
    folder: Path
    end_ids: tuple[int, ...]  # that end a text or a turn
    step: int  # updates it has had; 0 for a model that is not ours
    config: dict[str, Any]  # the training run's settings; {} for a model that is not ours


# ---- which folder


def newest(folder: Path) -> Path:
    """`folder`, or what `save` had put aside where it was killed between its two renames."""
    if os.path.exists(folder):  # unlike Path's, for a name of any length
        return folder
    old = workplace(Path(os.path.realpath(folder))) / "nanoqstar.old"
    return old if os.path.exists(old / "nanoqstar.json") else folder


def workplace(folder: Path) -> Path:
    """Where `save` works on `folder`, in folders that bear our name: others may lie beside them."""
    return Path(f"{folder}.partial")


def stamp(folder: Path) -> tuple[int, int] | None:
    """Changes when `folder` is replaced; None where it is not there."""
    with suppress(OSError):
        found = folder.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def resolve(path_or_id: str | os.PathLike) -> Path:
    """The folder of a model, or of a run's checkpoint, or where the Hub's `owner/name` was put.

    Raises InputError: neither a folder nor an id, no network, no such repository, no access to it.
    """
    folder = newest(Path(path_or_id))
    if not str(path_or_id) or not os.path.isdir(folder):  # Path("") is the folder we are in
        return Path(fetch(snapshot_download, hub_id(path_or_id), allow_patterns=FILES))
    checkpoint = newest(folder / "checkpoint")  # a run's folder stands for what it trained
    if not checkpoint.is_dir() and (folder / "metrics.jsonl").exists():
        raise InputError(f"the run in {folder} has saved nothing yet; its pre-trained base, if "
                         "any, is in its base/")
    return checkpoint if checkpoint.is_dir() else folder


# ---- settings beside the weights


def read_info(folder: Path) -> tuple[int, dict[str, Any]]:
    """(step, config) of nanoqstar.json; (0, {}) of a model that is not ours."""
    file = folder / "nanoqstar.json"
    info = read_json(file) if file.exists() else {}
    step, config = info.get("step", 0), info.get("config")
    config = {} if config is None else config
    if type(step) is not int or not 0 <= step < 2**31 or not isinstance(config, dict):
        raise InputError(f"{file} is damaged: it must hold a step, an integer from 0 to 2^31, and "
                         "a config, an object")
    return step, config


def read_thinking(file: Path, given: Mapping[str, Any]) -> Thinking:
    """`given` as Thinking; what it lacks is the official checkpoint's."""
    known: dict[str, Any] = {}
    for key, (low, high) in THINKING_BOUNDS.items():
        x, default = given.get(key), getattr(OFFICIAL, key)
        with suppress(ValueError):
            x = type(default)(x) if isinstance(x, str) else x  # all metadata are text
        if x is None or (key == "n_ahead" and type(given[key]) is int and x == 0):
            x = default
        if type(x) not in (int, type(default)) or not low <= x <= high:
            raise InputError(f"{file} is damaged: {key} must be from {low:g} to {high:g}, not "
                             f"{shown(str(given[key]))}")
        known[key] = type(default)(x)
    delimiters = given.get("delimiters", "learned")
    if delimiters not in ("learned", "reread"):
        raise InputError(f"{file} is damaged: delimiters must be learned or reread, not "
                         f"{shown(str(delimiters))}")
    return Thinking(**known, delimiters=delimiters)


def check_context(config: Qwen2Config, n_positions: int) -> None:
    """InputError where `n_positions` RoPE positions are more than the model or its window knows."""
    if n_positions > config.max_context:
        window = " (its sliding window)" if config.sliding_window else ""
        raise InputError(f"{n_positions} positions are more than the model's context of "
                         f"{config.max_context}{window}: shorten the text (the prompt and "
                         "max_new_tokens, or max_length) or the thoughts")


# ---- in and out


def load_thinker(path_or_id: str | os.PathLike, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.float32, tokenizer: str | os.PathLike | None = None,
                 shard: Callable[[QuietStar], object] | None = None,
                 ) -> tuple[QuietStar, Tokenizer, Settings]:
    """The model of a local folder or Hub id, its tokenizer (or that of `tokenizer`, likewise a
    folder or Hub id), and its settings.

    It is read tensor by tensor, about one copy in host memory, after every name, shape and dtype
    was checked. The language model is in `dtype`; start, end and mixing head in fp32 at least: from
    `quietstar.safetensors`, from the layout of the official checkpoint, or else uninitialised
    (thinking.n_ahead is 0). shard: of the model while it is on meta; then only this rank's rows are
    read. All is of one save, also while another process replaces the folder.
    Raises InputError.
    """
    for _ in range(TRIES):
        folder = resolve(path_or_id)
        before = stamp(folder)
        try:
            loaded = read(folder, device, dtype, folder if tokenizer is None else tokenizer,
                          shard)
            if stamp(folder) == before:
                return loaded
            del loaded  # one copy in memory, not two
        except Exception:  # safetensors and torch open files, too, and have their own classes
            if before and stamp(folder) == before:
                raise
    raise InputError(f"{path_or_id} is being replaced again and again: wait until that has ended")


def read(folder: Path, device: str | torch.device, dtype: torch.dtype,
         tokenizer: str | os.PathLike, shard: Callable[[QuietStar], object] | None = None,
         ) -> tuple[QuietStar, Tokenizer, Settings]:
    """`load_thinker` of a folder that stays as it is."""
    config, (step, trained) = read_config(folder), read_info(folder)
    words = load_tokenizer(tokenizer)
    given = {key: special_ids(folder, key, config.vocab_size) for key in SPECIAL}
    ends = [*given["eos_token_id"], end_of_text_id(words), words.token_to_id(END_OF_TURN)]
    stored = {name: x for name, x in find_weights(folder).items()
              if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)  # the same as the embedding
    check_sizes(folder, config, stored)
    banned = unknown_ids(words, config.vocab_size)

    own, thinking = folder / "quietstar.safetensors", Thinking()
    extra: dict[str, Stored] = {}
    is_official = any(n.startswith(("talk_head.", "start_", "end_")) for n in stored)
    if own.exists():
        extra, metadata = read_header(own)
        thinking = read_thinking(own, trained | metadata)
    elif is_official:
        thinking = OFFICIAL
    elif step and trained.get("n_ahead"):  # a pre-trained base has had no step
        raise InputError(f"{own} is missing, although {folder / 'nanoqstar.json'} says that this "
                         "model was taught to think: the copy of it is not complete")
    with torch.device("meta"):
        model = QuietStar(Qwen2(config), thinking.thought_temperature,
                          reread=thinking.delimiters == "reread")
    shapes: dict[str, Sequence[int]] = {n: p.shape for n, p in model.lm.named_parameters()}
    ours = {n: p.shape for n, p in model.named_parameters() if not n.startswith("lm.")}
    theirs: dict[str, Sequence[int]] = {
        n.replace("mixing_head.", "talk_head.0."): (2, *s) if n.endswith("_embedding") else s
        for n, s in ours.items() if is_official}
    check(folder, stored, shapes | theirs)
    if own.exists():
        check(own, extra, ours)

    wide = torch.promote_types(dtype, torch.float32)  # they are few; the mixing weight deserves it
    model.to(wide).lm.to(dtype)
    if shard:
        shard(model)
    model.to_empty(device=device)
    named = model.state_dict(keep_vars=True)  # free of wrappers' prefixes
    copy(stored, {name: named[f"lm.{name}"] for name in shapes})
    copy(extra, {name: named[name] for name in extra})
    if theirs:
        weights = {name: torch.empty(shape, dtype=wide) for name, shape in theirs.items()}
        copy(stored, weights)
        for name, x in from_official(weights)[1].items():
            parallel.fill(named[name], x)
    model.banned = banned.to(device)  # not before: to_empty empties buffers
    end_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
    return model, words, Settings(thinking, folder, end_ids, step, trained)


def save(folder: str | os.PathLike, model: QuietStar, tokenizer: Tokenizer, *,
         thinking: Thinking | None, step: int, config: Mapping[str, Any], source: Path | None,
         dtype: Literal["fp32", "bf16"] = "fp32", beside: Mapping[str, str] | None = None) -> None:
    """Writes a folder that `load_thinker` and transformers read; one we wrote earlier is replaced.

    thinking: how start, end and mixing head were trained, or None for the language model alone.
    source: the model folder it came from, whose files for transformers go along. dtype: of the
    language model's weights; fp32: as they are, those with adapters merged in fp32. beside: more
    files, {name: text}. At any moment `load_thinker` finds the earlier folder or the new one,
    whole. What others have put into the folder stays in it. Raises OSError, with the earlier one in
    place, where writing fails, and InputError where the folder is not ours or another process is
    saving into it.
    """
    folder = Path(os.path.realpath(folder))
    work = workplace(folder)
    new, old = work / "nanoqstar.new", work / "nanoqstar.old"
    try:
        with lock(work):
            if folder.is_file() or (folder.exists() and any(folder.iterdir())
                                    and not (folder / "nanoqstar.json").exists()):
                raise InputError(f"{folder} exists and was not saved by nanoqstar; choose another "
                                 "folder")
            try:
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                write(new, model, tokenizer, thinking, source, dtype)
                lora.save(new / "adapter", model.lm, base_of(folder, config, source))
                write_json(new / "nanoqstar.json", {"step": step, "config": dict(config)})
                for name, text in (beside or {}).items():
                    (new / name).write_text(text, encoding="utf-8")
                for file in (*new.rglob("*"), new):
                    sync(file)
                if folder.exists():
                    retire(old, folder)
                    folder.rename(old)
                new.rename(folder)
                sync(folder.parent)
            except BaseException as error:
                if newest(folder) == old:  # as a kill between the renames leaves it
                    old.rename(folder)
                shutil.rmtree(new, ignore_errors=True)
                if isinstance(error, SafetensorError):  # so it calls a full disk
                    raise OSError(f"{folder} cannot be written: {error}") from error
                raise
            retire(old, folder)
    finally:
        with suppress(OSError):  # it holds what another process, or another person, put there
            work.rmdir()


def base_of(folder: Path, config: Mapping[str, Any], source: Path | None) -> str:
    """What a run's adapters belong to: the Hub's id, the model's folder, or its own base/."""
    given = config.get("model_path")
    if given and not os.path.isdir(newest(Path(given))):
        return given
    return str(source or folder.parent / "base")


def retire(old: Path, folder: Path) -> None:
    """Deletes the save that was put aside; what others have put into it moves on to `folder`."""
    with suppress(OSError):  # then the next save tries again
        for name in {x.name for x in old.iterdir()} - set(OURS):
            (old / name).rename(folder / name)
        shutil.rmtree(old)


def write(folder: Path, model: QuietStar, tokenizer: Tokenizer, thinking: Thinking | None,
          source: Path | None, dtype: str) -> None:
    """Config, tokenizer and weights into an empty folder."""
    lm, weights, end = model.lm, lora.merged(model.lm), end_of_text_id(tokenizer)
    if dtype == "bf16":
        weights = {name: x.bfloat16() for name, x in weights.items()}
    kind = "qwen2" if lm.config.attention_bias else "mistral"
    ids: dict[str, Any] = {"bos_token_id": beginning_ids(tokenizer)[:1],
                           "eos_token_id": [] if end is None else [end], "pad_token_id": []}
    for key, default in ids.items():  # null where there is none: absent keys have meanings
        found = (special_ids(source, key, lm.config.vocab_size) if source else []) or default
        ids[key] = found if key == "eos_token_id" and len(found) > 1 else next(iter(found), None)
    companions = [source / name for name in COMPANIONS if source and (source / name).is_file()]
    for file in companions:
        shutil.copyfile(file, folder / file.name)
    generation = folder / "generation_config.json"
    write_json(generation, (read_json(generation) if generation.exists() else {}) | ids)
    if not (folder / "tokenizer_config.json").exists():  # or transformers goes by the model's type
        words = {f"{x}_token": tokenizer.id_to_token(i) for x in ("bos", "eos")
                 if isinstance(i := ids[f"{x}_token_id"], int)}
        write_json(folder / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast", **words})
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(folder / "config.json", {
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind,
        "hidden_act": "silu", **asdict(lm.config), **ids,
        "torch_dtype": str(weights["model.embed_tokens.weight"].dtype).removeprefix("torch.")})

    own = {n: x for n, x in model.state_dict().items() if thinking and not n.startswith("lm.")}
    settings = {k: str(v) for k, v in asdict(thinking).items()} if thinking else {}
    for name, tensors, said in (("model", weights, {}), ("quietstar", own, settings)):
        file = folder / f"{name}.safetensors"
        if tensors:  # whose names are free of the prefixes of wrapped blocks
            save_file({n: x.detach().contiguous() for n, x in tensors.items()}, file,
                      {"format": "pt", **said})  # transformers insists on the format
            shutil.copymode(folder / "config.json", file)  # safetensors' own is for its owner alone
