"""The tasks of EleutherAI's lm-evaluation-harness, asked of one checkpoint, or of a pair.

Each text begins a document, as in training; with --chat each question is put in the chat template.
Where a text is longer than the model's context, its newest tokens are seen. Of a pair the base
reads plain text and the instruct model, with --chat, its template; both get the same items, and
once more each item with another one's question: what is still right did not depend on it.

python -m lab.harness out/quickstart/base --tasks lambada_openai,arc_easy --limit 100
python -m lab.harness --base out/quickstart/base --instruct out/quickstart/instruct --tasks arc_easy
"""

from __future__ import annotations

import argparse
import contextlib
import json
import traceback
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from data.chat import ROLES, Message, Prompt, plain_prompt, template_fingerprint
from data.fitting import after_examples
from hf.adapter import chat_prompt, load_checkpoint, load_pair
from lab.likelihood import batches, of_tokens, predictions
from lab.pair import asked_of, origin
from lab.paired import Compared, compared, scores_of
from lab.stats import lines, to_json
from model.check import check_range
from model.generate import Sampling, stream
from runtime.cli import Parser, listed, one_line_errors, say
from runtime.device import environment, has_bf16, set_up
from runtime.files import check_file, write_json, write_text
from training.checkpoint import Checkpoint

try:
    from lm_eval.api.model import LM
except ModuleNotFoundError:  # the rest of the lab works without it; `run` says what is missing
    LM = object

SWAPPED = ", swapped"  # in the name of a column
MAX_NEW = 256  # tokens of a reply for which a task sets no limit: the harness's own default
# Settings of Hugging Face's that some tasks name, at the values that leave things as they are.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0, "temperature": 1.0}
Row = tuple[list[int], list[int]]  # a prompt and its continuation


class HarnessModel(LM):  # type: ignore[misc]
    """A checkpoint as the harness sees it: three kinds of requests, each a batch of texts.

    The harness passes prompts on as strings. In chat those are JSON, in which a message cannot end
    itself or begin another, and which only here becomes the template's tokens.

    Args:
        checkpoint: base or instruct.
        chat: whether prompts are conversations; `simple_evaluate` must be told the same.
        batch_size: rows at once; None for as many as the lab takes.
        swapped: whether each item is asked with the question of the one after it.
        prompt: how a conversation is put.
        until: texts that end every reply.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        chat: bool = False,
        batch_size: int | None = None,
        swapped: bool = False,
        prompt: Prompt = chat_prompt,
        until: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.checkpoint, self.chat, self.batch_size = checkpoint, chat, batch_size
        self.prompt, self.until, self.swapped = prompt, list(until), swapped
        self.tokenizer, self.model = checkpoint.tokenizer, checkpoint.model
        self.block_size = self.model.config.block_size
        self._device = self.model.wte.weight.device

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells prompts in its caches apart by."""
        return f"{self.tokenizer.fingerprint}-{template_fingerprint()}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as JSON; without a generation prompt its last message goes on.

        Raises:
            ValueError: a message of a role that the template lacks.
        """
        for message in chat_history:
            if message["role"] not in ROLES:
                raise ValueError(f"the chat template has no role {message['role']!r}: {ROLES}")
        return json.dumps({"messages": chat_history, "goes_on": not add_generation_prompt})

    def begin(self, context: str) -> tuple[list[int], str]:
        """Ids that begin a prompt, and the plain text after them, which what follows continues.

        Raises:
            ValueError: in chat, a prompt that is no conversation.
        """
        if not self.chat or not context:
            return [self.tokenizer.end_of_text], context
        try:
            prompt = json.loads(context)
            messages = [Message(role=m["role"], content=m["content"]) for m in prompt["messages"]]
            last = messages.pop()["content"] if prompt["goes_on"] else ""
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"a task puts its prompts together by itself and cannot be asked with --chat; "
                f"one begins {context[:40]!r}"
            ) from None
        return self.prompt(messages, self.tokenizer), last

    def swap(self, requests: list[Any]) -> None:
        """If swapped, gives each request the question of the item after its own, the last one that
        of the first; of several questions of one item the one in the same place."""
        items: dict[Any, dict[int, Any]] = {}
        for request in requests if self.swapped else []:  # a repeated one is the same object
            items.setdefault((request.task_name, request.doc_id), {})[id(request)] = request
        own = [[request.args[0] for request in item.values()] for item in items.values()]
        for item, others in zip(items.values(), [*own[1:], *own[:1]], strict=True):
            for i, request in enumerate(item.values()):
                other = others[min(i, len(others) - 1)]
                request.arguments = (other, *request.args[1:])

    def pair(self, context: str, continuation: str) -> Row:
        """Ids of both. Spaces at the end of a context go to the continuation, as in the harness."""
        ids, text = self.begin(context)
        kept = text.rstrip()
        before, whole = self.tokenizer.encode(kept), self.tokenizer.encode(text + continuation)
        if whole[: len(before)] != before:  # the tokenizer would join them: keep them apart
            whole = before + self.tokenizer.encode(text[len(kept) :] + continuation)
        return ids + before, whole[len(before) :]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """The log-likelihood of each continuation, and whether greedy decoding would write it."""
        self.swap(requests)
        pairs = [self.pair(*request.args) for request in requests]
        self.tell(len(c) + len(k) > self.block_size + 1 for c, k in pairs)
        return self.score([self.windows(*pair) for pair in pairs])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """The log-likelihood of each text, however long, every token predicted once."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        scores = self.score([self.windows([self.tokenizer.end_of_text], ids) for ids in texts])
        return [total for total, _ in scores]

    def windows(self, context: list[int], continuation: list[int]) -> list[Row]:
        """Rows that fit and in which each token of the continuation is predicted once.

        It is one row, with as much of the context as there is room for, if the continuation fits.
        """
        if len(continuation) <= self.block_size:
            return [(context[-(self.block_size + 1 - len(continuation)) :], continuation)]
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        rolling = get_rolling_token_windows(continuation, context[-1], self.block_size, 1)
        return [make_disjoint_window(window) for window in rolling]

    def score(self, texts: list[list[Row]]) -> list[tuple[float, bool]]:
        """For each text, given in windows: its log-likelihood, and whether all of it is greedy."""
        rows = [(i, row) for i, windows in enumerate(texts) for row in windows if row[1]]
        totals, greedy = [0.0] * len(texts), [True] * len(texts)
        lengths = [len(prompt) + len(continuation) for _, (prompt, continuation) in rows]
        for chosen in self.progress(batches(self.checkpoint, lengths, self.batch_size)):
            owners = [rows[i][0] for i in chosen]
            prompts, continuations = zip(*(rows[i][1] for i in chosen), strict=True)
            logprobs = predictions(self.checkpoint, prompts, continuations)
            for i, ids, found in zip(owners, continuations, logprobs, strict=True):
                totals[i] += float(of_tokens(found, ids).cpu().double().sum())
                greedy[i] &= found.argmax(dim=1).tolist() == ids
        return list(zip(totals, greedy, strict=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A reply to each prompt, up to the first of the strings that end it."""
        replies = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        asked: dict[str, int] = defaultdict(int)
        self.swap(requests)
        for i, request in enumerate(requests):
            settings = json.dumps(request.args[1], sort_keys=True)
            # Asked again, a question is sampled with another seed.
            asked[request.args[0] + settings] += 1
            groups[f"{asked[request.args[0] + settings]} {settings}"].append(i)
        for group, members in groups.items():
            seed, _, settings = group.partition(" ")
            sampling, until = sampling_of(json.loads(settings), int(seed))
            room = self.block_size - min(sampling.max_new_tokens, self.block_size // 2)
            prompts = []
            for i in members:
                ids, text = self.begin(requests[i].args[0])
                prompts.append(ids + self.tokenizer.encode(text))
            self.tell(len(prompt) > room for prompt in prompts)
            prompts = [prompt[-room:] for prompt in prompts]
            lengths = [len(prompt) for prompt in prompts]
            for chosen in self.progress(batches(self.checkpoint, lengths, self.batch_size)):
                texts = self.write([prompts[j] for j in chosen], sampling, until + self.until)
                for j, text in zip(chosen, texts, strict=True):
                    replies[members[j]] = text
        return replies

    def write(self, prompts: list[list[int]], sampling: Sampling, until: list[str]) -> list[str]:
        """Replies to some prompts, without what ended them."""
        ends = {self.tokenizer.end_of_text, self.tokenizer.end_of_turn}
        tail = max((len(text.encode()) for text in until), default=0)  # a token is a byte or more
        replies: list[list[int]] = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        for step in stream(self.model, prompts, sampling, ends):
            for r in list(unfinished):
                new = step[r]
                if new is None or new in ends:
                    unfinished.discard(r)
                    continue
                replies[r].append(new)
                if any(text in self.tokenizer.decode(replies[r][-tail:]) for text in until):
                    unfinished.discard(r)
            if not unfinished:
                break
        texts = [self.tokenizer.decode(reply) for reply in replies]
        for end in until:
            texts = [text.split(end)[0] for text in texts]
        return texts

    def tell(self, cut: Iterator[bool]) -> None:
        """Says how many of some texts are longer than the model's context."""
        flags = list(cut)
        if any(flags):
            note = f"{sum(flags)} of {len(flags)} texts are too long; the model sees their ends"
            say(f"note: {note}", error=True)

    def progress(self, steps: Collection[list[int]]) -> Iterator[list[int]]:
        """The steps, with a bar on a terminal."""
        console = Console(stderr=True)
        hidden = not console.is_terminal
        yield from track(steps, "batches", console=console, transient=True, disable=hidden)


def sampling_of(settings: dict[str, Any], seed: int) -> tuple[Sampling, list[str]]:
    """How a task wants replies to be drawn, and the strings that end them.

    Raises:
        ValueError: a setting that we do not have, or that is out of range.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    given = {k: v for k, v in settings.items() if v is not None and v != NEUTRAL.get(k)}
    found: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_NEW))
    temperature = found.pop("temperature", 1.0) if found.pop("do_sample") else 0.0
    found.pop("temperature", None)
    sampling = Sampling(
        found.pop("max_gen_toks"),
        float(temperature),
        found.pop("top_k", None) or None,  # 0 turns it off, as in Hugging Face's
        found.pop("top_p", None),
        seed,
    )
    until = [text for text in found.pop("until") if text]
    if found:
        raise ValueError(f"a task asks for {', '.join(found)}, which our sampling does not have")
    return sampling, until


def run(a: argparse.Namespace) -> None:
    """Runs the tasks that a command line names."""
    if LM is object:
        raise ValueError("lm_eval is not installed: pip install -r requirements-eval.txt")
    for name in ("limit", "batch_size", "num_fewshot"):
        value, least = getattr(a, name), int(name != "num_fewshot")
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value}; it must be {least} or more")
    if a.include_path is not None and not a.include_path.is_dir():
        raise ValueError(f"--include-path {a.include_path} is no folder")
    check_file("--out", a.out)
    check_file("--log", a.log)
    check_range("--shots", a.shots, "0 to 1000")
    columns = models_of(a)

    from lm_eval import simple_evaluate, tasks
    from lm_eval.utils import make_table

    include = None if a.include_path is None else str(a.include_path)
    with one_line("--include-path"):
        manager = tasks.TaskManager(include_path=include)
    names = [name.strip() for name in a.tasks.split(",") if name.strip()]
    if unknown := [name for name in names if name not in manager.all_tasks]:
        remedy = f"can its YAML in {include} be read?" if include else "`lm_eval ls tasks`"
        raise ValueError(f"--tasks: the harness has no {', '.join(unknown)}; {remedy}")
    every: dict[str, Any] = {}
    for column, model in columns.items():
        with one_line("--tasks"):
            found = every[column] = simple_evaluate(
                model,
                tasks=names,
                num_fewshot=a.num_fewshot,
                limit=a.limit,
                apply_chat_template=model.chat,
                task_manager=manager,
            )
        if not model.swapped:
            if a.checkpoint is None:
                say(f"{column}:")
            say(make_table(found))
            if found.get("groups"):
                say(make_table(found, "groups"))
    comparison = {}
    if a.checkpoint is None:
        comparison = to_json(compare(every))
        say("\n".join(lines(comparison)))
        for name, of in comparison.items():
            gained, lost = (f"{len(of[k])} ({listed(of[k]) or '-'})" for k in ("gained", "lost"))
            say(f"{name}: items gained {gained}, lost {lost}")
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    results = {c: {key: f[key] for key in kept if key in f} for c, f in every.items()}
    if a.log is not None:
        rows = (json.dumps(row, default=str) + "\n" for row in logged(every))  # a task's own types
        write_text(a.log, "".join(rows))
        say(f"every reply: {a.log}")
    if a.out is not None:
        checkpoints = {m.checkpoint.meta["kind"]: m.checkpoint for m in columns.values()}
        first = next(iter(checkpoints.values()))
        weight = first.model.wte.weight
        settings = {
            **{k: getattr(a, k) for k in ("chat", "shots", "limit", "num_fewshot", "batch_size")},
            "qa": a.qa and str(a.qa),
            "lm_eval": version("lm_eval"),
            "precision": str(weight.dtype).removeprefix("torch."),
            **environment(weight.device),
        }
        of = {kind: origin(checkpoint) for kind, checkpoint in checkpoints.items()}
        whole = {"compared": comparison, "columns": results}
        written = results[""] if a.checkpoint is not None else whole
        write_json(a.out, {"settings": settings, "runs": [of], **written})
        say(f"written: {a.out}")


@contextlib.contextmanager
def one_line(option: str) -> Iterator[None]:
    """Raises ValueError for what a task makes of the harness: tasks are other people's. What our
    own model raises goes on as it is.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if {frame.name for frame in frames if frame.filename == __file__} - {"one_line", "run"}:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ValueError(f"{option}: a task fails with {reason}") from None


def models_of(a: argparse.Namespace) -> dict[str, HarnessModel]:
    """What a command line asks of, by column; one checkpoint alone is in a column without a name.

    Raises:
        ValueError: neither a checkpoint nor a pair, or they cannot be loaded.
    """
    of_pair = (a.base, a.instruct)
    if (a.checkpoint is None) != all(of_pair) or (a.checkpoint and any(of_pair)):
        raise ValueError("name one checkpoint, or --base and --instruct")
    if a.checkpoint is not None and (a.shots or a.qa):
        what = "--shots and --qa are for the base of a pair"
        raise ValueError(f"{what}; of one checkpoint --num-fewshot shows a task's own examples")
    if a.qa and not a.shots:
        raise ValueError("--qa is where the --shots are from; give their number")
    if a.checkpoint is not None:
        kind = "instruct" if a.chat else "base"
        checkpoints = [load_checkpoint(a.checkpoint, set_up(a.device), kind)]
    else:
        checkpoints = list(load_pair(a.base, a.instruct, a.device))
    for checkpoint in checkpoints:
        noted = checkpoint.meta.get("template", template_fingerprint())
        if a.chat and noted != template_fingerprint():
            raise ValueError(f"{checkpoint.path} was trained with another chat template")
        if has_bf16(checkpoint.model.wte.weight.device):
            checkpoint.model.bfloat16()
    if a.checkpoint is not None:
        return {"": HarnessModel(checkpoints[0], a.chat, a.batch_size)}
    base, instruct = checkpoints
    ways: dict[str, Any] = {"base": (base, False), "instruct": (instruct, a.chat)}
    if a.shots:
        examples = asked_of((base, instruct), a.qa, a.shots)[2]
        put = after_examples(plain_prompt, examples)
        ways["base_examples"] = (base, True, put, ["\nQuestion:"])
    return {
        f"{name}{SWAPPED * swapped}": HarnessModel(model, chat, a.batch_size, swapped, *how)
        for name, (model, chat, *how) in ways.items()
        for swapped in (False, True)
    }


def compare(every: dict[str, Any]) -> dict[str, Compared]:
    """By task and metric: all columns. Of metrics that are means over items in each of them."""
    scores = {column: scores_of(found) for column, found in every.items()}
    result = {}
    for name in (n for n in scores["base"] if all(n in found for found in scores.values())):
        asked = {c: found[name] for c, found in scores.items() if not c.endswith(SWAPPED)}
        swapped = {c: scores[c + SWAPPED][name] for c in asked}
        result[name] = compared(asked, swapped)
    return result


def logged(every: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each item of each column: the question, the target, what came of it, the scores."""
    for column, found in every.items():
        for task, rows in found["samples"].items():
            for row in rows:
                yield {
                    **{"column": column, "task": task, "item": row["doc_id"]},
                    **{"filter": row["filter"], "target": row["target"]},
                    "asked": [request[0] for request in row["arguments"]],
                    "replies": row["filtered_resps"],
                    "scores": {metric: row[metric] for metric in row["metrics"]},
                }


def main() -> None:
    """Runs one command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?", help="base or instruct checkpoint, or its run")
    p.add_argument("--base", help="or a pair: base checkpoint, or its run; hf:NAME of transformers")
    p.add_argument("--instruct", help="instruct checkpoint, or its run; hf:NAME of transformers")
    p.add_argument("--tasks", required=True, help="names of the harness, with commas between them")
    p.add_argument("--chat", action="store_true", help="put questions in the chat template")
    p.add_argument(
        "--shots", type=int, default=0, help="also ask the base after so many answered questions"
    )
    p.add_argument("--qa", type=Path, help="take these from this Q&A file or folder")
    p.add_argument("--limit", type=int, help="examples of each task (default: all)")
    p.add_argument("--num-fewshot", type=int, help="examples with answers before each question")
    p.add_argument("--batch-size", type=int, help="rows at once (default: as the rest of the lab)")
    p.add_argument("--include-path", type=Path, help="a folder with tasks of your own, in YAML")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    p.add_argument("--out", type=Path, help="a .json file to write, settings and run included")
    p.add_argument("--log", type=Path, help="a .jsonl file of every item, reply and score")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
