"""Rollouts: answers that the model samples and a task judges, as batches that it learns from.

A step of reinforcement learning asks a few questions, samples a group of answers to each, and makes
the better answers of a group likelier and the worse ones less likely:

    draw_questions     which questions, in an order that a resumed run continues
    sample_groups      a group of answers to each, every answer with a seed of its own
    judge              the reward of an answer, and whether it is right
    group_advantages   how much better than its group an answer is
    micro_batches      tokens, targets and weights for model(inputs, targets, weights)

That is GRPO (Shao et al. 2024, arXiv 2402.03300) as it is without its two safeguards. The answers
are sampled from the weights that they update, so that every probability ratio is 1 and there is
nothing to clip. There is no KL penalty, and so no second model: a small learning rate keeps the
policy near the one that it started from. The loss is a mean over tokens and not over answers (DAPO,
Yu et al. 2025, arXiv 2503.14476), so that a token counts the same in a long answer.

An answer holds tokens that the model did not choose: the tool's reply. They are read, and nothing
is learned from them. An answer that was cut at its last token is judged as it stands, but is
never made likelier: else the model would learn from answers that were right before their end to
write until there is no room.
"""
import functools
import math
import random
from typing import NamedTuple

import torch

from nanochat.common import UserError
from nanochat.scores import pass_at_k

ANSWER_TOKENS = 96      # of an answer at most, where its question does not ask for more
EPSILON = 1e-4          # beside the standard deviation of a group's rewards
STANDARD_ERRORS = 2.0   # by which a score must have moved to count as moved


class Rollout(NamedTuple):
    """An answer that the model sampled."""
    prompt: list        # ids
    tokens: list        # ids of the answer, the tool's replies included
    sampled: list       # for each of these tokens whether the model chose it
    is_cut: bool        # whether it ended at its last token and not by itself
    reward: float       # what the task gives for it
    is_right: bool      # whether the task calls it right


# ------------------------------------------------------------------------------------------------
# sampling and judging

@functools.lru_cache(maxsize=32)
def _order(size, seed, epoch):
    """The indices of a task in the order of an epoch."""
    order = list(range(size))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


def draw_questions(tasks, start, count, seed):
    """[(task, conversation)] of the draws `start` to `start + count` of a run.

    The tasks take turns. Each is asked in a shuffled order, another one in every epoch.
    """
    drawn = []
    for number in range(start, start + count):
        turn, which = divmod(number, len(tasks))
        task = tasks[which]
        epoch, place = divmod(turn, len(task))
        index = _order(len(task), f"{seed} {which}", epoch)[place]
        drawn.append((task, task[index]))
    return drawn


def distinct_draws(tasks, most):
    """At most `most` of the first draws of draw_questions(), without those that repeat a question.

    >>> distinct_draws([range(1), range(3)], 9)
    [0, 1, 3, 5]
    """
    longest = max(map(len, tasks))
    numbers = []
    for number in range(longest * len(tasks)):
        turn, which = divmod(number, len(tasks))
        if turn < len(tasks[which]):
            numbers.append(number)
    return numbers[:most]


def asks_the_same(practised, scored, count):
    """Whether the first `count` questions of the task `scored` are among those of `practised`."""
    def question(task, index):
        return str(task[index]["messages"][-2]["content"])

    wanted = {question(scored, index) for index in range(min(count, len(scored)))}
    return wanted <= {question(practised, index) for index in range(len(practised))}


def seed_of(*numbers):
    """A seed from a few numbers, such as the run's seed, the draw and the sample."""
    return random.Random(repr(numbers)).getrandbits(32)


def sample_groups(engine, questions, seeds, max_new_tokens=None, **options):
    """A list of Rollouts for each question.

    questions: [(task, conversation)]. seeds: for each of them one seed for each answer.
    max_new_tokens: of an answer; None: as many as the question asks for, else 96.
    options: temperature and top_k. A question that leaves no room in the context has no answers.
    """
    # 1. all answers at once, each with its own seed
    groups = []
    for (_, conversation), own_seeds in zip(questions, seeds):
        prompt = engine.tokenizer.render_for_completion(conversation)
        room = max_new_tokens or conversation.get("answer_tokens", ANSWER_TOKENS)
        if len(prompt) >= engine.max_seq_len:
            own_seeds = []
        groups.append([
            engine.new_sequence(prompt, seed=seed, max_new_tokens=room, **options)
            for seed in own_seeds
        ])
    engine.run([sequence for group in groups for sequence in group])

    # 2. what each is worth
    judged = []
    for (task, conversation), group in zip(questions, groups):
        rollouts = []
        for sequence in group:
            parts = engine.tokenizer.parse_completion(sequence.tokens)
            verdict = judge(task, conversation, parts)
            is_cut = sequence.finish_reason == "length"
            answer = sequence.prompt, sequence.tokens, sequence.sampled
            rollouts.append(Rollout(*answer, is_cut, *verdict))
        judged.append(rollouts)
    return judged


def judge(task, conversation, parts):
    """(reward, whether it is right) of an answer's parts.

    UserError, with the place in the task's file, for a reward that is no finite number.
    """
    reward = task.reward(conversation, parts)
    try:
        number = float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{_place_of_reward(task)}: the reward of an answer is {reward!r}, which is no finite "
            "number: return a float, such as 1.0 for a right answer and 0.0 for a wrong one")
    return number, bool(task.evaluate(conversation, parts))


def _place_of_reward(task):
    """The file and line where the reward of a task is defined."""
    own = getattr(task, "task", task)   # of a user's file, which the loader has wrapped
    code = type(own).reward.__code__
    return f"{code.co_filename}, line {code.co_firstlineno}"


# ------------------------------------------------------------------------------------------------
# what is learned from them

def group_advantages(rewards):
    """How much better than its group each answer is: (groups, k) -> (groups, k) float32.

    (reward - mean) / (std + 1e-4) over the k answers of a group (arXiv 2402.03300, section 4.1.2),
    with the standard deviation of the group itself. A group whose rewards are all the same says
    nothing: its advantages are 0.

    >>> group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).round(decimals=2).tolist()
    [[1.0, -1.0], [0.0, 0.0]]
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    spread = rewards.std(-1, correction=0, keepdim=True)
    differ = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)
    return torch.where(differ, centred / (spread + EPSILON), 0.0).float()


def has_spread(group):
    """Whether the rewards of a group, a list of Rollouts, differ."""
    return len({rollout.reward for rollout in group}) > 1


def weighted_rollouts(groups):
    """[(rollout, advantage)] of the groups whose rewards differ; groups: lists of Rollouts."""
    kept = []
    for group in filter(has_spread, groups):
        rewards = [rollout.reward for rollout in group]
        advantages = group_advantages(torch.tensor([rewards]))[0].tolist()
        for rollout, advantage in zip(group, advantages):
            if rollout.is_cut:
                advantage = min(advantage, 0.0)
            kept.append((rollout, advantage))
    return kept


def training_row(rollout, advantage):
    """(inputs, targets, weights) of an answer, three lists of one length.

    A target is -1 where the model did not choose the token: in the prompt and in the tool's reply.
    """
    ids = rollout.prompt + rollout.tokens
    chosen = [False] * len(rollout.prompt) + rollout.sampled
    targets = [token if own else -1 for token, own in zip(ids, chosen)]
    weights = [advantage if own else 0.0 for own in chosen]
    return ids[:-1], targets[1:], weights[1:]


def micro_batches(weighted, micro_batch_size, device, multiple=1, context=math.inf):
    """[(inputs, targets, weights)] of weighted rollouts, each (B, T); answers alike in length are
    together.

    weighted: of weighted_rollouts(). multiple: T is rounded up to one of it, or to the `context` of
    the model where that is less. Of no rollouts, it is one micro-batch without a target.
    """
    rows = [training_row(*one) for one in weighted] or [EMPTY_ROW]
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(rows), micro_batch_size):
        some = rows[start:start + micro_batch_size]
        length = min(-(-len(some[-1][0]) // multiple) * multiple, context)
        batches.append(tuple(
            torch.tensor([values + [filler] * (length - len(values)) for values in column],
                         device=device)
            for column, filler in zip(zip(*some), FILLERS)
        ))
    return batches


EMPTY_ROW = [0], [-1], [0.0]
FILLERS = 0, -1, 0.0    # behind the end of inputs, targets and weights


def evened_out(batches, count, device):
    """The micro-batches of a rank, and empty ones until there are as many as other ranks have."""
    empty = tuple(torch.tensor([values], device=device) for values in EMPTY_ROW)
    return batches + [empty] * (int(count) - len(batches))


# ------------------------------------------------------------------------------------------------
# scores

class Score(NamedTuple):
    """How well held-out questions are answered. Rates and their standard errors over questions."""
    accuracy: float         # the share of right answers, which is pass@1
    accuracy_error: float
    pass_at_k: float        # the share of questions to which one of k answers is right
    reward: float           # mean
    reward_error: float
    cut: float              # the share of answers that were cut


def score_of(groups):
    """The Score of groups of Rollouts, a group for each question. UserError without any answer."""
    groups = [group for group in groups if group]
    if not groups:
        raise UserError("no held-out question leaves room for an answer in the model's context: "
                        "choose a task with shorter questions")
    accuracies, passes, rewards, cuts = [], [], [], []
    for group in groups:
        right = sum(rollout.is_right for rollout in group)
        accuracies.append(right / len(group))
        passes.append(pass_at_k(len(group), right, len(group)))
        rewards.append(sum(rollout.reward for rollout in group) / len(group))
        cuts.append(sum(rollout.is_cut for rollout in group) / len(group))
    return Score(
        *mean_and_error(accuracies),
        mean_and_error(passes)[0],
        *mean_and_error(rewards),
        mean_and_error(cuts)[0],
    )


def mean_and_error(values):
    """(mean, its standard error) of a list of numbers."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return mean, math.sqrt(variance / len(values))


def has_moved(before, after, error_before, error_after):
    """1 where a mean has risen by more than its standard errors explain, -1 where it has fallen by
    as much, else 0."""
    error = STANDARD_ERRORS * math.hypot(error_before, error_after)
    if after > before + error:
        return 1
    return -1 if after < before - error else 0


def hacking_warning(first, last):
    """One line where the reward has risen while right answers have fallen; "" where not.

    first, last: Scores of the same questions, before training and later.
    """
    reward = has_moved(first.reward, last.reward, first.reward_error, last.reward_error)
    right = has_moved(first.accuracy, last.accuracy, first.accuracy_error, last.accuracy_error)
    if reward <= 0 or right >= 0:
        return ""
    return (f"warning: the reward is being hacked: on held-out questions it rose from "
            f"{first.reward:.3g} to {last.reward:.3g}, while right answers fell from "
            f"{rates_of(first, last)}: let reward() follow what evaluate() calls right")


def outcome_warning(first, last):
    """One line where training did not make the answers better; "" where it did."""
    hacked = hacking_warning(first, last)
    if hacked:
        return hacked
    if last.accuracy > first.accuracy:
        return ""
    right = has_moved(first.accuracy, last.accuracy, first.accuracy_error, last.accuracy_error)
    if right < 0 or last.reward > first.reward:
        return (f"warning: right answers went from {rates_of(first, last)}, and the reward from "
                f"{first.reward:.3g} to {last.reward:.3g}: lower --learning_rate, and look whether "
                "reward() pays for something else than what evaluate() calls right")
    if first.accuracy == last.accuracy == 1:
        return ("warning: all held-out questions were answered rightly before training, too: "
                "choose a harder task")
    return (f"warning: right answers to held-out questions did not rise, {rates_of(first, last)}: "
            "lower --learning_rate, give it more minutes, or choose a task that the model solves "
            "at times and not always")


def rates_of(first, last):
    return f"{100 * first.accuracy:.1f} to {100 * last.accuracy:.1f} %"


def nothing_to_learn(groups):
    """Why a step has nothing to learn from its groups, one line."""
    rewards = [rollout.reward for group in groups for rollout in group]
    if not rewards:
        return "no question leaves room for an answer in the model's context"
    if min(rewards) == max(rewards):
        return (f"all {len(rewards)} answers have the reward {rewards[0]:g}, so that there is "
                "nothing to learn: choose questions that the model answers rightly at times")
    return ("the answers to each question all have the same reward, so that there is nothing to "
            "learn: raise --num_samples or --temperature")
