"""Exact, sharding-independent kernels that rules are made of."""
