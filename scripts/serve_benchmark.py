"""
How fast a server answers, whichever it is, as long as it speaks OpenAI's API.

    python -m scripts.serve_benchmark --concurrency=1,8,32 --input=1024 --output=256
    python -m scripts.serve_benchmark --url=http://localhost:11434      # another server
    python -m scripts.serve_benchmark --model=qwen3-32b --device=dgx-spark --dtype=fp8
    python -m scripts.serve_benchmark --input=64 --output=64            # our chat_web, small model

At each concurrency that many clients send `rounds` requests one after the other. Every request has
its own words, so that no cached prefix helps. nanochat/load_test.py says what each figure counts;
where the server reports no usage, pieces are counted as tokens, and the result says so.

With --model and --device the result stands beside what the hardware allows. This roofline
(nanochat/roofline.py) bounds decoding alone, while the measured time includes prefill.
$OPENAI_API_KEY is sent where it is set. The table is Markdown; the last line is JSON.
"""
import time

from nanochat.common import UserError, print0
from nanochat.configurator import configure, require
from nanochat.hardware import DEVICES
from nanochat.load_test import (
    TITLES,
    Request,
    Server,
    base_of,
    figure_cells,
    find_model,
    how_counted,
    measured,
    run_clients,
    words_for,
)
from nanochat.metrics import finish_stage
from nanochat.roofline import MODELS, decode_rate, look_up, numbers

url = "http://localhost:8000"   # the server, with or without /v1
concurrency = "1,8,32"          # requests at a time
input = 1024                    # tokens of a prompt
output = 256                    # longest answer in tokens
rounds = 3                      # requests that each client sends
served_model: str = None        # its name there. None: the first that the server lists
ignore_eos = False              # ask for full-length answers (vLLM, SGLang; others may refuse it)
timeout = 600                   # seconds without any data after which a request has failed
model: str = None               # for the roofline: one of serve_plan's models
device: str = None              # and one of its devices
devices: int = None             # number of devices. None: what the deployment here has
dtype = ""                      # bf16, fp8 or int4 weights there. Empty: the only published dtype


def roofline(row):
    """The most tokens/s that the hardware allows for what a row of summary() measured."""
    # On average, a sequence has its prompt and half its answer in the cache.
    context = (row["input_tokens"] or input) + row["output_tokens"] / 2
    shape = MODELS[model]
    rate, _ = decode_rate(
        shape,
        DEVICES[device],
        dtype or shape.dtypes[0],
        row["concurrency"],
        context,
        devices or shape.devices,
    )
    return rate


# --------------------------------------------------------------------------------------------------
# the report

def roofline_cell(row):
    if "roofline" not in row:
        return ""
    share = row["tokens_per_second"] / row["roofline"]
    return f"{100 * share:.0f} of {row['roofline']:,.1f}"


def table(rows):
    """Yield the lines of the Markdown table: one for each concurrency."""
    head = ["at a time", *TITLES]
    if model:
        head.append("% of the roofline")
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)

    for row in rows:
        cells = [str(row["concurrency"]), *figure_cells(row)]
        if model:
            cells.append(roofline_cell(row))
        yield "| " + " | ".join(cells) + " |"


def check_settings():
    """UserError for settings that can be refused before anything is sent."""
    pointless = model is None and (dtype or devices)
    if (model is None) != (device is None) or pointless:
        raise UserError("the roofline needs --model and --device; "
                        "without both, --dtype and --devices are for nothing")
    if model is None:
        return
    look_up(DEVICES, device, "device")
    kinds = look_up(MODELS, model, "model").dtypes
    if dtype or len(kinds) > 1:
        look_up(dict.fromkeys(kinds), dtype, "dtype")


def main(settings):
    # 1) what was asked for
    require(settings, 1, "input", "output", "rounds", "devices", "timeout")
    batches = numbers(concurrency, "concurrency")
    base = base_of(url)
    check_settings()

    # 2) the server, and how long its prompts must be
    started = time.perf_counter()
    server = Server(base, served_model or find_model(base), ignore_eos, timeout)
    words = words_for(server, input)
    print0(f"{server.model} at {base}: prompts of {input} tokens ({words} words), "
           f"answers of at most {output}, {rounds} from each client")

    # 3) the measurement, one concurrency after the other
    rows = []
    for clients in batches:
        queues = [
            [Request(server, words, output) for _ in range(rounds)] for _ in range(clients)
        ]
        row = measured(run_clients(server, queues), clients)
        if model:
            row["roofline"] = roofline(row)
        rows.append(row)

    # 4) for people, then for machines
    print0("\n" + "\n".join(table(rows)) + "\n")
    print0(how_counted(rows))
    seconds = time.perf_counter() - started
    finish_stage("serve_benchmark", seconds, settings, served_model=server.model, rows=rows)


if __name__ == "__main__":
    main(configure(globals()))
