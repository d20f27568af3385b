"""The prompt and the label words, built here and nowhere else."""

import string
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qlora_helpers.errors import ModelError

TEMPLATE = "{text}\nTopic:"
_EXAMPLE_WORDS = 60  # of a solved example: every row pays for its length


def build_prompt(text: str) -> str:
    """The prompt for one text. It ends just before the label word."""
    return TEMPLATE.format(text=text)


def few_shot_prefix(texts: Sequence[str], words: Sequence[str]) -> str:
    """Solved examples to put before a prompt (arXiv:2005.14165): the prompt of each text's first 60 words, and its label word."""
    return "".join(
        f"{build_prompt(' '.join(text.split()[:_EXAMPLE_WORDS]))}{word}\n\n"
        for text, word in zip(texts, words, strict=True)
    )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, prefix: str = ""
) -> list[list[int]]:
    """Token ids of `prefix` and each text's prompt, as one text.
    A prompt longer than `max_length` tokens loses the last words of its text, or the last
    characters if its first word alone is too long: its cue has the tokens of any other. `prefix` is
    not counted."""
    most = max_length
    if prefix:
        most += len(tokenizer(prefix, add_special_tokens=False).input_ids)
    prompts = [prefix + build_prompt(text) for text in texts]
    encoded = tokenizer(prompts).input_ids if prompts else []
    return [
        ids if len(ids) <= most else _cut(tokenizer, text, most, prefix)
        for ids, text in zip(encoded, texts, strict=True)
    ]


def _cut(tokenizer, text: str, most: int, prefix: str) -> list[int]:
    """The ids of a prompt with as many of the text's first words, or else characters, as fit."""
    empty = tokenizer(prefix + build_prompt("")).input_ids
    words = text.split(" ")[:most]  # a word is a token at least
    for parts, joint in ((words, " "), (words[0], "")):
        fitting, low, high = empty, 0, len(parts)
        while low < high:
            middle = (low + high + 1) // 2
            ids = tokenizer(prefix + build_prompt(joint.join(parts[:middle]))).input_ids
            if len(ids) <= most:
                fitting, low = ids, middle
            else:
                high = middle - 1
        if low:
            break
    return fitting


def label_words(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[str]:
    """What the model is asked for: each of `labels` after a space or, where the first tokens of two would be the same, " A", " B", " C" ...
    Raises ModelError if this tokenizer cannot tell the letters apart either."""
    words = [f" {label}" for label in labels]  # the space belongs to the word: "Topic:" + " World"
    try:
        _first_tokens(tokenizer, words)
    except ModelError:
        words = [f" {letter}" for letter in string.ascii_uppercase[: len(labels)]]
        _first_tokens(tokenizer, words)
    return words


def label_token_ids(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[int]:
    """The first token of each of `label_words`, as it follows the prompt. Raises what that raises."""
    return _first_tokens(tokenizer, label_words(tokenizer, labels))


def _first_tokens(tokenizer, words: list[str]) -> list[int]:
    prompt = tokenizer(build_prompt("A headline")).input_ids
    ids = []
    for word in words:
        whole = tokenizer(build_prompt("A headline") + word).input_ids
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ModelError(
                f"this tokenizer joins the end of the prompt and the label word {word!r} into one token: change TEMPLATE."
            )
        ids.append(whole[len(prompt)])
    for i, first in enumerate(ids):
        if ids.index(first) != i:
            raise ModelError(
                f"the label words {words[ids.index(first)]!r} and {words[i]!r} both begin with the token "
                f"{tokenizer.convert_ids_to_tokens(first)!r}: choose words that differ in their first token."
            )
    return ids
