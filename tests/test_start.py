"""Where a run starts: every combination of settings and checkpoints, without a process."""
import itertools

import pytest

from nanochat.common import UserError
from nanochat.plan import BUDGETS
from nanochat.start import (
    EXTENDED,
    FRESH,
    RESUMED,
    Choice,
    check_named,
    choose_base_checkpoint,
    reason_for_fresh_chat,
    reason_to_start_fresh,
    resume_hint,
)

FINGERPRINT, OTHER = "abc", "xyz"
NAMES = "resume", "resume_from_checkpoint", "extend", "model_tag", "depth", "data", *BUDGETS


def settings_with(**given):
    """The settings of base_train that decide where it starts: all None, but for these."""
    assert given.keys() <= set(NAMES)
    return {**dict.fromkeys(NAMES), "resume": False, **given}


def meta_of(step, before_decay=True, finished=False, **more):
    """What a meta file says of a step."""
    return {
        "step": step,
        "before_decay": before_decay,
        "finished": finished,
        "tokenizer": FINGERPRINT,
        "settings": settings_with(),
        **more,
    }


STEPS = [meta_of(10), meta_of(20), meta_of(30, before_decay=False)]
FINISHED = [*STEPS, meta_of(40, before_decay=False, finished=True)]


# -------------------------------------------------------------------------------- which checkpoint

@pytest.mark.parametrize("metas", [[], STEPS, FINISHED], ids=["none", "some", "finished"])
def test_without_a_word_about_checkpoints_a_run_is_fresh(metas):
    assert choose_base_checkpoint(settings_with(), metas) == Choice(FRESH, None)
    assert choose_base_checkpoint(settings_with(depth=4, minutes=3.0), metas) == Choice(FRESH, None)


@pytest.mark.parametrize("metas", [STEPS, FINISHED], ids=["some", "finished"])
def test_resume_takes_the_newest_undamaged_step(metas):
    assert choose_base_checkpoint(settings_with(resume=True), metas) == Choice(RESUMED, None)


def test_resume_without_any_checkpoint_starts_fresh_and_says_so():
    choice = choose_base_checkpoint(settings_with(resume=True), [])
    assert choice == Choice(FRESH, None, "nothing to resume: starting from step 0")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("metas", [[], STEPS, FINISHED], ids=["none", "some", "finished"])
def test_a_named_step_is_resumed_whatever_else_is_there(metas, resume):
    given = settings_with(resume=resume, resume_from_checkpoint="20")
    assert choose_base_checkpoint(given, metas, named_step=20) == Choice(RESUMED, 20)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("metas", [STEPS, FINISHED], ids=["some", "finished"])
def test_extend_takes_the_newest_step_from_before_the_decay(metas, resume):
    given = settings_with(resume=resume, extend=2.0)
    assert choose_base_checkpoint(given, metas) == Choice(EXTENDED, 20)


@pytest.mark.parametrize("metas", [STEPS, FINISHED], ids=["some", "finished"])
def test_extend_takes_the_named_step(metas):
    given = settings_with(extend=2.0, resume_from_checkpoint="10")
    assert choose_base_checkpoint(given, metas, named_step=10) == Choice(EXTENDED, 10)


@pytest.mark.parametrize("metas", [
    [],
    [meta_of(30, before_decay=False)],
    [{"step": 30, "finished": True}],  # of a stage that knows no decay
], ids=["none", "after the decay", "not said"])
def test_there_must_be_something_to_extend(metas):
    with pytest.raises(UserError, match="is from before LR decay"):
        choose_base_checkpoint(settings_with(extend=2.0), metas)


@pytest.mark.parametrize("resume", [False, True])
def test_the_same_extension_is_resumed_where_it_stopped(resume):
    stopped = [*FINISHED, meta_of(50, before_decay=False, extend=2.0)]
    given = settings_with(resume=resume, extend=2.0)
    assert choose_base_checkpoint(given, stopped) == Choice(RESUMED, None)
    named = settings_with(resume=resume, extend=2.0, resume_from_checkpoint="50")
    assert choose_base_checkpoint(named, stopped, named_step=50) == Choice(RESUMED, 50)


def test_another_extension_or_a_finished_one_is_extended_again():
    stopped = [*FINISHED, meta_of(50, extend=2.0)]
    assert choose_base_checkpoint(settings_with(extend=3.0), stopped) == Choice(EXTENDED, 50)
    finished = [*stopped, meta_of(60, before_decay=False, finished=True, extend=2.0)]
    assert choose_base_checkpoint(settings_with(extend=2.0), finished) == Choice(EXTENDED, 50)


def test_every_combination_gives_a_choice_or_one_refusal():
    kinds = set()
    every = itertools.product(
        (False, True), (None, 2.0, 3.0), (None, 20), ([], STEPS, FINISHED, FINISHED[:1]))
    for resume, extend, named_step, metas in every:
        given = settings_with(resume=resume, extend=extend)
        try:
            choice = choose_base_checkpoint(given, metas, named_step)
        except UserError:
            assert extend and not metas and named_step is None
            continue
        kinds.add(choice.kind)
        assert (choice.step is None) == (choice.kind != EXTENDED and named_step is None)
        assert bool(choice.message) == (choice.kind == FRESH and resume)
        if named_step is not None:
            assert choice.step == named_step
    assert kinds == {FRESH, RESUMED, EXTENDED}


# -------------------------------------------------------------------------------- whether it fits

@pytest.mark.parametrize("given", [{}, {"depth": 4}, {"model_tag": "d4"}])
@pytest.mark.parametrize("tokenizer", [FINGERPRINT, OTHER])
def test_a_finished_run_is_not_resumed(given, tokenizer):
    meta = meta_of(40, finished=True, tokenizer=tokenizer)
    reason = reason_to_start_fresh(settings_with(resume=True, **given), "d4", meta, FINGERPRINT)
    assert reason == "the newest checkpoint of d4 is a finished run: starting from step 0"


def test_an_unfinished_run_is_resumed_where_settings_and_tokenizer_are_its_own():
    for name in ("data", *BUDGETS):
        given = settings_with(resume=True, **{name: 7})
        meta = meta_of(30, settings=settings_with(**{name: 7}))
        assert reason_to_start_fresh(given, "d4", meta, FINGERPRINT) == ""


@pytest.mark.parametrize("name", ["data", *BUDGETS])
def test_a_run_that_was_found_and_not_named_must_be_the_same_run(name):
    of_another_run = "the newest checkpoint, of d4, is of another run: starting from step 0"
    given = settings_with(resume=True, **{name: 7})
    for theirs in (settings_with(), settings_with(**{name: 8}), {}):
        meta = meta_of(30, settings=theirs)
        assert reason_to_start_fresh(given, "d4", meta, FINGERPRINT) == of_another_run
        # named, it may be resumed toward another budget or with other data
        for named in ({"depth": 4}, {"model_tag": "d4"}):
            assert reason_to_start_fresh({**given, **named}, "d4", meta, FINGERPRINT) == ""


def test_another_tokenizer_is_another_run_and_refused_where_the_run_was_named():
    meta = meta_of(30, tokenizer=OTHER)
    found = reason_to_start_fresh(settings_with(resume=True), "d4", meta, FINGERPRINT)
    assert found == "the newest checkpoint, of d4, is of another run: starting from step 0"
    for named in ({"depth": 4}, {"model_tag": "d4"}):
        with pytest.raises(UserError) as refused:
            reason_to_start_fresh(settings_with(resume=True, **named), "d4", meta, FINGERPRINT)
        assert str(refused.value) == (
            "d4 was trained with another tokenizer: train again without --resume")


@pytest.mark.parametrize("kind", [RESUMED, EXTENDED])
def test_a_named_checkpoint_must_have_this_tokenizer(kind):
    check_named(kind, "folder", meta_of(20), FINGERPRINT)
    with pytest.raises(UserError) as refused:
        check_named(kind, "folder", meta_of(20, tokenizer=OTHER), FINGERPRINT)
    assert str(refused.value) == (
        "folder was trained with another tokenizer: bring that one back")


def test_only_a_checkpoint_from_before_the_decay_is_extended():
    after = meta_of(30, before_decay=False)
    check_named(RESUMED, "folder", after, FINGERPRINT)
    with pytest.raises(UserError, match="step 30 of folder is from after the LR decay began"):
        check_named(EXTENDED, "folder", after, FINGERPRINT)


# -------------------------------------------------------------------------------- the chat stages

def test_a_chat_stage_resumes_an_unfinished_run_that_started_from_the_same_model():
    def reason(finished, origin):
        return reason_for_fresh_chat({"finished": finished, "origin": origin}, ["base/d4", 30])

    assert reason(False, ["base/d4", 30]) == ""
    assert reason(False, ["base/d4", 40]) == "started from another model"
    assert reason(False, ["base/d6", 30]) == "started from another model"
    assert reason(True, ["base/d4", 30]) == "is of a finished run"
    assert reason(True, ["base/d4", 40]) == "is of a finished run"


# -------------------------------------------------------------------------------- what is said

def test_a_stopped_run_says_how_to_resume_it():
    plain = "the same command with --resume resumes it"
    assert resume_hint(settings_with()) == resume_hint(settings_with(resume=True)) == plain
    assert resume_hint({"resume": False, "resume_from_checkpoint": None}) == plain  # a chat stage
    for name, value in (("resume_from_checkpoint", "20"), ("extend", 2.0)):
        assert resume_hint(settings_with(**{name: value})) == (
            f"the same command with --resume in place of --{name} resumes it")
