"""AdamW training of all parameters: one compiled program for every phase.

The learning rate is an input of the program, not a schedule inside it, and
every phase runs in chunks of the same number of steps. So XLA compiles once,
which on a CPU costs more time than a hundred steps. A phase that was killed
goes on from its last checkpoint and ends with the same bits.
"""

from collections.abc import Iterable, Iterator
import contextlib
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
import numpy as np
import optax

from experiments.scale_study import model, progress, resume, sharding
from experiments.scale_study.model import ModelConfig, Params

# Keys: params, opt_state, step.
TrainState = dict[str, Any]

CHUNK_STEPS = 50

# AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) but for the factor of
# the learning rate.
_OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.scale_by_adam(b2=0.98),
  optax.add_decayed_weights(0.01),
)


class Batch(NamedTuple):
  """Texts to learn from; several batches are stacked in front.

  Attributes:
    tokens: ids, int32 [batch, length].
    weights: of each token in the loss, float32 [batch, length]; 0 for padding
      and whatever is not learned.
  """

  tokens: jax.Array | np.ndarray
  weights: jax.Array | np.ndarray


@jax.jit
def initial_state(params: Params) -> TrainState:
  """Starts training from a copy of `params` with empty statistics."""
  return sharding.constrain_by_rules(
    {
      'params': jax.tree.map(jnp.copy, params),
      'opt_state': _OPTIMIZER.init(params),
      'step': jnp.zeros((), jnp.int32),
    }
  )


def learning_rates(steps: int, peak_rate: float) -> np.ndarray:
  """Warm-up over 5 % of the steps, then a cosine to 5 % of the peak."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, peak_rate, -(-steps // 20), steps, peak_rate / 20
  )
  return np.asarray(jax.jit(schedule)(jnp.arange(steps)))


def loss(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
  """Weighted mean cross-entropy of the next token, in nats."""
  tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.weights)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    model.logits(config, params, tokens)[:, :-1], tokens[:, 1:]
  )
  return jnp.sum(losses * weights[:, 1:]) / jnp.sum(weights[:, 1:])


@functools.partial(jax.jit, static_argnames='config', donate_argnames='state')
def train_chunk(
  config: ModelConfig, state: TrainState, rates: ArrayLike, batches: Batch
) -> tuple[TrainState, jax.Array]:
  """Takes one step for each learning rate.

  Args:
    config: shape of the model.
    state: where to go on; it is used up.
    rates: float32 [steps].
    batches: [steps, batch, length].

  Returns:
    The new state and the loss before every step, float32 [steps].
  """

  def step(state, inputs):
    rate, batch = inputs
    value, gradients = jax.value_and_grad(loss, argnums=1)(
      config, state['params'], batch
    )
    updates, opt_state = _OPTIMIZER.update(
      gradients, state['opt_state'], state['params']
    )
    updates = jax.tree.map(lambda update: -rate * update, updates)
    state = {
      'params': optax.apply_updates(state['params'], updates),
      'opt_state': opt_state,
      'step': state['step'] + 1,
    }
    return sharding.constrain_by_rules(state), value

  return jax.lax.scan(step, state, (rates, batches))


def train(
  config: ModelConfig,
  params: Params,
  batches: Iterable[tuple[ArrayLike, ArrayLike]],
  *,
  steps: int,
  peak_rate: float,
  label: str,
  data: str = '',
  directory: Path | None = None,
  save_every: int = 10,
  mesh: Mesh | None = None,
) -> tuple[TrainState | None, np.ndarray]:
  """Trains on one batch a step, with warm-up and cosine decay.

  Args:
    config: shape of the model.
    params: where to start; they are not changed.
    batches: tokens and weights as in `Batch`, at least `steps` of them. A
      resumed phase skips those it has seen, so they must come again in the
      same order.
    steps: number of steps; whole chunks of `CHUNK_STEPS` compile once.
    peak_rate: learning rate after the warm-up.
    label: name of the phase in the progress bar.
    data: digest of what the batches are drawn from; '' where they are made as
      they are drawn.
    directory: where a CheckpointManager keeps the newest state, from which the
      same call goes on; None keeps nothing.
    save_every: chunks between two checkpoints; the last is always kept.
    mesh: with the axes of `sharding.PARTITION_RULES`; None trains where
      `params` lie.

  Returns:
    The final state, and the losses of the steps that this call took, float32;
    of a training that was finished before, None and no losses.

  Raises:
    ValueError: if there are too few batches, or `directory` holds another
      training.
  """
  batches = iter(batches)
  first = next(batches, None)
  if first is None:
    raise ValueError(f'{label}: there are no batches to train on.')
  batches = itertools.chain([first], batches)
  rates = learning_rates(steps, peak_rate)
  losses = [np.zeros(0, np.float32)]
  with contextlib.ExitStack() as stack:
    if mesh is not None:
      stack.enter_context(jax.set_mesh(mesh))
      params = sharding.place(params, mesh)
    saved = None
    if directory is not None:
      identity = _identity(config, params, first, steps, peak_rate, data)
      saved = stack.enter_context(resume.Saved(directory, identity))
      if saved.step() == steps:
        return None, losses[0]
    # Of parameters that lie where they happen to, as those that were drawn,
    # another program would be made than of those that were read.
    state = jax.tree.map(
      lambda leaf: jax.device_put(leaf, leaf.sharding), initial_state(params)
    )
    if saved:
      state = saved.restore(state)
    done = int(state['step'])
    trained = stack.enter_context(progress.bar(steps, label, 'step', done))
    for chunk in _chunks(batches, done, steps, label):
      if mesh is not None:
        chunk = sharding.place_batches(chunk, mesh)
      taken = slice(done, done + len(chunk.tokens))
      state, values = train_chunk(config, state, rates[taken], chunk)
      losses.append(np.asarray(values))
      done = taken.stop
      trained.set_postfix(loss=f'{losses[-1].mean():.3f}', refresh=False)
      trained.update(len(values))
      if saved and (done == steps or done % (save_every * CHUNK_STEPS) == 0):
        saved.save(done, state)
  return state, np.concatenate(losses)


def _chunks(
  batches: Iterator[Any], start: int, stop: int, label: str
) -> Iterator[Batch]:
  """Stacks the batches of steps `start` to `stop`, a chunk at a time."""
  batches = itertools.islice(batches, start, stop)
  for first in range(start, stop, CHUNK_STEPS):
    count = min(CHUNK_STEPS, stop - first)
    chunk = list(itertools.islice(batches, count))
    if len(chunk) < count:
      raise ValueError(
        f'{label}: {stop} steps need as many batches, but there are only '
        f'{first + len(chunk)}. Take fewer steps, or give more batches.'
      )
    yield Batch(*map(np.stack, zip(*chunk, strict=True)))


def _identity(
  config: ModelConfig,
  params: Params,
  first: tuple[ArrayLike, ArrayLike],
  steps: int,
  peak_rate: float,
  data: str,
) -> dict[str, str | int | float]:
  """What must be the same for a phase to go on from its checkpoint."""
  batch = b''.join(np.asarray(part).tobytes() for part in first)
  return {
    'model': str(config),
    'steps': steps,
    'peak_rate': peak_rate,
    'start': int(_checksum(params)),
    'first_batch': zlib.crc32(batch),
    'training_data': data,
  }


@jax.jit
def _checksum(params: Params) -> jax.Array:
  """Sum of all bits as integers: exact, in whatever order devices add."""
  return sum(
    (
      jnp.sum(leaf.view(f'uint{8 * leaf.dtype.itemsize}'), dtype=jnp.uint32)
      for leaf in jax.tree.leaves(params)
    ),
    jnp.uint32(0),
  )
