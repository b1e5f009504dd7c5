"""What the methods should give: plain numpy in float64.

Written from the papers and the design, without a line of the library: the task
vectors are rounded to float32 as the library's are, all that follows is
float64, thresholds come from `numpy.partition`, masks from `jax.random` itself.

Models are flat dictionaries {mask name: array}; a slice of a stacked leaf has
the name of the leaf and its layer, `(name, layer)`.
"""

import hashlib

import jax
import numpy as np


def float64(model):
  """The stored values, exactly."""
  return {
    name: np.asarray(leaf).astype(np.float64) for name, leaf in model.items()
  }


def task_vectors(experts, base):
  """expert - base, rounded to float32 once, per expert and tensor."""
  single = lambda leaf: np.asarray(leaf).astype(np.float32)
  return [
    {
      name: (single(expert[name]) - single(base[name])).astype(np.float64)
      for name in base
    }
    for expert in experts
  ]


def number_kept(density, size):
  return max(1, round(1e6 * density) * size // 10**6)


def threshold(arrays, density):
  """The magnitude of the k-th largest element of some arrays."""
  values = np.concatenate([np.abs(array).ravel() for array in arrays])
  if not values.size:
    return 0.0
  rank = values.size - number_kept(density, values.size)
  return np.partition(values, rank)[rank]


def trim(deltas, density, scope):
  result = []
  for delta in deltas:
    whole = threshold(delta.values(), density)
    trimmed = {}
    for name, value in delta.items():
      cut = whole if scope == 'model' else threshold([value], density)
      trimmed[name] = np.where(np.abs(value) >= cut, value, 0)
    result.append(trimmed)
  return result


def rounded_rate(drop_rate):
  """The drop rate in steps of 1/65536, as the library rounds it."""
  return round(drop_rate * 65536) / 65536


def expert_bits(key, name, shape, expert):
  """16 random bits an element, from the 64-bit words of `jax.random.bits`."""
  name, layer = name if isinstance(name, tuple) else (name, 0)
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  for word in (digest[:4], digest[4:]):
    key = jax.random.fold_in(key, np.uint32(int.from_bytes(word, 'big')))
  key = jax.random.fold_in(jax.random.fold_in(key, layer), expert // 4)
  with jax.enable_x64(True):
    words = np.asarray(jax.random.bits(key, shape, 'uint64'))
  shift = (32, 48, 0, 16)[expert % 4]
  return (words >> np.uint64(shift)) & np.uint64(0xFFFF)


def drop(deltas, drop_rate, key):
  rate = rounded_rate(drop_rate)
  return [
    {
      name: np.where(
        expert_bits(key, name, value.shape, i) >= rate * 65536,
        value / (1 - rate),
        0,
      )
      for name, value in delta.items()
    }
    for i, delta in enumerate(deltas)
  ]


def weighted_sum(deltas, weights):
  return {
    name: sum(
      weight * delta[name]
      for weight, delta in zip(weights, deltas, strict=True)
    )
    for name in deltas[0]
  }


def disjoint_mean(deltas, weights, election, zero_mass, scope, combine):
  if election == 'mass':
    mass = weighted_sum(deltas, weights)
  else:
    signs = [{n: np.sign(v) for n, v in delta.items()} for delta in deltas]
    mass = weighted_sum(signs, [1] * len(deltas))
  elected = {name: np.sign(value) for name, value in mass.items()}

  def majority(signs):
    votes = sum(sign.sum() for sign in signs)
    return -1 if zero_mass == 'majority' and votes < 0 else 1

  result = {}
  for name, sign in elected.items():
    tie = majority(elected.values() if scope == 'model' else [sign])
    sign = np.where(sign == 0, tie, sign)
    total = np.zeros(sign.shape)
    weight_sum = np.zeros(sign.shape)
    for weight, delta in zip(weights, deltas, strict=True):
      agrees = (delta[name] * sign > 0) & (weight > 0)
      total += np.where(agrees, weight * delta[name], 0)
      weight_sum += np.where(agrees, weight, 0)
    if combine == 'sum':
      weight_sum = np.ones(sign.shape)
    result[name] = np.divide(
      total, weight_sum, out=np.zeros(sign.shape), where=weight_sum > 0
    )
  return result


def add_to(base, delta, scale):
  return {
    name: value + scale * delta[name] for name, value in float64(base).items()
  }


def average(experts, base=None, key=None, *, weights=None):
  del base, key
  weights = weights or [1] * len(experts)
  total = weighted_sum([float64(expert) for expert in experts], weights)
  return {name: value / sum(weights) for name, value in total.items()}


def task_arithmetic(experts, base, key=None, *, scale=1.0, weights=None):
  del key
  weights = weights or [1] * len(experts)
  delta = weighted_sum(task_vectors(experts, base), weights)
  return add_to(base, delta, scale)


def ties(
  experts,
  base,
  key=None,
  *,
  density=0.2,
  scale=1.0,
  weights=None,
  scope='model',
  election='mass',
  zero_mass='positive',
  combine='mean',
):
  del key
  weights = weights or [1] * len(experts)
  deltas = trim(task_vectors(experts, base), density, scope)
  delta = disjoint_mean(deltas, weights, election, zero_mass, scope, combine)
  return add_to(base, delta, scale)


def dare(experts, base, key, *, drop_rate=0.9, scale=1.0, weights=None):
  weights = weights or [1] * len(experts)
  deltas = drop(task_vectors(experts, base), drop_rate, key)
  return add_to(base, weighted_sum(deltas, weights), scale)


def dare_ties(
  experts,
  base,
  key,
  *,
  drop_rate=0.9,
  density=None,
  scale=1.0,
  weights=None,
  scope='model',
  election='mass',
  zero_mass='positive',
  combine='mean',
):
  weights = weights or [1] * len(experts)
  deltas = drop(task_vectors(experts, base), drop_rate, key)
  if density is not None:
    deltas = trim(deltas, density, scope)
  delta = disjoint_mean(deltas, weights, election, zero_mass, scope, combine)
  return add_to(base, delta, scale)


def slerp(experts, base=None, key=None, *, fraction=0.5):
  """Spherical interpolation between two experts, tensor by tensor."""
  del base, key
  result = {}
  first, second = (float64(expert) for expert in experts)
  for name, a in first.items():
    b = second[name]
    norms = np.sqrt((a * a).sum() * (b * b).sum())
    cosine = (a * b).sum() / norms if norms else 1.0
    if 1 - abs(cosine) < 1e-6:
      result[name] = (1 - fraction) * a + fraction * b
    else:
      angle = np.arccos(cosine)
      weights = np.sin(np.array([1 - fraction, fraction]) * angle)
      result[name] = (weights[0] * a + weights[1] * b) / np.sin(angle)
  return result
