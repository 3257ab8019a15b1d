"""Words as they are compared: folded, told apart by language, and with the forms they may have.

    words_of("Käse im Kühlschrank")         # ["kase", "im", "kuhlschrank"]
    language_of(["wann", "ist", "ostern"])  # ("German", 0.67)
    likeness("clock", "clocks")             # 0.9

No dictionary is needed: forms of a word differ by one of the endings below, which serve the larger
languages of Europe together, and scripts without spaces are compared by pairs of characters.
"""
import os
import re
import unicodedata

# The characters of scripts that are written without spaces: Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
WORD = re.compile(f"{UNSPACED}+|(?:(?!{UNSPACED})[^\\W_])+")
ASCII_WORD = re.compile("[a-z0-9]+")   # the same where nothing else can occur, and faster
ACCENTS = re.compile("[\u0300-\u036f]")

# Endings by which forms of a word differ, without accents
ENDINGS = {""} | set(
    "s es d ed ing er ers r y ies ied ly t "         # English
    "n en e em t te ten st ung ungen ne nen "        # German, Dutch
    "a as o os i is ent ons ez ait aient ment".split()   # French, Spanish, Italian, Portuguese
)

COMPOUND_CHARS = 5  # shorter words are not looked for inside of others

# The words of a question that say nothing about its subject, as words_of() returns them. In short
# notes many of them are rare, so that their frequency alone would make them look important.
STOP_WORDS = {
    "English": (
        "a about again all also am an and any are as ask at be because been but by call called "
        "came can come could did do does doing done ever every find first for found from gave get "
        "give go goes going gone got had has have he help her here him his how i if in into is it "
        "its just keep kept kind know last lie like long made make many may me mean means meant "
        "much must my need next no not now of off old on one only or our out per please put s "
        "said say says see seen she should since so some sort still t take taken tell that the "
        "their them then there these they think this those though till time to took under until "
        "up us use used using want was way we went were what whats when where wheres which who "
        "whom whose why will with work would yes yet you your"
    ),
    "German": (
        "aber alle als am an auch auf aus bei bin bis da damit das dass dem den denn der des die "
        "dies doch du ein eine einem einen einer er es fur gibt habe haben hat hatte ich ihr im "
        "in ist ja kann kein man mein meine mir mit muss nach nicht noch nur ob oder sich sie "
        "sind so soll um und uns unser viel viele vom von vor wann war waren warum was welche "
        "welchem welchen welcher welches wem wen wenn wer werden wie wieviel wir wird wo wofur "
        "woher wohin zu zum zur"
    ),
    "French": (
        "a ai au aux avec ce ces cette combien comment dans de des du elle en est et il je la le "
        "les leur ma mes mon ne nous on ont ou par pas pour pourquoi qu quand que quel quelle "
        "quelles quels qui quoi sa se ses son sont sur ta tu un une vous y"
    ),
    "Spanish": (
        "a al como con cual cuales cuando cuanta cuantas cuanto cuantos de del donde el ella en "
        "es esta este fue ha hay la las lo los me mi mis no nos o para pero por porque que quien "
        "se ser si sin sobre son su sus tu un una y"
    ),
    "Italian": (
        "a al alla che chi ci come con cosa cui da dal dei del della di dove e gli ha i il in io "
        "la le lo ma mi mio nel non o per perche piu quale quali quando quanti quanto se si sono "
        "su un una"
    ),
    "Portuguese": (
        "a ao as com como da das de do dos e em eu foi ha isso mas me meu na nao no nos o onde os "
        "ou para por porque quais qual quando quanto quantos que quem se ser sua um uma"
    ),
    "Dutch": (
        "aan als bij dan dat de der die dit door een en er had heb heeft het hij hoe hoeveel ik "
        "in is je kan maar met mijn naar niet nog of om ook op te uit van voor waar waarom "
        "wanneer was wat we welke wie wordt ze zijn zo"
    ),
    "Chinese": (
        "什么 时候 多少 怎么 怎样 为什 哪里 哪儿 哪个 谁 几 吗 呢 的 是 有"
    ),
    "Japanese": (
        "いつ どこ なに 何 だれ 誰 どう なぜ いく くつ です ます すか ですか"
    ),
}
STOP_WORDS = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}


def words_of(text):
    """The words of a text without case and accents; of a script without spaces, its pairs of
    characters.

    >>> words_of("Käse im Kühlschrank"), words_of("我喜欢茶")
    (['kase', 'im', 'kuhlschrank'], ['我喜', '喜欢', '欢茶'])
    """
    text = text.casefold()
    if text.isascii():
        return ASCII_WORD.findall(text)
    text = ACCENTS.sub("", unicodedata.normalize("NFKD", text))
    text = unicodedata.normalize("NFC", text)
    words = []
    for word in WORD.findall(text):
        if len(word) > 1 and re.match(UNSPACED, word):
            words += [word[i:i + 2] for i in range(len(word) - 1)]
        else:
            words.append(word)
    return words


def is_unspaced(character):
    """Whether a character is of a script that is written without spaces."""
    return re.fullmatch(UNSPACED, character) is not None


def language_of(words):
    """(language, share) whose stop words are the largest share of the words, by STOP_WORDS."""
    counts = {name: sum(word in known for word in words) for name, known in STOP_WORDS.items()}
    language = max(counts, key=counts.get)
    return language, counts[language] / max(1, len(words))


def likeness(word, known):
    """How much another word counts as this one: 1 for itself, 0.9 for a form of it, 0.6 for a
    compound that contains it, 0 for any other."""
    if word == known:
        return 1.0
    common = len(os.path.commonprefix([word, known]))
    if common >= 3 and {word[common:], known[common:]} <= ENDINGS:
        return 0.9
    starts = len(word) >= 4 and common == len(word)
    inside = len(word) >= COMPOUND_CHARS and word in known
    return 0.6 if starts or inside else 0.0


def is_typo(word, known):
    """Whether a letter behind the first was changed, added, left out, or exchanged with its
    neighbour."""
    if word[0] != known[0] or abs(len(word) - len(known)) > 1:
        return False
    common = len(os.path.commonprefix([word, known]))
    rest, known_rest = word[common:], known[common:]
    added = rest == known_rest[1:]
    missing = known_rest == rest[1:]
    changed = rest[1:] == known_rest[1:]
    swapped = known_rest == rest[1:2] + rest[:1] + rest[2:]
    return any((added, missing, changed, swapped))
