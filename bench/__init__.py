"""What is measured: tables, comparisons and loads, each a command of its own (`python -m ...`)."""
