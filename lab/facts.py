"""The same facts twice, outside the world: completed in a text, and asked for.

What `lab.knowledge` asks about people of a world, about facts of public knowledge: for checkpoints
that were trained on real text. The facts are those of data/facts.toml or of a file of your own
(lab/relations.py says in which form).

python -m lab.facts --base BASE --instruct INSTRUCT
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.chat import Message, Prompt
from data.tokenizer import Tokenizer
from lab.likelihood import ask, reply_limit, score_choices
from lab.pair import Pair, contexts_of, fitting, open_both, run_instrument
from lab.relations import Fact, Relation, read_facts
from lab.stats import Difference, Mean, Share, difference
from runtime.files import sha256_file
from training.checkpoint import Checkpoint

OURS = Path(__file__).parents[1] / "data" / "facts.toml"
Cell = dict[str, Share]  # "all", then each relation
# Each grade of a reply, and that of the cloze which stands against it in a table.
CONTEXTS = ("cloze", "plain", "chat")
GRADES = {"said": "said", "stopped": "said", "first": "first"}


@dataclass(frozen=True, kw_only=True)
class FactPair(Pair):
    """A pair, and the facts that fit into its context; `file` is where they are from."""

    relations: dict[str, Relation]
    file: Path


@dataclass(frozen=True)
class Graded:
    """One grade, and what it would be whoever a fact is about.

    Attributes:
        right: by relation.
        swapped: replies about another subject, the next of the relation whose value is another,
            that would be right about this one. A model that has but a favourite in each relation
            has as many of them as right ones; one that knows every fact has none.
        subject: what the subject is worth: right - swapped.
    """

    right: Cell
    swapped: Share
    subject: Difference


@dataclass(frozen=True)
class InContext:
    """One model in one context: "cloze", or the question as "plain" text, in the "chat" template,
    or after "examples" as plain text.

    Attributes:
        said: of greedy text: the cloze goes on with the value; of a reply the first sentence or
            line names the value and no other of its relation, stop or not.
        stopped: the same, and it ends by itself.
        first: the value is the likeliest of all values of its relation, by the log-likelihood of
            "value." in all: that of writing just this, as a reply with a space before it or
            without, whichever is likelier: some models learn to begin so. Per token, long names
            would be ahead, whose later tokens follow from the first. In all, frequent and short
            values are, but of every subject alike, which `swapped` shows.
        reciprocal: 1 / the rank of the value among those.
    """

    said: Graded
    stopped: Share
    first: Graded
    reciprocal: Mean

    @property
    def grades(self) -> dict[str, Share]:
        """Over all facts, by what GRADES names."""
        said, first = (graded.right["all"] for graded in (self.said, self.first))
        return {"said": said, "stopped": self.stopped, "first": first}


@dataclass(frozen=True)
class CrossTable:
    """What a model completes against what it, or another, answers; shares of all facts.

    Attributes:
        answered_of_known: of what is known alone. Where little is, two likeliest values can agree
            because both are the relation's favourite: see `Graded.swapped`.
    """

    known_and_answered: Share
    known_not_answered: Share
    answered_not_known: Share
    neither: Share
    answered_of_known: Share
    answered_less_known: Difference


@dataclass(frozen=True)
class Tuning:
    """What became of the base's cloze in the instruct model; shares of all facts."""

    kept: Share
    lost: Share
    gained: Share
    neither: Share
    instruct_less_base: Difference


@dataclass(frozen=True)
class Facts:
    """All figures.

    Attributes:
        chance: a value of the relation, drawn blindly.
        most_frequent: always the value that most of these facts of the relation have.
        base, instruct: by context.
        tables: by grade of the reply, then by whose cloze and whose reply it is; in the chat
            template, if nothing else is said.
        tuning: by grade of the cloze.
    """

    file: str
    sha256: str
    chance: dict[str, float]
    most_frequent: Cell
    base: dict[str, InContext]
    instruct: dict[str, InContext]
    tables: dict[str, dict[str, CrossTable]]
    tuning: dict[str, Tuning]


def open_with_facts(
    base: str, instruct: str, device: str, file: Path | None, shots: int = 0
) -> FactPair:
    """Loads two checkpoints and what to ask them, for which they need no world and no Q&A. With
    `shots` the base is also asked after so many other facts, drawn at random, and none of these is.

    Raises:
        ValueError: they are no pair, or the file holds no facts that fit into their context.
    """
    return with_facts(open_both(base, instruct, device), file, shots)


def with_facts(pair: tuple[Checkpoint, Checkpoint], file: Path | None, shots: int) -> FactPair:
    """Two checkpoints and what to ask them. Arguments and errors as those of `open_with_facts`."""
    relations = read_facts(file or OURS)
    asked = [
        [Message(role="user", content=f.question), Message(role="assistant", content=f.sentence)]
        for relation in relations.values()
        for f in relation.facts.values()
    ]
    random.Random("shown").shuffle(asked)
    examples = [message for messages in asked[:shots] for message in messages]
    limit = reply_limit(pair[0], (reply["content"] for _, reply in asked))
    asked = fitting(asked[shots:], pair[0], limit, contexts_of(None, examples))
    fit = {(question["content"], reply["content"]) for question, reply in asked}
    for name, r in relations.items():
        facts = {s: f for s, f in r.facts.items() if (f.question, f.sentence) in fit}
        relations[name] = Relation(facts, r.forms)
    given = (*pair, None, asked, limit, examples, shots)
    return FactPair(*given, relations=relations, file=file or OURS)


def facts(pair: FactPair, questions: int) -> Facts:
    """All figures, of at most `questions` facts."""
    every = [fact for relation in pair.relations.values() for fact in relation.facts.values()]
    asked = random.Random("facts").sample(every, min(questions, len(every)))
    chance, common = dict[str, float](), dict[str, str]()
    for name in sorted({fact.relation for fact in asked}):
        chance[name] = 1 / len(pair.relations[name].values)
        common[name] = Counter(f.value for f in asked if f.relation == name).most_common(1)[0][0]
    instruct = {c: in_context(pair.instruct, pair, asked, c) for c in CONTEXTS}
    of_base = [*CONTEXTS, *(["examples"] if pair.examples else [])]
    base = {c: in_context(pair.base, pair, asked, c) for c in of_base}
    against = {
        "base x base, plain text": (base["cloze"], base["plain"]),
        "base x base": (base["cloze"], base["chat"]),
        "base x instruct": (base["cloze"], instruct["chat"]),
        "instruct x instruct": (instruct["cloze"], instruct["chat"]),
    }
    if pair.examples:
        against["base x base, after examples"] = (base["cloze"], base["examples"])
    before, after = base["cloze"].grades, instruct["cloze"].grades
    return Facts(
        file=str(pair.file),
        sha256=sha256_file(pair.file),
        chance={"all": sum(chance[f.relation] for f in asked) / len(asked), **chance},
        most_frequent=cell(asked, [f.value == common[f.relation] for f in asked]),
        base=base,
        instruct=instruct,
        tables={
            grade: {
                who: cross_table(cloze.grades[known], reply.grades[grade])
                for who, (cloze, reply) in against.items()
            }
            for grade, known in GRADES.items()
        },
        tuning={
            grade: Tuning(
                *four_ways(before[grade], after[grade]), difference(after[grade], before[grade])
            )
            for grade in ("said", "first")
        },
    )


def public_facts(pair: Pair, questions: int) -> Facts:
    """All figures of any pair, of at most `questions` facts of data/facts.toml.

    Raises:
        NothingFitsError: none does into its context.
    """
    return facts(with_facts((pair.base, pair.instruct), None, pair.shots), questions)


def in_context(
    checkpoint: Checkpoint, pair: FactPair, facts: Sequence[Fact], context: str
) -> InContext:
    """What a model makes of each fact in a context."""
    tokenizer, is_cloze = checkpoint.tokenizer, context == "cloze"
    put: Prompt = cloze_prompt if is_cloze else pair.contexts[context]
    texts = [fact.cloze if is_cloze else fact.question for fact in facts]
    prompts = [put([Message(role="user", content=text)], tokenizer) for text in texts]
    forms = {form for relation in pair.relations.values() for form in relation.forms}
    longest = 2 + max(len(tokenizer.encode(f" {form}")) for form in forms)
    replies = ask(checkpoint, prompts, min(longest, pair.limit) if is_cloze else pair.limit)
    said, first, ranks = list[str](), list[str](), list[int]()
    for fact, prompt, ids in zip(facts, prompts, replies, strict=True):
        relation = pair.relations[fact.relation]
        text = tokenizer.decode(ids[: end_of(ids, tokenizer)])
        said.append(relation.begins(text) if is_cloze else relation.says(text))
        beginnings = ["", " "]
        if is_cloze:  # whole, since a text is not cut into tokens where its cloze ends
            prompt, beginnings = prompt[:1], [f"{fact.cloze} "]
        n = len(relation.values)
        choices = [f"{beginning}{value}." for beginning in beginnings for value in relation.values]
        scores = score_choices(checkpoint, prompt, [tokenizer.encode(c) for c in choices])
        scores = [max(scores[i::n]) for i in range(n)]
        true = scores[relation.values.index(fact.value)]
        first.append(relation.values[scores.index(max(scores))])
        ranks.append(1 + sum(score > true for score in scores))
    right = graded(facts, said)
    stops = [ids[-1] == tokenizer.end_of_turn for ids in replies]
    stopped = [hit and stop for (_, hit), stop in zip(right.right["all"].flags, stops, strict=True)]
    return InContext(
        said=right,
        stopped=Share.of(stopped, topics(facts)),
        first=graded(facts, first),
        reciprocal=Mean.of(1 / rank for rank in ranks),
    )


def cloze_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """The beginning of a text."""
    return [tokenizer.end_of_text, *tokenizer.encode(messages[-1]["content"])]


def end_of(ids: list[int], tokenizer: Tokenizer) -> int:
    """Where a reply ends: its turn, or the document that it is in."""
    ends = (tokenizer.end_of_turn, tokenizer.end_of_text)
    return next((i for i, token in enumerate(ids) if token in ends), len(ids))


def graded(facts: Sequence[Fact], values: Sequence[str]) -> Graded:
    """Grades the value that a model gives for each fact."""
    right = cell(facts, [value == fact.value for value, fact in zip(values, facts, strict=True)])
    others = {i: other for i in range(len(facts)) if (other := another(facts, i)) is not None}
    about = topics([facts[i] for i in others])
    swapped = Share.of((values[other] == facts[i].value for i, other in others.items()), about)
    own = Share.of((values[i] == facts[i].value for i in others), about)
    return Graded(right, swapped, difference(own, swapped))


def another(facts: Sequence[Fact], i: int) -> int | None:
    """The next fact of the same relation that has another value, around the end; None if none."""
    order = (j % len(facts) for j in range(i + 1, i + len(facts)))
    same = (j for j in order if facts[j].relation == facts[i].relation)
    return next((j for j in same if facts[j].value != facts[i].value), None)


def cell(facts: Sequence[Fact], flags: Sequence[bool]) -> Cell:
    """Shares over all facts and over those of each relation, a flag for each fact."""
    found = {"all": Share.of(flags, topics(facts))}
    for name in sorted({fact.relation for fact in facts}):
        of = (flag for fact, flag in zip(facts, flags, strict=True) if fact.relation == name)
        found[name] = Share.of(of)
    return found


def topics(facts: Iterable[Fact]) -> list[str]:
    """What each fact is about: a subject may be that of several relations."""
    return [f"{fact.subject}/{fact.relation}" for fact in facts]


def cross_table(known: Share, answered: Share) -> CrossTable:
    """The table of two grades of the same facts."""
    both = zip(known.flags, answered.flags, strict=True)
    of_known = Share.of(answers for (_, knows), (_, answers) in both if knows)
    return CrossTable(*four_ways(known, answered), of_known, difference(answered, known))


def four_ways(a: Share, b: Share) -> tuple[Share, Share, Share, Share]:
    """Which facts are hits of both, of the first alone, of the second alone, of neither."""
    flags = [(one, other) for (_, one), (_, other) in zip(a.flags, b.flags, strict=True)]
    about = [topic for topic, _ in a.flags]

    def which(*way: bool) -> Share:
        return Share.of((found == way for found in flags), about)

    return which(True, True), which(True, False), which(False, True), which(False, False)


def main() -> None:
    """The command line."""
    file = ("--facts", "a file of facts, .toml or .jsonl (default: data/facts.toml)")
    run_instrument(__doc__ or "", facts, questions=1000, opened=open_with_facts, file=file)


if __name__ == "__main__":
    main()
