"""Evaluation: metrics, protocol, report."""

from ie.evaluation.report import evaluate

__all__ = ["evaluate"]
