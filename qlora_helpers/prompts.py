"""The prompt and the label words, built here and nowhere else."""

import string
from bisect import bisect_right
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qlora_helpers.errors import ModelError

TEMPLATE = "{text}\nTopic:"
_EXAMPLE_WORDS = 60  # of a solved example: every row pays for its length


def build_prompt(text: str) -> str:
    """Return the prompt for one text. It ends just before the label word."""
    return TEMPLATE.format(text=text)


def few_shot_prefix(texts: Sequence[str], words: Sequence[str]) -> str:
    """Return solved examples, to put before a prompt (arXiv:2005.14165)."""
    short = [" ".join(text.split()[:_EXAMPLE_WORDS]) for text in texts]
    examples = zip(short, words, strict=True)
    return "".join(f"{build_prompt(text)}{word}\n\n" for text, word in examples)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, prefix: str = ""
) -> list[list[int]]:
    """Return the token ids of `prefix` and each text's prompt, as one text.

    A prompt longer than `max_length` tokens, `prefix` not counted, loses the last words of its
    text, or the last characters of its first word if that alone is too long; never its cue.
    """
    most = max_length + len(tokenizer(prefix, add_special_tokens=False).input_ids)
    prompts = [prefix + build_prompt(text) for text in texts]
    encoded = tokenizer(prompts).input_ids if prompts else []
    return [
        ids if len(ids) <= most else _cut(tokenizer, text, most, prefix)
        for ids, text in zip(encoded, texts, strict=True)
    ]


def _cut(tokenizer, text: str, most: int, prefix: str) -> list[int]:
    """Return the ids of a prompt with as many of the text's first words or characters as fit."""

    def ids(part: str) -> list[int]:
        return tokenizer(prefix + build_prompt(part)).input_ids

    words = text.split(" ")[:most]  # a word has at least one token
    counts = range(1, len(words) + 1)
    if count := bisect_right(counts, most, key=lambda n: len(ids(" ".join(words[:n])))):
        return ids(" ".join(words[:count]))
    lengths = range(1, len(words[0]) + 1)
    return ids(words[0][: bisect_right(lengths, most, key=lambda n: len(ids(words[0][:n])))])


def label_words(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[str]:
    """Return what the model is asked for: each label after a space, or " A", " B", " C" ... if two
    begin with the same token. Raises ModelError if the letters do so too."""
    words = [f" {label}" for label in labels]
    try:
        _first_tokens(tokenizer, words)
    except ModelError:
        words = [f" {letter}" for letter in string.ascii_uppercase[: len(labels)]]
        _first_tokens(tokenizer, words)
    return words


def label_token_ids(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[int]:
    """Return the first token of each of `label_words`, as it follows the prompt."""
    return _first_tokens(tokenizer, label_words(tokenizer, labels))


def _first_tokens(tokenizer, words: list[str]) -> list[int]:
    prompt = tokenizer(build_prompt("A headline")).input_ids
    ids = []
    for word in words:
        whole = tokenizer(build_prompt("A headline") + word).input_ids
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            parts = f"the end of the prompt and the label word {word!r}"
            raise ModelError(f"this tokenizer joins {parts} into one token: change TEMPLATE.")
        ids.append(whole[len(prompt)])
    if len(set(ids)) < len(ids):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise ModelError(f"two of the label words {words} begin with the same token: {tokens}.")
    return ids
