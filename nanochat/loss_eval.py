"""Bits per byte: what a model spends on each raw byte of unseen text, whatever the tokenizer."""
import math

import torch
import torch.distributed as dist

from nanochat.common import collective_device


def cut_into_sequences(documents, tokenizer, T):
    """Token ids of all documents, each opened by <|bos|>, in pieces of T + 1 that overlap by one.

    So every token but <|bos|> is a target exactly once. Returns a list of lists, shortest first.
    """
    bos = tokenizer.get_bos_token_id()
    sequences = []
    for ids in tokenizer.encode(list(documents), prepend=bos):
        for start in range(0, len(ids) - 1, T):
            sequences.append(ids[start:start + T + 1])
    return sorted(sequences, key=len)


def pad_batch(sequences, device):
    """Lists of ids -> inputs and targets, (B, longest - 1) each; -1 where there is no target."""
    longest = max(map(len, sequences))
    inputs, targets = [], []
    for ids in sequences:
        padding = longest - len(ids)
        inputs.append(ids[:-1] + [0] * padding)
        targets.append(ids[1:] + [-1] * padding)
    return torch.tensor(inputs, device=device), torch.tensor(targets, device=device)


@torch.no_grad()
def evaluate_bpb(model, tokenizer, documents, device, batch_size=16, rank=0, world_size=1):
    """Bits per raw byte of `documents` (list of str), each whole.

    <|bos|> opens a document and is never a target. Ranks share the sequences; their sums meet in
    one all-reduce, so that uneven shares cannot hang.
    """
    T = model.config.max_seq_len
    sequences = cut_into_sequences(documents, tokenizer, T)[rank::world_size]
    was_training = model.training
    model.eval()
    # 1. this rank's share
    nats = 0.0
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start:start + batch_size]
        inputs, targets = pad_batch(batch, device)
        log_probs = model.log_probs(inputs, targets)
        nats -= log_probs.cpu().double().sum().item()  # on the CPU: MPS has no float64
    model.train(was_training)

    # 2. the sum over ranks
    if world_size > 1:
        total = torch.tensor(nats, dtype=torch.float64, device=collective_device())
        dist.all_reduce(total)
        nats = total.item()

    # 3. of each byte
    raw_bytes = sum(len(document.encode("utf-8")) for document in documents)
    return nats / math.log(2) / raw_bytes
