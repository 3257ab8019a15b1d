"""
Train the tokenizer on the training documents, and save it in $NANOCHAT_BASE_DIR/tokenizer, or for
the user's own text in $NANOCHAT_BASE_DIR/tokenizers.

    python -m scripts.tok_train
    python -m scripts.tok_train --data=notes/ --vocab_size=8192
    python -m scripts.tok_train --digits=1      # for a model that llama.cpp shall serve
    python -m scripts.tok_train --tokenizer=t80k/tokenizer.json     # one that others trained

The validation split is never read for this: a vocabulary fitted to it would flatter every later
figure.
"""
import itertools
import time
from pathlib import Path

import torch

from nanochat.checkpoint_manager import hand_out_tokenizer
from nanochat.common import UserError, expand_home, get_dist_info, print0
from nanochat.configurator import configure, require
from nanochat.dataset import open_dataset
from nanochat.hardware import measure_matmul_flops, preferred_dtype
from nanochat.metrics import finish_stage
from nanochat.textfiles import split_document
from nanochat.tokenizer import (
    Tokenizer,
    one_digit_pattern,
    read_transition,
    tokenizer_folder,
)
from nanochat.tokenizer_json import read_tokenizer_json

data: str = None        # file or folder of text; None: the shards that nanochat.dataset made
vocab_size: int = None  # all tokens; None: 65536 (GPU), 4096 or 2048 (CPU), less for little text
max_chars: int = None   # characters to train on; None: 2e9 on a GPU machine, 50,000,000 on a CPU
tokenizer: str = None   # a tokenizer.json of Hugging Face to read in place of training one
superbpe = False        # tokens of several words, learnt in a second pass (arXiv 2503.13423)
transition: str = None  # share of tokens learnt before that: 0.9, or t180k for it. None: 0.4
digits = 2              # of a number that a token may hold: 2, or 1 as llama.cpp reads numbers
doc_cap: int = None     # characters of each document that count; None: 10000, or all of little text
settings = configure(globals())

# Tokens of the default vocabulary, bytes and special tokens included. With 65,536 of them, depth 20
# has the documented 561 M parameters. A slow CPU sees so few tokens in its minutes that 4,096 of
# them are not learnt (dev/LOG.md).
GPU_VOCAB_SIZE = 65_536
CPU_VOCAB_SIZE = 4_096
SLOW_CPU_VOCAB_SIZE = 2_048
SLOW_CPU_FLOPS = 220e9      # a CPU below this many FLOP/s is slow
MIN_VOCAB_SIZE = 512        # for very little text
BYTES_PER_TOKEN = 96        # of training text, of which fewer tokens would learn less (dev/LOG.md)
USUAL_DOC_CAP = 10_000      # so that no huge document dominates

VALIDATION_DOCUMENTS = 300
USUAL_TRANSITION = "0.4"


class TrainingTexts:
    """The texts to train on, capped by doc_cap and max_chars; can be iterated several times.

    doc_cap: characters of each document that count, or None for all of them, in pieces.
    """

    def __init__(self, dataset, max_chars, doc_cap):
        self.dataset = dataset
        self.max_chars = max_chars
        self.doc_cap = doc_cap

    def __iter__(self):
        left = self.max_chars
        for document in self.dataset.documents("train"):
            pieces = [document[:self.doc_cap]] if self.doc_cap else split_document(document)
            for text in pieces:
                text = text[:left]
                yield text
                left -= len(text)
                if left <= 0:
                    return


def usual_vocab_size(is_gpu):
    """The size of the vocabulary where there is enough text."""
    if is_gpu:
        return GPU_VOCAB_SIZE
    dtype = getattr(torch, preferred_dtype("cpu"))
    is_fast = measure_matmul_flops(torch.device("cpu"), dtype) > SLOW_CPU_FLOPS
    return CPU_VOCAB_SIZE if is_fast else SLOW_CPU_VOCAB_SIZE


def fitting_vocab_size(texts, usual):
    """`usual`, or what leaves every token BYTES_PER_TOKEN bytes where there is less text."""
    fitting = count_bytes(texts, usual * BYTES_PER_TOKEN) // BYTES_PER_TOKEN
    return max(min(fitting, usual), MIN_VOCAB_SIZE)


def count_bytes(texts, enough):
    """The number of bytes of texts, which are not read any further once there are enough.

    Bytes, for a character of Chinese says as much as three of English, and has as many bytes.
    """
    count = 0
    for text in texts:
        count += len(text.encode("utf-8"))
        if count >= enough:
            break
    return count


def choose_texts(dataset, vocab_size, max_chars):
    """TrainingTexts of a Dataset, at most max_chars characters, for a vocabulary of this size.

    Documents are capped where that leaves enough text. A few long books are too little otherwise,
    as lines of a .jsonl file; the same books as .txt files are many documents.
    """
    texts = TrainingTexts(dataset, max_chars, doc_cap or USUAL_DOC_CAP)
    enough = min(vocab_size * BYTES_PER_TOKEN, max_chars)
    if doc_cap or count_bytes(texts, enough) >= enough:
        return texts
    return TrainingTexts(dataset, max_chars, None)


def train(dataset):
    """The Tokenizer of a dataset's training documents, of the size that they allow."""
    is_gpu = torch.cuda.is_available()
    most_chars = max_chars or (2_000_000_000 if is_gpu else 50_000_000)
    wanted = vocab_size or usual_vocab_size(is_gpu)
    texts = choose_texts(dataset, wanted, most_chars)
    if not vocab_size:
        wanted = fitting_vocab_size(texts, wanted)
    trained = Tokenizer.train_from_iterator(
        texts,
        wanted,
        share if superbpe else None,
        or_fewer=not vocab_size,
        pattern=one_digit_pattern() if digits == 1 else None,
    )
    if trained.get_vocab_size() < wanted:
        print0(f"the text repeats itself: it yields {trained.get_vocab_size()} tokens, {wanted} "
               "would be usual")
    return trained


# 1) settings
require(settings, 1, "max_chars", "doc_cap")
if get_dist_info()[1] != 0:
    raise SystemExit(0)  # under torchrun one process trains; the others have nothing to wait for
if transition and not superbpe:
    raise UserError(f"transition={transition} is of SuperBPE alone: add --superbpe=1, or leave it "
                    "out for plain BPE")
if digits not in (1, 2):
    raise UserError(f"digits={digits}: a token may hold 1 or 2 digits of a number")
if digits == 1 and (superbpe or tokenizer):
    raise UserError("digits=1 is for plain BPE that is trained here: leave superbpe and tokenizer "
                    "out, or digits")
share = read_transition(transition or USUAL_TRANSITION)
if tokenizer and (superbpe or vocab_size):
    raise UserError(
        f"tokenizer={tokenizer} has a vocabulary: leave vocab_size and superbpe out, or train one")
start = time.time()

# 2) train one on the text, or read what others have trained; and save it
dataset = open_dataset(data)
if tokenizer:
    result = read_tokenizer_json(Path(expand_home(tokenizer, "write the whole path")))
else:
    result = train(dataset)
folder = tokenizer_folder(data)
hand_out_tokenizer(folder)
result.save(folder)

# 3) how far it compresses documents that it has not seen
sample = list(itertools.islice(dataset.documents("val"), VALIDATION_DOCUMENTS))
n_bytes = sum(len(text.encode("utf-8")) for text in sample)
n_tokens = sum(len(ids) for ids in result.encode(sample))
bytes_per_token = n_bytes / n_tokens
print0(
    f"{result.get_vocab_size()} tokens, {bytes_per_token:.3f} bytes per token "
    f"on {len(sample)} validation documents"
)
finish_stage(
    "tok_train",
    time.time() - start,
    settings,
    vocab_size=result.get_vocab_size(),
    bytes_per_token=bytes_per_token,
)
