"""
How far the tokenizer compresses different kinds of text, and whether it gives all of it back.

    python -m scripts.tok_eval
    python -m scripts.tok_eval --data=notes/

Bytes per token by kind: 1.0 is no compression at all. The fixed samples are short, so that their figures are a hint and
the validation documents are the measure.
"""
import itertools
import time

from nanochat.common import finish_stage, get_dist_info, print0
from nanochat.configurator import configure
from nanochat.dataset import iter_documents
from nanochat.tokenizer import get_tokenizer

data: str = None    # file or folder of text; None: the shards that nanochat.dataset made
documents = 300     # documents to read of each split
settings = configure(globals())

SAMPLES = {
    "English": "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down which ships "
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

start = time.time()
tokenizer = get_tokenizer()
kinds = {split: list(itertools.islice(iter_documents(split, data), documents)) for split in ("train", "val")}
kinds |= {kind: [text] for kind, text in SAMPLES.items()}

bytes_per_token = {}
print0(f"{'kind':<10}{'bytes':>12}{'tokens':>12}{'bytes/token':>14}")
for kind, texts in kinds.items():
    rows = tokenizer.encode(texts)
    for text, row in zip(texts, rows):
        if tokenizer.decode(row) != text:
            raise RuntimeError(f"text of kind {kind!r} is not the same after encoding and decoding: {text[:60]!r}")
    n_bytes, n_tokens = sum(len(text.encode("utf-8")) for text in texts), sum(map(len, rows))
    bytes_per_token[kind] = n_bytes / n_tokens
    print0(f"{kind:<10}{n_bytes:>12,}{n_tokens:>12,}{bytes_per_token[kind]:>14.3f}")

finish_stage("tok_eval", time.time() - start, settings, vocab_size=tokenizer.get_vocab_size(),
             bytes_per_token=bytes_per_token["val"], bytes_per_token_by_kind=bytes_per_token)
