"""Collectives in compiled graphs, on two ranks."""

from __future__ import annotations

from tests.distributed import collective_checks as checks
from tests.distributed.ranks import Ranks


def test_every_form_is_in_the_engine(ranks: Ranks) -> None:
    for kinds in ranks.run(checks.forms):
        assert len(kinds) >= 2 * len(checks.FORMS)
        assert set(kinds) == {"extern"}
