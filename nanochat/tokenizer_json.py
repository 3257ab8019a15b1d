"""Reading a tokenizer that others trained: the tokenizer.json of Hugging Face's `tokenizers`.

    tokenizer = read_tokenizer_json(Path("t80k/tokenizer.json"))

What is read is a byte-level BPE: a split of the text by at most one regular expression, bytes
spelled as GPT-2 did, and a list of merges. The published SuperBPE tokenizers (arXiv 2503.13423) are
of this form, and so are GPT-2's and those that we save. Anything else is refused in one line rather
than read as something that it is not.

Two things differ between their format and ours (tokenizer.py), and both are checked.

1. Their split may leave text unmatched, and that text is a piece, too: the words between two
   numbers in SuperBPE. We need a pattern that matches everything, so the pieces in between are
   spelled out: S becomes S|(?:(?!S)[\\s\\S])+.

2. Their merges name pairs, (t, he) say; our ranks name tokens, so that any two neighbours that
   spell "the" are merged. The two give the same ids if each token is what ranks make of its own
   bytes, and the last step of that is a pair in the list. For then neighbours that spell a token,
   both of them whole, are that pair: no merge has crossed an end of the token, so its bytes have
   been merged as they are when they stand alone.

The file's special tokens are left away and ours appended. Ids are those of the file where it has
the bytes first and then the tokens in the order of their merges, as is usual; read_with_ids() tells
them where they are not.

A model that was trained with such a tokenizer (hf_import.py) may have learnt from text that was
changed before it was split, or of which words were cut out as tokens. We change and cut nothing: it
reads such text in other tokens, which read_with_ids() says.
"""
import json
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, UNESCAPE, Tokenizer, byte_spelling, one_digit_pattern

# GPT-2's split, which a ByteLevel step with use_regex stands for.
GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
# Fields of the model that would make it another one, and what each may hold.
PLAIN = {
    "type": ("BPE", None),      # older files, as GPT-2's, do not say it
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}
# Characters of all kinds, to see that a split loses none.
SAMPLE = "".join(map(chr, range(1, 0x250))) + " Two words, 3,14 of it's.\r\n\n \t 数据 😀"


class _NotRead(Exception):
    """What of a file cannot be read, in words."""


class TheirTokenizer(NamedTuple):
    """A Tokenizer of ours, and what it was in the file."""
    tokenizer: Tokenizer
    ids: list           # the file's id of each of our tokens; None of a special one that it lacks
    differences: list   # a line for each way in which text may get other tokens than with the file


def read_tokenizer_json(path):
    """The Tokenizer of a tokenizer.json (a Path), with our special tokens.

    UserError where it cannot be read, and for any form that would not give the same tokens as
    `tokenizers` does.
    """
    found = read_with_ids(path)
    if found.differences:
        raise _refusal(path, found.differences[0])
    return found.tokenizer


def _refusal(path, reason):
    return UserError(
        f"{path}: {reason}; only a byte-level BPE with one split can be read: train one with "
        "scripts.tok_train in its place")


def read_with_ids(path):
    """The TheirTokenizer of a tokenizer.json (a Path).

    UserError as of read_tokenizer_json(), but where normal text gets the same tokens: a file that
    brings text to the normal form NFC, or cuts out words that it added, is read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name a tokenizer.json") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON: name a tokenizer.json of Hugging Face") from None

    try:
        return _tokenizer_of(content)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise UserError(
            f"{path} is not a tokenizer.json of Hugging Face's tokenizers: it lacks parts"
        ) from None
    except _NotRead as reason:
        raise _refusal(path, reason) from None


def _tokenizer_of(content):
    """The TheirTokenizer of a file's content. _NotRead where its tokens would be others."""
    model = content["model"]
    differences = []
    normalizer = content.get("normalizer")
    if normalizer not in (None, UNESCAPE):  # the second is of our own exports
        differences.append(f"it changes text before it is split ({normalizer['type']})")
        if normalizer["type"] != "NFC":
            raise _NotRead(differences[0])
    for name, allowed in PLAIN.items():
        if model.get(name) not in allowed:
            raise _NotRead(f"{name} of its model is {model[name]!r}")
    ordinary = [token["content"] for token in content["added_tokens"] if not token["special"]]
    if ordinary:
        differences.append(f"it cuts {ordinary[0]!r} out of the text before it is split")

    pattern = _pattern_of(content["pre_tokenizer"])
    byte_of = {character: byte for byte, character in byte_spelling().items()}
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    ranks, pairs, ids = _ranks_of(model, special, byte_of)
    try:
        tokenizer = Tokenizer(ranks)
        own = (tokenizer.pattern, one_digit_pattern(tokenizer.pattern))
        unwrapped = {_matching_all(ours): ours for ours in own}     # ours match all text
        tokenizer = Tokenizer(ranks, unwrapped.get(pattern, pattern))
    except UserError as error:
        raise _NotRead(" ".join(str(error).split())) from None
    if tokenizer.decode(tokenizer.encode(SAMPLE)) != SAMPLE:
        raise _NotRead("its split matches the empty text, after which we would lose some")
    _check_merges(ranks, pairs)
    ids += [special.get(name) for name in SPECIAL_TOKENS]
    return TheirTokenizer(tokenizer, ids, differences)


def _pattern_of(step):
    """One pattern that matches every text, from the file's steps before BPE."""
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _NotRead("its last step before BPE is not ByteLevel without a prefix space")
    by_itself = last.get("use_regex", True)
    if by_itself and not splits:
        return GPT2_PATTERN
    if by_itself or len(splits) != 1:
        raise _NotRead(f"it splits text {len(splits) + by_itself} times before BPE")
    [split] = splits
    kind = split["type"], split.get("behavior"), split.get("invert")
    if kind != ("Split", "Isolated", False) or "Regex" not in split["pattern"]:
        raise _NotRead(f"it splits text by {split['type']} ({split.get('behavior')})")
    regex = split["pattern"]["Regex"]
    if not isinstance(regex, str):
        raise TypeError("a regular expression is a text")
    return _matching_all(regex)


def _matching_all(regex):
    """A pattern that matches what a regular expression does, and what that leaves in between."""
    return f"{regex}|(?:(?!{regex})[\\s\\S])+"


def _ranks_of(model, special, byte_of):
    """(tokens by rank, {token: the pairs that its merges name}, the file's id of each rank).

    Tokens are bytes objects. The single bytes come first, in the order of their ids, then the
    tokens in the order of their merges.
    """
    def to_bytes(spelled):
        if not set(spelled) <= byte_of.keys():
            raise _NotRead(f"its token {spelled!r} is not spelled in bytes")
        return bytes(byte_of[character] for character in spelled)

    vocab = {spelled: i for spelled, i in model["vocab"].items() if spelled not in special}
    ids = {to_bytes(spelled): i for spelled, i in vocab.items()}
    pairs = {}
    latest = None
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        left, right = to_bytes(left), to_bytes(right)
        token = left + right
        if token in pairs and token != latest:
            raise _NotRead(f"merges that make {token!r} stand apart in its list")
        latest = token
        pairs.setdefault(token, []).append((left, right))

    single = sorted((token for token in ids if len(token) == 1), key=ids.get)
    missing = 256 - len(single)
    if missing:
        raise _NotRead(f"{missing} of the 256 bytes have no token, so that some text has none")
    ranks = single + list(pairs)
    stray = ids.keys() ^ set(ranks)
    if stray:
        raise _NotRead(f"{len(stray)} tokens have no merge or no id, {min(stray)!r} among them")
    return ranks, pairs, [ids[token] for token in ranks]


def _check_merges(ranks, pairs):
    """_NotRead unless the file's merges give what ranks give (the head of this module, 2)."""
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    last_pair = {}  # of each token, what ranks merge at last

    for token in ranks[256:]:
        for left, right in pairs[token]:
            parts_come_first = max(rank_of[left], rank_of[right]) < rank_of[token]
            if parts_come_first and _is_last_pair(left, right, rank_of, last_pair):
                last_pair[token] = left, right
        if token not in last_pair:
            raise _NotRead(f"its merges do not make {token!r} of the bytes of that alone")


def _is_last_pair(left, right, rank_of, last_pair):
    """Whether ranks merge the bytes of left + right to these two tokens before they merge them.

    Both tokens are taken apart along the boundary between them, the latest merge first. What then
    stands on its two sides must not have been merged across it, which would have happened if it
    spelled a token of a lower rank than the next merge on either side. Of equal ranks the left one
    is merged first. GitHub's `bpe` crate tests pairs of tokens in this way.
    """
    limit = rank_of[left + right]
    while True:
        if rank_of.get(left + right, limit) < limit:
            return False
        left_rank = rank_of[left] if len(left) > 1 else -1
        right_rank = rank_of[right] if len(right) > 1 else -1
        if left_rank == right_rank == -1:
            return True
        if left_rank > right_rank:
            limit, left = left_rank, last_pair[left][1]
        else:
            limit, right = right_rank + 1, last_pair[right][0]
