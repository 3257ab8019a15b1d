"""The stages of the sequence length: what each trains on, how they resume, and what is refused."""
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from conftest import last_json
from models import CONTEXT, make_model, noise
from nanochat import parallel
from nanochat.attention import windowed_attention
from nanochat.common import UserError
from nanochat.curriculum import (
    PRESETS,
    Stage,
    curriculum_to_resume,
    describe,
    read_curriculum,
    reshaped,
    sequences_of,
    sequences_per_pass,
    stage_at,
    stage_records,
    with_stage,
)
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state
from nanochat.forecast import assumed_machine
from nanochat.gpt import GPT, Attention, Block
from nanochat.memory import MAX_MICRO_BATCH, build_on_meta, memory
from nanochat.parallel import Layout, forward_backward, prepare, warm_up
from nanochat.plan import Budget, choose_batch, make_plan
from nanochat.variants import MODEL_CLASSES
from nanochat.variants.lookup import LookupGPT
from stage_runs import TINY, losses_of, meta_of, rows_of, same_weights, weights_of

TABLE = "0.25 16 8; 0.25 64; 0.5 128"
STAGES = (Stage(0.25, 16, 8), Stage(0.25, 64), Stage(0.5, 128))


# -------------------------------------------------------------------------------- the table

def test_a_run_without_a_setting_has_one_stage_and_a_table_has_its_rows():
    assert read_curriculum(None, 128) == (Stage(1.0, 128),)
    assert read_curriculum(TABLE, 128) == STAGES
    assert read_curriculum("\n  0.25 16 8\n\n 0.25 64\n 0.5 128\n", 128) == STAGES


@pytest.mark.parametrize("context", [128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_ends_with_the_whole_context_and_has_few_tokens_of_the_shortest(name, context):
    stages = read_curriculum(name, context)
    lengths = [stage.length for stage in stages]
    assert lengths == sorted(set(lengths)) and lengths[-1] == context
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    assert sum(stage.share for stage in stages if stage.length <= 8) <= 0.01
    if name == "ten_stage":
        documented = [8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048]
        assert lengths[:-1] == [length for length in documented if length < context]


@pytest.mark.parametrize("table, needle", [
    ("nine_stage", "neither a row of SHARE LENGTH"),
    ("", "is empty"),
    ("0.5 64 8 9; 0.5 128", "'0.5 64 8 9' is neither a row"),
    ("50% 64; 0.5 128", "'50% 64' is neither a row"),
    ("0.5 64; 0.4 128", "add up to 0.9, not to 1"),
    ("0.5 64; 0.6 128", "add up to 1.1, not to 1"),
    ("nan 64; 0.5 128", "must be above 0"),
    ("-0.5 64; 1.5 128", "must be above 0"),
    ("0 64; 1 128", "must be above 0"),
    ("0.5 0; 0.5 128", "at least 1 token"),
    ("0.5 256; 0.5 128", "longer than the context of 128"),
    ("0.5 64 65; 0.5 128", "a window of 65 must be from 1 to the 64 tokens"),
    ("0.5 64 0; 0.5 128", "a window of 0 must be from 1"),
    ("0.5 128; 0.5 64", "or give --max_seq_len=64"),
    ("0.5 64; 0.5 128 32", "whole context of 128 without a window"),
])
def test_a_table_that_cannot_be_trained_is_refused(table, needle):
    with pytest.raises(UserError, match=needle):
        read_curriculum(table, 128)


def test_a_resumed_run_keeps_its_stages_and_takes_no_others():
    meta = {"settings": {"curriculum": TABLE}, "config": {"max_seq_len": 128}}
    plain = {"settings": {}, "config": {"max_seq_len": 128}}
    same = TABLE.replace(";", "\n")
    assert curriculum_to_resume(None, meta) == curriculum_to_resume(same, meta) == TABLE
    assert curriculum_to_resume(None, plain) is None
    with pytest.raises(UserError, match="has another curriculum: leave --curriculum out"):
        curriculum_to_resume("three_stage", meta)
    with pytest.raises(UserError, match="has no curriculum"):
        curriculum_to_resume("three_stage", plain)


# -------------------------------------------------------------------------------- steps

@pytest.mark.parametrize("steps", [3, 10, 64, 1000])
def test_each_stage_has_its_share_of_the_steps_within_one(steps):
    for context in (64, 2048):
        stages = read_curriculum("ten_stage", context)
        of_steps = [stage_at(stages, step / steps) for step in range(steps)]
        assert of_steps == sorted(of_steps) and of_steps[0] == 0
        for index, stage in enumerate(stages):
            assert abs(of_steps.count(index) - stage.share * steps) <= 1
    assert stage_at(stages, 1.0) == stage_at(stages, 1.3) == len(stages) - 1


def test_a_stage_begins_where_it_should_whatever_the_last_digits():
    tenths = tuple(Stage(0.1, 64) for _ in range(10))
    assert 0.1 + 0.1 + 0.1 != 0.3
    assert [stage_at(tenths, step / 10) for step in range(10)] == list(range(10))
    # an extended run: three times the progress of a third
    assert [stage_at(tenths, 7 * (step / 70)) for step in range(10)] == list(range(10))


def test_a_stage_of_less_than_one_step_is_named():
    lines = describe(STAGES, 3)
    assert [("less than one of 3 steps" in line) for line in lines] == [False, True, True, False]
    assert "stage 1: 25 % in sequences of 16 tokens, attending to 8" in lines[1]
    assert describe(read_curriculum(None, 64), 3) == []


def test_the_record_accounts_for_every_step_also_after_a_roll_back():
    begun = []
    for index, step, seconds in ((0, 0, 0.0), (1, 3, 1.0), (2, 6, 2.0)):
        begun = with_stage(begun, index, step, seconds)
    begun = with_stage(begun, 1, 4, 3.0)   # back in the second stage, which began at step 3
    begun = with_stage(begun, 2, 6, 4.0)
    rows = stage_records(STAGES, begun, 10, 9.0, 512)
    assert [row["steps"] for row in rows] == [3, 3, 4]
    assert [row["tokens"] for row in rows] == [3 * 512, 3 * 512, 4 * 512]
    assert [row["seconds"] for row in rows] == [1.0, 3.0, 5.0]
    assert stage_records(STAGES[-1:], [[0, 0, 0.0]], 10, 9.0, 512) == []


# -------------------------------------------------------------------------------- batches

class Letters:
    """A tokenizer of bytes."""

    def get_bos_token_id(self):
        return 256

    def encode_to_numpy(self, texts, prepend):
        import numpy
        ids = [[prepend, *text.encode()] for text in texts]
        return numpy.array([i for some in ids for i in some]), list(map(len, ids))


@pytest.mark.parametrize("length", [8, 12, 32])
def test_each_batch_has_the_tokens_of_the_plain_one_and_every_target_follows_its_input(
        tmp_path, length):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {i} of many" * 9 for i in range(40)), encoding="utf-8")
    loader = tokenizing_distributed_data_loader_with_state(
        Letters(), 3, 32, "train", str(path), buffer_batches=2)
    for batch in itertools.islice(loader, 5):
        inputs, targets = reshaped(batch, length)
        assert inputs.shape == targets.shape == (96 // length, length)
        assert torch.equal(inputs.flatten(), batch[0].flatten())
        assert torch.equal(targets.flatten(), batch[1].flatten())
        if 32 % length == 0:
            assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_length_that_does_not_divide_the_context_takes_several_sequences_a_pass():
    stages = read_curriculum("ten_stage", 2048)
    assert sequences_per_pass(stages, 2048) == 3
    assert sequences_per_pass(STAGES, 128) == sequences_per_pass(STAGES[-1:], 128) == 1
    batch = choose_batch(2**19, 2048, 2, 16, multiple=3)
    assert batch.micro_batch_size % 3 == 0 and batch.micro_batch_size <= 16
    tokens = batch.micro_batch_size * 2048
    assert batch.total_batch_size == 2 * tokens * batch.grad_accum_steps
    assert 0.9 * 2**19 < batch.total_batch_size <= 2**19
    assert all(tokens % stage.length == 0 for stage in stages)
    assert choose_batch(1, 2048, 2, 16, 2 * 12 * 2048, 6, 3).micro_batch_size == 6
    with pytest.raises(UserError, match="total_batch_size=524288 .* 516096 is a multiple"):
        choose_batch(1, 2048, 2, 16, 2**19, None, 3)
    with pytest.raises(UserError, match="device_batch_size=16 .* 18 is a multiple of 3"):
        choose_batch(2**19, 2048, 2, 16, None, 16, 3)
    with pytest.raises(UserError, match="=6 does not divide the 9 sequences .*: 3 does"):
        choose_batch(1, 2048, 2, 16, 2 * 9 * 2048, 6, 3)


def test_a_pass_that_memory_made_smaller_than_a_sequence_holds_one():
    assert [sequences_of(768, length) for length in (8, 768, 1536)] == [96, 1, 1]


def planned(**given):
    """The plan of depth 4 on two GPUs."""
    settings = {
        "depth": 4, "max_seq_len": 2048, "kv_heads": None, "total_batch_size": None,
        "device_batch_size": None, "weight_decay": None, "keep": 3, "parallel": "auto",
        "checkpoint_activations": None,
    }
    return make_plan(
        {**settings, **given}, Budget("target_flops", 1e17), assumed_machine("h100", 2), GPT,
        65536, None)


def test_the_lengths_may_need_more_sequences_in_a_pass_than_are_usual():
    assert sequences_per_pass([Stage(0.5, 74), Stage(0.5, 2048)], 2048) == 37
    table = "0.5 74; 0.5 2048"
    batch = planned(curriculum=table).batch
    assert batch.micro_batch_size == 37 > MAX_MICRO_BATCH["cuda"]
    with pytest.raises(UserError, match="total_batch_size=524288 .* 454656 is a multiple"):
        planned(curriculum=table, total_batch_size=2**19)
    # so many take more memory than there is
    with pytest.raises(UserError, match="a multiple of 1040399 .* divide .* 2048 would fit"):
        planned(curriculum="0.3 1021; 0.3 1019; 0.4 2048")


def test_the_plan_has_the_stages_and_counts_their_flops():
    plans = {}
    for name in (None, "three_stage", "ten_stage"):
        plans[name] = planned(curriculum=name)
        assert plans[name].stages == read_curriculum(name, 2048)
    assert plans[None].steps < plans["three_stage"].steps
    assert plans["ten_stage"].batch.micro_batch_size % 3 == 0
    lines = "\n".join(plans["three_stage"].describe("gpt", 2))
    assert "curriculum: 3 stages" in lines and "stage 1: 25 % in sequences of 512 tokens" in lines
    assert "curriculum" not in "\n".join(plans[None].describe("gpt", 2))


@pytest.mark.parametrize("name", ["gpt", "lookup"])
def test_a_pass_of_shorter_sequences_takes_the_memory_that_was_planned(name):
    model_class = MODEL_CLASSES[name]
    whole, short = (
        memory(build_on_meta(model_class, model_class.config_class.from_depth(4, 4096, length)),
               16 * 256 // length, 4)
        for length in (256, 8))
    assert whole == short


# -------------------------------------------------------------------------------- windows

@pytest.mark.parametrize("T, window", [(32, 8), (30, 8), (9, 8), (7, 3), (16, 1), (16, 16)])
def test_a_window_is_attention_with_a_dense_mask(T, window):
    torch.manual_seed(0)
    q = torch.randn(2, T, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, T, 2, 8, requires_grad=True) for _ in range(2))
    behind = torch.arange(T)[:, None] - torch.arange(T)
    visible = (behind >= 0) & (behind < window)
    wanted = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(2, 1),
        v.transpose(1, 2).repeat_interleave(2, 1), attn_mask=visible).transpose(1, 2)
    found = windowed_attention(q, k, v, window)
    torch.testing.assert_close(found, wanted)
    dy = torch.randn_like(found)
    for mine, theirs in zip(
            torch.autograd.grad(found, (q, k, v), dy), torch.autograd.grad(wanted, (q, k, v), dy)):
        torch.testing.assert_close(mine, theirs)


def test_windows_are_for_training_alone_and_leave_no_token_further_than_they_reach():
    model = make_model(GPT, depth=1).train()
    idx = noise(1, CONTEXT)
    other = idx.clone()
    other[0, 0] = (idx[0, 0] + 1) % 97
    model.set_training_window(4)
    a, b = model(idx), model(other)
    assert torch.equal(a[:, 4:], b[:, 4:]) and not torch.equal(a[:, 3], b[:, 3])
    model.eval()
    assert not torch.equal(model(idx)[:, 4:], model(other)[:, 4:])


def test_a_model_with_an_attention_of_its_own_refuses_windows():
    class Other(Attention):
        def forward(self, x, *_, **more):
            return x

    class OtherBlock(Block):
        attention_class = Other

    class OtherGPT(GPT):
        block_class = OtherBlock

    model = make_model(OtherGPT, depth=1)
    model.set_training_window(None)
    with pytest.raises(UserError, match="OtherGPT has no windows of attention"):
        model.set_training_window(4)


def test_flops_of_a_window_lie_between_those_of_its_own_and_of_the_whole_length():
    assert Stage(1, 256).attended == Stage(1, 256, 256).attended == 256
    mean = sum(min(t, 32) for t in range(1, 257)) / 256
    assert Stage(1, 256, 32).attended == pytest.approx(2 * mean, rel=0.03)


# -------------------------------------------------------------------------------- compiling

def test_there_is_one_graph_for_each_length_and_none_is_made_after_the_warm_up(monkeypatch):
    """docs/traps.md: compile-recompiles"""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(parallel, "compile_problem", lambda device: None)
    monkeypatch.setattr(
        torch.nn.Module, "compile", functools.partialmethod(compile_in_place, backend=counting))
    torch._dynamo.reset()
    model = make_model(LookupGPT, depth=2).train()
    stages = [Stage(0.2, 4), Stage(0.2, 16), Stage(0.2, 32, 8), Stage(0.4, 32)]
    prepare(model, lengths=len(stages))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layout = Layout(model, model.setup_optimizers())
    batch = noise(2, CONTEXT), noise(2, CONTEXT), None
    for stage in stages:
        model.set_training_window(stage.window)
        warm_up(model, [reshaped(batch, stage.length)], 64 // stage.length, layout)
    assert len(graphs) == len(stages)
    assert same_weights(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())

    for stage in reversed(stages):
        model.set_training_window(stage.window)
        forward_backward(model, [reshaped(batch, stage.length)], 1.0, 64 // stage.length, layout)
    assert len(graphs) == len(stages)
    torch._dynamo.reset()


def test_a_table_of_many_lengths_is_within_the_limit_of_torch():
    """docs/traps.md: compile-recompiles"""
    # monkeypatch would delete the setting at its end, as torch keeps values apart from defaults
    with torch._dynamo.config.patch(recompile_limit=8):
        parallel.compile_blocks([], lengths=20)
        assert torch._dynamo.config.recompile_limit >= 40


# -------------------------------------------------------------------------------- whole runs

@pytest.fixture
def base(stages, text):
    """(tag, settings) -> (words of a tiny base_train with a curriculum, its folder)."""
    def named(tag, *settings):
        words = ("scripts.base_train", f"--data={text}", *TINY, f"--model_tag={tag}",
                 "--num_iterations=8", "--eval_every=0", *settings)
        return words, stages.folder("base", tag)
    return named


@pytest.mark.parametrize("ranks, parallel", [(1, "replicated"), (2, "fsdp")])
def test_a_run_that_is_stopped_within_a_stage_ends_with_the_weights_of_a_quiet_one(
        stages, base, ranks, parallel):
    # docs/traps.md: resume-forgets
    settings = (f"--curriculum={TABLE}", f"--parallel={parallel}", "--ngram_tokens=0")
    command, quiet = base(f"quiet-{ranks}", *settings)
    out, _ = stages.fork(*command, ranks=ranks)
    assert "step 1 begins stage 1 of 3, 16 tokens" in out
    assert "step 3 begins stage 2 of 3, 64 tokens" in out
    assert "step 5 begins stage 3 of 3, 128 tokens" in out
    assert "% of matmul rate | stage 1 of 3, 16 tokens | " in out

    command, folder = base(f"stopped-{ranks}", *settings)
    stages.fork(*command, ranks=ranks, status=130, faults={"4": "interrupt"})
    assert meta_of(folder, 4)["stages_begun"][1][:2] == [1, 2]
    resume = [word for word in command if not word.startswith("--curriculum")]
    row = stages.fork_record(*resume, "--resume", ranks=ranks)
    assert same_weights(weights_of(folder, 8), weights_of(quiet, 8))
    assert [stage["steps"] for stage in row["stages"]] == [2, 2, 4]
    assert sum(stage["tokens"] for stage in row["stages"]) == row["tokens"]
    assert [stage["length"] for stage in row["stages"]] == [16, 64, 128]
    assert row["settings"]["curriculum"] == TABLE


def test_only_validations_after_the_whole_context_can_end_a_run_early(stages, base):
    command, folder = base("validated", f"--curriculum={TABLE}", "--eval_every=2")
    stages.fork(*command)
    validated = {row["step"]: row["val_bpb"] for row in rows_of(folder, "val_bpb")}
    assert list(validated) == [2, 4, 6, 8]
    assert meta_of(folder, 8)["bpbs"] == [validated[6]], "stage 3 begins after step 4"


def test_the_learning_rate_and_the_text_are_those_of_a_run_without_stages(stages, base):
    """Counts of n-grams are mixed in here, as without a setting."""
    command, plain = base("plain")
    assert stages.fork_record(*command)["stages"] == []
    command, staged = base("staged", f"--curriculum={TABLE}")
    out, _ = stages.fork(*command)
    assert last_json(out)["val_bpb"] > 0
    rates = [[row["lr"] for row in rows_of(folder, "lr")] for folder in (plain, staged)]
    assert len(rates[0]) == 8 and rates[0] == rates[1]
    loaders = [
        torch.load(folder / "optim_000008_rank0.pt", weights_only=True)["loader"]
        for folder in (plain, staged)]
    assert loaders[0] == loaders[1]
    assert not same_weights(weights_of(plain, 8), weights_of(staged, 8))
    # from the first step on: the first tokens of a sequence know less
    assert losses_of(plain)[2] != losses_of(staged)[2]
    report = stages.fork_record("nanochat.report")["report"]
    assert "Stages of the sequence length" in open(report, encoding="utf-8").read()


def test_an_extended_run_is_in_the_stage_in_which_it_was(stages, base):
    command, _ = base("short", f"--curriculum={TABLE}", "--warmdown=0.25")
    stages.fork(*command)
    words = [word for word in command if not word.startswith(("--num_iter", "--curriculum"))]
    row = stages.fork_record(*words, "--extend=2")
    assert [(stage["length"], stage["steps"]) for stage in row["stages"]] == [
        (16, 2), (64, 2), (128, 12)]


@pytest.mark.parametrize("setting, needle", [
    ("--curriculum=0.5 64; 0.4 128", "add up to 0.9"),
    ("--curriculum=0.5 96; 0.5 128", "total_batch_size=512 does not suit"),
    ("--curriculum=0.5 256; 0.5 128", "longer than the context of 128"),
])
def test_a_curriculum_that_cannot_be_trained_is_one_line(stages, base, setting, needle):
    command, folder = base("refused", setting)
    assert needle in stages.refusal(*command)
    assert not list(folder.glob("model_*"))


@pytest.mark.parametrize("script", ["scripts.mid_train", "scripts.chat_sft"])
def test_the_chat_stages_take_no_curriculum(stages, script):
    assert "unknown setting --curriculum" in stages.refusal(script, "--curriculum=ten_stage")
