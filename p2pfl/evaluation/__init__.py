"""Conclusions from a finished run: baselines, intervals, subgroups, cross-site figures, the gain over local training, the summary."""
