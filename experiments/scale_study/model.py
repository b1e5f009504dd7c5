"""A decoder-only transformer whose layers are stacked in one leaf.

RMSNorm, rotary positions, grouped-query attention and SwiGLU: one model from
thirty thousand parameters to the shape of Llama and Qwen 2.5. All layers live
in one module with a leading layer axis, as a scanned MaxText checkpoint has
them: every parameter under `layers/` is stacked on axis 0, and what compiles
does not grow with depth.

The rest of the study handles parameters as a plain nested dict of arrays, the
form that is stored and merged; `create` and `logits` convert at the edge.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from experiments.scale_study import sharding

Params = dict[str, Any]

# Of the leaves that hold all layers, layers first.
STACKED_AXES = {r'(.*/)?layers/.*': 0}

# A loop over so few layers costs a CPU more than compiling each of them.
_UNROLLED_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of the transformer.

  Attributes:
    vocabulary_size: number of token ids.
    width: of the residual stream.
    layers: number of layers.
    heads: of the queries; a multiple of `kv_heads`.
    kv_heads: of keys and values, each shared by `heads / kv_heads` queries.
    head_size: features of a head, even.
    hidden: width of the feed-forward layer.
    rope_base: wavelength, in tokens over 2π, that the slowest rotation nears.
    norm_epsilon: added to the mean square before its root is taken.
    tied: whether the output projection is the embedding.
    convolution: tokens that the causal convolution before attention sees; 0
      for none.
    qkv_bias: whether queries, keys and values have a bias, as in Qwen 2.5.
    remat: whether a layer's activations are computed again in the backward
      pass, so that memory holds those of one layer only.
    dtype: of the computation; parameters keep the dtype they have.

  Raises:
    ValueError: if `heads` is no multiple of `kv_heads`, or `head_size` is odd.
  """

  vocabulary_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  hidden: int
  rope_base: float
  norm_epsilon: float = 1e-6
  tied: bool = True
  convolution: int = 0
  qkv_bias: bool = False
  remat: bool = False
  dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    if self.heads % self.kv_heads or self.head_size % 2:
      raise ValueError(
        f'heads={self.heads}, kv_heads={self.kv_heads}, '
        f'head_size={self.head_size}: heads must be a multiple of kv_heads, '
        'and head_size even, since rotary positions turn pairs of features.'
      )


def _scaled_normal(fan_in: int, depth: int = 1) -> nnx.Initializer:
  return nnx.initializers.normal(fan_in**-0.5 / depth)


def rotate(x: jax.Array, base: float) -> jax.Array:
  """Rotary position embedding (Su et al., 2021, arXiv 2104.09864).

  Feature i turns together with feature i + features / 2, as Llama's do.

  Args:
    x: queries or keys, [batch, length, heads, features].
    base: as `ModelConfig.rope_base`.

  Returns:
    `x` with each pair of features turned by an angle that grows with position.
  """
  length, features = x.shape[1], x.shape[-1]
  rates = base ** (-jnp.arange(0, features, 2) / features)
  angles = jnp.arange(length)[:, None, None] * rates  # [length, 1, features/2]
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [
      first * jnp.cos(angles) - second * jnp.sin(angles),
      first * jnp.sin(angles) + second * jnp.cos(angles),
    ],
    axis=-1,
  ).astype(x.dtype)


class CausalConvolution(nnx.Module):
  """Depthwise convolution over the current and the preceding tokens.

  Copying needs to know which token came before; with this a single attention
  layer can do it, and small models learn it in a tenth of the steps.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shape = (config.convolution, config.width)
    noise = 0.1 * jax.random.normal(rngs.params(), shape)
    self.kernel = nnx.Param(noise.at[0].add(1.0))

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...].astype(x.dtype)
    taps, length = kernel.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    shifts = jnp.stack(
      [padded[:, taps - 1 - tap :][:, :length] for tap in range(taps)]
    )
    return jnp.sum(shifts * kernel[:, None, None], axis=0)


class Attention(nnx.Module):
  """Causal self-attention with rotary positions.

  Queries share keys and values in groups (Ainslie et al., 2023, arXiv
  2305.13245).
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    width, self.rope_base = config.width, config.rope_base
    linear = functools.partial(nnx.Linear, dtype=config.dtype, rngs=rngs)

    def heads(number: int) -> nnx.Linear:
      return linear(
        width,
        number * config.head_size,
        use_bias=config.qkv_bias,
        kernel_init=_scaled_normal(width),
      )

    self.head_size = config.head_size
    self.query = heads(config.heads)
    self.key = heads(config.kv_heads)
    self.value = heads(config.kv_heads)
    mixed = config.heads * config.head_size
    self.out = linear(
      mixed,
      width,
      use_bias=False,
      kernel_init=_scaled_normal(mixed, config.layers),
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    query, key, value = (
      project(x).reshape(*x.shape[:2], -1, self.head_size)
      for project in (self.query, self.key, self.value)
    )
    mixed = jax.nn.dot_product_attention(
      rotate(query, self.rope_base),
      rotate(key, self.rope_base),
      value,
      is_causal=True,
    )
    mixed = mixed.reshape(*x.shape[:2], -1)
    return self.out(sharding.constrain(mixed, sharding.FEATURES))


class FeedForward(nnx.Module):
  """SwiGLU (Shazeer, 2020, arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    width, hidden = config.width, config.hidden
    linear = functools.partial(
      nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs
    )
    self.gate = linear(width, hidden, kernel_init=_scaled_normal(width))
    self.up = linear(width, hidden, kernel_init=_scaled_normal(width))
    self.down = linear(
      hidden, width, kernel_init=_scaled_normal(hidden, config.layers)
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = nnx.silu(self.gate(x)) * self.up(x)
    return self.down(sharding.constrain(hidden, sharding.FEATURES))


class Block(nnx.Module):
  """One pre-norm layer: attention, then feed-forward, both residual."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.attention_norm = _norm(config, rngs)
    if config.convolution:
      self.convolution = CausalConvolution(config, rngs=rngs)
    self.attention = Attention(config, rngs=rngs)
    self.feed_forward_norm = _norm(config, rngs)
    self.feed_forward = FeedForward(config, rngs=rngs)
    self.convolves = config.convolution > 0

  def __call__(self, x: jax.Array) -> jax.Array:
    normed = sharding.constrain(self.attention_norm(x), sharding.BATCH)
    x += self.attention(self.convolution(normed) if self.convolves else normed)
    normed = sharding.constrain(self.feed_forward_norm(x), sharding.BATCH)
    return x + self.feed_forward(normed)


class LanguageModel(nnx.Module):
  """Token ids [batch, length] to logits [batch, length, vocabulary]."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack_of_blocks(rngs: nnx.Rngs) -> Block:
      return Block(config, rngs=rngs)

    def table(deviation: float) -> nnx.Embed:
      return nnx.Embed(
        config.vocabulary_size,
        config.width,
        embedding_init=nnx.initializers.normal(deviation),
        dtype=config.dtype,
        rngs=rngs,
      )

    self.config = config
    self.embedding = table(0.05)
    self.layers = stack_of_blocks(rngs)
    self.final_norm = _norm(config, rngs)
    if not config.tied:
      self.head = table(config.width**-0.5)

  def __call__(self, tokens: jax.Array, at: Any = None) -> jax.Array:
    layers = self.config.layers

    def layer(x: jax.Array, block: Block) -> jax.Array:
      return sharding.constrain(block(x), sharding.RESIDUAL)

    # In a scan nothing can be shared with the forward pass by mistake.
    step = nnx.remat(layer, prevent_cse=False) if self.config.remat else layer
    through_layers = nnx.scan(
      step,
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
      unroll=layers if layers <= _UNROLLED_LAYERS else 1,
    )
    embedding = self._table(self.embedding)
    x = sharding.constrain(embedding[tokens], sharding.BATCH)
    x = sharding.constrain(x, sharding.RESIDUAL)
    x = self.final_norm(through_layers(x, self.layers))
    if at is not None:
      x = x[at]
    head = embedding if self.config.tied else self._table(self.head)
    return sharding.constrain(
      jnp.einsum('blw,vw->blv', x, head, preferred_element_type=jnp.float32),
      sharding.FEATURES,
    )

  def _table(self, embedding: nnx.Embed) -> jax.Array:
    table = embedding.embedding[...].astype(self.config.dtype)
    return sharding.constrain(table, sharding.TABLE)


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(
    config.width, epsilon=config.norm_epsilon, dtype=config.dtype, rngs=rngs
  )


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


def abstract_params(config: ModelConfig) -> Params:
  """What `create` would return, as shapes and dtypes without memory."""
  return jax.eval_shape(functools.partial(create, config), jax.random.key(0))


@functools.partial(jax.jit, static_argnames='config')
def logits(
  config: ModelConfig,
  params: Params,
  tokens: ArrayLike,
  at: tuple[ArrayLike, ArrayLike] | None = None,
) -> jax.Array:
  """Predicts the next token at every position, or only where it is asked for.

  Args:
    config: the shape `params` were created with.
    params: nested dict as returned by `create`.
    tokens: ids, int32 [batch, length].
    at: row and position of what is to be predicted, int32 [places, tokens]
      both or to be broadcast to that; None predicts everywhere. Large
      vocabularies make it worth while.

  Returns:
    Logits, float32 [batch, length, vocabulary] or [places, tokens, vocabulary].
  """
  return nnx.merge(_structure(config), params)(jnp.asarray(tokens), at)
