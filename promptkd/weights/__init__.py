"""Weight files: which tensor is cut where, and reading, writing and converting models of any tensor-parallel size."""
