"""The headline: what each model does with the same facts, in one table and one picture."""

from __future__ import annotations

from typing import Any

from lab.pair import Pair, replayed

Rows = dict[str, str]  # labels by key
# Of each model, about held-out people unless the label says otherwise.
COMPLETES: Rows = {
    "cloze_known": "completes a sentence of the text, known people",
    "cloze_held_out": "the same, held-out people",
    "cloze_unseen": "the same, unseen people",
}
ANSWERS: Rows = {
    "right_known": "answers with the bare value and stops, known people",
    "right_held_out": "the same, held-out people",
    "right_unseen": "the same, unseen people",
    "sentence_held_out": "answers in a sentence, if asked to, and stops",
    "form_held_out": "in the form asked for, in instructions never tuned on",
    "phrasings_taught": "to new phrasings, with a word of the text",
    "phrasings_untaught": "to new phrasings, with a word from nowhere",
}
TURNS: Rows = {
    "follow_up": "follow-up on the same person",
    "other_person": "then a question about another person",
    "return_to_first": "then back to the first one",
}
STOPS: Rows = {"stops": "stops by itself"}
LABELS: Rows = COMPLETES | ANSWERS | TURNS | STOPS
# The base, given every chance: rows of `more`.
GENEROUS: Rows = {
    "exact": "gives the bare value, cut by a forced stop at its first full stop",
    "forced_stop": "names the value in that first sentence",
    "by_chance": "the same of another fact, which nobody asked for",
    "examples": "names the value first, after three examples as running text",
    "begun": "names the value, its reply begun with the person's name",
    "begun_best": "the same, in the phrasing that does best for known people",
}


def headline(report: dict[str, Any], pairs: list[Pair]) -> dict[str, Any]:
    """The headline of a report about a world, each figure with its n and its interval.

    `right_*` and `bare_held_out` are the bare value, in the phrasings and instructions of tuning,
    right and stopped; all about held-out people where the key names no others.
    """
    rows = rows_of(report)
    return rows | {
        "more": {model: generous(report["knowledge"][model]) for model in rows},
        "replayed": replayed_in(pairs),
        "chance": report["chance"],
    }


def rows_of(report: dict[str, Any]) -> dict[str, Any]:
    """The rows of LABELS of each model, from what `knowledge` and `behaviour` found."""
    rows: dict[str, Any] = {}
    for model in ("base", "instruct"):
        known, acts = report["knowledge"][model], report["behaviour"][model]
        splits = known["cloze"]
        rows[model] = {
            **{f"cloze_{split}": known["cloze"][split]["all"] for split in splits},
            **{f"right_{split}": known["answers"][split]["answered"]["all"] for split in splits},
            "bare_held_out": known["answers"]["held_out"]["answered"]["all"],
            "sentence_held_out": known["sentence"]["answered"]["all"],
            "form_held_out": known["form"]["answered"]["all"],
            "phrasings_taught": known["rephrased"]["held_out"]["answered"]["all"],
            "phrasings_untaught": known["untaught"]["answered"]["all"],
            **{kind: acts[kind]["with"] for kind in TURNS},
            "stops": acts["stops"],
        }
    return rows


def replayed_in(pairs: list[Pair]) -> str:
    """What text was replayed in tuning: "none", "known" or "all".

    Raises:
        ValueError: not the same in all pairs.
    """
    chosen = {replayed(pair.instruct.meta) for pair in pairs}
    if len(chosen) > 1:
        raise ValueError(f"the pairs replayed different text ({', '.join(sorted(chosen))})")
    return chosen.pop()


def generous(known: dict[str, Any]) -> dict[str, Any]:
    """Whether a model names the truth first, stop or not."""
    return {
        "exact": known["answers"]["held_out"]["exact"],
        "forced_stop": known["answers"]["held_out"]["right"]["all"],
        "by_chance": known["answers"]["held_out"]["by_chance"],
        "examples": known["examples"]["right"]["all"],
        "begun": known["begun"]["any"]["right"]["all"],
        "begun_best": known["begun"]["best"]["right"]["all"],
    }


def by_kind(report: dict[str, Any]) -> dict[str, Any]:
    """Of the instruct model: new phrasings with a word of the text, by kind of fact."""
    found = report["knowledge"]["instruct"]["rephrased"]["held_out"]["answered"]
    return {kind: share for kind, share in found.items() if kind != "all"}


REPLAYED = {
    "none": "No text was replayed in tuning: nothing of the held-out people was read again.",
    "known": "Biographies of the known people were replayed in tuning, none of the held-out ones.",
    "all": "Text was replayed in tuning that leaves nobody out: where it is the base's own, the "
    "held-out people's facts were read again beside the questions, so what is answered about them "
    "is no transfer from pretraining alone.",
}
