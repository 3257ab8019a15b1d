"""Bits per byte against a slow reference implementation."""
import math

import pytest
import torch

from nanochat.gpt import GPT
from nanochat.loss_eval import cut_into_sequences, evaluate_bpb, pad_batch
from nanochat.tokenizer import Tokenizer
from nanochat.variants.lookup import LookupGPT

CONTEXT = 8
DOCUMENTS = ["one two three", "caf\u00e9 \U0001f600 " * 5, "ten"]


@pytest.fixture(scope="module")
def tokenizer():
    text = "one two three four five six seven eight nine ten "
    return Tokenizer.train_from_iterator([text * 9], 285)


def make_model(tokenizer, model_class=GPT):
    torch.manual_seed(0)
    model = model_class(model_class.config_class(1, 32, 2, 2, tokenizer.get_vocab_size(), CONTEXT))
    model.init_weights()
    torch.nn.init.normal_(model.head.weight)
    return model


def slow_bpb(model, tokenizer, documents):
    """The reference implementation: one sequence at a time, from the logits."""
    nats = 0.0
    for text in documents:
        ids = tokenizer.encode(text, prepend=tokenizer.get_bos_token_id())
        for start in range(0, len(ids) - 1, CONTEXT):
            row = ids[start:start + CONTEXT + 1]
            log_probs = torch.log_softmax(model(torch.tensor([row[:-1]]))[0], -1)
            nats -= sum(log_probs[range(len(row) - 1), row[1:]]).item()
    return nats / math.log(2) / sum(len(text.encode("utf-8")) for text in documents)


@pytest.mark.parametrize("model_class", [GPT, LookupGPT])
def test_bits_per_byte_equal_the_slow_ones_for_any_batch(tokenizer, model_class):
    model = make_model(tokenizer, model_class)
    wanted = slow_bpb(model, tokenizer, DOCUMENTS)
    for batch_size in (1, 2, 16):
        found = evaluate_bpb(model, tokenizer, DOCUMENTS, "cpu", batch_size)
        assert found == pytest.approx(wanted, rel=1e-5)
    assert model.training  # as it was before
    evaluate_bpb(model.eval(), tokenizer, DOCUMENTS, "cpu")
    assert not model.training


def test_the_ranks_share_all_sequences_and_their_sums_meet(tokenizer, monkeypatch):
    model = make_model(tokenizer)
    wanted = slow_bpb(model, tokenizer, DOCUMENTS)
    totals = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda both: totals.append(both.tolist()))
    monkeypatch.setattr("nanochat.loss_eval.collective_device", lambda: "cpu")
    for rank in range(3):
        evaluate_bpb(model, tokenizer, DOCUMENTS, "cpu", rank=rank, world_size=3)
    raw_bytes = sum(len(text.encode("utf-8")) for text in DOCUMENTS)
    assert len(totals) == 3 and all(total > 0 for total, _ in totals)
    assert all(total == of_network for total, of_network in totals), "nothing is mixed in"
    nats = sum(total for total, _ in totals)
    assert nats / math.log(2) / raw_bytes == pytest.approx(wanted, rel=1e-5)


def test_every_token_but_the_first_is_a_target_exactly_once(tokenizer):
    bos = tokenizer.get_bos_token_id()
    sequences = cut_into_sequences(DOCUMENTS, tokenizer, CONTEXT)
    targets = sorted(token for sequence in sequences for token in sequence[1:])
    assert targets == sorted(token for text in DOCUMENTS for token in tokenizer.encode(text))
    assert bos not in targets
    lengths = [len(sequence) for sequence in sequences]
    assert lengths == sorted(lengths) and 2 <= lengths[0] and lengths[-1] <= CONTEXT + 1


def test_a_batch_is_padded_with_targets_that_are_ignored():
    inputs, targets = pad_batch([[1, 2], [3, 4, 5, 6]], "cpu")
    assert inputs.tolist() == [[1, 0, 0], [3, 4, 5]]
    assert targets.tolist() == [[2, -1, -1], [4, 5, 6]]
