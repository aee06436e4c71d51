"""Tokenizers small enough to know by heart: one token a word, and a byte-level BPE that splits names."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def _wrapped(tokenizer: Tokenizer, bos: bool, eos: bool, pad: bool = True) -> PreTrainedTokenizerFast:
    template = " ".join((["<bos>"] if bos else []) + ["$A"] + (["<eos>"] if eos else []))
    special_ids = [(token, SPECIAL.index(token)) for token in ("<bos>", "<eos>")]
    added = processors.TemplateProcessing(single=template, special_tokens=special_ids)
    before = [tokenizer.post_processor] if tokenizer.post_processor else []
    tokenizer.post_processor = processors.Sequence([*before, added])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    if pad:
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def word_tokenizer(
    texts: Sequence[str], bos: bool = False, eos: bool = False, pad: bool = True, drop: str | None = None
) -> PreTrainedTokenizerFast:
    """One token for each word and mark of `texts`, in sorted order after the special ones; what `drop` matches vanishes."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)} - set(SPECIAL))
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    if drop:
        tokenizer.normalizer = normalizers.Replace(Regex(drop), "")
    return _wrapped(tokenizer, bos, eos, pad)


def bpe_tokenizer(
    texts: Sequence[str], vocab_size: int = 300, bos: bool = False, eos: bool = False, trim_offsets: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, as GPT-2's (`trim_offsets`: the space before a word is not part of it) or Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, bos, eos)
