"""Decoding by a rule, over two protocols (Proposer and Scorer). It knows no model library."""
