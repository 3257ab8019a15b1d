"""Learning rates and momentum as functions of progress."""
from types import SimpleNamespace

import pytest

from nanochat.schedule import lr_multiplier, muon_momentum, set_learning_rates


def test_the_learning_rate_never_rises_after_warm_up_nor_leaves_0_to_1():
    """docs/traps.md: micro-batch-counting, lr-rises-again"""
    multipliers = [lr_multiplier(p / 1000) for p in range(1200)]  # also beyond the end
    peak = multipliers.index(1.0)
    warm_up, after = multipliers[:peak + 1], multipliers[peak:]
    assert warm_up == sorted(warm_up)
    assert after == sorted(after, reverse=True)
    assert all(0 < multiplier <= 1 for multiplier in multipliers)
    assert multipliers[1000] == pytest.approx(0.02)
    assert multipliers[1199] == pytest.approx(0.02)


def test_the_learning_rate_warms_up_is_constant_and_decays_linearly():
    assert lr_multiplier(0, warmup=0, warmdown=1) == 1.0
    assert lr_multiplier(0, warmup=0.1) == 0.1  # never zero
    assert lr_multiplier(0.05, warmup=0.1) == 0.5
    assert lr_multiplier(0.3999) == 1.0
    assert lr_multiplier(0.7, warmdown=0.6, final=0) == pytest.approx(0.5)
    assert lr_multiplier(0.5, warmup=0, warmdown=1, final=0.2) == pytest.approx(0.6)
    assert lr_multiplier(0.99, warmdown=0) == 1.0


def test_momentum_rises_over_the_first_steps():
    assert muon_momentum(0) == 0.85 and muon_momentum(10_000) == 0.95
    assert muon_momentum(150) == pytest.approx(0.9)


def test_every_group_keeps_its_ratio_to_the_others():
    adamw = SimpleNamespace(param_groups=[{"initial_lr": 0.2}, {"initial_lr": 0.004}])
    muon = SimpleNamespace(param_groups=[{"initial_lr": 0.02, "momentum": 0.95}])
    for multiplier in (1.0, 0.5):  # always from the initial one
        set_learning_rates([adamw, muon], multiplier, momentum=0.9)
        found = [group["lr"] for group in adamw.param_groups]
        assert found == [0.2 * multiplier, 0.004 * multiplier]
        assert muon.param_groups[0]["lr"] == 0.02 * multiplier
    assert muon.param_groups[0]["momentum"] == 0.9 and "momentum" not in adamw.param_groups[0]
    set_learning_rates([muon], 0.25)
    assert muon.param_groups[0] == {"initial_lr": 0.02, "momentum": 0.9, "lr": 0.005}
