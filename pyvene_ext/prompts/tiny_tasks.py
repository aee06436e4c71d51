"""The tasks that the shipped tiny models are trained on, as seeded text generators.

Every task is a pure function of a NumPy generator and returns an `Example`: a prompt and the answer that follows it. Studies draw
their prompts from here too, so that every word is in the models' vocabulary.

Training and evaluation never share a prompt: `is_held_out` decides by a hash of the prompt's text, and `draw` returns prompts of
one side only.
"""

# ruff: noqa: SIM905  (word lists are easier to read, and to add to, as text)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import xxhash

T = TypeVar("T")
HELD_OUT_SHARE = 10  # one prompt in ten is never trained on


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; `prompt + answer` is the whole text."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class IOIPair:
    """An indirect-object prompt and its ABC counterfactual (Wang et al. 2022).

    Attributes:
        clean: the prompt.
        corrupt: the same sentence with three other names.
        io_name: the indirect object.
        s_name: the subject, which is named twice.
        io_token: the right answer as appended to the prompt.
        order: "ABBA" (IO S S) or "BABA" (S IO S).
    """

    clean: str
    corrupt: str
    io_name: str
    s_name: str
    io_token: str
    order: str


@dataclass(frozen=True)
class IOIWords:
    """What indirect-object sentences of one language are made of.

    Attributes:
        names: names of people.
        places: what fills `{place}` in a template, with article and preposition where the template has none.
        objects: what fills `{object}`.
        templates: sentences that end before the name of the indirect object, with `{first}`, `{second}`, `{subject}`, `{place}`
            and `{object}`.
        space: whether a space comes before that name.
    """

    names: Sequence[str]
    places: Sequence[str]
    objects: Sequence[str]
    templates: Sequence[str]
    space: bool = True


# --- vocabulary -------------------------------------------------------------------------------------------------------

NAMES_EN = (
    "Lisa David Mark Mary John James Robert Michael William Richard Joseph Thomas Charles Christopher Daniel Matthew "
    "Anthony Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Nancy Betty Margaret Sandra "
    "Emma Laura Peter Paul Anna Kevin Brian George Steven Edward Helen Alice Frank Henry Julia Simon Oscar Clara"
).split()
PLACES_EN = "store cafe park library school market museum station office garden hospital restaurant".split()
OBJECTS_EN = "apple book bottle card gift key letter message note package pen phone ring basket drink camera".split()
TEMPLATES_EN = (
    "When {first} and {second} went to the {place}, {subject} gave the {object} to",
    "When {first} and {second} met at the {place}, {subject} gave the {object} to",
    "After {first} and {second} met at the {place}, {subject} showed the {object} to",
    "While {first} and {second} were at the {place}, {subject} handed the {object} to",
    "When {first} and {second} were in the {place}, {subject} passed the {object} to",
    "After {first} and {second} went to the {place}, {subject} offered the {object} to",
    "Yesterday, {first} and {second} walked to the {place}, and {subject} sent the {object} to",
    "Then, {first} and {second} came to the {place}, and {subject} brought the {object} to",
)

NAMES_ZH = [
    f"小{given}" for given in "丽云伟军刚勇华娟婷峰平强敏明杰梅涛燕玲红芳雪霞龙亮飞波东洋英兰珍莉静琳慧鹏宇辉林"
]
PLACES_ZH = "商店 公园 图书馆 咖啡馆 学校 市场 博物馆 车站 办公室 医院 饭馆 花园".split()
OBJECTS_ZH = "书 电脑 水瓶 帽子 耳机 钥匙 笔记本 手机 钱包 礼物 手表 雨伞 照片 苹果".split()
OTHER_ZH = "当 和 去 在 时 把 给了 递给了 送给了 交给了 展示给了 碰面 见面 里 后 后来 昨天 来到 一起".split()
TEMPLATES_ZH = (
    "当{first}和{second}去{place}时，{subject}把{object}给了",
    "当{first}和{second}在{place}时，{subject}把{object}递给了",
    "当{first}和{second}在{place}碰面时，{subject}把{object}给了",
    "在{place}里，{first}和{second}见面后，{subject}把{object}展示给了",
    "昨天{first}和{second}来到{place}，{subject}把{object}送给了",
    "{first}和{second}一起去{place}，后来{subject}把{object}交给了",
)

IOI = {
    "en": IOIWords(NAMES_EN, PLACES_EN, OBJECTS_EN, TEMPLATES_EN),
    "zh": IOIWords(NAMES_ZH, PLACES_ZH, OBJECTS_ZH, TEMPLATES_ZH, space=False),
}

# English:French. No noun begins with a vowel, which would need elision ("l'"), and no word is spelt the same in both.
NOUNS_MASCULINE = (
    "cat:chat dog:chien boy:garçon king:roi horse:cheval rabbit:lapin wolf:loup brother:frère father:père doctor:médecin "
    "baker:boulanger fish:poisson neighbour:voisin fox:renard pig:cochon duck:canard sheep:mouton painter:peintre"
).split()
NOUNS_FEMININE = (
    "girl:fille woman:femme queen:reine cow:vache mouse:souris goat:chèvre hen:poule sister:soeur mother:mère "
    "singer:chanteuse turtle:tortue frog:grenouille witch:sorcière dancer:danseuse whale:baleine niece:nièce "
    "lady:dame princess:princesse"
).split()
# English:masculine:feminine; the adjective precedes the noun in English and follows it in French.
ADJECTIVES = (
    "red:rouge:rouge green:vert:verte black:noir:noire white:blanc:blanche grey:gris:grise yellow:jaune:jaune "
    "tired:fatigué:fatiguée happy:heureux:heureuse strong:fort:forte calm:tranquille:tranquille "
    "brave:courageux:courageuse clever:malin:maligne sad:triste:triste rich:riche:riche"
).split()
VERBS = (
    "sees:voit follows:suit helps:aide hears:entend knows:connaît finds:trouve greets:salue watches:regarde "
    "calls:appelle draws:dessine carries:porte loves:aime wakes:réveille pushes:pousse"
).split()
# The adverb precedes the verb in English and follows it in French.
ADVERBS = "often:souvent always:toujours rarely:rarement quickly:vite".split()
ARTICLES = (("the", "le", "la"), ("a", "un", "une"))

THINGS = "apples books coins cards pens stamps cakes eggs shells stickers".split()
LARGEST_NUMBER = 30
GAINS = ("{other} gives {who} {n} {things}.", "{who} finds {n} {things}.", "{who} buys {n} {things}.")
LOSSES = ("{who} gives {other} {n} {things}.", "{who} loses {n} {things}.", "{who} sells {n} {things}.")
STORY = "Question: {who} has {n} {things}. {steps} How many {things} does {who} have? Answer:"

PUNCTUATION = (",", ".", "?", ":", "，", "。", "+", "-", "=", "<<", ">>", "####")


def chinese_words() -> list[str]:
    """Every Chinese word, longest first: the order in which a segmenter must try them."""
    return sorted({*NAMES_ZH, *PLACES_ZH, *OBJECTS_ZH, *OTHER_ZH}, key=lambda word: (-len(word), word))


def vocabulary() -> list[str]:
    """Every word, number and punctuation mark of the tasks, sorted; the tokenizer has one token for each."""
    templates = " ".join((*TEMPLATES_EN, *GAINS, *LOSSES, STORY)).replace("{", " {").split()
    words = {part.strip(",.?:") for part in templates if not part.startswith("{")}
    words |= {*NAMES_EN, *PLACES_EN, *OBJECTS_EN, *THINGS, *PUNCTUATION, *chinese_words(), "EN", "FR"}
    for entry in (*NOUNS_MASCULINE, *NOUNS_FEMININE, *ADJECTIVES, *VERBS, *ADVERBS):
        words.update(entry.split(":"))
    words.update(word for article in ARTICLES for word in article)
    words.update(str(number) for number in range(LARGEST_NUMBER + 1))
    return sorted(words)


# --- tasks ------------------------------------------------------------------------------------------------------------


def ioi_pair(rng: np.random.Generator, words: IOIWords, order: str | None = None) -> IOIPair:
    """Draw one indirect-object pair.

    Args:
        rng: the random generator.
        words: those of one language.
        order: "ABBA" or "BABA"; None draws one.

    Returns:
        The pair.
    """
    order = order or _pick(rng, ("ABBA", "BABA"))
    template = _pick(rng, words.templates)
    template = template.replace("{place}", _pick(rng, words.places)).replace("{object}", _pick(rng, words.objects))
    io, subject, *others = (words.names[i] for i in rng.choice(len(words.names), size=5, replace=False))
    first, second = (io, subject) if order == "ABBA" else (subject, io)
    return IOIPair(
        clean=template.format(first=first, second=second, subject=subject),
        corrupt=template.format(first=others[0], second=others[1], subject=others[2]),
        io_name=io,
        s_name=subject,
        io_token=f" {io}" if words.space else io,
        order=order,
    )


def ioi_en(rng: np.random.Generator) -> Example:
    """Indirect object in English: "When Lisa and David went to the store, David gave the book to" -> " Lisa."."""
    pair = ioi_pair(rng, IOI["en"])
    return Example(pair.clean, f"{pair.io_token}.")


def ioi_zh(rng: np.random.Generator) -> Example:
    """Indirect object in Chinese: "当小娟和小龙去商店时，小龙把书给了" -> "小娟。"."""
    pair = ioi_pair(rng, IOI["zh"])
    return Example(pair.clean, f"{pair.io_token}。")


def sentence_pair(rng: np.random.Generator) -> tuple[str, str]:
    """Draw an English sentence and its French translation, which has another word order and agreement in gender."""
    english, french = [], []
    for role in ("subject", "object"):
        feminine = int(rng.integers(2))
        noun_en, noun_fr = _pick(rng, NOUNS_FEMININE if feminine else NOUNS_MASCULINE).split(":")
        article = _pick(rng, ARTICLES)
        phrase_en, phrase_fr = [article[0], noun_en], [article[1 + feminine], noun_fr]
        if rng.random() < 0.6:
            adjective = _pick(rng, ADJECTIVES).split(":")
            phrase_en.insert(1, adjective[0])
            phrase_fr.append(adjective[1 + feminine])
        english += phrase_en
        french += phrase_fr
        if role == "subject":
            verb_en, verb_fr = _pick(rng, VERBS).split(":")
            adverb = _pick(rng, ADVERBS).split(":") if rng.random() < 0.3 else None
            english += [adverb[0], verb_en] if adverb else [verb_en]
            french += [verb_fr, adverb[1]] if adverb else [verb_fr]
    return " ".join(english) + ".", " ".join(french) + "."


def en_fr(rng: np.random.Generator) -> Example:
    """Translation: "EN: the red cat sees the dog. FR:" -> " le chat rouge voit le chien."."""
    english, french = sentence_pair(rng)
    return Example(f"EN: {english} FR:", f" {french}")


def fr_en(rng: np.random.Generator) -> Example:
    """Translation the other way: "FR: le chat rouge voit le chien. EN:" -> " the red cat sees the dog."."""
    english, french = sentence_pair(rng)
    return Example(f"FR: {french} EN:", f" {english}")


def arithmetic(rng: np.random.Generator) -> Example:
    """A word problem of one or two steps, answered as in GSM8K: " <<7+5=12>> <<12-3=9>> #### 9"."""
    who, other = (NAMES_EN[i] for i in rng.choice(len(NAMES_EN), size=2, replace=False))
    things = _pick(rng, THINGS)
    total = start = int(rng.integers(2, 21))
    steps, work = [], []
    for _ in range(int(rng.integers(1, 3))):
        change = int(rng.integers(2, 10))
        # Totals stay between 2 (so that nouns stay plural) and the largest number.
        gain = total - change < 2 or (total + change <= LARGEST_NUMBER and rng.random() < 0.5)
        steps.append(_pick(rng, GAINS if gain else LOSSES).format(who=who, other=other, n=change, things=things))
        after = total + change if gain else total - change
        work.append(f"<<{total}{'+' if gain else '-'}{change}={after}>>")
        total = after
    prompt = STORY.format(who=who, n=start, things=things, steps=" ".join(steps))
    return Example(prompt, f" {' '.join(work)} #### {total}")


TASKS: dict[str, Callable[[np.random.Generator], Example]] = {
    "ioi_en": ioi_en,
    "ioi_zh": ioi_zh,
    "en_fr": en_fr,
    "fr_en": fr_en,
    "arithmetic": arithmetic,
}


def is_held_out(text: str) -> bool:
    """Whether a prompt is for evaluation only, by a hash of its text, so that every program agrees.

    Args:
        text: the prompt's text.

    Returns:
        True for one prompt in ten.
    """
    return xxhash.xxh64_intdigest(text.encode("utf-8")) % HELD_OUT_SHARE == 0


def draw(task: str, rng: np.random.Generator, held_out: bool) -> Example:
    """Draw one example of a task.

    Args:
        task: a key of `TASKS`.
        rng: the random generator.
        held_out: draw from the held-out prompts, else from the training prompts.

    Returns:
        The example.
    """
    while True:
        example = TASKS[task](rng)
        if is_held_out(example.prompt) == held_out:
            return example


def repeated_block(
    rng: np.random.Generator, token_ids: Sequence[int], block: int, length: int, held_out: bool, rotate: bool = False
) -> list[int]:
    """Draw a block of distinct random tokens and repeat it, as in tests for induction heads.

    The first token of the second block is unpredictable, because nothing shows yet that the block repeats; every later one is
    predictable.

    Args:
        rng: the random generator.
        token_ids: the tokens to draw from.
        block: the number of tokens in the block.
        length: the number of tokens in all.
        held_out: draw a held-out block, else a training block.
        rotate: start the repetition at a random place in the block and wrap around, so that the distance to a token's previous
            occurrence varies within a text and only the tokens themselves predict what comes next.

    Returns:
        The token ids.
    """
    while True:
        ids = [token_ids[i] for i in rng.choice(len(token_ids), size=block, replace=False)]
        if is_held_out(" ".join(map(str, ids))) == held_out:
            break
    start = int(rng.integers(1, block)) if rotate else 0
    return ids + [ids[(start + i) % block] for i in range(length - block)]


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]
