import pytest

from qlora_helpers import prompts
from qlora_helpers.config import LABELS
from qlora_helpers.errors import ModelError
from qlora_helpers.prompts import (
    build_prompt,
    encode_prompts,
    few_shot_prefix,
    label_token_ids,
    label_words,
)

CUE = [198, 29718, 42]  # \n|Topic|:


@pytest.fixture
def tokenizer(embedded_tokenizer):
    return embedded_tokenizer


def test_a_prompt_and_its_tokens(tokenizer):
    assert build_prompt("Rain stops {play} in Leeds") == "Rain stops {play} in Leeds\nTopic:"
    assert encode_prompts(tokenizer, ["Rain stops play", "Rain"], 256) == [
        [36951, 12326, 1238, *CUE],  # Rain| stops| play
        [36951, *CUE],
    ]
    assert encode_prompts(tokenizer, [], 256) == []


def test_the_label_words_and_their_tokens(tokenizer):
    assert label_words(tokenizer, LABELS) == [" World", " Sports", " Business", " Sci/Tech"]
    assert label_token_ids(tokenizer, LABELS) == [2260, 15278, 8460, 2528]
    assert tokenizer.convert_ids_to_tokens(2528) == "ĠSci"


def test_labels_that_begin_with_one_token_become_letters(tokenizer):
    assert label_words(tokenizer, ["World", "Sports", "World news"]) == [" A", " B", " C"]
    ids = label_token_ids(tokenizer, [f"talk.{i}" for i in range(26)])
    letters = [f"Ġ{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    assert tokenizer.convert_ids_to_tokens(ids) == letters


def test_solved_examples_end_in_their_label_word_and_a_long_one_is_cut():
    assert few_shot_prefix(["Rain stops play", "one " * 100], [" Sports", " B"]) == (
        "Rain stops play\nTopic: Sports\n\n" + " ".join(["one"] * 60) + "\nTopic: B\n\n"
    )


def test_a_template_that_ends_in_a_space_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "TEMPLATE", "{text}\nTopic: ")
    message = "joins the end of the prompt and the label word 'World' into one token"
    with pytest.raises(ModelError, match=message):
        prompts._first_tokens(tokenizer, ["World", "Sports"])


@pytest.mark.parametrize("prefix", ["", "Rain stops play\nTopic: Sports\n\n"])
@pytest.mark.parametrize(
    "text",
    [
        "Shares fall in Leeds. " * 1000,
        "antidisestablishmentarianism of Llanfairpwllgwyngyll " * 99,
        "\u592e\u884c \u5229\u7387 " * 500,
        "short " + "a" * 5000,
    ],
)
def test_a_text_that_is_too_long_loses_its_last_words(tokenizer, text, prefix):
    def encoded(text: str) -> list[int]:
        return tokenizer(prefix + build_prompt(text)).input_ids

    [ids] = encode_prompts(tokenizer, [text], 64, prefix)
    most = 64 + len(tokenizer(prefix).input_ids if prefix else [])
    kept = tokenizer.decode(ids).removeprefix(prefix).removesuffix("\nTopic:")
    words, count = text.split(" "), len(kept.split(" "))
    assert kept == " ".join(words[:count])  # whole words
    assert ids == encoded(kept) and ids[-3:] == CUE
    assert len(ids) <= most < len(encoded(" ".join(words[: count + 1])))


def test_a_single_word_that_is_too_long_loses_its_last_characters(tokenizer):
    [ids] = encode_prompts(tokenizer, ["goal" * 5000 + " at last"], 64)
    kept = tokenizer.decode(ids).removesuffix("\nTopic:")
    assert ("goal" * 5000).startswith(kept) and 60 <= len(ids) <= 64 and ids[-3:] == CUE


def test_a_text_of_just_the_length_is_whole(tokenizer):
    [ids] = encode_prompts(tokenizer, ["Rain " * 61 + "on"], 65)
    assert len(ids) == 65 and tokenizer.decode(ids) == "Rain " * 61 + "on\nTopic:"
