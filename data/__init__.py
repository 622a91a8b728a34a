"""Text, conversations, tokenizers and worlds."""

import sys
from types import TracebackType


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C outside of every `main` is no bug: one line instead of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Here, because every command imports this package before torch, which takes seconds.
if sys.excepthook is sys.__excepthook__:  # nobody else's: a notebook has its own
    sys.excepthook = _quiet
