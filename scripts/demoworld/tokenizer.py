"""The demo model's tokenizer: byte-level BPE over committed text, its chat template, and the loss mask.

The cut into pieces is made for copying, which is most of what so small a model has to do: a word has the same ids
wherever it stands (no leading-space variants), digits stand alone, and the JSON around every tool call and schema is a
few whole pieces. Only a short list of common words may swallow the space behind them, as their last merge. It knows no
model and no world beyond the text it is given.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|redacted|>")
# Added, but not special: decode() keeps them, so that a tool parser sees them in the text.
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VOCAB_SIZE = 1536
SPACED_WORDS = 176
_SPACE = "Ġ"  # what the byte-level alphabet writes for a space

_JSON_PIECES = (
    r'\{"type": "function", "function": \{"name": "',
    r'", "description": "',
    r'\.?", "parameters": \{"type": "object", "',
    r'": \{"type": "(?:string|number|integer|boolean)"',
    r'\{"name": "',
    r'", "arguments": \{"',
    r'"?[\}\]]*[,:] [\{\[]*"',
)
_WORD = r"\p{L}+"
_OTHER = r"|\p{N}|[,.:;?!)] |[^\s\p{L}\p{N}]+|\s+"


def _pre_tokenizer(word: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex("|".join(_JSON_PIECES) + "|" + word + _OTHER)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])


def _common_words(prose: str, reserved: frozenset[str]) -> list[str]:
    """The words most often followed by a space, without those that may be copied into a call."""
    counts = Counter(re.findall(r"[A-Za-z]+(?= )", prose))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return [word for word in words if word.lower() not in reserved]


def _with_spaced_words(tokenizer: Tokenizer, words: Sequence[str]) -> Tokenizer:
    """The same merges, then one more for each word that already is one piece: word + space."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]
    for word in [word for word in words if word in vocab][:SPACED_WORDS]:
        vocab[word + _SPACE] = len(vocab)
        merges.append((word, _SPACE))
    spaced = Tokenizer(BPE(vocab=vocab, merges=merges))
    spaced.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return spaced


def train(texts: Iterable[str], prose: str, *, template: str, reserved: frozenset[str]) -> PreTrainedTokenizerFast:
    """Learn `VOCAB_SIZE` pieces from `texts`; `prose` names the common words, `reserved` those that stay bare."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = _pre_tokenizer(_WORD)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKS) - SPACED_WORDS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe = _with_spaced_words(bpe, _common_words(prose, reserved))
    bpe.pre_tokenizer = _pre_tokenizer(_WORD + " ?")
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def strip_marks(text: str) -> str:
    """The text with special tokens and marks replaced by line ends, so that BPE never learns pieces of them."""
    return re.sub("|".join(re.escape(token) for token in SPECIAL_TOKENS + MARKS), "\n", text)


def read_template() -> str:
    """The chat template beside this file."""
    return (Path(__file__).parent / "template.jinja").read_text(encoding="utf-8").rstrip("\n")


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a rendered text; adds nothing."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def policy_mask(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[bool]:
    """True where the model writes the token: assistant turns with their `<|im_end|>`, not their header; [len(ids)]."""
    header = encode(tokenizer, "<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    mask = [False] * len(ids)
    writing = False
    for i, token in enumerate(ids):
        mask[i] = writing
        if token == end:
            writing = False
        elif list(ids[max(0, i + 1 - len(header)) : i + 1]) == header:
            writing = True
    return mask
