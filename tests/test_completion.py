"""Continuing a text: which tokens the model gets, where it ends, and what the terminal shows."""
import os
import subprocess
import sys

import pytest
from chat_fakes import FakeEngine, FakeTokenizer, type_lines

from checkpoint_cases import CONFIG, folder, meta, save, tokenizer  # noqa: F401 - fixtures
from conftest import ROOT
from nanochat.completion import fit_text, print_continuation
from nanochat.configurator import configure
from nanochat.engine import Engine
from nanochat.checkpoint_manager import load_model
from scripts import chat_cli, complete


def test_a_text_begins_with_bos_and_of_a_longer_one_the_end_is_continued(tokenizer):
    bos = tokenizer.get_bos_token_id()
    ids = tokenizer.encode("the cat sat on the mat")
    assert fit_text(tokenizer, "the cat sat on the mat", 100) == [bos, *ids]
    assert fit_text(tokenizer, "the cat sat on the mat", 3) == ids[-3:]
    assert fit_text(tokenizer, "", 3) == [bos]


def test_the_continuation_is_printed_behind_its_text_without_control_characters(capsys):
    engine = FakeEngine([" is\x1b[2J", " Ada", KeyboardInterrupt()])
    print_continuation(engine, FakeTokenizer(), "My\x07 name\udcc3", max_tokens=50)
    assert capsys.readouterr().out == "My name? is[2J Ada (stopped)\n"
    assert engine.calls[0]["prompt"] == [1, *map(ord, "My\x07 name?")]


def test_a_long_text_leaves_room_for_its_continuation():
    engine = FakeEngine()
    print_continuation(engine, FakeTokenizer(), "x" * 1000, max_tokens=50)
    assert len(engine.calls[0]["prompt"]) == 150
    print_continuation(engine, FakeTokenizer(), "x" * 1000, max_tokens=5000)
    assert len(engine.calls[1]["prompt"]) == 100, "half the context, where more is asked for"


# ------------------------------------------------------------------------------------------------
# the commands

def test_a_base_model_in_chat_cli_continues_texts_and_keeps_no_conversation(monkeypatch, capsys):
    type_lines(monkeypatch, ["My name", "", "The sea ", "quit"])
    engine = FakeEngine()
    chat_cli.continue_texts(engine, FakeTokenizer())
    out = capsys.readouterr().out
    assert "does not answer" in out and "My nameHello 🙂!\n" in out
    prompts = ["".join(map(chr, call["prompt"])) for call in engine.calls]
    assert prompts == ["\1My name", "\1The sea "]


def test_words_are_texts_where_a_script_takes_texts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("x = 3\n", encoding="utf-8")
    texts = []
    words = ["My name", "--x=5", "is", "--", "- milk", "--x=7"]
    settings = configure({"__file__": str(script), "x": 3}, words, texts=texts)
    assert texts == ["My name", "is", "- milk", "--x=7"] and settings == {"x": 5}


@pytest.fixture
def base_model(base_dir, folder, meta):
    save(folder, 7, meta)
    return base_dir


def run(base, *words, typed=None):
    environment = {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        input=typed,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def continued(base, text, max_tokens):
    """What the model of a base folder greedily makes of a text."""
    model, tokenizer, _ = load_model("base", "cpu")
    engine = Engine(model, tokenizer)
    return text + engine.generate(text, temperature=0, max_new_tokens=max_tokens)


def test_complete_continues_each_text_of_the_command_line(base_model):
    words = ("scripts.complete", "the cat", "a dog", "--max_tokens=5", "--temperature=0")
    done = run(base_model, *words)
    assert done.returncode == 0, done.stderr
    expected = [continued(base_model, text, 5) for text in ("the cat", "a dog")]
    assert done.stdout == chat_cli_shows(expected[0]) + "---\n" + chat_cli_shows(expected[1])


def test_complete_says_on_a_terminal_which_model_it_took(base_model):
    read, write = os.openpty()
    words = [sys.executable, "-m", "scripts.complete", "the cat", "--max_tokens=2"]
    variables = {**os.environ, "NANOCHAT_BASE_DIR": str(base_model), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=write, text=True)
    said = os.read(read, 10_000).decode()
    os.close(read), os.close(write)
    assert done.returncode == 0 and said.startswith("base d1, step ") and said.count("\n") == 1


def chat_cli_shows(text):
    from nanochat.completion import printable
    return printable(text) + "\n"


def test_what_is_piped_in_is_continued_and_chat_cli_does_the_same(base_model):
    settings = ("--max_tokens=5", "--temperature=0")
    piped = run(base_model, "scripts.complete", *settings, typed="the cat\n")
    asked = run(base_model, "scripts.chat_cli", "--source=base", "-p", "the cat", *settings)
    assert piped.returncode == asked.returncode == 0, piped.stderr + asked.stderr
    assert piped.stdout == asked.stdout == chat_cli_shows(continued(base_model, "the cat", 5))


@pytest.mark.parametrize("words, hint", [
    (["--temperature=-1", "x"], "temperature"),
    (["--max_tokens=0", "x"], "max_tokens"),
    (["--topk=5", "x"], "--top_k"),
    (["--model_tag=none-such", "x"], "none-such"),
    (["x"], "base"),
])
def test_bad_input_of_complete_is_one_line_and_status_2(tmp_path, words, hint):
    done = run(tmp_path, "scripts.complete", *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and hint in done.stderr


# ------------------------------------------------------------------------------------------------
# from Python

def lines_from_python(page):
    """The Python code of a page's section "From Python"."""
    section = (ROOT / page).read_text(encoding="utf-8").partition("## From Python\n")[2]
    return section.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("page", ["README.md", "docs/engine.md"])
def test_the_documented_lines_load_a_model_and_stream_an_answer(
    base_dir, folder, meta, tmp_path, page
):
    chat_folder = base_dir / "chatsft_checkpoints" / "d1"
    config = {**CONFIG, "max_seq_len": 128}
    save(chat_folder, 3, {**meta, "stage": "chat_sft", "config": config})
    lines = lines_from_python(page)
    assert 5 <= len([line for line in lines.split("\n") if line.strip()]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", lines + "\nassert stream.completion_tokens > 0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
