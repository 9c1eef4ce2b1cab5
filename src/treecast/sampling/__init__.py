"""How tokens are picked, and the laws by which trees are accepted. No torch here."""
