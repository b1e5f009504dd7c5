"""Made-up Llama models in safetensors, as libraries for them expect to find."""

from __future__ import annotations

from collections.abc import Iterable
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

WIDTH = 1024
HIDDEN = 2816
HEADS = 16
VOCABULARY = 32_000


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
  """Shapes of a model whose bfloat16 weights take about that much."""
  square = (WIDTH, WIDTH)
  layer = {
    'input_layernorm': (WIDTH,),
    'mlp.down_proj': (WIDTH, HIDDEN),
    'mlp.gate_proj': (HIDDEN, WIDTH),
    'mlp.up_proj': (HIDDEN, WIDTH),
    'post_attention_layernorm': (WIDTH,),
    **{f'self_attn.{name}_proj': square for name in 'koqv'},
  }
  ends = {
    'lm_head': (VOCABULARY, WIDTH),
    'model.embed_tokens': (VOCABULARY, WIDTH),
    'model.norm': (WIDTH,),
  }
  per_layer, outside = map(_bytes, (layer.values(), ends.values()))
  layers = max(1, round((gigabytes * 1e9 - outside) / per_layer))
  inside = {
    f'model.layers.{i}.{name}': shape
    for i in range(layers)
    for name, shape in layer.items()
  }
  return {f'{name}.weight': shape for name, shape in (ends | inside).items()}


def _bytes(shapes: Iterable[tuple[int, ...]]) -> int:
  return sum(2 * int(np.prod(shape)) for shape in shapes)


def save_set(
  folder: pathlib.Path, shapes: dict[str, tuple[int, ...]], experts: int
) -> list[pathlib.Path]:
  """Saves a base and its experts in bfloat16, with their configurations.

  Args:
    folder: where.
    shapes: of the tensors, by name.
    experts: how many.

  Returns:
    The directories, the base first.
  """
  paths = []
  for model in range(experts + 1):
    path = folder / ('base' if model == 0 else f'expert_{model}')
    path.mkdir(parents=True)
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
      values = np.random.default_rng(number).standard_normal(shape, 'float32')
      values *= 0.02
      if model:
        random = np.random.default_rng([number, model])
        values += 0.002 * random.standard_normal(shape, 'float32')
      tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, path / 'model.safetensors', {'format': 'pt'})
    config = json.dumps(_config(shapes), indent=2)
    (path / 'config.json').write_text(config + '\n')
    paths.append(path)
  return paths


def _config(shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
  layers = {name.split('.')[2] for name in shapes if '.layers.' in name}
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'hidden_size': WIDTH,
    'intermediate_size': HIDDEN,
    'num_attention_heads': HEADS,
    'num_key_value_heads': HEADS,
    'num_hidden_layers': len(layers),
    'vocab_size': VOCABULARY,
    'tie_word_embeddings': False,
    'torch_dtype': 'bfloat16',
  }
