"""python -m scripts.checkpoints: lists, verifies, deletes, and starts a rescue."""
import os
import shutil
import subprocess
import sys

import pytest

from checkpoint_cases import (  # noqa: F401 - fixtures among them
    flip_a_byte,
    folder,
    meta,
    save,
    save_with_a_forged_step,
    tokenizer,
)
from conftest import ROOT
from nanochat.checkpoint import read_meta, write_meta
from nanochat.checkpoint_manager import (
    CheckpointManager,
    checkpoint_dir,
    complete_steps,
    lock_folder,
)
from nanochat.common import UserError
from nanochat.passage_store import save_passages
from nanochat.passages import Passage
from scripts import checkpoints


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*words, status=0) -> what the command prints."""
    def run(*words, status=0):
        monkeypatch.setattr(sys, "argv", ["checkpoints", *map(str, words)])
        with pytest.raises((SystemExit, UserError)) as end:
            checkpoints.main()
        assert (2 if end.type is UserError else end.value.code) == status
        return capsys.readouterr().out + str(end.value)
    return run


def test_the_command_lists_verifies_and_prunes(folder, meta, command):
    for step in (1, 2, 3):
        save(folder, step, meta)
    (folder / "meta_000004.json").write_text("{", encoding="utf-8")
    lines = command(folder).splitlines()[:-1]
    assert len(lines) == 4 and "meta_000004.json is damaged" in lines[0]
    assert all("2.2500  complete" in line for line in lines[1:])
    listed = command(folder, "--verify", status=1)
    assert command("--verify", status=1) == listed, "that of the checkpoint saved last"
    assert listed.count("verified") == 3, "an incomplete step is no success"
    (folder / "meta_000004.json").unlink()
    assert command(folder, "--verify").count("verified") == 3
    assert "no checkpoint in" in command(folder.parent)
    flip_a_byte(folder / "model_000002.pt")
    assert "DAMAGED: model_000002.pt" in command(folder, "--verify", status=1)
    held = lock_folder(folder, 0)
    assert "is training into" in command(folder, "--prune", status=2)
    held.close()
    assert "deleting steps: none" in command(folder, "--prune")
    for step in (5, 6, 7, 8):
        save(folder, step, {**meta, "val_bpb": 3.0})
    assert "deleting steps: 2, 3, 5" in command(folder, "--prune"), "step 1 is the best"
    assert "not a folder" in command(folder / "none", status=2)
    refusal = command(folder.parent, "--rescue", status=2)
    assert "name the folder of another run" in refusal


def test_the_text_that_a_chat_quotes_is_verified_with_its_steps(folder, meta, command):
    name = save_passages(folder, [Passage("a.md", "Garden", ("Peas grow.",))])
    save(folder, 1, {**meta, "passages": name})
    assert "verified" in command(folder, "--verify")
    flip_a_byte(folder / name)
    assert f"DAMAGED: {name}" in command(folder, "--verify", status=1)


def test_without_a_folder_every_model_is_listed(folder, meta, command, base_dir):
    assert command() == f"no model in {base_dir}\n0"
    save(folder, 7, {**meta, "finished": True})
    of_notes = {**meta, "val_bpb": None, "settings": {"data": "/my/notes"}}
    save(checkpoint_dir("base", "notes-1a2b3c4d"), 8, of_notes)
    save(checkpoint_dir("sft", "d1"), 9, {**meta, "origin": [str(folder), 7]})
    _, first, second, third, hint = command().removesuffix("\n0").split("\n")
    assert first.split()[:4] == ["base", "d1", "7", "finished"]
    assert "2.2500" in first and first.endswith("MB  nanochat's own text")
    assert second.split()[:4] == ["base", "notes-1a2b3c4d", "8", "unfinished"]
    assert second.endswith("MB  /my/notes")
    assert third.split()[:2] == ["sft", "d1"] and third.endswith("from base_checkpoints/d1")
    assert f"python -m scripts.checkpoints {checkpoint_dir('sft', 'd1')}" in hint


def test_the_best_step_is_listed_beside_the_last_and_a_bad_folder_hides_no_other(
    folder, meta, command
):
    for step, bpb in ((5, 2.125), (7, None), (9, 2.5)):
        save(folder, step, {**meta, "val_bpb": bpb})
    bad = checkpoint_dir("base", "bad")
    save(bad, 3, meta)
    write_meta(bad, {**read_meta(bad, 3), "saved": 1e18, "val_bpb": 10**400})
    _, line, _ = command().removesuffix("\n0").split("\n")
    assert line.startswith("base   d1 ") and " 2.5000           2.1250 (5) " in line


def test_a_bound_has_a_column_of_its_own_and_tells_the_best_step(folder, meta, command):
    for step, bound in ((5, 2.125), (7, None), (9, 2.5)):
        save(folder, step, {**meta, "val_bpb": None, "val_bpb_bound": bound})
    heads, line, *_ = command().split("\n")
    assert line[heads.index("bound") - 2:].startswith(" 2.5000  <=2.1250 (5) ")
    assert not line[heads.index("val_bpb"):][:7].strip()
    assert " <=2.5000  " in command(folder)
    assert CheckpointManager(folder, 0).better_than(2.3) == (5, 2.125)


def test_a_finished_model_is_pruned_by_name_alone(folder, meta, command):
    save(folder, 1, {**meta, "val_bpb": None, "finished": True})
    for step in (2, 3, 4, 5):
        save(folder, step, {**meta, "val_bpb": None})
    assert "--prune needs the folder" in command("--prune", status=2)
    assert "--finished is for --prune" in command(folder, "--finished", status=2)
    assert complete_steps(folder) == [1, 2, 3, 4, 5]
    assert "deleting steps: 2\n" in command(folder, "--prune")
    assert complete_steps(folder) == [1, 3, 4, 5]
    assert "deleting steps: 1\n" in command(folder, "--prune", "--finished")
    assert complete_steps(folder) == [3, 4, 5]


def test_the_documented_name_of_the_command_still_works(folder, meta, run_module, base_dir):
    save(folder, 1, meta)
    for module in ("nanochat.checkpoint_manager", "scripts.checkpoints"):
        done = run_module(module, str(folder), "--verify", base=base_dir)
        assert done.returncode == 0 and "2.2500  verified" in done.stdout, done.stderr
        done = run_module(module, str(folder / "none"), base=base_dir)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_the_emergency_run_halves_the_rate_once_and_has_as_many_ranks(folder, meta, monkeypatch):
    runs = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: runs.append(arguments))
    settings = {
        "learning_rate": 0.02,
        "grad_clip": 0.0,
        "compile": True,
        "save_minutes": 10.0,
        "data": "a b",
        "depth": None,
    }
    for changed in ({}, {**checkpoints.SAFE, "learning_rate": 0.01}):
        fields = {"stage": "mid_train", "finished": False, "settings": {**settings, **changed}}
        save(folder, 5, {**meta, **fields})
        checkpoints.rescue(folder)
    for run in runs:
        assert "--learning_rate=0.01" in run and "--grad_clip=1.0" in run
        assert "--data=a b" in run and "--compile=False" in run
    assert runs[0][1:3] == ["-m", "scripts.mid_train"]
    assert f"--resume_from_checkpoint={folder}/meta_000005.json" in runs[0]
    write_meta(folder, {**read_meta(folder, 5), "world_size": 2})
    checkpoints.rescue(folder)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert runs[2][1:8] == [*torchrun, "-m", "scripts.mid_train", "--"]


@pytest.mark.parametrize("saved_by, device_type, gpus, ranks", [
    (8, "", 0, 8),
    (8, "", 6, 6),
    (8, "cuda", 6, 6),
    (2, "", 6, 2),
    (2, "cpu", 1, 2),
    (2, None, 1, 1),
])
def test_the_emergency_run_has_no_more_ranks_than_there_are_gpus(
        monkeypatch, capsys, saved_by, device_type, gpus, ranks):
    # docs/traps.md: rank-count-on-resume
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert checkpoints.ranks_here(saved_by, device_type) == ranks
    said = f"the run had {saved_by} ranks, this machine has {gpus} GPUs" in capsys.readouterr().out
    assert said == (ranks < saved_by)


@pytest.mark.parametrize("change", [
    {"stage": "../../evil"},
    {"stage": "setup"},
    {"settings": {"learning_rate": "--x"}},
    {"settings": {}},
])
def test_a_rescue_runs_nothing_but_the_training_stages(folder, meta, monkeypatch, command, change):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("something was started"))
    save(folder, 5, {**meta, "settings": {"learning_rate": 0.1}, **change})
    assert "of no stage that can be resumed" in command(folder, "--rescue", status=2)


def test_pruning_by_command_touches_nothing_that_a_forged_meta_file_names(
    folder, meta, base_dir, command
):
    victim = save_with_a_forged_step(folder, meta, base_dir)
    printed = command(folder, "--prune")
    assert "deleting steps: 2" in printed and "names '../../victim'" in printed
    assert victim.exists()


FAKE_PYTHON = '#!/bin/sh\necho "$NANOCHAT_BASE_DIR|$*"\n'


@pytest.mark.parametrize("given, folder_given, said", [
    ("runs", "", "{here}/runs|-m scripts.checkpoints  --rescue"),
    ("~/runs", "d4", "~/runs|-m scripts.checkpoints {here}/d4 --rescue"),
    ("", "~/d4", "|-m scripts.checkpoints ~/d4 --rescue"),
    ("/a b", "/c d", "/a b|-m scripts.checkpoints /c d --rescue"),
])
def test_emergency_training_finds_folders_from_where_the_user_stands(
    tmp_path, given, folder_given, said
):
    repository, here = tmp_path / "repo", tmp_path / "here"
    (repository / "scripts").mkdir(parents=True)
    here.mkdir()
    shutil.copy(ROOT / "emergency_training.sh", repository)
    (repository / "scripts" / "setup.sh").write_text("true\n", encoding="utf-8")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    words = [folder_given] if folder_given else []
    path = f"{python.parent}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", str(repository / "emergency_training.sh"), *words],
        cwd=here,
        env={**os.environ, "PATH": path, "NANOCHAT_BASE_DIR": given},
        capture_output=True,
        text=True,
    )
    assert run.stdout == said.format(here=here) + "\n", run.stderr
