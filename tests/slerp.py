"""Slerp, written as a user of the library would: public names alone."""

import jax
import jax.numpy as jnp

import mergekit_jax as mk


@mk.rule
class Slerp:
  """Spherical interpolation between two experts.

  Shoemake, 1985, "Animating rotation with quaternion curves". Parallel tensors,
  of which the angle says nothing, are interpolated linearly.
  """

  fraction: float

  def __call__(self, t: mk.Place):
    a, b = t.experts
    gram = yield from mk.gram_matrix([a, b])
    # A handful of scalars costs nothing in float64.
    with jax.enable_x64(True):
      gram = gram.astype('float64')
      norms = jnp.sqrt(gram[0, 0] * gram[1, 1])
      cosine = jnp.where(norms == 0, 1, gram[0, 1] / norms)
      parallel = 1 - jnp.abs(cosine) < 1e-6
      angle = jnp.arccos(jnp.where(parallel, 0, cosine))
      parts = jnp.stack([1 - self.fraction, jnp.asarray(self.fraction)])
      weights = jnp.sin(parts * angle) / jnp.sin(angle)
      weights = jnp.where(parallel, parts, weights).astype('float32')
    return weights[0] * a + weights[1] * b
