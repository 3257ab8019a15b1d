"""BPE training and encoding against slow reference implementations, Hugging Face and tiktoken."""
import itertools
import json
import os
import random
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import regex
import rustbpe
import tiktoken

PATTERN = rustbpe.Tokenizer().get_pattern()


def prints_as_itself(byte):
    """Whether a byte is a visible character in Latin-1."""
    return 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255


# GPT-2's order: bytes that print as themselves, then the others.
BYTE_ORDER = sorted(range(256), key=lambda byte: (not prints_as_itself(byte), byte))


def train(texts, vocab_size, pattern=None):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern)
    return tokenizer


def tokens_of(tokenizer):
    ranks = tokenizer.get_mergeable_ranks()
    assert [rank for _, rank in ranks] == list(range(len(ranks)))
    return [token for token, _ in ranks]


def slow_train(texts, vocab_size):
    """The reference implementation: counts every pair again for every merge.

    Of equal counts the smaller pair of ids wins.
    """
    tokens = [bytes([b]) for b in BYTE_ORDER]
    id_of_byte = {b: i for i, b in enumerate(BYTE_ORDER)}
    counts = Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    words = [
        ([id_of_byte[b] for b in word.encode("utf-8")], count)
        for word, count in counts.items()
    ]
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


def test_equals_the_reference_implementation_on_code():
    texts = stdlib_text(40_000)
    assert tokens_of(train(texts, 400)) == slow_train(texts, 400)


def test_equals_the_reference_implementation_where_counts_tie_and_pairs_overlap():
    rng = random.Random(7)
    for alphabet in ("ab", "aab ", "xyz1 \n", "äé日 a"):
        texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(60))) for _ in range(40)]
        assert tokens_of(train(texts, 380)) == slow_train(texts, 380)


def test_equals_the_reference_implementation_on_random_unicode():
    rng = random.Random(8)
    texts = [random_text(rng, 300) for _ in range(20)]
    assert tokens_of(train(texts, 330)) == slow_train(texts, 330)


def test_equals_hugging_face():
    """5 MB, the vocabulary of the CPU run: the same merges in order, and the same ids."""
    hf = pytest.importorskip("tokenizers")
    texts = stdlib_text(5_000_000)
    other = hf.Tokenizer(hf.models.BPE())
    other.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(PATTERN), "isolated"),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = hf.trainers.BpeTrainer(
        vocab_size=4096,
        show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    other.train_from_iterator(texts, trainer)
    # Hugging Face spells each byte as a character: itself where it prints, else the next one from
    # U+0100 on.
    spelled = {chr(b): b for b in BYTE_ORDER[:188]}
    spelled |= {chr(256 + i): b for i, b in enumerate(BYTE_ORDER[188:])}
    merges = json.loads(other.to_str())["model"]["merges"]
    tokens = tokens_of(train(texts, 4096))
    assert tokens[256:] == [bytes(spelled[c] for c in left + right) for left, right in merges]

    encoding = tiktoken.Encoding(
        "test",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    for text, encoded in zip(texts, other.encode_batch(texts)):
        assert encoding.encode_ordinary(text) == encoded.ids


def test_first_256_ranks_are_the_bytes_in_gpt2_order():
    assert tokens_of(train(["abc"], 256)) == [bytes([b]) for b in BYTE_ORDER]


def real_text(n_chars):
    """Documents of the folder of real data, where there is one."""
    folder = os.environ.get("NANOCHAT_TEST_DATA")
    if not folder:
        pytest.skip("NANOCHAT_TEST_DATA names no folder of real text")
    texts = []
    for path in sorted(Path(folder, "text").rglob("*.parquet")):
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
            texts.append(text[:n_chars])
            n_chars -= len(texts[-1])
            if n_chars <= 0:
                return texts
    return texts


def tiktoken_of(tokenizer):
    return tiktoken.Encoding("test", pat_str=tokenizer.get_pattern(), special_tokens={},
                             mergeable_ranks=dict(tokenizer.get_mergeable_ranks()))


@pytest.fixture(scope="module")
def superwords():
    tokenizer = train(stdlib_text(300_000), 800)
    tokenizer.train_superwords(iter(stdlib_text(300_000)), 2000)
    return tokenizer


SUPERWORDS = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S)"
ODD = [
    "", "'", "'s", "'S it'll I'VE 'streets 'ſ 'Ve\u0345", "a'",
    " \t x", "\n\n  \n x", "  ", " \u00a0\u3000", "\r\n\r", "\t\t!",
    "1234567", " 12", "½²³ ٣٤",
    "!!!\n\n//x", " !", " !!", " !\n", "/ / //", "  !!",
    "a  b   c", "a \n", "日本語12日", "e\u0301é",
]


@pytest.mark.parametrize("pattern", [PATTERN, SUPERWORDS + rf"|(?:(?!{SUPERWORDS})[\s\S])+"])
def test_the_scanners_split_as_the_patterns_say(pattern):
    rng = random.Random(12)
    texts = ODD + [random_text(rng, 400) for _ in range(100)] + stdlib_text(300_000)
    texts += ["".join(rng.choices("ab' s1!/\n \t", k=60)) for _ in range(2000)]
    for text in texts:
        by_hand = rustbpe.Tokenizer.split(text, pattern)
        assert by_hand == rustbpe.Tokenizer.split(text, pattern, by_hand=False)
        assert "".join(by_hand) == text


@pytest.mark.parametrize("pattern", [PATTERN, SUPERWORDS + rf"|(?:(?!{SUPERWORDS})[\s\S])+"])
def test_the_scanners_split_real_text_as_the_patterns_say(pattern):
    for text in real_text(4_000_000):
        by_hand = rustbpe.Tokenizer.split(text, pattern)
        assert by_hand == rustbpe.Tokenizer.split(text, pattern, by_hand=False)


@pytest.mark.parametrize("words", [True, False])
def test_encode_equals_tiktoken(superwords, words):
    rng = random.Random(9)
    tokenizer = train(stdlib_text(200_000), 1000) if words else superwords
    encoding = tiktoken_of(tokenizer)
    texts = ODD + stdlib_text(400_000) + [random_text(rng, 400) for _ in range(100)]
    texts += ["".join(rng.choices("ab", k=rng.randrange(300))) for _ in range(100)]
    for text in texts:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)


def test_encode_equals_tiktoken_on_real_text():
    texts = real_text(8_000_000)
    tokenizer = train(texts[:200], 8000)
    encoding = tiktoken_of(tokenizer)
    assert all(tokenizer.encode(text) == encoding.encode_ordinary(text) for text in texts)


@pytest.mark.parametrize("unit", ["a", " ", "7", "\n", "=", "é", "ab"])
def test_a_megabyte_of_one_thing_is_no_trouble(unit):
    """The same at a length where tiktoken is asked, and a megabyte gives back what went in."""
    tokenizer = train([unit * n for n in (1, 2, 3, 5, 9, 17)] * 3, 262)
    for n in (90, 101, 1000, 5003):
        assert tokenizer.encode(unit * n) == tiktoken_of(tokenizer).encode_ordinary(unit * n)
    tokens = tokens_of(tokenizer)
    text = unit * (1_000_000 // len(unit))
    assert b"".join(tokens[i] for i in tokenizer.encode(text)) == text.encode("utf-8")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_batch_is_its_texts_in_order(threads):
    tokenizer = train(stdlib_text(100_000), 500)
    texts = stdlib_text(50_000) + ["", "a"]
    ids, lengths = tokenizer.encode_batch(texts, threads)
    rows = [tokenizer.encode(text) for text in texts]
    assert lengths == [len(row) for row in rows]
    assert memoryview(ids).cast("I").tolist() == sum(rows, [])
    ids, lengths = tokenizer.encode_batch(texts, threads, 499)
    assert memoryview(ids).cast("I").tolist() == sum([[499] + row for row in rows], [])
    assert tokenizer.encode_batch([], threads) == (b"", [])


def slow_superwords(texts, tokens, vocab_size):
    """The reference implementation of the second stage.

    It applies the first stage's merges in order, then continues, counting every pair again.
    """
    tokens, ranks = list(tokens), {token: rank for rank, token in enumerate(tokens)}
    rows = []
    for text in texts:
        for piece in regex.findall(SUPERWORDS + rf"|(?:(?!{SUPERWORDS})[\s\S])+", text):
            parts = [bytes([b]) for b in piece.encode("utf-8")]
            while len(parts) > 1:
                joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
                best = joined.index(min(joined))
                if joined[best] == len(ranks):
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids = [ranks[part] for part in parts]
            rows += [ids[i : i + 128] for i in range(0, len(ids), 128)]
    while len(tokens) < vocab_size:
        pairs = Counter(pair for ids in rows for pair in zip(ids, ids[1:]))
        best = None
        for a, b in pairs:
            token = tokens[a] + tokens[b]
            if b": " in token or len([word for word in token.split(b" ") if word]) > 4:
                continue
            best = min(best or (0, 0, 0), (-pairs[a, b], a, b))
        if best is None:
            break
        a, b = best[1:]
        if tokens[a] + tokens[b] not in tokens:
            tokens.append(tokens[a] + tokens[b])
        new = tokens.index(tokens[a] + tokens[b])
        for ids in rows:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == (a, b):
                    ids[i : i + 2] = [new]
                i += 1
    return tokens


def test_superwords_equal_the_reference_implementation_and_hold_several_words():
    texts = stdlib_text(50_000)
    tokenizer = train(texts, 400)
    first = tokens_of(tokenizer)
    tokenizer.train_superwords(iter(texts), 520)
    assert tokens_of(tokenizer) == slow_superwords(texts, first, 520)
    assert any(b" " in token.strip() for token in tokens_of(tokenizer)[400:])


def test_superwords_stop_at_four_words_and_at_a_colon():
    texts = ["Answer: one two three four five six seven. "] * 50
    tokenizer = train(texts, 290)
    tokenizer.train_superwords(iter(texts), 5000)
    tokens = tokens_of(tokenizer)
    assert max(len(token.split()) for token in tokens) == 4
    assert not any(b": " in token for token in tokens)


def test_order_and_batching_of_documents_do_not_matter():
    texts = stdlib_text(300_000)
    assert tokens_of(train(texts, 600)) == tokens_of(train(reversed(texts), 600))


def test_pattern_covers_every_string():
    # docs/traps.md: dropped-text
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


@pytest.mark.parametrize("tokens, pattern, error", [
    ([b"a"], PATTERN, "no token for the byte 0"),
    ([bytes([b]) for b in range(256)] + [b"ab", b"ab"], PATTERN, "ranks 256 and 257 are the same"),
    ([bytes([b]) for b in range(256)], "(", "pattern is not valid"),
])
def test_a_vocabulary_with_a_hole_or_a_duplicate_is_refused(tokens, pattern, error):
    with pytest.raises(ValueError, match=error):
        rustbpe.Tokenizer.from_tokens(tokens, pattern)


def test_error_in_the_iterator_comes_through():
    def texts():
        yield "a"
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"):
        train(texts(), 300)


def test_no_text_is_kept():
    # docs/traps.md: leaked-python-objects
    texts = [f"document number {i} " * 20 for i in range(500)]
    before = [sys.getrefcount(text) for text in texts]
    train(texts, 300)
    assert [sys.getrefcount(text) for text in texts] == before


def test_gil_is_released():
    # docs/traps.md: leaked-python-objects
    """Another thread runs on while a call runs that executes no Python at all."""
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
        # without end, and without Python code
        interrupted(itertools.repeat("so many words " * 1000), 300)


def test_ctrl_c_stops_merging():
    rng = random.Random(11)
    text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(3_000_000))
    with pytest.raises(KeyboardInterrupt):
        interrupted([text], 1_000_000)  # one piece of three million letters: minutes of merging
