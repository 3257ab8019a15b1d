"""Ask a chat model the items of a task, and score its answers: what chat_eval does for each task.

    how = How(answerer, batch_size=64)
    asked = ask_all(how, "MMLU", task, numbers, conversations)
    numbers = score(task, conversations, asked)

Beside a multiple-choice question stands its control: the same choices below the question of another
item. A model that knows the answer has lost what it knows it by, and falls to chance; what is left
above chance is the habit of a letter, or a choice that looks like an answer.
"""
import time
import zlib
from typing import NamedTuple

from nanochat.answers import Noise, is_generated
from nanochat.common import gathered, get_dist_info, print0
from nanochat.metrics import wilson_interval
from nanochat.scores import centred, majority_share, pass_at_k, sample_counts
from tasks.common import answer_text, stem_of, with_stem
from tasks.questions import Questions
from tasks.scope import SCOPE_TASKS, is_refusal

PROGRESS_SECONDS = 2


class How(NamedTuple):
    """How questions are asked."""
    answerer: object            # an Answerer (nanochat/answers.py)
    batch_size: int = 64        # answers at a time
    samples: int = 1            # answers to each question, where they are generated
    temperature: float = 0.0    # of these; 0: the likeliest token
    top_k: int = 0              # of these; 0: among all tokens
    control: bool = True        # whether multiple-choice questions have a control

    def noise(self, number, sample):
        """The Noise of one sample of the item `number`; None for a greedy answer."""
        if self.temperature == 0:
            return None
        seed = zlib.crc32(f"{number} {sample}".encode())
        return Noise(self.temperature, self.top_k, seed)


class Asked(NamedTuple):
    """An item and how it was answered."""
    number: int         # of the item in its data set
    right: list         # for each sample whether it is right
    control: object     # whether the control is right; None where there is none
    similarity: float   # to the accepted answer, of a file's questions
    fits: bool          # whether the question fits the context
    given: str          # the text of the first answer


# ------------------------------------------------------------------------------------------------
# asking

def control_of(conversations, place):
    """A multiple-choice conversation with the question of another one; None where there is none.

    The other one stands half of the items away: in a sorted data set, in another subject.
    """
    stem = stem_of(conversations[place])
    if stem is None:
        return None
    count = len(conversations)
    for distance in range(count // 2, count // 2 + count):
        other = stem_of(conversations[(place + distance) % count])
        if other not in (None, stem):
            return with_stem(conversations[place], other)
    return None


def ask(how, task, numbers, conversations, controls):
    """The Asked of items. numbers, conversations, controls: of each item, or None."""
    # 1) answer every sample of every item, and every control
    samples = [how.samples if is_generated(one) else 1 for one in conversations]
    prompts, noises = [], []
    for number, conversation, count in zip(numbers, conversations, samples):
        prompts += [conversation] * count
        noises += [how.noise(number, sample) for sample in range(count)]
    prompts += [one for one in controls if one]
    noises += [None] * (len(prompts) - len(noises))
    answers = how.answerer.answer(prompts, noises)

    # 2) judge them, together
    verdicts = task.evaluate_many(list(zip(prompts, answers)))
    of_controls = iter(verdicts[sum(samples):])

    # 3) what belongs to each item
    asked = []
    first = 0
    for number, conversation, other, count in zip(numbers, conversations, controls, samples):
        parts = answers[first]
        asked.append(Asked(
            number,
            verdicts[first:first + count],
            next(of_controls) if other else None,
            task.similarity(conversation, parts) if isinstance(task, Questions) else 0.0,
            not how.answerer.does_not_fit(conversation),
            answer_text(parts),
        ))
        first += count
    return asked


def ask_all(how, name, task, numbers, conversations):
    """The Asked of all items in their order, on every rank: the ranks share the items out.

    name: of the task, for the lines that say how far it has come. numbers: of the items.
    """
    _, rank, _, world_size = get_dist_info()

    # 1) this rank's items, those of a length together: a batch is padded to its longest
    def length(place):
        return len(str(conversations[place]["messages"][-2]["content"]))

    mine = sorted(range(rank, len(conversations), world_size), key=length)
    has_samples = any(map(is_generated, conversations))
    at_a_time = max(1, how.batch_size // how.samples) if has_samples else how.batch_size

    # 2) their answers
    asked = []
    began = said_at = time.perf_counter()
    for start in range(0, len(mine), at_a_time):
        places = mine[start:start + at_a_time]
        controls = [control_of(conversations, place) if how.control else None for place in places]
        asked += ask(
            how,
            task,
            [numbers[place] for place in places],
            [conversations[place] for place in places],
            controls,
        )
        now = time.perf_counter()
        is_due = now - said_at > PROGRESS_SECONDS
        if is_due and len(asked) < len(mine):
            said_at = now
            left = (now - began) / len(asked) * (len(mine) - len(asked))
            print0(f"{name}: {len(asked)} of {len(mine)} answered, {left:.0f} s left")

    # 3) those of the other ranks
    return sorted(gathered(asked), key=lambda one: one.number)


# ------------------------------------------------------------------------------------------------
# scoring

class Score(NamedTuple):
    """The numbers of a task."""
    right: float        # how many items are right: of several samples, the mean
    count: int          # of items
    accuracy: float     # the share of right answers
    interval: tuple     # (low, high), 95 %
    chance: float       # what guessing gets right
    majority: float     # what always giving the most frequent right answer gets right
    centred: float      # the accuracy with chance at 0
    control: float      # the accuracy of the controls; None where there are none
    pass_at_k: dict     # {k: share} where there are several samples
    f1: float           # the mean similarity, of a file's questions; None of others


def score(task, conversations, asked):
    """The Score of a task's conversations and their Asked, in the same order."""
    count = len(asked)
    right = sum(sum(one.right) / len(one.right) for one in asked)
    chance = chance_of(task, conversations)
    controls = [one.control for one in asked if one.control is not None]
    samples = max(len(one.right) for one in asked)
    shares = {}
    if samples > 1:
        for k in sample_counts(samples):
            shares[k] = sum(pass_at(one, k) for one in asked) / count
    return Score(
        right=right,
        count=count,
        accuracy=right / count,
        interval=wilson_interval(right / count, count),
        chance=chance,
        majority=majority_share([gold_of(one) for one in conversations]),
        centred=centred(right / count, chance),
        control=sum(controls) / len(controls) if controls else None,
        pass_at_k=shares,
        f1=sum(one.similarity for one in asked) / count if isinstance(task, Questions) else None,
    )


def pass_at(one, k):
    """The pass@k of an Asked. An answer that is picked is the same in every sample."""
    samples = len(one.right)
    return pass_at_k(samples, sum(one.right), min(k, samples))


def chance_of(task, conversations):
    """What guessing gets right of these conversations."""
    choices = [one.get("choices") or one.get("letters") for one in conversations]
    shares = [1 / len(some) for some in choices if some]
    return sum(shares) / len(conversations) if shares else task.chance


def gold_of(conversation):
    """The right answer, for the majority: of choices the place of the right one."""
    if "gold" in conversation:
        return conversation["gold"]
    return answer_text(conversation["messages"][-1]["content"])


def score_words(score):
    """A Score as a line's words."""
    def percent(share, digits=1):
        return f"{100 * share:.{digits}f} %"

    low, high = score.interval
    words = [
        f"95 % interval {100 * low:.0f} to {percent(high, 0)}",
        f"chance {percent(score.chance, 0)}",
        f"majority {percent(score.majority, 0)}",
    ]
    if score.control is not None:
        words.append(f"control {percent(score.control)}")
    if score.f1 is not None:
        words.append(f"F1 {percent(score.f1)}")
    words += [f"pass@{k} {percent(share)}" for k, share in score.pass_at_k.items()]
    right = f"{score.right:4.{0 if score.right % 1 == 0 else 1}f} of {score.count} right"
    return f"{right}, {100 * score.accuracy:5.1f} % ({', '.join(words)})"


# ------------------------------------------------------------------------------------------------
# declining

class Declined(NamedTuple):
    """How often questions were declined. Shares are None where there were no questions."""
    should: float           # of those that a chat should decline, the share that it did
    should_count: int
    should_not: float       # of all others
    should_not_count: int


def refusals_of(conversations, asked):
    """For each item whose answer is written, whether it was declined, a list of bools.

    An answer that is picked from choices declines nothing.
    """
    pairs = zip(conversations, asked)
    return [is_refusal(one.given) for conversation, one in pairs if is_generated(conversation)]


def declined_of(refusals):
    """The Declined of {task: what refusals_of() returns}."""
    should, should_not = [], []
    for name, of_task in refusals.items():
        (should if name in SCOPE_TASKS else should_not).extend(of_task)
    shares = [sum(some) / len(some) if some else None for some in (should, should_not)]
    return Declined(shares[0], len(should), shares[1], len(should_not))


def declined_words(declined):
    """A Declined as a line's words."""
    words = [
        f"{100 * declined.should:.1f} % of {declined.should_count:,} questions that it should",
    ]
    if declined.should_not is not None:
        count = declined.should_not_count
        words.append(f"{100 * declined.should_not:.1f} % of {count:,} that it should not")
    return ", ".join(words)


# ------------------------------------------------------------------------------------------------
# wrong answers

def one_line(text):
    """A text as one short line of visible characters."""
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "?" for c in words)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def show_wrong(conversations, asked, shown):
    """Print question, expected and given answer of the first `shown` wrong ones."""
    wrong = [pair for pair in zip(conversations, asked) if not pair[1].right[0]]
    for conversation, one in wrong[:shown]:
        *_, question, expected = conversation["messages"]
        print0(f"  asked     {one_line(question['content'])}")
        print0(f"  expected  {one_line(answer_text(expected['content']))}")
        print0(f"  given     {one_line(one.given)}")
