"""The user's own conversations in the forms that people have them in: read, said, or refused in one
line that names the place."""
import bz2
import gzip
import json
import lzma
import re
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
from nanochat.common import UserError
from nanochat.conversation import check_conversation
from tasks.customjson import (
    ANSWERS,
    CHOICES,
    DETAILS,
    LABELS,
    MESSAGES,
    QUESTIONS,
    READERS,
    SYSTEM,
    CustomJSON,
)

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hello, Ada."}
TALK = [USER, ASSISTANT]


def sharegpt(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def compressed(data, suffix):
    """Bytes as another program would compress them."""
    if suffix == ".zst":
        return pa.compress(data, codec="zstd", asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(data)


@pytest.fixture
def read(tmp_path):
    """read(content, name) -> the messages of all conversations of a file with this content.

    A text is written as it is, a list as one line of JSON for each item.
    """
    def read(content, name="mine.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        task = CustomJSON(path)
        return [task[i]["messages"] for i in range(len(task))]
    return read


def texts(messages):
    return [(message["role"], message["content"]) for message in messages]


# ------------------------------------------------------------------------------------------------
# what a record may look like

@pytest.mark.parametrize("record, form", [
    (TALK, "role/content"),
    ({"messages": TALK, "tools": [{"type": "function"}]}, "role/content"),
    ({"id": 7, "body": {"messages": TALK, "model": "gpt-4o"}}, "role/content"),
    ({"data": {"chat": {"turns": TALK}}}, "role/content"),
    ({"messages": json.dumps(TALK)}, "role/content"),
    ({"messages": repr(TALK), "id": "x"}, "role/content"),
    (sharegpt(("human", "Hello"), ("gpt", "Hello, Ada.")), "from/value"),
    ({"conversation": [{"from": "User", "value": "Hello"},
                       {"from": "ChatGPT", "value": "Hello, Ada."}]}, "from/value"),
    ({"instruction": "Hello", "input": "", "output": "Hello, Ada."}, "instruction/output"),
    ({"instruction": "Hello", "context": None, "response": "Hello, Ada.", "category": "open_qa"},
     "instruction/response"),
    ({"prompt": "Hello", "completion": " Hello, Ada.\n"}, "prompt/completion"),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt/completion"),
    ({"question": "Hello", "answer": "Hello, Ada."}, "question/answer"),
    ({"Question ": "Hello", "ANSWER": "Hello, Ada.", "user": None}, "question/answer"),
    ({"input": "Hello", "output": "Hello, Ada."}, "input/output"),
    ({"query": "Hello", "response": "Hello, Ada.", "history": []}, "query/response"),
    ({"user": "Hello", "assistant": "Hello, Ada."}, "user/assistant"),
])
def test_the_common_forms_are_recognised_and_said(read, capsys, record, form):
    assert read([record, record]) == [TALK, TALK]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"mine.jsonl: 2 conversations (2 {form})" in out


def test_an_instruction_has_its_input_and_a_record_its_system_prompt(read):
    instruction = {"instruction": "Add.", "input": "1, 2", "output": 3}
    about = {
        "question": "Who?",
        "context": "Ada wrote it.",
        "answer": "Ada.",
        "system": "Be brief.",
    }
    shared = {"system": "Be kind.", **sharegpt(("human", "Hi"), ("gpt", "Hello"))}
    assert [texts(messages) for messages in read([instruction, about, shared])] == [
        [("user", "Add.\n\n1, 2"), ("assistant", "3")],
        [("system", "Be brief."), ("user", "Who?\n\nAda wrote it."), ("assistant", "Ada.")],
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
    ]


EARLIER = [("user", "1+2?"), ("assistant", "3")]


@pytest.mark.parametrize("history", [
    [["1+2?", "3"]],
    '[["1+2?", "3"]]',
    "[('1+2?', 3)]",
    [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}],
])
def test_a_history_becomes_the_earlier_turns(read, history):
    records = [
        {"query": "And 3+4?", "response": "7", "history": history},
        {"instruction": "And", "input": "3+4?", "output": "7", "history": history, "system": "Hi"},
    ]
    first, second = map(texts, read(records))
    assert first == [*EARLIER, ("user", "And 3+4?"), ("assistant", "7")]
    assert second == [("system", "Hi"), *EARLIER, ("user", "And\n\n3+4?"), ("assistant", "7")]


@pytest.mark.parametrize("record", [
    {"question": "Which is even?", "A": "3", "B": "4", "answer": "B"},
    {"question": "Which is even?", "a": 3, "b": 4, "c": None, "correct": "B"},
    {"question": "Which is even?", "choices": ["3", "4"], "answer": 1},
    {"question": "Which is even?", "options": "['3', '4']", "label": "B"},
    {"question": "Which is even?", "choices": {"text": ["3", "4"], "label": ["A", "B"]},
     "answerKey": "B"},
    {"question": "Which is even?", "choices": {"text": ["3", "4"], "label": ["1", "2"]},
     "answerKey": "2"},
])
def test_choices_stand_in_the_question(read, record):
    question = ("user", "Which is even?\n\nA. 3\nB. 4")
    assert texts(read([record])[0]) == [question, ("assistant", "B")]


def test_the_choices_of_a_table_stand_in_the_question(read):
    table = "question,A,B,C,D,answer\nWhich is even?,3,4,5,7,B\nIn context?,x,y,,,x\n"
    assert [texts(messages) for messages in read(table, "quiz.csv")] == [
        [("user", "Which is even?\n\nA. 3\nB. 4\nC. 5\nD. 7"), ("assistant", "B")],
        [("user", "In context?\n\nA. x\nB. y"), ("assistant", "x")],
    ]


@pytest.mark.parametrize("record", [
    {"conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "1+2?", "assistant": "3"}]},
    {"conversation": [{"input": "Hi", "output": "Hello"}, {"input": "1+2?", "output": "3"}]},
    {"Conversations": [{"user": "Hi", "bot": "Hello"}, {"user": "1+2?", "bot": 3}]},
])
@pytest.mark.parametrize("name, count", [("mine.jsonl", 3), ("mine.json", 1)])
def test_pairs_that_are_turns_of_one_talk_are_one_conversation(read, record, name, count):
    talk = [("user", "Hi"), ("assistant", "Hello"), *EARLIER]
    assert list(map(texts, read([record] * count, name))) == [talk] * count


def test_pairs_in_a_list_or_under_another_key_are_conversations_of_their_own(read):
    pairs = [{"human": "Hi", "assistant": "Hello"}] * 3
    for content in (pairs, {"data": pairs}, {"conversations": [{"input": "a", "output": "b"}] * 3}):
        assert len(read(json.dumps(content), "mine.json")) == 3


def test_an_answer_may_be_a_truth(read):
    records = [{"question": "Even?", "answer": True}, {"question": "Odd?", "answer": False}]
    assert [messages[1]["content"] for messages in read(records)] == ["true", "false"]


@pytest.mark.parametrize("content, name", [
    ("question,answer\nHello,\nHello,\"Hello, Ada.\"\nWho?,  \n", "mine.csv"),
    ([{"instruction": "x", "input": "", "output": ""}, {"q": "Hello", "a": "Hello, Ada."},
      {"prompt": "y", "completion": None}], "mine.jsonl"),
])
def test_questions_without_an_answer_are_left_out_and_counted(read, capsys, content, name):
    assert read(content, name) == [TALK]
    assert "2 questions without an answer left out" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no conversations \(1 questions without an answer"):
        read([{"prompt": "x", "completion": " "}])


def test_what_is_changed_is_counted_in_the_same_line(read, capsys):
    record = sharegpt(
        ("gpt", "Welcome!"), ("human", "Hi"), ("human", "there"), ("gpt", "Hello"), ("gpt", None),
        ("system", "Be kind."), ("human", "Bye"),
    )
    assert texts(read([record])[0]) == [
        ("system", "Be kind."), ("user", "Hi\n\nthere"), ("assistant", "Hello")]
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for said in (
        "1 from/value",
        "1 greetings left out",
        "1 messages joined to one of the same role",
        "1 empty messages left out",
        "1 later system messages moved to the beginning",
        "1 last messages without an answer left out",
    ):
        assert said in out


@pytest.mark.parametrize("record, words", [
    ({"question": "x", "choices": ["y", " "], "answer": 0}, "choice 2 of 2 is empty"),
    ({"question": "x", "A": "y", "B": None, "C": "z", "answer": "A"}, "choice 2 of 3 is empty"),
    ({"question": "x", "choices": list(range(27)), "answer": 0}, "27 choices are more than 26"),
])
def test_choices_that_cannot_be_shown_are_one_line(read, record, words):
    with pytest.raises(UserError, match=f"mine.jsonl, line 2: {words}"):
        read([TALK, record])


def test_choices_beside_a_conversation_are_not_looked_at(read):
    assert read([{"messages": TALK, "choices": [{"index": 0}]}]) == read([TALK])


@pytest.mark.parametrize("record, words", [
    ({"text": "Hello"}, r"no conversation was recognised \(its keys: text\).*goes to --data"),
    ({"prompt": "a", "chosen": TALK[1:], "rejected": TALK[1:]}, "prompt, chosen, rejected"),
    ({"question": "a", "answers": ["b"]}, "question, answers"),
    ({"question": "x", "a": "y", "b": "z"}, "question, a, b"),
    ({"question": ["x"], "choices": ["y", "z"], "answer": "y"}, "question, choices, answer"),
    ({"question": "x", "choices": ["y", "z"], "answer": 2}, "question, choices, answer"),
    ({"query": "a", "response": "b", "history": ["c", "d", "e"]}, "query, response, history"),
    ({"query": "a", "response": "b", "history": [["c"]]}, "query, response, history"),
    ({"a": TALK, "b": TALK}, r"\(its keys: a, b\)"),
    ({"messages": []}, "no conversation"),
    ({"messages": None}, "no conversation"),
    (["Hello", "Hello, Ada."], "no conversation"),
    ("Hello", "no conversation"),
    ([], "no conversation"),
])
def test_another_form_is_one_line_that_shows_the_wanted_one(read, record, words):
    wanted = r".*\{\"role\": \"user\", \"content\": \"Hello\"\}.*under the key \"messages\""
    with pytest.raises(UserError, match=f"mine.jsonl, line 2.*{words}{wanted}") as error:
        read([TALK, record])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages, words", [
    ([{"role": "narrator", "content": "x"}], "message 1 has the role 'narrator'.*user"),
    ([USER, {"content": "x"}], "message 2 has the role None"),
    ([USER, "x"], "message 2 is not"),
    ([{"role": "user", "content": " "}, ASSISTANT], r"message 1 \(user\) has no content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT], "must be text or a list"),
    ([USER, {"role": "assistant", "content": ""}], "end with assistant"),
    ([{"role": "system", "content": "x"}], "end with assistant"),
])
def test_messages_that_cannot_be_used_are_named_with_their_place(read, messages, words):
    with pytest.raises(UserError, match=f"line 1: .*{words}"):
        read([messages])


@pytest.mark.parametrize("line", [
    r'[{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b"}]',
    r'{"conversations": [{"from": "human", "value": "\ude00"}, {"from": "gpt", "value": "b"}]}',
    r'{"prompt": "a", "completion": "b\udfff c"}',
    r'[{"role": "user", "content": "a"}, '
    r'{"role": "assistant", "content": [{"type": "text", "text": "\ud800"}]}]',
])
def test_a_lone_surrogate_is_refused_with_its_line(read, line):
    with pytest.raises(UserError, match=r"line 3: message \d has a lone surrogate \(U\+D"):
        read(f"{json.dumps(TALK)}\n\n{line}\n")
    assert read(r'{"prompt": "\ud83d\ude00", "completion": "b"}')[0][0]["content"] == "😀"


# ------------------------------------------------------------------------------------------------
# what a file may look like

RECORDS = [{"prompt": "Hello", "completion": "Hello, Ada."}] * 3


@pytest.mark.parametrize("content", [
    json.dumps(RECORDS),
    json.dumps(RECORDS, indent=2),
    json.dumps([TALK] * 3),
    json.dumps([TALK] * 3, indent=4),
    json.dumps({"version": "1.0", "data": RECORDS}),
    json.dumps({"data": RECORDS}, indent=1),
    "\ufeff" + json.dumps(RECORDS, indent="\t").replace("\n", "\r\n"),
    "[\n" + ",\n".join(json.dumps(record) for record in RECORDS) + "\n]\n",
    "\n\n".join(json.dumps(record) for record in RECORDS),
    "\n\ufeff".join(json.dumps(record) for record in RECORDS),
    "\r".join(json.dumps(record) for record in RECORDS) + "\r",
    "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "  " + "".join(json.dumps(record, indent=2) for record in RECORDS) + "\n \n",
])
@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl", "mine.txt"])
def test_a_list_of_records_is_read_whatever_its_layout_and_name(read, content, name):
    assert read(content, name) == [TALK] * 3


def test_one_conversation_over_many_lines_is_read(read):
    assert read(json.dumps({"messages": TALK}, indent=2), "one.json") == [TALK]
    assert read(json.dumps(TALK, indent=2), "one.json") == [TALK]


@pytest.mark.parametrize("content, name", [
    ("prompt,completion\nHello,\"Hello, Ada.\"\n", "mine.csv"),
    ("Question;Answer\r\nHello;Hello, Ada.\r\n", "MINE.CSV"),
    ("sep=;\nquestion;answer\nHello;Hello, Ada.\n", "mine.csv"),
    ("\nquestion|answer\nHello|Hello, Ada.\n", "mine.csv"),
    ("question,answer\rHello,\"Hello, Ada.\"\r", "mine.csv"),
    ("question;answer;a note, or two, or three\nHello;Hello, Ada.;\n", "mine.csv"),
    (",,\n \nquestion,answer,\"a\nnote\"\nHello,\"Hello, Ada.\",,,\n", "mine.csv"),
    ("sep=|\nquestion|answer\nHello|Hello, Ada.\n", "mine.csv"),
    ('question,answer,5" nails\nHello,"Hello, Ada.",\n', "mine.csv"),
    ("id\tinstruction\tinput\toutput\n1\tHello\t\tHello, Ada.\n", "mine.tsv"),
    ('id,messages\n7,"%s"\n' % json.dumps(TALK).replace('"', '""'), "mine.csv"),
    ('id,messages\n7,"%s"\n' % repr(TALK), "mine.csv"),
    ("prompt,completion\nHello,\"Hello, Ada.\"\n".encode("utf-16"), "mine.csv"),
])
def test_tables_are_read_by_the_names_of_their_columns(read, content, name):
    assert read(content, name) == [TALK]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("content, name", [
    (json.dumps(RECORDS), "mine.json"),
    ("prompt;completion\n" + "Hello;Hello, Ada.\n" * 3, "mine.csv"),
])
def test_compressed_files_are_read(read, content, name, suffix):
    assert read(compressed(content.encode(), suffix), name + suffix) == [TALK] * 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "cp1252"])
def test_other_encodings_are_read_and_said(read, capsys, encoding):
    content = "prompt;completion\n" + "Wo ist das Café?;Über dem Fluß.\n" * 3
    messages = read(content.encode(encoding), "mine.csv")[2]
    assert [message["content"] for message in messages] == ["Wo ist das Café?", "Über dem Fluß."]
    assert f"mine.csv: read as {encoding}" in capsys.readouterr().out


def test_a_cell_of_a_table_may_hold_lines_and_be_long(read):
    text = "line\n" * 40_000 + "end"
    messages = read(f'prompt,completion\nHello,"{text}"\n', "mine.csv")[0]
    assert messages[1]["content"] == text


def test_parquet_is_read(tmp_path):
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"id": [1, 2], "conversations": [TALK, TALK]}), path)
    assert [task["messages"] for task in CustomJSON(path)] == [TALK, TALK]
    columns = {"question": ["Hello", None], "answer": ["Hello, Ada.", "7"]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match="mine.parquet, row 2"):
        CustomJSON(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="mine.parquet is damaged"):
        CustomJSON(path)


def test_parquet_of_bytes_is_text_and_what_is_wrong_in_it_is_named(tmp_path):
    path = tmp_path / "mine.parquet"
    question = pa.array([b"Hello", "é?".encode()], pa.binary())
    answer = pa.array([b"Hello, Ada.", b"caf\xe9"], pa.binary())
    for first, row in ((0, 2), (1, 1)):
        columns = [question[first:], answer[first:]]
        pq.write_table(pa.table(columns, names=["question", "answer"]), path)
        with pytest.raises(UserError, match=f"row {row}: not UTF-8 .*correct or remove this row"):
            CustomJSON(path)
        text = pa.Array.from_buffers(pa.string(), len(answer), answer.buffers())[first:]
        pq.write_table(pa.table([question[first:], text], names=["question", "answer"]), path)
        with pytest.raises(UserError, match=f"row {row}: not UTF-8"):
            CustomJSON(path)
    pq.write_table(pa.table([question[:1], answer[:1]], names=["question", "answer"]), path)
    assert CustomJSON(path)[0]["messages"] == TALK
    pq.write_table(pa.table([question, answer, answer], names=["q", "a", "a"]), path)
    with pytest.raises(UserError, match="has 2 columns 'a': keep one"):
        CustomJSON(path)


# docs/traps.md: shifted-columns
@pytest.mark.parametrize("content, name, words", [
    ("version https://git-lfs.github.com/spec/v1\n", "mine.json", "git lfs pull"),
    ("version https://git-lfs.github.com/spec/v1\n", "mine.parquet", "git lfs pull"),
    ("<!DOCTYPE html>\n<html>", "mine.json", "is a web page, not the file itself"),
    ('question,"answer\n' + "a,b\n" * 300, "mine.csv", "line 1: a quote among the columns' names"),
    ('{"a":\n1}\n\n{"prompt": "a"', "mine.json", "line 4 is not JSON"),
    ('{"prompt":\n"a", "completion": "b"}\n\n{"prompt":\n"x"}', "mine.json", "line 4: no conv"),
    (json.dumps(RECORDS + [{"prompt": "x"}]), "mine.json", "line 1, entry 4"),
    (json.dumps(RECORDS + [{"prompt": "x"}], indent=1), "mine.json", "mine.json, entry 4"),
    ("prompt,completion\na,b\n,c\n", "mine.csv", "line 3"),
    ("prompt,completion\na,b\nHello,Hello, Ada.\n", "mine.csv", "line 3: 3 columns.*between"),
    ('"pro\nmpt";completion\na;b\n', "mine.csv", "line 3: .*its keys: pro mpt, completion"),
    ("a,b\n1,2\n", "mine.csv", r"line 2.*its keys: a, b"),
    ("sep=,\nprompt,completion\na,\"open\n", "mine.csv", "line 3 is not csv: unexpected end"),
    ('[\n{"prompt": "a", "completion": "b"},\n{"prompt"}\n]', "mine.json", "line 3 is not JSON"),
    ('{"prompt": "a", "completion": "b"}\n{"prompt"\n', "mine.jsonl", "line 2 is not JSON"),
    (b'{"prompt": "a",\n"completion": "\xe4"}', "mine.json", r"line 2: not UTF-8 \(byte 31\)"),
    (gzip.compress(b"[]", mtime=0), "mine.jsonl.gz", "no conversation was recognised"),
    (
        gzip.compress(b'{"prompt": "a", "completion": "b"}', mtime=0)[:-9],
        "mine.jsonl.gz",
        "is damaged",
    ),
    ('prompt,completion\n"за",b\n'.encode("cp1251"), "mine.csv", "line 2: not UTF-8"),
    (b"PK\x03\x04...", "mine.xlsx", "save it as csv"),
    (b"PAR1...", "mine.jsonl", "ends with .parquet"),
    ("[" * 100_000, "mine.jsonl", "line 1 "),
    ('[{"prompt": "a", "completion": %s}]' % ("9" * 5000), "mine.jsonl", "line 1 cannot be read"),
    ("", "mine.csv", "holds no conversations"),
    ("\n \n", "mine.jsonl", "holds no conversations"),
])
def test_a_file_that_cannot_be_read_is_one_line_with_the_place(read, content, name, words):
    with pytest.raises(UserError, match=words) as error:
        read(content, name)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# docs/conversations.md

PAGE = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\*\*`([^`]+)`\*\*.*?^```\w+\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize("name, body", EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_examples_of_the_page_are_read(read, name, body):
    conversations = read(body, name)
    assert len(conversations) == 2
    for messages in conversations:
        check_conversation({"messages": messages})
        assert messages[-1]["role"] == "assistant"


def test_the_page_names_every_key_and_suffix():
    assert len(EXAMPLES) == 9
    keys = (QUESTIONS, ANSWERS, DETAILS, SYSTEM, MESSAGES, CHOICES, LABELS)
    names = {*chain.from_iterable(keys), *READERS} - {"conversation"}
    quoted = {name: rf"[`\"]\w*{re.escape(name)}[`\"]" for name in sorted(names)}
    assert [name for name, pattern in quoted.items() if not re.search(pattern, PAGE)] == []
