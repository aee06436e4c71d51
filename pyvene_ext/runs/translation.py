"""What studies of translation share: sentences as prompts, heads found by their attention, and prompts that ask for one word.

    setting = prepare(flags, flags.heads)         # flags: px.flags.TranslatedWords
    setting.heads                                 # those given, else those found by their attention
    setting.asked.plus                            # "EN: the cat sees the dog. FR: le chat", two prompts per swap

Two sentences are each other's swap if their translations agree up to a word and then go on with different ones, so that the
source alone tells which. Real text has hardly any: there every sentence is asked for its own word, and the wrong answer is the
strongest rival, the token other than the right one that the untouched model finds most likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.io.errors import counted
from pyvene_ext.methods.heads.patterns import check_patterns, check_prompts
from pyvene_ext.methods.heads.published import KNOWN, read_known
from pyvene_ext.methods.heads.translation import found_heads, of_swaps, translation_scores
from pyvene_ext.models.devices import input_device, is_main_process
from pyvene_ext.models.loading import TINY_MODELS
from pyvene_ext.models.loading.fetch import PUBLISHED
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.sizes import heads_of, n_heads, n_layers, n_positions
from pyvene_ext.prompts.parallel import (
    OPUS_100,
    Languages,
    SentencePair,
    WordPrompts,
    filter_pairs,
    load_pairs,
    lone_word_prompts,
    parse_languages,
    swap_neighbours,
    tokenize_pairs,
    word_prompts,
    word_spans,
)
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.runs.flags import TranslatedWords, Translation
from pyvene_ext.runs.plans import seconds_a_pass
from pyvene_ext.stats.controls import Head, head_label
from pyvene_ext.stats.intervals import Interval, student_interval

THRESHOLDS = {"difference": 0.05, "translation": 0.13}
HIGHEST = 5  # heads that are studied if none is above the threshold and no threshold is published for the model
FEWEST = 4  # prompts that an interval needs
SWAPS = 4  # with fewer an interval over swaps says little
PROMPTS = 40  # of each word, if --limit does not say


# -- what the flags stand for ------------------------------------------------------------------------------------------


def dataset_of(flags: Translation) -> str:
    """The data set that is read."""
    without = "en_fr" if flags.model in TINY_MODELS else "sentences" if flags.model in PUBLISHED else OPUS_100
    return flags.dataset or without


def criterion_of(flags: Translation) -> str:
    """What must be above the threshold: "difference" or "translation"."""
    return flags.criterion or ("translation" if flags.model in TINY_MODELS else "difference")


def published(flags: Translation) -> dict[str, Any]:
    """Heads and thresholds that are known of the model, which goes by the end of its name; nothing if none are."""
    models = {name.lower(): known for name, known in read_known(flags.known or KNOWN).items()}
    return models.get(Path(flags.model).name.lower(), {})


def source_of_threshold(flags: Translation) -> str:
    """Where the thresholds of the heads come from, for the terminal."""
    if flags.threshold is not None or flags.thresholds:
        return "given"
    if published(flags) and criterion_of(flags) == "difference":
        return "published for this model"
    return "a convention of ours, published for no model like this one"


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
        translation, control = compared(self.translation, self.control)
        return np.nanmean(translation, 0), np.nanmean(control, 0)

    @property
    def difference(self) -> Interval:
        """Translation - control by head, with Student's t 95% interval over sentences, paired if every sentence has a control."""
        if len(self.translation) == len(self.control):
            return student_interval(np.moveaxis(self.translation - self.control, 0, -1))
        both = [student_interval(np.moveaxis(values, 0, -1)) for values in (self.translation, self.control)]
        mean = both[0].mean - both[1].mean
        half = np.hypot(*(of.high - of.mean for of in both))
        return Interval(mean, mean - half, mean + half)


def compared(
    translation: Float[np.ndarray, "sentence layer head"], control: Float[np.ndarray, "sentence layer head"]
) -> tuple[Float[np.ndarray, "sentence layer head"], Float[np.ndarray, "sentence layer head"]]:
    """The scores that means are over: where every sentence has a control, of those sentences that were skipped in neither.

    Args:
        translation: NaN where a sentence was skipped.
        control: likewise.

    Returns:
        Both, with NaN for what does not count.
    """
    if len(translation) != len(control):
        return translation, control
    skipped = np.isnan(translation) | np.isnan(control)
    return np.where(skipped, np.nan, translation), np.where(skipped, np.nan, control)


def load_sentences(pair: str, flags: Translation) -> list[SentencePair]:
    """The sentences of a pair of languages, before any filter (`parallel.load_pairs` says what is refused)."""
    flag = "pair" if isinstance(flags, TranslatedWords) else "pairs"
    try:
        return load_pairs(find_prompts(dataset_of(flags), ".tsv"), parse_languages(pair), flags.split)
    except ValueError as error:
        raise ValueError(f"--{flag} {pair}: {error}") from None


def check_words(words: Sequence[int], pairs: Sequence[SentencePair], pair: str) -> None:
    """Check that there are translations that have the words asked for.

    Args:
        words: of --words.
        pairs: sentences and their translations.
        pair: the languages, for the error.

    Raises:
        ValueError: the longest translation has too few words.
    """
    longest = max(len(word_spans(one.target)) for one in pairs)
    for word in words:
        if word >= longest:
            raise ValueError(
                f"--words {word}: the longest {pair} translation has {counted(longest, 'word')}; give numbers from 0 to "
                f"{longest - 1}."
            )


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
        limit: keep at most this many; 0 or None for all.

    Returns:
        The sentence pairs of the languages.

    Raises:
        ValueError: what no model could be run on, or has no control.
    """
    kept, dropped = filter_pairs(raw, tokenizer, flags.max_length_difference)
    kept = kept[: limit or None]
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
    of_both = compared(translation, control)
    if any(np.isnan(values).all() for values in of_both):
        raise ValueError(f"{pair}: no sentence has crops long enough in translation and control; give longer text.")
    by_head = np.nanmean(of_both[0], 0)
    if criterion_of(flags) == "difference":
        by_head = by_head - np.nanmean(of_both[1], 0)
    return Scores(translation, control, by_head, threshold, found_heads(by_head, threshold))


# -- prompts that ask for one word -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordSetting:
    """One model on the words of one pair of languages.

    Attributes:
        sentences: of the pair, whole.
        asked: the prompts for the words, whole swaps of them.
        given: the heads that were named, if any.
        threshold: from which on heads are found by their attention.
        right: whether the right word is the most likely of all in each prompt, untouched; None if prompts are in swaps.
    """

    flags: TranslatedWords
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sentences: Sentences
    asked: WordPrompts
    given: tuple[Head, ...]
    threshold: float
    right: np.ndarray | None = None

    @cached_property
    def scores(self) -> Scores:
        """How every head attends to the source while the translation is read; a few forward passes, once."""
        return scores_of(self.flags.pair, self.sentences, self.model, self.threshold, self.flags)

    @cached_property
    def heads(self) -> list[Head]:
        """The heads given, else those found by their attention, else the highest; ValueError if none is above a --threshold."""
        found = list(self.given) or self.scores.found
        if not found and self.flags.threshold is None and not self.flags.thresholds and not published(self.flags):
            return found_heads(self.scores.by_head, -np.inf)[:HIGHEST]
        if not found:
            raise ValueError(
                f"no head is above the threshold of {self.threshold:g}, so that there is none to study; lower --threshold, or "
                "name --heads."
            )
        return found

    @property
    def likely_heads(self) -> list[Head]:
        """The heads given, else as many as mostly are found, spread over the layers: for how long they will take."""
        layers, heads = n_layers(self.model.config), n_heads(self.model.config)
        spread = np.linspace(0, layers * heads - 1, min(HIGHEST, layers * heads)).astype(int)
        return list(self.given) or [divmod(int(one), heads) for one in spread]

    def seconds_to_find_heads(self) -> float:
        """How long it takes to score all heads by their attention, on sentences and their controls, if none are given."""
        return 0.0 if self.given else 3 * seconds_a_pass(self.model, self.sentences.prompts)

    @property
    def contrast(self) -> str:
        """What the wrong word is: that of a "swap", or the strongest "rival"."""
        return "swap" if self.asked.in_couples else "rival"

    @property
    def items(self) -> str:
        """What intervals are over."""
        return "swaps" if self.asked.in_couples else "prompts"

    @property
    def measure(self) -> str:
        """What is read of every item."""
        return (
            "paired logit difference"
            if self.asked.in_couples
            else "logit of the right word above its strongest rival's"
        )

    def by_item(self, values: Float[np.ndarray, "*set prompt"]) -> Float[np.ndarray, "*set item"]:
        """Logit differences by swap, or by prompt where there are no swaps."""
        return of_swaps(values) if self.asked.in_couples else values

    @property
    def facts(self) -> dict[str, Any]:
        """What was run, for the summary."""
        return {
            "model": self.flags.model,
            "dataset": dataset_of(self.flags),
            "pair": self.flags.pair,
            "n_prompts": len(self.asked.plus),
            "contrast": self.contrast,
            "clean_accuracy": None if self.right is None else float(self.right.mean()),
            "dropped": dict(self.asked.dropped),
            "hash": self.asked.plus.hash,
            "seed": self.flags.seed,
        }

    def headline(self, heads: Sequence[Head] = ()) -> str:
        """What was run, for the terminal: the prompts, some of the words, and the heads if not all."""
        some = ", ".join(list(dict.fromkeys(self.asked.words))[:4])
        of_heads = f"heads {', '.join(map(head_label, heads)) or 'all, one at a time'}"
        if heads and not self.given and not self.scores.found:
            of_heads += f" (none is above {self.threshold:g}; these are the highest)"
        lines = [
            f"{self.flags.model}, {self.flags.pair}: {len(self.asked.plus)} prompts for words "
            f"{', '.join(map(str, self.flags.words))} (such as {some}), {of_heads}"
        ]
        if self.right is not None:
            if self.flags.contrast is None:
                lines.append(
                    "hardly two translations agree up to these words, so that every sentence is asked for its own"
                )
            lines.append(
                f"untouched, the right word is the most likely of all after {self.right.mean():.0%} of the prompts"
            )
        return "\n".join(lines)


def prepare(flags: TranslatedWords, heads: Sequence[str] = (), *, scores: bool = False) -> WordSetting:
    """Load model and sentences and make the prompts for --words; the only pass is the one that finds the strongest rivals.

    Args:
        flags: of the study.
        heads: as `head_label` writes them; none for those found by their attention.
        scores: whether all heads are scored by their attention even if some are given.

    Returns:
        The model, its sentences and the prompts of each word.

    Raises:
        ValueError: flags, sentences or a model that could not be run; fewer than two swaps of sentences, or four prompts.
    """
    if 0 < (flags.limit or 0) < FEWEST:
        raise ValueError(
            f"--limit must be {FEWEST} or more, or 0 for all, not {flags.limit}: an interval needs as many."
        )
    raw = load_sentences(flags.pair, flags)
    languages = parse_languages(flags.pair)
    threshold = threshold_of(languages, flags)
    check_words(flags.words, raw, flags.pair)
    model, tokenizer = flags.load_model()
    given = heads_of(heads, flags.model, model)
    if scores:
        check_patterns(model)
    sentences = sentences_of(flags.pair, raw, model, tokenizer, flags)
    check_words(flags.words, sentences.kept, flags.pair)
    options: dict[str, Any] = {"template": flags.template, "max_length": n_positions(model.config)}
    asked = _asked(tokenizer, sentences.kept, languages, flags, options)
    right = None
    if not asked.in_couples:
        asked, right = _against_rivals(model, asked, flags.batch_size)
    return WordSetting(flags, model, tokenizer, sentences, asked, given, threshold, right)


def _asked(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[SentencePair],
    languages: Languages,
    flags: TranslatedWords,
    options: dict[str, Any],
) -> WordPrompts:
    """The prompts of all words, in swaps or alone."""
    limit = PROMPTS if flags.limit is None else flags.limit or len(flags.words) * len(pairs)
    if flags.contrast != "rival":
        try:
            swaps = [word_prompts(tokenizer, pairs, languages, word, **options) for word in flags.words]
        except ValueError:
            if flags.contrast == "swap":
                raise
            swaps = []
        if swaps and (flags.contrast == "swap" or sum(len(of_word.words) for of_word in swaps) >= 2 * SWAPS):
            asked = reduce(add, (of_word.first(limit) for of_word in swaps))
            if len(asked.words) < FEWEST:
                raise ValueError(
                    "only one swap of sentences is left at these words, and an interval needs two; choose other --words, or give "
                    "more sentences."
                )
            return asked
    alone = [lone_word_prompts(tokenizer, pairs, languages, word, **options) for word in flags.words]
    asked = reduce(add, (of_word.first(limit) for of_word in alone))
    if len(asked.words) < FEWEST:
        raise ValueError(
            f"{len(asked.words)} sentences are left at these words, and an interval needs four; choose other --words, or give "
            "more sentences."
        )
    return asked


def _against_rivals(model: PreTrainedModel, asked: WordPrompts, batch_size: int) -> tuple[WordPrompts, np.ndarray]:
    """The prompts with the strongest rival as their wrong answer, and whether the right word is the most likely of all."""
    rivals, right = np.zeros(len(asked.plus), int), np.zeros(len(asked.plus), bool)
    own = np.array([answers.right[0][0] for answers in asked.plus.answers])
    with evaluating(model), torch.no_grad():
        for batch in asked.plus.batches(batch_size):
            first, second = answer_logits(model, batch.to(input_device(model))).topk(2).indices.cpu().numpy().T
            is_first = first == own[batch.index]
            rivals[batch.index], right[batch.index] = np.where(is_first, second, first), is_first
    return asked.with_rivals(rivals.tolist()), right
