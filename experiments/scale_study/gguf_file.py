"""A Llama in a GGUF file, as llama.cpp keeps it, written as Hugging Face's.

Quantised matrices become float32. llama.cpp turns neighbouring features of a
query or key together, Hugging Face feature i with feature i + size / 2, so the
rows of both matrices change places. In the wrong order a model still answers,
only worse: tests compare logits.
"""

from collections.abc import Callable, Mapping
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# Names in Hugging Face's files by names in GGUF; `{}` is the number of a layer.
_NAMES = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
}
_LAYER_NAMES = {
  f'blk.{{}}.{ours}.weight': f'model.layers.{{}}.{theirs}.weight'
  for ours, theirs in (
    ('attn_norm', 'input_layernorm'),
    ('attn_q', 'self_attn.q_proj'),
    ('attn_k', 'self_attn.k_proj'),
    ('attn_v', 'self_attn.v_proj'),
    ('attn_output', 'self_attn.o_proj'),
    ('ffn_norm', 'post_attention_layernorm'),
    ('ffn_gate', 'mlp.gate_proj'),
    ('ffn_up', 'mlp.up_proj'),
    ('ffn_down', 'mlp.down_proj'),
  )
}
# Tokens that stand for no text, by the numbers of llama.cpp.
_CONTROL = 3


def write_hugging_face(source: Path, folder: Path) -> None:
  """Writes config.json, model.safetensors and tokenizer.json.

  Args:
    source: a GGUF file of a Llama whose output projection is its embedding, and
      whose tokenizer is that of SmolLM.
    folder: where to; it is made.

  Raises:
    ImportError: if the package `gguf` is missing.
    ValueError: if the file holds another kind of model or tokenizer.
  """
  try:
    # Only this preset needs the package.
    import gguf
  except ImportError as error:
    raise ImportError(
      'Reading a GGUF file needs the package gguf: '
      "pip install 'mergekit_jax[real]'."
    ) from error
  reader = gguf.GGUFReader(source)

  def field(name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()

  for name, expected in (
    ('general.architecture', 'llama'),
    ('tokenizer.ggml.model', 'gpt2'),
    ('tokenizer.ggml.pre', 'smollm'),
  ):
    if field(name) != expected:
      raise ValueError(
        f'{source}: {name} is {field(name)!r}; only {expected!r} can be read.'
      )
  config = _config(field)
  tensors = {
    tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
    for tensor in reader.tensors
  }
  folder.mkdir(parents=True, exist_ok=True)
  _write_json(folder / 'config.json', config)
  _write_json(folder / 'tokenizer.json', _tokenizer(field))
  save_file(_renamed(tensors, config), folder / 'model.safetensors')


def _config(field: Callable[[str], Any]) -> dict[str, Any]:
  return {
    'model_type': 'llama',
    'vocab_size': len(field('tokenizer.ggml.tokens')),
    'hidden_size': field('llama.embedding_length'),
    'num_hidden_layers': field('llama.block_count'),
    'num_attention_heads': field('llama.attention.head_count'),
    'num_key_value_heads': field('llama.attention.head_count_kv'),
    'intermediate_size': field('llama.feed_forward_length'),
    'rope_theta': field('llama.rope.freq_base'),
    'rms_norm_eps': field('llama.attention.layer_norm_rms_epsilon'),
    'tie_word_embeddings': True,
  }


def _renamed(
  tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  names = dict(_NAMES)
  for layer in range(config['num_hidden_layers']):
    for ours, theirs in _LAYER_NAMES.items():
      names[ours.format(layer)] = theirs.format(layer)
  heads = {
    'attn_q': config['num_attention_heads'],
    'attn_k': config['num_key_value_heads'],
  }
  renamed = {}
  for name, tensor in tensors.items():
    kind = name.removesuffix('.weight').rpartition('.')[-1]
    if kind in heads:
      tensor = _halves(tensor, heads[kind])
    # What has no name here is left for the reader to complain about.
    renamed[names.get(name, name)] = np.ascontiguousarray(tensor, np.float32)
  return renamed


def _halves(matrix: np.ndarray, heads: int) -> np.ndarray:
  """Reorders the rows of each head: first the even ones, then the odd ones."""
  rows, columns = matrix.shape
  pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
  return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(field: Callable[[str], Any]) -> dict[str, Any]:
  """Byte-pair tokens of text whose digits stand alone."""
  tokens = field('tokenizer.ggml.tokens')
  kinds = field('tokenizer.ggml.token_type')
  byte_level = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': True,
  }
  return {
    'version': '1.0',
    'added_tokens': [
      {
        'id': index,
        'content': token,
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': True,
      }
      for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
      if kind == _CONTROL
    ],
    'pre_tokenizer': {
      'type': 'Sequence',
      'pretokenizers': [
        {'type': 'Digits', 'individual_digits': True},
        byte_level,
      ],
    },
    'decoder': byte_level,
    'model': {
      'type': 'BPE',
      'vocab': {token: index for index, token in enumerate(tokens)},
      'merges': [merge.split(' ') for merge in field('tokenizer.ggml.merges')],
    },
  }


def _write_json(path: Path, record: Any) -> None:
  path.write_text(json.dumps(record), encoding='utf-8')
