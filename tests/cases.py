"""THE table: every method through every guarantee. A new method is a row."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import mergekit_jax as mk
from tests import reference
from tests.slerp import Slerp


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A method and what is true of it.

  Attributes:
    name: the test id.
    rule: the method.
    expected: `(experts, base, key) -> {name: float64}`, from reference.py.
    family: 'elementwise', 'threshold', 'random' or 'gram'.
    rounds: full reads before the last one.
    other: the same method with other numbers, which must not recompile it.
    symmetric: whether the order of the experts is of no account.
    identical: the method with the numbers for which N identical experts merge
      to that expert. Every row of METHODS has one, of other rows it is None.
    experts: how many experts it takes.
  """

  name: str
  rule: Any
  expected: Callable
  family: str
  rounds: int
  other: Any = None
  symmetric: bool = False
  identical: Any = None
  experts: int = 3

  def __repr__(self):
    return self.name


def _case(name, make, expected, family, rounds, *, other=None, **others):
  """A row whose rule and reference take the same options."""
  options = others.pop('options', {})
  return Case(
    name,
    make(**options),
    functools.partial(expected, **options),
    family,
    rounds,
    other=make(**(options if other is None else other)),
    **others,
  )


METHODS = [
  _case(
    'average',
    mk.average,
    reference.average,
    'elementwise',
    0,
    symmetric=True,
    identical=mk.average(),
  ),
  _case(
    'task_arithmetic',
    mk.task_arithmetic,
    reference.task_arithmetic,
    'elementwise',
    0,
    options={'scale': 0.4},
    other={'scale': 1},
    symmetric=True,
    identical=mk.task_arithmetic(1 / 3),
  ),
  _case(
    'ties',
    mk.ties,
    reference.ties,
    'threshold',
    2,
    options={'density': 0.3, 'scale': 0.7},
    other={'density': 1, 'scale': 2.0},
    symmetric=True,
    identical=mk.ties(density=1.0),
  ),
  _case(
    'dare',
    mk.dare,
    reference.dare,
    'random',
    0,
    options={'drop_rate': 0.6, 'scale': 0.4},
    other={'drop_rate': 0.9, 'scale': 1.5},
    identical=mk.dare(drop_rate=0.0, scale=1 / 3),
  ),
  _case(
    'dare_ties',
    mk.dare_ties,
    reference.dare_ties,
    'random',
    0,
    options={'drop_rate': 0.6, 'scale': 0.7},
    other={'drop_rate': 0.25, 'scale': 1.5},
    identical=mk.dare_ties(drop_rate=0.0),
  ),
  _case(
    'slerp',
    Slerp,
    reference.slerp,
    'gram',
    1,
    options={'fraction': 0.3},
    other={'fraction': 0.8},
    identical=Slerp(0.5),
    experts=2,
  ),
]

# Options of the same methods: they meet the reference, and declare rounds.
VARIANTS = [
  _case(
    'average_weighted',
    mk.average,
    reference.average,
    'elementwise',
    0,
    options={'weights': [1, 0.5, 3]},
  ),
  _case(
    'task_arithmetic_negated',
    mk.task_arithmetic,
    reference.task_arithmetic,
    'elementwise',
    0,
    options={'scale': 0.4, 'weights': [1, -0.5, 2]},
  ),
  _case(
    'ties_density_one',
    mk.ties,
    reference.ties,
    'threshold',
    2,
    options={'density': 1.0},
  ),
  _case(
    'ties_tensor_weighted',
    mk.ties,
    reference.ties,
    'threshold',
    2,
    options={'density': 0.25, 'scope': 'tensor', 'weights': [1, 0.5, 2]},
  ),
  _case(
    'ties_count',
    mk.ties,
    reference.ties,
    'threshold',
    2,
    options={'density': 0.7, 'election': 'count'},
  ),
  _case(
    'ties_majority',
    mk.ties,
    reference.ties,
    'threshold',
    3,
    options={'density': 0.7, 'zero_mass': 'majority'},
  ),
  _case(
    'ties_majority_of_tensor_by_count',
    mk.ties,
    reference.ties,
    'threshold',
    3,
    options={
      'density': 0.7,
      'scope': 'tensor',
      'election': 'count',
      'zero_mass': 'majority',
    },
  ),
  _case(
    'ties_sum',
    mk.ties,
    reference.ties,
    'threshold',
    2,
    options={'density': 0.7, 'combine': 'sum', 'weights': [1, 0.5, 2]},
  ),
  _case(
    'dare_weighted',
    mk.dare,
    reference.dare,
    'random',
    0,
    options={'weights': [1, -0.5, 2]},
  ),
  _case(
    'dare_ties_majority',
    mk.dare_ties,
    reference.dare_ties,
    'random',
    1,
    options={'drop_rate': 0.5, 'zero_mass': 'majority'},
  ),
  _case(
    'dare_ties_sum',
    mk.dare_ties,
    reference.dare_ties,
    'random',
    0,
    options={'drop_rate': 0.5, 'combine': 'sum'},
  ),
  _case(
    'dare_ties_trimmed',
    mk.dare_ties,
    reference.dare_ties,
    'random',
    2,
    options={'drop_rate': 0.5, 'density': 0.2},
  ),
]

ALL = [*METHODS, *VARIANTS]
# One of each family; what only the family decides is tested with these.
FAMILIES = list({case.family: case for case in reversed(METHODS)}.values())
