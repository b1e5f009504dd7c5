"""What a plan says it costs, against figures worked out by hand."""

import collections
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax import sharding
from mergekit_jax.driving import drive, reported
from mergekit_jax.driving import measure as measuring
from mergekit_jax.forecasting import compiled, forecast
from mergekit_jax.jobs import caveats, job
from mergekit_jax.planning import costs, planner
from mergekit_jax.streaming import programs
from tests import checkpoints, compare, models

FLOAT32 = jnp.dtype('float32')


def plan_of(rule, shapes, axes, models=3, hosts=None, stacked=None, **options):
  stacked = stacked or {}
  leaves = [
    costs.Leaf(path, shape, (FLOAT32,) * models, FLOAT32, stacked.get(path, ()))
    for path, shape in shapes.items()
  ]
  mesh = sharding.make_mesh(axes)
  return planner.make_plan(
    [((rule,), leaves)],
    mesh,
    memory_budget=2**32,
    has_base=True,
    hosts=hosts,
    **options,
  )


class TestHostBytes:
  # Two devices on each of four hosts: (0, 0) and (0, 1) on the first.
  @pytest.mark.parametrize(
    ('spec', 'read', 'written'),
    [
      ((None, None), 1, 1),  # all read all, the first writes
      (('fsdp', None), 1 / 4, 1 / 4),
      (('tensor', None), 1, 1),  # the devices of a host hold both parts
      (('fsdp', 'tensor'), 1 / 4, 1 / 4),
      ((None, ('tensor', 'fsdp')), 1 / 4, 1 / 4),
    ],
  )
  def test_shares(self, spec, read, written):
    plan = plan_of(
      mk.task_arithmetic(),
      {'a': (16, 24)},
      {'fsdp': 4, 'tensor': 2},
      hosts=4,
      partition_rules={'a': jax.P(*spec)},
    )
    stored = 4 * 16 * 24
    assert forecast.host_bytes(plan, 4) == forecast.HostBytes(
      3 * stored * read, stored * written
    )

  def test_parts_that_hosts_share(self):
    """The other way about, a host has one of two parts, as three others."""
    plan = plan_of(
      mk.ties(),
      {'a': (16, 24)},
      {'tensor': 2, 'fsdp': 4},
      hosts=4,
      partition_rules={'a': jax.P('tensor')},
    )
    stored = 4 * 16 * 24
    assert forecast.host_bytes(plan, 4) == forecast.HostBytes(
      3 * 3 * stored // 2, stored // 2
    )

  def test_what_is_left_over_is_read_by_all(self):
    """Of 19 rows, 16 are spread over the hosts."""
    plan = plan_of(
      mk.task_arithmetic(),
      {'a': (19, 24)},
      {'fsdp': 8},
      hosts=2,
      partition_rules={'a': jax.P('fsdp')},
    )
    assert forecast.host_bytes(plan, 2) == forecast.HostBytes(
      3 * 4 * 24 * (8 + 3), 4 * 24 * (8 + 3)
    )
    one = forecast.host_bytes(plan)
    assert (one.read, one.written) == (plan.bytes_read, plan.bytes_written)


class TestHostMemory:
  def test_of_what_is_not_spread(self):
    """Every host holds it, whatever their number."""
    sizes = [
      plan_of(
        mk.task_arithmetic(),
        {'a': (16, 24)},
        {'fsdp': 8},
        hosts=hosts,
        partition_rules={'a': jax.P()},
      ).host_bytes
      for hosts in (1, 8)
    ]
    # 3 models read twice over; each device computes 4 values, 2 outputs, flags.
    per_element = [
      3 * 4 * 2 + devices * (4 * 4 + 2 * 4 + 1) for devices in (8, 1)
    ]
    assert sizes == [16 * 24 * count for count in per_element]

  def test_of_what_is(self):
    plan = plan_of(
      mk.task_arithmetic(),
      {'a': (16, 24)},
      {'fsdp': 8},
      hosts=4,
      partition_rules={'a': jax.P('fsdp')},
    )
    assert plan.host_bytes == 16 * 24 // 4 * (3 * 4 * 2 + 4 * 4 + 2 * 4 + 1)

  def test_small_leaves_are_spread_over_many_hosts(self):
    """32 KiB a device: one host holds it whole, eight read an eighth each."""
    shape = {'a': (64, 1024)}
    for hosts, spec in [(1, jax.P(None, None)), (8, jax.P('fsdp', None))]:
      plan = plan_of(mk.average(), shape, {'fsdp': 8}, hosts=hosts)
      (tensor,) = plan.scopes[0].tensors
      (box,) = tensor.boxes
      assert [*box.spec] == [*spec]


@mk.rule
class Median:
  """What a merge rule must not do: it needs the whole tensor in one place."""

  needs = 'matrix'

  def __call__(self, t):
    values = jnp.sort(t.experts[0].reshape(-1))
    return t.base + values[values.size // 2]


class TestCompiled:
  def test_memory(self):
    """A device holds its parts of three models, their sum and a flag.

    Beside these, a slice of them, and one in float64 at most.
    """
    plan = plan_of(mk.task_arithmetic(), {'a': (4096, 1024)}, {'fsdp': 8})
    merge, measure = compiled.compile_kernels(plan)
    part = 4096 * 1024 // 8
    held = (3 * 4 + 4 + 1) * part
    assert 0 <= merge.device_bytes - held < 2**18 * (8 + 3 * 4) + 1000
    # Nothing is stored but sums of 64 rows: of 2 norms, 4 and a flag twice.
    assert 0 <= measure.device_bytes - held < 64 * 7 * 8 + 1000
    assert [kernel.step for kernel in (merge, measure)] == ['merge', 'measure']
    assert merge.collectives == {}
    assert measure.collectives == {'all-reduce': 1}

  def test_an_all_gather_is_counted(self):
    plan = plan_of(Median(), {'a': (1024, 512)}, {'fsdp': 8})
    merge, *_ = compiled.compile_kernels(plan)
    assert merge.collectives['all-gather'] > 0
    assert ' 0 all-gather' not in forecast.describe(plan, kernels=[merge])

  def test_largest_of_each_kind(self):
    """The largest of those spread alike; a whole one only if it is larger."""
    shapes = {
      'a': (1024, 512),
      'b': (2048, 512),
      'wide': (512, 2048),
      'scale': (512,),
      'odd': (1021,),
    }
    specs = {'wide': jax.P(None, 'fsdp')}
    for whole, paths in [({}, 'b wide'), ({'a': jax.P()}, 'b wide a')]:
      plan = plan_of(
        mk.average(), shapes, {'fsdp': 8}, partition_rules=specs | whole
      )
      kernels = compiled.compile_kernels(plan)
      merges = [k.path for k in kernels if k.step == 'merge']
      assert merges == paths.split()

  def test_once_for_all_numbers_of_a_method(self):
    rules = [mk.task_arithmetic(scale) for scale in (0.2, 0.5, 1)]
    leaf = costs.Leaf('a', (1024, 512), (FLOAT32,) * 2, FLOAT32, stacked=())
    plan = planner.make_plan(
      [((*rules, mk.average()), [leaf])],
      sharding.make_mesh({'fsdp': 8}),
      memory_budget=2**32,
      has_base=True,
    )
    kernels = compiled.compile_kernels(plan)
    assert [k.step for k in kernels] == 2 * ['merge', 'measure']

  def test_most_layers(self):
    """Totals of many small layers may need more than a few large ones."""
    leaves = [
      costs.Leaf(path, shape, (FLOAT32,) * 2, FLOAT32, stacked=(0,))
      for path, shape in [('large', (2, 512, 512)), ('many', (16, 8, 64))]
    ]
    plan = planner.make_plan(
      [((mk.ties(scope='tensor'),), leaves)],
      sharding.make_mesh({'fsdp': 8}),
      memory_budget=2**32,
      has_base=True,
      partition_rules={'.*': jax.P(None, None, 'fsdp')},
    )
    kernels = compiled.compile_kernels(plan)
    assert {k.path for k in kernels} == {'large', 'many'}
    # A histogram of 2**16 counts in 4 bytes for each layer.
    many = [k for k in kernels if (k.path, k.step) == ('many', 'round 1')]
    assert many[0].device_bytes > 16 * 2**16 * 4

  def test_totals_of_a_model_are_the_same_for_any_number_of_layers(self):
    """They are added up layer by layer, in one histogram an expert."""

    def bytes_of(layers):
      stack = costs.Leaf(
        'stack', (layers, 8, 64), (FLOAT32,) * 3, FLOAT32, stacked=(0,)
      )
      plan = planner.make_plan(
        [((mk.ties(),), [stack])],
        sharding.make_mesh({'fsdp': 8}),
        memory_budget=2**32,
        has_base=True,
        partition_rules={'.*': jax.P(None, None, 'fsdp')},
      )
      (first, *_) = compiled.compile_kernels(plan)
      assert first.step == 'round 1'
      return first.device_bytes

    parts = 3 * 15 * 8 * 8 * 4
    assert abs(bytes_of(16) - bytes_of(1) - parts) < 10_000

  def test_is_what_the_stream_runs(self, tmp_path, monkeypatch):
    """The same programs, text for text."""
    base, experts = checkpoints.save_set(
      tmp_path, {'kernel': (1024, 512)}, experts=2
    )
    lowered = collections.defaultdict(set)

    def spy(module):
      steps = module.steps

      def listed(*arguments, **options):
        for name, step in steps(*arguments, **options):
          lowered[module].add(step.as_text())
          yield name, step

      monkeypatch.setattr(module, 'steps', listed)

    spy(compiled)
    spy(programs)
    compiled.compile_kernels(job.make_job([mk.ties()], experts, base).plan)
    mk.merge_checkpoints(
      mk.ties(), experts=experts, base=base, output=tmp_path / 'out'
    )
    assert lowered[compiled] == lowered[programs]
    assert len(lowered[programs]) == 4


@pytest.mark.parametrize(
  ('axes', 'spec'),
  [
    ({'fsdp': 8}, (None, 'fsdp')),
    ({'fsdp': 8}, ('fsdp', None)),
    ({'fsdp': 4, 'tensor': 2}, ('tensor', 'fsdp')),
    ({'fsdp': 4, 'tensor': 2}, (None, 'tensor')),
    ({'fsdp': 8}, (None, None)),
  ],
)
def test_measure_gathers_nothing(axes, spec):
  """The sums of each device are added, along whatever it holds a part of."""
  placed = NamedSharding(sharding.make_mesh(axes), jax.P(*spec))
  random = np.random.default_rng(0)
  arrays = random.normal(size=(4, 16, 64)).astype('float32')
  kept = random.random((16, 64)) < 0.3
  base, first, second, merged = (jax.device_put(x, placed) for x in arrays)
  block = drive.Block(
    base, [first, second], None, (0, 0), (16, 64), (), FLOAT32
  )
  bits = jax.device_put(kept.astype('uint8'), placed)
  flags = reported.Flags([bits], jax.tree.structure({'density': 0}))
  program = measuring.measure_on(placed)
  measured = program(placed, block, merged, flags)
  wide = arrays.astype('float64')
  # Float32 squares: each is rounded by at most 2**-24 of itself, its task
  # vector by as much again, twice; the sums of rows by 64 times that at most.
  close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5)
  close(measured['merged'], np.sum((wide[3] - wide[0]) ** 2))
  close(measured['experts'], np.sum((wide[1:3] - wide[0]) ** 2, axis=(1, 2)))
  assert int(measured['flags']['density']) == kept.sum()
  lowered = program.lower(placed, block, merged, flags)
  assert 'all-gather' not in (lowered.compile().as_text() or '')


class TestDescribe:
  def test_rows(self):
    """Leaves that differ by a number, and in nothing else, are one row."""
    shapes = {f'layers_{i}/kernel': (1024, 512) for i in range(12)}
    shapes |= {'layers_12/kernel': (512, 512), 'layers_0/scale': (512,)}
    specs = {'.*kernel': jax.P('fsdp', 'tensor')}
    plan = plan_of(
      mk.ties(), shapes, {'fsdp': 4, 'tensor': 2}, partition_rules=specs
    )
    lines = forecast.describe(plan).splitlines()
    assert [line.split() for line in lines[:4]] == [
      'tensor leaves shape layers along boxes reads sharding'.split(),
      'layers_*/kernel 12 [1024, 512] - 1 3 fsdp,tensor'.split(),
      'layers_12/kernel 1 [512, 512] - 1 3 fsdp,tensor'.split(),
      'layers_0/scale 1 [512] - 1 3 -'.split(),
    ]
    assert lines[4] == 'mesh: fsdp=4,tensor=2, on 1 host'
    assert lines[5] == (
      '14 tensors merged, 0 copied, in 14 boxes and 42 reads of a box'
    )

  def test_stacked_layers(self):
    """Which axes are taken for layers, and what may have been forgotten."""
    shapes = {
      'decoder/layers/kernel': (4, 512, 6),
      'decoder/layers/scale': (512,),
      'decoder/layers/0/kernel': (512, 6),
      'moe_layers/kernel': (512, 6),
    }
    stacked = {'decoder/layers/kernel': (0,)}
    plan = plan_of(mk.ties(), shapes, {'fsdp': 8}, stacked=stacked)
    lines = forecast.describe(plan).splitlines()
    columns = [line.split() for line in lines[1:5]]
    assert [row[-4] for row in columns] == ['0', '-', '-', '-']
    plan = plan_of(
      mk.ties(scope='tensor'), shapes, {'fsdp': 8}, stacked=stacked
    )
    (warning,) = caveats.of_plan(plan, 2, 0)
    assert '1 tensor below "layers", moe_layers/kernel, is' in warning

  @pytest.mark.parametrize(
    ('drop_rate', 'density', 'warned'),
    [
      (0.9, 0.2, True),
      (0.9, 0.1, True),
      (0.9, 0.05, False),
      (0.0, 1.0, False),
      (0.9, None, False),
    ],
  )
  def test_warns_of_a_trim_that_trims_nothing(self, drop_rate, density, warned):
    rule = mk.dare_ties(drop_rate, density)
    plan = plan_of(rule, {'a': (64, 64)}, {'fsdp': 8})
    warnings = caveats.of_plan(plan, 2, 0)
    assert [
      f'density={density} trims next to nothing' in w for w in warnings
    ] == ([True] * warned)
    if warned and density > 1 - drop_rate:
      base, experts = models.flat({'a': (64, 64)})
      merge = lambda rule: mk.merge(rule, experts, base, key=0)
      without = merge(mk.dare_ties(drop_rate))
      compare.same_bits(merge(rule), without)

  def test_seconds(self):
    plan = plan_of(mk.task_arithmetic(), {'a': (1024, 512)}, {'fsdp': 8})
    last = forecast.describe(plan, bandwidth=10**6).splitlines()[-1]
    one = 4 * 1024 * 512 / 1e6
    assert last.startswith(f'seconds: {3 * one:.1f} at least, to read ')
    assert f' and meanwhile {one:.1f} to write ' in last


class TestLinear:
  def test_calls(self):
    """Four times the tensors, no two alike, four times the calls at most."""

    def calls(number):
      shapes = {f'layers_{i}/kernel': (1024, 512 + i) for i in range(number)}
      count = 0

      def counting(frame, event, argument):
        nonlocal count
        count += event == 'call'

      sys.setprofile(counting)
      try:
        plan = plan_of(mk.ties(), shapes, {'fsdp': 8})
        forecast.describe(plan)
        assert sum(1 for _ in plan.units()) == 3 * sum(
          len(tensor.boxes) for tensor in plan.scopes[0].tensors
        )
      finally:
        sys.setprofile(None)
      return count

    calls(1)  # what is traced once
    few, many = calls(100), calls(400)
    assert many < 4.1 * few
