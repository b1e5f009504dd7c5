"""Merges small models as Tunix's trainer stores them, restored by Tunix.

  pip install google-tunix; python -m tests.compare_tunix FOLDER

Values have to be those of a merge in float64, but for rounding. Not a test: the
library takes long to install.
"""

import pathlib
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tunix.models.llama3 import model as llama3
from tunix.sft import checkpoint_manager, peft_trainer, utils

import mergekit_jax as mk

CONFIG = llama3.ModelConfig(
  num_layers=2,
  vocab_size=64,
  embed_dim=16,
  hidden_dim=32,
  num_heads=4,
  head_dim=8,
  num_kv_heads=2,
  rope_theta=10_000,
  norm_eps=1e-5,
)
EVERY_STEP = ocp.CheckpointManagerOptions(save_interval_steps=1)


def small_model():
  return llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))


def inputs(batch):
  mask = batch.input_mask.astype(bool)
  return {
    'input_tokens': batch.input_tokens,
    'input_mask': batch.input_mask,
    'positions': utils.build_positions_from_mask(mask),
    'attention_mask': utils.make_causal_attn_mask(mask),
  }


def fine_tune(path, seed):
  tokens = np.random.default_rng(seed).integers(1, 64, (4, 8))
  batch = peft_trainer.TrainingInput(
    input_tokens=jnp.asarray(tokens), input_mask=jnp.ones((4, 8), jnp.int32)
  )
  config = peft_trainer.TrainingConfig(
    eval_every_n_steps=100,
    max_steps=2,
    checkpoint_root_directory=str(path),
    checkpointing_options=EVERY_STEP,
  )
  trainer = peft_trainer.PeftTrainer(small_model(), optax.adamw(1e-3), config)
  trainer.with_gen_model_input_fn(inputs).train([batch] * 2)


def restored(path):
  """What Tunix restores into a model of zeros, in float64 by path."""
  model = small_model()
  nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
  manager = checkpoint_manager.CheckpointManager(str(path))
  manager.maybe_restore(model)
  manager.close()
  return {
    keys: np.asarray(leaf.get_value(), np.float64)
    for keys, leaf in nnx.to_flat_state(nnx.state(model))
  }


def main(folder):
  paths = [folder / name for name in ('base', 'one', 'two')]
  manager = checkpoint_manager.CheckpointManager(str(paths[0]))
  manager.save(0, small_model(), force=True)
  manager.close()
  for seed, path in enumerate(paths[1:]):
    fine_tune(path, seed)
  base, one, two = map(restored, paths)
  expected = {
    'average': (mk.average(), lambda b, x, y: (x + y) / 2),
    'sum': (mk.task_arithmetic(0.5), lambda b, x, y: b + (x + y - 2 * b) / 2),
  }
  for name, (method, formula) in expected.items():
    output = folder / name
    report = mk.merge_checkpoints(
      method, experts=paths[1:], base=paths[0], output=output
    )
    assert len(report.tensors) == len(base) and not report.warnings
    merged = restored(output)
    for keys, leaf in merged.items():
      models = base[keys], one[keys], two[keys]
      # A rounding of float32 of each of four numbers no larger than this.
      largest = np.max(np.abs(models), 0) * 2
      error = np.abs(leaf - formula(*models))
      assert np.all(error <= 4 * np.finfo(np.float32).eps * largest), keys
    print(f'{name}: the same values')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]).absolute())
