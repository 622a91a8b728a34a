"""One decoding step as a CUDA graph: one launch in place of several hundred."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from model.seen import KVCache, Seen


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device: each stream would keep 32 MiB of workspace."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class StaticStep:
    """The logits after one more token a row. All that changes from step to step lies in buffers of
    a fixed place and size, so that on CUDA the step is captured once and then replayed. On other
    devices it runs as it is, which is how a test compares both. `next_logits` gives logits
    (B, vocab_size) from new ids (B, 1) and what they may look at.
    """

    def __init__(self, next_logits: Callable[[Tensor, Seen], Tensor], cache: KVCache) -> None:
        self.next_logits, self.cache = next_logits, cache
        self.ids = torch.zeros_like(cache.starts)
        self.column = torch.full((1,), cache.used, device=cache.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if cache.device.type != "cuda":
            return
        with torch.cuda.device(cache.device):
            side = side_stream(cache.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # warm up; the column that this writes is written again
                    self._run()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self._run()

    def _run(self) -> None:
        seen = self.cache.see_at(self.column, self.cache.room)
        self.logits = self.next_logits(self.ids[:, None], seen)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, vocab_size) after one more id a row (B,); overwritten by the next call."""
        self.ids.copy_(ids)
        self.column.fill_(self.cache.used)
        self.cache.used += 1
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.logits
