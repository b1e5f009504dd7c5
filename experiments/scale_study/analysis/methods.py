"""The merge methods of the study, in the order in which they are shown.

Keys are functions of `mergekit_jax`; any other method of the library joins by
an entry here, and one in `methods` of a preset.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Method(NamedTuple):
  """How a method is shown.

  Attributes:
    title: for people.
    color: in figures.
    marker: in figures.
  """

  title: str
  color: str
  marker: str


METHODS: Mapping[str, Method] = {
  'average': Method('Averaging', '#000000', 'o'),
  'task_arithmetic': Method('Task arithmetic', '#0072b2', 's'),
  'dare_ties': Method('Dare-TIES', '#cc79a7', 'D'),
  'ties': Method('TIES', '#d55e00', '^'),
}
