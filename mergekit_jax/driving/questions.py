"""What a rule asks and whether it is random, found without data."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mergekit_jax.driving.block import Block
from mergekit_jax.driving.drive import advance, answer, NoKeyError
from mergekit_jax.driving.widths import narrow_spec, widen
from mergekit_jax.rule import needs_of, PyTree, scope_of


def asked(method: Any, block: Block) -> list[PyTree]:
  """What a rule asks, round by round, found without data.

  Args:
    method: a rule.
    block: a block of arrays or of `jax.ShapeDtypeStruct`s.

  Returns:
    The partials of every round, as `jax.ShapeDtypeStruct`s: nothing for
    elementwise and random rules, one round for Gram rules, two for TIES. A
    round is a full read before the last one.

  Raises:
    ValueError: if the rule needs a base and the block has none.
  """
  questions = []
  answers = []
  while True:
    reached = jax.eval_shape(advance, method, block, _seen(answers))
    if reached.partials is None:
      return questions
    questions.append(reached.partials)
    with jax.enable_x64(True):
      answers.append(
        jax.eval_shape(
          functools.partial(answer, method, block),
          _totals(reached.partials),
          answers,
        )
      )


@jax.disable_jit(False)  # which is part of the text
def program(method: Any, block: Block) -> str:
  """What a rule computes, as text: its code, but for its own numbers.

  Args:
    method: a rule.
    block: as for `asked`.
  """
  texts = []
  answers = []
  for partials in asked(method, block):
    texts.append(advance.lower(method, block, _seen(answers)).as_text())
    with jax.enable_x64(True):
      answered = jax.jit(answer).lower(
        method, block, _totals(partials), answers
      )
    texts.append(answered.as_text())
    answers.append(answered.out_info)
  texts.append(advance.lower(method, block, _seen(answers)).as_text())
  return '\n'.join(texts)


def _seen(answers: PyTree) -> PyTree:
  """Answers as rules see them: jax warns of 64 bits where it has 32."""
  return jax.tree.map(narrow_spec, answers)


def _totals(partials: PyTree) -> PyTree:
  return jax.eval_shape(functools.partial(jax.tree.map, widen), partials)


def is_random(method: Any, experts: int, rank: int = 2) -> bool:
  """Whether a rule draws random numbers, found without data.

  Args:
    method: a rule.
    experts: how many it merges.
    rank: number of dimensions of a leaf.
  """
  try:
    asked(method, stand_in((2,) * rank, experts, has_base=True))
  except NoKeyError:
    return True
  return False


def tells_layers_apart(method: Any, experts: int, rank: int) -> bool:
  """Whether it matters to a rule that a leaf holds several layers.

  Args:
    method: a rule.
    experts: how many it merges.
    rank: number of dimensions of the leaf.
  """
  if needs_of(method) != 'element' or is_random(method, experts, rank):
    return True
  block = stand_in((2,) * rank, experts, has_base=True)
  return scope_of(method) == 'tensor' and bool(asked(method, block))


def stand_in(
  shape: tuple[int, ...], experts: int, has_base: bool, key: Any = None
) -> Block:
  """A block of shapes, to trace rules with."""
  values = jax.ShapeDtypeStruct(shape, jnp.float32)
  return Block(
    base=values if has_base else None,
    experts=[values] * experts,
    key=key,
    origin=(0,) * len(shape),
    whole=shape,
    stacked=(),
    dtype=values.dtype,
  )
