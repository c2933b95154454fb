"""Tokenizers that are learned from the training part of a dataset, as the JSON of Hugging Face's tokenizers.

Not here: tokenizers that come with given weights (`pretrained`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

PAD, START, END, UNKNOWN, MASK = 0, 1, 2, 3, 4
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
SEEN = 2  # times that a piece must be there to be one


def encoder_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return a tokenizer of pieces in lower case, for a text as a whole: [CLS] text [SEP].

    By byte-pair encoding: it knows every character, and the same texts give the same pieces. The trainer of BERT's own
    WordPiece gives others in each process.
    """
    tokenizer = _pieces(texts, vocabulary, SPECIAL, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(SPECIAL[START], START), (SPECIAL[END], END)]
    )
    return tokenizer


def _pieces(texts: Iterable[str], vocabulary: int, special: Sequence[str], normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=normalizer is not None)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary, len(alphabet) + len(special)),
        min_frequency=SEEN,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def translation_tokenizer(texts: Iterable[str], kind: str, vocabulary: int) -> Tokenizer:
    """Return a tokenizer whose tokens give the text back: text [SEP].

    Args:
        kind: `pieces` (byte-pair encoding, which knows every character), `words` or `characters`.
    """
    special = SPECIAL[:MASK]
    if kind == "pieces":
        tokenizer = _pieces(texts, vocabulary, special)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL[UNKNOWN]))
        if kind == "words":
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=list(special), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[(SPECIAL[END], END)])
    return tokenizer
