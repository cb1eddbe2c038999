"""The STARS algorithm over two protocols, Proposer and Scorer; it knows no model library."""
