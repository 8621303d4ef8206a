"""Every setting of the scripts, typed and explained, and the presets."""

from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nanoqstar import InputError
from nanoqstar.cli import When, check, nearest, setting

NEW_MODEL = When("a new model (model_path none)", lambda c: c.model_path is None)
FOLD = When("the embedded corpus (data fold)", lambda c: c.data == "fold")
THOUGHTS = When("thoughts (n_ahead above 0)", lambda c: c.n_ahead > 0)
WARM_FOLD = When("a warm start (warm_steps above 0) on the embedded corpus (data fold)",
                 lambda c: c.data == "fold" and c.n_ahead > 0 and c.warm_steps > 0)
LEARNED = When("thoughts with learned delimiters",
               lambda c: c.n_ahead > 0 and c.delimiters == "learned")
RESUMED = When("resume", lambda c: c.resume is not None)
NEW_RUN = When("a new run, or resume auto", lambda c: c.resume in (None, "auto"))
ADAPTERS = When("adapters (lora_rank above 0)", lambda c: c.lora_rank > 0)
PUSHED = When("push", lambda c: c.push is not None)
THINKING = When("thoughts", lambda c: not c.no_thoughts)
FILE = When("a file of prompts (prompts)", lambda c: c.prompts is not None)
DATASET = When("a Hugging Face dataset (input none)", lambda c: c.input is None)
Device = Literal["auto", "cuda", "mps", "cpu"]
AUTO = "auto: the first of cuda, mps, cpu there is"
TASKS = ("gsm8k", "commonsense_qa")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    # ---- model and data
    model_path: str | None = setting(
        None, "folder or Hub id to start from: Qwen2, Mistral, an earlier run, or an official "
        "Quiet-STaR checkpoint; none: a new model of the sizes below, pre-trained first",
        at_least=1)
    tokenizer: str | None = setting(
        None, "folder or Hub id of the tokenizer; none: the one in model_path",
        when=When("model_path", lambda c: c.model_path is not None), at_least=1)
    data: str = setting("fold", "folder made by data/prepare.py, or 'fold', the embedded corpus",
                        at_least=1)
    out_dir: str | None = setting(
        None, "where the run is kept; none: out/PRESET, or out/PRESET-2 .. if that is taken",
        at_least=1, when=NEW_RUN)
    resume: str | None = setting(
        None, "go on bit for bit: a run's folder, or one of the states in it, with the run's own "
        "settings where none are given; auto: this command's own folder (out/PRESET, if out_dir is "
        "none), where it holds a state, else start it", at_least=1)
    force: bool = setting(False, "go on although settings differ that change what is learned",
                          when=RESUMED)
    plan: bool = setting(False, "print what an update takes of memory and the run of time, and on "
                         "which cards it fits, and end")
    seed: int = setting(0, "of data order, thoughts and new weights", at_least=0, below=2**63)
    device: Device = setting("auto", AUTO)
    threads: int | None = setting(None, "CPU threads; none: a core each, two at most for a small "
                                  "model", at_least=1, at_most=1024)
    compile: bool | None = setting(
        None, "torch.compile the model's blocks; none: on CUDA only (eager wins on a CPU)")
    checkpointing: float = setting(
        0.0, "share of the blocks' activations that the backward pass recomputes instead of "
        "keeping: 0 is fastest, 1 needs least memory", at_least=0, at_most=1)

    # ---- Quiet-STaR: what is computed (paper section 4; 'official' is the authors' script)
    n_ahead: int = setting(
        8, "K, tokens of a thought, start and end included, so K-2 are sampled; 0: no thoughts, "
        "plain continued pre-training (the official n_ahead is ours + 1)", at_least=0)
    n_ahead_talk: int = setting(4, "A, true tokens predicted after each thought, A-1 of them "
                                "teacher-forced (official: 4)", at_least=1)
    n_passes: int = setting(2, "P, thoughts per position; their mean reward is the baseline "
                            "(official: 2)", at_least=1, when=THOUGHTS)
    max_length: int = setting(1024, "T, positions of a window that think; a window holds T + "
                              "n_ahead_talk tokens", at_least=1)
    thought_temperature: float = setting(
        1.0, "temperature thoughts are sampled at (official: 1, whatever its gumbel_temperature)",
        at_least=1e-3, when=THOUGHTS)
    reinforce_temperature: float = setting(
        3.0, "temperature of the log-probs in the policy term (official: 3)", at_least=1e-3,
        when=THOUGHTS)
    base_weight: float = setting(0.5, "weight of the NLL without thoughts (official: 0.5)",
                                 at_least=0, when=THOUGHTS, at_most=1e12)
    mixed_weight: float = setting(0.5, "weight of the NLL with thoughts (official: 0.5)",
                                  at_least=0, when=THOUGHTS, at_most=1e12)
    policy_weight: float = setting(
        1e6, "weight of the REINFORCE term; below 0, a control experiment: what helps is unlearned "
        "(official: 1e6)", at_least=-1e12, when=THOUGHTS, at_most=1e12)
    clamp_advantage: bool = setting(True, "drop negative advantages (official: true)",
                                    when=THOUGHTS)
    normalize_advantage: bool = setting(
        False, "divide advantages by their root mean square, of each forward's own: needs "
        "grad_accum 1 (official: false)", when=THOUGHTS)
    shuffle_advantage: bool = setting(
        False, "control experiment: advantages go to other thoughts of their window, by one random "
        "order (official: false)", when=THOUGHTS)
    delimiters: Literal["learned", "reread"] = setting(
        "learned", "start and end of a thought; learned: two vectors (official); reread: the "
        "embedding of the token before the thought, and of its last one, plus two vectors that "
        "begin at zero: an untrained thought is how the model itself goes on", when=THOUGHTS)
    start_init_text: str = setting("---", "the start embedding begins as the mean embedding of "
                                   "this text (official: ---)", escapes=True, when=LEARNED)
    end_init_text: str = setting("---", "the same for the end embedding (official: ---)",
                                 escapes=True, when=LEARNED)
    embedding_lr_factor: float = setting(
        100.0, "learning rate of start and end embedding, times this; weight decay over it "
        "(official: 100, by storing them / 100)", above=0, when=THOUGHTS)
    thoughts_from: str | None = setting(
        None, "control experiment: thoughts drawn uniformly from the tokens of this text instead "
        "of from the model (one token: fixed thoughts)", escapes=True, when=THOUGHTS)
    warm_steps: int = setting(
        0, "updates before thinking that learn the thoughts given to the data (data/prepare.py "
        "--thoughts, or fold_thoughts): their first n_ahead - 2 tokens", at_least=0, at_most=10**9,
        when=THOUGHTS)
    trainable: Literal["all", "thoughts", "mixing_head"] = setting(
        "all", "control experiment: what learns; thoughts: start, end and mixing head")
    lora_rank: int = setting(
        0, "LoRA: adapters of this rank learn in every block instead of the model, which stays as "
        "it is, in bf16 on CUDA if it comes from model_path; 0: none", at_least=0)
    lora_alpha: int = setting(32, "what they add is scaled by lora_alpha / lora_rank", at_least=1,
                              at_most=10**6, when=ADAPTERS)

    # ---- optimization
    max_steps: int = setting(100_000, "updates of this run", at_least=1, at_most=10**9)
    batch_size: int = setting(1, "windows per forward", at_least=1)
    grad_accum: int = setting(1, "forwards per update, of all processes together; equals one batch "
                              "of batch_size * grad_accum windows", at_least=1)
    learning_rate: float = setting(1e-6, "of AdamW after warmup (official: 1e-6)", above=0,
                                   at_most=1000)
    warmup_steps: int = setting(20, "updates of linear warmup (official: 20)", at_least=0)
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "after warmup; cosine: down to a tenth (official: constant)")
    beta2: float = setting(0.999, "of AdamW; beta1 is 0.9", above=0, below=1)
    weight_decay: float = setting(
        0.001, "of matrices; norms and biases have none (official: 0.001)", at_least=0,
        at_most=1000)
    grad_clip: float = setting(1.0, "largest gradient norm; unlike the official code's, it counts "
                               "start and end embedding at their own scale (official: 1)", above=0)

    skip_spikes: bool = setting(False, "leave out an update whose gradient norm lies over the mean "
                                "plus 6 sigma of the 128 before it")
    max_base_rise: float | None = setting(
        0.5, "the run ends where the base's NLL on val has risen by more, nats; none: never",
        above=0)

    # ---- pre-training of a new model
    hidden_size: int = setting(96, "width of a new model", at_least=2, when=NEW_MODEL)
    intermediate_size: int = setting(288, "inner width of its SwiGLU", at_least=1, when=NEW_MODEL)
    n_layers: int = setting(2, "its blocks", at_least=1, at_most=1000, when=NEW_MODEL)
    n_heads: int = setting(4, "its attention heads", at_least=1, when=NEW_MODEL)
    n_kv_heads: int = setting(4, "its key and value heads", at_least=1, when=NEW_MODEL)
    init_std: float = setting(0.06, "standard deviation of its matrices at the start", at_least=0,
                              at_most=100, when=NEW_MODEL)
    embedding_std: float = setting(0.1, "standard deviation of its embedding at the start",
                                   at_least=0, at_most=100, when=NEW_MODEL)
    pretrain_steps: int = setting(600, "updates of pre-training, cosine down to a tenth",
                                  at_least=0, when=NEW_MODEL, at_most=10**9)
    pretrain_batch_size: int = setting(32, "windows per pre-training update", at_least=1,
                                       when=NEW_MODEL)
    pretrain_learning_rate: float = setting(2e-3, "after 30 updates of warmup", above=0,
                                            when=NEW_MODEL, at_most=1000)

    # ---- the embedded corpus
    fold_family: Literal["fold", "chase", "sum", "table"] = setting(
        "fold", "folds, or another family of text: pointers to follow fold_operands times, numbers "
        "of fold_operands digits to add, answers from a table (data/fold.py)", when=FOLD)
    fold_operands: int = setting(4, "letters of a problem", at_least=2, at_most=8, when=FOLD)
    fold_shortest: int | None = setting(
        None, "problems have from so many letters to fold_operands; none: all have fold_operands",
        at_least=2, when=When("folds", lambda c: c.data == "fold" and c.fold_family == "fold"))
    fold_operations: int = setting(1, "Latin squares; several have signs between the operands, as "
                                   "in a*b+c", at_least=1, at_most=4, when=FOLD)
    fold_ordinary_frac: float = setting(0.0, "share of lines that are ordinary text (docstrings of "
                                        "the standard library)", at_least=0, below=1, when=FOLD)
    fold_worked_frac: float = setting(0.1, "share of lines that work the answer out", at_least=0,
                                      at_most=1, when=FOLD)
    fold_restated_frac: float = setting(0.3, "share of lines that restate the question; the rest "
                                        "answer directly", at_least=0, at_most=1, when=FOLD)
    fold_tokens: int = setting(1_500_000, "characters of training text", at_least=1, at_most=10**9,
                               when=FOLD)

    fold_thoughts: int = setting(0, "problems, the first of the training text, whose steps are "
                                 "given as a thought after `=`", at_least=0, at_most=10**6,
                                 when=WARM_FOLD)

    # ---- logging
    log_every: int = setting(
        10, "updates between lines in the log and in metrics.jsonl", at_least=1)
    eval_every: int = setting(500, "updates between evaluations on val", at_least=1)
    eval_windows: int = setting(16, "val windows of an evaluation", at_least=1, at_most=10**6)
    eval_tasks: str | None = setting(
        None, "questions answered at every evaluation, with and without thoughts: gsm8k, "
        "commonsense_qa or both with a comma; gsm8k=FILE: from a .parquet or .jsonl of that schema "
        "instead of from the Hub", at_least=1)
    eval_limit: int | None = setting(
        200, "the first so many questions of each; none: all", at_least=1,
        when=When("eval_tasks", lambda c: c.eval_tasks is not None))
    save_every: int = setting(1000, "updates between saves (a state, and the model for others); "
                              "one is always written at the end, or when Ctrl-C or SIGTERM ends "
                              "the run", at_least=1)
    keep: int = setting(2, "states kept, the newest, besides the best on val; one takes three "
                        "times the fp32 model", at_least=1)
    save_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "of the model that others load; states are exact all the same")
    push: str | None = setting(None, "OWNER/NAME of a model on the Hub, made private if it is not "
                               "there, to back checkpoint/ up to in the background", at_least=1)
    push_every: int = setting(1000, "updates between backups; each is made at a save, one at the "
                              "end", at_least=1, when=PUSHED)
    wandb: bool = setting(False, "log to Weights & Biases as well (pip install -e '.[wandb]')")

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.n_ahead < 3:
            raise InputError(f"n_ahead={self.n_ahead} leaves no sampled token: start and end need "
                             "n_ahead >= 3 (or 0 for plain continued pre-training)")
        if (self.hidden_size % self.n_heads or self.n_heads % self.n_kv_heads
                or self.hidden_size // self.n_heads % 2):
            raise InputError(f"hidden_size={self.hidden_size}, n_heads={self.n_heads}, n_kv_heads="
                             f"{self.n_kv_heads}: heads must divide the width into even parts, and "
                             "kv heads the heads")
        if (self.fold_shortest or 0) > self.fold_operands:
            raise InputError(f"fold_shortest={self.fold_shortest}: at most fold_operands="
                             f"{self.fold_operands}")
        if self.fold_family != "fold" and (self.fold_operations > 1 or self.fold_shortest):
            raise InputError(f"fold_family={self.fold_family}: only folds have several operations, "
                             "or a shortest problem (fold_operations 1, fold_shortest none)")
        if self.n_ahead and self.warm_steps and self.trainable == "mixing_head":
            raise InputError("trainable=mixing_head: a mixing head alone cannot learn the thoughts "
                             "of a warm start (warm_steps)")
        if self.fold_worked_frac + self.fold_restated_frac > 1:
            raise InputError("fold_worked_frac + fold_restated_frac is more than 1")
        if self.n_ahead == 0 and self.trainable != "all":
            raise InputError(f"trainable={self.trainable}: without thoughts (n_ahead=0) only the "
                             "whole model can learn")
        if self.lora_rank and (self.trainable != "all"
                               or (self.model_path is None and not self.pretrain_steps)):
            raise InputError(f"lora_rank={self.lora_rank}: adapters need trainable=all and a model "
                             "that has learned before (model_path, or pretrain_steps above 0)")
        if self.normalize_advantage and self.grad_accum > 1:
            raise InputError("normalize_advantage takes each forward by itself: set grad_accum 1 "
                             "and a larger batch_size")
        if self.eval_tasks and self.thoughts_from:
            raise InputError("eval_tasks answers with the model's own thoughts: leave it or "
                             "thoughts_from out")
        _ = self.task_files

    @property
    def task_files(self) -> dict[str, str | None]:
        """{task of eval_tasks: its file, or none for the Hub's}."""
        files = {}
        for word in self.eval_tasks.split(",") if self.eval_tasks else ():
            name, given, file = word.partition("=")
            if name not in TASKS or name in files or (given and not file):
                raise InputError(f"--eval_tasks: {word!r} is none of {', '.join(TASKS)}, each at "
                                 "most once, or NAME=FILE")
            files[name] = file or None
        return files


# what a resumed run may change without --force: nothing that is learned depends on it
HARMLESS = {"max_base_rise", "log_every", "eval_every", "eval_tasks", "eval_limit", "save_every",
            "keep", "save_dtype", "push", "push_every", "wandb"}


def changes(before: TrainConfig, now: TrainConfig) -> tuple[list[str], list[str]]:
    """What a resumed run does otherwise, in words: (the harmless, what needs --force)."""
    harmless = HARMLESS | (
        {"max_steps"} if now.schedule == before.schedule == "constant" else set())
    told: tuple[list[str], list[str]] = ([], [])
    for name in TrainConfig.__dataclass_fields__:
        old, new = getattr(before, name), getattr(now, name)
        if old != new and name not in ("out_dir", "resume", "force"):
            told[name not in harmless].append(f"{name} {old} -> {new}")
    return told


@dataclass(frozen=True)
class Preset:
    config: TrainConfig
    hardware: str
    memory: str  # of an update at its highest, by nanoqstar/plan.py (tests/test_plan.py)
    purpose: str


FOLD_RECIPE = TrainConfig(  # what suits a small model that learns fast, on the embedded corpus
    n_ahead_talk=2, start_init_text="(", end_init_text=")", embedding_lr_factor=10.0,
    policy_weight=10.0, reinforce_temperature=1.0, clamp_advantage=False, beta2=0.99,
    eval_windows=192)
TINY = replace(FOLD_RECIPE, max_length=62, learning_rate=1e-3, warmup_steps=10, schedule="cosine",
               eval_every=40, eval_windows=144, save_every=40)
H200 = TrainConfig(data="data/fineweb-edu", n_passes=4, checkpointing=1.0)
LORA = replace(H200, lora_rank=16, learning_rate=1e-4, n_passes=2)  # the official runs' 1e-4
PRESETS = {
    "tiny": Preset(replace(
        TINY, delimiters="reread", n_ahead=6, n_ahead_talk=1, batch_size=32, max_steps=200,
        warmup_steps=40, embedding_lr_factor=30.0, policy_weight=20.0),
        "2 CPU cores", "484.5 MB", "the embedded demo: thoughts become useful in two minutes"),
    "tiny_learned": Preset(replace(
        TINY, n_ahead=6, max_steps=110, batch_size=16),
        "2 CPU cores", "287.6 MB", "the same with the paper's delimiters, begun at ( and )"),
    "small": Preset(replace(
        FOLD_RECIPE, max_length=126, max_steps=400, batch_size=32, learning_rate=3e-4,
        eval_every=50, save_every=50, hidden_size=512, intermediate_size=1536, n_layers=8,
        n_heads=8, init_std=0.03, pretrain_steps=3000, pretrain_batch_size=64,
        pretrain_learning_rate=1e-3, fold_operands=6, fold_operations=3, fold_ordinary_frac=0.1,
        fold_worked_frac=0.3, fold_tokens=20_000_000),
        "1 GPU (not yet run)", "8.9 GB",
        "the demo scaled up: three operations, six operands, prose"),
    "text": Preset(TrainConfig(
        data="data/text", max_length=128, reinforce_temperature=1.0, policy_weight=10.0,
        embedding_lr_factor=10.0, max_steps=300, batch_size=8, learning_rate=2e-4, beta2=0.99,
        eval_every=100, eval_windows=64, save_every=100, hidden_size=256, intermediate_size=688,
        n_layers=4, n_heads=8, n_kv_heads=2, init_std=0.04, embedding_std=0.04, pretrain_steps=2000,
        pretrain_learning_rate=1e-3),
        "1 GPU, or patience", "993.3 MB",
        "your own text (--data FOLDER) with a new small model"),
    "qwen2_5_0_5b": Preset(replace(H200, model_path="Qwen/Qwen2.5-0.5B"), "1 GPU, 24 GB", "16.7 GB",
                           "the real thing at its smallest"),
    "qwen2_5_0_5b_12gb": Preset(replace(LORA, model_path="Qwen/Qwen2.5-0.5B"), "1 GPU, 12 GB",
                                "8.1 GB", "its adapters, on a small card"),
    "qwen2_5_3b": Preset(replace(H200, model_path="Qwen/Qwen2.5-3B"), "1 GPU, 80 GB", "60.5 GB",
                         "the main run, FineWeb-Edu"),
    "qwen2_5_3b_24gb": Preset(replace(LORA, model_path="Qwen/Qwen2.5-3B"), "1 GPU, 24 GB",
                              "19.3 GB", "adapters of the main run's model"),
    "qwen2_5_3b_math": Preset(
        replace(H200, model_path="Qwen/Qwen2.5-3B", data="data/open-web-math"), "1 GPU, 80 GB",
        "60.5 GB", "the main run on open-web-math, as in the paper"),
    "qwen2_5_7b": Preset(replace(H200, model_path="Qwen/Qwen2.5-7B", grad_accum=8), "2 to 8 H200",
                         "155.1 GB", "by torchrun: larger than one GPU holds in fp32 masters"),
    "qwen2_5_7b_48gb": Preset(replace(LORA, model_path="Qwen/Qwen2.5-7B"), "1 GPU, 48 GB",
                              "32.4 GB", "its adapters, which one GPU holds"),
    "mistral_7b_paper": Preset(replace(
        H200, model_path="mistralai/Mistral-7B-v0.1", data="data/open-web-math-mistral", n_ahead=11,
        n_passes=2, max_length=252, grad_accum=8, max_steps=100, save_every=25),
        "1 GPU, 141 GB", "122.9 GB",
        "the official run: 256 tokens, 8 texts an update, official 12/4"),
    "mistral_7b_24gb": Preset(replace(
        LORA, model_path="mistralai/Mistral-7B-v0.1", data="data/open-web-math-mistral", n_ahead=3,
        n_ahead_talk=2, max_length=254, grad_accum=8, save_every=25),
        "1 GPU, 24 GB", "17.8 GB", "the official run with LoRA: 256 tokens, official 4/2"),
}


def load_config(name: str) -> tuple[str, TrainConfig]:
    """A preset's name or the path of a saved config.json -> (name for the run, its settings)."""
    from nanoqstar.files import read_json

    if name in PRESETS:
        return name, PRESETS[name].config
    path = Path(name)
    if not path.is_file():
        raise InputError(f"no config {name!r}{nearest(name, PRESETS)}; there are "
                         f"{', '.join(PRESETS)}, and any saved config.json")
    return path.resolve().parent.name, restored(read_json(path), path)


def restored(saved: dict[str, Any], path: Path) -> TrainConfig:
    """Settings as `path` has them. Raises InputError."""
    known = TrainConfig.__dataclass_fields__
    for key in saved:
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    return TrainConfig(**saved)


def run_of(resume: str) -> Path:
    """The folder of the run that `resume` names, or one of whose states it names."""
    folder = Path(resume).parents[1] if Path(resume).parent.name == "state" else Path(resume)
    if not (folder / "config.json").is_file():
        raise InputError(f"there is no run in {folder} to resume (no config.json)")
    if not (folder / "state").is_dir():  # a model's folder has a config.json, too
        raise InputError(f"{folder} holds no state to go on from: name the folder of a run that "
                         "has saved one")
    return folder


def list_presets() -> str:
    rows = [("config", "hardware", "memory by plan", "purpose"),
            *((name, p.hardware, p.memory, p.purpose) for name, p in PRESETS.items())]
    return "\n".join([*("{:19}{:24}{:16}{}".format(*row) for row in rows), "",
                      "Memory: of an update at its highest, on a GPU by arithmetic alone; "
                      "`python train.py CONFIG --plan` says what of."])


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    prompt: str | None = setting(
        None, "text to continue, taken as it is; none: ask for prompts, one after the other",
        when=When("one prompt (prompts none)", lambda c: c.prompts is None))
    prompts: str | None = setting(
        None, "file of prompts: .txt, one a line, blank lines left out; .jsonl, a `prompt` in each "
        "object", at_least=1)
    out: str | None = setting(
        None, "the .jsonl to write: a row a prompt, in their order; rows that are there already "
        "are not computed again", at_least=1, when=FILE)
    batch_size: int = setting(8, "prompts that are written on at once; changes no text but by "
                              "rounding", at_least=1, when=FILE)
    n_samples: int = setting(
        1, "continuations of the prompt, written at once and shown one after the other", at_least=1,
        at_most=10_000, when=When("single prompts, not a file or a conversation", lambda c: (
            c.prompts is None and (c.prompt is not None or not c.chat))))
    chat: bool = setting(False, "prompts are messages to an instruct model (ChatML, as Qwen has "
                         "it); asked for one after the other, they are one conversation")
    system: str | None = setting(
        "You are a helpful assistant.", "what a conversation begins with; none: nothing",
        at_least=1, when=When("chat", lambda c: c.chat))
    model_path: str | None = setting(None, "a run's folder, a checkpoint, a model folder or a Hub "
                                     "id; none: the newest run in out/", at_least=1)
    tokenizer: str | None = setting(
        None, "folder or Hub id of the tokenizer; none: the model's own", at_least=1)
    max_new_tokens: int = setting(100, "tokens to write", at_least=1)
    stop: tuple[str, ...] = setting((), "end before this text, which is not shown; \\n is a "
                                    "newline", escapes=True)
    temperature: float = setting(1.0, "of the text; 0: always the likeliest token", at_least=0,
                                 at_most=1000)
    top_k: int | None = setting(None, "draw from the k likeliest tokens only", at_least=1)
    top_p: float | None = setting(None, "draw from the fewest tokens whose probabilities reach p",
                                  above=0, at_most=1)
    seed: int = setting(0, "of thoughts and text", at_least=0, below=2**63)
    n_ahead: int | None = setting(
        None, "tokens of a thought, start and end included; none: as trained", at_least=3,
        when=THINKING)
    thought_temperature: float | None = setting(
        None, "of the thoughts; 0: always the likeliest; none: as trained", at_least=0,
        at_most=1000, when=THINKING)
    no_thoughts: bool = setting(False, "the base model alone")
    show_thoughts: bool = setting(False, "print each token's thought before it, or add them to the "
                                  "rows", when=THINKING)
    compile: bool = setting(False, "on a GPU: compile first, for a minute or more the first time, "
                            "then write faster")
    device: Device = setting("auto", AUTO)

    def __post_init__(self) -> None:
        check(self)
        if self.prompts and Path(self.prompts).suffix.lower() not in (".txt", ".jsonl"):
            raise InputError("--prompts: name a .txt (one a line) or a .jsonl")
        if self.prompts and Path(self.out or "").suffix.lower() != ".jsonl":
            raise InputError("--prompts needs an --out FILE.jsonl to write to")
        if 0 < (self.thought_temperature or 0) < 1e-3:
            raise InputError("--thought_temperature: must be 0 (the likeliest) or at least 0.001")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    run: str = setting(MISSING, "a run's folder, a checkpoint, a model folder or a Hub id",
                       at_least=1)
    folder: str = setting(MISSING, "what to make; nothing may be in it", at_least=1)
    tokenizer: str | None = setting(
        None, "folder or Hub id of the tokenizer; none: the model's own", at_least=1)
    save_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "of the weights; fp32: as they were trained; bf16: half as large, but rounding "
        "undoes updates smaller than its steps")
    push: str | None = setting(None, "OWNER/NAME of a model on the Hub to upload it to as well, "
                               "made private if it is not there", at_least=1)

    def __post_init__(self) -> None:
        check(self)


COT = When("gsm8k with --cot", lambda c: c.task == "gsm8k" and c.cot)
TEXT = When("the task text", lambda c: c.task == "text")
QUESTIONS = When("gsm8k and commonsense_qa", lambda c: c.task in TASKS)
ONE_PASS = When("gsm8k and commonsense_qa, without --cot", lambda c: c.task in TASKS and not c.cot)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    task: Literal["gsm8k", "commonsense_qa", "text"] = setting(
        MISSING, "questions of the paper's two tasks, or text")
    model_path: str = setting(MISSING, "a run's folder, a checkpoint, a model folder or a Hub id",
                              at_least=1)
    tokenizer: str | None = setting(
        None, "folder or Hub id of the tokenizer; none: the model's own", at_least=1)
    input: str | None = setting(
        None, "questions: a .parquet or .jsonl (also .gz) of the published schema; none: the "
        "published file, from the Hub. text: a folder made by data/prepare.py, of which val is "
        "read, or a text file", at_least=1)
    limit: int | None = setting(None, "the first so many questions; none: all", at_least=1,
                                when=QUESTIONS)
    n_ahead: int | None = setting(
        None, "tokens of a thought, start and end included; none: as trained", at_least=3)
    samples: int = setting(3, "times that every answer is thought about anew: their spread is the "
                           "noise of one sampled thought a position", at_least=1, at_most=1000,
                           when=ONE_PASS)
    seed: int = setting(0, "of thoughts, and of sampled text", at_least=0, below=2**63)
    batch_size: int = setting(16, "texts of a forward", at_least=1)
    json: str | None = setting(None, "a file for the same figures, for programs", at_least=1)
    device: Device = setting("auto", AUTO)

    # ---- gsm8k
    cot: bool = setting(False, "sampled chains of thought and the majority of their answers, as in "
                        "the paper", when=When("gsm8k", lambda c: c.task == "gsm8k"))
    votes: int = setting(8, "chains for a question", at_least=1, at_most=1000, when=COT)
    official_items: bool = setting(False, "the 128 questions of the paper's figure", when=COT)
    answers: str | None = setting(
        None, "a .jsonl to which answers are added as they come, and from which they are taken "
        "where they are there; none: one in out/answers, named after model and settings",
        at_least=1, when=COT)

    # ---- text
    windows: int = setting(64, "windows of text that are scored", at_least=1, at_most=10**6,
                           when=TEXT)
    max_length: int | None = setting(None, "positions of a window that think; none: as trained, or "
                                     "256", at_least=1, when=TEXT)
    sweep: str | None = setting(
        None, "the same at other lengths of thought, n_ahead=4,6,8,12, or of what is predicted "
        "after it, n_ahead_talk=1,2,4", at_least=1, when=TEXT)
    plot: str | None = setting(None, "an .svg of the gain by decile", at_least=1, when=TEXT)

    def __post_init__(self) -> None:
        check(self)
        _ = self.swept
        for name, file, ending in (("json", self.json, ".json"), ("plot", self.plot, ".svg")):
            if file is not None and Path(file).suffix.lower() != ending:
                raise InputError(f"--{name}: name a file that ends in {ending}, not {file}")
        if self.task == "text" and self.input is None:
            raise InputError("text needs --input: a folder made by data/prepare.py, or a text file")

    @property
    def swept(self) -> list[dict[str, int]]:
        """The settings to compare, each what differs from those that the model was trained with."""
        if self.sweep is None:
            return [{} if self.n_ahead is None else {"n_ahead": self.n_ahead}]
        name, _, listed = self.sweep.partition("=")
        values = [int(x) if x.isdecimal() and len(x) < 5 else 0 for x in listed.split(",")]
        least = {"n_ahead": 3, "n_ahead_talk": 1}.get(name, 10**5)
        if min(values) < least or (name == "n_ahead" and self.n_ahead is not None):
            raise InputError(f"--sweep: {self.sweep!r} is neither n_ahead=.. (3 or more each; then "
                             "without --n_ahead) nor n_ahead_talk=.. (1 or more)")
        given = {} if self.n_ahead is None else {"n_ahead": self.n_ahead}
        return [given | {name: x} for x in values]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    run: str = setting(MISSING, "a run's folder, finished or not", at_least=1)
    out: str | None = setting(None, "the page to write; none: report.html in the run's folder",
                              at_least=1)
    tokens: int = setting(1000, "held-out tokens whose thoughts are shown, a kilobyte or two each",
                          at_least=1, at_most=100_000)
    seed: int | None = setting(None, "of the thoughts; none: the run's, as in its evaluations",
                               at_least=0, below=2**63)
    device: Device = setting("auto", AUTO)

    def __post_init__(self) -> None:
        check(self)
        if self.out is not None and not self.out.endswith(".html"):  # no file of the run
            raise InputError(f"--out: {self.out!r} is no name of a page: end it in .html")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    input: str | None = setting(None, "a .txt, .jsonl, .parquet (also .gz) or other text file, or "
                                "a folder of them; none: a Hugging Face dataset", at_least=1)
    dataset_name: str = setting("HuggingFaceFW/fineweb-edu", "its id", when=DATASET, at_least=1)
    dataset_subset: str | None = setting(None, "its config or folder; none: sample-10BT of "
                                         "FineWeb-Edu, else default", when=DATASET, at_least=1)
    text_field: str = setting("text", "column or key of the text", at_least=1)
    min_score: int = setting(3, "least int_score of a document, where the data has one")
    max_tokens: int | None = setting(200_000_000, "stop after the document that reaches this many; "
                                     "none: take all", at_least=1)
    val_fraction: float = setting(0.01, "share of documents held out, chosen by their hash",
                                  above=0, below=1)
    strict: bool = setting(False, "refuse a file with bytes that are no UTF-8 or lines that are no "
                           "JSON, instead of leaving those out; a bad thought, too")
    thoughts: str | None = setting(
        None, "a .jsonl (also .gz) of thoughts for train.py --warm_steps; a line has a `document` "
        "(its whole text), a `position` in it (characters before the thought) and a `thought`",
        at_least=1)
    tokenizer: str = setting("Qwen/Qwen2.5-3B", "folder or Hub id with a tokenizer.json, or "
                             "train:N for a new byte-level BPE of N entries, trained on the text",
                             at_least=1)
    out: str | None = setting(
        None, "folder to make; none: named after the input or dataset, in data/", at_least=1)

    def __post_init__(self) -> None:
        check(self)
        name, _, count = self.tokenizer.partition(":")
        if name == "train" and not (count.isdecimal() and 257 <= int(count[:10]) <= 1_000_000):
            raise InputError("--tokenizer train:N needs an N from 257 (256 bytes and the "
                             "end-of-text token) to 1,000,000")
