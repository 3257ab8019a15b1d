"""Continue a text: what a base model does, which has read texts and no conversations.

    print_continuation(engine, tokenizer, "My name is", max_tokens=50, temperature=0.8)

A text begins with <|bos|>, as each document did in training. The end of a text that is longer
than the context is continued, without <|bos|>: pieces of documents were seen in training as well.
"""
import re

from nanochat.conversation import prompt_room
from nanochat.sequence_text import begun_stop

# Control characters, which are removed: what a model writes must not steer the terminal.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text):
    """The text without the control characters that a terminal would obey."""
    return CONTROL.sub("", text)


def print_stream(stream):
    """Print the pieces of an engine's Stream as they come, without a line break behind the last.

    Returns their text. Ctrl+C ends it early, which is said.
    """
    text = ""
    try:
        for piece in stream:
            print(printable(piece), end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" (stopped)", end="", flush=True)
    return text


def fit_text(tokenizer, text, max_tokens):
    """Ids of a text that is to be continued; of a longer one the last max_tokens.

    UserError for lone surrogates, which UTF-8 lacks.
    """
    ids = tokenizer.encode(text, prepend=tokenizer.get_bos_token_id())
    return ids[-max_tokens:]


def print_continuation(engine, tokenizer, text, max_tokens, **sampling):
    """Print a text and, as it comes, what the model continues it with.

    max_tokens: the longest continuation, of which half the context is kept free. sampling:
    temperature, top_k and seed, as of engine.Sequence.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a character becomes "?"
    ids = fit_text(tokenizer, text, prompt_room(engine.max_seq_len, max_tokens))
    print(printable(text), end="", flush=True)
    continuation = print_stream(engine.stream(ids, max_new_tokens=max_tokens, **sampling))
    print(flush=True)
    return continuation


# ------------------------------------------------------------------------------------------------
# texts at which a continuation ends

class UntilStop:
    """The pieces of a Stream up to the first of some stop texts, which is left out.

    What may be the beginning of a stop text is held back until it is known to be none. Has the
    attributes of a Stream.
    """

    def __init__(self, stream, stops):
        self.finish_reason = None
        self._stream = stream
        self._stops = stops

    @property
    def prompt_tokens(self):
        return self._stream.prompt_tokens

    @property
    def completion_tokens(self):
        return self._stream.completion_tokens

    def __iter__(self):
        held = ""
        for piece in self._stream:
            held += piece
            places = [held.find(stop) for stop in self._stops if stop in held]
            if places:
                self.finish_reason = "stop"
                yield held[:min(places)]
                return      # leaving the loop retires the sequence
            shown = len(held) - begun_stop(held, self._stops)
            yield held[:shown]
            held = held[shown:]
        self.finish_reason = self._stream.finish_reason
        yield held
