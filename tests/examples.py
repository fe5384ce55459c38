"""How many random examples a test tries that brings up a whole world for each.

`make test` tries a part of them, the same ones each time; `make campaign` tries all, and others.
"""

from hypothesis import settings

SHORT = 5
"""Of so many examples of the campaign, `make test` tries one."""


def examples(campaign):
    """Examples of a test that tries so many in a campaign."""
    if settings.get_current_profile_name() == "random":
        return campaign
    return max(campaign // SHORT, 10)
