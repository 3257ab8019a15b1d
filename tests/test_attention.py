"""Which attention kernel runs: the order for each GPU, the probe, and what stays on a CPU."""
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from models import make_model, noise
from nanochat import attention
from nanochat.attention import (
    KERNELS,
    Choice,
    Gpu,
    attend,
    causal_attention,
    choose_kernel,
    difference,
    first_that_works,
    fused_name,
    kernel_order,
    kernel_problem,
    reason_not_to_run,
    running_kernel,
    small_case,
    use_kernels,
    use_torchs_own,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_torch_has_it():
    yield
    use_torchs_own()


# -------------------------------------------------------------------------------- the order

def cuda(major, minor, cudnn=92600, has_fa3=False):
    return Gpu(False, (major, minor), cudnn, has_fa3)


@pytest.mark.parametrize("gpu, best", [
    (cuda(9, 0), "cudnn"),                   # H100
    (cuda(9, 0, cudnn=91500), "flash"),      # with an older cuDNN
    (cuda(9, 0, cudnn=0), "flash"),
    (cuda(9, 0, has_fa3=True), "fa3"),
    (cuda(10, 0), "cudnn"),                  # B200
    (cuda(10, 0, has_fa3=True), "cudnn"),    # FlashAttention-3 is for Hopper alone
    (cuda(8, 0), "flash"),                   # A100, where cuDNN is slower
    (cuda(8, 9), "flash"),                   # RTX 4090
    (cuda(8, 0, has_fa3=True), "flash"),
    (cuda(12, 0), "flash"),                  # RTX 5090
])
def test_each_nvidia_gpu_has_its_best_kernel(gpu, best):
    order = kernel_order(gpu)
    assert order[0] == best and order[-1] == "math"
    assert set(KERNELS) - {"fa3"} <= set(order)


def test_float32_and_old_gpus_have_the_memory_efficient_kernel():
    wanted = ["efficient", "math"]
    for gpu in (cuda(9, 0, has_fa3=True), cuda(8, 0), Gpu(True, (11, 0), 0, False)):
        assert kernel_order(gpu, torch.float32) == wanted
    assert kernel_order(cuda(7, 5)) == kernel_order(cuda(7, 0), torch.float16) == wanted


@pytest.mark.parametrize("capability", [(9, 0), (9, 4), (9, 5), (10, 0), (11, 0)])
def test_an_amd_gpu_is_never_taken_for_a_hopper(capability):
    """docs/traps.md: hip-capability"""
    assert kernel_order(Gpu(True, capability, 92600, True)) == ["flash", "efficient", "math"]


def test_an_order_names_each_kernel_once():
    for gpu in (cuda(9, 0, has_fa3=True), cuda(8, 0), Gpu(True, (11, 0), 0, False)):
        order = kernel_order(gpu)
        assert len(set(order)) == len(order)
        assert set(order) <= set(KERNELS)


# -------------------------------------------------------------------------------- the choice

def test_a_kernel_that_fails_or_errs_is_dropped_for_the_next_one():
    """docs/traps.md: slow-attention-kernel"""
    problems = {"cudnn": "no engine", "flash": "y is off by nan", "efficient": ""}
    choice = first_that_works(["cudnn", "flash", "efficient", "math"], problems.get)
    assert choice == Choice("efficient", {"cudnn": "no engine", "flash": "y is off by nan"})
    assert choice.describe() == "efficient; not cudnn: no engine; not flash: y is off by nan"


def test_the_maths_kernel_is_the_last_resort_and_is_called_slow():
    """docs/traps.md: slow-attention-kernel"""
    choice = first_that_works(["flash", "efficient", "math"], lambda name: f"{name} is broken")
    assert choice.name == "math" and set(choice.dropped) == {"flash", "efficient"}
    assert "many times slower" in choice.describe() and "flash is broken" in choice.describe()
    assert "\n" not in choice.describe()


def test_a_good_kernel_is_named_without_further_words():
    assert first_that_works(["cudnn", "flash", "math"], lambda name: "").describe() == "cudnn"


def test_on_a_gpu_the_first_right_kernel_is_set_for_good(monkeypatch):
    probed = []

    def problem(device, dtype, name, grouped=False):
        probed.append((name, grouped))
        return "broken" if name == "flash" or grouped else ""

    monkeypatch.setattr(attention, "this_gpu", lambda device: Gpu(True, (11, 0), 0, False))
    monkeypatch.setattr(attention, "kernel_problem", problem)
    choice = choose_kernel(torch.device("cuda"), torch.bfloat16)
    assert choice == Choice("efficient", {"flash": "broken"})
    assert probed == [("flash", False), ("efficient", False), ("efficient", True)]
    assert not attention.IN_USE.grouped
    enabled = torch.nn.attention._cur_sdpa_kernel_backends()
    assert set(enabled) == {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}


def test_an_order_replaces_the_one_before_and_can_be_undone():
    before = torch._C._get_sdp_priority_order()
    use_kernels(["math"])
    assert running_kernel(CPU, torch.float32) == "math"
    use_kernels(["cudnn", "efficient", "flash", "math"], grouped=True)
    order = [int(KERNELS[name].backend) for name in ("cudnn", "efficient", "flash", "math")]
    assert torch._C._get_sdp_priority_order()[:4] == order
    assert attention.IN_USE.grouped
    use_torchs_own()
    assert torch._C._get_sdp_priority_order() == before
    assert running_kernel(CPU, torch.float32) != "math"
    assert not attention.IN_USE.grouped


# -------------------------------------------------------------------------------- the probe

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_of_a_cpu_passes_the_probe(dtype):
    assert kernel_problem(CPU, dtype, "flash") == ""
    assert kernel_problem(CPU, dtype, "math", grouped=True) == ""


def test_a_kernel_that_is_not_there_has_a_reason():
    assert kernel_problem(CPU, torch.float32, "cudnn").startswith("No viable backend")


@pytest.mark.parametrize("error", [
    OSError("libtorch.so: undefined symbol"),     # built for another torch
    ImportError("flash_attn_3._C"),
    AttributeError("no attribute bwd"),
    TypeError("fwd() takes 30 arguments"),
])
def test_a_flash_attention_3_that_does_not_fit_torch_is_dropped(monkeypatch, error):
    """docs/traps.md: slow-attention-kernel"""
    def activate(implementation):
        if implementation:
            raise error

    monkeypatch.setattr(attention, "activate", activate)
    reason = kernel_problem(CPU, torch.float32, "fa3")
    assert reason == str(error)
    order = ["fa3", "flash", "math"]
    choice = first_that_works(order, lambda name: kernel_problem(CPU, torch.float32, name))
    assert choice == Choice("flash", {"fa3": reason})


@pytest.mark.parametrize("known, wanted", [(["FA3", "FA4"], True), (["FA4"], False)])
def test_flash_attention_3_is_in_the_order_only_if_torch_knows_it(monkeypatch, known, wanted):
    torch_attention = attention.torch_attention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "is_installed", lambda module: True)
    monkeypatch.setattr(
        torch_attention, "list_flash_attention_impls", lambda: known, raising=False)
    assert attention.this_gpu(torch.device("cuda")).has_fa3 == wanted
    monkeypatch.delattr(torch_attention, "list_flash_attention_impls")
    assert not attention.this_gpu(torch.device("cuda")).has_fa3


def test_the_reason_is_the_one_that_torch_warns_of():
    said = [
        "Memory efficient kernel not used because: (Triggered internally at a.cpp:1.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at a.cpp:2.)",
        "Flash attention kernel not used because: (Triggered internally at a.cpp:3.)",
        "Flash attention was not compiled for gfx1100. (Triggered internally at a.cpp:4.)",
    ]
    assert reason_not_to_run("No available kernel.", said) == (
        "Flash attention was not compiled for gfx1100.")
    assert reason_not_to_run("No available kernel.\nAborting", said[:3]) == (
        "No available kernel. Aborting")
    assert reason_not_to_run("", []) == "no reason given"
    assert len(reason_not_to_run("x" * 999, [])) == 120


@pytest.mark.parametrize("wrong", [
    lambda y: y + 0.05 * torch.randn_like(y),   # too much rounding
    lambda y: y * float("nan"),
    lambda y: y.flip(1),                        # of other tokens
    lambda y: y + (y.mean() - y.detach().mean()) * 1e4,  # the gradient alone
])
def test_a_wrong_kernel_fails_the_probe(monkeypatch, wrong):
    right = attention.attend
    calls = []

    def first_call_wrong(*inputs):
        calls.append(inputs)
        y = right(*inputs)
        return wrong(y) if len(calls) == 1 else y

    monkeypatch.setattr(attention, "attend", first_call_wrong)
    assert "is off by" in kernel_problem(CPU, torch.bfloat16, "flash")
    assert len(calls) == 2


def test_the_tolerance_is_of_the_norm():
    ones = [torch.ones(4)] * 4
    assert difference(ones, ones, 1e-3) == ""
    assert difference([torch.ones(4) * 1.0005] * 4, ones, 1e-3) == ""
    worse = [*ones[:2], torch.ones(4) * 1.5, ones[0]]
    assert difference(worse, ones, 1e-3) == "dk is off by 0.5 of its norm, at most 0.001"


def test_the_kernel_is_known_by_its_node():
    names = {
        "ScaledDotProductCudnnAttentionBackward0": "cudnn",
        "ScaledDotProductFlashAttentionBackward0": "flash",
        "ScaledDotProductEfficientAttentionBackward0": "efficient",
        "ScaledDotProductFlashAttentionForCpuBackward0": "FlashAttentionForCpu",
    }
    assert {node: fused_name(node) for node in names} == names


# -------------------------------------------------------------------------------- what it computes

def test_cached_attention_on_a_gpu_leaves_cudnn_out_and_restores_it():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    assert enabled()
    with attention.without_cudnn(torch.device("cuda")):
        assert not enabled()
    assert enabled()
    with pytest.raises(RuntimeError), attention.without_cudnn(torch.device("cuda")):
        raise RuntimeError
    assert enabled()
    with attention.without_cudnn(CPU):
        assert enabled()
    use_kernels(["flash", "math"])
    with attention.without_cudnn(torch.device("cuda")):
        assert not enabled()
    assert not enabled(), "what was off stays off"


def test_grouped_heads_give_the_same_whether_torch_or_we_repeat_them():
    case = small_case(CPU, torch.float32)
    torch.testing.assert_close(attend(*case[:3], True), attend(*case[:3], False))


def test_on_a_cpu_no_bit_changes_by_choosing():
    model = make_model(kv_heads=2)
    idx, targets = noise(2, 32), noise(2, 32)
    with torch.no_grad():
        before = model(idx, targets)
    choice = choose_kernel(CPU, torch.float32)
    assert choice == Choice("FlashAttentionForCpu", {})
    with torch.no_grad():
        assert torch.equal(model(idx, targets), before)
    q, k, v, _ = small_case(CPU, torch.float32, kv_heads=4)
    plain = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    assert torch.equal(causal_attention(q, k, v), plain.transpose(1, 2))


def operations(function, *inputs):
    """The names of the operations that a function runs."""
    with torch.autograd.profiler.profile() as profile:
        function(*inputs)
    return {event.name for event in profile.function_events}


def test_a_compiled_function_takes_the_chosen_kernel_without_a_break_in_its_graph():
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    inputs = [x.requires_grad_() for x in small_case(CPU, torch.float32)[:3]]
    for names, is_fused in ((["flash", "math"], True), (["math"], False)):
        torch.compiler.reset()
        use_kernels(names)
        compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), causal_attention(*inputs))
        assert (fused in operations(compiled, *inputs)) == is_fused
    torch.compiler.reset()


def test_compiled_code_on_disk_does_not_bring_back_another_kernel(tmp_path, monkeypatch):
    """docs/traps.md: slow-attention-kernel"""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    tag = attention.compiler_config.cache_key_tag
    inputs = small_case(CPU, torch.float32, kv_heads=4)[:3]
    for names, is_fused in ((["flash", "math"], True), (["math"], False)):
        torch.compiler.reset()  # as in the next process, which finds what is on disk
        use_kernels(names)
        compiled = torch.compile(causal_attention, fullgraph=True)
        compiled(*inputs)
        assert (fused in operations(compiled, *inputs)) == is_fused
    torch.compiler.reset()
    use_torchs_own()
    assert attention.compiler_config.cache_key_tag == tag


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_blocks_of_queries_equals_the_fused_kernel(T, kv_heads):
    """On a CPU in bfloat16, without a gradient; with one, the fused kernel runs."""
    torch.manual_seed(0)
    q = torch.randn(2, T, 4, 16)
    k, v = torch.randn(2, T, kv_heads, 16), torch.randn(2, T, kv_heads, 16)
    wanted = attention.causal_attention(q, k, v)
    halves = [x.bfloat16() for x in (q, k, v)]
    with torch.no_grad():
        found = attention.causal_attention(*halves)
    assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
    torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.03)
    fused = attention.attend(*halves, False)
    torch.testing.assert_close(found.float(), fused.float(), atol=0.03, rtol=0.03)
