"""Bits per byte: how many bits the model spends on each raw byte of unseen text, whatever the tokenizer."""
import math

import torch
import torch.distributed as dist


@torch.no_grad()
def evaluate_bpb(model, tokenizer, documents, device, batch_size=16, rank=0, world_size=1):
    """Bits per raw byte of `documents` (list of str), each whole.

    <|bos|> opens a document and is never a target; the document is cut into non-overlapping rows of max_seq_len, the
    last one padded. Ranks share the rows; the sums meet in one all-reduce, so that uneven shares cannot hang.
    """
    T = model.config.max_seq_len
    rows = []
    for ids in tokenizer.encode(list(documents), prepend=tokenizer.get_bos_token_id()):
        rows += [ids[i:i + T + 1] for i in range(0, len(ids) - 1, T)]
    rows = sorted(rows, key=len)[rank::world_size]
    was_training = model.training
    model.eval()
    nats = 0.0
    for start in range(0, len(rows), batch_size):
        part = rows[start:start + batch_size]
        longest = max(map(len, part))
        inputs = torch.tensor([r[:-1] + [0] * (longest - len(r)) for r in part], device=device)
        targets = torch.tensor([r[1:] + [-1] * (longest - len(r)) for r in part], device=device)
        nats += model(inputs, targets, reduction="none").cpu().double().sum().item()  # on mps there is no float64
    model.train(was_training)
    if world_size > 1:
        total = torch.tensor(nats, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        nats = total.item()
    return nats / math.log(2) / sum(len(d.encode("utf-8")) for d in documents)
