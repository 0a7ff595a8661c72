"""README's table of combinations is what the cases of these folders say."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from common import MODEL, Run
from parallel import combinations
from parallel.test_options import DENSE, INTERLEAVED, ZERO_BUBBLE, recompute
from parallel.test_random_layouts import as_config

from megagrin.distributed.mesh import ParallelConfig
from megagrin.training import rules

DEGREES: dict[str, dict[str, Any]] = {
    "pp-1f1b": {"pp": 2},
    "pp-interleaved_1f1b": INTERLEAVED,
    "pp-zero_bubble": ZERO_BUBBLE,
    "ep": {"ep": 2},
    "ep-chunks": {"ep": 2, "ep_chunks": 2},
    "etp": {"etp": 2},
    "dp_replicate": {"dp_replicate": 2},
}
# Not refused but without effect: a pipeline's ZeRO stage (footnote 2), parts that a dense model has not.
WITHOUT_EFFECT = {(f"zero{zero}", option) for zero in (1, 2, 3) for option in combinations.COLUMNS["pp"]}
WITHOUT_EFFECT |= {("dense", "expert_mlp"), ("dense", "router")}


@pytest.mark.parametrize("pair", sorted(combinations.REFUSED - WITHOUT_EFFECT), ids="-".join)
def test_a_dash_is_refused(pair: tuple[str, str]) -> None:
    """The combination breaks a rule that one of its halves alone keeps."""
    run = Run(model=replace(MODEL, n_layers=4), micro=2, dtype="fp32")
    for option in pair:
        if option in DEGREES:
            run = replace(run, parallel=ParallelConfig(**DEGREES[option]))
        elif option == "dense":
            run = replace(run, model=DENSE)
        elif option.startswith("deepspeed"):
            run = replace(run, engine=run.engine | {"kind": "deepspeed", "zero": int(option[-1])})
        else:
            run = replace(run, engine=run.engine | ({"compile": True} if option == "compile" else recompute(option)))
    assert rules.violations(as_config(run), 4) != []
    alone = replace(run, engine={}) if run.engine else replace(run, parallel=ParallelConfig())
    assert rules.violations(as_config(alone), 4) == []


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
