"""
Write a model for other programs, and check that it is the same there.

    python -m scripts.export --to=hf                # for transformers and vLLM, into ./export-TAG
    python -m scripts.export --to=hf --source=base --out=my-model --dtype=bfloat16
    python -m scripts.export --to=gguf --dtype=q8_0 # for llama.cpp
    python -m scripts.export --to=ollama            # and with a Modelfile, for ollama

The export is loaded by the program that it is for and compared with the model: logits, token ids,
rendered conversations, greedy text. A difference deletes it and ends with status 1. A plain GPT and
a portable model can leave for transformers, a portable model for llama.cpp. docs/export.md has what
else there is to know.
"""
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, expand_home, print0
from nanochat.configurator import check_choices, configure
from nanochat.export_check import check_hf
from nanochat.folders import chosen_line
from nanochat.gguf_check import check_gguf, has_llama_cpp
from nanochat.gguf_export import (
    KINDS,
    export_gguf,
    pre_tokenizer,
    require_portable,
    round_to_gguf,
    write_modelfile,
)
from nanochat.hf_export import DTYPES, export_hf, hf_class_of, round_weights
from nanochat.metrics import finish_stage
from nanochat.model_card import model_card
from nanochat.sampling import SamplingOptions

to = "hf"                   # hf: transformers and vLLM; gguf: llama.cpp; ollama: gguf and Modelfile
source = "sft"              # stage of the model: base, mid, sft or rl
model_tag: str = None       # its folder, such as d4. None: the newest
step: int = None            # its step. None: of a base model the best by validation, else the last
out: str = None             # folder to write, which must not exist. None: export-TAG, here
dtype = "float32"           # of the weights: float32 or bfloat16, for llama.cpp also q8_0
split_digits = False        # for llama.cpp: accept that it reads numbers digit by digit
temperature = 0.6           # of the sampling that programs take by themselves; 0: greedy
top_k = 50                  # of the same
repetition_penalty = 1.1    # of the same; 1: none, with which a small model may repeat itself
device_type = ""            # where it is checked: cuda, mps or cpu. Empty: the best one here
settings = configure(globals())

SHORT_NAMES = {"f32": "float32", "bf16": "bfloat16"}
FLOAT16 = ("f16", "fp16", "float16")


# ---- what differs between the programs
class Program(NamedTuple):
    """How a model leaves for a program. The functions are those below."""
    dtypes: tuple           # of the weights
    suffix: str             # of the folder's name
    prepare: Callable       # refuse what it cannot read, and round the weights as it reads them
    write: Callable         # (folder, text of the model card)
    compare: Callable       # folder -> the Findings, as they come


def prepare_hf():
    round_weights(model, dtype)


def write_hf(place, card):
    export_hf(model, tokenizer, place, dtype, is_chat, sampling, card)


def compare_hf(place):
    return check_hf(model, tokenizer, place)


def prepare_gguf():
    require_portable(model)
    pre_tokenizer(tokenizer, split_digits)
    round_to_gguf(model, dtype)


def write_gguf(place, card):
    export_gguf(
        model, tokenizer, place / "model.gguf", dtype, is_chat, meta["tag"], split_digits)
    (place / "README.md").write_text(card, encoding="utf-8")


def compare_gguf(place):
    if not has_llama_cpp():
        print0("llama-cpp-python is not installed, so that the tensors alone are compared: "
               "`uv pip install llama-cpp-python` for the rest")
    return check_gguf(model, tokenizer, place / "model.gguf", dtype, split_digits)


def write_ollama(place, card):
    write_gguf(place, card)
    write_modelfile(place, model.config, is_chat, sampling)


GGUF = Program(tuple(KINDS), "-gguf", prepare_gguf, write_gguf, compare_gguf)
PROGRAMS = {
    "hf": Program(DTYPES, "", prepare_hf, write_hf, compare_hf),
    "gguf": GGUF,
    "ollama": GGUF._replace(suffix="-ollama", write=write_ollama),
}

# ---- what is asked for
dtype = SHORT_NAMES.get(dtype, dtype)
check_choices(settings, to=PROGRAMS)
program = PROGRAMS[to]
if dtype in FLOAT16:
    raise UserError(f"dtype={dtype} is not offered, because activations such as ReLU squared "
                    "exceed 65,504, the largest number of float16, and become NaN: take bfloat16")
if dtype not in program.dtypes:
    raise UserError(f"dtype={dtype} cannot be written for {to}: choose from "
                    f"{', '.join(program.dtypes)}")
sampling = SamplingOptions(
    temperature=temperature, top_k=top_k, repetition_penalty=repetition_penalty)
is_chat = source != "base"
started = time.perf_counter()

# ---- the model, with the weights as they will be read
compute = compute_init(device_type)
model, tokenizer, meta = load_model(source, compute.device, "eval", model_tag, step)
hf_class = hf_class_of(model)
name = f"export-{meta['tag']}{program.suffix}"
folder = Path(expand_home(out or name, "write the whole path")).absolute()
if folder.exists():
    raise UserError(f"{folder} exists: delete it, or name another folder with --out")
program.prepare()
print0(f"exporting {chosen_line(source, meta)} as {hf_class.architecture}, {dtype}")
model.compute_dtype = torch.float32

# ---- write it beside its place, compare, and only then give it its name
findings = []
folder.parent.mkdir(parents=True, exist_ok=True)
unchecked = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
try:
    program.write(unchecked, model_card(model, meta, hf_class.architecture, dtype, to))
    print0("checking it against the model")
    for finding in program.compare(unchecked):
        print0(finding.line())
        findings.append(finding)
    failed = [finding.name for finding in findings if not finding.passed]
    if not failed:
        unchecked.chmod(0o755)      # a temporary folder is its owner's alone
        unchecked.rename(folder)
finally:
    shutil.rmtree(unchecked, ignore_errors=True)

# ---- what came of it
if failed:
    print0(f"the export was another model ({', '.join(failed)} differ) and is deleted")
else:
    print0(f"it is in {folder}")
finish_stage(
    "export",
    time.perf_counter() - started,
    settings,
    folder=None if failed else str(folder),
    architecture=hf_class.architecture,
    failed=failed,
    checked={finding.name: finding.detail for finding in findings},
    checkpoint=meta["dir"],
    step=meta["step"],
)
compute_cleanup()
if failed:
    sys.exit(1)
