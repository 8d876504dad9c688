"""One script per claim, each beside a peer; the tables are in RESULTS.md."""
