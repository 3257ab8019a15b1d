"""
How far the tokenizer compresses different kinds of text, and whether it gives all of it back.

    python -m scripts.tok_eval
    python -m scripts.tok_eval --data=notes/

Bytes per token by kind: 1.0 is no compression at all. The fixed samples are short, so that their figures are a hint and
the validation documents are the measure. GPT-2's and GPT-4's vocabularies stand beside it where tiktoken has them in its
cache; a SuperBPE vocabulary stands beside a plain one of the same size, trained for the purpose.
"""
import hashlib
import itertools
import os
import tempfile
import time

import tiktoken

from nanochat.common import get_dist_info, print0
from nanochat.metrics import finish_stage
from nanochat.configurator import configure, require
from nanochat.dataset import iter_documents
from nanochat.tokenizer import Tokenizer, get_tokenizer
from tasks.arithmetic import Arithmetic
from tasks.identity import Identity

data: str = None    # file or folder of text; None: the shards that nanochat.dataset made
documents = 300     # documents to read of each split
settings = configure(globals())
require(settings, 1, "documents")

SAMPLES = {
    "prose": "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down which ships "
             "went by. On most nights there were none; he noted the wind instead, and what he had had for supper.",
    "German": "Der alte Leuchtturmwärter stieg jeden Abend die Treppe hinauf, zündete die Lampe an und schrieb auf, "
              "welche Schiffe vorbeifuhren. Meistens waren es keine; dann notierte er den Wind.",
    "Chinese": "老灯塔看守人每天晚上爬上楼梯,点亮灯,记下哪些船经过。大多数夜晚一艘也没有,他就记下风向。",
    "code": "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
            "    return total / len(values) if values else None\n",
    "numbers": "3.14159 26535 1999-12-31 4,096 + 512 = 4,608; 17 * 23 = 391; 0x7fff 1e-8 100% 42",
    "emoji": "👩‍🚀🚀 🎉🥳 ❤️ 🇨🇦 👍🏽 ¯\\_(ツ)_/¯",
}

if get_dist_info()[1] != 0:
    raise SystemExit(0)  # under torchrun one process measures


def cached_encoding(name):
    """tiktoken's encoding of that name, or None where it would have to be downloaded."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = cache or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    there = os.path.exists(os.path.join(cache, hashlib.sha1(url.encode()).hexdigest()))
    return tiktoken.get_encoding(name) if there else None


def said(task, count=200):
    """All that is said in the first conversations of a task."""
    messages = [message for i in range(min(count, len(task))) for message in task[i]["messages"]]
    contents = [message["content"] for message in messages]
    return [part if isinstance(part, str) else "".join(p["text"] for p in part) for part in contents]


start = time.time()
tokenizer = get_tokenizer()
kinds = {split: list(itertools.islice(iter_documents(split, data), documents)) for split in ("train", "val")}
kinds |= {"math": said(Arithmetic("test")), "chat": said(Identity("test"))}
kinds |= {kind: [text] for kind, text in SAMPLES.items()}

for kind, texts in kinds.items():
    for text, ids in zip(texts, tokenizer.encode(texts)):
        if tokenizer.decode(ids) != text:
            raise RuntimeError(f"text of kind {kind!r} is not the same after encoding and decoding: {text[:60]!r}")

tokens = [tokenizer.id_to_bytes(i) for i in range(tokenizer.get_bos_token_id())]
superwords = [token for token in tokens if len(token.split()) > 1]
encoders = {"ours": lambda text: tokenizer.encode(text, num_threads=1)}
if superwords:
    print0("training a plain vocabulary of the same size to compare with")
    read = itertools.islice(iter_documents("train", data), 10_000)
    encoders["plain BPE"] = Tokenizer.train_from_iterator(read, tokenizer.get_vocab_size()).encode
for name, encoding in (("GPT-2", "r50k_base"), ("GPT-4", "cl100k_base")):
    if found := cached_encoding(encoding):
        encoders[name] = found.encode_ordinary

table = {}
print0(f"{'kind':<10}{'bytes':>12}" + "".join(f"{name:>12}" for name in encoders) + f"{'tokens/word':>14}")
for kind, texts in kinds.items():
    n_bytes, n_words = (sum(len(f(text)) for text in texts) for f in (lambda t: t.encode("utf-8"), str.split))
    n_tokens = {name: sum(len(encode(text)) for text in texts) for name, encode in encoders.items()}
    table[kind] = {name: n_bytes / n for name, n in n_tokens.items()}
    print0(f"{kind:<10}{n_bytes:>12,}" + "".join(f"{ratio:>12.3f}" for ratio in table[kind].values())
           + f"{n_tokens['ours'] / n_words:>14.2f}")
print0("bytes per token, and our tokens per word")

longest = sorted(tokens, key=len, reverse=True)[:8]
print0("longest tokens: " + "  ".join(repr(token.decode("utf-8", errors="replace")) for token in longest))
print0(f"{len(superwords)} of {len(tokens)} tokens hold several words")
texts = kinds["train"] + kinds["val"]
n_bytes, begin = sum(len(text.encode("utf-8")) for text in texts), time.perf_counter()
tokenizer.encode_to_numpy(texts, num_threads=1)
speed = n_bytes / (time.perf_counter() - begin)
print0(f"{speed / 1e6:.0f} MB/s on one thread")

by_kind = {kind: row["ours"] for kind, row in table.items()}
finish_stage("tok_eval", time.time() - start, settings, vocab_size=tokenizer.get_vocab_size(),
             bytes_per_token=by_kind["val"], bytes_per_token_by_kind=by_kind, beside=table, bytes_per_second=speed,
             superwords=len(superwords) / len(tokens))
