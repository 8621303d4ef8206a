"""Exported folders: what is in them, that others read them, and that they reach the Hub whole; the
official checkpoint's layout on the way through."""

import base64
import http.server
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from test_hf import edit, write_official
from tokenizers import Tokenizer, models, processors

import sample
from nanoqstar import evaluate, export, hf, hub, lora
from nanoqstar.attention import dense
from nanoqstar.hf import Thinking, load_thinker
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.runlog import RunLog
from nanoqstar.state import Progress

CONFIG = Qwen2Config(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=256)
MISTRAL = replace(CONFIG, tie_word_embeddings=False, attention_bias=False, rope_theta=1e4,
                  rms_norm_eps=1e-5)
IDS = torch.arange(24).view(2, 12) * 7 % 40
THINKING = Thinking(6, 2, 1.0)
EVAL = {"kind": "eval", "nll_base": 1.5, "nll_mixed": 1.25, "gain": 0.25, "gain_stderr": 0.01}


def random_model(config=CONFIG, seed=0):
    model, generator = QuietStar(Qwen2(config)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def words(n=48, *special, begin=None):
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(n)}, unk_token="t0"))
    tokenizer.add_special_tokens(list(special))
    if begin:
        pair = (begin, tokenizer.token_to_id(begin))
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [pair])
    return tokenizer


def make_run(folder, model=None, config=None, thinking=THINKING, source=None):
    """A run's folder, as train.py leaves it."""
    hf.save(folder / "checkpoint", model or random_model(), words(48, "<|endoftext|>"),
            thinking=thinking, step=160, config={"seed": 3, **(config or {})}, source=source)
    rows = [EVAL | {"step": 0, "nll_mixed": 1.5}, {"kind": "think", "step": 10, "nll_base": 9.0},
            EVAL | {"step": 160, "answers": {"direct": {
                "n": 736, "accuracy_base": 0.079, "accuracy_mixed": 0.986}}},
            EVAL | {"step": 170, "nll_base": 7.0}]  # after what was saved
    text = "\n".join(map(json.dumps, rows)) + '\n{"kind": "eval", "st'
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def make(tmp_path, capsys):
    """export with some arguments -> (exit code, stdout, stderr); into tmp_path/shared."""
    def call(run, *args, folder=tmp_path / "shared"):
        code = export.main([str(run), str(folder), *args])
        return code, *capsys.readouterr()
    return call


def check_refused(result, *pieces):
    code, _, err = result
    assert (code, err[:7], err.count("\n")) == (2, "error: ", 1), result
    assert all(piece in err for piece in pieces), err


def logits(lm):
    with torch.no_grad():
        return lm.logits(lm(IDS, torch.arange(IDS.shape[1]), dense(None)))


# ---- the folder


@pytest.mark.parametrize("config", [CONFIG, MISTRAL], ids=["qwen2", "mistral"])
def test_transformers_and_we_load_it_with_equal_logits(tmp_path, make, config):
    transformers = pytest.importorskip("transformers")
    model = random_model(config)
    code, out, err = make(make_run(tmp_path / "run", model))
    assert (code, err) == (0, "")
    assert "license, base_model, datasets not known" in out
    again, _, settings = load_thinker(tmp_path / "shared")
    assert settings.thinking == THINKING
    assert (settings.end_ids, settings.step) == ((48,), 160)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "shared", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.generation_config.eos_token_id == 48
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert (logits(again.lm) - expected).abs().max() / expected.abs().max() < 1e-5
    assert [x.name for x in tmp_path.iterdir() if x.name.startswith("shared")] == ["shared"]


def test_bfloat16(tmp_path, make):
    make(make_run(tmp_path / "run"), "--save_dtype", "bf16")
    stored = load_file(tmp_path / "shared" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    given = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(x, given[name].bfloat16()) for name, x in stored.items())
    own = load_file(tmp_path / "shared" / "quietstar.safetensors")
    assert {x.dtype for x in own.values()} == {torch.float32}
    assert "weights: bf16" in (tmp_path / "shared" / "README.md").read_text()
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_adapters_are_merged(tmp_path, make):
    model = random_model()
    lora.add(model.lm, 2, 4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    assert make(make_run(tmp_path / "run", model, {"lora_rank": 2}))[0] == 0
    assert (tmp_path / "run" / "checkpoint" / "adapter").exists()
    assert not (tmp_path / "shared" / "adapter").exists()
    again = load_thinker(tmp_path / "shared")[0]
    assert not any("lora" in name for name, _ in again.named_parameters())
    torch.testing.assert_close(logits(again.lm), logits(model.lm), rtol=1e-4, atol=1e-4)
    assert "- LoRA rank: 2" in (tmp_path / "shared" / "README.md").read_text()


def test_files_of_the_source_go_along(tmp_path, make):
    source = make_run(tmp_path / "source", thinking=None) / "checkpoint"
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 48], "top_k": 5}')
    run = make_run(tmp_path / "run", source=source)
    (run / "report.html").write_text("<p>é</p>", encoding="utf-8")
    assert make(run)[0] == 0
    shared = tmp_path / "shared"
    assert (shared / "chat_template.jinja").read_text() == "{{ messages }}"
    generation = json.loads((shared / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["top_k"]) == ([7, 48], 5)
    assert (shared / "report.html").read_text(encoding="utf-8") == "<p>é</p>"
    assert "`report.html`" in (shared / "README.md").read_text()


def test_nothing_of_this_machine_goes_along(tmp_path, make):
    settings = {"model_path": str(tmp_path / "secret" / "base"), "data": str(tmp_path / "texts"),
                "out_dir": str(tmp_path), "start_init_text": "/"}
    assert make(make_run(tmp_path / "run", config=settings))[0] == 0
    for file in (tmp_path / "shared").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    config = json.loads((tmp_path / "shared" / "nanoqstar.json").read_text())["config"]
    assert (config["model_path"], config["data"], config["start_init_text"]) == (
        "base", "texts", "/")


@pytest.mark.parametrize("what", ["a file", "files", "a link to nothing"])
def test_what_is_there_is_not_touched(tmp_path, make, what):
    run, target = make_run(tmp_path / "run"), tmp_path / "shared"
    if what == "files":
        shutil.copytree(run / "checkpoint", target)  # one of ours as well
    elif what == "a file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = sorted((str(x), x.stat().st_mtime_ns) for x in tmp_path.rglob("*") if x.exists())
    check_refused(make(run), "holds something already")
    assert before == sorted((str(x), x.stat().st_mtime_ns) for x in tmp_path.rglob("*")
                            if x.exists())


def test_an_empty_folder_is_filled_and_half_of_one_is_never_left(tmp_path, make, monkeypatch):
    run, target = make_run(tmp_path / "run"), tmp_path / "shared"
    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        check_refused(make(run), "full")
    assert [x.name for x in tmp_path.iterdir()] == ["run"]
    target.mkdir()
    assert make(run)[0] == 0
    assert (target / "README.md").exists()


def test_typos_and_missing_words(capsys, tmp_path):
    for args, piece in (([], "run and folder must be given"), (["a"], "folder must be given"),
                        (["a", "b", "c"], "unexpected argument 'c'"),
                        (["a", "b", "--pus", "x"], "did you mean --push?"),
                        (["a", "b", "--push", "x"], "'x' is no OWNER/NAME"),
                        ([str(tmp_path / "a"), str(tmp_path / "b")], "no folder")):
        check_refused((export.main(args), *capsys.readouterr()), piece)
    assert export.main(["--help"]) == 0
    assert "--save_dtype" in capsys.readouterr().out


# ---- its card


def test_the_card_holds_the_runs_real_figures(tmp_path, make):
    make(make_run(tmp_path / "run"))
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["nanoqstar", "quiet-star"]}
    assert "| held-out text, after update 160 | base | with thoughts |" in card.text
    assert "| NLL, nats a token | 1.5000 | 1.2500 |" in card.text
    assert "| the same after update 0 | 1.5000 | 1.5000 |" in card.text
    assert "| direct answers right, n=736 | 7.9% | 98.6% |" in card.text
    assert "+0.2500 ± 0.0200 (2 standard errors, by window)" in card.text
    assert "7.0000" not in card.text
    assert "- seed: 3\n" in card.text
    assert ("vLLM, llama.cpp (GGUF) and plain `generate` run the base part and do not think"
            in card.text)


def test_a_model_without_thoughts_says_so(tmp_path, make):
    run = make_run(tmp_path / "run", thinking=None)
    assert make(run)[0] == 0
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.tags == ["nanoqstar"]
    assert "without thoughts" in card.text
    assert "vLLM, llama" not in card.text
    assert "| NLL, nats a token | 1.5000 |\n" in card.text
    assert not (tmp_path / "shared" / "quietstar.safetensors").exists()


def test_the_base_of_a_run_goes_without_its_report(tmp_path, make):
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("what it thinks")
    hf.save(run / "base", random_model(), words(), thinking=None, step=0, config={}, source=None)
    assert make(run)[0] == make(run / "base", folder=tmp_path / "base")[0] == 0
    assert (tmp_path / "shared" / "report.html").read_text() == "what it thinks"
    assert not (tmp_path / "base" / "report.html").exists()


def test_the_snippet_of_the_card_thinks(tmp_path, make, monkeypatch, capsys):
    pytest.importorskip("transformers")
    make(make_run(tmp_path / "run"))
    code = re.search("```python\n(.*?)```", (tmp_path / "shared" / "README.md").read_text(),
                     re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("PROMPT", "t5"), {})
    assert re.search(r"t5 t\d+", capsys.readouterr().out)


@pytest.mark.parametrize("text", [
    "[" * 10**5, '{"kind": "eval", "step": 160, "nll_base": "<b>", "nll_mixed": 1.0, "gain": 0.1}',
    '{"kind": "eval", "step": 160, "nll_base": NaN, "nll_mixed": 1.0, "gain": 0.1}', "5", "\xff",
    '{"kind": "eval", "step": [1], "nll_base": 1.0, "nll_mixed": 1.0, "gain": 0.1}'])
def test_garbled_metrics_are_no_figures(tmp_path, make, text):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(text.encode("latin1"))
    assert make(run)[0] == 0
    assert "Measured" not in (tmp_path / "shared" / "README.md").read_text()


def test_only_what_is_known_is_said(tmp_path, make, monkeypatch):
    """License: of the source's card. Data: where prepared ones say it. Base: what nobody here can
    confirm to be of the Hub is left out."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data" / "mine"
    data.mkdir(parents=True)
    (data / "meta.json").write_text('{"source": {"dataset_name": "me/texts"}}')
    source = make_run(tmp_path / "source", thinking=None, config={"model_path": "out/gone"})
    base = source / "checkpoint"
    run = make_run(tmp_path / "run", config={"model_path": "base", "data": "data/mine"})
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "nanoqstar.json").unlink()
    (tmp_path / "base" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: [x]\nbase_model: a/b\n---\nText")
    assert make(run)[0] == 0
    known = ModelCard.load(tmp_path / "shared" / "README.md").data
    assert (known.license, known.license_name, known.datasets) == ("other", "mine", ["me/texts"])
    assert known.get("license_link") is None
    assert known.get("base_model") is None
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [\n---\n")
    code, out, _ = make(run, folder=tmp_path / "again")
    assert code == 0
    assert "license, base_model not known" in out


def test_the_base_is_named_where_the_hub_has_it(tmp_path, make, monkeypatch):
    """Through an earlier run, too, that began from it."""
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: apache-2.0\n---\n")

    def fetch(call, name, file):
        assert (name, file) == ("me/base", "README.md")
        return str(card)
    monkeypatch.setattr(hub, "fetch", fetch)
    first = make_run(tmp_path / "first", config={"model_path": "me/base"})
    second = make_run(tmp_path / "second", config={"model_path": str(first)})
    for run in (first, second):
        assert make(run, folder=tmp_path / f"shared-{run.name}")[0] == 0
        data = ModelCard.load(tmp_path / f"shared-{run.name}" / "README.md").data
        assert (data.base_model, data.license) == ("me/base", "apache-2.0")


# ---- the published official checkpoint's layout


def test_the_official_layout_is_sampled_scored_and_exported(tmp_path, make, capsys):
    """Equal text, with and without the export; no thought and no text holds the two extra rows."""
    official, tokenizer = tmp_path / "official", tmp_path / "words"
    write_official(official, random_model(MISTRAL))
    edit(official, bos_token_id=46, eos_token_id=47)
    tokenizer.mkdir()
    text = words(46, "<s>", "</s>", begin="<s>")
    (tokenizer / "tokenizer.json").write_text(text.to_str())
    check_refused(make(official), "no tokenizer.json", "--tokenizer")
    assert make(official, "--tokenizer", str(tokenizer))[0::2] == (0, "")
    ours, _, settings = load_thinker(official, tokenizer=tokenizer)
    again, _, exported = load_thinker(tmp_path / "shared")
    assert settings.thinking == exported.thinking == Thinking(7, 4, 1.0)
    assert exported.end_ids == settings.end_ids == (47,)
    for p, q in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert again.banned.nonzero()[:, 0].tolist() == [48, 49]
    scores = [evaluate.score_text(m, IDS, torch.zeros_like(IDS), 7, 4) for m in (ours, again)]
    assert torch.equal(scores[0].mixed_lp, scores[1].mixed_lp)
    assert not torch.equal(scores[0].mixed_lp, scores[0].base_lp)
    assert (scores[0].thoughts < 48).all()
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (50, 46, 47)
    written = []
    for args in ([str(official), "--tokenizer", str(tokenizer)], [str(tmp_path / "shared")]):
        assert sample.main(["--model_path", *args, "--prompt", "t5", "--show_thoughts",
                            "--max_new_tokens", "5", "--device", "cpu"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert written[0].count("⟨") in range(1, 6)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shared")
    assert type(theirs).__name__ == "MistralForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(ours.lm), rtol=1e-4, atol=1e-4)


# ---- the Hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Takes pushes to `me/model` as the Hub does: large files by LFS, small ones with the commit.
    `status` answers every request instead; `gate` is waited for first of all."""

    status, gate = None, None

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://{self.headers['Host']}"
        if self.status:
            return self.answer({"error": "no"}, self.status)
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "who?"}, 401)
        if self.path == "/api/repos/create":
            if self.gate:
                self.gate.wait(60)
            self.made.append(json.loads(body))
            is_new = len(self.made) == 1
            return self.answer({"url": f"{host}/me/model", "error": "it exists"},
                               200 if is_new else 409)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/models/me/model/preupload/main":
            return self.answer({"files": [
                {"path": x["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if x["path"].endswith(".safetensors") else "regular"}
                for x in json.loads(body)["files"]]})
        if self.path == "/me/model.git/info/lfs/objects/batch":
            return self.answer({"transfer": "basic", "objects": [
                {**x, "actions": {"upload": {"href": f"{host}/lfs/{x['oid']}"}}}
                for x in json.loads(body)["objects"]]})
        assert self.path == "/api/models/me/model/commit/main", self.path
        lines = [json.loads(line) for line in body.splitlines()]
        self.commits.append(lines[0]["value"]["summary"])
        for line in lines[1:]:
            x = line["value"]
            self.files[x["path"]] = (base64.b64decode(x["content"]) if line["key"] == "file"
                                     else self.large[x["oid"]])
        return self.answer({"success": True, "commitUrl": f"{host}/me/model/commit/1",
                            "commitOid": "1" * 40})

    def do_PUT(self):
        self.large[self.path.rpartition("/")[2]] = self.rfile.read(
            int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        self.answer({"error": "nothing here"}, self.status or 404)

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """The handler's class of a server that this process takes for the Hub, logged in."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    handler = type("Handler", (FakeHub,), dict(files={}, large={}, commits=[], made=[]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.answers.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()
    server.server_close()
    hub.answers.cache_clear()


def test_a_push_sends_the_folder_as_it_is(tmp_path, make, fake_hub):
    run = make_run(tmp_path / "run")
    for n in (1, 2):
        code, out, _ = make(run, "--push", "me/model", folder=tmp_path / f"shared{n}")
        assert code == 0
        assert "pushed to me/model" in out
    assert fake_hub.files == {x.name: x.read_bytes() for x in (tmp_path / "shared2").iterdir()}
    assert fake_hub.commits == ["Update 160"] * 2
    assert fake_hub.made[0]["name"] == "model"
    assert fake_hub.made[0].get("private") or fake_hub.made[0].get("visibility") == "private"
    assert b'name = "me/model"' in fake_hub.files["README.md"]


def test_a_push_that_is_refused(tmp_path, make, fake_hub, monkeypatch):
    """One sentence; what is exported stays. Without a token nothing is begun."""
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before it asks again
    for status, piece in ((403, "refuses it (403): use a token that may write"),
                          (401, "refuses it (401)"), (500, "the Hub answered 500")):
        fake_hub.status, folder = status, tmp_path / f"shared{status}"
        check_refused(make(run, "--push", "me/model", folder=folder), "'me/model' on the Hub was "
                      "not written", piece, f"{folder} is written")
        assert load_thinker(folder)[2].step == 160
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody there
    check_refused(make(run, "--push", "me/model"), "no network, or HF_HUB_OFFLINE is set")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    folder = tmp_path / "other"
    check_refused(make(run, "--push", "me/model", folder=folder), "without a token", "HF_TOKEN")
    assert not folder.exists()
    assert not fake_hub.files


def save(log, model, update, **options):
    log.save(Progress("think", update), model, None, words(48), THINKING, None, {},
             **options)


def test_a_run_is_backed_up_in_the_background(tmp_path, fake_hub, capsys, monkeypatch):
    """A save that comes meanwhile changes nothing that is under way, and waits for nothing."""
    monkeypatch.setattr(sys.stdout, "flush", lambda: None)
    log = RunLog(tmp_path, {"push": "me/model", "push_every": 20})
    fake_hub.gate = threading.Event()
    first = random_model(seed=1)
    save(log, first, 10)
    assert log.pushing is None  # not yet due
    save(log, first, 20, background=True)
    log.wait()
    for seed, update in ((2, 30), (3, 40)):  # the latter would be due
        save(log, random_model(seed=seed), update, background=True)
        log.wait()
    assert load_thinker(tmp_path / "checkpoint")[2].step == 40
    assert not fake_hub.commits
    fake_hub.gate.set()
    log.pushing.join()
    assert fake_hub.commits == ["Update 20"]
    sent = tmp_path / "sent"
    sent.mkdir()
    for name, content in fake_hub.files.items():
        (sent / name).write_bytes(content)
    model, _, settings = load_thinker(sent)
    assert settings.step == 20
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), first.parameters()))
    for _ in range(2):  # once is enough
        log.back_up(40, last=True)
    assert fake_hub.commits == ["Update 20", "Update 40"]
    assert json.loads(fake_hub.files["nanoqstar.json"])["step"] == 40
    assert not (tmp_path / "checkpoint.push").exists()
    assert capsys.readouterr().out.count("is backed up to me/model") == 2


def test_a_backup_that_fails_is_said_and_the_run_goes_on(tmp_path, fake_hub, capsys,
                                                         monkeypatch):
    fake_hub.status = 403
    log = RunLog(tmp_path, {"push": "me/model", "push_every": 10})
    save(log, random_model(), 10)
    log.back_up(10, last=True)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "warning: update 10 is not backed up" in err
    assert "the run goes on" in err
    assert log.saved == (tmp_path / "checkpoint", 10)
    fake_hub.status = None
    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError))
        log.back_up(11, last=True)
    assert "no network" in capsys.readouterr().err
    log.back_up(12, last=True)  # it is not remembered that nobody answered
    assert fake_hub.commits == ["Update 12"]
