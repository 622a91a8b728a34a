"""Same knowledge, different behaviour: what a model completes, and what it answers.

The protocol of Allen-Zhu & Li, Physics of Language Models 3.1 (arXiv 2309.14316), in miniature:
{complete the biography, answer the question} x {base, instruct} on known, held-out and unseen
people. All decoding is greedy.

python -m lab.knowledge --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data.chat import Message, Prompt, raw_prompt
from data.tokenizer import Tokenizer
from data.world import ATTRIBUTES, BARE, FORMS, SPLITS, Attribute, Person, Turn, World
from hf.adapter import chat_prompt
from lab.likelihood import ask, reply_limit, score_choices
from lab.pair import Pair, after_shown, contexts_of, run_instrument
from lab.questions import (
    Fact,
    Grade,
    Question,
    Wordings,
    after_examples,
    begun,
    draw,
    facts_of,
    grade,
    openings,
    true_replies,
    used,
)
from lab.stats import Difference, Mean, Share, Tally, difference
from training.checkpoint import Checkpoint

Cell = dict[str, Share]  # "all", then each attribute
THOROUGHLY = 5  # of so many questions, one is asked in the ways that matter less as well
CHOSEN_ON, FIRST = 20, 16  # known people on whom a phrasing is chosen; tokens, a first sentence


@dataclass(frozen=True)
class Answers:
    """What became of one set of questions; what each grade says, is in `Grade`.

    Attributes:
        answered: right, stops, and in the form asked for.
        right: the value named in the first sentence, and no other of its kind, stop or not: what a
            forced stop would leave.
        exact: nothing but the value in the first sentence.
        by_chance: right about another kind of fact.
        wrong: what the wrong first sentences named instead, by the kind of fact asked for.
    """

    answered: Cell
    right: Cell
    exact: Share
    by_chance: Share
    stops: Share
    in_form: Share
    mentions: Share
    next_document: Share
    abstains: Share
    wrong: dict[str, Tally]


@dataclass(frozen=True)
class Rank:
    """The true value among all 40 of its attribute, by the likelihood of the text that holds it."""

    first: Share
    reciprocal: Mean


@dataclass(frozen=True)
class Knowledge:
    """One model's rows of the table; what is not by split, is about held-out people.

    Attributes:
        cloze: a biography sentence is completed with exactly the right value.
        answers: a bare value is asked for, in phrasings and instructions that tuning uses, in the
            chat template.
        sentence: the same, but a sentence is asked for.
        form: either form, in instructions that tuning never uses.
        uninstructed: no form is asked for.
        rephrased: as `answers`, in phrasings that tuning never uses and whose content word the
            text teaches.
        untaught: the same, but nothing teaches the word.
        named: as `sentence`, but the reply is begun with the person's name, so that it can be
            about nobody else.
        examples: as running text without the template, after three questions with their values.
        plain: as `answers`, but as running text.
        begun: as running text, the reply begun with the person's name: in "any" phrasing of
            tuning's, or in the "best" one for each kind of fact (`best_wordings`).
        ranks: without generation, by context: "cloze" is a biography sentence, "plain" and "chat"
            the true value as a reply.
    """

    cloze: dict[str, Cell]
    answers: dict[str, Answers]
    sentence: Answers
    form: Answers
    uninstructed: Answers
    rephrased: dict[str, Answers]
    untaught: Answers
    named: Answers
    examples: Answers
    plain: dict[str, Answers]
    begun: dict[str, Answers]
    ranks: dict[str, dict[str, Rank]]


def measure(checkpoint: Checkpoint, world: World, n: int, thorough: bool = True) -> Knowledge:
    """One model's rows, on n questions per cell drawn evenly over people and attributes.

    Args:
        thorough: also `plain`, `begun` and `ranks`, which take most of the time.

    Raises:
        ValueError: the world has fewer than n facts in a split.
    """
    cloze, answers, rephrased = {}, {}, {}
    plain: dict[str, Answers] = {}
    ranks: dict[str, dict[str, Rank]] = {}
    more: dict[str, Answers] = {}
    more_begun: dict[str, Answers] = {}

    def graded(questions: list[Question], prompt: Prompt = chat_prompt) -> Answers:
        return summarize(ask_all(checkpoint, world, questions, prompt))

    for split in SPLITS:
        cloze[split], facts, rng = draw_and_complete(checkpoint, world, split, n)
        asked = openings(facts, rng)
        answers[split] = graded(asked)
        few = max(1, n // THOROUGHLY)
        others = facts if split == "held_out" else facts[:few]
        rephrased[split] = graded(openings(others, rng, wordings=taught))
        if split == "held_out":
            more = {
                "sentence": graded(openings(facts, rng, ("sentence",))),
                "form": graded(openings(facts, rng, FORMS, instructions="unused")),
                "uninstructed": graded(openings(facts, rng, ())),
                "untaught": graded(openings(facts, rng, wordings=untaught)),
                "examples": graded(after_examples(world, asked), raw_prompt),
                "named": graded(begun(openings(facts, rng, ("sentence",)))),
            }
            if thorough:
                ways = {"any": used, "best": best_wordings(checkpoint, world)}
                for way, wordings in ways.items():
                    told = begun(openings(facts, rng, (), wordings))
                    more_begun[way] = summarize(ask_all(checkpoint, world, told, raw_prompt, FIRST))
        if thorough:
            plain[split] = graded(asked[:few], raw_prompt)
            for context in ("cloze", "plain", "chat"):
                found = rank(checkpoint, world, asked[:few], context)
                ranks.setdefault(context, {})[split] = found
    return Knowledge(
        cloze=cloze,
        answers=answers,
        rephrased=rephrased,
        plain=plain,
        begun=more_begun,
        ranks=ranks,
        **more,
    )


def best_wordings(checkpoint: Checkpoint, world: World) -> Wordings:
    """For each kind of fact that phrasing of tuning's in which known people's are named most often,
    as running text and with the name given: the most that a prompt of this kind gets out.
    """
    people, best = world.by_split["known"][:CHOSEN_ON], dict[str, list[str]]()
    for attribute in ATTRIBUTES:
        turns = [Turn(person, attribute, w) for w in attribute.questions for person in people]
        asked = begun([Question([Message(role="user", content=t.question)], t) for t in turns])
        right = Counter(
            question.turn.wording
            for question, grade in ask_all(checkpoint, world, asked, raw_prompt, FIRST)
            if grade.right
        )
        best[attribute.name] = [max(attribute.questions, key=right.__getitem__)]
    return lambda attribute: best[attribute.name]


def taught(attribute: Attribute) -> Sequence[str]:
    """Phrasings that tuning never uses, with a word of the text."""
    return attribute.taught_questions


def untaught(attribute: Attribute) -> Sequence[str]:
    """Phrasings that tuning never uses, with a word that stands nowhere."""
    return attribute.untaught_questions


Graded = tuple[Question, Grade]


def ask_all(
    checkpoint: Checkpoint,
    world: World,
    questions: list[Question],
    prompt: Prompt = chat_prompt,
    limit: int | None = None,
) -> list[Graded]:
    """Every question with the grade of the model's reply.

    Args:
        prompt: how a conversation is put to the model.
        limit: tokens of a reply at most; None for `reply_limit` of the true ones in the forms
            asked for.
    """
    begins = [checkpoint.tokenizer.encode(q.begin) for q in questions]
    prompts = [prompt(q.messages, checkpoint.tokenizer) for q in questions]
    limit = limit or reply_limit(checkpoint, true_replies(world, {q.form for q in questions}))
    new = ask(checkpoint, [p + b for p, b in zip(prompts, begins, strict=True)], limit)
    replies = [begin + ids for begin, ids in zip(begins, new, strict=True)]
    return [(q, grade(checkpoint, q, ids)) for q, ids in zip(questions, replies, strict=True)]


def summarize(graded: Sequence[Graded]) -> Answers:
    """The shares of a set of graded questions."""
    grades = [g for _, g in graded]
    facts = [(q.turn.person, q.turn.attribute) for q, _ in graded]
    named = {
        kind: [g.named for q, g in graded if q.turn.attribute.name == kind]
        for kind in dict.fromkeys(a.name for _, a in facts)
    }
    return Answers(
        answered=cell(facts, (g.answered for g in grades)),
        right=cell(facts, (g.right for g in grades)),
        exact=Share.of(g.exact for g in grades),
        by_chance=Share.of(g.by_chance for g in grades),
        stops=Share.of(g.stops for g in grades),
        in_form=Share.of(g.in_form for g in grades),
        mentions=Share.of(g.mentions for g in grades),
        next_document=Share.of(g.next_document for g in grades),
        abstains=Share.of(g.abstains for g in grades),
        wrong={k: Tally(Counter(what for what in x if what), len(x)) for k, x in named.items()},
    )


def cell(facts: Sequence[Fact], flags: Iterable[bool]) -> Cell:
    """Shares over all facts and over those of each attribute, a flag for each fact."""
    flagged = list(zip(facts, flags, strict=True))
    topics = [f"{person.name}/{attribute.name}" for person, attribute in facts]
    return {"all": Share.of((flag for _, flag in flagged), topics)} | {
        a.name: Share.of(flag for (_, of), flag in flagged if of is a) for a in ATTRIBUTES
    }


def cloze_prompts(person: Person, attribute: Attribute, paraphrases: int) -> list[str]:
    """Beginnings of biography sentences after which only the value is missing."""
    return [
        t.removesuffix(" {V}.").format(S=person.name)
        for t in attribute.sentences[:paraphrases]
        if t.startswith("{S}") and t.endswith(" {V}.")
    ]


def draw_and_complete(
    checkpoint: Checkpoint, world: World, split: str, n: int
) -> tuple[Cell, list[Fact], random.Random]:
    """Cloze of n facts of a split, the same for every model; also what goes on from there."""
    rng = random.Random(f"questions {split} {world.config.seed}")
    facts = draw(world, split, n, rng)
    return complete(checkpoint, world, facts, rng), facts, rng


def complete(checkpoint: Checkpoint, world: World, facts: list[Fact], rng: random.Random) -> Cell:
    """Which facts' biography sentences are completed with exactly the right value.

    The sentence stands alone and in any wording: few of them occur like that in the text.
    """
    texts = [rng.choice(cloze_prompts(p, a, world.config.paraphrases)) for p, a in facts]
    return cell(facts, completed(checkpoint, facts, texts))


def recite(checkpoint: Checkpoint, world: World, facts: list[Fact], rng: random.Random) -> Cell:
    """Which facts are completed in a biography that was written for training, up to the value.

    Left out is where the person is not named before the value. One in fifty biographies is in the
    validation text.
    """
    read, texts = [], []
    for person, attribute in facts:
        value = person.facts[attribute.name]
        beginnings = [b[: b.index(value)] for b in world.biographies(person) if value in b]
        beginnings = [b.rstrip() for b in beginnings if person.name in b]
        if beginnings:
            read.append((person, attribute))
            texts.append(rng.choice(beginnings))
    return cell(read, completed(checkpoint, read, texts, full_stop=False))


def completed(
    checkpoint: Checkpoint, facts: list[Fact], texts: list[str], full_stop: bool = True
) -> list[bool]:
    """Whether each text is continued with the value of its fact."""
    tokenizer = checkpoint.tokenizer
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
    longest = max(len(tokenizer.encode(f" {v}.")) for a in ATTRIBUTES for v in a.values)
    end = "." if full_stop else ""
    return [
        tokenizer.decode(ids).startswith(f" {person.facts[attribute.name]}{end}")
        for (person, attribute), ids in zip(
            facts, ask(checkpoint, prompts, longest + 1), strict=True
        )
    ]


def rank(checkpoint: Checkpoint, world: World, questions: list[Question], context: str) -> Rank:
    """Where the truth stands among all values of its attribute, by the likelihood of " value.".

    Args:
        context: what the value stands after: "cloze", a biography sentence; "plain" or "chat", the
            question as running text or in the template.
    """
    tokenizer, ranks = checkpoint.tokenizer, []
    for question in questions:
        person, attribute = question.turn.person, question.turn.attribute
        if context == "cloze":
            sentence = cloze_prompts(person, attribute, world.config.paraphrases)[0]
            prompt = [tokenizer.end_of_text, *tokenizer.encode(sentence)]
        else:
            put = contexts_of(world)[context]
            prompt = put(question.messages, tokenizer)
        choices = [tokenizer.encode(BARE.format(V=v)) for v in attribute.values]
        scores = score_choices(checkpoint, prompt, choices)
        true = scores[attribute.values.index(question.value)]
        ranks.append(1 + sum(score > true for score in scores))
    return Rank(Share.of(r == 1 for r in ranks), Mean.of(1 / r for r in ranks))


# ---- what the text never holds ---------------------------------------------------------------


@dataclass(frozen=True)
class Lint:
    """Shares of tokens that the pretraining text never holds: what a model cannot know of.

    Attributes:
        replies: of the replies of instruction tuning.
        prompts: of its questions and instructions, without the template's tokens.
        plain: of questions about held-out people as the base is asked in running text.
        new_prompts: of the questions that tuning never uses, by the group of their wordings.
        new_words: of those tokens, what neither the text nor tuning holds.
    """

    replies: Share
    prompts: Share
    plain: Share
    new_prompts: dict[str, Share]
    new_words: dict[str, Share]


def lint(world: World, tokenizer: Tokenizer) -> Lint:
    """Which tokens of questions and replies the text lacks, token by token."""
    held = {token for text in world.biographies() for token in tokenizer.encode(text)}
    said: dict[str, list[int]] = {"reply": [], "prompt": []}
    for conversation in world.conversations():
        for message in conversation:
            who = "reply" if message["role"] == "assistant" else "prompt"
            said[who] += tokenizer.encode(message["content"])
    tuned = held | set(said["prompt"]) | set(said["reply"])
    new: dict[str, list[int]] = {}
    for group, wordings in (("taught", taught), ("untaught", untaught)):
        new[group] = [
            token
            for person in world.by_split["held_out"]
            for attribute in ATTRIBUTES
            for wording in wordings(attribute)
            for token in tokenizer.encode(Turn(person, attribute, wording).question)
        ]
    rng = random.Random(f"lint {world.config.seed}")
    asked = openings(facts_of(world, "held_out"), rng)
    put = contexts_of(world)["plain"]
    read = [token for question in asked for token in put(question.messages, tokenizer)]
    return Lint(
        plain=Share.of(token not in held for token in read),
        replies=Share.of(token not in held for token in said["reply"]),
        prompts=Share.of(token not in held for token in said["prompt"]),
        new_prompts={group: Share.of(t not in held for t in new[group]) for group in new},
        new_words={group: Share.of(t not in tuned for t in new[group]) for group in new},
    )


# ---- both models -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Both:
    """The rows of both models.

    Attributes:
        differences: on the same facts about held-out people, what the name says.
        lint: see Lint.
        examples: those of the "base" after answered questions; empty without --shots.
    """

    base: Knowledge
    instruct: Knowledge
    differences: dict[str, Difference]
    lint: Lint
    examples: dict[str, Knowledge]


def knowledge(pair: Pair, questions: int) -> Both:
    """The rows of base and instruct.

    Raises:
        ValueError: the checkpoints know no world, so that nobody can say what is true.
    """
    if pair.world is None:
        raise ValueError(
            "knowledge can only be measured where the truth is known: on checkpoints that were "
            "trained on a world made by `python -m data.prepare world`, and without --qa"
        )
    base, instruct = (measure(c, pair.world, questions) for c in (pair.base, pair.instruct))
    asked = instruct.answers["held_out"].answered["all"]
    against = {
        "cloze: instruct - base": (instruct.cloze["held_out"], base.cloze["held_out"]),
        "answers - cloze, instruct": (
            instruct.answers["held_out"].answered,
            instruct.cloze["held_out"],
        ),
    }
    others = {
        "in a sentence": instruct.sentence,
        "in unused instructions": instruct.form,
        "in taught phrasings": instruct.rephrased["held_out"],
        "in untaught phrasings": instruct.untaught,
        "uninstructed": instruct.uninstructed,
    }
    against |= {
        f"answers {how} - bare": (found.answered, {"all": asked}) for how, found in others.items()
    }
    differences = {name: difference(a["all"], b["all"]) for name, (a, b) in against.items()}
    shown = {"base": after_shown(pair)} if pair.examples else {}
    examples = {k: measure(c, pair.world, questions, thorough=False) for k, c in shown.items()}
    return Both(base, instruct, differences, lint(pair.world, pair.base.tokenizer), examples)


if __name__ == "__main__":
    run_instrument(__doc__ or "", knowledge, questions=300)
