"""Text in and out of a model: ChatML by hand, and what the ids that follow a prompt say."""

from collections.abc import Container, Sequence

from tokenizers import Tokenizer

from nanoqstar import InputError
from nanoqstar.tokenizer import END_OF_TURN, encode

START_OF_TURN = "<|im_start|>"
HALF = "\ufffd"  # what stands for bytes that are no character, or not yet


class ChatML:
    """The turns of a conversation as ids, as Qwen's chat template makes them.

    From then on the tokenizer takes every text as it is: what is spelled like a special token is
    none, so that nobody can end a turn, or begin one, from within. InputError: the tokenizer has
    no tokens for turns.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        start, end = map(tokenizer.token_to_id, (START_OF_TURN, END_OF_TURN))
        if start is None or end is None:
            raise InputError(f"the tokenizer has no {START_OF_TURN} and {END_OF_TURN}: chat is for "
                             "models that know them, such as Qwen's Instruct ones")
        added = tokenizer.get_added_tokens_decoder().values()
        tokenizer.add_special_tokens([token.content for token in added])  # flags them as such
        tokenizer.encode_special_tokens = True
        self.start, self.after = start, [end, *encode(tokenizer, "\n", "a turn's end")]
        self.reply = [start, *encode(tokenizer, "assistant\n", "a turn's beginning")]

    def turn(self, role: str, text: str) -> list[int]:
        """The ids of a turn, `after` at its end. InputError: the tokenizer cannot encode it."""
        ids = encode(self.tokenizer, f"{role}\n{text}", f"the {role}'s message")
        if {self.start, self.after[0]} & set(ids):  # as words of its own, which are not added ones
            raise InputError(f"the {role}'s message holds {START_OF_TURN} or {END_OF_TURN}: leave "
                             "them out")
        return [self.start, *ids, *self.after]

    def ask(self, text: str) -> list[int]:
        """The ids of a user's turn, and of the answer's beginning."""
        return self.turn("user", text) + self.reply


class Continuation:
    """What is written after a prompt: the ids, and their text as soon as nothing can change it.

    Half of a character waits for the other half, and what may become one of `stops` for what comes;
    the text ends before the stop string that is complete first. end_ids end it, too.
    Attributes: `tokens`, all ids; `thoughts`, the text before each that is no end, and `mix`, its
    weight; `text`; `shown`, the text with the thoughts, if they are to be shown; and `stop`, why it
    ended: "end" (one of end_ids), "stop" (one of stops), "length", or "" while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], end_ids: Container[int],
                 stops: Sequence[str] = (), show_thoughts: bool = False) -> None:
        self.tokenizer, self.end_ids, self.stops = tokenizer, end_ids, stops
        self.show_thoughts = show_thoughts
        self.tokens: list[int] = []
        self.thoughts: list[str] = []
        self.mix: list[float] = []
        self.text = self.shown = self.stop = ""
        self.held = ""  # what may be the beginning of a stop string
        # the ids not told yet, and before them, as a token may read otherwise where a text begins,
        # n_old that are
        self.context, self.n_old = list(prompt), len(prompt)
        self.n_said = len(self.decode(prompt))  # characters of the context that are told

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def add(self, token: int, thought: Sequence[int] = (), mix: float = 0.0) -> None:
        """One id more, and the thought before it."""
        self.tokens.append(token)
        if token in self.end_ids:
            return self.finish("end")
        if self.show_thoughts:
            self.thoughts.append(self.decode(thought))
            self.mix.append(mix)
            self.shown += f"⟨{self.thoughts[-1]!r:.60} {mix:+.2f}⟩"
        self.context.append(token)
        text = self.decode(self.context)
        whole = text.rstrip(HALF)
        self.say(text[self.n_said:len(whole)])
        self.n_said = max(self.n_said, len(whole))
        if whole == text:  # what is new is context enough: a text of any length is no dearer
            self.context = self.context[self.n_old:]
            self.n_old, self.n_said = len(self.context), len(self.decode(self.context))

    def say(self, piece: str) -> None:
        """A piece of text, up to a stop string; where it may end in the beginning of one, later."""
        held = self.held + piece
        found = [(at + len(s), at) for s in self.stops if (at := held.find(s)) >= 0]
        if found:
            self.stop, n_ready, held = "stop", min(found)[1], held[:min(found)[1]]
        else:
            n_ready = len(held) - max((n for s in self.stops for n in range(1, len(s))
                                       if held.endswith(s[:n])), default=0)
        ready, self.held = held[:n_ready], held[n_ready:]
        self.text += ready
        self.shown += ready

    def finish(self, why: str) -> None:
        """No more ids come: all that waited is said."""
        self.say(self.decode(self.context)[self.n_said:])
        self.stop = self.stop or why
        self.text += self.held
        self.shown += self.held
        self.held = ""
