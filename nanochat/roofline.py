"""
What a device can at best do with a language model: whether it fits, how many tokens it can keep in
its cache, and how many tokens a second it decodes.

A decode step reads every weight that it uses and the kv_cache of every sequence, each one time, and
multiplies each weight with one vector per sequence. For B sequences of T tokens each, therefore,

    (1) bytes       = weights read + B * T * cache bytes per token
    (2) FLOPs       = 2 * active parameters * B
    (3) throughput  = B / max(bytes / bandwidth, FLOPs / peak)     tokens/s of all sequences

bounds the throughput from above: attention's own multiplications, kernel launches, traffic between
devices and prefill come on top. (Speculative decoding exceeds it, since one step then yields more
than one token.) In a mixture of experts each token chooses k of R routed experts. If all experts
are chosen equally often, a step for B sequences reads on average

    (4) R * (1 - (1 - k / R) ** B)

of them. It reads fewer where tokens choose alike, so that a real server may then exceed the bound.
"""
import math
from collections import namedtuple

from nanochat.common import UserError

# Bytes per weight. The scales of fp8, one for a block of 128 x 128 weights, are too few to count.
# int4 (AWQ) stores a scale of 16 bits and a zero point of 4 for every 128 weights.
WEIGHT_BYTES = {
    "bf16": 2,
    "fp8": 1,
    "int4": (4 + 20 / 128) / 8,
}
CACHE_BYTES = {"bf16": 2, "fp8": 1}

# title          the model's name
# layers         number of blocks
# kv_heads       heads of the cache
# kv_width       numbers that the cache holds per head, token and layer: a key and a value, or with
#                multi-head latent attention (MLA) one latent for both
# dense          parameters that every token uses
# routed         parameters of the routed experts
# chosen         fraction of the routed experts that a token uses
# head           parameters of the output head. It stays in bf16, and so does the input embedding,
#                which has the same size
# dtypes         the weight dtypes in which the model is published
# devices, max_model_len    of the deployment that this repository has
# Norms are too small to count.
Model = namedtuple(
    "Model",
    "title layers kv_heads kv_width dense routed chosen head dtypes devices max_model_len",
)


def _qwen3_32b():
    """config.json of Qwen/Qwen3-32B. Published in bf16, FP8 (-FP8) and INT4 (-AWQ)."""
    layers, width, vocab_size = 64, 5120, 151936
    heads, kv_heads, head_dim = 64, 8, 128
    feed_forward = 25600

    queries_and_output = 2 * width * heads * head_dim
    keys_and_values = 2 * width * kv_heads * head_dim
    mlp = 3 * width * feed_forward
    return Model(
        title="Qwen3-32B",
        layers=layers,
        kv_heads=kv_heads,
        kv_width=2 * head_dim,
        dense=layers * (queries_and_output + keys_and_values + mlp),
        routed=0,
        chosen=0,
        head=vocab_size * width,
        dtypes=("bf16", "fp8", "int4"),
        devices=1,
        max_model_len=32000,
    )


def _deepseek_r1():
    """config.json of deepseek-ai/DeepSeek-R1, published in FP8.

    The first 3 layers have a dense MLP, the other 58 have 1 shared and 256 routed experts. The
    layer for speculative decoding (14 B parameters more on disk) stays unused.
    """
    layers, width, vocab_size = 61, 7168, 129280
    heads = 128
    q_latent, kv_latent = 1536, 512     # low-rank projections of queries, and of keys and values
    plain, rotary, value = 128, 64, 128     # numbers per head; the rotary ones hold the position
    dense_layers, feed_forward = 3, 18432
    expert_layers, experts, chosen, expert_feed_forward = 58, 256, 8, 2048

    attention = (
        width * q_latent
        + q_latent * heads * (plain + rotary)
        + width * (kv_latent + rotary)
        + kv_latent * heads * (plain + value)
        + heads * value * width
    )
    dense_mlp = 3 * width * feed_forward
    expert = 3 * width * expert_feed_forward
    router = experts * width
    return Model(
        title="DeepSeek-R1",
        layers=layers,
        kv_heads=1,
        kv_width=kv_latent + rotary,
        dense=layers * attention + dense_layers * dense_mlp + expert_layers * (expert + router),
        routed=expert_layers * experts * expert,
        chosen=chosen / experts,
        head=vocab_size * width,
        dtypes=("fp8",),
        devices=8,
        max_model_len=32768,
    )


MODELS = {"qwen3-32b": _qwen3_32b(), "deepseek-r1": _deepseek_r1()}


def look_up(table, name, setting):
    """table[name]; UserError that lists the choices where the table has no such name."""
    if name not in table:
        raise UserError(f"{setting}={name} is not in the table: choose from {', '.join(table)}")
    return table[name]


def numbers(text, setting):
    """The whole numbers in a setting: "1,8,32" -> [1, 8, 32].

    UserError where `text` is anything but whole numbers from 1 with commas between.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(f"{setting}={text} must be whole numbers from 1 with commas between, "
                        "such as 1,8,32")
    return [int(word) for word in words]


def active_parameters(model):
    """Parameters that a token is multiplied with. (Of the input embedding, one row is copied.)"""
    return model.dense + model.routed * model.chosen + model.head


def weight_bytes(model, dtype):
    """Bytes of all weights in memory, summed over the devices."""
    embedding_and_head = 2 * model.head
    blocks = (model.dense + model.routed) * WEIGHT_BYTES[dtype]
    return blocks + embedding_and_head * WEIGHT_BYTES["bf16"]


def read_bytes(model, dtype, requests):
    """Bytes of weights that one decode step for `requests` sequences reads, summed over the
    devices.

    This is formula (4) for the experts; the input embedding does not count.
    """
    routed = model.routed * (1 - (1 - model.chosen) ** requests)
    return (model.dense + routed) * WEIGHT_BYTES[dtype] + model.head * WEIGHT_BYTES["bf16"]


def cache_bytes(model, dtype="bf16", devices=1):
    """Bytes that one token takes in the cache of each device.

    The devices share the heads among them; what cannot be divided is on all of them.
    """
    heads = math.ceil(model.kv_heads / devices)
    return model.layers * heads * model.kv_width * CACHE_BYTES[dtype]


def cache_room(model, device, dtype, devices, utilization):
    """Bytes left for the cache on each device beside the weights; negative where they do not fit.

    device: of hardware.DEVICES. utilization: the fraction of its memory that may be used.
    """
    return device.memory * utilization - weight_bytes(model, dtype) / devices


def _peak(device, dtype):
    """FLOP/s of a device for weights of a dtype, None where they are not known.

    Without native support for their dtype, weights are widened to bf16 and multiplied in bf16.
    """
    if dtype == "fp8" and device.fp8:
        return device.fp8
    return device.bf16


def decode_rate(model, device, dtype, requests, context, devices=1, kv_dtype="bf16"):
    """Formula (3): the most tokens/s that `requests` sequences of `context` tokens get, all
    together.

    Returns (tokens/s, bound): the bound is "memory" or "FLOP/s", whichever takes longer. Where the
    device's FLOP/s are not known, only memory counts.
    """
    cache = requests * context * cache_bytes(model, kv_dtype, devices)
    weights = read_bytes(model, dtype, requests) / devices
    moving = (weights + cache) / device.bandwidth

    peak = _peak(device, dtype)
    multiplying = 0
    if peak:
        multiplying = 2 * active_parameters(model) * requests / (devices * peak)

    bound = "memory" if moving >= multiplying else "FLOP/s"
    return requests / max(moving, multiplying), bound
