"""Files that a run leaves behind: records, checkpoints, departures."""
