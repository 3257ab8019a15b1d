"""
How far the tokenizer compresses different kinds of text, and whether it gives all of it back.

    python -m scripts.tok_eval
    python -m scripts.tok_eval --data=notes/
    python -m scripts.tok_eval --compare t80k t180k plain
    python -m scripts.tok_eval --compare mine/ theirs/tokenizer.json

Bytes per token by kind: 1.0 is no compression at all. The fixed samples are short, so that their
figures are a hint and the validation documents are the measure. GPT-2's and GPT-4's vocabularies
stand beside it where tiktoken has them in its cache; a SuperBPE vocabulary stands beside a plain
one of the same size, trained for the purpose. --compare puts others in their place: each name is
the folder of a tokenizer of ours, the tokenizer.json of another, or a kind that is trained for the
purpose as well: plain, t80k, t180k or another share of the vocabulary (SuperBPE's transition).
"""
import hashlib
import itertools
import os
import tempfile
import time
from pathlib import Path

import tiktoken

from nanochat.common import UserError, expand_home, get_dist_info, print0
from nanochat.configurator import configure, require
from nanochat.dataset import open_dataset
from nanochat.metrics import finish_stage
from nanochat.tokenizer import Tokenizer, get_tokenizer, read_transition
from nanochat.tokenizer_json import read_tokenizer_json
from tasks.arithmetic import Arithmetic
from tasks.identity import Identity

data: str = None    # file or folder of text; None: the shards that nanochat.dataset made
documents = 300     # documents to read of each split
compare = False     # the tokenizers that the words behind it name, side by side
vocab_size: int = None  # of those that are trained to compare; None: that of the tokenizer here
names = []          # behind --compare
settings = configure(globals(), texts=names)
require(settings, 1, "documents", "vocab_size")

SAMPLES = {
    "prose": (
        "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down "
        "which ships went by. On most nights there were none; he noted the wind instead, and what "
        "he had had for supper."
    ),
    "German": (
        "Der alte Leuchtturmwärter stieg jeden Abend die Treppe hinauf, zündete die Lampe an und "
        "schrieb auf, welche Schiffe vorbeifuhren. Meistens waren es keine; dann notierte er den "
        "Wind."
    ),
    "Chinese": (
        "老灯塔看守人每天晚上爬上楼梯,点亮灯,记下哪些船经过。"
        "大多数夜晚一艘也没有,他就记下风向。"
    ),
    "code": (
        "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
        "    return total / len(values) if values else None\n"
    ),
    "numbers": "3.14159 26535 1999-12-31 4,096 + 512 = 4,608; 17 * 23 = 391; 0x7fff 1e-8 100% 42",
    "emoji": "👩‍🚀🚀 🎉🥳 ❤️ 🇨🇦 👍🏽 ¯\\_(ツ)_/¯",
}
REFERENCE_ENCODINGS = {"GPT-2": "r50k_base", "GPT-4": "cl100k_base"}
TRAINING_DOCUMENTS = 10_000    # of the vocabularies that are trained to compare with
LONGEST_SHOWN = 8

if bool(names) != compare:
    raise UserError(
        "--compare takes the tokenizers as words, and no other setting does: --compare t80k t180k")
if get_dist_info()[1] != 0:
    raise SystemExit(0)  # under torchrun one process measures


def cached_encoding(name):
    """tiktoken's encoding of that name, or None where it would have to be downloaded."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    if not cache:
        cache = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    cached = os.path.join(cache, hashlib.sha1(url.encode()).hexdigest())
    return tiktoken.get_encoding(name) if os.path.exists(cached) else None


def message_text(message):
    """All of a message's text, the tool's calls and outputs included."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def task_texts(task, count=200):
    """The texts of all messages in the first conversations of a task."""
    conversations = [task[i] for i in range(min(count, len(task)))]
    return [message_text(message) for talk in conversations for message in talk["messages"]]


def utf8_bytes(texts):
    return sum(len(text.encode("utf-8")) for text in texts)


def trained(kind):
    """The Tokenizer of a kind, "plain" or a transition, trained on the first documents."""
    share = None if kind == "plain" else read_transition(kind)
    size = vocab_size or get_tokenizer(data).get_vocab_size()
    print0(f"training a vocabulary of {size} tokens to compare with: {kind}")
    texts = list(itertools.islice(dataset.documents("train"), TRAINING_DOCUMENTS))
    return Tokenizer.train_from_iterator(texts, size, share)


def read_named(name):
    """The Tokenizer that a word behind --compare names, None for a kind that is to be trained."""
    path = Path(expand_home(name, "write the whole path"))
    if path.is_dir():
        return Tokenizer.load(path)
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    try:
        if name != "plain":
            read_transition(name)
    except UserError as error:
        raise UserError(
            f"{name} is no folder of a tokenizer and no tokenizer.json: {error}") from None
    return None


def ordinary_tokens(tokenizer):
    """The bytes of its tokens but for the special ones, a list."""
    return [tokenizer.id_to_bytes(i) for i in range(tokenizer.get_bos_token_id())]


def superword_share(tokenizer):
    """The share of the tokens that hold several words."""
    tokens = ordinary_tokens(tokenizer)
    return sum(len(token.split()) > 1 for token in tokens) / len(tokens)


# 1) the texts, by kind, and the tokenizers
start = time.time()
dataset = open_dataset(data)
if compare:
    named = {name: read_named(name) for name in names}  # all of them, before one is trained
    tokenizers = {name: read or trained(name) for name, read in named.items()}
else:
    tokenizers = {"ours": get_tokenizer(data)}
first, tokenizer = next(iter(tokenizers.items()))
if not compare and superword_share(tokenizer):
    vocab_size = tokenizer.get_vocab_size()
    tokenizers["plain BPE"] = trained("plain")
kinds = {
    "train": list(itertools.islice(dataset.documents("train"), documents)),
    "val": list(itertools.islice(dataset.documents("val"), documents)),
    "math": task_texts(Arithmetic("test")),
    "chat": task_texts(Identity("test")),
}
for kind, text in SAMPLES.items():
    kinds[kind] = [text]

# 2) every text must come back from its tokens
n_tokens = {name: {} for name in tokenizers}
for name, kind in itertools.product(tokenizers, kinds):
    encoded = tokenizers[name].encode(kinds[kind])
    n_tokens[name][kind] = sum(len(ids) for ids in encoded)
    for text, ids in zip(kinds[kind], encoded):
        if tokenizers[name].decode(ids) != text:
            raise RuntimeError(
                f"text of kind {kind!r} is not the same after encoding and decoding with {name}: "
                f"{text[:60]!r}"
            )
for name, encoding in REFERENCE_ENCODINGS.items():
    found = cached_encoding(encoding)
    if found:
        n_tokens[name] = {
            kind: sum(map(len, found.encode_ordinary_batch(texts)))
            for kind, texts in kinds.items()
        }

# 3) bytes per token, a row for each kind
table = {}
width = max(12, *(len(name) + 2 for name in n_tokens))
header = "".join(f"{name:>{width}}" for name in n_tokens)
print0(f"{'kind':<10}{'bytes':>12}{header}{'tokens/word':>14}")
for kind, texts in kinds.items():
    n_bytes = utf8_bytes(texts)
    n_words = sum(len(text.split()) for text in texts)
    table[kind] = {name: n_bytes / counts[kind] for name, counts in n_tokens.items()}
    figures = "".join(f"{ratio:>{width}.3f}" for ratio in table[kind].values())
    print0(f"{kind:<10}{n_bytes:>12,}{figures}{n_tokens[first][kind] / n_words:>14.2f}")
print0(f"bytes per token, and the tokens per word of {first}")

# 4) the vocabularies, and what each saves on unseen documents
compared = {}
for name, each in tokenizers.items():
    compared[name] = {
        "vocab_size": each.get_vocab_size(),
        "bytes_per_token": table["val"][name],
        "superwords": superword_share(each),
        "tokens_saved": 1 - n_tokens[name]["val"] / n_tokens[first]["val"],
        "characters_per_token": sum(map(len, kinds["val"])) / n_tokens[name]["val"],
    }
    saved = 100 * compared[name]["tokens_saved"]
    difference = f"{abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'}"
    print0(
        f"{name}: {each.get_vocab_size():,} tokens, {100 * compared[name]['superwords']:.1f} % of "
        f"them hold several words; the validation documents take {difference} tokens than with "
        f"{first}")
longest = sorted(ordinary_tokens(tokenizer), key=len, reverse=True)[:LONGEST_SHOWN]
shown = [repr(token.decode("utf-8", errors="replace")) for token in longest]
print0(f"longest tokens of {first}: " + "  ".join(shown))

# 5) speed
texts = kinds["train"] + kinds["val"]
n_bytes = utf8_bytes(texts)
begin = time.perf_counter()
tokenizer.encode_to_numpy(texts, num_threads=1)
speed = n_bytes / (time.perf_counter() - begin)
print0(f"{first}: {speed / 1e6:.0f} MB/s on one thread")

by_kind = {kind: row[first] for kind, row in table.items()}
finish_stage(
    "tok_eval",
    time.time() - start,
    settings,
    vocab_size=tokenizer.get_vocab_size(),
    bytes_per_token=by_kind["val"],
    bytes_per_token_by_kind=by_kind,
    beside=table,
    compared=compared,
    bytes_per_second=speed,
    superwords=compared[first]["superwords"],
)
