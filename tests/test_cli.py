"""The command line: one grammar derived from the fields, and one sentence for whatever is wrong."""

import errno
import os
import sys
from dataclasses import dataclass, fields, replace
from typing import Literal

import pytest

from configs import PRESETS, PrepareConfig, SampleConfig, TrainConfig
from nanoqstar import InputError, cli
from nanoqstar.cli import When, parse, setting, settings


@dataclass(frozen=True, kw_only=True)
class Example:
    """Every kind of field."""

    what: Literal["one", "two"] = setting("one", "which")
    n: int | None = setting(None, "a number", at_least=1, at_most=9)
    x: float = setting(0.5, "another", above=0, below=1)
    flag: bool = setting(False, "yes or no")
    maybe: bool | None = setting(None, "yes, no or neither")
    text: str = setting("a", "as it is")
    path: str | None = setting(None, "not empty", at_least=1)
    escaped: str = setting("b", "with escapes", escapes=True)
    several: tuple[str, ...] = setting((), "again for more", escapes=True)
    extra: int = setting(0, "goes with flag", when=When("a flag", lambda c: c.flag))

    def __post_init__(self):
        cli.check(self)


def test_both_spellings_and_bare_booleans():
    args = ["--n", "8", "--x=0.25", "--flag", "--maybe", "false", "--text", "--n",
            "--escaped=a\\nb"]
    assert parse(Example, args) == {"n": 8, "x": 0.25, "flag": True, "maybe": False, "text": "--n",
                                    "escaped": "a\nb"}
    assert parse(Example, ["--several", "a\\n", "--several=--n", "--n=1"]) == {
        "several": ("a\n", "--n"), "n": 1}
    assert parse(Example, ["--flag", "--n", "none"]) == {"flag": True, "n": None}
    assert parse(Example, ["--maybe", "None", "--flag=false"]) == {"maybe": None, "flag": False}
    assert parse(TrainConfig, ["--max_steps", "100_000"]) == {"max_steps": 100_000}
    assert parse(Example, ["two", "--n", "3"], positional="what") == {"what": "two", "n": 3}


@pytest.mark.parametrize("text", ["a \\neq b", "\\nabla \\tau \\\\ \\n", "none", "true", "",
                                  "--help"])
def test_a_prompt_is_taken_as_it_is(text):
    """LaTeX above all: escapes belong to a field, not to its name."""
    for args in (["--prompt", text], [f"--prompt={text}"]):
        prompt = settings(SampleConfig, args, "").prompt
        assert prompt == (None if text == "none" else text)


@pytest.mark.parametrize(("args", "sentence"), [
    (["--m", "8"], "unknown option --m"),
    (["--fla"], "unknown option --fla; did you mean --flag?"),
    (["--x", "fast"], "--x: expected float, got 'fast'"),
    (["--n", "7.5"], "--n: expected int, got '7.5'"),
    (["--flag=maybe"], "--flag: expected bool, got 'maybe'"),
    (["--n"], "--n: a value is missing"), (["n", "3"], "unexpected argument 'n'"),
    (["-n", "3"], "unexpected argument '-n'"),
    (["--n", "0"], "--n: must be at least 1, got 0"),
    (["--n=10"], "--n: must be at most 9, got 10"),
    (["--x", "0"], "--x: must be greater than 0, got 0.0"),
    (["--x", "1"], "--x: must be less than 1"), (["--x", "nan"], "--x: expected float, got nan"),
    (["--x", "1e999"], "--x: expected float, got inf"), (["--n", "9" * 5000], "--n: expected int"),
    (["--extra", "3"], "--extra is for a flag only: leave it out"),
    (["--extra", str(2**63), "--flag"], "--extra: a smaller integer"),
    (["--path", ""], "--path: must not be empty"),
    (["--several=a", "--several="], "--several: must not be empty"),
    (["--several=a", "--several", "\0"], "--several: '\\x00' holds a NUL"),
    (["--what", "three"], "--what: 'three' is not one of one, two"),
])
def test_refused_options(args, sentence):
    with pytest.raises(InputError) as refused:
        settings(Example, args, "")
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_what_no_command_line_holds_is_refused_in_a_file_too(text):
    with pytest.raises(InputError, match=r"--data: .* holds a NUL, or half of a character"):
        TrainConfig(data=text)
    assert TrainConfig(data="\udcff é").data == "\udcff é"  # a byte that is no UTF-8


def test_what_applies_is_judged_by_the_result():
    assert settings(Example, ["--extra", "3", "--flag"], "").extra == 3
    assert settings(Example, ["--extra", "3"], "", base=Example(flag=True)).extra == 3
    for args, cls in ((["--no_thoughts", "--show_thoughts"], SampleConfig),
                      (["--input", "x", "--dataset_name", "y"], PrepareConfig),
                      (["--model_path", "x", "--hidden_size", "96"], TrainConfig),
                      (["--data", "x", "--fold_operands", "3"], TrainConfig),
                      (["--n_ahead", "0", "--n_passes", "3"], TrainConfig)):
        refused = args[2] if len(args) > 2 else args[1]
        with pytest.raises(InputError, match=f"{refused} is for .* only"):
            settings(cls, args, "")


@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig, PrepareConfig])
def test_help_explains_every_field(cls):
    with pytest.raises(cli.Answer) as help_text:
        settings(cls, ["--seed=0", "--help"] if cls is not PrepareConfig else ["-h"], "usage")
    for f in fields(cls):
        assert f"--{f.name} (" in str(help_text.value)
        assert f.metadata["help"] in str(help_text.value)


def test_help_of_a_preset_lists_what_applies():
    def options(base):
        with pytest.raises(cli.Answer) as text:
            settings(TrainConfig, ["--help"], "usage", base=base)
        return str(text.value)

    tiny, big = options(PRESETS["tiny"].config), options(PRESETS["qwen2_5_3b"].config)
    assert "--fold_operands" in tiny
    assert "--hidden_size" in tiny
    assert "--tokenizer" not in tiny
    assert "--fold_operands" not in big
    assert "--hidden_size" not in big
    assert "--tokenizer" in big
    assert "--n_passes" in big
    assert "--n_passes" not in options(replace(PRESETS["tiny"].config, n_ahead=0))


# ---- what a script's end looks like


def end(monkeypatch, error):
    """(exit code) of a script whose work raises error."""
    def work():
        raise error
    monkeypatch.setattr(sys.modules[__name__], "work", work, raising=False)
    return cli.command([], lambda args: (), f"{__name__}:work")


@pytest.mark.parametrize(("error", "code", "sentence"), [
    (InputError("this is wrong"), 2, "this is wrong"),
    (OSError(errno.ENOSPC, "No space left", "out/x"), 2, "out/x: No space left"),
    (MemoryError(), 2, "the memory is used up"),
    (RuntimeError("CPUAllocator: can't allocate memory: 4"), 2, "the memory is used up"),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 2, "the memory is used up"),
])
def test_whatever_goes_wrong_is_one_sentence(monkeypatch, capsys, error, code, sentence):
    assert end(monkeypatch, error) == code
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}")
    assert said.count("\n") == 1


def test_an_error_is_a_line_that_a_terminal_can_show(monkeypatch, capsys):
    """What it quotes may be anybody's: escape sequences that rewrite the screen, or a megabyte."""
    assert end(monkeypatch, InputError(f"no \x1b[2J\x07 in é{'x' * 10**6}: mend\n it so")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no \ufffd[2J\ufffd in éxxx")
    assert said.endswith("xxx: mend it so\n")
    assert len(said) < 3100


def test_an_end_that_was_asked_for_is_no_error(monkeypatch, capsys):
    assert end(monkeypatch, cli.Interrupted(15, "ended")) == 143
    assert end(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "ended\ninterrupted\n"


def test_a_defect_of_ours_is_a_traceback(monkeypatch):
    with pytest.raises(RuntimeError, match="shape"):
        end(monkeypatch, RuntimeError("shape"))


def test_answers_go_to_stdout(capsys):
    def read(args):
        raise cli.Answer("the help")
    assert cli.command([], read, "nowhere:nothing") == 0
    assert capsys.readouterr().out == "the help\n"


def test_streams_that_are_closed_or_full_are_no_defect(monkeypatch):
    """As `>&-` leaves them; and an exit code is said though its sentence cannot be."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.command(["--help"], lambda a: (settings(Example, a, "usage"),), "x:y") == 0
    assert sys.stdin.read() == "" and sys.stdout.write("x") == 1

    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    assert cli.fail("this is wrong") == 2
    assert cli.say("help") == 0


def test_a_reader_that_leaves_is_no_error():
    """As `| head -1` does."""
    read, write = os.pipe()
    os.close(read)
    kept = os.dup(1)
    os.dup2(write, 1)
    try:
        with open(1, "w", closefd=False) as out, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert cli.command(["--help"], lambda a: (settings(Example, a, "usage"),), "x:y") == 0
    finally:
        os.dup2(kept, 1)
