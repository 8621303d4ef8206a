"""Folders in and out: what is read is checked, what is wrong is named, what is saved is read by us and transformers."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from nanoqstar import InputError, hf
from nanoqstar.attention import dense
from nanoqstar.hf import check_context, load, read_config, resolve, save
from nanoqstar.tokenizer import load_tokenizer, unknown_ids
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config

CONFIG = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
MISTRAL = replace(UNTIED, attention_bias=False, sliding_window=32, rope_theta=1e4, rms_norm_eps=1e-5)
IDS = torch.arange(24).view(2, 12) * 7 % 50


def random_model(config=CONFIG, seed=0):
    model = QuietStar(Qwen2(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tokenizer_json(n=45):
    vocabulary = {f"t{i}": i for i in range(n - 3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startthought|>", "<|endthought|>"])
    return tokenizer.to_str()


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model", random_model(), tokenizer_json(), {"step": 3})
    return tmp_path / "model"


def edit(folder, **changes):
    """Changes keys of config.json; ... deletes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def logits(lm):
    with torch.no_grad():
        return lm.logits(lm(IDS, torch.arange(IDS.shape[1]), dense(None)))


def complete(lm, thoughts):
    model = QuietStar(lm)
    assert not model.load_state_dict(thoughts, strict=False).unexpected_keys
    return model


def mixing_weights(model):
    thoughts = (torch.arange(2 * 2 * 10 * 3) % 50).view(2, 2, 10, 3)
    with torch.no_grad():
        return model.score(IDS, torch.zeros_like(IDS), thoughts).mix


# ---- round trips

@pytest.mark.parametrize("config", [CONFIG, UNTIED, MISTRAL], ids=["tied", "untied", "mistral"])
def test_save_then_load(config, tmp_path):
    model = random_model(config)
    save(tmp_path / "a", model, tokenizer_json(), {"step": 3})
    lm, thoughts, where = load(str(tmp_path / "a"))
    assert where == tmp_path / "a" and lm.config == config
    again = complete(lm, thoughts)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert all(p.requires_grad and isinstance(p, torch.nn.Parameter) for p in lm.parameters())
    assert torch.equal(logits(lm), logits(model.lm))
    mix = mixing_weights(again)
    assert torch.equal(mix, mixing_weights(model)) and mix.std() > 0.1
    assert json.loads((tmp_path / "a" / "nanoqstar.json").read_text()) == {"step": 3}
    assert load_tokenizer(where).to_str() == tokenizer_json()
    assert ("lm_head.weight" in load_file(where / "model.safetensors")) != config.tie_word_embeddings


def test_save_of_a_plain_model(tmp_path):
    lm = random_model().lm.bfloat16()
    save(tmp_path / "a", lm, None, {})
    assert {x.name for x in (tmp_path / "a").iterdir()} == {"config.json", "model.safetensors", "nanoqstar.json"}
    again, thoughts, _ = load(tmp_path / "a", dtype=torch.bfloat16)
    assert thoughts is None and torch.equal(logits(again), logits(lm))
    assert load(tmp_path / "a")[0].head_weight.dtype == torch.float32


@pytest.mark.parametrize("config", [CONFIG, UNTIED, MISTRAL], ids=["tied", "untied", "mistral"])
def test_saved_folder_loads_in_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(config)
    save(tmp_path / "a", model, None, {})
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == ("Qwen2ForCausalLM" if config.attention_bias else "MistralForCausalLM")
    assert theirs.dtype == torch.float32 and theirs.config.sliding_window == config.sliding_window
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert (logits(model.lm) - expected).abs().max() / expected.abs().max() < 1e-5


def write_official(folder, model, change=lambda tensors: None):
    """The published checkpoint's layout: everything in one set of bf16 files, delimiters / 100 with an unused row."""
    save(folder, model.lm, None, {})
    (folder / "nanoqstar.json").unlink()
    tensors = dict(model.lm.state_dict())
    for name, p in model.named_parameters():
        if name.startswith("mixing_head."):
            tensors[name.replace("mixing_head.", "talk_head.0.")] = p
        elif not name.startswith("lm."):
            tensors[name] = torch.stack((p / 100, torch.full_like(p, 9.0)))
    tensors = {name: x.detach().bfloat16().contiguous() for name, x in tensors.items()}
    change(tensors)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_official_layout(tmp_path):
    """Nothing that exists is initialised anew, also after a save in our layout."""
    model = random_model(MISTRAL)
    tensors = write_official(tmp_path / "a", model)
    lm, thoughts, _ = load(tmp_path / "a")
    assert torch.equal(thoughts["start_embedding"], tensors["start_embedding"][0].float() * 100)
    assert torch.equal(thoughts["end_embedding"], tensors["end_embedding"][0].float() * 100)
    assert torch.equal(thoughts["mixing_head.4.weight"], tensors["talk_head.0.4.weight"].float())
    first = complete(lm, thoughts)
    save(tmp_path / "b", first, None, {})
    second = complete(*load(tmp_path / "b")[:2])
    assert torch.equal(logits(second.lm), logits(first.lm))
    assert torch.equal(mixing_weights(second), mixing_weights(first))
    exact = mixing_weights(model)
    assert (mixing_weights(first) - exact).abs().max() / exact.abs().max() < 0.03  # bf16


def test_official_layout_incomplete(tmp_path):
    def change(tensors):
        del tensors["talk_head.0.2.bias"]
        tensors["start_embedding"] = tensors["start_embedding"][0]
    write_official(tmp_path / "a", random_model(), change)
    with pytest.raises(InputError, match=r"talk_head.0.2.bias; .*: start_embedding \[16\] instead of \[2, 16\]"):
        load(tmp_path / "a")


def test_own_file_incomplete(folder):
    tensors = load_file(folder / "quietstar.safetensors")
    del tensors["end_embedding"]
    save_file(tensors, folder / "quietstar.safetensors")
    with pytest.raises(InputError, match="quietstar.safetensors .* 1 missing: end_embedding"):
        load(folder)
    save_file({}, folder / "quietstar.safetensors")
    with pytest.raises(InputError, match="7 missing"):
        load(folder)


def test_replacing_a_folder(folder):
    (folder.parent / "model.partial").mkdir()
    (folder.parent / "model.partial" / "rubbish").touch()
    other = random_model(seed=1)
    save(folder, other, None, {"step": 4})
    assert torch.equal(logits(load(folder)[0]), logits(other.lm)) and not (folder / "tokenizer.json").exists()
    assert [x.name for x in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing_rename", [1, 2])
def test_interrupted_replacement(folder, monkeypatch, failing_rename):
    """One whole model exists at any moment, and the next save cleans up."""
    before, calls, rename = logits(load(folder)[0]), [], Path.rename

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == failing_rename:
            raise KeyboardInterrupt
        return rename(self, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(folder, random_model(seed=1), None, {})
    whole = folder if failing_rename == 1 else folder.with_name("model.old")
    assert torch.equal(logits(load(whole)[0]), before)
    save(folder, random_model(seed=2), None, {})
    assert torch.equal(logits(load(folder)[0]), logits(random_model(seed=2).lm))
    assert [x.name for x in folder.parent.iterdir()] == ["model"]


def test_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(InputError, match="was not saved by nanoqstar"):
            save(target, random_model(), None, {})
    assert (tmp_path / "thesis.tex").exists()


# ---- config.json

@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    ({"model_type": ...}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_parameters of type 'llama3'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters .*full_attention"),
    ({"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window with a sliding_window of 32"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq"),
    ({"hidden_size": ...}, "hidden_size must be a positive integer, not missing"),
    ({"hidden_size": "16"}, "hidden_size must be a positive integer, not '16'"),
    ({"vocab_size": 50.0}, "vocab_size must be a positive integer, not 50.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
    ({"max_position_embeddings": -1}, "max_position_embeddings must be a positive integer"),
    ({"rope_theta": float("nan")}, "rope_theta must be a positive number, not nan"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"num_key_value_heads": 3}, "4 attention heads must be a multiple of 3"),
    ({"head_dim": 5}, "head_dim 5 even"),
])
def test_refused_configs(folder, changes, words):
    with pytest.raises(InputError, match=words):
        read_config(edit(folder, **changes))


@pytest.mark.parametrize(("changes", "expected"), [
    ({"head_dim": None, "tie_word_embeddings": ..., "attention_bias": ...}, {"tie_word_embeddings": False}),
    ({"head_dim": ..., "num_key_value_heads": None}, {"num_key_value_heads": 4}),
    ({"rope_theta": ...}, {"rope_theta": 1e4}),
    ({"rope_theta": ..., "rope_parameters": {"rope_theta": 500, "rope_type": "default"}}, {"rope_theta": 500.0}),
    ({"rope_scaling": None, "rope_parameters": None}, {}),
    ({"use_sliding_window": False, "sliding_window": 32}, {}),
    ({"use_sliding_window": True, "sliding_window": 64}, {}),
    ({"model_type": "mistral", "attention_bias": ...}, {"attention_bias": False}),
    ({"model_type": "mistral", "sliding_window": 32}, {"sliding_window": 32}),
    ({"model_type": "mistral", "sliding_window": None}, {}),
])
def test_accepted_configs(folder, changes, expected):
    assert read_config(edit(folder, **changes)) == replace(CONFIG, **expected)


def test_mistral_7b_config(tmp_path):
    """The published config.json of Mistral-7B-v0.1: its window limits the context."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000}))
    config = read_config(tmp_path)
    assert config.head_dim == 128 and not config.attention_bias and config.max_context == 4096
    check_context(config, 4096)
    with pytest.raises(InputError, match="4097 positions .* context of 4096 .*sliding window"):
        check_context(config, 4097)
    with pytest.raises(InputError, match="65 positions are more than the model's context of 64: shorten"):
        check_context(CONFIG, 65)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_broken_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"config\.json (cannot be read as|holds no) JSON"):
        load(folder)


# ---- weights

def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_all_wrong_tensors_are_listed_at_once(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 16)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.int8)
    change_weights(folder, change)
    with pytest.raises(InputError) as error:
        load(folder)
    for part in ("1 missing: model.norm.weight", "1 unexpected: model.layers.7.mlp.up_proj.weight",
                 "1 misshapen: model.layers.0.mlp.up_proj.weight [3, 16] instead of [24, 16]",
                 "F64: model.layers.1.mlp.up_proj.weight I8"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_harmless_extras(folder, dtype):
    expected = load_file(folder / "model.safetensors")

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied, yet stored
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    change_weights(folder, change)
    lm = load(folder)[0]
    for name, p in lm.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, expected[name].to(dtype).float()), name
    assert load(folder, dtype=torch.float64)[0].head_weight.dtype == torch.float64


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(folder, size):
    for name in ("quietstar.safetensors", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size])
        with pytest.raises(InputError, match=f"{name} is damaged or cut short"):
            load(folder)


def test_missing_shard_and_broken_index(tmp_path):
    write_official(tmp_path, random_model())
    shard, index = tmp_path / "model-00002-of-00002.safetensors", tmp_path / "model.safetensors.index.json"
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors is missing"):
        load(tmp_path)
    for text in ("{}", '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(InputError, match="index.json has no weight_map"):
            load(tmp_path)


def test_folders_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no model.safetensors, nor shards"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"but pickles \(pytorch_model.bin\), which are not read"):
        load(folder)


MEASURE = """
import sys, torch
from nanoqstar.hf import load
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024
load(sys.argv[1])
before = peak()
lm = load(sys.argv[2])[0]
size = sum(p.nbytes for p in lm.parameters())
print(size, (peak() - before) / size)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peak_memory_is_one_copy(folder, tmp_path, stored):
    """Not getrusage: a child of vfork starts with its parent's maximum."""
    config = replace(UNTIED, vocab_size=16384, hidden_size=1024, intermediate_size=4096, head_dim=256)
    with torch.device("meta"):
        model = Qwen2(config)
    save(tmp_path / "big", model.to(stored).to_empty(device="cpu"), None, {})
    size, ratio = map(float, run(MEASURE, folder, tmp_path / "big").split())
    print(f"peak memory {ratio:.3f} copies")
    assert 200e6 < size < 300e6 and ratio < 1.35, ratio


def run(program, *arguments, **environment):
    """Standard output of a Python program in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, check=True, cwd=Path(__file__).parent.parent,
                          stdout=subprocess.PIPE, text=True, timeout=300)
    return done.stdout


# ---- tokenizer

def test_unknown_ids(folder):
    tokenizer = load_tokenizer(folder)
    unknown = unknown_ids(tokenizer, 50)
    assert unknown.dtype == torch.bool and unknown.shape == (50,)
    assert unknown.nonzero()[:, 0].tolist() == [43, 44, 45, 46, 47, 48, 49]  # 43, 44: the official delimiters
    with pytest.raises(InputError, match="the tokenizer has id 44, the model 44 rows"):
        unknown_ids(tokenizer, 44)


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        load_tokenizer(folder)


# ---- local paths and the Hub

@pytest.mark.parametrize(("path", "words"), [
    ("no-such-folder", "no folder 'no-such-folder', and it is no Hub id"), ("a/b/c", "no Hub id"), ("./x", "no Hub id"),
    ("/no/such", "no Hub id"), (__file__, "is a file; give the folder"),
])
def test_no_such_folder(path, words):
    with pytest.raises(InputError, match=words):
        resolve(path)


def test_other_failures_of_the_hub(monkeypatch):
    class Busy(Exception):
        response = SimpleNamespace(status_code=503)

    def fail(*_, **__):
        raise error from cause
    monkeypatch.setattr(hf, "snapshot_download", fail)
    for error, cause, words in ((LocalEntryNotFoundError("no"), Busy(), "the Hub answered 503"),
                                (OSError(28, "No space left\non device"), None, "No space left on device")):
        with pytest.raises(InputError, match=f"no folder 'me/model', and it cannot be fetched as a Hub id: .*{words}$"):
            resolve("me/model")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load(tmp_path)


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers like the Hub for `me/model`, whose files are `files`; other names are statuses: `me/403`."""

    files, sha, asked = {}, "0123456789" * 4, []

    def do_GET(self):
        self.asked.append(self.path)
        name, file = re.search(r"(?:^(?:/api/models)?/me/(\w+)(?:/resolve/\w+/(.*))?)?", self.path).groups()
        if name != "model":
            self.answer(int(name or 404))
        elif file:
            self.answer(200, self.files[file])
        elif "/tree/" in self.path:
            self.answer(200, json.dumps([{"type": "file", "path": n, "size": len(x), "oid": f"{len(x):040x}"}
                                         for n, x in self.files.items()]).encode())
        else:
            siblings = [{"rfilename": n} for n in self.files]
            self.answer(200, json.dumps({"id": "me/model", "sha": self.sha, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def answer(self, status, content=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content):040x}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """(environment for a process that takes a server of ours for the Hub, the handler's class)."""
    files = {x.name: x.read_bytes() for x in folder.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"}
    handler = type("Handler", (FakeHub,), {"files": files, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
           "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
           "NO_PROXY": "*", "no_proxy": "*"}, handler
    server.shutdown()
    server.server_close()


ATTEMPT = """
import sys
from nanoqstar import InputError
from nanoqstar.hf import load
for name in sys.argv[1:]:
    try:
        lm, thoughts, folder = load(name)
        print("loaded", lm.head_weight.sum().item(), sorted(thoughts)[0], sorted(x.name for x in folder.iterdir()))
    except InputError as error:
        print(error)
"""


def test_hub(hub, folder):
    environment, handler = hub
    out = run(ATTEMPT, "me/model", "me/401", "me/403", "me/404", **environment).splitlines()
    total = load(folder)[0].head_weight.sum().item()
    assert out[0] == (f"loaded {total} end_embedding "
                      "['config.json', 'model.safetensors', 'quietstar.safetensors', 'tokenizer.json']")
    assert not any("bin" in path or "onnx" in path for path in handler.asked)
    for line, status in zip(out[1:3], (401, 403), strict=True):
        assert f"refuses access to 'me/{status}' ({status})" in line
        assert "HF_TOKEN" in line and "`hf auth login`" in line
    assert "neither a folder 'me/404' nor a repository" in out[3] and len(out) == 4

    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody there; then not even tried; what was fetched still loads
    for offline in "01":
        out = run(ATTEMPT, "me/other", "me/model", **environment | {"HF_HUB_OFFLINE": offline}).splitlines()
        assert out[0] == ("there is no folder 'me/other', and it cannot be fetched as a Hub id: "
                          "no network, or HF_HUB_OFFLINE is set: go online, or give a local folder")
        assert out[1].startswith("loaded")
