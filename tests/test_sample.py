"""sample.py: what it reads, writes and refuses; once as a user runs it, else in this process."""

import ast
import importlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import sample
from data import fold
from nanoqstar import hf
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.sampling import Decoder, Step

ROOT = Path(__file__).parents[1]
LATEX = r"a \neq b, \nabla \times \theta \\n \t \frac{1}{2} \tnot"
FOLD = {"data": "fold", "fold_operands": 4, "fold_operations": 1}


def make_model(tokenizer):
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=2048)
    model, generator = QuietStar(Qwen2(config)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def make_run(folder, tokenizer, thinking=None, config=None):
    """A run's folder, as train.py leaves it, of a random model."""
    hf.save(folder / "checkpoint", make_model(tokenizer), tokenizer, thinking=thinking,
            step=3, config=config or {}, source=None)
    return folder


def byte_tokenizer(*special, beginning=None):
    """A token for each byte and each of `special`; `beginning` goes before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special])
    if beginning:
        pair = (beginning, tokenizer.token_to_id(beginning))
        tokenizer.post_processor = processors.TemplateProcessing(f"{beginning} $A", None, [pair])
    return tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run of a demo that thinks with n_ahead 6, in a folder out/."""
    tokenizer = Tokenizer.from_str(fold.tokenizer_json(fold.vocabulary()))
    return make_run(tmp_path_factory.mktemp("runs") / "out" / "tiny", tokenizer,
                    hf.Thinking(6, 2, 1.0), config=FOLD)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A model of bytes that was never taught to think; it ends a turn with <|im_end|>."""
    tokenizer = byte_tokenizer("<|endoftext|>", "<|im_end|>")
    return make_run(tmp_path_factory.mktemp("letters"), tokenizer)


@pytest.fixture
def write(capsys):
    """sample.py with some arguments -> (exit code, stdout, stderr)."""
    def call(folder, *args):
        code = sample.main(["--model_path", str(folder), "--device", "cpu", *args])
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def scripted(monkeypatch):
    """Tokens that the model writes from now on; returns what it was asked."""
    def script(tokens):
        asked = []

        def write(self, prompts, *settings, ended, **others):
            asked.append((list(prompts[0]), self.n_ahead))
            for token in tokens:
                if isinstance(token, BaseException):
                    raise token
                if ended:
                    return
                thought = torch.zeros(1, max(0, self.n_ahead - 2), dtype=torch.long)
                yield Step(torch.tensor([token]), thought, torch.zeros(1), torch.zeros(1, 1), [0])
        monkeypatch.setattr(Decoder, "write", write)
        return asked
    return script


def ask(monkeypatch, data):
    """Standard input for the interactive loop."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def check_refused(result, *pieces):
    code, _, err = result
    assert (code, err[:7], err.count("\n")) == (2, "error: ", 1), result
    assert all(piece in err for piece in pieces), err


# ---- as a user runs it


def test_it_asks_for_prompts_as_a_user_runs_it(demo):
    """The child process of this file: bytes that are no UTF-8 and unknown letters stop nothing."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--max_new_tokens", "2", "--device", "cpu"],
        cwd=demo.parents[1], input=b"abcd=\n\xff\nhallo\n\naaaa=\n", capture_output=True,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": ":strict"})
    out, errors = done.stdout.decode(), done.stderr.decode().splitlines()
    assert (done.returncode, out.count("> ")) == (0, 6), done.stderr
    assert "> abcd=" in out
    assert "> aaaa=" in out
    assert [line.startswith("error: the prompt") for line in errors] == [True] * 3
    assert "no UTF-8" in errors[0]
    assert "'hallo'" in errors[1]
    assert "is empty" in errors[2]


def test_nothing_heavy_is_imported_before_the_arguments_are_parsed():
    body = ast.parse((ROOT / "sample.py").read_text()).body
    first = next(n for n, node in enumerate(body) if isinstance(node, ast.If))
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
             for node in body[:first] if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert names == ["sys", "configs", "nanoqstar"]
    assert "exit(main" in ast.unparse(body[first])


def test_help_and_typos(capsys):
    assert sample.main(["--help"]) == 0
    assert "--show_thoughts" in capsys.readouterr().out
    check_refused((sample.main(["--promt", "a"]), *capsys.readouterr()), "did you mean --prompt?")


# ---- what it writes


def test_a_seed_writes_the_same_text_and_thoughts(demo, write):
    args = "--prompt", "abcd=", "--max_new_tokens", "6", "--show_thoughts"
    code, out, err = write(demo, *args)
    assert code == 0
    assert out.startswith("abcd=⟨'")
    assert out.count("⟨") == 6
    assert not err
    assert write(demo, *args)[1] == out != write(demo, *args, "--seed", "1")[1]
    code, plain, err = write(demo, *args[:4], "--no_thoughts")
    assert code == 0
    assert "⟨" not in plain
    assert len(plain) == len("abcd=") + 6 + 1
    assert not err


@pytest.mark.parametrize("prompt", [LATEX, r"\n", "\t1\n2\n", "½ é 語"])
def test_a_prompt_stays_as_it_is(letters, write, scripted, prompt):
    asked = scripted([])
    assert write(letters, "--prompt", prompt)[:2] == (0, prompt + "\n")
    assert asked == [(byte_tokenizer().encode(prompt).ids, 0)]


def test_a_prompt_stays_as_it_is_when_asked_for(letters, write, scripted, monkeypatch):
    asked = scripted([])
    ask(monkeypatch, LATEX.encode() + b"\n")
    assert f"> {LATEX}\n" in write(letters)[1]
    assert asked == [(byte_tokenizer().encode(LATEX).ids, 0)]


def test_a_prompt_comes_after_the_beginning_of_text(tmp_path, write, scripted):
    tokenizer = byte_tokenizer("<s>", beginning="<s>")
    make_run(tmp_path, tokenizer)
    begin, asked = tokenizer.token_to_id("<s>"), scripted(tokenizer.encode("c").ids[1:])
    assert write(tmp_path, "--prompt", "ab")[1] == "abc\n"
    assert write(tmp_path, "--prompt", "")[1] == "c\n"
    assert asked == [([begin, *byte_tokenizer().encode("ab").ids], 0), ([begin], 0)]


def test_an_empty_prompt_starts_at_the_end_of_a_text(letters, write, scripted):
    asked = scripted([])
    assert write(letters, "--prompt", "")[0] == 0
    assert asked == [([byte_tokenizer("<|endoftext|>").token_to_id("<|endoftext|>")], 0)]


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(("written", "shown"), [("é", "é"), ("語x", "語x")])
def test_half_a_character_waits_and_is_shown_at_the_end(letters, write, scripted, monkeypatch, asks,
                                                        written, shown):
    ids = byte_tokenizer().encode(written).ids
    args = [] if asks else ["--prompt", "a"]
    for n, end in ((len(ids), shown), (1, "\ufffd")):
        scripted(ids[:n])
        ask(monkeypatch, b"a\n")
        assert f"a{end}\n" in write(letters, *args)[1]


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_end|>"])
def test_a_text_or_a_turn_ends(letters, write, scripted, token):
    tokenizer = byte_tokenizer("<|endoftext|>", "<|im_end|>")
    b, end, c = (tokenizer.encode(x).ids[0] for x in ("b", token, "c"))
    scripted([b, end, c])
    assert write(letters, "--prompt", "a")[1] == "ab\n"


def test_thoughts_are_as_long_as_trained_or_as_asked_for(demo, write, scripted):
    asked = scripted([0])
    assert write(demo, "--prompt", "a")[2] == ""
    assert "trained with n_ahead 6" in write(demo, "--prompt", "a", "--n_ahead", "1500")[2]
    assert write(demo, "--prompt", "a", "--n_ahead", "6")[2] == ""
    assert write(demo, "--prompt", "a", "--no_thoughts")[2] == ""
    assert [n_ahead for _, n_ahead in asked] == [6, 1500, 6, 0]


def test_a_model_that_was_never_taught_to_think(letters, write):
    code, out, err = write(letters, "--prompt", "a", "--max_new_tokens", "2")
    assert code == 0
    assert out.startswith("a")
    assert "never taught to think: writing without" in err
    assert write(letters, "--prompt", "a", "--max_new_tokens", "2", "--no_thoughts") == (0, out, "")
    for args in (["--n_ahead", "6"], ["--show_thoughts"]):
        check_refused(write(letters, "--prompt", "a", *args), "never taught to think: leave")


def test_a_tiny_temperature_or_top_p_is_greedy(demo, write):
    args = "--prompt", "abcd=", "--max_new_tokens", "20", "--no_thoughts"
    greedy = write(demo, *args, "--temperature", "0")
    assert greedy[0] == 0
    assert write(demo, *args)[1] != greedy[1]
    for setting in (["--temperature", "1e-300"], ["--temperature", "1e-30"], ["--top_p", "1e-300"]):
        assert write(demo, *args, *setting) == greedy


def test_another_tokenizer(demo, tmp_path, write):
    bare = shutil.copytree(demo / "checkpoint", tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    args = "--prompt", "abcd=", "--max_new_tokens", "4"
    check_refused(write(bare, *args), "tokenizer.json", "--tokenizer")
    assert write(bare, *args, "--tokenizer", str(demo / "checkpoint")) == write(demo, *args)


def test_a_terminal_without_utf_8(demo, monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    args = ["--model_path", str(demo), "--prompt", "abcd=", "--max_new_tokens", "2"]
    assert sample.main([*args, "--show_thoughts"]) == 0
    assert sys.stdout.buffer.getvalue().startswith(b"abcd=?'")
    assert sample.main(["--model_path", str(demo), "--prompt", "½"]) == 2


# ---- asking for prompts


def test_the_demo_shows_what_it_knows_and_what_its_lines_look_like(demo, write, monkeypatch):
    ask(monkeypatch, b"")
    code, out, err = write(demo)
    first = out.splitlines()[0]
    assert code == 0
    assert not err
    assert r"'abcdefg=()\n'" in first
    problem = first.split()[-1]
    assert problem.endswith("=")
    assert len(problem) == 5
    assert fold.held_out(problem[:-1])


@pytest.mark.parametrize("config", [
    {}, {"data": "text"}, {"data": "fold", "fold_operands": "x"}, FOLD | {"fold_operands": 10**12}])
def test_other_models_and_garbled_settings_show_no_lines_of_the_demo(config):
    shown = sample.hint(byte_tokenizer("<|endoftext|>"), config)
    assert "characters" not in shown
    assert "=" not in shown


def test_the_next_prompt_may_be_better(demo, write, monkeypatch):
    ask(monkeypatch, b"xyz\n\xff\xfe\n" + b"a" * 3000 + b"\nabcd=\n")
    code, out, err = write(demo, "--max_new_tokens", "2")
    sentences = err.splitlines()
    assert code == 0
    assert "> abcd=" in out
    assert out.endswith("> \n")
    assert len(sentences) == 3
    assert all(s.startswith("error: ") for s in sentences)
    assert "it knows 'abcdefg" in sentences[0]
    assert "no UTF-8" in sentences[1]
    assert "context of 2048" in sentences[2]


# ---- what it refuses


@pytest.mark.parametrize(("args", "pieces"), [
    (["--prompt", "xyz"], ["cannot encode 'xyz'", r"it knows 'abcdefg=()\n'"]),
    (["--prompt", ""], ["the prompt is empty"]),
    (["--prompt", "a\udcff"], ["no UTF-8"]),
    (["--prompt", "ab" * 2000], ["more than the model's context of 2048"]),
    (["--prompt", "a", "--n_ahead", "2000"], ["more than the model's context of 2048", "thoughts"]),
    (["--top_p", "2"], ["--top_p"]), (["--temperature", "-1"], ["--temperature"]),
    (["--no_thoughts", "--show_thoughts"], ["--show_thoughts", "thoughts only"]),
    (["--no_thoughts", "--n_ahead", "6"], ["--n_ahead", "thoughts only"]),
    (["--tokenizer", "nowhere"], ["nowhere"]),
], ids=lambda x: " ".join(x)[:30])
def test_it_refuses_in_one_sentence(demo, capsys, args, pieces):
    code = sample.main(["--model_path", str(demo), *args])
    out, err = capsys.readouterr()
    check_refused((code, out, err.splitlines()[-1] + "\n"), *pieces)
    assert err.count("\n") == 1 + ("were trained with n_ahead" in err)


def test_damaged_folders_are_refused_in_one_sentence(demo, tmp_path, write):
    def damaged(name, file, content):
        folder = shutil.copytree(demo / "checkpoint", tmp_path / name)
        (folder / file).write_bytes(content)
        return folder
    weights = (demo / "checkpoint" / "model.safetensors").read_bytes()
    check_refused(write(damaged("a", "nanoqstar.json", b"{"), "--prompt", "a"), "nanoqstar.json")
    check_refused(write(damaged("b", "nanoqstar.json", b"[" * 10**5), "--prompt", "a"),
                  "nanoqstar.json")
    half = weights[:len(weights) // 2]
    check_refused(write(damaged("c", "model.safetensors", half), "--prompt", "a"),
            "model.safetensors")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    check_refused(write(tmp_path / "new", "--prompt", "a"), "has saved nothing yet")


@pytest.mark.parametrize("text", ["5", "[]", '{"config": 5}', '{"step": "x"}'])
def test_a_garbled_nanoqstar_json_is_refused(demo, tmp_path, write, text):
    folder = shutil.copytree(demo / "checkpoint", tmp_path / "garbled")
    (folder / "nanoqstar.json").write_text(text)
    check_refused(write(folder, "--prompt", "a"), "nanoqstar.json")


@pytest.mark.parametrize("value", [float("nan"), 3e38], ids=["nan", "too large"])
@pytest.mark.parametrize("args", [[], ["--temperature", "0"], ["--no_thoughts"]], ids=str)
def test_a_model_without_numbers_is_refused(demo, tmp_path, write, value, args):
    model, tokenizer, settings = hf.load_thinker(demo)
    model.lm.model.norm.weight.detach().fill_(value)
    hf.save(tmp_path / "run", model, tokenizer, thinking=settings.thinking, step=0, config={},
            source=None)
    result = write(tmp_path / "run", "--prompt", "ab", *args)
    check_refused((result[0], "", result[2]), "not finite", "NaN")


# ---- which run, and how it ends


def test_the_newest_run_is_taken(demo, tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    aside = "checkpoint.partial/nanoqstar.old"
    for n, name in enumerate((f"a/{aside}", "b/checkpoint", f"b/{aside}", "c/base")):
        shutil.copytree(demo / "checkpoint", tmp_path / "out" / name)
        written = 0 if name == f"b/{aside}" else n
        os.utime(tmp_path / "out" / name / "nanoqstar.json", (written, written))
    assert sample.newest_run() == Path("out/b/checkpoint")
    shutil.rmtree("out/b")
    assert sample.newest_run() == Path("out/a") / aside
    assert sample.main(["--prompt", "abcd=", "--max_new_tokens", "2"]) == 0


def test_without_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused((sample.main(["--prompt", "a"]), *capsys.readouterr()),
                  "no finished run under out/")


def test_nobody_reads_on(demo, monkeypatch, capfd):
    """As in `| head -1`: no sentence, no traceback, exit code 0."""
    for args in (["--prompt", "abcd="], []):
        read, write = os.pipe()
        os.close(read)
        ask(monkeypatch, b"abcd=\n")
        with open(write, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            assert sample.main(["--model_path", str(demo), "--max_new_tokens", "2", *args]) == 0
    assert capfd.readouterr().err == ""


def test_ctrl_c(demo, write, scripted, monkeypatch):
    """While it writes, while it asks, and while torch is imported."""
    scripted([0, KeyboardInterrupt()])
    code, out, err = write(demo, "--prompt", "abcd=")
    assert code == 130
    assert out.startswith("abcd=a")
    assert "interrupted" in err
    assert err.count("\n") == 1

    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", interrupt)
    assert write(demo)[0] == 130
    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert write(demo)[0] == 130
