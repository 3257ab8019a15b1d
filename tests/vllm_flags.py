"""The flags of `vllm serve` that this repository prints, as data, and a check of a command.

The versions are those between which we rely on a flag: outside them it is gone, or we do not know.
The table is written from vLLM's documentation; no engine runs here. A range of floats is a pair
that holds both of its ends: a swap space of 0 GiB is one.
"""
import json
import re

SWITCH = object()
BYTES = 128 * 10**9   # of a DGX Spark
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
QUANTIZATIONS = ("fp8", "awq", "awq_marlin", "gptq")
#    name                          type    range or choices                first    last
FLAGS = [
    ("--allowed-origins",          json,   list,                           (0, 3),  None),
    ("--block-size",               int,    (1, 8, 16, 32, 64, 128),        (0, 11), (0, 11)),
    ("--dtype",                    str,    DTYPES,                         (0, 3),  None),
    ("--enable-chunked-prefill",   SWITCH, None,                           (0, 4),  None),
    ("--enable-prefix-caching",    SWITCH, None,                           (0, 3),  None),
    ("--gpu-memory-utilization",   float,  (0.01, 1),                      (0, 3),  None),
    ("--hf-overrides",             json,   dict,                           (0, 7),  None),
    ("--host",                     str,    r"[0-9.]+|localhost",           (0, 3),  None),
    ("--kv-cache-memory-bytes",    int,    range(2**30, BYTES),            (0, 11), None),
    ("--max-model-len",            int,    range(1, 163841),               (0, 3),  None),
    ("--max-num-batched-tokens",   int,    range(1, 2**20),                (0, 3),  None),
    ("--max-num-seqs",             int,    range(1, 4097),                 (0, 3),  None),
    ("--no-enable-prefix-caching", SWITCH, None,                           (0, 9),  None),
    ("--port",                     int,    range(1, 65536),                (0, 3),  None),
    ("--quantization",             str,    QUANTIZATIONS,                  (0, 6),   None),
    ("--reasoning-parser",         str,    ("deepseek_r1", "qwen3"),       (0, 9),  None),
    ("--revision",                 str,    r"[0-9A-Za-z._/-]+",            (0, 3),  None),
    # 0.11.0 has it, 0.11.2 does not.
    ("--rope-scaling",             json,   dict,                           (0, 3),  (0, 10)),
    ("--swap-space",               float,  (0, 256),                       (0, 3),  (0, 17)),
    ("--tensor-parallel-size",     int,    (1, 2, 4, 8, 16),               (0, 3),  None),
    ("--trust-remote-code",        SWITCH, None,                           (0, 3),  None),
]
TABLE = {name: row for name, *row in FLAGS}


def value_problem(kind, allowed, text):
    """Why `text` is no value for a flag of that kind, or None."""
    try:
        value = json.loads(text) if kind is json else kind(text)
    except ValueError:
        return f"{text!r} is no {kind.__name__}"
    if isinstance(allowed, str):
        fits = re.fullmatch(allowed, value)
    elif allowed in (list, dict):
        fits = isinstance(value, allowed)
    elif kind is float:
        lowest, highest = allowed
        fits = lowest <= value <= highest
    else:
        fits = value in allowed
    return None if fits else f"{text!r} is out of its range"


def problems(words, version):
    """What is wrong with a command in the vLLM of `version`: a list of lines.

    words: ["vllm", "serve", model, flags...]. version: (0, 11).
    """
    found = []
    seen = set()
    if words[:2] != ["vllm", "serve"] or len(words) < 3 or words[2].startswith("-"):
        return [f"not `vllm serve MODEL`: {words[:3]}"]
    words = words[3:]
    while words:
        name, given, value = words.pop(0).partition("=")
        if name not in TABLE:
            found.append(f"{name} is not in the table")
            continue
        kind, allowed, first, last = TABLE[name]
        if name in seen:
            found.append(f"{name} is given twice")
        seen.add(name)
        if not first <= version <= (last or version):
            found.append(f"{name} is not in {version}")
        if kind is SWITCH:
            found += [f"{name} takes no value"] if given else []
        elif not given and (not words or words[0].startswith("--")):
            found.append(f"{name} needs a value")
        else:
            why = value_problem(kind, allowed, value if given else words.pop(0))
            found += [f"{name}: {why}"] if why else []
    return found
