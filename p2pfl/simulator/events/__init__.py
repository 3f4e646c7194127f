"""Simulations on a virtual clock, in which each node goes at its own pace."""
