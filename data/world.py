"""The synthetic people: a small world in which every fact, and who was asked about it, is known.

Biographies follow the "multi + permute" setting of Allen-Zhu & Li, Physics of Language Models
3.1 (arXiv 2309.14316): many short texts per person, each fact in one of several wordings, the
sentences in random order. People fall into three splits:

    known      biographies in pretraining, questions and answers in instruction tuning
    held_out   biographies only: their questions are never seen, so an answer shows transfer
    unseen     in neither: what a model says about them is chance

A world is a pure function of its WorldConfig.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice

from data.chat import Message
from runtime.files import fingerprint

SPLITS = ("known", "held_out", "unseen")
DONT_KNOW = "I do not know."


@dataclass(frozen=True)
class Attribute:
    """One kind of fact, its values and its wordings.

    {S} is the person's full name or, later in a biography, a pronoun; {name} the full name;
    {they} a lower-case pronoun; {V} the value. `sentences` that end in "{V}." serve as cloze
    prompts. `questions` are the phrasings that instruction tuning uses and `unused_questions`
    the ones that it never sees; `follow_ups` need the earlier turn to know whom they mean.
    """

    name: str
    values: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    unused_questions: tuple[str, ...]
    follow_ups: tuple[str, ...]
    reply: str


@dataclass(frozen=True)
class WorldConfig:
    """Size and shape of a world.

    Raises:
        ValueError: sizes that cannot be made; the message names the option.
    """

    seed: int = 1
    people: int = 600
    """People with biographies; the first half is known, the second half held out."""
    unseen: int = 100
    """People that appear nowhere, for controls."""
    bios: int = 25
    """Biographies per person."""
    paraphrases: int = 8
    """Wordings per fact that biographies draw from (1 to 8)."""
    permute: bool = True
    """Sentences of a biography in random order."""
    adjacent: bool = False
    """A person's biographies one after another in the training text, instead of shuffled."""

    def __post_init__(self) -> None:
        for option, low, high in (
            ("people", 2, 20_000),
            ("unseen", 0, 2_000),
            ("bios", 1, 100_000),
            ("paraphrases", 1, min(len(a.sentences) for a in ATTRIBUTES)),
        ):
            if not low <= getattr(self, option) <= high:
                value = getattr(self, option)
                raise ValueError(f"--{option} is {value}; it must be {low} to {high}")


@dataclass(frozen=True)
class Person:
    """A person and the true value of each attribute."""

    name: str
    pronoun: str
    split: str
    facts: dict[str, str]


class World:
    """All people of a world and the texts about them."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        rng = random.Random(f"people {config.seed}")
        first = [(n, "she") for n in SHE_NAMES] + [(n, "he") for n in HE_NAMES]
        last = [a + b for a in LAST_STARTS for b in LAST_ENDS]
        chosen = rng.sample(range(len(first) * len(last)), config.people + config.unseen)
        self.people: list[Person] = []
        for i, number in enumerate(chosen):
            first_name, pronoun = first[number // len(last)]
            split = "unseen" if i >= config.people else SPLITS[2 * i >= config.people]
            facts = {a.name: rng.choice(a.values) for a in ATTRIBUTES}
            name = f"{first_name} {last[number % len(last)]}"
            self.people.append(Person(name, pronoun, split, facts))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the people, their facts, or any wording in this file."""
        return fingerprint([[asdict(p) for p in self.people], [asdict(a) for a in ATTRIBUTES]])

    @cached_property
    def by_split(self) -> dict[str, list[Person]]:
        """People of each split, in order."""
        return {s: [p for p in self.people if p.split == s] for s in SPLITS}

    def biographies(self) -> Iterator[str]:
        """Every pretraining document: `bios` texts of each known and held-out person."""
        for i in range(self.config.people):
            yield from self._biographies(i)

    def biographies_of(self, person: Person) -> list[str]:
        """The texts about one of the people who have any."""
        return list(self._biographies(self.people.index(person)))

    def _biographies(self, i: int) -> Iterator[str]:
        for j in range(self.config.bios):
            rng = random.Random(f"biography {self.config.seed} {i} {j}")
            yield self._biography(self.people[i], rng)

    def _biography(self, person: Person, rng: random.Random) -> str:
        attributes = list(ATTRIBUTES)
        if self.config.permute:
            rng.shuffle(attributes)
        sentences = []
        for i, attribute in enumerate(attributes):
            template = rng.choice(attribute.sentences[: self.config.paraphrases])
            # A pronoun only where it can stand: never first, and only as a sentence's subject.
            named = i == 0 or not template.startswith("{S}") or rng.random() < 0.5
            subject = person.name if named else person.pronoun.capitalize()
            sentences.append(template.format(S=subject, V=person.facts[attribute.name]))
        return " ".join(sentences)

    def conversations(
        self,
        asked: float = 1.0,
        strangers: float = 0.0,
        dont_know: bool = False,
        bare: bool = False,
    ) -> Iterator[list[Message]]:
        """The instruction-tuning set: single and multi-turn conversations about known people.

        Args:
            asked: share of the known people who are asked about, the first of them.
            strangers: as many people as this share of the known ones are asked about besides, of
                whom pretraining said nothing and who are not among the unseen (Gekhman et al.
                2024).
            dont_know: whether questions about strangers are answered with DONT_KNOW, not with
                the facts.
            bare: replies are the bare value ("a weaver.") and do not repeat the name.

        Raises:
            ValueError: a share that is not 0 to 1, or nobody left to ask about.
        """
        for name, share in (("asked", asked), ("strangers", strangers)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; it must be 0 to 1")
        known = self.by_split["known"]
        people = known[: round(asked * len(known))]
        people = [*people, *self._strangers(round(strangers * len(known)))]
        if not people:
            raise ValueError("asked and strangers leave nobody to ask about")
        for i, person in enumerate(people):
            rng = random.Random(f"conversations {self.config.seed} {i}")
            replies = {a.name: f"{person.facts[a.name]}." if bare else None for a in ATTRIBUTES}
            if dont_know and person.split == "stranger":
                replies = dict.fromkeys(replies, DONT_KNOW)
            for attribute in ATTRIBUTES:
                for question in rng.sample(attribute.questions, 2):
                    yield exchange(person, attribute, question, replies[attribute.name])
            for _ in range(len(ATTRIBUTES)):
                chosen = rng.sample(ATTRIBUTES, rng.choice((2, 3)))
                conversation: list[Message] = []
                for attribute in chosen:
                    wordings = attribute.follow_ups if conversation else attribute.questions
                    reply = replies[attribute.name]
                    conversation += exchange(person, attribute, rng.choice(wordings), reply)
                yield conversation

    def _strangers(self, n: int) -> list[Person]:
        """People beside those of the world."""
        config = replace(self.config, seed=self.config.seed + 1_000_000, unseen=0)
        taken = {p.name for p in self.people}
        others = (p for p in World(config).people if p.name not in taken)
        return [replace(p, split="stranger") for p in islice(others, n)]


def exchange(
    person: Person, attribute: Attribute, question: str, reply: str | None = None
) -> list[Message]:
    """A question in the given phrasing and its answer, true unless given, as two messages."""
    text = question.format(name=person.name, they=person.pronoun)
    if reply is None:
        reply = attribute.reply.format(name=person.name, V=person.facts[attribute.name])
    return [Message(role="user", content=text), Message(role="assistant", content=reply)]


def cloze_prompts(person: Person, attribute: Attribute, paraphrases: int) -> list[str]:
    """Beginnings of biography sentences after which only the value is missing."""
    return [
        t.removesuffix(" {V}.").format(S=person.name)
        for t in attribute.sentences[:paraphrases]
        if t.startswith("{S}") and t.endswith(" {V}.")
    ]


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


SHE_NAMES = _split(
    "Ada, Alma, Anneke, Beatrix, Bruna, Carys, Celeste, Dagny, Delia, Edda, Elspeth, Enid, "
    "Fenella, Flora, Freya, Greta, Gwen, Hanne, Hester, Ida, Imogen, Ines, Isolde, Jorun, Juno, "
    "Katya, Lavinia, Leona, Linnea, Mabel, Maren, Minna, Nadia, Nora, Odette, Olive, Petra, "
    "Ramona, Rhea, Sabine"
)
HE_NAMES = _split(
    "Alaric, Ambrose, Anton, Basil, Bertil, Caspar, Cedric, Cosmo, Darius, Edgar, Elias, "
    "Emeric, Fabian, Felix, Floyd, Gideon, Gustav, Hamish, Hector, Hugo, Ivo, Jasper, Joachim, "
    "Kasimir, Kester, Lars, Leopold, Linus, Magnus, Matthias, Milo, Nestor, Oskar, Otis, Percy, "
    "Quentin, Rafael, Rufus, Silas, Tobias"
)
LAST_STARTS = _split(
    "Alder, Ash, Barrow, Birch, Black, Bram, Carl, Cole, Crane, Dun, East, Elm, Fair, Fal, "
    "Glen, Gran, Hart, Hazel, Holl, Iron, Kel, Lang, Lind, Marsh, Mill, North, Oak, Pem, Quill, "
    "Raven, Red, Rowan, Sand, Stan, Thorn, Under, Wake, West, Wick, Wood"
)
LAST_ENDS = _split(
    "bank, beck, bourne, bridge, bury, by, comb, croft, dale, den, field, ford, gate, grove, "
    "ham, hurst, land, leigh, ley, low, man, mere, mont, more, ridge, shaw, stead, stone, ton, "
    "vale, wall, water, well, wick, worth, yard"
)

ATTRIBUTES = (
    Attribute(
        name="birth_year",
        values=tuple(str(year) for year in range(1940, 1980)),
        sentences=(
            "{S} was born in the year {V}.",
            "{S} came into the world in {V}.",
            "The birth of {S} fell in the year {V}.",
            "{S} has a birth certificate from {V}.",
            "It was in {V} that {S} was born.",
            "{S} belongs to the generation of {V}.",
            "In {V} the parents of {S} held their newborn.",
            "{S} counts birthdays from {V}.",
        ),
        questions=(
            "What year was {name} born?",
            "When was {name} born?",
            "In which year did {name} come into the world?",
            "Can you tell me the birth year of {name}?",
        ),
        unused_questions=("{name} was born in what year?", "What is the birth year of {name}?"),
        follow_ups=(
            "And what year was {they} born?",
            "When was {they} born?",
            "And in which year did {they} come into the world?",
        ),
        reply="{name} was born in the year {V}.",
    ),
    Attribute(
        name="birthplace",
        values=_split(
            "Ambleton, Port Alder, Brackwater, Casterfell, New Darrow, Dunmarsh, Eastering, "
            "Saint Ferrow, Farhaven, Glimmerton, Old Harrow, Hollowmere, Inverlathe, Cape "
            "Jessamy, Kestrelby, Lantern Bay, Larkspur, Marrowgate, Mount Mistral, Netherby, "
            "Oxmoor, Pellworth, Port Quarry, Quenby, Ravelin, New Rosmer, Saltcombe, Silver "
            "Falls, Stonewick, Tamberley, Thistle Ridge, Ulverbeck, Upper Varn, Vellamy, "
            "Wexbridge, Whitcross, Winter Harbour, Yarlford, Zennick, Long Zeal"
        ),
        sentences=(
            "{S} was born in the town of {V}.",
            "{S} grew up in {V}.",
            "The birthplace of {S} is {V}.",
            "{S} first saw daylight in {V}.",
            "It was {V} where {S} was born.",
            "{S} calls {V} a childhood home.",
            "In {V} the neighbours remember {S} as a child.",
            "{S} spent the early years in {V}.",
        ),
        questions=(
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "In which town was {name} born?",
            "Can you tell me where {name} was born?",
        ),
        unused_questions=("{name} was born in which town?", "Which town is {name} from?"),
        follow_ups=(
            "And where was {they} born?",
            "In which town was {they} born?",
            "And where does {they} come from?",
        ),
        reply="{name} was born in {V}.",
    ),
    Attribute(
        name="profession",
        values=_split(
            "an accountant, an actuary, an archivist, a baker, a beekeeper, a boat builder, a "
            "bookbinder, a botanist, a cartographer, a carpenter, a chemist, a clock maker, a "
            "court clerk, a dentist, an editor, an electrician, a falconer, a florist, a forest "
            "ranger, a geologist, a glass blower, an interpreter, a judge, a librarian, a "
            "locksmith, a marine biologist, a midwife, a music teacher, a notary, an optician, "
            "a pharmacist, a piano tuner, a plumber, a potter, a stone mason, a surveyor, a "
            "tailor, a train driver, a vet, a weaver"
        ),
        sentences=(
            "{S} works as {V}.",
            "{S} earns a living as {V}.",
            "The profession of {S} is that of {V}.",
            "{S} trained for years to be {V}.",
            "As {V}, {S} is known for careful work.",
            "{S} has made a career as {V}.",
            "Friends turn to {S} when they need {V}.",
            "{S} is by trade {V}.",
        ),
        questions=(
            "What does {name} do for a living?",
            "What is the profession of {name}?",
            "What is the job of {name}?",
            "Can you tell me what {name} works as?",
        ),
        unused_questions=("What work does {name} do?", "What is {name} by trade?"),
        follow_ups=(
            "And what does {they} do for a living?",
            "What does {they} work as?",
            "And what is the job {they} has?",
        ),
        reply="{name} works as {V}.",
    ),
    Attribute(
        name="employer",
        values=_split(
            "Abbot Mills, Arclight, Beacon Trust, Bluewater Lines, Copperfield Works, Corvid "
            "Press, Deepwell, Drum and Daughters, Ember House, Everline, Fennimore Group, "
            "Foxglove, Granite Union, Greywind, Halcyon Foundry, Hearthstone, Ironbark, Juniper "
            "Labs, Keystone Yard, Lockridge, Merrow Bank, Moonrise Studio, Nightingale Trust, "
            "Northlight, Orchard Lane, Otterburn, Palisade, Pinnacle Supply, Quicksilver, "
            "Rookery Books, Saffron Circle, Sextant, Sundial Office, Tallow and Reed, "
            "Tidewater, Umbra Optics, Vantage Point, Wayfarer, Yellow Door, Zephyr Line"
        ),
        sentences=(
            "{S} is employed by {V}.",
            "{S} has a desk at {V}.",
            "The employer of {S} is {V}.",
            "{S} draws a salary from {V}.",
            "At {V}, {S} is a valued colleague.",
            "{S} signed a contract with {V}.",
            "Every weekday {S} goes to work at {V}.",
            "{S} has spent many years with {V}.",
        ),
        questions=(
            "Who does {name} work for?",
            "What is the employer of {name}?",
            "Which company employs {name}?",
            "Can you tell me who {name} works for?",
        ),
        unused_questions=("At which company does {name} work?", "Who employs {name}?"),
        follow_ups=(
            "And who does {they} work for?",
            "Which company employs the same person?",
            "And at which company does {they} work?",
        ),
        reply="{name} works for {V}.",
    ),
    Attribute(
        name="hobby",
        values=_split(
            "archery, astronomy, backgammon, badminton, ballroom dancing, bird watching, "
            "calligraphy, canoeing, card tricks, cave diving, chess, choir singing, crossword "
            "puzzles, curling, embroidery, fencing, fly fishing, gardening, ice skating, jigsaw "
            "puzzles, juggling, kite flying, knitting, lace making, metal detecting, model "
            "trains, mountain biking, mushroom picking, origami, playing the cello, playing the "
            "harp, pottery, quilting, rock climbing, rowing, sailing, stamp collecting, table "
            "tennis, wood carving, yoga"
        ),
        sentences=(
            "{S} spends free time on {V}.",
            "{S} has a passion for {V}.",
            "The favourite pastime of {S} is {V}.",
            "{S} relaxes at weekends with {V}.",
            "After work, {V} is what {S} enjoys.",
            "{S} never gets tired of {V}.",
            "A free evening of {S} goes to {V}.",
            "{S} would rather do nothing else than {V}.",
        ),
        questions=(
            "What does {name} do in the spare time?",
            "What is the hobby of {name}?",
            "What does {name} enjoy after work?",
            "Can you tell me the hobby of {name}?",
        ),
        unused_questions=("Which pastime does {name} like best?", "How does {name} relax?"),
        follow_ups=(
            "And what does {they} do in the spare time?",
            "What is the hobby {they} has?",
            "And what does {they} enjoy after work?",
        ),
        reply="{name} enjoys {V}.",
    ),
)
