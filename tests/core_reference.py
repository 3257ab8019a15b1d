"""CORE the slow way: one example and one choice at a time, whole sequences, no cache, float32.

The reference implementation of nanochat/core_eval.py, written from what nanochat's CORE does and
not from that file. It shares no code with it but the model and the tokenizer. A row of a task is a
dict as in the bundle; `task` has kind, shots, delimiter.
"""
import random

import torch


def shuffled(rows):
    order = random.Random(1337)
    copied = [*rows]
    order.shuffle(copied)
    return copied


def shown_before(rows, index, shots):
    """The rows that are shown solved before row `index`."""
    available = [i for i in range(len(rows)) if i != index]
    shots = min(shots, len(available))
    return [rows[i] for i in random.Random(1234 + index).sample(available, shots)]


def prompts(task, rows, index):
    """(prompts, for continuations the context alone or None)"""
    text = ""
    for row in shown_before(rows, index, task.shots):
        if task.kind == "multiple_choice":
            text += f"{row['query']}{task.delimiter}{row['choices'][row['gold']]}\n\n"
        elif task.kind == "schema":
            option = row["context_options"][row["gold"]]
            text += f"{option}{task.delimiter}{row['continuation']}\n\n"
        else:
            text += f"{row['context'].strip()}{task.delimiter}{row['continuation']}\n\n"
    row = rows[index]
    if task.kind == "multiple_choice":
        return [f"{text}{row['query']}{task.delimiter}{choice}" for choice in row["choices"]], None
    if task.kind == "schema":
        wholes = []
        for option in row["context_options"]:
            wholes.append(f"{text}{option}{task.delimiter}{row['continuation']}")
        return wholes, None
    context = f"{text}{row['context'].strip()}{task.delimiter}"
    return [context + row["continuation"]], context.strip()


def same_tokens(lists):
    """How many tokens the lists begin with together."""
    count = 0
    for tokens in zip(*lists):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def spans(task, sequences, context):
    """Where each sequence is scored: (start, end)."""
    found = []
    for ids in sequences:
        if task.kind == "multiple_choice":
            start = same_tokens(sequences)
        elif task.kind == "schema":
            start = len(ids) - same_tokens([other[::-1] for other in sequences])
        else:
            start = same_tokens([context, ids])
        found.append((min(start, len(ids) - 1), len(ids)))
    return found


def encode(tokenizer, text):
    return [int(i) for i in tokenizer.encode(text, prepend=tokenizer.get_bos_token_id())]


@torch.no_grad()
def verdict(model, tokenizer, task, rows, index):
    """(credit, margin) of one row of shuffled rows."""
    texts, context = prompts(task, rows, index)
    sequences = [encode(tokenizer, text) for text in texts]
    scored = spans(task, sequences, context and encode(tokenizer, context))
    too_long = max(0, max(len(ids) for ids in sequences) - model.config.max_seq_len)
    scores, leads = [], []
    for ids, (start, end) in zip(sequences, scored):
        cut = too_long if len(ids) - too_long >= 2 else len(ids) - 2
        ids, start, end = ids[cut:], max(1, start - cut), end - cut
        logits = model(torch.tensor([ids]))[0].double()
        nats = logits.log_softmax(-1)
        scores.append(sum(nats[i - 1, ids[i]].item() for i in range(start, end)) / (end - start))
        for i in range(start, end):
            others = logits[i - 1].clone()
            others[ids[i]] = -torch.inf
            leads.append((logits[i - 1, ids[i]] - others.max()).item())
    if task.kind == "language_modeling":
        return float(min(leads) > 0), min(leads)
    gold = rows[index]["gold"]
    best = max(scores)
    winners = [i for i, score in enumerate(scores) if score > best - 1e-6]
    rest = [score for i, score in enumerate(scores) if i != gold]
    return (1 / len(winners) if gold in winners else 0.0), scores[gold] - max(rest)
