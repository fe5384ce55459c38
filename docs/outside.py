"""Links from the documentation to files beside it, which are not part of the site, become code."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown, **_):
    """Return a page's text with such links replaced by the file's name."""
    return OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2].partition('#')[0]}`)", markdown)
