"""A checkpoint is whole or not there, says what is wrong with it in one line, and comes back as it went."""
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import (Checkpoints, SaveUnderWay, build_model, checkpoint_dir, complete_steps, find_model_tag, load_model, lock_folder,
                                         prune, read_checkpoint, read_metas)
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer

CONFIG = {"depth": 1, "width": 64, "heads": 1, "kv_heads": 1, "vocab_size": 280, "max_seq_len": 32}


@pytest.fixture
def tokenizer(base_dir):
    tokenizer = Tokenizer.train_from_iterator(["the cat sat on the mat, the dog ran to the tree and back " * 9], 280)
    tokenizer.save(base_dir / "tokenizer")
    return tokenizer


@pytest.fixture
def meta(tokenizer):
    return {"stage": "base_train", "model_class": "gpt", "config": CONFIG, "dtype": "float32",
            "tokenizer": tokenizer.fingerprint, "settings": {"depth": 1, "data": None}, "elapsed": 1.5, "val_bpb": 2.25,
            "finished": False}


@pytest.fixture
def folder(tokenizer):
    return checkpoint_dir("base", "d1")


def make(meta, steps=2):
    """A model and its optimizers after some steps of training on noise."""
    torch.manual_seed(1)
    model = build_model(meta, "cpu")
    optimizers = model.setup_optimizers()
    for _ in range(steps):
        train_step(model, optimizers)
    return model, optimizers


def train_step(model, optimizers):
    idx = torch.randint(0, 280, (2, 17))
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.item()


def save(folder, step, meta, world_size=1, rank=0, model=None, optimizers=()):
    model = model or make(meta, 0)[0]
    state = {"optimizers": [o.state_dict() for o in optimizers], "loader": (1, 2, 3, 4), "rng": torch.get_rng_state()}
    SaveUnderWay(folder, step, model, state, meta, rank).finish()


def error_of(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def test_trap_31_what_comes_back_trains_on_exactly_as_what_was_saved(folder, meta):
    model, optimizers = make(meta)
    save(folder, 2, meta, model=model, optimizers=optimizers)
    losses = [train_step(model, optimizers) for _ in range(3)]

    weights, state, found = read_checkpoint(folder, rank=0)
    assert found["step"] == 2 and found["world_size"] == 1 and {**found, **meta} == found
    assert state["loader"] == (1, 2, 3, 4)
    again = build_model(found, "cpu")
    again.load_state_dict(weights)
    fresh = again.setup_optimizers()
    for optimizer, saved in zip(fresh, state["optimizers"]):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"])
    assert [train_step(again, fresh) for _ in range(3)] == losses
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_files_have_the_documented_names_and_plain_keys(folder, meta):
    save(folder, 7, meta)
    assert sorted(p.name for p in folder.iterdir()) == ["meta_000007.json", "model_000007.pt", "optim_000007_rank0.pt"]
    assert folder.parent.name == "base_checkpoints"
    weights = torch.load(folder / "model_000007.pt", weights_only=True)
    assert "embed.weight" in weights and not any("_orig_mod" in key for key in weights)
    hashes = json.loads((folder / "meta_000007.json").read_text(encoding="utf-8"))["files"]
    assert hashes.keys() == {"model_000007.pt", "optim_000007_rank0.pt"}


def test_load_model_gives_model_tokenizer_and_meta(folder, meta, tokenizer):
    model, _ = make(meta)
    save(folder, 2, meta, model=model)
    for phase in ("eval", "train"):
        loaded, its_tokenizer, found = load_model("base", "cpu", phase)
        assert loaded.training == (phase == "train") and its_tokenizer.fingerprint == tokenizer.fingerprint
        assert (found["tag"], found["dir"], found["step"]) == ("d1", str(folder), 2)
        idx = torch.randint(0, 280, (1, 8))
        assert torch.equal(loaded(idx), model(idx))


def test_trap_28_a_step_without_its_meta_file_is_not_there(folder, meta):
    save(folder, 5, meta)
    save(folder, 9, meta)
    (folder / "meta_000009.json").unlink()
    assert complete_steps(folder) == [5] and read_checkpoint(folder)[2]["step"] == 5
    assert "choose from 5" in error_of(read_checkpoint, folder, 9)


def test_trap_28_a_crash_before_the_meta_file_leaves_the_old_step_as_the_latest(folder, meta, monkeypatch):
    save(folder, 5, meta)
    write = checkpoint_manager.atomic_write

    def crash_at_meta(path, data):
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        write(path, data)
    monkeypatch.setattr(checkpoint_manager, "atomic_write", crash_at_meta)
    with pytest.raises(OSError):
        save(folder, 9, meta)
    assert (folder / "model_000009.pt").exists() and complete_steps(folder) == [5]


def test_trap_28_a_full_disk_between_the_files_leaves_no_step_and_no_temporary_file(folder, meta, monkeypatch):
    save(folder, 5, meta)
    rename = os.replace

    def full_at_the_optimizer(source, target):
        if "optim" in str(target):
            raise OSError(28, "No space left on device")
        rename(source, target)
    monkeypatch.setattr(os, "replace", full_at_the_optimizer)
    with pytest.raises(OSError):
        save(folder, 9, meta)
    assert complete_steps(folder) == [5] and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"files": {}}', '{"files": {"model_000009.pt": "0"}, "saved": 9}'])
def test_trap_28_a_damaged_meta_file_is_no_meta_file(folder, meta, damage):
    save(folder, 5, meta)
    (folder / "meta_000009.json").write_text(damage, encoding="utf-8")
    assert complete_steps(folder) == [5]


def test_a_step_whose_other_files_are_missing_is_not_there(folder, meta):
    save(folder, 5, meta)
    (folder / "model_000005.pt").unlink()
    assert complete_steps(folder) == []
    assert "scripts.base_train" in error_of(load_model, "base", "cpu", model_tag="d1")


def test_trap_28_the_latest_is_the_last_saved_and_not_the_highest_number(folder, meta):
    save(folder, 900, meta)
    save(folder, 40, meta)  # a later, shorter run in the same folder
    assert complete_steps(folder) == [900, 40] and read_checkpoint(folder)[2]["step"] == 40
    assert read_checkpoint(folder, 900)[2]["step"] == 900


def test_the_newest_tag_is_taken_where_none_is_named(meta, tokenizer):
    for seconds, tag in ((200, "d2"), (300, "d1"), (100, "d9")):
        save(checkpoint_dir("base", tag), 1, meta)
        os.utime(checkpoint_dir("base", tag) / "meta_000001.json", (seconds, seconds))
    assert find_model_tag("base") == "d1"
    assert find_model_tag("sft", missing_ok=True) is None
    assert "scripts.chat_sft" in error_of(find_model_tag, "sft")
    assert "base, mid, sft, rl" in error_of(load_model, "nowhere", "cpu", model_tag="d1")


@pytest.mark.parametrize("name", ["model_000005.pt", "optim_000005_rank0.pt"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_file_is_named(folder, meta, name, cut):
    save(folder, 5, meta)
    if cut:
        os.truncate(folder / name, (folder / name).stat().st_size - 9)
    else:
        flip_a_byte(folder / name)
    message = error_of(read_checkpoint, folder, rank=0)
    assert str(folder / name) in message and "damaged" in message and "\n" not in message


def test_another_tokenizer_is_an_error_with_both_fingerprints(folder, meta, tokenizer, base_dir):
    save(folder, 5, meta)
    other = Tokenizer.train_from_iterator(["completely different words were here before " * 9], 280)
    other.save(base_dir / "tokenizer")
    message = error_of(load_model, "base", "cpu")
    assert tokenizer.fingerprint in message and other.fingerprint in message


def test_trap_30_another_number_of_ranks_is_an_error_with_both_numbers(folder, meta, monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "get_dist_info", lambda: (True, 0, 0, 2))
    monkeypatch.setattr(checkpoint_manager, "all_reduce_max", lambda *numbers: numbers)
    monkeypatch.setattr(checkpoint_manager.dist, "all_gather_object",
                        lambda out, mine: out.__setitem__(slice(None), [mine, ({}, None)]))
    save(folder, 5, meta)
    monkeypatch.setattr(checkpoint_manager, "get_dist_info", lambda: (True, 0, 0, 3))
    message = error_of(read_checkpoint, folder, rank=0)
    assert "2 ranks" in message and "has 3" in message
    assert read_checkpoint(folder)[1] is None, "without optimizer states, any number will do"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran-on-load",)


def test_trap_32_loading_runs_no_code_from_the_file(folder, meta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(folder, 5, meta)
    torch.save({"embed.weight": Evil()}, folder / "model_000005.pt")
    found = read_metas(folder)[5]
    found["files"]["model_000005.pt"] = checkpoint_manager.sha256(folder / "model_000005.pt")
    checkpoint_manager.write_meta(folder, found)
    with pytest.raises(Exception, match="(?i)weights.only"):
        read_checkpoint(folder)
    assert not (tmp_path / "ran-on-load").exists()


def test_the_newest_the_best_and_the_last_before_the_decay_stay(folder, meta):
    for step, bpb in ((1, 2.0), (2, 1.5), (3, None), (4, 1.7), (5, None), (6, None), (7, None)):
        save(folder, step, {**meta, "val_bpb": bpb, "before_decay": step < 5})
    assert complete_steps(folder) == [2, 4, 5, 6, 7]
    assert prune(folder, 1) == [5, 6] and complete_steps(folder) == [2, 4, 7]
    assert {int(path.name.split("_")[1][:6]) for path in folder.glob("*_0*")} == {2, 4, 7}, "no file of the others is left"


def test_two_runs_never_share_a_folder(folder):
    held = lock_folder(folder, 0)
    message = error_of(lock_folder, folder, 0)
    assert str(os.getpid()) in message and str(folder) in message and "--model_tag" in message
    assert lock_folder(folder, 1) is None, "the other ranks of a run follow rank 0"
    held.close()
    lock_folder(folder, 0).close()


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_step_is_named_and_the_one_before_is_taken(folder, meta, capsys):
    for step in (5, 9, 12):
        save(folder, step, meta)
    flip_a_byte(folder / "optim_000009_rank0.pt")
    flip_a_byte(folder / "model_000012.pt")
    (folder / "model_000020.pt").write_bytes(b"of a run that was killed")
    assert read_checkpoint(folder, rank=0)[2]["step"] == 5
    out = capsys.readouterr().out
    assert "model_000012.pt is damaged" in out and "optim_000009_rank0.pt is damaged" in out
    assert "step 20" in out and "meta_000020.json is missing" in out
    assert read_checkpoint(folder)[2]["step"] == 9, "whoever needs the weights alone may have step 9"
    assert "is damaged" in error_of(read_checkpoint, folder, 12)


def test_a_step_with_a_cut_meta_file_or_without_a_ranks_shard_is_passed_over(folder, meta, capsys):
    for step in (1, 2, 3):
        save(folder, step, meta)
    found = read_metas(folder)[2]
    checkpoint_manager.write_meta(folder, {**found, "world_size": 2, "files": {**found["files"], "optim_000002_rank1.pt": "0" * 64}})
    os.truncate(folder / "meta_000003.json", 99)
    assert complete_steps(folder) == [1] and read_checkpoint(folder, rank=0)[2]["step"] == 1
    out = capsys.readouterr().out
    assert "optim_000002_rank1.pt is missing" in out and "meta_000003.json is damaged" in out


def test_the_command_lists_verifies_and_prunes(folder, meta, monkeypatch, capsys):
    def command(*words, status=0):
        monkeypatch.setattr(sys, "argv", ["checkpoint_manager", *map(str, words)])
        with pytest.raises((SystemExit, UserError)) as end:
            checkpoint_manager.main()
        assert (2 if end.type is UserError else end.value.code) == status
        return capsys.readouterr().out + str(end.value)
    monkeypatch.setattr(checkpoint_manager, "install_error_hook", lambda: None)
    for step in (1, 2, 3):
        save(folder, step, meta)
    (folder / "meta_000004.json").write_text("{", encoding="utf-8")
    lines = command(folder).splitlines()[:-1]
    assert len(lines) == 4 and "meta_000004.json is damaged" in lines[0] and all("2.2500  complete" in line for line in lines[1:])
    assert command(folder, "--verify", status=1).count("verified") == 3, "an incomplete step is no success"
    (folder / "meta_000004.json").unlink()
    assert command(folder, "--verify").count("verified") == 3
    assert "no checkpoint in" in command(folder.parent)
    flip_a_byte(folder / "model_000002.pt")
    assert "DAMAGED: model_000002.pt" in command(folder, "--verify", status=1)
    held = lock_folder(folder, 0)
    assert "is training into" in command(folder, "--prune", status=2)
    held.close()
    assert "deleted steps: none" in command(folder, "--prune")
    assert "not a folder" in command(folder / "none", status=2)
    assert "name the folder of the sick run" in command(folder.parent, "--rescue", status=2)


def in_a_child(action):
    """Fork, run action() there, and return the child's number; its status is 0, or 9 where the action failed."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's others did not come along
            action()
            os._exit(0)
        except BaseException:
            os._exit(9)
    return child


def must_be_whole(folder):
    """Every step that counts as complete reads back with its hashes."""
    for step in complete_steps(folder):
        for name, digest in read_metas(folder)[step]["files"].items():
            assert checkpoint_manager.sha256(folder / name) == digest, (step, name)
    return complete_steps(folder)


def test_killed_at_every_write_sync_and_rename_a_save_leaves_the_step_before_it(folder, meta):
    model, optimizers = make(meta, 1)
    save(folder, 1, meta, model=model, optimizers=optimizers)
    moments = [(os, "fsync"), (os, "replace"), (os, "chmod"), (torch, "save"), (checkpoint_manager, "atomic_write")]
    died = 0
    for module, name in moments:
        for count in range(1, 7):
            def save_and_die():
                real, calls = getattr(module, name), iter(range(1, 99))

                def call(*arguments, **options):
                    if next(calls) == count:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **options)
                setattr(module, name, call)
                save(folder, 2, meta, model=model, optimizers=optimizers)
            status = os.waitstatus_to_exitcode(os.waitpid(in_a_child(save_and_die), 0)[1])
            died += status == -signal.SIGKILL
            done = not status or (name, count) == ("fsync", 6)  # the last is that of the folder with the meta file's name in it
            assert must_be_whole(folder) == ([1, 2] if done else [1])
            for path in folder.glob("*_000002*"):
                path.unlink()
    assert died == 15, "of three files each is synced, made readable, renamed and its name synced, two are saved by torch, one is the meta file"


def test_killed_at_a_hundred_random_moments_all_complete_steps_are_whole(folder, meta):
    model, optimizers = make(meta, 1)
    save(folder, 0, meta, model=model, optimizers=optimizers)
    moment, wait, newest = random.Random(1), 0.02, 0

    def save_for_ever():
        for step in range(newest + 1, newest + 99):
            save(folder, step, meta, model=model, optimizers=optimizers)
    for _ in range(100):
        child = in_a_child(save_for_ever)
        time.sleep(2 * wait * moment.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = must_be_whole(folder)
        assert steps and steps[-1] >= newest, "what was complete once stays, or a newer one does"
        wait *= 0.8 if steps[-1] > newest else 1.25  # however fast the machine is, half the children complete a step
        newest = steps[-1]
    assert newest > 10


@pytest.mark.parametrize("number, message", [(28, "No space left on device"), (5, "Input/output error"), (30, "Read-only file system")])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_steps_before(folder, meta, monkeypatch, number, message, call):
    save(folder, 5, meta)

    def fail(*arguments):
        raise OSError(number, message)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=message):
        save(folder, 9, meta)
    monkeypatch.undo()
    assert must_be_whole(folder) == [5] and not list(folder.glob("*.tmp"))


def test_a_save_under_way_is_a_snapshot_and_is_complete_when_finished(folder, meta, monkeypatch):
    model, optimizers = make(meta)
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    gate, real = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: gate.wait(60) and real(*arguments))
    under_way = SaveUnderWay(folder, 7, model, {"optimizers": [o.state_dict() for o in optimizers]}, meta, 0)
    train_step(model, optimizers)
    assert not under_way.done() and complete_steps(folder) == []
    gate.set()
    under_way.finish()
    weights, state, _ = read_checkpoint(folder, rank=0)
    assert all(torch.equal(weights[key], whole[key]) for key in whole), "what was trained since is not in it"
    assert not torch.equal(whole["embed.weight"], model.state_dict()["embed.weight"])
    assert state["optimizers"][0]["state"][0]["step"] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_fails_or_dies_is_heard_of_when_the_save_finishes(folder, meta, monkeypatch):
    model = make(meta, 0)[0]
    for error, said in ((OSError(28, "No space left on device"), "No space left"), (RuntimeError("full"), "full"), (SystemExit(), "not all written")):
        monkeypatch.setattr(torch, "save", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match=f"step 7 was not saved in .*{said}"):
            SaveUnderWay(folder, 7, model, None, meta, 0).finish()
    assert complete_steps(folder) == [] and not list(folder.glob("*.tmp"))


def test_a_disk_that_is_full_in_the_middle_of_a_file_is_one_line_and_a_run_goes_on_without_that_step(folder, meta, monkeypatch, capsys):
    model, real = make(meta, 0)[0], checkpoint_manager.atomic_file

    @contextlib.contextmanager
    def full(path):
        with real(path) as file:
            write, room = file.write, [5000]

            class File:
                def write(self, data):
                    room[0] -= len(data)
                    if room[0] < 0:
                        raise OSError(28, "No space left on device")
                    return write(data)

                def flush(self):
                    file.flush()
            yield File()
    run = Checkpoints(folder, 0)
    run.save(1, model, None, meta)
    run.finish()
    monkeypatch.setattr(checkpoint_manager, "atomic_file", full)
    run.save(2, model, None, meta)
    run.finish(must=False)
    assert "step 2 was not saved" in capsys.readouterr().out and run.good_steps == [1]
    run.save(3, model, None, meta)
    with pytest.raises(OSError, match="step 3 was not saved in .*No space left on device"):
        run.finish()
    monkeypatch.setattr(checkpoint_manager, "atomic_file", real)
    run.save(3, model, None, meta)
    run.finish()
    assert must_be_whole(folder) == [1, 3] and not list(folder.glob("*.tmp"))
    run.lock.close()


def test_a_step_that_is_saved_again_is_never_half_of_two_runs(folder, meta, monkeypatch):
    """A run that begins anew in a folder and is killed while it saves must not leave the other's meta file beside its weights."""
    save(folder, 5, meta, model=make(meta, 0)[0])

    def killed_at_the_optimizer():
        rename = os.replace

        def replace(source, target):
            if "optim" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
        os.replace = replace
        save(folder, 5, meta, model=make(meta, 0)[0])
    os.waitpid(in_a_child(killed_at_the_optimizer), 0)
    assert must_be_whole(folder) == [] and list(folder.glob("*.tmp"))
    lock_folder(folder, 0).close()
    assert not list(folder.glob("*.tmp")), "the next run clears away what a killed one left half written"


def test_a_byte_flipped_anywhere_in_a_meta_file_is_named_or_harmless(folder, meta):
    save(folder, 4, meta)
    save(folder, 5, meta)
    path = folder / "meta_000005.json"
    good, found = path.read_bytes(), read_metas(folder)[5]
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        seen = read_metas(folder)
        if isinstance(seen[5], dict):
            assert {key: seen[5].get(key) for key in found if key != "digest"} == {key: value for key, value in found.items() if key != "digest"}
        else:
            assert "meta_000005.json is damaged" in seen[5] and complete_steps(folder) == [4]


def test_a_resumed_run_may_go_back_to_the_steps_before_but_not_to_those_of_another_run(folder, meta):
    for step in (4, 10, 2, 6, 8):  # a run to step 10, and one that began anew
        save(folder, step, meta)
    run = Checkpoints(folder, 0, keep=9, resumed_from=8)
    assert run.good_steps == [2, 6, 8]
    assert run.last_good(9) == 8 and complete_steps(folder)[-1] == 8
    assert run.last_good(8) == 6, "no step since was good"
    assert run.newest() == 8, "but the batches may have been bad, not the weights"
    (folder / "meta_000006.json").unlink()
    assert run.last_good(6) == 2 and run.last_good(2) == 2, "the last one stays: there is no other"
    run.lock.close()


def test_weights_that_are_not_finite_are_not_saved(folder, meta, capsys):
    model = make(meta, 0)[0]
    run = Checkpoints(folder, 0)
    run.save(1, model, None, meta)
    model.embed.weight.data[0, 0] = torch.nan
    run.save(2, model, None, meta)
    run.finish(must=False)
    assert "step 2 was not saved" in capsys.readouterr().out and must_be_whole(folder) == [1] and run.good_steps == [1] and run.newest() == 1
    run.lock.close()


def test_a_complete_step_is_amended(folder, meta):
    save(folder, 5, {**meta, "finished": False})
    run = Checkpoints(folder, 0, resumed_from=5)
    run.amend(5, finished=True, val_bpb=1.25)
    found = read_metas(folder)[5]
    assert found["finished"] and found["val_bpb"] == 1.25 and must_be_whole(folder) == [5]
    model = make(meta, 0)[0]
    run.save(5, model, None, {**meta, "finished": False})
    run.finish()
    assert read_metas(folder)[5]["finished"], "what is saved is not saved again"
    run.lock.close()


def test_the_emergency_run_halves_the_rate_once_and_has_as_many_ranks(folder, meta, monkeypatch):
    words = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: words.append(arguments))
    settings = {"learning_rate": 0.02, "grad_clip": 0.0, "compile": True, "save_minutes": 10.0, "data": "a b", "depth": None}
    for changed in ({}, {**checkpoint_manager.SAFE, "learning_rate": 0.01}):
        save(folder, 5, {**meta, "stage": "mid_train", "finished": False, "settings": {**settings, **changed}})
        checkpoint_manager.rescue(folder)
    assert all("--learning_rate=0.01" in run and "--grad_clip=1.0" in run and "--data=a b" in run and "--compile=False" in run for run in words)
    assert words[0][1:3] == ["-m", "scripts.mid_train"] and f"--resume_from_checkpoint={folder}/meta_000005.json" in words[0]
    checkpoint_manager.write_meta(folder, {**read_metas(folder)[5], "world_size": 2})
    checkpoint_manager.rescue(folder)
    assert words[2][1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.mid_train"] and words[2][7] == "--"
