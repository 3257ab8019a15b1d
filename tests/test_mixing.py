"""How often the user's own conversations come: by shares, evenly, and said in numbers."""
import itertools
from collections import Counter
from types import SimpleNamespace

import pytest

from nanochat.common import UserError
from nanochat.dataloader import sft_data_generator
from tasks.common import Task, conversation
from tasks.mixing import (
    MAX_EPOCH,
    MAX_READINGS,
    Repeated,
    check_share,
    divide_epoch,
    mix_with_own,
    mixture_tokens,
    planned_draws,
    planned_tokens,
    say_times,
    times_each,
)


class Numbers(Task):
    """Conversations of one number each."""

    def __init__(self, first, count):
        super().__init__()
        self.first, self.count = first, count

    def num_examples(self):
        return self.count

    def get_example(self, i):
        return conversation(str(self.first + i), "x")


class OneTokenEach:
    """A tokenizer that writes a conversation as two ids: its number, and an answer."""

    def get_bos_token_id(self):
        return 0

    def render_conversation(self, conversation, max_tokens=None):
        return [int(conversation["messages"][0]["content"]) + 1, 0], [0, 1]


def number_of(item):
    return int(item["messages"][0]["content"])


# ------------------------------------------------------------------------------------------------
# the shares

@pytest.mark.parametrize("lines, others, share", [
    (8, 100_000, 0.3),
    (8, 100_000, 0.9),
    (50_000, 1_000, 0.1),
    (300, 300, 0.5),
    (1, 100, 0.999),
])
def test_a_wanted_share_is_met_and_an_epoch_has_every_conversation(lines, others, share):
    portions = divide_epoch(lines, others, share)
    assert portions.share == pytest.approx(share, rel=0.01)
    assert portions.own >= lines and portions.others >= others


def test_an_epoch_fits_the_memory_whatever_is_wanted():
    for share in (1e-6, 0.9999999):
        portions = divide_epoch(8, 130_000, share)
        assert sum(portions) <= MAX_EPOCH + 1 and min(portions) >= 1
    assert divide_epoch(8, 130_000, 1.0) == (8, 0)


def test_without_a_wanted_share_few_lines_count_and_many_do_not_displace_the_others():
    shares = [divide_epoch(lines, 130_000).share for lines in (8, 100, 1000, 5000, 10**6)]
    assert shares == sorted(shares)
    assert shares[0] > 0.05 and shares[1] == pytest.approx(0.1, abs=0.001)
    assert shares[-1] == pytest.approx(0.5)
    assert divide_epoch(1, 130_000).own == MAX_READINGS, "no line is read without end"


@pytest.mark.parametrize("custom, share, words", [
    ("mine.jsonl", 0.0, "above 0 and at most 1"),
    ("mine.jsonl", 30.0, "0.3 makes 30 %"),
    ("mine.jsonl", float("nan"), "above 0"),
    (None, 0.3, "--custom=FILE"),
])
def test_a_share_that_cannot_be_had_is_refused(custom, share, words):
    with pytest.raises(UserError, match=words):
        check_share(custom, share)


def test_the_usual_shares_are_taken():
    for custom, share in ((None, None), ("mine.jsonl", None), ("mine.jsonl", 1.0)):
        check_share(custom, share)


def test_repeated_examples_are_all_of_a_task_or_some_at_equal_distances():
    for count, wanted in ((3, [0, 3, 6]), (10, [*range(10)]), (12, [*range(10), 0, 1])):
        task = Repeated(Numbers(0, 10), count)
        assert [number_of(task[i]) for i in range(len(task))] == wanted


# ------------------------------------------------------------------------------------------------
# what a run sees

def drawn_numbers(mixture, batches):
    """The numbers of the conversations in the first batches of a loader."""
    loader = sft_data_generator(OneTokenEach(), mixture, 4, 63)
    found = []
    for inputs, _, _ in itertools.islice(loader, batches):
        found += [int(number) - 1 for number in inputs[:, 0::2].flatten() if number > 0]
    return found


def test_the_share_holds_in_the_first_part_of_an_epoch_and_each_line_comes_about_as_often():
    own, others = Numbers(1_000_000, 8), Numbers(0, 20_000)
    mixture, portions = mix_with_own(own, others, 0.3)
    for batches in (10, 30):
        numbers = drawn_numbers(mixture, batches)
        assert len(numbers) < len(mixture) / 5, "a small part of an epoch"
        counts = Counter(number for number in numbers if number >= 1_000_000)
        assert sum(counts.values()) / len(numbers) == pytest.approx(0.3, abs=0.05)
        expected = times_each(len(own), portions, len(numbers))
        assert expected == pytest.approx(0.3 * len(numbers) / 8, rel=0.01)
        assert len(counts) == 8
        assert all(0.5 * expected < count < 1.6 * expected for count in counts.values())
    assert drawn_numbers(mixture, 10) == drawn_numbers(mix_with_own(own, others, 0.3)[0], 10)


def test_the_number_of_conversations_ahead_follows_from_the_budget():
    steps, minutes = SimpleNamespace(num_iterations=5, minutes=None), None
    assert planned_tokens(steps, 4096, "cpu", 1e11, 1e7) == 5 * 4096
    minutes = SimpleNamespace(num_iterations=None, minutes=2.0)
    assert planned_tokens(minutes, 4096, "cpu", 1e11, 1e7) == pytest.approx(120 * 0.5 * 1e4)

    mixture = Numbers(0, 1000)
    assert planned_draws(OneTokenEach(), mixture, 600) == 300, "two tokens each"


def test_the_tokens_of_a_mixture_are_about_what_its_conversations_hold():
    lengths = [1 + (i * 7919) % 97 for i in range(20_000)]
    tokenizer = SimpleNamespace(render_conversation=lambda length: ([0] * length, None))
    assert mixture_tokens(tokenizer, lengths, 200) == pytest.approx(sum(lengths), rel=0.03)
    cut = sum(min(length, 51) for length in lengths)
    assert mixture_tokens(tokenizer, lengths, 50) == pytest.approx(cut, rel=0.03)
    assert mixture_tokens(tokenizer, [5, 5, 7], 50) == 17


@pytest.mark.parametrize("lines, times, words", [
    (8, 120.4, "each of your 8 conversations about 120 times"),
    (12_000, 0.42, "each of your 12,000 conversations about 0.4 times"),
    (1, 1234.5, "your one conversation about 1,234 times"),
])
def test_how_often_each_line_comes_is_said(lines, times, words):
    assert say_times(lines, times) == words
