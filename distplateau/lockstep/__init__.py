"""One decision per validation, the same bits on every rank."""
