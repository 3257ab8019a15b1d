"""CORE: every verdict of the fast way is that of the slow reference, and what a score means."""
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import core_reference
from core_cases import rows_of, small_tokenizer
from models import make_model
from nanochat import core_eval
from nanochat.core_bundle import CoreTask, read_bundle
from nanochat.core_eval import (
    Example,
    NearTies,
    as_encoder,
    choose,
    few_shot_indices,
    half_precision_copy,
    in_order,
    judge,
    judge_fast,
    make_example,
    make_examples,
    render,
    verdict_of,
)
from nanochat.engine import NonFiniteError
from nanochat.variants import CAUSAL, MODEL_CLASSES

REAL = os.environ.get("NANOCHAT_TEST_DATA")
KINDS = ("multiple_choice", "schema", "language_modeling")
TOKENIZER = small_tokenizer()


def task_of(kind, shots=1, delimiter=" "):
    return CoreTask(kind, kind, shots, delimiter, 0.0, rows_of(kind))


def model_of(name, context=32):
    model = make_model(MODEL_CLASSES[name], vocab_size=TOKENIZER.get_vocab_size()).eval()
    model.config.max_seq_len = context
    model.build_rotary()
    return model


def examples_of(model, task, rows, count, control=False):
    encode = as_encoder(TOKENIZER)
    return make_examples(task, rows, range(count), encode, model.config.max_seq_len, control)


def assert_equal_to_reference(model, task, rows, count, tokens=TOKENIZER, atol=2e-5):
    encode = as_encoder(tokens)
    examples = make_examples(task, rows, range(count), encode, model.config.max_seq_len)
    verdicts = judge(model, examples, "cpu")
    for index, verdict in enumerate(verdicts):
        credit, margin = core_reference.verdict(model, tokens, task, rows, index)
        assert verdict.credit == credit, (task.label, index, verdict, margin)
        assert verdict.margin == pytest.approx(margin, abs=atol), (task.label, index)


# ------------------------------------------------------------------------------------------------
# verdicts

@pytest.mark.parametrize("context", [24, 32, 200], ids="context {}".format)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_verdicts_and_margins_equal_the_slow_reference(name, kind, context, monkeypatch):
    """24 tokens cut into the question, 200 hold all of it; several batches, of unequal lengths."""
    monkeypatch.setattr(core_eval, "BATCH_TOKENS", 128)
    task = task_of(kind)
    assert_equal_to_reference(model_of(name, context), task, in_order(task.rows), 8)


@pytest.mark.parametrize("context", [3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_context_shorter_than_a_choice_is_cut_like_the_reference(kind, context):
    task = task_of(kind, shots=0)
    assert_equal_to_reference(model_of("lookup_ngrams", context), task, in_order(task.rows), 8)


def test_choices_without_a_common_beginning_or_of_one_token_equal_the_reference():
    rows = [
        {"query": "Which?", "choices": ["a", "ab", "abc", "abcdefgh"], "gold": 1},
        {"query": "", "choices": ["x", "yes it is so"], "gold": 0},
        {"query": "Same?", "choices": ["no", "no"], "gold": 1},
    ]
    task = CoreTask("odd", "multiple_choice", 0, "", 0.0, rows)
    assert_equal_to_reference(model_of("gpt", 64), task, rows, 3)


@pytest.mark.skipif(not REAL, reason="NANOCHAT_TEST_DATA is not set")
@pytest.mark.parametrize("name", ["gpt", "lookup_ngrams"])
def test_two_rows_of_each_real_task_equal_the_reference(name):
    tasks = read_bundle(Path(REAL) / "eval_bundle")
    assert len(tasks) == 22
    model = model_of(name, 96)
    for task in tasks:
        assert_equal_to_reference(model, task, in_order(task.rows), 2, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_bfloat16_with_repeats_gives_the_verdicts_of_float32(name, kind, monkeypatch):
    monkeypatch.setattr(core_eval, "FIRST_SAMPLE", 3)
    task, model = task_of(kind), model_of(name)
    examples = examples_of(model, task, in_order(task.rows), 8)
    fast, near_ties = half_precision_copy(model), NearTies()
    found = judge_fast(model, fast, examples, near_ties, "cpu")
    exact = judge(model, examples, "cpu")
    assert [verdict.credit for verdict in found] == [verdict.credit for verdict in exact]
    assert near_ties.compared >= 3 and near_ties.largest_error > 0, "bfloat16 rounds"
    assert next(fast.blocks[0].mlp.parameters()).dtype == torch.bfloat16
    assert fast.embed.weight is model.embed.weight, "tables are not copied"
    assert next(model.blocks[0].mlp.parameters()).dtype == torch.float32


def test_near_ties_are_computed_again_until_none_is_left(monkeypatch):
    """The rough model errs by more and more; each larger error makes further margins doubtful."""
    rough = [0.5, 0.09, 0.4, 1.2, 9.0]
    exact = [0.4, -0.09, -0.1, 1.0, 9.0]
    examples = [Example([np.arange(3)], [(2, 3)], -1)] * 5

    def fake(model, examples, *_):
        margins = rough if model == "rough" else [exact[i] for i in chosen(len(examples))]
        return [core_eval.Verdict(float(margin > 0), margin) for margin in margins]

    asked = iter([[0], [1, 2], [3]])

    def chosen(count):
        numbers = next(asked)
        assert len(numbers) == count
        return numbers

    monkeypatch.setattr(core_eval, "judge", fake)
    monkeypatch.setattr(core_eval, "FIRST_SAMPLE", 1)
    monkeypatch.setattr(core_eval, "SAFETY", 5)
    near_ties = NearTies()
    found = judge_fast("exact", "rough", examples, near_ties, "cpu")
    assert [verdict.credit for verdict in found] == [1, 0, 0, 1, 1]
    assert near_ties.compared == 4 and near_ties.largest_error == pytest.approx(0.5)


def test_near_ties_are_repeated_without_the_choices_that_are_certainly_worse():
    ids = [np.arange(length) for length in (3, 4, 5, 6)]
    example = Example(ids, [(2, len(one)) for one in ids], 2)
    near_ties = NearTies()
    near_ties.compare(example, rough=0.5, exact=0.4)
    assert near_ties.bound(example) == pytest.approx(core_eval.SAFETY * 0.1)
    kept = near_ties.rivals(example, [-9.0, -1.1, -1.0, -1.9])
    assert [len(one) for one in kept.sequences] == [4, 5]
    assert kept.spans == [(2, 4), (2, 5)] and kept.gold == 1


def test_a_choice_that_a_larger_error_makes_doubtful_is_read_as_well(monkeypatch):
    """The choice of 4 tokens is beyond the bound, until those of 3 and 5 show a larger error."""
    ids = {length: np.arange(length) for length in (3, 4, 5, 6, 7)}
    sampled = Example([ids[6], ids[7]], [(5, 6), (6, 7)], 0)
    example = Example([ids[3], ids[4], ids[5]], [(2, 3), (3, 4), (4, 5)], 0)
    scores = {
        "rough": {3: -1.0, 4: -1.5, 5: -1.1, 6: -1.0, 7: -5.0},
        "exact": {3: -1.0, 4: -0.9, 5: -1.3, 6: -1.0, 7: -5.1},
    }
    read = []

    def fake(model, examples, *_):
        read.append([[len(ids) for ids in one.sequences] for one in examples])
        verdicts = []
        for one in examples:
            verdicts.append(choose([scores[model][len(ids)] for ids in one.sequences], one.gold))
        return verdicts

    monkeypatch.setattr(core_eval, "judge", fake)
    monkeypatch.setattr(core_eval, "FIRST_SAMPLE", 1)
    monkeypatch.setattr(core_eval, "SAFETY", 3)
    near_ties = NearTies()
    found = judge_fast("exact", "rough", [sampled, example], near_ties, "cpu")
    assert read == [[[6, 7], [3, 4, 5]], [[6, 7]], [[3, 5]], [[3, 4, 5]]]
    assert [verdict.credit for verdict in found] == [1, 0] and near_ties.compared == 2


# ------------------------------------------------------------------------------------------------
# what a verdict means

# docs/traps.md: core-baselines
def test_choices_that_tie_share_the_credit():
    assert choose([-1.0, -1.0, -2.0, -1.0], gold=0)[:2] == (1 / 3, 0.0)
    assert choose([-1.0, -1.0, -2.0, -1.0], gold=2).credit == 0
    assert choose([-1.0, -1.5], gold=0)[:2] == (1.0, 0.5)
    assert choose([-1.0, -1.5], gold=1)[:2] == (0.0, -0.5)


# docs/traps.md: core-baselines
def test_a_model_that_knows_nothing_scores_chance_where_the_first_choice_is_always_right():
    model = model_of("gpt")
    torch.nn.init.zeros_(model.head.weight)
    rows = [{**row, "gold": 0} for row in rows_of("multiple_choice")]
    task = CoreTask("first", "multiple_choice", 0, " ", 0.25, rows)
    verdicts = judge(model, examples_of(model, task, rows, 8), "cpu")
    assert [verdict.credit for verdict in verdicts] == [0.25] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_diverged_model_is_an_error_and_no_verdict(kind):
    model, task = model_of("gpt"), task_of(kind)
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(NonFiniteError):
        judge(model, examples_of(model, task, task.rows, 2), "cpu")


def test_equal_choices_tie_whatever_rounding_did():
    ids = np.arange(5)
    example = Example([ids, ids.copy()], [(3, 5), (3, 5)], 0)
    assert verdict_of(example, [[-1.0, -2.0], [-1.1, -2.0]])[:2] == (0.5, 0.0)


def test_a_continuation_is_right_only_where_every_token_leads():
    example = Example([np.arange(5)], [(3, 5)], -1)
    assert verdict_of(example, [[0.2, 0.1]])[:2] == (1.0, 0.1)
    assert verdict_of(example, [[0.2, -0.1]])[:2] == (0.0, -0.1)
    assert verdict_of(example, [[0.2, 0.0]]).credit == 0, "a tie predicts nothing"


# ------------------------------------------------------------------------------------------------
# prompts

def test_solved_examples_are_drawn_by_the_index_and_are_never_the_row_itself():
    for index in (0, 3, 7):
        others = [i for i in range(8) if i != index]
        wanted = random.Random(1234 + index).sample(others, 4)
        assert few_shot_indices(8, index, 4) == wanted


def test_as_many_solved_examples_are_shown_as_there_are():
    assert sorted(few_shot_indices(4, 2, 10)) == [0, 1, 3]


def test_prompts_are_those_of_nanochat():
    rows = rows_of("multiple_choice")
    task = task_of("multiple_choice", shots=1, delimiter="\nAnswer: ")
    shown = rows[few_shot_indices(8, 1, 1)[0]]
    before = f"{shown['query']}\nAnswer: {shown['choices'][shown['gold']]}\n\n"
    prompts = render(task, rows, 1)
    assert prompts[2] == before + "Question: what has Bob?\nAnswer: two pens"
    continuation = render(task_of("language_modeling", shots=0), rows_of("language_modeling"), 0)
    assert continuation == ["Ann has", "Ann has a red hat"]
    schema = render(task_of("schema", shots=0), rows_of("schema"), 0)
    assert schema == ["Ann took a red hat and left.", "Ann took an old dog and left."]


def test_the_control_asks_for_the_same_choices_after_another_query():
    task = task_of("multiple_choice", shots=1)
    plain, control = render(task, task.rows, 0), render(task, task.rows, 0, control=True)
    assert [text.replace("Ann", "Bob") for text in plain] == control


def test_too_long_prompts_lose_the_same_beginning_for_every_choice():
    task = task_of("multiple_choice")
    sequences = [np.array([0, 1, 2, 3, 4]), np.array([0, 1, 2, 9, 8, 7, 6])]
    example = make_example(task, sequences, 1, context=5)
    assert [ids.tolist() for ids in example.sequences] == [[2, 3, 4], [2, 9, 8, 7, 6]]
    assert example.spans == [(1, 3), (1, 5)]


def test_rows_are_in_the_same_order_every_time():
    rows = list(range(100))
    assert in_order(rows) == in_order(rows) == core_reference.shuffled(rows) != rows
