"""A small demo of STARS on a CPU: a 135M language model and a sentiment reward model made from it."""
