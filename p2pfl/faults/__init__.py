"""Scripts of faults for simulated and real networks."""
