"""docs/families.md says what the tests show, and nothing else."""

from __future__ import annotations

from pathlib import Path

from tiny_families import TINY

import families_page
from sparsek_cli.families import TABLE


def test_the_page_is_up_to_date():
    assert families_page.PAGE.read_text(encoding="utf-8") == families_page.page(), (
        "run `python tools/families_page.py --write`"
    )


def test_every_tick_is_a_test_that_runs_for_the_family():
    """Tests of test_families.py take a fixture that goes through all of `TINY`."""
    source = Path(__file__).with_name("test_families.py").read_text(encoding="utf-8")
    for test in set(families_page.COLUMNS.values()):
        line = next(line for line in source.splitlines() if line.startswith(f"def {test}("))
        assert "made" in line or "checkpoints" in line or "converted" in line
    assert set(TINY) == set(TABLE)


def test_families_with_states_are_those_whose_configs_say_so():
    from tiny_families import tiny_config

    from sparsek_cli.families.layers import has_states

    mixed = [name for name, row in TABLE.items() if row.mixed]
    states = {name for name in mixed if has_states(tiny_config(name).layer_types)}
    assert states == set(families_page._STATES)
