"""Prompts follow the text: the beginnings of documents, in any script."""
import pytest

from nanochat.prompts import (
    QUESTIONS,
    SUGGESTIONS,
    TEXTS,
    beginning,
    columns,
    suggestions_of,
    text_prompts,
)

GERMAN = "Die Uhr in der Küche ging seit drei Wochen nach, und niemand hatte sie gestellt."
CHINESE = "春天来了，花园里的花都开了，孩子们在院子里跑来跑去。"
THAI = "ฉันชอบกินข้าวกับปลาที่แม่ทำให้ทุกวันตอนเย็น"


@pytest.mark.parametrize("document, expected", [
    (GERMAN, "Die Uhr in der Küche"),
    (f"# Uhr\n\n{GERMAN}\n", "Die Uhr in der Küche"),
    (CHINESE, "春天来了，花园里的花都开"),
    ("   \n", ""),
    ("", ""),
    ("2024-05-01\n17\n", "2024-"),
    ("word", "wo"),
    ("Donaudampfschifffahrtsgesellschaft und mehr", "Donaudampfschifffahrt"),
])
def test_a_prompt_is_the_first_words_of_a_document(document, expected):
    assert beginning(document) == expected


def test_marks_stay_with_their_characters():
    begun = beginning(THAI)
    assert THAI.startswith(begun) and columns(begun) <= columns(THAI) / 2
    following = THAI[len(begun)]
    assert columns(following) == 1, "the next character begins a new column"


def test_the_default_text_has_fixed_prompts_and_own_text_those_of_its_documents():
    assert text_prompts([GERMAN], None) == list(TEXTS)
    documents = [GERMAN, GERMAN, "", CHINESE]
    assert text_prompts(documents, "notes/") == [beginning(GERMAN), beginning(CHINESE)]
    assert text_prompts(["", "\n"], "notes/") == list(TEXTS), "never none"
    many = [f"The document number {i} of a long list of documents." for i in "abcdefgh"]
    assert len(text_prompts(many, "notes/")) == 5


def test_the_page_offers_what_the_model_was_shown():
    assert suggestions_of({"stage": "base_train"}) == TEXTS
    assert suggestions_of({"stage": "base_train", "prompts": ["Die Uhr"]}) == ["Die Uhr"]
    assert suggestions_of({"stage": "chat_sft", "prompts": ["Die Uhr"]}) == SUGGESTIONS
    assert suggestions_of({"stage": "chat_sft", "questions": ["Tomatoes?"]}) == ["Tomatoes?"]
    assert set(QUESTIONS) & set(SUGGESTIONS)
