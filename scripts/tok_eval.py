"""
How far the tokenizer compresses different kinds of text, and whether it gives all of it back.

    python -m scripts.tok_eval
    python -m scripts.tok_eval --data=notes/

Bytes per token by kind: 1.0 is no compression at all. The fixed samples are short, so that their
figures are a hint and the validation documents are the measure. GPT-2's and GPT-4's vocabularies
stand beside it where tiktoken has them in its cache; a SuperBPE vocabulary stands beside a plain
one of the same size, trained for the purpose.
"""
import hashlib
import itertools
import os
import tempfile
import time

import tiktoken

from nanochat.common import get_dist_info, print0
from nanochat.configurator import configure, require
from nanochat.dataset import open_dataset
from nanochat.metrics import finish_stage
from nanochat.tokenizer import Tokenizer, get_tokenizer
from tasks.arithmetic import Arithmetic
from tasks.identity import Identity

data: str = None    # file or folder of text; None: the shards that nanochat.dataset made
documents = 300     # documents to read of each split
settings = configure(globals())
require(settings, 1, "documents")

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
PLAIN_DOCUMENTS = 10_000    # to train the plain vocabulary on, beside a SuperBPE one
LONGEST_SHOWN = 8

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


# 1) the texts, by kind
start = time.time()
tokenizer = get_tokenizer(data)
dataset = open_dataset(data)
kinds = {
    "train": list(itertools.islice(dataset.documents("train"), documents)),
    "val": list(itertools.islice(dataset.documents("val"), documents)),
    "math": task_texts(Arithmetic("test")),
    "chat": task_texts(Identity("test")),
}
for kind, text in SAMPLES.items():
    kinds[kind] = [text]

# 2) every text must come back from its tokens
for kind, texts in kinds.items():
    for text, ids in zip(texts, tokenizer.encode(texts)):
        if tokenizer.decode(ids) != text:
            raise RuntimeError(
                f"text of kind {kind!r} is not the same after encoding and decoding: {text[:60]!r}"
            )

# 3) the vocabularies to compare
tokens = [tokenizer.id_to_bytes(i) for i in range(tokenizer.get_bos_token_id())]
superwords = [token for token in tokens if len(token.split()) > 1]
encoders = {"ours": lambda text: tokenizer.encode(text, num_threads=1)}
if superwords:
    print0("training a plain vocabulary of the same size to compare with")
    texts = itertools.islice(dataset.documents("train"), PLAIN_DOCUMENTS)
    plain = Tokenizer.train_from_iterator(texts, tokenizer.get_vocab_size())
    encoders["plain BPE"] = plain.encode
for name, encoding in REFERENCE_ENCODINGS.items():
    found = cached_encoding(encoding)
    if found:
        encoders[name] = found.encode_ordinary

# 4) bytes per token, a row for each kind
table = {}
header = "".join(f"{name:>12}" for name in encoders)
print0(f"{'kind':<10}{'bytes':>12}{header}{'tokens/word':>14}")
for kind, texts in kinds.items():
    n_bytes = utf8_bytes(texts)
    n_words = sum(len(text.split()) for text in texts)
    n_tokens = {}
    for name, encode in encoders.items():
        n_tokens[name] = sum(len(encode(text)) for text in texts)
    table[kind] = {name: n_bytes / count for name, count in n_tokens.items()}
    figures = "".join(f"{ratio:>12.3f}" for ratio in table[kind].values())
    print0(f"{kind:<10}{n_bytes:>12,}{figures}{n_tokens['ours'] / n_words:>14.2f}")
print0("bytes per token, and our tokens per word")

# 5) the longest tokens, and those of several words
longest = sorted(tokens, key=len, reverse=True)[:LONGEST_SHOWN]
shown = [repr(token.decode("utf-8", errors="replace")) for token in longest]
print0("longest tokens: " + "  ".join(shown))
print0(f"{len(superwords)} of {len(tokens)} tokens hold several words")

# 6) speed
texts = kinds["train"] + kinds["val"]
n_bytes = utf8_bytes(texts)
begin = time.perf_counter()
tokenizer.encode_to_numpy(texts, num_threads=1)
speed = n_bytes / (time.perf_counter() - begin)
print0(f"{speed / 1e6:.0f} MB/s on one thread")

by_kind = {kind: row["ours"] for kind, row in table.items()}
finish_stage(
    "tok_eval",
    time.time() - start,
    settings,
    vocab_size=tokenizer.get_vocab_size(),
    bytes_per_token=by_kind["val"],
    bytes_per_token_by_kind=by_kind,
    beside=table,
    bytes_per_second=speed,
    superwords=len(superwords) / len(tokens),
)
