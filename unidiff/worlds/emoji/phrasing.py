"""How people type, in the words of the scenes' grammar: a text normaliser for the embedded model's tokenizer.

The model has learned captions and questions of one small grammar (`language.py`). The normaliser turns other wordings of the
same thing into it: capitals, punctuation, missing articles, plurals, digits, other names of the objects, and the emoji
characters themselves. It is a list of replacements of Hugging Face's `tokenizers`, kept in `tokenizer.json`; texts of the
grammar come out as they went in.

Other names follow the English keywords of the Unicode CLDR annotations (version 48), as far as they mean one object only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from unidiff.tokens.text import HOLE_MARK, words_of
from unidiff.worlds.emoji.language import (
    GROUND_PHRASES,
    IRREGULAR,
    NUMBERS,
    OPENERS,
    RELATIONS,
    UNCOUNTED,
    ZONE_PHRASES,
    article,
    plural,
)
from unidiff.worlds.emoji.scenes import BACKGROUNDS

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer

SYNONYMS: dict[str, tuple[str, ...]] = {
    "dog face": ("dog", "doggy", "doggie", "puppy", "puppy dog", "hound"),
    "cat face": ("cat", "kitty", "kitten", "kitty cat", "pussycat", "tomcat"),
    "fox": ("fox face", "vixen"),
    "bear": ("bear face", "grizzly", "grizzly bear"),
    "panda": ("panda face", "panda bear"),
    "koala": ("koala face", "koala bear"),
    "tiger face": ("tiger",),
    "lion": ("lion face",),
    "cow face": ("cow", "calf"),
    "pig face": ("pig", "piggy", "piglet"),
    "frog": ("frog face", "toad"),
    "monkey face": ("monkey",),
    "chicken": ("hen", "chicken face"),
    "penguin": ("penguin face",),
    "owl": ("owl face",),
    "honeybee": ("bee", "bumblebee", "honey bee", "bumble bee"),
    "butterfly": (),
    "lady beetle": ("beetle", "ladybug", "ladybird", "lady bug", "lady bird"),
    "turtle": ("tortoise", "terrapin"),
    "octopus": (),
    "crab": (),
    "tropical fish": ("fish",),
    "spouting whale": ("whale",),
    "cactus": (),
    "evergreen tree": ("tree", "evergreen", "pine", "pine tree", "fir", "fir tree", "christmas tree", "conifer"),
    "mushroom": ("toadstool", "fungus"),
    "rose": (),
    "sunflower": (),
    "tulip": (),
    "red apple": ("apple",),
    "pear": (),
    "lemon": (),
    "banana": (),
    "watermelon": ("water melon", "melon", "slice of watermelon"),
    "grapes": ("grape", "bunch of grapes"),
    "strawberry": (),
    "cherries": ("cherry",),
    "pineapple": (),
    "carrot": (),
    "ear of corn": ("corn", "maize", "corn cob", "corncob", "cob of corn", "corn on the cob"),
    "croissant": (),
    "cheese wedge": ("cheese", "wedge of cheese", "piece of cheese", "slice of cheese"),
    "hamburger": ("burger", "cheeseburger"),
    "pizza": ("slice of pizza", "pizza slice", "piece of pizza"),
    "doughnut": ("donut",),
    "birthday cake": ("cake", "piece of cake"),
    "soft ice cream": ("ice cream", "icecream", "ice cream cone", "soft serve"),
    "hot beverage": ("beverage", "coffee", "tea", "hot drink", "cup of coffee", "cup of tea", "mug of coffee"),
    "soccer ball": ("ball", "football", "soccer"),
    "basketball": ("basket ball",),
    "automobile": ("car", "auto"),
    "bus": ("school bus",),
    "rocket": ("spaceship", "space ship", "space rocket", "rocket ship"),
    "sailboat": ("boat", "sailing boat", "sail boat", "yacht", "sailing ship"),
    "house": ("home", "cottage"),
    "alarm clock": ("clock", "alarm"),
    "key": (),
    "light bulb": ("bulb", "lightbulb", "lamp"),
    "wrapped gift": ("gift", "present", "wrapped present", "gift box", "birthday present", "birthday gift"),
    "balloon": (),
    "crown": (),
    "guitar": (),
    "bell": ("church bell",),
    "teddy bear": ("teddy", "plush bear", "toy bear", "stuffed bear"),
}
_PLURALS = {"calf": "calves", "fungus": "fungi", "corn on the cob": "corn on the cob"}
_SPELLINGS = {
    "colou?rs?": "colour", "grey": "gray", "center": "centre", "big|huge|giant|enormous": "large",
    "little|tiny|mini": "small", "upper": "top", "lower": "bottom", "violet": "purple", "backdrop|bg": "background", "centred|centered": "in the centre", "(?:a )?trio of": "three", r"\w+-(?=(?:red|green|blue|gray|yellow|purple)\b)": "",
    "1x?": "one", "2x?|a pair of|a couple of": "two", "3x?": "three", "4x?": "four", "5x?": "five", "&|[+]|plus": "and",
    "beneath|underneath": "below", "what's": "what is", "where's": "where is", "left[- ]hand": "left", "right[- ]hand": "right",
}  # fmt: skip
_HEARD = (
    "please draw paint show generate create make render me us photo photograph drawing painting illustration icon icons emoji "
    "emojis sketch scene next beside by alongside together front over atop color grey center big huge giant enormous little "
    "tiny mini upper lower violet backdrop pair couple plus beneath underneath hand left-hand right-hand what's where's any few several lots lot bunch trio bg centred centered "
    "some do can you see it this that here shown are 1 2 3 4 5 & +"
)  # words of the patterns below
_LINKS = "few several some lots lot bunch next beside by near alongside together over atop front is are"
_NATURAL = {
    "frog": "green",
    "evergreen tree": "green",
    "cactus": "green",
    "turtle": "green",
    "pear": "green",
    "watermelon": "green",
    "automobile": "red",
    "rose": "red",
    "balloon": "red",
    "strawberry": "red",
    "cherries": "red",
    "crab": "red",
    "lady beetle": "red",
    "mushroom": "red",
    "lemon": "yellow",
    "banana": "yellow",
    "sunflower": "yellow",
    "ear of corn": "yellow",
    "cheese wedge": "yellow",
    "key": "yellow",
    "bell": "yellow",
    "light bulb": "yellow",
    "spouting whale": "blue",
    "koala": "gray",
    "grapes": "purple",
}  # colours that the artwork has
_ASKS = r"(?:what|where|how|is|are|which|do|does|can)\b"
_EDGE, _END = r"(?<![\w-])", r"(?![\w-])"
_ONE, _MANY = (
    0xE000,
    0xE400,
)  # private characters for one object and for several; that of a name stands at its place in the list
Steps = Iterator[tuple[str, str]]
"""Patterns of Oniguruma's syntax and what is put in their place, in order. `\\K` keeps what was found before it."""


def understood_words() -> set[str]:
    """Words that the normaliser reads besides those of the grammar, for the list of a tokenizer's known words."""
    return {*_HEARD.split(), *(word for others in SYNONYMS.values() for other in others for word in words_of(other))}


def normaliser(names: Sequence[str], characters: Sequence[str]) -> Normalizer:
    """A normaliser to be kept in the tokenizer of a model of scenes.

    Args:
        names: of the objects, as the grammar has them. characters: their emoji, in the same order.
    """
    from tokenizers import Regex, normalizers

    signs = _Signs(names)
    steps = [normalizers.NFKC(), normalizers.Lowercase()]
    groups = (_characters(signs, characters), _spelling(), _objects(signs), _questions(signs), _captions(signs))
    for pattern, content in chain(*groups, signs.written_out()):
        steps.append(normalizers.Replace(Regex(pattern), content))
    return normalizers.Sequence(steps)


class _Signs:
    """One private character for an object, another for several of it, so that a pattern can say "any object"."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.one = [chr(_ONE + i) for i in range(len(names))]
        self.many = [chr(_MANY + i) for i in range(len(names))]
        kinds: dict[str, str] = {"mass": "", "vowel": "", "other": ""}
        for name, sign in zip(names, self.one, strict=True):
            kinds["mass" if name in UNCOUNTED else "vowel" if article(name).startswith("an ") else "other"] += sign
        self.mass, self.vowel, self.other = (f"[{kind or chr(_MANY - 1)}]" for kind in kinds.values())
        self.any_one, self.any_many = f"[{self.one[0]}-{self.one[-1]}]", f"[{self.many[0]}-{self.many[-1]}]"
        self.any = f"[{self.one[0]}-{self.one[-1]}{self.many[0]}-{self.many[-1]}]"
        self.counts = "|".join(word for n, word in NUMBERS.items() if n > 1)

    def written_out(self) -> Steps:
        for name, one, many in zip(self.names, self.one, self.many, strict=True):
            yield one, name
            yield many, plural(name)


def _characters(signs: _Signs, characters: Sequence[str]) -> Steps:
    """Spaces, quotes, what an emoji may carry, and emoji: two of the same are a number, different ones a list."""
    yield r"\s+", " "
    yield "[\u2018\u2019]", "'"
    yield "[\ufe0e\ufe0f\u200d\U0001f3fb-\U0001f3ff]", ""
    for character, one, many in zip(characters, signs.one, signs.many, strict=True):
        sign = character.replace("\ufe0f", "")
        for n in range(max(NUMBERS), 1, -1):
            yield f"(?<!{sign})(?<!{sign} )(?:{sign} ?){{{n}}}(?!{sign})", f" {NUMBERS[n]} {many} "
        yield sign, f" {one} "
    yield f"{signs.any} \\K *(?=(?:(?:{signs.counts}) )?{signs.any})", "and "
    yield " {2,}", " "
    yield f"^ (?=(?:(?:{signs.counts}) )?{signs.any})", ""
    yield f"{signs.any}\\K $", ""


def _spelling() -> Steps:
    """Other spellings and words for the same, requests, and the ends of sentences."""
    for pattern, content in _SPELLINGS.items():
        yield f"{_EDGE}(?:{pattern}){_END}", content
    verb = "put|draw|paint|show|generate|create|make|render|give|get|have|see|do"
    yield r"^(?:hi|hello|hey|ok)[,! ]+", ""
    yield rf"^(?:please,? )?(?:can|could|may|would) (?:you|u|i|we) (?:please )?(?:{verb})(?: me| us)? ", ""
    yield rf"^(?:please,? )?(?:i|we)(?: want|'d like| would like| need|'d love)(?: to (?:{verb}))? ", ""
    yield rf"^(?:please,? )?(?:{verb})(?: me| us)? ", ""
    yield r"^(?:please|let's see),? |^there (?:is|are|should be) ", ""
    yield r"[.] (?=\S)", ", "
    yield r",?(?: please| thanks| thank you| for me)+[.!?]* ?$", ""
    yield (
        r"^(?:an? |the )?(?:photo|photograph|drawing|painting|illustration|icon|emoji|sketch|scene) of ",
        "a picture of ",
    )
    yield r"^(?=picture of )", "a "
    yield r"^(?=image of )", "an "
    yield r"^(?:an? |the )?(?:picture|image) (?:with|showing|that shows) ", "a picture of "
    yield r",? next to each other|(?: [:;]-?[()D])+ ?$|[.!;]+ ?$", ""


def _objects(signs: _Signs) -> Steps:
    """Names and other names, the longest first, to the signs; as many as a number says."""
    found: dict[str, str] = {}
    for name, one, many in zip(signs.names, signs.one, signs.many, strict=True):
        for other in SYNONYMS.get(name, ()):
            found.setdefault(_plural(other), many)
            found[other] = one
    for name, one, many in zip(signs.names, signs.one, signs.many, strict=True):
        found[plural(name)] = many
        found[name] = one
    for words in sorted({wording.count(" ") for wording in found}, reverse=True):
        for sign in (*signs.many, *signs.one):
            own = [wording for wording, meant in found.items() if meant == sign and wording.count(" ") == words]
            if own:
                yield f"{_EDGE}(?:{'|'.join(own)}){_END}", sign
    yield f"{signs.any}\\K (?:emoji|icon)s?{_END}", ""
    for one, many in zip(signs.one, signs.many, strict=True):
        yield f"{_EDGE}(?:{signs.counts}) \\K{one}", many
        yield f"(?:^(?:is|are) there|^do you see|^can you see)(?: an?| any| some|) \\K{many}", one


def _questions(signs: _Signs) -> Steps:
    """Questions of the grammar, which end with a question mark."""
    shown = "(?:in|on) (?:the|this) (?:picture|image)"
    yield (
        rf"^(?:are there|do you see|can you see|is there)(?: an?| any| some|) (?=[{signs.vowel[1:-1]}])",
        "is there an ",
    )
    yield (
        rf"^(?:are there|do you see|can you see|is there)(?: an?| any| some|) (?=[{signs.other[1:-1]}])",
        "is there a ",
    )
    yield rf"^(?:are there|do you see|can you see|is there)(?: an?| any| some|) (?=[{signs.mass[1:-1]}])", "is there "
    yield rf"^(?:how many|is there) .*\K {shown}(?=\??$)", ""
    yield rf"^how many {signs.any}\K(?: do you see| can you see|)(?= ?\??$)", " are there"
    yield (
        r"^what (?:is the (?:background colour|colour of the background)|colour is the background) ?\??$",
        ("what colour is the background?"),
    )
    yield (
        rf"^what (?:is|do you see|can you see|is shown|are) (?:this|that|it|here|{shown}) ?\??$",
        "what is in the picture?",
    )
    yield rf"^where is (?:an? |)(?={signs.any_one})", "where is the "
    yield rf"^{_ASKS}[^?]*\K$", "?"


def _captions(signs: _Signs) -> Steps:
    """Words that the grammar lacks, articles, lists, relations and backgrounds. Questions and `<mask>` stay as they are."""

    def everywhere(pattern: str, condition: str = "") -> str:
        """The pattern wherever it stands in a text that is no question and in which the condition holds at its start."""
        return rf"(?:^(?!{_ASKS}){condition}|\G(?!^)).*?\K{pattern}"

    size, noun = "(?:large |small )", rf"(?:an? |the |one |(?:{signs.counts}) )?(?:large |small )?{signs.any}"
    colours = "|".join(BACKGROUNDS)
    phrases = (*OPENERS, *GROUND_PHRASES, *chain(*ZONE_PHRASES.values(), *RELATIONS.values()), "a and large small")
    own = {*chain(*map(words_of, phrases)), *NUMBERS.values(), *BACKGROUNDS}
    named, link = rf"(?=.*{signs.any})", "and|on|against|with|in|at|to|left|right|above|below|under|of"

    def without_words_but(kept: Iterable[str]) -> tuple[str, str]:
        return everywhere(rf"{_EDGE}(?!(?:{'|'.join(sorted(kept))}){_END})[^\W_][\w'-]* ?", named), ""

    yield without_words_but({*own, *_LINKS.split()})
    some = "an? few|several|some|lots of|an? lot of|an? bunch of|(?<!how )many"
    yield everywhere(rf"{_EDGE}(?:{some}) (?={signs.any})"), ""
    yield everywhere(rf"{_EDGE}(?:{signs.counts}) \K(?:large|small) (?={signs.any})"), ""
    yield everywhere(r",?(?: of| in| on) the (?:picture|image)(?= (?:on|against|with) |,|$)", named), ""
    # backgrounds: `blue background, a fox`, `on blue: a fox`, `a fox, blue background`
    for colour in BACKGROUNDS:
        first = rf"^(?:an? |the )?{colour} background(?:,|:| with) |^(?:on|against|with) (?:an? |the )?{colour}(?: background)?[,:] "
        yield rf"(?:{first})(?=.*{signs.any}).*\K$", f" on a {colour} background"
        yield rf"(?:{first})(?=.*{signs.any})", ""
    yield everywhere(rf",? ?{_EDGE}(?:in front of|over|in|of) (?:an? |the )?(?=(?:{colours}) background)"), " on a "
    yield everywhere(rf" ?, (?:and )?(?:an? )?(?=(?:{colours}) background{_END})"), " on a "
    yield everywhere(rf"{_EDGE}(?:on|against|with) \K(?:the )?(?=(?:{colours}) background)"), "a "
    yield everywhere(rf"{signs.any}\K (?=(?:{colours}) background{_END})"), " on a "
    yield everywhere(rf", (?=(?:{colours})$)"), " on "
    for one, colour in ((one, _NATURAL[n]) for n, one in zip(signs.names, signs.one, strict=True) if n in _NATURAL):
        yield everywhere(rf"{_EDGE}{colour} (?={one})"), ""
    # sizes and places: `a fox, small, top left`
    for word in ("large", "small"):
        yield rf"^(?:an? |the )?\K(?={signs.any_one}(?:,? | [^,]*, ){word}{_END})", f"{word} "
        yield rf"^(?:an? |the )?{word} {signs.any_one}[^,]*?\K,? {word}{_END}", ""
    for places_of, lead in (("left|right", "on"), ("centre|middle", "in"), ("(?:top|bottom)(?: left| right)?", "at")):
        yield rf"^{noun}\K,? (?:(?:at|in|on) the )?(?=(?:{places_of})(?:,|$| on| against| with))", f" {lead} the "
    yield rf"^{noun}\K,? (?:(?:at|in|on) the )?(?=(?:top|bottom) (?:left|right) corner{_END})", " in the "
    # relations
    for far, near, word in (("left", "right", "left of"), ("right", "left", "right of")):
        yield rf"^{noun} \Kon the {far}(?: side)?(?:,? and|,) (?={noun} on the {near})", f"{word} "
        yield rf"^{noun} {word} {noun}\K on the {near}(?: side)?", ""
        yield everywhere(rf"on the {far}(?: side)? of (?={noun})"), f"to the {far} of "
    for far, near, word in (
        ("(?:on|at the) top", "(?:below|at the bottom)", "above"),
        ("at the bottom", "(?:above|on top|at the top)", "below"),
    ):
        yield rf"^{noun} \K{far}(?:,? and|,) (?={noun} {near})", f"{word} "
        yield rf"^{noun} {word} {noun}\K {near}", ""
    yield everywhere(rf", (?=(?:on|against|with|in|at|near|to|left of|right of|above|below|under){_END})"), " "
    yield everywhere(rf"{_EDGE}(?:next to|beside|by|near|alongside|together with|with) (?={noun})"), "and "
    yield everywhere(rf"{_EDGE}(?:over|atop) (?={noun})"), "above "
    yield everywhere(rf"{signs.any} \K(?:is|are) "), ""
    # what is left of words that were taken out
    yield without_words_but(own)
    yield everywhere(rf"{_EDGE}(?:an?|the) (?=(?:and|on|against|with|in|at){_END}|,|$)", named), ""
    yield everywhere(rf"(?:^|a picture of |an image of )\K(?:(?:and|on|with|of|,) )+(?={noun})", named), ""
    yield everywhere(rf"{signs.any}\K(?:,? (?:{link}))+ ?$", named), ""
    yield rf"^[ ,:;!?-]+{named}", ""
    yield rf"^(?!{_ASKS}).*?\K[ ,:;!?-]+$", ""
    # articles, numbers and lists
    yield everywhere(rf"{signs.any}\K and (?={noun}(?:,| and) )"), ", "
    yield everywhere(rf"{_EDGE}one (?={size}?{signs.any_one})"), "a "
    yield everywhere(rf"{_EDGE}the (?={size}?{signs.any})"), ""
    yield (
        rf"(?<!{HOLE_MARK} )(?<!many )"
        + "".join(f"(?<!{word} )" for word in NUMBERS.values())
        + rf"(?={signs.any_many})",
        "two ",
    )
    before = rf"(?<!{HOLE_MARK})(?<!{HOLE_MARK} )(?<!a )(?<!an )(?<!large )(?<!small )"
    yield everywhere(rf"{before}(?={size}?{signs.any_one})"), "a "
    yield everywhere(rf"{_EDGE}an (?={size}|{signs.other})"), "a "
    yield everywhere(rf"{_EDGE}a (?={signs.vowel})"), "an "
    yield everywhere(rf"{_EDGE}an? (?={size}?{signs.mass})"), ""
    yield (
        everywhere(
            rf"(?:,| ,|, and) (?={noun}(?: (?:on|against|with|in|at|near|to) [^,{HOLE_MARK}]*)?$)", "(?!.* and )"
        ),
        " and ",
    )
    yield everywhere(r", and "), " and "


def _plural(name: str) -> str:
    """Of another name: `kitties`, `slices of pizza`."""
    head, of, rest = name.partition(" of ")
    regular = plural(head) if not re.search("[^aeiou]y$", head) or head in IRREGULAR else head[:-1] + "ies"
    return _PLURALS.get(name, regular + of + rest)
