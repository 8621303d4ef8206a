"""One command line for every script: its options are the fields of a dataclass.

    --key value, --key=value, and --key alone for a boolean; `none` where a field may be None

Exit codes, the same everywhere: 0 done, 2 wrong input (one sentence on stderr says what is wrong
and how to mend it), 130 and 143 ended by Ctrl-C and SIGTERM. This room imports the standard library
only, so that --help and typos are answered at once; what a script does is imported when its
settings are right.
"""

import dataclasses
import difflib
import importlib
import json
import math
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Literal, NamedTuple, TypeVar

from nanoqstar import InputError

T = TypeVar("T")
WRONG_INPUT = 2
LONGEST = 3000  # characters of an error: names and values in it may be anybody's


class Answer(Exception):
    """The command line asked for a text and nothing else: --help, a list."""


class Interrupted(BaseException):
    """A signal has ended what was going on; the exit code is 128 + its number.

    No Exception, as it may come out of anything: what catches those must not take it for its own.
    """

    def __init__(self, number: int, sentence: str = "interrupted") -> None:
        super().__init__(sentence)
        self.number = number


class When(NamedTuple):
    """For which settings a field means anything."""

    what: str
    holds: Callable[[Any], bool]


def setting(default: Any, meaning: str, *, at_least: float | None = None,
            above: float | None = None, at_most: float | None = None, below: float | None = None,
            escapes: bool = False, when: When | None = None) -> Any:
    """A field of a settings dataclass, checked by `check`.

    at_least, for a text: it must not be empty. escapes: `\\n` on the command line is a newline, so
    that any shell can say it.
    """
    bounds = {"at least": at_least, "greater than": above, "at most": at_most, "less than": below}
    return dataclasses.field(default=default, metadata={
        "help": meaning, "bounds": {k: v for k, v in bounds.items() if v is not None},
        "escapes": escapes, "when": when})


def types_of(f: dataclasses.Field) -> tuple[tuple[type, ...], tuple[str, ...] | None]:
    """(accepted types, choices or None): `X | None` gives X and NoneType, Literal its choices.

    A tuple is one of texts: the option may be given several times.
    """
    if typing.get_origin(f.type) is Literal:
        return (str,), typing.get_args(f.type)
    if typing.get_origin(f.type) is tuple:
        return (tuple,), None
    kind: Any = f.type
    return (typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)), None


def sayable(text: str) -> bool:
    """Whether a command line, or the name of a file, can hold it; what a JSON file says may not."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def check(settings: Any) -> None:
    """InputError for the first field whose value is of a wrong type or out of its bounds."""
    for f in dataclasses.fields(settings):
        value, (accepted, choices) = getattr(settings, f.name), types_of(f)
        if choices and value not in choices:
            guess = nearest(value, choices) if isinstance(value, str) else ""
            raise InputError(f"--{f.name}: {value!r} is not one of {', '.join(choices)}{guess}")
        whole = float in accepted and type(value) is int
        if (type(value) not in accepted and not whole) or (
                type(value) is float and not math.isfinite(value)):
            expected = " or ".join("none" if t is type(None) else t.__name__ for t in accepted)
            raise InputError(f"--{f.name}: expected {expected}, got {value!r}")
        if type(value) is int and not -2**63 <= value < 2**63:
            raise InputError(f"--{f.name}: a smaller integer, please: below 2^63")
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not sayable(text):
                raise InputError(f"--{f.name}: {text!r} holds a NUL, or half of a character")
            if text == "" and (f.metadata["bounds"] or text is not value):
                raise InputError(f"--{f.name}: must not be empty")
        bounds = {} if value is None or isinstance(value, str) else f.metadata["bounds"]
        for bound, limit in bounds.items():
            good = {"at least": value >= limit, "greater than": value > limit,
                    "at most": value <= limit, "less than": value < limit}[bound]
            if not good:
                raise InputError(f"--{f.name}: must be {bound} {limit:,}, got {value}")


def nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def parse_value(f: dataclasses.Field, text: str) -> Any:
    accepted, _ = types_of(f)
    kind = accepted[0]
    if text.lower() == "none" and type(None) in accepted:
        return None
    if kind in (str, tuple):
        text = text.replace("\\n", "\n") if f.metadata["escapes"] else text
        return text if kind is str else (text,)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return {int: int, float: float}[kind](text.replace("_", ""))
    except (KeyError, ValueError):
        raise InputError(f"--{f.name}: expected {kind.__name__}, got {text!r}") from None


def parse(cls: type, args: Iterable[str], positional: str | None = None) -> dict[str, Any]:
    """Command line -> {field: value}; `positional` names the field that a bare first word sets.

    Raises InputError, or Answer("") where --help stands among the options.
    """
    known, values, rest = {f.name: f for f in dataclasses.fields(cls)}, {}, list(args)
    if positional and rest and not rest[0].startswith("-"):
        values[positional] = parse_value(known[positional], rest.pop(0))
    while rest:
        option = rest.pop(0)
        if option in ("--help", "-h"):
            raise Answer
        if not option.startswith("--"):
            raise InputError(f"unexpected argument {option!r}: options look like --max_steps 100")
        name, equals, text = option[2:].partition("=")
        if name not in known or name == positional:
            options = ["--" + k for k in known if k != positional]
            raise InputError(f"unknown option --{name}{nearest('--' + name, options)}")
        f = known[name]
        if not equals:
            words = ("true", "false", "none")
            if bool in types_of(f)[0] and (not rest or rest[0].lower() not in words):
                text = "true"
            elif rest:
                text = rest.pop(0)
            else:
                raise InputError(f"--{name}: a value is missing")
        value = parse_value(f, text)
        values[name] = values.get(name, ()) + value if isinstance(value, tuple) else value
    return values


def settings(cls: type[T], args: Iterable[str], usage: str, positional: str | None = None,
             base: T | None = None) -> T:
    """The settings that a command line asks for, on top of `base` (else the defaults).

    A given field that means nothing under the others is refused. Raises InputError; Answer: help.
    """
    try:
        values = parse(cls, args, positional)
    except Answer:
        raise Answer(help_text(cls, usage, base, positional)) from None
    if base is None:
        required = [f.name for f in dataclasses.fields(cls)  # type: ignore
                    if f.default is dataclasses.MISSING and f.name not in values]
        if required:
            raise InputError(f"{' and '.join(required)} must be given; --help shows how")
    result = cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore
    for f in dataclasses.fields(cls):  # type: ignore
        when = f.metadata["when"]
        if f.name in values and when and not when.holds(result):
            raise InputError(f"--{f.name} is for {when.what} only: leave it out")
    return result


def help_text(cls: type, usage: str, base: Any = None, positional: str | None = None) -> str:
    """Every field, its meaning and default; with a `base`, its values and what applies to it."""
    lines = [usage.strip(), "", "options, as --key value or --key=value:"]
    for f in dataclasses.fields(cls):
        when = f.metadata["when"]
        if base is not None and when and not when.holds(base):
            continue
        accepted, choices = types_of(f)
        names = ("none" if t is type(None) else t.__name__ for t in accepted)
        kind = "|".join(choices) if choices else " or ".join(names)
        kind = kind.replace("tuple", "str, again for more")
        value = f.default if base is None else getattr(base, f.name)
        default = "none" if value in (None, ()) else value
        if isinstance(value, (bool, str)):
            default = json.dumps(value)
        only = f" ({when.what} only)" if base is None and when else ""
        name = f.name if f.name == positional else "--" + f.name
        given = "required" if value is dataclasses.MISSING else f"default {default}"
        lines.append(f"  {name} ({kind}, {given})\n      {f.metadata['help']}{only}")
    return "\n".join(lines)


def command(args: Iterable[str], read: Callable[[list[str]], tuple], target: str) -> int:
    """Runs a script and returns its exit code; whatever goes wrong becomes one sentence on stderr.

    read: command line -> the arguments of the target, or InputError, or Answer.
    target: 'module:function', imported once the command line is right; it may return an exit code.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows another
            stream.reconfigure(errors="replace")
    # threads that wait spin for a moment, then sleep: by the system's default they spin on, and two
    # take ten times as long on a machine whose cores are taken; read when torch is imported
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        arguments = read(list(args))
        module, function = target.split(":")
        code = getattr(importlib.import_module(module), function)(*arguments) or 0
        sys.stdout.flush()
        return code
    except Answer as answer:
        return say(str(answer))
    except InputError as error:
        return fail(str(error))
    except BrokenPipeError:  # nobody reads on, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Interrupted, KeyboardInterrupt) as end:
        say(str(end) or "interrupted", sys.stderr)
        return 128 + getattr(end, "number", signal.SIGINT)
    except OSError as error:
        return fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return fail(OUT_OF_MEMORY)


OUT_OF_MEMORY = ("the memory is used up: lower batch_size (raise grad_accum), n_passes or "
                 "max_length, or set --checkpointing 1")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that host or GPU memory did not suffice."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error))


def say(text: str, stream: Any = None) -> int:
    """A text on stdout, or another stream, whether or not anybody reads it; returns 0."""
    with suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)
        return 0
    with suppress(OSError, AttributeError):  # or Python complains that it cannot flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())
    return 0


def one_line(sentence: str) -> str:
    """As a terminal can show it, whatever names and values it holds."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(sentence.split()))
    if len(line) > LONGEST:  # what is wrong stands first, how to mend it last
        line = f"{line[:LONGEST * 3 // 4]} .. {line[-LONGEST // 4:]}"
    return line


def fail(sentence: str) -> int:
    say(f"error: {one_line(sentence)}", sys.stderr)
    return WRONG_INPUT
