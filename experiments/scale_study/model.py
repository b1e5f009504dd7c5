"""A small decoder-only transformer whose layers are stacked in one leaf.

RMSNorm, rotary positions, a short causal convolution, attention, SwiGLU and
tied embeddings. All layers live in one module with a leading layer axis, as a
scanned MaxText checkpoint has them: every parameter under `layers/` is stacked
on axis 0.

The rest of the study handles parameters as a plain nested dict of arrays, the
form that is stored and merged; `create` and `apply` convert at the edge.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Params = dict[str, Any]

# Short texts need few wavelengths: the longest is about the length of a text.
_ROTARY_BASE = 100.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of the transformer; `width` divides into `heads`."""

  vocabulary_size: int
  width: int
  layers: int
  heads: int

  @property
  def hidden(self) -> int:
    """Width of the feed-forward layer.

    With 3/2 of `width` its input matrix has the shape of the one of attention,
    and whatever compiles per shape, as merging does, compiles once for both.
    """
    return 3 * self.width // 2


def _scaled_normal(fan_in: int, depth: int = 1) -> nnx.Initializer:
  return nnx.initializers.normal(fan_in**-0.5 / depth)


def rotate(x: jax.Array) -> jax.Array:
  """Rotary position embedding (Su et al., 2021, arXiv 2104.09864).

  Args:
    x: queries or keys, [batch, length, heads, features].

  Returns:
    `x` with each pair of features turned by an angle that grows with position.
  """
  length, features = x.shape[1], x.shape[-1]
  rates = _ROTARY_BASE ** (-jnp.arange(0, features, 2) / features)
  angles = jnp.arange(length)[:, None, None] * rates  # [length, 1, features/2]
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [
      first * jnp.cos(angles) - second * jnp.sin(angles),
      first * jnp.sin(angles) + second * jnp.cos(angles),
    ],
    axis=-1,
  )


class CausalConvolution(nnx.Module):
  """Depthwise convolution over the current and the two previous tokens.

  Copying needs to know which token came before; with this a single attention
  layer can do it, and small models learn it in a tenth of the steps.
  """

  taps = 3

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    noise = 0.1 * jax.random.normal(rngs.params(), (self.taps, width))
    self.kernel = nnx.Param(noise.at[0].add(1.0))

  def __call__(self, x: jax.Array) -> jax.Array:
    length = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (self.taps - 1, 0), (0, 0)))
    shifts = jnp.stack(
      [padded[:, self.taps - 1 - tap :][:, :length] for tap in range(self.taps)]
    )
    return jnp.sum(shifts * self.kernel[...][:, None, None], axis=0)


class Attention(nnx.Module):
  """Causal multi-head self-attention with rotary positions."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    width, self.heads = config.width, config.heads
    linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
    self.qkv = linear(width, 3 * width, kernel_init=_scaled_normal(width))
    self.out = linear(
      width, width, kernel_init=_scaled_normal(width, config.layers)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    heads = (*x.shape[:2], self.heads, -1)
    query, key, value = (
      part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1)
    )
    mixed = jax.nn.dot_product_attention(
      rotate(query), rotate(key), value, is_causal=True
    )
    return self.out(mixed.reshape(x.shape))


class FeedForward(nnx.Module):
  """SwiGLU (Shazeer, 2020, arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    width, hidden = config.width, config.hidden
    linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
    self.up = linear(width, 2 * hidden, kernel_init=_scaled_normal(width))
    self.down = linear(
      hidden, width, kernel_init=_scaled_normal(hidden, config.layers)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    value, gate = jnp.split(self.up(x), 2, axis=-1)
    return self.down(value * nnx.silu(gate))


class Block(nnx.Module):
  """One pre-norm layer: attention, then feed-forward, both residual."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    # The matrices behind the norm can learn its scale.
    self.norm = nnx.RMSNorm(config.width, use_scale=False, rngs=rngs)
    self.convolution = CausalConvolution(config.width, rngs=rngs)
    self.attention = Attention(config, rngs=rngs)
    self.feed_forward = FeedForward(config, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attention(self.convolution(self.norm(x)))
    return x + self.feed_forward(self.norm(x))


class LanguageModel(nnx.Module):
  """Token ids [batch, length] to logits [batch, length, vocabulary]."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack_of_blocks(rngs: nnx.Rngs) -> Block:
      return Block(config, rngs=rngs)

    self.embedding = nnx.Embed(
      config.vocabulary_size,
      config.width,
      embedding_init=nnx.initializers.normal(0.05),
      rngs=rngs,
    )
    self.layers = stack_of_blocks(rngs)
    self.final_norm = nnx.RMSNorm(config.width, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    # Few and small layers: a loop would cost a CPU more than it saves.
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, unroll=True)
    def through_layers(x: jax.Array, block: Block) -> jax.Array:
      return block(x)

    x = through_layers(self.embedding(tokens), self.layers)
    return self.embedding.attend(self.final_norm(x))


@functools.cache
def _structure(config: ModelConfig) -> nnx.GraphDef:
  abstract = nnx.eval_shape(
    lambda: LanguageModel(config, rngs=nnx.Rngs(params=0))
  )
  return nnx.graphdef(abstract)


@functools.partial(jax.jit, static_argnames='config')
def create(config: ModelConfig, key: jax.Array) -> Params:
  """Draws the parameters of a new model as a nested dict of float32 arrays."""
  model = LanguageModel(config, rngs=nnx.Rngs(params=key))
  return nnx.to_pure_dict(nnx.state(model))


def apply(config: ModelConfig, params: Params, tokens: ArrayLike) -> jax.Array:
  """Predicts the next token at every position.

  Args:
    config: the shape `params` were created with.
    params: nested dict as returned by `create`.
    tokens: ids, int32 [batch, length].

  Returns:
    Logits, float32 [batch, length, vocabulary].
  """
  return nnx.merge(_structure(config), params)(jnp.asarray(tokens))
