"""Loading Llama and Qwen 2.5 models as Hugging Face stores them.

Their layers are apart and their matrices [out, in]; here layers are stacked and
matrices are [in, out]. Every device's part of a leaf is read from the boxes of
the stored tensors that it consists of, so that nothing is ever held whole.
"""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike
import numpy as np

from experiments.scale_study import sharding
from experiments.scale_study.model import abstract_params, ModelConfig, Params
import mergekit_jax as mk
from mergekit_jax import tree

# Names in the files by paths here; `{}` is the number of the layer.
_NAMES = {
  'embedding/embedding': 'model.embed_tokens.weight',
  'final_norm/scale': 'model.norm.weight',
  'head/embedding': 'lm_head.weight',
  **{
    f'layers/{path}': f'model.layers.{{}}.{name}'
    for path, name in (
      ('attention_norm/scale', 'input_layernorm.weight'),
      ('attention/query/kernel', 'self_attn.q_proj.weight'),
      ('attention/query/bias', 'self_attn.q_proj.bias'),
      ('attention/key/kernel', 'self_attn.k_proj.weight'),
      ('attention/key/bias', 'self_attn.k_proj.bias'),
      ('attention/value/kernel', 'self_attn.v_proj.weight'),
      ('attention/value/bias', 'self_attn.v_proj.bias'),
      ('attention/out/kernel', 'self_attn.o_proj.weight'),
      ('feed_forward_norm/scale', 'post_attention_layernorm.weight'),
      ('feed_forward/gate/kernel', 'mlp.gate_proj.weight'),
      ('feed_forward/up/kernel', 'mlp.up_proj.weight'),
      ('feed_forward/down/kernel', 'mlp.down_proj.weight'),
    )
  },
}

# Settings that change the function, and the value under which they do not.
_PLAIN = {
  'attention_bias': False,
  'hidden_act': 'silu',
  'mlp_bias': False,
  'partial_rotary_factor': 1.0,
  'quantization_config': None,
  'rope_scaling': None,
  'use_sliding_window': False,
}


def load(
  directory: Path, *, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32
) -> tuple[ModelConfig, Params]:
  """Reads a model.

  Args:
    directory: with config.json and safetensors, in one file or in shards.
    mesh: with the axes of `sharding.PARTITION_RULES`; None takes one device.
    dtype: of the parameters. Fine-tuning moves them by less than bfloat16 can
      tell apart.

  Returns:
    The shape, and the parameters in the form of `model.create`.

  Raises:
    FileNotFoundError: if `directory` or its config.json is missing.
    ValueError: if the model is of a kind that is not supported, or its tensors
      are not those that its configuration says.
  """
  directory = Path(directory)
  config = read_config(directory)
  checkpoint = mk.open_checkpoint(directory)
  specs, structure = tree.flatten(abstract_params(config))
  _demand_fit(config, checkpoint, specs)
  if mesh is None:
    one = SingleDeviceSharding(jax.local_devices()[0])
    places = {path: one for path in specs}
  else:
    places, _ = tree.flatten(
      sharding.shardings(structure.unflatten(specs.values()), mesh)
    )

  def leaf(path: str) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      return _read(checkpoint, path, index, specs[path].shape).astype(
        dtype, copy=False
      )

    return jax.make_array_from_callback(specs[path].shape, places[path], part)

  return config, structure.unflatten(map(leaf, specs))


def read_config(directory: Path) -> ModelConfig:
  """Reads the shape of a model from its config.json.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if the model is of a kind that is not supported.
  """
  path = Path(directory) / 'config.json'
  if not path.exists():
    raise FileNotFoundError(
      f'There is no {path}. Give the folder of a model as Hugging Face stores '
      'it; names on a hub are not looked up: download it first.'
    )
  read = json.loads(path.read_text(encoding='utf-8'))
  family = read.get('model_type')
  # Newer files keep what concerns rotary positions together.
  rope = read.get('rope_parameters') or {}
  settings = {**read, 'rope_type': 'default', **rope}
  unsupported = [
    f'{name} = {settings[name]!r}'
    for name, plain in {**_PLAIN, 'rope_type': 'default'}.items()
    if settings.get(name, plain) != plain
  ]
  if family not in ('llama', 'qwen2'):
    unsupported.insert(0, f'model_type = {family!r}')
  if unsupported:
    raise ValueError(
      f'{path} describes a model that is not supported: '
      f'{", ".join(unsupported)}. Llama and Qwen 2.5 (model_type llama and '
      'qwen2) are, without scaled rotary positions, sliding windows, '
      'quantization, or biases other than those of Qwen.'
    )
  heads, width = settings['num_attention_heads'], settings['hidden_size']
  return ModelConfig(
    vocabulary_size=settings['vocab_size'],
    width=width,
    layers=settings['num_hidden_layers'],
    heads=heads,
    kv_heads=settings.get('num_key_value_heads') or heads,
    head_size=settings.get('head_dim') or width // heads,
    hidden=settings['intermediate_size'],
    rope_base=float(settings.get('rope_theta', 10_000.0)),
    norm_epsilon=settings.get('rms_norm_eps', 1e-6),
    tied=settings.get('tie_word_embeddings', False),
    qkv_bias=family == 'qwen2',
  )


def _demand_fit(
  config: ModelConfig, checkpoint: Any, specs: Mapping[str, Any]
) -> None:
  """Raises one ValueError that lists every difference, if there is any."""
  expected = {}
  for path, spec in specs.items():
    shape = spec.shape
    if path.startswith('layers/'):
      shape = shape[1:]
    if path.endswith('/kernel'):
      shape = shape[::-1]
    for layer in range(config.layers):
      expected[_NAMES[path].format(layer)] = jax.ShapeDtypeStruct(
        shape, spec.dtype
      )
  found = {
    name: spec
    for name, spec in checkpoint.specs.items()
    # Old files hold constants, and some a head that is the embedding.
    if not name.endswith('rotary_emb.inv_freq')
    and not (config.tied and name == _NAMES['head/embedding'])
  }
  lines = tree.differences('the files', expected, found)
  if lines:
    raise ValueError(
      f'The tensors of {checkpoint.path} are not those that its config.json '
      f'describes; they differ in {len(lines)} places:\n  ' + '\n  '.join(lines)
    )


def _read(
  checkpoint: Any, path: str, index: tuple[slice, ...], shape: tuple[int, ...]
) -> np.ndarray:
  """Reads the box `index` of the leaf that is `path` here."""
  stacked, transposed = path.startswith('layers/'), path.endswith('/kernel')
  layers, box = (index[0], index[1:]) if stacked else (slice(0, 1), index)
  box = box[::-1] if transposed else box
  parts, reads = [], []
  for layer in range(*layers.indices(shape[0])):
    name = _NAMES[path].format(layer)
    spec = checkpoint.specs[name]
    sizes = [
      len(range(*part.indices(size)))
      for part, size in zip(box, spec.shape, strict=True)
    ]
    out = np.empty(sizes, spec.dtype)
    reads.append(checkpoint.read_into(name, box, out))
    parts.append(out.T if transposed else out)
  for read in reads:
    read.result()
  return np.stack(parts) if stacked else parts[0]
