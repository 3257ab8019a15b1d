"""
Text to token ids and back, and conversations to the ids that a model trains on.

    tokenizer = Tokenizer.train_from_iterator(texts, vocab_size=4096)   # the Rust trainer, once: scripts/tok_train.py
    tokenizer.save(directory)                                           # two text files, nothing to unpickle
    tokenizer = get_tokenizer()                                         # from then on

A byte-level BPE: every byte is a token, so every string has an encoding. Training is done by `rustbpe`, encoding by
tiktoken. The pattern that splits text first is the trainer's, and travels with the ranks from then on.

Special tokens cannot be written. `encode` treats all text as ordinary text, also text that reads "<|bos|>"; control
ids come from the renderers below and from nowhere else.
"""

import base64
import binascii
import codecs
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import tiktoken

from nanochat.common import UserError, atomic_write, get_base_dir

# Their ids follow the mergeable ranks, in this order.
SPECIAL_TOKENS = (
    "<|bos|>",              # begins every document and every conversation
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",   # an expression that the assistant hands to the Python tool
    "<|output_start|>", "<|output_end|>",   # and the tool's reply
    "<|system_start|>", "<|system_end|>",
    "<|mask|>",             # reserved for the diffusion objective
)

# Types of the parts of an assistant's message; "text" stands bare, the others between a pair of control tokens.
PART_TOKENS = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}

MAX_CHARS = 200_000             # a longer text is encoded in cuts of this many characters
RANKS_FILE = "ranks.tiktoken"   # one line per token: its bytes in base64, a space, its rank
META_FILE = "meta.json"         # written last: the pattern, the special tokens, and the hash of the ranks


class Tokenizer:
    """Immutable: made by `train_from_iterator` or `load`."""

    def __init__(self, ranks, pattern, special_tokens=SPECIAL_TOKENS):
        """ranks: list of bytes, the token of rank i at index i. pattern: the split, a regular expression."""
        self.pattern = pattern
        self._specials = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self._special_names = {i: name for name, i in self._specials.items()}
        self._bytes = list(ranks) + [b""] * len(special_tokens)
        self._encoding = tiktoken.Encoding(
            name="nanochat",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=self._specials,
        )

    # ------------------------------------------------------------------ making, saving, loading

    @classmethod
    def train_from_iterator(cls, texts, vocab_size):
        """
        Trains on an iterable of strings. vocab_size counts everything: 256 bytes, merges and special tokens.
        UserError when the texts do not hold enough different pieces for that many tokens, or hold a lone surrogate.
        """
        import rustbpe  # here, because only training needs the extension module

        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(f"vocab_size is {vocab_size}, but bytes and special tokens alone are {smallest}: use more")
        trainer = rustbpe.Tokenizer()
        try:
            trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS))
        except UnicodeEncodeError as error:
            raise UserError(f"the training text is not valid Unicode ({error}): remove lone surrogates") from None
        ranks = [token for token, _ in trainer.get_mergeable_ranks()]
        yielded = len(ranks) + len(SPECIAL_TOKENS)
        if yielded < vocab_size:
            raise UserError(
                f"the data yields a vocabulary of {yielded}, {vocab_size} was asked for: "
                f"use --vocab_size={yielded} or less, or give more text"
            )
        return cls(ranks, trainer.get_pattern())

    def save(self, directory):
        """Writes the two text files into `directory` (a Path). An interrupted save is noticed by the next load."""
        directory.mkdir(parents=True, exist_ok=True)
        ranks = self._ranks_text()
        atomic_write(directory / RANKS_FILE, ranks)
        meta = {
            "pattern": self.pattern,
            "special_tokens": list(self._specials),
            "ranks_sha256": hashlib.sha256(ranks).hexdigest(),
        }
        atomic_write(directory / META_FILE, json.dumps(meta, indent=1) + "\n")

    @classmethod
    def load(cls, directory):
        """The inverse of `save`. UserError when a file is missing or is not what was saved."""
        remedy = "run `python -m scripts.tok_train`"
        try:
            meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
            text = (directory / RANKS_FILE).read_bytes()
            pattern, specials, digest = meta["pattern"], meta["special_tokens"], meta["ranks_sha256"]
        except FileNotFoundError:
            raise UserError(f"no tokenizer in {directory}: {remedy}") from None
        except (ValueError, KeyError, TypeError):   # not JSON, not UTF-8, or JSON of another shape
            raise UserError(f"the tokenizer's {directory / META_FILE} is damaged: {remedy}") from None
        if hashlib.sha256(text).hexdigest() != digest:
            raise UserError(f"the tokenizer's {directory / RANKS_FILE} is damaged: {remedy}")
        if not set(SPECIAL_TOKENS) <= set(specials):
            raise UserError(f"the tokenizer in {directory} lacks special tokens of this version: {remedy}")
        try:
            pairs = [line.split(b" ") for line in text.split(b"\n")[:-1]]
            ranks = [base64.b64decode(token, validate=True) for token, _ in pairs]
            in_order = [int(rank) for _, rank in pairs] == list(range(len(pairs)))
        except (ValueError, binascii.Error):
            in_order = False
        if not in_order:
            raise UserError(f"the tokenizer's {directory / RANKS_FILE} is not a list of ranks: {remedy}")
        return cls(ranks, pattern, specials)

    def _ranks_text(self):
        ranks = self._bytes[: len(self._bytes) - len(self._specials)]
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))

    @property
    def fingerprint(self):
        """16 hex digits that differ between any two tokenizers; checkpoints record it."""
        rest = json.dumps([self.pattern, list(self._specials)])
        return hashlib.sha256(self._ranks_text() + rest.encode("utf-8")).hexdigest()[:16]

    # ------------------------------------------------------------------ the vocabulary

    def get_vocab_size(self):
        """Bytes, merges and special tokens; never padded (the model pads its own matrices)."""
        return len(self._bytes)

    def get_bos_token_id(self):
        return self._specials["<|bos|>"]

    def encode_special(self, name):
        """Id of a special token, "<|bos|>" say. KeyError for any other name."""
        return self._specials[name]

    def id_to_bytes(self, token_id):
        """The raw bytes of a token; b"" for special tokens. IndexError beyond the vocabulary."""
        return self._bytes[token_id]

    def token_bytes(self):
        """Length of each token in raw bytes, by id; 0 for special tokens. Never measured on `str`: half of a
        character would decode to U+FFFD and count three bytes."""
        return [len(token) for token in self._bytes]

    # ------------------------------------------------------------------ text <-> ids

    def encode(self, text, prepend=None, append=None, num_threads=2):
        """
        Ids of a string, or a list of ids for each of a list of strings (in num_threads threads). All text is ordinary
        text. prepend, append: an id to put before and after each. UserError for lone surrogates, which UTF-8 lacks.
        """
        if isinstance(text, str):
            rows = [self._encode_text(text)]
        else:
            with ThreadPoolExecutor(num_threads) as pool:  # tiktoken releases the GIL
                rows = list(pool.map(self._encode_text, text))
        head = [] if prepend is None else [prepend]
        tail = [] if append is None else [append]
        if head or tail:
            rows = [head + row + tail for row in rows]
        return rows[0] if isinstance(text, str) else rows

    def _encode_text(self, text):
        check_unicode(text)  # tiktoken would replace the surrogate silently
        # A million spaces in a row overflow the stack of tiktoken's regex engine, so that long texts are cut.
        cuts = [text[at : at + MAX_CHARS] for at in range(0, len(text), MAX_CHARS)]
        return [i for cut in cuts for i in self._encoding.encode_ordinary(cut)]

    def decode(self, ids):
        """Text of the ordinary tokens; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    # ------------------------------------------------------------------ conversations <-> ids

    def render_conversation(self, conversation, max_tokens=None):
        """
        {"messages": [{"role": "user", "content": "2+2?"},
                      {"role": "assistant", "content": [{"type": "python", "text": "2+2"},
                                                        {"type": "python_output", "text": "4"},
                                                        {"type": "text", "text": "It is 4."}]}]}
        becomes <|bos|><|user_start|>2+2?<|user_end|><|assistant_start|><|python_start|>2+2<|python_end|>
        <|output_start|>4<|output_end|>It is 4.<|assistant_end|>.

        Returns (ids, mask), two lists of the same length, cut to max_tokens. mask is 1 where the assistant has to
        produce the token itself: its text, its Python and the control tokens around and after them; the tool's reply,
        with its markers, is 0 like everything that others wrote. Content is a string or a list of parts; only the
        assistant's may hold parts other than text. One system message may come first, then user and assistant take
        turns. UserError otherwise.
        """
        messages = check_conversation(conversation)
        ids, mask = [self.get_bos_token_id()], [0]

        def add(tokens, trained):
            ids.extend(tokens)
            mask.extend([int(trained)] * len(tokens))

        for message in messages:
            role = message["role"]
            assistant = role == "assistant"
            add([self._specials[f"<|{role}_start|>"]], False)
            for part in as_parts(message["content"]):
                tokens = self.encode(part["text"])
                if part["type"] in PART_TOKENS:
                    start, end = PART_TOKENS[part["type"]]
                    tokens = [self._specials[start], *tokens, self._specials[end]]
                add(tokens, assistant and part["type"] != "python_output")
            add([self._specials[f"<|{role}_end|>"]], assistant)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation):
        """Ids of a conversation up to its last user message, then <|assistant_start|>: the model goes on from there.
        A trailing assistant message is dropped."""
        messages = check_conversation(conversation)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if messages[-1]["role"] != "user":
            raise UserError("the conversation has no user message to answer: add one")
        ids, _ = self.render_conversation({"messages": messages})
        return ids + [self.encode_special("<|assistant_start|>")]

    def parse_completion(self, ids):
        """
        The inverse of rendering an assistant message: the ids after <|assistant_start|> become a list of parts
        {"type": "text" | "python" | "python_output", "text": str}. Stops at <|assistant_end|>; leaves out empty parts.
        """
        starts = {self._specials[start]: kind for kind, (start, _) in PART_TOKENS.items()}
        ends = {self._specials[end] for _, end in PART_TOKENS.values()}
        parts, kind, run = [], "text", []

        def close():
            if run:
                parts.append({"type": kind, "text": self.decode(run)})
                run.clear()

        for i in ids:
            if i == self._specials["<|assistant_end|>"]:
                break
            if i in starts or i in ends:
                close()
                kind = starts.get(i, "text")
            elif i not in self._special_names:
                run.append(i)
        close()
        return parts


class StreamDecoder:
    """
    Text from ids one at a time. One character may span several tokens: what is incomplete is held back until the rest
    arrives, so that no half emoji is shown. A U+FFFD that the model really wrote is complete and comes out at once.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id):
        """The text that is complete now, often ""; special tokens have none."""
        return self._utf8.decode(self._tokenizer.id_to_bytes(token_id))

    def flush(self):
        """What is still held back at the end of the stream: "" or one U+FFFD."""
        return self._utf8.decode(b"", final=True)


def get_tokenizer():
    """The tokenizer of this base directory."""
    return Tokenizer.load(get_base_dir() / "tokenizer")


def check_unicode(text):
    """UserError when a string holds a lone surrogate, half of a UTF-16 pair that stands for no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        raise UserError(f"character {at} of the text is a lone surrogate (U+{ord(text[at]):04X}): remove it") from None


def as_parts(content):
    """Content of a message as a list of parts: "hi" -> [{"type": "text", "text": "hi"}]."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def check_conversation(conversation):
    """Returns the list of messages of a well-formed conversation; UserError says what is wrong with another."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message')
    expected = ("system", "user")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in expected:
            raise UserError(f"message {i + 1} has the role {role!r} where {' or '.join(expected)} is due")
        expected = ("assistant",) if role == "user" else ("user",)
        check_content(message.get("content"), role, i + 1)
    return messages


def check_content(content, role, number):
    """UserError unless content is a string or a list of parts that this role may send."""
    parts = as_parts(content)
    allowed = ("text", *PART_TOKENS) if role == "assistant" else ("text",)
    if not isinstance(parts, list):
        raise UserError(f"message {number} needs a content: a string or a list of parts")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in allowed or not isinstance(part.get("text"), str):
            raise UserError(f'a part of message {number} ({role}) is not {{"type": {"|".join(allowed)}, "text": str}}')
    if role == "user" and not any(part["text"] for part in parts):
        raise UserError(f"message {number} (user) is empty: write something")
