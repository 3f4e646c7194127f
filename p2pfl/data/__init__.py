"""Data before it is a task: downloads and tables."""
