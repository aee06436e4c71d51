"""Names, words and templates of the prompt sets that `make_prompts.py` writes.

Each name, capital and country is one token for Gemma 3's tokenizer; Japanese and Arabic names are as few as that allows. No Latin
name begins a text, where it would have no space before it and might be other tokens. All French, German,
Spanish, Japanese and Arabic sentences end just before the name of who is given something:

* French and Spanish with the preposition of the indirect object (à, a);
* German with "an", after which "weiter" or "weitergab" may follow the name;
* Japanese, whose verb comes last, with a cleft: "the one to whom Tanaka gave the book is";
* Arabic with إلى. Its names are men's, since the verb agrees with its subject, and stand after مع ("with"), since و ("and")
  would be glued to them.
"""

# ruff: noqa: SIM905  (word lists are easier to read, and to add to, as text)

from __future__ import annotations

from dataclasses import dataclass

from pyvene_ext.prompts.tiny_tasks import IOI, IOIWords


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


FRENCH = IOIWords(
    names=(
        "Pierre Marie Paul Jean Louis Sophie Claire Nicolas Thomas Antoine Julie Camille Lucas Hugo Emma Charles Michel Philippe "
        "Alain Bernard Marc Laurent Olivier Vincent David Martin Simon Daniel Anne Catherine Isabelle Nathalie Christine "
        "Caroline Laura Sarah Alice Charlotte Patrick Denis Bruno Gabriel Arthur Robert Henri Roger Jacques Pascal Eva"
    ).split(),
    places=_items(
        "au magasin, au café, au parc, à la bibliothèque, à l'école, au marché, au musée, à la gare, au bureau, dans le jardin, "
        "à l'hôpital, au restaurant"
    ),
    objects=_items(
        "le livre, la bouteille, la carte, le cadeau, la clé, la lettre, le stylo, la photo, le parapluie, la montre, le sac, "
        "le téléphone, le cahier, l'appareil photo, le journal"
    ),
    templates=_lines("""
        Quand {first} et {second} étaient {place}, {subject} a donné {object} à
        Dans l'après-midi, {first} et {second} se trouvaient {place}, où {subject} a montré {object} à
        Hier, {first} et {second} étaient {place}, et {subject} a tendu {object} à
        Hier matin, {first} et {second} attendaient {place}, et {subject} a apporté {object} à
        Ce matin, {first} et {second} travaillaient ensemble {place} quand {subject} a passé {object} à
        Comme {first} et {second} étaient encore {place}, {subject} a prêté {object} à
        Il y a une heure, {first} et {second} parlaient {place}, puis {subject} a rendu {object} à
        """),
)

GERMAN = IOIWords(
    names=(
        "Anna Peter Thomas Michael Andreas Stefan Martin Klaus Hans Maria Julia Laura Lisa Sarah Paul Lukas Felix Max Jonas Leon "
        "Emma Sophie Karl Otto Fritz Heinrich Wolfgang Jürgen Werner Walter Frank Sabine Petra Claudia Christian Daniel "
        "Sebastian Alexander Johannes Simon Eva Nina Lena Clara Greta Barbara Oliver Kurt Georg Robert"
    ).split(),
    places=_items(
        "im Laden, im Café, im Park, in der Bibliothek, in der Schule, auf dem Markt, im Museum, am Bahnhof, im Büro, im Garten, "
        "im Krankenhaus, im Restaurant"
    ),
    objects=_items(
        "das Buch, die Flasche, die Karte, das Geschenk, den Schlüssel, den Brief, den Stift, das Foto, den Regenschirm, "
        "die Uhr, die Tasche, das Handy, das Heft, die Kamera, die Zeitung"
    ),
    templates=_lines("""
        Als {first} und {second} {place} waren, gab {subject} {object} an
        Nachdem sich {first} und {second} {place} getroffen hatten, übergab {subject} {object} an
        Während {first} und {second} {place} warteten, reichte {subject} {object} an
        Gestern waren {first} und {second} {place}, und {subject} gab {object} an
        Gestern trafen sich {first} und {second} {place}, und dann übergab {subject} {object} an
        Am Montag waren {first} und {second} gerade {place}, als {subject} {object} an
        Heute Morgen waren {first} und {second} {place}, bevor {subject} {object} an
        """),
)

SPANISH = IOIWords(
    names=(
        "Juan María Pedro Carlos Luis Ana Laura Carmen Marta Miguel Antonio Francisco Manuel David Daniel Pablo Diego Sergio "
        "Jorge Alberto Fernando Roberto Ricardo Elena Rosa Sara Julia Andrea Clara Eva Alicia Victoria Patricia Silvia Mario "
        "Hugo Javier Rafael José Gabriel Emilio Jaime Felipe Teresa Gloria Alejandro Eduardo Santiago Cristina Beatriz"
    ).split(),
    places=_items(
        "en la tienda, en el café, en el parque, en la biblioteca, en la escuela, en el mercado, en el museo, en la estación, "
        "en la oficina, en el jardín, en el hospital, en el restaurante"
    ),
    objects=_items(
        "el libro, la botella, la tarjeta, el regalo, la llave, la carta, el bolígrafo, la foto, el paraguas, el reloj, "
        "el bolso, el teléfono, el cuaderno, la cámara, el periódico"
    ),
    templates=_lines("""
        Cuando {first} y {second} estaban {place}, {subject} le dio {object} a
        Después de que {first} y {second} se encontraron {place}, {subject} le mostró {object} a
        Mientras {first} y {second} esperaban {place}, {subject} le pasó {object} a
        Ayer, {first} y {second} estaban {place}, y {subject} le entregó {object} a
        El lunes, {first} y {second} se vieron {place}, y luego {subject} le devolvió {object} a
        Esta mañana, {first} y {second} trabajaban {place} cuando {subject} le prestó {object} a
        Hace una hora, {first} y {second} hablaban {place}, y entonces {subject} le ofreció {object} a
        """),
)

JAPANESE = IOIWords(
    names="田中 鈴木 佐藤 山田 伊藤 中村 吉田 山本 山口 清水 岡田 和田 中山 千葉".split(),
    places="店 喫茶店 公園 図書館 学校 市場 美術館 駅 会社 ホテル 病院 レストラン".split(),
    objects="本 ボトル カード プレゼント 鍵 手紙 ペン 写真 傘 時計 かばん 携帯電話 ノート カメラ 新聞".split(),
    templates=_lines("""
        {first}さんと{second}さんが{place}にいたとき、{subject}さんが{object}を渡した相手は
        {first}さんと{second}さんが{place}で会ったとき、{subject}さんが{object}を見せた相手は
        {first}さんと{second}さんが{place}で待っている間に、{subject}さんが{object}を手渡した相手は
        昨日、{first}さんと{second}さんは{place}で会いました。{subject}さんが{object}を貸した相手は
        昨日、{first}さんと{second}さんは{place}に行きました。そこで{subject}さんが{object}をあげた相手は
        {first}さんと{second}さんが{place}で話した後、{subject}さんが{object}を返した相手は
        """),
    space=False,
)

ARABIC = IOIWords(
    names="أحمد محمد علي عمر خالد حسن حسين سعيد محمود كريم سلمان جمال بدر صالح".split(),
    places="المتجر المقهى الحديقة المكتبة المدرسة السوق المتحف المحطة المكتب الفندق المستشفى المطعم".split(),
    objects="الكتاب الزجاجة البطاقة الهدية المفتاح الرسالة القلم الصورة المظلة الساعة الحقيبة الهاتف الدفتر الجريدة".split(),
    templates=_lines("""
        عندما كان {first} مع {second} في {place}، أعطى {subject} {object} إلى
        بعد أن تحدث {first} مع {second} في {place}، قدم {subject} {object} إلى
        بينما كان {first} مع {second} في {place}، أعاد {subject} {object} إلى
        أمس كان {first} مع {second} في {place}، ثم سلم {subject} {object} إلى
        جلس {first} مع {second} في {place}، وبعد قليل أعطى {subject} {object} إلى
        هذا الصباح عمل {first} مع {second} في {place}، ثم أرسل {subject} {object} إلى
        """),
)

LANGUAGES: dict[str, tuple[str, IOIWords]] = {
    "en": ("English", IOI["en"]),
    "zh": ("Chinese", IOI["zh"]),
    "fr": ("French", FRENCH),
    "de": ("German", GERMAN),
    "es": ("Spanish", SPANISH),
    "ja": ("Japanese", JAPANESE),
    "ar": ("Arabic", ARABIC),
}

# Nouns whose plural is their singular and "s", a preposition, and nouns of the same kind that come between them and their verb.
PHRASES = (
    ("key door", "to", "cabinet room office kitchen farm"),
    ("picture photo painting", "of", "garden river bridge castle village"),
    ("letter song book", "about", "town river farmer king village"),
    ("teacher student doctor lawyer", "near", "guard nurse artist manager"),
    ("writer actor singer driver", "behind", "guard nurse artist farmer"),
    ("letter card cup bottle phone", "on", "table desk chair bed"),
    ("book cup bottle phone", "next to", "chair bed window door"),
)

COUNTRIES = dict(
    entry.split(":")
    for entry in (
        "France:Paris Italy:Rome Germany:Berlin Spain:Madrid Portugal:Lisbon England:London Ireland:Dublin Scotland:Edinburgh "
        "Austria:Vienna Hungary:Budapest Poland:Warsaw Greece:Athens Turkey:Ankara Egypt:Cairo Iran:Tehran Iraq:Baghdad "
        "Russia:Moscow China:Beijing Japan:Tokyo Thailand:Bangkok Vietnam:Hanoi Australia:Canberra Canada:Ottawa Cuba:Havana "
        "Peru:Lima Chile:Santiago Venezuela:Caracas Kenya:Nairobi Norway:Oslo Sweden:Stockholm Finland:Helsinki "
        "Denmark:Copenhagen Belgium:Brussels Switzerland:Bern Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb "
        "Lebanon:Beirut Syria:Damascus Jordan:Amman Afghanistan:Kabul Pakistan:Islamabad Nepal:Kathmandu Qatar:Doha Morocco:Rabat"
    ).split()
)
CAPITAL_TEMPLATES = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "The name of the capital of {country} is",
    "As everyone knows, the capital of {country} is",
)


# -- word problems -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A word problem, and for each step of its solution a sentence with a calculation.

    Attributes:
        told: the story, with {a}, {b} and {c} for its numbers.
        asked: the question.
        solution: the sentences; a calculation is in square brackets, where x is the result of the step before.
    """

    told: str
    asked: str
    solution: tuple[str, ...]


PLAIN_THINGS = "apples oranges books coins stickers pencils marbles cards cookies shells balloons eggs".split()
PLAIN_BOXES = "box bag basket drawer jar".split()
_NOW = "How many {things} does {who} have now?"
_LEFT = "How many {things} does {who} have left?"
_ALL = "How many {things} does {who} have in all?"
_BOXES = "{who} has {a} {boxes} with {b} {things} in each {box}"
# Additions are in the majority among those of one step: the smallest models hardly solve others.
STORIES = (
    Story("{who} has {a} {things}. {other} gives {who} {b} more {things}.", _NOW, ("{who} has [a+b] {things} now.",)),
    Story("{who} has {a} {things}. {who} buys {b} more {things}.", _NOW, ("{who} has [a+b] {things} now.",)),
    Story("{who} has {a} {things}. {who} finds {b} more {things}.", _NOW, ("{who} has [a+b] {things} now.",)),
    Story(
        "{who} has {a} {things} and {other} has {b} {things}.",
        "How many {things} do they have together?",
        ("Together they have [a+b] {things}.",),
    ),
    Story("{who} has {a} {things}. {who} gives {b} {things} to {other}.", _LEFT, ("{who} has [a-b] {things} left.",)),
    Story("{who} has {a} {things}. {who} loses {b} {things}.", _LEFT, ("{who} has [a-b] {things} left.",)),
    Story(
        "{who} has {a} {things}. {other} gives {who} {b} more {things}, and then {who} loses {c} {things}.",
        _NOW,
        ("{who} has [a+b] {things} at first.", "Then {who} has [x-c] {things}."),
    ),
    Story(
        "{who} has {a} {things}. {who} gives {b} {things} to {other} and finds {c} {things}.",
        _NOW,
        ("{who} has [a-b] {things} left.", "Then {who} has [x+c] {things}."),
    ),
    Story(
        _BOXES + ". {who} gives {c} {things} to {other}.",
        _LEFT,
        ("{who} has [a*b] {things}.", "Then {who} has [x-c] {things} left."),
    ),
    Story(
        _BOXES + ", and {c} more {things}.",
        _ALL,
        ("In the {boxes} there are [a*b] {things}.", "In all {who} has [x+c] {things}."),
    ),
    Story(
        "{who} has {a} {things}. {other} has {b} more {things} than {who}.",
        "How many {things} do they have together?",
        ("{other} has [a+b] {things}.", "Together they have [a+x] {things}."),
    ),
    Story(
        "{who} has {a} {things} and buys {b} more {things}. {who} shares all of them equally among {c} friends.",
        "How many {things} does each friend get?",
        ("{who} has [a+b] {things}.", "Each friend gets [x/c] {things}."),
    ),
)
