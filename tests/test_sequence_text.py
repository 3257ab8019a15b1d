"""The text of a sequence as its tokens come: whole characters, stop strings, tool calls."""
import random
from types import SimpleNamespace

import pytest

from nanochat.sequence_text import TextOfSequence, begun_stop, is_lookup
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["the cat sat on the mat. " * 20], 280)


def sequence_of(tokens, finish_reason="stop", may_look_up=False):
    """A sequence that ends with these tokens and has none yet, and a function that gives it some.
    """
    sequence = SimpleNamespace(
        prompt=[1, 2, 3], tokens=[], finish_reason=None, may_look_up=may_look_up)

    def give(count):
        sequence.tokens += tokens[len(sequence.tokens):len(sequence.tokens) + count]
        if len(sequence.tokens) == len(tokens):
            sequence.finish_reason = finish_reason
    return sequence, give


def read_all(tokenizer, tokens, step=1, may_look_up=False, **options):
    """(the pieces of text, the TextOfSequence), `step` tokens at a time."""
    sequence, give = sequence_of(tokens, may_look_up=may_look_up)
    text, pieces = TextOfSequence(tokenizer, sequence, **options), []
    while text.finish_reason is None:
        give(step)
        pieces.append(text.read())
    assert text.read() == ""
    return pieces, text


def ids(tokenizer, *parts):
    """Ids of texts and special tokens."""
    found = []
    for part in parts:
        is_special = part.startswith("<|")
        found += [tokenizer.encode_special(part)] if is_special else tokenizer.encode(part)
    return found


@pytest.mark.parametrize("step", [1, 2, 100])
def test_characters_of_several_tokens_are_shown_when_they_are_complete(tokenizer, step):
    """docs/traps.md: half-characters"""
    told = "café, 你好 🙂 \ufffd!"
    tokens = tokenizer.encode(told)
    pieces, text = read_all(tokenizer, tokens, step)
    assert "".join(pieces) == told and text.completion_tokens == len(tokens)
    if step == 1:
        assert sum(piece.count("\ufffd") for piece in pieces) == 1
    pieces, _ = read_all(tokenizer, tokenizer.encode("🙂")[:-1], step)
    assert "".join(pieces) == "\ufffd", "a character that was cut"


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("told, stop, shown", [
    ("the cat sat", [], "the cat sat"),
    ("the cat sat", ["cat"], "the "),
    ("the cat sat", ["sat", "t s", "nothing"], "the ca"),
    ("aaab", ["aab"], "a"),
    ("one🙂two", ["🙂t"], "one"),
    ("the cat sa", ["sat"], "the cat sa"),
    ("cat", ["cat"], ""),
])
def test_a_text_ends_before_the_first_stop_string(tokenizer, told, stop, shown, step):
    pieces, text = read_all(tokenizer, tokenizer.encode(told), step, stop=stop)
    assert "".join(pieces) == shown
    assert text.is_stopped == (shown != told) and text.finish_reason == "stop"


def test_nothing_of_a_stop_string_is_shown_before_it_is_known_to_be_none(tokenizer):
    tokens = tokenizer.encode("a...b")
    pieces, _ = read_all(tokenizer, tokens, stop=["....", ".b"])
    assert "".join(pieces) == "a.." and "." not in "".join(pieces[:3])
    assert begun_stop("ab\n", ["\n\n", "b\n-"]) == 2 and begun_stop("ab", ["c"]) == 0


def test_random_texts_and_stop_strings_agree_with_a_search_in_the_whole_text(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        told = "".join(rng.choices("ab🙂", k=rng.randrange(1, 12)))
        stop = ["".join(rng.choices("ab🙂", k=rng.randrange(1, 4))) for _ in range(2)]
        places = [told.find(one) for one in stop if one in told]
        pieces, text = read_all(tokenizer, tokenizer.encode(told), rng.randrange(1, 4), stop=stop)
        shown = "".join(pieces)
        if not places:
            assert shown == told and not text.is_stopped
        else:
            # of several, the one that was complete first
            assert text.is_stopped and told.startswith(shown)
            assert any(told[len(shown):].startswith(one) for one in stop)
            assert len(shown) <= min(told.find(one) + len(one) for one in stop if one in told)


def test_the_finish_reason_is_the_sequences_own_and_tokens_behind_a_stop_string_do_not_count(
        tokenizer):
    tokens = tokenizer.encode("a.bcd")
    sequence, give = sequence_of(tokens, "length")
    text = TextOfSequence(tokenizer, sequence, stop=["."])
    give(100)
    assert text.read() == "a" and (text.prompt_tokens, text.completion_tokens) == (3, 2)
    assert (text.finish_reason, text.unread) == ("stop", 3)
    sequence, give = sequence_of(tokens, "length")
    text = TextOfSequence(tokenizer, sequence)
    give(4)
    assert text.finish_reason is None and text.read() == "a.bc" and text.finish_reason is None
    give(1)
    assert text.read() == "d" and text.finish_reason == "length"


def test_an_answer_without_a_token_ends_too(tokenizer):
    sequence, _ = sequence_of([])
    sequence.finish_reason = "error"
    text = TextOfSequence(tokenizer, sequence)
    assert text.read() == "" and text.finish_reason == "error"


CALL = ("So ", "<|python_start|>", "12*7", "<|python_end|>")
REPLY = ("<|output_start|>", "84", "<|output_end|>")


@pytest.mark.parametrize("may_look_up", [True, False])
def test_a_tool_call_is_shown_with_its_reply_or_left_out(tokenizer, may_look_up):
    tokens = ids(tokenizer, *CALL, *REPLY, "It is 84.", "<|assistant_end|>")
    pieces, _ = read_all(tokenizer, tokens, may_look_up=may_look_up)
    assert "".join(pieces) == "So `12*7` → 84\nIt is 84."
    pieces, _ = read_all(tokenizer, tokens, may_look_up=may_look_up, shows_calls=False)
    assert "".join(pieces) == "So It is 84."


@pytest.mark.parametrize("may_look_up", [True, False])
def test_a_call_that_is_cut_or_refused_is_shown_as_it_stands(tokenizer, may_look_up):
    for told, shown in [
        (CALL[:3], "So `12*7"),
        (CALL, "So `12*7`"),
        ((*CALL, " then"), "So `12*7` then"),
    ]:
        pieces, _ = read_all(tokenizer, ids(tokenizer, *told), may_look_up=may_look_up)
        assert "".join(pieces) == shown
        pieces, _ = read_all(
            tokenizer, ids(tokenizer, *told), may_look_up=may_look_up, shows_calls=False)
        assert "".join(pieces) == ("So  then" if told[-1] == " then" else "So ")


@pytest.mark.parametrize("may_look_up", [True, False])
def test_markers_where_none_belong_lose_no_text_and_change_no_order(tokenizer, may_look_up):
    start, output = "<|python_start|>", "<|output_start|>"
    told = (start, "12", start, "7", output, "84", "<|python_end|>")
    pieces, _ = read_all(tokenizer, ids(tokenizer, *told), may_look_up=may_look_up)
    assert "".join(pieces) == "`12`7 → 84`"


@pytest.mark.parametrize("shows_calls", [True, False])
def test_of_a_look_up_the_reply_alone_is_shown(tokenizer, shows_calls):
    told = ("<|python_start|>", " lookup() ", "<|python_end|>", "<|output_start|>", "A quote.",
            "<|output_end|>", "Well.")
    pieces, _ = read_all(
        tokenizer, ids(tokenizer, *told), may_look_up=True, shows_calls=shows_calls)
    assert "".join(pieces) == "A quote.\nWell."
    assert is_lookup(" lookup() ") and not is_lookup("lookup(1)")


def test_no_control_token_is_shown(tokenizer):
    """docs/traps.md: control-tokens"""
    for shows_calls in (True, False):
        for name in SPECIAL_TOKENS:
            tokens = ids(tokenizer, "the", name, "cat")
            pieces, _ = read_all(tokenizer, tokens, shows_calls=shows_calls)
            assert "<|" not in "".join(pieces) and "the" in "".join(pieces)
