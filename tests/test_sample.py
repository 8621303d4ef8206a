"""sample.py: what it reads, writes and refuses; once as a user runs it, else in this process."""

import ast
import importlib
import io
import json
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
from nanoqstar.continuation import Continuation
from nanoqstar.files import alone
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
    {}, {"data": "text"}, {"data": "fold", "fold_operands": "x"}, FOLD | {"fold_operands": 10**12},
    FOLD | {"fold_family": []}])
def test_other_models_and_garbled_settings_show_no_lines_of_the_demo(config):
    shown = sample.hint(byte_tokenizer("<|endoftext|>"), config)
    assert "characters" not in shown
    assert "=" not in shown


@pytest.mark.parametrize(("family", "letters"), [("fold", 4), ("chase", 8), ("sum", 8)])
def test_the_lines_shown_are_of_the_models_own_family(family, letters):
    shown = sample.hint(byte_tokenizer("<|endoftext|>"), FOLD | {"fold_family": family})
    prompt = shown.split()[-1]
    assert len(prompt) == letters + 1 and fold.held_out(prompt[:-1])


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


# ---- several samples, stop strings, thoughts of other kinds


def test_samples_of_one_prompt_are_shown_one_after_the_other(demo, write):
    """Each the same however many there are, and the first the one that there is without."""
    args = "--prompt", "abcd=", "--max_new_tokens", "9", "--show_thoughts"
    alone = write(demo, *args)[1]
    three, five = (write(demo, *args, "--n_samples", n)[1][:-1].split("\n---\n") for n in "35")
    assert (len(three), len(set(five))) == (3, 5)
    assert five[:3] == three
    assert alone == three[0] + "\n"
    assert all(x.startswith("abcd=⟨'") and x.count("⟨") <= 9 for x in five)


def test_the_sample_at_hand_is_shown_as_it_is_written(capsys):
    def written():
        a, b = (Continuation(byte_tokenizer(), [0], ()) for _ in range(2))
        for step, (x, y) in enumerate(zip("abc", "xyz")):
            yield [a, b]
            for row, letter in ((a, x), (b, y)):
                if not row.stop:
                    row.add(byte_tokenizer().encode(letter).ids[0])
            if step == 1:
                a.finish("length")
            out = capsys.readouterr().out
            assert out == (">", "a", "b\n---\n>xy")[step]
        b.finish("length")
        yield [a, b]
    sample.show(">", written())
    assert capsys.readouterr().out == "z\n"


def test_a_stop_string_ends_the_text(letters, write, scripted):
    ids = byte_tokenizer().encode("one\n\nQ: two").ids
    for stops, shown in ((["Q:"], "one\n\n"), ([r"\n\n"], "one"), (["x", "wo"], "one\n\nQ: t"),
                         (["zzz", "two more"], "one\n\nQ: two")):
        scripted(ids)
        args = [word for stop in stops for word in ("--stop", stop)]
        assert write(letters, "--prompt", "a", "--max_new_tokens", "11", *args)[1] == f"a{shown}\n"


def test_greedy_thoughts(demo, write):
    """The same for every seed; sampled ones are not. Text is greedy here."""
    args = "--prompt", "abcd=", "--max_new_tokens", "9", "--show_thoughts", "--temperature", "0"
    for temperature, n in (("0", 1), ("3", 2)):
        out = {write(demo, *args, "--thought_temperature", temperature, "--seed", s)[1]
               for s in "12"}
        assert len(out) == n


@pytest.mark.parametrize(("args", "pieces"), [
    (["--prompt", "a", "--n_samples", "0"], ["--n_samples", "at least 1"]),
    (["--prompt", "a", "--stop", ""], ["--stop", "empty"]),
    (["--prompt", "a", "--stop", "a", "--stop="], ["--stop", "empty"]),
    (["--prompt", "a", "--stop", "a\udcff\0"], ["--stop"]),
    (["--prompt", "a", "--thought_temperature", "1e-9"], ["at least 0.001"]),
    (["--prompt", "a", "--no_thoughts", "--thought_temperature", "1"], ["thoughts only"]),
    (["--prompt", "a", "--prompts", "a.txt", "--out", "b.jsonl"], ["--prompt is for one prompt"]),
    (["--prompts", "a.txt"], ["--out FILE.jsonl"]),
    (["--prompts", "a.txt", "--out", "b.txt"], ["--out FILE.jsonl"]),
    (["--prompts", "a.csv", "--out", "b.jsonl"], [".txt", ".jsonl"]),
    (["--prompts", "nowhere.txt", "--out", "b.jsonl"], ["nowhere.txt: No such file"]),
    (["--out", "b.jsonl"], ["--out is for a file of prompts"]),
    (["--prompts", "a.txt", "--out", "b.jsonl", "--n_samples", "2"], ["--n_samples is for"]),
    (["--chat", "--n_samples", "2"], ["--n_samples is for"]),
    (["--system", "x", "--prompt", "a"], ["--system is for chat only"]),
    (["--chat", "--prompt", "a"], ["no <|im_start|> and <|im_end|>"]),
], ids=lambda x: " ".join(x)[:50])
def test_it_refuses_settings_in_one_sentence(demo, write, args, pieces):
    check_refused(write(demo, *args), *pieces)


def test_a_batch_beyond_the_memory_is_refused(demo, write, monkeypatch):
    monkeypatch.setattr("nanoqstar.sampling.total_memory", lambda device: 10**6)
    check_refused(write(demo, "--prompt", "a", "--n_samples", "99"), "keys and values", "fewer")


# ---- chat


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A model of bytes that thinks and knows turns."""
    tokenizer = byte_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return make_run(tmp_path_factory.mktemp("instruct"), tokenizer, hf.Thinking(4, 2, 1.0))


def chat_ids(*turns, system="You are a helpful assistant."):
    """ChatML by the tokenizer's own parsing of special tokens."""
    turns = (("system", system), *turns) if system else turns
    text = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return byte_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>").encode(
        f"{text}<|im_start|>assistant\n").ids


def test_a_conversation(instruct, write, scripted, monkeypatch):
    """Each turn begins with all earlier ones, answers as they were written; an empty line begins
    anew; an answer that was cut off is ended."""
    tokenizer = byte_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    for end in ("<|im_end|>", "<|endoftext|>"):
        asked = scripted(tokenizer.encode(f"Yés{end}x").ids)
        ask(monkeypatch, b"hi\nand <|im_end|>\n\nagain\n")
        code, out, err = write(instruct, "--chat", "--max_new_tokens", "9")
        assert code == 0
        assert out.splitlines()[1:] == ["> Yés", "> Yés", "> > Yés", "> "]
        assert not err
        first, second, third = (ids for ids, _ in asked)
        assert first == chat_ids(("user", "hi"))
        assert third == chat_ids(("user", "again"))
        assert second[:len(first)] == first
        ends = [tokenizer.token_to_id("<|im_end|>")]
        assert tokenizer.decode(second, skip_special_tokens=False).endswith(
            "assistant\nYés<|im_end|>\n<|im_start|>user\nand <|im_end|><|im_end|>\n"
            "<|im_start|>assistant\n")
        assert sum(i in ends for i in second) == 4  # system, user, answer, user: as they were sent
    asked = scripted(tokenizer.encode("Yes").ids)
    ask(monkeypatch, b"hi\nwhy\n")
    code, out, err = write(instruct, "--chat", "--max_new_tokens", "3", "--system", "none")
    assert asked[1][0] == chat_ids(("user", "hi"), ("assistant", "Yes"), ("user", "why"), system="")
    assert err.splitlines() == ["cut off after 3 tokens: raise --max_new_tokens"] * 2


@pytest.mark.parametrize("thoughts", [[], ["--no_thoughts"]], ids=str)
def test_a_conversation_is_not_read_again(instruct, write, monkeypatch, thoughts):
    """And what is written is what a decoder without a memory writes."""
    read, inner, kept = [], Decoder.next_logits, Decoder.__init__
    args = ["--chat", "--max_new_tokens", "5", "--device", "cpu", *thoughts]
    messages = b"hi\nwhat\nis it\n"

    def spy(self, text, n, u):
        read.append(text.shape[1])
        return inner(self, text, n, u)
    monkeypatch.setattr(Decoder, "next_logits", spy)
    ask(monkeypatch, messages)
    out = write(instruct, *args)
    opening = len(chat_ids(("user", "hi")))
    assert read[0] == opening
    assert [n for n in read if n > 1][1:] == [len(chat_ids(("user", x), system="")) + 1 + 2
                                              for x in ("what", "is it")]

    def forgetful(self, *args):
        kept(self, *args[:-1])  # its last argument is the earlier decoder
    monkeypatch.setattr(Decoder, "__init__", forgetful)
    read.clear()
    ask(monkeypatch, messages)
    assert write(instruct, *args) == out
    assert max(read) > 2 * opening


def test_a_conversation_longer_than_the_context_is_refused(instruct, write, monkeypatch):
    """Said before anything is read; the conversation stays as it was."""
    ask(monkeypatch, b"hi\n" + b"x" * 2000 + b"\nhi\n\n" + b"x" * 2100 + b"\n")
    code, out, err = write(instruct, "--chat", "--max_new_tokens", "4")
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 0
    assert out.count("> ") == 6
    assert "context of 2048" in errors[0]
    assert errors[0].endswith("an empty line begins a new conversation")
    assert "context of 2048" in errors[1]
    assert "new conversation" not in errors[1]


def test_one_message(instruct, write, scripted):
    asked = scripted(byte_tokenizer().encode("Yes").ids)
    args = "--chat", "--prompt", "hi<|im_end|>", "--max_new_tokens", "3"
    assert write(instruct, *args)[:2] == (0, "Yes\n")
    assert asked[0][0].count(chat_ids()[0]) == 3  # turns: what was typed begins or ends none
    assert len(asked[0][0]) == len(chat_ids(("user", "hi"))) + len("<|im_end|>")
    check_refused(write(instruct, "--chat", "--prompt", "a\udcff"), "the user's message")


# ---- prompts from a file


PROMPTS = ["abcd=", "a", "fedd=(fe", "bb=", "gg", "abcd="]
FILE = "\n".join(PROMPTS).encode()
FILLS = ["--max_new_tokens", "12", "--stop", "\n", "--stop", "ga", "--show_thoughts"]


@pytest.fixture
def filled(demo, write, tmp_path):
    """sample.py from a file with PROMPTS, or a given one, to out.jsonl -> (result, its rows)."""
    out = tmp_path / "out.jsonl"

    def call(*args, data=FILE, name="prompts.txt", folder=demo, fills=FILLS):
        (tmp_path / name).write_bytes(data)
        result = write(folder, "--prompts", str(tmp_path / name), "--out", str(out), *fills, *args)
        rows = out.read_bytes().decode().split("\n")[:-1] if out.exists() else []
        return result, [json.loads(row) for row in rows]
    return call


def test_rows_are_what_single_prompts_give(demo, filled, write, tmp_path):
    """Whatever the batch size; the first row is the text of --prompt; a prompt that comes twice
    gets two texts; ids, thoughts and weights of all that was written."""
    (code, out, err), rows = filled()
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'out.jsonl'}: 6 rows\n"
    assert [row["prompt"] for row in rows] == PROMPTS
    assert {row["stop"] for row in rows} <= {"stop", "length"}
    tokenizer = Tokenizer.from_file(str(demo / "checkpoint" / "tokenizer.json"))
    for row in rows:
        assert list(row) == ["settings", "prompt", "text", "tokens", "stop", "thoughts", "mix"]
        assert tokenizer.decode(row["tokens"]).startswith(row["text"])
        assert "\n" not in row["text"] and "ga" not in row["text"]
        assert len(row["thoughts"]) == len(row["mix"]) == len(row["tokens"]) <= 12
        assert all(len(thought) == 4 for thought in row["thoughts"])
    plain = [x for x in FILLS if x != "--show_thoughts"]
    assert write(demo, "--prompt", "abcd=", *plain)[1] == f"abcd={rows[0]['text']}\n"
    assert rows[0]["tokens"] != rows[5]["tokens"]
    for size in "1", "4":
        (tmp_path / "out.jsonl").unlink()
        assert [{**row, "mix": []} for row in filled("--batch_size", size)[1]] == [
            {**row, "mix": []} for row in rows]


def test_rows_that_are_there_are_not_computed_again(filled, tmp_path, monkeypatch):
    """A file cut at any byte, as a kill may leave it, is filled to the same file."""
    (code, _, _), rows = filled("--batch_size", "4")
    assert code == 0
    whole, begun, inner = (tmp_path / "out.jsonl").read_bytes(), [], Decoder.begin
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]

    def spy(self, prompts):
        begun.append(len(prompts))
        return inner(self, prompts)
    monkeypatch.setattr(Decoder, "begin", spy)
    for cut in (0, 1, 20, 40, ends[0] - 1, ends[0], ends[0] + 1, ends[2] + 30, ends[4], len(whole)):
        (tmp_path / "out.jsonl").write_bytes(whole[:cut])
        begun.clear()
        (code, out, _), again = filled("--batch_size", "4")
        there = sum(end <= cut for end in ends)
        assert code == 0
        assert sum(begun) == 6 - there
        assert ("of which were there" in out) == (there > 0)
        assert [{**row, "mix": []} for row in again] == [{**row, "mix": []} for row in rows]


def test_an_interrupted_file_goes_on(filled, monkeypatch):
    """Ctrl-C in the second batch: the first batch's rows are there; more prompts may be added."""
    inner, n = Decoder.write, []

    def interrupted(self, *args, **settings):
        n.append(0)
        for step in inner(self, *args, **settings):
            if len(n) == 2:
                raise KeyboardInterrupt
            yield step
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "write", interrupted)
        (code, _, err), rows = filled("--batch_size", "2")
        assert (code, len(rows)) == (130, 2), err
    data = "\n".join([*PROMPTS, "cc="]).encode()
    (code, out, _), rows = filled(data=data)
    assert code == 0
    assert out.endswith("7 rows, 2 of which were there\n")
    assert [row["prompt"] for row in rows] == [*PROMPTS, "cc="]


def test_two_commands_do_not_write_one_file(filled, tmp_path):
    with alone(tmp_path / "out.jsonl"):
        (code, _, err), rows = filled()
    assert (code, rows) == (2, [])
    assert "another process is writing" in err
    assert filled()[0][0] == 0


def test_rows_are_written_as_they_come(filled, tmp_path, monkeypatch):
    """In the prompts' order: not after the last of the batch, and none before an earlier one."""
    sizes, inner = [], Continuation.add

    def spy(self, token, *args):
        inner(self, token, *args)
        out = tmp_path / "out.jsonl"
        sizes.append(out.read_bytes().count(b"\n"))
        n = len(self.tokens)
        if n == {"a": 6, "bb=": 2}.get(prompt_of[id(self)], 4):
            self.finish("length")
    prompt_of, made = {}, Continuation.__init__

    def init(self, tokenizer, prompt, *args):
        made(self, tokenizer, prompt, *args)
        prompt_of[id(self)] = tokenizer.decode(prompt)
    monkeypatch.setattr(Continuation, "__init__", init)
    monkeypatch.setattr(Continuation, "add", spy)
    (code, _, _), rows = filled(fills=[])
    assert code == 0
    assert sorted(set(sizes)) == [0, 1]  # the first after four tokens, all others after the second
    assert [len(row["tokens"]) for row in rows] == [4, 6, 4, 2, 4, 4]


def test_what_files_of_prompts_may_look_like(filled, letters, tmp_path):
    """CRLF, a byte-order mark, blank lines, no newline at the end, line separators inside."""
    expected = ["one ", "tw\u2028o", "thr\x0bee", "\u00e9\r"]
    lines = ["\ufeffone ", "", "tw\u2028o", "  ", "thr\x0bee", "\u00e9\r"]
    quick = ["--max_new_tokens", "1"]
    for ending in ("\r\n", "\n"):
        data = ending.join(lines).encode() + (b"\r\n" if ending == "\r\n" else b"\n")
        (code, _, _), rows = filled(data=data, folder=letters, fills=quick)
        assert code == 0
        assert [row["prompt"] for row in rows] == (
            expected if ending == "\r\n" else [*expected[:3], "\u00e9"])
        (tmp_path / "out.jsonl").unlink()
    rows = [{"prompt": x, "id": 7} for x in ("a\nb", "", "\ud83d\ude00", " ")]
    data = b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, rows)).encode()
    (code, _, _), rows = filled(data=data, name="p.jsonl", folder=letters, fills=quick)
    assert code == 0
    assert [row["prompt"] for row in rows] == ["a\nb", "", "\U0001f600", " "]
    assert all(row.keys() == {"settings", "prompt", "text", "tokens", "stop"} for row in rows)


@pytest.mark.parametrize(("data", "name", "pieces"), [
    (b"abcd=\n\xff", "p.txt", ["p.txt, line 2: holds bytes that are no UTF-8"]),
    ("abcd=".encode("utf-16"), "p.txt", ["line 1: holds bytes that are no UTF-8"]),
    (b"", "p.txt", ["p.txt holds no prompts"]), (b"\n \r\n", "p.jsonl", ["holds no prompts"]),
    (b"abcd=\nxyz", "p.txt", ["line 2: the prompt: the tokenizer cannot encode 'xyz'"]),
    (b"a\n" + b"ab" * 2000, "p.txt", ["line 2: ", "the model's context of 2048"]),
    (b'{"prompt": "a"}\n{"prompt": ""}', "p.jsonl", ["line 2: the prompt is empty"]),
    (b'{"prompt": "a"}\n{"text": "a"}', "p.jsonl", ["line 2: must be an object"]),
    (b'{"prompt": 5}', "p.jsonl", ["line 1: must be an object"]), (b"[]", "p.jsonl", ["object"]),
    (b'{"prompt": "a"', "p.jsonl", ["line 1: is not JSON"]),
    (b"[" * 10**5, "p.jsonl", ["line 1: is not JSON"]),
    (b'{"prompt": "\\ud800"}', "p.jsonl", ["line 1: the prompt holds bytes that are no UTF-8"]),
], ids=lambda x: repr(x)[:30])
def test_a_file_of_prompts_is_refused_before_anything_is_written(filled, tmp_path, data, name,
                                                                 pieces):
    result, _ = filled(data=data, name=name)
    check_refused(result, *pieces)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("change", [
    ["--seed", "1"], ["--max_new_tokens", "13"], ["--temperature", "0.5"], ["--n_ahead", "5"],
    ["--stop", "x"], ["--thought_temperature", "0"], ["--no_thoughts"], ["other prompts"],
    ["fewer prompts"], ["other weights"]], ids=str)
def test_the_rows_of_another_command_are_left_alone(demo, filled, tmp_path, change):
    filled()
    before = (tmp_path / "out.jsonl").read_bytes()
    if change == ["other prompts"]:
        result, _ = filled(data="\n".join(["b", *PROMPTS[1:]]).encode())
    elif change == ["fewer prompts"]:
        result, _ = filled(data="\n".join(PROMPTS[:5]).encode())
    elif change == ["other weights"]:
        model, tokenizer, settings = hf.load_thinker(demo)
        with torch.no_grad():
            model.lm.model.layers[0].mlp.up_proj.weight[3, 2] += 1e-6
        hf.save(tmp_path / "other", model, tokenizer, thinking=settings.thinking, step=3,
                config=settings.config, source=None)
        result, _ = filled(folder=tmp_path / "other")
    else:
        fills = [x for x in FILLS if "--no_thoughts" not in change or x != "--show_thoughts"]
        result, _ = filled(*change, fills=fills)
    sentence = result[2].splitlines()[-1] + "\n"
    check_refused((result[0], "", sentence), "choose another --out")
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [
    b"hello", b"hello\n", b'{"prompt": "abcd=", "text": "x"}\n', b"\n", b'{"settings": "0123',
    b'{"settings": 1}\n', b"[" * 10**5 + b"\n", b"\xff\xfe\n"], ids=lambda x: repr(x)[:30])
def test_a_file_of_somebody_else_is_left_alone(demo, write, tmp_path, content):
    out, prompts = tmp_path / "out.jsonl", tmp_path / "p.txt"
    out.write_bytes(content)
    prompts.write_text("abcd=")
    check_refused(write(demo, "--prompts", str(prompts), "--out", str(out)), "another --out")
    assert out.read_bytes() == content


def test_an_out_file_that_cannot_be(filled, demo, write, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "p.txt").write_text("a")
    for out, piece in ((tmp_path / "folder.jsonl", "not a plain file"),
                       (tmp_path / "no" / "o.jsonl", "No such file"),
                       ("/dev/null.jsonl/x.jsonl", "No")):
        check_refused(write(demo, "--prompts", str(tmp_path / "p.txt"), "--out", str(out)), piece)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    both = str(tmp_path / "p.jsonl")
    check_refused(write(demo, "--prompts", both, "--out", both), "choose another --out")
    assert (tmp_path / "p.jsonl").read_text() == '{"prompt": "a"}\n'


def test_messages_from_a_file(filled, instruct, scripted):
    """Each begins a conversation."""
    asked = scripted([])
    (code, _, _), rows = filled("--chat", "--batch_size", "1", data=b"hi\nwhy", folder=instruct,
                                fills=["--max_new_tokens", "2"])
    assert code == 0
    assert [ids for ids, _ in asked] == [chat_ids(("user", x)) for x in ("hi", "why")]
    assert [row["prompt"] for row in rows] == ["hi", "why"]
