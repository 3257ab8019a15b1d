"""
Write a model for other programs, and check that it is the same there.

    python -m scripts.export --to=hf                      # for transformers and vLLM: ./export-TAG
    python -m scripts.export --to=hf --source=base --out=my-model --dtype=bfloat16

The export is loaded by the program that it is for and compared with the model: logits, token ids,
rendered conversations, greedy text. A difference deletes it and ends with status 1. A plain GPT and
a portable model can leave; docs/export.md has what else there is to know.
"""
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, expand_home, print0
from nanochat.configurator import configure
from nanochat.export_check import check_hf
from nanochat.folders import chosen_line
from nanochat.hf_export import DTYPES, Sampling, export_hf, hf_class_of, round_weights
from nanochat.metrics import finish_stage
from nanochat.model_card import model_card

to = "hf"                   # hf: a folder for transformers and vLLM
source = "sft"              # stage of the model: base, mid, sft or rl
model_tag: str = None       # its folder, such as d4. None: the newest
step: int = None            # its step. None: of a base model the best by validation, else the last
out: str = None             # folder to write, which must not exist. None: export-TAG, here
dtype = "float32"           # of the weights: float32 or bfloat16
temperature = 0.6           # of the sampling that programs take by themselves; 0: greedy
top_k = 50                  # of the same
repetition_penalty = 1.1    # of the same; 1: none, with which a small model may repeat itself
device_type = ""            # where it is checked: cuda, mps or cpu. Empty: the best one here
settings = configure(globals())

if to != "hf":
    raise UserError(f"to={to} is not known: choose hf")
if dtype not in DTYPES:
    raise UserError(f"dtype={dtype} cannot be written: choose from {', '.join(DTYPES)}")
is_chat = source != "base"
started = time.perf_counter()

# ---- the model, with the weights as they will be read
compute = compute_init(device_type)
model, tokenizer, meta = load_model(source, compute.device, "eval", model_tag, step)
hf_class = hf_class_of(model)
folder = Path(expand_home(out or f"export-{meta['tag']}", "write the whole path")).absolute()
if folder.exists():
    raise UserError(f"{folder} exists: delete it, or name another folder with --out")
print0(f"exporting {chosen_line(source, meta)} as {hf_class.architecture}, {dtype}")
round_weights(model, dtype)
model.compute_dtype = torch.float32

# ---- write it beside its place, compare, and only then give it its name
folder.parent.mkdir(parents=True, exist_ok=True)
unchecked = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
try:
    card = model_card(model, meta, hf_class.architecture, dtype)
    sampling = Sampling(temperature, top_k, repetition_penalty)
    export_hf(model, tokenizer, unchecked, dtype, is_chat, sampling, card)
    print0("checking it against the model")
    findings = []
    for finding in check_hf(model, tokenizer, unchecked):
        print0(finding.line())
        findings.append(finding)
    failed = [finding.name for finding in findings if not finding.passed]
    if not failed:
        unchecked.chmod(0o755)      # a temporary folder is its owner's alone
        unchecked.rename(folder)
finally:
    shutil.rmtree(unchecked, ignore_errors=True)

# ---- what came of it
checked = {finding.name: finding.detail for finding in findings}
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
    checked=checked,
    checkpoint=meta["dir"],
    step=meta["step"],
)
compute_cleanup()
if failed:
    sys.exit(1)
