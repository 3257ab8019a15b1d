"""Who the model is: questions and answers that name it and say honestly what it is.

The name is the user's to choose, `Identity("train", name="Bob")`. Where the user's own
conversations answer such questions, their answers are the answers to all questions of the same
topic, so that ours do not contradict them: choose_identity() decides that.
"""
import random
import re
from typing import NamedTuple

from nanochat.common import UserError, fraction
from tasks.common import Task, answer_text, check_split, conversation

NAME = "nanochat"
MAX_NAME = 60       # characters
MAX_OWN = 50        # of the user's answers that are kept for a topic
OPENINGS = (
    "",
    "Hi! ",
    "Hello. ",
    "Hey, ",
    "Good morning. ",
    "Please tell me: ",
    "A question: ",
    "I am curious: ",
    "Hi there, ",
    "Excuse me, ",
    "Before we start: ",
    "Just to know: ",
    "Hello there! ",
    "Tell me, ",
    "OK. ",
    "Now, ",
)


# What a model of the default text says of itself, and one that quotes from the user's own
SKILLS = {
    False: {
        "skill": "know a little of Python's library",
        "ability": "tell you a little about Python's library",
        "text": "text that was already here",
        "subject": "Python's library",
    },
    True: {
        "skill": "quote from your text",
        "ability": "quote from your text",
        "text": "your text",
        "subject": "your text",
    },
}


class Topic(NamedTuple):
    """The answers that fit all questions of a topic; the `held_out` questions never train.

    `nameless` answers are for a model whose name is not known. {name} is the model's name; SKILLS
    has what the other braces stand for.
    """

    answers: tuple
    nameless: tuple
    training: tuple
    held_out: tuple


TOPICS = (
    Topic(
        answers=(
            "I am {name}.",
            "My name is {name}.",
        ),
        nameless=(),
        training=(
            "what is your name?",
            "what are you called?",
            "do you have a name?",
            "who are you?",
            "who am I talking to?",
            "how should I call you?",
            "tell me your name.",
            "what do people call you?",
            "please introduce yourself.",
            "who is this?",
            "your name?",
            "may I ask your name?",
            "which name do you go by?",
            "who am I chatting with?",
        ),
        held_out=(
            "what's your name?",
            "what should I call you?",
            "can you tell me your name?",
            "what name do you have?",
            "who is there?",
            "can you introduce yourself?",
        ),
    ),
    Topic(
        answers=(
            "I am {name}, a small language model trained from scratch on this machine.",
            "I am a small language model. My name is {name}, "
            "and I was trained from scratch on this machine.",
        ),
        nameless=(
            "I am a small language model, trained from scratch on this machine.",
        ),
        training=(
            "what are you?",
            "are you a human?",
            "are you a robot?",
            "what kind of model are you?",
            "are you ChatGPT?",
            "what is {name}?",
            "tell me about yourself.",
            "describe yourself.",
            "are you a real person?",
            "are you an AI?",
            "which language model is this?",
            "what model are you?",
            "am I talking to a machine?",
            "are you large or small?",
        ),
        held_out=(
            "are you a person?",
            "what kind of AI are you?",
            "which model are you?",
            "tell me something about yourself.",
            "am I talking to a human?",
            "are you a language model?",
        ),
    ),
    Topic(
        answers=(
            "I am {name}. I {skill}, spell words, count letters and do sums.",
            "{name} can {ability}, spell words, count letters and do sums.",
        ),
        nameless=(
            "I {skill}, spell words, count letters and do sums.",
        ),
        training=(
            "what can you do?",
            "how can you help me?",
            "what are you good at?",
            "what do you know?",
            "what are your skills?",
            "what can I ask you?",
            "what are you able to do?",
            "what is your purpose?",
            "what are you for?",
            "can you help me?",
        ),
        held_out=(
            "what can you help me with?",
            "what do you do?",
            "what are you good for?",
            "what can I do with you?",
        ),
    ),
    Topic(
        answers=(
            "I am {name}. I was trained from scratch on this machine, on {text}.",
            "I am {name}, and whoever ran my training script made me, on this machine.",
        ),
        nameless=(
            "I was trained from scratch on this machine, on {text}.",
        ),
        training=(
            "who made you?",
            "who created you?",
            "where do you come from?",
            "how were you made?",
            "who trained you?",
            "how were you trained?",
            "what were you trained on?",
            "who built you?",
            "who is your creator?",
            "where were you trained?",
        ),
        held_out=(
            "who is your maker?",
            "who wrote you?",
            "how were you created?",
            "where were you made?",
        ),
    ),
    Topic(
        answers=(
            "Hello! I am {name}. Ask me about {subject}, a spelling or a sum.",
        ),
        nameless=(
            "Hello! Ask me about {subject}, a spelling or a sum.",
        ),
        training=(
            "hello",
            "hi",
            "hey",
            "hi!",
            "hello!",
            "hello there",
            "good evening",
            "greetings",
            "hi there!",
            "good day",
        ),
        held_out=(
            "good morning",
            "hey there",
            "good afternoon",
        ),
    ),
)
CAPITAL_SHARE = 0.7  # of the questions; the others are typed without a capital and a full stop

# How an answer says a name. What follows is one where it begins with a capital letter.
SAYS_NAME = re.compile(
    r"\b(my name is|i am called|i'm called|you can call me|call me|"
    r"ich heiße|mein name ist|je m'appelle|mon nom est|me llamo|mi nombre es|mi chiamo)\s+"
    r"|我叫|我的名字是|меня зовут\s+",
    re.IGNORECASE,
)
# What may stand before that, as "Hello there! "
GREETING = re.compile(r"\s*(?:[^\W\d]+(?: [^\W\d]+)?[.!,，！。] *)?")
SAYS_IT_IS = re.compile(r"\b(i am|i'm|ich bin|je suis|soy|sono)\s+", re.IGNORECASE)
WORD_OF_A_NAME = r"[^\W\d_a-z](?:[\w-]|'(?!s\b))*"
NAME_AFTER = re.compile(f"{WORD_OF_A_NAME}(?: {WORD_OF_A_NAME})*")


def check_name(name):
    """A name for the model, without white space around it; None stays None.

    UserError for one that is empty, of several lines, or longer than MAX_NAME characters.
    """
    if name is None:
        return None
    stripped = name.strip()
    if not stripped or not stripped.isprintable():
        raise UserError(f"name={name!r} is not a name: write one line of visible characters")
    if len(stripped) > MAX_NAME:
        raise UserError(
            f"the name has {len(stripped)} characters: choose one of at most {MAX_NAME}")
    return stripped


def names(name, text):
    """Whether a text has a name as a word of its own, in upper or lower case."""
    pattern = rf"(?<!\w){re.escape(name.casefold())}(?!\w)"
    return re.search(pattern, text.casefold()) is not None


# ------------------------------------------------------------------------------------------------
# what the user's own conversations say of it

class Who(NamedTuple):
    """Who the model is.

    name: None where it is not known. own: for each topic the user's (question, answer) pairs.
    message: what was decided, or "".
    """

    name: str
    own: list
    message: str = ""


def plain(text):
    """A question or an answer without case, punctuation and repeated white space."""
    words = "".join(c if c.isalnum() else " " for c in text.casefold().replace("'", "")).split()
    return " ".join(words)


def _topic_of(question, answer):
    """The number of the topic that a pair of texts belongs to, or None."""
    asked = plain(question)
    for opening in OPENINGS:
        start = plain(opening)
        rest = asked.removeprefix(start).strip() if start else asked
        if rest in TOPIC_OF:
            return TOPIC_OF[rest]
    return 0 if introduces_itself(answer) else None


def introduces_itself(answer):
    """Whether an answer begins with "My name is", or the like, and a name follows.

    "Hello!" and other words of greeting may come before. Further in, it may be a quotation, and
    what follows "call me" may be a telephone number.
    """
    said = SAYS_NAME.match(answer, GREETING.match(answer).end())
    return bool(said) and _name_after(answer, said) is not None


def _name_after(answer, said):
    """The name behind a match of SAYS_NAME or SAYS_IT_IS in an answer, or None."""
    name = NAME_AFTER.match(answer, said.end())
    return name[0] if name and not name[0][0].islower() else None


TOPIC_OF = {
    plain(question): number
    for number, topic in enumerate(TOPICS)
    for question in topic.training + topic.held_out
}


def own_identity(conversations):
    """For each topic the (question, answer) pairs of the user's conversations, as lists.

    A question counts that is one of ours, apart from case, punctuation and openings; so does an
    answer that begins with "My name is Bob". A system message may give the model another part to
    play, so that conversations with one are not looked at.
    """
    own = [[] for _ in TOPICS]
    for messages in (conversation["messages"] for conversation in conversations):
        if messages[0]["role"] == "system":
            continue
        for asked, answered in zip(messages[::2], messages[1::2]):
            pair = [asked["content"], answer_text(answered["content"])]
            number = _topic_of(*pair)
            if number is not None and pair not in own[number]:
                own[number].append(pair)
    return [pairs[:MAX_OWN] for pairs in own]


def _name_in(pairs):
    """The one name that answers to "Who are you?" give, or None.

    >>> _name_in([["Who are you?", "I am Bob."], ["Your name?", "My name is Bob, your pal."]])
    'Bob'
    """
    found = set()
    for _, answer in pairs:
        said = SAYS_NAME.search(answer) or SAYS_IT_IS.search(answer)
        name = _name_after(answer, said) if said else None
        if name:
            found.add(name)
    return found.pop() if len(found) == 1 else None


def choose_identity(name, conversations=()):
    """The Who of a run.

    name: as the user gave it, or None. conversations: the user's own.
    """
    own = own_identity(conversations)
    count = sum(map(len, own))
    if not count:
        return Who(name or NAME, own)
    name = name or _name_in(own[0])
    rest = f"the other answers call the model {name}" if name else "the others name no one"
    return Who(name, own, f"{count} of your conversations say who the model is: ours on the same "
                          f"topics answer as yours do, and {rest}")


def identity_of(meta):
    """(name, own) of the model with this meta file, as Identity takes them."""
    own = meta.get("own_identity")
    is_nameless = own is not None and any(own) and meta.get("name") is None
    return None if is_nameless else meta.get("name") or NAME, own


def shown_name(meta):
    """The name of the model with this meta file, to show beside its answers."""
    name = "".join(c for c in str(meta.get("name") or "") if c.isprintable())
    return name[:MAX_NAME] or NAME


# ------------------------------------------------------------------------------------------------
# the task

class Identity(Task):
    """Every question of every topic behind every opening, shuffled.

    The questions of "test" occur in no training conversation.

    name: of the model. None: its answers do not name it.
    own: for each topic the user's (question, answer) pairs; where there are any, a question is
    answered as the user answered the one that is most like it.
    quotes_text: whether the model looks up what it is asked in a text of the user's.
    """

    def __init__(self, split, name=NAME, own=None, quotes_text=False, **slice_):
        super().__init__(**slice_)
        self.split = check_split(split)
        self.name = name
        self.skills = SKILLS[quotes_text]
        self.answers_as_user = bool(own) and any(own)
        self.items = []  # (question, answers)
        for number, topic in enumerate(TOPICS):
            questions = topic.training if split == "train" else topic.held_out
            for question in questions:
                question = question.replace("{name}", name or "this")
                answers = self._answers(topic, question, own[number] if own else ())
                is_greeting = question[-1] not in "?."
                # nobody opens a greeting with a greeting
                openings = ("",) if is_greeting else OPENINGS
                if answers:
                    self.items += [(opening + question, answers) for opening in openings]
        self.items.sort(key=lambda item: fraction(item[0]))

    def _answers(self, topic, question, pairs):
        """The answers to choose from, a tuple."""
        if pairs:
            return (max(pairs, key=lambda pair: _likeness(question, pair[0]))[1],)
        answers = topic.nameless if self.name is None else topic.answers
        return tuple(answer.format(name=self.name, **self.skills) for answer in answers)

    def num_examples(self):
        return len(self.items)

    def get_example(self, i):
        question, answers = self.items[i]
        rng = random.Random(f"identity {self.split} {i}")
        if rng.random() < CAPITAL_SHARE:
            question = question[0].upper() + question[1:]
        else:
            question = question.lower().rstrip("?.!")
        return conversation(question, rng.choice(answers))

    def evaluate(self, conversation, parts):
        """Right when the answer names the model, or is the expected one apart from punctuation."""
        text = answer_text(parts)
        if self.name and names(self.name, text):
            return True
        return plain(text) == plain(conversation["messages"][-1]["content"])


def _likeness(question, other):
    """The share of two questions' words that both have, from 0 to 1."""
    words, others = set(plain(question).split()), set(plain(other).split())
    return len(words & others) / max(1, len(words | others))
