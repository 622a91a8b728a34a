"""Scripts in processes of their own, each without the seconds that importing torch takes."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
# A process that has imported torch and done nothing else; each script is a fork of it. Elsewhere
# than on Linux a fork of such a process is not safe, and each script imports torch after all.
SERVER: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
SERVER.set_forkserver_preload(["torch._dynamo"])


def run(words: Sequence[str], cwd: str, env: Mapping[str, str], *files: Connection) -> None:
    """In the fork: what `python SCRIPT ARGUMENT ...` would do."""
    import torch

    for i, file in enumerate(files, 1):
        os.dup2(file.fileno(), i)
        file.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [*words]
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    torch.set_num_threads(1)
    runpy.run_path(words[0], run_name="__main__")


class Forked:
    """A running script: what is used here of `subprocess.Popen`. Its output goes into pipes."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path = ROOT,
        env: Mapping[str, str] = os.environ,
        stderr: IO[str] | None = None,
        errors: str | None = None,
        **_: Any,
    ) -> None:
        pipes = [SERVER.Pipe(duplex=False) for _ in range(2)]
        self.stdout, self.stderr = (os.fdopen(os.dup(o.fileno()), errors=errors) for o, _ in pipes)
        theirs = [other for _, other in pipes]
        if stderr is not None:
            theirs[1] = Connection(os.dup(stderr.fileno()), readable=False)
        words = command[1:]  # without "python"
        self.process = SERVER.Process(target=run, args=(words, str(cwd), {**env}, *theirs))
        self.process.start()
        for one in theirs:
            one.close()
        self.kill, self.terminate = self.process.kill, self.process.terminate

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self, timeout: float = 300) -> int | None:
        """Its exit code, or a negative signal number. TimeoutError: it still ran, and is killed."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"{self.process.name} ran for more than {timeout} s")
        return self.returncode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode
