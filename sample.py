"""The two checkpoints side by side: same prompt, same seed, same sampler.

python sample.py --base out/quickstart/base --instruct out/quickstart/instruct --chat
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.chat import Message, raw_prompt
from data.fitting import recent_turns
from hf.adapter import chat_prompt, load_pair
from model.generate import Sampling, generate
from runtime.cli import Parser, one_line_errors, read_text, say, visible
from runtime.files import check_file, write_json
from training.checkpoint import Checkpoint

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
        say(f"note: {note}", error=True)
    new = generate(checkpoint.model, [ids], sampling, stop={end})[0]
    stopped = new[-1] == end
    return Reply(checkpoint.tokenizer.decode(new[:-1] if stopped else new), len(new), stopped)


def unseen(checkpoint: Checkpoint, ids: list[int]) -> str:
    """A note on a prompt of which the model sees the end only; empty if it sees all."""
    block_size = checkpoint.model.config.block_size
    if len(ids) <= block_size:
        return ""
    return f"of the {len(ids)} tokens of this prompt, the model sees the last {block_size}"


def room_for(checkpoint: Checkpoint, max_new_tokens: int) -> int:
    """The most tokens of a prompt that leave room for a reply: half of the context at least."""
    block_size = checkpoint.model.config.block_size
    return block_size - min(max_new_tokens, block_size // 2)


class Conversation:
    """One conversation with each of the three columns, each with its own replies as history."""

    def __init__(self, base: Checkpoint, instruct: Checkpoint, sampling: Sampling) -> None:
        self.models = {"base_raw": base, "base_chat": base, "instruct": instruct}
        self.sampling = sampling
        self.messages: dict[str, list[Message]] = {column: [] for column in COLUMNS}

    def ask(self, prompt: str) -> dict[str, Reply]:
        """The replies to the next prompt, by column. Old turns that do not fit are forgotten."""
        replies = {}
        for column, model in self.models.items():
            form = raw_prompt if column == "base_raw" else chat_prompt
            room = room_for(model, self.sampling.max_new_tokens)
            said = [*self.messages[column], Message(role="user", content=prompt)]
            said = recent_turns(form, said, model.tokenizer, room)
            replies[column] = reply(model, form(said, model.tokenizer), self.sampling)
            said.append(Message(role="assistant", content=replies[column].text))
            self.messages[column] = said
        return replies


def show(console: Console, prompt: str, replies: dict[str, Reply]) -> None:
    """A table on a terminal or in a picture; plain text, one reply a paragraph, in a pipe."""
    prompt, ends = visible(prompt), {c: "" if r.stopped else " ..." for c, r in replies.items()}
    texts = {c: visible(r.text.lstrip(" ")) + ends[c] for c, r in replies.items()}
    if console.is_terminal or console.record:
        table = Table(title=Text(prompt, style="bold"), title_justify="left")
        for title in COLUMNS.values():
            table.add_column(title, ratio=1)
        table.add_row(*(Text(texts[c]) for c in COLUMNS))
        console.print(table)
        return
    say(f"prompt: {prompt}")
    for c, text in texts.items():
        say(f"[{COLUMNS[c]}] {text}")
    say()


Result = tuple[str, dict[str, Reply]]  # a prompt and its replies by column


def chat(console: Console, base: Checkpoint, instruct: Checkpoint, how: Sampling) -> list[Result]:
    """Reads prompts until end of input; /reset begins again. Returns what was said."""
    results, conversation = list[Result](), Conversation(base, instruct, how)
    say("Type a message to both models; /reset begins a new conversation, Ctrl-D ends.")
    while True:
        try:
            prompt = input("you> ").strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: there is no input at all
            say()
            return results
        if prompt == "/reset":
            conversation = Conversation(base, instruct, how)
        elif prompt:
            results.append((prompt, conversation.ask(prompt)))
            show(console, *results[-1])


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
    sampling = Sampling(a.max_new_tokens, a.temperature, a.top_k, a.top_p, a.seed)
    base, instruct = load_pair(a.base, a.instruct, a.device, to_sample=True)
    console = Console()
    if a.prompt is None and a.prompts is None:
        results = chat(console, base, instruct, sampling)
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
    p = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
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
