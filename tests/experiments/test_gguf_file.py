"""Reading a GGUF file: what the model computes, and its tokens."""

import json
import sys

import numpy as np
import pytest

from experiments.scale_study import gguf_file, huggingface, model, smollm2
from experiments.scale_study.subword import Subwords
from tests.experiments import llama_reference, small_gguf

# Bytes are written as letters; a space is Ġ.
_TOKENS = (*small_gguf.SPECIAL, *'abcĠ12', 'ab', 'Ġab', 'Ġabc', '12')
_MERGES = ('a b', 'Ġ ab', 'Ġab c', '1 2')


def _converted(folder, **change):
  small_gguf.write(folder / 'model.gguf', _TOKENS, _MERGES, change=change)
  gguf_file.write_hugging_face(folder / 'model.gguf', folder / 'hf')
  return folder / 'hf'


def test_logits_equal_a_reference_that_turns_neighbours(tmp_path):
  folder = _converted(tmp_path)
  ids = np.random.default_rng(1).integers(0, len(_TOKENS), (2, 9))
  expected = llama_reference.logits(
    small_gguf.CONFIG,
    llama_reference.from_gguf(small_gguf.tensors(len(_TOKENS))),
    ids,
    neighbours=True,
  )
  shape, params = huggingface.load(folder)
  # Float32 through two layers; 1e-5 is 20 units in the last place of 5.
  np.testing.assert_allclose(
    model.logits(shape, params, ids), expected, rtol=0, atol=1e-5
  )


def test_the_configuration(tmp_path):
  folder = _converted(tmp_path)
  assert json.loads((folder / 'config.json').read_text()) == {
    **small_gguf.CONFIG,
    'vocab_size': len(_TOKENS),
  }


def test_text_becomes_the_tokens_of_the_file(tmp_path):
  tokenizer = Subwords(
    _converted(tmp_path) / 'tokenizer.json',
    starts=[smollm2.START],
    ends=[smollm2.END],
  )
  assert (tokenizer.start, tokenizer.end) == (1, 2)
  assert tokenizer.size == len(_TOKENS)

  def tokens(text):
    return [_TOKENS[index] for index in tokenizer.encode(text)]

  assert tokens('ab abc cab') == ['ab', 'Ġabc', 'Ġ', 'c', 'ab']
  # Digits stand alone, whatever the merges say.
  assert tokens('a12') == ['a', '1', '2']
  assert tokens('a<|im_end|>b') == ['a', '<|im_end|>', 'b']
  ids = tokenizer.encode('ab abc12')
  assert tokenizer.decode([*ids, tokenizer.end, 3]) == 'ab abc12'


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
  with pytest.raises(ValueError, match='which would end a text'):
    Subwords(_converted(tmp_path) / 'tokenizer.json', ends=['</s>'])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('general.architecture', 'gemma'),
    ('tokenizer.ggml.model', 'llama'),
    ('tokenizer.ggml.pre', 'qwen2'),
  ],
)
def test_what_cannot_be_read_is_refused(tmp_path, field, value):
  with pytest.raises(ValueError, match=f"{field} is '{value}'"):
    _converted(tmp_path, **{field: value})


def test_a_tensor_that_is_not_known_is_named(tmp_path):
  head = np.zeros((len(_TOKENS), small_gguf.WIDTH), np.float32)
  folder = _converted(tmp_path, **{'output.weight': head})
  with pytest.raises(ValueError, match='differ in 1 places:\n  output.weight'):
    huggingface.load(folder)


def test_without_the_package_the_error_has_the_command(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(ImportError, match=r'pip install .*\[real\]'):
    gguf_file.write_hugging_face(tmp_path / 'model.gguf', tmp_path / 'hf')


def test_nor_can_tokens_be_read_without_theirs(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ImportError, match=r'pip install .*\[real\]'):
    Subwords(tmp_path / 'tokenizer.json')


@pytest.mark.parametrize('name', ['nowhere.json', '.', 'tokenizer.json'])
def test_what_is_no_tokenizer_is_named(tmp_path, name):
  (tmp_path / 'tokenizer.json').write_text('not JSON')
  with pytest.raises(
    ValueError, match='Give the path of a tokenizer.json'
  ) as e:
    Subwords(tmp_path / name)
  assert str(e.value).startswith(f'{tmp_path / name} cannot be read')
