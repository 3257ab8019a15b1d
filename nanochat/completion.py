"""Continue a text: what a base model does, which has read texts and no conversations.

    print_continuation(engine, tokenizer, "My name is", max_tokens=50, temperature=0.8)

A text begins with <|bos|>, as each document did in training. The end of a text that is longer
than the context is continued, without <|bos|>: pieces of documents were seen in training as well.
"""
import re

from nanochat.conversation import prompt_room

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
