"""Speed side by side with two peer projects; `python -m bench.table` writes it up."""
