"""The merge methods of the study, in the order in which they are shown.

Keys are functions of `mergekit_jax`; any other method of the library joins by
an entry here, and one in `methods` of a preset, and one of your own as
docs/adding_a_method.md says.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Look(NamedTuple):
  """How a method or a base is shown.

  Attributes:
    title: for people.
    color: in figures.
    marker: in figures.
  """

  title: str
  color: str
  marker: str


METHODS: Mapping[str, Look] = {
  'average': Look('Averaging', '#000000', 'o'),
  'task_arithmetic': Look('Task arithmetic', '#0072b2', 's'),
  'dare_ties': Look('Dare-TIES', '#cc79a7', 'D'),
  'ties': Look('TIES', '#d55e00', '^'),
}
