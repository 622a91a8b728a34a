"""One way to say that a number is out of range."""

import math


def check_range(name: str, value: float | None, rule: str, remedy: str = "") -> None:
    """Raises ValueError where a number breaks a rule; None always passes.

    `rule` is one or two of "above A", "below B", "A or more", "at most B" and "A to B", joined by
    " and "; the message says it as it stands, after `name`, the key or option, and before `remedy`.
    """
    if value is None or all(_holds(value, *part.split()) for part in rule.split(" and ")):
        return
    raise ValueError(f"{name} is {value}; it must be {rule}{remedy and '; '}{remedy}")


def _holds(value: float, *rule: str) -> bool:
    # A whole number stays one: a float would round a large seed.
    numbers = [int(word) if word.isdecimal() else float(word) for word in rule if word[0].isdigit()]
    if "to" in rule:
        return numbers[0] <= value <= numbers[1]
    if not -math.inf < value < math.inf:  # not isfinite, which fails for a very large integer
        return False
    compare = {"above": value > numbers[0], "below": value < numbers[0], "at": value <= numbers[0]}
    return compare.get(rule[0], value >= numbers[0])
