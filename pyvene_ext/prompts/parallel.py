"""Parallel text: sentences with their translations, the filters and controls of the study of translation heads, as prompts.

    pairs = load_pairs("sentences.tsv", ("en", "fr"))
    kept, dropped = filter_pairs(pairs, tokenizer)
    prompts = tokenize_pairs(tokenizer, kept, ("en", "fr"))             # "EN: the cat sees the dog. FR: le chat voit le chien."
    control = tokenize_pairs(tokenizer, swap_neighbours(kept, tokenizer), ("en", "fr"))

A TSV file has a first line of language codes, tab-separated, and one sentence a column below. A JSONL file has one object a line,
`{"en": ..., "fr": ...}` or `{"translation": {"en": ..., "fr": ...}}`. Both may hold further languages. Anything else is the name
of a data set on the hub that is arranged as opus-100: a configuration a pair, its languages in alphabetical order.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from pyvene_ext.io.files import parse_json
from pyvene_ext.prompts.tokenized import (
    TokenizedPrompt,
    TokenizedPrompts,
    encode,
    held_tokens,
    tokenize_prompt,
)

Languages = tuple[str, str]
Minus = Literal["source", "label"]
TEMPLATE = "{source_label}: {source} {target_label}: {target}"
OPUS_100 = "Helsinki-NLP/opus-100"
WORDS = (3, 50)
TOKEN_DIFFERENCE = 5
UNWANTED = re.compile(r"[%\-_\\/*&\u3000\u2669-\u266f]")  # the last are notes of music
# Chinese, Japanese, Thai, Lao and Khmer write no spaces between words: each character stands for a word there.
SPACELESS = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


class SentencePair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


def parse_languages(pair: str) -> Languages:
    """The two languages of "en-fr", source first. Raises ValueError for anything else."""
    codes = tuple(pair.lower().split("-"))
    if len(codes) != 2 or not all(re.fullmatch(r"[a-z_]+", code) for code in codes) or codes[0] == codes[1]:
        raise ValueError(f"{pair!r} is no pair of languages; write two different codes as in en-fr, source first.")
    return codes[0], codes[1]


# -- reading -----------------------------------------------------------------------------------------------------------


def load_pairs(source: str | Path, languages: Languages, split: str | None = None) -> list[SentencePair]:
    """The sentences of two languages, in their order; a side may be empty, which `filter_pairs` drops and counts.

    Args:
        source: a .tsv or .jsonl file, or the name of a data set on the hub.
        languages: source and target language, by their codes in the file.
        split: of a data set on the hub; by default "train[:1000]", and "test" for pairs without English, which opus-100 has no
            training sentences of.

    Raises FileNotFoundError for a missing file, ValueError in one sentence, with file and line, for content that is no parallel
    text of these languages, and OSError for a data set that cannot be loaded.
    """
    path = Path(source)
    if path.suffix.lower() in (".tsv", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path} of parallel text; check the path.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; save it in that encoding.") from None
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = _from_tsv(path, lines) if path.suffix.lower() == ".tsv" else _from_jsonl(path, lines)
    elif path.exists():
        raise ValueError(f"{path} is no parallel text by its name; give a .tsv or a .jsonl file.")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(f"there is no file {path} of parallel text; check the path.")
    else:
        rows = _from_hub(str(source), languages, split)
    pairs = [_pair(where, row, languages) for where, row in rows]
    if not any(pair.source and pair.target for pair in pairs):
        raise ValueError(f"{source} holds no sentences in {' and '.join(languages)}; give at least one pair.")
    return pairs


def _from_tsv(path: Path, lines: list[tuple[int, str]]) -> Iterable[tuple[str, dict[str, Any]]]:
    header = [code.strip().lower() for code in lines[0][1].split("\t")] if lines else []
    for number, line in lines[1:]:
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number} has {len(cells)} columns but the first line names {len(header)} languages; put one "
                "sentence a column, with one tab between two."
            )
        yield f"{path}, line {number}", dict(zip(header, cells, strict=True))


def _from_jsonl(path: Path, lines: list[tuple[int, str]]) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in lines:
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not one JSON object ({error.msg}).") from None
        yield f"{path}, line {number}", row


def _from_hub(name: str, languages: Languages, split: str | None) -> Iterable[tuple[str, dict[str, Any]]]:
    import datasets  # takes seconds to import

    config = "-".join(sorted(languages))
    split = split or ("train[:1000]" if "en" in languages else "test")
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the network and the readers of a dozen formats each raise their own kinds
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise OSError(
            f"{config} of {name} cannot be loaded as a data set of the hub ({reason}); give a local .tsv or .jsonl file instead."
        ) from error
    return ((f"{name} ({config}, {split}), row {number}", row) for number, row in enumerate(rows))


def _pair(where: str, row: Any, languages: Languages) -> SentencePair:
    texts = row.get("translation", row) if isinstance(row, dict) else None
    if not isinstance(texts, dict):
        raise ValueError(f"{where}: should be an object with one text a language, not {row!r}.")
    for language in languages:
        if not isinstance(texts.get(language), str):
            raise ValueError(
                f"{where} has no text in {language!r}; it has {', '.join(map(repr, texts)) or 'nothing'}: choose other "
                "languages, or correct it."
            )
    return SentencePair(*(texts[language].strip() for language in languages))


# -- the published filters and control ---------------------------------------------------------------------------------


def word_spans(text: str) -> list[tuple[int, int]]:
    """`[start, end)` of every word: what stands between spaces; in scripts that write none, every character (ours)."""
    return [match.span() for match in WORD.finditer(text)]


def filter_pairs(
    pairs: Sequence[SentencePair], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[SentencePair], Counter[str]]:
    """The pairs that the study of translation heads keeps, and how many are dropped for which reason (the first that holds).

    Kept are pairs with something on both sides, 3 to 50 words in the source, no digit and none of `% - _ \\ / * &`, U+3000 or a
    note of music on either side, and numbers of tokens that differ by 5 at most.
    """
    kept, dropped = [], Counter[str]()
    for pair in pairs:
        both = pair.source + pair.target
        if not (pair.source and pair.target):
            dropped["one side is empty"] += 1
        elif not WORDS[0] <= len(word_spans(pair.source)) <= WORDS[1]:
            dropped[f"not {WORDS[0]} to {WORDS[1]} words"] += 1
        elif any(character.isdigit() for character in both):
            dropped["digits"] += 1
        elif UNWANTED.search(both):
            dropped["unwanted characters"] += 1
        elif abs(_n_tokens(tokenizer, pair.source) - _n_tokens(tokenizer, pair.target)) > TOKEN_DIFFERENCE:
            dropped[f"lengths differ by more than {TOKEN_DIFFERENCE} tokens"] += 1
        else:
            kept.append(pair)
    return kept, dropped


def swap_neighbours(pairs: Sequence[SentencePair], tokenizer: PreTrainedTokenizerBase) -> list[SentencePair]:
    """The control: every source with the target of another pair that is about as long, in the order of `pairs`.

    The pairs are sorted by the number of tokens of their targets, and neighbours swap targets; of an odd number the last three
    go round. Where two neighbours have the same target a "control" would be a translation, and is left out.

    Raises ValueError for fewer than two pairs.
    """
    if len(pairs) < 2:
        raise ValueError(f"a control swaps the targets of neighbours, which takes two pairs or more, not {len(pairs)}.")
    order = sorted(range(len(pairs)), key=lambda i: _n_tokens(tokenizer, pairs[i].target))
    giver: dict[int, int] = {}
    starts = range(0, len(order) - 1, 2)
    for start in starts:
        group = order[start : start + 2] if start != starts[-1] else order[start:]  # the last is of two or three
        giver |= zip(group, group[1:] + group[:1], strict=True)
    swapped = [SentencePair(pair.source, pairs[giver[i]].target) for i, pair in enumerate(pairs)]
    return [new for new, pair in zip(swapped, pairs, strict=True) if new.target != pair.target]


def _n_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# -- prompts -----------------------------------------------------------------------------------------------------------


def label_of(language: str) -> str:
    """What a prompt calls a language: "EN"."""
    return language.upper()


def check_template(template: str) -> None:
    """Raise ValueError unless a template has the four parts of a prompt, the target's label behind the source."""
    fields, wanted = (re.findall(r"\{[^{}]*\}|[{}]", text) for text in (template, TEMPLATE))
    if sorted(fields) != sorted(wanted) or fields[-2:] != wanted[-2:]:
        raise ValueError(
            f"the template {template!r} must hold {', '.join(wanted)}, each once and the last two last, as in {TEMPLATE!r}."
        )


def render(pair: SentencePair, languages: Languages, template: str = TEMPLATE) -> tuple[str, tuple[int, int]]:
    """The text of a pair's prompt, and `[start, end)` of the target's label in it."""
    before, behind = template.split("{target_label}")
    source, target = map(label_of, languages)
    start = len(front := before.format(source_label=source, source=pair.source))
    return front + target + behind.format(target=pair.target), (start, start + len(target))


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[SentencePair],
    languages: Languages,
    template: str = TEMPLATE,
    max_length: int | None = None,
) -> TokenizedPrompts:
    """The prompts of pairs, with the positions "label", the token where the target's label begins, and "first", the first token
    behind a start token. They have no answers (both ids are 0).

    The label is found by its place in the text, so that a sentence may hold the same word.

    Raises ValueError, naming the prompt, for words that the tokenizer does not know, a label that no token holds, and a prompt of
    more than `max_length` tokens.
    """
    check_template(template)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot say where the label is; load the fast one."
        )
    rows = []
    for number, pair in enumerate(pairs):
        text, span = render(pair, languages, template)
        where = f"prompt {number} ({text!r})"
        ids, offsets = encode(tokenizer, text, where)
        label = held_tokens(offsets, *span)
        if not label:
            raise ValueError(
                f"{where}: no token holds the label {text[slice(*span)]!r}; use another template, or another tokenizer."
            )
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"{where} has {len(ids)} tokens and the model takes {max_length}; leave the pair out.")
        first = int(ids[0] == tokenizer.bos_token_id)
        positions = {"end": -1, "last": -1, "label": label[0] - len(ids), "first": first - len(ids)}
        rows.append(TokenizedPrompt(tuple(ids), (0, 0), positions))
    return _prompts(rows, tokenizer)


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> TokenizedPrompts:
    """Texts by themselves as prompts without answers (both ids are 0)."""
    encoded = [encode(tokenizer, text, f"text {number} ({text!r})").ids for number, text in enumerate(texts)]
    return _prompts([TokenizedPrompt(tuple(ids), (0, 0), {"end": -1, "last": -1}) for ids in encoded], tokenizer)


def _prompts(rows: Sequence[TokenizedPrompt], tokenizer: PreTrainedTokenizerBase) -> TokenizedPrompts:
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    ids, answers, positions = zip(*rows, strict=True)
    return TokenizedPrompts(ids, answers, positions, next(pad for pad in pads if pad is not None))


# -- one word of a translation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordPrompts:
    """Prompts that end before one word of the translation, two by two: rows 2i and 2i + 1 are each other's swap.

    Attributes:
        plus: the prompts (X+); each has as answers the first tokens of its own next word and of its swap's, and the positions
            "source_first" and "source", the first and the last token of the sentence to be translated.
        minus: what differs (X-), with the same answers: by "source" the swap's prompt, by "label" its own with the source's
            label in place of the target's, so that nothing asks for a translation.
        words: the next word of every prompt.
        dropped: how many pairs are in no prompt, by reason.
    """

    plus: TokenizedPrompts
    minus: dict[Minus, TokenizedPrompts]
    words: tuple[str, ...]
    dropped: Counter[str]

    def __add__(self, other: WordPrompts) -> WordPrompts:
        """The prompts of both, those of another word behind the ones of the first."""
        plus, *minus = (
            replace(
                mine,
                input_ids=mine.input_ids + theirs.input_ids,
                answer_ids=mine.answer_ids + theirs.answer_ids,
                positions=mine.positions + theirs.positions,
            )
            for mine, theirs in ((self.plus, other.plus), *((self.minus[of], other.minus[of]) for of in self.minus))
        )
        of_minus = dict(zip(self.minus, minus, strict=True))
        return WordPrompts(plus, of_minus, self.words + other.words, self.dropped + other.dropped)

    def first(self, n: int) -> WordPrompts:
        """At most so many prompts, whole swaps."""
        kept = range(min(len(self.words), n // 2 * 2))
        minus = {what: prompts.take(kept) for what, prompts in self.minus.items()}
        return replace(self, plus=self.plus.take(kept), minus=minus, words=self.words[: len(kept)])


def word_prompts(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[SentencePair],
    languages: Languages,
    word: int,
    *,
    template: str = TEMPLATE,
    max_length: int | None = None,
) -> WordPrompts:
    """Prompts that ask for one word of the translation, the words before it given.

    `word` counts from 0. Two pairs are each other's swap if their translations begin with the same words and go on with different
    ones; so that the sentence to be translated alone tells which of the two comes next. Among those, neighbours in number of
    words are taken. Where the two words begin with the same tokens, these join both prompts.

    Raises ValueError if no two pairs are each other's swap, or the tokenizer does not know a word.
    """
    check_template(template)
    if word < 0:
        raise ValueError(f"word counts the words of a translation from 0, so it cannot be {word}.")
    dropped = Counter[str]()
    groups: dict[str, list[_Asked]] = {}
    for pair in pairs:
        spans = word_spans(pair.target)
        if len(spans) <= word:
            dropped[f"no word {word} in the translation"] += 1
            continue
        asked = _Asked(pair, *spans[word])
        groups.setdefault(pair.target[: asked.start], []).append(asked)
    rows: list[_Row] = []
    untold = ""
    for group in groups.values():
        waiting: list[_Asked] = []
        for asked in sorted(group, key=lambda one: len(word_spans(one.pair.source))):
            other = next((one for one in waiting if one.word != asked.word), None)
            if other is None:
                waiting.append(asked)
                continue
            waiting.remove(other)
            try:
                rows += _couple(tokenizer, (other, asked), languages, template, max_length)
            except ValueError as error:
                dropped["tokens do not tell the words apart"] += 2
                untold = f" {error}"
        dropped["no other pair to swap with"] += len(waiting)
    dropped = +dropped
    if not rows:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise ValueError(
            f"no two of {len(pairs)} pairs can be swapped at word {word} ({why}); choose another word, or give more pairs."
            + untold
        )
    plus, source, label, words = zip(*rows, strict=True)
    minus: dict[Minus, TokenizedPrompts] = {"source": _prompts(source, tokenizer), "label": _prompts(label, tokenizer)}
    return WordPrompts(_prompts(plus, tokenizer), minus, words, dropped)


_Row = tuple[TokenizedPrompt, TokenizedPrompt, TokenizedPrompt, str]


class _Asked(NamedTuple):
    """A pair and the characters of its target that are asked for."""

    pair: SentencePair
    start: int
    end: int

    @property
    def word(self) -> str:
        return self.pair.target[self.start : self.end]

    def texts(self, languages: Languages, template: str) -> tuple[str, str]:
        """The prompt up to the word, and what the word adds to it."""
        whole, _ = render(self.pair, languages, template)
        target = len(whole) - len(self.pair.target)
        prompt = whole[: target + self.start].rstrip()
        return prompt, whole[len(prompt) : target + self.end]

    def places(self, languages: Languages, template: str) -> dict[str, tuple[int, int]]:
        """The first character and all characters of the source in the prompt."""
        start = len(template.split("{source}")[0].format(source_label=label_of(languages[0])))
        return {"source_first": (start, start + 1), "source": (start, start + len(self.pair.source))}


def _couple(
    tokenizer: PreTrainedTokenizerBase,
    couple: tuple[_Asked, _Asked],
    languages: Languages,
    template: str,
    max_length: int | None,
) -> list[_Row]:
    """X+, both X- and word of both; ValueError where tokens do not tell the two words apart."""

    def tokenized(asked: _Asked, wanted: _Asked, languages: Languages) -> TokenizedPrompt:
        prompt, places = asked.texts(languages, template)[0], asked.places(languages, template)
        answers = [one.texts(languages, template)[1] for one in (wanted, *(one for one in couple if one is not wanted))]
        return tokenize_prompt(
            tokenizer,
            prompt,
            (answers[0], answers[1]),
            places,
            "first_difference",
            max_length,
            f"the prompt {prompt!r}",
        )

    rows: list[_Row] = []
    for asked, other in (couple, couple[::-1]):
        plus = tokenized(asked, asked, languages)
        source, label = tokenized(other, asked, languages), tokenized(asked, asked, (languages[0], languages[0]))
        if not plus.answer_ids == source.answer_ids == label.answer_ids:
            raise ValueError(f"the word {asked.word!r} has other tokens in X- than in X+.")
        rows.append((plus, source, label, asked.word))
    return rows
