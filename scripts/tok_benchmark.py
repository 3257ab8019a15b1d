"""
The speed of our tokenizer beside others, on the same text, in the same run.

    python -m scripts.tok_benchmark
    python -m scripts.tok_benchmark --data=notes/ --vocab_size=4096

The results are ratios, since machines differ four-fold.
Training: beside the published `rustbpe` wheel, which is fetched into a folder of its own, and
Hugging Face's `tokenizers`. Encoding: beside tiktoken and `tokenizers`, with our vocabulary. Each
figure is the median of `repeats`. Each training runs in a process of its own (the wheel's module
has our name), which also reports its peak memory.
"""
import itertools
import json
import os
import pickle
import statistics
import subprocess
import sys
import time

import tiktoken

from nanochat.common import UserError, get_base_dir, print0
from nanochat.configurator import configure
from nanochat.dataset import open_dataset
from nanochat.metrics import finish_stage
from nanochat.tokenizer import Tokenizer, byte_spelling

data: str = None         # file or folder of text; None: the shards that nanochat.dataset made
megabytes = 70           # of text to train on
encode_megabytes = 10    # of text to encode
vocab_size = 32768       # tokens, the 256 bytes among them
repeats = 5              # of each measurement
threads = 2              # for training, and for the second figure of encoding
settings = configure(globals())

# ----------------------------------------------------------------------------------------------
# The programs that train: each reads the texts, trains, and prints one JSON line. `memory` is by
# how much the process grows at its peak.

PRELUDE = """
import json, pickle, resource, sys, time

texts = pickle.load(open(sys.argv[1], "rb"))
vocab_size, pattern = int(sys.argv[2]), sys.argv[3]
is_linux = sys.platform == "linux"

def peak():
    if not is_linux:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

if is_linux:
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # resets the peak: reading the texts does not count

def report(tokens):
    seconds, memory = time.perf_counter() - begin, peak() - before
    print(json.dumps({"seconds": seconds, "memory": memory, "tokens": tokens()}))
"""
RUSTBPE = PRELUDE + """
import rustbpe

before, begin = peak(), time.perf_counter()
tokenizer = rustbpe.Tokenizer()
tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
report(lambda: [bytes(token).hex() for token, _ in tokenizer.get_mergeable_ranks()])
"""
HUGGING_FACE = PRELUDE + """
import tokenizers as hf

tokenizer = hf.Tokenizer(hf.models.BPE())
tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence([
    hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"),
    hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])
trainer = hf.trainers.BpeTrainer(
    vocab_size=vocab_size,
    show_progress=False,
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
)
before, begin = peak(), time.perf_counter()
tokenizer.train_from_iterator(texts, trainer)
report(lambda: sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id))
"""
PROGRAMS = {"ours": RUSTBPE, "wheel": RUSTBPE, "tokenizers": HUGGING_FACE}


def fetch_wheel():
    """The folder that holds the published wheel, which the first call installs there."""
    folder = get_base_dir() / "rustbpe_wheel"
    if (folder / "rustbpe").exists():
        return folder
    installers = (
        ["uv", "pip", "install", "--python", sys.executable],
        [sys.executable, "-m", "pip", "install"],
    )
    options = ["--quiet", "--no-deps", "--target", str(folder), "rustbpe"]
    for installer in installers:
        try:
            subprocess.run([*installer, *options], check=True)
            return folder
        except (OSError, subprocess.CalledProcessError):
            continue
    raise UserError(
        "the published rustbpe wheel could not be installed: check the network or pip's index"
    )


def utf8_bytes(texts):
    return sum(len(text.encode("utf-8")) for text in texts)


def read_texts(dataset, limit):
    """The first training documents that hold at least `limit` bytes, or all of them."""
    texts = []
    left = limit
    for text in dataset.documents("train"):
        texts.append(text)
        left -= len(text.encode("utf-8"))
        if left <= 0:
            break
    return texts


def train_once(program, path):
    """Train in a process of its own: {"seconds", "memory" in bytes, "tokens"}."""
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
    }
    environment.pop("PYTHONPATH", None)
    if program == "wheel":
        environment["PYTHONPATH"] = str(wheel)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAMS[program], path, str(vocab_size), pattern],
        env=environment,
        cwd=get_base_dir(),
        stdout=subprocess.PIPE,
        text=True,
    )
    if run.returncode != 0:
        raise RuntimeError(f"training with {program} failed")
    return json.loads(run.stdout.splitlines()[-1])


def seconds_of(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def medians(runs, field):
    """{program: median of a field over its runs}."""
    return {name: statistics.median(run[field] for run in some) for name, some in runs.items()}


# 1) what there is to compare
started = time.perf_counter()
wheel = fetch_wheel()
pattern = Tokenizer([bytes([b]) for b in range(256)]).pattern
dataset = open_dataset(data)
trainers = ["ours", "wheel"]
try:
    import tokenizers as hf
    trainers.append("tokenizers")
except ImportError:
    hf = None
    print0("without Hugging Face's tokenizers, which is not installed")

# 2) training; the programs take turns, so that a slow minute hits all of them
texts = read_texts(dataset, megabytes * 1_000_000)
path = get_base_dir() / "tok_benchmark.pickle"  # made and read by us alone
path.write_bytes(pickle.dumps(texts))
print0(
    f"training: {utf8_bytes(texts) / 1e6:.1f} MB, {vocab_size} tokens, {threads} threads, "
    f"{repeats} runs each"
)
runs = {name: [] for name in trainers}
for _, name in itertools.product(range(repeats), trainers):
    run = train_once(name, str(path))
    runs[name].append(run)
    print0(f"  {name:<11} {run['seconds']:6.2f} s  {run['memory'] / 1e6:6.0f} MB")
path.unlink()
train_seconds = medians(runs, "seconds")
train_memory = medians(runs, "memory")

# 3) are the merges the same? The wheel breaks ties by another rule, which may end in a token or two
#    of difference; tokenizers has our rule.
learnt = {name: runs[name][0]["tokens"] for name in trainers}  # in the order of their ranks
if hf:
    byte_of = {character: byte for byte, character in byte_spelling().items()}
    learnt["tokenizers"] = [
        bytes(byte_of[character] for character in token).hex()
        for token in learnt["tokenizers"]
    ]
wheel_differs = len(set(learnt["ours"]) - set(learnt["wheel"]))
merges_identical = learnt["ours"] == learnt["tokenizers"] if hf else wheel_differs == 0
print0(
    f"merges identical to {trainers[-1]}'s: {merges_identical}; "
    f"{wheel_differs} tokens differ from the wheel's"
)

# 4) encoding, with the vocabulary that we have just learnt to make
tokenizer = Tokenizer.train_from_iterator(texts, vocab_size)
ranks = {tokenizer.id_to_bytes(i): i for i in range(tokenizer.get_bos_token_id())}
other = tiktoken.Encoding(
    "ours",
    pat_str=tokenizer.pattern,
    mergeable_ranks=ranks,
    special_tokens={},
)
sample = read_texts(dataset, encode_megabytes * 1_000_000)
sample_bytes = utf8_bytes(sample)
ours_threaded = f"ours, {threads} threads"
encoders = {
    "ours": lambda: tokenizer.encode_to_numpy(sample, num_threads=1),
    "ours, lists": lambda: tokenizer.encode(sample, num_threads=1),
    ours_threaded: lambda: tokenizer.encode_to_numpy(sample, num_threads=threads),
    "tiktoken": lambda: [other.encode_ordinary(text) for text in sample],
}
theirs = [other.encode_ordinary(text) for text in sample]
ids_identical = tokenizer.encode(sample) == theirs
if hf:
    reader = hf.Tokenizer.from_str(json.dumps(tokenizer.hugging_face()))
    encoders["tokenizers"] = lambda: reader.encode_batch(sample)
    ids_identical &= [encoding.ids for encoding in reader.encode_batch(sample)] == theirs

print0(f"encoding: {sample_bytes / 1e6:.1f} MB")
times = {name: [] for name in encoders}
for _, name in itertools.product(range(repeats), encoders):
    times[name].append(seconds_of(encoders[name]))
encode_rate = {name: sample_bytes / statistics.median(some) for name, some in times.items()}
for name, rate in encode_rate.items():
    print0(f"  {name:<16} {rate / 1e6:7.1f} MB/s")

finish_stage(
    "tok_benchmark",
    time.perf_counter() - started,
    settings,
    train_seconds=train_seconds,
    train_memory=train_memory,
    encode_bytes_per_second=encode_rate,
    train_ratio=train_seconds["wheel"] / train_seconds["ours"],
    train_memory_ratio=train_memory["ours"] / train_memory["wheel"],
    encode_ratio=encode_rate["ours"] / encode_rate["tiktoken"],
    encode_two_threads_gain=encode_rate[ours_threaded] / encode_rate["ours"],
    merges_identical=merges_identical,
    wheel_differs=wheel_differs,
    ids_identical=ids_identical,
)
