"""The tests; a package so that one test file can import another's helpers by name."""
