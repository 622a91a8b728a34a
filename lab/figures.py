"""The pictures of the lab, each an SVG text drawn from JSON-ready results, and its pages."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.world import ATTRIBUTES
from lab.headline import rows_of
from lab.stats import kind_of

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "diptych",  # the same figures make the same bytes
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
# Okabe & Ito's colours, which people with any colour vision can tell apart.
BASE, INSTRUCT, GREEN, PURPLE, SKY = "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9"
GREY = "#777777"
# On the report's page a colour means one thing: these two the models, those below what is measured.
CLASS_COLORS = {"unshifted": "#F1EEF8", "marginal": "#CFC4E6", "shifted": "#A592D3"}
POINT_COLORS = {"stops": GREY, "right": PURPLE, "answers": GREEN, "cloze": "#000000"}
LOSS, VIOLET = "#D55E00", "#6A4FB0"
CURVE_COLORS = (BASE, INSTRUCT, GREEN, PURPLE, SKY, LOSS, VIOLET, GREY)
SWEEP_LINES = {
    "answers_known": ("answers, known people", GREEN),
    "answers_held_out": ("answers, held-out people", INSTRUCT),
    "rephrased_held_out": ("the same, new phrasings", SKY),
    "cloze_held_out": ("cloze after SFT, held-out", BASE),
    "stops_held_out": ("stops by itself", GREY),
    "abstains_unseen": ("says “I do not know”, unseen", PURPLE),
    "abstains_held_out": ("the same, held-out", "#D55E00"),
}


def templates() -> jinja2.Environment:
    """The lab's pages, in which all text is escaped and nothing may be missing."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def draw(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, in inches, with axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def stack(width: float, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """An empty figure, in inches, with axes of one x axis above each other."""
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    return figure, list(axes[:, 0])


def svg(figure: Figure) -> str:
    """A figure as SVG text."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def line(
    axes: Axes,
    xs: Sequence[float],
    cells: list[dict[str, Any]],
    name: str,
    color: str,
    style: str = "-",
) -> None:
    """Figures over xs with their 95 % intervals, and a dot for each pooled run."""
    kind = kind_of(cells[0])
    axes.plot(xs, [c[kind] for c in cells], f"o{style}", color=color, label=name)
    # Of a single number there is no interval.
    low, high = ([float("nan") if c[k] is None else c[k] for c in cells] for k in ("low", "high"))
    axes.fill_between(xs, low, high, color=color, alpha=0.15, lw=0)
    for x, c in zip(xs, cells, strict=True):
        axes.plot([x] * len(c.get("runs", [])), c.get("runs", []), ".", color=color, ms=2.5)


def as_share(axes: Axes) -> None:
    """The vertical axis of a proportion."""
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y", color="#dddddd", lw=0.6)


def report_plots(report: dict[str, Any]) -> dict[str, str]:
    """The pictures of a report, by name."""
    with mpl.rc_context(STYLE):
        figures = {
            **(
                {"headline": headline_plot(report["headline"])}
                if report["headline"]
                else {"curves": curves_plot(report["curves"])}
            ),
            "roles": roles_plot(report["shift"]["chat"]["roles"]),
            "positions": positions_plot(report["shift"]),
            "matrices": matrices_plot(report["weights"]["matrices"]),
            "interpolation": interpolation_plot(report["weights"]),
            "grafts": grafts_plot(report["weights"]["grafts"]),
            **(
                {"forgetting": forgetting_plot(report["forgetting"])}
                if report["forgetting"]
                else {}
            ),
            "bits": bits_plot({"": report["bits"]}),
            **({"places": places_plot(report["positions"])} if report["positions"] else {}),
            **({"probes": probes_plot({"": report["probes"]})} if report["probes"] else {}),
        }
        return {name: svg(figure) for name, figure in figures.items()}


def headline_plot(headline: dict[str, Any]) -> Figure:
    """What each model does with the facts about held-out people."""
    keys = [
        *("cloze_held_out", "bare_held_out", "sentence_held_out", "form_held_out"),
        *("phrasings_taught", "follow_up", "other_person", "return_to_first", "stops"),
    ]
    names = [
        *("completes the sentence", "answers with the value", "answers in a sentence"),
        *("obeys the form asked for", "in new phrasings", "keeps the person"),
        *("changes the person", "returns to the first", "stops"),
    ]
    figure, (axes,) = draw(4.6, 4.4)
    for model, color, shift in (("base", BASE, -0.18), ("instruct", INSTRUCT, 0.18)):
        cells = [headline[model][key] for key in keys]
        shares = [c["share"] for c in cells]
        rows = [row + shift for row in range(len(keys))]
        axes.barh(rows, shares, height=0.34, color=color, label=model)
        low = [max(0.0, s - c["low"]) for s, c in zip(shares, cells, strict=True)]
        high = [max(0.0, c["high"] - s) for s, c in zip(shares, cells, strict=True)]
        axes.errorbar(shares, rows, xerr=[low, high], fmt="none", ecolor="black", lw=0.8)
    axes.axvline(headline["chance"], color=GREY, lw=0.8, ls=":")
    axes.set_yticks(range(len(keys)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def curves_plot(curves: dict[str, Any]) -> Figure:
    """Training and validation loss of both runs, beside each other."""
    figure, panels = draw(7.2, 2.6, columns=2)
    for axes, (model, color) in zip(panels, (("base", BASE), ("instruct", INSTRUCT)), strict=True):
        rows = curves[model]
        evaluated = [row for row in rows if "val_loss" in row]
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=color)
        axes.plot(
            [r["step"] for r in evaluated], [r["val_loss"] for r in evaluated], "o", color=color
        )
        axes.set_title(model if rows else f"{model}: no metrics")
        axes.set_xlabel("step")
        axes.grid(axis="y", color="#dddddd", lw=0.6)
    panels[0].set_ylabel("loss, nats per token")
    return figure


def roles_plot(roles: dict[str, Any]) -> Figure:
    """How many tokens of each role the base would have written too."""
    figure, (axes,) = draw(4.6, 0.9 + 0.4 * len(roles))
    left = [0.0] * len(roles)
    for name, color in CLASS_COLORS.items():
        shares = [role["classes"][name]["share"] for role in roles.values()]
        axes.barh(list(roles), shares, left=left, color=color, label=name, height=0.7)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_xlabel("share of tokens, base in the chat template")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def positions_plot(shift: dict[str, Any]) -> Figure:
    """KL by place in the reply, for each context of the base."""
    figure, (axes,) = draw(4.6, 3.0)
    for (context, found), style in zip(shift.items(), ("-", "--", ":", "-."), strict=False):
        places = [int(p) for p in found["positions"]]
        cells = [p["kl"] for p in found["positions"].values()]
        line(axes, places, cells, context, VIOLET, style)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("token of the reply")
    axes.set_ylabel("KL(instruct || base), nats")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def matrices_plot(matrices: dict[str, Any]) -> Figure:
    """The relative change of every matrix of the blocks, layer by layer."""
    blocks = [name.split(".", 2) for name in matrices if name.startswith("blocks.")]
    layers = list(dict.fromkeys(int(layer) for _, layer, _ in blocks))
    kinds = list(dict.fromkeys(kind for _, _, kind in blocks))
    table = [[matrices[f"blocks.{i}.{kind}"]["relative"] for i in layers] for kind in kinds]
    figure, (axes,) = draw(4.6, 0.9 + 0.3 * len(kinds))
    top = max(map(max, table)) or 1.0
    axes.imshow(table, cmap="Greys", vmin=0, vmax=top, aspect="auto")
    if len(layers) <= 12:
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                color = "white" if value > 0.6 * top else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(layers)), [str(i) for i in layers])
    axes.set_yticks(range(len(kinds)), [kind.removesuffix(".weight") for kind in kinds])
    axes.set_xlabel("layer;   each number is ‖change‖ / ‖base‖")
    return figure


def interpolation_plot(weights: dict[str, Any]) -> Figure:
    """What a model between base and instruct does, and beyond."""
    figure, (axes,) = draw(4.6, 3.0)
    points = weights["interpolation"]
    point_lines(axes, [float(x) for x in points], list(points.values()))
    axes.set_xlabel("a, in base + a * change")
    as_share(axes)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def point_lines(axes: Axes, xs: Sequence[float], points: list[Any], style: str = "-") -> None:
    """What of stops, answers and cloze was measured, over xs; in the legend once."""
    named = {text.get_label() for text in axes.get_lines()}
    for key, color in POINT_COLORS.items():
        if points and points[0][key]["n"]:
            name = f"_{key}" if key in named else key
            line(axes, xs, [p[key] for p in points], name, color, style)


def places_plot(positions: dict[str, Any]) -> Figure:
    """For each group of tokens: tuned weights there alone, and everywhere but there."""
    return grafts_plot(positions, "tuned there alone", "tuned everywhere but there")


def grafts_plot(
    grafts: dict[str, Any], only: str = "this change alone", without: str = "all but this"
) -> Figure:
    """For each group of parameters: its change alone, and all changes but its own."""
    figure, (axes,) = draw(4.6, 1.0 + 0.32 * len(grafts))
    rows = range(len(grafts))
    for key, color in POINT_COLORS.items():
        if not next(iter(grafts.values()))["only"].get(key, {}).get("n"):
            continue
        shift = {"stops": -0.3, "right": -0.1, "answers": 0.1, "cloze": 0.3}[key]
        for how, marker in (("only", "o"), ("without", "x")):
            shares = [graft[how][key]["share"] for graft in grafts.values()]
            axes.plot(shares, [row + shift for row in rows], marker, color=color, ls="")
        axes.plot([], [], "-", color=color, label=key)
    axes.plot([], [], "o", color="#BBBBBB", ls="", label=only)
    axes.plot([], [], "x", color="#BBBBBB", ls="", label=without)
    axes.set_yticks(rows, list(grafts))
    axes.invert_yaxis()
    axes.set_xlim(-0.04, 1.04)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def panels(width: float, height: float, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """An empty figure with axes side by side, a name above each if there are several."""
    figure, axes = draw(max(4.6, width * len(names)), height, len(names))
    if len(names) > 1:
        for each, name in zip(axes, names, strict=True):
            each.set_title(name)
    return figure, axes


Cells = dict[str, dict[str, Any]]  # results of one instrument, by the name of their cell
Curves = dict[str, dict[int, dict[str, Any]]]  # figures by name and step


def probes_plot(cells: Cells) -> Figure:
    """Where the truth ranks in what a classifier reads, layer by layer."""
    figure, axes = panels(2.9, 3.2, list(cells))
    for each, found in zip(axes, cells.values(), strict=True):
        for place, style in (("name", ":"), ("cloze", "--"), ("reply", "-")):
            for model, color in (("base", BASE), ("instruct", INSTRUCT)):
                layers = found[model]["places"][place]
                ranks = [layer["rank"] for layer in layers.values()]
                name = f"{model}, {place}" if each is axes[0] else "_"
                line(each, [int(i) for i in layers], ranks, name, color, style)
        each.set_ylim(0.4, 1.02)
        each.axhline(0.5, color=GREY, lw=0.8, ls=":")
        each.set_xlabel("after layer")
    axes[0].set_ylabel("other values ranked lower")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def bits_plot(cells: Cells) -> Figure:
    """Answers over the size of what is kept of a change, for each way of cutting it down."""
    figure, axes = panels(3.4, 3.2, list(cells))
    for each, found in zip(axes, cells.values(), strict=True):
        key = "answers" if found["whole"]["point"]["answers"]["n"] else "stops"
        ways = (("rank", LOSS), ("magnitude", VIOLET), ("quantised", GREY))
        for way, color in ways:
            cuts = sorted(found[way].values(), key=lambda cut: float(cut["kilobytes"]))
            sizes = [cut["kilobytes"] for cut in cuts]
            points = [cut["point"][key] for cut in cuts]
            line(each, sizes, points, way if each is axes[0] else "_", color)
        each.axvline(found["whole"]["kilobytes"], color="black", lw=0.8, ls=":")
        each.set_xscale("log")
        each.set_xlabel("kilobytes of the change; dotted: all of it")
        as_share(each)
    axes[0].set_ylabel("right and stopped" if key == "answers" else "stops")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def phrasings_plot(cells: Cells) -> Figure:
    """How many questions of each group are answered rightly, stop or not."""
    figure, axes = panels(3.6, 3.0, list(cells))
    for each, found in zip(axes, cells.values(), strict=True):
        groups = found["instruct"]["groups"]
        for model, color, shift in (("base", BASE, -0.15), ("instruct", INSTRUCT, 0.15)):
            shares = [group["right"]["all"] for group in found[model]["groups"].values()]
            rows = [row + shift for row in range(len(groups))]
            dots(each, rows, shares, model if each is axes[0] else "_", color)
        each.set_yticks(range(len(groups)), list(groups))
        each.invert_yaxis()
        each.set_xlim(-0.03, 1.03)
        each.grid(axis="x", color="#dddddd", lw=0.6)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def forms_plot(cells: Cells) -> Figure:
    """The instruct model, each kind of fact in each form: right, in form, and both with a stop."""
    figure, axes = panels(3.4, 3.0, list(cells))
    for each, found in zip(axes, cells.values(), strict=True):
        kinds = found["instruct"]["sentence"]
        for grade, color, shift in (
            ("right", PURPLE, -0.2),
            ("in_form", GREY, 0),
            ("answers", GREEN, 0.2),
        ):
            rows = [row + shift for row in range(len(kinds))]
            shares = [kind[grade] for kind in kinds.values()]
            dots(each, rows, shares, grade.replace("_", " ") if each is axes[0] else "_", color)
        each.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
        each.invert_yaxis()
        each.set_xlim(-0.03, 1.03)
        each.set_xlabel("asked for a sentence")
        each.grid(axis="x", color="#dddddd", lw=0.6)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def rows_plot(cells: Cells) -> Figure:
    """Sentences about people whose names need an unsaid token: as tuned, with rows given back."""
    figure, (axes,) = panels(6.4, 0.45 * len(cells) + 1.2, ["sentences"])
    for rows, group, name, color, shift in (
        ("none", "said", "all other names", GREY, -0.2),
        ("none", "unsaid", "names with an unsaid token", INSTRUCT, 0),
        ("unsaid", "unsaid", "the same, the head's rows given back", GREEN, 0.2),
    ):
        shares = [found[rows][group]["answers"] for found in cells.values()]
        dots(axes, [row + shift for row in range(len(cells))], shares, name, color)
    axes.set_yticks(range(len(cells)), list(cells))
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_xlabel("sentences about held-out people, right and stopped")
    figure.legend(loc="outside upper left")
    return figure


def exposures_plot(cells: Cells) -> Figure:
    """What is completed and answered of held-out people, by how often they were read about."""
    figure, axes = panels(3.0, 3.2, list(cells))
    for each, found in zip(axes, cells.values(), strict=True):
        groups = found["instruct"]
        xs = range(len(groups))
        drawn = (
            ("base", "cloze", "base: cloze", BASE),
            ("instruct", "cloze", "instruct: cloze", SKY),
            ("instruct", "answers", "instruct: right and stopped", INSTRUCT),
        )
        for model, key, name, color in drawn:
            shares = [group[key] for group in found[model].values()]
            line(each, xs, shares, name if each is axes[0] else "_", color)
        each.set_xticks(xs, list(groups), rotation=30)
        each.set_xlabel("biographies read")
        as_share(each)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def trace_plot(cells: Cells) -> Figure:
    """How much of what the difference is read as are words of tuning, layer by layer."""
    figure, axes = panels(2.6, 2.8, list(cells))
    for each, found in zip(axes, cells.values(), strict=True):
        layers = [int(i) for i in found["layers"]]
        for key, name, color in (
            ("words", "the difference", VIOLET),
            ("text", "the text's own mean", BASE),
            ("chance", "random directions", GREY),
        ):
            shares = [layer[key] for layer in found["layers"].values()]
            line(each, layers, shares, name if each is axes[0] else "_", color)
        each.set_ylim(-0.03, 0.6)
        each.set_xticks(layers)
        each.set_xlabel("after layer")
    axes[0].set_ylabel("words of tuning, of 20")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


PLOTS: dict[str, Any] = {
    "probes": probes_plot,
    "bits": bits_plot,
    "phrasings": phrasings_plot,
    "forms": forms_plot,
    "rows": rows_plot,
    "exposures": exposures_plot,
    "trace": trace_plot,
}


def instrument_plots(cells: Cells) -> dict[str, str]:
    """The pictures of the instruments that a sweep ran, by name."""
    with mpl.rc_context(STYLE):
        made = {
            name: plot({label: cell[name] for label, cell in cells.items()})
            for name, plot in PLOTS.items()
            if all(name in cell for cell in cells.values())
        }
        for name, key, plot in (
            ("grafts", "weights", lambda found: grafts_plot(found["grafts"])),
            ("interpolation", "weights", interpolation_plot),
            ("roles", "shift", lambda found: roles_plot(found["chat"]["roles"])),
            ("positions", "positions", places_plot),
            ("forgetting", "forgetting", forgetting_plot),
        ):
            for i, cell in enumerate(cells.values(), 1):
                if key in cell:
                    made[name if len(cells) == 1 else f"{name}_{i}"] = plot(cell[key])
        whole = [cell for cell in cells.values() if {"knowledge", "behaviour"} <= set(cell)]
        if len(whole) == 1:
            chance = sum(1 / len(a.values) for a in ATTRIBUTES) / len(ATTRIBUTES)
            made["headline"] = headline_plot(rows_of(whole[0]) | {"chance": chance})
        return {name: svg(figure) for name, figure in made.items()}


def timelines(curves: dict[str, dict[str, Any]], end: int) -> list[tuple[list[int], list[Any]]]:
    """Steps and values of "tuning", then of each return to text, which begins where tuning ends."""
    found = []
    for name, curve in curves.items():
        begin = 0 if name == "tuning" else end
        found.append(([begin + int(step) for step in curve], list(curve.values())))
        if begin:
            found[-1] = ([end, *found[-1][0]], [curves["tuning"][str(end)], *found[-1][1]])
    return found


def forgetting_plot(forgetting: dict[str, Any]) -> Figure:
    """What the model does, and its loss on text, during tuning and the return to text."""
    with_loss = bool(forgetting["text_loss"])
    figure, panels = stack(4.6, [2.3, 2.3] if with_loss else [3.0])
    end = max(map(int, forgetting["tuning"]))
    curves = {"tuning": forgetting["tuning"], **forgetting["recovery"]}
    for (steps, points), style in zip(timelines(curves, end), ("-", "-", "--"), strict=False):
        point_lines(panels[0], steps, points, style)
    as_share(panels[0])
    if with_loss:
        losses = timelines(forgetting["text_loss"], end)
        for (steps, values), style in zip(losses, ("-", "-", "--"), strict=False):
            panels[1].plot(steps, values, f"o{style}", color=LOSS)
        panels[1].set_ylabel("loss on text, nats")
        panels[1].grid(axis="y", color="#dddddd", lw=0.6)
    panels[-1].set_xlabel("step of instruction tuning")
    if returns := [int(step) for curve in forgetting["recovery"].values() for step in curve]:
        for axes in panels:
            axes.axvspan(end, end + max(returns), color="#eeeeee", lw=0)
        panels[-1].set_xlabel("step of instruction tuning;   shaded: back on pretraining text")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def curve_plot(stages: dict[str, Curves], logarithmic: Collection[str]) -> str:
    """Figures over the steps of a stage or two, which stand side by side; what is not between 0 and
    1 throughout has an axis of its own below. Of `logarithmic` stages the steps are on a log axis.
    """
    names = list(next(iter(stages.values())))
    cells = {n: [c for curves in stages.values() for c in curves[n].values()] for n in names}
    is_share = {n: all(0 <= cell[kind_of(cell)] <= 1 for cell in cells[n]) for n in names}
    rows = sorted(set(is_share.values()), reverse=True)
    size = max(5.6, 3.6 * len(stages)), 2.8 * len(rows) + 0.2 * len(names)
    with mpl.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        panels = figure.subplots(len(rows), len(stages), sharex="col", sharey="row", squeeze=False)
        for column, (stage, curves) in zip(panels.T, stages.items(), strict=True):
            for i, name in enumerate(names):
                axes, color = column[rows.index(is_share[name])], CURVE_COLORS[i % 8]
                if curves[name]:
                    line(axes, list(curves[name]), list(curves[name].values()), name, color)
            steps = sorted({step for curve in curves.values() for step in curve})
            if stage in logarithmic:
                column[-1].set_xscale("log")
                column[-1].set_xticks(steps, [str(step) for step in steps], rotation=45)
                column[-1].minorticks_off()
            column[-1].set_xlabel(f"step of {stage}")
        for share, row in zip(rows, panels, strict=True):
            for axes in row:
                as_share(axes) if share else axes.grid(axis="y", color="#dddddd", lw=0.6)
        drawn = [axes.get_legend_handles_labels() for axes in panels.flat]
        legend = {name: handle for pair in drawn for handle, name in zip(*pair, strict=True)}
        found = [name for name in names if name in legend]
        figure.legend([legend[n] for n in found], found, loc="outside upper left")
        return svg(figure)


def sweep_plot(table: dict[str, Any]) -> str:
    """The pooled cells of a sweep: curves over one numeric key, else a row of dots each; of a sweep
    on no world losses, and beside them shares."""
    cells = table["cells"]
    values = [list(c["cell"].values()) for c in cells]
    one_key = len({tuple(c["cell"]) for c in cells}) == 1
    one_number = one_key and all(len(v) == 1 and type(v[0]) in (int, float) for v in values)
    panels = panels_of(cells)
    with mpl.rc_context(STYLE):
        if one_number:
            figure, all_axes = draw(2.4 + 3.6 * len(panels), 3.6, len(panels))
        else:
            figure, all_axes = draw(3.6 + 4.0 * len(panels), 1.0 + 0.55 * len(cells), len(panels))
        for axes, lines in zip(all_axes, panels, strict=True):
            is_share = all(kind_of(cells[0][key]) == "share" for key in lines)
            for i, (key, (name, color)) in enumerate(lines.items()):
                found = [c[key] for c in cells]
                if one_number:
                    line(axes, range(len(cells)), found, name, color)
                else:
                    rows = [row + 0.12 * (i - (len(lines) - 1) / 2) for row in range(len(cells))]
                    dots(axes, rows, found, name, color)
            if one_number:
                axes.set_xticks(range(len(cells)), [f"{v[0]:g}" for v in values])
                axes.set_xlabel(next(iter(cells[0]["cell"])))
                as_share(axes) if is_share else axes.grid(axis="y", color="#dddddd", lw=0.6)
            else:
                keys = ["\n".join(f"{k} = {v}" for k, v in c["cell"].items()) for c in cells]
                names = table.get("spec", {}).get("labels", keys)
                axes.set_yticks(
                    range(len(cells)), names if axes is all_axes[0] else [""] * len(cells)
                )
                axes.invert_yaxis()
                if is_share:
                    axes.set_xlim(-0.03, 1.03)
                axes.grid(axis="x", color="#dddddd", lw=0.6)
        figure.legend(loc="outside right center")
        return svg(figure)


def panels_of(cells: list[dict[str, Any]]) -> list[dict[str, tuple[str, str]]]:
    """What is drawn of a sweep, a panel each: keys of its rows, with a name and a colour."""
    if "answers_known" in cells[0]:
        lines = SWEEP_LINES.items()
        return [{k: v for k, v in lines if "abstains" not in k or abstains(cells)}]
    losses = [key for key in cells[0] if key.endswith(("val_loss", "val_bpb"))]
    shares = [key for key in cells[0] if key in ("stops",)]
    colors = iter(CURVE_COLORS)
    panels = [{k: (k.replace("_", " "), next(colors)) for k in keys} for keys in (losses, shares)]
    return [panel for panel in panels if panel]


def dots(axes: Axes, rows: Sequence[float], cells: list[Any], name: str, color: str) -> None:
    """Figures with their 95 % intervals, a row each; none of nothing."""
    both = [(row, cell) for row, cell in zip(rows, cells, strict=True) if cell["n"]]
    rows, cells = [row for row, _ in both], [cell for _, cell in both]
    values = [c[kind_of(c)] for c in cells]
    # Of a single number there is no interval.
    low = [0.0 if c["low"] is None else max(0.0, c[kind_of(c)] - c["low"]) for c in cells]
    high = [0.0 if c["high"] is None else max(0.0, c["high"] - c[kind_of(c)]) for c in cells]
    axes.errorbar(values, rows, xerr=[low, high], fmt="o", color=color, label=name, ms=4, lw=1)


def abstains(cells: list[dict[str, Any]]) -> bool:
    """Whether any run of a sweep ever says that it does not know."""
    return any(c["abstains_unseen"]["share"] for c in cells)
