"""The guarantees of the design, for every method of the table."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving import drive, questions
from tests import cases, compare, drivers, models

SEED = 5


@functools.cache
def in_memory(case, shapes='small', data='fine', dtype='float32'):
  """The merge of one of the models of models.py, with what went in."""
  shapes = {'small': models.SMALL, 'full': models.FULL}[shapes]
  if data == 'fine':
    base, experts = models.flat(shapes, dtype, case.experts)
  else:
    base, experts = models.coarse(shapes, case.experts)
  return drivers.in_memory(case.rule, experts, base, SEED), experts, base


# Module scope, so that pytest runs all tests of a method together and what one
# of them compiled serves the next.
@pytest.fixture(scope='module', params=cases.ALL, ids=repr)
def any_case(request):
  return request.param


@pytest.fixture(scope='module', params=cases.METHODS, ids=repr)
def case(request):
  return request.param


@pytest.fixture(scope='module', params=cases.FAMILIES, ids=repr)
def family(request):
  return request.param


class TestReference:
  """1. Equals an independent float64 reference."""

  @pytest.mark.parametrize('data', ['fine', 'coarse'])
  def test_float32(self, any_case, data):
    # One shape of each kind for every method, fewer for its options.
    shapes = 'full' if any_case in cases.METHODS else 'small'
    merged, experts, base = in_memory(any_case, shapes, data)
    expected = any_case.expected(experts, base, jax.random.key(SEED))
    compare.like_reference(merged, expected, [*experts, base])
    if any_case.family == 'gram':
      compare.within_ulps(merged, expected, 2, *experts)

  def test_bfloat16(self, family):
    merged, experts, base = in_memory(family, dtype='bfloat16')
    expected = family.expected(experts, base, jax.random.key(SEED))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in merged.values())
    compare.like_reference(merged, expected, [*experts, base])


def same_model(case, got, expected, experts):
  """Bitwise, or for Gram methods within 2 float32 ulp."""
  if case.family == 'gram':
    compare.within_ulps(got, expected, 2, *experts)
  else:
    compare.same_bits(got, expected)


class TestMeshes:
  """2. The same model on one device and on every mesh."""

  def check(self, case, name, axis_type, shapes):
    base, experts = models.flat(shapes, experts=case.experts)
    expected = drivers.in_memory(case.rule, experts, base, SEED)
    mesh = models.mesh(name, axis_type)
    base = models.place(base, mesh)
    merged = mk.merge(
      case.rule,
      [models.nest(models.place(expert, mesh)) for expert in experts],
      models.nest(base),
      key=SEED,
    )
    kernel = merged['params']['dense']['kernel']
    assert kernel.sharding == base['dense/kernel'].sharding
    assert not kernel.sharding.is_fully_replicated
    got = models.unnest(merged)
    if case.family == 'gram':
      float64 = case.expected(experts, base)
      compare.within_ulps(got, float64, 2, *experts)
    same_model(case, got, expected, experts)

  def test_two_dimensional(self, case):
    self.check(case, '2d', AxisType.Auto, models.SMALL)

  @pytest.mark.parametrize(
    'name,axis_type',
    [
      ('fsdp', AxisType.Auto),
      ('tensor', AxisType.Auto),
      ('2d', AxisType.Explicit),
    ],
    ids=['fsdp', 'tensor', 'explicit'],
  )
  def test_other(self, family, name, axis_type):
    # 'odd' has met a mesh above.
    shapes = {'dense/kernel': models.SMALL['dense/kernel']}
    self.check(family, name, axis_type, shapes)


class TestDrivers:
  """3, 4. Every driver gives the model that the in-memory merge gives."""

  @pytest.mark.parametrize('name', drivers.DRIVERS)
  def test_same(self, case, name):
    expected, experts, base = in_memory(case)
    got = drivers.DRIVERS[name](case.rule, experts, base, SEED)
    same_model(case, got, expected, experts)

  def test_blocks_of_stacked_layers(self, family):
    # Cut along the layers, and inside of them.
    base, experts = models.flat(models.STACKED, experts=family.experts)
    layers, rows, columns = models.STACKED['layers/kernel']
    box = lambda first, last, top, bottom: (
      slice(first, last),
      slice(top, bottom),
      slice(0, columns),
    )
    half = rows // 2
    below = [box(1, layers, 0, half), box(1, layers, half, rows)]
    groups = [
      [('layers/kernel', [box(0, 1, 0, rows)])],
      [('layers/kernel', below)],
      [('odd', [(slice(0, 7), slice(0, 5))])],
    ]
    if getattr(family.rule, 'scope', 'tensor') == 'model':
      groups = [sum(groups, [])]
    got = {name: np.full_like(leaf, np.nan) for name, leaf in base.items()}
    got = {name: np.array(leaf) for name, leaf in got.items()}
    for group in groups:
      parts = [
        (name, place, block)
        for name, cut in group
        for place, block in drivers.blocks_of(
          name,
          experts,
          base,
          SEED,
          cut,
          stacked=(0,) if name == 'layers/kernel' else (),
        )
      ]
      results = drivers.drive(family.rule, [block for _, _, block in parts])
      for (name, place, _), result in zip(parts, results, strict=True):
        got[name][place] = result
    same_model(family, got, scanned(family), experts)


@functools.cache
def scanned(case):
  base, experts = models.flat(models.STACKED, experts=case.experts)
  options = {'stacked_axes': {'.*/layers/.*': 0}}
  return drivers.in_memory(case.rule, experts, base, SEED, **options)


def unscanned(model):
  """Every layer a leaf of its own, under the name that reference.py takes."""
  kernel = model['layers/kernel']
  slices = {('layers/kernel', i): layer for i, layer in enumerate(kernel)}
  return {**slices, 'odd': model['odd']}


class TestStackedLayers:
  """3. Scanned = unscanned, layer by layer."""

  def test_unscanned(self, case):
    base, experts = models.flat(models.STACKED, experts=case.experts)
    whole = scanned(case)
    if case.family == 'random':
      # Masks go by name and layer: the first layer alone has both.
      apart = lambda model: {'layers/kernel': model['layers/kernel'][0]}
    else:
      apart = lambda model: {
        name if name == 'odd' else f'layers_{name[1]}/kernel': leaf
        for name, leaf in unscanned(model).items()
      }
    experts, base = [apart(expert) for expert in experts], apart(base)
    expected = drivers.in_memory(case.rule, experts, base, SEED)
    same_model(case, apart(whole), expected, experts)

  def test_reference_of_every_layer(self, family):
    base, experts = models.flat(models.STACKED, experts=family.experts)
    base, *experts = map(unscanned, (base, *experts))
    got = unscanned(scanned(family))
    expected = family.expected(experts, base, jax.random.key(SEED))
    compare.like_reference(got, expected, [*experts, base])

  @pytest.mark.parametrize('layout', ['second axis', 'two axes'])
  def test_layouts(self, family, layout):
    base, experts = models.flat(models.STACKED, experts=family.experts)
    name = 'layers/kernel'
    layers, rows, columns = models.STACKED[name]

    def lay_out(kernel):
      if layout == 'second axis':
        return np.moveaxis(kernel, 0, 1)
      kernel = np.reshape(kernel, (2, layers // 2, rows, columns))
      return np.moveaxis(kernel, 1, 2)

    axes = 1 if layout == 'second axis' else (0, 2)
    change = lambda model: {**model, name: lay_out(np.asarray(model[name]))}
    got = drivers.in_memory(
      family.rule,
      [change(expert) for expert in experts],
      change(base),
      SEED,
      stacked_axes={'.*/layers/.*': axes},
    )
    expected = change(scanned(family))
    same_model(family, got, expected, [change(expert) for expert in experts])


class TestIdenticalExperts:
  """5. Identical experts, and experts in another order."""

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_identical(self, case, dtype):
    base, (expert, *_) = models.flat(models.SMALL, dtype)
    copies = [expert] * case.experts
    merged = drivers.in_memory(case.identical, copies, base, SEED)
    if dtype == 'bfloat16':
      compare.same_bits(merged, expert)
    else:
      exact = {k: np.asarray(v, np.float64) for k, v in expert.items()}
      compare.within_ulps(merged, exact, 1, base, expert)

  @pytest.mark.parametrize('data', ['fine', 'coarse'])
  def test_permuted(self, case, data):
    merged, experts, base = in_memory(case, data=data)
    permuted = drivers.in_memory(case.rule, experts[::-1], base, SEED)
    if not case.symmetric:
      # Of a rule that minds the order, the order must not be lost.
      assert any((permuted[name] != merged[name]).any() for name in merged)
      return
    turned = 0
    for name, value in merged.items():
      stored = [np.asarray(model[name]) for model in (base, *experts)]
      bound = compare.ulp(*stored)
      if case.name == 'average':
        # It has no small task vectors: N - 1 roundings of a sum N times as
        # large as an expert, in either order, and one of the quotient.
        n = len(experts)
        total = sum(np.abs(expert) for expert in stored[1:])
        bound = bound + (n - 1) / n * compare.ulp(total)
      error = np.abs(permuted[name].astype(np.float64) - value)
      deltas = [expert - stored[0] for expert in stored[1:]]
      mass = np.abs(sum(delta.astype(np.float64) for delta in deltas))
      near_zero = mass <= len(experts) * compare.ulp(*deltas)
      assert not ((error > bound) & ~near_zero).any(), name
      turned += (error > bound).sum()
    assert turned == 0  # no mass here is that close to 0 without being 0


def passes(rule, block):
  """The compiled HLO of every pass of a rule over one block, without data."""
  wide = {'i': 'int64', 'f': 'float64'}
  answers = []
  while True:
    lowered = drive.advance.lower(rule, block, answers)
    yield lowered.compile().as_text()
    reached = jax.eval_shape(drive.advance, rule, block, answers)
    if reached.merged is not None:
      return
    with jax.enable_x64(True):
      totals = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, wide[x.dtype.kind]),
        reached.partials,
      )
      answers.append(
        jax.eval_shape(
          functools.partial(drive.answer, rule, block), totals, answers
        )
      )


def sharded_block(shape, stacked=(), experts=3):
  mesh = models.mesh('2d')
  spec = jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=models.sharding(mesh, shape)
  )
  assert len(spec.sharding.spec) == len(shape)
  assert None not in spec.sharding.spec[len(stacked) :]
  return drive.Block(
    base=spec,
    experts=[spec] * experts,
    key=jax.ShapeDtypeStruct((2,), jnp.uint32),
    origin=(0,) * len(shape),
    whole=shape,
    stacked=stacked,
    dtype=jnp.dtype('bfloat16'),
  )


@mk.rule
class Median:
  """What a merge rule must not do: it needs the whole tensor in one place."""

  def __call__(self, t):
    values = jnp.sort(t.experts[0].reshape(-1))
    return t.base + values[values.size // 2]


class TestCompilation:
  """6. What XLA makes of a rule, and how often."""

  def test_no_all_gather(self, case):
    texts = list(
      passes(case.rule, sharded_block((16, 24), experts=case.experts))
    )
    assert len(texts) == case.rounds + 1
    for text in texts:
      assert 'all-gather' not in text
    # The totals are sums over the mesh, and nothing else travels.
    assert all('all-reduce' in text for text in texts[:-1])

  def test_no_all_gather_of_stacked_layers(self, family):
    block = sharded_block((4, 16, 8), (0,), family.experts)
    for text in passes(family.rule, block):
      assert 'all-gather' not in text

  def test_an_all_gather_is_found(self):
    (text,) = passes(Median(), sharded_block((16, 24)))
    assert 'all-gather' in text

  def test_no_recompilation(self, case):
    in_memory(case)
    compiled = drive.advance._cache_size()
    # Other numbers, other data, other names: the same shapes.
    base, experts = models.flat(models.SMALL, experts=case.experts, seed=1)
    rename = lambda model: {name + '_': leaf for name, leaf in model.items()}
    experts, base = [rename(expert) for expert in experts], rename(base)
    drivers.in_memory(case.other, experts, base, SEED + 1)
    assert drive.advance._cache_size() == compiled
    # A shape that was not seen is: the count does count.
    wider = {name: jnp.tile(leaf, 2) for name, leaf in base.items()}
    drivers.in_memory(case.rule, [wider] * case.experts, wider, SEED)
    assert drive.advance._cache_size() > compiled

  def test_rounds(self, any_case):
    block = sharded_block((16, 24), experts=any_case.experts)
    assert len(questions.asked(any_case.rule, block)) == any_case.rounds
    stacked = sharded_block((4, 16, 8), (0,), any_case.experts)
    assert len(questions.asked(any_case.rule, stacked)) == any_case.rounds


class TestDegenerate:
  """8. Inputs at the edge: defined, never silent."""

  def test_zero_deltas(self, case):
    base, _ = models.flat(models.SMALL)
    merged = drivers.in_memory(case.rule, [base] * case.experts, base, SEED)
    if case.name in ('average', 'slerp'):
      compare.within_ulps(merged, base, 1, base)
    else:
      compare.same_bits(merged, base)

  def test_equal_magnitudes(self):
    # At every density all entries are at the cut, and all are kept.
    base, _ = models.coarse(models.SMALL)
    signs = np.random.default_rng(0)
    experts = [
      {
        name: value + 0.25 * signs.choice(np.float32([-1, 1]), value.shape)
        for name, value in base.items()
      }
      for _ in range(3)
    ]
    trimmed = drivers.in_memory(mk.ties(0.01), experts, base)
    compare.same_bits(trimmed, drivers.in_memory(mk.ties(1.0), experts, base))
    changed = np.concatenate([(trimmed[n] - base[n]).ravel() for n in base])
    assert (np.abs(changed) == 0.25).all()

  @pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
  def test_non_finite(self, case, value):
    finite, experts, base = in_memory(case)
    broken = {**experts[1], 'odd': experts[1]['odd'].at[2, 3].set(value)}
    if case.family == 'random':
      # An entry that is dropped does not count; the seed keeps this one.
      case = cases.Case(
        case.name, case.identical, case.expected, case.family, 0
      )
      finite = drivers.in_memory(case.rule, experts, base, SEED)
    merged = drivers.in_memory(
      case.rule, [experts[0], broken, *experts[2:]], base, SEED
    )
    assert not np.isfinite(merged['odd'][2, 3])
    elsewhere = np.ones((7, 5), bool)
    elsewhere[2, 3] = False
    if case.family in ('elementwise', 'random'):
      assert (merged['odd'] == finite['odd'])[elsewhere].all()
      assert (merged['dense/kernel'] == finite['dense/kernel']).all()

  def test_opposite_infinities(self, case):
    _, experts, base = in_memory(case)
    first, second, *others = experts
    broken = [
      {**first, 'odd': first['odd'].at[2, 3].set(np.inf)},
      {**second, 'odd': second['odd'].at[2, 3].set(-np.inf)},
    ]
    merged = drivers.in_memory(case.identical, [*broken, *others], base, SEED)
    assert np.isnan(merged['odd'][2, 3])
