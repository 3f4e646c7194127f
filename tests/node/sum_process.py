"""One member's regression as a process: ``python sum_process.py SITE_YAML PLACE``; prints the fit's bits as hexadecimal digits."""

from __future__ import annotations

import sys
from pathlib import Path

from sum_clinics import planned_regression, regression, rows_of

from p2pfl.experiment.loading import load_study
from p2pfl.node.own_sums import analyse_with_others, sum_terms
from p2pfl.node.site import SiteFile

if __name__ == "__main__":
    path, place = Path(sys.argv[1]), int(sys.argv[2])
    study = load_study(SiteFile.load(path).study)
    terms = sum_terms(study, planned_regression())
    rows = rows_of(len(study.names))[place]
    fit = analyse_with_others(path, study, terms, regression(), rows, wait_s=60.0, presence_s=0.2)
    sys.stdout.write(f"{fit.params.tobytes().hex()} {fit.covariance_PP.tobytes().hex()}\n")
