"""What studies of translation share: sentences as prompts, heads found by their attention, and prompts that ask for one word.

    setting = prepare(flags, flags.heads)         # flags: px.flags.TranslatedWords
    setting.heads                                 # those given, else those found by their attention
    setting.asked.plus                            # "EN: the cat sees the dog. FR: le chat", two prompts a swap

Two sentences are each other's swap if their translations agree up to a word and then go on with different ones, so that the
source alone tells which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.methods.heads.patterns import check_prompts
from pyvene_ext.methods.heads.published import KNOWN, read_known
from pyvene_ext.methods.heads.translation import found_heads, translation_scores
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.models.loading import TINY_MODELS
from pyvene_ext.models.sizes import heads_of, n_positions
from pyvene_ext.prompts.parallel import (
    OPUS_100,
    Languages,
    SentencePair,
    WordPrompts,
    filter_pairs,
    load_pairs,
    parse_languages,
    swap_neighbours,
    tokenize_pairs,
    word_prompts,
)
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.runs.flags import TranslatedWords, Translation
from pyvene_ext.stats.controls import Head, head_label

THRESHOLDS = {"difference": 0.05, "translation": 0.13}


# -- what the flags stand for ------------------------------------------------------------------------------------------


def dataset_of(flags: Translation) -> str:
    """The data set that is read."""
    return flags.dataset or ("en_fr" if flags.model in TINY_MODELS else OPUS_100)


def criterion_of(flags: Translation) -> str:
    """What must be above the threshold: "difference" or "translation"."""
    return flags.criterion or ("translation" if flags.model in TINY_MODELS else "difference")


def published(flags: Translation) -> dict[str, Any]:
    """Heads and thresholds that are known of the model, which goes by the end of its name; nothing if none are."""
    models = {name.lower(): known for name, known in read_known(flags.known or KNOWN).items()}
    return models.get(Path(flags.model).name.lower(), {})


def threshold_of(languages: Languages, flags: Translation) -> float:
    """The threshold of a pair: the lowest of its languages' own, else the model's.

    Args:
        languages: the pair.
        flags: of the study.

    Returns:
        The threshold.

    Raises:
        ValueError: --thresholds is not of the form, or the threshold is no share of attention.
    """
    criterion, known, general = criterion_of(flags), published(flags), flags.threshold
    own: dict[str, float] = {}
    if criterion == "translation":
        known = {}  # published thresholds are those of the difference
    if general is None:
        own |= known.get("thresholds", {})
        general = known.get("threshold", THRESHOLDS[criterion])
    for entry in flags.thresholds:
        language, _, value = entry.partition("=")
        try:
            own[language.lower()] = float(value)
        except ValueError:
            raise ValueError(f"--thresholds {entry}: write a language and a number, as in ja=0.03.") from None
    threshold = min((own[language] for language in languages if language in own), default=general)
    if not -1 < threshold < 1:
        raise ValueError(f"a threshold of {threshold} makes no sense for a share of attention; give one below 1.")
    return threshold


# -- sentences, and the heads that align them --------------------------------------------------------------------------


class Sentences(NamedTuple):
    """The sentences of one pair of languages that passed the filters, and the prompts made of them."""

    kept: list[SentencePair]
    dropped: dict[str, int]
    prompts: TokenizedPrompts
    control: TokenizedPrompts


class Scores(NamedTuple):
    """The scores of one pair of languages; `by_head` is held to the threshold, and `found` has the highest head first."""

    translation: Float[np.ndarray, "sentence layer head"]
    control: Float[np.ndarray, "sentence layer head"]
    by_head: Float[np.ndarray, "layer head"]
    threshold: float
    found: list[Head]

    @property
    def means(self) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """Over the sentences that were not skipped: translation and control."""
        return np.nanmean(self.translation, 0), np.nanmean(self.control, 0)


def load_sentences(pair: str, flags: Translation) -> list[SentencePair]:
    """The sentences of a pair of languages, before any filter (`parallel.load_pairs` says what is refused)."""
    return load_pairs(find_prompts(dataset_of(flags), ".tsv"), parse_languages(pair), flags.split)


def sentences_of(
    pair: str,
    raw: Sequence[SentencePair],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    flags: Translation,
    limit: int | None = None,
) -> Sentences:
    """Filter the sentences of a pair and make its prompts.

    Args:
        pair: the languages, source first.
        raw: of `load_sentences`.
        model: whose prompts they become.
        tokenizer: the model's.
        flags: for the template, and the data set's name in errors.
        limit: keep at most so many.

    Returns:
        The sentence pairs of the languages.

    Raises:
        ValueError: what no model could be run on, or has no control.
    """
    kept, dropped = filter_pairs(raw, tokenizer)
    kept = kept[:limit]
    if len(kept) < 2:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "there are no more"
        raise ValueError(
            f"{len(kept)} of {len(raw)} {pair} pairs of {dataset_of(flags)} pass the filters ({why}), and a control needs two; "
            "give more sentences."
        )
    swapped = swap_neighbours(kept, tokenizer)
    if not swapped:
        raise ValueError(f"all {pair} sentences have the same translation, so that there is no control; give others.")
    languages, longest = parse_languages(pair), n_positions(model.config)
    prompts, control = (
        tokenize_pairs(tokenizer, pairs, languages, flags.template, longest) for pairs in (kept, swapped)
    )
    check_prompts(model, prompts)
    return Sentences(kept, dict(dropped), prompts, control)


def scores_of(pair: str, sentences: Sentences, model: PreTrainedModel, threshold: float, flags: Translation) -> Scores:
    """Score every head on the sentences of a pair and on their control; the heads above the threshold are found.

    Args:
        pair: the languages, for errors.
        sentences: of `sentences_of`.
        model: whose heads are scored.
        threshold: of `threshold_of`.
        flags: of the study.

    Returns:
        The scores of every head, and which heads are found.

    Raises:
        ValueError: no crop of either is long enough for a score.
    """
    translation, control = (
        translation_scores(model, prompts, batch_size=flags.batch_size, progress=is_main_process())
        for prompts in (sentences.prompts, sentences.control)
    )
    for what, values in (("translation", translation), ("control", control)):
        if np.isnan(values).all():
            raise ValueError(f"{pair}: every crop of the {what} is too short for three diagonals; give longer text.")
    by_head = np.nanmean(translation, 0)
    if criterion_of(flags) == "difference":
        by_head = by_head - np.nanmean(control, 0)
    return Scores(translation, control, by_head, threshold, found_heads(by_head, threshold))


# -- prompts that ask for one word -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One model on the words of one pair of languages.

    Attributes:
        sentences: of the pair, whole.
        asked: the prompts for the words, whole swaps of them.
        given: the heads that were named, if any.
        threshold: from which on heads are found by their attention.
    """

    flags: TranslatedWords
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sentences: Sentences
    asked: WordPrompts
    given: tuple[Head, ...]
    threshold: float

    @cached_property
    def scores(self) -> Scores:
        """How every head attends to the source while the translation is read; a few forward passes, once."""
        return scores_of(self.flags.pair, self.sentences, self.model, self.threshold, self.flags)

    @cached_property
    def heads(self) -> list[Head]:
        """The heads given, else those found by their attention; ValueError if none is."""
        found = list(self.given) or self.scores.found
        if not found:
            raise ValueError(
                f"no head is above the threshold of {self.threshold:g}, so that there is none to study; lower --threshold, or "
                "name --heads."
            )
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What was run, for the summary."""
        return {
            "model": self.flags.model,
            "dataset": dataset_of(self.flags),
            "pair": self.flags.pair,
            "n_prompts": len(self.asked.plus),
            "dropped": dict(self.asked.dropped),
            "hash": self.asked.plus.hash,
            "seed": self.flags.seed,
        }

    def headline(self, heads: Sequence[Head] = ()) -> str:
        """What was run, for the terminal: the prompts, some of the words, and the heads if not all."""
        some = ", ".join(list(dict.fromkeys(self.asked.words))[:4])
        return (
            f"{self.flags.model}, {self.flags.pair}: {len(self.asked.plus)} prompts for words "
            f"{', '.join(map(str, self.flags.words))} (such as {some}), "
            f"heads {', '.join(map(head_label, heads)) or 'all, one at a time'}"
        )


def prepare(flags: TranslatedWords, heads: Sequence[str] = ()) -> Setting:
    """Load model and sentences and make the prompts for --words; no forward pass yet.

    Args:
        flags: of the study.
        heads: as `head_label` writes them; none for those found by their attention.

    Returns:
        The model, its sentences and the prompts of each word.

    Raises:
        ValueError: flags, sentences or a model that could not be run; fewer than two swaps of sentences.
    """
    languages = parse_languages(flags.pair)
    threshold = threshold_of(languages, flags)
    raw = load_sentences(flags.pair, flags)
    model, tokenizer = flags.load_model()
    given = heads_of(heads, flags.model, model)
    sentences = sentences_of(flags.pair, raw, model, tokenizer, flags)
    options: dict[str, Any] = {"template": flags.template, "max_length": n_positions(model.config)}
    of_words = (word_prompts(tokenizer, sentences.kept, languages, word, **options) for word in flags.words)
    asked = reduce(add, (of_word.first(flags.limit) for of_word in of_words))
    if len(asked.words) < 4:
        raise ValueError(
            "only one swap of sentences is left at these words, and an interval needs two; choose other --words, or give more "
            "sentences."
        )
    return Setting(flags, model, tokenizer, sentences, asked, given, threshold)
