"""From documents to batches: a stream of tokens, each document opened by <|bos|>, cut into rows of T without waste.

Rows that follow each other are of one document: a batch of sixteen such rows would show some four documents.
So the stream is read in stretches of several batches, and a stretch's rows are dealt out in random order.

The state that comes with a batch says where the *next* one is: epoch, row group, row and token at which its stretch
begins, and how many batches of the stretch are dealt. A loader that starts from it goes on with exactly the batches that
would have come.
"""
import functools
import random

import numpy as np
import torch

from nanochat.dataset import iter_row_groups, parquet_paths, read_row_group


def _documents(groups, rank, world_size, epoch, group, row):
    """Endless ((epoch, group, row), text), rows shared out over the ranks; the offset applies once, then is zero (trap 1).

    The share moves on with group and epoch, so that a split of fewer rows than ranks leaves no rank waiting for ever.
    """
    while True:
        for group in range(group, len(groups)):
            texts = read_row_group(*groups[group])
            for row in range(row, len(texts)):
                if (epoch + group + row) % world_size == rank:
                    yield (epoch, group, row), texts[row]
            row = 0
        epoch, group = epoch + 1, 0


def tokenizing_distributed_data_loader_with_state(tokenizer, B, T, split, data=None, device="cpu", rank=0, world_size=1,
                                                  state=None, stretch=16, documents_at_once=64):
    """Endless (inputs (B, T), targets (B, T), state), int64. split: "train" (all shards but the last) or "val"."""
    paths = parquet_paths(data)
    groups = list(iter_row_groups(paths[:-1] if split == "train" else paths[-1:]))
    epoch, group, row, skip, dealt = state or (0, 0, 0, 0, 0)
    documents = _documents(groups, rank, world_size, epoch, group, row)
    bos = tokenizer.get_bos_token_id()
    tokens, places = np.empty(0, np.int64), []  # the buffer; [place, tokens used, tokens left] of each document in it
    count = stretch * B * T
    while True:
        while len(tokens) <= count:  # the last target is one token further, the next stretch's first input
            some = [next(documents) for _ in range(documents_at_once)]
            ids, lengths = tokenizer.encode_to_numpy([text for _, text in some], prepend=bos)
            places += [[place, 0, length] for (place, _), length in zip(some, lengths)]
            places[-len(some)][1:] = skip, lengths[0] - skip
            tokens, skip = np.concatenate((tokens, ids[skip:]), dtype=np.int64), 0
        begin = (*places[0][0], places[0][1])
        used = count
        while used >= places[0][2]:
            used -= places.pop(0)[2]
        places[0][1:] = places[0][1] + used, places[0][2] - used
        end = (*places[0][0], places[0][1])
        inputs, targets = (torch.from_numpy(tokens[i:count + i].reshape(-1, T).copy()) for i in (0, 1))
        if torch.device(device).type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()  # so that copying them waits for nothing
        tokens = tokens[count:]
        order = torch.from_numpy(np.random.default_rng(begin).permutation(stretch * B)).split(B)
        for i in range(dealt, stretch):
            yield (inputs[order[i]].to(device, non_blocking=True), targets[order[i]].to(device, non_blocking=True),
                   (*begin, i + 1) if i + 1 < stretch else (*end, 0))
        dealt = 0


def sft_data_generator(tokenizer, task, B, T, device="cpu", rank=0, world_size=1, state=None, seed=1):
    """Endless (inputs (B, T), targets (B, T), state) of whole conversations packed into rows.

    Rows are packed best-fit from a small buffer and padded with <|bos|>, whose targets are ignored (-1), as is all that
    the user says. A conversation longer than a row is cut to it (trap 14). The order is a new shuffle at every epoch.
    The state is how many conversations this rank has drawn, and which of these still wait in the buffer.
    """
    pad = tokenizer.get_bos_token_id()

    @functools.lru_cache(2)  # a buffer holds conversations of two epochs at most
    def order(epoch):
        return random.Random(f"{seed} {epoch}").sample(range(len(task)), len(task))

    def render(draw):
        epoch, i = divmod(draw * world_size + rank, len(task))
        return draw, *tokenizer.render_conversation(task[order(epoch)[i]], max_tokens=T + 1)

    drawn, waiting = state or (0, ())
    buffer = [render(draw) for draw in waiting]
    while True:
        inputs = np.full((B, T + 1), pad, np.int64)
        targets = np.full((B, T + 1), -1, np.int64)
        for b in range(B):
            filled = 0
            while True:
                while len(buffer) < 32:
                    buffer.append(render(drawn))
                    drawn += 1
                fits = [i for i, (_, ids, _) in enumerate(buffer) if len(ids) <= T + 1 - filled]
                if not fits:
                    break
                _, ids, mask = buffer.pop(max(fits, key=lambda i: (len(buffer[i][1]), -i)))
                end = filled + len(ids)
                inputs[b, filled:end] = ids
                targets[b, filled:end] = np.where(np.array(mask, bool), ids, -1)
                filled = end
        state = drawn, tuple(draw for draw, _, _ in buffer)
        yield torch.from_numpy(inputs[:, :-1].copy()).to(device), torch.from_numpy(targets[:, 1:].copy()).to(device), state
