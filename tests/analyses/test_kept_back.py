"""What no output says: a count of one patient, an exact small count of a site, or one site's own result."""

from __future__ import annotations

import pytest
from study_tables import changed, integer, made, write_study

from p2pfl.analyses.stats import run
from p2pfl.errors import ConfigError


@pytest.mark.parametrize("cells", ["total", "site"])
def test_a_group_of_one_patient_is_refused_however_many_groups_there_are(cells, tmp_path):
    variables, outcome, rows = made()
    variables = {**variables, "visits": integer(0, 6)}
    study = changed((variables, outcome, rows), visits=lambda _, place: "6" if place == 4 else str(place % 2))
    contract, sites = write_study(tmp_path, study)

    with pytest.raises(ConfigError, match=r"a combination of died and visits has fewer than 5 patients|refused by policy"):
        run({"kind": "compare", "formula": "Surv(days, died) ~ visits", "cells": cells}, contract, sites)
