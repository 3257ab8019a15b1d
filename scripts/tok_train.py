"""
Train the tokenizer on the training documents, and save it in $NANOCHAT_BASE_DIR/tokenizer.

    python -m scripts.tok_train
    python -m scripts.tok_train --data=notes/ --vocab_size=8192

The validation file is never read for this: a vocabulary fitted to it would flatter every later figure.
"""
import itertools
import time

import torch

from nanochat.common import UserError, get_base_dir, get_dist_info, print0
from nanochat.metrics import finish_stage
from nanochat.configurator import configure, require
from nanochat.dataset import iter_documents
from nanochat.hardware import measure_matmul_flops, preferred_dtype
from nanochat.tokenizer import Tokenizer

data: str = None        # file or folder of text; None: the shards that nanochat.dataset made
vocab_size: int = None  # all tokens, bytes and special ones too. None: 32768 on a GPU, 4096 or 2048 on a CPU, less for little text
max_chars: int = None   # characters to train on. None: 2,000,000,000 on a GPU machine, 50,000,000 on a CPU
superbpe = False        # tokens of several words, learnt in a second pass: a fifth fewer tokens (arXiv 2503.13423)
transition = "0.4"      # share of the vocabulary learnt before that; t80k and t180k are names for 0.4 and 0.9
doc_cap = 10_000        # characters of a document that count; one huge document must not decide the vocabulary
settings = configure(globals())

require(settings, 1, "max_chars", "doc_cap")
if get_dist_info()[1] != 0:
    raise SystemExit(0)  # under torchrun one process trains; the others have nothing to wait for

try:
    share = {"t80k": 0.4, "t180k": 0.9}.get(transition) or float(transition)
except ValueError:
    share = -1.0
if not 0 < share < 1:
    raise UserError(f"transition={transition} is not a share of the vocabulary: use a number between 0 and 1, t80k or t180k")

gpu = torch.cuda.is_available()
max_chars = max_chars or (2_000_000_000 if gpu else 50_000_000)


class TrainingTexts:
    """What there is to train on, as often as somebody iterates."""

    def __iter__(self):
        left = max_chars
        for text in iter_documents("train", data):
            text = text[: min(doc_cap, left)]
            yield text
            left -= len(text)
            if left <= 0:
                return


def default_vocab_size(chars_per_token=256):
    """The usual size, or what leaves every token enough text to be learned from.

    A CPU below 220 GFLOP/s sees so few tokens in its minutes that 4096 of them are not learnt (dev/LOG.md): it takes 2048.
    """
    cpu = torch.device("cpu")
    fast = gpu or measure_matmul_flops(cpu, getattr(torch, preferred_dtype("cpu"))) > 220e9
    usual, chars = 32768 if gpu else 4096 if fast else 2048, 0
    for text in TrainingTexts():
        chars += len(text)
        if chars >= usual * chars_per_token:
            return usual
    return max(chars // chars_per_token, 512)


start = time.time()
vocab_size = vocab_size or default_vocab_size()
tokenizer = Tokenizer.train_from_iterator(TrainingTexts(), vocab_size, share if superbpe else None)
tokenizer.save(get_base_dir() / "tokenizer")

sample = list(itertools.islice(iter_documents("val", data), 300))
n_bytes = sum(len(text.encode("utf-8")) for text in sample)
n_tokens = sum(len(row) for row in tokenizer.encode(sample))
print0(f"{vocab_size} tokens, {n_bytes / n_tokens:.3f} bytes per token on {len(sample)} validation documents")
finish_stage("tok_train", time.time() - start, settings, vocab_size=vocab_size, bytes_per_token=n_bytes / n_tokens)
