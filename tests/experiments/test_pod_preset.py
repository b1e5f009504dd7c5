"""The preset for a pod, phase by phase, on models of a few thousand numbers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.scale_study import phases
from experiments.scale_study.analysis import cells
from experiments.scale_study.configs import pod
from experiments.scale_study.folder import Arm
from experiments.scale_study.study import PHASES, Study
from experiments.scale_study.study_config import MethodGrid, Stored
from tests.experiments import small_study

_QWEN = {
  'model_type': 'qwen2',
  'vocab_size': 272,
  'hidden_size': 16,
  'intermediate_size': 16,
  'num_attention_heads': 2,
  'num_hidden_layers': 1,
  'tie_word_embeddings': True,
}
_LAYER = {
  'input_layernorm.weight': (16,),
  'post_attention_layernorm.weight': (16,),
  **{
    f'self_attn.{name}_proj.{part}': (16, 16) if part == 'weight' else (16,)
    for name in 'qkv'
    for part in ('weight', 'bias')
  },
  'self_attn.o_proj.weight': (16, 16),
  **{f'mlp.{name}_proj.weight': (16, 16) for name in ('gate', 'up', 'down')},
}


def _save(folder, seed):
  """Writes a model as Hugging Face does."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(_QWEN))
  shapes = {
    'model.embed_tokens.weight': (_QWEN['vocab_size'], 16),
    'model.norm.weight': (16,),
    **{f'model.layers.0.{name}': shape for name, shape in _LAYER.items()},
  }
  random = np.random.default_rng(seed)
  tensors = {
    name: random.standard_normal(shape, np.float32) / 4 + ('norm' in name)
    for name, shape in shapes.items()
  }
  save_file(
    {name: np.float32(x) for name, x in tensors.items()},
    folder / 'model.safetensors',
  )
  return str(folder)


@pytest.fixture
def config(tmp_path):
  small_study.write_tasks(tmp_path / 'tasks')
  return dataclasses.replace(
    pod.CONFIG,
    tasks=str(tmp_path / 'tasks'),
    tokenizer='',
    sizes={
      'xs': Stored(
        pretrained=_save(tmp_path / 'model', 0),
        instruction_tuned=_save(tmp_path / 'model-instruct', 1),
      )
    },
    length=12,
    batch=8,
    expert_steps=50,
    multitask_steps=50,
    validation_examples=4,
    test_examples=4,
    merged=(2,),
    methods={'task_arithmetic': MethodGrid({'scale': 0.3}, (0.3, 0.6))},
    mesh={'data': 1, 'fsdp': 2, 'tensor': 2},
  )


def test_phases_one_by_one(config, tmp_path):
  for phase in PHASES:
    # As by a command of its own.
    study = Study(config, tmp_path / 'results', ['--preset=pod'])
    study.run([phase])
  made = cells.load(study.folder.root / 'cells.jsonl')
  assert {(cell.base, cell.setting) for cell in made} == {
    (base, setting)
    for base in cells.BASES
    for setting in ('validated', 'fixed')
  }
  size = study.size('xs')
  scored = phases.Scored(size, Arm('xs', 'pretrained', 0))
  expert = size.load(
    study.folder.root / scored.experts['sentiment']['checkpoint']
  )
  kernel = expert['layers']['feed_forward']['up']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 8, 8)
  base = size.load(size.base(Arm('xs', 'pretrained', 0)))
  moved = jax.tree.map(lambda one, two: bool((one != two).any()), expert, base)
  assert any(jax.tree.leaves(moved))


def test_a_vocabulary_that_is_too_large_is_refused(config, tmp_path):
  path = tmp_path / 'model' / 'config.json'
  path.write_text(json.dumps({**_QWEN, 'vocab_size': 8}))
  study = Study(config, tmp_path / 'results', [])
  with pytest.raises(ValueError, match='only 8. Give their own'):
    study.run(['experts'])
