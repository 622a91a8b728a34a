"""The two checkpoints side by side: same prompt, same seed, same sampler.

python sample.py --base out/quickstart/base --instruct out/quickstart/instruct --chat
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.chat import Message, Prompt, render_prompt, template_fingerprint
from data.tokenizer import Tokenizer
from model.generate import Sampling, generate
from runtime.cli import one_line_errors
from runtime.device import has_bf16, set_up
from runtime.files import write_json
from training.checkpoint import Checkpoint, load_checkpoint

# What is shown of each prompt: the column's title by its name in the JSON.
COLUMNS = {
    "base_raw": "base, continuing the text",
    "base_chat": "base, given the chat template",
    "instruct": "instruct",
}


@dataclass(frozen=True)
class Reply:
    """What a model made of a prompt; `stopped` says that it ended by itself."""

    text: str
    tokens: int
    stopped: bool


def reply(checkpoint: Checkpoint, ids: list[int], sampling: Sampling) -> Reply:
    """Samples up to the end-of-turn token, which the text leaves out."""
    end = checkpoint.tokenizer.end_of_turn
    if note := unseen(checkpoint, ids):
        print(f"note: {note}", file=sys.stderr)
    new = generate(checkpoint.model, [ids], sampling, stop={end})[0]
    stopped = new[-1] == end
    return Reply(checkpoint.tokenizer.decode(new[:-1] if stopped else new), len(new), stopped)


def unseen(checkpoint: Checkpoint, ids: list[int]) -> str:
    """A note on a prompt of which the model sees the end only; empty if it sees all."""
    block_size = checkpoint.model.config.block_size
    if len(ids) <= block_size:
        return ""
    return f"of the {len(ids)} tokens of this prompt, the model sees the last {block_size}"


def load_pair(base: str, instruct: str, device: str) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints on a device.

    Raises:
        ValueError: not a base and an instruct checkpoint that share a tokenizer and template.
    """
    where = set_up(device)
    pair = [load_checkpoint(path, where) for path in (base, instruct)]
    for checkpoint, kind in zip(pair, ("base", "instruct"), strict=True):
        if checkpoint.meta["kind"] != kind:
            found = checkpoint.meta["kind"]
            raise ValueError(f"--{kind} {checkpoint.path} is of the other kind: {found}")
    if pair[0].tokenizer.fingerprint != pair[1].tokenizer.fingerprint:
        raise ValueError("the two checkpoints have different tokenizers; they cannot be compared")
    if pair[1].meta["template"] != template_fingerprint():
        raise ValueError(f"{pair[1].path} was trained with another chat template than this code's")
    return pair[0], pair[1]


def load_to_sample(base: str, instruct: str, device: str) -> tuple[Checkpoint, Checkpoint]:
    """`load_pair`, in bf16 where the device computes in it."""
    pair = load_pair(base, instruct, device)
    for checkpoint in pair:
        if has_bf16(checkpoint.model.wte.weight.device):
            checkpoint.model.bfloat16()  # every token reads all weights: half the bytes and time
    return pair


def continue_text(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """A conversation as one text to go on with, in which each prompt begins a line."""
    lines = [("\n" if m["role"] == "user" else "") + m["content"] for m in messages]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(lines)[1:])]


def put(
    prompt: Prompt, messages: list[Message], checkpoint: Checkpoint, max_new_tokens: int
) -> list[int]:
    """Token ids of a conversation. Removes the oldest turns that leave no room for a reply.

    Whole turns are forgotten, so that the newest question is never cut. A text to be continued has
    no turns: of a long one the model sees the end.
    """
    block_size = checkpoint.model.config.block_size
    room = min(max_new_tokens, block_size // 2)

    def fits(turn: int) -> bool:
        return len(prompt(messages[2 * turn :], checkpoint.tokenizer)) + room <= block_size

    if prompt is not continue_text:
        last = (len(messages) - 1) // 2
        del messages[: 2 * bisect_left(range(last), True, key=fits)]
    return prompt(messages, checkpoint.tokenizer)


class Conversation:
    """One conversation with each of the three columns, each with its own replies as history."""

    def __init__(self, base: Checkpoint, instruct: Checkpoint, sampling: Sampling) -> None:
        self.base, self.instruct, self.sampling = base, instruct, sampling
        self.messages: dict[str, list[Message]] = {column: [] for column in COLUMNS}

    def ask(self, prompt: str) -> dict[str, Reply]:
        """The replies to the next prompt, by column."""
        replies = {}
        for column, messages in self.messages.items():
            checkpoint = self.instruct if column == "instruct" else self.base
            form = continue_text if column == "base_raw" else render_prompt
            messages.append(Message(role="user", content=prompt))
            ids = put(form, messages, checkpoint, self.sampling.max_new_tokens)
            replies[column] = reply(checkpoint, ids, self.sampling)
            messages.append(Message(role="assistant", content=replies[column].text))
        return replies


def show(console: Console, prompt: str, replies: dict[str, Reply]) -> None:
    """A table on a terminal or in a picture; plain text, one reply a paragraph, in a pipe."""
    texts = {c: r.text + ("" if r.stopped else " ...") for c, r in replies.items()}
    if console.is_terminal or console.record:
        table = Table(*COLUMNS.values(), title=Text(prompt, style="bold"), title_justify="left")
        for column in table.columns:
            column.ratio = 1
        table.add_row(*(Text(texts[c]) for c in COLUMNS))
        console.print(table)
        return
    print(f"prompt: {prompt}")
    for c, text in texts.items():
        print(f"[{COLUMNS[c]}] {text}")
    print(flush=True)


Result = tuple[str, dict[str, Reply]]  # a prompt and its replies by column


def chat(console: Console, conversation: Conversation) -> list[Result]:
    """Reads prompts until end of input; /reset begins again. Returns what was said."""
    results: list[Result] = []
    print("Type a message to both models; /reset begins a new conversation, Ctrl-D ends.")
    while True:
        try:
            prompt = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return results
        if prompt == "/reset":
            conversation = Conversation(
                conversation.base, conversation.instruct, conversation.sampling
            )
        elif prompt:
            results.append((prompt, conversation.ask(prompt)))
            show(console, *results[-1])


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: not UTF-8, or no prompt in it.
    """
    try:
        prompts = [p for p in file.read_text(encoding="utf-8-sig").splitlines() if p.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return prompts


def run(a: argparse.Namespace) -> None:
    """Answers what the command line asks."""
    if a.json is not None and not a.json.absolute().parent.is_dir():
        raise ValueError(f"--json {a.json}: there is no folder {a.json.parent}")
    sampling = Sampling(a.max_new_tokens, a.temperature, a.top_k, a.top_p, a.seed)
    base, instruct = load_to_sample(a.base, a.instruct, a.device)
    console = Console()
    if a.prompt is None and a.prompts is None:
        results = chat(console, Conversation(base, instruct, sampling))
    else:
        prompts = [a.prompt] if a.prompts is None else read_prompts(a.prompts)
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("--prompt is empty; give some text")
        results = []
        for prompt in prompts:
            results.append((prompt, Conversation(base, instruct, sampling).ask(prompt)))
            show(console, *results[-1])
    if a.json is not None:
        made_by = {"base": str(base.path), "instruct": str(instruct.path), **asdict(sampling)}
        rows = [{"prompt": p, **{c: asdict(r) for c, r in rs.items()}} for p, rs in results]
        write_json(a.json, {"settings": made_by, "results": rows})


def main() -> None:
    """Runs one command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="base checkpoint, or its run")
    p.add_argument("--instruct", required=True, help="instruct checkpoint, or its run")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="one prompt")
    what.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    what.add_argument("--chat", action="store_true", help="a live conversation (default)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    p.add_argument("--top-k", type=int, help="sample from the k most likely tokens")
    p.add_argument("--top-p", type=float, help="sample from the most likely share p")
    p.add_argument("--seed", type=int, default=1, help="of the sampling (default 1)")
    p.add_argument("--max-new-tokens", type=int, default=64, help="per reply (default 64)")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    p.add_argument("--json", type=Path, help="write prompts, replies and settings here too")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
