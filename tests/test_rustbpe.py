"""The BPE trainer against a slow Python twin, Hugging Face's trainer, and the traps it could fall into."""
import itertools
import json
import random
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import regex
import rustbpe
import tiktoken

PATTERN = rustbpe.Tokenizer().get_pattern()

# GPT-2's order: bytes that print as themselves in Latin-1, then the others.
BYTE_ORDER = sorted(range(256), key=lambda b: (not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255), b))


def train(texts, vocab_size, pattern=None):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern)
    return tokenizer


def tokens_of(tokenizer):
    ranks = tokenizer.get_mergeable_ranks()
    assert [rank for _, rank in ranks] == list(range(len(ranks)))
    return [token for token, _ in ranks]


def slow_train(texts, vocab_size):
    """The twin: counts every pair afresh for every merge; of equal counts the smaller pair of ids wins."""
    tokens = [bytes([b]) for b in BYTE_ORDER]
    id_of_byte = {b: i for i, b in enumerate(BYTE_ORDER)}
    words = Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    words = [([id_of_byte[b] for b in word.encode("utf-8")], count) for word, count in words.items()]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:]):
                pairs[pair] += count
        if not pairs:
            break
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in tokens:
            tokens.append(token)
        new = tokens.index(token)
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == pair:
                    ids[i : i + 2] = [new]
                i += 1
    return tokens


def stdlib_text(n_chars):
    """Documents of the standard library, n_chars in all."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")[:n_chars]
        texts += [text[i : i + 6000] for i in range(0, len(text), 6000)]
        n_chars -= len(text)
    return texts


def random_text(rng, length):
    """Every plane and every class of character, so that every alternative of the pattern is met."""
    def char():
        kind = rng.randrange(8)
        if kind < 3:
            return rng.choice("abcdeABE'sS  \t\n\r\n1234.,!_")
        if kind < 6:
            return chr(rng.choice([rng.randrange(0x80, 0x800), rng.randrange(0x800, 0xD800)]))
        return chr(rng.choice([rng.randrange(0xE000, 0x10000), rng.randrange(0x10000, 0x110000)]))
    return "".join(char() for _ in range(length))


def test_equals_slow_twin_on_code():
    texts = stdlib_text(40_000)
    assert tokens_of(train(texts, 400)) == slow_train(texts, 400)


def test_equals_slow_twin_where_counts_tie_and_pairs_overlap():
    rng = random.Random(7)
    for alphabet in ("ab", "aab ", "xyz1 \n", "äé日 a"):
        texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(60))) for _ in range(40)]
        assert tokens_of(train(texts, 380)) == slow_train(texts, 380)


def test_equals_slow_twin_on_random_unicode():
    rng = random.Random(8)
    texts = [random_text(rng, 300) for _ in range(20)]
    assert tokens_of(train(texts, 330)) == slow_train(texts, 330)


def test_equals_hugging_face():
    """5 MB, the vocabulary of the CPU run: the same merges in the same order, and the same ids for every document."""
    hf = pytest.importorskip("tokenizers")
    texts = stdlib_text(5_000_000)
    other = hf.Tokenizer(hf.models.BPE())
    other.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(PATTERN), "isolated"),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    other.train_from_iterator(texts, hf.trainers.BpeTrainer(
        vocab_size=4096, show_progress=False, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
    # Hugging Face spells each byte as a character: itself where it prints, else the next one from U+0100 on.
    spelled = {chr(b): b for b in BYTE_ORDER[:188]} | {chr(256 + i): b for i, b in enumerate(BYTE_ORDER[188:])}
    merges = json.loads(other.to_str())["model"]["merges"]
    tokens = tokens_of(train(texts, 4096))
    assert tokens[256:] == [bytes(spelled[c] for c in left + right) for left, right in merges]

    encoding = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                 special_tokens={})
    for text, encoded in zip(texts, other.encode_batch(texts)):
        assert encoding.encode_ordinary(text) == encoded.ids


def test_first_256_ranks_are_the_bytes_in_gpt2_order():
    assert tokens_of(train(["abc"], 256)) == [bytes([b]) for b in BYTE_ORDER]


def test_encode_equals_tiktoken():
    rng = random.Random(9)
    tokenizer = train(stdlib_text(200_000), 1000)
    ranks = dict(tokenizer.get_mergeable_ranks())
    encoding = tiktoken.Encoding("test", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={})
    for text in stdlib_text(20_000) + [random_text(rng, 200) for _ in range(20)]:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)


def test_order_and_batching_of_documents_do_not_matter():
    texts = stdlib_text(300_000)
    assert tokens_of(train(texts, 600)) == tokens_of(train(reversed(texts), 600))


def test_trap_10_pattern_covers_every_string():
    rng = random.Random(10)
    for _ in range(50):
        text = random_text(rng, 300)
        assert "".join(regex.findall(PATTERN, text)) == text


def test_numbers_split_in_twos_and_other_patterns_are_taken():
    assert regex.findall(PATTERN, "in 12345") == ["in", " ", "12", "34", "5"]
    digits = [token for token in tokens_of(train(["123456789"] * 9, 300)) if token.isdigit()]
    assert {len(token) for token in digits} == {1, 2}
    tokenizer = train(["a b"] * 9, 300, r"[\s\S]+")
    assert tokenizer.get_pattern() == r"[\s\S]+" and tokens_of(tokenizer)[-1] == b"a b"


def test_ends_early_when_all_pieces_are_one_token():
    assert tokens_of(train(["hello hello"], 1000))[-1] == b" hello"
    assert len(tokens_of(train([], 1000))) == 256


@pytest.mark.parametrize("texts, vocab_size, pattern, error", [
    (["a"], 255, None, ValueError),
    (["a"], 300, "(", ValueError),
    ([b"a"], 300, None, TypeError),
    (["a\ud800"], 300, None, UnicodeEncodeError),
])
def test_bad_input(texts, vocab_size, pattern, error):
    with pytest.raises(error):
        train(texts, vocab_size, pattern)


def test_untrained_encode_is_an_error():
    with pytest.raises(ValueError, match="train"):
        rustbpe.Tokenizer().encode("a")


def test_error_in_the_iterator_comes_through():
    def texts():
        yield "a"
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"):
        train(texts(), 300)


def test_trap_12_no_text_is_kept():
    texts = [f"document number {i} " * 20 for i in range(500)]
    before = [sys.getrefcount(text) for text in texts]
    train(texts, 300)
    assert [sys.getrefcount(text) for text in texts] == before


def test_trap_12_gil_is_released():
    """Another thread goes on while a call runs that executes no Python at all."""
    ticks, done = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    texts = stdlib_text(2_000_000)
    before = ticks
    train(texts, 4096)
    during = ticks - before
    done.set()
    thread.join()
    assert during > 10


def interrupted(texts, vocab_size):
    """Trains with a signal on its way whose handler raises KeyboardInterrupt, as Ctrl+C's does."""
    def handler(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        train(texts, vocab_size)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_stops_counting():
    with pytest.raises(KeyboardInterrupt):
        interrupted(itertools.repeat("so many words " * 1000), 300)  # without end, and without Python code


def test_ctrl_c_stops_merging():
    rng = random.Random(11)
    text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(3_000_000))
    with pytest.raises(KeyboardInterrupt):
        interrupted([text], 1_000_000)  # one piece of three million letters: minutes of merging
