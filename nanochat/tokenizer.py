"""
Text to token ids and back, and conversations to the ids that a model trains on.

    # once, with the Rust trainer (scripts/tok_train.py); saved as three text files
    tokenizer = Tokenizer.train_from_iterator(texts, vocab_size=4096)
    tokenizer.save(directory)

    # from then on
    tokenizer = get_tokenizer()

A byte-level BPE: every byte is a token, so every string has an encoding. Training and encoding are
done by `rustbpe`. The pattern that splits text first is the trainer's, and is saved with the ranks:
tiktoken with the two gives the same ids, and so does Hugging Face's `tokenizers` with the third
file.

Special tokens cannot be written. `encode` treats all text as ordinary text, also text that reads
"<|bos|>"; control ids come from the renderers below and from nowhere else.
"""

import base64
import binascii
import codecs
import hashlib
import json
import re

import numpy as np

from nanochat.common import UserError, atomic_write, get_base_dir, print0
from nanochat.conversation import as_parts, check_conversation

# Their ids follow the mergeable ranks, in this order.
SPECIAL_TOKENS = (
    "<|bos|>",              # begins every document and every conversation
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",   # an expression from the assistant to the Python tool
    "<|output_start|>", "<|output_end|>",   # the tool's reply
    "<|system_start|>", "<|system_end|>",
    "<|mask|>",             # reserved for the diffusion objective
)

# Parts of an assistant's message that stand between a pair of control tokens; "text" stands bare.
PART_TOKENS = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}

# Names from the paper on SuperBPE (arXiv 2503.13423), whose vocabularies have 200,000 tokens: the
# share of them that is learnt before tokens may hold several words.
TRANSITIONS = {"t80k": 0.4, "t180k": 0.9}

RANKS_FILE = "ranks.tiktoken"   # one line per token: its bytes in base64, a space, its rank
HF_FILE = "tokenizer.json"      # the same for Hugging Face's `tokenizers`; we never read it
META_FILE = "meta.json"         # written last: pattern, special tokens, and the hash of the ranks

# How text is kept from becoming control tokens in runtimes that look for these in a rendered chat:
# their chat template writes ESCAPE into the text (chat_template.jinja), and a normalizer, which
# acts behind that search, takes it out. The character is one that Unicode leaves to programs and
# never assigns; text that has it is escaped as well, so that nothing is lost.
ESCAPE = "\ufdd0"
UNESCAPE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Replace", "pattern": {"String": f"<{ESCAPE}|"}, "content": "<|"},
        {"type": "Replace", "pattern": {"String": ESCAPE + ESCAPE}, "content": ESCAPE},
    ],
}


def byte_spelling():
    """{byte: character} as GPT-2 wrote bytes into text.

    Bytes that print in Latin-1 are themselves, the others are the characters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return spelling


def one_digit_pattern(pattern=None):
    """The pattern by which text is split, with numbers cut into single digits.

    pattern: one that cuts them into pairs; None: ours.
    """
    if pattern is None:
        import rustbpe  # here, as below
        pattern = rustbpe.Tokenizer().get_pattern()
    return pattern.replace(r"\p{N}{1,2}", r"\p{N}")


def read_transition(transition):
    """The share of the vocabulary that is learnt within words, a float between 0 and 1.

    transition: a name in TRANSITIONS, or a number in words. UserError for anything else.
    """
    try:
        share = TRANSITIONS.get(transition) or float(transition)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UserError(
            f"transition={transition} is not a share of the vocabulary: "
            "use a number between 0 and 1, t80k or t180k"
        )
    return share


class Tokenizer:
    """Immutable: made by `train_from_iterator` or `load`."""

    def __init__(self, ranks, pattern=None, special_tokens=SPECIAL_TOKENS):
        """ranks: list of bytes, the token of rank i at index i.

        pattern: the regular expression that splits text; None: ours. UserError, with the reason of
        rustbpe, when the ranks are not a vocabulary.
        """
        import rustbpe  # here, so that a benchmark runs where the package is not installed
        self.pattern = pattern or rustbpe.Tokenizer().get_pattern()
        self._specials = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self._special_names = {i: name for name, i in self._specials.items()}
        self._bytes = list(ranks) + [b""] * len(special_tokens)
        try:
            self._bpe = rustbpe.Tokenizer.from_tokens(list(ranks), self.pattern)
        except ValueError as error:
            raise UserError(f"not a vocabulary: {error}") from None

    # ------------------------------------------------------------------ making, saving, loading

    @classmethod
    def train_from_iterator(
            cls, texts, vocab_size, transition=None, or_fewer=False, pattern=None):
        """
        Trains on an iterable of strings.

        vocab_size: counts everything: 256 bytes, merges and special tokens.
        transition: for SuperBPE (arXiv 2503.13423), the share of the vocabulary that is learnt
        before tokens may hold several words; the texts are then iterated over twice.
        or_fewer: take the tokens that the texts yield where they do not yield vocab_size of them.
        pattern: the regular expression that splits text; None: ours. Not with a transition.

        UserError when the texts do not hold enough different pieces for that many tokens, or hold
        a lone surrogate.
        """
        import rustbpe
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size is {vocab_size}, "
                f"but bytes and special tokens alone are {smallest}: use more"
            )

        merged = vocab_size - len(SPECIAL_TOKENS)
        first_stage = merged if transition is None else max(256, round(transition * merged))
        bpe = rustbpe.Tokenizer()
        try:
            bpe.train_from_iterator(texts, first_stage, pattern)
            if transition is not None:
                bpe.train_superwords(texts, merged)
        except UnicodeEncodeError as error:
            raise UserError(
                f"the training text is not valid Unicode ({error}): remove lone surrogates"
            ) from None

        ranks = [token for token, _ in bpe.get_mergeable_ranks()]
        yielded = len(ranks) + len(SPECIAL_TOKENS)
        if yielded < vocab_size and not or_fewer:
            raise UserError(
                f"the data yields a vocabulary of {yielded}, {vocab_size} was asked for: "
                f"use --vocab_size={yielded} or less, or give more text"
            )
        return cls(ranks, bpe.get_pattern())

    def save(self, directory):
        """Writes the text files into `directory` (a Path).

        The next load notices a save that was interrupted.
        """
        directory.mkdir(parents=True, exist_ok=True)
        ranks = self._ranks_text()
        hugging_face = json.dumps(self.hugging_face(), ensure_ascii=False)
        atomic_write(directory / RANKS_FILE, ranks)
        atomic_write(directory / HF_FILE, hugging_face + "\n")
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
        meta_path, ranks_path = directory / META_FILE, directory / RANKS_FILE

        # 1. read both files
        try:
            meta = json.loads(meta_path.read_text(encoding="utf-8"))
            text = ranks_path.read_bytes()
            pattern, specials = meta["pattern"], meta["special_tokens"]
            digest = meta["ranks_sha256"]
            if not isinstance(pattern, str) or not isinstance(specials, list):
                raise TypeError
        except FileNotFoundError:
            raise UserError(f"no tokenizer in {directory}: {remedy}") from None
        except (ValueError, KeyError, TypeError):   # not JSON, not UTF-8, or JSON of another shape
            raise UserError(f"the tokenizer's {meta_path} is damaged: {remedy}") from None

        # 2. compare them with what was saved
        if hashlib.sha256(text).hexdigest() != digest:
            raise UserError(f"the tokenizer's {ranks_path} is damaged: {remedy}")
        if not set(SPECIAL_TOKENS) <= set(specials):
            raise UserError(
                f"the tokenizer in {directory} lacks special tokens of this version: {remedy}"
            )

        # 3. parse the ranks
        try:
            pairs = [line.split(b" ") for line in text.split(b"\n")[:-1]]
            ranks = [base64.b64decode(token, validate=True) for token, _ in pairs]
            in_order = [int(rank) for _, rank in pairs] == list(range(len(pairs)))
        except (ValueError, binascii.Error):
            in_order = False
        if not in_order:
            raise UserError(f"the tokenizer's {ranks_path} is not a list of ranks: {remedy}")
        return cls(ranks, pattern, specials)

    def _ranks(self):
        """The bytes of the ordinary tokens, in the order of their ranks."""
        return self._bytes[:len(self._bytes) - len(self._specials)]

    def _ranks_text(self):
        """The content of RANKS_FILE, as bytes."""
        lines = []
        for rank, token in enumerate(self._ranks()):
            lines.append(base64.b64encode(token) + b" %d\n" % rank)
        return b"".join(lines)

    def hugging_face(self):
        """
        The content of Hugging Face's tokenizer.json, as a dict.

        Ranks name tokens, its merges name pairs: every pair of tokens that spells a third is
        listed, in the order of the ranks. Bytes are spelled as GPT-2 did, one character each.
        """
        spelling = byte_spelling()
        ranks = self._ranks()

        def spell(token):
            return "".join(spelling[byte] for byte in token)

        known = set(ranks)
        merges = []
        for token in ranks:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in known and right in known:
                    merges.append([spell(left), spell(right)])

        added_tokens = []
        for name, token_id in self._specials.items():
            added_tokens.append({
                "id": token_id,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            })

        split = {
            "type": "Split",
            "pattern": {"Regex": self.pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell(token): rank for rank, token in enumerate(ranks)},
            "merges": merges,
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "post_processor": None,
            "added_tokens": added_tokens,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": byte_level,
            "model": model,
        }

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
        """Length of each token in raw bytes, by id; 0 for special tokens.

        Never measured on `str`: half of a character would decode to U+FFFD and count three bytes.
        """
        return [len(token) for token in self._bytes]

    # ------------------------------------------------------------------ text <-> ids

    def encode(self, text, prepend=None, append=None, num_threads=2):
        """
        Ids of a string, or a list of ids for each of a list of strings.

        All text is ordinary text. prepend, append: an id to put before and after each text.
        A list is encoded in num_threads threads. UserError for lone surrogates, which UTF-8 lacks.
        """
        texts = [text] if isinstance(text, str) else text
        ids, lengths = self.encode_to_numpy(texts, prepend, num_threads)
        end_ids = [] if append is None else [append]
        encoded, start = [], 0
        for length in lengths:
            encoded.append(ids[start:start + length].tolist() + end_ids)
            start += length
        return encoded[0] if isinstance(text, str) else encoded

    def encode_to_numpy(self, texts, prepend=None, num_threads=2):
        """The ids of N texts one after another, and how many each text has.

        Returns (array of uint32, list of N lengths). Arguments and errors are those of encode.
        """
        try:
            ids, lengths = self._bpe.encode_batch(texts, num_threads, prepend)
        except UnicodeEncodeError as error:
            character = f"U+{ord(error.object[error.start]):04X}"
            raise UserError(
                f"character {error.start} of the text is a lone surrogate ({character}): remove it"
            ) from None
        return np.frombuffer(ids, dtype=np.uint32), lengths

    def decode(self, ids):
        """Text of the ordinary tokens.

        Special tokens have no text; bytes that are not UTF-8 become U+FFFD.
        """
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    # ------------------------------------------------------------------ conversations <-> ids

    def render_conversation(self, conversation, max_tokens=None):
        """
        {"messages": [{"role": "user", "content": "2+2?"},
                      {"role": "assistant", "content": [{"type": "python", "text": "2+2"},
                                                        {"type": "python_output", "text": "4"},
                                                        {"type": "text", "text": "It is 4."}]}]}
        becomes
        <|bos|><|user_start|>2+2?<|user_end|>
        <|assistant_start|><|python_start|>2+2<|python_end|>
        <|output_start|>4<|output_end|>It is 4.<|assistant_end|>

        Returns (ids, mask), two lists of the same length, cut to max_tokens. mask is 1 where the
        assistant has to produce the token itself: its text, its Python with both markers, and
        <|assistant_end|>. <|assistant_start|> is given to it, so 0, as are the tool's reply with
        its markers and all that others wrote.

        Content is a string or a list of parts; only the assistant's may hold parts other than text.
        One system message may come first, then user and assistant take turns. UserError otherwise.
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

    def render_for_completion(self, conversation, continue_final_message=False):
        """Ids of a conversation up to its last user message, and <|assistant_start|>.

        This is the prompt that the model continues with its answer. A trailing assistant message
        is dropped; with continue_final_message it stays, without its end, and is what the model
        continues. UserError where no user message is left to answer.
        """
        messages = check_conversation(conversation)
        if continue_final_message and messages[-1]["role"] == "assistant":
            ids, _ = self.render_conversation(conversation)
            return ids[:-1]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if messages[-1]["role"] != "user":
            raise UserError("the conversation has no user message to answer: add one")
        ids, _ = self.render_conversation({"messages": messages})
        return ids + [self.encode_special("<|assistant_start|>")]

    def parse_completion(self, ids):
        """
        The inverse of rendering an assistant message.

        The ids after <|assistant_start|> become a list of parts {"type": "text" | "python" |
        "python_output", "text": str}, up to <|assistant_end|>. Empty parts are dropped.
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
    Text from ids one at a time.

    One character may span several tokens: what is incomplete is held back until the rest arrives,
    so that no half emoji is shown. A U+FFFD that the model really wrote is complete, and comes out
    at once.
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


def tokenizer_folder(data=None):
    """Where the tokenizer that is trained on a data path is saved, a Path.

    $NANOCHAT_BASE_DIR/tokenizer for nanochat's own text (None), tokenizers/TAG for the user's, so
    that text of one kind never overwrites the tokenizer of another.
    """
    from nanochat.dataset import data_tag  # it imports pyarrow, which a chat does without
    tag = data_tag(data) if data is not None else None
    if tag is None:
        return get_base_dir() / "tokenizer"
    return get_base_dir() / "tokenizers" / tag


def get_tokenizer(data=None):
    """The tokenizer of a data path; None: of nanochat's own text.

    Where none was trained on the user's text as it is now, the one of its last state is taken, else
    that of nanochat's own text, and a line says so. UserError where there is none at all.
    """
    folder = tokenizer_folder(data)
    usual = get_base_dir() / "tokenizer"
    if folder == usual or (folder / META_FILE).exists():
        return Tokenizer.load(folder)
    name = re.compile(re.escape(folder.name.rpartition("-")[0]) + "-[0-9a-f]{8}")
    metas = folder.parent.glob(f"*/{META_FILE}")
    of_data = [path for path in metas if name.fullmatch(path.parent.name)]
    if of_data:
        earlier = max(of_data, key=lambda path: path.stat().st_mtime).parent
        print0(f"{data} has changed since its tokenizer was trained: taking {earlier}")
        return Tokenizer.load(earlier)
    if not (usual / META_FILE).exists():
        raise UserError(
            f"no tokenizer for {data}: run `python -m scripts.tok_train --data={data}` first"
        )
    print0(f"no tokenizer was trained on {data} (scripts.tok_train --data): taking {usual}")
    return Tokenizer.load(usual)
