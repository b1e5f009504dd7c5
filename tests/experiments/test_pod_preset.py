"""The preset for a pod, phase by phase, on models of a few thousand numbers."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
import tokenizers

from experiments.scale_study import huggingface, shapes, stored
from experiments.scale_study.analysis import cells
from experiments.scale_study.configs import pod
from experiments.scale_study.folder import Arm
from experiments.scale_study.scored import Scored
from experiments.scale_study.study import Study
from experiments.scale_study.study_config import Stored, StudyConfig
from tests.experiments import small_pod, small_study, unoptimized
from tests.launch import free_port


@pytest.fixture
def config(tmp_path):
  small_pod.write(tmp_path)
  return small_pod.config(tmp_path)


def run_together(folder, *phases):
  """Runs phases of the preset in two processes of half the mesh."""
  command = [sys.executable, '-m', small_pod.__name__, str(folder)]
  command += [*small_pod.FLAGS, f'--output_dir={folder}/results']
  command += [f'--coordinator_address=127.0.0.1:{free_port()}']
  command += ['--num_processes=2', *(f'--phase={phase}' for phase in phases)]
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': unoptimized.XLA_FLAGS,
    'JAX_NUM_CPU_DEVICES': '2',
  }
  logs = [folder / f'{process}.txt' for process in range(2)]
  with contextlib.ExitStack() as stack:
    running = [
      subprocess.Popen(
        [*command, f'--process_id={process}'],
        env=environment,
        stdout=stack.enter_context(log.open('w')),
        stderr=subprocess.STDOUT,
      )
      for process, log in enumerate(logs)
    ]
    ended = [process.wait() for process in running]
  assert ended == [0, 0], [log.read_text()[-3000:] for log in logs]


def test_phases_by_commands(config, tmp_path):
  """As on a pod; one process can read what two wrote."""
  run_together(tmp_path, 'bases', 'experts')
  assert not (tmp_path / 'results' / 'report.html').exists()
  run_together(tmp_path, 'multitask', 'evaluate', 'merge', 'report')
  assert (tmp_path / 'results' / 'report.html').exists()
  study = Study(config, tmp_path / 'results', small_pod.FLAGS)
  size = study.size('xs')
  made = cells.load(study.folder.root / 'cells.jsonl')
  assert {(cell.base, cell.setting) for cell in made} == {
    (base, setting)
    for base in cells.BASES
    for setting in ('validated', 'fixed')
  }
  scored = Scored(size, Arm('xs', 'pretrained', 0))
  expert = size.load(
    study.folder.root / scored.experts['sentiment']['checkpoint']
  )
  kernel = expert['layers']['feed_forward']['up']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 8, 8)
  base = size.load(size.base(Arm('xs', 'pretrained', 0)))
  moved = jax.tree.map(lambda one, two: bool((one != two).any()), expert, base)
  assert any(jax.tree.leaves(moved))
  record = scored.base
  with size.on_mesh():
    again = size.examination.scores(base, 'test')
  assert set(again) == set(record['test'])
  for task, score in again.items():
    # As many devices in one process: float32 sums may be added in another
    # order, and each addition rounds by up to 6e-8 of its result.
    np.testing.assert_allclose(score, record['test'][task], rtol=1e-5)


def test_models_compute_as_the_preset_says(config, tmp_path):
  """Whatever their own files say, and as they are compiled in advance."""
  shape = Study(config, tmp_path / 'results', []).size('xs').shape
  compiled = shapes.computed(shapes.SIZES['8b'], pod.CONFIG)
  for made in (shape, compiled):
    assert (made.remat, made.dtype) == (True, jax.numpy.bfloat16)
  plain = StudyConfig(sizes={}, methods={}, sweeps={})
  assert shapes.computed(shape, plain) == dataclasses.replace(
    shape, remat=False, dtype=jax.numpy.float32
  )


def test_a_vocabulary_that_is_too_large_is_refused(config, tmp_path):
  path = tmp_path / 'model' / 'config.json'
  path.write_text(json.dumps({**small_pod.QWEN, 'vocab_size': 8}))
  study = Study(config, tmp_path / 'results', [])
  with pytest.raises(ValueError, match='only 8. Give their own'):
    study.run(['experts'])


def write_tokenizer(path, words):
  """Writes a tokenizer that numbers words in their order."""
  ids = {word: number for number, word in enumerate([*words, '</s>'])}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, 'what'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(path))


WORDS = ('what', *small_study.COLOURS)


def test_models_with_a_tokenizer_have_to_be_given_it(config, tmp_path):
  own = tmp_path / 'model-instruct' / 'tokenizer.json'
  write_tokenizer(own, WORDS)
  study = Study(config, tmp_path / 'results', [])
  with pytest.raises(ValueError, match=f"add tokenizer='{own}'"):
    study.size('xs')
  # Whose model is not used.
  config = dataclasses.replace(config, bases=('pretrained',))
  assert Study(config, tmp_path / 'another', []).size('xs')


def test_a_model_without_any_tokenizer_is_warned_of(config, tmp_path, caplog):
  with caplog.at_level('WARNING', logger='absl'):
    Study(config, tmp_path / 'results', []).size('xs')
  assert f'nor {tmp_path}/model has a tokenizer' in caplog.text


def test_a_tokenizer_that_is_not_the_model_s_own_is_refused(config, tmp_path):
  used = tmp_path / 'tokenizer.json'
  write_tokenizer(used, WORDS)
  config = dataclasses.replace(config, tokenizer=str(used))
  study = Study(config, tmp_path / 'results', [])
  own = tmp_path / 'model-instruct' / 'tokenizer.json'
  # The same, as another version of transformers may have saved it.
  own.write_text(json.dumps(json.loads(used.read_text()), indent=7))
  assert study.size('xs').source.tokenizer.encode('blue red') == [2, 1]
  write_tokenizer(own, WORDS[::-1])
  study = Study(config, tmp_path / 'results', [])
  message = f"instruction-tuned model of size 'xs' .*, in {own}, than .*{used}"
  with pytest.raises(ValueError, match=message):
    study.size('xs')


def test_models_in_orbax_format(config, tmp_path):
  """They are the same models as Hugging Face's that they were made of."""
  size = config.sizes['xs']
  sources = {
    'pretrained': size.pretrained,
    'instruction_tuned': size.instruction_tuned,
  }
  for stage, source in sources.items():
    stored.save(tmp_path / stage, huggingface.load(Path(source))[1])
  orbax = Stored(
    **{stage: str(tmp_path / stage) for stage in sources},
    shape=str(tmp_path / 'model'),
  )
  config = dataclasses.replace(config, sizes={'xs': orbax})
  study = Study(config, tmp_path / 'results', small_pod.FLAGS)
  study.run(['bases'])
  for stage, source in sources.items():
    arm = Arm('xs', stage.replace('_', '-'), 0)
    made = study.size('xs').load(study.size('xs').base(arm))
    _, expected = huggingface.load(Path(source))
    jax.tree.map(np.testing.assert_array_equal, made, expected)


def test_a_model_of_another_shape_is_refused(config, tmp_path):
  _, params = huggingface.load(Path(config.sizes['xs'].instruction_tuned))
  stored.save(tmp_path / 'orbax', params)
  size = Stored(instruction_tuned=str(tmp_path / 'orbax'), shape='1b')
  config = dataclasses.replace(
    config, sizes={'xs': size}, bases=('instruction-tuned',)
  )
  with pytest.raises(ValueError, match='does not hold a model of the shape'):
    Study(config, tmp_path / 'results', []).run(['bases'])


@pytest.fixture
def copied(config, tmp_path):
  """Does the phase `bases`, again if it was done."""

  def bases():
    Study(config, tmp_path / 'results', []).run(['bases'])

  bases()
  return bases


def _replace_model(folder, seed):
  shutil.rmtree(folder)
  small_pod.save_model(folder, seed)


@pytest.mark.parametrize('is_noted', [True, False])
def test_a_base_that_was_replaced_is_refused(copied, tmp_path, is_noted):
  """Also in a study of an older version, which does not say what it copied."""
  arm = tmp_path / 'results/models/xs/pretrained/0'
  if not is_noted:
    (arm / 'base.json').unlink()
  _replace_model(tmp_path / 'model', 2)
  with pytest.raises(ValueError, match='/model is not the model any more'):
    copied()
  shutil.rmtree(arm)
  copied()
  embedding = stored.load(
    arm / 'base', huggingface.read_config(tmp_path / 'model')
  )['embedding']['embedding']
  expected = load_file(tmp_path / 'model/model.safetensors')
  np.testing.assert_array_equal(
    embedding, expected['model.embed_tokens.weight']
  )


def test_a_base_is_read_once_of_the_same_files(copied, tmp_path, monkeypatch):
  _replace_model(tmp_path / 'model', 0)  # as a copy, with other times
  copied()
  monkeypatch.delattr(stored, 'original')
  copied()


def test_a_base_that_was_copied_is_not_needed_any_more(copied, tmp_path):
  (tmp_path / 'model' / 'model.safetensors').unlink()
  copied()


def test_an_unknown_shape_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"'9b' is no folder .* '8b', '24b'"):
    stored.stored_shape(Stored(instruction_tuned=str(tmp_path), shape='9b'))
