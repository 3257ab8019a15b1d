import pytest
import torch
import torch.nn.functional as F

from nanochat.fast_linear import (
    FastLinear,
    can_multiply_fast,
    int8_tiles_of,
    multiply_int8_tiles,
    multiply_tiles,
    quantize,
    tiles_of,
)

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not can_multiply_fast(CPU), reason="this torch has no oneDNN: the model multiplies as it is")
SHAPES = [(64, 16), (100, 24), (1, 8), (33, 1)]     # outputs that fill tiles, and that do not


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("N, K", SHAPES)
def test_sums_over_tiles_are_the_product(N, K):
    weight, x = torch.randn(N, K), torch.randn(K)
    found = multiply_tiles(x, tiles_of(weight))
    torch.testing.assert_close(found[:N], weight @ x, atol=1e-5, rtol=1e-5)
    assert not found[N:].any()


@pytest.mark.parametrize("N, K", SHAPES)
def test_sums_over_masked_bytes_are_the_product_of_the_int8_weights(N, K):
    quantized, x = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.randn(K)
    found = multiply_int8_tiles(x, int8_tiles_of(quantized))
    wanted = quantized.double() @ x.double()
    torch.testing.assert_close(found[:N].double(), wanted, atol=1e-2, rtol=1e-5)


def test_rounding_to_int8_errs_by_half_a_step_at_most_and_keeps_zeros():
    weight = torch.randn(50, 30) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0
    quantized, scale = quantize(weight)
    error = (quantized * scale[:, None] - weight).abs()
    assert (error <= 0.501 * scale[:, None]).all()
    assert quantized.abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(50)]
    assert not (quantized * scale[:, None])[7].any()


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24)])
def test_a_fast_linear_multiplies_like_the_plain_one(dtype, int8, shape):
    weight, x = torch.randn(100, 24), torch.randn(shape)
    fast = FastLinear(weight, dtype, int8)
    if int8:
        quantized, scale = quantize(weight)
        weight = quantized * scale[:, None]
    wanted = F.linear(x, weight)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    found = fast(x.to(dtype))
    assert found.dtype == dtype and found.shape == wanted.shape
    torch.testing.assert_close(found.float(), wanted, atol=tolerance, rtol=tolerance)
    one = fast.multiply_one(x.view(-1, 24)[0])
    torch.testing.assert_close(one, wanted.view(-1, 100)[0], atol=tolerance, rtol=tolerance)
