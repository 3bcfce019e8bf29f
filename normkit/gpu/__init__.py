"""Training steps on a GPU by Triton kernels: kernels.py has the layers, step.py puts them together."""
