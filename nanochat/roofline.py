"""
What a device can at best do with a language model: whether it fits, how much it can remember, and tokens a second.

A step of decoding reads every weight that it uses and the cache of every request once, and multiplies each weight with one
vector a request. So, for B requests that hold T tokens each,

    (1) bytes  = weights read + B * T * cache bytes a token
    (2) FLOPs  = 2 * active parameters * B
    (3) rate   = B / max(bytes / bandwidth, FLOPs / peak)      tokens a second, all requests together

bounds the rate from above: attention's own multiplications, launches, the traffic between devices and the prompts come
on top. (Speculation gets past it, since a step then yields more than one token.) Of R routed experts, each token's own
choice of k, a batch reads on average, if all are chosen equally often,

    (4) R * (1 - (1 - k / R) ** B)

and fewer where its tokens choose alike, so that there a real rate may lie above the bound.
"""
import math
from collections import namedtuple

from nanochat.common import UserError

# Bytes of a weight. Scales: none worth counting for fp8's blocks of 128 x 128; int4 (AWQ) has 16 + 4 bits for 128 weights.
WEIGHT_BYTES = {"bf16": 2, "fp8": 1, "int4": (4 + 20 / 128) / 8}
CACHE_BYTES = {"bf16": 2, "fp8": 1}

# layers; heads of the cache, and numbers that each keeps of a token and layer (keys and values; MLA: one latent for both);
# parameters that every token uses; parameters of the routed experts and the part of them that a token uses; parameters of
# the head, which stays in bf16, as does the input table of the same size; the published dtypes; the devices and the longest
# context of the deployment that this repository has. Norms are left out.
Model = namedtuple("Model", "title layers kv_heads kv_width dense routed chosen head dtypes devices max_model_len")
MODELS = {
    # config.json of Qwen/Qwen3-32B: 64 layers of width 5120, 64 heads of 128, 8 of them with keys and values, feed-forward
    # 25600, vocabulary 151936. Published in bf16, FP8 (-FP8) and INT4 (-AWQ).
    "qwen3-32b": Model(
        "Qwen3-32B", layers=64, kv_heads=8, kv_width=2 * 128,
        dense=64 * (2 * 5120 * 64 * 128 + 2 * 5120 * 8 * 128 + 3 * 5120 * 25600), routed=0, chosen=0,
        head=151936 * 5120, dtypes=("bf16", "fp8", "int4"), devices=1, max_model_len=32000),
    # config.json of deepseek-ai/DeepSeek-R1: 61 layers of width 7168, 128 heads; latents of 1536 (queries) and 512 (keys
    # and values), 128 + 64 numbers a query (the 64 with positions), 128 a value. Feed-forward 18432 in the first 3 layers, then
    # 1 shared and 256 routed experts of 2048, 8 chosen. Vocabulary 129280. Its layer for speculation (14 B more on disk) stays unused.
    "deepseek-r1": Model(
        "DeepSeek-R1", layers=61, kv_heads=1, kv_width=512 + 64,
        dense=61 * (7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168)
        + 3 * 3 * 7168 * 18432 + 58 * (3 * 7168 * 2048 + 256 * 7168),
        routed=58 * 256 * 3 * 7168 * 2048, chosen=8 / 256, head=129280 * 7168, dtypes=("fp8",), devices=8, max_model_len=32768),
}


def look_up(table, name, setting):
    """table[name]; UserError where it has no such row."""
    if name not in table:
        raise UserError(f"{setting}={name} is not in the table: choose from {', '.join(table)}")
    return table[name]


def numbers(text, setting):
    """[1, 8, 32] of "1,8,32", which a setting holds; UserError where these are not whole numbers from 1."""
    found = [int(word) for word in text.split(",") if word.strip().isdecimal()]
    if len(found) != text.count(",") + 1 or min(found) < 1:
        raise UserError(f"{setting}={text} must be whole numbers from 1 with commas between, such as 1,8,32")
    return found


def active_parameters(model):
    """Parameters that a token is multiplied with. (Its row of the input table is copied.)"""
    return model.dense + model.routed * model.chosen + model.head


def weight_bytes(model, dtype):
    """Bytes of the weights in memory, on all devices together."""
    return (model.dense + model.routed) * WEIGHT_BYTES[dtype] + 2 * model.head * 2


def read_bytes(model, dtype, requests):
    """Bytes of weights that one step for so many requests reads, on all devices together: formula (4), no input table."""
    routed = model.routed * (1 - (1 - model.chosen) ** requests)
    return (model.dense + routed) * WEIGHT_BYTES[dtype] + model.head * 2


def cache_bytes(model, dtype="bf16", devices=1):
    """Bytes that one token takes in the cache of each device. The devices share out the heads; a single one is on all of them."""
    return model.layers * math.ceil(model.kv_heads / devices) * model.kv_width * CACHE_BYTES[dtype]


def cache_room(model, device, dtype, devices, utilization):
    """Bytes left for the cache on each device when the weights are loaded; below zero where they do not fit."""
    return device.memory * utilization - weight_bytes(model, dtype) / devices


def decode_rate(model, device, dtype, requests, context, devices=1, kv_dtype="bf16"):
    """
    Formula (3): the most tokens a second, all requests together, each holding `context` tokens; and what bounds it,
    "memory" or "FLOP/s". Where the device's FLOP/s are not known, memory alone is asked.
    """
    moving = (read_bytes(model, dtype, requests) / devices + requests * context * cache_bytes(model, kv_dtype, devices)) / device.bandwidth
    peak = device.fp8 if dtype == "fp8" and device.fp8 else device.bf16  # other weights are widened to bf16 and multiplied so
    multiplying = 2 * active_parameters(model) * requests / (devices * peak) if peak else 0
    return requests / max(moving, multiplying), "memory" if moving >= multiplying else "FLOP/s"
