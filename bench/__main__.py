"""How fast it is, measured beside nanoGPT and nanochat in fresh processes, in turns."""

import sys
import tempfile
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import BENCHES, READS, ROOT
from bench.measure import Bench
from bench.table import write_page
from model.gpt import RECIPES
from runtime.cli import Parser, one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command line, on which every entry of a case is an option."""
    p = Parser("python -m bench", description=__doc__)
    p.set_defaults(**dict.fromkeys(READS) | {"rounds": 3})
    benches = p.add_subparsers(dest="what", metavar="BENCH", required=True)
    for what, bench in BENCHES.items():
        texts = {"help": bench["about"].split("\n")[0], "description": bench["about"]}
        b = benches.add_parser(what, formatter_class=RawDescriptionHelpFormatter, **texts)
        for name in bench["reads"]:
            kind = int if name == "rounds" else Path
            b.add_argument(f"--{name}", type=kind, default=SUPPRESS, help=READS[name])
        b.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
        b.add_argument("--quick", action="store_true", help="tiny sizes, half a round")
        b.add_argument("--case", choices=bench["cases"], help="the device has a default")
        case = {**bench.get("defaults", {}), **next(iter(bench["cases"].values()))}
        for name, value in case.items():
            how: dict[str, Any] = {"choices": [*RECIPES] if name == "recipe" else None}
            how["type"] = type(value)
            if isinstance(value, bool):
                how = {"action": "store_true", "default": None}
            elif isinstance(value, list):
                how = {"type": type((value or [""])[0]), "nargs": "+"}
            if not isinstance(value, dict):
                how["help"] = f"instead of the case's; of {next(iter(bench['cases']))}: {value}"
                b.add_argument("--" + name.replace("_", "-"), **how)
    b = benches.add_parser("table", help="The tables of docs/speed.md, from the result files.")
    b.add_argument("--page", type=Path, default=ROOT / "docs/speed.md", help="to write into")
    for b in benches.choices.values():
        b.add_argument("--out", type=Path, default=ROOT / "bench/results", help="of result files")
    a = p.parse_args(argv)
    a.argv = sys.argv[1:] if argv is None else argv
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        if a.what == "table":
            write_page(a.out, a.page)
        else:
            getattr(Bench(a, Path(scratch)), a.what)()


if __name__ == "__main__":
    main()
