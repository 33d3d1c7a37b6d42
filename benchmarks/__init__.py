"""Measurements that anyone can repeat; `benchmarks/README.md` keeps their figures. Not part of the package."""
