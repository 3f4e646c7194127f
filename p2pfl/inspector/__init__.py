"""How a run went, from its records alone: never runs a model."""

from p2pfl.inspector.tables import Tables, read

__all__ = ["Tables", "read"]
