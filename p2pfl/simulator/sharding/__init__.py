"""One simulation over several processes: shards of rows and the exchange between ranks."""
