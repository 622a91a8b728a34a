"""The instruments: what instruction tuning changed, and what it did not."""

import data  # noqa: F401  (Ctrl-C while numpy and torch are imported: see there)
