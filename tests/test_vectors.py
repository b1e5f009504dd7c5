"""Outputs of the original authors' code, reproduced (see vectors/ops.json).

Every row whose method exists here is merged with the options that mean the same
(`translate`), and matches to 1e-6 unless it is listed in `DIFFERENT`. These
translations say how our options relate to theirs:

* `keep` and `mask_rate` of the authors of TIES and DARE keep int(d·keep) + 1
  and d − int(d·rate) + 1 entries; the density here is that number over d.
* A common weight cancels here and in mergekit; PEFT divides by the number of
  experts that agree, so that a common weight scales the result: `scale`.
* Our drop rate is rounded to 1/65536 and survivors are rescaled by the rounded
  rate; `scale` puts theirs, 1 / (1 − p) or none, in its place.
* Where the mass is exactly 0, the authors take the majority's sign:
  `zero_mass='majority'`.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving.drive import answer, Block
from mergekit_jax.driving.widths import wide_add
from mergekit_jax.rule import Place, step
from tests import reference

FILE = json.loads(
  (pathlib.Path(__file__).parent / 'vectors' / 'ops.json').read_text()
)
ROWS = FILE['vectors']

# The columns of the table of dialects, and the rows in which they show.
DIFFERENT = {
  'combine: a disjoint maximum, where experts that agree differ': (
    [24, 31, 59, 66, 73, 101, 108, 115]
  ),
  'density 1: an error there, all here': [39, 40, 81, 82, 123, 124],
  'kept: nothing of a tensor, an error there, at least one entry here': (
    [61, 62, 63]
  ),
  'kept: nothing of a tensor there, at least one entry here': [152],
  'sum exactly 0: no majority either; negative there (authors), + here': (
    [106, 107, 113, 114, 120]
  ),
  'sum exactly 0: no majority either; dropped there (MergeLM), + here': (
    [109, 116, 121]
  ),
  'kept: one of several equal magnitudes at the cut there, all here': (
    [110, 111, 112, 117, 118, 119, 161, 164, 165, 166, 167]
  ),
  'DARE rescale: by the ratio of L1 norms': [131, 132, 134, 140, 141, 143],
}


def translate(row):
  """The same method here: the rule, and drop masks if the row forces them."""
  case = FILE['cases'][row['case']]
  size = sum(map(len, case['base'].values()))
  params, op, origin = row['params'], row['op'], row['reference']
  scale = params.get('lambda', 1.0)
  authors = origin.startswith(('ties-merging', 'MergeLM'))
  is_sum = 'dis-sum' == params.get('merge') or not params.get('normalize', True)
  combine = 'sum' if is_sum else 'mean'

  if op == 'averaging':
    return mk.average()
  if op == 'task_arithmetic':
    return mk.task_arithmetic(scale * params.get('weight', 1.0))
  if op == 'task_arithmetic_normalized':
    return mk.task_arithmetic(scale / len(case['experts']))

  if op in ('ties', 'ties_count', 'ties_notrim'):
    if op == 'ties_notrim' or params.get('mask_rate') == 0:
      density = 1.0
    elif 'mask_rate' in params:
      density = (size - int(size * params['mask_rate']) + 1) / size
    elif 'keep' in params:
      density = min(1.0, (int(size * params['keep']) + 1) / size)
    else:
      density = params['density']
    if origin.startswith('peft'):
      scale *= params['weight']
    return mk.ties(
      density,
      scale,
      scope='model' if authors else 'tensor',
      election='count' if op == 'ties_count' else 'mass',
      zero_mass='majority' if authors else 'positive',
      combine=combine,
    )

  drop_rate = params['drop_rate']
  kept = 1 - reference.rounded_rate(drop_rate)
  scale *= params.get('weight', 1.0)
  scale *= kept if params['rescale'] is None else kept / (1 - drop_rate)
  if op == 'dare+averaging':
    return mk.dare(drop_rate, scale / len(case['experts']))
  if op in ('dare+task_arithmetic', 'dare_linear'):
    return mk.dare(drop_rate, scale)
  density = None
  if 'param_value_mask_rate' in params:
    density = (size - int(size * params['param_value_mask_rate']) + 1) / size
  return mk.dare_ties(
    drop_rate,
    density,
    scale,
    scope='model' if authors else 'tensor',
    zero_mass='majority' if authors else 'positive',
    combine=combine,
  )


def float32(model):
  return {name: jnp.float32(values) for name, values in model.items()}


@jax.jit
def reach(rule, base, experts, bits, answers):
  """One pass over one tensor whose random bits are given."""
  narrow = {'i': 'int32', 'f': 'float32'}
  answers = jax.tree.map(lambda x: x.astype(narrow[x.dtype.kind]), answers)
  place = Place(base, experts, jnp.int32(0), lambda i: bits[i])
  reached = step(rule(place), answers)
  if reached.request is None:
    return None, reached.returned
  return [total.partial for total in reached.totals], None


def merge_with_masks(rule, base, experts, drop_masks):
  """A driver of its own, with `random_bits` that drop what the masks say."""
  (name,) = base
  base, experts = base[name], [expert[name] for expert in experts]
  # Zero bits are below every drop rate, full ones above.
  bits = jnp.where(jnp.array(drop_masks) == 1, 0, 65535).astype(jnp.uint32)
  block = Block(base, experts, None, (0,), base.shape, (), base.dtype)
  answers = []
  while True:
    partials, merged = reach(rule, base, experts, bits, answers)
    if merged is not None:
      return {name: merged}
    answers.append(answer(rule, block, wide_add([partials]), answers))


def reproduces(row):
  """Whether our merge is theirs to 1e-6. Nothing is, of a row that raises."""
  if 'raises' in row:
    return False
  case = FILE['cases'][row['case']]
  base = float32(case['base'])
  experts = [float32(expert) for expert in case['experts']]
  rule = translate(row)
  if 'drop_mask' in row['params']:
    merged = merge_with_masks(rule, base, experts, row['params']['drop_mask'])
  else:
    merged = mk.merge(rule, experts, base)
  assert merged.keys() == row['output'].keys()
  return all(
    np.allclose(merged[name], output, rtol=0, atol=1e-6)
    for name, output in row['output'].items()
  )


@pytest.mark.parametrize('index', range(len(ROWS)))
def test_row(index):
  different = [name for name, rows in DIFFERENT.items() if index in rows]
  # A difference that is none any more must leave the list.
  assert reproduces(ROWS[index]) == (not different)
  assert len(different) <= 1


def test_differences_are_of_their_kind():
  """The list cannot hide a row that has nothing to do with its reason."""
  kinds = {
    'combine: a disjoint maximum': lambda row: (
      row['params']['merge'] == 'dis-max'
    ),
    'density 1': lambda row: 'kthvalue' in row['raises'],
    'kept: nothing of a tensor, an error': lambda row: 'raises' in row,
    'kept: nothing of a tensor there': lambda row: (
      int(4 * row['params']['density']) == 0
    ),
    'sum exactly 0': lambda row: row['case'] == 'D_majority_zero',
    'kept: one of several': lambda row: row['tie_at_threshold'],
    'DARE rescale': lambda row: row['params']['rescale'] == 'l1',
  }
  listed = sum(DIFFERENT.values(), [])
  assert len(listed) == len(set(listed)) < len(ROWS) / 3
  for reason, rows in DIFFERENT.items():
    (kind,) = [
      test for start, test in kinds.items() if reason.startswith(start)
    ]
    assert all(kind(ROWS[index]) for index in rows), reason


@pytest.mark.parametrize('drop_rate', ['0.5', '0.75'])
def test_drop_has_the_mean_and_variance_of_the_authors(drop_rate):
  """Over all 2^8 masks, as the vectors were made: unbiased, exactly."""
  properties = FILE['dare_properties_exact']['by_drop_rate'][drop_rate]
  delta = np.float32(properties['delta'])
  rate = float(drop_rate)
  masks = np.arange(256)[:, None] >> np.arange(8) & 1  # [256, 8], 1 drops
  probability = np.where(masks, rate, 1 - rate).prod(1)
  bits = jnp.where(masks == 1, 0, 65535).astype(jnp.uint32)
  place = Place(
    jnp.zeros((256, 8)),
    [jnp.broadcast_to(delta, (256, 8))],
    jnp.int32(0),
    lambda i: bits,
  )
  outputs = np.asarray(step(mk.dare(rate)(place), []).returned, np.float64)
  mean = probability @ outputs
  variance = probability @ (outputs - mean) ** 2
  np.testing.assert_allclose(mean, properties['E_MergeLM'], rtol=1e-6)
  np.testing.assert_allclose(variance, properties['Var_MergeLM'], rtol=1e-6)
