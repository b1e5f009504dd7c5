"""Loading Llama and Qwen 2.5 models, and what they then compute."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.scale_study import huggingface, model, stored
from mergekit_jax.sharding import make_mesh
from tests.experiments import llama_reference

_CONFIG = {
  'vocab_size': 24,
  'hidden_size': 16,
  'intermediate_size': 40,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'rms_norm_eps': 1e-3,
  'rope_theta': 300.0,
  'hidden_act': 'silu',
  'rope_scaling': None,
}
_LLAMA = {
  **_CONFIG,
  'model_type': 'llama',
  # More than are unrolled.
  'num_hidden_layers': 5,
  'head_dim': 6,
  'tie_word_embeddings': False,
}
_QWEN = {
  **_CONFIG,
  'model_type': 'qwen2',
  'num_hidden_layers': 3,
  'tie_word_embeddings': True,
  'use_sliding_window': False,
}
_TOKENS = np.random.default_rng(5).integers(0, 24, (2, 11))

both = pytest.mark.parametrize('config', [_LLAMA, _QWEN], ids=['llama', 'qwen'])


def _tensors(config):
  """Random weights by the names that Hugging Face gives them."""
  random = np.random.default_rng(0)
  width, hidden = config['hidden_size'], config['intermediate_size']
  size = config.get('head_dim', width // config['num_attention_heads'])
  queries = config['num_attention_heads'] * size
  keys = config['num_key_value_heads'] * size
  shapes = {
    'model.embed_tokens.weight': (config['vocab_size'], width),
    'model.norm.weight': (width,),
  }
  if not config['tie_word_embeddings']:
    shapes['lm_head.weight'] = (config['vocab_size'], width)
  for layer in range(config['num_hidden_layers']):
    own = {
      'input_layernorm.weight': (width,),
      'post_attention_layernorm.weight': (width,),
      'self_attn.q_proj.weight': (queries, width),
      'self_attn.k_proj.weight': (keys, width),
      'self_attn.v_proj.weight': (keys, width),
      'self_attn.o_proj.weight': (width, queries),
      'mlp.gate_proj.weight': (hidden, width),
      'mlp.up_proj.weight': (hidden, width),
      'mlp.down_proj.weight': (width, hidden),
    }
    if config['model_type'] == 'qwen2':
      own |= {
        'self_attn.q_proj.bias': (queries,),
        'self_attn.k_proj.bias': (keys,),
        'self_attn.v_proj.bias': (keys,),
      }
    shapes |= {f'model.layers.{layer}.{k}': v for k, v in own.items()}
  return {
    name: (
      ('norm' in name) + random.standard_normal(shape) * shape[-1] ** -0.5
    ).astype(np.float32)
    for name, shape in shapes.items()
  }


def _save(directory, config, tensors):
  directory.mkdir(exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(config))
  save_file(tensors, directory / 'model.safetensors')
  return directory


@both
def test_logits_equal_a_reference_in_float64(tmp_path, config):
  tensors = _tensors(config)
  shape, params = huggingface.load(_save(tmp_path / 'hf', config, tensors))
  expected = llama_reference.logits(config, tensors, _TOKENS)
  # Float32 through up to five layers; the logits are about 1.
  np.testing.assert_allclose(
    model.logits(shape, params, _TOKENS), expected, rtol=0, atol=1e-5
  )


def test_logits_equal_those_of_transformers(tmp_path):
  torch = pytest.importorskip(
    'torch', reason='needs gigabytes; pip install -e ".[hf]" to run this'
  )
  transformers = pytest.importorskip(
    'transformers', reason='comes with torch: pip install -e ".[hf]"'
  )
  for config in (_LLAMA, _QWEN):
    settings = {k: v for k, v in config.items() if k != 'model_type'}
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(
        config['model_type'], **settings, initializer_range=0.2
      )
    )
    with torch.no_grad():
      # Scales and biases, which are all alike in a new model.
      for parameter in theirs.parameters():
        if parameter.ndim == 1:
          parameter.uniform_(0.5, 1.5)
    directory = tmp_path / config['model_type']
    theirs.save_pretrained(directory)
    shape, params = huggingface.load(directory)
    with torch.no_grad():
      expected = theirs(torch.tensor(_TOKENS)).logits.numpy()
    # Both are float32; the logits are about 1.
    np.testing.assert_allclose(
      model.logits(shape, params, _TOKENS), expected, rtol=0, atol=1e-5
    )


@both
def test_every_device_gets_its_own_part(tmp_path, config):
  directory = _save(tmp_path / 'hf', config, _tensors(config))
  mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
  _, whole = huggingface.load(directory)
  _, parts = huggingface.load(directory, mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  kernel = parts['layers']['feed_forward']['up']['kernel']
  layers = config['num_hidden_layers']
  assert kernel.sharding.shard_shape(kernel.shape) == (layers, 4, 20)


def test_stored_bfloat16_is_read_exactly_and_saved_in_orbax(tmp_path):
  tensors = {
    name: tensor.astype(ml_dtypes.bfloat16)
    for name, tensor in _tensors(_LLAMA).items()
  }
  directory = _save(tmp_path / 'hf', _LLAMA, tensors)
  shape, params = huggingface.load(directory)
  for layer in range(5):
    np.testing.assert_array_equal(
      params['layers']['attention']['out']['kernel'][layer],
      tensors[f'model.layers.{layer}.self_attn.o_proj.weight'].T.astype('f4'),
    )
  stored.save(tmp_path / 'orbax', params)
  restored = stored.load(tmp_path / 'orbax', shape)
  jax.tree.map(np.testing.assert_array_equal, restored, params)
  _, half = huggingface.load(directory, dtype=jnp.bfloat16)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {'bfloat16'}


def test_newer_files_keep_rotary_settings_together(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(_LLAMA))
  before = huggingface.read_config(tmp_path)
  assert before.rope_base == 300.0
  newer = {k: v for k, v in _LLAMA.items() if not k.startswith('rope')}
  newer['rope_parameters'] = {'rope_theta': 7e5, 'rope_type': 'default'}
  (tmp_path / 'config.json').write_text(json.dumps(newer))
  after = huggingface.read_config(tmp_path)
  assert after == dataclasses.replace(before, rope_base=7e5)


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    ({'model_type': 'gemma2'}, "model_type = 'gemma2'"),
    ({'rope_scaling': {'rope_type': 'llama3'}}, 'rope_scaling = '),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_type = 'yarn'"),
    ({'attention_bias': True}, 'attention_bias = True'),
    ({'use_sliding_window': True}, 'use_sliding_window = True'),
    ({'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
  ],
)
def test_unsupported_models_are_refused(tmp_path, change, expected):
  (tmp_path / 'config.json').write_text(json.dumps({**_LLAMA, **change}))
  with pytest.raises(ValueError, match='not supported') as error:
    huggingface.read_config(tmp_path)
  assert expected in str(error.value)


@pytest.mark.parametrize('read', [huggingface.load, huggingface.read_config])
def test_a_name_on_a_hub_is_no_folder(read):
  name = 'meta-llama/Llama-3.1-8B'
  with pytest.raises(FileNotFoundError, match='on a hub are not') as error:
    read(name)
  assert f'There is no {name}/config.json.' in str(error.value)


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
  tensors = _tensors(_LLAMA)
  del tensors['lm_head.weight']
  tensors['model.layers.1.mlp.up_proj.weight'] = np.zeros((41, 16), np.float32)
  tensors['model.layers.5.mlp.up_proj.weight'] = np.zeros((40, 16), np.float32)
  directory = _save(tmp_path / 'hf', _LLAMA, tensors)
  with pytest.raises(ValueError, match='differ in 3 places') as error:
    huggingface.load(directory)
  lines = str(error.value).split('\n')[1:]
  assert [line.split(':')[0].strip() for line in lines] == [
    'lm_head.weight',
    'model.layers.1.mlp.up_proj.weight',
    'model.layers.5.mlp.up_proj.weight',
  ]
  assert 'float32[41,16]' in lines[1] and 'float32[40,16]' in lines[1]


def test_a_stored_head_is_ignored_where_it_is_the_embedding(tmp_path):
  tensors = _tensors(_QWEN)
  tensors['lm_head.weight'] = np.zeros((24, 16), np.float32)
  _, params = huggingface.load(_save(tmp_path / 'hf', _QWEN, tensors))
  assert 'head' not in params
