"""One script a measurement, beside a peer where there is one; RESULTS.md has what they printed."""
