"""Merge methods, one file a paper or family."""

from mergekit_jax.methods.average import average
from mergekit_jax.methods.dare import dare, dare_ties
from mergekit_jax.methods.task_arithmetic import task_arithmetic
from mergekit_jax.methods.ties import ties

__all__ = ['average', 'dare', 'dare_ties', 'task_arithmetic', 'ties']
