"""docs/extend.md and docs/data-formats.md: every line and command runs, and every example of a
format has the keys that are written."""
import doctest
import json
import re
import shlex

import pytest
import torch

from conftest import ROOT
from nanochat.tokenizer import Tokenizer
from stage_runs import TINY, TINY_CHAT, meta_of, rows_of

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FORMATS = (ROOT / "docs" / "data-formats.md").read_text(encoding="utf-8")


def blocks_of(page, language):
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)


def patched(source, diff):
    """A source after a diff without line numbers, whose old lines occur once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert source.count(old) == 1, old
    return source.replace(old, new)


def test_the_lines_of_the_page_do_what_it_says(base_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    result = doctest.testfile(
        str(ROOT / "docs" / "extend.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    torch.set_rng_state(state)
    assert result.attempted > 15 and result.failed == 0


def test_the_tool_of_the_page_computes_and_without_it_is_refused():
    plain = (ROOT / "nanochat" / "execution.py").read_text(encoding="utf-8")
    changed = plain
    for diff in blocks_of(PAGE, "diff"):
        changed = patched(changed, diff)
    expression, expected = re.search(r'`use_tool\("(.*?)"\)` is `\'(.*?)\'`', PAGE).groups()
    for source, result in ((changed, expected), (plain, None)):
        module = {}
        exec(compile(source, "execution.py", "exec"), module)
        assert module["use_tool"](expression) == result
        assert module["use_tool"]("12*7") == "84" and module["use_tool"]('len("ab")') == "2"


@pytest.fixture(scope="module")
def records(stages, text):
    """The records of the page's commands, run on a small text: {stage: record}."""
    commands = re.findall(r"^python -m (.*)$", PAGE, re.M)
    sizes = {"base_train": TINY, "mid_train": TINY_CHAT}
    found = {}
    for command in commands:
        words = shlex.split(command.replace("my.txt", str(text)))
        stage = words[0].rpartition(".")[-1]
        found[stage] = stages.fork_record(*words, *sizes.get(stage, ()))
    return found


def test_the_commands_of_the_page_run(records, stages):
    assert list(records) == ["tok_train", "base_train", "mid_train"]
    [folder] = (stages.base / "mid_checkpoints").iterdir()
    assert "Bob" in json.dumps(meta_of(folder, 2))


def test_the_formats_of_the_page_are_those_that_are_written(records, stages):
    [folder] = (stages.base / "base_checkpoints").iterdir()
    written = {
        "meta": meta_of(folder, 4),
        "opening": rows_of(folder, "horizon")[0],
        "step": rows_of(folder, "loss")[0],
        "validation": rows_of(folder, "val_bpb")[-1],
        "record": records["base_train"],
    }
    for kind, row in written.items():
        [example] = blocks_of(FORMATS, kind)
        missing = json.loads(example).keys() - row.keys()
        assert not missing, (kind, missing, list(row))
    assert set(json.loads(blocks_of(FORMATS, "step")[0])) == set(written["step"])
    lines = (folder / "tokenizer" / "ranks.tiktoken").read_text(encoding="utf-8")
    assert "IQ== 0\n" in lines and {path.name for path in (folder / "tokenizer").iterdir()} == {
        "meta.json", "ranks.tiktoken", "tokenizer.json"}


def test_the_conversation_of_the_page_is_rendered():
    [example] = blocks_of(FORMATS, "conversation")
    tokenizer = Tokenizer.train_from_iterator(["2+2? It is 4. "] * 9, 290, or_fewer=True)
    ids, mask = tokenizer.render_conversation(json.loads(example))
    learnt = [token for token, weight in zip(ids, mask) if weight]
    assert tokenizer.decode(learnt) == "2+2It is 4."
