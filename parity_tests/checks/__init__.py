"""The checks of this GPT: each function yields the rows of one comparison; `parity_tests.suite` has them in order."""
