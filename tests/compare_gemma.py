"""Merges small models as Gemma's library stores them, loaded by that library.

  pip install gemma; python -m tests.compare_gemma FOLDER

Each of its three layouts (nested, flat, stacked) has to give the merge of what
was stored, bit for bit. Not a test: the library takes gigabytes to install.
"""

import dataclasses
import pathlib
import sys

from gemma import gm
from gemma.gm.ckpts import _checkpoint
import jax
import jax.numpy as jnp
import numpy as np

import mergekit_jax as mk

PATTERN = 6  # layers, after which the kinds of attention begin again
LAYOUTS = {
  'nested': lambda params: params,
  'flat': _checkpoint._nested_to_flat,
  'stacked': lambda params: _checkpoint._nested_to_stacked(params, PATTERN),
}
METHODS = {
  'average': mk.average(),
  'ties': mk.ties(density=0.3),
  'ties, tensor': mk.ties(density=0.3, scope='tensor'),
}


def small_model():
  """Gemma 3 with two rounds of its pattern of attention."""
  config = gm.nn.Gemma3_270M().config
  return gm.nn.Gemma3_270M(
    config=dataclasses.replace(
      config,
      num_embed=64,
      embed_dim=16,
      hidden_dim=32,
      head_dim=8,
      attention_types=config.attention_types[: 2 * PATTERN],
    )
  )


def made_up(number):
  """Parameters in bfloat16: of the base if the number is 0, else an expert."""
  tokens = jnp.arange(8)[None]
  base = small_model().init(jax.random.key(0), tokens)['params']
  random = np.random.default_rng(number)
  noise = lambda leaf: 0.01 * number * random.standard_normal(leaf.shape)
  return jax.tree.map(lambda x: jnp.bfloat16(x + noise(x)), base)


def main(folder):
  base, *experts = map(made_up, range(3))
  for layout, stored_as in LAYOUTS.items():
    paths = [folder / layout / name for name in ('base', 'one', 'two')]
    for path, params in zip(paths, (base, *experts), strict=True):
      gm.ckpts.save_params(stored_as(params), path, wait_until_finished=True)
    for name, method in METHODS.items():
      output = folder / layout / name
      mk.merge_checkpoints(
        method, experts=paths[1:], base=paths[0], output=output
      )
      loaded = gm.ckpts.load_params(output)
      expected = mk.merge(method, experts, base)
      jax.tree.map(np.testing.assert_array_equal, loaded, expected)
      print(f'{layout}, {name}: the same bits')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]).absolute())
