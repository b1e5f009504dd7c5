"""AdamW training: one compiled program for pretraining and every expert.

The learning rate is an input of the program, not a schedule inside it, and
every phase runs in chunks of the same number of steps. So XLA compiles once,
which on a CPU costs more time than a hundred steps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.scale_study import model
from experiments.scale_study.model import ModelConfig, Params
from experiments.scale_study.tasks.encoding import Batches

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


def initial_state(params: Params) -> TrainState:
  """Starts training from `params` with empty optimizer statistics."""
  return {
    'params': params,
    'opt_state': _OPTIMIZER.init(params),
    'step': jnp.zeros((), jnp.int32),
  }


def loss(config: ModelConfig, params: Params, batch: Batches) -> jax.Array:
  """Weighted mean cross-entropy of the next token, in nats."""
  logits = model.apply(config, params, batch.ids)[:, :-1]
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch.ids[:, 1:]
  )
  weights = batch.weights[:, 1:]
  return jnp.sum(losses * weights) / jnp.sum(weights)


@functools.partial(jax.jit, static_argnames='config')
def _train_chunk(
  config: ModelConfig, state: TrainState, rates: jax.Array, batches: Batches
) -> tuple[TrainState, jax.Array]:
  def step(state, inputs):
    rate, batch = inputs
    value, gradients = jax.value_and_grad(loss, argnums=1)(
      config, state['params'], batch
    )
    updates, opt_state = _OPTIMIZER.update(
      gradients, state['opt_state'], state['params']
    )
    updates = jax.tree.map(lambda update: -rate * update, updates)
    return {
      'params': optax.apply_updates(state['params'], updates),
      'opt_state': opt_state,
      'step': state['step'] + 1,
    }, value

  return jax.lax.scan(step, state, (rates, batches))


def train(
  config: ModelConfig,
  params: Params,
  batches: Batches,
  *,
  peak_rate: float,
  label: str,
) -> tuple[TrainState, np.ndarray]:
  """Trains on each batch once, with warm-up and cosine decay.

  Args:
    config: shape of the model.
    params: where to start.
    batches: what to learn, [steps, batch, length].
    peak_rate: learning rate after the warm-up of 5 % of the steps.
    label: name of the phase in the progress bar.

  Returns:
    The final state and the loss of every step, float32 [steps].
  """
  steps = len(batches.ids)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, peak_rate, -(-steps // 20), steps, peak_rate / 20
  )
  rates = jnp.asarray(schedule(jnp.arange(steps)))
  state, losses = initial_state(params), []
  with tqdm(total=steps, desc=label, unit='step', disable=None) as progress:
    for start in range(0, steps, CHUNK_STEPS):
      chunk = slice(start, start + CHUNK_STEPS)
      state, chunk_losses = _train_chunk(
        config, state, rates[chunk], Batches(*(x[chunk] for x in batches))
      )
      losses.append(np.asarray(chunk_losses))
      progress.update(len(chunk_losses))
      progress.set_postfix(loss=f'{losses[-1].mean():.3f}')
  return state, np.concatenate(losses)
