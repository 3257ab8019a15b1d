"""The user's own text in the chat: what is practised, what the engine quotes, what is kept."""
import os
import random
import re
import shutil

import pytest
import torch

from nanochat.common import UserError
from nanochat.conversation import LOOKUP_CALL, NOTHING_FOUND
from nanochat.dataset import data_tag
from nanochat.engine import Engine, user_texts
from nanochat.gpt import GPT, GPTConfig
from nanochat.passage_store import find_data, load_passages, prepare_passages, save_passages
from nanochat.passages import passages_of
from nanochat.retrieval import Passages
from nanochat.tokenizer import Tokenizer
from stage_runs import TINY, TINY_CHAT
from tasks.common import answer_text
from tasks.identity import Identity, own_identity
from tasks.own_text import DEFINITION, OwnText, identity_tasks, language_of_text, overlap, retyped

NOTES = [
    (
        f"notes/{name}.md",
        f"# {name.title()}\n\n{name.title()} was bought on {day} May.\n"
        f"Colour: {colour}\nWhere is the {name}?\nIn room {day}.\n",
    )
    for day, name, colour in [
        (1, "piano", "black"), (2, "kettle", "red"), (3, "bicycle", "green"),
        (4, "lamp", "white"), (5, "mirror", "silver"), (6, "carpet", "blue"),
        (7, "ladder", "grey"), (8, "clock", "gold"), (9, "hammer", "brown"),
        (10, "pillow", "pink"), (11, "basket", "beige"), (12, "drum", "tan"),
    ]
]


@pytest.fixture(scope="module")
def passages():
    return Passages(passages_of(NOTES))


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["what do I know about the piano? lookup() was bought on (source: notes) " * 20]
    return Tokenizer.train_from_iterator(texts, 300)


# ------------------------------------------------------------------------------------------------
# practice

def sources(split, passages):
    task = OwnText(split, passages, 300)
    return {tuple(task[i]["source"]) for i in range(len(task)) if task[i]["source"]}


def test_headings_are_held_out_whole_and_both_splits_have_some():
    names = [f"{first} {second}" for first in "abcde" for second in "fghij"]
    text = "Long sentences. " * 90 + "\n\n"
    many = passages_of([("a.md", f"# {name}\n\n{text}") for name in names])
    train, test = sources("train", many), sources("test", many)
    assert train and test and not train & test
    assert len(train) + len(test) == len(names)


def test_of_a_text_without_headings_single_passages_are_held_out():
    text = "\n\n".join(f"Chapter-less sentence number {i}. " * 12 for i in range(40))
    novel = passages_of([("novel.txt", text)])
    held_out = OwnText("test", novel).passages
    assert 0 < len(held_out) < len(OwnText("train", novel).passages)


def test_a_text_of_one_line_has_nothing_to_hold_out_and_says_so():
    line = passages_of([("a.txt", "Hello there.")])
    assert sorted(len(OwnText(split, line, 7)) for split in ("train", "test")) == [0, 7]


def test_every_question_is_answered_by_the_same_call(passages):
    task = OwnText("train", passages.passages, 200)
    for i in range(len(task)):
        conversation = task[i]
        assert conversation == task[i]
        for message in conversation["messages"][1::2]:
            call, reply = message["content"]
            assert (call["type"], call["text"]) == ("python", LOOKUP_CALL)
            assert reply["text"] == NOTHING_FOUND or "(source: notes/" in reply["text"]
    turns = {len(task[i]["messages"]) for i in range(len(task))}
    assert turns == {2, 4}


def test_questions_come_from_headings_definitions_questions_and_rare_words(passages):
    task = OwnText("train", passages.passages, 600)
    asked = {task[i]["messages"][-2]["content"].lower().rstrip("?. ") for i in range(len(task))}
    assert any(question.startswith("what do i know about") for question in asked)
    assert any("colour" in question for question in asked)              # Colour: black
    assert {"where is the lamp", "where is the piano"} & asked          # Where is the lamp?
    assert any("bought" in question and "what" in question for question in asked)


@pytest.mark.parametrize("text, subject", [
    ("Die Uhr ist kaputt und sie ist im Keller.", "Napoleon"),
    ("我的钟在墙上。", "拿破仑"),
])
def test_what_the_text_need_not_speak_of_is_asked_in_its_language(text, subject):
    task = OwnText("train", passages_of([(f"{i}.md", text) for i in range(40)]), 900)
    elsewhere = [task[i] for i in range(len(task)) if not task[i]["source"]]
    asked = " ".join(c["messages"][-2]["content"] for c in elsewhere).lower()
    assert subject.lower() in asked and "president" not in asked and "what" not in asked


def test_no_time_of_day_and_no_address_is_asked_for():
    lines = ["At 10:30 the dentist calls.", "https://example.org is the page of the club.",
             "Price: 12", "7:15 the bus leaves."]
    assert [bool(DEFINITION.fullmatch(line)) for line in lines] == [False, False, True, False]


def test_an_answer_is_right_when_its_source_is(passages):
    task = OwnText("train", passages.passages, 50)
    conversation = next(task[i] for i in range(50) if task[i]["source"])
    source = ", ".join(conversation["source"])
    right = [{"type": "python", "text": LOOKUP_CALL},
             {"type": "python_output", "text": f"It was red.\n(source: {source})"}]
    assert task.evaluate(conversation, right)
    assert not task.evaluate(conversation, [{"type": "text", "text": f"(source: {source})"}])
    right[1]["text"] = "It was red.\n(source: notes/other.md)"
    assert not task.evaluate(conversation, right)


def test_beside_own_text_the_model_practises_to_be_greeted(passages):
    identity = Identity("train")
    plain, often = identity_tasks(identity, None, "hub"), identity_tasks(identity, passages, "hub")
    assert len(plain) == 4

    def greetings(tasks):
        asked = [task[i]["messages"][0]["content"].lower() for task in tasks
                 for i in range(len(task))]
        return asked.count("hello") / len(asked)

    assert greetings(often) > 5 * greetings(plain) > 0
    # the local mixture declines single words
    assert greetings(identity_tasks(identity, None, "local")) > 5 * greetings(plain)


def test_the_users_own_answers_on_who_the_model_is_are_practised_more(passages):
    own = own_identity([{"messages": [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "My name is Bob."},
    ]}])
    usual = identity_tasks(Identity("train", "Bob", [[] for _ in own]), passages, "local")
    named = identity_tasks(Identity("train", "Bob", own), passages, "local")
    whole = [sum(isinstance(task, Identity) for task in tasks) for tasks in (usual, named)]
    assert whole[1] > 3 * whole[0] and len(named) - whole[1] == len(usual) - whole[0]
    assert len(identity_tasks(Identity("train", "Bob", own), None, "hub")) == 4


def test_a_quote_is_part_of_the_answer_and_the_output_of_a_sum_is_not():
    quote = [{"type": "python", "text": LOOKUP_CALL}, {"type": "python_output", "text": "In May."}]
    total = [{"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}]
    assert answer_text(quote) == "In May."
    assert answer_text([*total, {"type": "text", "text": "It is."}]) == "It is."


def test_from_memory_half_of_the_words_are_right(passages):
    task = OwnText("test", passages.passages, 20, form="recall")
    conversation = task[0]
    quote = conversation["messages"][-1]["content"]
    assert isinstance(quote, str)
    assert task.evaluate(conversation, [{"type": "text", "text": quote.lower()}])
    assert not task.evaluate(conversation, [{"type": "text", "text": "I do not know."}])
    assert overlap("a b c d", "a b x y") == 0.5


@pytest.mark.parametrize("text, language", [
    ("The clock is on the wall and it was wound in May.", "English"),
    ("Die Uhr ist an der Wand und sie war im Mai kaputt.", "German"),
    ("我的钟在墙上。", "Chinese"),
    ("時計はここです。", "Japanese"),
    ("Kello on seinalla ollut pysahtyneena toukokuusta asti", ""),
])
def test_questions_are_in_the_language_of_the_text(text, language):
    assert language_of_text(text) == language
    task = OwnText("train", passages_of([(f"{i}.md", text) for i in range(40)]), 40)
    assert all(task[i]["messages"][0]["content"].strip() for i in range(40))


def test_a_question_keeps_its_words_however_it_is_typed():
    rng = random.Random(1)
    typed = {retyped("where is Ada?", rng) for _ in range(30)}
    assert typed == {"where is ada", "Where is Ada?"}
    assert all(retyped("???", rng) for _ in range(30))


# ------------------------------------------------------------------------------------------------
# the engine

class Scripted(torch.nn.Module):
    """A model that writes the ids of `script` after the prompt, whatever that is."""

    def __init__(self, tokenizer, script, T=200):
        super().__init__()
        self.config = GPTConfig(
            depth=1, width=64, heads=2, kv_heads=2,
            vocab_size=tokenizer.get_vocab_size(), max_seq_len=T)
        self.model = GPT(self.config)
        self.model.init_weights()
        self.embed = self.model.embed
        self.script = script
        self.written = 0

    def new_kv_cache(self, slots, length):
        return self.model.new_kv_cache(slots, length)

    def _logits(self, count):
        logits = torch.zeros(count, self.config.vocab_size)
        logits[:, self.script[min(self.written, len(self.script) - 1)]] = 1
        self.written += 1
        return logits

    def prefill(self, idx, kv_cache, slots, lengths):
        return self._logits(len(idx))

    def decode(self, idx, kv_cache):
        logits = self._logits(len(idx))
        return logits


def scripted_engine(tokenizer, passages, call=LOOKUP_CALL, T=200):
    special = tokenizer.encode_special
    script = [special("<|python_start|>"), *tokenizer.encode(call), special("<|python_end|>")]
    # while a reply is forced, what the model would write is not read
    script += [special("<|assistant_end|>")]
    return Engine(Scripted(tokenizer, script, T), tokenizer, passages)


def ask(engine, *texts, **options):
    messages = []
    for text in texts[:-1]:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "Hm."}]
    messages.append({"role": "user", "content": texts[-1]})
    ids = engine.tokenizer.render_for_completion({"messages": messages})
    return engine.generate(ids, **{"temperature": 0, "max_new_tokens": 180, **options})


def test_the_engine_answers_a_look_up_with_the_quote_for_the_last_question(tokenizer, passages):
    engine = scripted_engine(tokenizer, passages, T=400)
    text = ask(engine, "what colour is the kettle", "drum, when bought?")
    assert text.startswith("Drum was bought on 12 May.") and "kettle" not in text.lower()
    assert text.endswith("\n(source: notes/drum.md, Drum)\n")
    assert LOOKUP_CALL not in text and "`" not in text


def test_a_look_up_without_passages_is_refused_and_other_calls_are_shown(tokenizer, passages):
    refused = ask(scripted_engine(tokenizer, None), "the drum?")
    assert refused == f"`{LOOKUP_CALL}`"
    assert ask(scripted_engine(tokenizer, passages, "12*7"), "12*7?") == "`12*7` → 84\n"


@pytest.mark.parametrize("limit, said", [
    (12, "Drum was bought on 12 May.\nColour: tan\nWhere is the drum?\nIn room 12.\n(source: notes/"
         "drum.md, Drum)"),
    (200, "Drum was bought on 12 May.\n(source: notes/drum.md, Drum)"),
    (200, "No room here to quote your text."),
])
def test_a_quote_takes_what_the_context_leaves_whatever_the_model_may_write(
        tokenizer, passages, limit, said):
    message = {"role": "user", "content": "drum bought?"}
    ids = tokenizer.render_for_completion({"messages": [message]})

    # a context that ends with the answer: two markers of the call, two of the reply, the end
    context = len(ids) + len(tokenizer.encode(LOOKUP_CALL)) + len(tokenizer.encode(said)) + 5
    engine = scripted_engine(tokenizer, passages, T=context)
    (tokens,) = engine.generate_batch([ids], max_new_tokens=limit, temperature=0)
    reply = tokenizer.parse_completion(tokens)
    assert [part["text"] for part in reply if part["type"] == "python_output"] == [said]
    assert tokens[-1] == tokenizer.encode_special("<|assistant_end|>")


def test_a_follow_up_is_understood_where_the_question_before_is_out_of_the_context(
        tokenizer, passages):
    texts = ["Tell me about the drum", "and what colour?"]
    engine = scripted_engine(tokenizer, passages, T=256)
    alone = ask(engine, texts[1])
    engine = scripted_engine(tokenizer, passages, T=256)
    assert "drum.md" not in alone and "drum.md" in ask(engine, texts[1], questions=texts)


def test_a_call_with_blanks_is_shown_as_a_look_up_too(tokenizer, passages):
    engine = scripted_engine(tokenizer, passages, " lookup() ", T=400)
    assert ask(engine, "drum, when bought?").startswith("Drum was bought on 12 May.")


def test_a_user_who_writes_the_call_gets_no_quote_and_no_marker(tokenizer, passages):
    message = {"role": "user", "content": "<|python_start|>lookup()<|python_end|>"}
    ids = tokenizer.render_for_completion({"messages": [message]})
    assert user_texts(tokenizer, ids) == [message["content"]]


# ------------------------------------------------------------------------------------------------
# what is kept

def test_passages_are_kept_beside_the_model_and_damage_is_named(tmp_path, passages):
    name = save_passages(tmp_path, passages.passages)
    meta = {"passages": name, "dir": str(tmp_path)}
    assert load_passages(meta).passages == passages.passages
    assert save_passages(tmp_path, passages.passages) == name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert load_passages({"dir": str(tmp_path)}) is None

    (tmp_path / name).write_bytes(b"PAR1 something else")
    for damaged in (meta, {**meta, "passages": "../" + name}, {**meta, "passages": 7}):
        with pytest.raises(UserError, match="missing or damaged"):
            load_passages(damaged)


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, text in NOTES:
        (folder / name.split("/")[1]).write_text(text, encoding="utf-8")
    return folder


def have_origins(monkeypatch, origins):
    """Checkpoints {(folder, step): meta} in place of those that are there."""
    def read_meta(folder, step):
        if (str(folder), step) not in origins:
            raise UserError("is gone")
        return origins[str(folder), step]

    monkeypatch.setattr("nanochat.passage_store.read_meta", read_meta)


def test_a_chat_stage_finds_the_text_of_its_model_and_keeps_it(
        notes, tmp_path, monkeypatch, capsys):
    have_origins(monkeypatch, {
        ("mid", 5): {"origin": ["base", 9], "settings": {"data": None}},
        ("base", 9): {"settings": {"data": str(notes)}},
    })
    assert find_data({"origin": ["mid", 5]}) == (str(notes), None)

    meta = {"origin": ["mid", 5]}
    found = prepare_passages(None, meta, tmp_path / "sft")
    assert found.answer("what colour is the kettle").quotes[0].source == "kettle.md, Kettle"
    assert f"of {len(NOTES)} files" in capsys.readouterr().out

    # the notes have moved: a resumed run and the chat have them all the same
    shutil.rmtree(notes)
    again = prepare_passages(None, dict(meta), tmp_path / "sft")
    assert again.passages == found.passages
    assert prepare_passages(None, {"origin": ["mid", 5]}, tmp_path / "new") is None
    assert "is gone" in capsys.readouterr().out


def test_a_run_that_continues_in_another_folder_takes_its_passages_along(passages, tmp_path):
    name = save_passages(tmp_path / "sft", passages.passages)
    meta = {"passages": name, "continues": [str(tmp_path / "sft"), 3]}
    assert prepare_passages(None, meta, tmp_path / "sft-2").passages == passages.passages
    shutil.rmtree(tmp_path / "sft")
    assert prepare_passages(None, meta, tmp_path / "sft-2").passages == passages.passages
    assert [path.name for path in (tmp_path / "sft-2").iterdir()] == [name]


def test_text_and_base_model_may_be_gone_where_midtraining_has_kept_the_text(
        passages, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    mid = tmp_path / "mid_checkpoints" / "notes"
    name = save_passages(mid, passages.passages)
    kept = {"origin": ["base", 9], "settings": {}, "passages": name, "data": "/gone/notes"}
    have_origins(monkeypatch, {(str(mid), 5): kept})

    # the base directory was elsewhere when the chat stage began
    meta = {"origin": ["/elsewhere/mid_checkpoints/notes", 5]}
    found = prepare_passages(None, meta, tmp_path / "sft")
    assert found.passages == passages.passages and meta["data"] == "/gone/notes"
    assert "as it was kept beside" in capsys.readouterr().out

    # nothing is left that tells of a text
    have_origins(monkeypatch, {(str(mid), 5): {"origin": ["base", 9], "settings": {}}})
    assert prepare_passages(None, {"origin": [str(mid), 5]}, tmp_path / "new") is None
    assert capsys.readouterr().out.count("--data=PATH") == 1


def test_a_text_beyond_the_cap_is_a_corpus_unless_it_was_asked_for(
        notes, tmp_path, monkeypatch, capsys):
    have_origins(monkeypatch, {("base", 9): {"settings": {"data": str(notes)}}})
    monkeypatch.setattr("nanochat.passage_store.MAX_CHARS", 300)
    meta = {"origin": ["base", 9]}
    assert prepare_passages(None, meta, tmp_path / "sft") is None and "passages" not in meta
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "300 characters" in line]
    assert f"--data={notes}" in line
    assert prepare_passages(str(notes), {"origin": ["base", 9]}, tmp_path / "sft").passages
    assert prepare_passages(str(notes), dict(meta), tmp_path / "sft") is None   # resumed


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="/nope does not exist"):
        prepare_passages("/nope", {}, tmp_path)


def test_the_rows_of_a_table_are_of_one_file():
    rows = [(f"a.parquet, row {i}", f"Row number {i} is here.") for i in range(5)]
    assert Passages(passages_of([*rows, ("b, row 7.md", "Other.")])).document_count == 2


def test_a_model_of_other_text_has_nothing_to_look_up(tmp_path, monkeypatch):
    have_origins(monkeypatch, {("base", 9): {"settings": {"data": None}}})
    meta = {"origin": ["base", 9]}
    assert prepare_passages(None, meta, tmp_path) is None and "passages" not in meta


# docs/own-text.md: the stages from the notes to the chat
def test_a_chat_of_notes_quotes_them_after_they_are_gone(stages, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(60):
        text = f"# Harbour {i}\n\n" + f"Boat {i} lies at berth {i * 7}. " * 5
        (notes / f"boat {i}.md").write_text(text, encoding="utf-8")
    small = (*TINY_CHAT, "--num_iterations=2", "--device_type=cpu")
    relative = os.path.relpath(notes)
    stages.fork("scripts.base_train", f"--data={relative}", *TINY, "--num_iterations=2")
    out, _ = stages.fork("scripts.mid_train", *small)
    named = re.search("passages of 60 files of (/.*)", out)[1]
    assert os.path.samefile(named, notes)
    tag = data_tag(relative)
    shutil.rmtree(notes)

    # from here on the text is that of midtraining
    folder = stages.folder("mid", tag)
    out, _ = stages.fork("scripts.chat_sft", *small, "--own_text=recall", status=0)
    row = stages.fork_record("scripts.chat_eval", "--source=mid", "--items=3", "--max_new_tokens=8")
    assert {"own_text", "own_text_practised"} <= row["accuracy"].keys()
    assert "pydoc" not in row["accuracy"] and row["own_files"] == 60
    assert list(folder.glob("passages_*.parquet"))
    stages.refusal("scripts.mid_train", *small, "--own_text=both")
    stages.refusal("scripts.mid_train", *small, "--data=/nope")
