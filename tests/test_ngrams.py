"""Counts of the training text and of the text at hand against dictionaries, and the mixture against its definition."""
from collections import Counter, defaultdict

import pytest
import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, GPTConfig
from nanochat.ngrams import LEAST, ORDERS, PARTS, REPEATS, NGrams, count

V = 11
S = 24  # how far back


@pytest.fixture
def ids():
    torch.manual_seed(0)
    return torch.randint(V, (400,)).square() % V  # squares: some tokens are frequent


def dictionary(ids):
    """{context: {next token: times}} of what is kept; contexts are tuples, the newest token first, 0 before the text."""
    found, ids = defaultdict(Counter), ids.tolist()
    for i in range(len(ids) - 1):
        for order in range(ORDERS):
            found[tuple(ids[i - back] if i >= back else 0 for back in range(order + 1))][ids[i + 1]] += 1
    return {context: {token: n for token, n in after.items() if n >= LEAST[len(context) - 1]} for context, after in found.items()}


def make_ngrams(ids):
    keys, counts = count(ids)
    ngrams = NGrams(len(keys))
    ngrams.fill(keys, counts)
    return ngrams


def windows(ids):
    """The last tokens (T - 1, S) at each token but the last, and the contexts that they make as tuples."""
    tokens = F.pad(ids, (S - 1, 0), value=-1).unfold(0, S, 1)[:-1]
    return tokens, [[tuple(max(0, row[-1 - back]) for back in range(order + 1)) for order in range(ORDERS)] for row in tokens.tolist()]


def continuations(row, order):
    """What came, in the last S tokens, after each earlier place where the newest `order` tokens stood."""
    row = [token for token in row if token >= 0]
    return Counter(row[i] for i in range(1, len(row)) if i >= order and row[i - order:i] == row[len(row) - order:])


def make_model(ids):
    torch.manual_seed(0)
    keys, counts = count(ids)
    model = GPT(GPTConfig(2, 64, 4, 4, V, 32, ngrams=len(keys)))
    model.init_weights()
    model.ngrams.fill(keys, counts)
    for p in (*model.gate.parameters(), model.head.weight):
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_counts_are_those_of_a_dictionary(ids):
    twin, ngrams = dictionary(ids), make_ngrams(ids)
    assert len(ngrams.keys) == sum(map(len, twin.values())) and (ngrams.keys.diff() > 0).all()
    unseen = torch.tensor([V - 2, V - 2, V - 2, V - 2, V - 2, V - 2, 1])
    for text in (ids, unseen):
        tokens, tuples = windows(text)
        totals, kinds, hits = ngrams.look_up(tokens, text[1:])
        for row, (names, token) in enumerate(zip(tuples, text[1:].tolist())):
            for order, name in enumerate(names):
                after = twin.get(name, {})
                assert (totals[row, order], kinds[row, order], hits[row, order]) == (sum(after.values()), len(after), after.get(token, 0))


def test_repeats_are_those_of_a_dictionary(ids):
    tokens, _ = windows(ids)
    totals, _, hits = make_ngrams(ids).look_up(tokens, ids[1:])
    for row, token in enumerate(ids[1:].tolist()):
        for order in range(REPEATS):
            after = continuations(tokens[row].tolist(), order)
            assert (totals[row, ORDERS + order], hits[row, ORDERS + order]) == (sum(after.values()), after[token])


def test_leaving_a_token_out_is_counting_the_text_without_it(ids):
    """Without one occurrence of the n-grams that end there, what is left is what a dictionary of the others keeps."""
    tokens, tuples = windows(ids)
    left = make_ngrams(ids).look_up(tokens, ids[1:], left_out=True)
    everything = Counter((name, token) for names, token in zip(tuples, ids[1:].tolist()) for name in names)
    for row in range(0, len(tuples), 7):
        for order, name in enumerate(tuples[row]):
            token = int(ids[row + 1])
            after = {t: everything[name, t] - (t == token) for t in range(V)}
            after = {t: n for t, n in after.items() if n >= LEAST[order]}
            assert [int(x[row, order]) for x in left] == [sum(after.values()), len(after), after.get(token, 0)]


def test_next_tokens_are_the_weighted_shares(ids):
    twin, (tokens, tuples) = dictionary(ids), windows(ids)
    weights = torch.rand(len(tokens), PARTS)
    ngrams = make_ngrams(ids)
    found = ngrams.next_tokens(tokens, ngrams.find(tokens), weights, V)
    wanted = torch.zeros(len(tuples), V)
    for row, names in enumerate(tuples):
        parts = [twin[name] for name in names] + [continuations(tokens[row].tolist(), order) for order in range(REPEATS)]
        for part, after in enumerate(parts):
            for token, n in after.items():
                wanted[row, token] += weights[row, part] * n / sum(after.values())
    torch.testing.assert_close(found, wanted)


def test_tokens_that_were_not_counted_are_not_left_out_of_the_counts(ids):
    """A text longer than what was counted: beyond that, taking an occurrence away would teach the gate to distrust the counts."""
    model, idx = make_model(ids[:200]), ids[300:331][None]
    model.train()
    losses = []
    for model.left_out in (True, False):
        losses.append(model(idx[:, :-1], idx[:, 1:]).item())
    model.eval()
    assert losses[1] == pytest.approx(model(idx[:, :-1], idx[:, 1:]).item()) and losses[0] != pytest.approx(losses[1])


def test_a_text_of_one_token_has_no_ngrams():
    assert [len(part) for part in count(torch.tensor([3]))] == [0, 0]


def test_the_mixture_is_a_distribution_and_the_loss_is_its_logarithm(ids):
    model = make_model(ids).eval()
    idx = torch.cat((ids[:30], torch.full((2,), V - 2)))[None]
    logits = model(idx[:, :-1])
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, 31))
    each = model(idx[:, :-1], idx[:, 1:], reduction="none")
    torch.testing.assert_close(each, F.cross_entropy(logits[0], idx[0, 1:], reduction="none")[None])


def test_decoding_one_by_one_gives_the_logits_of_the_whole_row(ids):
    model, idx = make_model(ids).eval(), ids[:24].view(2, 12)
    cache, pieces = model.new_kv_cache(2, 16), []
    for part in idx.split([5, 1, 1, 5], dim=1):
        pieces.append(model(part, kv_cache=cache))
        cache.advance([0, 1], [part.size(1)] * 2)
    torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_mixture_and_of_the_network_alone(ids):
    model, idx = make_model(ids), ids[:62].view(2, 31)
    targets = idx[:, 1:].clone()
    targets[:, ::5] = -1
    model(idx[:, :-1], targets).backward()
    ours = {name: p.grad.to_dense() for name, p in model.named_parameters()}
    model.zero_grad()
    mixed = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    ngrams, model.ngrams = model.ngrams, None
    alone = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    (mixed + alone).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad.to_dense(), atol=1e-4, rtol=1e-4, msg=name)


def test_only_training_on_the_counted_text_leaves_tokens_out(ids):
    model, idx = make_model(ids), ids[:31][None]
    losses = {}
    for left_out in (False, True):
        for mode in ("train", "eval"):
            getattr(model, mode)()
            model.left_out = left_out
            losses[mode, left_out] = model(idx[:, :-1], idx[:, 1:]).item()
    assert losses["train", True] > losses["train", False] + 0.1
    assert losses["eval", True] == pytest.approx(losses["eval", False]) == pytest.approx(losses["train", False])
