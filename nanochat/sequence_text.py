"""From the tokens of a sequence to the text that a person sees, as the tokens come.

    text = TextOfSequence(tokenizer, sequence, stop=["\\n\\n"])
    while ...:
        engine.step()
        show(text.read())       # what came since the last read, often ""

A character may span several tokens: it is shown when it is complete. A tool call is shown as
`12*7` → 84; of a look-up in the user's own text (retrieval.py) the reply alone. The text ends
before the first of the stop strings, and what may be the beginning of one is held back until it is
known to be none.
"""
from nanochat.conversation import LOOKUP_CALL, SHOWN
from nanochat.tokenizer import StreamDecoder


def is_lookup(call):
    """Whether the text of a Python call asks for the user's own text."""
    return call.strip() == LOOKUP_CALL


def begun_stop(text, stops):
    """How many of the last characters of `text` may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


class TextOfSequence:
    """The text of one sequence. It reads the sequence's tokens, and takes no steps.

    stop            strings before which the text ends
    shows_calls     whether tool calls and their replies are shown; a look-up's reply always is

    is_stopped      whether a stop string was found: then its caller retires the sequence
    finish_reason   None until all text was read, then the sequence's own, or "stop"
    prompt_tokens, completion_tokens    how many tokens the prompt has, and the text so far
    """

    def __init__(self, tokenizer, sequence, stop=(), shows_calls=True):
        self.prompt_tokens = len(sequence.prompt)
        self.completion_tokens = 0
        self.finish_reason = None
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._sequence = sequence
        self._stops = tuple(stop)
        self._held = ""         # what may be the beginning of a stop string
        self._calls = ShownCalls(tokenizer, sequence.may_look_up, shows_calls)

    @property
    def unread(self):
        """How many tokens of the sequence were not read yet."""
        return len(self._sequence.tokens) - self.completion_tokens

    def read(self):
        """The text of all tokens that came since the last read."""
        text = ""
        while self.finish_reason is None and self.unread:
            token = self._sequence.tokens[self.completion_tokens]
            self.completion_tokens += 1
            text += self._until_stop(self._calls.feed(token))
        ended = self._sequence.finish_reason
        if self.finish_reason is None and ended:
            text += self._until_stop(self._calls.flush()) + self._held
            self._held = ""
            self.finish_reason = self.finish_reason or ended
        return text

    def _until_stop(self, piece):
        """The text that can be shown now that `piece` has come, without the stop string."""
        if not self._stops:
            return piece
        text = self._held + piece
        places = [text.find(stop) for stop in self._stops if stop in text]
        if places:
            self.is_stopped, self.finish_reason, self._held = True, "stop", ""
            return text[:min(places)]
        shown = len(text) - begun_stop(text, self._stops)
        self._held = text[shown:]
        return text[:shown]


class ShownCalls:
    """Text from ids one at a time, with the markers of tool calls as a person sees them.

    may_look_up: whether lookup() is answered; then the text of a call is held back until it is
    known whether it is one. shows_calls: as of TextOfSequence.
    """

    def __init__(self, tokenizer, may_look_up, shows_calls):
        self._decoder = StreamDecoder(tokenizer)
        self._markers = {tokenizer.encode_special(name): name for name in SHOWN}
        self._may_look_up = may_look_up
        self._shows_calls = shows_calls
        self._call = None       # the text of a call that may become a look-up, held back
        self._quoting = False   # whether a look-up's reply is being shown
        self._hiding = False    # whether a call or its reply is being left out

    def feed(self, token):
        """The text that is complete with this token, often ""."""
        marker = self._markers.get(token)
        if marker is None:
            return self._placed(self._decoder.feed(token))
        before = self._placed(self._decoder.flush())
        return before + self._shown(marker)

    def flush(self):
        """What is still held back at the end."""
        text = self._placed(self._decoder.flush())
        return (self._call or "") + text if self._shows_calls else text

    def _placed(self, piece):
        """A piece of text where it belongs: shown, held back as a part of a call, or left out."""
        if self._call is not None:
            self._call += piece
            return ""
        return "" if self._hiding else piece

    def _shown(self, marker):
        """How a marker of a tool call is shown."""
        text = SHOWN[marker]
        if marker == "<|python_start|>" and self._may_look_up:
            unfinished, self._call = self._call or "", text
            return self._visible(unfinished)
        if marker == "<|python_end|>" and self._call is not None:
            call, self._call = self._call, None
            self._quoting = is_lookup(call.removeprefix(text))
            return "" if self._quoting else self._visible(call + text)
        if self._call is not None:      # a marker where none belongs
            self._call += text
            return ""
        if marker == "<|output_start|>" and self._quoting:
            return ""
        starts = marker in ("<|python_start|>", "<|output_start|>")
        self._hiding = starts and not self._shows_calls
        return text if self._quoting else self._visible(text)

    def _visible(self, text):
        """The text of a call or of its markers, "" where calls are not shown."""
        return text if self._shows_calls else ""
