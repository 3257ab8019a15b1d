"""A small bundle for the tests of CORE: a task of each kind."""
import json

from nanochat.tokenizer import Tokenizer

NAMES = ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn", "Gus", "Hal")
THINGS = ("a red hat", "an old dog", "two pens", "the map")

CORE_YAML = """\
# a small one
icl_tasks:
- label: choices
  dataset_uri: some/choices.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "   # before the answer
-
  label: schemas
  dataset_uri: some/schemas.jsonl
  num_fewshot: [0]
  icl_task_type: schema
- label: continuations
  dataset_uri: some/continuations.jsonl
  num_fewshot: [1]
  icl_task_type: language_modeling
"""
META = """\
Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline
choices,x,y,2,8,25
schemas,x,y,0,8,50
continuations,x,y,1,8,0
"""


def rows_of(kind):
    """Eight rows of a kind."""
    rows = []
    for i, name in enumerate(NAMES):
        thing, other = THINGS[i % 4], THINGS[(i + 1) % 4]
        if kind == "multiple_choice":
            query = f"Question: what has {name}?"
            rows.append({"query": query, "choices": list(THINGS), "gold": i % 4})
        elif kind == "schema":
            options = [f"{name} took {thing} and", f"{name} took {other} and"]
            rows.append({"context_options": options, "continuation": "left.", "gold": i % 2})
        else:
            rows.append({"context": f" {name} has ", "continuation": thing})
    return rows


def write_bundle(folder):
    """A whole bundle in `folder`, a Path that does not exist yet."""
    data = folder / "eval_data" / "some"
    data.mkdir(parents=True)
    (folder / "core.yaml").write_text(CORE_YAML, encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(META, encoding="utf-8")
    kinds = {
        "choices": "multiple_choice",
        "schemas": "schema",
        "continuations": "language_modeling",
    }
    for name, kind in kinds.items():
        lines = [json.dumps(row) + "\n" for row in rows_of(kind)]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def small_tokenizer():
    """A vocabulary of 300, of the bundle's own words."""
    texts = [json.dumps(rows_of(kind)) for kind in ("multiple_choice", "schema")]
    return Tokenizer.train_from_iterator(texts, 300)
