"""Tensor-parallel sizes of whole models: which tensor is cut where, reading shards, writing them at another size."""
