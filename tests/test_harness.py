"""What lm-evaluation-harness asks of a server, and that it gets our own log-likelihoods.

docs/harness.md has a whole run of it; here are the requests that its `local-completions` sends.
"""
import pytest
import requests
import torch
from chat_fakes import MODEL, serve

from core_cases import rows_of, small_tokenizer
from models import make_model
from nanochat.core_bundle import CoreTask
from nanochat.core_eval import as_encoder, judge, make_examples
from nanochat.engine import Engine

CONTEXT = 160


class Served:
    """A model, its tokenizer and the address of its server."""

    def __init__(self, model, tokenizer, address):
        self.model, self.tokenizer, self.address = model, tokenizer, address

    def ask(self, prompts):
        """The choices that the harness gets for prompts, in their order."""
        payload = {
            "model": MODEL,
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        answer = requests.post(self.address + "/v1/completions", json=payload, timeout=30)
        assert answer.status_code == 200, answer.text
        return sorted(answer.json()["choices"], key=lambda choice: choice["index"])

    def expected(self, ids, start):
        """(log-likelihood of ids[start:], whether each is the likeliest), from the whole logits."""
        with torch.inference_mode():
            scores = self.model(torch.tensor([ids]))[0].log_softmax(-1)
        scored = scores[start - 1:-1]
        targets = torch.tensor(ids[start:])
        total = scored.gather(1, targets[:, None]).sum().item()
        return total, bool((scored.argmax(-1) == targets).all())


@pytest.fixture(scope="module")
def served():
    """A small model that ends the first of the texts, and others like it."""
    tokenizer = small_tokenizer()
    model = make_model(vocab_size=tokenizer.get_vocab_size()).eval()
    model.config.max_seq_len = CONTEXT
    model.build_rotary()
    bos = tokenizer.get_bos_token_id()
    first = torch.tensor([tokenizer.encode("".join(pairs()[0]), prepend=bos)])
    with torch.no_grad():
        model.head.weight[bos] = 0.25 * model.features(first)[0][0, -1]
    with serve(Engine(model, tokenizer, max_slots=8), continues=True) as address:
        yield Served(model, tokenizer, address)


def harness_score(choice, context_length):
    """(log-likelihood, is_greedy) as the harness takes them from a choice: behind the context, and
    without the last entry, which it takes to be the token that was generated."""
    logprobs = choice["logprobs"]
    own = logprobs["token_logprobs"][context_length:-1]
    top = logprobs["top_logprobs"][context_length:-1]
    is_greedy = all(value == max(best.values()) for value, best in zip(own, top))
    return sum(own), is_greedy


def pairs():
    """(context, continuation) of the choices of eight items."""
    found = []
    for row in rows_of("multiple_choice"):
        found += [(row["query"] + "\nAnswer:", " " + choice) for choice in row["choices"]]
    return found


@pytest.mark.parametrize("form", ["texts", "token ids"])
def test_the_harness_gets_our_loglikelihoods_also_where_the_text_would_end(served, form):
    """The token that ends an answer counts as generated: without it the last one is cut off."""
    encode, bos = served.tokenizer.encode, served.tokenizer.get_bos_token_id()
    lengths = [len(encode(context)) for context, _ in pairs()]
    texts = [context + continuation for context, continuation in pairs()]
    prompts = texts if form == "texts" else encode(texts)
    opened = 1 if form == "texts" else 0    # a text is opened by <|bos|>, which is not listed

    choices = served.ask(prompts)
    for text, length, choice in zip(texts, lengths, choices):
        ids = [bos] * opened + encode(text)
        assert len(choice["logprobs"]["token_logprobs"]) == len(encode(text)) + 1
        found, is_greedy = harness_score(choice, length)
        expected, is_likeliest = served.expected(ids, length + opened)
        assert found == pytest.approx(expected, abs=1e-4)
        assert is_greedy == is_likeliest
    reasons = [choice["finish_reason"] for choice in choices]
    assert {"stop", "length"} == set(reasons), "both ends are met"


def test_what_the_model_would_write_is_greedy(served):
    """The logprob of a token and the best one of its place are the same number, to the bit."""
    contexts = [served.tokenizer.encode(context) for context, _ in pairs()[::4]]
    best = served.model.next_token_logits(contexts).argmax(-1).tolist()
    prompts = [[*ids, token] for ids, token in zip(contexts, best)]
    for ids, choice in zip(contexts, served.ask(prompts)):
        assert harness_score(choice, len(ids))[1]


def test_verdicts_are_those_of_core(served):
    """The sums differ from CORE's by what the choices of an item share, if anything."""
    rows = rows_of("multiple_choice")
    task = CoreTask("choices", "multiple_choice", 0, "\nAnswer: ", 0.25, rows)
    encode = as_encoder(served.tokenizer)
    examples = make_examples(task, rows, range(len(rows)), encode, CONTEXT)
    for row, example, verdict in zip(rows, examples, judge(served.model, examples, "cpu")):
        context = row["query"] + "\nAnswer:"
        choices = served.ask([f"{context} {choice}" for choice in row["choices"]])
        length = len(served.tokenizer.encode(context))
        theirs = [harness_score(choice, length)[0] for choice in choices]
        sizes = [end - start for start, end in example.spans]
        ours = [score * size for score, size in zip(verdict.scores, sizes)]
        assert ours.index(max(ours)) == theirs.index(max(theirs))
        differences = [a - b for a, b in zip(ours, theirs)]
        assert max(differences) == pytest.approx(min(differences), abs=1e-4)
