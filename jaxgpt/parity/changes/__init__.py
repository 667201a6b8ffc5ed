"""Changes of the PyTorch side: the mistakes that ports make, made on purpose.

Each change edits some operations of a recorded forward pass: another epsilon, a transposed weight, a mask left out. The
diagnosis tries which of them makes the difference to the JAX side vanish; the mutants show that each makes one.
"""
