"""The steps of a run: saved asynchronously, kept, found again, and loaded as they were saved."""
import contextlib
import errno
import fcntl
import os
import shutil
import threading

import pytest
import torch

from checkpoint_cases import (  # noqa: F401 - fixtures among them
    error_of,
    flip_a_byte,
    folder,
    make,
    meta,
    must_be_whole,
    problems,
    save,
    state_of,
    tokenizer,
    train_step,
)
from nanochat import checkpoint, checkpoint_manager
from nanochat.checkpoint import read_meta, write_meta
from nanochat.checkpoint_manager import (
    AsyncSave,
    CheckpointManager,
    build_model,
    checkpoint_dir,
    complete_metas,
    complete_steps,
    find_model_tag,
    hand_out_tokenizer,
    load_model,
    lock_folder,
    prune,
    read_checkpoint,
    steps_of_run,
    steps_to_delete,
)
from nanochat.common import warn_once
from nanochat.parallel import Layout
from nanochat.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# load


def test_what_comes_back_trains_on_exactly_as_what_was_saved(folder, meta):
    # docs/traps.md: resume-forgets
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
    assert must_be_whole(folder) == [2], "training changed no file"


def test_optimizers_keep_the_learning_rate_and_weight_decay_of_this_run(folder, meta):
    model, optimizers = make(meta)
    save(folder, 2, meta, model=model, optimizers=optimizers)
    state = read_checkpoint(folder, rank=0)[1]
    fresh = model.setup_optimizers(learning_rate=0.5, weight_decay=0.25)
    wanted = [group["initial_lr"] for optimizer in fresh for group in optimizer.param_groups]
    Layout(model, fresh).load_optimizer_state(state["optimizers"])
    groups = [group for optimizer in fresh for group in optimizer.param_groups]
    assert [group["initial_lr"] for group in groups] == wanted
    assert fresh[1].param_groups[0]["weight_decay"] == 0.25
    for loaded, saved in zip(fresh, state["optimizers"]):
        for number, values in loaded.state_dict()["state"].items():
            for key, value in values.items():
                own = saved["state"][number][key]
                assert not isinstance(value, torch.Tensor) or torch.equal(value, own)
                assert not isinstance(value, torch.Tensor) or value.data_ptr() != own.data_ptr()


def test_load_model_gives_model_tokenizer_and_meta(folder, meta, tokenizer):
    model, _ = make(meta)
    save(folder, 2, meta, model=model)
    for phase in ("eval", "train"):
        loaded, its_tokenizer, found = load_model("base", "cpu", phase)
        assert loaded.training == (phase == "train")
        assert its_tokenizer.fingerprint == tokenizer.fingerprint
        assert (found["tag"], found["dir"], found["step"]) == ("d1", str(folder), 2)
        idx = torch.randint(0, 280, (1, 8))
        assert torch.equal(loaded(idx), model(idx))


def test_building_a_model_draws_random_numbers_for_its_weights_alone(meta):
    """Torch's own initialisers do nothing, so a seed gives the weights of init_weights()."""
    torch.manual_seed(5)
    built = build_model(meta, "cpu")
    after = torch.get_rng_state()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(torch.nan)
    built.init_weights()
    assert torch.equal(after, torch.get_rng_state())
    torch.manual_seed(5)
    again = build_model(meta, "cpu").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in built.state_dict().items())


def test_the_newest_tag_is_taken_where_none_is_named(meta, tokenizer):
    for tag in ("d9", "d2", "d1"):
        save(checkpoint_dir("base", tag), 1, meta)
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
    assert str(folder / name) in message and "damaged" in message


def test_another_tokenizer_is_an_error_with_both_fingerprints(folder, meta, tokenizer, base_dir):
    save(folder, 5, meta)
    other = Tokenizer.train_from_iterator(["completely different words were here before " * 9], 280)
    other.save(base_dir / "tokenizer")
    message = error_of(load_model, "base", "cpu")
    assert tokenizer.fingerprint in message and other.fingerprint in message


def test_another_number_of_ranks_is_an_error_with_both_numbers(folder, meta, monkeypatch):
    # docs/traps.md: rank-count-on-resume
    def gather(out, mine):
        out[:] = [mine, ({}, None)]

    def pretend(world_size):
        for module in (checkpoint, checkpoint_manager):
            monkeypatch.setattr(module, "get_dist_info", lambda: (True, 0, 0, world_size))
            monkeypatch.setattr(module, "all_reduce_max", lambda *numbers: numbers)

    monkeypatch.setattr(checkpoint.dist, "all_gather_object", gather)
    pretend(2)
    save(folder, 5, meta)
    pretend(3)
    message = error_of(read_checkpoint, folder, rank=0)
    assert "2 ranks" in message and "has 3" in message
    assert read_checkpoint(folder)[1] is None, "without optimizer states, any number will do"


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
    assert read_checkpoint(folder)[2]["step"] == 9, "the weights of step 9 are not damaged"
    assert "is damaged" in error_of(read_checkpoint, folder, 12)


def test_a_step_with_a_cut_meta_file_or_without_a_ranks_shard_is_passed_over(folder, meta, capsys):
    for step in (1, 2, 3):
        save(folder, step, meta)
    found = read_meta(folder, 2)
    files = {**found["files"], "optim_000002_rank1.pt": "0" * 64}
    write_meta(folder, {**found, "world_size": 2, "files": files})
    os.truncate(folder / "meta_000003.json", 99)
    assert complete_steps(folder) == [1] and read_checkpoint(folder, rank=0)[2]["step"] == 1
    out = capsys.readouterr().out
    assert "optim_000002_rank1.pt is missing" in out and "meta_000003.json is damaged" in out


def test_a_model_is_loaded_with_the_tokenizer_beside_it_whatever_was_trained_since(
    folder, meta, tokenizer, base_dir
):
    run = CheckpointManager(folder, 0)
    run.save_tokenizer(tokenizer)
    run.save(5, make(meta, 0)[0], None, meta)
    run.finish()
    run.lock.close()
    other = Tokenizer.train_from_iterator(["completely different words were here before " * 9], 280)
    other.save(base_dir / "tokenizer")
    assert load_model("base", "cpu")[1].fingerprint == tokenizer.fingerprint
    shutil.rmtree(base_dir / "tokenizer")
    assert load_model("base", "cpu")[1].fingerprint == tokenizer.fingerprint


def test_a_tokenizer_that_is_about_to_be_replaced_is_kept_beside_the_models_that_need_it(
    folder, meta, tokenizer, base_dir
):
    save(folder, 5, meta)  # by an earlier version
    save(checkpoint_dir("sft", "d9"), 5, {**meta, "tokenizer": "of another"})
    (folder / "tokenizer").mkdir()  # of a copy that was interrupted
    hand_out_tokenizer(base_dir / "tokenizer")
    shutil.rmtree(base_dir / "tokenizer")
    assert load_model("base", "cpu")[1].fingerprint == tokenizer.fingerprint
    assert not (checkpoint_dir("sft", "d9") / "tokenizer").exists()
    hand_out_tokenizer(base_dir / "tokenizer")  # there is none


def test_a_tokenizer_beside_a_model_that_is_not_its_own_is_not_believed(
    folder, meta, tokenizer, base_dir, capsys
):
    save(folder, 5, meta)
    other = Tokenizer.train_from_iterator(["completely different words were here before " * 9], 280)
    other.save(folder / "tokenizer")
    assert load_model("base", "cpu")[1].fingerprint == tokenizer.fingerprint, "the base directory's"
    ranks = folder / "tokenizer" / "ranks.tiktoken"
    flip_a_byte(ranks)
    assert load_model("base", "cpu")[1].fingerprint == tokenizer.fingerprint
    assert "ranks.tiktoken is damaged" in capsys.readouterr().out
    run = CheckpointManager(folder, 0)
    (folder / "tokenizer" / "ranks.tiktoken.x.tmp").write_bytes(b"of a run that was killed")
    run.lock.close()
    run = CheckpointManager(folder, 0)
    run.save_tokenizer(tokenizer)
    run.lock.close()
    assert {path.name for path in (folder / "tokenizer").iterdir()} == {
        "ranks.tiktoken", "tokenizer.json", "meta.json"}
    shutil.rmtree(base_dir / "tokenizer")
    assert load_model("base", "cpu")[1].fingerprint == tokenizer.fingerprint


# --------------------------------------------------------------------------------------------------
# keep


def test_the_newest_the_best_and_the_last_before_lr_decay_stay(folder, meta):
    run = CheckpointManager(folder, 0)
    model = make(meta, 0)[0]
    scores = ((1, 2.0), (2, 1.5), (3, None), (4, 1.7), (5, None), (6, None), (7, None))
    for step, bpb in scores:
        run.save(step, model, {}, {**meta, "val_bpb": bpb, "before_decay": step < 5})
        run.finish()
    assert complete_steps(folder) == [2, 4, 5, 6, 7]
    assert prune(folder, 1) == [5, 6] and complete_steps(folder) == [2, 4, 7]
    left = {int(path.name.split("_")[1][:6]) for path in folder.glob("*_0*")}
    assert left == {2, 4, 7}, "no file of the others is left"
    run.lock.close()


def test_training_deletes_no_step_of_another_run_and_the_owner_no_finished_model(folder, meta):
    # docs/traps.md: shared-folders
    of_another = {**meta, "val_bpb": 1.0}
    save(folder, 1, of_another)                          # of an earlier version, which names no run
    save(folder, 2, {**of_another, "finished": True})
    save(folder, 3, {**of_another, "run": "17-5"})
    run = CheckpointManager(folder, 0, keep=2, run="17-4")
    model = make(meta, 0)[0]
    for step, bpb in ((11, 2.0), (12, 2.5), (13, 2.4), (14, 2.3), (15, None)):
        run.save(step, model, None, {**meta, "val_bpb": bpb, "run": "17-4"})
        run.finish()
    assert complete_steps(folder) == [1, 2, 3, 11, 14, 15], "11 is the best of its own run"
    run.lock.close()
    assert prune(folder, 2) == [3, 11] and complete_steps(folder) == [1, 2, 14, 15]
    metas = complete_metas(folder)
    deleted = steps_to_delete(metas, 2, finished=True)
    assert [meta["step"] for meta in deleted] == [2], "1 is the best of all"


def test_a_step_that_cannot_be_deleted_is_one_line(folder, meta, monkeypatch, capsys):
    def fail(dir, keep, run):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_manager, "prune", fail)
    run = CheckpointManager(folder, 0)
    run.save(1, make(meta, 0)[0], None, meta)
    run.finish()
    assert "were not deleted" in capsys.readouterr().out and run.good_steps == [1]
    run.lock.close()


def test_two_runs_never_share_a_folder(folder):
    held = lock_folder(folder, 0)
    message = error_of(lock_folder, folder, 0)
    assert str(os.getpid()) in message and str(folder) in message and "--model_tag" in message
    assert lock_folder(folder, 1) is None, "the other ranks of a run follow rank 0"
    held.close()
    lock_folder(folder, 0).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_a_warning_once(
    folder, meta, monkeypatch, capsys, number
):
    warn_once.cache_clear()

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    folder.mkdir(parents=True)
    of_another_run = folder / "model_000009.pt.x.tmp"
    of_another_run.write_bytes(b"half")
    for _ in range(2):
        run = CheckpointManager(folder, 0)
        run.lock.close()
    run.save(1, make(meta, 0)[0], None, meta)
    run.finish()
    assert complete_steps(folder) == [1] and of_another_run.exists()
    assert capsys.readouterr().err.count("has no locks") == 1


def test_a_disk_that_fails_to_lock_is_an_error(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        lock_folder(folder, 0)


# --------------------------------------------------------------------------------------------------
# save while training continues


def test_an_async_save_is_a_snapshot_and_is_complete_when_finished(folder, meta, monkeypatch):
    model, optimizers = make(meta)
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    gate, real = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: gate.wait(60) and real(*arguments))
    state = state_of(optimizers)
    pending = AsyncSave(folder, 7, model, state, meta, 0)
    train_step(model, optimizers)
    assert not pending.done() and complete_steps(folder) == []
    gate.set()
    pending.finish()
    weights, state, _ = read_checkpoint(folder, rank=0)
    assert all(torch.equal(weights[key], whole[key]) for key in whole), "not what was trained since"
    assert not torch.equal(whole["embed.weight"], model.state_dict()["embed.weight"])
    assert state["optimizers"][0]["state"][0]["step"] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_fails_or_dies_is_an_error_when_the_save_finishes(folder, meta, monkeypatch):
    model = make(meta, 0)[0]
    failures = (
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError("full"), "full"),
        (SystemExit(), "not all written"),
    )
    for error, said in failures:
        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match=f"step 7 was not saved in .*{said}"):
            AsyncSave(folder, 7, model, None, meta, 0).finish()
    assert complete_steps(folder) == [] and not list(folder.glob("*.tmp"))


class FullDisk:
    """A file on which only so many bytes have room."""

    def __init__(self, file, room):
        self.file = file
        self.room = room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def test_a_disk_that_is_full_within_a_file_is_one_line_and_a_run_continues_without_that_step(
    folder, meta, monkeypatch, capsys
):
    model = make(meta, 0)[0]
    real = checkpoint.atomic_file

    @contextlib.contextmanager
    def full(path):
        with real(path) as file:
            yield FullDisk(file, 5000)

    run = CheckpointManager(folder, 0)
    run.save(1, model, None, meta)
    run.finish()
    monkeypatch.setattr(checkpoint, "atomic_file", full)
    run.save(2, model, None, meta)
    run.finish(raise_on_error=False)
    assert "step 2 was not saved" in capsys.readouterr().out and run.good_steps == [1]
    run.save(3, model, None, meta)
    with pytest.raises(OSError, match="step 3 was not saved in .*No space left on device"):
        run.finish()
    monkeypatch.setattr(checkpoint, "atomic_file", real)
    run.save(3, model, None, meta)
    run.finish()
    assert must_be_whole(folder) == [1, 3] and not list(folder.glob("*.tmp"))
    run.lock.close()


def test_weights_that_are_not_finite_leave_a_run_with_its_last_good_step(folder, meta, capsys):
    model = make(meta, 0)[0]
    run = CheckpointManager(folder, 0)
    run.save(1, model, None, meta)
    model.embed.weight.data[0, 0] = torch.nan
    run.save(2, model, None, meta)
    run.finish(raise_on_error=False)
    assert "step 2 was not saved" in capsys.readouterr().out
    assert must_be_whole(folder) == [1] and run.good_steps == [1] and run.newest() == 1
    run.lock.close()


# --------------------------------------------------------------------------------------------------
# the steps to which a run may return


def test_a_resumed_run_may_return_to_its_own_steps_but_not_to_those_of_another_run(folder, meta):
    for step in (4, 10, 2, 6, 8):  # a run to step 10, and another that started from step 0
        save(folder, step, meta)
    run = CheckpointManager(folder, 0, keep=9, resumed_from=8)
    assert run.good_steps == [2, 6, 8]
    assert run.last_good(9) == 8 and complete_steps(folder)[-1] == 8
    assert run.last_good(8) == 6, "no step since was good"
    assert run.newest() == 8, "but the batches may have been bad, not the weights"
    (folder / "meta_000006.json").unlink()
    assert run.last_good(6) == 2 and run.last_good(2) == 2, "the last one stays: there is no other"
    run.lock.close()


def test_the_steps_of_one_run():
    assert steps_of_run([4, 10, 2, 6, 8], 8) == [2, 6, 8]
    assert steps_of_run([4, 10, 2, 6, 8], 6) == [2, 6]
    assert steps_of_run([4, 10], 10) == [4, 10]
    assert steps_of_run([], 8) == steps_of_run([2], 8) == []


def test_a_roll_back_loads_weights_and_optimizers_in_place(folder, meta):
    model, optimizers = make(meta)
    run = CheckpointManager(folder, 0)
    run.save(2, model, state_of(optimizers), meta)
    run.finish()
    losses = []
    for _ in range(2):
        run.load(2, Layout(model, optimizers))
        torch.manual_seed(3)
        losses.append([train_step(model, optimizers) for _ in range(3)])
    assert losses[0] == losses[1] and must_be_whole(folder) == [2]
    run.lock.close()


def test_a_complete_step_is_amended(folder, meta):
    save(folder, 5, {**meta, "finished": False})
    run = CheckpointManager(folder, 0, resumed_from=5)
    run.amend(5, finished=True, val_bpb=1.25)
    found = read_meta(folder, 5)
    assert found["finished"] and found["val_bpb"] == 1.25 and must_be_whole(folder) == [5]
    model = make(meta, 0)[0]
    run.save(5, model, None, {**meta, "finished": False})
    run.finish()
    assert read_meta(folder, 5)["finished"], "what is saved is not saved again"
    assert problems(folder) == {5: None}
    run.lock.close()


def test_the_best_step_is_named_with_its_own_bits_per_byte(folder, meta):
    run = CheckpointManager(folder, 0)
    for step, bpb in ((4, 2.0), (8, 2.5), (12, None)):
        run.save(step, make(meta, 0)[0], None, {**meta, "val_bpb": bpb})
        run.finish()
    assert run.better_than(2.25) == (4, 2.0) and run.better_than(1.5) == (None, 1.5)
    run.lock.close()
