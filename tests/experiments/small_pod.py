"""The preset for a pod on models of a few thousand numbers.

As a program it is the study's, which also knows the preset that `write` wrote:

  python -m tests.experiments.small_pod FOLDER --preset=small_pod ...
"""

import dataclasses
import json
from pathlib import Path
import sys

from absl import app
import numpy as np
from safetensors.numpy import save_file

from experiments.scale_study import __main__ as program
from experiments.scale_study import configs
from experiments.scale_study.configs import pod
from experiments.scale_study.study_config import MethodGrid, Stored, StudyConfig
from tests.experiments import small_study

FLAGS = ['--preset=small_pod']
QWEN = {
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


def save_model(folder, seed):
  """Writes a model as Hugging Face does."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(QWEN))
  shapes = {
    'model.embed_tokens.weight': (QWEN['vocab_size'], 16),
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


_PRESET = """
from pathlib import Path
from tests.experiments.small_pod import config
CONFIG = config(Path(__file__).parents[1])
"""


def write(folder: Path) -> None:
  """Writes tasks, two models and the preset."""
  small_study.write_tasks(folder / 'tasks')
  (folder / 'presets').mkdir()
  (folder / 'presets' / 'small_pod.py').write_text(_PRESET)
  save_model(folder / 'model', 0)
  save_model(folder / 'model-instruct', 1)


def config(folder: Path) -> StudyConfig:
  """The preset, on what `write` wrote."""
  return dataclasses.replace(
    pod.CONFIG,
    tasks=str(folder / 'tasks'),
    tokenizer='',
    sizes={
      'xs': Stored(
        pretrained=str(folder / 'model'),
        instruction_tuned=str(folder / 'model-instruct'),
      )
    },
    seeds=(0,),
    length=12,
    batch=8,
    expert_steps=2,
    multitask_steps=2,
    validation_examples=4,
    test_examples=4,
    merged=(2,),
    methods={
      'task_arithmetic': MethodGrid({'scale': 0.3}, {'scale': (0.3, 0.6)})
    },
    mesh={'data': 1, 'fsdp': 2, 'tensor': 2},
  )


if __name__ == '__main__':
  # As if the preset were in the folder of the others.
  configs.__path__.append(f'{sys.argv.pop(1)}/presets')
  app.run(program.main)
