"""A bound on the likelihood of a masked diffusion model (arXiv 2502.09992, equation 6).

Of L tokens, l ~ U{1..L} are hidden, and the sum of their log-probabilities counts L / l times. Its
mean over l and over the places is the mean log-likelihood over all orders in which the tokens could
be written, and a lower bound on log p. A few draws estimate it without bias.

The random numbers follow from the tokens alone, and not from the batch, the rank or what stands
before the tokens: so an evaluation can be repeated, and two prompts are compared by the same masks.

Shapes: B sequences, T tokens, n draws of each.
"""
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.loss import token_log_probs

# Of one forward pass: what lies in the caches of a CPU is faster (dev/LOG.md).
FORWARD_TOKENS = {"cpu": 4096, "cuda": 16384, "mps": 16384}


def whole_sequences(inputs, targets, padding):
    """(ids (B, T + 1), which of them are to be predicted (B, T + 1)).

    inputs and targets (B, T) as a causal model has them: targets follow the inputs, -1 is none.
    Behind the last target there is padding.
    """
    is_target = F.pad(targets >= 0, (1, 0))
    ids = F.pad(inputs, (0, 1), value=padding)
    ids = torch.where(is_target, F.pad(targets, (1, 0)), ids)
    still_to_come = is_target.flip(1).cumsum(1).flip(1)
    return ids.masked_fill(still_to_come == 0, padding), is_target


def draw_hidden(ids, is_target, draws):
    """Which tokens of a sequence (T,) each draw hides, (n, T) bool.

    The numbers l are at equal distances in 1..L with a random offset: each of them is uniform, and
    their mean varies less than that of independent ones.
    """
    tokens = ids[is_target].cpu().numpy()
    L = len(tokens)
    rng = np.random.default_rng(zlib.crc32(tokens.tobytes()))

    # 1. how many
    distance = (np.arange(draws) + rng.random()) / draws
    counts = np.floor(distance * L).astype(int) + 1

    # 2. which: those that come first in a random order
    order = rng.random((draws, L)).argsort(1).argsort(1)
    hidden = torch.zeros(draws, len(ids), dtype=torch.bool)
    hidden[:, is_target.cpu()] = torch.from_numpy(order < counts[:, None])
    return hidden


def last_targets(is_target):
    """The last position that is to be predicted, (B,), of is_target (B, T); 0 where there is none.
    """
    positions = torch.arange(is_target.size(1), device=is_target.device)
    return (positions * is_target).amax(1)


def hidden_log_probs(model, ids, hidden):
    """The log-probability of each hidden token of ids (B, T), (B, T); 0 of what is not hidden."""
    # 1. where they stand, (B, n): those of a row first, then others of it
    counts = hidden.sum(1)
    most = max(1, int(counts.max()))
    at = hidden.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    is_hidden = torch.arange(at.size(1), device=ids.device) < counts[:, None]   # B, n

    # 2. what is predicted there
    noisy = ids.masked_fill(hidden, model.config.mask_token)
    x, _ = model.features(noisy, at=at)
    targets = ids.gather(1, at)
    log_probs = torch.zeros(at.shape, device=ids.device)
    log_probs[is_hidden] = token_log_probs(
        x[is_hidden],
        model.head_weight(),
        targets[is_hidden],
        model.config.softcap,
    )
    return torch.zeros(ids.shape, device=ids.device).scatter(1, at, log_probs)


@torch.no_grad()
def bound_of(model, inputs, targets, draws):
    """Of each target its part in a lower bound on log p(all targets of its sequence), in nats.

    inputs, targets (B, T) as in whole_sequences(). The sum over a sequence, (B, T) -> (B,), is the
    bound; of what is no target it is 0.
    """
    config = model.config
    ids, is_target = whole_sequences(inputs, targets, config.bos_token)

    # 1. what is hidden in each draw, (B * n, T + 1), and its weight L / l
    drawn = [draw_hidden(*sequence, draws) for sequence in zip(ids, is_target)]
    hidden = torch.cat(drawn).to(ids.device)
    lengths = is_target.sum(1).repeat_interleave(draws)
    weights = lengths / hidden.sum(1).clamp(min=1)

    # 2. the log-probabilities of what is hidden; draws of about as many tokens, of which they hide
    # about as many, share a forward pass
    ids = ids.repeat_interleave(draws, 0)
    ends = last_targets(is_target).repeat_interleave(draws) + 1
    T = ids.size(1)
    by_end_and_count = ends * T + hidden.sum(1)
    order = by_end_and_count.argsort()
    found = torch.zeros(ids.shape, device=ids.device)
    size = max(1, FORWARD_TOKENS[ids.device.type] // T)
    for some in order.split(size):
        end = int(ends[some].max())     # padding is all that follows
        found[some, :end] = hidden_log_probs(model, ids[some, :end], hidden[some, :end])

    # 3. the mean over the draws
    found = found * weights[:, None]
    found = found.view(len(inputs), draws, -1).mean(1)
    return found[:, 1:]
