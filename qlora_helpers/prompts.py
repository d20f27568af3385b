"""The prompt and the label words, built here and nowhere else."""

import string
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qlora_helpers.errors import ModelError

TEMPLATE = "{text}\nTopic:"
_TAIL = 8  # tokens kept at the end of a prompt that is too long: at least "\nTopic:"
_EXAMPLE_WORDS = 60  # of a solved example: every row pays for its length


def build_prompt(text: str) -> str:
    """The prompt for one text. It ends just before the label word."""
    return TEMPLATE.format(text=text)


def few_shot_prefix(texts: Sequence[str], words: Sequence[str]) -> str:
    """Solved examples to put before a prompt (arXiv:2005.14165): the prompt of each text's first 60 words, and its label word."""
    return "".join(f"{build_prompt(' '.join(text.split()[:_EXAMPLE_WORDS]))}{word}\n\n" for text, word in zip(texts, words, strict=True))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, after_prefix: bool = False) -> list[list[int]]:
    """Token ids of each text's prompt. One longer than `max_length` tokens loses what stands before its last 8.
    `after_prefix` leaves out the token that begins a text."""
    prompts = [build_prompt(text) for text in texts]
    encoded = tokenizer(prompts, add_special_tokens=not after_prefix).input_ids if prompts else []
    return [ids if len(ids) <= max_length else ids[:max_length - _TAIL] + ids[-_TAIL:] for ids in encoded]


def label_words(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[str]:
    """What the model is asked for: each of `labels` after a space or, where the first tokens of two would be the same, " A", " B", " C" ...
    Raises ModelError if this tokenizer cannot tell the letters apart either."""
    words = [f" {label}" for label in labels]  # the space belongs to the word: "Topic:" + " World"
    try:
        _first_tokens(tokenizer, words)
    except ModelError:
        words = [f" {letter}" for letter in string.ascii_uppercase[:len(labels)]]
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
        if whole[:len(prompt)] != prompt or len(whole) == len(prompt):
            raise ModelError(f"this tokenizer joins the end of the prompt and the label word {word!r} into one token: change TEMPLATE.")
        ids.append(whole[len(prompt)])
    for i, first in enumerate(ids):
        if ids.index(first) != i:
            raise ModelError(f"the label words {words[ids.index(first)]!r} and {words[i]!r} both begin with the token "
                             f"{tokenizer.convert_ids_to_tokens(first)!r}: choose words that differ in their first token.")
    return ids
