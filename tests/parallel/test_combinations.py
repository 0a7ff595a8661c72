"""README's table of combinations is what the cases of these folders say."""

import pytest

pytest.importorskip("deepspeed")

from parallel import combinations


def test_table_of_readme() -> None:
    """Each tick has all its cases, each dash is refused; a case that goes, or is skipped, empties its cell."""
    held = [case.options for case in combinations.cases()]
    gone = {
        f"{title} × {column}: no case for {pairs}"
        for title, row in combinations.ROWS.items()
        for column in combinations.COLUMNS
        if (pairs := combinations.missing(row, column, held))
    }
    assert gone == set()
    assert combinations.in_readme() == combinations.table(held)


def test_a_case_that_goes_empties_its_cell() -> None:
    """DeepSpeed's ZeRO-3 with the norms recomputed is one case; without it the tick is gone."""
    held = [case.options for case in combinations.cases()]
    without = [options for options in held if not {"deepspeed3", "norms"} <= options]
    assert len(without) < len(held)
    assert combinations.missing(combinations.DEEPSPEED, "recompute", without) == [("deepspeed3", "norms")]
    assert combinations.table(without) != combinations.table(held)
