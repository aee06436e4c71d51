"""Parallel text as prompts: sentences with their translations, and the filters and controls of the translation-heads study.

    pairs = load_pairs("sentences.tsv", ("en", "fr"))
    kept, dropped = filter_pairs(pairs, tokenizer)
    prompts = tokenize_pairs(tokenizer, kept, ("en", "fr"))             # "EN: the cat sees the dog. FR: le chat voit le chien."
    control = tokenize_pairs(tokenizer, swap_neighbours(kept, tokenizer), ("en", "fr"))

A TSV file has language codes in its first line, tab-separated, and one sentence per column in the others. A JSONL file has one
object per line, `{"en": ..., "fr": ...}` or `{"translation": {"en": ..., "fr": ...}}`. Both may hold further languages. Anything
else is the name of a data set on the hub with the layout of opus-100: one configuration per pair, its languages in alphabetical
order.
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
from pyvene_ext.prompts.encoding import (
    AnswerTexts,
    AnswerTokens,
    TokenizedPrompt,
    answer_pairs,
    encode,
    pad_id,
    tokenize_prompt,
    tokens_in_span,
)
from pyvene_ext.prompts.tokenized import TokenizedPrompts, collect

Languages = tuple[str, str]
Minus = Literal["source", "label"]
TEMPLATE = "{source_label}: {source} {target_label}: {target}"
OPUS_100 = "Helsinki-NLP/opus-100"
WORDS = (3, 50)
TOKEN_DIFFERENCE = 5
UNWANTED = re.compile(r"[%\-_\\/*&\u3000\u2669-\u266f]")  # the last are musical symbols
# Chinese, Japanese, Thai, Lao and Khmer are written without spaces: each character counts as a word there.
SPACELESS = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")


class SentencePair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


def parse_languages(pair: str) -> Languages:
    """Split "en-fr" into its two languages, source first.

    Args:
        pair: two different language codes, joined by a hyphen.

    Returns:
        The codes, in lower case.

    Raises:
        ValueError: anything else.
    """
    codes = tuple(pair.lower().split("-"))
    if len(codes) != 2 or not all(re.fullmatch(r"[a-z_]+", code) for code in codes) or codes[0] == codes[1]:
        raise ValueError(f"{pair!r} is not a pair of languages; write two different codes as in en-fr, source first.")
    return codes[0], codes[1]


# -- reading -----------------------------------------------------------------------------------------------------------


def load_pairs(source: str | Path, languages: Languages, split: str | None = None) -> list[SentencePair]:
    """Load the sentences of two languages.

    Args:
        source: a .tsv or .jsonl file, or the name of a data set on the hub.
        languages: source and target language, by their codes in the file.
        split: split of a data set on the hub; default "train[:1000]", or "test" for pairs without English, for which opus-100 has
            no training sentences.

    Returns:
        The pairs, in order; a side may be empty (`filter_pairs` drops and counts such pairs).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is not parallel text of these languages; says in which file and line.
        OSError: the data set cannot be loaded from the hub.
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
        raise ValueError(f"{path} is not named as parallel text; give a .tsv or a .jsonl file.")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
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
                "sentence in each column, separated by single tabs."
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
        raise ValueError(f"{where}: should be an object with one text per language, not {row!r}.")
    for language in languages:
        if not isinstance(texts.get(language), str):
            raise ValueError(
                f"{where} has no text in {language!r}; it has {', '.join(map(repr, texts)) or 'nothing'}: choose other "
                "languages, or correct it."
            )
    return SentencePair(*(texts[language].strip() for language in languages))


# -- the published filters and control ---------------------------------------------------------------------------------


def word_spans(text: str) -> list[tuple[int, int]]:
    """Split a text into words.

    Args:
        text: any text.

    Returns:
        `[start, end)` in characters of every word: a run between spaces, or in scripts without spaces each character (our
        addition to the published filter).
    """
    return [match.span() for match in WORD.finditer(text)]


def filter_pairs(
    pairs: Sequence[SentencePair], tokenizer: PreTrainedTokenizerBase, token_difference: int = TOKEN_DIFFERENCE
) -> tuple[list[SentencePair], Counter[str]]:
    r"""Filter pairs as the translation-heads study does.

    A pair is kept if both sides have text, the source has 3 to 50 words, neither side has a digit, one of `% - _ \ / * &`, U+3000
    or a musical symbol, and the two sides differ by at most `token_difference` tokens.

    Args:
        pairs: sentence pairs.
        tokenizer: counts the tokens.
        token_difference: the most tokens by which the sides may differ; 5 as published.

    Returns:
        The pairs kept, and the number dropped by reason (the first that applies).
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
        elif abs(_n_tokens(tokenizer, pair.source) - _n_tokens(tokenizer, pair.target)) > token_difference:
            dropped[f"lengths differ by more than {token_difference} tokens"] += 1
        else:
            kept.append(pair)
    return kept, dropped


def swap_neighbours(pairs: Sequence[SentencePair], tokenizer: PreTrainedTokenizerBase) -> list[SentencePair]:
    """Build the control: every source with the target of another pair of similar length.

    Pairs are sorted by the number of tokens in their targets, and neighbours swap targets; if the number of pairs is odd, the
    last three rotate theirs. If two neighbours have the same target the "control" would be a translation, and is dropped.

    Args:
        pairs: two sentence pairs or more.
        tokenizer: counts the tokens.

    Returns:
        The mismatched pairs, in the order of `pairs`.

    Raises:
        ValueError: fewer than two pairs.
    """
    partner = _partners(pairs, tokenizer)
    swapped = [SentencePair(pair.source, pairs[partner[i]].target) for i, pair in enumerate(pairs)]
    return [new for new, pair in zip(swapped, pairs, strict=True) if new.target != pair.target]


def _partners(pairs: Sequence[SentencePair], tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """The pair whose target each pair gets, of similar length."""
    if len(pairs) < 2:
        raise ValueError(f"a control swaps targets between pairs, which takes two pairs or more, not {len(pairs)}.")
    order = sorted(range(len(pairs)), key=lambda i: _n_tokens(tokenizer, pairs[i].target))
    partner: dict[int, int] = {}  # the pair whose target each pair gets
    starts = range(0, len(order) - 1, 2)
    for start in starts:
        group = order[start : start + 2] if start != starts[-1] else order[start:]  # the last has two or three
        partner |= zip(group, group[1:] + group[:1], strict=True)
    return partner


def _n_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# -- prompts -----------------------------------------------------------------------------------------------------------


def label_of(language: str) -> str:
    """The label of a language in a prompt: "EN" for "en"."""
    return language.upper()


def check_template(template: str) -> None:
    """Check that a template has the four parts of a translation prompt, the target's label and the target last.

    Args:
        template: a text like `TEMPLATE`.

    Raises:
        ValueError: a part is missing, there twice or out of order.
    """
    fields, wanted = (re.findall(r"\{[^{}]*\}|[{}]", text) for text in (template, TEMPLATE))
    if sorted(fields) != sorted(wanted) or fields[-2:] != wanted[-2:]:
        raise ValueError(
            f"the template {template!r} must hold {', '.join(wanted)}, each once and the last two last, as in {TEMPLATE!r}."
        )


def render(pair: SentencePair, languages: Languages, template: str = TEMPLATE) -> tuple[str, tuple[int, int]]:
    """Fill a template with a pair.

    Args:
        pair: source and target sentence.
        languages: their codes.
        template: a text that passes `check_template`.

    Returns:
        The text, and `[start, end)` in characters of the target's label in it.
    """
    before, after = template.split("{target_label}")
    source, target = map(label_of, languages)
    start = len(opening := before.format(source_label=source, source=pair.source))
    return opening + target + after.format(target=pair.target), (start, start + len(target))


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[SentencePair],
    languages: Languages,
    template: str = TEMPLATE,
    max_length: int | None = None,
) -> TokenizedPrompts:
    """Tokenise translation prompts, one per pair.

    Args:
        tokenizer: a fast one.
        pairs: sentence pairs.
        languages: their codes.
        template: a text like `TEMPLATE`.
        max_length: the most tokens that a prompt may have.

    Returns:
        The prompts, without answers, with the positions "label", the token where the target's label begins
        (found by its place in the text, since the sentence may contain the same word), and "first", the first token after any
        start token.

    Raises:
        ValueError: a word that the tokenizer does not know, a label without a token, or a prompt of more than `max_length`
            tokens; names the prompt.
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
        label = tokens_in_span(offsets, *span)
        if not label:
            raise ValueError(
                f"{where}: no token holds the label {text[slice(*span)]!r}; use another template, or another tokenizer."
            )
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"{where} has {len(ids)} tokens but the model takes {max_length}; leave the pair out.")
        first = int(ids[0] == tokenizer.bos_token_id)
        positions = {"end": -1, "last": -1, "label": label[0] - len(ids), "first": first - len(ids)}
        rows.append(TokenizedPrompt(tuple(ids), AnswerTokens(), positions))
    return collect(rows, tokenizer)


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> TokenizedPrompts:
    """Tokenise plain texts.

    Args:
        tokenizer: a fast one.
        texts: the texts.

    Returns:
        One prompt per text, without answers.

    Raises:
        ValueError: an empty text, or a word that the tokenizer does not know; names the text.
    """
    encoded = (encode(tokenizer, text, f"text {number} ({text!r})").ids for number, text in enumerate(texts))
    return TokenizedPrompts(tuple(map(tuple, encoded)), pad_id=pad_id(tokenizer))


# -- one word of a translation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordPrompts:
    """Prompts that end just before one word of the translation, in couples (rows 2i and 2i + 1 are each other's swap) or alone.

    Attributes:
        plus: the prompts (X+); the answers of each are the first tokens of its own next word and of its swap's (alone: only of
            its own); its positions "source_first" and "source" are the first and last token of the sentence to translate.
        minus: the counterfactual prompts (X-), with the same answers: under "source" the swap's prompt (alone: the prompt with
            another sentence to translate, of similar length), under "label" the prompt itself with the source's label in place
            of the target's, so that nothing asks for a translation.
        words: the next word of every prompt.
        dropped: the number of pairs without a prompt, by reason.
        in_couples: whether prompts are in couples.
    """

    plus: TokenizedPrompts
    minus: dict[Minus, TokenizedPrompts]
    words: tuple[str, ...]
    dropped: Counter[str]
    in_couples: bool = True

    def __add__(self, other: WordPrompts) -> WordPrompts:
        """Concatenate the prompts of two words."""
        plus, *minus = (
            replace(
                mine,
                input_ids=mine.input_ids + theirs.input_ids,
                answers=mine.answers + theirs.answers,
                positions=mine.positions + theirs.positions,
            )
            for mine, theirs in ((self.plus, other.plus), *((self.minus[of], other.minus[of]) for of in self.minus))
        )
        of_minus = dict(zip(self.minus, minus, strict=True))
        return WordPrompts(
            plus, of_minus, self.words + other.words, self.dropped + other.dropped, self.in_couples and other.in_couples
        )

    def with_rivals(self, rivals: Sequence[int]) -> WordPrompts:
        """Give every prompt a wrong answer.

        Args:
            rivals: its token, for every prompt.

        Returns:
            The same prompts, and counterfactuals, with the word's first token and its rival as answers.
        """
        own = [answers.right[0][0] for answers in self.plus.answers]
        plus, *minus = (
            prompts.with_answer_ids(zip(own, rivals, strict=True)) for prompts in (self.plus, *self.minus.values())
        )
        return replace(self, plus=plus, minus=dict(zip(self.minus, minus, strict=True)))

    def first(self, n: int) -> WordPrompts:
        """Keep the first couples.

        Args:
            n: the most prompts to keep; of couples rounded down to whole ones.

        Returns:
            The first prompts.
        """
        kept = range(min(len(self.words), n // 2 * 2 if self.in_couples else n))
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
    """Build prompts that ask for one word of the translation, given the words before it.

    Two pairs can be swapped if their translations share the words before `word` and differ in it, so that only the sentence to
    translate determines which of the two words comes next. Among those, pairs with similar numbers of words are coupled. If the
    two words begin with the same tokens, these are appended to both prompts.

    Args:
        tokenizer: a fast one.
        pairs: sentence pairs.
        languages: their codes.
        word: the word asked for, counted from 0.
        template: a text like `TEMPLATE`.
        max_length: the most tokens that a prompt may have; couples with longer ones are dropped.

    Returns:
        The prompts, their counterfactuals, and the number of pairs dropped by reason.

    Raises:
        ValueError: no two pairs can be swapped at this word.
    """
    check_template(template)
    targets, dropped = _targets(pairs, word)
    groups: dict[str, list[_Target]] = {}
    for target in targets.values():
        pair = target.pair
        groups.setdefault(pair.target[: target.start], []).append(target)
    rows: list[_Row] = []
    last_error = ""
    for group in groups.values():
        single: list[_Target] = []
        for target in sorted(group, key=lambda one: len(word_spans(one.pair.source))):
            other = next((one for one in single if one.word != target.word), None)
            if other is None:
                single.append(target)
                continue
            single.remove(other)
            try:
                rows += _couple(tokenizer, (other, target), languages, template, max_length)
            except ValueError as error:
                dropped["tokens do not tell the words apart"] += 2
                last_error = f" {error}"
        dropped["no other pair to swap with"] += len(single)
    dropped = +dropped
    if not rows:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise ValueError(
            f"no two of {len(pairs)} pairs can be swapped at word {word} ({why}); choose another word, or give more pairs."
            + last_error
        )
    return _collected(rows, tokenizer, dropped, in_couples=True)


def lone_word_prompts(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[SentencePair],
    languages: Languages,
    word: int,
    *,
    template: str = TEMPLATE,
    max_length: int | None = None,
) -> WordPrompts:
    """Build prompts that ask for one word of the translation from every pair, where hardly two translations agree up to it.

    Args:
        tokenizer: a fast one.
        pairs: sentence pairs.
        languages: their codes.
        word: the word asked for, counted from 0.
        template: a text like `TEMPLATE`.
        max_length: the most tokens that a prompt may have; longer ones are dropped.

    Returns:
        The prompts, each with the right answer alone, their counterfactuals, and the number of pairs dropped by reason. The other
        sentence of "source" is that of the pair whose translation has a similar number of tokens (`swap_neighbours`).

    Raises:
        ValueError: no pair has such a word.
    """
    check_template(template)
    targets, dropped = _targets(pairs, word)
    source_of = {got: giver for giver, got in _partners(pairs, tokenizer).items()}
    rows: list[_Row] = []
    last_error = ""
    for number, target in targets.items():
        pair, other = target.pair, pairs[source_of[number]]
        if other.source == pair.source or other.target[: target.end] == pair.target[: target.end]:
            dropped["another sentence of similar length asks for the same word"] += 1
            continue
        shown = target._replace(pair=SentencePair(other.source, pair.target))
        try:
            plus, source, label = (
                _tokenized(tokenizer, one, (target,), of, template, max_length)
                for one, of in ((target, languages), (shown, languages), (target, (languages[0], languages[0])))
            )
        except ValueError as error:
            dropped["cannot be tokenised"] += 1
            last_error = f" {error}"
            continue
        if len({row.answers.right for row in (plus, source, label)}) > 1:
            dropped["the word has different tokens in X+ and X-"] += 1
            continue
        rows.append((plus, source, label, target.word))
    if not rows:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise ValueError(
            f"no pair of {len(pairs)} can be asked for word {word} ({why}); choose another word." + last_error
        )
    return _collected(rows, tokenizer, dropped, in_couples=False)


_Row = tuple[TokenizedPrompt, TokenizedPrompt, TokenizedPrompt, str]


def _collected(
    rows: Sequence[_Row], tokenizer: PreTrainedTokenizerBase, dropped: Counter[str], in_couples: bool
) -> WordPrompts:
    plus, source, label, words = zip(*rows, strict=True)
    minus: dict[Minus, TokenizedPrompts] = {"source": collect(source, tokenizer), "label": collect(label, tokenizer)}
    return WordPrompts(collect(plus, tokenizer), minus, words, dropped, in_couples)


class _Target(NamedTuple):
    """A pair, and `[start, end)` in its target sentence of the word that a prompt asks for."""

    pair: SentencePair
    start: int
    end: int

    @property
    def word(self) -> str:
        return self.pair.target[self.start : self.end]

    def texts(self, languages: Languages, template: str) -> tuple[str, str]:
        """The prompt up to the word, and the text that the word appends to it."""
        whole, _ = render(self.pair, languages, template)
        target = len(whole) - len(self.pair.target)
        prompt = whole[: target + self.start].rstrip()
        return prompt, whole[len(prompt) : target + self.end]

    def places(self, languages: Languages, template: str) -> dict[str, tuple[int, int]]:
        """The spans of the source's first character and of the whole source in the prompt."""
        start = len(template.split("{source}")[0].format(source_label=label_of(languages[0])))
        return {"source_first": (start, start + 1), "source": (start, start + len(self.pair.source))}


def _targets(pairs: Sequence[SentencePair], word: int) -> tuple[dict[int, _Target], Counter[str]]:
    """The word asked for in the translation of every pair that is long enough, by the pair's number; and how many are not."""
    if word < 0:
        raise ValueError(f"word counts the words of a translation from 0, so it cannot be {word}; give 0 or more.")
    found, dropped = {}, Counter[str]()
    for number, pair in enumerate(pairs):
        spans = word_spans(pair.target)
        if len(spans) <= word:
            dropped[f"no word {word} in the translation"] += 1
        else:
            found[number] = _Target(pair, *spans[word])
    return found, dropped


def _couple(
    tokenizer: PreTrainedTokenizerBase,
    couple: tuple[_Target, _Target],
    languages: Languages,
    template: str,
    max_length: int | None,
) -> list[_Row]:
    """X+, both X- and the word, for each of the couple; ValueError if tokens do not tell the two words apart."""
    rows: list[_Row] = []
    for target, other in (couple, couple[::-1]):
        plus, source, label = (
            _tokenized(tokenizer, shown, (target, other), of, template, max_length)
            for shown, of in ((target, languages), (other, languages), (target, (languages[0], languages[0])))
        )
        first = [row.answers.first_ids(number) for number, row in enumerate((plus, source, label))]
        if len(set(first)) > 1:
            raise ValueError(f"the word {target.word!r} has different tokens in X+ and X-.")
        (answers,) = answer_pairs(first[:1])
        plus, source, label = (row._replace(answers=answers) for row in (plus, source, label))
        rows.append((plus, source, label, target.word))
    return rows


def _tokenized(
    tokenizer: PreTrainedTokenizerBase,
    shown: _Target,
    answers: tuple[_Target] | tuple[_Target, _Target],
    languages: Languages,
    template: str,
    max_length: int | None,
) -> TokenizedPrompt:
    """The prompt of a pair, with the words of others as its right and, if there are two, its wrong answer."""
    prompt, places = shown.texts(languages, template)[0], shown.places(languages, template)
    return tokenize_prompt(
        tokenizer,
        prompt,
        AnswerTexts(*((one.texts(languages, template)[1],) for one in answers)),
        places,
        "first_difference",
        max_length,
        f"the prompt {prompt!r}",
    )
