"""The rungs: each function yields the rows of one comparison; `parity_tests.ladder` has them in order."""
