"""How often the user's own conversations come among the built-in ones.

A few lines must count beside a hundred thousand built-in conversations, and a run of minutes sees a
part of an epoch only. So the mixture is made by shares: divide_epoch() decides how many of an
epoch's conversations are the user's, and the loader shuffles the epoch as a whole, which keeps the
share in any part of it.
"""
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.forecast import ASSUMED_SHARE
from tasks.common import Task, TaskMixture

OWN_WEIGHT = 10        # an epoch has each of one's own conversations this often, beside ours,
MIN_SHARE = 0.1        # but one's own are at least a tenth of what is drawn
MAX_SHARE = 0.5        # and at most half of it
MAX_READINGS = 1000    # and an epoch, which takes a CPU more than an hour, has none more often
MAX_EPOCH = 2_000_000  # conversations in an epoch, for the sake of memory
SAMPLED = 300          # conversations whose mean length is that of all


def check_share(custom, share):
    """UserError for a share of one's own conversations that cannot be had.

    custom: the path of the file, or None. share: the setting, or None.
    """
    if share is None:
        return
    if custom is None:
        raise UserError(f"custom_share={share} is of conversations that --custom=FILE names")
    if not 0 < share <= 1:
        raise UserError(
            f"custom_share={share} is not above 0 and at most 1: 0.3 makes 30 % of what is drawn "
            "your own conversations")


class Portions(NamedTuple):
    """How many conversations of an epoch are one's own, and how many are others."""
    own: int
    others: int

    @property
    def share(self):
        return self.own / (self.own + self.others)


def divide_epoch(lines, others, share=None):
    """The Portions of an epoch.

    lines: conversations in one's own file. others: those of the built-in tasks. share: of one's own
    among all that are drawn, above 0, at most 1. None: by the constants above, so that a few lines
    count beside a hundred thousand others, and many do not displace these.

    >>> divide_epoch(8, 100_000), divide_epoch(8, 900, share=0.1)
    (Portions(own=8000, others=100000), Portions(own=100, others=900))
    """
    is_default = share is None
    if is_default:
        wanted = OWN_WEIGHT * lines / (OWN_WEIGHT * lines + others)
        share = min(MAX_SHARE, max(MIN_SHARE, wanted))
    if share == 1:
        return Portions(lines, 0)

    # the smallest epoch that has every conversation of both kinds, or one that fits the memory
    total = max(lines / share, others / (1 - share))
    total = min(total, max(MAX_EPOCH, lines + others))
    own = max(1, round(share * total))
    rest = max(1, round((1 - share) * total))
    if is_default:
        own = min(own, MAX_READINGS * lines)
    return Portions(own, rest)


class Repeated(Task):
    """`count` examples of a task: all of them, again and again, or fewer, at equal distances."""

    def __init__(self, task, count):
        super().__init__()
        self.task = task
        self.count = count

    def num_examples(self):
        return self.count

    def get_example(self, i):
        if self.count < len(self.task):
            return self.task[i * len(self.task) // self.count]
        return self.task[i % len(self.task)]


def mix_with_own(own, others, share=None):
    """(mixture, Portions): the mixture `others` with one's own conversations among them.

    The loader shuffles an epoch as a whole, so that the share holds in any part of it, too: a run
    of minutes does not finish its first epoch.
    """
    portions = divide_epoch(len(own), len(others), share)
    parts = [Repeated(own, portions.own), Repeated(others, portions.others)]
    return TaskMixture(parts), portions


# ------------------------------------------------------------------------------------------------
# how often each of one's own conversations comes

def planned_tokens(horizon, total_batch_size, device_type, flops_per_second, flops_per_token):
    """Tokens of a run with this Horizon; None where its end is one pass over the mixture.

    flops_per_second: the measured matmul rate of all devices; a run of minutes reaches about
    ASSUMED_SHARE of it.
    """
    if horizon.num_iterations:
        return horizon.num_iterations * total_batch_size
    if horizon.minutes is None:
        return None
    speed = ASSUMED_SHARE[device_type] * flops_per_second / flops_per_token
    return 60 * horizon.minutes * speed


def planned_draws(tokenizer, mixture, tokens):
    """How many conversations of a mixture as many tokens hold; tokens None: all of them, once.

    Conversations are packed, so that their mean length decides, which SAMPLED of them tell.
    """
    if tokens is None:
        return len(mixture)
    step = max(1, len(mixture) // SAMPLED)
    lengths = [
        len(tokenizer.render_conversation(mixture[i])[0])
        for i in range(0, len(mixture), step)
    ]
    return tokens * len(lengths) / sum(lengths)


def times_each(lines, portions, drawn):
    """How often each of `lines` conversations comes where `drawn` are drawn from the mixture."""
    return drawn * portions.share / lines


def say_times(lines, times):
    """Words for times_each(): "each of your 8 conversations about 120 times"."""
    shown = f"{times:,.0f}" if times >= 9.95 else f"{times:.1f}"
    which = f"each of your {lines:,} conversations" if lines > 1 else "your one conversation"
    return f"{which} about {shown} times"
