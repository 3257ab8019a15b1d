"""Every decision before the first step, without a process, a GPU or a measurement.

Memory is held to the bytes of real tensors, and activations to an account of what autograd keeps.
"""
import itertools
import math

import pytest
import torch

from nanochat.common import UserError, compute_init
from nanochat.dataloader import TextSize
from nanochat.forecast import PASS_TOKENS, Machine, assumed_machine, expected_step
from nanochat.gpt import GPT, GPTConfig
from nanochat.memory import MAX_MICRO_BATCH, build_on_meta, fits, memory, micro_batch_limit
from nanochat.plan import (
    BUDGETS,
    CPU_MINUTES,
    CPU_SHAPES,
    GPU_DEPTHS,
    GPU_HOURS,
    GPU_PARAM_DATA_RATIO,
    MIN_HASHED_ROWS,
    MOST_EPOCHS,
    OVERFITTING_BPB,
    SIZES,
    TOO_LITTLE_BYTES,
    Batch,
    Budget,
    Horizon,
    Reading,
    Shape,
    arrange,
    arrangements,
    chat_batch,
    chat_layout,
    chat_horizon,
    chat_layout,
    check_disk,
    check_not_passed,
    checkpoint_bytes,
    choose_batch,
    choose_budget,
    choose_horizon,
    config_for,
    cpu_shape,
    depth_of_size,
    fitting_hashed_rows,
    given_fields,
    gpu_shape,
    gpu_weight_decay,
    is_overfitting,
    gpu_depth,
    largest_divisor,
    make_chat_plan,
    make_plan,
    matmul_parameters,
    measure_step,
    speed_of,
    tokens_within,
)
from nanochat.variants import MODEL_CLASSES
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.portable import PortableGPT

GB = 10**9
VOCAB_SIZE = 65536
NAMES = (
    "depth", "max_seq_len", "kv_heads", "total_batch_size", "device_batch_size", "weight_decay",
    "extend", "checkpoint_activations", "width", "heads", "mlp_width", "tied", "rotary_base",
    *BUDGETS)


def settings_with(**given):
    """The settings of base_train as far as a plan reads them: all None, but for these."""
    assert given.keys() <= {*NAMES, "keep", "parallel"}
    return {**dict.fromkeys(NAMES), "keep": 3, "parallel": "auto", **given}


# -------------------------------------------------------------------------------- 1. the budget

@pytest.mark.parametrize("kind", BUDGETS)
def test_a_given_budget_is_the_budget(kind):
    given = settings_with(**{kind: 12})
    for device_type, resumed in itertools.product(("cpu", "cuda"), (None, {"minutes": 7.0})):
        assert choose_budget(given, device_type, resumed) == Budget(kind, 12)


def test_without_a_budget_the_device_decides():
    for device_type in ("cpu", "mps"):
        found = choose_budget(settings_with(), device_type)
        assert found == Budget("minutes", CPU_MINUTES)
    ratio = Budget("target_param_data_ratio", GPU_PARAM_DATA_RATIO)
    assert choose_budget(settings_with(), "cuda") == ratio


@pytest.mark.parametrize("kind", BUDGETS)
def test_a_resumed_run_keeps_its_budget_and_an_extended_one_multiplies_it(kind):
    resumed = {kind: 10.0}
    for device_type in ("cpu", "cuda"):
        assert choose_budget(settings_with(), device_type, resumed) == Budget(kind, 10.0)
        extend = settings_with(extend=2.5)
        assert choose_budget(extend, device_type, resumed, 2.5) == Budget(kind, 25.0)
        # the run before had been extended already
        assert choose_budget(extend, device_type, resumed) == Budget(kind, 10.0)


@pytest.mark.parametrize("pair", [*itertools.combinations(BUDGETS, 2)])
def test_two_budgets_are_refused(pair):
    with pytest.raises(UserError) as refused:
        choose_budget(settings_with(**dict.fromkeys(pair, 3)), "cpu")
    assert str(refused.value) == f"{pair[0]}=3, {pair[1]}=3: give one budget, above zero"


@pytest.mark.parametrize("amount", [0, -1.5])
@pytest.mark.parametrize("kind", BUDGETS)
def test_a_budget_that_is_not_above_zero_is_refused(kind, amount):
    with pytest.raises(UserError, match=f"{kind}={amount}: give one budget, above zero"):
        choose_budget(settings_with(**{kind: amount}), "cuda")


def test_a_run_is_not_resumed_toward_a_budget_that_it_has_passed():
    resumed = {"step": 50, "elapsed": 120.0, "budgets": {"num_iterations": 100}}
    check_not_passed(Budget("num_iterations", 51), Horizon(51, None), resumed)
    check_not_passed(Budget("minutes", 2.1), Horizon(None, 2.1), resumed)
    for budget, horizon in (
        (Budget("num_iterations", 50), Horizon(50, None)),
        (Budget("num_iterations", 10), Horizon(10, None)),
        (Budget("target_flops", 1e9), Horizon(3, None)),
        (Budget("minutes", 2.0), Horizon(None, 2.0)),
    ):
        with pytest.raises(UserError, match="is over at step 50, after 2 minutes, where the run"):
            check_not_passed(budget, horizon, resumed)

    # a fresh run, and one that lacks nothing but its last evaluation
    check_not_passed(Budget("num_iterations", 10), Horizon(10, None), None)
    done = {**resumed, "budgets": {"num_iterations": 50}}
    check_not_passed(Budget("num_iterations", 50), Horizon(50, None), done)


@pytest.mark.parametrize("factor", [None, 2.0])  # None: it was extended before
def test_extend_takes_no_budget_and_a_factor_above_1(factor):
    for kind in BUDGETS:
        with pytest.raises(UserError, match="extend=2.0 must be above 1, and takes no other"):
            choose_budget(settings_with(extend=2.0, **{kind: 5}), "cpu", {"minutes": 5}, factor)
    for extend in (1.0, 0.5, 0.0, -2.0):
        with pytest.raises(UserError, match=f"extend={extend} must be above 1"):
            choose_budget(settings_with(extend=extend), "cpu", {"minutes": 5}, factor and extend)


# -------------------------------------------------------------------------------- 2. the text

NOVEL = TextSize(600_000, 250_000, True)
LIBRARY = TextSize(60_000_000_000, 12_000_000_000, False)


@pytest.mark.parametrize("bpbs, expected", [
    ([], False),
    ([2.0, 2.5], False),                        # one better and one worse say nothing yet
    ([2.5, 2.0, 2.1], False),                   # once may be chance
    ([2.5, 2.0, 2.1, 2.1], True),
    ([2.5, 2.0, 2.1, 2.0], False),              # it came back
    ([2.0, 2.0 + OVERFITTING_BPB / 2, 2.0 + OVERFITTING_BPB / 2], False),
    ([2.0, 2.1, 2.2, 1.9], False),
])
def test_a_run_overfits_where_two_validations_are_clearly_above_its_best(bpbs, expected):
    assert is_overfitting(bpbs) == expected


def test_hashed_tables_grow_with_the_text_up_to_the_usual_size():
    sizes = [10**n for n in range(2, 10)]
    rows = [fitting_hashed_rows(TextSize(2 * n, n, True), 131072) for n in sizes]
    assert rows[0] == MIN_HASHED_ROWS and rows[-1] == 0  # 0 is the usual size
    growing = [found or 131072 for found in rows]
    assert growing == sorted(growing) and max(growing) == 131072
    config = config_for(LookupGPT, cpu_shape(lambda *_: 0), 2048, None, NOVEL)
    small, usual = LookupGPT(config), LookupGPT(LookupGPT.config_class.from_depth(2, 2048, 256))
    assert len(small.bigram.weight) == config.hashed_rows < len(usual.bigram.weight)
    assert len(usual.trigram.weight) == 131072


def test_a_text_that_is_read_once_gets_the_usual_tables():
    often, once = plan_of_text(NOVEL), plan_of_text(LIBRARY)
    assert often.reading.repeated() == NOVEL and once.reading.repeated() is None
    assert often.memory.tables < once.memory.tables / 4


def plan_of_text(text, minutes=10.0, machine="cpu", resumed=None, **given):
    budget = Budget("minutes", minutes)
    return make_plan(
        settings_with(**given), budget, MACHINES[machine], LookupGPT, 2048, slow_machine, resumed,
        text)


def test_a_short_text_ends_a_run_of_minutes_and_a_long_one_does_not():
    short, long = plan_of_text(NOVEL), plan_of_text(LIBRARY)
    step = short.batch.total_batch_size
    assert short.horizon.max_steps == pytest.approx(MOST_EPOCHS * NOVEL.tokens / step, rel=0.01)
    assert short.hours < 10 / 60 and short.horizon.minutes == 10
    assert short.reading.epochs == pytest.approx(MOST_EPOCHS, rel=0.01)
    assert short.reading.wanted > MOST_EPOCHS
    assert long.reading.epochs == long.reading.wanted < 0.001
    assert long.horizon.max_steps > 100 * long.steps
    for plan in (short, long):
        check_plan(plan, MACHINES["cpu"])


def test_a_short_text_has_no_larger_model_than_its_tokens_pay_for():
    plans = [plan_of_text(TextSize(3 * n, n, True), 1e4) for n in (10**4, 10**5, 10**6, 10**8)]
    depths = [plan.shape.depth for plan in plans]
    assert depths == sorted(depths) and depths[0] == CPU_SHAPES[0][1] < depths[-1]
    assert [plan.memory.tables for plan in plans] == sorted(plan.memory.tables for plan in plans)


@pytest.mark.parametrize("kind", ["target_flops", "target_param_data_ratio"])
def test_a_gpu_does_not_read_a_short_text_thousands_of_times(kind):
    budget = Budget(kind, {"target_flops": 1e20}.get(kind, 20.0))
    plan = make_plan(settings_with(), budget, MACHINES["cuda"], GPT, VOCAB_SIZE, None, None, NOVEL)
    assert plan.horizon.num_iterations == round(MOST_EPOCHS * NOVEL.tokens / 524288)
    assert plan.reading.wanted > 1000


def test_steps_that_the_user_names_are_not_cut():
    budget = Budget("num_iterations", 10**6)
    plan = make_plan(
        settings_with(), budget, MACHINES["cpu"], LookupGPT, 2048, slow_machine, None, NOVEL)
    assert plan.horizon == Horizon(10**6, None)
    assert plan.reading.epochs == plan.reading.wanted > 1000


def test_an_extended_run_reads_a_short_text_so_many_times_as_often():
    meta = resumed_meta("lookup", 1)
    steps = [
        plan_of_text(NOVEL, resumed={**meta, **factors}).horizon.max_steps
        for factors in ({}, {"extend": 2.0}, {"extend": 2.0, "extended": 4.0})
    ]
    assert steps[1] == pytest.approx(2 * steps[0], abs=1)
    assert steps[2] == pytest.approx(4 * steps[0], abs=2), "it was extended twice"


def test_a_plan_says_how_often_the_text_is_read():
    assert Reading(NOVEL, 12.4, 4.0).describe() == (
        "text: 0.6 MB, 250,000 tokens: the budget reads it 12 times, the run 4.0 times and ends "
        "before")
    assert Reading(NOVEL, 2.5, 2.5).describe() == (
        "text: 0.6 MB, 250,000 tokens: the budget reads it 2.5 times")
    assert Reading(LIBRARY, 0.25, 0.25).describe() == (
        "text: about 60.0 GB, about 12,000,000,000 tokens: the budget reads 25 % of it")


def test_little_text_is_warned_of_before_minutes_are_spent():
    tiny = TextSize(TOO_LITTLE_BYTES - 1, 9000, True)
    warnings = Reading(tiny, 50.0, 4.0).warnings()
    assert len(warnings) == 1 and "add text" in warnings[0]
    warnings = Reading(NOVEL, 12.0, 4.0).warnings()
    assert len(warnings) == 1 and "more text would help more than more minutes" in warnings[0]
    assert Reading(NOVEL, 3.0, 3.0).warnings() == Reading(LIBRARY, 0.1, 0.1).warnings() == []


def test_validations_come_after_each_epoch_of_a_text_that_is_read_often():
    counts = [Reading(NOVEL, 99, epochs).evaluations() for epochs in (0.1, 1, 4.5, 8, 1000)]
    assert counts == [4, 4, 5, 8, 20]


# -------------------------------------------------------------------------------- 3. the shape

def asked_shapes(tokens_at, depth=None):
    """(the Shape of a CPU, the shapes for which the training tokens were asked)."""
    asked = []

    def asking(depth, max_seq_len):
        asked.append((depth, max_seq_len))
        return tokens_at(depth, max_seq_len)

    return cpu_shape(asking, depth), asked


def test_more_tokens_never_plan_a_smaller_model():
    def tokens_at(scale):
        return lambda depth, max_seq_len: scale * 1e6 / depth**2

    shapes = [asked_shapes(tokens_at(scale))[0] for scale in (0, 1, 4, 10, 50, 100, 1e3, 1e9)]
    sizes = [shape[:3] for shape in shapes]
    assert sizes == sorted(sizes)
    assert sizes[0] == CPU_SHAPES[0][1:] and sizes[-1] == CPU_SHAPES[-1][1:]
    assert len(set(sizes)) == len(CPU_SHAPES)


@pytest.mark.parametrize("paying", range(1, len(CPU_SHAPES) + 1))
def test_speed_is_asked_from_the_smallest_row_on_and_no_further_than_needed(paying):
    """paying: how many rows the budget pays for."""
    tokens = CPU_SHAPES[paying - 1][0]
    shape, asked = asked_shapes(lambda depth, max_seq_len: tokens)
    assert shape[:3] == CPU_SHAPES[paying - 1][1:]
    assert asked == [row[1:3] for row in CPU_SHAPES[1:paying + 1]]


def test_the_reason_of_a_shape_names_what_was_bought_and_what_was_not():
    smallest, _ = asked_shapes(lambda depth, max_seq_len: 1000)
    assert smallest.reason == (
        "the smallest shape; 0.0 M tokens at depth 2 would be too few, 0.9 M are needed")
    middle, _ = asked_shapes(lambda depth, max_seq_len: 3e6)
    assert middle.reason == (
        "the budget buys 3.0 M tokens at depth 3; 3.0 M tokens at depth 4 would be too few, "
        "5.5 M are needed")
    largest, _ = asked_shapes(lambda depth, max_seq_len: 1e9)
    assert largest.reason == "the budget buys 1000.0 M tokens at depth 6"


@pytest.mark.parametrize("depth, rest", [
    (1, (256, 2048)),   # as the smallest row
    (3, (256, 4096)),
    (5, (256, 4096)),   # as depth 4
    (6, (512, 8192)),
    (12, (512, 8192)),
])
def test_a_given_depth_stays_and_takes_the_rest_from_the_nearest_row(depth, rest):
    shape, asked = asked_shapes(lambda depth, max_seq_len: 0, depth)
    assert shape[:3] == (depth, *rest)
    assert asked == ([(1, 256)] if depth == 1 else [])
    assert ("smallest shape" in shape.reason) is False


def test_a_given_depth_takes_the_larger_batch_where_the_budget_pays():
    shape, asked = asked_shapes(lambda depth, max_seq_len: 1e6, depth=2)
    assert shape[:3] == (2, 256, 4096) and asked == [(2, 256)]


def test_the_depth_of_a_gpu_run_gives_its_batch_and_its_weight_decay():
    depths = 4, 12, 20, 32
    for vocab_size in (32768, VOCAB_SIZE):
        shapes = [gpu_shape(depth, vocab_size) for depth in depths]
        assert [shape.depth for shape in shapes] == list(depths)
        assert {shape.max_seq_len for shape in shapes} == {2048}
        batches = [shape.total_batch_size for shape in shapes]
        assert batches == sorted(batches)
        assert batches[1:] == [262144, 524288, 1048576]
    assert gpu_shape(4, 32768).total_batch_size == 131072
    assert gpu_shape(None, VOCAB_SIZE) == gpu_shape(20, VOCAB_SIZE)  # the documented run
    assert "524,288 tokens at depth 20" in gpu_shape(12, VOCAB_SIZE).reason

    decays = [gpu_weight_decay(depth) for depth in depths]
    assert decays == sorted(decays, reverse=True)
    assert decays[1] == pytest.approx(0.2) and decays[2] == pytest.approx(0.072)


def test_the_documented_matmul_parameters_are_those_of_the_model():
    for depth in (4, 12, 20):
        model = build_on_meta(GPT, GPTConfig.from_depth(depth, VOCAB_SIZE, 2048))
        assert matmul_parameters(depth, VOCAB_SIZE) == model.matmul_parameters()


# -------------------------------------------------------------------------------- 4. the batch

def tokens_of(batch, max_seq_len, ranks):
    return batch.micro_batch_size * batch.grad_accum_steps * ranks * max_seq_len


@pytest.mark.parametrize("gb", [24, 80, 192])
@pytest.mark.parametrize("ranks", range(1, 9))
def test_any_number_of_gpus_trains_depth_20(ranks, gb):
    machine = Machine("cuda", ranks, gb * GB, 2, 4e14)
    budget = Budget("num_iterations", 10)
    plan = make_plan(settings_with(), budget, machine, GPT, VOCAB_SIZE, speed=None)
    batch = plan.batch
    assert tokens_of(batch, 2048, ranks) == batch.total_batch_size
    assert batch.micro_batch_size <= 32
    assert 0.9 * 524288 <= batch.total_batch_size <= 524288
    if gb == 24:
        assert batch.micro_batch_size >= 3
    else:
        assert batch.micro_batch_size >= 16
    if gb == 192 and ranks in (1, 2, 4, 8):
        assert batch == Batch(524288, 32, 8 // ranks)  # nothing is rounded


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("limit", [1, 5, 16, 32])
@pytest.mark.parametrize("wanted", [100, 4096, 262144, 1048576])
def test_a_batch_is_its_factors_and_near_what_was_wanted(ranks, limit, wanted):
    max_seq_len = 512
    batch = choose_batch(wanted, max_seq_len, ranks, limit)
    assert tokens_of(batch, max_seq_len, ranks) == batch.total_batch_size
    assert 1 <= batch.micro_batch_size <= limit
    one_each = max_seq_len * ranks
    assert batch.total_batch_size <= max(wanted, one_each)
    assert batch.total_batch_size > 0.9 * wanted - one_each


def test_a_device_is_half_full_where_a_tenth_fewer_sequences_allow_it():
    # 43 sequences, a prime: 42 = 2 x 21
    assert choose_batch(43 * 512, 512, 1, 32) == Batch(42 * 512, 21, 2)
    # 37 fit as they are
    assert choose_batch(37 * 512, 512, 1, 64) == Batch(37 * 512, 37, 1)


def test_given_numbers_are_never_changed():
    assert choose_batch(1, 512, 2, 32, 43 * 1024) == Batch(43 * 1024, 1, 43)
    assert choose_batch(1, 512, 2, 32, 48 * 1024, 12) == Batch(48 * 1024, 12, 4)
    assert choose_batch(48 * 1024, 512, 2, 32, None, 12) == Batch(48 * 1024, 12, 4)
    # more than fits in the plan's opinion: the user decides
    assert choose_batch(1, 512, 2, 4, 48 * 1024, 24) == Batch(48 * 1024, 24, 2)
    # a rank has fewer sequences than it may take at a time
    assert choose_batch(1, 512, 2, 32, 4 * 1024, 24) == Batch(4 * 1024, 4, 1)


def test_what_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(UserError) as refused:
        choose_batch(1, 512, 3, 32, 4096)
    assert str(refused.value) == (
        "total_batch_size=4096 is not a multiple of max_seq_len x ranks = 512 x 3: 3072 is one, or "
        "leave it out")
    for total_batch_size in (None, 43 * 512):
        with pytest.raises(UserError) as refused:
            choose_batch(43 * 512, 512, 1, 32, total_batch_size, 8)
        assert str(refused.value) == (
            "device_batch_size=8 does not divide the 43 sequences that a rank has per step: 1 does")


def test_the_largest_divisor_is_found():
    found = [largest_divisor(n, 8) for n in (1, 6, 12, 13, 64, 85)]
    assert found == [1, 6, 6, 1, 8, 5]


def chat_settings(**given):
    assert given.keys() <= {"device_batch_size", "total_batch_size", "minutes", "num_iterations"}
    names = "device_batch_size", "total_batch_size", "minutes", "num_iterations"
    return {**dict.fromkeys(names), **given}


def test_a_chat_stage_takes_one_pass_over_the_batch_of_pretraining():
    assert chat_batch(chat_settings(), 256, 1, 2048) == Batch(2048, 8, 1)
    assert chat_batch(chat_settings(), 256, 2, 2048) == Batch(2048, 4, 1)
    assert chat_batch(chat_settings(), 2048, 8, 524288) == Batch(262144, 16, 1)  # at most 16
    assert chat_batch(chat_settings(), 2048, 8, 4096) == Batch(16384, 1, 1)      # at least 1
    given = chat_settings(device_batch_size=4, total_batch_size=8192)
    assert chat_batch(given, 256, 2, 2048) == Batch(8192, 4, 4)
    with pytest.raises(UserError) as refused:
        chat_batch(chat_settings(total_batch_size=1000), 256, 2, 2048)
    assert str(refused.value) == (
        "total_batch_size=1000 is not a multiple of device_batch_size x context x ranks = "
        "4 x 256 x 2")


# -------------------------------------------------------------------------------- 5. the horizon

def test_a_run_of_seconds_is_a_trial():
    assert Horizon(None, 0.1).is_trial and not Horizon(None, 0.25).is_trial
    assert not Horizon(1, None).is_trial, "who gives steps knows what they are for"


def test_every_budget_becomes_steps_or_minutes():
    def horizon(kind, amount):
        return choose_horizon(
            Budget(kind, amount), total_batch_size=1000, flops_per_token=50, parameters=200)

    assert horizon("minutes", 2.5) == Horizon(None, 2.5)
    assert horizon("num_iterations", 7) == Horizon(7, None)
    assert horizon("num_iterations", 7 * 1.5) == Horizon(10, None)  # extended
    assert horizon("target_flops", 1e6) == Horizon(20, None)
    assert horizon("target_param_data_ratio", 20) == Horizon(4, None)
    assert horizon("target_flops", 1) == Horizon(1, None)  # never none
    assert horizon("target_param_data_ratio", 1e-3) == Horizon(1, None)


def test_the_horizon_of_a_chat_stage():
    for device_type in ("cpu", "cuda", "mps"):
        assert chat_horizon(chat_settings(num_iterations=9), device_type, 1, 1) == Horizon(9, None)
        assert chat_horizon(chat_settings(minutes=2.0), device_type, 1, 1) == Horizon(None, 2.0)
        for given in ({"minutes": 0.0}, {"num_iterations": -1}):
            with pytest.raises(UserError, match="a budget must be above zero"):
                chat_horizon(chat_settings(**given), device_type, 1000, None)
    for device_type in ("cpu", "mps"):
        assert chat_horizon(chat_settings(), device_type, 1000, None) == Horizon(None, CPU_MINUTES)
    assert chat_horizon(chat_settings(), "cuda", 1000, 700_400) == Horizon(700, None)
    assert chat_horizon(chat_settings(), "cuda", 1000, 3_000) == Horizon(500, None)


# about as many tokens as the mixtures of tasks/chat_data.py hold: midtraining's and fine-tuning's
# documented ones, and the local one
@pytest.mark.parametrize("data_tokens", [330_000_000, 8_000_000, 4_000_000])
@pytest.mark.parametrize("ranks", [1, 2, 6, 8])
@pytest.mark.parametrize("device_batch_size", [None, 7, 32])
def test_a_chat_stage_on_gpus_has_500_steps_with_the_largest_batch_that_gives_as_many(
        data_tokens, ranks, device_batch_size):
    # docs/traps.md: too-few-updates
    T, most = 2048, 524_288
    meta = {"total_batch_size": most, "device_batch_size": device_batch_size}
    plan = make_chat_plan(chat_settings(), "cuda", T, ranks, meta, lambda: data_tokens)
    total, micro, accumulation = plan.batch
    sequences = total // (T * ranks)        # of a rank
    assert total == micro * T * ranks * accumulation and sequences == micro * accumulation
    assert plan.horizon.minutes is None and plan.horizon.num_iterations >= 500
    assert micro <= min(16, device_batch_size or 16)

    fitting = min(most, data_tokens / 500) // (T * ranks)
    assert max(1, math.ceil(0.9 * fitting)) <= sequences <= max(1, fitting)
    read = plan.horizon.num_iterations * total / data_tokens
    assert read == pytest.approx(1, rel=0.01) if fitting >= 1 else read > 1
    data, batch, horizon = plan.describe(T, ranks)
    assert f"{data_tokens / 1e6:,.1f} M tokens" in data
    assert f"{total:,} tokens a step = {micro} sequences x 2048 tokens x {ranks} ranks" in batch
    assert ("fewer than 500" in batch) is (data_tokens / total < 500)
    assert f"{plan.horizon.num_iterations:,} steps, which read the conversations" in horizon


def test_the_chat_stages_of_eight_gpus_are_those_that_the_page_shows():
    meta = {"total_batch_size": 524_288}
    plans = [
        make_chat_plan(chat_settings(), "cuda", 2048, 8, meta, lambda: tokens)
        for tokens in (330_000_000, 8_000_000, 4_000_000)
    ]
    assert [plan.batch for plan in plans] == [
        Batch(524_288, 16, 2), Batch(16_384, 1, 1), Batch(16_384, 1, 1)]
    assert [plan.horizon.num_iterations for plan in plans] == [629, 500, 500]


def test_settings_of_a_chat_stage_on_gpus_are_kept_or_refused():
    def plan(**given):
        meta = {"total_batch_size": 524_288}
        return make_chat_plan(chat_settings(**given), "cuda", 2048, 8, meta, lambda: 40_000_000)

    assert plan() == (Batch(65_536, 4, 1), Horizon(610, None), 40_000_000)
    assert plan(device_batch_size=3).batch == Batch(49_152, 3, 1)
    assert plan(device_batch_size=16).batch == Batch(65_536, 4, 1)
    assert plan(total_batch_size=524_288).batch == Batch(524_288, 16, 2)
    assert plan(total_batch_size=524_288).horizon == Horizon(500, None), "several passes"
    assert plan(num_iterations=7).horizon == Horizon(7, None)
    timed = plan(minutes=30.0)
    assert timed.horizon == Horizon(None, 30.0) and "30.0 minutes" in timed.describe(2048, 8)[-1]
    with pytest.raises(UserError, match="total_batch_size=100000 is not a multiple"):
        plan(total_batch_size=100_000)


def test_a_chat_stage_is_divided_as_pretraining_had_to_be():
    settings = {"parallel": "auto", "checkpoint_activations": None}
    sharded = {"parallel": "fsdp", "checkpoint_activations": True}
    assert chat_layout(settings, sharded, 2) == ("fsdp", True)
    assert chat_layout(settings, sharded, 1) == ("auto", True), "one rank has nothing to share"
    assert chat_layout(settings, {"parallel": "replicated"}, 2) == ("auto", False)
    assert chat_layout(settings, {}, 2) == ("auto", False), "of an earlier version"
    given = {"parallel": "zero2", "checkpoint_activations": False}
    assert chat_layout(given, sharded, 2) == ("zero2", False)


def test_on_a_cpu_the_conversations_decide_nothing():
    def count_tokens():
        raise AssertionError("nobody counts")
    meta = {"total_batch_size": 4096, "device_batch_size": 4}
    plan = make_chat_plan(chat_settings(), "cpu", 256, 1, meta, count_tokens)
    assert plan.batch == chat_batch(chat_settings(), 256, 1, 4096) == Batch(4096, 16, 1)
    assert plan.horizon == Horizon(None, CPU_MINUTES) and plan.describe(256, 1) == []


# -------------------------------------------------------------------------------- 6. the layout

def model_of(name, depth=2, max_seq_len=64, vocab_size=97):
    """A fresh model of a class, by its name in MODEL_CLASSES."""
    torch.manual_seed(0)
    model_class = MODEL_CLASSES[name]
    config = model_class.config_class.from_depth(depth, vocab_size, max_seq_len)
    if name == "lookup_ngrams":
        config.ngrams = 7
    model = model_class(config)
    model.init_weights()
    if name == "lookup_ngrams":
        model.ngrams.fill(torch.arange(7), torch.ones(7, dtype=torch.int32))
    return model


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_more_sequences_need_more_memory_and_more_memory_takes_more_sequences():
    model = build_on_meta(GPT, GPTConfig.from_depth(12, VOCAB_SIZE, 2048))
    totals = [memory(model, sequences, 2).total for sequences in range(1, 33)]
    assert totals == sorted(totals) and totals[0] < totals[-1]

    limits = [micro_batch_limit(model, gb * GB, 2, 1, "cuda") for gb in (1, 8, 16, 24, 48, 80, 192)]
    assert limits == sorted(limits)
    assert limits[0] == 0 and limits[-1] == MAX_MICRO_BATCH["cuda"] == 32
    for gb, limit in zip((16, 24, 48), limits[2:]):
        which = [fits(model, n, 2, 1, "cuda", gb * GB) for n in range(1, 33)]
        assert which == sorted(which, reverse=True) and sum(which) == limit


def test_a_deeper_model_takes_no_more_sequences_and_more_ranks_no_fewer():
    models = [
        build_on_meta(GPT, GPTConfig.from_depth(depth, VOCAB_SIZE, 2048))
        for depth in (4, 8, 12, 20)
    ]
    limits = [micro_batch_limit(model, 40 * GB, 2, 1, "cuda") for model in models]
    assert limits == sorted(limits, reverse=True) and limits[0] > limits[-1]
    limits = [micro_batch_limit(models[-1], 40 * GB, 2, ranks, "cuda") for ranks in (1, 2, 4, 8)]
    assert limits == sorted(limits)


@pytest.mark.parametrize("device_type", MAX_MICRO_BATCH)
def test_where_the_memory_is_not_known_the_usual_number_of_sequences_is_taken(device_type):
    model = model_of("gpt")
    assert micro_batch_limit(model, None, 4, 1, device_type) == MAX_MICRO_BATCH[device_type]


H100, RTX_4090, XTX = "h100", "rtx-4090", "7900-xtx"
RATIO = Budget("target_param_data_ratio", 20.0)


def network(depth, model_class=GPT, vocab_size=32768):
    return build_on_meta(
        model_class, model_class.config_class.from_depth(depth, vocab_size, 2048))


def test_zero2_is_taken_where_it_fits_and_fsdp_only_where_nothing_else_does():
    """fsdp moves the model in every micro-batch; recomputing comes before it."""
    def chosen(depth, kind, gpus, model_class=GPT):
        found = arrange(settings_with(), assumed_machine(kind, gpus), network(depth, model_class),
                        2**20)
        return found.parallel, found.checkpoint_activations

    assert chosen(20, H100, 8) == ("zero2", False)
    assert chosen(20, XTX, 6) == ("zero2", False)
    assert chosen(32, XTX, 6) == ("zero2", True)
    assert chosen(32, XTX, 6, LookupGPT) == ("fsdp", True)
    assert chosen(20, RTX_4090, 1) == ("replicated", False)


def test_recomputing_is_taken_where_it_is_faster_than_passes_of_few_tokens():
    ways = arrangements(settings_with(), assumed_machine(RTX_4090, 1), network(20), 2**19)
    assert [way.checkpoint_activations for way in ways] == [False, True]
    assert ways[0].tokens_per_second > ways[1].tokens_per_second
    assert ways[0].limit < ways[1].limit
    for way in ways:
        assert way.memory.total <= 0.85 * 24 * GB


def test_given_layouts_are_kept_and_what_cannot_fit_is_refused_with_what_would():
    machine = assumed_machine(XTX, 6)
    kept = arrange(
        settings_with(parallel="fsdp", checkpoint_activations=True), machine, network(12), 2**18)
    assert kept.parallel == "fsdp" and kept.checkpoint_activations
    for given, words in (
        ({"parallel": "replicated"}, "--parallel=zero2 --checkpoint_activations"),
        ({"checkpoint_activations": False, "parallel": "zero2"}, "--checkpoint_activations"),
    ):
        with pytest.raises(UserError) as refused:
            arrange(settings_with(**given), machine, network(32), 2**20)
        assert "and there are 24.0 GB: " in str(refused.value) and words in str(refused.value)
    with pytest.raises(UserError) as refused:
        arrange(settings_with(checkpoint_activations=False), assumed_machine(RTX_4090, 1),
                network(20), 2**19, None, 32)
    words = str(refused.value)
    assert "depth 20 takes " in words and "32 sequences at a time" in words
    assert "--device_batch_size=" in words
    with pytest.raises(UserError, match="--depth=28 would fit, or more GPUs"):
        arrange(settings_with(), assumed_machine(RTX_4090, 1), network(32), 2**20)
    with pytest.raises(UserError, match="parallel=zero3 is unknown: choose from auto, replicated"):
        arrange(settings_with(parallel="zero3"), machine, network(12), 2**18)


def test_a_cpu_refuses_what_its_memory_cannot_hold():
    machine = Machine("cpu", 1, 4 * GB, 4, 5e10)
    given = settings_with(depth=20, max_seq_len=2048, total_batch_size=4096)
    with pytest.raises(UserError, match="depth 20 takes .* are 4.0 GB: --depth=12 would fit$"):
        make_plan(given, Budget("minutes", 5.0), machine, GPT, 65536, None)


def test_a_resumed_run_is_not_refused_by_an_estimate():
    meta = resumed_meta("gpt", 1)
    machine = Machine("cuda", 1, 10**6, 2, 1e12)
    plan = make_plan(
        settings_with(), Budget("minutes", 4.0), machine, GPT, 280, None,
        {**meta, "device_batch_size": 43})
    assert plan.batch.micro_batch_size == 43


def test_an_estimate_decides_where_a_run_is_resumed_on_other_ranks():
    """base_train then leaves out how many sequences a rank had: they need not fit."""
    meta = {**resumed_meta("gpt", 1), "device_batch_size": None}
    machine = Machine("cuda", 1, 10**6, 2, 1e12)
    with pytest.raises(UserError, match="and there are 0.0 GB: "):
        make_plan(settings_with(), Budget("minutes", 4.0), machine, GPT, 280, None, meta)


@pytest.mark.parametrize("sequences, ranks, nearest", [
    (256, 6, 258), (252, 8, 256), (252, 5, 250), (256, 2, 256), (16, 3, 15), (2, 3, 3), (1, 6, 6)])
def test_a_run_is_resumed_on_any_number_of_ranks(sequences, ranks, nearest):
    """A GPU that has failed must not end a run whose batch the others cannot share."""
    meta = resumed_meta("gpt", 1)
    T = meta["config"]["max_seq_len"]
    meta = {**meta, "total_batch_size": sequences * T, "device_batch_size": None}
    machine = Machine("cuda", ranks, 24 * GB, 2, 1e12)
    plan = make_plan(settings_with(), Budget("minutes", 4.0), machine, GPT, 280, None, meta)
    assert plan.batch.total_batch_size == nearest * T
    said = f"but for its {sequences * T:,} tokens a step, which {ranks} ranks cannot share"
    assert (said in plan.shape.reason) == (nearest != sequences)


def test_what_fits_only_without_a_margin_is_refused_with_the_margin():
    """The last number is above the first, so that the line must say why."""
    config = GPTConfig.from_depth(12, 65536, 1_000_000)
    with pytest.raises(UserError, match=r"takes 73.3 GB .* 80.0 GB, of which 85 % are planned: "):
        arrange(settings_with(), assumed_machine(H100, 1), build_on_meta(GPT, config), 2**18)


def depth_of(kind, gpus, budget=RATIO, vocab_size=32768, **given):
    machine = assumed_machine(kind, gpus)
    return gpu_depth(settings_with(**given), budget, machine, GPT, vocab_size)


def test_a_gpu_run_without_a_depth_fits_its_memory_and_a_night():
    assert depth_of(H100, 8)[0] == depth_of(H100, 8, vocab_size=VOCAB_SIZE)[0] == 20
    for kind, gpus in ((RTX_4090, 1), (XTX, 1), (XTX, 6), (H100, 1)):
        depth, reason = depth_of(kind, gpus)
        assert 4 < depth < 20 and f"depth {depth + 2} would take " in reason
        settings = settings_with()
        plan = make_plan(settings, RATIO, assumed_machine(kind, gpus), GPT, 32768, None)
        assert plan.shape.depth == depth and plan.hours <= 1.05 * GPU_HOURS
        assert reason in plan.shape.reason
    assert depth_of(XTX, 1)[0] < depth_of(XTX, 6)[0]


def test_minutes_pay_for_a_depth():
    depths = [depth_of(H100, 8, Budget("minutes", minutes))[0] for minutes in (5, 60, 140, 6000)]
    assert depths == sorted(depths) and len(set(depths)) == 4
    assert depths[-1] == GPU_DEPTHS[-1]
    # with text for no more than that
    short = gpu_depth(
        settings_with(), Budget("minutes", 6000), assumed_machine(H100, 8), GPT, 32768, 10**9)
    assert short[0] < depths[-1]


def test_a_small_card_takes_a_smaller_model_for_want_of_memory():
    machine = assumed_machine(H100, 1, 8 * GB)
    depth, reason = gpu_depth(settings_with(), Budget("num_iterations", 10), machine, GPT, 32768)
    assert depth < 20 and f"depth {depth + 2} does not fit the memory" in reason


def test_the_anchors_of_the_assumed_rates():
    """Tokens/s of a GPU at depth 20 and a vocabulary of 32,768, as forecast.RATES says."""
    for kind, expected in ((H100, 148e3), (RTX_4090, 34.5e3), (XTX, 15e3)):
        machine = assumed_machine(kind, 1)
        step = expected_step(machine, network(20), Batch(2**19, 16, 16))
        assert step.tokens_per_second == pytest.approx(expected, rel=0.03)


def test_recomputing_and_slow_links_cost_time():
    machine = assumed_machine(XTX, 6)
    batch = Batch(6 * 2048 * 42, 7, 6)
    plain = expected_step(machine, network(20), batch, "zero2")
    again = expected_step(machine, network(20), batch, "zero2", True)
    assert again.computing == pytest.approx(4 / 3 * plain.computing)
    faster = expected_step(machine._replace(link=48e9), network(20), batch, "zero2")
    assert plain.communicating == pytest.approx(4 * faster.communicating)
    every_pass = expected_step(machine, network(20), batch, "fsdp")
    assert every_pass.communicating > 3 * plain.communicating


def test_too_little_disk_is_warned_of_or_refused():
    plan = make_plan(
        settings_with(depth=4), Budget("num_iterations", 10), MACHINES["cuda"], GPT, 4096, None)
    one = plan.disk / 5
    assert check_disk(plan, 3, 6 * one, "/x") is None
    assert "warning: /x has " in check_disk(plan, 3, 4 * one, "/x")
    with pytest.raises(UserError, match="set NANOCHAT_BASE_DIR to a folder on a larger disk"):
        check_disk(plan, 3, 0.9 * one, "/x")


# -------------------------------------------------------------------------------- 7. time and disk

@pytest.mark.parametrize("name", ["gpt", "lookup", "portable"])
def test_a_checkpoint_takes_the_model_and_its_optimizer_state(name):
    model = model_of(name)
    tokens = torch.randint(97, (2, 64))
    model(tokens, tokens).backward()
    optimizers = model.setup_optimizers()
    for optimizer in optimizers:
        optimizer.step()
    states = [values for optimizer in optimizers for values in optimizer.state.values()]
    state = nbytes(tensor for values in states for tensor in values.values())
    found = nbytes(model.state_dict().values()) + state
    assert checkpoint_bytes(model) == pytest.approx(found, rel=1e-3)  # but for counts of steps


@pytest.mark.parametrize("model_class", [GPT, LookupGPT, PortableGPT])
def test_measuring_a_step_leaves_the_random_numbers_alone(model_class):
    config = model_class.config_class.from_depth(1, 97, 32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    speed = measure_step(model_class, config, "cpu", torch.float32, tokens=64, repeats=1)
    assert speed > 0 and torch.equal(torch.get_rng_state(), before)


def test_tokens_within_a_budget_follow_from_its_time_or_its_flops():
    def tokens(kind, amount, speed=None):
        return tokens_within(Budget(kind, amount), 50, speed)

    assert tokens("target_flops", 1e6) == 20_000
    assert tokens("minutes", 2, lambda: 100) == 12_000
    for kind in ("num_iterations", "target_param_data_ratio"):
        # neither says how long: the ratio's tokens grow with the depth that is to be chosen
        assert tokens(kind, 7, lambda: 100) == 60 * CPU_MINUTES * 100


# -------------------------------------------------------------------------------- the whole plan

MACHINES = {
    "cpu": Machine("cpu", 1, None, 4, 5e10),
    "two ranks of a cpu": Machine("cpu", 2, None, 4, 5e10),
    "mps": Machine("mps", 1, None, 4, 5e12),
    "cuda": Machine("cuda", 1, 80 * GB, 2, 4e14),
    "six small gpus": Machine("cuda", 6, 24 * GB, 2, 5e13),
    "eight gpus": Machine("cuda", 8, 80 * GB, 2, 4e14),
}
AMOUNTS = {
    None: None,
    "minutes": 3.0,
    "num_iterations": 50,
    "target_flops": 1e15,
    "target_param_data_ratio": 10.0,
}


def slow_machine(depth, max_seq_len):
    """Training tokens per second of a small CPU: 2 minutes pay for depth 2."""
    return 40_000 / depth**2


def resumed_meta(name, ranks):
    """The meta of a run of depth 3 with one key/value head, whose ranks have 43 sequences each."""
    model_class = MODEL_CLASSES[name]
    config = model_class.config_class.from_depth(3, 280, 256)
    config.kv_heads = 1
    return {"config": vars(config), "total_batch_size": 256 * 43 * ranks, "budgets": {"minutes": 4}}


def check_plan(plan, machine):
    """What holds for every plan."""
    batch, shape = plan.batch, plan.shape
    assert tokens_of(batch, shape.max_seq_len, machine.ranks) == batch.total_batch_size
    assert batch.micro_batch_size <= MAX_MICRO_BATCH[machine.device_type]
    assert (plan.horizon.num_iterations is None) != (plan.horizon.minutes is None)
    assert plan.hours > 0 and plan.disk > 0
    assert not machine.memory or plan.memory.total <= machine.memory
    assert plan.parallel == ("zero2" if machine.ranks > 1 else "replicated")
    lines = plan.describe("gpt", machine.ranks)
    count = 8 if plan.reading else 7
    assert [line[:3] for line in lines] == [f"{n}) " for n in range(1, count + 1)]
    assert f"{batch.micro_batch_size} sequences" in lines[2] and shape.reason in lines[1]


@pytest.mark.parametrize("kind", AMOUNTS)
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
def test_a_fresh_run_has_a_plan_for_every_budget_and_machine(machine, kind):
    given = settings_with(**({kind: AMOUNTS[kind]} if kind else {}))
    budget = choose_budget(given, machine.device_type)
    on_gpu = machine.device_type == "cuda"
    name = "gpt" if on_gpu else "lookup"
    plan = make_plan(given, budget, machine, MODEL_CLASSES[name], 4096, slow_machine)
    check_plan(plan, machine)
    assert plan.budget == budget
    if on_gpu:
        assert plan.shape.depth in GPU_DEPTHS and plan.shape.max_seq_len == 2048
        assert plan.weight_decay == gpu_weight_decay(plan.shape.depth)
        assert plan.hours < 1.05 * GPU_HOURS
    else:
        assert plan.shape[:3] in [row[1:] for row in CPU_SHAPES] and plan.weight_decay == 0
    if kind == "minutes":
        assert plan.horizon == Horizon(None, 3.0) and plan.hours == 0.05
    if kind == "num_iterations":
        assert plan.horizon == Horizon(50, None)


@pytest.mark.parametrize("name", MODEL_CLASSES)
@pytest.mark.parametrize("kind, factor", [*((kind, None) for kind in AMOUNTS), (None, 2.0)])
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
def test_a_resumed_run_keeps_its_shape_and_its_batch(machine, kind, factor, name):
    """Resumed with its own budget or another one, or extended; whatever shape the settings say."""
    shape = {"depth": 7, "max_seq_len": 128, "total_batch_size": 128 * machine.ranks}
    budgets = {kind: AMOUNTS[kind]} if kind else {}
    given = settings_with(extend=factor, **shape, **budgets)
    meta = resumed_meta(name, machine.ranks)
    budget = choose_budget(given, machine.device_type, meta["budgets"], factor)

    def no_speed(depth, max_seq_len):
        pytest.fail("a resumed run has its shape already")

    model_class = MODEL_CLASSES[name]
    plan = make_plan(given, budget, machine, model_class, 280, no_speed, meta)
    check_plan(plan, machine)
    assert plan.shape[:2] == (3, 256)
    assert plan.batch.total_batch_size == meta["total_batch_size"]
    model = build_on_meta(model_class, model_class.config_class(**meta["config"]))
    size = machine.dtype_bytes, machine.ranks, machine.device_type
    assert plan.memory == memory(
        model, plan.batch.micro_batch_size, *size,
        parallel=plan.parallel, grad_accum_steps=plan.batch.grad_accum_steps)
    if kind is None:
        assert plan.horizon == Horizon(None, 4 * (factor or 1))
    else:
        assert plan.budget == Budget(kind, AMOUNTS[kind])


@pytest.mark.parametrize("size", SIZES)
def test_a_documented_size_is_a_depth_and_its_shape(size):
    depth = depth_of_size(size)
    config = GPTConfig.from_depth(depth, 65536, 2048)
    assert SIZES[size] == (config.depth, config.width, config.heads)
    assert depth_of_size(size, depth) == depth, "as a run that is started again gives both"
    with pytest.raises(UserError, match=f"size={size} is a depth of {depth}, not depth=4"):
        depth_of_size(size, 4)
    with pytest.raises(UserError, match="size=huge does not exist: choose from small, medium"):
        depth_of_size("huge")


def test_given_settings_decide_the_shape():
    given = settings_with(depth=5, max_seq_len=128, total_batch_size=1024, weight_decay=0.1)
    budget = Budget("minutes", 1.0)

    def no_speed(depth, max_seq_len):
        pytest.fail("all is given")

    for machine in (MACHINES["cpu"], MACHINES["cuda"]):
        plan = make_plan(given, budget, machine, GPT, 280, no_speed)
        assert (plan.shape.depth, plan.shape.max_seq_len) == (5, 128)
        assert plan.batch.total_batch_size == 1024 and plan.weight_decay == 0.1

    only_context = settings_with(max_seq_len=64)
    plan = make_plan(only_context, budget, MACHINES["cpu"], GPT, 280, slow_machine)
    assert plan.shape.max_seq_len == 64
    check_plan(plan, MACHINES["cpu"])


def test_grouped_queries_are_planned_and_refused_before_the_run():
    budget = Budget("num_iterations", 10)
    machine = MACHINES["cuda"]
    plans = [
        make_plan(settings_with(depth=8, kv_heads=heads), budget, machine, GPT, 280, None)
        for heads in (8, 2)
    ]
    assert plans[1].memory.parameters < plans[0].memory.parameters
    with pytest.raises(UserError, match="kv_heads=3 must divide the 8 query heads of depth 8"):
        make_plan(settings_with(depth=8, kv_heads=3), budget, machine, GPT, 280, None)


GIVEN_SHAPE = {
    "depth": 3, "width": 160, "heads": 5, "mlp_width": 320, "tied": True, "rotary_base": 5000.0}


def test_a_shape_that_the_settings_give_is_planned_and_measured():
    given = settings_with(**GIVEN_SHAPE)
    fields = given_fields(given, PortableGPT)
    config = config_for(PortableGPT, Shape(3, 64, 64, ""), 280, fields)
    assert (config.width, config.heads, config.kv_heads, config.head_dim) == (160, 5, 5, 32)
    assert (config.mlp_width, config.tied, config.rotary_base) == (320, True, 5000.0)

    plan = make_plan(given, Budget("num_iterations", 10), MACHINES["cuda"], PortableGPT, 280, None)
    parameters = sum(p.numel() for p in build_on_meta(PortableGPT, config).parameters())
    assert plan.memory.parameters + plan.memory.tables == 4 * parameters

    # the speed is measured at this shape, too
    class Measured(PortableGPT):
        configs = []

        def __init__(self, config):
            super().__init__(config)
            self.configs.append(config)

    speed_of(Measured, 280, compute_init("cpu", "float32", 1), fields)(3, 64)
    assert Measured.configs == [config]


@pytest.mark.parametrize("given, model_class, words", [
    ({"depth": 2, "mlp_width": 64}, GPT, "mlp_width=64 is not part of GPT: leave it out, or take"),
    ({"depth": 2, "tied": False}, GPT, "tied=False is not part of GPT"),
    ({"width": 64}, GPT, "width=64 needs --depth"),
    ({"depth": 2, "width": 100, "heads": 3}, GPT, "heads=3 must divide width=100"),
    ({"depth": 2, "width": 66, "heads": 2}, GPT, "heads=2 must divide width=66 into an even"),
    ({"depth": 2, "heads": 4, "kv_heads": 3}, GPT, "kv_heads=3 must divide the 4 query heads"),
])
def test_a_shape_that_cannot_be_is_refused_before_the_run(given, model_class, words):
    budget = Budget("num_iterations", 10)
    with pytest.raises(UserError, match=words):
        make_plan(settings_with(**given), budget, MACHINES["cuda"], model_class, 280, None)


def test_the_hours_of_a_number_of_steps_follow_from_the_matmul_rate():
    machine = MACHINES["cuda"]
    plan = make_plan(settings_with(depth=4), Budget("num_iterations", 100), machine, GPT, 280, None)
    model = build_on_meta(GPT, GPTConfig.from_depth(4, 280, 2048))
    flops = 100 * plan.batch.total_batch_size * model.flops_per_token(2048)
    passes = 1 + PASS_TOKENS / (plan.batch.micro_batch_size * 2048)
    assert plan.hours == pytest.approx(passes * flops / (0.5 * 4e14) / 3600)
    assert plan.disk == 5 * checkpoint_bytes(model)  # keep 3, the best and that before the decay


def test_a_plan_says_its_decisions_in_numbered_lines():
    plan = make_plan(
        settings_with(), Budget("target_param_data_ratio", 20.0), MACHINES["eight gpus"], GPT,
        VOCAB_SIZE, None)
    lines = plan.describe("gpt", 8)
    assert lines[0] == "1) budget: target_param_data_ratio=20"
    assert lines[1].startswith("2) shape: model gpt, depth 20, context 2048 (about 7.1 h by ")
    assert lines[2] == (
        "3) batch: 524,288 tokens a step = 16 sequences x 2048 tokens x 8 ranks x 2 passes")
    assert lines[3] == "4) layout: zero2 on 8 ranks"
    assert lines[4].startswith("5) memory of a device: about ")
    assert "activations" in lines[4] and "update" not in lines[4]
    assert lines[5].startswith("6) horizon: 18,200 steps, about ")
    assert lines[5].endswith("tokens/s (estimate, never measured by us); weight decay 0.072")
    assert lines[6].startswith("7) disk: about ")
