"""Examination of a site, before its node runs and while it does: each fault is named with its remedy."""
