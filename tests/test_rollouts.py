"""Groups of answers, what they are worth, and the batches that are made of them."""
import math
import random

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.rollouts import (
    Rollout,
    Score,
    asks_the_same,
    distinct_draws,
    draw_questions,
    evened_out,
    group_advantages,
    hacking_warning,
    has_moved,
    judge,
    micro_batches,
    nothing_to_learn,
    outcome_warning,
    sample_groups,
    score_of,
    seed_of,
    training_row,
    weighted_rollouts,
)
from nanochat.tokenizer import Tokenizer
from models import make_model
from tasks.arithmetic import Arithmetic
from tasks.common import Task, answer_text, conversation


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat on the mat, 12*7 is 84, and the dog ran. " * 20]
    return Tokenizer.train_from_iterator(texts, 290)


class Cats(Task):
    """`size` questions; an answer is right where it has an e, and worth what `worth` is."""

    worth = None

    def __init__(self, size=5, say="cat"):
        super().__init__()
        self.size = size
        self.say = say

    def num_examples(self):
        return self.size

    def get_example(self, i):
        return conversation(f"{self.say} {i}", "yes")

    def evaluate(self, conversation, parts):
        return "e" in answer_text(parts)

    def reward(self, conversation, parts):
        return float(self.evaluate(conversation, parts)) if self.worth is None else self.worth


def rollout(reward, tokens=(5, 6), sampled=None, is_cut=False, is_right=False, prompt=(1, 2, 3)):
    sampled = [True] * len(tokens) if sampled is None else sampled
    return Rollout(list(prompt), list(tokens), sampled, is_cut, reward, is_right)


# ------------------------------------------------------------------------------------------------
# sampling and judging

def test_every_question_is_drawn_once_an_epoch_and_tasks_take_turns():
    few, many = Cats(3), Cats(7)
    drawn = draw_questions([few, many], 0, 42, seed=1)
    assert [task for task, _ in drawn] == [few, many] * 21
    texts = [one["messages"][0]["content"] for _, one in drawn[1::2]]
    epochs = [texts[:7], texts[7:14], texts[14:]]
    assert all(sorted(epoch) == [f"cat {i}" for i in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1], "the order of each epoch is another"
    assert draw_questions([few, many], 17, 9, seed=1) == drawn[17:26], "as a resumed run draws"
    assert draw_questions([few, many], 0, 42, seed=2) != drawn


def test_a_held_out_question_is_scored_once_however_few_there_are():
    few, many = Cats(2), Cats(5)
    for most, wanted in ((3, 3), (7, 7), (128, 7)):
        numbers = distinct_draws([few, many], most)
        drawn = [draw_questions([few, many], number, 1, 0)[0] for number in numbers]
        found = {(task, one["messages"][0]["content"]) for task, one in drawn}
        assert len(found) == len(numbers) == wanted


def test_an_answer_depends_on_its_question_and_its_seed_alone(tokenizer):
    model = make_model(vocab_size=tokenizer.get_vocab_size()).eval()
    engine, task = Engine(model, tokenizer), Cats()
    questions = [(task, task[i]) for i in range(4)]
    seeds = [[seed_of(9, number, i) for i in range(3)] for number in range(4)]
    options = {"temperature": 1.0, "top_k": 0, "max_new_tokens": 8}
    together = sample_groups(engine, questions, seeds, **options)
    assert len({tuple(one.tokens) for one in together[0]}) == 3, "seeds of a group differ"
    for question, own, group in zip(questions, seeds, together):
        assert sample_groups(engine, [question], [own], **options) == [group]
    for one in together[0]:
        said = answer_text(tokenizer.parse_completion(one.tokens))
        assert one.is_right == ("e" in said) and one.reward == float(one.is_right)
        assert one.is_cut == (len(one.tokens) == 8)


def test_a_question_that_fills_the_context_has_no_answers(tokenizer):
    model = make_model(vocab_size=tokenizer.get_vocab_size()).eval()
    long, short = Cats(say="cat " * 30), Cats()
    questions = [(long, long[0]), (short, short[0])]
    options = {"temperature": 1.0, "top_k": 0, "max_new_tokens": 3}
    groups = sample_groups(Engine(model, tokenizer), questions, [[1, 2], [3, 4]], **options)
    assert groups[0] == [] and len(groups[1]) == 2
    assert weighted_rollouts(groups[:1]) == [] and "no question" in nothing_to_learn(groups[:1])
    with pytest.raises(UserError, match="shorter questions"):
        score_of(groups[:1])


@pytest.mark.parametrize("worth", [math.nan, math.inf, 10**400, "a lot", [1.0]])
def test_a_reward_that_is_no_finite_number_is_an_error_that_names_its_place(worth):
    task = Cats()
    task.worth = worth
    line = Cats.reward.__code__.co_firstlineno
    with pytest.raises(UserError, match=rf"test_rollouts.py, line {line}: .* no finite number"):
        judge(task, task[0], [])


def test_numbers_of_any_kind_are_rewards():
    task = Cats()
    for worth, reward in ((True, 1.0), (2, 2.0), (torch.tensor(0.5), 0.5)):
        task.worth = worth
        assert judge(task, task[0], [{"type": "text", "text": "yes"}]) == (reward, True)


# ------------------------------------------------------------------------------------------------
# what is learned from them

def test_advantages_have_mean_zero_and_deviation_one_in_each_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.3, 0.1, 0.9, 7.0]])
    found = group_advantages(rewards)
    assert found.mean(-1).abs().max() < 1e-6
    assert (found.std(-1, correction=0) - 1).abs().max() < 1e-3
    assert torch.equal(group_advantages(torch.full((1, 8), 0.1)), torch.zeros(1, 8))
    shifted = group_advantages(rewards * 3 + 5)
    assert (shifted - found).abs().max() < 1e-3, "the scale of a reward does not matter"


def test_groups_without_spread_are_left_out_and_a_cut_answer_is_never_made_likelier():
    same = [rollout(1.0), rollout(1.0)]
    mixed = [rollout(1.0, is_cut=True), rollout(0.0, is_cut=True), rollout(1.0), rollout(0.0)]
    weighted = weighted_rollouts([same, mixed, []])
    assert [one for one, _ in weighted] == mixed
    advantages = [advantage for _, advantage in weighted]
    assert advantages == pytest.approx([0.0, -1.0, 1.0, -1.0], abs=1e-3)


def test_nothing_is_learned_from_the_prompt_and_from_the_reply_of_the_tool():
    # docs/traps.md: forced-tokens
    own = [True, False, False, True]
    row = training_row(rollout(1.0, tokens=(4, 5, 6, 7), sampled=own), 0.5)
    inputs, targets, weights = row
    assert inputs == [1, 2, 3, 4, 5, 6]
    assert targets == [-1, -1, 4, -1, -1, 7]
    assert weights == [0.0, 0.0, 0.5, 0.0, 0.0, 0.5]


def some_rollouts(count, vocab_size=97):
    """Weighted rollouts of many lengths."""
    rng = random.Random(0)
    weighted = []
    for _ in range(count):
        ids = [rng.randrange(vocab_size) for _ in range(rng.randint(4, 25))]
        prompt, tokens = ids[:3], ids[3:]
        own = [rng.random() < 0.7 for _ in tokens]
        weighted.append((rollout(0.0, tokens, own, prompt=prompt), rng.uniform(-2, 2)))
    return weighted


def reference_loss(model, weighted):
    """The sum over the chosen tokens of -advantage * log p, one answer at a time."""
    total = torch.zeros(())
    for one, advantage in weighted:
        ids = one.prompt + one.tokens
        log_probs = model(torch.tensor([ids]))[0].log_softmax(-1)
        for place, (token, own) in enumerate(zip(one.tokens, one.sampled)):
            if own:
                total = total - advantage * log_probs[len(one.prompt) + place - 1, token]
    return total


@pytest.mark.parametrize("size, multiple", [(4, 1), (64, 1), (3, 8)])
def test_padded_micro_batches_have_the_gradient_of_one_answer_at_a_time(size, multiple):
    weighted, model = some_rollouts(11), make_model()
    wanted = torch.autograd.grad(
        reference_loss(model, weighted), list(model.parameters()), allow_unused=True)
    batches = micro_batches(weighted, size, "cpu", multiple)
    assert all(len(inputs) <= size for inputs, _, _ in batches)
    assert all(inputs.size(1) % multiple == 0 for inputs, _, _ in batches)
    loss = sum(model(*batch) for batch in batches)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for a, b in zip(wanted, found):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_micro_batch_is_never_longer_than_the_context():
    weighted = [(rollout(1.0, tokens=[5] * 17), 1.0)]
    lengths = [micro_batches(weighted, 4, "cpu", 16, context)[0][0].size(1) for context in (24, 40)]
    assert lengths == [24, 32]


def test_a_rank_without_rollouts_gets_batches_that_teach_nothing():
    batches = evened_out(micro_batches([], 4, "cpu"), 3, "cpu")
    assert len(batches) == 3
    assert sum((targets >= 0).sum() for _, targets, _ in batches) == 0
    model = make_model()
    loss = sum(model(*batch) for batch in batches)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_a_step_along_the_gradient_makes_better_answers_likelier_and_worse_ones_less_likely():
    model = make_model()
    better, worse = rollout(1.0, (5, 6, 7)), rollout(0.0, (8, 9, 5))
    weighted = weighted_rollouts([[better, worse]])

    def log_prob(one):
        with torch.no_grad():
            return -float(reference_loss(model, [(one, 1.0)]))

    before = log_prob(better), log_prob(worse)
    (batch,) = micro_batches(weighted, 4, "cpu")
    model(*batch).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-4 * p.grad
    assert log_prob(better) > before[0] and log_prob(worse) < before[1]


# ------------------------------------------------------------------------------------------------
# scores

def test_a_score_counts_answers_and_questions():
    groups = [
        [rollout(1.0, is_right=True), rollout(0.0)],
        [rollout(0.0), rollout(0.0, is_cut=True)],
        [rollout(2.0, is_right=True), rollout(1.0, is_right=True)],
    ]
    score = score_of(groups)
    assert score.accuracy == pytest.approx(0.5) and score.pass_at_k == pytest.approx(2 / 3)
    assert score.reward == pytest.approx(4 / 6) and score.cut == pytest.approx(1 / 6)
    assert score.accuracy_error == pytest.approx(math.sqrt(1 / 6 / 3))


def score(accuracy, reward, error=0.01):
    return Score(accuracy, error, 1.0, reward, error, 0.0)


def test_a_reward_that_rises_while_right_answers_fall_is_called_hacked():
    # docs/traps.md: hacked-reward
    first = score(0.5, 0.5)
    assert "being hacked" in hacking_warning(first, score(0.3, 0.9))
    assert "being hacked" in outcome_warning(first, score(0.3, 0.9))
    for last in (score(0.7, 0.9), score(0.49, 0.9), score(0.3, 0.51), score(0.3, 0.3)):
        assert hacking_warning(first, last) == "", last


def test_a_score_that_did_not_rise_is_said():
    assert outcome_warning(score(0.5, 0.5), score(0.6, 0.6)) == ""
    for accuracy in (0.5, 0.49):
        assert "did not rise" in outcome_warning(score(0.5, 0.5), score(accuracy, 0.5))
    assert "choose a harder task" in outcome_warning(score(1.0, 1.0), score(1.0, 1.0))


def test_answers_that_became_worse_are_not_given_more_minutes():
    for last in (score(0.2, 0.5), score(0.49, 0.51)):
        said = outcome_warning(score(0.5, 0.5), last)
        assert "more minutes" not in said and "reward()" in said


def test_questions_that_are_practised_and_scored_are_told():
    practised, others = Arithmetic("train", 20), Arithmetic("test", 20)
    assert asks_the_same(practised, practised, 5)
    assert not asks_the_same(practised, others, 5)


def test_a_score_moves_by_more_than_its_errors_explain_or_not_at_all():
    assert has_moved(0.5, 0.6, 0.01, 0.01) == 1 and has_moved(0.6, 0.5, 0.01, 0.01) == -1
    assert has_moved(0.5, 0.6, 0.05, 0.05) == 0


def test_a_step_without_spread_says_why():
    always = [[rollout(1.0), rollout(1.0)], [rollout(1.0), rollout(1.0)]]
    assert "all 4 answers have the reward 1" in nothing_to_learn(always)
    unlike = [[rollout(1.0), rollout(1.0)], [rollout(0.0), rollout(0.0)]]
    assert "to each question all have the same" in nothing_to_learn(unlike)
