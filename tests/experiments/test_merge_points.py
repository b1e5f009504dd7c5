"""Which merges a preset asks for, listed by hand."""

from types import SimpleNamespace

import pytest

from experiments.scale_study import merge_points
from experiments.scale_study.merge_points import Merge
from experiments.scale_study.study_config import MethodGrid

_TIES = MethodGrid({'density': 0.2, 'scale': 1.0}, {'scale': (0.5, 1.5)})


def preset(sweeps=(), **methods):
  return SimpleNamespace(methods=methods, sweeps=dict(sweeps))


def test_the_order_of_hyperparameters_makes_no_other_merge():
  one = Merge.of('ties', {'scale': 1.0, 'density': 0.2})
  assert one == Merge.of('ties', {'density': 0.2, 'scale': 1.0})


def test_what_is_not_chosen_is_as_it_is_fixed():
  config = preset(ties=_TIES)
  found = merge_points.candidates(config)['ties']
  assert [merge.values for merge in found] == [
    {'density': 0.2, 'scale': 0.5},
    {'density': 0.2, 'scale': 1.5},
  ]
  fixed = merge_points.fixed(config)['ties']
  assert fixed.values == {'density': 0.2, 'scale': 1.0}


def test_sweeps_that_meet_share_a_point():
  sweeps = {'ties': {'density': (0.1, 0.2), 'scale': (1.0, 2.0)}}
  found = merge_points.swept(preset(sweeps, ties=_TIES))
  assert [(m.values['density'], m.values['scale']) for m in found] == [
    (0.1, 1.0),
    (0.2, 1.0),
    (0.2, 2.0),
  ]


def test_a_fixed_value_is_checked_though_others_are_chosen_from():
  grid = MethodGrid({'density': 2.0}, {'density': (0.5,)})
  with pytest.raises(ValueError, match='ties .*density=2'):
    merge_points.demand_rules(preset(ties=grid))
