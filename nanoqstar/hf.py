"""Hugging Face folders in and out: config.json, safetensors and tokenizer.json; nothing is ever pickled.

Our own additions lie beside them in `quietstar.safetensors`, so that any Qwen2 loader still reads what we save.
"""

import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanoqstar import InputError
from nanoqstar.files import read_json
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config

FILES = ["config.json", "tokenizer.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
         "quietstar.safetensors"]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PIECE = 2**20  # elements read at once; far larger buffers fragment the heap
OFFICIAL_EMBEDDING_SCALE = 100  # it stores the delimiters' embeddings divided by this (`embedding_scale`)


def resolve(path_or_id):
    """The local folder of a model: `path_or_id` itself, or where the Hub's `owner/name` was downloaded to.

    Raises InputError: neither a folder nor an id, no network, no such repository, or no access to it.
    """
    if os.path.isdir(path_or_id):
        checkpoint = Path(path_or_id, "checkpoint")  # a run's folder stands for what it trained
        if not checkpoint.is_dir() and Path(path_or_id, "metrics.jsonl").exists():
            raise InputError(f"the run in {path_or_id} has saved nothing yet; its pre-trained base, if any, is in its "
                             "base/")
        return checkpoint if checkpoint.is_dir() else Path(path_or_id)
    name = str(path_or_id)
    if os.path.exists(name):
        raise InputError(f"{name} is a file; give the folder it lies in")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(f"there is no folder {name!r}, and it is no Hub id either (owner/name)")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the Hub's client raises what its HTTP library does, which depends on its version
        raise hub_error(name, error) from error


def hub_error(name, error):
    """InputError for what the Hub's client raised about the repository `name`: what is wrong and how to mend it."""
    status, cause = None, error
    while cause is not None and status is None:
        status, cause = getattr(getattr(cause, "response", None), "status_code", None), cause.__cause__
    if status in (401, 403):
        return InputError(f"the Hub refuses access to {name!r} ({status}): the name is wrong, or it is private or "
                          "gated: accept its terms on its page, then set HF_TOKEN or run `hf auth login`")
    if status == 404:
        return InputError(f"there is neither a folder {name!r} nor a repository of that name on the Hub (404)")
    if status:
        reason = f"the Hub answered {status}"
    elif isinstance(error, LocalEntryNotFoundError):
        reason = "no network, or HF_HUB_OFFLINE is set: go online, or give a local folder"
    else:  # such as a full disk
        reason = " ".join(str(error).split())
    return InputError(f"there is no folder {name!r}, and it cannot be fetched as a Hub id: {reason}")


def read_config(folder):
    """Qwen2Config from config.json (Qwen2, Qwen2.5, Mistral); InputError names whatever we would compute wrongly.

    Absent keys mean what they mean to transformers; `attention_bias`, which it does not read, is what `save` writes.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)

    def get(key, kind, default=None):
        value = default if raw.get(key) is None else raw[key]
        if kind is bool:
            good, wanted = isinstance(value, bool), "true or false"
        else:
            good = isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value < math.inf
            wanted = {int: "a positive integer", float: "a positive number"}[kind]
        if not good:
            raise InputError(f"{file}: {key} must be {wanted}, not {'missing' if value is None else repr(value)}")
        return kind(value)

    def refuse(what):
        raise InputError(f"{file}: {what} is not supported; nanoqstar computes plain Qwen2, Qwen2.5 and Mistral only")

    if raw.get("model_type") not in ("qwen2", "mistral"):
        refuse(f"model_type {raw.get('model_type')!r}")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {raw['hidden_act']!r}")
    for key in ("mlp_bias", "quantization_config", "use_qk_norm", "use_mrope"):
        if raw.get(key):
            refuse(f"{key} {raw[key]!r}")
    for key in ("rope_scaling", "rope_parameters"):  # the latter since transformers 5, with rope_theta inside
        rope = raw.get(key) or {}
        if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
            refuse(f"{key} {rope!r}")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            refuse(f"{key} of type {rope.get('rope_type', rope.get('type'))!r}")
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))

    is_qwen = raw["model_type"] == "qwen2"
    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    positions = get("max_position_embeddings", int)
    window = get("sliding_window", int, positions)
    if is_qwen and not get("use_sliding_window", bool, False):
        window = positions
    if is_qwen and window < positions:
        refuse(f"use_sliding_window with a sliding_window of {window}")
    config = Qwen2Config(
        vocab_size=get("vocab_size", int), hidden_size=hidden, intermediate_size=get("intermediate_size", int),
        num_hidden_layers=get("num_hidden_layers", int), num_attention_heads=heads,
        num_key_value_heads=get("num_key_value_heads", int, heads), head_dim=get("head_dim", int, hidden // heads),
        max_position_embeddings=positions, rope_theta=get("rope_theta", float, 10000.0),
        rms_norm_eps=get("rms_norm_eps", float, 1e-6), attention_bias=get("attention_bias", bool, is_qwen),
        tie_word_embeddings=get("tie_word_embeddings", bool, False),
        sliding_window=window if window < positions else None)
    if heads % config.num_key_value_heads or config.head_dim % 2:
        raise InputError(f"{file}: {heads} attention heads must be a multiple of {config.num_key_value_heads} "
                         f"key/value heads, and head_dim {config.head_dim} even")
    return config


@dataclass
class Stored:
    """One tensor on disk."""

    file: Path
    offset: int  # bytes
    dtype: str  # safetensors' name
    shape: tuple

    def read_into(self, out):
        """Fills `out`, of this shape and any dtype and device, piece by piece: there is no second copy in memory."""
        with open(self.file, "rb") as file, torch.no_grad():
            file.seek(self.offset)
            for piece in out.view(-1).split(PIECE):
                buffer = torch.empty(piece.shape, dtype=DTYPES[self.dtype])
                if file.readinto(buffer.view(torch.uint8).numpy()) != buffer.nbytes:
                    raise InputError(f"{self.file} became shorter while it was read")
                piece.copy_(buffer)
        return out


def read_header(file):
    """{name: Stored} of one safetensors file; InputError where it is missing or not whole."""
    try:
        with safe_open(file, "pt"):  # checks the header against itself and against the file's length
            pass
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    except FileNotFoundError:
        raise InputError(f"{file} is missing: the download or copy of this model is not complete") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or cut short, fetch it again ({error})") from error
    return {name: Stored(file, 8 + length + x["data_offsets"][0], x["dtype"], tuple(x["shape"]))
            for name, x in header.items() if name != "__metadata__"}


def find_weights(folder):
    """{name: Stored} of model.safetensors, or of all shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        pickles = [x.name for x in folder.glob("*.bin")]
        raise InputError(f"{folder} has no model.safetensors" + (
            f" but pickles ({pickles[0]}), which are not read: convert them with transformers' save_pretrained"
            if pickles else ", nor shards with a model.safetensors.index.json"))
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise InputError(f"{index} has no weight_map from tensors to files")
    stored = {}
    for shard in sorted(set(shards.values())):
        stored |= read_header(folder / shard)
    return stored


def check(folder, stored, shapes):
    """InputError that lists every tensor that is missing, unexpected, misshapen or of a dtype we do not read."""
    wrong_shape = [f"{n} {list(stored[n].shape)} instead of {list(shapes[n])}" for n in shapes
                   if n in stored and stored[n].shape != tuple(shapes[n])]
    wrong_dtype = [f"{n} {x.dtype}" for n, x in stored.items() if n in shapes and x.dtype not in DTYPES]
    problems = {"missing": sorted(shapes.keys() - stored.keys()), "unexpected": sorted(stored.keys() - shapes.keys()),
                "misshapen": wrong_shape, f"of a dtype other than {', '.join(DTYPES)}": wrong_dtype}
    if any(problems.values()):
        listed = "; ".join(f"{len(x)} {what}: {', '.join(x)}" for what, x in problems.items() if x)
        raise InputError(f"the tensors in {folder} are not those of its config.json: {listed}")


def from_official(weights, scale=OFFICIAL_EMBEDDING_SCALE):
    """Splits the official code's tensors into (language model's, ours): `talk_head.0.*` is `mixing_head.*`, and the
    delimiters' embeddings are row 0, stored divided by `scale` (row 1 is unused)."""
    weights = dict(weights)
    added = {f"{name}_embedding": weights.pop(f"{name}_embedding")[0] * scale for name in ("start", "end")}
    for name in [n for n in weights if n.startswith("talk_head.0.")]:
        added[f"mixing_head.{name.removeprefix('talk_head.0.')}"] = weights.pop(name)
    return weights, added


def load(path_or_id, device="cpu", dtype=torch.float32):
    """(Qwen2, thoughts or None, folder) of a local folder or Hub id, tensor by tensor: about one copy in host memory.

    thoughts: {name: tensor} of QuietStar's own parameters, from `quietstar.safetensors` or from the layout of the
    official checkpoint, in fp32 at least.  Every name, shape and dtype is checked before anything is loaded;
    InputError otherwise.
    """
    folder = resolve(path_or_id)
    config = read_config(folder)
    with torch.device("meta"):
        model = QuietStar(Qwen2(config))
    shapes = {name: p.shape for name, p in model.lm.named_parameters()}
    ours = {name: p.shape for name, p in model.named_parameters() if not name.startswith("lm.")}
    official = {n.replace("mixing_head.", "talk_head.0."): (2, *s) if n.endswith("_embedding") else s
                for n, s in ours.items()}

    stored = {name: x for name, x in find_weights(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)  # the same as the embedding
    own = folder / "quietstar.safetensors"
    if own.exists():
        extra = read_header(own)
        check(own, extra, ours)
    else:
        extra = {name: stored[name] for name in official if name in stored}
        shapes |= official if extra else {}
    check(folder, stored, shapes)

    lm = model.lm.to(dtype).to_empty(device=device)
    for name, p in lm.named_parameters():
        stored[name].read_into(p.detach())
    wide = torch.promote_types(dtype, torch.float32)  # they are small, and the mixing weight deserves it
    thoughts = {name: x.read_into(torch.empty(x.shape, device=device, dtype=wide)) for name, x in extra.items()}
    if thoughts and not own.exists():
        _, thoughts = from_official(thoughts)
    return lm, thoughts or None, folder


def check_context(config, n_positions):
    """InputError where `n_positions` RoPE positions are more than the model knows or than its attention window."""
    if n_positions > config.max_context:
        window = " (its sliding window)" if config.sliding_window else ""
        raise InputError(f"{n_positions} positions are more than the model's context of {config.max_context}{window}: "
                         "shorten the text (the prompt and max_new_tokens, or max_length) or the thoughts")


def save(folder, model, tokenizer_json, info):
    """Writes a folder that `load` and transformers read; one we wrote earlier is replaced, whole, by renaming.

    model: QuietStar, or a Qwen2.  tokenizer_json: text of tokenizer.json, or None.  info: written to nanoqstar.json.
    An interruption leaves the folder as it was, or the earlier one as `<folder>.old`.
    """
    folder = Path(folder).resolve()
    if folder.is_file() or folder.exists() and any(folder.iterdir()) and not (folder / "nanoqstar.json").exists():
        raise InputError(f"{folder} exists and was not saved by nanoqstar; choose another folder")
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    lm = model.lm if isinstance(model, QuietStar) else model
    own = {name: x for name, x in model.state_dict().items() if lm is not model and not name.startswith("lm.")}
    for name, tensors in (("model", lm.state_dict()), ("quietstar", own)):  # free of the prefixes of wrapped blocks
        if tensors:  # transformers insists on the metadata
            save_file({n: p.detach().contiguous() for n, p in tensors.items()}, partial / f"{name}.safetensors",
                      {"format": "pt"})
    is_qwen = lm.config.attention_bias
    config = {"architectures": ["Qwen2ForCausalLM" if is_qwen else "MistralForCausalLM"],
              "model_type": "qwen2" if is_qwen else "mistral", "hidden_act": "silu",
              "torch_dtype": str(lm.head_weight.dtype).removeprefix("torch."), **asdict(lm.config)}
    for name, value in (("config.json", config), ("nanoqstar.json", info)):
        (partial / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if tokenizer_json is not None:
        (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")

    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
