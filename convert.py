"""Weights in and out, in the folders that Hugging Face's transformers reads and writes.

python convert.py import gpt2 out/gpt2
python convert.py export out/quickstart/instruct out/quickstart/instruct-hf

What is imported can be gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name on the hub, or a folder.
An export loads with `AutoModelForCausalLM` and `AutoTokenizer`, as their `gpt2` or `nanochat`.
"""

import contextlib
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import data  # isort: skip  # noqa: F401  (before torch: see there)

import torch
from safetensors.torch import save_file

from data.chat import jinja_template, template_fingerprint
from data.tokenizer import END_OF_TEXT, END_OF_TURN
from hf.architecture import export_config, export_weights, import_weights, read_config
from hf.hub import GPT2_NAMES, ORIGIN_FILE, find_model, origin_of, unknown_training, weight_files
from hf.tokenizer import export_tokenizer, import_tokenizer, marked
from model.gpt import GPT, ModelConfig
from runtime.cli import Parser, one_line_errors, say
from runtime.device import check_size, environment
from runtime.files import ODD, new_directory, read_json, read_meta, sha256_file, write_json
from training.checkpoint import check_meta, load_checkpoint, save_checkpoint, writing


def import_checkpoint(
    source: str, out: Path, downloads: Path, dropout: float | None, kind: str | None = None
) -> Path:
    """Makes a run's folder with one checkpoint of a folder, or a name on the hub; returns it.
    An export of this project, unchanged since, becomes what it was, bit for bit; all else is of
    `kind`, or a base. `dropout` is that of training from here on; None for what config.json says.
    Raises ValueError: not a GPT-2, damaged, not to be had, of another kind, an instruct model with
    another chat template than ours, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another folder, or delete it")
    folder = find_model(source, downloads, _check)
    with _importing(folder):
        config, n_rows = read_config(folder)
        tokenizer, n_known = import_tokenizer(folder, n_rows)
        files = weight_files(folder)
        if (meta := origin_of(folder, files)) is not None:
            config = ModelConfig(**meta["model"])
            if meta["kind"] not in ([kind] if kind else ("base", "instruct")):
                raise ValueError(f"its {ORIGIN_FILE} says that it is of kind {meta['kind']!r:.20}")
            check_meta(meta, f"its {ORIGIN_FILE}")
        else:
            meta = unknown_training() | {"kind": kind or "base"}
            meta |= {"environment": environment(torch.device("cpu"))}
            if kind == "instruct":
                check_template(folder, n_known == tokenizer.n_vocab)
                meta |= {"template": template_fingerprint(), "base": {}}
        if dropout is not None:
            config = replace(config, dropout=dropout)
        check_size(config, tokenizer.n_vocab)
        sizes = sum(f.stat().st_size for f in folder.glob("model*.safetensors"))
        if 0 < sizes < config.n_layer * config.n_embd**2:
            raise ValueError("its config.json asks for more weights than its files hold")
        model = GPT(config, tokenizer.n_vocab)
        import_weights(model, folder, n_known)
    meta = meta | {"imported": {"from": source, "files": files}}
    path = save_checkpoint(out, model, [], tokenizer, meta, meta["step"], meta["metrics"])
    if read_meta(path).get("imported") != meta["imported"]:
        raise ValueError(f"another process has made {path}")
    say(f"{meta['kind']} checkpoint of {model.n_params():,} parameters: {path}")
    return path


def check_template(folder: Path, has_tokens: bool) -> None:
    """Raises ValueError: an instruct model has not our chat template, or tokens for it."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    text = read_json(settings).get("chat_template", "") if settings.exists() else ""
    text = file.read_text(encoding="utf-8") if file.exists() else text
    if not has_tokens or text != jinja_template(marked("<|")):
        raise ValueError("its chat template is not this project's; compare it as hf:FOLDER")


def _check(folder: Path) -> None:
    with _importing(folder):
        read_config(folder)


@contextlib.contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Names the folder in whose files something is not what it should be."""
    try:
        yield
    except (*ODD, ValueError) as error:
        reason, kind = next(iter(str(error).splitlines()), ""), type(error).__name__
        if not isinstance(error, ValueError):
            reason = f"something in its files is not as in a GPT-2's ({kind}: {reason or kind})"
        raise ValueError(f"{folder} cannot be imported: {reason or kind}") from None


def export_checkpoint(path: str, out: Path) -> None:
    """Writes a folder that transformers loads. Raises ValueError: no checkpoint, or one that
    transformers has no architecture for. Raises OSError: `out` is there, or cannot be written.
    """
    checkpoint = load_checkpoint(path)
    model, tokenizer, kind = checkpoint.model, checkpoint.tokenizer, checkpoint.meta["kind"]
    end = END_OF_TURN if kind == "instruct" else END_OF_TEXT
    # Padding by the end token: any other id, found in a prompt, would be taken for padding there.
    special = {"bos_token": END_OF_TEXT, "eos_token": end, "pad_token": end}
    ids = {f"{name}_id": tokenizer.control(token) for name, token in special.items()}
    config = export_config(model.config, model.vocab_size) | ids
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.block_size,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # what is generated follows the prompt at once
        "chat_template": jinja_template(marked("<|")),
        **{name: marked(token) for name, token in special.items()},
    }
    with new_directory(out) as folder:
        weights = folder / "model.safetensors"
        with writing(out):
            save_file(export_weights(model), weights, {"format": "pt"})
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", ids)
        write_json(folder / "tokenizer.json", export_tokenizer(tokenizer))
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        origin = {"weights": {weights.name: sha256_file(weights)}, "meta": checkpoint.meta}
        write_json(folder / ORIGIN_FILE, origin)
    say(f"{out}: {kind} checkpoint of step {checkpoint.meta['step']} as a {config['model_type']}")


def main() -> None:
    """Runs one command line."""
    p = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    i = commands.add_parser("import", help="from transformers: a base; of an export, what it was")
    i.add_argument("source", help=f"{', '.join(GPT2_NAMES)}, owner/name on the hub, or a folder")
    i.add_argument("out", type=Path, help="folder to make: a run with one checkpoint")
    kinds = "default base; of an export, what it was; instruct if its chat template is ours"
    i.add_argument("--kind", choices=("base", "instruct"), help=kinds)
    i.add_argument("--dropout", type=float, help="of training from here on (default: its own)")
    i.add_argument("--downloads", type=Path, default="out/downloads", help="(default %(default)s)")
    e = commands.add_parser("export", help="a folder for transformers")
    e.add_argument("checkpoint", help="checkpoint, or its run")
    e.add_argument("out", type=Path, help="folder to make")
    a = p.parse_args()
    with one_line_errors():
        if a.command == "import":
            import_checkpoint(a.source, a.out, a.downloads, a.dropout, a.kind)
        else:
            export_checkpoint(a.checkpoint, a.out)


if __name__ == "__main__":
    main()
