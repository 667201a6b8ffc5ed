"""The parity engine: holds a JAX program against a PyTorch program, and shows that the comparison can fail.

It knows neither model. What differs from pair to pair comes in as arguments: the checks, their tolerances, the faults,
the tensors in order of computation.

- harness: one comparison and its row
- tolerances: the table that rows are held against
- suite: checks, run in several processes
- locate: the first tensor that departs
- mutants: planted faults
- report: tables and JSON
"""
