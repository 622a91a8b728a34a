"""The benches of bench/cases.toml: what each starts in fresh processes, and reads from them."""

import datetime
import json
import math
import re
import shlex
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import cases
from bench.cases import BENCHES, PEERS, ROOT, Figures, plain, random_data, sizes
from bench.launch import FIRST_STEP
from bench.rounds import Output, Row, call, interleave, start
from bench.table import table
from data.prepare import prepare_text
from model.check import check_range
from model.gpt import GPT, ModelConfig
from runtime.device import environment, flops_per_token
from runtime.files import write_json
from training.log import read_metrics

LOGGED = 10  # steps between two lines of all logs; no speed counts those before the first line
Curve = list[tuple[float, int, float]]  # seconds since process start, tokens, validation loss


class Bench:
    """A command line with a scratch folder; a method a bench. ValueError: an unusable option."""

    def __init__(self, a: Namespace, folder: Path) -> None:
        of = self.of = BENCHES[a.what]
        check_range("--rounds", a.rounds, "1 or more")
        if not (a.text or a.data or a.quick) and "text" in of:
            raise ValueError(f"--text is missing: {of['text']}")
        if a.text is not None and not a.text.is_file():
            raise ValueError(f"--text {a.text} is no file")
        self.options, self.folder, self.tokens = a, folder, folder / "tokens"
        self.passes, self.text = 1 if a.quick else 2 * a.rounds, (a.text or ROOT / "README.md")
        trees = {name: tree for name in PEERS if (tree := getattr(a, name.lower()))}
        self.peers = {n: cases.copy_tree(n, tree, folder / n) for n, tree in trees.items()}
        self.commits = {n: environment(torch.device("cpu"), t)["commit"] for n, t in trees.items()}
        self.machine = call("bench.workers:machine", device=a.device, quick=a.quick)
        del self.machine["peak_memory"]
        self.device = self.machine["type"] if a.device == "auto" else a.device
        usual = of.get("on_cuda") if self.machine["type"] == "cuda" else None
        self.at = "quick" if a.quick else a.case or usual or next(iter(of["cases"]))
        self.case = of.get("defaults", {}) | of["cases"][self.at]
        given = {k: v for k, v in vars(a).items() if k in self.case and v is not None}
        for name, value in given.items():
            if isinstance(value, int):
                check_range(f"--{name.replace('_', '-')}", value, "1 or more")
        changed = [f"-{k}-{v}" for k, v in given.items() if k != "compile" and v != self.case[k]]
        self.changed = re.sub(r"[^\w.]+", "-", "".join(changed)).rstrip("-")  # in the file's name
        self.case |= given

    def write(self, rows: list[Row], at: str = "", **more: Any) -> dict[str, Any]:
        """Writes the result file, replacing that of the same bench, device and case; returns it."""
        a, at = self.options, at or self.at + "-compiled" * self.case.get("compile", False)
        at += self.changed
        words = ["python", "-m", "bench", *(re.sub(r"[^\s=]*/", "", word) for word in a.argv)]
        result = {"what": a.what, "case": at, "date": datetime.date.today().isoformat()}
        result |= {"command": shlex.join(words), "machine": self.machine, "peers": self.commits}
        a.out.mkdir(parents=True, exist_ok=True)
        path = a.out / f"{a.what}-{self.machine['type']}-{at}.json"
        write_json(path, result := {**result, "settings": self.case | more, "rows": rows})
        print(f"written: {path}")
        return result

    def prepare_tokens(self) -> None:
        """Makes tokens of the text, or random ones, and nanoGPT's data set."""
        data, needs_text = self.options.data, "text" in self.of
        tree = self.peers.get("nanoGPT") if "nanoGPT" in self.case or not needs_text else None
        has_text = not data and (self.options.text or needs_text)
        if data:
            self.tokens = data.absolute()
        elif has_text:
            prepare_text([self.text], self.tokens, self.case["tokenizer"], 0.1, "text", 1)
        else:
            random_data(self.tokens, self.case["vocab_size"], 1_000_000, [2, 2])
        if tree and has_text and self.case["tokenizer"] == "byte":  # its own characters
            plain(self.text, tree / "data/shakespeare_char/input.txt")
            start(["data/shakespeare_char/prepare.py"], {}, tree)
        elif tree:
            cases.nanogpt_data(tree / "data/shakespeare_char", self.tokens)

    def run(self, name: str, command: Sequence[str], **values: Any) -> tuple[Output, list[Any]]:
        """Runs a training command once; returns our metrics too, if it is ours."""
        cache = str(self.folder / name.replace(" ", "-"))  # of compiled code
        cwd = self.peers["nanoGPT"] if name.startswith("nanoGPT") else ROOT
        with tempfile.TemporaryDirectory(dir=self.folder) as run:
            values |= self.case | {"run": run, "tokens": self.tokens, "device": self.device}
            values |= {"case": json.dumps(self.case), "nanochat": self.peers.get("nanochat")}
            output = start(command, values, cwd, TORCHINDUCTOR_CACHE_DIR=cache)
            return output, read_metrics(Path(run) / "metrics.jsonl")

    def train(self) -> None:
        """Training speed."""
        steps, rows, micros = (self.case[k] for k in ("steps", "batch_size", "micro_batch_sizes"))
        if steps % LOGGED or steps <= LOGGED:
            raise ValueError(f"--steps is {steps}; it must be a multiple of 10 above 10")
        if bad := [m for m in micros if m < 1 or rows % m]:
            raise ValueError(f"--micro-batch-sizes: {bad[0]} does not divide {rows} rows")
        self.prepare_tokens()
        shared = self.of["commands"]
        commands = {name: [*shared["ours"], *own] for name, own in self.of["ours"].items()}
        commands |= {name: shared[name] for name in self.peers}
        once = {key: partial(self.train_once, commands, *key) for key in product(commands, micros)}
        named = {f"{name}, micro-batch {m}": run for (name, m), run in once.items()}
        tried: dict[str, dict[int, Figures]] = {name: {} for name in commands}
        search = interleave(named, 1) if len(micros) > 1 else []
        for (name, m), row in zip(once, search, strict=False):
            # One that fails, for lack of memory most likely, is said and left out.
            tried[name][m] = row["runs"][0] or {"tokens_per_second": 0.0, "error": row["error"]}
        best = {}
        for name, found in tried.items():
            best[name] = max(found, key=lambda m: found[m]["tokens_per_second"], default=micros[0])
        results = interleave({name: once[name, m] for name, m in best.items()}, self.passes)
        results = [{**row, "micro_batch_size": best[row["name"]]} for row in results]
        what = self.options.text.name if self.options.text else "random ids"
        self.write(results, text=what, micro_batch_search=tried)

    def train_once(self, commands: Mapping[str, Sequence[str]], name: str, micro: int) -> Figures:
        """Figures of one run, MFU by one formula for all where the device's peak is known."""
        case, peak, run = self.case, self.machine["peak_flops"], f"{name}-{micro}"
        # The first compiled run of a micro-batch size is slow to start: a figure of its own.
        is_cold = case["compile"] and not (self.folder / run.replace(" ", "-")).exists()
        parts, mode = case["batch_size"] // micro, "on" if case["compile"] else "off"
        output, rows = self.run(run, commands[name], micro=micro, parts=parts, mode=mode)
        times = {row["step"]: row["seconds"] for row in rows}  # ours says the last after evaluating
        times = times or output.steps(r"(?:iter|step) (\d+)")
        tokens = (max(times) - LOGGED) * case["batch_size"] * case["block_size"]
        figures = {"tokens_per_second": tokens / (times[max(times)] - times[LOGGED])}
        figures["cold_start_seconds" if is_cold else "start_seconds"] = output.first(FIRST_STEP)[0]
        if peak:
            with torch.device("meta"):  # the recipes multiply alike, and nanochat's nearly so
                flops = flops_per_token(GPT(ModelConfig(**sizes(case)), case["vocab_size"]))
            figures["mfu"] = figures["tokens_per_second"] * flops / peak
        return figures | output.figures()

    def loss(self) -> None:
        """Time to a fixed validation loss."""
        self.prepare_tokens()
        case, target = self.case, self.case["target"]
        curves: dict[str, list[Curve]] = {name: [] for name in case["ours"]}
        calls: Any = {name: partial(self.loss_of_ours, name, curves[name]) for name in curves}
        calls |= {name: self.loss_of_nanogpt for name in self.peers if name in case}
        rows = interleave(calls, len(case["seeds"]))
        if math.isnan(target):
            theirs = [run for row in rows[len(curves) :] for run in row["runs"] if run]
            target = theirs[0]["val_loss"] if theirs else None
        if target is not None:
            settle(rows, curves, target)
        named = {f"{name}, pass {i}": c for name in curves for i, c in enumerate(curves[name], 1)}
        self.write(rows, text=(self.options.data or self.text).name, target=target, curves=named)

    def loss_of_ours(self, name: str, curves: list[Curve]) -> Figures:
        """Runs train_pretrain.py once, with the next seed, and adds its curve."""
        case, command = self.case, [*self.case["ours"][name], *self.of["commands"]["ours"]]
        command += [f"--{override}" for override in case["override"]]
        seed, every = case["seeds"][len(curves)], max(1, case["steps"] // 20)
        output, rows = self.run(name, command, seed=seed, every=every)
        rows, said = [row for row in rows if "val_loss" in row], output.steps(r"step (\d+)/")
        curves.append([(said[row["step"]], row["tokens"], row["val_loss"]) for row in rows])
        return {"total_seconds": output.seconds, "val_loss": rows[-1]["val_loss"]}

    def loss_of_nanogpt(self) -> Figures:
        """Runs nanoGPT's recipe once. Its seed is fixed."""
        own, on_cuda = self.case["nanoGPT"], self.machine["type"] == "cuda"
        command = [*self.of["commands"]["nanoGPT"], *(f"--{k}={v}" for k, v in own.items())]
        output, _ = self.run("nanoGPT", command, compile=on_cuda)
        times, last = output.steps(r"iter (\d+): loss"), own["max_iters"]
        seconds = {i: times[i] - times[before] for before, i in pairwise(times)}
        # Steps between two lines of the log that evaluate too are taken to train like the others.
        usual = [s for i, s in seconds.items() if i % own.get("eval_interval", 250)]
        rows = own["batch_size"] * own.get("gradient_accumulation_steps", 1)
        reached, line = output.first(f"step {last}:")
        return {
            "seconds_to_loss": reached,
            "tokens_to_loss": last * rows * own["block_size"],
            "training_seconds": sum(usual) + statistics.median(usual) * (len(seconds) - len(usual)),
            "total_seconds": output.seconds,
            "val_loss": float(line.split()[-1]),
        }

    def sft(self) -> None:
        """Instruction-tuning speed."""
        case, rng = self.case, np.random.default_rng(1)
        lengths = rng.lognormal(np.log(120), 0.7, case["steps"] * case["batch_size"])
        lengths = lengths.clip(8, case["block_size"]).astype(int)
        random_data(self.tokens, case["vocab_size"], 100, lengths.tolist())
        packs = self.machine["bf16"] and ModelConfig(**sizes(case)).has_varlen  # as train_sft.py
        names = ["ours, packed" if packs else "ours, bucketed", *self.of["others"]]
        tune = partial(call, "bench.workers:tune", folder=str(self.tokens), case=case)
        calls = {name: partial(tune, name=name, device=self.device) for name in names}
        self.write(interleave(calls, self.passes), **self.of["facts"])

    def sample(self) -> None:
        """Sampling speed."""
        trees = dict.fromkeys(self.of["ours"], Path()) | self.peers
        work = partial(call, "bench.workers:sample", case=self.case, device=self.device)
        calls = {name: partial(work, name=name, tree=str(tree)) for name, tree in trees.items()}
        self.write(interleave(calls, self.passes), **self.of["facts"])

    def prepare(self) -> None:
        """Preparation speed, a result file for each kind of tokens."""
        text, tree = self.text.resolve(), self.peers.get("nanoGPT")
        megabytes = plain(text, self.folder / "plain.txt").stat().st_size / 1e6
        at = "quick" if self.options.quick else text.name.partition(".")[0]
        for kind in self.case["tokenizer"]:
            commands = {f"ours, {kind}": self.of["commands"]["ours"]}
            mapped = kind == "gpt2" and ".jsonl" in text.name and find_spec("datasets")
            if tree and kind in self.of["folders"]:
                folder = tree / "data" / ("openwebtext" if mapped else self.of["folders"][kind])
                code = (script := folder / "prepare.py").read_text()
                for old, new in self.of["changes"].items():
                    code = code.replace(old, new.replace("$text", str(text)))
                script.write_text(code)
                plain(text, folder / "input.txt")
                commands["nanoGPT, datasets.map" if mapped else "nanoGPT, whole text"] = [script]
            both = partial(self.both_ways, megabytes, {"text": text, "tokenizer": kind})
            rows = interleave({n: partial(both, c) for n, c in commands.items()}, self.passes)
            self.write(rows, f"{at}-{kind}", text=text.name, megabytes=megabytes, tokenizer=kind)

    def both_ways(self, megabytes: float, values: Any, command: Sequence[str]) -> Figures:
        """MB/s of a command on one core and on all, each time with a fresh folder to write to."""
        figures = Figures()
        for name, flags in (("machine", ()), ("core", ("--pin",))):
            with tempfile.TemporaryDirectory(dir=self.folder) as out:
                env = self.of["environment"] | {"HF_HOME": out}
                output = start([*flags, *command], values | {"out": out}, **env)
            figures[f"megabytes_per_second_{name}"] = megabytes / output.seconds
        return figures | output.figures()

    def profile(self) -> None:
        """What one step spends its time on."""
        found = call("bench.workers:profile", case=self.case, device=self.device)
        rows = [{"name": f"`{key}`", "runs": [run]} for key, run in found.pop("operators")]
        print("\n".join(table(self.write(rows, **found))))

    def gpu(self) -> None:
        """All that is to be shown on a GPU, one command after another."""
        random_data(self.tokens, self.case["vocab_size"], 1_000_000, [60] * 200)
        values = vars(self.options) | self.case | {"device": self.device}
        values |= {"run": self.folder / "run", "tokens": self.tokens}
        peers = [word for n in self.peers for word in (f"--{n.lower()}", f"${n.lower()}")]
        several = {"$peers": peers, "$quick": ["--quick"] * self.options.quick, **self.case}

        def run(words: Sequence[str]) -> Figures:
            command = [w for word in words for w in several.get(word, [word])]
            return {"seconds": start(command, values).seconds}

        rows = interleave({n: partial(run, words) for n, words in self.of["commands"].items()}, 1)
        self.write(rows)
        if failed := [row["name"] for row in rows if "error" in row]:
            raise ValueError(f"failed: {', '.join(failed)}")


def settle(rows: list[Row], curves: Mapping[str, list[Curve]], target: float) -> None:
    """Adds to each run of ours when it was first at the target, None where it never was."""
    for row in rows:
        for figures, curve in zip(row["runs"], curves.get(row["name"], ()), strict=False):
            reached = next((point for point in curve if point[2] <= target), (None, None))
            figures["seconds_to_loss"], figures["tokens_to_loss"] = reached[:2]
        times = [figures["seconds_to_loss"] for figures in row["runs"] if figures]
        if late := times.count(None):
            row["note"] = f"{len(times) - late} of {len(times)} runs reached the loss"
