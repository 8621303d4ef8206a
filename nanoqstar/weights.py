"""What a Hugging Face folder holds of a model: config.json and safetensors, checked, then read."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nanoqstar import InputError, parallel
from nanoqstar.files import plain, read_json, shown
from nanoqstar.qwen2 import Qwen2Config

DTYPES = ("BF16", "F16", "F32", "F64")
ABSURD = 1000  # times the largest stored tensor: a matrix of so many numbers is never asked for
LISTED = 10  # names of wrong tensors in an error
EMBEDDING_SCALE = 100  # the official code stores the delimiters' embeddings divided by this

# ---- config.json

SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers: what an absent key means
    "qwen2": SIZES | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
                      "max_position_embeddings": 32768},
    "mistral": SIZES | {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
                        "max_position_embeddings": 131072}}


def read_config(folder: str | os.PathLike) -> Qwen2Config:
    """Qwen2Config from config.json (Qwen2, Qwen2.5, Mistral), read as transformers reads it.

    Raises InputError that names whatever we would compute wrongly.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = raw.get(key, default)
        accepted, wanted = {bool: ((bool,), "true or false"), int: ((int,), "a positive integer"),
                            float: ((int, float), "a positive number")}[kind]
        if type(value) not in accepted or (kind is not bool and not 0 < value < 1e300):
            raise InputError(f"{file}: {key} must be {wanted}, not {value!r}")
        return kind(value)

    def refuse(what: str) -> None:
        raise InputError(f"{file}: {what} is not supported; nanoqstar computes plain Qwen2, "
                         "Qwen2.5 and Mistral only")

    if str(raw.get("model_type")) not in DEFAULTS:
        refuse(f"model_type {raw.get('model_type')!r}")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {raw['hidden_act']!r}")
    for key in ("mlp_bias", "quantization_config", "use_qk_norm", "use_mrope"):
        if raw.get(key):
            refuse(f"{key} {raw[key]!r}")
    thetas: list[Any] = []
    for key in ("rope_scaling", "rope_parameters"):  # the latter since transformers 5
        rope = raw.get(key) or {}
        if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
            refuse(f"{key} {rope!r}")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            refuse(f"{key} of type {rope.get('rope_type', rope.get('type'))!r}")
        thetas += [rope["rope_theta"]] if "rope_theta" in rope else []
    if thetas:
        raw["rope_theta"] = thetas[0]
        if thetas[1:] not in ([], thetas[:1]):
            refuse(f"rope_theta {thetas[0]!r} in one place and {thetas[-1]!r} in another")

    is_qwen = raw["model_type"] == "qwen2"
    raw = DEFAULTS[raw["model_type"]] | raw
    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    for key, meaning in (("num_key_value_heads", heads), ("head_dim", hidden // heads)):
        raw[key] = meaning if raw.get(key) is None else raw[key]
    positions = get("max_position_embeddings", int)
    window = None
    if raw.get("sliding_window", 4096) is not None and (
            not is_qwen or get("use_sliding_window", bool, False)):
        window = get("sliding_window", int, 4096)
    window = window if window and window < positions else None
    if is_qwen and window:
        refuse(f"use_sliding_window with a sliding_window of {window}")
    config = Qwen2Config(
        vocab_size=get("vocab_size", int), hidden_size=hidden,
        intermediate_size=get("intermediate_size", int),
        num_hidden_layers=get("num_hidden_layers", int), num_attention_heads=heads,
        num_key_value_heads=get("num_key_value_heads", int), head_dim=get("head_dim", int),
        max_position_embeddings=positions, rope_theta=get("rope_theta", float, 10000.0),
        rms_norm_eps=get("rms_norm_eps", float, 1e-6), attention_bias=is_qwen,
        tie_word_embeddings=get("tie_word_embeddings", bool, False), sliding_window=window)
    if config.rope_theta < 1:
        refuse(f"rope_theta {config.rope_theta}")
    if heads % config.num_key_value_heads or config.head_dim % 2:
        raise InputError(f"{file}: {heads} attention heads must be a multiple of "
                         f"{config.num_key_value_heads} key/value heads, and head_dim "
                         f"{config.head_dim} even")
    return config


def special_ids(folder: Path, key: str, vocab_size: int) -> list[int]:
    """Ids that generation_config.json and config.json give for `key`: 'eos_token_id', say.

    Those of no row of the model are left out: -1, for one, is how some say that there is none.
    """
    found: list[int] = []
    for file in (folder / "generation_config.json", folder / "config.json"):
        value = read_json(file).get(key) if file.exists() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(x) is not int for x in ids):
            raise InputError(f"{file}: {key} must be an integer or a list of them, not {value!r}")
        found += [x for x in ids if 0 <= x < vocab_size]
    return list(dict.fromkeys(found))


# ---- weights


class Stored(NamedTuple):
    """One tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """({name: Stored}, metadata) of a safetensors file; InputError: it is missing, or not whole."""
    try:
        with safe_open(plain(file), "pt") as f:  # checks the header against itself and the length
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {name: Stored(file, tuple(x.get_shape()), x.get_dtype())
                    for name, x in slices.items()}, f.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{file} is missing: the download or copy of this model is not "
                         "complete") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or cut short, fetch it again ({error})") from error


def find_weights(folder: Path) -> dict[str, Stored]:
    """{name: Stored} of model.safetensors, or of all shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)[0]
    if not index.exists():
        pickles = [x.name for x in folder.glob("*.bin")]
        raise InputError(f"{folder} has no model.safetensors" + (
            f" but pickles ({pickles[0]}), which are not read: convert them with transformers' "
            "save_pretrained" if pickles else ", nor shards with a model.safetensors.index.json"))
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise InputError(f"{index} has no weight_map from tensors to files")
    stored: dict[str, Stored] = {}
    wrong: list[str] = []
    for shard in sorted(set(shards.values())):
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise InputError(f"{index} names '{shown(shard)}': only .safetensors files beside it "
                             "are read")
        held = read_header(folder / shard)[0]
        wrong += held.keys() & stored.keys()
        stored |= held
    wrong += [n for n, shard in shards.items() if n not in stored or stored[n].file.name != shard]
    if wrong:
        raise InputError(f"{index} and its shards do not belong together: {shown(min(wrong))} is "
                         "not in the one that it should be in, and there only")
    return stored


def check(folder: Path, stored: Mapping[str, Stored], shapes: Mapping[str, Sequence[int]]
          ) -> None:
    """InputError for tensors that are missing, unexpected, misshapen or of an unreadable dtype."""
    here = {n: x for n, x in stored.items() if n in shapes}
    problems = {
        "missing": sorted(shapes.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - shapes.keys()),
        "misshapen": [f"{n} {list(x.shape)} instead of {list(shapes[n])}" for n, x in here.items()
                      if x.shape != tuple(shapes[n])],
        f"of a dtype other than {', '.join(DTYPES)}": [
            f"{n} {x.dtype}" for n, x in here.items() if x.dtype not in DTYPES]}
    if any(problems.values()):
        listed = "; ".join(
            f"{len(x)} {what}: {', '.join(map(shown, x[:LISTED]))}" + ", .." * (len(x) > LISTED)
            for what, x in problems.items() if x)
        raise InputError(f"the tensors in {folder} are not those of its config.json: {listed}")


def check_sizes(folder: Path, config: Qwen2Config, stored: Mapping[str, Stored]) -> None:
    """InputError where config.json asks for so much that even an empty model cannot be built."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    rows = max(config.vocab_size, config.intermediate_size, hidden,
               config.num_attention_heads * config.head_dim)
    largest = max((math.prod(x.shape) for x in stored.values()), default=0)
    if layers > len(stored) or rows * hidden > ABSURD * largest:
        raise InputError(f"{folder}/config.json asks for {layers:,} layers and matrices of up to "
                         f"{rows:,} x {hidden:,} numbers, but the weights are {len(stored):,} "
                         f"tensors of up to {largest:,}: they do not belong together")


def copy(stored: Mapping[str, Stored], targets: Mapping[str, torch.Tensor]) -> None:
    """Fills the targets, of any dtype and device, one by one, of shards only this rank's rows;
    InputError: there is a NaN or inf."""
    for name, target in targets.items():
        file = stored[name].file
        with safe_open(file, "pt") as f:  # opened anew, or all that was read stays mapped
            sharded = parallel.local(target) is not target
            x = f.get_slice(name)[parallel.rows(target)] if sharded else f.get_tensor(name)
        if x.numel() and not all(math.isfinite(y.item()) for y in x.aminmax()):
            raise InputError(f"{file}: {name} holds numbers that are not finite (NaN or infinity): "
                             "this model is broken, take an earlier one")
        parallel.local(target).detach().copy_(x)


def from_official(weights: Mapping[str, torch.Tensor], scale: float = EMBEDDING_SCALE
                  ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Splits the official code's tensors into (language model's, ours): `talk_head.0.*` is
    `mixing_head.*`, and the delimiters' embeddings are row 0, stored divided by `scale`."""
    weights = dict(weights)
    added = {f"{n}_embedding": weights.pop(f"{n}_embedding")[0] * scale for n in ("start", "end")}
    for name in [n for n in weights if n.startswith("talk_head.0.")]:
        added[f"mixing_head.{name.removeprefix('talk_head.0.')}"] = weights.pop(name)
    return weights, added
