"""Folders in and out: what is read is checked, what is wrong is named, what is saved is read by us
and by transformers, and no interruption loses it."""

import errno
import http.server
import json
import os
import re
import shutil
import socket
import string
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from nanoqstar import InputError, hf, hub
from nanoqstar.attention import dense
from nanoqstar.hf import Settings, Thinking, check_context, load_thinker, resolve, save
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.tokenizer import load_tokenizer
from nanoqstar.weights import read_config

CONFIG = Qwen2Config(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
MISTRAL = replace(UNTIED, attention_bias=False, sliding_window=32, rope_theta=1e4,
                  rms_norm_eps=1e-5)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, UNTIED, MISTRAL],
                                  ids=["tied", "untied", "mistral"])
IDS = torch.arange(24).view(2, 12) * 7 % 50
THINKING = Thinking(8, 3, 0.7)


def random_model(config=CONFIG, seed=0):
    model = QuietStar(Qwen2(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def words(*special, n=42):
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(n)}, unk_token="t0"))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


TOKENIZER = words("<|endoftext|>", "<|startthought|>", "<|endthought|>")  # 42, 43, 44


def store(folder, model, tokenizer=TOKENIZER, thinking=THINKING, step=3, config=None, source=None):
    save(folder, model, tokenizer, thinking=thinking, step=step, config=config or {"seed": 1},
         source=source)
    return folder


@pytest.fixture
def folder(tmp_path):
    return store(tmp_path / "model", random_model())


def edit(file, **changes):
    """Changes keys of a JSON file, config.json of a folder; ... deletes one."""
    file = file / "config.json" if file.is_dir() else file
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return file.parent


def logits(lm):
    with torch.no_grad():
        return lm.logits(lm(IDS, torch.arange(IDS.shape[1]), dense(None)))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- round trips


@CONFIGS
def test_save_then_load(config, tmp_path):
    model = random_model(config)
    store(tmp_path / "a", model)
    again, tokenizer, settings = load_thinker(str(tmp_path / "a"))
    assert settings == Settings(THINKING, tmp_path / "a", (42,), 3, {"seed": 1})
    assert again.lm.config == config
    assert same(model, again)
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())
    assert torch.equal(logits(again.lm), logits(model.lm))
    assert again.thought_temperature == 0.7
    assert tokenizer.to_str() == TOKENIZER.to_str()
    assert again.banned.nonzero()[:, 0].tolist() == [43, 44, 45, 46, 47, 48, 49]
    info = json.loads((tmp_path / "a" / "nanoqstar.json").read_text())
    assert info == {"step": 3, "config": {"seed": 1}}
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert ("lm_head.weight" in stored) != config.tie_word_embeddings


def test_dtypes_of_a_loaded_model(folder):
    model = load_thinker(folder, dtype=torch.bfloat16)[0]
    assert {p.dtype for p in model.lm.parameters()} == {torch.bfloat16}
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith("lm.")} == {
        torch.float32}
    assert {p.dtype for p in load_thinker(folder, dtype=torch.float64)[0].parameters()} == {
        torch.float64}
    assert model.banned.dtype == torch.bool


def test_a_model_without_thoughts(tmp_path):
    model = random_model()
    store(tmp_path / "a", model, thinking=None)
    assert not (tmp_path / "a" / "quietstar.safetensors").exists()
    again, _, settings = load_thinker(tmp_path / "a")
    assert same(again.lm, model.lm)
    assert settings.thinking.n_ahead == 0
    assert again.start_embedding.shape == (16,)  # to be initialised


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    load_thinker(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_weight_files_are_readable_for_whom_other_files_are(tmp_path):
    mask = os.umask(0o027)
    try:
        store(tmp_path / "a", random_model())
    finally:
        os.umask(mask)
    assert {x.stat().st_mode & 0o777 for x in (tmp_path / "a").iterdir()} == {0o640}


# ---- a thought's settings


def test_thinking_is_metadata_of_the_thoughts(folder):
    with safe_open(folder / "quietstar.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "n_ahead": "8", "n_ahead_talk": "3",
                                "thought_temperature": "0.7", "delimiters": "learned"}
    edit(folder / "nanoqstar.json", config={"n_ahead": 0, "n_ahead_talk": 9})  # a continued run's
    assert load_thinker(folder)[2].thinking == THINKING


@pytest.mark.parametrize(("config", "expected"), [
    ({"n_ahead": 12, "n_ahead_talk": 5, "thought_temperature": 0.5}, Thinking(12, 5, 0.5)),
    ({"n_ahead": 0}, Thinking(7, 4, 1.0)), (None, Thinking(7, 4, 1.0)),
])
def test_thinking_of_older_folders(folder, config, expected):
    own = folder / "quietstar.safetensors"
    save_file(load_file(own), own, {"format": "pt"})
    edit(folder / "nanoqstar.json", config=config)
    model, _, settings = load_thinker(folder)
    assert settings.thinking == expected
    assert model.thought_temperature == expected.thought_temperature


@pytest.mark.parametrize("metadata", [
    {"n_ahead": "many"}, {"n_ahead": "2"}, {"n_ahead_talk": "-1"}, {"thought_temperature": "nan"},
    {"thought_temperature": "-1.0"}, {"thought_temperature": "inf"}, {"n_ahead": "8.5"},
    {"n_ahead": str(10**30)}, {"n_ahead": "9" * 5000}, {"n_ahead_talk": str(2**17)},
    {"n_ahead": "0"}, {"thought_temperature": "1e-320"}, {"delimiters": "(" * 999}])
def test_damaged_thinking(folder, metadata):
    own = folder / "quietstar.safetensors"
    save_file(load_file(own), own, {"format": "pt", **metadata})
    message = rf"quietstar.safetensors is damaged: {min(metadata)} must be .* not "
    with pytest.raises(InputError, match=message) as error:
        load_thinker(folder)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("config", [
    {"n_ahead": False}, {"n_ahead": ""}, {"n_ahead": []}, {"n_ahead": 8.5}, {"n_ahead": 2**17},
    {"n_ahead_talk": True}, {"n_ahead_talk": 0}, {"thought_temperature": 0},
    {"thought_temperature": True}])
def test_damaged_thinking_of_older_folders(folder, config):
    own = folder / "quietstar.safetensors"
    save_file(load_file(own), own, {"format": "pt"})
    edit(folder / "nanoqstar.json", config=config)
    with pytest.raises(InputError, match=f"is damaged: {min(config)} must be from"):
        load_thinker(folder)


def test_delimiters_that_reread_are_loaded_as_such(folder):
    own = folder / "quietstar.safetensors"
    assert not load_thinker(folder)[0].reread
    save_file(load_file(own), own, {"format": "pt", "delimiters": "reread"})
    model, _, settings = load_thinker(folder)
    assert model.reread and settings.thinking.delimiters == "reread"


def test_thoughts_that_got_lost(folder):
    """Not a pre-trained base, which has had no update with thoughts."""
    (folder / "quietstar.safetensors").unlink()
    edit(folder / "nanoqstar.json", config={"n_ahead": 8}, step=0)
    assert load_thinker(folder)[2].thinking.n_ahead == 0
    edit(folder / "nanoqstar.json", config={"n_ahead": 0}, step=3)
    assert load_thinker(folder)[2].thinking.n_ahead == 0
    edit(folder / "nanoqstar.json", config={"n_ahead": 8}, step=3)
    with pytest.raises(InputError, match=r"quietstar\.safetensors is missing, although .*taught"):
        load_thinker(folder)


@pytest.mark.parametrize("content", [
    "{", "[]", "\xff", '{"step": "3"}', '{"step": -1}', '{"step": 9999999999}',
    '{"step": true}', '{"config": [1]}', '{"config": []}', '{"config": ""}', '{"config": 0}',
    '{"config": {"n_ahead": [8]}}', '{"config": {"n_ahead": 1e999}}',
    '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}"])
def test_damaged_information(folder, content):
    own = folder / "quietstar.safetensors"
    save_file(load_file(own), own, {"format": "pt"})
    (folder / "nanoqstar.json").write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=r"nanoqstar\.json|quietstar\.safetensors") as error:
        load_thinker(folder)
    assert len(str(error.value)) < 500


# ---- replacing a folder, and what may happen meanwhile


def test_replacing_a_folder(folder):
    (folder.parent / "model.partial" / "nanoqstar.new").mkdir(parents=True)
    (folder.parent / "model.partial" / "nanoqstar.new" / "rubbish").touch()
    (folder / "chat_template.jinja").touch()
    store(folder, random_model(seed=1), step=4)
    model, _, settings = load_thinker(folder)
    assert same(model, random_model(seed=1))
    assert settings.step == 4
    assert not (folder / "chat_template.jinja").exists()
    assert [x.name for x in folder.parent.iterdir()] == ["model"]


def test_what_others_have_put_there_stays(folder, tmp_path, monkeypatch):
    others = [tmp_path / "model.old" / "a", tmp_path / "model.partial" / "a", folder / "notes.txt",
              folder / "logs" / "a"]
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.write_text(str(file))
    for seed in (1, 2):
        store(folder, random_model(seed=seed))
        assert same(load_thinker(folder)[0], random_model(seed=seed))
    monkeypatch.setattr(hf, "retire", lambda old, folder: None)  # killed before it could tidy up
    store(folder, random_model(seed=3))
    monkeypatch.undo()
    assert not (folder / "notes.txt").exists()
    store(folder, random_model(seed=4))
    assert [file.read_text() for file in others] == [str(file) for file in others]
    assert {x.name for x in tmp_path.iterdir()} == {"model", "model.old", "model.partial"}
    assert [x.name for x in (tmp_path / "model.partial").iterdir()] == ["a"]


def test_two_processes_that_save(folder, monkeypatch):
    """At any moment of the first one's save the second is refused, and harms nothing."""
    pytest.importorskip("fcntl")
    refused = []

    def interfere(function):
        def call(*args, **options):
            with pytest.raises(InputError, match="another process is writing"):
                save(folder, random_model(seed=2), TOKENIZER, thinking=None, step=9, config={},
                     source=None)
            refused.append(function.__name__)
            return function(*args, **options)
        return call
    with monkeypatch.context() as patch:
        for name in ("write", "save_file", "sync", "retire"):
            patch.setattr(hf, name, interfere(getattr(hf, name)))
        patch.setattr(Path, "rename", interfere(Path.rename))
        store(folder, random_model(seed=1), step=4)
    assert set(refused) == {"write", "save_file", "sync", "retire", "rename"}
    model, _, settings = load_thinker(folder)
    assert same(model, random_model(seed=1))
    assert settings.step == 4
    assert [x.name for x in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("when", ["read_info", "load_tokenizer", "check", "copy"])
@pytest.mark.parametrize("n_saves", [1, 2, 99])
def test_a_save_while_loading(folder, monkeypatch, when, n_saves):
    """What is loaded is of one save; a folder that is replaced for ever is given up."""
    real, saves = getattr(hf, when), []

    def meanwhile(*args):
        if len(saves) < n_saves:
            saves.append(store(folder, random_model(seed=len(saves) + 1), step=len(saves) + 4))
        return real(*args)
    monkeypatch.setattr(hf, when, meanwhile)
    if n_saves == 99:
        with pytest.raises(InputError, match="model is being replaced again and again"):
            load_thinker(folder)
    else:
        model, _, settings = load_thinker(folder)
        assert settings.step == n_saves + 3
        assert same(model, random_model(seed=n_saves))


def test_loading_while_a_folder_is_being_renamed(folder, monkeypatch):
    """Between the two renames of a save the earlier one is read; if it vanishes, the new one."""
    aside, real = folder.parent / "model.partial" / "nanoqstar.old", hf.read_config
    new = store(folder.parent / "new", random_model(seed=1), step=4)
    aside.parent.mkdir()
    folder.rename(aside)

    def meanwhile(path):
        if path == aside:
            new.rename(folder)
            shutil.rmtree(aside)
        return real(path)
    monkeypatch.setattr(hf, "read_config", meanwhile)
    assert load_thinker(folder)[2].step == 4


class Killed(BaseException):
    """Nothing runs after it: every further call to the file system raises it again."""


class Saboteur:
    """Counts calls to the file system while `on`; the one numbered `fatal` fails."""

    def __init__(self):
        self.on, self.calls, self.fatal, self.kill = False, 0, None, True
        sys.addaudithook(self.audit)  # for good, so there is one of them

    def audit(self, event, args):
        if event.startswith(("os.", "shutil.", "open")):
            self.call()

    def call(self):
        if self.on:
            self.calls += 1
            if self.calls == self.fatal and not self.kill:
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.fatal and self.calls >= self.fatal and self.kill:
                raise Killed

    def during(self, action, fatal=None, kill=True):
        """What `action` raised (None), and the number of calls it made."""
        self.on, self.calls, self.fatal, self.kill = True, 0, fatal, kill
        try:
            action()
        except (Killed, OSError) as error:
            return error, self.calls
        finally:
            self.on = False
        return None, self.calls


SABOTEUR = Saboteur()


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "failing"])
def test_interrupted_anywhere(folder, tmp_path, monkeypatch, kill):
    """After a kill, or a failure, of any call: one whole model, and the next save cleans up."""
    def save_in_steps(tensors, file, metadata):  # the library's own calls are not seen
        SABOTEUR.call()
        Path(file).write_bytes(b"half")
        SABOTEUR.call()
        save_file(tensors, file, metadata)
        SABOTEUR.call()
    monkeypatch.setattr(hf, "save_file", save_in_steps)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # it costs time only
    models = {3: random_model(), 4: random_model(seed=1), 5: random_model(seed=2)}

    def scenario(fatal=None):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        path = shutil.copytree(folder, tmp_path / "x" / "model")
        return path, *SABOTEUR.during(lambda: store(path, models[4], step=4), fatal, kill)

    path, error, n_calls = scenario()
    assert error is None
    assert n_calls > 30
    found = []
    for fatal in range(1, n_calls + 1):
        path, error, _ = scenario(fatal)
        step = load_thinker(path)[2].step
        assert error or (not kill and step == 4)  # where tidying up fails, the next save does it
        assert same(load_thinker(path)[0], models[step]), fatal
        if error:
            found.append(((path / "nanoqstar.json").exists(), step))
        if not kill and error:  # it tidies up after itself
            assert found[-1][0], fatal
            assert not [*path.parent.glob("model.partial/nanoqstar.new")], fatal
        store(path, models[5], step=5)
        assert same(load_thinker(path)[0], models[5])
        assert [x.name for x in path.parent.iterdir()] == ["model"], fatal
    assert [step for _, step in found] == sorted(step for _, step in found)  # old, then new
    assert {step for _, step in found} == {3, 4}
    assert ((False, 3) in found) == kill  # between the renames


def test_files_are_on_the_disk_before_a_rename(folder, monkeypatch):
    done, sync, rename = [], hf.sync, Path.rename
    monkeypatch.setattr(hf, "sync", lambda path: (done.append(Path(path).name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append("rename"), rename(self, to)))
    store(folder, random_model())
    before = done[:done.index("rename")]
    assert {x.name for x in folder.iterdir()} | {"nanoqstar.new"} == set(before)
    assert before[-1] == "nanoqstar.new"
    assert done[-1] == folder.parent.name


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("I/O error: No space left on device (os error 28)")])
def test_full_disk(folder, monkeypatch, error):
    def fail(*_):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", fail)
        with pytest.raises(OSError, match="No space left on device"):
            store(folder, random_model(seed=1))
    assert same(load_thinker(folder)[0], random_model())
    assert [x.name for x in folder.parent.iterdir()] == ["model"]


def test_checkpoint_put_aside_is_found_through_its_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="has saved nothing yet"):
        resolve(tmp_path / "run")
    store(tmp_path / "run" / "checkpoint", random_model())
    aside = tmp_path / "run" / "checkpoint.partial" / "nanoqstar.old"
    aside.parent.mkdir()
    (tmp_path / "run" / "checkpoint").rename(aside)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        assert resolve(path) == aside
        assert load_thinker(path)[2].step == 3


def test_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(InputError, match="was not saved by nanoqstar"):
            store(target, random_model())
    assert (tmp_path / "thesis.tex").exists()


# ---- transformers


@CONFIGS
def test_saved_folder_loads_in_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(config)
    store(tmp_path / "a", model)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", output_loading_info=True)
    assert not any(report.values()), report
    kind = "Qwen2" if config.attention_bias else "Mistral"
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    assert theirs.dtype == torch.float32
    assert theirs.config.sliding_window == config.sliding_window
    for where in (theirs.config, theirs.generation_config):  # Mistral's defaults are 1 and 2
        assert (where.bos_token_id, where.eos_token_id) == (None, 42)
    auto = transformers.AutoTokenizer  # for Qwen2 it builds its own from the vocabulary
    fast = transformers.PreTrainedTokenizerFast if kind == "Qwen2" else auto
    tokenizer = fast.from_pretrained(tmp_path / "a")
    assert tokenizer("t5").input_ids == [5]
    assert tokenizer.eos_token == "<|endoftext|>"
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert (logits(model.lm) - expected).abs().max() / expected.abs().max() < 1e-5


def make_instruct(folder):
    """A folder like Qwen's instruct models', as transformers has it."""
    letters = string.ascii_letters[:32] + string.digits
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # 42, 43, 44
    store(folder, random_model(), tokenizer, thinking=None)
    (folder / "nanoqstar.json").unlink()
    edit(folder, bos_token_id=42, eos_token_id=44)
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [44, 42], "pad_token_id": 42, "do_sample": True, "temperature": 0.7}))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}7")
    return folder


def test_a_sources_files_go_along_and_generate_stops(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer, settings = load_thinker(make_instruct(tmp_path / "source"))
    assert settings == Settings(Thinking(), tmp_path / "source", (44, 42), 0, {})
    store(tmp_path / "a", model, tokenizer, None, source=settings.folder)
    store(tmp_path / "b", model, tokenizer, None, source=tmp_path / "a")  # continued
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert load_thinker(folder)[2].end_ids == (44, 42)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        message = [{"role": "user", "content": "b5"}]
        assert theirs.apply_chat_template(message, tokenize=False) == "b57"
        assert theirs.eos_token == "<|im_end|>"
        assert theirs("b57").input_ids == [1, 37, 39]
        lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert lm.config.eos_token_id == [44, 42]
        assert lm.config.bos_token_id == 42
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert generation.eos_token_id == [44, 42]
        assert generation.temperature == 0.7
        torch.manual_seed(0)
        out = lm.generate(IDS[:1], max_new_tokens=1000, temperature=5.0, top_k=0)[0].tolist()
        assert out[-1] in (42, 44)
        assert len(out) < 1000


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|im_end|>", "</s>"])
def test_end_ids_by_the_tokenizer(tmp_path, special):
    store(tmp_path / "a", random_model(), words(special))
    edit(tmp_path / "a", eos_token_id=None)
    (tmp_path / "a" / "generation_config.json").unlink()
    assert load_thinker(tmp_path / "a")[2].end_ids == (42,)


def test_beginning_goes_into_the_config(tmp_path):
    tokenizer = words("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 42)])
    store(tmp_path / "a", random_model(MISTRAL), tokenizer)
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "a" / name).read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (42, 43)


@pytest.mark.parametrize("value", ["2", [2, "3"], 2.0, True, {"a": 1}])
def test_wrong_end_ids(folder, value):
    with pytest.raises(InputError, match="eos_token_id must be an integer or a list of them"):
        load_thinker(edit(folder, eos_token_id=value))


def test_ids_of_no_token_end_nothing(folder, tmp_path):
    edit(folder, eos_token_id=[-1, 50, 10**30, 7], pad_token_id=-1)
    (folder / "generation_config.json").unlink()
    model, tokenizer, settings = load_thinker(folder)
    assert settings.end_ids == (7, 42)
    store(tmp_path / "a", model, tokenizer, source=folder)
    ids = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (ids["eos_token_id"], ids["pad_token_id"]) == (7, None)


def test_wrong_padding_is_said_before_a_save(folder):
    with pytest.raises(InputError, match="pad_token_id must be an integer"):
        load_thinker(edit(folder, pad_token_id="x"))


KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "rope_theta", "rope_parameters", "rope_scaling", "rms_norm_eps", "tie_word_embeddings",
        "sliding_window", "use_sliding_window", "hidden_act")


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_absent_keys_mean_what_they_mean_to_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    full = {"vocab_size": 51, "hidden_size": 128, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 6,
            "max_position_embeddings": 8192, "rope_theta": 500.0, "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True, "sliding_window": 4096, "use_sliding_window": False,
            "hidden_act": "silu", "rope_scaling": None}
    configs = [{}, full, *({k: v for k, v in full.items() if k != key} for key in KEYS),
               full | {"head_dim": None}, full | {"sliding_window": None},
               full | {"sliding_window": 10**6}, full | {"rope_parameters": None},
               full | {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}]
    configs += [full | {"num_key_value_heads": None}] * (kind == "qwen2")  # else refused there
    seen = set()
    for raw in configs:
        (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": kind}))
        ours = asdict(read_config(tmp_path))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        expected = {key: getattr(theirs, key, None) for key in ours}
        expected["rope_theta"] = theirs.rope_parameters["rope_theta"]
        expected["head_dim"] = (getattr(theirs, "head_dim", None)
                                or theirs.hidden_size // theirs.num_attention_heads)
        expected["attention_bias"] = kind == "qwen2"
        if (theirs.sliding_window or 0) >= theirs.max_position_embeddings:
            expected["sliding_window"] = None
        assert ours == expected, raw
        seen.add(json.dumps(ours))
    assert len(seen) > 12


# ---- the official checkpoint


def write_official(folder, model, change=lambda tensors: None):
    """The published layout: everything in one set of bf16 files, delimiters / 100 with an unused
    row, and most likely no tokenizer.json."""
    store(folder, model, thinking=None)
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    tensors = dict(model.lm.state_dict())
    for name, p in model.named_parameters():
        if name.startswith("mixing_head."):
            tensors[name.replace("mixing_head.", "talk_head.0.")] = p
        elif not name.startswith("lm."):
            tensors[name] = torch.stack((p / 100, torch.full_like(p, 9.0)))
    tensors = {name: x.detach().bfloat16().contiguous() for name, x in tensors.items()}
    change(tensors)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.fixture
def tokenizer_folder(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text(TOKENIZER.to_str())
    return tmp_path / "words"


def test_official_layout(tmp_path, tokenizer_folder):
    """Nothing that exists is initialised anew, also after a save in our layout."""
    model = random_model(MISTRAL)
    tensors = write_official(tmp_path / "a", model)
    with pytest.raises(InputError, match=r"a has no tokenizer.json: .* with --tokenizer"):
        load_thinker(tmp_path / "a")
    first, tokenizer, settings = load_thinker(tmp_path / "a", tokenizer=tokenizer_folder)
    assert torch.equal(first.start_embedding, tensors["start_embedding"][0].float() * 100)
    assert torch.equal(first.end_embedding, tensors["end_embedding"][0].float() * 100)
    assert torch.equal(first.mixing_head[4].weight, tensors["talk_head.0.4.weight"].float())
    assert settings == Settings(Thinking(7, 4, 1.0), tmp_path / "a", (42,), 0, {})
    for p, q in zip(model.parameters(), first.parameters(), strict=True):
        assert (p - q).abs().max() < 0.02  # bf16
    store(tmp_path / "b", first, tokenizer, source=settings.folder)
    assert same(load_thinker(tmp_path / "b")[0], first)


def test_official_layout_incomplete(tmp_path, tokenizer_folder):
    def change(tensors):
        del tensors["talk_head.0.2.bias"]
        tensors["start_embedding"] = tensors["start_embedding"][0]
    write_official(tmp_path / "a", random_model(), change)
    with pytest.raises(InputError, match=r"talk_head.0.2.bias; .*: start_embedding \[16\] instead "
                                         r"of \[2, 16\]"):
        load_thinker(tmp_path / "a", tokenizer=tokenizer_folder)


# ---- config.json


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    ({"model_type": ...}, "model_type None"),
    ({"model_type": ["qwen2"]}, r"model_type \['qwen2'\]"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
    ({"rope_scaling": [1]}, r"rope_scaling \[1\]"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters of type 'llama3'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters .*full_att"),
    ({"use_sliding_window": True, "sliding_window": 32}, "with a sliding_window of 32"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq"),
    ({"hidden_size": "16"}, "hidden_size must be a positive integer, not '16'"),
    ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
    ({"vocab_size": 50.0}, "vocab_size must be a positive integer, not 50.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
    ({"max_position_embeddings": -1}, "max_position_embeddings must be a positive integer"),
    ({"rope_theta": float("nan")}, "rope_theta must be a positive number, not nan"),
    ({"rope_theta": 0.5}, r"rope_theta 0\.5 is not supported"),
    ({"rope_parameters": {"rope_theta": 5e-324}}, "rope_theta 5e-324 is not supported"),
    ({"rope_parameters": {"rope_theta": 50}, "rope_scaling": {"rope_theta": 70}},
     "rope_theta 70 in one place and 50 in another"),
    ({"rope_theta": None}, "rope_theta must be a positive number, not None"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"num_key_value_heads": 3}, "4 attention heads must be a multiple of 3"),
    ({"head_dim": 5}, "head_dim 5 even"),
    ({"head_dim": ..., "num_attention_heads": 32}, "head_dim must be a positive integer, not 0"),
])
def test_refused_configs(folder, changes, message):
    with pytest.raises(InputError, match=message):
        read_config(edit(folder, **changes))


@pytest.mark.parametrize(("changes", "expected"), [
    ({"head_dim": None, "num_key_value_heads": None}, {"num_key_value_heads": 4}),
    ({"rope_theta": ..., "rope_parameters": {"rope_theta": 500, "rope_type": "default"}},
     {"rope_theta": 500.0}),
    ({"rope_scaling": None, "rope_parameters": None}, {}),
    ({"use_sliding_window": False, "sliding_window": 32}, {}),
    ({"use_sliding_window": True, "sliding_window": 64}, {}),
    ({"model_type": "mistral", "sliding_window": 32},
     {"attention_bias": False, "sliding_window": 32}),
])
def test_accepted_configs(folder, changes, expected):
    assert read_config(edit(folder, **changes)) == replace(CONFIG, **expected)


def test_context_of_mistral_7b(tmp_path):
    """The published config.json of v0.1 without what transformers fills in; its window limits."""
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-05}))
    config = read_config(tmp_path)
    assert config.head_dim == 128
    assert config.num_key_value_heads == 8
    check_context(config, 4096)
    with pytest.raises(InputError, match=r"4097 positions .* context of 4096 .*sliding window"):
        check_context(config, 4097)
    with pytest.raises(InputError, match="65 positions are more than the model's context of 64: s"):
        check_context(CONFIG, 65)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 10**5, '{"a": ' + "[" * 10**5])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json(folder, name, text):
    (folder / name).write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=f"/{name} (cannot be read as|holds no) JSON") as error:
        load_thinker(folder)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("changes", [
    {"hidden_size": 10**12}, {"num_hidden_layers": 10**9}, {"vocab_size": 10**15},
    {"intermediate_size": 10**18}, {"num_attention_heads": 2 * 10**12}, {"head_dim": 2 * 10**12},
    {"hidden_size": 10**18, "vocab_size": 10**18}, {"num_hidden_layers": 10**200}])
def test_absurd_sizes(folder, changes):
    with pytest.raises(InputError, match=r"config.json asks for .* they do not belong together"):
        load_thinker(edit(folder, **changes))


# ---- weights


def change_weights(folder, change, name="model"):
    file = folder / f"{name}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_all_wrong_tensors_are_listed_at_once(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 16)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.int8)
    change_weights(folder, change)
    with pytest.raises(InputError) as error:
        load_thinker(folder)
    for part in ("1 missing: model.norm.weight", "1 unexpected: model.layers.7.mlp.up_proj.weight",
                 "1 misshapen: model.layers.0.mlp.up_proj.weight [3, 16] instead of [24, 16]",
                 "F64: model.layers.1.mlp.up_proj.weight I8"):
        assert part in str(error.value)


def test_a_long_list_of_wrong_tensors_is_cut(folder):
    with pytest.raises(InputError, match=r"24 missing: (model[\w.]+, ){10}\.\.$"):
        load_thinker(edit(folder, num_hidden_layers=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_harmless_extras(folder, dtype):
    expected = load_file(folder / "model.safetensors")

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied, yet stored
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    change_weights(folder, change)
    for name, p in load_thinker(folder)[0].lm.named_parameters():
        assert p.dtype == torch.float32, name
        assert torch.equal(p, expected[name].to(dtype).float()), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("file", "name"), [("model", "model.layers.1.mlp.up_proj.weight"),
                                            ("quietstar", "mixing_head.2.weight")])
def test_numbers_that_are_not_finite(folder, file, name, bad):
    change_weights(folder, lambda tensors: tensors[name][1].fill_(bad), file)
    with pytest.raises(InputError, match=f"{file}.safetensors: {name} .*not finite"):
        load_thinker(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(folder, size):
    for name in ("quietstar.safetensors", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size])
        with pytest.raises(InputError, match=f"{name} is damaged or cut short"):
            load_thinker(folder)


@pytest.mark.parametrize("name", ["quietstar.safetensors", "model.safetensors",
                                  "generation_config.json", "nanoqstar.json"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is not a plain file"):
        load_thinker(folder)


def test_links_in_a_loop(tmp_path):
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(InputError, match="there is no folder"):
        load_thinker(tmp_path / "a")


def test_a_companion_that_is_no_file_is_left(folder, tmp_path):
    """A run that starts from such a model would else never be saved."""
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").mkdir()
    os.mkfifo(folder / "chat_template.jinja")
    store(tmp_path / "again", load_thinker(folder)[0], source=folder)
    assert (tmp_path / "again" / "tokenizer_config.json").is_file()
    assert not (tmp_path / "again" / "chat_template.jinja").exists()


def test_own_file_incomplete(folder):
    tensors = load_file(folder / "quietstar.safetensors")
    del tensors["end_embedding"]
    save_file(tensors, folder / "quietstar.safetensors")
    with pytest.raises(InputError, match=r"quietstar.safetensors .* 1 missing: end_embedding"):
        load_thinker(folder)
    save_file({}, folder / "quietstar.safetensors")
    with pytest.raises(InputError, match="7 missing"):
        load_thinker(folder)


def test_missing_shard_and_broken_index(tmp_path, tokenizer_folder):
    write_official(tmp_path / "a", random_model())
    index = tmp_path / "a" / "model.safetensors.index.json"
    (tmp_path / "a" / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_thinker(tmp_path / "a", tokenizer=tokenizer_folder)
    for text in ("{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(InputError, match=r"index.json has no weight_map"):
            load_thinker(tmp_path / "a", tokenizer=tokenizer_folder)


def test_an_index_and_its_shards_must_agree(tmp_path, tokenizer_folder):
    folder = tmp_path / "a"
    write_official(folder, random_model())
    index, first = folder / "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    whole = json.loads(index.read_text())["weight_map"]
    again = next(n for n in whole if whole[n] != first)
    for wrong in ("not.there", again):
        index.write_text(json.dumps({"weight_map": whole | {wrong: first}}))
        with pytest.raises(InputError, match=f"do not belong together: {wrong} is not in the one"):
            load_thinker(folder, tokenizer=tokenizer_folder)
    index.write_text(json.dumps({"weight_map": whole}))
    tensors = load_file(folder / first)
    tensors[again] = load_file(folder / whole[again])[again] + 1
    save_file(tensors, folder / first)
    with pytest.raises(InputError, match=f"do not belong together: {again} is not in the one"):
        load_thinker(folder, tokenizer=tokenizer_folder)


@pytest.mark.parametrize("name", ["a\nb", "n" * 10**5])
def test_names_of_wrong_tensors_make_a_short_line(folder, name):
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(InputError, match=r"1 unexpected: (a\\nb|n{100}\.\.)$"):
        load_thinker(folder)


@pytest.mark.parametrize("name", [
    "../x.safetensors", "{}/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
    "C:x.safetensors", "..", "", "x.safetensors\n", "~/x.safetensors", "x.bin"])
def test_an_index_names_plain_files_only(folder, name):
    name = name.format(folder.parent)
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    tensors = load_file(folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(InputError, match=r"only .safetensors files beside it are read"):
        load_thinker(folder)
    (folder / "y.safetensors").symlink_to(folder.parent / "x.safetensors")  # as in the Hub's cache
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "y.safetensors")}))
    assert same(load_thinker(folder)[0], random_model())


def test_folders_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model.safetensors, nor shards"):
        load_thinker(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"but pickles \(pytorch_model.bin\), which are not read"):
        load_thinker(folder)


MEASURE = """
import sys
from nanoqstar.hf import load_thinker
def peak():
    status = open("/proc/self/status")
    return int(next(x for x in status if x.startswith("VmHWM")).split()[1]) * 1024
load_thinker(sys.argv[1])
for folder in sys.argv[2:]:
    before = peak()
    model = load_thinker(folder)[0]
    size = sum(p.nbytes for p in model.lm.parameters())
    print(size, (peak() - before) / size)
    del model
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_peak_memory_is_one_copy(folder, tmp_path):
    """Not getrusage: a child of vfork starts with its parent's maximum."""
    config = replace(UNTIED, vocab_size=16384, hidden_size=1024, intermediate_size=4096,
                     head_dim=256)
    with torch.device("meta"):
        model = QuietStar(Qwen2(config))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    store(tmp_path / "fp32", model, thinking=None)
    store(tmp_path / "bf16", model.bfloat16(), thinking=None)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, tmp_path / "fp32", tmp_path / "bf16"], check=True,
        cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, timeout=300)
    for line in done.stdout.splitlines():
        size, ratio = map(float, line.split())
        print(f"peak memory {ratio:.3f} copies")
        assert 200e6 < size < 300e6
        assert ratio < 1.35
    assert len(done.stdout.splitlines()) == 2


# ---- local paths and the Hub


@pytest.mark.parametrize(("path", "message"), [
    ("no-such-folder", "no folder 'no-such-folder', and it is no Hub id"),
    ("a/b/c", "no Hub id"), ("./x", "no Hub id"), ("/no/such", "no Hub id"),
    pytest.param(__file__, "is a file; give the folder", id="a file"),
    ("", "no folder '', and it is no Hub id"),
    ("x" * 5000, r"no folder 'x{100}\.\.', and it is no Hub id"),
])
def test_no_such_folder(path, message):
    for load in (resolve, load_tokenizer):
        with pytest.raises(InputError, match=message):
            load(path)


def test_no_name_is_not_the_folder_we_are_in(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_thinker(".")[2].step == load_thinker(Path())[2].step == 3
    for names in (("",), (".", "cpu", torch.float32, "")):
        with pytest.raises(InputError, match="there is no folder ''"):
            load_thinker(*names)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load_thinker(tmp_path)


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers like the Hub for `me/model`, whose files are `files`; other names are statuses:
    `me/403`, and `me/gated`."""

    files, sha, asked = {}, "0123456789" * 4, []

    def do_GET(self):
        self.asked.append(self.path)
        name, file = re.search(r"(?:^(?:/api/models)?/me/(\w+)(?:/resolve/\w+/(.*))?)?",
                               self.path).groups()
        if name == "gated":
            self.answer(403, code="GatedRepo")
        elif name != "model":
            self.answer(int(name or 404), code="RepoNotFound" if name == "404" else None)
        elif file:
            if file in self.files:
                self.answer(200, self.files[file])
            else:
                self.answer(404, code="EntryNotFound")
        elif "/tree/" in self.path:
            self.answer(200, json.dumps(
                [{"type": "file", "path": n, "size": len(x), "oid": f"{len(x):040x}"}
                 for n, x in self.files.items()]).encode())
        else:
            siblings = [{"rfilename": n} for n in self.files]
            self.answer(200, json.dumps(
                {"id": "me/model", "sha": self.sha, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def answer(self, status, content=b"", code=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content):040x}"')
        self.send_header("X-Repo-Commit", self.sha)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """Makes this process take a URL for the Hub's, with an empty cache."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def use(url, offline=False):
        hub.answers.cache_clear()
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    yield use
    hub.answers.cache_clear()


@pytest.fixture
def fake_hub(folder, endpoint):
    """The handler's class of a server that we now take for the Hub."""
    files = {x.name: x.read_bytes() for x in make_instruct(folder).iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"}
    handler = type("Handler", (FakeHub,), {"files": files, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint(f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def test_hub(fake_hub, endpoint, monkeypatch):
    model, tokenizer, settings = load_thinker("me/model")
    assert same(model.lm, random_model().lm)
    assert settings.end_ids == (44, 42)
    assert {x.name for x in settings.folder.iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json",
        "chat_template.jinja", "special_tokens_map.json", "generation_config.json"}
    assert not any("bin" in path or "onnx" in path for path in fake_hub.asked)
    assert load_tokenizer("me/model").to_str() == tokenizer.to_str()

    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it tries again and again"))
    endpoint("http://127.0.0.1:9")  # nobody there
    for offline in (False, True):
        endpoint("http://127.0.0.1:9", offline)
        assert same(load_thinker("me/model")[0].lm, model.lm)  # what was fetched still loads
        assert load_tokenizer("me/model").to_str() == tokenizer.to_str()
        for load in (resolve, load_tokenizer):
            with pytest.raises(InputError, match="'me/other' is not on this disk, and cannot be "
                               "fetched from the Hub: no network, or HF_HUB_OFFLINE is set: go"):
                load("me/other")


@pytest.mark.parametrize(("name", "message"), [
    ("401", r"refuses access to 'me/401' \(401\): .*HF_TOKEN or run `hf auth login`"),
    ("403", r"refuses access to 'me/403' \(403\): .*HF_TOKEN or run `hf auth login`"),
    ("gated", r"refuses access to 'me/gated' \(403\): .*accept its terms"),
    ("404", r"'me/404' is neither on this disk nor on the Hub \(404\)"),
    ("500", "cannot be fetched from the Hub: the Hub answered 500$"),
])
def test_refusals_of_the_hub(fake_hub, monkeypatch, name, message):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before it asks again
    for load in (resolve, load_tokenizer):
        with pytest.raises(InputError, match=message):
            load(f"me/{name}")


def test_a_repository_without_a_tokenizer(fake_hub):
    del fake_hub.files["tokenizer.json"]
    with pytest.raises(InputError, match=r"the Hub's 'me/model' has no tokenizer\.json"):
        load_tokenizer("me/model")
    with pytest.raises(InputError, match=r"has no tokenizer\.json: .*--tokenizer"):
        load_thinker("me/model")


@pytest.mark.parametrize("silent", ["its address", "the name server"])
def test_a_hub_that_does_not_answer(endpoint, monkeypatch, silent):
    """Where packets vanish, the client would wait for ever."""
    endpoint("http://127.0.0.1:9")
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    over, start = threading.Event(), time.monotonic()

    def connect(address, timeout):
        assert address == ("127.0.0.1", 9)
        assert timeout == 0.05
        if silent == "the name server":
            over.wait(60)
        raise TimeoutError
    monkeypatch.setattr(socket, "create_connection", connect)
    for call in (snapshot_download, hf_hub_download):
        with pytest.raises(InputError, match=r"'me/model'.*: no network"):
            hub.fetch(call, "me/model", *["x"] * (call is hf_hub_download))
    with pytest.raises(InputError, match=r"'me/model'.*: no network"):
        hub.fetch(lambda name: pytest.fail("called"), "me/model")
    assert time.monotonic() - start < 10
    over.set()


def test_a_proxy_is_not_passed_by(endpoint, monkeypatch):
    endpoint("https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("called"))
    assert hub.fetch(lambda name, local_files_only=False: local_files_only, "me/model") is False


@pytest.mark.parametrize(("error", "message"), [
    (OSError(28, "No space left\non device"), "cannot be fetched from the Hub: .*No space left"),
    (LocalEntryNotFoundError("x"), "no network, or HF_HUB_OFFLINE is set"),
    (OfflineModeIsEnabled("x"), "no network, or HF_HUB_OFFLINE is set"),
    (ValueError(), "ValueError$")])
def test_other_failures_of_the_hub(endpoint, error, message):
    endpoint("http://127.0.0.1:9", offline=True)

    def fail(name):
        raise error
    with pytest.raises(InputError, match=message):
        hub.fetch(fail, "me/model")
