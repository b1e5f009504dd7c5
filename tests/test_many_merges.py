"""Many merges from one read: each as if alone, the sources read once."""

import collections
import functools
import signal
import sys
import weakref

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.checkpoint.stage import Stage
from mergekit_jax.jobs import job
from mergekit_jax.streaming import reading
from tests import cases, checkpoints, compare, models

LARGE = {'layers/kernel': (300, 3, 97), 'odd': (7, 5)}
STACKED = {r'.*/layers/.*': 1}
SEEDS = {'model': 0, 'tensor': 0, 'random': 3, 'elementwise': 0, 'gram': 0}
# Of every family, and of both scopes: 2, 2, 0, 0 and 1 rounds.
METHODS = {
  'model': mk.ties(),
  'tensor': mk.ties(scope='tensor', density=0.3),
  'random': mk.dare(drop_rate=0.5),
  'elementwise': mk.task_arithmetic(scale=0.3),
  'gram': next(case.rule for case in cases.METHODS if case.family == 'gram'),
}
EXPERTS = 2  # spherical interpolation takes two


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  return checkpoints.save_set(
    tmp_path_factory.mktemp('sources'), LARGE, experts=EXPERTS
  )


@pytest.fixture
def reads(monkeypatch):
  """Counts the elements that are read, by model and leaf."""
  counted = collections.Counter()
  read_parts = reading.Model.read_parts

  def spy(model, path, parts):
    counted[model.name, path] += sum(out.size for _, out in parts)
    return read_parts(model, path, parts)

  monkeypatch.setattr(reading.Model, 'read_parts', spy)
  return counted


def merge(saved, directory, names=tuple(METHODS), **options):
  base, experts = saved
  return mk.merge_checkpoints(
    {name: METHODS[name] for name in names},
    experts=experts,
    base=base,
    output={name: directory / name for name in names},
    seed={name: SEEDS[name] for name in names},
    stacked_axes=STACKED,
    **options,
  )


def in_memory(name):
  base, experts = models.trees(LARGE, 'float32', EXPERTS)
  merged = mk.merge(
    METHODS[name], experts, base, key=SEEDS[name], stacked_axes=STACKED
  )
  return models.unnest(merged)


def assert_same(name, merged):
  """Bitwise; by the guarantee of Gram methods where the rule is one."""
  expected = in_memory(name)
  if name == 'gram':
    compare.within_ulps(merged, expected, 2, expected)
  else:
    compare.same_bits(merged, expected)


@pytest.mark.parametrize('budget', ['4GiB', '8MB'])
def test_each_is_as_if_alone(saved, tmp_path, reads, budget):
  """Whole leaves, and leaves cut between layers and within them."""
  base, experts = saved
  reports = merge(saved, tmp_path, memory_budget=budget)
  assert list(reports) == list(METHODS)
  for name in METHODS:
    assert_same(name, checkpoints.load_floats(tmp_path / name))
    report = checkpoints.report_of(tmp_path / name)
    assert report['provenance']['method'] == repr(METHODS[name])
    assert report['provenance']['seed'] == SEEDS[name]
  # Rounds, and once more: not the sum over the methods, which would be ten.
  elements = {'params/layers/kernel': 300 * 3 * 97, 'params/odd': 35}
  assert reads == {
    **{
      (model, path): 3 * size
      for model in ('base', 'experts[0]', 'experts[1]')
      for path, size in elements.items()
    },
    ('base', 'params/steps'): 3,
  }
  plan = job.make_job(
    list(METHODS.values()),
    experts,
    base,
    stacked_axes=STACKED,
    memory_budget=budget,
  ).plan
  assert plan.bytes_read == 4 * 9 * sum(elements.values()) + 12
  boxes = {t.path: len(t.boxes) for s in plan.scopes for t in s.tensors}
  assert (boxes['params/layers/kernel'] > 3) == (budget != '4GiB')


def test_rounds_that_differ(saved, tmp_path, reads):
  """Of a leaf that fits, a rule over tensors needs no read of its own."""
  merge(saved, tmp_path, ('tensor', 'random', 'elementwise'))
  assert set(reads.values()) == {300 * 3 * 97, 35, 3}


def test_hyperparameters_and_seeds_of_one_method(saved, tmp_path):
  base, experts = saved
  scales = {'low': 0.2, 'high': 0.9}
  mk.merge_checkpoints(
    {name: mk.dare(drop_rate=0.5, scale=scales[name]) for name in scales},
    experts=experts,
    base=base,
    output={name: tmp_path / name for name in scales},
    seed={'low': 1, 'high': 2},
  )
  for seed, (name, scale) in enumerate(scales.items(), 1):
    tree, others = models.trees(LARGE, 'float32', EXPERTS)
    expected = mk.merge(
      mk.dare(drop_rate=0.5, scale=scale), others, tree, key=seed
    )
    compare.same_bits(
      checkpoints.load_floats(tmp_path / name),
      models.unnest(expected),
    )


def test_to_safetensors(saved, tmp_path):
  merge(saved, tmp_path, ('elementwise', 'random'), format='safetensors')
  for name in ('elementwise', 'random'):
    checkpoint = mk.open_checkpoint(tmp_path / name)
    assert checkpoint.format == 'safetensors'
    merged = {
      path.removeprefix('params/'): checkpoint.read(path)
      for path in checkpoint.specs
      if path != 'params/steps'
    }
    assert_same(name, {path: np.asarray(x) for path, x in merged.items()})


def test_overrides_hold_for_all(saved, tmp_path):
  overrides = {'params/odd': mk.average(), 'params/layers/.*': 'base'}
  names = ('tensor', 'elementwise')
  merge(saved, tmp_path, names, overrides=overrides)
  base, experts = models.trees(LARGE, 'float32', EXPERTS)
  expected = models.unnest(mk.merge(mk.average(), experts, base))
  for name in names:
    merged = checkpoints.load_floats(tmp_path / name)
    kept = models.unnest(base)['layers/kernel']
    np.testing.assert_array_equal(merged['odd'], expected['odd'])
    np.testing.assert_array_equal(merged['layers/kernel'], kept)


class TestSweep:
  def test_checkpoints(self, saved, reads):
    base, experts = saved
    seen = []

    def evaluate(tree):
      seen.append(jax.tree.structure(tree))
      return models.unnest(tree)

    swept = mk.sweep(
      METHODS,
      experts,
      base,
      evaluate,
      seed=SEEDS,
      stacked_axes=STACKED,
      memory_budget='8MB',
    )
    assert list(swept) == list(METHODS)
    for name, merged in swept.items():
      assert_same(name, merged)
    assert reads['experts[0]', 'params/odd'] == 3 * 35
    tree, _ = models.trees(LARGE, 'float32', EXPERTS)
    assert set(seen) == {jax.tree.structure(tree)}

  def test_where_jit_is_off(self, saved):
    """That is for what evaluates; the stream is compiled."""
    base, experts = saved

    def evaluate(tree):
      assert jax.config.jax_disable_jit
      return models.unnest(tree)

    with jax.disable_jit():
      swept = mk.sweep(
        {'tensor': METHODS['tensor']},
        experts,
        base,
        evaluate,
        stacked_axes=STACKED,
        memory_budget='8MB',
      )
    assert_same('tensor', swept['tensor'])

  def test_leaves_that_are_not_merged(self, saved):
    base, experts = saved
    swept = mk.sweep(
      {'mean': mk.average()},
      experts,
      base,
      lambda tree: tree['params']['steps'],
      overrides={'params/odd': 'base'},
    )
    tree, _ = models.trees(LARGE, 'float32', EXPERTS)
    np.testing.assert_array_equal(swept['mean'], tree['params']['steps'])

  def test_floats_of_four_bits_that_are_not_merged(self, tmp_path):
    kept = jnp.arange(6, dtype=jnp.float4_e2m1fn).reshape(2, 3)
    tree = {'params': {'w': np.ones((2, 3), np.float32), 'kept': kept}}
    path = checkpoints.save(tmp_path / 'model', tree)
    swept = mk.sweep(
      {'mean': mk.average()},
      [path],
      path,
      lambda tree: tree['params']['kept'],
      overrides={'params/kept': 'base'},
    )
    assert swept['mean'].dtype == kept.dtype
    np.testing.assert_array_equal(
      *(np.asarray(x, np.float32) for x in (swept['mean'], kept))
    )

  def test_float64_in_several_boxes(self, tmp_path):
    """Without 64-bit types in JAX."""
    random = np.random.default_rng(0)
    trees = [{'params': {'w': random.normal(size=(301, 401))}} for _ in '123']
    paths = [
      checkpoints.save(tmp_path / str(i), tree) for i, tree in enumerate(trees)
    ]
    swept = mk.sweep(
      {'mean': mk.average()},
      paths[1:],
      paths[0],
      lambda tree: np.asarray(tree['params']['w']),
      memory_budget='8MB',
    )
    assert swept['mean'].dtype == np.float64
    # Rules compute in float32, in which only the sum is rounded here.
    one, two = (
      tree['params']['w'].astype(np.float32).astype(np.float64)
      for tree in trees[1:]
    )
    np.testing.assert_allclose(swept['mean'], (one + two) / 2, rtol=6e-8)

  @pytest.mark.parametrize('budget', ['4GiB', '8MB'])
  @pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto])
  def test_on_a_mesh_as_it_is_set(self, saved, budget, axis_type):
    """On which `evaluate` computes with what else lies there."""
    base, experts = saved
    mesh = models.mesh('2d', axis_type)

    def evaluate(tree):
      leaf = tree['params']['layers']['kernel']
      assert leaf.sharding.mesh == mesh
      ones = jax.device_put(jnp.ones(leaf.shape), leaf.sharding)
      np.testing.assert_array_equal(leaf * ones, leaf)
      return leaf.sharding.spec, models.unnest(tree)

    with jax.set_mesh(mesh):
      ((spec, merged),) = mk.sweep(
        {'model': METHODS['model']},
        experts,
        base,
        evaluate,
        stacked_axes=STACKED,
        mesh=mesh,
        memory_budget=budget,
      ).values()
    assert jax.tree.leaves(tuple(spec))
    assert_same('model', merged)

  @pytest.mark.parametrize('budget', ['4GiB', '8MB'])
  @pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto])
  def test_in_a_mesh_of_other_devices_that_is_set(
    self, saved, budget, axis_type
  ):
    base, experts = saved
    for devices in (jax.devices()[::-1], jax.devices()[2:4]):
      other = jax.sharding.Mesh(devices, ('x',), axis_types=(axis_type,))
      with jax.set_mesh(other):
        swept = mk.sweep(
          {'model': METHODS['model']},
          experts,
          base,
          models.unnest,
          stacked_axes=STACKED,
          memory_budget=budget,
        )
      assert_same('model', swept['model'])

  def test_random_keys_are_keys(self, tmp_path):
    tree = lambda value: {
      'params': {
        'w': np.full((2, 3), value, 'float32'),
        'key': jax.random.key(7),
      }
    }
    one, two = (checkpoints.save(tmp_path / str(i), tree(i)) for i in (1, 3))
    sweep = lambda mesh: mk.sweep(
      {'mean': mk.average()}, [one, two], None, lambda x: x, mesh=mesh
    )
    for mesh in (None, models.mesh('2d', AxisType.Explicit)):
      params = sweep(mesh)['mean']['params']
      np.testing.assert_array_equal(params['w'], np.full((2, 3), 2.0))
      assert params['key'] == jax.random.key(7)

  def test_says_what_is_left_out(self, tmp_path, caplog):
    tree = {'params': {'w': np.ones(3)}, 'statistics': np.ones(2)}
    path = checkpoints.save(tmp_path / 'one', tree)
    with caplog.at_level('WARNING', logger='absl'):
      mk.sweep({'mean': mk.average()}, [path], None, len)
    assert 'not in the output: statistics' in caplog.text

  def test_says_where_layers_may_be_stacked(self, tmp_path, caplog):
    tree = {'layers': {'w': np.ones((2, 3))}}
    path = checkpoints.save(tmp_path / 'one', tree)
    with caplog.at_level('WARNING', logger='absl'):
      mk.sweep({'dare': mk.dare(0.5)}, [path], path, len)
    assert '1 tensor below "layers", layers/w, is' in caplog.text

  def test_refuses_what_cannot_be_called_before_it_reads(self):
    with pytest.raises(ValueError, match='evaluate=None was given; give a fun'):
      mk.sweep({'a': mk.average()}, ['nowhere'], None, None)

  def test_refuses_a_merge_before_another_is_evaluated(self):
    evaluated = []
    trees = [{'w': np.float32([x])} for x in (0, 1, 2)]
    methods = {'good': mk.ties(), 'not called': mk.ties}
    with pytest.raises(ValueError, match='A method is a rule'):
      mk.sweep(methods, trees[1:], trees[0], evaluated.append)
    assert not evaluated

  def test_names_the_merge_whose_evaluation_fails(self):
    def evaluate(tree):
      if tree['w'] > 1:
        raise KeyError('w')

    methods = {x: mk.task_arithmetic(x) for x in (1.0, 2.0)}
    trees = [{'w': np.float32(x)} for x in (0, 1)]
    with pytest.raises(KeyError) as caught:
      mk.sweep(methods, trees[1:], trees[0], evaluate)
    assert caught.value.__notes__ == ['So evaluate ended for the merge 2.0.']

  def test_trees_in_memory(self):
    base, experts = models.trees(LARGE, 'float32', EXPERTS)
    swept = mk.sweep(
      METHODS, experts, base, models.unnest, seed=SEEDS, stacked_axes=STACKED
    )
    for name, merged in swept.items():
      assert_same(name, merged)

  def test_lets_go_of_a_tree_before_the_next_merge(self, monkeypatch):
    base, experts = models.flat({'odd': (7, 5)})
    given, alive = [], []

    def counting(*arguments, **options):
      alive.append(sum(each() is not None for each in given))
      return mk.merge(*arguments, **options)

    monkeypatch.setitem(mk.sweep.__globals__, 'merge', counting)
    methods = {str(scale): mk.task_arithmetic(scale) for scale in (1, 2, 3)}
    keep = lambda tree: given.append(weakref.ref(tree['odd']))
    mk.sweep(methods, experts, base, keep)
    assert alive == [0, 0, 0]

  @pytest.mark.parametrize('has_base', [True, False])
  def test_may_donate_what_it_is_given(self, has_base):
    tree = lambda x: {
      'params': {'w': jnp.full(3, x), 'kept': jnp.full(2, x)},
      'step': jnp.int32(7),
      'key': jax.random.key(1),
      'name': 'net',
      'ids': np.arange(2),
    }
    base, *experts = map(tree, (0.0, 1.0, 2.0))
    arrays = lambda of: [x for x in jax.tree.leaves(of) if hasattr(x, 'delete')]

    def donated(merged):
      total = merged['params']['w'].sum() + merged['params']['kept'].sum()
      for leaf in arrays(merged):
        leaf.delete()
      return float(total)

    scores = mk.sweep(
      {x: mk.average() for x in 'ab'},
      experts,
      base if has_base else None,
      donated,
      overrides={'params/kept': 'base'},
    )
    assert scores == dict.fromkeys('ab', 4.5 if has_base else 6.5)
    given = arrays([base, *experts])
    assert len(given) == 12 and not any(leaf.is_deleted() for leaf in given)

  def test_nonfinite(self, tmp_path):
    path = checkpoints.save(tmp_path / 'one', {'w': np.array([1.0, np.nan])})
    sweep = functools.partial(
      mk.sweep, {'a': mk.average()}, [path], None, lambda tree: tree['w']
    )
    with pytest.raises(FloatingPointError, match='allow_nonfinite=True'):
      sweep()
    swept = sweep(allow_nonfinite=True)
    np.testing.assert_array_equal(swept['a'], [1, np.nan])

  def test_bad_input(self, saved):
    base, experts = saved
    with pytest.raises(ValueError, match='methods is empty; give {name: '):
      mk.sweep({}, experts, base, len)
    with pytest.raises(ValueError, match='methods is a list; give {name'):
      mk.sweep([mk.average()], experts, base, len)  # type: ignore
    with pytest.raises(ValueError, match="seed \\['b'\\]"):
      mk.sweep({'a': mk.average()}, experts, base, len, seed={'b': 1})

  @pytest.mark.parametrize('experts', [{'w': np.ones(3)}, [], 7])
  def test_experts_that_are_no_list(self, experts):
    with pytest.raises(ValueError, match='give a list'):
      mk.sweep({'a': mk.average()}, experts, None, len)

  def test_experts_one_by_one(self):
    trees = ({'w': np.full(3, x)} for x in (1.0, 2.0))
    swept = mk.sweep({'a': mk.average()}, trees, None, lambda tree: tree['w'])  # type: ignore
    np.testing.assert_array_equal(swept['a'], np.full(3, 1.5))

  @pytest.mark.parametrize(
    'options',
    [{'mesh': jax.make_mesh((1,), ('a',))}, {'partition_rules': {'.*': None}}],
  )
  def test_what_is_for_checkpoints(self, options):
    with pytest.raises(ValueError, match='are for checkpoints'):
      mk.sweep({'a': mk.average()}, [{'w': np.ones(3)}], None, len, **options)


def test_names_need_not_be_text(saved, tmp_path):
  base, experts = saved
  reports = mk.merge_checkpoints(
    {0.3: mk.task_arithmetic(0.3), '0.3': mk.average()},
    experts=experts,
    base=base,
    output={0.3: tmp_path / 'number', '0.3': tmp_path / 'text'},
  )
  assert [*reports] == [0.3, '0.3']
  assert reports[0.3].output.endswith('number')
  assert reports['0.3'].output.endswith('text')


class TestBadInput:
  @pytest.mark.parametrize(
    ('changed', 'message'),
    [
      ({'method': {}}, 'method is empty; give {name: rule} of at least one'),
      ({'output': 'out'}, 'method and seed names several merges'),
      ({'output': {'a': 'x', 'c': 'y'}}, 'method names a, b and output names'),
      ({'seed': {'a': 1}}, 'seed names a and output names a, b'),
      ({'output': {'a': 'x', 'b': 'x'}}, 'a and b lie in each other'),
      ({'output': {'a': 'x', 'b': 'x/y'}}, 'a and b lie in each other'),
      ({'method': {'a': mk.average(), 'b': 'ties'}}, "'ties' was given"),
    ],
  )
  def test_names(self, saved, tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    base, experts = saved
    arguments = {
      'method': {'a': mk.average(), 'b': mk.task_arithmetic()},
      'output': {'a': 'x', 'b': 'y'},
      'seed': {'a': 1, 'b': 2},
    } | changed
    with pytest.raises(ValueError, match=message):
      mk.merge_checkpoints(experts=experts, base=base, **arguments)
    assert not list(tmp_path.iterdir())

  def test_one_of_the_outputs_exists(self, saved, tmp_path):
    """Nothing is written to the others either."""
    (tmp_path / 'random').mkdir()
    (tmp_path / 'random' / 'thesis.tex').touch()
    with pytest.raises(FileExistsError, match='random exists'):
      merge(saved, tmp_path, ('elementwise', 'random'))
    assert [path.name for path in tmp_path.iterdir()] == ['random']


def test_resumed(saved, tmp_path, monkeypatch):
  """Stopped in the middle: what one output has is not written again."""
  names = ('model', 'random')
  read_ahead = mk.streamed.stream.read_ahead

  class StoppedError(Exception):
    """As if the plug were pulled."""

  def stopping(plan, models, done):
    written = 0
    for loading in read_ahead(plan, models, done):
      written += loading.unit.written
      if written == 4:
        raise StoppedError
      yield loading

  monkeypatch.setattr(mk.streamed.stream, 'read_ahead', stopping)
  with pytest.raises(StoppedError):
    merge(saved, tmp_path, names, memory_budget='5MB')
  assert not (tmp_path / 'model').exists()
  monkeypatch.undo()
  reports = merge(saved, tmp_path, names, memory_budget='5MB')
  for name in names:
    assert_same(name, checkpoints.load_floats(tmp_path / name))
    assert reports[name].units_resumed == 3
    assert reports[name].units_done > 0


@mk.rule
class NormalisesMatrices:
  """Asks for a total on some leaves only, each of which is its scope."""

  def __call__(self, t):
    total = lambda delta: mk.Total(jnp.sum(jnp.abs(delta)), lambda x, _: x)
    if t.base.ndim < 2:
      return t.base
    norm = yield total(t.experts[0] - t.base)
    return t.base + (t.experts[0] - t.base) / norm


def test_one_asks_on_some_leaves_beside_one_that_asks_on_all(tmp_path):
  generator = np.random.default_rng(0)
  model = lambda: {
    'w': np.float32(generator.standard_normal((16, 8))),
    'b': np.float32(generator.standard_normal(8)),
  }
  base, expert = model(), model()
  paths = [
    checkpoints.save_safetensors(tmp_path / f'{name}.safetensors', tree)
    for name, tree in (('base', base), ('expert', expert))
  ]
  own = NormalisesMatrices()
  sweep = lambda methods: mk.sweep(methods, paths[1:], paths[0], lambda x: x)
  delta = np.float64(expert['w']) - base['w']
  merged = sweep({'own': own, 'ties': mk.ties(scope='tensor')})['own']
  np.testing.assert_allclose(
    merged['w'],
    base['w'] + delta / np.abs(delta).sum(),
    rtol=1e-5,  # of a float32 sum of 128 numbers
  )
  np.testing.assert_array_equal(merged['b'], base['b'])
  with pytest.raises(ValueError, match='or that of a rule it is merged beside'):
    sweep({'own': own, 'ties': mk.ties()})


def test_warnings_of_one_merge_are_not_those_of_another(tmp_path):
  """Only to a rule with thresholds of a tensor it matters what is stacked."""
  names = [f'layers/{name}/w' for name in 'abc']
  save = lambda name, x: checkpoints.save_safetensors(
    tmp_path / name, {each: np.float32(x + np.eye(4)) for each in names}
  )
  reports = mk.merge_checkpoints(
    {'sum': mk.task_arithmetic(), 'ties': mk.ties(scope='tensor')},
    experts=[save('one.safetensors', 1)],
    base=save('base.safetensors', 0),
    output={name: tmp_path / name for name in ('sum', 'ties')},
  )
  stacked = {
    name: [w for w in report.warnings if 'stacked' in w]
    for name, report in reports.items()
  }
  assert stacked['ties'] and not stacked['sum']


def test_more_than_the_stack_has_room_for(tmp_path):
  """Writers of several outputs do not lie in each other."""
  numbers = np.arange(8, dtype=np.float32)
  path = checkpoints.save_safetensors(
    tmp_path / 'one.safetensors', {'w': numbers}
  )
  base = checkpoints.save_safetensors(
    tmp_path / 'base.safetensors', {'w': numbers - 1}
  )
  names = range(sys.getrecursionlimit() // 5)
  reports = mk.merge_checkpoints(
    {i: mk.task_arithmetic(i) for i in names},
    experts=[path],
    base=base,
    output={i: tmp_path / f'out {i}' for i in names},
  )
  assert len(reports) == len(names)
  for i in (0, 7, names[-1]):
    found = mk.open_checkpoint(tmp_path / f'out {i}').read('w')
    np.testing.assert_array_equal(found, numbers - 1 + i)


def test_ctrl_c_while_several_are_written(saved, tmp_path, monkeypatch):
  """It is heard where the stream is, before the next unit."""
  units = []

  def interrupted(stage, unit, facts):
    units.append(unit)
    if len(units) == 3:
      signal.raise_signal(signal.SIGINT)
    record(stage, unit, facts)

  record = Stage.record
  monkeypatch.setattr(Stage, 'record', interrupted)
  # A shell starts what is in its background with this signal ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt):
      merge(saved, tmp_path, ('model', 'random'), memory_budget='5MB')
  finally:
    signal.signal(signal.SIGINT, before)
  reports = merge(saved, tmp_path, ('model', 'random'), memory_budget='5MB')
  assert all(report.units_done for report in reports.values())
