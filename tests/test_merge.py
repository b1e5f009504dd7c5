"""The in-memory merge: trees, transformations, options, errors."""

import collections
import dataclasses
import functools

from flax import linen, nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving import drive
from mergekit_jax.driving.drive import advance, answer
from tests import compare, models, reference

SHAPES = {'kernel': (6, 5), 'odd': (7, 5)}
BASE, EXPERTS = models.flat(SHAPES)
KEY = jax.random.key(3)
AVERAGE = reference.average(EXPERTS)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['kernel', 'odd'],
  meta_fields=['name'],
)
@dataclasses.dataclass
class Parameters:
  kernel: jax.Array
  odd: jax.Array
  name: str = 'a model'


TREES = {
  'dict': lambda model: dict(model),
  'list': lambda model: [model['kernel'], [model['odd']]],
  'tuple': lambda model: (model['kernel'], (), {'b': model['odd']}, None),
  'dataclass': lambda model: Parameters(**model),
  'numpy': lambda model: {k: np.asarray(v) for k, v in model.items()},
  'nnx': lambda model: nnx.State(
    {name: nnx.Param(leaf) for name, leaf in model.items()}
  ),
}


# What traces a function without arguments.
TRACED = {
  'jit': lambda run: jax.jit(run)(),
  'checkpoint': lambda run: jax.checkpoint(run)(),
  'cond': lambda run: jax.lax.cond(True, run, lambda: BASE),
  'scan': lambda run: jax.lax.scan(lambda x, _: (run(), x), BASE, length=1)[0],
}


class TestTrees:
  """Any pytree in, the same pytree out."""

  @pytest.mark.parametrize('kind', TREES)
  def test_kind(self, kind):
    base, *experts = map(TREES[kind], (BASE, *EXPERTS))
    merged = mk.merge(mk.average(), experts, base)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    got = dict(zip(('kernel', 'odd'), jax.tree.leaves(merged), strict=True))
    compare.like_reference(got, AVERAGE, EXPERTS)

  def test_linen_and_nnx_draw_the_same_masks(self):
    module = linen.Dense(5)
    params = module.init(jax.random.key(0), jnp.ones((2, 6)))
    moved = [
      jax.tree.map(lambda x, i=i: x + 0.01 * (i + 1), params) for i in range(3)
    ]
    merged = mk.merge(mk.dare(0.5), moved, params, key=0)
    assert module.apply(merged, jnp.ones((2, 6))).shape == (2, 5)
    state = lambda tree: nnx.State(
      {name: nnx.Param(leaf) for name, leaf in tree['params'].items()}
    )
    again = mk.merge(
      mk.dare(0.5), list(map(state, moved)), state(params), key=0
    )
    for name, leaf in merged['params'].items():
      np.testing.assert_array_equal(again[name].get_value(), leaf)
    assert (merged['params']['kernel'] != moved[0]['params']['kernel']).any()

  def test_other_leaves_are_those_of_the_base(self):
    others = {
      'steps': jnp.arange(3),
      'flag': jnp.array([True, False]),
      'key': jax.random.key(1),
    }
    changed = {**others, 'steps': jnp.arange(3) + 7, 'flag': ~others['flag']}
    experts = [{**expert, **changed} for expert in EXPERTS]
    merged = mk.merge(mk.average(), experts, {**BASE, **others})
    assert merged.keys() == {*BASE, *others}
    for name, leaf in others.items():
      assert merged[name].dtype == leaf.dtype and (merged[name] == leaf).all()

  def test_dtype_is_of_the_base(self):
    base = {**BASE, 'kernel': BASE['kernel'].astype('bfloat16')}
    merged = mk.merge(mk.task_arithmetic(0.4), EXPERTS, base)
    assert merged['kernel'].dtype == jnp.bfloat16
    assert merged['odd'].dtype == jnp.float32
    # The experts were not rounded to the base's dtype first.
    expected = reference.task_arithmetic(EXPERTS, base, scale=0.4)
    compare.like_reference(merged, expected, EXPERTS)
    merged = mk.merge(mk.average(), [base, *EXPERTS])
    assert merged['kernel'].dtype == jnp.bfloat16

  def test_inputs_are_left_alone(self):
    before = jax.tree.map(np.array, (BASE, EXPERTS))
    mk.merge(mk.ties(0.5), EXPERTS, BASE)
    jax.tree.map(np.testing.assert_array_equal, before, (BASE, EXPERTS))

  def test_committed_only_if_the_base_is(self):
    """What is not goes with arrays on any other devices."""
    device = jax.devices()[0]
    for base in (BASE, jax.device_put(BASE, device)):
      merged = mk.merge(mk.ties(0.5), EXPERTS, base)
      committed = jax.tree.map(lambda x: x.committed, (base, merged))
      assert committed[0] == committed[1]

  @pytest.mark.parametrize('place', [np.asarray, jnp.asarray])
  def test_base_that_nobody_has_placed(self, place):
    """The merge stays on all devices, as a sum of both would."""
    mesh = jax.make_mesh((8,), ('x',), (AxisType.Auto,))
    spread = NamedSharding(mesh, jax.P('x'))
    experts = [jax.device_put(jnp.full((8, 2), n), spread) for n in (1.0, 2.0)]
    merged = mk.merge(
      mk.task_arithmetic(), experts, place(np.zeros((8, 2), np.float32))
    )
    assert merged.sharding == spread
    np.testing.assert_array_equal(merged + experts[0], np.full((8, 2), 4.0))

  def test_totals_of_leaves_are_added_as_they_come(self, monkeypatch):
    """All of them at once would be larger than the models."""
    held = []

    def looked_at(*arguments):
      held.append(sum(array.nbytes for array in jax.live_arrays()))
      return answer(*arguments)

    monkeypatch.setattr(drive, 'answer', looked_at)
    for leaves in (2, 40):
      model = {str(i): np.ones(4, np.float32) for i in range(leaves)}
      mk.merge(mk.ties(), [model], model)
    few, many = held[0], held[2]
    assert many - few < 2**20  # of 40 histograms of 2**18 bytes

  @pytest.mark.parametrize('has_base', [True, False])
  def test_numpy_is_put_on_a_device_once(self, has_base, monkeypatch):
    trees = list(map(TREES['numpy'], (BASE, *EXPERTS)))
    base, experts = (trees[0], trees[1:]) if has_base else (None, trees)
    put = collections.Counter()
    asarray = jnp.asarray

    def counted(x, *arguments, **options):
      put[id(x)] += isinstance(x, np.ndarray)
      return asarray(x, *arguments, **options)

    monkeypatch.setattr(jnp, 'asarray', counted)
    mk.merge(mk.average(), experts, base)
    assert [put[id(leaf)] for leaf in jax.tree.leaves(trees)] == [1] * 8


class TestTransformations:
  """An ordinary JAX function."""

  def weighted(self, merged):
    # A different cotangent for every entry.
    return sum(
      (leaf * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape))).sum()
      for leaf in merged.values()
    )

  def slope(self, expected, point, direction, step=1e-4):
    """Central difference of the float64 reference."""
    value = lambda at: sum(
      (leaf * np.cos(np.arange(leaf.size).reshape(leaf.shape))).sum()
      for leaf in expected(at).values()
    )
    shifted = [point + sign * step * direction for sign in (1, -1)]
    return (value(shifted[0]) - value(shifted[1])) / (2 * step)

  @pytest.mark.parametrize(
    'method,expected',
    [
      (
        lambda s: mk.ties(0.4, s, election='count'),
        lambda s: reference.ties(
          EXPERTS, BASE, density=0.4, scale=s, election='count'
        ),
      ),
      (
        lambda s: mk.dare(0.5, s),
        lambda s: reference.dare(EXPERTS, BASE, KEY, drop_rate=0.5, scale=s),
      ),
    ],
    ids=['ties', 'dare'],
  )
  def test_gradient_of_scale(self, method, expected):
    loss = lambda s: self.weighted(mk.merge(method(s), EXPERTS, BASE, key=KEY))
    got = jax.grad(loss)(0.7)
    want = self.slope(expected, 0.7, 1.0)
    # Sums in float32 against differences, which are no exact slopes.
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert abs(want) > 1e-3

  @pytest.mark.parametrize(
    'method,expected',
    [
      (
        lambda w: mk.average(w),
        lambda w: reference.average(EXPERTS, weights=list(w)),
      ),
      (
        lambda w: mk.ties(0.4, weights=w, election='count'),
        lambda w: reference.ties(
          EXPERTS, BASE, density=0.4, weights=list(w), election='count'
        ),
      ),
    ],
    ids=['average', 'ties'],
  )
  def test_gradient_of_weights(self, method, expected):
    loss = lambda w: self.weighted(mk.merge(method(w), EXPERTS, BASE))
    point = np.array([1.0, 0.5, 2.0])
    got = jax.grad(loss)(jnp.asarray(point, jnp.float32))
    want = [self.slope(expected, point, axis) for axis in np.eye(3)]
    # As above; one slope of three may be small where its terms cancel.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(want).max() > 1e-2

  @pytest.mark.parametrize('election', ['mass', 'count'])
  def test_gradient_of_a_weight_that_is_zero(self, election):
    """By hand: the expert agrees in the first entry, not in the second."""
    base, first, second = jnp.zeros(2), jnp.array([2.0, 2.0]), [6.0, -1.0]
    if election == 'count':
      first = jnp.array([[2.0, 2.0], [2.0, 2.0]])
    experts = [*jnp.atleast_2d(first), jnp.array(second)]
    others = len(experts) - 1

    def merged(weight):
      weights = (*[1.0] * others, weight)
      return mk.merge(
        mk.ties(1.0, weights=weights, election=election), experts, base
      )

    # (2 n + 6 w) / (n + w) has the slope 4 / n where w is 0.
    expected = [4.0 / others, 0.0]
    # Quotients of small whole numbers in float32, off by some 2**-24.
    np.testing.assert_allclose(jax.jacobian(merged)(0.0), expected, atol=1e-6)

  def test_no_gradient_where_an_expert_is_the_base(self):
    """It takes no part in the mean there."""
    run = lambda x: mk.merge(mk.ties(1.0), [jnp.full(2, 2.0), x], jnp.zeros(2))
    assert not jax.jacobian(run)(jnp.zeros(2)).any()

  def test_trim_where_as_many_are_nan_as_are_kept(self):
    expert = jnp.arange(1.0, 11.0).at[0].set(jnp.nan)
    merged = mk.merge(mk.ties(0.1), [expert], jnp.zeros(10))
    np.testing.assert_array_equal(merged, [np.nan] + [0.0] * 9)

  @pytest.mark.parametrize('kind', [float, np.float64, np.float32, jnp.float32])
  def test_forward_mode(self, kind):
    """A density has no slope; the slope in λ is the merged task vector."""

    def merged(density, scale):
      return mk.merge(mk.ties(density, scale), EXPERTS, BASE)

    numbers = kind(0.5), kind(2.0)
    value, slope = jax.jvp(merged, numbers, (kind(1), kind(1)))
    expected = reference.ties(EXPERTS, BASE, density=0.5, scale=2.0)
    base = reference.float64(BASE)
    deltas = reference.task_vectors(EXPERTS, BASE)
    for name, leaf in expected.items():
      # Two additions of experts, a quotient and the base (λ is a power of 2):
      # float32 rounds four times, by 2**-24 of no more than all magnitudes.
      most = abs(base[name]) + 2 * sum(abs(delta[name]) for delta in deltas)
      bound = 4 * 2**-24 * most.max()
      close = functools.partial(np.testing.assert_allclose, rtol=0, atol=bound)
      close(value[name], leaf)
      close(slope[name], (leaf - base[name]) / 2)

  def test_gradient_of_experts(self):
    """A merge inside a training loop: what survives the trim gets a slope."""
    loss = lambda experts: mk.merge(mk.ties(0.4), experts, BASE)['odd'].sum()
    gradient = jax.grad(loss)(EXPERTS)
    moved = reference.ties(EXPERTS, BASE, density=0.4)['odd'] != BASE['odd']
    total = sum(np.asarray(g['odd']) for g in gradient)
    # The disjoint mean hands each entry's slope to those that agree.
    np.testing.assert_allclose(total, moved, atol=1e-6)
    assert all((np.asarray(g['kernel']) == 0).all() for g in gradient)

  @pytest.mark.parametrize(
    'method,values,expected',
    [
      (
        lambda v: mk.ties(v, scope='tensor'),
        [0.1, 0.5, 1.0],
        lambda v: reference.ties(EXPERTS, BASE, density=v, scope='tensor'),
      ),
      (
        lambda v: mk.task_arithmetic(v),
        [0.0, 0.5, -1.0],
        lambda v: reference.task_arithmetic(EXPERTS, BASE, scale=v),
      ),
      (
        lambda v: mk.dare(v, 0.4),
        [0.0, 0.5, 0.9],
        lambda v: reference.dare(EXPERTS, BASE, KEY, drop_rate=v, scale=0.4),
      ),
    ],
    ids=['density', 'scale', 'drop_rate'],
  )
  def test_vmap(self, method, values, expected):
    run = lambda value: mk.merge(method(value), EXPERTS, BASE, key=KEY)
    merged = jax.vmap(run)(jnp.array(values))
    for i, value in enumerate(values):
      got = {name: leaf[i] for name, leaf in merged.items()}
      compare.like_reference(got, expected(value), [*EXPERTS, BASE])

  @pytest.mark.parametrize(
    'make,expected',
    [
      (mk.average, reference.average),
      (lambda w: mk.chain(mk.weighted_sum(w)), reference.task_arithmetic),
    ],
    ids=['average', 'sum'],
  )
  def test_vmap_over_weights(self, make, expected):
    """A rule of arrays, of which each entry is a merge of its own."""
    batch = ([1.0, 0.0], [0.5, 0.0], [0.0, 2.0])
    rule = make(tuple(map(jnp.array, batch)))
    merged = jax.vmap(lambda rule: mk.merge(rule, EXPERTS, BASE))(rule)
    for i, weights in enumerate(zip(*batch, strict=True)):
      got = {name: leaf[i] for name, leaf in merged.items()}
      value = expected(EXPERTS, BASE, weights=list(weights))
      compare.like_reference(got, value, [*EXPERTS, BASE])

  @pytest.mark.parametrize('weights', [(0.3, 0.7, 0.11), (0.1, 0.2, 0.3)])
  @pytest.mark.parametrize('kind', [float, np.float64])
  def test_64_bits_change_nothing(self, weights, kind):
    rule = mk.average(list(map(kind, weights)))
    expected = mk.merge(rule, EXPERTS)
    with jax.enable_x64(True):
      compare.same_bits(mk.merge(rule, EXPERTS), expected)

  @pytest.mark.parametrize('stacked', [None, 0, 1])
  @pytest.mark.parametrize(
    ('mesh', 'spec'),
    [('fsdp', jax.P(None, 'fsdp')), ('2d', jax.P('fsdp', None, 'tensor'))],
  )
  def test_cut_to_what_devices_do_not_divide(self, mesh, spec, stacked):
    """With a threshold for each layer where layers are stacked."""
    base, experts = models.flat({'kernel': (16, 16, 8)}, experts=2)
    placed = NamedSharding(models.mesh(mesh), spec)
    put = lambda model: {'kernel': jax.device_put(model['kernel'], placed)}
    cut = lambda model: {'kernel': model['kernel'][:9, :13, :7]}
    method = mk.ties(0.3, scope='model' if stacked is None else 'tensor')
    axes = None if stacked is None else {'kernel': stacked}

    def run(experts, base):
      experts = [*map(cut, experts)]
      return mk.merge(method, experts, cut(base), stacked_axes=axes)

    merged = jax.jit(run)([*map(put, experts)], put(base))
    compare.same_bits(merged, run(experts, base))

    def layers(model):
      if stacked is None:
        return cut(model)
      return dict(enumerate(np.moveaxis(cut(model)['kernel'], stacked, 0)))

    base, *experts = map(layers, (base, *experts))
    expected = reference.ties(experts, base, density=0.3, scope=method.scope)
    compare.like_reference(layers(merged), expected, [*experts, base])

  def test_constrained_to_devices_that_do_not_divide_it(self):
    placed = NamedSharding(models.mesh('fsdp'), jax.P('fsdp'))

    @jax.jit
    def run(experts, base):
      constrained = jax.lax.with_sharding_constraint([base, *experts], placed)
      return mk.merge(mk.ties(0.4), constrained[1:], constrained[0])

    merged = run(EXPERTS, BASE)
    compare.same_bits(merged, mk.merge(mk.ties(0.4), EXPERTS, BASE))
    expected = reference.ties(EXPERTS, BASE, density=0.4)
    compare.like_reference(merged, expected, [*EXPERTS, BASE])

  @pytest.mark.parametrize('kind', TRACED)
  def test_of_models_that_are_closed_over(self, kind):
    """Where nothing that is merged is traced, but what is computed of it is."""
    merged = TRACED[kind](lambda: mk.merge(mk.ties(0.4), EXPERTS, BASE))
    expected = reference.ties(EXPERTS, BASE, density=0.4)
    compare.like_reference(merged, expected, [*EXPERTS, BASE])

  @pytest.mark.parametrize('placed', [True, False])
  @pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto])
  def test_closed_over_in_a_mesh_that_is_set(self, axis_type, placed):
    mesh = models.mesh('2d', axis_type)
    put = lambda model: models.place(model, mesh) if placed else model
    base, *experts = map(put, (BASE, *EXPERTS))
    method = mk.dare_ties(0.5, 0.4)
    expected = mk.merge(method, EXPERTS, BASE, key=KEY)
    with jax.set_mesh(mesh):
      merged = jax.jit(lambda: mk.merge(method, experts, base, key=KEY))()
    compare.same_bits(merged, expected)

  def test_shapes_of_models_that_are_closed_over(self):
    shapes = jax.eval_shape(lambda: mk.merge(mk.ties(), EXPERTS, BASE))
    assert {name: leaf.shape for name, leaf in shapes.items()} == SHAPES

  def test_jit_on_explicit_axes(self):
    mesh = models.mesh('2d', AxisType.Explicit)
    base, *experts = (models.place(m, mesh) for m in (BASE, *EXPERTS))
    run = jax.jit(lambda m, e, b: mk.merge(m, e, b))
    merged = run(mk.ties(0.4), experts, base)
    for name, leaf in merged.items():
      assert leaf.sharding.spec == base[name].sharding.spec
    compare.same_bits(merged, mk.merge(mk.ties(0.4), EXPERTS, BASE))

  def test_jit_on_explicit_axes_with_a_base_that_is_not_placed(self):
    mesh = models.mesh('2d', AxisType.Explicit)
    experts = [models.place(expert, mesh) for expert in EXPERTS]
    run = jax.jit(lambda e, b: mk.merge(mk.ties(0.4), e, b))
    compare.same_bits(run(experts, BASE), mk.merge(mk.ties(0.4), EXPERTS, BASE))

  @pytest.mark.parametrize('placed', [True, False])
  @pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto])
  def test_in_a_mesh_that_is_set(self, axis_type, placed):
    mesh = models.mesh('2d', axis_type)
    put = lambda model: models.place(model, mesh) if placed else model
    base, *experts = map(put, (BASE, *EXPERTS))
    run = lambda e, b: mk.merge(mk.ties(0.4), e, b)
    expected = run(EXPERTS, BASE)
    with jax.set_mesh(mesh):
      compare.same_bits(run(experts, base), expected)
      compare.same_bits(jax.jit(run)(experts, base), expected)

  @pytest.mark.parametrize('method', [mk.average(), mk.ties(0.4)])
  @pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto])
  def test_in_a_shard_map_over_some_axes(self, axis_type, method):
    """Each part is a merge of its own."""
    mesh = models.mesh('2d', axis_type)
    over, rows = mesh.axis_names[0], mesh.devices.shape[0]
    random = np.random.default_rng(0)
    whole = random.standard_normal((3, 2 * rows, 4)).astype('float32')
    placed = NamedSharding(mesh, jax.P(*mesh.axis_names))
    run = lambda base, *experts: mk.merge(method, experts, base)
    with jax.set_mesh(mesh):
      in_parts = jax.shard_map(
        run, in_specs=jax.P(over), out_specs=jax.P(over), axis_names={over}
      )
      merged = jax.jit(in_parts)(*jax.device_put(list(whole), placed))
    expected = [run(*part) for part in np.split(whole, rows, axis=1)]
    np.testing.assert_array_equal(merged, np.concatenate(expected))

  @pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto])
  def test_key_in_a_mesh_of_one_device_that_is_set(self, axis_type):
    method = mk.dare(0.5)
    expected = mk.merge(method, EXPERTS, BASE, key=KEY)
    with jax.set_mesh(jax.make_mesh((1,), ('x',), axis_types=(axis_type,))):
      for key in (3, jax.random.key(3), jax.random.PRNGKey(3)):
        compare.same_bits(mk.merge(method, EXPERTS, BASE, key=key), expected)
      (swept,) = mk.sweep({'': method}, EXPERTS, BASE, dict, seed=3).values()
    compare.same_bits(swept, expected)

  def test_gradient_and_vmap_in_a_mesh_that_is_set(self):
    mesh = models.mesh('2d', AxisType.Explicit)
    base, *experts = (models.place(model, mesh) for model in (BASE, *EXPERTS))

    def total(scale):
      merged = mk.merge(mk.ties(0.4, scale), experts, base)
      return sum(leaf.sum() for leaf in merged.values())

    with jax.set_mesh(mesh):
      slope = jax.grad(total)(1.0)
      totals = jax.jit(jax.vmap(total))(jnp.array([0.0, 1.0]))
    of = lambda model: sum(float(leaf.sum()) for leaf in model.values())
    ends = [
      of(reference.ties(EXPERTS, BASE, density=0.4, scale=scale))
      for scale in (0.0, 1.0)
    ]
    # Float32 sums of 65 numbers, added in pairs seven deep, whose magnitudes
    # are seven times what they come to: 7 * 7 * 2**-24.
    np.testing.assert_allclose(totals, ends, rtol=3e-6)
    np.testing.assert_allclose(slope, ends[1] - ends[0], rtol=3e-6)

  def test_ties_of_each_part_in_shard_map(self):
    """Of parts so large that their histograms take several scatters."""
    shape = (8, 2**17 + 5)
    base, experts = models.flat({'kernel': shape}, experts=2)
    merge = lambda e, b: mk.merge(mk.ties(0.3), e, b)
    rows = jax.P('fsdp')
    merged = jax.jit(
      jax.shard_map(
        merge,
        mesh=models.mesh('fsdp'),
        in_specs=(rows, rows),
        out_specs=rows,
      )
    )(experts, base)
    row = lambda model: {'kernel': model['kernel'][3:4]}
    compare.same_bits(row(merged), merge([*map(row, experts)], row(base)))

  def test_numbers_of_any_type_compile_once(self):
    run = lambda scale: mk.merge(mk.task_arithmetic(scale), EXPERTS, BASE)
    run(0.3)
    compiled = advance._cache_size()
    compare.same_bits(run(2), run(2.0))
    assert advance._cache_size() == compiled


class TestKeys:
  """Every kind of key gives the same bits for the same seed."""

  def run(self, key):
    return mk.merge(mk.dare(0.5), EXPERTS, BASE, key=key)

  def test_kinds(self):
    expected = self.run(3)
    compare.same_bits(self.run(jax.random.key(3)), expected)
    compare.same_bits(self.run(jax.random.PRNGKey(3)), expected)
    other = self.run(4)
    assert any((other[n] != expected[n]).any() for n in expected)

  @pytest.mark.parametrize(
    'key',
    [
      jax.random.split(jax.random.key(0), 3),
      jax.random.PRNGKey(0, impl='rbg'),
      np.array([1, 2, 3]),
      np.array([7], np.uint32),
      np.array([0.1, 0.2], np.float32),
      np.float32(3),
    ],
    ids=['three', 'rbg', 'integers', 'one word', 'floats', 'float'],
  )
  def test_no_key(self, key):
    with pytest.raises(ValueError, match=r'key(=| is ).*; give'):
      self.run(key)

  @pytest.mark.parametrize('implementation', ['rbg', 'unsafe_rbg'])
  def test_a_seed_is_a_threefry_key(self, implementation):
    """Whatever keys the caller makes by default."""
    expected = self.run(3)
    with jax.default_prng_impl(implementation):
      compare.same_bits(self.run(3), expected)
      compare.same_bits(self.run(np.int64(3)), expected)

  def test_a_traced_seed(self):
    compare.same_bits(jax.jit(self.run)(3), self.run(3))

  def test_other_implementations(self):
    merged = self.run(jax.random.key(3, impl='rbg'))
    compare.same_bits(self.run(jax.random.key(3, impl='rbg')), merged)
    other = self.run(jax.random.key(4, impl='rbg'))
    assert any((other[n] != merged[n]).any() for n in merged)

  def test_leaves_and_experts_have_masks_of_their_own(self):
    same = {'a': BASE['odd'], 'b': BASE['odd']}
    moved = {name: leaf + 1 for name, leaf in same.items()}
    of_first = mk.merge(
      mk.dare(0.5, weights=[1, 0, 0]), [moved] * 3, same, key=0
    )
    of_second = mk.merge(
      mk.dare(0.5, weights=[0, 1, 0]), [moved] * 3, same, key=0
    )
    assert (of_first['a'] != of_first['b']).any()
    assert (of_first['a'] != of_second['a']).any()

  def test_other_leaves_do_not_change_a_mask(self):
    expected = self.run(3)
    only = lambda model: {'odd': model['odd']}
    alone = mk.merge(mk.dare(0.5), [*map(only, EXPERTS)], only(BASE), key=3)
    compare.same_bits(alone, only(expected))


class TestOverrides:
  """{regex: 'base' or a rule}, a scope of its own."""

  def run(self, overrides, method=None):
    return mk.merge(
      method or mk.task_arithmetic(0.4), EXPERTS, BASE, overrides=overrides
    )

  def test_base(self):
    merged = self.run({'.*dd': 'base'})
    np.testing.assert_array_equal(merged['odd'], BASE['odd'])
    expected = reference.task_arithmetic(EXPERTS, BASE, scale=0.4)
    compare.like_reference(
      {'kernel': merged['kernel']}, {'kernel': expected['kernel']}, EXPERTS
    )

  @pytest.mark.parametrize(
    'other',
    [
      *(jax.nn.relu, 'mlp', linen.Dense(3)),
      *(jnp.float32, np.float32, np.dtype('float32')),
    ],
    ids=lambda other: type(other).__name__,
  )
  def test_leaves_that_are_no_arrays(self, other):
    """As modules have them among their leaves."""
    module = lambda leaf: {'w': leaf, 'other': other}
    merged = mk.merge(mk.average(), [module(jnp.ones(3)), module(jnp.zeros(3))])
    assert merged['w'].tolist() == [0.5] * 3
    assert merged['other'] is other

  def test_what_is_kept_need_not_be_alike(self):
    """Such as the embedding of an expert whose vocabulary was extended."""
    longer, lacking = dict(EXPERTS[0]), dict(EXPERTS[1])
    longer['odd'] = jnp.zeros((9, 5))
    del lacking['odd']
    merge = lambda overrides: mk.merge(
      mk.average(), [longer, lacking], BASE, overrides=overrides
    )
    merged = merge({'odd': 'base'})
    np.testing.assert_array_equal(merged['odd'], BASE['odd'])
    expected = (EXPERTS[0]['kernel'] + EXPERTS[1]['kernel']) / 2
    # A sum of two and a half of it, in float32: a rounding or two.
    np.testing.assert_allclose(merged['kernel'], expected, rtol=1e-6)
    with pytest.raises(ValueError, match='differ in 2 places'):
      merge({'odd': mk.average()})

  def test_what_only_an_expert_has_is_named_and_left_out(self):
    """Such as an output layer that is tied in the base."""
    untied = {**EXPERTS[0], 'head': jnp.ones((2, 3))}
    merge = lambda overrides: mk.merge(
      mk.average(), [untied, *EXPERTS[1:]], BASE, overrides=overrides
    )
    compare.same_bits(merge({'head': 'base'}), mk.merge(mk.average(), EXPERTS))
    for overrides in (None, {'head': mk.average()}):
      with pytest.raises(ValueError, match='head: only in(?s:.*)overrides={'):
        merge(overrides)

  def test_first_match_wins(self):
    merged = self.run({'odd': mk.average(), 'odd|kernel': 'base'})
    np.testing.assert_array_equal(merged['kernel'], BASE['kernel'])
    compare.like_reference(
      {'odd': merged['odd']}, {'odd': AVERAGE['odd']}, EXPERTS
    )

  def test_scope_of_its_own(self):
    # Small task vectors: one threshold for both would drop all of `odd`.
    experts = [
      {**e, 'odd': BASE['odd'] + 0.01 * (e['odd'] - BASE['odd'])}
      for e in EXPERTS
    ]
    rule = mk.ties(0.3)
    together = mk.merge(rule, experts, BASE)
    np.testing.assert_array_equal(together['odd'], BASE['odd'])
    apart = mk.merge(rule, experts, BASE, overrides={'odd': mk.ties(0.5)})
    for name, density in {'odd': 0.5, 'kernel': 0.3}.items():
      only = lambda model, name=name: {name: model[name]}
      expected = reference.ties(
        [*map(only, experts)], only(BASE), density=density
      )
      compare.like_reference(only(apart), expected, EXPERTS)

  def test_path_below_the_root(self):
    nest = lambda model: {'params': dict(model)}
    merged = mk.merge(
      mk.average(),
      [*map(nest, EXPERTS)],
      nest(BASE),
      overrides={'params/odd': 'base'},
    )
    np.testing.assert_array_equal(merged['params']['odd'], BASE['odd'])


class TestStackedAxes:
  """Every layer slice is a tensor of its own."""

  @pytest.mark.parametrize(
    'axes,order', [(1, (1, 0, 2)), (-1, (2, 0, 1)), ((2, 0), (0, 2, 1))]
  )
  def test_slices(self, axes, order):
    base, experts = models.flat({'w': (2, 3, 5)})
    rule = mk.ties(0.4, scope='tensor')
    merged = mk.merge(rule, experts, base, stacked_axes={'w': axes})
    slices = lambda model: {
      str(i): leaf
      for i, leaf in enumerate(
        np.transpose(np.asarray(model['w']), order).reshape(
          -1, *np.transpose(model['w'], order).shape[np.size(axes) :]
        )
      )
    }
    expected = reference.ties(
      [*map(slices, experts)], slices(base), density=0.4, scope='tensor'
    )
    compare.like_reference(slices(merged), expected, experts_of(experts))

  def test_model_scope_is_not_touched_by_stacking(self):
    base, experts = models.flat({'w': (2, 3, 5)})
    merged = mk.merge(mk.ties(0.4), experts, base, stacked_axes={'w': 0})
    compare.same_bits(merged, mk.merge(mk.ties(0.4), experts, base))


def experts_of(experts):
  """The slices share the largest value of their leaf, for the bound."""
  largest = max(np.abs(np.asarray(e['w'])).max() for e in experts)
  return [{str(i): largest for i in range(10)}]


class TestErrors:
  """Each says what was given, what was expected and what to do."""

  def fails(self, pattern, call, error=ValueError):
    with pytest.raises(error, match=pattern):
      call()

  def test_no_experts(self):
    self.fails('No experts', lambda: mk.merge(mk.average(), [], BASE))

  def test_all_differences_are_listed(self):
    first = {'kernel': BASE['kernel'].T, 'extra': jnp.ones(3)}
    second = {**BASE, 'odd': jnp.ones((7, 5), jnp.int32)}
    with pytest.raises(ValueError) as raised:
      mk.merge(mk.average(), [first, second], BASE)
    for line in (
      'differ in 4 places',
      'extra: only in experts[0], float32[3]',
      'kernel: float32[5,6] in experts[0], float32[6,5] expected',
      'odd: missing in experts[0]',
      'odd: int32[7,5] in experts[1], float32[7,5] expected',
    ):
      assert line in str(raised.value)

  def test_missing_base(self):
    for rule in (mk.task_arithmetic(), mk.ties(), mk.dare()):
      call = lambda rule=rule: mk.merge(rule, EXPERTS, key=0)
      self.fails('no base was given', call)

  def test_missing_key(self):
    call = lambda: mk.merge(mk.dare(), EXPERTS, BASE)
    self.fails(r'no key was given.*key=jax\.random\.key', call)

  def test_override_matches_nothing(self):
    call = lambda: mk.merge(
      mk.average(), EXPERTS, BASE, overrides={'kernle': 'base'}
    )
    self.fails(r"overrides: 'kernle' matches no path.*'kernel'\?", call)

  @pytest.mark.parametrize('value', ['bass', 0.5, None])
  def test_override_of_a_wrong_type(self, value):
    call = lambda: mk.merge(
      mk.average(), EXPERTS, BASE, overrides={'odd': value}
    )
    self.fails(f"An override is 'base' or a rule .*{value!r}", call)

  def test_override_is_no_regular_expression(self):
    call = lambda: mk.merge(
      mk.average(), EXPERTS, BASE, overrides={'(odd': 'base'}
    )
    self.fails('is not a regular expression', call)

  @pytest.mark.parametrize('axes', [2, -3, (0, 5)])
  def test_stacked_axis_out_of_range(self, axes):
    call = lambda: mk.merge(
      mk.average(), EXPERTS, BASE, stacked_axes={'odd': axes}
    )
    self.fails(r'odd has shape \(7, 5\) and no axis', call)

  def test_stacked_axes_match_nothing(self):
    call = lambda: mk.merge(mk.average(), EXPERTS, BASE, stacked_axes={'od': 0})
    self.fails(r"stacked_axes: 'od' matches no path.*'odd'\?", call)

  @pytest.mark.parametrize('make', [mk.average, mk.task_arithmetic, mk.ties])
  def test_number_of_weights(self, make):
    call = lambda: mk.merge(make(weights=[1, 2]), EXPERTS, BASE)
    self.fails('2 weights were given for 3 experts', call)

  @pytest.mark.parametrize('value', [0, -0.1, 1.01, float('nan'), float('inf')])
  def test_density(self, value):
    self.fails(r'density=.*fraction in \(0, 1\]', lambda: mk.ties(value))
    call = lambda: mk.dare_ties(density=value)
    self.fails(r'density=.*fraction in \(0, 1\]', call)

  @pytest.mark.parametrize('value', [-0.1, 1, 1.5, float('nan')])
  def test_drop_rate(self, value):
    for make in (mk.dare, mk.dare_ties):
      call = lambda make=make: make(value)
      self.fails(r'drop_rate=.*fraction in \[0, 1\)', call)

  @pytest.mark.parametrize(
    'make,name',
    [
      (mk.task_arithmetic, 'scale'),
      (mk.ties, 'density'),
      (mk.dare, 'drop_rate'),
      (lambda w: mk.average([w] * 3), 'weight'),
    ],
  )
  def test_arrays_are_for_vmap(self, make, name):
    """They would be broadcast over the columns of a leaf."""
    call = lambda: mk.merge(make(np.full(5, 0.5)), EXPERTS, BASE, key=0)
    self.fails(rf'{name} is an array of shape \(5,\); .* one number', call)

  @pytest.mark.parametrize(
    'value',
    [
      *('0.5', True, None, [0.5], 0.5j, np.str_('0.5')),
      *(np.bool_(True), np.complex64(0.5), np.array(0.5, object)),
      *(jnp.array(True), jnp.array([0.5 + 1j])),
    ],
    ids=repr,
  )
  def test_numbers(self, value):
    real = 'give a real number'
    self.fails(f'scale=.*{real}', lambda: mk.ties(scale=value))
    self.fails(f'density=.*{real}', lambda: mk.ties(density=value))
    self.fails(f'weight=.*{real}', lambda: mk.task_arithmetic(weights=[value]))

  @pytest.mark.parametrize('dtype', ['bool', 'complex64'])
  def test_traced_numbers(self, dtype):
    made = lambda value: jax.tree.leaves(mk.task_arithmetic(value))
    value = np.ones((), dtype)
    self.fails('give a real number', lambda: jax.jit(made)(value))
    self.fails('give a real number', lambda: jax.vmap(made)(value[None]))

  @pytest.mark.parametrize('dtype', ['int8', 'uint32', 'float16', 'bfloat16'])
  def test_numbers_of_every_size(self, dtype):
    merged = mk.merge(mk.task_arithmetic(jnp.ones((), dtype)), EXPERTS, BASE)
    compare.same_bits(merged, mk.merge(mk.task_arithmetic(), EXPERTS, BASE))

  @pytest.mark.parametrize('value', [float('nan'), float('inf')])
  def test_finite(self, value):
    self.fails('finite', lambda: mk.task_arithmetic(value))
    self.fails('finite', lambda: mk.task_arithmetic(weights=[1, value]))
    self.fails('finite', lambda: mk.average([1, value]))
    # Of many at once, too.
    scales = jnp.array([1.0, value])
    self.fails('finite', lambda: mk.task_arithmetic(scales))

  def test_weights(self):
    for make in (mk.average, lambda w: mk.ties(weights=w)):
      self.fails('weights of 0 or more', lambda make=make: make([1, -1]))
      self.fails('All weights are 0', lambda make=make: make([0, 0]))
      # Of two merges, the second.
      batch = [jnp.array([1, 0]), jnp.array([1, 0])]
      self.fails('All weights are 0', functools.partial(make, batch))
      batch = [jnp.array([1, -1]), jnp.array([1, 1])]
      self.fails('weights of 0 or more', functools.partial(make, batch))
    assert mk.task_arithmetic(weights=[1, -1])  # takes a task away

  @pytest.mark.parametrize('make', [mk.average, mk.disjoint_mean])
  @pytest.mark.parametrize('value', [1e-40, 1e-37, 1e38, 1e39, 1e300])
  def test_weights_that_float32_cannot_work_with(self, make, value):
    """Products with them, or reciprocals of their sum, became 0 or NaN."""
    ratios = (
      'give 0, or numbers between 1e-18 and 1e18: only their ratios matter'
    )
    self.fails(ratios, lambda: make([value] * 3))
    self.fails(ratios, lambda: make([1, 0, value]))
    self.fails(ratios, lambda: make([1, np.array([1, value])]))
    if value < np.finfo(np.float32).max:
      self.fails(ratios, lambda: make(jnp.array([value, 1.0])))

  @pytest.mark.parametrize('value', [1e-18, 1e18 / 3])
  @pytest.mark.parametrize('dtype', ['float32', 'float64'])
  def test_weights_whose_ratios_alone_matter(self, value, dtype):
    weights = value * np.array([3, 1, 0], dtype)
    zeros = jnp.zeros(3)
    deltas = [4e9, 4.0, 1e-9], [8e9, 8.0, 2e-9], [7.0, 7.0, -1.0]
    for method in (mk.average(weights), mk.ties(1.0, weights=weights)):
      merged = mk.merge(method, [jnp.array(d) for d in deltas], zeros)
      # By hand: (3 a + b) / 4, of which float32 rounds four steps: 4 · 6e-8.
      np.testing.assert_allclose(merged, [5e9, 5.0, 1.25e-9], rtol=1e-6)

  def test_names(self):
    self.fails(r"scope='tensr'.*'tensor'\?", lambda: mk.ties(scope='tensr'))
    call = lambda: mk.ties(election='mas')
    self.fails(r"election='mas'.*'mass'\?", call)
    call = lambda: mk.dare_ties(zero_mass='majorty')
    self.fails(r"zero_mass='majorty'.*'majority'\?", call)
    self.fails("scope='all'", lambda: mk.chain(mk.scale(1), scope='all'))
    self.fails('no stage', lambda: mk.chain())

  def test_misspelt_option(self):
    call = lambda: mk.ties(densty=0.2)
    self.fails('densty', call, TypeError)


@pytest.mark.parametrize('scope', ['model', 'tensor'])
def test_leaves_on_different_devices(scope):
  """As pipelines have them: totals of a model are of all of them."""
  devices = jax.devices()
  assert len(devices) > 1
  placed = lambda tree: {
    name: jax.device_put(leaf, device)
    for (name, leaf), device in zip(tree.items(), devices, strict=False)
  }
  generator = np.random.default_rng(0)
  model = lambda: {
    name: np.float32(generator.standard_normal((8, 4))) for name in 'ab'
  }
  base, *experts = model(), model(), model()
  method = mk.ties(0.3, scope=scope)
  merged = mk.merge(method, [*map(placed, experts)], placed(base))
  compare.same_bits(merged, mk.merge(method, experts, base))
  for leaf, device in zip(merged.values(), devices, strict=False):
    assert leaf.devices() == {device}
