"""How a run went, from its records alone: never runs a model."""
