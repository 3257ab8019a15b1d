"""Counts against dictionaries, and the mixture of counts and network against its definition."""
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import in_pieces, make_model
from nanochat.loss import chunk_softcap
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.ngrams import (
    COMPONENTS,
    CONTEXT_ORDERS,
    MIN_COUNTS,
    NGRAM_ORDERS,
    NGramGPT,
    NGrams,
    chunk_mixture,
    count_ngrams,
    count_texts,
)

V = 11
S = 24  # lookback


@pytest.fixture
def ids():
    torch.manual_seed(0)
    return torch.randint(V, (400,)).square() % V  # squares: some tokens are frequent


def dictionary(ids):
    """{context: {next token: times}} of what is kept: the reference implementation of counting.

    Contexts are tuples, the newest token first, 0 before the text.
    """
    found, ids = defaultdict(Counter), ids.tolist()
    for i in range(len(ids) - 1):
        for order in range(NGRAM_ORDERS):
            context = tuple(ids[i - back] if i >= back else 0 for back in range(order + 1))
            found[context][ids[i + 1]] += 1
    return {
        context: {token: n for token, n in after.items() if n >= MIN_COUNTS[len(context) - 1]}
        for context, after in found.items()
    }


def make_ngrams(ids):
    keys, counts = count_ngrams(ids)
    ngrams = NGrams(len(keys))
    ngrams.fill(keys, counts)
    return ngrams


def windows(ids):
    """The last tokens (T - 1, S) up to each token but the last, and their contexts as tuples."""
    tokens = F.pad(ids, (S - 1, 0), value=-1).unfold(0, S, 1)[:-1]
    contexts = []
    for row in tokens.tolist():
        newest_first = [max(0, token) for token in row[::-1]]
        contexts.append([tuple(newest_first[:order + 1]) for order in range(NGRAM_ORDERS)])
    return tokens, contexts


def continuations(row, order):
    """What came in the last S tokens wherever the newest `order` tokens stood before."""
    row = [token for token in row if token >= 0]
    newest = row[len(row) - order:]
    return Counter(
        row[i] for i in range(1, len(row)) if i >= order and row[i - order:i] == newest)


def make_mixture(ids):
    """An NGramGPT that has counted ids, and whose gate and head matter."""
    keys, counts = count_ngrams(ids)
    model = make_model(NGramGPT, vocab_size=V, ngrams=len(keys))
    model.init_weights()
    model.ngrams.fill(keys, counts)
    for p in (*model.gate.parameters(), model.head.weight):
        torch.nn.init.normal_(p, std=0.3)
    return model


# -------------------------------------------------------------------------------- counts

def test_counts_are_those_of_a_dictionary(ids):
    reference, ngrams = dictionary(ids), make_ngrams(ids)
    assert len(ngrams.keys) == sum(map(len, reference.values()))
    assert (ngrams.keys.diff() > 0).all()
    unseen = torch.tensor([V - 2, V - 2, V - 2, V - 2, V - 2, V - 2, 1])
    for text in (ids, unseen):
        tokens, contexts = windows(text)
        found = ngrams.look_up(tokens, text[1:])
        for row, (names, token) in enumerate(zip(contexts, text[1:].tolist())):
            for order, name in enumerate(names):
                after = reference.get(name, {})
                assert found.context_counts[row, order] == sum(after.values())
                assert found.continuations[row, order] == len(after)
                assert found.target_counts[row, order] == after.get(token, 0)


def test_counts_of_the_context_are_those_of_a_dictionary(ids):
    tokens, _ = windows(ids)
    found = make_ngrams(ids).look_up(tokens, ids[1:])
    for row, token in enumerate(ids[1:].tolist()):
        for order in range(CONTEXT_ORDERS):
            after = continuations(tokens[row].tolist(), order)
            assert found.context_counts[row, NGRAM_ORDERS + order] == sum(after.values())
            assert found.target_counts[row, NGRAM_ORDERS + order] == after[token]


def test_leave_one_out_is_counting_the_text_without_it(ids):
    """Without one occurrence of the n-grams that end at a token, what remains is what a dictionary
    of the others keeps."""
    tokens, contexts = windows(ids)
    found = make_ngrams(ids).look_up(tokens, ids[1:], leave_one_out=True)
    everything = Counter(
        (name, token) for names, token in zip(contexts, ids[1:].tolist()) for name in names)
    for row in range(0, len(contexts), 7):
        for order, name in enumerate(contexts[row]):
            token = int(ids[row + 1])
            after = {t: everything[name, t] - (t == token) for t in range(V)}
            after = {t: n for t, n in after.items() if n >= MIN_COUNTS[order]}
            wanted = [sum(after.values()), len(after), after.get(token, 0)]
            assert [int(numbers[row, order]) for numbers in found] == wanted


def test_leave_one_out_leaves_the_counts_of_the_context_as_they_are(ids):
    tokens, _ = windows(ids)
    whole = make_ngrams(ids).look_up(tokens, ids[1:])
    without = make_ngrams(ids).look_up(tokens, ids[1:], leave_one_out=True)
    for name in ("context_counts", "target_counts"):
        both = [getattr(found, name)[:, NGRAM_ORDERS:] for found in (whole, without)]
        assert torch.equal(*both)


def test_next_token_probs_are_the_weighted_shares(ids):
    reference, (tokens, contexts) = dictionary(ids), windows(ids)
    weights = torch.rand(len(tokens), COMPONENTS)
    ngrams = make_ngrams(ids)
    found = ngrams.next_token_probs(tokens, ngrams.find_contexts(tokens), weights, V)
    wanted = torch.zeros(len(contexts), V)
    for row, names in enumerate(contexts):
        components = [reference[name] for name in names]
        components += [
            continuations(tokens[row].tolist(), order) for order in range(CONTEXT_ORDERS)]
        for component, after in enumerate(components):
            for token, n in after.items():
                wanted[row, token] += weights[row, component] * n / sum(after.values())
    torch.testing.assert_close(found, wanted)


def test_a_text_of_one_token_has_no_ngrams():
    assert [len(part) for part in count_ngrams(torch.tensor([3]))] == [0, 0]


class Letters:
    """A tokenizer of one token per letter, behind token 0 at the beginning of a text."""

    def get_bos_token_id(self):
        return 0

    def encode_to_numpy(self, texts, prepend):
        ids = [token for text in texts for token in (prepend, *text.encode())]
        return np.array(ids, dtype=np.uint32), None


def test_counting_stops_at_its_tokens_and_says_how_much_of_the_text_was_counted(capsys):
    texts = ["abcabc", "abd"]
    whole = count_texts(iter(texts), Letters(), max_tokens=11, seconds=60)
    assert whole.tokens == 0  # all of it
    ids = torch.tensor([0, *b"abcabc", 0, *b"abd"])
    assert torch.equal(whole.keys, count_ngrams(ids)[0])
    assert "11 tokens" in capsys.readouterr().out

    part = count_texts(iter(texts), Letters(), max_tokens=5, seconds=60)
    assert part.tokens == 5 and torch.equal(part.keys, count_ngrams(ids[:5])[0])
    assert count_texts(iter(texts), Letters(), max_tokens=5, seconds=0) is None
    assert count_texts(iter([]), Letters(), max_tokens=5, seconds=60) is None


# -------------------------------------------------------------------------------- the mixture

def test_tokens_that_were_not_counted_are_not_taken_from_the_counts(ids):
    """A text longer than what was counted: beyond that, taking an occurrence away would teach the
    gate to distrust the counts."""
    model, idx = make_mixture(ids[:200]), ids[300:331][None]
    model.train()
    losses = []
    for model.leave_one_out in (True, False):
        losses.append(model(idx[:, :-1], idx[:, 1:]).item())
    model.eval()
    assert losses[1] == pytest.approx(model(idx[:, :-1], idx[:, 1:]).item())
    assert losses[0] != pytest.approx(losses[1])


def test_only_training_on_the_counted_text_is_leave_one_out(ids):
    model, idx = make_mixture(ids), ids[:31][None]
    losses = {}
    for leave_one_out in (False, True):
        for mode in ("train", "eval"):
            getattr(model, mode)()
            model.leave_one_out = leave_one_out
            losses[mode, leave_one_out] = model(idx[:, :-1], idx[:, 1:]).item()
    assert losses["train", True] > losses["train", False] + 0.1
    assert losses["eval", True] == pytest.approx(losses["eval", False])
    assert losses["eval", False] == pytest.approx(losses["train", False])


def test_the_mixture_is_a_distribution_and_the_loss_is_its_logarithm(ids):
    model = make_mixture(ids).eval()
    idx = torch.cat((ids[:30], torch.full((2,), V - 2)))[None]
    logits = model(idx[:, :-1])
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, 31))
    each = -model.log_probs(idx[:, :-1], idx[:, 1:])
    wanted = F.cross_entropy(logits[0], idx[0, 1:], reduction="none")
    torch.testing.assert_close(each, wanted.detach()[None])


def test_both_log_probs_are_those_of_the_mixture_and_of_the_network_alone(ids):
    model = make_mixture(ids).eval()
    idx = ids[:62].view(2, 31)
    targets = idx[:, 1:].clone()
    targets[:, ::5] = -1
    mixed, alone = model.log_probs_of_both(idx[:, :-1], targets)
    torch.testing.assert_close(mixed, model.log_probs(idx[:, :-1], targets))
    torch.testing.assert_close(alone, model.for_chat().log_probs(idx[:, :-1], targets))
    assert not torch.allclose(mixed, alone) and (alone[:, ::5] == 0).all()


def test_decoding_one_by_one_gives_the_logits_of_the_whole_sequence(ids):
    model, idx = make_mixture(ids).eval(), ids[:24].view(2, 12)
    pieces = in_pieces(model, idx, [5, 1, 1, 5])
    torch.testing.assert_close(pieces, model(idx).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_the_mixture_and_of_the_network_alone(ids, weighted):
    model, idx = make_mixture(ids), ids[:62].view(2, 31)
    targets = idx[:, 1:].clone()
    targets[:, ::5] = -1
    weights = torch.randn(targets.shape) if weighted else None
    loss = model(idx[:, :-1], targets, weights)
    loss.backward()
    ours = {name: p.grad.to_dense() for name, p in model.named_parameters()}
    model.zero_grad()

    def plain(logits):
        each = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return (each * (1 if weights is None else weights.flatten())).sum()

    mixed = plain(model(idx[:, :-1]))
    alone = plain(super(NGramGPT, model).logits(*model.features(idx[:, :-1])))
    torch.testing.assert_close(loss, mixed)  # the network's own is in the gradient alone
    (mixed + alone).backward()
    for name, p in model.named_parameters():
        wanted = p.grad.to_dense()
        torch.testing.assert_close(ours[name], wanted, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("cap", [0, 15.0])
def test_the_chunk_of_the_mixture_has_the_gradients_of_plain_autograd(cap):
    torch.manual_seed(0)
    z = torch.randn(9, V, requires_grad=True)
    log_gate = torch.randn(9).sub(2).requires_grad_()
    counted = torch.rand(9).mul(0.5).requires_grad_()
    targets, weights = torch.randint(V, (9,)), torch.randn(9)

    capped = cap * torch.tanh(z / cap) if cap else z
    own = F.cross_entropy(capped, targets, reduction="none")
    mixed = -torch.log((log_gate - own).exp() + counted)
    by_gate, by_counted = torch.autograd.grad(
        (mixed * weights).sum(), (log_gate, counted), retain_graph=True)
    by_z, = torch.autograd.grad(((mixed + own) * weights).sum(), z)

    with torch.no_grad():
        inputs = targets, weights, log_gate, counted
        losses, gradient, others = chunk_mixture(cap, z.clone(), *inputs)
    torch.testing.assert_close(losses, (mixed * weights).detach())
    torch.testing.assert_close(gradient, by_z)
    torch.testing.assert_close(others, (by_gate, by_counted))


def test_without_any_counts_the_mixture_is_the_network(ids):
    """Then the loss is the plain one, and its gradient is there twice."""
    torch.manual_seed(0)
    z, targets, weights = torch.randn(9, V), torch.randint(V, (9,)), torch.randn(9)
    nothing = torch.zeros(9), torch.zeros(9)  # a gate of 1, and nothing counted
    losses, gradient, _ = chunk_mixture(15.0, z.clone(), targets, weights, *nothing)
    wanted, once, _ = chunk_softcap(15.0, z.clone(), targets, weights)
    torch.testing.assert_close(losses, wanted)
    torch.testing.assert_close(gradient, 2 * once)


def test_without_counts_the_network_is_a_lookup_model_of_its_own(ids):
    model, idx = make_mixture(ids).eval(), ids[:32].view(2, 16)
    network = model.for_chat()
    assert type(network) is LookupGPT and not network.training
    assert not any("ngrams" in name or "gate" in name for name in network.state_dict())
    own = super(NGramGPT, model).logits(*model.features(idx))
    torch.testing.assert_close(network(idx), own)

    model.compute_dtype = torch.bfloat16
    network = model.train().for_chat()
    assert network.training and network.compute_dtype == torch.bfloat16
    network(idx, idx).backward()
    assert network.bigram.weight.grad.is_sparse
