"""Scores made of how many answers were right."""
import itertools

import pytest

from nanochat.scores import centred, majority_share, pass_at_k, sample_counts


def test_a_centred_accuracy_has_guessing_at_zero():
    assert centred(0.25, 0.25) == 0 and centred(1, 0.25) == 1
    assert centred(0, 0.25) == pytest.approx(-1 / 3) and centred(0.3, 0) == 0.3


def test_the_majority_is_the_share_of_the_most_frequent_answer():
    assert majority_share(list("CCCAB")) == 0.6
    assert majority_share([1]) == 1


@pytest.mark.parametrize("samples, right", [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(samples, right):
    answers = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(answers, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_given_for_powers_of_two_and_for_all_samples():
    assert [sample_counts(n) for n in (1, 2, 3, 8, 9)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 9]]
