"""The model card of an export: what the model is, and the numbers that its run recorded.

Nothing is measured here. The records are those of metrics.jsonl whose checkpoint is the exported
one, or one that it was trained from: the report's numbers, of this model alone.
"""
from dataclasses import asdict

from nanochat.card import machine_class
from nanochat.checkpoint import read_meta
from nanochat.common import UserError, get_base_dir
from nanochat.document import to_markdown
from nanochat.records import TRAINING, duration, interval, percent, read_jsonl, si

LONGEST_ORIGIN = 8      # stages that are followed back
FRONT = """\
---
library_name: {library}
pipeline_tag: text-generation
tags:
- nanochat
---

"""
USE_CHAT = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
messages = [{"role": "user", "content": "Who are you?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=96)
print(tokenizer.decode(answer[0, prompt["input_ids"].size(1):], skip_special_tokens=True))
```
"""
USE_BASE = """
## Use

It continues texts and answers no questions.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
prompt = tokenizer("My name is", return_tensors="pt")
text = model.generate(prompt["input_ids"], max_new_tokens=50)
print(tokenizer.decode(text[0], skip_special_tokens=True))
```
"""
USE_GGUF = """
## Use

With llama.cpp: `llama-cli -m model.gguf`, or `llama-server -m model.gguf` for a server.
"""
USE_OLLAMA = """
## Use

`ollama create NAME -f Modelfile` in this folder, then `ollama run NAME`.
"""
SHORT = (
    "A language model that was trained from scratch with nanochat: {size} parameters. What it says "
    "about the world is not to be relied on; what was measured stands below, and nothing else was."
)
NO_RECORDS = "No record of its training or of an evaluation is there."


def chain_of(meta):
    """The folders of a checkpoint and of those that it was trained from, the newest first.

    meta: of load_model(). One that is there no more ends the chain.
    """
    folders = [meta["dir"]]
    while meta.get("origin") and len(folders) < LONGEST_ORIGIN:
        folder, step = meta["origin"]
        folders.append(folder)
        try:
            meta = read_meta(folder, step)
        except UserError:
            break
    return folders


def records_of(meta):
    """{stage: its last record} of a checkpoint's own training and evaluations, and of the training
    that came before it."""
    folders = chain_of(meta)
    found = {}
    for record in read_jsonl(get_base_dir() / "metrics.jsonl"):
        checkpoint, stage = record.get("checkpoint"), record.get("stage")
        is_own = checkpoint == folders[0]
        is_earlier = checkpoint in folders and stage in TRAINING
        if is_own or is_earlier:
            found[stage] = record
    return found


def training_blocks(records):
    """A table with a row for each stage of training."""
    rows = []
    for stage in TRAINING:
        record = records.get(stage)
        if record is None:
            continue
        bpb = record.get("val_bpb")
        rows.append([
            stage,
            record.get("steps"),
            si(record.get("tokens")),
            duration(record.get("train_seconds") or 0),
            machine_class(record),
            "" if bpb is None else f"{bpb:.4f}",
        ])
    if rows:
        yield ("heading", "Training")
        header = ["stage", "steps", "tokens", "time", "machine", "validation, bits per byte"]
        yield ("table", header, rows)


def accuracy_blocks(records):
    """A table of what chat_eval measured, and the CORE number."""
    record = records.get("chat_eval", {})
    items, chance = record.get("items", {}), record.get("chance", {})
    rows = []
    for task, accuracy in record.get("accuracy", {}).items():
        rows.append([
            task,
            percent(accuracy),
            interval(accuracy, items.get(task)),
            percent(chance.get(task)),
            items.get(task),
        ])
    core = records.get("base_eval", {}).get("core")
    if not rows and core is None:
        return
    yield ("heading", "Measured on held-out items, greedy")
    if rows:
        header = ["task", "accuracy", "95 % interval", "chance", "items"]
        yield ("table", header, rows)
    if core is not None:
        yield ("text", f"CORE: {core:.4f}")


def use_of(to, is_chat):
    """How an export is used, Markdown. to: hf, gguf or ollama."""
    if to == "hf":
        return USE_CHAT if is_chat else USE_BASE
    return USE_OLLAMA if to == "ollama" else USE_GGUF


def model_card(model, meta, architecture, dtype, to):
    """The text of README.md, Markdown.

    meta: of load_model(). architecture: transformers' class. dtype: of the weights. to: hf, gguf or
    ollama.
    """
    records = records_of(meta)
    size = si(sum(parameter.numel() for parameter in model.parameters()))
    blocks = [("text", SHORT.format(size=size))]
    measured = [*training_blocks(records), *accuracy_blocks(records)]
    blocks += measured or [("text", NO_RECORDS)]

    shape = asdict(model.config) | {"class": architecture, "dtype": dtype}
    shape |= {"checkpoint": f"{meta['stage']} {meta['tag']}, step {meta['step']}"}
    blocks += [("heading", "Shape"), ("table", ["", ""], shape.items())]
    front = FRONT.format(library="transformers" if to == "hf" else "gguf")
    text = to_markdown(meta.get("name") or meta["tag"], blocks)
    return front + text + use_of(to, meta["stage"] != "base_train")
