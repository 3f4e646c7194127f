"""Statistics as sums over institutions."""
