"""Batches of text and of conversations: no token lost or twice, and states that resume exactly."""
import hashlib
import itertools
import random
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.common import UserError
from nanochat.dataloader import (
    count_cut,
    deliver,
    measure_text,
    on_device,
    read_ahead,
    resumed_conversations,
    resumed_text,
    say_cut,
    sft_data_generator,
    tokenizing_distributed_data_loader_with_state,
)
from nanochat.dataset import iter_documents, open_dataset
from nanochat.tokenizer import Tokenizer

WORDS = "the a cat dog sat ran on under mat tree and then was not very small big red who".split()


def sentence(rng, least=1, most=30):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return Tokenizer.train_from_iterator([sentence(rng) for _ in range(200)], 300)


def write_folder(folder, files, rows_per_group):
    folder.mkdir()
    for i, documents in enumerate(files):
        table = pa.table({"text": documents})
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=rows_per_group)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three training files of 2 to 5 row groups, and one of validation."""
    rng = random.Random(1)
    files = [[sentence(rng, least=6) for _ in range(count)] for count in (13, 8, 11, 6)]
    return write_folder(tmp_path_factory.mktemp("data") / "text", files, 3)


def load(tokenizer, data, count, B=2, T=16, split="train", **options):
    loader = tokenizing_distributed_data_loader_with_state(tokenizer, B, T, split, data, **options)
    return list(itertools.islice(loader, count))


def load_in_order(*args, **options):
    """Sequences as they follow each other: a shuffle buffer of a single one has only one order."""
    return load(*args, B=1, buffer_batches=1, **options)


def assert_equal_batches(batches, again):
    for (inputs, targets, state), (inputs_2, targets_2, state_2) in zip(batches, again):
        assert torch.equal(inputs, inputs_2) and torch.equal(targets, targets_2)
        assert state == state_2


def stream_of(batches):
    return torch.cat([inputs.flatten() for inputs, _, _ in batches]).tolist()


def documents_as_ids(tokenizer, split, data):
    return tokenizer.encode(list(iter_documents(split, data)), prepend=tokenizer.get_bos_token_id())


def test_the_loader_takes_an_open_dataset_as_well_as_its_path(tokenizer, data):
    assert_equal_batches(load(tokenizer, data, 20), load(tokenizer, open_dataset(data), 20))


def test_a_text_is_measured_exactly_where_it_is_short_and_estimated_where_it_is_long(
        tokenizer, data):
    dataset = open_dataset(data)
    texts = list(dataset.documents("train"))
    ids = documents_as_ids(tokenizer, "train", data)
    whole = measure_text(dataset, tokenizer)
    assert whole.exact and whole.bytes == sum(map(len, texts))
    assert whole.tokens == sum(map(len, ids))
    part = measure_text(dataset, tokenizer, most_bytes=whole.bytes // 3)
    assert not part.exact
    assert part.bytes == pytest.approx(whole.bytes, rel=0.3)
    assert part.tokens == pytest.approx(whole.tokens, rel=0.3)


def test_rows_for_validation_do_not_count_as_training_text(tokenizer, tmp_path):
    rng = random.Random(3)
    documents = [sentence(rng, least=6) for _ in range(40)]
    path = write_folder(tmp_path / "one", [documents], 50)  # its last rows are validation
    size = measure_text(open_dataset(path), tokenizer)
    assert size.bytes == sum(map(len, documents[:38]))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_stream_is_all_documents_behind_bos_and_targets_are_one_ahead(tokenizer, data, split):
    ids = sum(documents_as_ids(tokenizer, split, data), [])
    assert len(ids) > 3 * 32
    three_epochs = 3 * len(ids) // 16  # give or take
    batches = load_in_order(tokenizer, data, three_epochs, split=split)
    stream = stream_of(batches)
    assert stream == (ids * 4)[:len(stream)]
    targets = torch.cat([targets.flatten() for _, targets, _ in batches]).tolist()
    assert targets[:-1] == stream[1:] and targets[-1] == (ids * 4)[len(stream)]
    for inputs, targets, _ in batches:
        assert inputs.shape == targets.shape == (1, 16)
        assert inputs.dtype == targets.dtype == torch.int64


def test_each_sequence_of_a_buffer_is_yielded_once_in_an_order_that_changes(tokenizer, data):
    def sequences(batches):
        return [
            tuple(a + b)
            for inputs, targets, _ in batches
            for a, b in zip(inputs.tolist(), targets.tolist())
        ]

    in_order = sequences(load_in_order(tokenizer, data, 64))
    yielded = sequences(load(tokenizer, data, 16, B=4, buffer_batches=8))
    halves = slice(0, 32), slice(32, 64)
    for half in halves:
        assert sorted(yielded[half]) == sorted(in_order[half])
    first, second = ([in_order[half].index(one) for one in yielded[half]] for half in halves)
    assert first != sorted(first) and first != second


def test_the_stream_does_not_depend_on_how_many_documents_are_encoded_at_once(tokenizer, data):
    one_at_a_time = load(tokenizer, data, 40, documents_at_once=1)
    assert stream_of(load(tokenizer, data, 40)) == stream_of(one_at_a_time)


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_every_saved_state_resumes_with_the_very_same_batches(tokenizer, data, rank, world_size):
    # docs/traps.md: loader-second-epoch, resume-forgets
    place = dict(rank=rank, world_size=world_size)
    batches = load(tokenizer, data, 250, B=1, buffer_batches=2, **place)
    states = [state for _, _, state in batches]
    assert states[-1][0] >= 2, "the end of the files was passed twice"
    assert {state[1] for state in states} == set(range(12)), "a buffer began in every row group"
    assert states == sorted(states) and any(state[3] for state in states)
    for i in range(0, 240, 7):
        again = load(tokenizer, data, 10, B=1, buffer_batches=2, state=states[i], **place)
        assert_equal_batches(batches[i + 1:], again)


def first_epoch(tokenizer, data, rank, world_size):
    """The documents that a rank reads in its first epoch, as lists of ids."""
    batches = load_in_order(tokenizer, data, 400, T=4, rank=rank, world_size=world_size)
    end, over = next((i, state[3]) for i, (_, _, state) in enumerate(batches) if state[0] == 1)
    stream, documents = stream_of(batches[:end + 1]), []
    for token in stream[:len(stream) - over]:
        if token == tokenizer.get_bos_token_id():
            documents.append([])
        documents[-1].append(token)
    return documents


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_documents_whatever_the_row_groups(tokenizer, data, world_size):
    # docs/traps.md: too-few-rows
    parts = [first_epoch(tokenizer, data, rank, world_size) for rank in range(world_size)]
    assert sorted(sum(parts, [])) == sorted(documents_as_ids(tokenizer, "train", data))
    assert all(parts)


def test_two_ranks_share_the_rows_of_a_single_row_group(tokenizer, tmp_path):
    # docs/traps.md: too-few-rows
    texts = [f"{i} the cat sat on the mat" for i in range(6)]
    folder = write_folder(tmp_path / "text", [["a dog"], texts], 100)
    for rank in (0, 1):
        ids = sum(tokenizer.encode(texts[rank::2], prepend=tokenizer.get_bos_token_id()), [])
        count = len(ids) // 16
        place = {"rank": rank, "world_size": 2}
        batches = load_in_order(tokenizer, folder, count, split="val", **place)
        assert stream_of(batches) == ids[:16 * count]


def test_fewer_documents_than_ranks_hang_no_rank(tokenizer, tmp_path):
    # docs/traps.md: too-few-rows
    folder = write_folder(tmp_path / "text", [["the cat sat on the mat"], ["a dog ran"]], 1)
    for rank in range(3):
        assert len(load(tokenizer, folder, 2, rank=rank, world_size=3)) == 2


@pytest.fixture
def copies(monkeypatch):
    """The copies to a device that are made: (type of the device, pinned, does not block)."""
    made, pinned = [], set()

    def pin_memory(tensor):
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        return copy

    def to(tensor, device, non_blocking=False):
        made.append((torch.device(device).type, tensor.data_ptr() in pinned, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return made


def test_what_is_copied_to_a_gpu_is_pinned_itself_and_does_not_block(
        copies, tokenizer, data):
    load(tokenizer, data, 3, device="cuda")
    assert copies == [("cuda", True, True)] * 6
    copies.clear()
    for device in ("mps", "cpu"):
        on_device([torch.zeros(2)], device)
    assert copies == [("mps", False, False), ("cpu", False, False)]


# ----------------------------------------------------------------------------------------------
# conversations

def talk(question, answer):
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages}


@pytest.fixture(scope="module")
def talks():
    """Conversations that differ, so that a sequence tells which ones are in it."""
    rng = random.Random(2)
    return [
        talk(f"{i} {sentence(rng, most=4)}", f"{sentence(rng, most=3)} {i}")
        for i in range(100)
    ]


def test_conversations_that_are_cut_to_the_context_are_counted_and_said(tokenizer, capsys):
    short, long = talk("a cat", "a dog"), talk("a cat", "the tree " * 200)
    unanswered = talk("the tree " * 200, "a dog")
    task = [short, long, short, unanswered, long]
    assert count_cut(tokenizer, task, 48) == (3, 1)
    say_cut(tokenizer, task, 48)
    said = capsys.readouterr().out
    assert "3 of 5 conversations are longer than the context of 48 tokens" in said
    assert "1 of them keep no answer" in said and said.count("\n") == 1
    say_cut(tokenizer, [short] * 3, 48)
    assert capsys.readouterr().out == "", "there is nothing to say"


def test_a_conversation_is_cut_where_it_is_one_token_longer_than_a_sequence(tokenizer):
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    for one in (talk("ä cat 🙂", "a dog"), talk("1+1", [*parts, {"type": "text", "text": "é"}])):
        length = len(tokenizer.render_conversation(one)[0])
        assert count_cut(tokenizer, [one], length - 1) == (0, 0)
        assert count_cut(tokenizer, [one], length - 2) == (1, 0)


def test_a_conversation_without_a_long_text_is_not_tokenized(monkeypatch, tokenizer):
    rendered = []
    render = tokenizer.render_conversation
    monkeypatch.setattr(
        tokenizer, "render_conversation", lambda one: rendered.append(one) or render(one))
    count_cut(tokenizer, [talk("a cat", "a dog")] * 9 + [talk("a cat", "a dog" * 20)], 48)
    assert len(rendered) == 1


def pack(tokenizer, task, count, B=2, T=48, **options):
    return list(itertools.islice(sft_data_generator(tokenizer, task, B, T, **options), count))


def conversations_in(tokenizer, inputs, targets):
    """[(ids, targets)] of the conversations in a batch.

    Each begins at a bos that something other than bos follows.
    """
    bos, found = tokenizer.get_bos_token_id(), []
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        starts = [i for i, token in enumerate(row) if token == bos] + [len(row)]
        found += [(row[a:b], wanted[a:b]) for a, b in zip(starts, starts[1:]) if b - a > 1]
    return found


def test_targets_are_what_the_assistant_says_and_padding_is_ignored(tokenizer, talks):
    rendered = [tokenizer.render_conversation(t) for t in talks]
    expected = {
        tuple(ids): [i if m else -1 for i, m in zip(ids[1:], mask[1:])]
        for ids, mask in rendered
    }
    bos, seen, packed = tokenizer.get_bos_token_id(), set(), 0
    for inputs, targets, _ in pack(tokenizer, talks, 30):
        assert inputs.shape == targets.shape == (2, 48)
        found = conversations_in(tokenizer, inputs, targets)
        packed = max(packed, len(found))
        for ids, wanted in found:
            key = tuple(ids)
            if key not in expected:  # the last token of a full sequence is a target alone
                key = (*ids, tokenizer.encode_special("<|assistant_end|>"))
            assert wanted[:len(ids) - 1] == expected[key][:len(ids) - 1]
            seen.add(key)
        assert not (targets == bos).any() and (targets[inputs == bos] == -1).all()
    assert len(seen) > 50 and packed > 2


def test_an_epoch_holds_every_conversation_once_and_the_next_has_another_order(tokenizer, talks):
    drawn = []

    class Watched(list):
        def __getitem__(self, i):
            drawn.append(i)
            return super().__getitem__(i)

    pack(tokenizer, Watched(talks), 120)
    first, second = drawn[:100], drawn[100:200]
    assert sorted(first) == sorted(second) == list(range(100)) and first != second


def test_a_conversation_longer_than_a_sequence_is_cut_and_still_teaches(tokenizer):
    # docs/traps.md: packing-clogged
    long = [talk("who?", "the cat sat on the mat and " * 40) for _ in range(40)]
    batches = pack(tokenizer, long + [talk("who?", "a dog")], 60)
    assert all((targets >= 0).sum() > 20 for _, targets, _ in batches)
    assert batches[-1][2][0] > 100, "the buffer is not clogged"


def test_a_question_longer_than_a_sequence_gives_no_targets_and_no_error(tokenizer):
    # docs/traps.md: packing-clogged
    (batch,) = pack(tokenizer, [talk("the cat sat on the mat and " * 40, "yes")], 1)
    assert (batch[1] == -1).all()


def test_two_ranks_draw_different_conversations(tokenizer, talks):
    def drawn(rank):
        ids = set()
        for inputs, targets, (count, _) in pack(tokenizer, talks, 40, rank=rank, world_size=2):
            if count > 50:
                return ids
            ids |= {tuple(row[:12]) for row, _ in conversations_in(tokenizer, inputs, targets)}
    assert drawn(0) and drawn(1) and not drawn(0) & drawn(1)


def test_every_saved_state_resumes_with_the_very_same_conversations(tokenizer, talks):
    # docs/traps.md: resume-forgets
    batches = pack(tokenizer, talks, 60)
    assert batches[-1][2][0] > 250, "two ends of an epoch were passed"
    for i in range(0, 50, 7):
        again = pack(tokenizer, talks, 8, state=batches[i][2])
        assert_equal_batches(batches[i + 1:], again)


# ----------------------------------------------------------------------------------------------
# read ahead by a thread

def test_batches_that_a_thread_reads_ahead_are_the_same_with_the_same_states(tokenizer, talks):
    # docs/traps.md: resume-forgets
    """The state is that of the batch that was taken, however many the thread has read since."""
    expected = pack(tokenizer, talks, 40)
    for taken in (1, 7, 20):
        ahead = read_ahead(sft_data_generator(tokenizer, talks, 2, 48), count=3)
        first = list(itertools.islice(ahead, taken))
        ahead.close()
        rest = pack(tokenizer, talks, 10, state=first[-1][2])
        assert_equal_batches(expected[:taken + 10], first + rest)
        assert [state for _, _, state in first] == [state for _, _, state in expected[:taken]]


def test_a_thread_reads_no_further_than_it_may_and_ends_when_it_is_closed():
    read = []
    five_are_read = threading.Event()

    def numbers():
        for number in itertools.count():
            read.append(number)
            if len(read) == 5:
                five_are_read.set()
            yield number

    before = threading.active_count()
    ahead = read_ahead(numbers(), count=3)
    assert next(ahead) == 0
    assert five_are_read.wait(30), "one was taken, three wait, one is held until there is room"
    assert next(ahead) == 1
    ahead.close()
    assert len(read) <= 6 and threading.active_count() == before


def test_what_a_thread_meets_is_raised_where_its_items_are_taken():
    def broken():
        yield from range(3)
        raise UserError("the data end here")

    taken = []
    with pytest.raises(UserError, match="the data end here"):
        for number in read_ahead(broken(), count=1):
            taken.append(number)
    assert taken == [0, 1, 2]
    assert list(read_ahead(range(9), count=2)) == [*range(9)]


def test_a_cpu_gets_its_batches_without_a_thread(tokenizer, talks):
    before = threading.active_count()
    batches = deliver(sft_data_generator(tokenizer, talks, 2, 48), "cpu")
    first = list(itertools.islice(batches, 5))
    assert threading.active_count() == before
    assert_equal_batches(first, pack(tokenizer, talks, 5))


class Moved:
    """A tensor that remembers what was done with it, since there is no GPU here."""

    def __init__(self, did=()):
        self.did = did

    def pin_memory(self):
        return Moved((*self.did, f"pinned, thread {threading.current_thread().name}"))

    def to(self, device, non_blocking):
        return Moved((*self.did, f"{device}, non_blocking={non_blocking}"))


def test_a_gpu_gets_pinned_batches_that_a_thread_has_packed():
    """The thread does not pin: its current device is the first one, whatever the rank's is."""
    names = []

    def batches():
        for state in range(20):
            names.append(threading.current_thread().name)
            yield Moved(), Moved(), state

    here = threading.current_thread().name
    did = (f"pinned, thread {here}", "cuda:1, non_blocking=True")
    found = list(deliver(batches(), "cuda:1"))
    assert [(x.did, y.did, state) for x, y, state in found] == [
        (did, did, state) for state in range(20)]
    assert len(names) == 20 and here not in names
# another number of ranks, another batch

class Numbers:
    """A tokenizer of documents that are a number, over and over: each number is a token."""

    def get_bos_token_id(self):
        return 0

    def encode_to_numpy(self, texts, prepend):
        ids = [[prepend, *map(int, text.split())] for text in texts]
        return np.array(sum(ids, [])), list(map(len, ids))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """900 documents of 5 to 45 tokens, numbered from 1."""
    texts = [" ".join([str(i)] * (5 + 7 * i % 41)) for i in range(1, 901)]
    return write_folder(tmp_path_factory.mktemp("numbers") / "text", [texts, ["1"]], 50)


def states_after(data, count, world_size):
    """(the numbers in `count` batches of each rank, the states after them)."""
    seen, states = set(), []
    for rank in range(world_size):
        batches = load(Numbers(), data, count, rank=rank, world_size=world_size)
        seen |= set(stream_of(batches)) - {0}
        states.append(batches[-1][2])
    return seen, states


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3), (3, 2), (3, 1)])
@pytest.mark.parametrize("count", [16, 21])  # at the end of a shuffle buffer, and inside of one
def test_another_number_of_ranks_reads_nothing_twice_and_skips_little(
        numbers, before, after, count):
    # docs/traps.md: rank-count-on-resume
    seen, states = states_after(numbers, count, before)
    more = []
    for rank in range(after):
        place = {"rank": rank, "world_size": after}
        state = resumed_text(states, 2, Numbers(), 3, 16, numbers, **place)
        lists = [list(state) for state in states]
        assert state == resumed_text(lists, 2, Numbers(), 3, 16, numbers, **place)
        more.append(set(stream_of(load(Numbers(), numbers, 16, B=3, state=state, **place))) - {0})
    assert not seen & set().union(*more) and sum(map(len, more)) == len(set().union(*more))
    skipped = min(map(min, more)) - 1 - len(seen)
    assert skipped * 25 < before * 16 * 2 * 16, "documents of 25 tokens on average"
    if count == 16:
        assert skipped <= 2 * before, "none but those between the ranks"


def test_another_batch_size_continues_behind_the_shuffle_buffer(numbers):
    _, states = states_after(numbers, 21, 2)
    whole = stream_of(load_in_order(Numbers(), numbers, 90, rank=1, world_size=2))
    place = {"rank": 1, "world_size": 2}
    assert resumed_text(states, 2, Numbers(), 2, 16, numbers, **place) == states[1]
    state = resumed_text(states, 2, Numbers(), 3, 16, numbers, **place)
    buffers = 2 * 16 * 2 * 16
    rest = stream_of(load_in_order(Numbers(), numbers, 20, state=state, **place))
    assert rest == whole[buffers:buffers + len(rest)]


@pytest.mark.parametrize("state", [None, 7, (1, 2), (0, 0, 0, 0, -1), (0, 0, 0, 0, 1.5), "00000"])
def test_what_is_no_place_in_the_data_is_refused_in_one_line(state):
    with pytest.raises(ValueError, match="no place in the text"):
        resumed_text([state], 2, Numbers(), 2, 16, "nowhere")
    for no_state in (state, (3, 4), (3, (4, -1)), (-3, ())):
        with pytest.raises(ValueError, match="no place in the conversations"):
            resumed_conversations([no_state])
    with pytest.raises(ValueError, match="no place in the conversations .one rank 10{15} behind"):
        resumed_conversations([(10**15, ()), (0, ())])  # would list all of them


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3), (3, 2), (6, 4)])
def test_another_number_of_ranks_takes_every_conversation_once(tokenizer, talks, before, after):
    # docs/traps.md: rank-count-on-resume
    states = []
    for rank in range(before):
        # ranks may be at different places
        batches = pack(tokenizer, talks, 7 + rank, rank=rank, world_size=before)
        states.append(batches[-1][2])
    assert resumed_conversations(states, 0, before) == states[0]

    taken = []
    for rank, (drawn, waiting) in enumerate(states):
        taken += [draw * before + rank for draw in range(drawn) if draw not in waiting]
    horizon = before * max(drawn for drawn, _ in states) + 100
    for rank in range(after):
        drawn, waiting = resumed_conversations(states, rank, after)
        coming = [draw * after + rank for draw in (*waiting, *range(drawn, horizon))]
        taken += [number for number in coming if number < horizon]
        pack(tokenizer, talks, 1, rank=rank, world_size=after, state=(drawn, waiting))
    assert sorted(taken) == list(range(horizon))


# ----------------------------------------------------------------------------------------------
# The batches and the saved states of today are those of yesterday: a resumed run depends on it.

def numbered_documents(count, step):
    """`count` different documents of 3 to 19 words, made without a random generator."""
    return [
        " ".join(WORDS[(step * i + j * j) % len(WORDS)] for j in range(3 + 5 * i % 17))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A vocabulary of the 256 bytes alone, which no change of the trainer can touch."""
    return Tokenizer([bytes([b]) for b in range(256)])


@pytest.fixture(scope="module")
def pinned_data(tmp_path_factory):
    files = [numbered_documents(count, step) for count, step in ((13, 3), (8, 5), (11, 7), (6, 11))]
    return write_folder(tmp_path_factory.mktemp("pinned") / "text", files, 3)


def digest(batches):
    """Hash of the inputs, the targets and the states of some batches."""
    total = hashlib.sha256()
    for inputs, targets, state in batches:
        assert inputs.dtype == targets.dtype == torch.int64
        total.update(inputs.numpy().tobytes())
        total.update(targets.numpy().tobytes())
        total.update(repr(state).encode("utf-8"))
    return total.hexdigest()[:16]


@pytest.mark.parametrize("split, rank, world_size, expected", [
    ("train", 0, 1, "58c110d5fbb9b2fa"),
    ("train", 1, 3, "3fed6eed1b95ef73"),
    ("val", 0, 1, "3fe27ced34bb1b77"),
    ("val", 1, 2, "69e8b66ac4901d68"),
])
def test_batches_of_text_are_pinned(byte_tokenizer, pinned_data, split, rank, world_size, expected):
    place = {"rank": rank, "world_size": world_size}
    batches = load(byte_tokenizer, pinned_data, 150, split=split, **place)
    assert batches[-1][2][0] >= 1, "the pin covers the second epoch"
    assert digest(batches) == expected
    for i in (4, 75):  # a state in the middle of a buffer, and one in a later buffer
        resumed = load(byte_tokenizer, pinned_data, 70, split=split, state=batches[i][2], **place)
        assert digest(resumed) == digest(batches[i + 1:i + 71])


@pytest.mark.parametrize("state, expected", [
    ((0, 0, 0, 0, 0), "65333231cb691386"),
    ((0, 5, 1, 9, 7), "3c0285a930563211"),
    ((3, 11, 0, 2, 15), "c1628a9083efa2e1"),
])
def test_batches_from_a_saved_state_are_pinned(byte_tokenizer, pinned_data, state, expected):
    batches = load(byte_tokenizer, pinned_data, 40, B=3, T=8, state=state)
    assert all(type(number) is int for _, _, state in batches for number in state)
    assert all(type(state) is tuple and len(state) == 5 for _, _, state in batches)
    assert digest(batches) == expected


@pytest.mark.parametrize("rank, world_size, state, expected", [
    (0, 1, None, "2587528716d9cdd6"),
    (1, 2, None, "fc2f19cff6861fed"),
    (0, 1, (70, (3, 41, 69)), "7f9aa42e0d4b36f8"),
])
def test_batches_of_conversations_are_pinned(byte_tokenizer, rank, world_size, state, expected):
    pairs = zip(numbered_documents(60, 3), numbered_documents(60, 13))
    conversations = [talk(question, answer) for question, answer in pairs]
    options = {"B": 3, "T": 160, "rank": rank, "world_size": world_size}
    batches = pack(byte_tokenizer, conversations, 40, state=state, **options)
    assert batches[-1][2][0] > 120 / world_size, "the pin covers the second epoch"
    assert digest(batches) == expected
    resumed = pack(byte_tokenizer, conversations, 20, state=batches[19][2], **options)
    assert digest(resumed) == digest(batches[20:])
    other_seed = pack(byte_tokenizer, conversations, 20, seed=2, **options)
    assert digest(other_seed) != digest(batches[:20])
