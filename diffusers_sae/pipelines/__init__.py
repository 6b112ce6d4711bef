"""Steerable pipelines."""

from .mixin import SAESteeringMixin
from .pipeline import SAESteeringPipeline

__all__ = ["SAESteeringMixin", "SAESteeringPipeline"]
