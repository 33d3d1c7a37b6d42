"""Measurements that anyone can repeat; `benchmarks/README.md` keeps their figures. Not part of the package."""

from ie import runtime

runtime.prepare()  # as `ie` itself does, before torch is loaded
