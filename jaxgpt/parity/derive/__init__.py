"""The derivation of a weight converter, where the user gives none: from names, shapes and values.

- entries, torch_tensors: the tensors of both sides; fused ones split, separate ones joined
- naming, layers, layouts: what names have in common, which layers belong together, the layouts that a weight may take
- plan, search: the matching of least cost, and what it leaves open decided by value
- conversion, derivation: the converter, as array steps and as code
"""
