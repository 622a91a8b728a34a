"""Pretraining text that is trained on beside the conversations of instruction tuning."""

from typing import Any

from data.pretrain import PretrainData, PretrainDataConfig
from data.sft import SFTDataConfig


def open_replay(
    config: SFTDataConfig, base: dict[str, Any], block_size: int, seed: int, verify: bool
) -> PretrainData | None:
    """The text to replay beside the conversations; None if the config replays none.

    Args:
        base: the meta.json of the base, which says what text it was trained on, and how.

    Raises ValueError: that text is not known or has changed, or it has another tokenizer.
    """
    if not config.replay:
        return None
    read = base["config"]["data"]
    path, remedy = config.replay_path or read["path"], "name the text to replay with"
    if path is None:
        raise ValueError(f"the base was imported from elsewhere; {remedy} --data.replay_path")
    rows = max(1, round(config.batch_size * config.replay / (1 - config.replay)))
    settings = PretrainDataConfig(path, rows, document_mask=read.get("document_mask", False))
    data = PretrainData(settings, block_size, seed, verify)
    if config.replay_path is None and data.fingerprint != base["data"]["fingerprint"]:
        raise ValueError(
            f"{path} is no longer the text that the base was trained on; {remedy} "
            "--data.replay_path"
        )
    if data.tokenizer.fingerprint != base["tokenizer"]["fingerprint"]:
        raise ValueError(f"{path}, to be replayed, has another tokenizer than the base")
    return data
