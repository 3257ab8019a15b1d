"""Reading the tokenizer.json of others: the same tokens as Hugging Face's `tokenizers` finds."""
import json
import random

import pytest

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokenizer_json import read_tokenizer_json

hf = pytest.importorskip("tokenizers", reason="the outside opinion")

# The split of SuperBPE's second stage as the published tokenizers have it (arXiv 2503.13423).
SUPERWORDS = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S)"
SENTENCES = [
    "The cat sat on the mat, and the dog sat on the log.",
    "In the end of the day 12345 cats came!!! It is one of the best; one of the worst.",
    "def f(x):\n    return x  # of the kind\n\n",
    "Für Élise — 3,14 ≈ π; 老灯塔看守人每天晚上爬上楼梯 👩‍🚀",
    "a  b   c\t d\r\n e. one of the, one of the. of the day, of the end",
]


def corpus(count=300):
    rng = random.Random(3)
    words = " ".join(SENTENCES).split(" ")
    return [*SENTENCES, *(" ".join(rng.choices(words, k=30)) for _ in range(count))]


def byte_level(split=None, use_regex=False):
    """What stands before BPE: a Split, or none, and ByteLevel."""
    last = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    if split is None:
        return last
    first = hf.pre_tokenizers.Split(hf.Regex(split), "isolated")
    return hf.pre_tokenizers.Sequence([first, last])


def trained(split, use_regex=False, size=600):
    """A tokenizer that `tokenizers` has trained."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = byte_level(split, use_regex)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, max_token_length=24)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def superbpe():
    """A tokenizer of two stages, words first and then several, with the split as published.

    `tokenizers` cannot train one, so that its merges are ours.
    """
    content = Tokenizer.train_from_iterator(corpus(), 600, transition=0.5).hugging_face()
    content["model"]["ignore_merges"] = False
    content["added_tokens"] = []
    tokenizer = hf.Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = byte_level(SUPERWORDS)
    return tokenizer


def read(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    return read_tokenizer_json(path)


@pytest.mark.parametrize("make", [
    superbpe,
    lambda: trained(SUPERWORDS),
    lambda: trained(r"\p{N}{1,2}|\s?\p{L}+|\s+|[^\s\p{L}\p{N}]+"),
    lambda: trained(None, use_regex=True),
], ids=["two stages", "superwords", "words", "GPT-2"])
def test_a_file_gives_the_ids_that_its_own_library_finds(make, tmp_path):
    theirs = make()
    ours = read(theirs, tmp_path)
    documents = [*corpus(50), *map(chr, range(1, 0x500)), "x" * 300, " ".join(["of the"] * 50)]
    for text in documents:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.get_vocab_size() == theirs.get_vocab_size() + len(SPECIAL_TOKENS)
    assert ours.get_bos_token_id() == theirs.get_vocab_size()
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode(documents[1]) == ours.encode(documents[1])


def test_superwords_are_found_across_spaces(tmp_path):
    ours = read(superbpe(), tmp_path)
    pieces = [ours.id_to_bytes(i) for i in ours.encode("one of the best")]
    assert max(piece.strip().count(b" ") for piece in pieces) >= 1, pieces


def test_their_special_tokens_make_room_for_ours(tmp_path):
    theirs = trained(SUPERWORDS)
    theirs.add_special_tokens(["<|endoftext|>"])
    ours = read(theirs, tmp_path)
    assert ours.get_bos_token_id() == theirs.token_to_id("<|endoftext|>")
    assert ours.decode(ours.encode("a<|endoftext|>b")) == "a<|endoftext|>b", "no text is control"


def random_merges(rng):
    """A file with merges that no training would make: they may never be used, or in part."""
    content = json.loads(trained(None, use_regex=True, size=256).to_str())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    tokens = list("abc")
    while len(merges) < 7:
        left, right = rng.choices(tokens, k=2)
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
            tokens.append(left + right)
    return hf.Tokenizer.from_str(json.dumps(content))


def test_merges_that_ranks_do_not_give_are_refused_and_all_others_give_the_same_ids(tmp_path):
    rng = random.Random(0)
    accepted = refused = 0
    for _ in range(60):
        theirs = random_merges(rng)
        texts = ["".join(rng.choices("abc", k=rng.randint(1, 14))) for _ in range(150)]
        try:
            ours = read(theirs, tmp_path)
        except UserError as error:
            assert "of the bytes of that alone" in str(error)
            refused += 1
            continue
        accepted += 1
        for text in texts:
            assert ours.encode(text) == theirs.encode(text).ids, text
    assert accepted > 10 and refused > 10, (accepted, refused)


def damaged(change):
    content = json.loads(trained(SUPERWORDS, size=300).to_str())
    change(content)
    return json.dumps(content)


def change_model(**fields):
    return lambda content: content["model"].update(fields)


def lose_a_byte(content):
    del content["model"]["vocab"]["!"]


def lose_a_merge(content):
    del content["model"]["merges"][-1]


def split_twice(content):
    steps = content["pre_tokenizer"]["pretokenizers"]
    steps.insert(0, steps[0])


def drop_what_matches(content):
    content["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"


def prefix_space(content):
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def add_a_word(content):
    content["added_tokens"].append({"id": 900, "content": "cat", "special": False})


def split_by(regex):
    def change(content):
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    return damaged(change)


def test_an_older_file_without_a_type_and_with_merges_as_strings_is_read(tmp_path):
    """GPT-2's is of this form."""
    def age(content):
        model = content["model"]
        del model["type"]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]

    path = tmp_path / "tokenizer.json"
    path.write_text(damaged(age), encoding="utf-8")
    theirs = hf.Tokenizer.from_file(str(path))
    for text in SENTENCES:
        assert read_tokenizer_json(path).encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("text, words", [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    (damaged(change_model(merges=["a b c"])), "it lacks parts"),
    (damaged(lambda content: content["pre_tokenizer"].update(pretokenizers=[])), "it lacks parts"),
    (split_by(["a"]), "it lacks parts"),
    (split_by("((("), "the split pattern is not valid"),
    (split_by("a*"), "matches the empty text"),
    (split_by("(?=a)"), "matches the empty text"),
    ("{}", "it lacks parts"),
    ("[]", "it lacks parts"),
    (damaged(lambda content: content.update(normalizer={"type": "NFC"})), r"split \(NFC\)"),
    (damaged(change_model(type="Unigram")), "type of its model is 'Unigram'"),
    (damaged(change_model(dropout=0.1)), "dropout of its model is 0.1"),
    (damaged(change_model(end_of_word_suffix="</w>")), "end_of_word_suffix"),
    (damaged(change_model(byte_fallback=True)), "byte_fallback"),
    (damaged(lose_a_byte), "1 of the 256 bytes have no token"),
    (damaged(lose_a_merge), "1 tokens have no merge or no id"),
    (damaged(split_twice), "splits text 2 times"),
    (damaged(drop_what_matches), r"Split \(Removed\)"),
    (damaged(prefix_space), "without a prefix space"),
    (damaged(add_a_word), "cuts 'cat' out of the text"),
    (damaged(lambda content: content.update(pre_tokenizer={"type": "Metaspace"})), "ByteLevel"),
])
def test_other_forms_are_refused_in_one_line(text, words, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        read_tokenizer_json(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_tokenizer_json(tmp_path / "none.json")
