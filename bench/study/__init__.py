"""The report on trees: what guesses, widths, laws and shapes are worth, measured in one process.

`measure` runs the sections that a folder lacks and saves each as JSON; `render` makes Markdown and
plots of what is there. Under the law `replay` a target's answer does not depend on the trees, so it
is recorded once and every drafter is held against it; the law `mss` runs the target.
"""
