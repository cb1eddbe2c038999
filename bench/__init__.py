"""python -m bench: check that all contestants give the same answers, then time them."""
