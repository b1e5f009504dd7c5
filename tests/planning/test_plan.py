"""The plan: boxes that tile every tensor, what is read when, and memory."""

import collections
import dataclasses
import math
import operator
import timeit
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax import sharding
from mergekit_jax.driving import questions
from mergekit_jax.forecasting import forecast
from mergekit_jax.jobs import job
from mergekit_jax.planning import costs, planner
from tests import checkpoints

FLOAT32 = jnp.dtype('float32')
BFLOAT16 = jnp.dtype('bfloat16')
MESHES = {
  'one': {'fsdp': 1},
  'three': {'fsdp': 3},
  'eight': {'fsdp': 8},
  'two axes': {'fsdp': 4, 'tensor': 2},
}
# Scalars, fewer rows than devices, primes, vectors, empty axes.
SHAPES = [
  (),
  (1,),
  (5,),
  (1_000_003,),
  (3, 5),
  (2, 200_003),
  (509, 1021),
  (1024, 512),
  (7, 11, 13, 17),
  (61, 3, 1009),
  (0, 4),
]
BUDGETS = [2**23, 2**25, 2**32]


def mesh_of(name):
  return sharding.make_mesh(MESHES[name])


def leaf(path, shape, models=3, dtype=FLOAT32, **options):
  return costs.Leaf(path, shape, (dtype,) * models, dtype, **options)


def plan_of(rule, leaves, mesh='eight', budget=2**32, **options):
  return planner.make_plan(
    [((rule,), leaves)],
    mesh_of(mesh),
    memory_budget=budget,
    has_base=True,
    **options,
  )


@mk.rule
class Whole:
  """Looks at no more than it says it needs."""

  needs: str

  def __call__(self, t):
    return t.experts[0]


row_rule, matrix_rule = Whole('row'), Whole('matrix')


def boxes_of(rules, one, mesh='one', budget=2**32, **options):
  """The only leaf of a plan, of one rule or of several."""
  rules = rules if isinstance(rules, tuple) else (rules,)
  (scope,) = planner.make_plan(
    [(rules, [one])],
    mesh_of(mesh),
    memory_budget=budget,
    has_base=True,
    **options,
  ).scopes
  return scope.tensors


def demand_tiling(tensor, mesh):
  """Boxes and the parts of their devices hold each element exactly once."""
  assert tensor.boxes, 'an empty leaf is written as well'
  seen = np.zeros(tensor.shape, np.int8)
  for box in tensor.boxes:
    ends = map(operator.add, box.origin, box.shape)
    index = tuple(map(slice, box.origin, ends))
    assert seen[index].shape == box.shape  # nothing beyond the tensor
    counts = sharding.shards(box.spec, len(box.shape), mesh)
    assert all(n % c == 0 for n, c in zip(box.shape, counts, strict=True))
    seen[index] += 1
  assert (seen == 1).all()


class TestBoxes:
  @pytest.mark.parametrize('budget', BUDGETS)
  @pytest.mark.parametrize('mesh', MESHES)
  def test_tile(self, mesh, budget):
    leaves = [leaf(str(i), shape) for i, shape in enumerate(SHAPES)]
    planned = plan_of(mk.average(), leaves, mesh, budget)
    (scope,) = planned.scopes
    for tensor, shape in zip(scope.tensors, SHAPES, strict=True):
      assert tensor.shape == shape
      demand_tiling(tensor, planned.mesh)
    assert planned.host_bytes <= budget
    if budget == BUDGETS[0]:
      cut = {t.shape for t in scope.tensors if len(t.boxes) > 2}
      assert cut >= {(1_000_003,), (509, 1021)}

  @pytest.mark.parametrize('mesh', ['three', 'eight', 'two axes'])
  @pytest.mark.parametrize('axes', [(0,), (1,), (0, 1), (2,)])
  def test_stacked(self, mesh, axes):
    """Stacked axes are cut first and never sharded."""
    shape = (7, 6, 509, 67)
    stacked = leaf('layers', shape, stacked=axes)
    for budget in (2**23, 2**25):
      planned = plan_of(mk.task_arithmetic(), [stacked], mesh, budget)
      (tensor,) = planned.scopes[0].tensors
      demand_tiling(tensor, planned.mesh)
      for box in tensor.boxes:
        assert all(box.spec[axis] is None for axis in axes)

  def test_layers_are_cut_first(self):
    """Two layers fit: each box holds whole layers, though rows would do."""
    stacked = leaf('layers', (300, 9, 400), stacked=(1,))
    # An element is read twice over in 3 models, written twice, and flagged; the
    # kernel has 2**17 of them under way.
    budget = 3 * (24 + 8 + 1) * 300 * 400 + 2**17 * 4 * 4 - 1
    planned = plan_of(mk.average(), [stacked], 'one', budget)
    (tensor,) = planned.scopes[0].tensors
    assert {(box.shape[0], box.shape[2]) for box in tensor.boxes} == {
      (300, 400)
    }
    assert {box.shape[1] for box in tensor.boxes} <= {1, 2}

  def test_large_parts_are_sharded_and_small_ones_are_not(self):
    leaves = [leaf('large', (4096, 1024)), leaf('small', (64, 64))]
    large, small = plan_of(mk.average(), leaves).scopes[0].tensors
    assert [box.spec for box in large.boxes] == [jax.P('fsdp', None)]
    assert [box.spec for box in small.boxes] == [jax.P(None, None)]

  @pytest.mark.parametrize('kind', [tuple, list, lambda given: jax.P(*given)])
  def test_partition_rules(self, kind):
    planned = plan_of(
      mk.average(),
      [leaf('a/kernel', (18, 9)), leaf('b/kernel', (18, 9))],
      'two axes',
      partition_rules={'a/.*': kind([None, ('tensor', 'fsdp')])},
    )
    first, second = planned.scopes[0].tensors
    assert [(box.shape, box.spec) for box in first.boxes] == [
      ((18, 8), jax.P(None, ('tensor', 'fsdp'))),
      ((18, 1), jax.P(None, None)),
    ]
    assert [box.spec for box in second.boxes] == [jax.P(None, None)]

  @pytest.mark.parametrize('needs', ['row', 'matrix'])
  def test_of_rules_that_need_more_than_elements(self, needs):
    needs_ = needs

    @mk.rule
    class Rule:
      needs: ClassVar[str] = needs_

      def __call__(self, t):
        return t.experts[0]

    shape = (4, 600, 500)
    weights = leaf('kernel', shape)
    stacked = leaf('kernel', shape, stacked=(0,))
    # The whole leaf takes 58 MB, a layer 14 MB.
    (tensor,) = plan_of(Rule(), [stacked], 'one', 20 * 10**6).scopes[0].tensors
    assert {box.shape[1:] for box in tensor.boxes} == {shape[1:]}
    assert len(tensor.boxes) > 1
    if needs == 'matrix':
      with pytest.raises(ValueError, match='is too small'):
        plan_of(Rule(), [weights], 'one', 20 * 10**6)
      return
    (tensor,) = plan_of(Rule(), [weights], 'one', 20 * 10**6).scopes[0].tensors
    assert {box.shape[2] for box in tensor.boxes} == {shape[2]}
    assert len(tensor.boxes) > 1

  def test_rows_stay_whole_though_they_are_the_long_side(self):
    (tensor,) = boxes_of(row_rule, leaf('a', (600, 2000)), budget=20 * 10**6)
    assert {box.shape[1] for box in tensor.boxes} == {2000}
    assert len(tensor.boxes) > 1
    # Nor may a remainder be cut off: 9 columns do not go over 2 devices.
    columns = {'a': jax.P(None, 'tensor')}
    (tensor,) = boxes_of(
      row_rule, leaf('a', (18, 9)), mesh='two axes', partition_rules=columns
    )
    (box,) = tensor.boxes
    assert (box.shape, box.spec) == ((18, 9), jax.P(None, None))

  def test_one_rule_that_needs_the_whole_decides_for_all(self):
    """And for no leaf but its own, though one may be of the same shape."""
    large = (4000, 2000)  # 96 MB in 3 models
    (tensor,) = boxes_of((mk.average(), matrix_rule), leaf('a', large))
    assert len(tensor.boxes) == 1
    alone, whole = planner.make_plan(
      [
        ((mk.average(),), [leaf('a', large)]),
        ((matrix_rule,), [leaf('b', large)]),
      ],
      mesh_of('one'),
      memory_budget=2**32,
      has_base=True,
    ).scopes
    assert len(alone.tensors[0].boxes) > 1
    assert len(whole.tensors[0].boxes) == 1

  def test_what_asks_nothing_saves_no_reads(self):
    """A rule without rounds beside one whose layers are read once."""
    rules = (mk.ties(scope='tensor'), mk.dare_ties())
    (tensor,) = boxes_of(rules, leaf('a', (4000, 2000)))
    assert len(tensor.boxes) == 1

  @pytest.mark.parametrize(
    'column, width', [(1024, 1024), (64, 4096), (1500, 4096)]
  )
  def test_boxes_are_as_wide_as_what_lies_in_one_piece(self, column, width):
    """Unless that is less than 4 MiB, or leaves a rest."""
    stored = leaf('a', (4096, 4096), stored=(4096, column))
    (tensor,) = boxes_of(mk.average(), stored)
    assert {box.shape[1] for box in tensor.boxes} == {width}

  def test_partial_sums_of_layers_take_no_more_than_8_mib(self):
    """Of two experts 2**16 counts of 4 bytes each are half a MiB a layer."""
    stack = leaf('a', (64, 4, 4), stacked=(0,))
    (tensor,) = boxes_of(mk.ties(scope='tensor'), stack)
    assert {box.shape for box in tensor.boxes} == {(16, 4, 4)}

  def test_a_budget_that_is_just_enough(self):
    large = leaf('a', (1000, 700))
    planned = plan_of(mk.average(), [large], 'one')
    again = plan_of(mk.average(), [large], 'one', planned.host_bytes)
    assert again.scopes == planned.scopes

  def test_parts_leave_the_least_over(self):
    """Every part size from the largest that fits to half of it is looked at."""
    generator = np.random.default_rng(0)
    for _ in range(300):
      shards = int(generator.integers(1, 9))
      rows = int(generator.integers(2, 4000))
      most = int(generator.integers(1, rows))
      step = int(generator.integers(1, 40))
      compressed = bool(generator.integers(2))
      made = leaf('a', (rows * shards,))
      if compressed:
        made = dataclasses.replace(made, chunk=(step * shards,))
      step = step if compressed and step <= most else 1
      fewest = most // 2 + 1 if shards == 1 else math.ceil(most / 4)
      parts = [n for n in range(most, fewest - 1, -1) if n % step == 0]
      left = [rows % part for part in parts]
      expected = parts[left.index(min(left))]
      assert planner._part(most, shards, made, 0) == expected

  def test_boxes_are_about_as_large_as_may_be(self):
    """None but the last is smaller than half of what may be.

    When boxes were halved until they fit, 188 layers of 1 MiB in five models
    became sixes, where fourteen take the 72 MiB.
    """
    for layers in range(1, 400):
      stack = leaf('a', (layers, 512, 512), 5, stacked=(0,))
      (tensor,) = plan_of(mk.average(), [stack], 'one').scopes[0].tensors
      *full, rest = [box.shape[0] for box in tensor.boxes]
      assert max([*full, rest]) * 5 * 2**20 <= 72 * 2**20, layers
      assert all(size > 7 for size in full), layers
      assert sum([*full, rest]) == layers

  def test_a_long_vector(self):
    """It is planned as fast as a short one that makes as many boxes."""

    def seconds(rows, most):
      made = leaf('a', (rows,))
      run = lambda: planner._part(most, 1, made, 0)
      return min(timeit.repeat(run, number=10, repeat=3))

    assert seconds(2**30 - 1, 2**21) < 10 * seconds(2**20 - 1, 2**11)


@mk.rule
class AsksRank:
  """Asks for a float for each dimension, about the whole model."""

  needs: str
  scope: str = 'model'

  def __call__(self, t):
    seen = yield mk.Total(jnp.ones(t.base.ndim), lambda total, answers: total)
    return t.base + seen[0]


class TestCosts:
  """Bytes, counted by hand."""

  def costs(self, merges=1):
    return costs.Costs(
      mesh_of('one'),
      2**32,
      has_base=True,
      decoding_bytes=0,
      merges=merges,
      hosts=None,
    )

  def test_the_host_that_holds_most_of_the_mesh_counts(self):
    devices = np.array(
      [types.SimpleNamespace(process_index=i) for i in (0, 0, 0, 0, 1, 1)]
    )
    found = costs.Costs(
      types.SimpleNamespace(devices=devices, size=6),  # pyright: ignore
      2**32,
      has_base=True,
      decoding_bytes=0,
      merges=1,
      hosts=None,
    )
    assert (found.hosts, found.held((600,), 6)) == (2, 400)

  @pytest.mark.parametrize('merges', [1, 3])
  def test_each_merge_is_written(self, merges):
    """1000 elements of 3 models, read ahead once and written behind once."""
    read, flags, computed = 2 * 12, 1, 4 * 4
    written = 2 * 4 * merges
    taken = self.costs(merges).of(
      (mk.average(),), leaf('a', (1000,)), (1000,), 1
    )
    assert taken == 1000 * (read + written + flags + computed)

  def test_what_is_not_cut_into_slices_is_computed_at_once(self):
    shape = (2**18,)
    given = leaf('a', shape), shape, 1
    sliced = self.costs().of((mk.average(),), *given)
    for rules in (matrix_rule,), (mk.average(), matrix_rule):
      whole = self.costs().of(rules, *given)
      # A float32 for each of 3 models and one more, of 2**18 and not 2**17.
      assert whole - sliced == 2**17 * 4 * 4

  @pytest.mark.parametrize(
    'rule, expected',
    [
      # 2**16 counts of two experts, in int32 and in int64.
      (mk.ties(scope='tensor'), 8 * 4 * 2 * 2**16),
      (mk.ties(scope='model'), 8 * 2 * 2**16),
      # Two float64 for the two dimensions of a layer.
      (AsksRank('element'), 8 * 2),
      (AsksRank('matrix'), 8 * 8 * 2),
    ],
    ids=['layers', 'model', 'slices', 'whole layers'],
  )
  def test_partial_sums(self, rule, expected):
    """Of all layers, unless slices of any layer are added up at once."""
    stack = leaf('a', (8, 4, 4), stacked=(0,))
    taken = self.costs().partial_bytes((rule,), stack, stack.shape)
    assert taken == expected

  def test_partial_sums_may_depend_on_the_rank(self):
    rule, found = AsksRank('element'), self.costs()
    for shape in (5,), (5, 3), (5, 3, 2):
      taken = found.partial_bytes((rule,), leaf('a', shape), shape)
      assert taken == 8 * len(shape)


class TestReads:
  def test_order(self):
    """All reads of a round come before the next; the last ones are written."""
    leaves = [leaf(name, (300, 400)) for name in 'ab']
    rules = [
      ((mk.ties(),), leaves),
      ((mk.average(),), [leaf('c', (600, 400))]),
      ((), [leaf('count', (4,), 1)]),
    ]
    planned = planner.make_plan(
      rules, mesh_of('one'), memory_budget=7 * 10**6, has_base=True
    )
    units = list(planned.units())
    assert [scope.rounds for scope in planned.scopes] == [(2,), (0,), ()]
    assert planned.rounds == 2
    order = [(unit.scope, -unit.rounds_left) for unit in units]
    assert order == sorted(order)
    assert {*order} == {(0, -2), (0, -1), (0, 0), (1, 0), (2, 0)}
    boxes = {
      tensor.path: len(tensor.boxes)
      for scope in planned.scopes
      for tensor in scope.tensors
    }
    assert min(boxes['a'], boxes['c']) > 1
    counted = collections.Counter((u.tensor.path, u.rounds_left) for u in units)
    assert counted == {
      **{(path, round_): boxes[path] for path in 'ab' for round_ in range(3)},
      ('c', 0): boxes['c'],
      ('count', 0): 1,
    }
    assert [unit.number for unit in units] == list(range(len(units)))
    for unit, following in zip(units, [*order[1:], None], strict=True):
      ends = (unit.scope, -unit.rounds_left) != following
      if unit.scope == 0:
        assert unit.ends_scope == ends

  def test_once(self):
    """A tensor that is a scope of its own and fits is read once."""
    rule = mk.ties(scope='tensor')
    small = leaf('small', (30, 40))
    large = leaf('large', (1000, 700))
    layers = leaf('layers', (50, 100, 700), stacked=(0,))

    def reads(rule, *where):
      (scope,) = plan_of(rule, *where).scopes
      (tensor,) = scope.tensors
      return scope.reads(tensor), len(tensor.boxes) > 1

    assert reads(rule, [small], 'one', 12 * 10**6) == (1, False)
    assert reads(rule, [large], 'one', 12 * 10**6) == (3, True)
    assert reads(rule, [layers], 'one', 12 * 10**6) == (1, True)
    # Over the whole model nothing is; without rounds everything is.
    assert reads(mk.ties(), [small]) == (3, False)
    assert reads(mk.dare(), [large], 'one', 2**22) == (1, True)

  def test_bytes(self):
    mixed = costs.Leaf('a', (10, 7), (FLOAT32, BFLOAT16, FLOAT32), BFLOAT16)
    copied = costs.Leaf('n', (3,), (jnp.dtype('int64'),), jnp.dtype('int64'))
    rules = [((mk.ties(),), [mixed]), ((), [copied])]
    planned = planner.make_plan(
      rules, mesh_of('one'), memory_budget=2**30, has_base=True
    )
    assert planned.bytes_read == 3 * 70 * 10 + 24
    assert planned.bytes_written == 70 * 2 + 24
    assert planned.bytes_read == sum(u.source_bytes for u in planned.units())

  @pytest.mark.parametrize(
    'rule',
    [mk.average(), mk.ties(), mk.ties(scope='tensor')],
    ids=['average', 'ties', 'ties_tensor'],
  )
  def test_budget(self, rule):
    """A smaller budget is kept as well, and only the boxes change."""
    leaves = [leaf(str(i), shape) for i, shape in enumerate(SHAPES)]
    counts = []
    for budget in (12 * 10**6, 2**24, 2**26, 2**30):
      planned = plan_of(rule, leaves, 'eight', budget)
      assert planned.host_bytes <= budget == planned.memory_budget
      counts.append(sum(len(t.boxes) for t in planned.scopes[0].tensors))
      assert planned.bytes_written == 4 * sum(map(math.prod, SHAPES))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]

  def test_more_experts_take_smaller_boxes(self):
    """Not more memory: boxes are halved, so within a factor of two or so."""
    shape = (32, 4096, 11008)
    taken = [
      plan_of(
        mk.task_arithmetic(),
        [leaf('a', shape, models, BFLOAT16, stacked=(0,))],
      ).host_bytes
      for models in (3, 5, 9, 17, 33)
    ]
    assert max(taken) < 2.2 * min(taken)
    assert taken[2] < 1.2 * taken[0]  # eight experts, and two

  def test_decoding_counts(self):
    large = leaf('a', (1000, 700))
    plain = plan_of(mk.average(), [large], 'one', 2**23)
    decoded = plan_of(mk.average(), [large], 'one', 2**23, decoding_bytes=2**22)
    boxes = [p.scopes[0].tensors[0].boxes for p in (plain, decoded)]
    assert len(boxes[0]) < len(boxes[1])
    with pytest.raises(ValueError, match='is too small'):
      plan_of(mk.average(), [large], 'one', 2**23, decoding_bytes=2**23)


class TestCompressedChunks:
  def test_boxes_end_on_chunk_borders(self):
    chunked = leaf('a', (1024, 512), chunk=(96, 512))
    # Half of the leaf fits, a third of a chunk need not be decoded twice.
    (tensor,) = plan_of(mk.average(), [chunked], 'one', 2**24).scopes[0].tensors
    starts = [box.origin[0] for box in tensor.boxes]
    assert len(starts) > 1
    assert all(start % 96 == 0 for start in starts)
    # What is decoded in vain is the padding of the last chunk.
    assert tensor.amplification == pytest.approx(11 * 96 / 1024)

  @pytest.mark.parametrize('width', [512, 128])
  def test_amplification(self, width):
    """Boxes inside of one chunk share it; those across several decode all."""
    chunked = leaf('a', (1024, 512), chunk=(1024, width))
    (tensor,) = plan_of(mk.average(), [chunked], 'one', 2**22).scopes[0].tensors
    assert len(tensor.boxes) > 1
    assert {box.shape[1] for box in tensor.boxes} == {512}
    expected = 1 if width == 512 else len(tensor.boxes)
    assert tensor.amplification == expected
    plain = leaf('a', (1024, 512))
    (tensor,) = plan_of(mk.average(), [plain], 'one', 2**22).scopes[0].tensors
    assert tensor.amplification == 1

  @pytest.mark.parametrize(
    'scope,budget', [('model', 2**32), ('tensor', 2**30)]
  )
  def test_a_stack_is_decoded_once_a_read(self, scope, budget):
    """The save-time shards of a stack hold columns of all its layers.

    Whole layers would be read once, but each box of them decodes all shards.
    """
    shard = (128, 512, 128)
    stack = leaf('a', (128, 512, 1024), stacked=(0,), chunk=shard, stored=shard)
    plan = plan_of(mk.ties(scope=scope), [stack], 'one', budget)
    (planned,) = plan.scopes
    (tensor,) = planned.tensors
    assert [box.shape for box in tensor.boxes] == [shard] * 8
    assert (planned.reads(tensor), tensor.amplification) == (3, 1)

  def test_a_stack_that_fits_the_budget_is_decoded_once(self):
    """A third of what its columns take, for boxes larger than others are."""
    shard = (128, 512, 128)
    stack = leaf('a', (128, 512, 1024), stacked=(0,), chunk=shard, stored=shard)
    plan = plan_of(mk.ties(scope='tensor'), [stack], 'one')
    (planned,) = plan.scopes
    (tensor,) = planned.tensors
    assert [box.shape for box in tensor.boxes] == [stack.shape]
    assert (planned.reads(tensor), tensor.amplification) == (1, 1)
    assert plan.host_bytes <= plan.memory_budget

  def test_whole_layers_are_read_once_where_that_decodes_less(self):
    layer = (1, 512, 1024)
    rows = leaf('a', (32, 512, 1024), stacked=(0,), chunk=layer, stored=layer)
    (planned,) = plan_of(mk.ties(scope='tensor'), [rows], 'one').scopes
    (tensor,) = planned.tensors
    assert {box.shape for box in tensor.boxes} == {(16, 512, 1024)}
    assert (planned.reads(tensor), tensor.amplification) == (1, 1)

  def test_layers_that_are_decoded_as_often_are_read_once(self):
    """3 boxes that each decode all, or 3 reads of a third: the same."""
    shard = (3, 2048, 512)
    stack = leaf('a', (3, 2048, 4096), stacked=(0,), chunk=shard, stored=shard)
    rule = mk.ties(scope='tensor')
    plan = plan_of(rule, [stack], 'one', 2**29)
    (tensor,) = plan.scopes[0].tensors
    assert {box.shape for box in tensor.boxes} == {(1, 2048, 4096)}
    assert tensor.amplification == 3

  @pytest.mark.parametrize('rule,reads', [(mk.ties(), 3), (mk.average(), 1)])
  def test_boxes_of_a_chunk_follow_each_other(self, rule, reads):
    """So that what is decoded for the first of them serves the others."""
    shard = (64, 512, 512)
    stack = leaf('a', (64, 512, 1024), stacked=(0,), chunk=shard, stored=shard)
    plan = plan_of(rule, [stack], 'one')
    columns = [unit.box.origin[2] // 512 for unit in plan.units()]
    assert columns == [0, 0, 1, 1] * reads
    assert plan.scopes[0].tensors[0].amplification == 1

  def test_layers_with_totals_of_their_own_are_decoded_apart(self):
    shard = (64, 512, 512)
    stack = leaf('a', (64, 512, 1024), stacked=(0,), chunk=shard, stored=shard)
    plan = plan_of(mk.ties(scope='tensor'), [stack], 'one', 2**29)
    (tensor,) = plan.scopes[0].tensors
    layers = {(box.origin[0], box.shape[0]) for box in tensor.boxes}
    assert len(layers) > 1
    assert tensor.amplification == len(layers)

  def test_is_printed(self, tmp_path):
    paths = {}
    for compress in (False, True):
      directory = tmp_path / str(compress)
      base, (expert,) = checkpoints.save_set(
        directory, {'kernel': (4, 200, 150)}, experts=1, compress=compress
      )
      planned = job.make_job(
        [mk.ties(scope='tensor')],
        [expert],
        base,
        memory_budget=20_000_000,
        stacked_axes={'.*kernel': 0},
      )
      (tensor,) = planned.plan.scopes[0].tensors
      assert len(tensor.boxes) == 2
      paths[compress] = forecast.describe(planned.plan)
    assert 'compressed chunks' not in paths[False]
    assert 'up to 2.00 bytes decoded' in paths[True]
    assert 'params/kernel' in paths[True]


class TestLinear:
  def test_rules_are_traced_once(self, monkeypatch):
    """20,000 tensors, and a rule is traced no more often than for two."""
    calls = collections.Counter()
    asked = questions.asked

    def spy(*arguments):
      calls['asked'] += 1
      return asked(*arguments)

    monkeypatch.setattr(questions, 'asked', spy)
    rule = mk.ties(scope='tensor')
    for size in (2, 20_000):
      calls.clear()
      scopes = [((rule,), [leaf(str(i), (64, 64))]) for i in range(size)]
      planned = planner.make_plan(
        scopes, mesh_of('eight'), memory_budget=2**30, has_base=True
      )
      assert calls['asked'] == 1
      assert sum(1 for _ in planned.units()) == size
      assert planned.bytes_read == size * 3 * 4 * 64 * 64

  def test_rules_are_asked_once(self):
    """Tensors of which no two are alike, and a rule says its needs as often."""
    asked = collections.Counter()

    @mk.rule
    class Counted:
      @property
      def needs(self):
        asked['needs'] += 1
        return 'element'

      def __call__(self, t):
        return t.experts[0]

    counts = []
    for size in (2, 200):
      asked.clear()
      leaves = [leaf(str(i), (4096, 512 + i)) for i in range(size)]
      plan_of(Counted(), leaves, 'eight', 2**24)
      counts.append(asked['needs'])
    assert counts[1] == counts[0] > 0

  @pytest.mark.parametrize(
    'rule', [mk.average(), mk.ties()], ids=['average', 'ties']
  )
  def test_work(self, rule, monkeypatch):
    """Twice the tensors of one shape, and they are cut no more often."""
    calls = collections.Counter()
    of = costs.Costs.of

    def spy(*arguments):
      calls['of'] += 1
      return of(*arguments)

    monkeypatch.setattr(costs.Costs, 'of', spy)
    counts = []
    for size in (500, 1000):
      calls.clear()
      leaves = [leaf(str(i), (4096, 512)) for i in range(size)]
      (scope,) = plan_of(rule, leaves, 'eight', 2**24).scopes
      assert [tensor.path for tensor in scope.tensors] == [
        leaf.path for leaf in leaves
      ]
      counts.append(calls['of'])
    assert counts[1] == counts[0] > 1


@pytest.mark.parametrize('shape', [(0, 16), (16, 0)])
def test_an_empty_leaf_within_a_budget_for_nothing(shape):
  """Its partial sums may be more than the budget; no cut makes them less."""
  with pytest.raises(ValueError, match='memory_budget'):
    plan_of(mk.ties(), [leaf('a', shape, 9)], budget=5 * 10**6)


def test_an_axis_that_is_not_used_makes_no_part_smaller():
  """No dimension has 256 elements, but the second axis goes into one."""
  mesh = jax.sharding.AbstractMesh((256, 8), ('fsdp', 'tensor'))
  spec = sharding.partition((3, 3, 128, 128), mesh, (), smallest=512)
  assert tuple(spec) == (None, None, 'tensor', None)
