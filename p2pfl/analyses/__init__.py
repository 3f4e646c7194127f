"""Analyses of the tables of a contract: what is asked, what each site allows, and the result that equals the pooled one."""

from __future__ import annotations

from p2pfl.analyses import stats

__all__ = ["stats"]
