"""The prompt and the label words, built here and nowhere else."""

from transformers import PreTrainedTokenizerBase

from qlora_helpers.data import LABELS
from qlora_helpers.errors import ModelError

TEMPLATE = "{text}\nTopic:"
LABEL_WORDS = [f" {label}" for label in LABELS]  # the space belongs to the word: "Topic:" + " World"
_TAIL = 8  # tokens kept at the end of a prompt that is too long: at least "\nTopic:"


def build_prompt(text: str) -> str:
    """The prompt for one text. It ends just before the label word."""
    return TEMPLATE.format(text=text)


def few_shot_prefix(texts: list[str], labels: list[int]) -> str:
    """Solved examples to put before a prompt (arXiv:2005.14165): each text's prompt with its label word."""
    return "".join(f"{build_prompt(text)}{LABEL_WORDS[label]}\n\n" for text, label in zip(texts, labels, strict=True))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, after_prefix: bool = False) -> list[list[int]]:
    """Token ids of each text's prompt. One longer than `max_length` tokens loses what stands before its last 8.
    `after_prefix` leaves out the token that begins a text."""
    prompts = [build_prompt(text) for text in texts]
    encoded = tokenizer(prompts, add_special_tokens=not after_prefix).input_ids if prompts else []
    return [ids if len(ids) <= max_length else ids[:max_length - _TAIL] + ids[-_TAIL:] for ids in encoded]


def label_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first token of each label word, in LABELS' order, as it follows the prompt.
    Raises ModelError if two label words begin with the same token, or a word's token merges with the prompt's end."""
    prompt = tokenizer(build_prompt("A headline")).input_ids
    ids = []
    for word in LABEL_WORDS:
        whole = tokenizer(build_prompt("A headline") + word).input_ids
        if whole[:len(prompt)] != prompt or len(whole) == len(prompt):
            raise ModelError(f"this tokenizer joins the end of the prompt and the label word {word!r} into one token: change TEMPLATE.")
        ids.append(whole[len(prompt)])
    for i, first in enumerate(ids):
        if ids.index(first) != i:
            raise ModelError(f"the label words {LABEL_WORDS[ids.index(first)]!r} and {LABEL_WORDS[i]!r} both begin with the token "
                             f"{tokenizer.convert_ids_to_tokens(first)!r}: choose words that differ in their first token.")
    return ids
