"""Bits per byte: what a model spends on each raw byte of unseen text, whatever the tokenizer.

    score = score_documents(model, tokenizer, documents, device)
    score.bits_per_byte, score.perplexity

Texts of several domains are compared by their surprise ratios, and a mix is recommended by these.
docs/domains.md says what they tell and what they do not.
"""
import hashlib
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.common import UserError, collective_device

# Of the bound of a diffusion model (docs/llada.md), where every sequence counts by itself; fewer on
# a CPU.
DRAWS = 128


def set_draws(model, draws, few):
    """Set how many draws the bound of a model takes. draws: None: DRAWS, on a CPU `few`.

    UserError for a model whose likelihood is exact, where draws are given.
    """
    if model.causal:
        if draws is not None:
            raise UserError("draws: only a diffusion model has a bound; leave --draws out")
        return
    model.draws = draws or (few if model.device.type == "cpu" else DRAWS)


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


def raw_bytes(documents):
    """How many bytes documents (list of str) are as UTF-8: of the text itself, not of its tokens.
    """
    return sum(len(document.encode("utf-8")) for document in documents)


def protocol_id(documents, holdout="documents"):
    """The name of what bits per byte were measured on: how many documents, and which.

    Figures with the same name compare, whatever the tokenizer and the model. The 1 counts
    definitions of the measure itself: raw bytes, whole documents, <|bos|> no target.
    holdout: "source" where training has read nothing of the sources of these documents.

    >>> protocol_id(["Hello.", "World."])
    'bpb1-2-743cefd7'
    >>> protocol_id(["Hello.", "World."], "source")
    'bpb1-source-2-743cefd7'
    """
    digest = hashlib.sha256()
    for document in documents:
        text = document.encode("utf-8")
        digest.update(len(text).to_bytes(8, "big"))  # so that no other division has the same hash
        digest.update(text)
    split = "" if holdout == "documents" else f"{holdout}-"
    return f"bpb1-{split}{len(documents)}-{digest.hexdigest()[:8]}"


class Score(NamedTuple):
    """What a model spends on documents. <|bos|> is no target: it counts no token and no byte.

    network_nats: what its network would spend alone, without the counts that some models mix in.
    """
    nats: float
    bytes: int
    tokens: int
    network_nats: float

    @property
    def bits_per_byte(self):
        return self.nats / math.log(2) / self.bytes

    @property
    def bits_per_byte_without_counts(self):
        return self.network_nats / math.log(2) / self.bytes

    @property
    def perplexity(self):
        """The exponential of the mean cross-entropy of a token: it depends on the tokenizer."""
        return math.exp(self.nats / self.tokens)


@torch.no_grad()
def score_documents(
    model, tokenizer, documents, device, batch_size=16, rank=0, world_size=1, progress=None,
):
    """The Score of `documents` (list of str, together at least one byte), each whole.

    Of a model that has no likelihood but a bound on it (docs/llada.md), these are upper bounds.
    <|bos|> opens a document and is never a target. One that is longer than the context is scored
    in windows, each token once. Ranks share the sequences; their sums meet in one all-reduce, so
    that uneven shares cannot hang. progress: called with the share that is done, or None.
    """
    T = model.max_targets
    every = cut_into_sequences(documents, tokenizer, T)
    tokens = sum(len(sequence) - 1 for sequence in every)
    sequences = every[rank::world_size]
    was_training = model.training
    model.eval()
    # 1. this rank's share
    nats, network_nats = 0.0, 0.0
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start:start + batch_size]
        inputs, targets = pad_batch(batch, device)
        log_probs, of_network = model.log_probs_of_both(inputs, targets)
        nats -= log_probs.cpu().double().sum().item()  # on the CPU: MPS has no float64
        network_nats -= of_network.cpu().double().sum().item()
        if progress:
            progress((start + len(batch)) / len(sequences))
    model.train(was_training)

    # 2. the sums over ranks
    if world_size > 1:
        totals = torch.tensor(
            [nats, network_nats], dtype=torch.float64, device=collective_device())
        dist.all_reduce(totals)
        nats, network_nats = totals.tolist()
    return Score(nats, raw_bytes(documents), tokens, network_nats)


def evaluate_bpb(model, tokenizer, documents, device, batch_size=16, rank=0, world_size=1):
    """The bits per raw byte of score_documents()."""
    score = score_documents(model, tokenizer, documents, device, batch_size, rank, world_size)
    return score.bits_per_byte


# ------------------------------------------------------------------------------------------------
# several domains

def base_domain(names):
    """The domain that others are compared with: C4 where it was measured, else the first."""
    return "c4" if "c4" in names else next(iter(names))


def surprise_ratios(bits_per_byte):
    """{name: bits per byte} -> {name: that of a domain divided by that of base_domain()}.

    A uniform model whose tokens are bytes has 1 everywhere.
    """
    base = bits_per_byte[base_domain(bits_per_byte)]
    return {name: bits / base for name, bits in bits_per_byte.items()}


def domain_rows(scores, others):
    """{name: figures} of the domains, for a table and a record.

    scores: {name: Score} of a model; others: {"step_0": {name: Score}, ...} of those beside it.
    """
    ratios = _ratios_of(scores)
    rows = {}
    for name, score in scores.items():
        rows[name] = {
            "bytes": score.bytes,
            "tokens": score.tokens,
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
            "ratio": ratios[name],
        }
    for whose, its_scores in others.items():
        its_ratios = _ratios_of(its_scores)
        for name, score in its_scores.items():
            rows[name][whose] = {"bits_per_byte": score.bits_per_byte, "ratio": its_ratios[name]}
    return rows


def _ratios_of(scores):
    return surprise_ratios({name: score.bits_per_byte for name, score in scores.items()})


def recommended_shares(ratios, reference):
    """{name: share of what is added to the training text}, which sum to 1; None for nothing to add.

    ratios: the surprise_ratios() of the model; reference: those of a model that it should be like.
    A domain's share is proportional to max(0, ratio - ratio of the reference). It is a heuristic,
    after the excess loss by which DoReMi (arXiv 2305.10429) weighs domains; there it is of a token,
    measured again and again during training, and here of the whole domain, once.
    """
    excess = {name: max(0.0, ratios[name] - reference[name]) for name in ratios}
    total = sum(excess.values())
    if total == 0:
        return None
    return {name: value / total for name, value in excess.items()}


def figure_to_compare(bits_per_byte, best_by):
    """The number by which the steps of a run are compared: the lowest is the best.

    bits_per_byte: {name of a domain: bits per byte}. best_by: one of the names, or "mean" for the
    mean of all, each of the same weight.
    """
    if best_by == "mean":
        return sum(bits_per_byte.values()) / len(bits_per_byte)
    return bits_per_byte[best_by]
