"""Every setting of a run, typed and explained; the presets; and the command line derived from them."""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot be; the message is one sentence."""


def setting(default, meaning):
    return field(default=default, metadata={"help": meaning})


def types_of(f):
    """(accepted types, choices or None) of a field: `X | None` gives X and NoneType, Literal its choices."""
    if typing.get_origin(f.type) is Literal:
        return (str,), typing.get_args(f.type)
    return (typing.get_args(f.type) if isinstance(f.type, types.UnionType) else (f.type,)), None


def check_type(f, value):
    accepted, choices = types_of(f)
    if choices and value not in choices:
        raise ConfigError(f"--{f.name}: {value!r} is not one of {', '.join(choices)}")
    numeric = float in accepted and type(value) is int
    if type(value) not in accepted and not numeric or value != value or value in (float("inf"), -float("inf")):
        raise ConfigError(f"--{f.name}: expected {' or '.join(t.__name__ for t in accepted)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    # ---- model and data
    model_path: str | None = setting(None, "folder or Hub id to start from: Qwen2, Mistral, an earlier run, or an "
                                     "official Quiet-STaR checkpoint; none: a new model of the sizes below, "
                                     "pre-trained first")
    data: str = setting("fold", "folder made by data/prepare.py, or 'fold', the embedded corpus")
    out_dir: str | None = setting(None, "where the run is kept; none: out/PRESET, or out/PRESET-2 .. if that is taken")
    seed: int = setting(0, "of data order, thoughts and new weights")
    device: Literal["auto", "cuda", "mps", "cpu"] = setting("auto", "auto: the first of cuda, mps, cpu there is")
    threads: int | None = setting(None, "CPU threads; none: all cores")
    compile: bool | None = setting(None, "torch.compile the model's blocks; none: on CUDA only (eager wins on a CPU)")
    checkpointing: float = setting(0.0, "share of the blocks' activations that the backward pass recomputes instead of "
                                   "keeping: 0 is fastest, 1 needs least memory")

    # ---- Quiet-STaR: what is computed (paper section 4; 'official' is the authors' training script)
    n_ahead: int = setting(8, "K, tokens of a thought, start and end included, so K-2 are sampled; 0: no thoughts, "
                           "plain continued pre-training (the official n_ahead is ours + 1)")
    n_ahead_talk: int = setting(4, "A, true tokens predicted after each thought, A-1 of them teacher-forced "
                                "(official: 4)")
    n_passes: int = setting(2, "P, thoughts per position; their mean reward is the baseline (official: 2)")
    max_length: int = setting(1024, "T, positions of a window that think; a window holds T + n_ahead_talk tokens")
    thought_temperature: float = setting(1.0, "temperature thoughts are sampled at (official: 1, whatever its "
                                         "gumbel_temperature)")
    reinforce_temperature: float = setting(3.0, "temperature of the log-probs in the policy term (official: 3)")
    base_weight: float = setting(0.5, "weight of the NLL without thoughts (official: 0.5)")
    mixed_weight: float = setting(0.5, "weight of the NLL with thoughts (official: 0.5)")
    policy_weight: float = setting(1e6, "weight of the REINFORCE term (official: 1e6)")
    clamp_advantage: bool = setting(True, "drop negative advantages (official: true)")
    normalize_advantage: bool = setting(False, "divide advantages by their root mean square, of each forward's own: "
                                        "needs grad_accum 1 (official: false)")
    start_init_text: str = setting("---", "the start embedding begins as the mean embedding of this text "
                                   "(official: ---)")
    end_init_text: str = setting("---", "the same for the end embedding (official: ---)")
    embedding_lr_factor: float = setting(100.0, "learning rate of start and end embedding, times this; weight decay "
                                         "over it (official: 100, by storing them / 100)")
    thoughts_from: str | None = setting(None, "control experiment: thoughts drawn uniformly from the tokens of this "
                                        "text instead of from the model (one token: fixed thoughts)")
    trainable: Literal["all", "thoughts", "mixing_head"] = setting(
        "all", "control experiment: what learns; thoughts: start, end and mixing head")

    # ---- optimization
    max_steps: int = setting(100_000, "Quiet-STaR updates")
    batch_size: int = setting(1, "windows per forward")
    grad_accum: int = setting(1, "forwards per update; equals one batch of batch_size * grad_accum windows")
    learning_rate: float = setting(1e-6, "of AdamW after warmup (official: 1e-6)")
    warmup_steps: int = setting(20, "updates of linear warmup (official: 20)")
    schedule: Literal["constant", "cosine"] = setting("constant", "after warmup; cosine: down to a tenth "
                                                      "(official: constant)")
    beta2: float = setting(0.999, "of AdamW; beta1 is 0.9")
    weight_decay: float = setting(0.001, "of matrices; norms and biases have none (official: 0.001)")
    grad_clip: float = setting(1.0, "largest gradient norm; unlike the official code's, it counts start and end "
                               "embedding at their own scale (official: 1)")

    # ---- pre-training of a new model (model_path none)
    hidden_size: int = setting(96, "width of a new model")
    intermediate_size: int = setting(288, "inner width of its SwiGLU")
    n_layers: int = setting(2, "its blocks")
    n_heads: int = setting(4, "its attention heads")
    n_kv_heads: int = setting(4, "its key and value heads")
    init_std: float = setting(0.06, "standard deviation of its matrices at the start")
    embedding_std: float = setting(0.1, "standard deviation of its embedding at the start")
    pretrain_steps: int = setting(600, "updates of pre-training, cosine down to a tenth")
    pretrain_batch_size: int = setting(32, "windows per pre-training update")
    pretrain_learning_rate: float = setting(2e-3, "after 30 updates of warmup")

    # ---- the embedded corpus (data fold)
    fold_operands: int = setting(4, "letters of a problem")
    fold_operations: int = setting(1, "Latin squares; several have signs between the operands, as in a*b+c")
    fold_ordinary_frac: float = setting(0.0, "share of lines that are ordinary text (docstrings of the standard "
                                       "library)")
    fold_worked_frac: float = setting(0.1, "share of lines that work the answer out")
    fold_restated_frac: float = setting(0.3, "share of lines that restate the question; the rest answer directly")
    fold_tokens: int = setting(1_500_000, "characters of training text")

    # ---- logging
    log_every: int = setting(10, "updates between lines in the log and in metrics.jsonl")
    eval_every: int = setting(500, "updates between evaluations on val")
    eval_windows: int = setting(16, "val windows of an evaluation")
    save_every: int = setting(1000, "updates between checkpoints; one is kept, and one is always written at the end")
    wandb: bool = setting(False, "log to Weights & Biases as well (pip install -e '.[wandb]')")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_type(f, getattr(self, f.name))
        positive = ("max_length", "n_passes", "batch_size", "grad_accum", "max_steps", "hidden_size",
                    "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "pretrain_batch_size", "log_every",
                    "eval_every", "eval_windows", "save_every", "thought_temperature", "reinforce_temperature",
                    "learning_rate", "grad_clip", "embedding_lr_factor", "pretrain_learning_rate", "fold_tokens")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be greater than 0")
        for name in ("base_weight", "mixed_weight", "policy_weight", "warmup_steps", "weight_decay", "pretrain_steps",
                     "seed", "fold_worked_frac", "fold_restated_frac", "init_std", "embedding_std"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
        if self.n_ahead != 0 and self.n_ahead < 3:
            raise ConfigError(f"n_ahead={self.n_ahead} leaves no sampled token: start and end need n_ahead >= 3 "
                              "(or 0 for plain continued pre-training)")
        if self.n_ahead_talk < 1:
            raise ConfigError(f"n_ahead_talk={self.n_ahead_talk}: at least 1 token is predicted after a thought")
        if self.hidden_size % self.n_heads or self.n_heads % self.n_kv_heads or self.hidden_size // self.n_heads % 2:
            raise ConfigError(f"hidden_size={self.hidden_size}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}: "
                              "heads must divide the width into even parts, and kv heads the heads")
        if self.fold_worked_frac + self.fold_restated_frac > 1:
            raise ConfigError("fold_worked_frac + fold_restated_frac is more than 1")
        if not (1 <= self.fold_operations <= 4 and 0 <= self.fold_ordinary_frac < 1):
            raise ConfigError(f"fold_operations={self.fold_operations}, fold_ordinary_frac={self.fold_ordinary_frac}: "
                              "1 to 4 operations, and a share below 1")
        if self.n_ahead == 0 and self.trainable != "all":
            raise ConfigError(f"trainable={self.trainable}: without thoughts (n_ahead=0) only the whole model "
                              "can learn")
        if self.normalize_advantage and self.grad_accum > 1:
            raise ConfigError("normalize_advantage takes each forward by itself: set grad_accum 1 and a larger "
                              "batch_size")
        if self.seed >= 2**63:
            raise ConfigError(f"seed={self.seed}: must be below 2^63")
        if not 2 <= self.fold_operands <= 8:
            raise ConfigError(f"fold_operands={self.fold_operands}: problems have 2 to 8 operands")
        if not 0 <= self.checkpointing <= 1:
            raise ConfigError(f"checkpointing={self.checkpointing}: a share, from 0 to 1")
        if not 0 < self.beta2 < 1:
            raise ConfigError(f"beta2={self.beta2}: must lie between 0 and 1")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads={self.threads}: must be at least 1, or none for all cores")


@dataclass(frozen=True)
class Preset:
    config: TrainConfig
    hardware: str
    memory: str  # of the resident state: fp32 weights, gradients and two Adam moments, 16 bytes a parameter
    purpose: str


H200 = dict(data="data/fineweb-edu", n_ahead=8, n_ahead_talk=4, n_passes=4, max_length=1024, checkpointing=1.0)
PRESETS = {
    "tiny": Preset(TrainConfig(
        n_ahead=6, n_ahead_talk=2, n_passes=2, max_length=62, start_init_text="(", end_init_text=")",
        embedding_lr_factor=10.0, policy_weight=10.0, reinforce_temperature=1.0, clamp_advantage=False, max_steps=160,
        batch_size=16, learning_rate=1e-3, warmup_steps=10, beta2=0.99, eval_every=40, eval_windows=192),
        "2 CPU cores", "4 MB", "the embedded demo: thoughts become useful in minutes"),
    "small": Preset(TrainConfig(
        n_ahead=8, n_ahead_talk=2, n_passes=2, max_length=126, start_init_text="(", end_init_text=")",
        embedding_lr_factor=10.0, policy_weight=10.0, reinforce_temperature=1.0, clamp_advantage=False, max_steps=400,
        batch_size=32, learning_rate=3e-4, warmup_steps=20, beta2=0.99, eval_every=50, eval_windows=192,
        hidden_size=512, intermediate_size=1536, n_layers=8, n_heads=8, n_kv_heads=4, init_std=0.03,
        pretrain_steps=3000, pretrain_batch_size=64, pretrain_learning_rate=1e-3, fold_operands=6, fold_operations=3,
        fold_ordinary_frac=0.1, fold_worked_frac=0.3, fold_tokens=20_000_000),
        "1 GPU (not yet run)", "416 MB + activations",
        "the demo scaled up: three operations, six operands, prose"),
    "text": Preset(TrainConfig(
        data="data/text", n_ahead=8, n_ahead_talk=4, n_passes=2, max_length=128, reinforce_temperature=1.0,
        policy_weight=10.0, embedding_lr_factor=10.0, max_steps=300, batch_size=8, learning_rate=2e-4, warmup_steps=20,
        beta2=0.99, eval_every=100, eval_windows=64, hidden_size=256, intermediate_size=688, n_layers=4, n_heads=8,
        n_kv_heads=2, init_std=0.04, embedding_std=0.04, pretrain_steps=2000, pretrain_learning_rate=1e-3),
        "1 GPU, or patience", "64 MB + activations", "your own text (--data FOLDER) with a new small model"),
    "qwen2_5_0_5b": Preset(TrainConfig(model_path="Qwen/Qwen2.5-0.5B", **H200),
                           "1 GPU, 24 GB or more", "8 GB + activations", "the real thing at its smallest"),
    "qwen2_5_3b": Preset(TrainConfig(model_path="Qwen/Qwen2.5-3B", **H200),
                         "1 H200", "49 GB + activations", "the main run, FineWeb-Edu"),
    "qwen2_5_3b_math": Preset(TrainConfig(model_path="Qwen/Qwen2.5-3B", **H200 | {"data": "data/open-web-math"}),
                              "1 H200", "49 GB + activations", "the main run on open-web-math, as in the paper"),
    "qwen2_5_7b": Preset(TrainConfig(model_path="Qwen/Qwen2.5-7B", **H200),
                         "several GPUs (not yet)", "122 GB + activations",
                         "larger than one GPU holds in fp32 masters: waits for FSDP2"),
    "mistral_7b_paper": Preset(TrainConfig(
        model_path="mistralai/Mistral-7B-v0.1", **H200 | dict(data="data/open-web-math-mistral", n_ahead=11, n_passes=2,
                                                             max_length=252), grad_accum=8, max_steps=100),
        "1 H200 or several GPUs", "116 GB + activations",
        "the official run: 256 tokens, 8 texts an update, official 12/4"),
}


def parse_value(f, text):
    accepted, _ = types_of(f)
    kind = accepted[0]
    if text.lower() == "none" and type(None) in accepted:
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is str:
        says_text = f.name.endswith("_text") or f.name in ("thoughts_from", "prompt")
        return text.replace("\\n", "\n") if says_text else text  # so that any shell can say it
    try:
        return kind(text.replace("_", "")) if kind is not bool else bool[text]
    except (ValueError, TypeError):
        raise ConfigError(f"--{f.name}: expected {kind.__name__}, got {text!r}") from None


def nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def parse_options(cls, args):
    """`--key value`, `--key=value` and bare `--flag` for booleans -> {field: value}; raises ConfigError."""
    known, values, args = {f.name: f for f in dataclasses.fields(cls)}, {}, list(args)
    while args:
        option = args.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"unexpected argument {option!r}: options look like --max_steps 100")
        name, equals, text = option[2:].partition("=")
        if name not in known:
            raise ConfigError(f"unknown option --{name}" + nearest("--" + name, ["--" + k for k in known]))
        f = known[name]
        if not equals:
            if bool in types_of(f)[0] and (not args or args[0].lower() not in ("true", "false", "none")):
                text = "true"
            elif args:
                text = args.pop(0)
            else:
                raise ConfigError(f"--{name}: a value is missing")
        values[name] = parse_value(f, text)
    return values


def load_config(name):
    """A preset's name or the path of a saved config.json -> (run name, TrainConfig)."""
    if name in PRESETS:
        return name, PRESETS[name].config
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"no config {name!r}{nearest(name, list(PRESETS))}; there are {', '.join(PRESETS)}, and any "
                          "saved config.json")
    try:
        saved = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not readable as JSON ({error}); name another or a preset") from None
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} holds no settings: a saved config.json is an object of names and values")
    for key in saved:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    return path.resolve().parent.name, TrainConfig(**saved)


def help_text(cls, usage, values=None):
    """Every field of `cls` with its meaning and default, those of the config `values` where one is given."""
    lines = [usage, "", "options, as --key value or --key=value:"]
    for f in dataclasses.fields(cls):
        accepted, choices = types_of(f)
        types = ("none" if t is type(None) else t.__name__ for t in accepted)
        kind = "|".join(choices) if choices else " or ".join(types)
        value = f.default if values is None else getattr(values, f.name)
        default = "none" if value is None else json.dumps(value) if isinstance(value, (bool, str)) else value
        lines.append(f"  --{f.name} ({kind}, default {default})\n      {f.metadata['help']}")
    return "\n".join(lines)


def list_presets():
    lines = [f"{'config':18}{'hardware':24}{'resident memory':24}purpose"]
    lines += [f"{name:18}{p.hardware:24}{p.memory:24}{p.purpose}" for name, p in PRESETS.items()]
    note = "Resident memory: fp32 master weights, gradients and two Adam moments, 16 bytes a parameter."
    return "\n".join([*lines, "", note])


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    prompt: str | None = setting(None, "text to continue; none: ask for prompts, one after the other")
    model_path: str | None = setting(None, "a run's folder, a checkpoint, a model folder or a Hub id; none: the newest "
                                     "run in out/")
    max_new_tokens: int = setting(100, "tokens to write")
    temperature: float = setting(1.0, "of the text; 0: always the likeliest token")
    top_k: int | None = setting(None, "draw from the k likeliest tokens only")
    top_p: float | None = setting(None, "draw from the fewest tokens whose probabilities reach p")
    seed: int = setting(0, "of thoughts and text")
    n_ahead: int | None = setting(None, "tokens of a thought, start and end included; none: as trained")
    no_thoughts: bool = setting(False, "the base model alone")
    show_thoughts: bool = setting(False, "print each token's thought before it")
    compile: bool = setting(False, "on a GPU: compile first, for a minute or more the first time, then write faster")
    device: Literal["auto", "cuda", "mps", "cpu"] = setting("auto", "auto: the first of cuda, mps, cpu there is")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_type(f, getattr(self, f.name))
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: must be at least 1, or none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must lie in (0, 1], or none")
        if self.n_ahead is not None and self.n_ahead < 3:
            raise ConfigError(f"n_ahead={self.n_ahead}: a thought has at least 3 tokens; --no_thoughts does without")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed}: must lie between 0 and 2^63")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    input: str | None = setting(None, "a .txt, .jsonl, .parquet (also .gz) or other text file, or a folder of them; "
                                "none: a Hugging Face dataset")
    dataset_name: str = setting("HuggingFaceFW/fineweb-edu", "its id")
    dataset_subset: str | None = setting(None, "its config or folder; none: sample-10BT of FineWeb-Edu, else default")
    text_field: str = setting("text", "column or key of the text")
    min_score: int = setting(3, "least int_score of a document, where the data has one")
    max_tokens: int | None = setting(200_000_000, "stop after the document that reaches this many; none: take all")
    val_fraction: float = setting(0.01, "share of documents held out, chosen by their hash")
    tokenizer: str = setting("Qwen/Qwen2.5-3B", "folder or Hub id with a tokenizer.json, or train:N for a new "
                             "byte-level BPE of N entries, trained on the text")
    out: str | None = setting(None, "folder to make; none: named after the input or dataset, in data/")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_type(f, getattr(self, f.name))
        if self.input and (self.dataset_name, self.dataset_subset) != (PrepareConfig.dataset_name, None):
            raise ConfigError("--input takes the place of a dataset: leave out --dataset_name and --dataset_subset")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}: must be at least 1, or none")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction}: must lie between 0 and 1")
        name, _, count = self.tokenizer.partition(":")
        if name == "train" and not (count.isdecimal() and int(count) >= 257):
            raise ConfigError("--tokenizer train:N needs an N of at least 257: 256 bytes and the end-of-text token")
