"""New phrasings by vocabulary: what must a model have read of a word to understand a question?

Held-out people are asked about in phrasings that tuning never used. The content words of some stand
in the first 8 wordings of a fact in the text ("early"), of others only in the last 4 ("late"), so a
world of 8 wordings teaches the first alone, with the same questions in tuning; of yet others they
stand nowhere ("untaught"). What the frame of a question tells without them ("when", "whose"), the
same phrasings with made-up words say; what the words tell without it, one frame for all of them
("neutral": "What is the vocation of X?").

python -m lab.phrasings --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import partial

from data.world import ATTRIBUTES, Attribute, World
from lab.knowledge import Answers, ask_all, summarize
from lab.pair import Pair, of_both, run_instrument
from lab.questions import Wordings, draw, openings
from lab.stats import Difference, difference
from training.checkpoint import Checkpoint

EARLY = 8  # wordings a fact
VERBS = ("bought", "count", "draw", "hail", "lie", "paid", "relax", "wear")  # of new phrasings
MADE_UP = ("blick", "dax", "fep", "gorp", "modi", "toma", "wug", "zib")


@dataclass(frozen=True)
class Phrasings:
    """One model's answers about held-out people; a bare value is asked for.

    Attributes:
        groups: "used" in tuning, "early", "late", "neutral", "untaught", and the middle three "made
            up".
        word: what the content words are worth in each of the middle three: less the same with
            made-up words, on the same facts; right, stop or not.
    """

    groups: dict[str, Answers]
    word: dict[str, Difference]


def phrasings(pair: Pair, questions: int) -> dict[str, Phrasings]:
    """Both models.

    Raises:
        ValueError: there is no world to ask about.
    """
    return of_both(pair, phrased, questions)


def phrased(checkpoint: Checkpoint, world: World, n: int) -> Phrasings:
    """One model's answers, n questions a group."""
    rng = random.Random(f"phrasings {world.config.seed}")
    facts = draw(world, "held_out", n, rng)
    early, late = (partial(new_questions, early=early) for early in (True, False))
    ways: dict[str, Wordings] = {
        "used": lambda a: a.questions,
        "early": early,
        "early, made up": lambda a: [made_up(question) for question in early(a)],
        "late": late,
        "late, made up": lambda a: [made_up(question) for question in late(a)],
        "neutral": neutral,
        "neutral, made up": lambda a: [made_up(question) for question in neutral(a)],
        "untaught": lambda a: a.untaught_questions,
    }
    groups, word = dict[str, Answers](), dict[str, Difference]()
    for group, wordings in ways.items():
        possible = [(p, a) for p, a in facts if wordings(a)]
        seed = f"{group.partition(',')[0]} {world.config.seed}"  # made-up words: the same questions
        asked = openings(possible, random.Random(seed), wordings=wordings)
        groups[group] = summarize(ask_all(checkpoint, world, asked))
    for group in ("early", "late", "neutral"):
        both = (groups[way].right["all"] for way in (group, f"{group}, made up"))
        word[group] = difference(*both)
    return Phrasings(groups, word)


def new_questions(attribute: Attribute, early: bool) -> list[str]:
    """The phrasings of `taught_questions` whose content words stand early in the text, or late."""
    return [q for q in attribute.taught_questions if is_early(q, attribute) == early]


def neutral(attribute: Attribute) -> list[str]:
    """The nouns of `taught_questions` in one frame, which tuning uses for every kind of fact."""
    questions = map(content_words, attribute.taught_questions)
    nouns = (" ".join(word for word in content if word not in VERBS) for content in questions)
    return [f"What is the {noun} of {{name}}?" for noun in nouns if noun]


def is_early(question: str, attribute: Attribute) -> bool:
    """Whether the first EARLY wordings of a fact have all content words of a phrasing."""
    read = {word for sentence in attribute.sentences[:EARLY] for word in words(sentence)}
    return set(content_words(question)) <= read


def content_words(question: str) -> list[str]:
    """The words of a phrasing that no phrasing of tuning has."""
    return [word for word in words(question) if word.lower() not in (*TUNED, "from")]


def words(wording: str) -> list[str]:
    """The words of a wording, without the places where a name or a value goes."""
    return re.findall(r"\w+", re.sub(r"\{\w+\}", "", wording))


def made_up(question: str) -> str:
    """A phrasing with a made-up word in place of each content word, the same for the same word."""
    for word in content_words(question):
        other = MADE_UP[sum(map(ord, word)) % len(MADE_UP)]
        question = re.sub(rf"\b{word}\b", other, question)
    return question


TUNED = {
    word.lower()
    for attribute in ATTRIBUTES
    for wording in (*attribute.questions, *attribute.follow_ups)
    for word in words(wording)
}


if __name__ == "__main__":
    run_instrument(__doc__ or "", phrasings, questions=200)
