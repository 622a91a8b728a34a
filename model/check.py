"""One way to say that a number is out of range."""

from __future__ import annotations

import math


def check_range(name: str, value: float | None, rule: str, remedy: str = "") -> None:
    """Refuses a number that breaks a rule; None always passes.

    Args:
        name: the key or option, such as "optim.lr".
        rule: one or two of "above A", "below A", "A or more" and "A to B", joined by " and ". The
            message says it as it stands.
        remedy: what to do, said after the rule.

    Raises:
        ValueError: the number is out of range, infinite, or not a number.
    """
    if value is None or all(_holds(value, part.split()) for part in rule.split(" and ")):
        return
    raise ValueError(f"{name} is {value}; it must be {rule}{remedy and '; '}{remedy}")


def _holds(value: float, rule: list[str]) -> bool:
    match rule:
        case ["above", low]:
            return _number(low) < value < math.inf
        case ["below", high]:
            return -math.inf < value < _number(high)
        case [low, "or", "more"]:
            return _number(low) <= value < math.inf
        case [low, "to", high]:
            return _number(low) <= value <= _number(high)
    raise AssertionError(rule)


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)  # a float would round a large seed
