"""The learning rate as a function of progress (0 at the first step, 1 at the end of the budget),
and Muon's momentum as a function of the step.

Progress is the used share of the budget, whatever the budget counts: minutes, steps or a pass over
the data. A run on a budget of time therefore always finishes its LR decay, however slow the
machine turned out to be.

The learning rate of a parameter in a step is the product of three numbers:
    --learning_rate             the setting of the stage's script, Muon's peak
    its recipe's multiple       OPTIMIZERS in gpt.py, and (width / 768)^-0.5 where the recipe says
                                by_width; setup_optimizers() stores the product of these two in the
                                parameter group as `initial_lr`
    the multiplier of the step  lr_multiplier(progress) here, times Run.lr_scale, which every
                                roll-back halves; set_learning_rates() writes `lr` into the groups
"""


def lr_multiplier(progress, warmup=0.02, warmdown=0.6, final=0.02):
    """The learning rate as a share of its peak: linear warm-up (from .1), constant, linear decay.

    The decay takes the last `warmdown` of the run and ends at `final` of the peak.
    """
    if progress < warmup:
        return max(0.1, progress / warmup)
    if progress < 1 - warmdown:
        return 1.0
    return final + (1 - final) * max(0.0, 1 - progress) / warmdown


def muon_momentum(step, start=0.85, end=0.95, steps=300):
    """Muon's momentum at a step: it rises while the first gradients are still wild."""
    return start + (end - start) * min(1.0, step / steps)


def set_learning_rates(optimizers, multiplier, momentum=None):
    """Give every parameter group its learning rate: its initial one times the multiplier.

    momentum: Muon's, or None to leave it.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if momentum is not None and "momentum" in group:
                group["momentum"] = momentum
