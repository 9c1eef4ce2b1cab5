"""One generation as a page for people: every round's tree, and where the time went."""

from treecast.tracepage.page import render_page

__all__ = ["render_page"]
