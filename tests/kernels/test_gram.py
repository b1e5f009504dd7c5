"""Gram matrices: float64 accuracy from float32 arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving.drive import advance, answer, Block
from tests import models


@mk.rule
class Gram:
  """Asks for the Gram matrix of the experts; merges to nothing."""

  def __call__(self, t):
    gram = yield from mk.gram_matrix(t.experts)
    return t.experts[0] + 0 * gram.sum()


def gram_of(tensors):
  block = Block(
    None,
    tensors,
    None,
    (0,) * tensors[0].ndim,
    tensors[0].shape,
    (),
    jnp.dtype('float32'),
  )
  totals = advance(Gram(), block, []).partials
  return np.asarray(answer(Gram(), block, totals, []))


SHAPES = [(64, 1024), (1,), (), (0, 3), (257,)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_accuracy(shape):
  random = np.random.default_rng(0)
  a = random.normal(size=shape) + 1
  # Nearly orthogonal, nearly parallel, of another magnitude.
  tensors = [a, random.normal(size=shape), a * 1.001 + 1e-3, -1e-12 * a]
  tensors = [np.asarray(tensor, np.float32) for tensor in tensors]
  got = gram_of([jnp.asarray(tensor) for tensor in tensors])
  wide = [tensor.astype(np.float64).ravel() for tensor in tensors]
  assert got.shape == (4, 4) and got.dtype == np.float64
  for i, x in enumerate(wide):
    for j, y in enumerate(wide):
      bound = 1e-6 * np.linalg.norm(x) * np.linalg.norm(y)
      assert abs(got[i, j] - x @ y) <= bound
  np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize('name', models.MESHES)
def test_accuracy_on_a_mesh(name):
  base, (a, b) = models.flat({'kernel': (16, 24)}, experts=2)
  mesh = models.mesh(name)
  tensors = [models.place(x['kernel'], mesh) for x in (a, b)]
  got = gram_of(tensors)
  x, y = (np.asarray(t['kernel'], np.float64).ravel() for t in (a, b))
  bound = 1e-6 * np.linalg.norm(x) * np.linalg.norm(y)
  assert abs(got[0, 1] - x @ y) <= bound
  assert abs(got[0, 0] - x @ x) <= 1e-6 * (x @ x)


def test_gradient():
  """The angle of an expert moves with the expert."""
  tensors = [jnp.arange(1.0, 4), jnp.array([1.0, -1, 2])]

  def norm(scale):
    merged = mk.merge(Normalised(), [scale * tensors[0], tensors[1]])
    return merged.sum()

  # a·b / sqrt(a·a) does not depend on the length of a.
  assert abs(jax.grad(norm)(2.0)) < 1e-5
  # A few roundings in float32, of 6e-8 each.
  np.testing.assert_allclose(norm(2.0), 3 * 5 / np.sqrt(14), rtol=1e-6)


@mk.rule
class Normalised:
  def __call__(self, t):
    gram = yield from mk.gram_matrix(t.experts)
    ratio = gram[0, 1] / jnp.sqrt(gram[0, 0])
    return jnp.broadcast_to(ratio, t.experts[0].shape)
