"""A folder for each run: which one a run gets, and which models are found again."""
import fcntl
import subprocess
import sys

import pytest

from checkpoint_cases import (  # noqa: F401 - fixtures among them
    error_of,
    folder,
    meta,
    save,
    tokenizer,
)
from nanochat.checkpoint_manager import CheckpointManager, load_model, lock_folder
from nanochat.common import UserError
from nanochat.folders import (
    CLAIMED,
    checkpoint_dir,
    chosen_line,
    claim_folder,
    describe_all,
    find_model_tag,
    folder_to_continue,
    folder_to_extend,
    free_folder,
    is_locked,
    list_models,
    new_run,
    newest_model,
    refuse_taken,
    tag_setting,
)


def found(dir):
    """The free folder that a run finds which then ends, so that its lock is released."""
    free = free_folder(dir)
    lock_folder(free, 0).close()
    return free


def refusal(dir):
    with pytest.raises(UserError) as refused:
        refuse_taken(dir)
    return str(refused.value)


@pytest.mark.parametrize("tag", ["../../x", "/tmp/x", "a/b", "d4/", ".", "..", "a\\b"])
def test_a_tag_is_the_name_of_a_folder_and_leads_nowhere_else(base_dir, tag):
    with pytest.raises(UserError, match="is not the name of a folder: give a single name"):
        checkpoint_dir("base", tag)
    assert checkpoint_dir("base", "d4..x").parent == base_dir / "base_checkpoints"


# --------------------------------------------------------------------------------------------------
# a folder for a run that begins


def test_who_looks_at_a_lock_keeps_no_run_from_taking_it(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()
    looks = open(tmp_path / ".lock", encoding="utf-8")
    fcntl.flock(looks, fcntl.LOCK_SH)
    monkeypatch.setattr("nanochat.folders.time.sleep", lambda _: looks.close())
    with lock_folder(tmp_path, 0):
        assert is_locked(tmp_path)


def test_a_run_that_begins_takes_the_next_free_name(folder, meta, capsys):
    # docs/traps.md: shared-folders
    assert found(folder) == folder and capsys.readouterr().out == ""
    save(folder, 5, {**meta, "finished": True})
    assert found(folder).name == "d1-2"
    assert capsys.readouterr().out == "d1 holds a finished run: this one is d1-2\n"
    save(checkpoint_dir("base", "d1-2"), 5, meta)
    save(checkpoint_dir("base", "d1-4"), 5, meta)
    assert found(folder).name == "d1-3"
    assert found(checkpoint_dir("base", "d1-2")).name == "d1-2-2"
    hint = "d1-2 holds an unfinished run, which --resume resumes: this one is d1-2-2\n"
    assert hint in capsys.readouterr().out


def test_a_folder_is_taken_by_a_meta_file_that_cannot_be_read_but_not_by_a_half_saved_step(folder):
    folder.mkdir(parents=True)
    (folder / "model_000009.pt").write_bytes(b"of a run that was killed")
    assert found(folder) == folder
    (folder / "meta_000009.json").write_text("{", encoding="utf-8")
    assert found(folder).name == "d1-2", "it may be of a later version"
    assert refusal(folder) == "d1 holds checkpoints that cannot be read: name another --model_tag"


def test_a_folder_is_taken_by_a_run_that_has_not_saved_yet(folder):
    held = lock_folder(folder, 0)
    assert is_locked(folder) and free_folder(folder).name == "d1-2"
    assert refusal(folder) == "d1 holds a run that is training now: name another --model_tag"
    held.close()
    assert not is_locked(folder) and found(folder) == folder


def test_two_runs_that_begin_at_once_never_choose_the_same_folder(folder, meta):
    # docs/traps.md: chosen-before-locked
    program = f"from nanochat.folders import free_folder; print(free_folder({str(folder)!r}).name)"
    assert free_folder(folder) == folder and is_locked(folder), "before the run has done anything"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert other.stdout.splitlines()[-1] == "d1-2", other.stderr

    # the run takes the lock over, and only its end releases it
    run = CheckpointManager(folder, 0)
    assert folder not in CLAIMED and is_locked(folder)
    assert found(folder).name == "d1-2"
    run.lock.close()
    assert not is_locked(folder)


def test_a_folder_that_another_run_filled_after_the_first_look_is_not_taken(
    folder, meta, monkeypatch
):
    # docs/traps.md: chosen-before-locked
    save(folder, 5, {**meta, "finished": True})
    looks = iter(["", ""])  # the other run saved and ended between look and lock
    monkeypatch.setattr("nanochat.folders.what_holds", lambda dir: next(looks))
    assert not claim_folder(folder) and not is_locked(folder)
    assert claim_folder(folder.with_name("d9"))
    lock_folder(folder.with_name("d9"), 0).close()


def test_a_named_folder_that_holds_a_run_is_refused_with_the_remedy(folder, meta):
    refuse_taken(folder)
    assert is_locked(folder), "and none that was free is left to another run"
    lock_folder(folder, 0).close()
    save(folder, 5, meta)
    assert refusal(folder) == (
        "d1 holds an unfinished run: resume it with --resume, or name another --model_tag")
    save(folder, 6, {**meta, "finished": True})
    assert refusal(folder) == (
        "d1 holds a finished run: extend it with --extend=2, or name another --model_tag")


def test_a_run_continues_in_its_folder_unless_that_holds_a_finished_model(folder, meta, capsys):
    # docs/traps.md: shared-folders
    save(folder, 4, meta)
    (folder / "log.jsonl").write_text('{"step": 4}\n', encoding="utf-8")
    assert folder_to_continue(folder, 4) == folder
    save(folder, 6, {**meta, "finished": True})
    save(folder, 5, meta)  # another run in the same folder, by an earlier version
    beside = folder_to_continue(folder, 5)
    assert beside.name == "d1-2" and (beside / "log.jsonl").read_text("utf-8") == '{"step": 4}\n'
    assert "d1-2 continues from step 5 of d1\n" in capsys.readouterr().out
    lock_folder(beside, 0).close()
    assert folder_to_extend(folder, 4).name == "d1-2", "nothing was saved there"


# --------------------------------------------------------------------------------------------------
# the models that are there


def test_models_are_listed_in_the_order_in_which_they_were_saved(meta, tokenizer):
    assert list_models() == []
    save(checkpoint_dir("mid", "d9"), 3, meta)
    save(checkpoint_dir("base", "d2"), 1, meta)
    save(checkpoint_dir("base", "d2"), 2, {**meta, "finished": True})
    (checkpoint_dir("base", "empty")).mkdir()
    save(checkpoint_dir("base", "d1"), 7, meta)
    models = list_models()
    found = [(model.source, model.tag, model.meta["step"], model.steps) for model in models]
    assert found == [("mid", "d9", 3, 1), ("base", "d2", 2, 2), ("base", "d1", 7, 1)]
    assert [model.finished for model in models] == [False, True, False]
    assert list_models("base") == models[1:]


def test_within_a_speedrun_the_newest_is_that_of_its_own_run(meta, tokenizer, monkeypatch):
    monkeypatch.delenv("NANOCHAT_RUN", raising=False)
    assert new_run() and newest_model([]) is None
    for tag, run in (("d1", "17-4"), ("d2", "17-5"), ("d3", None)):
        save(checkpoint_dir("base", tag), 1, {**meta, "run": run} if run else meta)
    assert find_model_tag("base") == "d3"
    for run, tag in (("17-4", "d1"), ("17-5", "d2"), ("17-6", "d3")):
        monkeypatch.setenv("NANOCHAT_RUN", run)
        assert new_run() == run and find_model_tag("base") == tag
        named = {"d1": "--model_tag=d1", "d2": "--model_tag=d2", "d3": ""}
        assert tag_setting("base", run) == named[tag], "needed where d3 is newer"
        assert load_model("base", "cpu")[2]["tag"] == tag


def test_without_a_midtrained_model_the_base_model_is_offered(meta, tokenizer):
    with pytest.raises(UserError, match="scripts.mid_train first$"):
        find_model_tag("mid")
    save(checkpoint_dir("base", "d1"), 1, meta)
    with pytest.raises(UserError, match="scripts.mid_train first, or .*: --source=base$"):
        find_model_tag("mid")


def test_an_unknown_tag_is_answered_with_those_that_there_are(meta, tokenizer):
    def message():
        return error_of(load_model, "base", "cpu", model_tag="x")

    assert "run python -m scripts.base_train first" in message()
    save(checkpoint_dir("base", "d1"), 7, {**meta, "finished": True})
    save(checkpoint_dir("base", "notes-1a2b3c4d"), 9, meta)
    first, second = message().partition("choose --model_tag from ")[2].split("), ")
    assert first.startswith("notes-1a2b3c4d (unfinished, step 9, 20")
    assert second.startswith("d1 (finished, step 7, 20")


def test_which_model_was_taken_is_said_with_the_others(meta, tokenizer):
    def line():
        return chosen_line("base", load_model("base", "cpu")[2])

    save(checkpoint_dir("base", "d1"), 7, {**meta, "finished": True})
    assert line() == "base d1, step 7"
    save(checkpoint_dir("base", "d2"), 9, meta)
    assert line() == (
        "base d2, step 9 (unfinished), of 2 models; --model_tag=TAG for another: d1")
    save(checkpoint_dir("base", "d2"), 12, {**meta, "finished": True})
    assert chosen_line("base", load_model("base", "cpu", step=9)[2]).startswith(
        "base d2, step 9, of 2"), "an earlier step of a finished run"
    models = list_models() * 6
    assert describe_all(models).count("step") == 8
    assert describe_all(models).endswith("and 4 more (python -m scripts.checkpoints)")
