"""The protocol between a rule and whoever drives it."""

import dataclasses
import functools
from typing import Optional  # noqa: F401, in an annotation that is text

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving.drive import (
  advance,
  answer,
  Block,
  on_layers,
)
from mergekit_jax.driving.questions import asked, is_random
from mergekit_jax.driving.widths import wide_add
from mergekit_jax.rule import needs_of, scope_of, step
from tests import checkpoints

VALUES = [jnp.array([1.0, 2, 3, 4]), jnp.array([5.0, 6, 7, 8])]


def block_of(experts=VALUES, base=None):
  shape = experts[0].shape
  origin = (0,) * len(shape)
  dtype = jnp.dtype('float32')
  return Block(base, experts, None, origin, shape, (), dtype)


def rule_from(function, **attributes):
  """A rule without numbers, from a generator function of the place."""
  call = lambda self, t: function(t)
  return mk.rule(type('Rule', (), {'__call__': call, **attributes}))()


def wrapped(function):
  """Calls a function of a rule with a number beside the place."""
  return functools.wraps(function)(lambda self, t: function(self, t, 0))


def stage_from(**attributes):
  """A stage that leaves the task vectors as they are."""
  call = lambda self, t, deltas: deltas
  return mk.rule(type('Stage', (), {'__call__': call, **attributes}))()


def merge(rule, experts=VALUES, base=None):
  return np.asarray(mk.merge(rule, experts, base))


def total(partial):
  return mk.Total(partial, lambda total, answers: total)


class TestTogether:
  """Several generators step as one."""

  def chained(self, values, rounds):
    """Asks `rounds` times; each answer goes into the next question."""
    seen = 0.0
    for _ in range(rounds):
      seen = yield total(values.sum() + seen)
    return seen

  def test_different_lengths(self):
    lengths = (0, 3, 1, 2)

    def rule(t):
      a = t.experts[0]
      parts = [self.chained((i + 1) * a, n) for i, n in enumerate(lengths)]
      results = yield from mk.together(parts)
      return jnp.stack([jnp.asarray(r, jnp.float32) for r in results])

    sums = 10 * np.arange(1, 5)
    np.testing.assert_array_equal(merge(rule_from(rule)), sums * lengths)
    assert len(asked(rule_from(rule), block_of())) == 3

  def test_nested(self):
    def rule(t):
      pairs = [
        mk.together([self.chained(e, 2), self.chained(2 * e, 1)])
        for e in t.experts
      ]
      (a, b), (c, d) = yield from mk.together(pairs)
      return jnp.stack([a, b, c, d])

    np.testing.assert_array_equal(merge(rule_from(rule)), [20, 20, 52, 52])
    assert len(asked(rule_from(rule), block_of())) == 2

  def test_of_nothing(self):
    def rule(t):
      nothing = yield from mk.together([])
      assert nothing == []
      return t.experts[0]

    np.testing.assert_array_equal(merge(rule_from(rule)), VALUES[0])

  def test_reports_pass_through(self):
    def reporting(values):
      yield mk.Report(before=values > 5)
      seen = yield total(values.sum())
      reply = yield mk.Report(after=values < seen - 20)
      assert reply is None
      return seen

    def rule(t):
      seen = yield from mk.together(map(reporting, t.experts))
      yield mk.Report(last=t.experts[0] < seen[0] - 7)
      return t.experts[0] + seen[1]

    rule = rule_from(rule)
    np.testing.assert_array_equal(merge(rule), VALUES[0] + 26)
    first = advance(rule, block_of(), [])
    assert first.merged is None
    answers = [answer(rule, block_of(), wide_add([first.partials]), [])]
    assert on_layers(rule, block_of(), [], report=True)[2] == {}
    assert on_layers(rule, block_of(), answers)[2] == {}
    flags = on_layers(rule, block_of(), answers, report=True)[2]
    # Of two reports of one name the later counts.
    assert {name: flag.tolist() for name, flag in flags.items()} == {
      'before': [False, True, True, True],
      'after': [True, False, False, False],
      'last': [True, True, False, False],
    }

  def test_answers_are_its_own(self):
    """A member that starts after other rounds sees none of their answers."""

    def member(values, factor):
      first = yield mk.Total(
        values.sum(), lambda total, answers: total * factor + len(answers)
      )

      def then(total, answers):
        (own,) = answers
        return own + total

      second = yield mk.Total(jnp.float32(0.5), then)
      return first, second

    def rule(t):
      yield total(jnp.float32(1000))
      pairs = yield from mk.together(
        [member(t.experts[0], 1.0), member(t.experts[1], 2.0)]
      )
      return jnp.stack([x for pair in pairs for x in pair])

    np.testing.assert_array_equal(merge(rule_from(rule)), [10, 10.5, 52, 52.5])

  @pytest.mark.parametrize('scope', ['model', 'tensor'])
  def test_leaks_no_tracers(self, scope):
    def function(t):
      asked = [mk.kth_magnitude(values, 0.5) for values in t.experts]
      first, second = yield from mk.together(asked)
      return jnp.where(t.experts[0] >= first, t.experts[0], second)

    rule = rule_from(function, scope=scope)
    with jax.checking_leaks():
      outside = merge(rule)
      inside = jax.jit(mk.merge)(rule, VALUES)
    np.testing.assert_array_equal(outside, [7, 7, 3, 4])
    np.testing.assert_array_equal(inside, outside)


class TestThen:
  """`then` sees exact totals, and nothing of the models."""

  def test_integers_above_32_bits(self):
    def rule(t):
      yield mk.Total(jnp.int32(3), lambda total, answers: total * 2**31 + 1)
      low = yield mk.Total(
        jnp.int32(0), lambda total, answers: (answers[0] - 1) % 1000
      )
      return jnp.zeros(4) + low

    expected = 3 * 2**31 % 1000
    np.testing.assert_array_equal(merge(rule_from(rule)), np.full(4, expected))

  def test_floats_beyond_float32(self):
    def rule(t):
      # 3e38 twice is infinite in float32; 2**24 + 1 is 2**24.
      yield mk.Total(
        (jnp.float32(3e38), jnp.float32(2**24)),
        lambda total, answers: (total[0] * 1e10, total[1] + 1),
      )
      seen = yield mk.Total(
        jnp.int32(0),
        lambda total, answers: (answers[0][0] / 1e48, answers[0][1] - 2**24),
      )
      return jnp.zeros(4) + jnp.stack([*seen, *seen])

    seen = merge(rule_from(rule))
    np.testing.assert_allclose(seen, [3, 1, 3, 1], rtol=1e-6)

  def test_partials_are_added_in_64_bits(self):
    largest = jnp.int32(2**31 - 1)
    huge = jnp.float32(3e38)
    count, mass = wide_add([[largest, huge]] * 3)
    assert count.dtype == 'int64' and int(count) == 3 * (2**31 - 1)
    (unsigned,) = wide_add([[jnp.uint32(2**32 - 1)]] * 3)
    assert unsigned.dtype == 'uint64' and int(unsigned) == 3 * (2**32 - 1)
    assert mass.dtype == 'float64' and float(mass) > 8.9e38

  def test_layers_are_added_in_64_bits(self):
    """As blocks are: 3e38 twice is infinite in float32."""

    def rule(t):
      seen = yield mk.Total(
        t.experts[0].sum(), lambda total, answers: total / 1e38
      )
      return t.experts[0] * 0 + seen

    stack = jnp.full((2, 1), 3e38)
    merged = mk.merge(
      rule_from(rule, scope='model'), [{'a': stack}], stacked_axes={'a': 0}
    )
    # A quotient of float32, and 1e38 is none: some roundings of 6e-8 each.
    np.testing.assert_allclose(merged['a'], [[6], [6]], rtol=1e-6)

  def test_an_answer_may_be_no_number(self):
    def rule(t):
      large = yield mk.Total(
        t.experts[0].sum(), lambda total, answers: total > 9
      )
      return jnp.where(large, t.experts[1], 0)

    np.testing.assert_array_equal(merge(rule_from(rule)), VALUES[1])

  def test_answers_come_back_in_32_bits(self):
    seen = []

    def rule(t):
      answers = yield [total(jnp.int32(1)), total(jnp.float32(1))]
      seen.extend(answer.dtype for answer in answers)
      return t.experts[0]

    merge(rule_from(rule))
    assert {*seen} == {jnp.dtype('int32'), jnp.dtype('float32')}

  def test_subclass_that_is_not_decorated(self):
    @mk.rule
    class Rule:
      number: float

      def __call__(self, t):
        return self.number * t.experts[0]

    class Other(Rule):
      pass

    tree = {'w': jnp.ones(3)}
    with pytest.raises(ValueError, match='Other is not, which a subclass must'):
      mk.merge(Other(2.0), [tree])
    decorated = mk.rule(type('Other', (Rule,), {}))
    merged = mk.merge(decorated(2.0), [tree])
    np.testing.assert_array_equal(merged['w'], np.full(3, 2.0))

  def test_sees_the_numbers_of_the_rule(self):
    rule = Shifted(2.0, 'sum')
    np.testing.assert_array_equal(merge(rule), VALUES[0] + 12)

    gradient = jax.grad(
      lambda shift: mk.merge(Shifted(shift, 'sum'), VALUES).sum()
    )
    assert gradient(2.0) == 4

  def test_numbers_of_the_rule_may_meet_before(self):
    """A replay warns of no 64-bit type that the numbers have but there."""

    @mk.rule
    class Between:
      low: float
      high: float

      def __call__(self, t):
        high = 1 - self.high / 2
        inside = (t.experts[0] > self.low * 2) & (t.experts[0] < high * 5)
        shift = yield mk.Total(
          mk.count(inside), lambda total, answers: total + self.low
        )
        return t.experts[0] + shift

    # Of 1, 2, 3, 4 two are between 1.25 and 3.75.
    merged = merge(Between(0.625, 0.5))
    np.testing.assert_array_equal(merged, VALUES[0] + 2.625)

  @pytest.mark.parametrize('place', ['base', 'experts'])
  def test_must_not_use_data(self, place):
    def rule(t):
      data = t.base if place == 'base' else t.experts[1]
      mean = yield mk.Total(
        t.experts[0].sum(), lambda total, answers: total / data.max()
      )
      return t.experts[0] - mean

    with pytest.raises(TypeError, match='a `then` uses a value computed from'):
      merge(rule_from(rule), base=VALUES[0])

  def test_must_not_use_an_earlier_answer_by_closure(self):
    """The narrowed answer is data of the trace; `answers` has the exact one."""

    def rule(t):
      first = yield total(t.experts[0].sum())
      second = yield mk.Total(
        t.experts[1].sum(), lambda total, answers: total + first
      )
      return t.experts[0] + second

    with pytest.raises(TypeError, match='its earlier answers'):
      merge(rule_from(rule))

  @pytest.mark.parametrize(
    'of',
    [
      lambda size: lambda total, answers: total / size,
      lambda size: lambda total, answers: total + np.arange(size).sum(),
      lambda size: lambda total, answers: total / np.array([size])[0],
      lambda size: lambda total, answers: total / jnp.array([size])[0],
    ],
  )
  def test_must_not_use_the_size_of_a_block(self, of, tmp_path):
    def rule(t):
      a = t.experts[0]
      return a - (yield mk.Total(a.sum(), of(a.size)))

    rule = rule_from(rule)
    with pytest.raises(TypeError, match='or the size of an array. It may use'):
      merge(rule)
    path = checkpoints.save(tmp_path / 'e', {'w': np.ones((4, 6), 'float32')})
    with pytest.raises(TypeError, match='or the size of an array. It may use'):
      mk.merge_checkpoints(rule, experts=[path], output=tmp_path / 'o')

  @pytest.mark.parametrize('scope', ['tensor', 'model'])
  def test_rows_that_stay_whole_keep_their_length(self, scope, tmp_path):
    """In memory and streamed, such as heads of four."""

    def rule(t):
      heads = t.experts[0].reshape(*t.experts[0].shape[:-1], -1, 4)
      largest = yield total(mk.count(heads > 2))
      return (heads.max(axis=-1) + largest).repeat(4, axis=-1)

    rule = rule_from(rule, needs='row', scope=scope)
    values = np.arange(8 * 12, dtype='float32').reshape(8, 12) % 7
    heads = values.reshape(8, 3, 4)
    expected = (heads.max(axis=-1) + (heads > 2).sum()).repeat(4, axis=-1)
    np.testing.assert_array_equal(merge(rule, [values]), expected)
    path = checkpoints.save(tmp_path / 'e', {'w': values})
    mk.merge_checkpoints(rule, experts=[path], output=tmp_path / 'o')
    np.testing.assert_array_equal(
      checkpoints.load(tmp_path / 'o')['w'], expected
    )

  def test_may_use_the_length_of_rows_only_where_it_is_one(self):
    def rule(t):
      a = t.experts[0]
      length = a.shape[-1]
      return a - (yield mk.Total(a.sum(), lambda total, _: total / length))

    values = np.arange(12, dtype='float32').reshape(2, 6)
    of_tensor = rule_from(rule, needs='row')
    np.testing.assert_array_equal(
      merge(of_tensor, [values]), values - values.sum() / 6
    )
    with pytest.raises(TypeError, match='or the size of an array. It may use'):
      merge(rule_from(rule, needs='row', scope='model'), [values])

  def test_may_use_the_size_that_is_in_the_partial(self):
    def rule(t):
      a = t.experts[0]
      mean = yield mk.Total(
        (a.sum(), mk.count(jnp.ones_like(a, bool))),
        lambda total, answers: total[0] / total[1],
      )
      return a - mean

    centred = VALUES[0] - VALUES[0].mean()
    np.testing.assert_array_equal(merge(rule_from(rule)), centred)

  def test_may_use_constants_and_numbers(self):
    """As often as it is traced, it is the same."""
    weights = jnp.arange(3.0)

    @mk.rule
    class Weighted:
      number: float
      pair: tuple

      def __call__(self, t):
        half = np.array([0.5, np.nan])
        shift = yield mk.Total(
          t.experts[0].sum(),
          lambda total, answers: (
            jax.nn.relu(total * half[0] + self.number) * weights.sum()
            + self.pair[1]
            + jax.lax.map(lambda x: x + total, weights)[2]
          ),
        )
        return t.experts[0] + shift

    got = merge(Weighted(1.0, (2.0, jnp.float32(3.0))))
    # Of a sum of 10: (5 + 1) * 3 + 3 + (2 + 10).
    np.testing.assert_array_equal(got, VALUES[0] + 33)

  def test_is_part_of_the_program_in_memory(self):
    """No host callback: a merge with totals compiles into one program."""
    run = jax.jit(lambda experts: mk.merge(Shifted(2.0, 'sum'), experts))
    text = run.lower(VALUES).as_text()
    assert 'callback' not in text


@mk.rule
class Shifted:
  shift: float
  mode: str

  def __call__(self, t):
    shift = yield mk.Total(
      t.experts[0].sum(), lambda total, answers: total + self.shift
    )
    return t.experts[0] + shift


@mk.rule
class Alike:
  """Has the fields of `Shifted`, by other names."""

  factor: float
  kind: str

  def __call__(self, t):
    return self.factor * t.experts[0]


@mk.rule
class Fields:
  number: float
  numbers: tuple
  nothing: tuple | None
  name: str
  flag: bool


class TestRule:
  """A frozen dataclass that is a pytree."""

  def test_fields(self):
    rule = Fields(1.5, (2.0, 3.0), None, 'mass', True)
    assert jax.tree.leaves(rule) == [1.5, 2.0, 3.0]
    doubled = jax.tree.map(lambda x: 2 * x, rule)
    assert doubled == Fields(3.0, (4.0, 6.0), None, 'mass', True)
    structure = lambda **change: jax.tree.structure(
      Fields(**{**vars(rule), **change})
    )
    assert structure(number=7.0) == structure()
    assert structure(name='count') != structure()
    assert structure(flag=False) != structure()

  def test_text_or_none(self):
    def call(self, t):
      return t.experts[0]

    for kind, names in ((str | None, 'both'), ('bool | None', True)):
      fields = {'__annotations__': {'mode': kind}, '__call__': call}
      rule = mk.rule(type('Rule', (), fields))
      assert jax.tree.leaves(rule(names)) == []
      assert merge(rule(names)).tolist() == [1, 2, 3, 4]
      assert merge(rule(None)).tolist() == [1, 2, 3, 4]

  def test_optional_as_text(self):
    fields = {'__annotations__': {'flip': 'Optional[bool]'}}
    fields['__call__'] = lambda self, t: -t.experts[0] if self.flip else 0
    rule = mk.rule(type('Rule', (), fields))
    assert merge(rule(True)).tolist() == [-1, -2, -3, -4]

  def test_number_that_is_declared_static(self):
    @mk.rule
    class Halved:
      times: int = dataclasses.field(metadata={'static': True})

      def __call__(self, t):
        value = t.experts[0]
        for _ in range(self.times):
          value = value / 2
        return value

    assert merge(Halved(2)).tolist() == [0.25, 0.5, 0.75, 1]

  @pytest.mark.parametrize('place', ['rule', 'branch', 'then'])
  def test_number_that_is_to_be_declared_static(self, place):
    def halved(value, times):
      if place == 'branch':
        return value / 2 if times > 1 else value
      for _ in range(times):
        value = value / 2
      return value

    @mk.rule
    class Halved:
      times: int

      def __call__(self, t):
        value = t.experts[0]
        if place == 'then':
          return (
            yield mk.Total(
              value.sum(), lambda total, answers: halved(total, self.times)
            )
          )
        return halved(value, self.times)

    with pytest.raises(jax.errors.JAXTypeError) as caught:
      merge(Halved(2))
    (note,) = [note for note in caught.value.__notes__ if 'Halved' in note]
    assert "n: int = dataclasses.field(metadata={'static': True})" in note

  def test_text_that_is_not_declared(self):
    fields = {'__annotations__': {'mode': 'Mode'}, '__call__': lambda s, t: 0}
    rule = mk.rule(type('Named', (), fields))
    with pytest.raises(ValueError, match=r"Named\.mode is 'both', but is not"):
      merge(rule('both'))

  @pytest.mark.parametrize('yielded', [None, 1.0, jnp.ones(3)])
  def test_what_is_no_total(self, yielded):
    def sums(t):
      yield yielded
      return t.experts[0]

    def at_once(t):
      yield from mk.together([sums(t), mk.gram_matrix(t.experts)])
      return t.experts[0]

    kind = type(yielded).__name__
    message = f'sums yielded a {kind}. Yield a Total'
    for function in (sums, at_once):
      with pytest.raises(TypeError, match=message):
        merge(rule_from(function))

  @pytest.mark.parametrize('returned', [None, [1.0]])
  def test_what_is_no_array(self, returned):
    kind = type(returned).__name__
    with pytest.raises(TypeError, match=f'Rule returned a {kind}; return the'):
      merge(rule_from(lambda t: returned))

  @pytest.mark.parametrize(
    'of,error,message',
    [
      (lambda a: jnp.mean(a, -1, keepdims=True), ValueError, 'of shape'),
      (lambda a: jnp.mean(a, 0), ValueError, 'of shape'),
      (lambda a: a[None], ValueError, 'of shape'),
      (lambda a: a > 0, TypeError, 'return floating-point numbers'),
      (lambda a: 1j * a, TypeError, 'return floating-point numbers'),
      (lambda a: jnp.int32(7), TypeError, 'return floating-point numbers'),
    ],
  )
  def test_what_does_not_fill_the_tensor(self, of, error, message, tmp_path):
    rule = rule_from(lambda t: of(t.experts[0]))
    tree = {'w': np.ones((4, 6), 'float32')}
    given = r'^Rule returned (float32|bool|complex64|int32)\[.*\]'
    with pytest.raises(error, match=f'{given}.*{message}'):
      mk.merge(rule, [tree])
    path = checkpoints.save(tmp_path / 'e', tree)
    with pytest.raises(error, match=f'{given}.*{message}'):
      mk.merge_checkpoints(rule, experts=[path], output=tmp_path / 'o')
    assert not (tmp_path / 'o').exists()

  def test_names_the_shape_that_is_expected(self):
    rule = rule_from(lambda t: t.experts[0].mean(-1, keepdims=True))
    message = r'Rule returned float32\[4, 1\] .* of shape \[4, 6\]; return'
    with pytest.raises(ValueError, match=message):
      mk.merge(rule, [np.ones((3, 4, 6))], stacked_axes={'': 0})

  def test_frozen(self):
    rule = Shifted(1.0, 'sum')
    with pytest.raises(AttributeError):
      rule.shift = 2.0

  def test_classes_are_told_apart(self):
    """jax 0.10 takes registered dataclasses of like fields for equal trees.

    A jit cache would then answer for one rule with the program of another, as
    often as their hashes meet.
    """
    stages = [mk.trim(0.5), mk.drop(0.5), mk.scale(0.5), Shifted(0.5, 'a')]
    rules = [*stages, mk.ties(), mk.dare_ties(), mk.average(), Alike(0.5, 'a')]
    structures = [jax.tree.structure(rule) for rule in rules]
    for i, one in enumerate(structures):
      assert [one == other for other in structures].count(True) == 1, rules[i]

  def test_defaults(self):
    assert (scope_of(Shifted), needs_of(Shifted)) == ('tensor', 'element')
    assert scope_of(mk.ties()) == 'model'
    assert needs_of(mk.ties()) == 'element'
    stage = stage_from(needs='matrix')
    assert needs_of(mk.chain(mk.trim(0.5), stage)) == 'matrix'

  @pytest.mark.parametrize(
    'attribute,near',
    [({'scope': 'modle'}, 'model'), ({'needs': 'rows'}, 'row')],
  )
  def test_misspelled_attributes(self, attribute, near):
    rule = rule_from(lambda t: t.experts[0], **attribute)
    (name,) = attribute
    message = rf"Rule\.{name}=.* Did you mean '{near}'"
    with pytest.raises(ValueError, match=message):
      merge(rule)
    with pytest.raises(ValueError, match=message):
      mk.merge(mk.average(), VALUES[:1], overrides={'.*': rule})

  def test_misspelled_needs_of_a_stage(self):
    stage = stage_from(needs='rows')
    with pytest.raises(ValueError, match=r"Stage\.needs='rows' was given"):
      mk.chain(stage)

  @pytest.mark.parametrize(
    'call',
    [
      jax.named_scope('rule')(lambda self, t: t.experts[0]),
      lambda self, *given: given[0].experts[0],
      lambda self, t, deltas=None: t.experts[0],
      staticmethod(lambda t: t.experts[0]),
      wrapped(lambda self, t, number: t.experts[number]),
    ],
    ids=['scope', 'any', 'optional', 'static', 'wrapped'],
  )
  def test_calls_of_many_kinds(self, call):
    """None is taken for a stage, whatever its signature says."""
    rule = mk.rule(type('Rule', (), {'__call__': call}))()
    np.testing.assert_array_equal(merge(rule), VALUES[0])

  def test_base_that_may_be_given(self):
    rule = rule_from(lambda t: t.base if t.has_base else t.experts[1])
    np.testing.assert_array_equal(merge(rule, base=VALUES[0]), VALUES[0])
    np.testing.assert_array_equal(merge(rule), VALUES[1])

  def test_plain_function(self):
    """A rule without totals need not be a generator."""
    rule = rule_from(lambda t: t.experts[1] - t.experts[0])
    np.testing.assert_array_equal(merge(rule), np.full(4, 4))
    assert len(asked(rule, block_of())) == 0

  @pytest.mark.parametrize(
    'scalar',
    [
      *(jnp.float32(0.1), np.float32(0.1), np.float64(0.1), 0.1),
      *(jnp.bfloat16(0.1), jnp.bfloat16.dtype.type(0.1)),
    ],
    ids=lambda scalar: f'{type(scalar)}',
  )
  def test_scalar_result_fills_the_tensor(self, scalar, tmp_path):
    rule = rule_from(lambda t: scalar)
    tree = {'w': np.ones((2, 3), np.float32)}
    expected = np.full((2, 3), np.float32(scalar))
    for stacked in ({}, {'w': 0}):
      merged = mk.merge(rule, [tree], stacked_axes=stacked)
      np.testing.assert_array_equal(merged['w'], expected)
    path = checkpoints.save(tmp_path / 'e', tree)
    mk.merge_checkpoints(rule, experts=[path], output=tmp_path / 'o')
    merged = checkpoints.load(tmp_path / 'o')
    np.testing.assert_array_equal(merged['w'], expected)

  def test_sees_float32(self):
    def rule(t):
      assert all(e.dtype == jnp.float32 for e in t.experts)
      assert t.base.dtype == jnp.float32
      # 257 is no bfloat16: rounding between the two would lose the one.
      return t.experts[0] + 257 - 256 - 1

    experts = [jnp.array([0.5, 2.0], jnp.bfloat16)]
    merged = merge(rule_from(rule), experts, experts[0])
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, experts[0])

  def test_user_rule_of_model_scope(self):
    def rule(t):
      largest = yield total((jnp.abs(t.experts[0]) > 2).sum(dtype='int32'))
      return t.experts[0] * largest

    tree = {'a': VALUES[0], 'b': VALUES[1]}
    by_tensor = mk.merge(rule_from(rule), [tree])
    by_model = mk.merge(rule_from(rule, scope='model'), [tree])
    np.testing.assert_array_equal(by_tensor['a'], 2 * VALUES[0])
    np.testing.assert_array_equal(by_model['a'], 6 * VALUES[0])


class TestLayers:
  """The number that a rule is told of a slice of a stack."""

  def test_of_a_box_inside_of_two_stacked_axes(self):
    values = jnp.zeros((2, 3, 2))
    block = Block(
      None, [values], None, (2, 0, 1), (5, 3, 4), (0, 2), values.dtype
    )
    _, merged, _ = on_layers(rule_from(lambda t: t.layer * 1.0), block, [])
    # Layers 2 and 3 of 5, of 4 each, and 1 and 2 of these.
    expected = np.array([[9, 10], [13, 14]])[:, None, :]
    np.testing.assert_array_equal(merged, expected * np.ones((2, 3, 2)))

  def test_flags_lie_as_the_layers_do(self):
    def rule(t):
      yield mk.Report(large=t.experts[0] > 2)
      return t.experts[0]

    values = jnp.arange(6.0).reshape(2, 3)
    block = Block(None, [values], None, (0, 0), (2, 3), (1,), values.dtype)
    flags = on_layers(rule_from(rule), block, [], report=True)[2]
    np.testing.assert_array_equal(flags['large'], values > 2)

  @pytest.mark.parametrize(
    ('flag', 'given'),
    [
      (lambda x: jnp.where(x > 2, 2, 1), r'large as int32\[6\]; .* bool\[6\]'),
      (lambda x: jnp.any(x > 2), r'large as bool\[\]'),
    ],
  )
  def test_flags_that_are_none(self, flag, given):
    def rule(t):
      yield mk.Report(large=flag(t.experts[0]))
      return t.experts[0]

    block = block_of([jnp.arange(6.0)])
    with pytest.raises(TypeError, match=f'reports {given}'):
      on_layers(rule_from(rule), block, [], report=True)


class TestRoundsOfSomeLeaves:
  """A scope adds up the totals of all its leaves."""

  @pytest.fixture
  def of_matrices(self):
    def rule(t):
      norm = 1.0
      if t.experts[0].ndim > 1:
        norm = yield mk.Total(
          (t.experts[0] ** 2).sum(), lambda total, answers: total
        )
      return t.experts[0] / norm

    return rule_from(rule, scope='model')

  @pytest.mark.parametrize('names', ['ab', 'ba'])
  def test_in_memory(self, of_matrices, names):
    tree = dict(zip(names, [np.ones((2, 2)), np.ones(2)], strict=True))
    with pytest.raises(ValueError, match='asks for totals on some leaves and'):
      mk.merge(of_matrices, [tree])

  def test_streamed(self, of_matrices, tmp_path):
    path = checkpoints.save(
      tmp_path / 'one', {'a': np.ones((2, 2)), 'b': np.ones(2)}
    )
    with pytest.raises(ValueError, match='asks for totals on some leaves and'):
      mk.merge_checkpoints(of_matrices, experts=[path], output=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_only_a_missing_key_says_that_a_rule_is_random():
  assert is_random(mk.dare(), 3) and not is_random(mk.ties(), 3)
  with pytest.raises(ValueError, match='2 weights were given for 3 experts'):
    is_random(mk.average([1, 2]), 3)


class TestStep:
  """What the other drivers build on."""

  def test_replays_to_the_first_open_question(self):
    def rule():
      first = yield total(1)
      yield mk.Report(first=first)
      pair = yield [total(2), {'x': total(3)}]
      return first, pair

    reached = step(rule(), [])
    assert [t.partial for t in reached.totals] == [1]
    reached = step(rule(), [10])
    assert [t.partial for t in reached.totals] == [2, 3]
    assert reached.answered(['a', 'b']) == ['a', {'x': 'b'}]
    done = step(rule(), [10, ['a', {'x': 'b'}]])
    assert done.request is None and done.returned == (10, ['a', {'x': 'b'}])
    assert done.flags == {'first': 10}

  def test_no_generator(self):
    assert step(7, []) == (None, 7, {})

  def test_chain_has_the_widest_scope_of_its_stages(self):
    """Unless it is told another."""

    @mk.rule
    class Unit:
      """Divides a task vector by its norm."""

      scope = 'model'

      def __call__(self, t, deltas):
        del t
        squares = [mk.accurate_sum(d * d) for d in deltas]
        norms = yield mk.Total(squares, lambda s, _: [jnp.sqrt(x) for x in s])
        return [d / n for d, n in zip(deltas, norms, strict=True)]

    base = {'a': np.zeros(3, np.float32), 'b': np.zeros(2, np.float32)}
    expert = {'a': np.float32([3, 0, 0]), 'b': np.float32([0, 4])}
    merge = lambda **scope: mk.merge(
      mk.chain(Unit(), mk.weighted_sum(), **scope), [expert], base
    )
    # Of 4 / 5 one rounding to float32, 6e-8; all before it is exact.
    np.testing.assert_allclose(merge()['b'], [0, 4 / 5], rtol=1e-7)
    np.testing.assert_allclose(merge(scope='tensor')['b'], [0, 1], rtol=1e-7)
    assert mk.chain(mk.trim(0.5), mk.weighted_sum()).scope == 'tensor'

  def test_chain_passes_totals_of_its_stages(self):
    def centre(t, deltas):
      means = yield from mk.together(map(self.mean, deltas))
      return [d - m for d, m in zip(deltas, means, strict=True)]

    stage = functools.partial(centre)
    rule = mk.chain(
      jax.tree_util.Partial(stage), mk.weighted_sum(), mk.scale(2.0)
    )
    base = jnp.ones(4)
    merged = merge(rule, base=base)
    expected = 1 + 2 * 2 * (VALUES[0] - VALUES[0].mean())
    np.testing.assert_array_equal(merged, expected)

  def mean(self, values):
    return (
      yield mk.Total(
        (values.sum(), jnp.int32(values.size)),
        lambda total, answers: total[0] / total[1],
      )
    )
