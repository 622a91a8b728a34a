"""A base and an instruct checkpoint side by side, same prompt, same seed; or one of them alone.

python sample.py --base out/quickstart/base --instruct out/quickstart/instruct --chat
"""

import contextlib
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.chat import Message, Prompt, plain_prompt, raw_prompt
from data.fitting import after_examples, recent_turns, rows_at_once
from data.sources.read import read_conversations
from hf.adapter import chat_prompt, load_models
from model.check import check_range
from model.generate import Sampling, generate
from runtime.cli import Parser, one_line_errors, read_text, say, shortened, visible
from runtime.files import check_file, write_json
from training.checkpoint import Checkpoint

# What is shown of each prompt: the column's title by its name in the JSON.
COLUMNS = {
    "base_raw": "base, continuing the text",
    "base_chat": "base, given the chat template",
    "base_examples": "base, after examples",
    "instruct": "instruct",
}
Columns = dict[str, tuple[Checkpoint, Prompt]]  # which model answers, and how it is asked
History = dict[str, list[Message]]  # a conversation by column, each with its own replies


def columns_of(models: dict[str, Checkpoint], examples: Sequence[Message] = ()) -> Columns:
    """The columns of a base, an instruct model, or both; `examples` are for another of the base."""
    columns: Columns = {}
    if base := models.get("base"):
        columns["base_raw"] = base, raw_prompt
        if base.tokenizer.has_template:
            columns["base_chat"] = base, chat_prompt
        if examples:
            columns["base_examples"] = base, after_examples(plain_prompt, [*examples])
    if instruct := models.get("instruct"):
        columns["instruct"] = instruct, chat_prompt
    return columns


@dataclass(frozen=True)
class Reply:
    """What a model made of a prompt; `stopped` says that it ended by itself."""

    text: str
    tokens: int
    stopped: bool


def reply(checkpoint: Checkpoint, prompts: list[list[int]], sampling: Sampling) -> list[Reply]:
    """Samples up to the end-of-turn token, which the texts leave out."""
    end, decode = checkpoint.tokenizer.end_of_turn, checkpoint.tokenizer.decode
    notes = ((unseen(checkpoint, ids), shortened(decode(ids), 80)) for ids in prompts)
    for note in dict.fromkeys(f"note: {note}: {text}" for note, text in notes if note):
        say(note, error=True)
    replies = generate(checkpoint.model, prompts, sampling, stop={end})
    return [Reply(decode([i for i in r if i != end]), len(r), r[-1] == end) for r in replies]


def unseen(checkpoint: Checkpoint, ids: list[int]) -> str:
    """A note on a prompt of which the model sees the end only; empty if it sees all."""
    n, seen = len(ids), checkpoint.model.config.block_size
    return "" if n <= seen else f"of the {n} tokens of this prompt, the model sees the last {seen}"


def room_for(checkpoint: Checkpoint, max_new_tokens: int) -> int:
    """The most tokens of a prompt that leave room for a reply: half of the context at least."""
    block_size = checkpoint.model.config.block_size
    return block_size - min(max_new_tokens, block_size // 2)


def ask(
    columns: Columns, histories: list[History], prompts: Sequence[str], sampling: Sampling
) -> list[dict[str, Reply]]:
    """The replies by column to the next prompt of each of some conversations, all at once. Their
    histories grow by both; old turns that do not fit are forgotten.
    """
    replies: list[dict[str, Reply]] = [{} for _ in prompts]
    for column, (model, form) in columns.items():
        room, rows = room_for(model, sampling.max_new_tokens), []
        for history, prompt in zip(histories, prompts, strict=True):
            said = [*history.get(column, []), Message(role="user", content=prompt)]
            history[column] = recent_turns(form, said, model.tokenizer, room)
            rows.append(form(history[column], model.tokenizer))
        for i, found in enumerate(reply(model, rows, sampling)):
            if column == "base_examples":  # the next question is how such a text ends a reply
                text, asks_on, _ = found.text.partition("\nQuestion:")
                found = replace(found, text=text, stopped=found.stopped or bool(asks_on))
            histories[i][column].append(Message(role="assistant", content=found.text))
            replies[i][column] = found
    return replies


def show(console: Console, prompt: str, replies: dict[str, Reply]) -> None:
    """A table on a terminal or in a picture; plain text, one reply a paragraph, in a pipe."""
    prompt, ends = visible(prompt), {c: "" if r.stopped else " ..." for c, r in replies.items()}
    texts = {c: visible(r.text.lstrip(" ")) + ends[c] for c, r in replies.items()}
    if console.is_terminal or console.record:
        table = Table(title=Text(prompt, style="bold"), title_justify="left")
        for column in texts:
            table.add_column(COLUMNS[column], ratio=1)
        table.add_row(*map(Text, texts.values()))
        console.print(table)
        return
    say(f"prompt: {prompt}")
    for column, text in texts.items():
        say(f"[{COLUMNS[column]}] {text}")
    say()


Result = tuple[str, int, dict[str, Reply]]  # a prompt, the seed, and the replies by column


def chat(columns: Columns, sampling: Sampling) -> Iterator[Result]:
    """Reads prompts until end of input and yields each answered; /reset begins again."""
    with contextlib.suppress(ImportError):  # where there is one, `input` edits and recalls lines
        import readline  # noqa: F401
    history = History()
    say("Type a message; /reset begins a new conversation, Ctrl-D ends.")
    while True:
        try:
            prompt = input("you> ").strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: there is no input at all
            say()
            return
        if prompt == "/reset":
            history = History()
        elif prompt:
            yield prompt, sampling.seed, ask(columns, [history], [prompt], sampling)[0]


def answer(columns: Columns, prompts: list[str], sampling: Sampling) -> Iterator[Result]:
    """Yields each prompt answered with each of `sampling.seeds`, many rows at a time."""
    rows = [(prompt, seed) for prompt in prompts for seed in sampling.seeds]
    size = rows_at_once(max(m.model.config.block_size for m, _ in columns.values()))
    for i in range(0, len(rows), size):
        texts, seeds = zip(*rows[i : i + size], strict=True)
        replies = ask(columns, [{} for _ in texts], texts, replace(sampling, seeds=seeds))
        yield from zip(texts, seeds, replies, strict=True)


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises ValueError: not UTF-8, or all blank."""
    try:
        prompts = [p for p in read_text(file).splitlines() if p.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return prompts


def run(a: Namespace) -> None:
    """Answers what the command line asks."""
    check_file("--json", a.json)
    check_range("--samples", a.samples, "1 to 10000")
    prompts = read_prompts(a.prompts) if a.prompts else [] if a.prompt is None else [a.prompt]
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt is empty; give some text")
    if a.samples > 1 and not prompts:
        raise ValueError("--samples is for --prompt and --prompts; a chat goes on with one reply")
    if a.temperature is None:
        a.temperature = float(bool(a.samples > 1 or a.top_k or a.top_p))
    if a.examples and not a.base:
        raise ValueError("--examples are for a base; give --base")
    seeds = [*range(a.seed, a.seed + a.samples)]
    sampling = Sampling(a.max_new_tokens, a.temperature, a.top_k, a.top_p, a.seed, seeds)
    models = load_models({"base": a.base, "instruct": a.instruct}, a.device, to_sample=True)
    shown = read_conversations([a.examples], skip_bad=False) if a.examples else []
    columns = columns_of(models, [message for messages in shown for message in messages])
    console, results = Console(), []
    answered = answer(columns, prompts, sampling) if prompts else chat(columns, sampling)
    for prompt, seed, replies in answered:
        show(console, prompt if a.samples == 1 else f"{prompt} (seed {seed})", replies)
        by_column = {column: asdict(r) for column, r in replies.items()}
        results.append({"prompt": prompt, "seed": seed, **by_column})
    if a.json is not None:
        made_by = {kind: str(model.path) for kind, model in models.items()} | asdict(sampling)
        write_json(a.json, {"settings": made_by, "results": results})


def main() -> None:
    """Runs one command line."""
    p = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--base", help="base checkpoint, or its run; hf:NAME of transformers")
    p.add_argument("--instruct", help="instruct checkpoint, or its run; one of both is enough")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="one prompt")
    what.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    what.add_argument("--chat", action="store_true", help="a live conversation (default)")
    p.add_argument("--samples", type=int, default=1, metavar="N", help="replies to each prompt")
    greedy = "default 0 (greedy), or 1 where --top-k, --top-p or --samples is given"
    p.add_argument("--temperature", type=float, help=greedy)
    p.add_argument("--top-k", type=int, help="sample from the k most likely tokens")
    p.add_argument("--top-p", type=float, help="sample from the most likely share p")
    p.add_argument("--seed", type=int, default=1, help="of the first sample (default 1)")
    p.add_argument("--max-new-tokens", type=int, default=64, help="per reply (default 64)")
    p.add_argument("--examples", type=Path, help="a Q&A file that the base is also given before")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    p.add_argument("--json", type=Path, help="write prompts, replies and settings here too")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
