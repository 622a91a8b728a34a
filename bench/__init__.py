import data  # noqa: F401  (Ctrl-C while torch is imported: see there)
