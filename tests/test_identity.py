"""Who the model is: a name of the user's choice, and the user's own answers in place of ours."""
import pytest

from nanochat.common import UserError
from tasks.common import conversation
from tasks.identity import (
    MAX_NAME,
    NAME,
    TOPICS,
    Identity,
    check_name,
    choose_identity,
    identity_of,
    names,
    own_identity,
    shown_name,
)

BOB = [
    ("What is your name?", "My name is Bob."),
    ("Who are you?", "I am Bob."),
    ("Hi! What should I call you?", "Call me Bob, please."),
    ("Wie heißt du?", "Mein Name ist Bob."),
]


def talks(pairs):
    return [conversation(*pair) for pair in pairs]


def all_text(task):
    items = [task[i]["messages"] for i in range(len(task))]
    return "\n".join(message["content"] for messages in items for message in messages)


# ------------------------------------------------------------------------------------------------
# the name

@pytest.mark.parametrize("name", ["Bob", "Mr. O'Brien", "{name} \\1", "小明", "R2-D2", "nanochat"])
def test_a_name_is_everywhere_and_ours_nowhere(name):
    for split in ("train", "test"):
        task = Identity(split, name)
        assert len(task) == len(Identity(split))
        for i in range(len(task)):
            expected = task[i]["messages"][1]["content"]
            assert name in expected and task.evaluate(task[i], expected)
            assert not task.evaluate(task[i], "I am somebody.")
        assert (NAME in all_text(task)) == (name == NAME)
    asked = {item["messages"][0]["content"].lower().rstrip("?") for item in Identity("train", name)}
    assert f"what is {name}".lower() in asked


def test_a_name_counts_as_a_word_of_its_own():
    assert names("Al", "I am AL.") and not names("Al", "I also know")
    assert names("C++", "c++!") and names("小明", "我叫 小明。")


@pytest.mark.parametrize("name, kept", [(" Bob\t", "Bob"), (None, None), ("x" * 60, "x" * 60)])
def test_names_that_are_taken(name, kept):
    assert check_name(name) == kept


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x1b[2J", "\ud83d", "x" * (MAX_NAME + 1)])
def test_names_that_are_refused_in_one_line(name):
    with pytest.raises(UserError) as error:
        check_name(name)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# the user's own answers

def test_own_answers_are_found_by_question_or_by_answer():
    own = own_identity(talks([
        *BOB, ("hello there", "Ahoy!"), ("6*7?", "42"), ("Good morning. Who made you", "Ann."),
    ]))
    assert own[0] == [list(pair) for pair in BOB]
    assert own[3] == [["Good morning. Who made you", "Ann."]] and own[4][0][1] == "Ahoy!"
    assert own[1] == own[2] == []


@pytest.mark.parametrize("question, answer", [
    ("How do I reach you?", "You can call me at 555-1234."),
    ("How does Moby Dick begin?", "It begins: Call me Ishmael."),
    ("What does he say?", "He says that my name is Ann."),
    ("What do you want?", "Call me when it is time."),
    ("Wie geht's?", "Mein Name ist nicht wichtig."),
])
def test_what_only_sounds_like_a_name_is_not_who_the_model_is(question, answer):
    assert choose_identity(None, talks([(question, answer)])).name == NAME
    assert not any(own_identity(talks([(question, answer)])))


@pytest.mark.parametrize("answer", [
    "My name is Bob.", "Hello there! You can call me Bob.", "Sure, my name is Bob.",
    "Hallo! Ich heiße Bob.", "  I'm called Bob.",
])
def test_an_answer_that_begins_with_the_name_says_it_whatever_was_asked(answer):
    assert choose_identity(None, talks([("And?", answer)])).name == "Bob"


def test_a_name_in_other_scripts_is_found():
    assert choose_identity(None, talks([("你叫什么?", "你好！我叫小明。")])).name == "小明"
    assert choose_identity(None, talks([("?!", "Меня зовут Анна.")])).name == "Анна"
    assert choose_identity(None, talks([("?!", "Меня зовут не так.")])).name == NAME


def test_a_part_that_a_system_message_gives_is_not_who_the_model_is():
    messages = [{"role": "system", "content": "You are Ada."}]
    messages += conversation(*BOB[0])["messages"]
    assert not any(own_identity([{"messages": messages}]))


def test_the_name_in_the_users_answers_becomes_the_models():
    who = choose_identity(None, talks(BOB))
    assert who.name == "Bob" and "call the model Bob" in who.message
    for split in ("train", "test"):
        text = all_text(Identity(split, who.name, who.own))
        assert "Bob" in text and NAME not in text
    given = choose_identity("Robert", talks(BOB))
    assert given.name == "Robert", "what was asked for counts more"


@pytest.mark.parametrize("answers", [
    ("I am a pirate.", "I am a pirate."),
    ("My name is Bob.", "My name is Rob."),
    ("I'm not telling.", "No."),
])
def test_without_one_name_the_other_answers_name_nobody(answers):
    who = choose_identity(None, talks(zip(("Who are you?", "What's your name?"), answers)))
    assert who.name is None
    for split in ("train", "test"):
        task = Identity(split, who.name, who.own)
        text = all_text(task)
        assert NAME not in text and "None" not in text and "{" not in text
        for i in range(len(task)):
            assert task.evaluate(task[i], task[i]["messages"][1]["content"])
            assert not task.evaluate(task[i], "I am nanochat.")


def test_a_question_gets_the_answer_to_the_question_most_like_it():
    own = own_identity(talks([("Are you a human?", "No."), ("What are you?", "A parrot.")]))
    items = {question: answers for question, answers in Identity("train", "Bob", own).items}
    assert items["are you a human?"] == items["are you a robot?"] == ("No.",)
    assert items["what kind of model are you?"] == ("A parrot.",)
    assert items["who are you?"] == ("I am Bob.", "My name is Bob."), "another topic keeps ours"


def test_without_own_answers_nothing_changes():
    assert choose_identity(None, talks([("6*7?", "42")])) == (NAME, [[] for _ in TOPICS], "")
    assert choose_identity("Bob").name == "Bob"
    plain, same = Identity("train"), Identity("train", NAME, [[] for _ in TOPICS])
    assert [plain[i] for i in range(50)] == [same[i] for i in range(50)]


# ------------------------------------------------------------------------------------------------
# what the checkpoint says

def test_a_checkpoint_says_who_the_model_is():
    assert identity_of({}) == (NAME, None) and shown_name({}) == NAME
    assert identity_of({"name": "Bob", "own_identity": [[], []]}) == ("Bob", [[], []])
    assert identity_of({"name": None})[0] == NAME
    own = [[["Who are you?", "A pirate."]]]
    assert identity_of({"name": None, "own_identity": own}) == (None, own)
    assert shown_name({"name": "Bob\x1b"}) == "Bob" and shown_name({"name": None}) == NAME


def test_a_model_of_the_users_text_does_not_say_that_it_knows_python():
    own = [conversation["messages"][1]["content"] for conversation in everything(True)]
    usual = [conversation["messages"][1]["content"] for conversation in everything(False)]
    assert not [text for text in own if "Python" in text]
    assert any("Python" in text for text in usual) and any("your text" in text for text in own)


def everything(quotes_text):
    task = Identity("train", quotes_text=quotes_text)
    return [task[i] for i in range(len(task))]
