"""Where a run starts: every combination of settings and checkpoints, without a process."""
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from models import make_model
from nanochat import start
from nanochat.checkpoint import problem_of
from nanochat.common import UserError
from nanochat.folders import Model, lock_folder
from nanochat.plan import BUDGETS
from nanochat.start import (
    EXTENDED,
    FRESH,
    RESUMED,
    FROM_PRETRAINING,
    Choice,
    Start,
    check_before_decay,
    choose_base_checkpoint,
    choose_base_folder,
    choose_chat_run,
    data_to_resume,
    meta_of_chat_run,
    place_of,
    resume_hint,
    shared_name,
    unfinished_extension,
)

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


def test_resume_takes_the_newest_undamaged_step():
    assert choose_base_checkpoint(settings_with(resume=True), STEPS) == Choice(RESUMED, None)


def test_a_finished_run_is_never_started_over():
    with pytest.raises(UserError) as refused:
        choose_base_checkpoint(settings_with(resume=True), FINISHED)
    assert str(refused.value) == (
        "the run has finished at step 40: use --extend, or leave --resume out and name another "
        "--model_tag")


def test_a_speedruns_own_finished_run_is_resumed_because_its_record_may_be_missing():
    own = [*STEPS, meta_of(40, before_decay=False, finished=True, run="17-4")]
    resume = settings_with(resume=True)
    assert choose_base_checkpoint(resume, own, run="17-4") == Choice(RESUMED, None)
    for run in ("17-5", None):
        with pytest.raises(UserError, match="has finished at step 40"):
            choose_base_checkpoint(resume, own, run=run)
    with pytest.raises(UserError, match="has finished at step 40"):
        choose_base_checkpoint(resume, FINISHED, run="17-4")


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


def test_a_run_that_ended_early_is_extended_from_its_best_step():
    bpbs = [2.5, 2.1, 2.3, 2.4]
    metas = [
        meta_of(5, val_bpb=2.5),
        meta_of(10, val_bpb=2.1),
        meta_of(15, val_bpb=None),
        meta_of(20, val_bpb=2.4, bpbs=bpbs, finished=True),
    ]
    given = settings_with(extend=2.0)
    assert choose_base_checkpoint(given, metas) == Choice(EXTENDED, 10)
    assert choose_base_checkpoint(given, metas[3:]) == Choice(EXTENDED, 20), "it alone was kept"
    metas[-1] = meta_of(20, val_bpb=2.4, bpbs=bpbs[:2], finished=True)
    assert choose_base_checkpoint(given, metas) == Choice(EXTENDED, 20)
    metas[1:] = [meta_of(15, bpbs=bpbs, val_bpb=None), meta_of(30, before_decay=False, bpbs=bpbs)]
    assert choose_base_checkpoint(given, metas[1:]) == Choice(EXTENDED, 15), "none was validated"


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
        except UserError as refusal:
            nothing_to_extend = extend and not metas
            finished = resume and not extend and metas and metas[-1]["finished"]
            assert named_step is None and (nothing_to_extend or finished), refusal
            continue
        kinds.add(choice.kind)
        assert (choice.step is None) == (choice.kind != EXTENDED and named_step is None)
        assert bool(choice.message) == (choice.kind == FRESH and resume)
        if named_step is not None:
            assert choice.step == named_step
    assert kinds == {FRESH, RESUMED, EXTENDED}


def test_a_run_is_resumed_on_its_own_text_and_no_other(tmp_path):
    notes, letters = tmp_path / "notes", tmp_path / "letters"
    notes.mkdir(), letters.mkdir()
    meta = meta_of(20, settings=settings_with(data=str(notes)))
    assert data_to_resume(None, meta) == str(notes)
    assert data_to_resume(f"{letters}/../notes", meta) == f"{letters}/../notes"
    with pytest.raises(UserError, match=f"was trained on {notes}, not on {letters}: leave --data"):
        data_to_resume(str(letters), meta)
    with pytest.raises(UserError, match="was trained on nanochat.dataset, not on"):
        data_to_resume(str(letters), meta_of(20))
    assert data_to_resume(None, meta_of(20)) is None

    # the text was moved, or an earlier version has not said which it was
    notes.rmdir()
    assert data_to_resume(str(letters), meta) == str(letters)
    assert data_to_resume(str(letters), {"step": 20}) == str(letters)


def test_only_a_checkpoint_from_before_the_decay_is_extended():
    check_before_decay("folder", meta_of(20))
    after = meta_of(30, before_decay=False)
    with pytest.raises(UserError, match="step 30 of folder is from after the LR decay began"):
        check_before_decay("folder", after)


# -------------------------------------------------------------------------------- which folder

def model_of(tag, saved, source="base", depth=4, finished=False, **more):
    """A Model whose newest step was saved at `saved`."""
    meta = meta_of(saved, finished=finished, saved=float(saved), config={"depth": depth}, **more)
    return Model(source, Path("base_checkpoints", tag), meta, 1)


def chosen(models, run=None, **given):
    found = choose_base_folder(settings_with(**given), models, run)
    return found and found.tag


def test_resume_without_a_tag_means_the_newest_unfinished_run_of_the_same_settings():
    notes = settings_with(data="notes/", minutes=3.0)
    models = [
        model_of("d4", 1),
        model_of("notes-1", 2, settings=notes),
        model_of("d4-2", 3, finished=True),
        model_of("d6", 4, depth=6, settings=settings_with(num_iterations=9)),
    ]
    assert chosen(models, resume=True) == "d6", "no budget given: toward any"
    assert chosen(models[:3], resume=True) == "d4", "a finished run is newer"
    assert chosen(models, resume=True, depth=4) == "d4"
    assert chosen(models, resume=True, depth=4, num_iterations=50) == "d4", "toward another budget"
    assert chosen(models, resume=True, num_iterations=9) == "d6"
    assert chosen(models, resume=True, num_iterations=8) is None
    assert chosen(models, resume=True, data="notes") == "notes-1"
    assert chosen(models, resume=True, data="notes", minutes=3.0) == "notes-1"
    assert chosen(models, resume=True, data="notes", minutes=4.0) is None
    assert chosen(models, resume=True, data="letters") is None
    assert chosen([], resume=True) is None


def test_where_all_runs_of_these_settings_have_finished_resume_means_the_newest_of_them():
    models = [model_of("d4", 1, finished=True), model_of("d4-2", 2, finished=True)]
    assert chosen(models, resume=True) == "d4-2"


def test_within_a_speedrun_resume_means_its_own_run_alone():
    models = [model_of("d4", 1, run="17-4"), model_of("d4-2", 2, run="17-5"), model_of("d4-3", 3)]
    assert chosen(models, "17-4", resume=True) == "d4"
    assert chosen(models, "17-6", resume=True) is None
    assert chosen(models, "17-4", resume=True, minutes=7.0) == "d4", "whatever its settings"


def test_extend_and_a_step_without_a_tag_mean_the_run_that_was_saved_last():
    models = [model_of("d4", 1), model_of("d6", 3, depth=6), model_of("d4-2", 2, finished=True)]
    for given in ({"extend": 2.0}, {"resume_from_checkpoint": "20"}):
        assert chosen(models, **given) == "d6"
        assert chosen(models, depth=4, **given) == "d4-2"


def test_an_extension_that_was_stopped_is_found_by_the_run_that_it_extends():
    folder = Path("base_checkpoints/d4")
    continues = ["/elsewhere/base_checkpoints/d4", 20]
    models = [
        model_of("d4", 1, finished=True),
        model_of("d4-2", 2, finished=True, extend=2.0, continues=continues),
        model_of("d4-3", 3, extend=2.0, continues=continues),
        model_of("d4-4", 4, extend=3.0, continues=continues),
        model_of("d6-2", 5, extend=2.0, continues=["base_checkpoints/d6", 20]),
    ]
    assert unfinished_extension(models, folder, 2.0).name == "d4-3"
    assert unfinished_extension(models[:2], folder, 2.0) == folder
    assert unfinished_extension(models, folder, 4.0) == folder


def test_a_run_that_continues_beside_a_finished_model_is_another_run_and_says_where_it_began(
    base_dir, monkeypatch
):
    monkeypatch.delenv("NANOCHAT_RUN", raising=False)
    folder = base_dir / "base_checkpoints" / "d4"

    def place(kind, finished=False, **more):
        metas = [{"finished": finished}]
        monkeypatch.setattr("nanochat.folders.complete_metas", lambda dir: metas * (dir == folder))
        there, meta = place_of(Start(kind, folder, None, None, {"step": 20, **more}))
        lock_folder(there, 0).close()  # as the end of the run does
        return there, meta

    old = {"run": "17-4", "finished": False}
    validated = {**old, "bpbs": [2.5, 2.1], "best_bpb": 2.1}
    assert place(RESUMED, **validated)[1]["best_bpb"] == 2.1
    assert not {"bpbs", "best_bpb"} & place(EXTENDED, **validated)[1].keys(), "they stay behind"
    assert place(RESUMED, **old) == (folder, {"step": 20, "run": "17-4"})
    assert place(RESUMED)[1]["run"], "an earlier version named no run"
    for kind, finished in ((RESUMED, True), (EXTENDED, False), (EXTENDED, True)):
        there, meta = place(kind, **{**old, "finished": finished})
        assert there.name == "d4-2" and meta["continues"] == [str(folder), 20]
        assert meta["run"] not in ("17-4", "")

    # a speedrun's own finished run lacks nothing but its record
    monkeypatch.setenv("NANOCHAT_RUN", "17-4")
    assert place(RESUMED, **{**old, "finished": True})[0] == folder


# -------------------------------------------------------------------------------- the chat stages

def test_a_chat_stage_resumes_the_newest_unfinished_run_that_started_from_the_same_model():
    def started(tag, saved, step=30, base="d4", **more):
        origin = [f"/base/base_checkpoints/{base}", step]
        return model_of(tag, saved, "mid", origin=origin, **more)

    models = [
        started("d4", 1),
        started("d4-2", 2),
        started("d4-3", 3, finished=True),
        started("d4-4", 4, step=40),
        started("d6", 5, base="d6", run="17-4", finished=True),
        model_of("old", 6, "mid"),
    ]
    origin = ["/moved/base_checkpoints/d4", 30]
    assert choose_chat_run(models, origin).tag == "d4-2"
    assert choose_chat_run(models[3:], origin) is None
    for tag, step, source in (("d4-3", 3, models[2:]), ("d6", 5, models)):
        base = ["base_checkpoints/" + tag[:2], 30]
        with pytest.raises(UserError) as refused:
            choose_chat_run(source, base)
        assert str(refused.value) == (
            f"{tag}, which started from this model, has finished at step {step}: leave --resume "
            "out to train another")
    own = choose_chat_run(models, ["/base/base_checkpoints/d6", 30], "17-4")
    assert own.tag == "d6", "only its record may be missing"
    assert choose_chat_run(models, origin, "17-4") is None


def test_a_chat_run_knows_how_its_model_was_trained_where_that_is_known():
    """A model of an earlier version does not say it; what the run saves must be readable."""
    model = make_model()
    old = {
        "dir": "base_checkpoints/d4", "step": 30, "dtype": "float32", "tokenizer": "t",
        "total_batch_size": 512}
    new = {**old, "device_batch_size": 2, "parallel": "fsdp", "checkpoint_activations": False}
    for origin in (old, new):
        meta = meta_of_chat_run("chat_sft", origin, model)
        assert {key: meta[key] for key in FROM_PRETRAINING if key in meta} == {
            key: origin[key] for key in FROM_PRETRAINING if key in origin}
        own = {"saved": 1.0, "world_size": 1, "files": {"model_000000.pt": ""}}
        assert problem_of({**meta, **own}, 0) is None
    assert problem_of({**meta, **own, "device_batch_size": None}, 0) is None, "once written so"


def test_machines_call_a_folder_alike_wherever_their_base_directories_are():
    names = {shared_name(base + "/base_checkpoints/d4") for base in ("/one", "/home/two")}
    assert names == {"base_checkpoints/d4"} and shared_name(None) is None


def test_the_ranks_compare_the_models_that_they_would_start_from(monkeypatch):
    """Machines may each have checkpoints of their own to start from."""
    origin = {"dir": "/one/base_checkpoints/d4", "tag": "d4", "step": 30}
    files = {"model_000030.pt": 32 * "ab"}
    compared = []

    def require_alike(*arguments):
        compared.append(arguments[:2])
        raise UserError("the ranks differ")

    monkeypatch.setattr(
        start, "load_model", lambda *_: (None, None, {**origin, "files": files}))
    monkeypatch.setattr(start, "require_alike", require_alike)
    settings, compute = {"model_tag": None, "from_step": None}, SimpleNamespace(device="cpu")
    with pytest.raises(UserError, match="the ranks differ"):
        start.start_chat_from_model("mid_train", "mid", settings, compute, "base")
    assert compared == [("the model to start from", ("d4", 30, 6 * "ab"))]


# -------------------------------------------------------------------------------- what is said

def test_a_stopped_run_says_how_to_resume_it():
    plain = "the same command with --resume resumes it"
    folder = Path("base_checkpoints/d4-2")
    for given in (settings_with(), settings_with(resume=True), settings_with(model_tag="d4-2")):
        assert resume_hint(given, folder) == plain
    assert resume_hint({"resume": False, "resume_from_checkpoint": None}, folder) == plain
    origin = ["base_checkpoints/d4", 30]
    chat = {"model_tag": "d4"}
    assert resume_hint(chat, folder, origin) == plain, "a chat stage names the base model"
    for name, value in (("resume_from_checkpoint", "20"), ("extend", 2.0)):
        assert resume_hint(settings_with(**{name: value}), folder) == (
            f"the same command with --resume in place of --{name} resumes it")
        assert resume_hint(settings_with(**{name: value, "model_tag": "d4"}), folder) == (
            f"the same command with --resume --model_tag=d4-2 in place of --{name} resumes it")


def test_a_chat_run_from_a_named_step_is_resumed_by_the_model_where_it_began():
    folder, origin = Path("chatsft_checkpoints/d6-2"), ["/base/base_checkpoints/d4", 30]
    rewound = {"model_tag": "d6", "from_step": None, "resume_from_checkpoint": "20"}
    words = "--resume --model_tag=d4 --from_step=30"
    after = " in place of --resume_from_checkpoint resumes it"
    assert resume_hint(rewound, folder, origin) == f"the same command with {words}{after}"
    sft = {**rewound, "source": "mid"}
    assert resume_hint(sft, folder, origin) == (
        f"the same command with {words} --source=base{after}")
    began = {**sft, "resume_from_checkpoint": None}
    assert resume_hint(began, folder, origin) == "the same command with --resume resumes it"
