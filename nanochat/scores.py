"""What is made of how many answers were right: scores that compare over tasks."""
import math
from collections import Counter


def centred(accuracy, chance):
    """An accuracy on the scale where guessing has 0 and all right has 1.

    As in the CORE score of DCLM (Li et al. 2024, arXiv 2406.11794).

    >>> centred(0.625, 0.25)
    0.5
    """
    return (accuracy - chance) / (1 - chance)


def majority_share(answers):
    """What the most frequent of the right answers gets right if it is always given, from 0 to 1.

    >>> majority_share(["A", "B", "A", "C"])
    0.5
    """
    [(_, count)] = Counter(answers).most_common(1)
    return count / len(answers)


def pass_at_k(samples, right, k):
    """The probability that one of k answers is right, of `samples` answers with `right` right ones.

    The estimate without bias of Chen et al. (2021, arXiv 2107.03374): 1 - C(n-c, k) / C(n, k).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    assert 1 <= k <= samples
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def sample_counts(samples):
    """The k for which pass@k is given: the powers of two up to `samples`, and `samples`.

    >>> sample_counts(1), sample_counts(10)
    ([1], [1, 2, 4, 8, 10])
    """
    powers = [2**i for i in range(samples.bit_length())]
    return sorted({*powers, samples})
