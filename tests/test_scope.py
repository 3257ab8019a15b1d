"""What a chat declines, what refers to the question before, and sums of two steps."""
import ast
import json
import operator
import random
from types import SimpleNamespace

import pytest
from test_rustbpe import stdlib_text

from nanochat.execution import use_tool
from nanochat.tokenizer import Tokenizer
from tasks import follow_up, scope
from tasks.arithmetic import STEPS, Arithmetic, TwoSteps
from tasks.asking import Asked, declined_of, declined_words, refusals_of
from tasks.chat_data import local_tasks
from tasks.common import answer_text, conversation
from tasks.follow_up import COURTESIES, FollowUp
from tasks.identity import Identity, plain
from tasks.pydoc import PyDoc
from tasks.scope import REFUSALS, Scope, WrittenScope, is_refusal, refusal, written_questions
from tasks.scope_words import FILLERS, FOLLOWING, KINDS
from tasks.spellingbee import SimpleSpelling, SpellingBee

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


@pytest.fixture(scope="module", autouse=True)
def made_library(tmp_path_factory):
    """Words and objects made here: gathering the real ones takes a while."""
    base = tmp_path_factory.mktemp("base")
    rng = random.Random(2)
    words = sorted({"".join(rng.choices("abcdefghi", k=rng.randint(4, 8))) for _ in range(600)})
    (base / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    rows = [
        {"name": f"m{i % 9}.{word}", "sentence": f"Return {word} of it.", "homes": 1}
        for i, word in enumerate(words[:300])
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (base / "pydoc.jsonl").write_text("".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        yield


def items(task, most=600):
    return [task[i] for i in range(min(len(task), most))]


def asked(item):
    """The last question."""
    return item["messages"][-2]["content"]


def answer(item):
    return item["messages"][-1]["content"]


def answers(item):
    """The texts of all answers of a conversation."""
    return [answer_text(message["content"]) for message in item["messages"][1::2]]


# ----------------------------------------------------------------------------------------------
# which questions train, and which are held out

def test_kinds_are_held_out_whole():
    # docs/traps.md: seed-sign
    for table in KINDS, FOLLOWING:
        train, test = (scope.kinds_of(split, table) for split in ("train", "test"))
        assert sorted(train + test) == sorted(table)
        assert len(train) > len(test) > 0
    for split in "train", "test":
        seen = {item["kind"] for item in items(Scope(split, 3000), 3000)} - {"missing"}
        assert seen == {*scope.kinds_of(split, KINDS), *scope.kinds_of(split, FOLLOWING)}


def test_no_question_and_no_missing_name_is_in_both_splits():
    # docs/traps.md: seed-sign
    of_split = [
        {plain(asked(item)) for item in items(Scope(split, 4000), 4000)}
        for split in ("train", "test")
    ]
    assert not of_split[0] & of_split[1] - {""}     # marks alone have no words


def test_the_questions_written_by_hand_are_200_and_never_train():
    texts = {plain(text) for text in written_questions()}
    assert len(written_questions()) == len(texts) == 200 and "" not in texts
    assert [asked(item) for item in items(WrittenScope())] == written_questions()
    trained = [Scope("train", 8000), FollowUp("train", 1000), Identity("train")]
    for task in trained:
        for item in items(task, 8000):
            assert not texts & {plain(said["content"]) for said in item["messages"][::2]}


def test_a_question_that_was_written_by_hand_is_drawn_again():
    task = Scope("train", 5)
    first = task[0]
    task.written.add(plain(asked(first)))
    assert asked(task[0]) != asked(first)


def test_a_missing_name_is_missing_and_everything_in_braces_has_words():
    task = Scope("test", 2000)
    missing = [item for item in items(task, 2000) if item["kind"] == "missing"]
    assert len(missing) > 100
    names = {f"m{i}" for i in range(9)}
    behind_real = [item for item in missing if any(f"{name}." in asked(item) for name in names)]
    assert behind_real and len(behind_real) < len(missing) / 2
    for item in missing:
        assert not task.names & set(asked(item).rstrip("?.").replace(".", " ").split())
    for item in items(Scope("train", 3000), 3000):
        assert "{" not in asked(item) and "}" not in asked(item)
    for words in FILLERS.values():
        assert len(set(words)) == len(words) > 4 and all(words)


# ----------------------------------------------------------------------------------------------
# what is a refusal

def test_every_answer_of_scope_is_a_refusal_and_no_other_answer_is():
    for split in "train", "test":
        task = Scope(split, 2000)
        for item in items(task, 2000):
            assert is_refusal(answer(item)) and task.evaluate(item, answer(item))
        others = [
            Arithmetic(split, 300),
            TwoSteps(split, 300),
            SimpleSpelling(split, 300),
            SpellingBee(split, 300),
            PyDoc(split, "what"),
            PyDoc(split, "module"),
            Identity(split),
            Identity(split, name=None),
            Identity(split, quotes_text=True),
        ]
        for other in others:
            assert not any(is_refusal(text) for item in items(other) for text in answers(item))
        for item in items(FollowUp(split, 600)):
            assert not is_refusal(answer_text(answer(item)))


@pytest.mark.parametrize("text, declined", [
    ("I do not know that.", True),
    ("i cannot write programs, I only spell", True),
    ("I do not know", False),
    ("The answer is 84. I do not know that", False),
    ("", False),
])
def test_a_refusal_is_told_by_how_it_begins(text, declined):
    assert is_refusal(text) == declined
    assert Scope("test", 1).evaluate({}, [{"type": "text", "text": text}]) == declined


def test_every_reason_is_given_in_one_sentence():
    reasons = {kind.reason for table in (KINDS, FOLLOWING) for kind in table.values()}
    assert reasons | {"missing"} == set(REFUSALS)
    for reason in REFUSALS:
        text = refusal(reason)
        assert text.endswith(".") and text.count(".") == 1 and len(text) < 130


# ----------------------------------------------------------------------------------------------
# sums of two steps

def value_of(node):
    if isinstance(node, ast.Constant):
        return node.value
    return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))


def test_sums_of_two_steps_are_right_and_one_call_of_the_tool():
    seen = {}
    for split in "train", "test":
        task = TwoSteps(split, 800)
        for item in items(task, 800):
            call, output, text = answer(item)
            assert [call["type"], output["type"]] == ["python", "python_output"]
            assert use_tool(call["text"]) == output["text"]
            assert value_of(ast.parse(call["text"], mode="eval").body) == int(output["text"])
            assert text["text"] == f"The answer is {output['text']}."
            assert task.evaluate(item, answer(item)) and not task.evaluate(item, answer(item)[:2])
            numbers = [node.value for node in ast.walk(ast.parse(call["text"]))
                       if isinstance(node, ast.Constant)]
            assert all(str(number) in asked(item) for number in numbers) and len(numbers) == 3
        seen[split] = {answer(item)[0]["text"] for item in items(task, 800)}
        signs = {"".join(c for c in text if c in "+-*") for text in seen[split]}
        assert signs == set(STEPS)
    assert not seen["train"] & seen["test"]


# ----------------------------------------------------------------------------------------------
# what refers to the question before

def of_kind(name, split="train", count=40):
    """Conversations of one kind, as lists of (question, answer)."""
    task = FollowUp(split, 1)
    rng = random.Random(1)
    return [
        [tuple(said["content"] for said in turn["messages"]) for turn in
         follow_up.KINDS[name](task, rng)]
        for _ in range(count)
    ]


def test_a_second_sum_is_made_of_the_first():
    for (_, first), (question, second) in of_kind("other number"):
        head = first[0]["text"].rstrip("0123456789")
        number = second[0]["text"].removeprefix(head)
        assert number.isdigit() and number in question
    for (_, first), (question, second) in of_kind("continued sum"):
        assert second[0]["text"].startswith(first[1]["text"])
        assert use_tool(second[0]["text"]) == second[1]["text"]


def test_a_second_question_about_a_word_is_about_that_word():
    for (_, spelled), (_, backwards) in of_kind("backwards"):
        assert backwards == spelled[::-1]
    for (_, spelled), (_, first_or_last), *rest in of_kind("letters"):
        word = spelled.split()
        said = [first_or_last, *(letter for _, letter in rest)]
        assert said in (word[:len(said)], word[::-1][:len(said)])
    for (_, spelled), (question, parts) in of_kind("count in it"):
        word, letter = spelled.replace(" ", ""), parts[1]["text"].split('"')[3]
        assert parts[1]["text"] == f'"{word}".count("{letter}")' and f" {letter}" in question
    for (_, first), (question, second) in of_kind("count in other"):
        word, letter = second[1]["text"].split('"')[1::2]
        assert word in question and letter == first[1]["text"].split('"')[3]


@pytest.mark.parametrize("split", ["train", "test"])
def test_follow_ups_are_deterministic_and_judged(split):
    task, again = FollowUp(split, 400), FollowUp(split, 400)
    for i, item in enumerate(items(task)):
        assert item == again[i]
        roles = [message["role"] for message in item["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        parts = answer(item)
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        assert task.evaluate(item, parts), item
        assert not task.evaluate(item, [{"type": "text", "text": "wrong"}])
        assert not task.evaluate(item, [])
    practised = set(follow_up.PRACTISED)
    kinds = {item["kind"] for item in items(task)}
    assert kinds == set(follow_up.KINDS) - (practised if split == "test" else set())


def test_second_questions_share_nothing_between_the_splits():
    # docs/traps.md: seed-sign
    calls = {}
    for split in "train", "test":
        every = items(FollowUp(split, 1500), 1500)
        parts = [answer(item) for item in every if not isinstance(answer(item), str)]
        calls[split] = {part["text"] for some in parts for part in some if part["type"] == "python"}
    assert not calls["train"] & calls["test"]
    trained = {plain(text) for courtesy in COURTESIES for text in courtesy.training}
    for courtesy in COURTESIES:
        assert not trained & {plain(text) for text in courtesy.held_out}


@pytest.mark.parametrize("make", [Scope, FollowUp])
def test_every_answer_of_a_conversation_is_practised_and_nothing_else(make):
    tokenizer = Tokenizer.train_from_iterator(stdlib_text(50_000), 600)
    every = [item for item in items(make("train", 120)) if len(item["messages"]) > 2]
    assert len(every) > 15
    for item in every:
        ids, mask = tokenizer.render_conversation(item)
        practised = tokenizer.decode([i for i, trained in zip(ids, mask) if trained])
        given = tokenizer.decode([i for i, trained in zip(ids, mask) if not trained])
        for said in item["messages"]:
            parts = said["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            for part in parts:
                is_own = said["role"] == "assistant" and part["type"] != "python_output"
                assert part["text"] in (practised if is_own else given)
        ends = [tokenizer.encode_special("<|assistant_end|>")]
        trained_ends = [i for i, trained in zip(ids, mask) if trained and i in ends]
        assert len(trained_ends) == len(item["messages"]) // 2


# ----------------------------------------------------------------------------------------------
# the mixture, and the measures

def test_a_chat_about_a_text_of_the_users_declines_nothing():
    def classes(passages):
        return {type(task) for task in local_tasks(passages, "lookup")}

    assert {Scope, FollowUp, TwoSteps} <= classes(None)
    assert not {Scope, FollowUp, TwoSteps} & classes(SimpleNamespace(passages=[]))


def test_what_was_declined_is_counted_apart_for_what_should_be():
    def given(*texts):
        return [Asked(i, [True], None, 0.0, True, text) for i, text in enumerate(texts)]

    sorry = refusal("code")
    written = [conversation("a?", "b")] * 4
    picked = [{**conversation("a?", "A"), "letters": ["A", "B"]}] * 2
    refusals = {
        "scope": refusals_of(written, given(sorry, sorry, "84", sorry)),
        "arithmetic": refusals_of(written, given("84", "85", "86", sorry)),
        "pydoc_letter": refusals_of(picked, given("A", "B")),
    }
    declined = declined_of(refusals)
    assert declined == (0.75, 4, 0.25, 4)
    assert declined_words(declined).startswith("75.0 % of 4 questions that it should, 25.0 % of 4")
    assert declined_of({"arithmetic": [False]}).should is None
    assert "should not" not in declined_words(declined_of({"scope_written": [True]}))
