"""An experiment from its file to a plan that every runtime runs."""
