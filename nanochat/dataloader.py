"""From documents to batches: text for pretraining, conversations for midtraining and fine-tuning.

Text. The documents are one endless stream of tokens, each document opened by <|bos|>. The stream is
cut into sequences of T tokens, so that no token is padding. Sequences that follow each other come
from the same document: a batch of sixteen of them would show about four documents. So the loader
fills a shuffle buffer with the sequences of several batches and yields them in random order.

Conversations. Several are packed into one sequence, where each attends to those before it; the
rest is padding. One that is longer than a sequence is cut to it.

Both loaders yield a state with every batch: the place of the *next* batch, as plain integers that a
checkpoint can hold. A loader that is given this state yields exactly the batches that would have
followed. A state belongs to one rank, and to the B, T and number of ranks that it was made with:
resumed_text() and resumed_conversations() make another of it where these have changed.
"""
import contextlib
import functools
import itertools
import queue
import random
import threading
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from nanochat.common import UserError, print0
from nanochat.conversation import as_parts
from nanochat.dataset import open_dataset
from nanochat.shards import read_row_group

IGNORED = -1                # target of a position that gives no loss
BUFFER_BATCHES = 16         # in a shuffle buffer of text
WAITING_CONVERSATIONS = 32  # from which the packing chooses
READ_AHEAD = 8              # batches that a thread has ready for a GPU
MOST_BEHIND = 1_000_000     # conversations, that one rank has drawn fewer than another
MEASURED_BYTES = 8_000_000  # of text that are read and encoded to measure it; less is exact


# ----------------------------------------------------------------------------------------------
# how much text there is

class TextSize(NamedTuple):
    """The size of the training text: raw bytes, and tokens with one <|bos|> for each document."""
    bytes: int
    tokens: int
    exact: bool  # whether all of it was read

    def check_context(self, max_seq_len):
        """UserError where the text is known not to fill a sequence of max_seq_len tokens."""
        if self.exact and max_seq_len and self.tokens <= max_seq_len:
            raise UserError(
                f"the context of {max_seq_len} tokens is longer than the training text of "
                f"{self.tokens}: lower --max_seq_len")


def measure_text(dataset, tokenizer, most_bytes=MEASURED_BYTES):
    """The TextSize of the training documents of a Dataset.

    About most_bytes are read and encoded, whole row groups of them. What the other row groups hold
    follows from their stored sizes, at as many raw bytes and tokens for each stored byte.
    """
    groups = dataset.groups("train")
    raw_bytes = tokens = 0
    read = 0  # row groups
    while read < len(groups) and raw_bytes < most_bytes:
        texts = [text for text in read_row_group(*groups[read]) if text]
        raw_bytes += sum(len(text.encode("utf-8")) for text in texts)
        tokens += sum(map(len, tokenizer.encode(texts))) + len(texts)
        read += 1
    if read == len(groups):
        return TextSize(raw_bytes, tokens, True)
    stored = stored_bytes(groups)
    factor = sum(stored) / max(1, sum(stored[:read]))
    return TextSize(round(factor * raw_bytes), round(factor * tokens), False)


def stored_bytes(groups):
    """The uncompressed size of the column `text` in each row group, a list.

    groups: what Dataset.groups() returned; of a group that counts in part, its share of the rows.
    """
    sizes = []
    for path, of_path in itertools.groupby(groups, key=lambda group: group[0]):
        with pq.ParquetFile(path) as parquet:
            for _, index, *rows in of_path:
                group = parquet.metadata.row_group(index)
                columns = [group.column(i) for i in range(group.num_columns)]
                text = next(column for column in columns if column.path_in_schema == "text")
                first, last = rows or (0, group.num_rows)
                sizes.append(text.total_uncompressed_size * (last - first) / group.num_rows)
    return sizes


# ----------------------------------------------------------------------------------------------
# text

def tokenizing_distributed_data_loader_with_state(
    tokenizer,
    B,
    T,
    split,
    data=None,
    device="cpu",
    rank=0,
    world_size=1,
    state=None,
    buffer_batches=BUFFER_BATCHES,
    documents_at_once=64,
):
    """Yield (inputs (B, T), targets (B, T), state) without end; both tensors are int64 on `device`.

    targets[b, t] is the token that follows inputs[b, t] in the stream.

    split: "train" or "val".
    data: a data path or what open_dataset returned for it.
    buffer_batches: batches in the shuffle buffer; 1 shuffles the sequences of each batch only.
    documents_at_once: documents that are read and encoded together, by several threads.

    The state is (epoch, group, row, token, yielded), five ints:
      epoch    number of times that the whole split has been read before
      group    index of the row group in the split
      row      row of the document in that row group
      token    tokens of that document that earlier shuffle buffers have used up
      yielded  batches of this shuffle buffer that have been yielded
    The first four name the first token in the shuffle buffer that holds the next batch. They also
    seed the buffer's order, so a resumed loader refills the same buffer, shuffles it the same way
    and skips the batches that have been yielded.
    """
    epoch, group, row, token, yielded = state or (0, 0, 0, 0, 0)
    groups = open_dataset(data).groups(split)
    documents = _endless_documents(groups, rank, world_size, epoch, group, row)
    stream = _TokenStream(tokenizer, documents, token, documents_at_once)
    count = buffer_batches * B * T  # tokens in a full shuffle buffer

    while True:
        # fill the shuffle buffer: inputs and targets are (buffer_batches * B, T)
        stream.read(count)
        begin = stream.position()
        tokens = stream.take(count)
        end = stream.position()
        inputs = torch.from_numpy(tokens[:-1].reshape(-1, T).copy())
        targets = torch.from_numpy(tokens[1:].reshape(-1, T).copy())
        order = np.random.default_rng(begin).permutation(buffer_batches * B)
        chosen = torch.from_numpy(order).split(B)

        # yield the batches that have not been yielded yet
        for i in range(yielded, buffer_batches):
            is_last = i + 1 == buffer_batches
            next_state = (*end, 0) if is_last else (*begin, i + 1)
            batch = inputs[chosen[i]], targets[chosen[i]]
            yield *on_device(batch, device), next_state
        yielded = 0


def on_device(batch, device):
    """A batch's tensors on a device, as a list, without waiting for what a GPU has still to do.

    Only from pinned memory does a copy not wait. So the batch itself is pinned: the rows that
    indexing has gathered are in memory of their own, whatever they were gathered from. On MPS the
    copy waits, for its memory could be used again before it was read.
    """
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in batch]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]


def resumed_text(states, saved_B, tokenizer, B, T, data, rank=0, world_size=1):
    """The state with which a rank continues the training text.

    states: of the loaders of all ranks that saved, in the order of the ranks, whose batches were
    (saved_B, T). The rest: of the loader that continues.

    As many ranks, and the same B: the very batches that would have followed.
    As many ranks, another B: the rank's own text, from behind the shuffle buffer in which it was.
    Another number of ranks: all ranks begin at the first document that no rank had in a shuffle
    buffer yet, or before it.

    So nothing is read twice. What is skipped is the rest of the shuffle buffers, at most
    BUFFER_BATCHES * saved_B * T tokens of each rank, and by another number of ranks also what the
    slower ones had yet to read of the text before the fastest one (ranks read as many tokens, but
    in documents of different lengths).

    UserError for states that no loader of text has made.
    """
    for state in states:
        is_state = isinstance(state, (tuple, list)) and len(state) == 5
        if not is_state or not all(type(number) is int and number >= 0 for number in state):
            raise UserError(_no_place(state, "text"))
    if len(states) == world_size and saved_B == B:
        return tuple(states[rank])

    groups = open_dataset(data).groups("train")
    count = BUFFER_BATCHES * saved_B * T
    ranks = range(len(states))
    if len(states) == world_size:
        ranks = [rank]
    ends = [_behind_the_buffer(tokenizer, groups, states[i], count, i, len(states)) for i in ranks]
    epoch, group, row, token = max(ends)
    if len(states) == world_size:
        return epoch, group, row, token, 0
    return epoch, group, row + (token > 0), 0, 0  # not in the midst of a document


def _no_place(state, kind):
    return (f"the checkpoint holds no place in the {kind} ({str(state)[:60]}): start from its "
            "weights, or get it again from where it came")


def _behind_the_buffer(tokenizer, groups, state, count, rank, world_size):
    """(epoch, group, row, token) behind the shuffle buffer of `count` tokens in which a state is.

    Where nothing of the buffer was yielded yet, that is its beginning.
    """
    *place, token, yielded = state
    if not yielded:
        return (*place, token)
    documents = _endless_documents(groups, rank, world_size, *place)
    stream = _TokenStream(tokenizer, documents, token, documents_at_once=64)
    stream.read(count)
    stream.take(count)
    return stream.position()


def _endless_documents(groups, rank, world_size, epoch, group, row):
    """Yield ((epoch, group, row), text) of this rank's documents, without end.

    It begins at the given place. This offset applies to the first group of the first epoch only:
    every later epoch begins at row 0 of group 0.

    Rows are divided among the ranks. The rank that gets row 0 changes with group and epoch: a split
    of fewer rows than ranks would otherwise leave a rank without a document for ever.
    """
    while True:
        for index in range(group, len(groups)):
            texts = read_row_group(*groups[index])
            for number in range(row, len(texts)):
                is_mine = (epoch + index + number) % world_size == rank
                if is_mine and texts[number]:  # a missing or empty text is no document
                    yield (epoch, index, number), texts[number]
            row = 0
        group = 0
        epoch += 1


class _TokenStream:
    """The tokens of endless documents, and the place in the data of each token that comes next.

    documents: yields ((epoch, group, row), text).
    skip: tokens of the very first document that are not part of the stream.
    """

    def __init__(self, tokenizer, documents, skip, documents_at_once):
        self.tokenizer = tokenizer
        self.bos = tokenizer.get_bos_token_id()
        self.documents = documents
        self.documents_at_once = documents_at_once
        self.skip = skip
        self.tokens = np.empty(0, np.int64)  # encoded, not yet taken
        self.spans = []  # for each document in self.tokens: [place, tokens taken, tokens left]

    def read(self, count):
        """Read and encode documents until more than `count` tokens can be taken."""
        while len(self.tokens) <= count:
            some = list(itertools.islice(self.documents, self.documents_at_once))
            texts = [text for _, text in some]
            ids, lengths = self.tokenizer.encode_to_numpy(texts, prepend=self.bos)
            spans = [[place, 0, length] for (place, _), length in zip(some, lengths)]

            # a resumed stream begins inside its first document
            spans[0][1] += self.skip
            spans[0][2] -= self.skip
            ids = ids[self.skip:]
            self.skip = 0

            self.tokens = np.concatenate((self.tokens, ids), dtype=np.int64)
            self.spans += spans

    def position(self):
        """(epoch, group, row, token) of the next token, which must have been read."""
        place, taken, _ = self.spans[0]
        return (*place, taken)

    def take(self, count):
        """Remove the next `count` tokens; returns them and the token after them, (count + 1,).

        That last token is only a target here. It is the first token of the next call.
        """
        tokens = self.tokens[:count + 1]
        self.tokens = self.tokens[count:]

        # drop the documents that are used up; the next token belongs to the first that is left
        while count >= self.spans[0][2]:
            _, _, left = self.spans.pop(0)
            count -= left
        self.spans[0][1] += count
        self.spans[0][2] -= count
        return tokens


# ----------------------------------------------------------------------------------------------
# conversations

def sft_data_generator(
    tokenizer,
    task,
    B,
    T,
    device="cpu",
    rank=0,
    world_size=1,
    state=None,
    seed=1,
    end_padding=None,
):
    """Yield (inputs (B, T), targets (B, T), state) of packed conversations without end, int64.

    task: a list of conversations, {"messages": [...]} each (see tasks/common.py).
    Targets are -1, which gives no loss, on padding (<|bos|>) and on all that the assistant does not
    say. A conversation longer than a sequence is cut to it. Every epoch has its own shuffled order.
    end_padding: of a model that writes an answer as a block, which has a length beforehand
    (GPT.end_padding): each conversation becomes one_answer() of it.

    The state is (drawn, waiting):
      drawn    number of conversations that this rank has taken from the task, over all epochs
      waiting  which of these still wait to be packed, a tuple of their numbers
    """
    @functools.lru_cache(2)  # the waiting conversations are of two epochs at most
    def order(epoch):
        return random.Random(f"{seed} {epoch}").sample(range(len(task)), len(task))

    def render(draw):
        """(draw, ids, mask) of this rank's conversation number `draw`, cut to T + 1 tokens."""
        epoch, i = divmod(draw * world_size + rank, len(task))
        conversation = task[order(epoch)[i]]
        if end_padding is None:
            ids, mask = tokenizer.render_conversation(conversation, max_tokens=T + 1)
            return draw, ids, mask
        ids, _ = tokenizer.render_conversation(conversation)
        rng = random.Random(f"{seed} {rank} {draw}")
        ids, mask = one_answer(tokenizer, ids, end_padding, rng)
        return draw, ids[:T + 1], mask[:T + 1]

    drawn, unpacked = state or (0, ())
    waiting = [render(draw) for draw in unpacked]
    # The documented pad is <|assistant_end|>. The token changes nothing: padding stands behind all
    # conversations of its sequence, attention is causal, and its targets give no loss. <|bos|> is
    # what stands behind a conversation that is not the last one, so that no pattern is new. (Where
    # attention is not causal it is no part of the conversation before it either.)
    pad = tokenizer.get_bos_token_id()
    while True:
        # A sequence of T + 1 tokens gives T inputs and, one position on, T targets.
        inputs = np.full((B, T + 1), pad, np.int64)
        targets = np.full((B, T + 1), IGNORED, np.int64)
        for b in range(B):
            filled = 0
            while True:
                # pack the longest waiting conversation that fits, until none does
                while len(waiting) < WAITING_CONVERSATIONS:
                    waiting.append(render(drawn))
                    drawn += 1
                best = _longest_that_fits(waiting, T + 1 - filled)
                if best is None:
                    break
                _, ids, mask = waiting.pop(best)
                end = filled + len(ids)
                inputs[b, filled:end] = ids
                targets[b, filled:end] = np.where(np.array(mask, bool), ids, IGNORED)
                filled = end

        next_state = (drawn, tuple(draw for draw, _, _ in waiting))
        batch = inputs[:, :-1], targets[:, 1:]
        yield *on_device([torch.from_numpy(part.copy()) for part in batch], device), next_state


def one_answer(tokenizer, ids, end_padding, rng):
    """(ids, mask) of a conversation up to the end of one of its answers, drawn by rng.

    ids: of the whole conversation. Behind the answer there are 0 to end_padding more
    <|assistant_end|>, and all of this is 1 in the mask (arXiv 2502.09992, section 2.3), the tool's
    reply as well: while the model writes, nothing behind its position is there to be seen. Half of
    the answers are cut at a random place: a block of masks in generation may end before the answer
    does.
    """
    start_token = tokenizer.encode_special("<|assistant_start|>")
    end_token = tokenizer.encode_special("<|assistant_end|>")
    start = 1 + rng.choice([place for place, token in enumerate(ids) if token == start_token])
    end = 1 + ids.index(end_token, start)
    answer = ids[start:end] + [end_token] * rng.randint(0, end_padding)
    if rng.random() < 0.5:
        answer = answer[:rng.randint(1, len(answer))]
    return ids[:start] + answer, [0] * start + [1] * len(answer)


def deliver(batches, device):
    """Yield batches (inputs, targets, state) on `device`.

    For a GPU a thread reads them ahead: packing conversations in Python takes longer than the GPU
    needs for them, and would make it wait. The state comes with its batch, so that the state of the
    last batch that was trained is what a resumed run needs, whatever the thread has read since.
    """
    is_cuda = torch.device(device).type == "cuda"
    with contextlib.closing(read_ahead(batches) if is_cuda else batches) as batches:
        for inputs, targets, state in batches:
            yield *on_device((inputs, targets), device), state


def read_ahead(items, count=READ_AHEAD):
    """Yield the items of an iterator in order, up to `count` of them read ahead by a thread.

    What the iterator raises is raised here, in its place. Closed, it ends the thread.
    """
    ready = queue.Queue(count)
    closed = threading.Event()
    end = object()

    def put(item):
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                pass  # look whether it was closed meanwhile

    def read():
        try:
            for item in items:
                put((item, None))
                if closed.is_set():
                    return
            put((end, None))
        except BaseException as error:  # noqa: B902  (whatever it is, it is raised below)
            put((end, error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        closed.set()
        thread.join()


def resumed_conversations(states, rank=0, world_size=1):
    """The state with which a rank continues the conversations.

    states: of the loaders of all ranks that saved, in the order of the ranks.

    As many ranks: the very batches that would have followed. Another number: conversations that
    wait, and those that only some ranks have passed by, go to the ranks by their number, so
    that none is left out or comes twice. B may have changed: a state counts no batches.

    UserError for states that no loader of conversations has made.
    """
    for state in states:
        is_state = isinstance(state, (tuple, list)) and len(state) == 2
        if not is_state or not _are_draws(*state):
            raise UserError(_no_place(state, "conversations"))
    saved_by = len(states)
    if saved_by == world_size:
        drawn, waiting = states[rank]
        return drawn, tuple(waiting)

    # Draw number d of rank r of N is number d * N + r of all conversations drawn.
    furthest = max(drawn for drawn, _ in states)
    behind = furthest - min(drawn for drawn, _ in states)
    if behind > MOST_BEHIND:
        raise UserError(_no_place(f"one rank {behind} behind another", "conversations"))
    left = []
    for saver, (drawn, waiting) in enumerate(states):
        left += [draw * saved_by + saver for draw in (*waiting, *range(drawn, furthest))]
    mine = sorted(number // world_size for number in left if number % world_size == rank)
    return -(-(furthest * saved_by - rank) // world_size), tuple(mine)


def _are_draws(drawn, waiting):
    """Whether these are numbers of conversations, as in a state of sft_data_generator."""
    if not isinstance(waiting, (tuple, list)):
        return False
    return all(type(number) is int and number >= 0 for number in (drawn, *waiting))


def count_cut(tokenizer, task, T):
    """(cut, unanswered): how many conversations of a task are longer than a sequence, and how many
    of them keep nothing that the assistant says once they are cut to it.

    Most conversations are not tokenized for this: a token has a byte at least.
    """
    cut = 0
    unanswered = 0
    for conversation in task:
        if _most_tokens(conversation) <= T + 1:
            continue
        ids, mask = tokenizer.render_conversation(conversation)
        if len(ids) > T + 1:
            cut += 1
            unanswered += not any(mask[:T + 1])
    return cut, unanswered


def _most_tokens(conversation):
    """What a conversation can have in tokens: a byte each, and the control tokens."""
    most = 1
    for message in conversation["messages"]:
        parts = as_parts(message["content"])
        most += 2 + sum(2 + len(part["text"].encode("utf-8")) for part in parts)
    return most


def say_cut(tokenizer, task, T):
    """Say how many conversations of one's own are cut to the context of T tokens, if any."""
    cut, unanswered = count_cut(tokenizer, task, T)
    if cut:
        print0(f"{cut:,} of {len(task):,} conversations are longer than the context of {T} tokens: "
               f"they are cut to it, and {unanswered:,} of them keep no answer to learn from")


def _longest_that_fits(waiting, room):
    """Index of the longest of the (draw, ids, mask) with at most `room` ids, or None.

    Of equally long ones the first: it has waited longest.
    """
    best = None
    best_length = 0
    for i, (_, ids, _) in enumerate(waiting):
        length = len(ids)
        if best_length < length <= room:
            best = i
            best_length = length
    return best
