"""Questions about the user's own text, made from the text itself: which one looks up what.

    OwnText("train", passages)                   # questions that are answered by looking up
    OwnText("train", passages, form="recall")    # the same from memory: answered with the sentence

The text's own structure says what can be asked. A heading or file name is a subject ("What do I
know about Beans?"), a definition ("Term: ...") and a row of a table name one, and so does whoever
speaks in a dialogue ("Name: ..."). A line with a question mark is a question. The rare words of any
sentence, behind a question word of the text's language, make one as people type it ("when beans
sow?").

In the form "lookup" the model has to decide only *that* the question is about the text, and calls

    lookup()

The engine then quotes the passage that nanochat/retrieval.py finds. A part of the questions is
about the world, of which the text need not speak: they are looked up as well, and nothing is found.

Headings are held out whole: what stands under a heading of the split "test" is never asked about
in training.
"""
import random
import re
from collections import Counter

from nanochat.conversation import LOOKUP_CALL, NOTHING_FOUND
from nanochat.prompts import QUESTIONS
from nanochat.retrieval import NOT_SURE, SURE, Answer, Quote, reply_to
from nanochat.words import language_of, words_of
from tasks.common import Task, answer_text, check_split, conversation, f1, split_of
from tasks.identity import TOPICS
from tasks.pydoc import PyDoc

FORMS = ("lookup", "recall")
OWN_EXAMPLES = 20_000

# s: a subject, such as a heading
SUBJECT_QUESTIONS = {
    "English": (
        "{s}?", "{s}", "What is {s}?", "What about {s}?", "Tell me about {s}.",
        "What do I know about {s}?", "What did I write about {s}?",
        "What do my notes say about {s}?", "Look up {s}.", "Find {s}.",
        "Do I have anything on {s}?", "Where did I write about {s}?",
        "What was it with {s}?", "Remind me of {s}.", "Details on {s}?", "I forgot: {s}?",
    ),
    "German": (
        "{s}?", "{s}", "Was ist {s}?", "Was steht zu {s}?", "Was weiß ich über {s}?",
        "Erzähl mir von {s}.", "Was habe ich über {s} geschrieben?", "Suche {s}.",
        "Wie war das mit {s}?", "Was sagen meine Notizen zu {s}?",
    ),
    "French": (
        "{s} ?", "{s}", "Qu'est-ce que {s} ?", "Que disent mes notes sur {s} ?",
        "Que sais-je de {s} ?", "Cherche {s}.", "Parle-moi de {s}.",
    ),
    "Spanish": (
        "¿{s}?", "{s}", "¿Qué es {s}?", "¿Qué dicen mis notas sobre {s}?", "¿Qué sé de {s}?",
        "Busca {s}.", "Háblame de {s}.",
    ),
    "Italian": ("{s}?", "{s}", "Che cos'è {s}?", "Cosa dicono i miei appunti su {s}?"),
    "Portuguese": ("{s}?", "{s}", "O que é {s}?", "O que dizem as minhas notas sobre {s}?"),
    "Dutch": ("{s}?", "{s}", "Wat is {s}?", "Wat weet ik over {s}?", "Zoek {s}."),
    "Chinese": ("{s}?", "{s}", "{s}是什么?", "关于{s}我写了什么?", "{s}怎么样?", "查一下{s}"),
    "Japanese": ("{s}?", "{s}", "{s}とは?", "{s}について教えて", "{s}は何ですか?"),
}
# What begins a question that continues with words of a sentence
OPENINGS = {
    "English": (
        "", "when", "where", "who", "why", "what", "which", "how", "how much", "how many",
        "how long", "how old", "what is the", "what was the", "where is the", "who is the",
        "when is the", "when did the", "what did the", "who did the", "which is the", "whose",
        "how much was the", "how much did the", "how many are in the", "how often does the",
        "what time is the", "what day is", "what colour is the", "where did I put the",
        "what does the", "how do I", "what kind of", "in which year", "is there a", "did I",
        "do we have", "what's the", "who's the", "where's the", "when's the", "number of the",
        "name of the", "date of", "address of", "phone number of", "price of the", "code for the",
    ),
    "German": (
        "", "wann", "wo", "wer", "was", "wie", "warum", "welche", "wie viel", "wie viele",
        "wie lange", "wann ist", "wo ist die", "wer ist", "was kostet", "wie heißt", "wie alt ist",
        "wann war die", "wer hat", "was ist mit", "wie oft", "um wie viel Uhr", "welcher",
    ),
    "French": (
        "", "quand", "où", "qui", "combien", "pourquoi", "comment", "quel", "quelle", "où est",
        "quand est", "combien coûte", "qui a", "à quelle heure", "quel est le",
    ),
    "Spanish": (
        "", "cuándo", "dónde", "quién", "cuánto", "por qué", "cómo", "cuál", "dónde está",
        "cuándo es", "cuánto cuesta", "quién es", "a qué hora",
    ),
    "Italian": ("", "quando", "dove", "chi", "quanto", "perché", "come", "quale"),
    "Portuguese": ("", "quando", "onde", "quem", "quanto", "por que", "como", "qual"),
    "Dutch": ("", "wanneer", "waar", "wie", "hoeveel", "waarom", "hoe", "welke", "wat is"),
    "Chinese": ("", "什么是", "什么时候", "谁", "为什么", "怎么", "哪里", "多少"),
    "Japanese": ("", "いつ", "どこ", "だれ", "なぜ", "いくら", "なに"),
}
# Subjects of which nobody's notes need to speak, so that a question about the world is looked up,
# too, in place of being answered out of nothing
ELSEWHERE = {
    "English": (
        "the capital of France", "the president", "the moon", "Napoleon", "photosynthesis",
        "gravity", "the world cup", "Shakespeare", "the speed of light", "the weather tomorrow",
        "dinosaurs", "the Roman Empire", "Mozart", "the stock market", "Mount Everest", "penguins",
        "the Beatles", "quantum physics", "Egypt", "the population of Japan", "my cousin's wedding",
        "the insurance", "the new camera", "the hotel in Rome", "the dog", "my passport",
        "the car keys", "the dentist", "a bicycle", "the printer", "Aunt Clara", "the piano",
        "last summer", "the neighbour's cat",
    ),
    "German": (
        "die Hauptstadt von Frankreich", "der Präsident", "der Mond", "Napoleon", "Photosynthese",
        "die Weltmeisterschaft", "Goethe", "das Wetter morgen", "Dinosaurier", "Mozart",
        "das Römische Reich", "der Aktienmarkt", "Pinguine", "die Versicherung", "der Zahnarzt",
        "die neue Kamera", "das Hotel in Rom", "der Hund", "mein Reisepass", "Tante Klara",
    ),
    "French": (
        "la capitale de l'Allemagne", "le président", "la lune", "Napoléon", "la photosynthèse",
        "la coupe du monde", "Molière", "les dinosaures", "Mozart", "l'assurance", "le dentiste",
        "le nouvel appareil photo", "le chien", "mon passeport", "l'Empire romain",
    ),
    "Spanish": (
        "la capital de Francia", "el presidente", "la luna", "Napoleón", "la fotosíntesis",
        "el mundial", "Cervantes", "los dinosaurios", "Mozart", "el seguro", "el dentista",
        "la cámara nueva", "el perro", "mi pasaporte", "el Imperio romano",
    ),
    "Italian": (
        "la capitale della Francia", "il presidente", "la luna", "Napoleone", "i dinosauri",
        "Dante", "Mozart", "il dentista", "il cane", "il mio passaporto",
    ),
    "Portuguese": (
        "a capital da França", "o presidente", "a lua", "Napoleão", "os dinossauros", "Camões",
        "Mozart", "o dentista", "o cão", "o meu passaporte",
    ),
    "Dutch": (
        "de hoofdstad van Frankrijk", "de president", "de maan", "Napoleon", "dinosaurussen",
        "Mozart", "Rembrandt", "de tandarts", "de hond", "mijn paspoort",
    ),
    "Chinese": (
        "法国的首都", "总统", "月亮", "拿破仑", "光合作用", "世界杯", "恐龙", "莫扎特", "明天的天气",
        "保险", "牙医", "我的护照",
    ),
    "Japanese": (
        "フランスの首都", "大統領", "月", "ナポレオン", "光合成", "ワールドカップ", "恐竜",
        "モーツァルト", "明日の天気", "保険", "歯医者", "私のパスポート",
    ),
}
SCRIPTS = {
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Chinese": re.compile("[\u3400-\u9fff]"),
}
# Of the questions in tasks/identity.py, those that ask nothing
GREETINGS = {
    question for topic in TOPICS for question in topic.training if question[-1] not in "?."
}
# "Term: ...", but no time of day ("At 10:30"), and no address ("https://...")
DEFINITION = re.compile(r"([^\W\d_][^:：.!?]{1,40})[:：](?![/\d])\s*(\S.+)", re.DOTALL)
QUESTION = re.compile(r"(?:\d{1,3}[.)]\s+)?(?:(?:Q|F|Frage|Question)[:.]\s*)?(.{6,100}[?？])")
PRACTISED_CHARS = 140       # of a quote in a practised answer: only the end of the turn is learnt
MIN_SUBJECTS = 20           # headings; with fewer, single passages are held out
SAMPLED_PASSAGES = 200      # from which the language of a text is told
RARE_WORDS = (2, 4)         # of a sentence, in a question made of them

# Shares of the kinds of question
ELSEWHERE_SHARE = 0.06
SUBJECT_SHARE = 0.35
SLOPPY_SHARE = 0.4          # without a capital and a mark
SECOND_TURN_SHARE = 0.15    # that follow another exchange


def subject_tasks(passages, form):
    """The tasks of what a chat is about: the user's own text, or without it Python's library.

    passages: a Passages or None. A model of the user's text has not read what PyDoc asks about.
    """
    if passages is not None:
        return [OwnText("train", passages.passages, OWN_EXAMPLES, form)]
    return [
        PyDoc("train", "what", 15_000),
        PyDoc("train", "module", 4_000),
        PyDoc("train", "letter", 1_600),
    ]


def sample_questions(passages):
    """The questions of a run's samples, which the page also offers: some about the user's text."""
    if passages is None:
        return list(QUESTIONS)
    held_out = OwnText("test", passages.passages)
    task = held_out if len(held_out) else OwnText("train", passages.passages)
    asked = [task[i]["messages"][0]["content"] for i in range(min(3, len(task)))]
    return [*dict.fromkeys(asked), *QUESTIONS[:2]]


def identity_tasks(identity, passages, chat_data):
    """An Identity as often as it must be practised to be told from other questions.

    chat_data: hub or local. The local mixture declines words by themselves, which a greeting is.
    Beside a text of the user's everything short looks like a heading, and a greeting most of all.
    The model has heard the built-in answers in midtraining, the user's own in one stage only.
    """
    if passages is None:
        return [identity] * 4 + [Greetings(identity)] * (50 if chat_data == "local" else 0)
    copies = 40 if identity.answers_as_user else 12
    return [identity] * copies + [Greetings(identity)] * 75


class Greetings(Task):
    """The greetings of an Identity, as they are there and in small letters."""

    def __init__(self, identity, **slice_):
        super().__init__(**slice_)
        asked = [identity[i]["messages"][0]["content"] for i in range(len(identity))]
        self.identity = identity
        self.numbers = [i for i, text in enumerate(asked) if text.lower() in GREETINGS]

    def num_examples(self):
        return 2 * len(self.numbers)

    def get_example(self, i):
        question, answer = self.identity[self.numbers[i // 2]]["messages"]
        text = question["content"].lower() if i % 2 else question["content"]
        return conversation(text, answer["content"])


class OwnText(Task):
    """`size` questions about a list of Passage (nanochat/passages.py).

    form: "lookup" or "recall". split: of the headings that are asked about. A short text may have
    nothing in one of the splits: then there are no questions.
    """

    def __init__(self, split, passages, size=1000, form="lookup", **slice_):
        super().__init__(**slice_)
        assert form in FORMS
        self.split = check_split(split)
        self.form = form
        self.size = size
        subjects = {(passage.source, passage.heading) for passage in passages}
        self.by_heading = len(subjects) >= MIN_SUBJECTS
        self.passages = [passage for passage in passages if self._is_mine(passage)]
        self.counts = Counter()     # in how many passages a word is
        for passage in passages:
            self.counts.update(set(words_of(" ".join(passage.units))))
        sample = passages[::max(1, len(passages) // SAMPLED_PASSAGES)]
        self.language = language_of_text(" ".join(unit for p in sample for unit in p.units))

    def _is_mine(self, passage):
        """Whether a passage is of this split: with all of its heading, or alone in a text that has
        hardly any headings."""
        subject = f"{passage.source} {passage.heading}"
        if not self.by_heading:
            subject += passage.units[0]
        return split_of(subject) == self.split

    def num_examples(self):
        return self.size if self.passages else 0

    def get_example(self, i):
        rng = random.Random(f"own text {self.split} {i}")
        first = self._draw(rng)
        if self.form == "recall" or rng.random() >= SECOND_TURN_SHARE:
            return first
        second = self._draw(rng)
        return {**second, "messages": first["messages"] + second["messages"]}

    def _draw(self, rng):
        """A conversation of one question, with `source`: the passage's file and heading, or None
        where the text does not speak of it."""
        passage = rng.choice(self.passages)
        language = language_of_text(" ".join(passage.units), self.language)
        elsewhere = self.form == "lookup" and rng.random() < ELSEWHERE_SHARE
        if elsewhere:
            known = language if language in ELSEWHERE else "English"
            subject = rng.choice(ELSEWHERE[known])
            question = rng.choice(SUBJECT_QUESTIONS[known]).format(s=subject)
            reply, source = NOTHING_FOUND, None
        else:
            question, quote = self._question(rng, passage, language)
            source = [passage.source, passage.heading]
            place = ", ".join(filter(None, source))
            found = Quote(quote[:PRACTISED_CHARS], place)
            reply = reply_to(Answer((found,), SURE, 1.0))
        question = retyped(question, rng)
        if self.form == "recall":
            return conversation(question, quote[:PRACTISED_CHARS], source=source)
        parts = [
            {"type": "python", "text": LOOKUP_CALL},
            {"type": "python_output", "text": reply},
        ]
        return conversation(question, parts, source=source)

    def _question(self, rng, passage, language):
        """(question, quote) about a passage."""
        place = rng.randrange(len(passage.units))
        unit = passage.units[place]
        asked = QUESTION.fullmatch(unit)
        if asked and place + 1 < len(passage.units):
            return asked[1], passage.units[place + 1]

        templates = SUBJECT_QUESTIONS.get(language, ("{s}?", "{s}"))
        definition = DEFINITION.fullmatch(unit)
        row = unit.split(" | ")
        if definition and rng.random() < SUBJECT_SHARE:
            return rng.choice(templates).format(s=definition[1]), unit
        if len(row) > 1 and row[0] and rng.random() < SUBJECT_SHARE:
            return rng.choice(templates).format(s=row[0]), unit
        if rng.random() < SUBJECT_SHARE:
            return rng.choice(templates).format(s=subject_of(passage)), passage.units[0]
        return self._from_rare_words(rng, unit, language), unit

    def _from_rare_words(self, rng, unit, language):
        """A question of a question word and some of the sentence's rarest words, in its order."""
        opening = rng.choice(OPENINGS.get(language, ("",)))
        if language in ("Chinese", "Japanese"):
            start = rng.randrange(max(1, len(unit) - 4))
            return unit[start:start + rng.randint(3, 6)] + opening + "?"
        words = re.findall(r"[^\W_]+", unit)
        count = rng.randint(*RARE_WORDS)
        by_rarity = sorted(range(len(words)), key=lambda i: self._commonness(words[i]))
        chosen = sorted(by_rarity[:count + 1])
        if len(chosen) > count:
            chosen.remove(rng.choice(chosen))
        return f"{opening} {' '.join(words[i] for i in chosen)}?".strip()

    def _commonness(self, word):
        """In how many passages a word is found."""
        return max((self.counts[piece] for piece in words_of(word)), default=0)

    def evaluate(self, conversation, parts):
        """Right when the passage asked about is quoted with its source, and where the text need
        not speak of the subject, when doubt is said. From memory: when half of the words are those
        of the sentence asked for."""
        expected = conversation["messages"][-1]["content"]
        if self.form == "recall":
            return overlap(expected, answer_text(parts)) >= 0.5
        quoted = "".join(part["text"] for part in parts if part["type"] == "python_output")
        source = conversation["source"]
        if source is None:
            return quoted.startswith((NOTHING_FOUND, NOT_SURE))
        return f"(source: {', '.join(filter(None, source))})" in quoted


def language_of_text(text, otherwise=""):
    """The language whose templates fit a text: a key of SUBJECT_QUESTIONS, or `otherwise`.

    By script, of which there must be a tenth, then by stop words, a fifth of all words.
    """
    for language, script in SCRIPTS.items():
        if 10 * len(script.findall(text)) > len(text):
            return language
    language, share = language_of(words_of(text))
    return language if share >= 0.2 else otherwise


def subject_of(passage):
    """What a passage is about: its last heading, else the name of its file."""
    if passage.heading:
        return passage.heading.split(" > ")[-1]
    name = passage.source.split("/")[-1]
    return re.sub(r"\.\w{1,7}$", "", name).replace("_", " ").replace("-", " ")


def retyped(question, rng):
    """A question as it is typed: often in small letters and without its mark."""
    if rng.random() < SLOPPY_SHARE:
        return question.lower().rstrip("?.？ ") or question
    return question[0].upper() + question[1:]


def overlap(expected, given):
    """The F1 of the words of two texts, from 0 to 1."""
    return f1(words_of(expected), words_of(given))
