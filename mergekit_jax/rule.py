"""What a merge rule is. Read this first.

A merge rule is straight-line maths over the arrays of one tensor. Where it
needs a number that depends on more than the elements in front of it (a
threshold, a norm, an angle), it *yields* a partial sum and receives the answer:

    @rule
    class Normalised:
      scale: float

      def __call__(self, t):
        delta = t.experts[0] - t.base
        norm = yield Total(
            jnp.sum(delta * delta), lambda total, answers: jnp.sqrt(total)
        )
        return t.base + self.scale * delta / norm

The rule never learns who adds up: one array, the blocks of a tensor too large
for memory, the devices of a mesh, or all tensors of a model: see `driving`.

The protocol:
  * `yield Total(partial, then)`: the partials of all places of the scope are
    added, `then` turns the sum into small values, and these come back. A round
    of totals is a full read of every model, so totals that do not depend on
    each other travel together: yield a list of them, or use `together`.
  * `yield Report(name=...)`: fractions for the report. No answer comes back.
  * helpers are generators too: `threshold = yield from kth_magnitude(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
import dataclasses
import inspect
from typing import (
  Any,
  dataclass_transform,
  get_type_hints,
  NamedTuple,
  TypeVar,
)

import jax

PyTree = Any
_T = TypeVar('_T', bound=type)


@dataclass_transform(frozen_default=True)
def rule(cls: _T) -> _T:
  """Makes a class a merge rule: a frozen dataclass that is a pytree.

  Numbers are leaves and structure is static: fields annotated `str`, `bool` or
  one of them `| None` are static, as are those declared with JAX's own
  `dataclasses.field(metadata={'static': True})`; all others are leaves or trees
  of leaves. A new value of a number therefore never recompiles, and `jax.grad`
  and `jax.vmap` see it. Numbers are traced, an `int` too: declare one static on
  which loops or shapes depend.

  Two class attributes tell a driver what the rule needs:
    scope: 'tensor' (the default) or 'model', the set over which totals are
      taken. A tensor is one layer slice of a stacked leaf.
    needs: 'element' (the default: may be cut anywhere), 'row' (the last axis
      stays whole) or 'matrix' (the tensor stays whole).

  Args:
    cls: a class with annotated fields and `__call__(self, t: Place)`, a
      function or a generator that returns the merged array, floating-point
      numbers `[*shape]`, or a scalar for all of it.

  Returns:
    The class, as a frozen dataclass registered with JAX.
  """
  cls = dataclasses.dataclass(frozen=True)(cls)
  fields = dataclasses.fields(cls)
  hints = _hints(cls)
  static = [
    field.name
    for field in fields
    if _is_static(field, hints.get(field.name, field.type))
  ]
  numbers = [field.name for field in fields if field.name not in static]

  def flatten(method):
    leaves = [
      (jax.tree_util.GetAttrKey(name), getattr(method, name))
      for name in numbers
    ]
    # With the class, since JAX tells dataclasses of like fields apart by their
    # hashes only: TIES and DARE-TIES would be one function to its cache.
    return leaves, (cls, *(getattr(method, name) for name in static))

  def unflatten(structure, leaves):
    method = object.__new__(cls)
    values = dict(zip(static, structure[1:], strict=True))
    for name, value in (
      values | dict(zip(numbers, leaves, strict=True))
    ).items():
      object.__setattr__(method, name, value)
    return method

  jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
  return cls


def _hints(cls: type) -> dict[str, Any]:
  """The types of the fields; nothing if a name among them cannot be found."""
  try:
    return get_type_hints(cls)
  except Exception:  # whatever evaluating text raises
    return {}


def _is_static(field: dataclasses.Field, kind: Any) -> bool:
  return field.metadata.get('static', kind in _STRUCTURE)


# Also as text, for annotations that could not be evaluated.
_STRUCTURE = (
  *(str, bool, str | None, bool | None),
  *('str', 'bool', 'str | None', 'bool | None'),
)


# Both from the narrowest to the widest.
SCOPES = ('tensor', 'model')
NEEDS = ('element', 'row', 'matrix')


def scope_of(method: Any) -> str:
  """The scope of a rule: 'tensor' unless it says 'model'."""
  return getattr(method, 'scope', 'tensor')


def needs_of(method: Any) -> str:
  """What a rule needs whole: 'element' unless it says more."""
  return getattr(method, 'needs', 'element')


@dataclasses.dataclass(frozen=True, eq=False)
class Total:
  """A question: the sum of `partial` over the scope, put through `then`.

  Attributes:
    partial: a small pytree of arrays; adding is all that happens to it.
      Integers are added in int64 and floats in float64 across blocks and
      tensors. Inside a block, counts of fewer than 2**31 elements are added in
      their own dtype: give wider integers where a partial may be more than the
      number of elements.
    then: `then(total, answers) -> answer`, plain jax.numpy, run with 64-bit
      types enabled. `total` is the sum; `answers` ends with what the earlier
      yields returned, before it was narrowed, so a helper finds its own last
      answer at `answers[-1]`. It may use the rule's own numbers, of 32 bits as
      everywhere, and never anything computed from the base or the experts. What
      it returns comes back in 32 bits: return a large count as a float.
  """

  partial: PyTree
  then: Callable[[PyTree, list], PyTree]


class Report:
  """Fractions for the report of a streamed merge; ignored in memory.

  Each keyword is a bool array `[*shape]`, of which the report gives the share
  that is true in each tensor, or a pair `(part, whole)` of them, of which it
  gives the ratio; or a list of these, one an expert. Of two reports of one name
  the later counts.
  """

  def __init__(self, **flags: PyTree):
    is_pair = lambda flag: isinstance(flag, tuple)
    self.flags = jax.tree.map(
      lambda flag: (
        dict(zip(('part', 'whole'), flag, strict=True))
        if is_pair(flag)
        else flag
      ),
      flags,
      is_leaf=is_pair,
    )


Request = Total | Report | Sequence['Request']
Answering = Generator[Request, Any, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
  """Where a rule stands: some elements of one tensor, in every model.

  Attributes:
    experts: the experts' values here, each float32 `[*shape]`.
    layer: int32 scalar, which slice of a stacked leaf this is; 0 elsewhere.
    random_bits: `random_bits(i)` gives uint32 `[*shape]` below 2**16: the
      random bits of expert i for exactly these elements, the same however the
      tensor is cut or sharded. Tests may replace it to force a mask.
  """

  _base: jax.Array | None
  experts: Sequence[jax.Array]
  layer: Any
  random_bits: Callable[[int], jax.Array]

  @property
  def has_base(self) -> bool:
    """Whether a base was given to the merge."""
    return self._base is not None

  @property
  def base(self) -> jax.Array:
    """The base model's values here, float32 `[*shape]`.

    Raises:
      ValueError: if no base was given to the merge.
    """
    if self._base is None:
      raise ValueError(
        'This method works on task vectors (expert - base), but no base was '
        'given. Pass the base model that the experts were fine-tuned from.'
      )
    return self._base


def together(generators: Iterable[Any]) -> Answering:
  """Steps several generators at once, so that their totals share a round.

  Args:
    generators: generators that yield `Total`s and `Report`s.

  Yields:
    The requests of all generators that wait for a total, as one list.

  Returns:
    What each generator returned, in order.
  """
  running = list(generators)
  returned = [None] * len(running)
  replies: Sequence[Any] = [None] * len(running)
  waiting = range(len(running))
  rounds = 0
  while True:
    requests: list[Any] = [None] * len(running)
    for i in waiting:
      try:
        request = running[i].send(replies[i])
        while isinstance(request, Report):
          yield request
          request = running[i].send(None)
        _demand_totals(running[i], request)
        requests[i] = _seen_by(request, i, rounds)
      except StopIteration as stop:
        returned[i] = stop.value
    waiting = [i for i, request in enumerate(requests) if request is not None]
    if not waiting:
      return returned
    replies = yield requests
    rounds += 1


def _seen_by(request: Request, i: int, rounds: int) -> Request:
  """Shows each `then` of member i only the answers that member i received."""

  def wrap(total: Total) -> Total:
    inner = total.then  # alone: `then` may outlive the trace of the partial

    def then(value, answers):
      own = answers[len(answers) - rounds :]
      return inner(value, [answer[i] for answer in own])

    return Total(total.partial, then)

  return jax.tree.map(wrap, request, is_leaf=_is_total)


def _demand_totals(generator: Any, request: Any) -> None:
  asked = jax.tree.leaves(request, is_leaf=_is_total)
  if request is None or not all(map(_is_total, asked)):
    raise TypeError(
      f'{generator.__qualname__} yielded a {type(request).__name__}. Yield a '
      'Total, several of them in a list, or a Report.'
    )


def _is_total(x: Any) -> bool:
  return isinstance(x, Total)


class Step(NamedTuple):
  """How far a rule came: `request` is open, or the rule has `returned`."""

  request: Request | None
  returned: Any
  flags: dict[str, PyTree]

  @property
  def totals(self) -> list[Total]:
    """The open totals, in the order in which `answered` takes the answers."""
    return jax.tree.leaves(self.request, is_leaf=_is_total)

  def without_partials(self) -> Step:
    """The same question, which holds nothing of the trace it was met in."""
    request = jax.tree.map(
      lambda total: Total(None, total.then), self.request, is_leaf=_is_total
    )
    return self._replace(request=request)

  def answered(self, values: Sequence[Any]) -> PyTree:
    """The answers to `totals`, in the shape of the request."""
    return jax.tree.unflatten(
      jax.tree.structure(self.request, is_leaf=_is_total), values
    )


def step(generator: Any, answers: Sequence[PyTree]) -> Step:
  """Feeds a rule all known answers and stops at the first open question.

  Args:
    generator: what calling a rule gave; an array if the rule asks for nothing.
    answers: the answers so far, in the shapes of their requests.

  Returns:
    The open request, or what the rule returned and reported.
  """
  if not inspect.isgenerator(generator):
    return Step(None, generator, {})
  remaining = iter(answers)
  flags = {}
  reply: Any = None
  while True:
    try:
      request: Any = generator.send(reply)
    except StopIteration as stop:
      return Step(None, stop.value, flags)
    if isinstance(request, Report):
      flags |= request.flags
      reply = None
      continue
    _demand_totals(generator, request)
    reply = next(remaining, _NOTHING)
    if reply is _NOTHING:
      return Step(request, None, {})


_NOTHING = object()
