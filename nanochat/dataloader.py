"""From documents to batches: a stream of tokens, each document opened by <|bos|>, cut into rows of T without waste.

The state that comes with a batch says where the *next* one starts: epoch, row group, row, and how many tokens of
that document are used up. A loader that starts from it goes on with exactly the batches that would have come.
"""
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
                                                  state=None, documents_at_once=64):
    """Endless (inputs (B, T), targets (B, T), state), int64. split: "train" (all shards but the last) or "val"."""
    paths = parquet_paths(data)
    groups = list(iter_row_groups(paths[:-1] if split == "train" else paths[-1:]))
    epoch, group, row, skip = state or (0, 0, 0, 0)
    documents = _documents(groups, rank, world_size, epoch, group, row)
    bos = tokenizer.get_bos_token_id()
    tokens, places = np.empty(0, np.int64), []  # the buffer; where each document in it lies, and how many tokens of it are left
    need = B * T + 1
    while True:
        while len(tokens) < need:
            some = [next(documents) for _ in range(documents_at_once)]
            encoded = tokenizer.encode([text for _, text in some], prepend=bos)
            for (place, _), ids in zip(some, encoded):
                ids = np.array(ids[skip:], dtype=np.int64)
                places.append([place, skip, len(ids)])
                tokens, skip = np.concatenate((tokens, ids)) if len(ids) else tokens, 0
        batch = torch.from_numpy(tokens[:need].copy())
        tokens = tokens[need - 1:]  # the last target is the next batch's first input
        used = need - 1
        while used >= places[0][2]:
            used -= places.pop(0)[2]
        places[0][1] += used
        places[0][2] -= used
        place, skip_here, _ = places[0]
        batch = batch.to(device, non_blocking=True)
        yield batch[:-1].view(B, T), batch[1:].view(B, T), (*place, skip_here)


def sft_data_generator(tokenizer, task, B, T, device="cpu", rank=0, world_size=1, start=0, seed=1):
    """Endless (inputs (B, T), targets (B, T), next start) of whole conversations packed into rows.

    Rows are packed best-fit from a small buffer and padded with <|bos|>, whose targets are ignored (-1), as is all that
    the user says. A conversation longer than a row is cut to it (trap 14). The order is a new shuffle at every epoch.
    """
    pad = tokenizer.get_bos_token_id()
    size = len(task)
    position, order, order_epoch = start, None, None
    buffer = []
    while True:
        inputs = np.full((B, T + 1), pad, np.int64)
        targets = np.full((B, T + 1), -1, np.int64)
        for b in range(B):
            filled = 0
            while True:
                while len(buffer) < 32:
                    epoch, index = divmod(position * world_size + rank, size)
                    if epoch != order_epoch:
                        order, order_epoch = list(range(size)), epoch
                        random.Random(f"{seed} {epoch}").shuffle(order)
                    ids, mask = tokenizer.render_conversation(task[order[index]], max_tokens=T + 1)
                    buffer.append((ids, mask))
                    position += 1
                fits = [i for i, (ids, _) in enumerate(buffer) if len(ids) <= T + 1 - filled]
                if not fits:
                    break
                best = max(fits, key=lambda i: (len(buffer[i][0]), -i))
                ids, mask = buffer.pop(best)
                end = filled + len(ids)
                inputs[b, filled:end] = ids
                targets[b, filled:end] = np.where(np.array(mask, bool), ids, -1)
                filled = end
        yield (torch.from_numpy(inputs[:, :-1].copy()).to(device), torch.from_numpy(targets[:, 1:].copy()).to(device), position)
