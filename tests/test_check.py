import math

import pytest

from model.check import check_range

SEED = f"0 or more and below {2**63}"


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("1 or more", [1, 2, 10**400], [0, -1, math.nan, math.inf]),
        ("above 0", [1e-300, 5], [0, -1e-300, math.nan, math.inf]),
        ("0 or more and below 1", [0, 0.999], [1, -0.1, math.nan, -math.inf]),
        ("above 0 and at most 1", [1e-9, 1], [0.0, 1.1, math.nan]),
        ("0 to 1", [0, 0.5, 1], [-0.01, 1.01, math.nan, math.inf]),
        (SEED, [0, 2**63 - 1], [-1, 2**63, 10**400]),
    ],
)
def test_a_rule_is_what_it_says(rule: str, good: list[float], bad: list[float]) -> None:
    for value in [*good, None]:
        check_range("some.key", value, rule)
    for value in bad:
        with pytest.raises(ValueError, match=r"^some\.key is .*; it must be ") as error:
            check_range("some.key", value, rule, "mend it")
        assert str(error.value).endswith(f"it must be {rule}; mend it")
