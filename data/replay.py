"""Pretraining text that is trained on beside the conversations of instruction tuning."""

from collections.abc import Callable
from typing import Any

from data.pretrain import PretrainData, PretrainDataConfig
from data.sft import SFTDataConfig
from data.world import World, WorldConfig
from runtime.files import read_meta


def open_replay(
    config: SFTDataConfig, base: dict[str, Any], block_size: int, seed: int, verify: bool
) -> PretrainData | None:
    """The text to replay beside the conversations; None if the config replays none. `base` is the
    meta.json of the base, which says what text it was trained on, and how. Raises ValueError: that
    text is not known or has changed, has another tokenizer, or knows of no people though only some
    are to be read about.
    """
    if not config.replay:
        return None
    read = base["config"]["data"]
    path = config.replay_path or read["path"]
    remedy = "name the text to replay with --data.replay_path"
    if path is None:
        raise ValueError(f"the base was imported from elsewhere; {remedy}")
    rows = max(1, round(config.batch_size * config.replay / (1 - config.replay)))
    settings = PretrainDataConfig(path, rows, document_mask=read.get("document_mask", False))
    wanted = about_known_people(path) if config.replay_people == "known" else None
    data = PretrainData(settings, block_size, seed, verify, wanted)
    if config.replay_path is None and data.fingerprint != base["data"]["fingerprint"]:
        raise ValueError(f"{path} is no longer the text that the base was trained on; {remedy}")
    if data.tokenizer.fingerprint != base["tokenizer"]["fingerprint"]:
        raise ValueError(f"{path}, to be replayed, has another tokenizer than the base")
    return data


def about_known_people(path: str) -> Callable[[str], bool]:
    """Whether a biography of a prepared world is about one of its known people.
    Raises ValueError: it is no world, or today's code would choose other people.
    """
    meta = read_meta(path)
    wrong = f"data.replay_people=known, but {path}"
    if "world" not in meta:
        raise ValueError(f"{wrong} is no world of people")
    world = World(WorldConfig(**meta["world"]))
    if world.fingerprint != meta["world_fingerprint"]:
        raise ValueError(f"{wrong} was made by other words; make it anew")
    names = [person.name for person in world.by_split["known"]]
    return lambda text: any(name in text for name in names)
