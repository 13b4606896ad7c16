"""Built-in labelled sets, made from templates: (text, label, group) rows whose answer no single word gives away.

Every set is balanced, and its last word says nothing about the label within a group that was not seen in training:
a probe on the last token must find what the model carried there. Knows nothing about models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

Row = tuple[str, str, str]
Make = Callable[[], Iterator[Row]]

_NOUNS = (
    *(
        ("key", "keys"),
        ("letter", "letters"),
        ("picture", "pictures"),
        ("window", "windows"),
        ("road", "roads"),
    ),
    *(("story", "stories"), ("teacher", "teachers"), ("farmer", "farmers"), ("doctor", "doctors")),
    *(("child", "children"), ("man", "men"), ("woman", "women"), ("mouse", "mice"), ("bird", "birds")),
    *(("bottle", "bottles"), ("lamp", "lamps"), ("sign", "signs"), ("guard", "guards"), ("label", "labels")),
    *(
        ("gift", "gifts"),
        ("bridge", "bridges"),
        ("tool", "tools"),
        ("ticket", "tickets"),
        ("person", "people"),
    ),
)
_ATTRACTORS = (
    *(("cabinet", "cabinets"), ("house", "houses"), ("garden", "gardens"), ("car", "cars")),
    *(("table", "tables"), ("box", "boxes"), ("school", "schools"), ("tree", "trees")),
)
_LINKS = ("near the", "behind the")

_VERBS = (
    *(("walks", "walked"), ("talks", "talked"), ("waits", "waited"), ("works", "worked"), ("sings", "sang")),
    *(("runs", "ran"), ("sleeps", "slept"), ("stands", "stood"), ("sits", "sat"), ("writes", "wrote")),
    *(("eats", "ate"), ("drinks", "drank"), ("plays", "played"), ("dances", "danced"), ("swims", "swam")),
    *(
        ("speaks", "spoke"),
        ("teaches", "taught"),
        ("fights", "fought"),
        ("smiles", "smiled"),
        ("hides", "hid"),
    ),
)
_PEOPLE = ("farmer", "doctor", "girl", "old man", "neighbour")
_PLACES = ("in the garden", "behind the house", "near the river", "with a friend", "under the bridge")

_GOOD = (
    *(
        "wonderful",
        "excellent",
        "brilliant",
        "delightful",
        "superb",
        "charming",
        "beautiful",
        "great",
        "amazing",
    ),
    *(
        "lovely",
        "fantastic",
        "perfect",
        "enjoyable",
        "impressive",
        "pleasant",
        "touching",
        "magnificent",
        "fun",
    ),
)
_BAD = (
    *("terrible", "awful", "boring", "dreadful", "horrible", "disappointing", "ugly", "bad", "disgusting"),
    *("poor", "miserable", "annoying", "unpleasant", "dull", "stupid", "painful", "mediocre", "pathetic"),
)
_OPINIONS = (
    "I thought the film was {}, and so did my sister",
    "The meal we had was {}, said the guest at the table",
    "It was a {} book from the first page to the last",
    "They called the concert {} when they came home",
    "She found the journey {} and told us about it in the evening",
    "What a {} show that was, we said on the way back",
)

# Per language five sentences' beginnings and ten places with equal meanings; a group is a place, held out whole.
_LANGUAGES = {
    "English": (
        (
            "The teacher reads a book",
            "My brother is waiting",
            "The children play",
            "We met our friends",
            "She works",
        ),
        (
            *(
                "in the garden",
                "at the station",
                "on the beach",
                "in the kitchen",
                "at school",
                "in the forest",
            ),
            *("on the roof", "in the library", "at the market", "in the church"),
        ),
    ),
    "French": (
        (
            "Le professeur lit un livre",
            "Mon frère attend",
            "Les enfants jouent",
            "Nous avons vu nos amis",
            "Elle travaille",
        ),
        (
            *("dans le jardin", "à la gare", "sur la plage", "dans la cuisine", "à l'école", "dans la forêt"),
            *("sur le toit", "dans la bibliothèque", "au marché", "dans l'église"),
        ),
    ),
    "German": (
        (
            "Der Lehrer liest ein Buch",
            "Mein Bruder wartet",
            "Die Kinder spielen",
            "Wir trafen unsere Freunde",
            "Sie arbeitet",
        ),
        (
            *("im Garten", "am Bahnhof", "am Strand", "in der Küche", "in der Schule", "im Wald"),
            *("auf dem Dach", "in der Bibliothek", "auf dem Markt", "in der Kirche"),
        ),
    ),
    "Spanish": (
        (
            "El profesor lee un libro",
            "Mi hermano espera",
            "Los niños juegan",
            "Vimos a nuestros amigos",
            "Ella trabaja",
        ),
        (
            *(
                "en el jardín",
                "en la estación",
                "en la playa",
                "en la cocina",
                "en la escuela",
                "en el bosque",
            ),
            *("en el techo", "en la biblioteca", "en el mercado", "en la iglesia"),
        ),
    ),
}


def _number() -> Iterator[Row]:
    """``The keys near the cabinet`` → plural; the last word's own number is singular and plural equally often."""
    for index, noun in enumerate(_NOUNS):
        attractors = [_ATTRACTORS[(index + step) % len(_ATTRACTORS)] for step in range(len(_LINKS))]
        for subject, other in product((0, 1), (0, 1)):
            for link, attractor in zip(_LINKS, attractors, strict=True):
                yield (
                    f"The {noun[subject]} {link} {attractor[other]}",
                    ("singular", "plural")[subject],
                    noun[0],
                )


def _tense() -> Iterator[Row]:
    """``The farmer walked in the garden`` → past."""
    for index, verb in enumerate(_VERBS):
        for step, person in enumerate(_PEOPLE):
            place = _PLACES[(index + step) % len(_PLACES)]
            for tense in (0, 1):
                yield f"The {person} {verb[tense]} {place}", ("present", "past")[tense], verb[0]


def _sentiment() -> Iterator[Row]:
    """``I thought the film was dull, and so did my sister`` → negative."""
    for label, adjectives in (("positive", _GOOD), ("negative", _BAD)):
        for adjective in adjectives:
            for template in _OPINIONS:
                yield template.format(adjective), label, adjective


def _language() -> Iterator[Row]:
    """``Die Kinder spielen im Garten`` → German."""
    for language, (beginnings, places) in _LANGUAGES.items():
        for index, place in enumerate(places):
            for beginning in beginnings:
                yield f"{beginning} {place}", language, f"place {index + 1}"


BUILTIN: dict[str, tuple[str, Make]] = {
    "number": (
        "Is the subject singular or plural? The noun is new, and a noun of either number follows it.",
        _number,
    ),
    "tense": ("Is the verb in the present or the past? The verb is new, and a place follows it.", _tense),
    "sentiment": (
        "Is the opinion good or bad? The adjective is new, and neutral words follow it.",
        _sentiment,
    ),
    "language": ("English, French, German or Spanish? The last words' meaning is new.", _language),
}
"""Name → what is asked, and the function that makes the rows."""
