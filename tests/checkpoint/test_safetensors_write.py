"""Safetensors files as their own library reads them, complete or not there."""

import errno
import itertools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

import mergekit_jax as mk
from mergekit_jax import cli
from mergekit_jax.checkpoint import (
  companions,
  open_checkpoint,
  safetensors_layout,
)
from mergekit_jax.checkpoint.safetensors_write import write_safetensors
from mergekit_jax.checkpoint.stage import Stage
from mergekit_jax.jobs import job
from mergekit_jax.verify import verify
from tests import checkpoints, compare

INDEX = 'model.safetensors.index.json'
NAMES = {np.dtype(t): name for name, t in safetensors_layout.DTYPES.items()}


@pytest.fixture
def tensors():
  random = np.random.default_rng(0)
  return {
    'odd': random.integers(0, 255, 3).astype(np.uint8),
    'model.layers.0.weight': random.normal(size=(6, 5, 4)).astype(np.float32),
    'half': random.normal(size=(7, 3)).astype(jnp.bfloat16),
    'e4m3': random.normal(size=(5, 2)).astype(jnp.float8_e4m3fn),
    'e5m2': random.normal(size=9).astype(jnp.float8_e5m2),
    'scalar': np.float32(3.5).reshape(()),
    'count': np.asarray(2**40 + 1),
    'empty': np.zeros((0, 3), np.float32),
    'mask': np.asarray([True, False, True]),
  }


def specs_of(tensors):
  return {
    name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
    for name, tensor in tensors.items()
  }


def write_whole(tensors):
  """A `produce` that writes every tensor whole."""

  def produce(write):
    for name, tensor in tensors.items():
      write(name, None, tensor)

  return produce


def write(path, tensors, like=None, **options):
  write_safetensors(
    path, specs_of(tensors), like, write_whole(tensors), **options
  )
  return path


def check(path, tensors):
  """What the library finds in a file: every name, dtype, shape and byte."""
  found = dict(safetensors.deserialize(path.read_bytes()))
  assert set(found) == set(tensors)
  for name, tensor in tensors.items():
    assert found[name]['dtype'] == NAMES[tensor.dtype], name
    assert tuple(found[name]['shape']) == tensor.shape, name
    assert bytes(found[name]['data']) == tensor.tobytes(), name


def metadata_of(file):
  with safetensors.safe_open(file, 'np') as opened:
    return opened.metadata()


class TestFiles:
  def test_every_dtype_and_shape(self, tmp_path, tensors):
    out = write(tmp_path / 'deep' / 'out', tensors, metadata={'a': 'b'})
    assert os.listdir(out) == ['model.safetensors']
    check(out / 'model.safetensors', tensors)
    assert metadata_of(out / 'model.safetensors') == {'a': 'b'}
    ours = open_checkpoint(out)
    assert ours.specs == specs_of(tensors)
    compare.same_bits({n: np.asarray(ours.read(n)) for n in tensors}, tensors)
    assert os.listdir(out.parent) == ['out']

  def test_tensors_are_aligned(self, tmp_path, tensors):
    file = write(tmp_path / 'out', tensors) / 'model.safetensors'
    header = safetensors_layout.read_header(file)
    assert len(header.raw) % 8 == 0
    for name, tensor in tensors.items():
      assert header.starts[name] % tensor.itemsize == 0

  def test_boxes_in_any_order(self, tmp_path):
    random = np.random.default_rng(1)
    tensors = {
      'a': random.normal(size=(6, 5, 1, 4)).astype(np.float32),
      'b': random.normal(size=(11, 3)).astype(jnp.bfloat16),
    }
    boxes = []
    for name, cuts in {'a': (4, 2, 1, 3), 'b': (5, 3)}.items():
      parts = [
        [slice(start, start + cut) for start in range(0, size, cut)]
        for size, cut in zip(tensors[name].shape, cuts, strict=True)
      ]
      boxes += [(name, box) for box in itertools.product(*parts)]
    random.shuffle(boxes)

    def produce(write):
      for name, box in boxes:
        # Neither in the order of the file nor contiguous itself.
        write(name, box, tensors[name][box]).result()

    write_safetensors(tmp_path / 'out', specs_of(tensors), None, produce)
    check(tmp_path / 'out' / 'model.safetensors', tensors)

  def test_trees_and_device_arrays(self, tmp_path):
    array = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    spec = jax.ShapeDtypeStruct(array.shape, array.dtype)
    tree = {'a': [{'b': spec}, None], 'c/d': spec, 'name': 'text'}
    out = tmp_path / 'out'
    write_safetensors(
      out,
      tree,
      None,
      lambda write: [write(name, None, array) for name in ('a/0/b', 'c/d')],
    )
    check(
      out / 'model.safetensors',
      dict.fromkeys(['a/0/b', 'c/d'], np.array(array)),
    )

  @pytest.mark.parametrize(
    'specs, error',
    [
      ({'a': None}, 'no jax.ShapeDtypeStruct'),
      ({'a': jax.ShapeDtypeStruct((2,), ml_dtypes.int4)}, 'a is int4'),
      ({'__metadata__': jax.ShapeDtypeStruct((), 'int8')}, 'rename it'),
    ],
  )
  def test_trees_that_cannot_be_written(self, tmp_path, specs, error):
    with pytest.raises(ValueError, match=error):
      write_safetensors(tmp_path / 'out', specs, None, lambda write: None)
    assert os.listdir(tmp_path) == []

  def test_remote_paths_are_refused(self):
    with pytest.raises(ValueError, match="format='orbax'"):
      write('gs://bucket/out', {'a': np.ones(2)})

  @pytest.mark.parametrize(
    'name, box, block, message',
    [
      ('x', None, np.zeros(4), "'x' is not among"),
      ('a', (slice(2),), np.zeros(4), r'needs float64\[2\]'),
      ('a', (slice(0, 4, 2),), np.zeros(2), 'step 1'),
      ('a', None, np.zeros(4, np.float32), r'float32\[4\].*needs float64\[4\]'),
    ],
  )
  def test_blocks_that_do_not_fit(self, tmp_path, name, box, block, message):
    with pytest.raises(ValueError, match=message):
      write_safetensors(
        tmp_path / 'out',
        specs_of({'a': np.zeros(4)}),
        None,
        lambda write: write(name, box, block),
      )
    assert not (tmp_path / 'out').exists()


class TestShards:
  def test_of_the_base(self, tmp_path, tensors):
    names = list(tensors)
    places = {}
    (tmp_path / 'base').mkdir()
    for file, part in {'x-b': names[3:], 'x-a': names[:3]}.items():
      part = {name: tensors[name] for name in part}
      header = safetensors_layout.make_header(specs_of(part), {'format': 'pt'})
      file = f'{file}.safetensors'
      with open(tmp_path / 'base' / file, 'wb') as opened:
        opened.write(header.raw)
        for name in sorted(part, key=header.starts.__getitem__):
          opened.write(part[name].tobytes())
      places |= dict.fromkeys(part, file)
    index = {'metadata': {'total_size': 0}, 'weight_map': places}
    (tmp_path / 'base' / INDEX).write_text(json.dumps(index))

    like = open_checkpoint(tmp_path / 'base')
    out = write(tmp_path / 'out', tensors, like)
    assert sorted(os.listdir(out)) == [
      INDEX,
      'x-a.safetensors',
      'x-b.safetensors',
    ]
    for file in ('x-a.safetensors', 'x-b.safetensors'):
      held = {n: tensors[n] for n in tensors if places[n] == file}
      check(out / file, held)
      assert metadata_of(out / file) == {'format': 'pt'}
    index = json.loads((out / INDEX).read_text())
    assert index['weight_map'] == places
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert index['metadata'] == {'total_size': size}

    # A size that is asked for wins.
    write(tmp_path / 'one', tensors, like, shard_size='1GB')
    assert os.listdir(tmp_path / 'one') == ['model.safetensors']

  def test_by_size(self, tmp_path):
    sizes = {'a': 300, 'b': 300, 'c': 1500, 'd': 1000, 'e': 1}
    tensors = {n: np.full(k, 7, np.uint8) for n, k in sizes.items()}
    out = write(tmp_path / 'out', tensors, shard_size='1kB')
    index = json.loads((out / INDEX).read_text())
    file = 'model-0000{}-of-00004.safetensors'.format
    assert index['weight_map'] == {
      'a': file(1),
      'b': file(1),
      'c': file(2),
      'd': file(3),
      'e': file(4),
    }
    for name in set(index['weight_map'].values()):
      part = [n for n, place in index['weight_map'].items() if place == name]
      check(out / name, {n: tensors[n] for n in part})
    compare.same_bits(
      {n: np.asarray(open_checkpoint(out).read(n)) for n in tensors}, tensors
    )

  @pytest.mark.parametrize('size', ['much', '1.2.3GB', '', 0, -5])
  def test_a_size_that_is_none(self, tmp_path, size):
    with pytest.raises(ValueError, match=f'shard_size={size!r} was given'):
      write(tmp_path / 'out', {'a': np.ones(2)}, shard_size=size)


class TestDisk:
  def test_a_full_disk_is_found_at_once(self, tmp_path, monkeypatch):
    def full(*_):
      raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    with pytest.raises(OSError, match='no room on the disk for [0-9,]+ bytes'):
      write_safetensors(
        tmp_path / 'out', specs_of({'a': np.ones(2)}), None, pytest.fail
      )

  @pytest.mark.parametrize('has', [True, False])
  def test_a_file_system_without_preallocation(
    self, tmp_path, tensors, monkeypatch, has
  ):
    def cannot(*_):
      raise OSError(errno.EOPNOTSUPP, 'Operation not supported')

    monkeypatch.setattr(os, 'posix_fallocate', cannot, raising=False)
    if not has:
      monkeypatch.delattr(os, 'posix_fallocate')
    write(tmp_path / 'out', tensors)
    check(tmp_path / 'out' / 'model.safetensors', tensors)

  def test_writes_that_are_cut_short_go_on(
    self, tmp_path, tensors, monkeypatch
  ):
    whole = os.pwrite
    monkeypatch.setattr(
      os, 'pwrite', lambda file, data, offset: whole(file, data[:7], offset)
    )
    write(tmp_path / 'out', tensors)
    check(tmp_path / 'out' / 'model.safetensors', tensors)

  @pytest.mark.skipif(
    not os.path.exists('/proc/self/fd'),
    reason='only Linux lists the files that a process has open in /proc',
  )
  def test_few_files_are_open_at_once(self, tmp_path):
    """However many shards there are, and outputs that are written together."""
    tensors = {f'{i}': np.full(3, i, np.float32) for i in range(60)}
    before = len(os.listdir('/proc/self/fd'))

    def produce(write):
      for name, tensor in tensors.items():
        write(name, None, tensor).result()
        assert len(os.listdir('/proc/self/fd')) < before + 10

    out = tmp_path / 'out'
    specs = specs_of(tensors)
    write_safetensors(out, specs, None, produce, shard_size=12)
    assert len(list(out.glob('*.safetensors'))) == 60

  def test_a_write_that_fails_is_raised(self, tmp_path, monkeypatch):
    whole = os.pwrite

    def fails(file, data, offset):
      if len(data) == 16:
        raise OSError(errno.EIO, 'Input/output error')
      return whole(file, data, offset)

    monkeypatch.setattr(os, 'pwrite', fails)
    with pytest.raises(OSError, match='a could not be written: .*output error'):
      write(tmp_path / 'out', {'a': np.ones(2)})
    assert not (tmp_path / 'out').exists()


class TestResume:
  def test_what_was_written_is_kept(self, tmp_path, tensors):
    def stops(write):
      for name in list(tensors)[:4]:
        write(name, None, tensors[name])
      raise KeyboardInterrupt

    specs = specs_of(tensors)
    with pytest.raises(KeyboardInterrupt):
      write_safetensors(tmp_path / 'out', specs, None, stops)
    assert os.listdir(tmp_path) == ['out.mergekit-tmp']
    rest = {name: tensors[name] for name in list(tensors)[4:]}
    write_safetensors(tmp_path / 'out', specs, None, write_whole(rest))
    check(tmp_path / 'out' / 'model.safetensors', tensors)
    assert os.listdir(tmp_path) == ['out']

  def test_written_is_on_the_disk(self, tmp_path, monkeypatch):
    """Before its future is done, which is before it is recorded."""
    whole, sync, unsynced = os.pwrite, os.fsync, set()

    def pwrite(file, data, offset):
      unsynced.add(file)
      return whole(file, data, offset)

    def fsync(file):
      sync(file)
      unsynced.discard(file)

    monkeypatch.setattr(os, 'pwrite', pwrite)
    monkeypatch.setattr(os, 'fsync', fsync)

    def produce(write):
      assert not unsynced  # the headers
      for start in range(0, 8, 2):
        box = slice(start, start + 2), slice(0, 2)
        write('a', box, np.ones((2, 2))).result()
        assert not unsynced

    specs = specs_of({'a': np.ones((8, 4))})
    write_safetensors(tmp_path / 'out', specs, None, produce)

  def test_a_file_that_was_not_finished_being_made(self, tmp_path, tensors):
    (tmp_path / 'out.mergekit-tmp').mkdir()
    file = tmp_path / 'out.mergekit-tmp' / 'model.safetensors'
    file.write_bytes(bytes(5000))
    write(tmp_path / 'out', tensors)
    check(tmp_path / 'out' / 'model.safetensors', tensors)

  def test_the_beginnings_of_another_checkpoint(self, tmp_path, tensors):
    with pytest.raises(ZeroDivisionError):
      write_safetensors(
        tmp_path / 'out', specs_of(tensors), None, lambda write: 1 / 0
      )
    with pytest.raises(ValueError, match='of another checkpoint'):
      write(tmp_path / 'out', {'a': np.ones(2)})


class TestMerge:
  """Through `merge_checkpoints`, an average of one expert."""

  TREE = {
    'params': {
      'dense': {'kernel': np.arange(12.0, dtype=np.float32).reshape(3, 4)},
      'half': np.arange(5).astype(jnp.bfloat16),
      'scalar': np.float32(2.5).reshape(()),
      'count': np.int32(9).reshape(()),
    }
  }

  @pytest.fixture(autouse=True)
  def _directory(self, tmp_path):
    self.directory = tmp_path
    self.out = tmp_path / 'out'

  def base(self, tensors=None, **metadata):
    """A directory as models are published in."""
    base = self.directory / 'base'
    base.mkdir()
    tensors = tensors or {'w': np.arange(6.0, dtype=np.float32)}
    save_file(tensors, base / 'model.safetensors', metadata or None)
    return base

  def copy(self, source, output, **options):
    return mk.merge_checkpoints(
      mk.average(), experts=[source], output=output, **options
    )

  def test_the_format_of_the_base(self):
    base = self.base(format='pt')
    report = self.copy(base, self.out)
    compare.same_bits(
      load_file(self.out / 'model.safetensors'),
      load_file(base / 'model.safetensors'),
    )
    metadata = metadata_of(self.out / 'model.safetensors')
    assert metadata.pop('format') == 'pt'
    provenance = json.loads(metadata.pop('mergekit_jax'))
    assert provenance == json.loads(json.dumps(report.provenance))
    assert not metadata

  def test_configuration_and_tokenizer(self):
    base = self.base()
    blobs = self.directory / 'blobs'
    blobs.mkdir()
    kept = (
      'config.json generation_config.json tokenizer.json tokenizer_config.json'
      ' tokenizer.model special_tokens_map.json vocab.json merges.txt'
      ' spiece.model sentencepiece.bpe.model qwen.tiktoken bpe.codes'
      ' preprocessor_config.json processor_config.json adapter_config.json'
      ' video_preprocessor_config.json chat_template.jinja'
    ).split()
    left = (
      'README.md pytorch_model.bin training_args.json trainer_state.json'
      ' optimizer.pt training_args.bin rng_state.pth model.gguf tf_model.h5'
      ' flax_model.msgpack model.onnx pytorch_model.bin.index.json train.py'
      ' tokenizer-of-sound.bin vocab.npy'
    ).split()
    for name in [*kept, *left]:
      (blobs / name).write_text(name)
      # As the Hugging Face cache has them.
      (base / name).symlink_to(blobs / name)
    for source in (base, base / 'model.safetensors'):
      # Another dtype, and a configuration in which nothing names one.
      self.copy(source, self.out, dtype='float16', overwrite=True)
      assert set(os.listdir(self.out)) == {*kept, 'model.safetensors'}
      for name in kept:
        assert not (self.out / name).is_symlink()
        assert (self.out / name).read_text() == name

  CODE = {'config.json': '{"auto_map": {"AutoModel": "modeling_x.X"}}'}
  CODE |= {'modeling_x.py': 'from .parts import y', 'parts.py': 'y = 1'}
  CODE |= {'ice_text.model': 'text', 'source.spm': 'spm', 'rag.jinja': '{{x}}'}

  def test_code_and_other_files_of_the_model(self):
    base = self.base()
    for name, text in self.CODE.items():
      (base / name).write_text(text)
    for _ in range(2):
      self.copy(base, self.out, overwrite=True)
      found = {path.name: path for path in self.out.iterdir()}
      assert set(found) == {*self.CODE, companions.RECORD, 'model.safetensors'}
      assert {n: found[n].read_text() for n in self.CODE} == self.CODE
      assert verify(self.out) == []
    # The record is of one output, not of what is made of it.
    self.copy(self.out, self.directory / 'again')
    assert set(os.listdir(self.directory / 'again')) == set(found)

  @pytest.mark.parametrize(
    'name',
    [
      *['modeling_x.py', 'train.py', 'tokenizer.py', 'lda.model'],
      *['tokenizer.json.bak', 'tokenizer_stats.csv', 'vocab.xlsx'],
      *['chat_template.jinja.orig', 'vocab-words.json', 'my.tiktoken'],
      'my_processor_config.json',
    ],
  )
  def test_somebodys_work_is_not_replaced(self, name):
    """Be it of the name of a file that a merge has copied."""
    base = self.base()
    for each, text in self.CODE.items():
      (base / each).write_text(text)
    self.copy(base, self.out)
    (self.out / name).write_text('years of work')
    with pytest.raises(FileExistsError, match='is not a checkpoint'):
      self.copy(base, self.out, overwrite=True)
    assert (self.out / name).read_text() == 'years of work'

  def test_names_that_are_like_those_of_a_tokenizer(self):
    """They are copied, and known again by what is in them."""
    base = self.base()
    names = {'tokenizer.model.v3', 'vocab.bpe', 'chat_template.tool.jinja'}
    names |= {'cl100k.tiktoken', 'audio_preprocessor_config.json'}
    for name in names:
      (base / name).write_text(name)
    for _ in range(2):
      self.copy(base, self.out, overwrite=True)
      found = {path.name for path in self.out.iterdir()}
      assert found == {*names, companions.RECORD, 'model.safetensors'}
      assert {(self.out / name).read_text() for name in names} == names

  TEMPLATES = 'additional_chat_templates'

  def test_more_chat_templates_than_one(self):
    base = self.base()
    (base / self.TEMPLATES).mkdir()
    texts = {'rag.jinja': '{{ rag }}', 'tool_use.jinja': '{{ tools }}'}
    for name, text in texts.items():
      (base / self.TEMPLATES / name).write_text(text)
    for source in (base, base, base / 'model.safetensors'):
      self.copy(source, self.out, overwrite=True)
      copied = (self.out / self.TEMPLATES).iterdir()
      assert {file.name: file.read_text() for file in copied} == texts
      assert verify(self.out) == []

  @pytest.mark.parametrize('other', ['mine.jinja', 'rag.jinja', 'drafts/'])
  def test_templates_of_somebody_are_not_replaced(self, other):
    base = self.base()
    (base / self.TEMPLATES).mkdir()
    (base / self.TEMPLATES / 'rag.jinja').write_text('{{ rag }}')
    self.copy(base, self.out)
    path = self.out / self.TEMPLATES / other
    path.mkdir() if other.endswith('/') else path.write_text('{{ mine }}')
    found = f'found {self.TEMPLATES}/{path.name}.,'
    with pytest.raises(FileExistsError, match=found):
      self.copy(base, self.out, overwrite=True)
    assert path.exists()

  @pytest.mark.parametrize(
    'base, expert, missing',
    [
      ([], ['config.json', 'vocab.json'], 'config.json and no tokenizer'),
      (['config.json'], ['config.json', 'qwen.tiktoken'], 'tokenizer'),
      (['tokenizer_config.json'], ['spiece.model'], 'tokenizer'),
      ([], ['chat_template.jinja'], 'chat template'),
      ([], ['tokenizer_config.json'], 'chat template'),
      (['vocab.json'], ['tokenizer.json'], ''),
      (['tokenizer_config.json'], ['chat_template.jinja'], ''),
      ([], ['generation_config.json', 'README.md'], ''),
      (['config.json'], [], ''),
    ],
  )
  @pytest.mark.parametrize('dangling', [False, True])
  def test_what_only_an_expert_has(self, base, expert, missing, dangling):
    """Of a cache some links lead nowhere; what they are called is not there."""
    paths = [self.base(), self.directory / 'expert']
    shutil.copytree(*paths)
    for path, names in zip(paths, (base, expert), strict=True):
      for name in names:
        (path / name).write_text('{"chat_template": "{{ x }}"}')
    if dangling:
      for name in expert:
        if not (paths[0] / name).exists():
          (paths[0] / name).symlink_to('nowhere')
    report = mk.merge_checkpoints(
      mk.task_arithmetic(), base=paths[0], experts=paths[1:], output=self.out
    )
    said = [w for w in report.warnings if 'They are copied from base' in w]
    assert len(said) == bool(missing)
    if missing:
      assert said[0].startswith(
        f'base ({paths[0]}) has no {missing}, which experts[0] ({paths[1]}) has'
      )

  def test_weights_called_like_a_tokenizer(self):
    """A second file of weights would make the output one of two models."""
    base = self.base()
    save_file({'a': np.ones(2)}, base / 'tokenizer-of-sound.safetensors')
    self.copy(base / 'model.safetensors', self.out)
    assert os.listdir(self.out) == ['model.safetensors']

  def test_configuration_names_the_dtype(self):
    """Where it is another one; else the file stays as it is, byte for byte."""
    base = self.base({'w': np.ones(2, 'float32'), 'n': np.ones(2, 'int32')})
    said = {
      'architectures': ['Gemma3ForConditionalGeneration'],
      'torch_dtype': 'float32',
      'text_config': {'dtype': 'float32', 'hidden_size': 2},
      'vision_config': {'torch_dtype': None, 'dtype': ['float32']},
      'quantization_config': {'dtype': 'int8'},
    }
    text = json.dumps(said, indent=None)
    (base / 'config.json').write_text(text)
    self.copy(base, self.out)
    assert (self.out / 'config.json').read_text() == text
    self.copy(base, self.out, dtype='bfloat16', overwrite=True)
    said['torch_dtype'] = said['text_config']['dtype'] = 'bfloat16'
    written = (self.out / 'config.json').read_text()
    assert written == json.dumps(said, indent=2) + '\n'
    found = open_checkpoint(self.out).specs
    assert {n: str(s.dtype) for n, s in found.items()} == {
      'w': 'bfloat16',
      'n': 'int32',
    }

  @pytest.mark.parametrize(
    'name, kept',
    [
      ('adapter_model', 'adapter_model'),
      # A part of a model is whole in its output. (As a folder it is refused:
      # nothing says that the other parts are not wanted.)
      ('model-00002-of-00003', 'model'),
    ],
  )
  def test_a_file_of_another_name(self, name, kept):
    base = self.base()
    file = base / f'{name}.safetensors'
    (base / 'model.safetensors').rename(file)
    for source in (file,) if '-of-' in name else (base, file):
      self.copy(source, self.out, overwrite=True)
      assert os.listdir(self.out) == [f'{kept}.safetensors']
      assert verify(self.out) == []
    (self.out / 'other.safetensors.index.json').write_text('{}')
    with pytest.raises(FileExistsError, match='is not a checkpoint'):
      self.copy(file, self.out, overwrite=True)

  def test_an_index_of_another_name(self):
    tensors = {n: np.ones(4, np.float32) for n in 'ab'}
    base = self.directory / 'base'
    checkpoints.save_shards(base, tensors)
    index = 'diffusion_pytorch_model.safetensors.index.json'
    (base / INDEX).rename(base / index)
    self.copy(base, self.out)
    names = {path.name for path in self.out.iterdir()}
    assert names == {path.name for path in base.iterdir()}
    assert verify(self.out) == []
    self.copy(base, self.out, shard_size='16B', overwrite=True)
    names = {path.name for path in self.out.glob('*safetensors*')}
    shard = 'diffusion_pytorch_model-0000{}-of-00002.safetensors'.format
    assert names == {index, shard(1), shard(2)}
    # A file that the index does not know is somebody's.
    save_file(tensors, self.out / 'lora.safetensors')
    with pytest.raises(FileExistsError, match='is not a checkpoint'):
      self.copy(base, self.out, overwrite=True)

  @pytest.mark.parametrize(
    'said, kept',
    [
      ({'total_parameters': 8, 'x': [1]}, {'total_parameters': 8, 'x': [1]}),
      ({'total_size': 7}, {}),
      ('none', {}),
    ],
  )
  @pytest.mark.parametrize('shard_size', [None, '16B'])
  def test_metadata_of_the_index(self, said, kept, shard_size):
    tensors = {n: np.ones(4, np.float32) for n in 'ab'}
    base = self.directory / 'base'
    checkpoints.save_shards(base, tensors)
    index = json.loads((base / INDEX).read_text()) | {'metadata': said}
    (base / INDEX).write_text(json.dumps(index))
    self.copy(base, self.out, shard_size=shard_size)
    written = json.loads((self.out / INDEX).read_text())
    assert written['metadata'] == {**kept, 'total_size': 32}

  @pytest.mark.parametrize('shard_size', [None, 30])
  def test_from_orbax_and_back(self, shard_size):
    base = checkpoints.save(
      self.directory / 'base', self.TREE, metadata={'scan_layers': False}
    )
    there, back = self.directory / 'there', self.directory / 'back'
    self.copy(base, there, format='safetensors', shard_size=shard_size)
    expected = checkpoints.leaves(self.TREE)
    if shard_size is None:
      check(there / 'model.safetensors', expected)
    self.copy(there, back, format='orbax')
    assert open_checkpoint(back).tree == open_checkpoint(base).tree
    compare.same_bits(checkpoints.load(back), expected)

  def test_lists_come_back_as_dictionaries(self):
    """At the same paths; the docs say so."""
    tree = {'params': [{'w': np.ones(2, np.float32)}, np.zeros(3, np.float32)]}
    base = checkpoints.save(self.directory / 'base', tree)
    there, back = self.directory / 'there', self.directory / 'back'
    self.copy(base, there, format='safetensors')
    self.copy(there, back, format='orbax')
    assert isinstance(open_checkpoint(base).tree['params'], list)
    assert open_checkpoint(back).tree == {
      'params': {'0': {'w': 'params/0/w'}, '1': 'params/1'}
    }
    compare.same_bits(checkpoints.load(back), checkpoints.leaves(tree))

  def test_from_safetensors_and_back(self):
    """Names with dots stay one key; names with slashes become a tree."""
    tensors = {
      'model.layers.0.weight': np.arange(6.0, dtype=np.float32),
      'model.layers.0.bias': np.ones(2, np.float32),
      'a/b/c': np.ones((2, 3), np.float32),
    }
    base = self.base(tensors, format='pt')
    there, back = self.directory / 'there', self.directory / 'back'
    self.copy(base, there, format='orbax')
    compare.same_bits(checkpoints.load(there), tensors)
    assert set(open_checkpoint(there).tree) == {
      'model.layers.0.weight',
      'model.layers.0.bias',
      'a',
    }
    self.copy(there, back, format='safetensors')
    compare.same_bits(load_file(back / 'model.safetensors'), tensors)
    assert metadata_of(back / 'model.safetensors')['format'] == 'pt'

  def test_names_that_are_no_tree(self):
    tensors = {'a': np.ones(2, np.float32), 'a/b': np.zeros(2, np.float32)}
    self.copy(self.base(tensors), self.out, format='orbax')
    compare.same_bits(checkpoints.load(self.out), tensors)

  def test_names_that_orbax_does_not_tell_apart(self):
    tensors = {'a.b': np.ones(2, np.float32), 'a/b': np.zeros(2, np.float32)}
    base = self.base(tensors)
    with pytest.raises(ValueError, match=r"'a/b' and 'a\.b' are both called"):
      self.copy(base, self.out, format='orbax')
    assert os.listdir(self.directory) == ['base']
    self.copy(base, self.out)
    compare.same_bits(load_file(self.out / 'model.safetensors'), tensors)

  def test_what_is_said_of_a_dtype_helps(self):
    """No dtype= changes what is copied, or makes floats integers."""
    numbers = {'w': jnp.ones(4), 'packed': jnp.ones(8, jnp.int4)}
    base = checkpoints.save(self.directory / 'int4', numbers)
    with pytest.raises(ValueError, match='packed is int4') as refused:
      self.copy(base, self.out, format='safetensors')
    assert 'dtype=' not in str(refused.value)
    assert "Give format='orbax'." in str(refused.value)
    self.copy(base, self.directory / 'orbax', format='orbax')

    numbers = {'w': jnp.ones(4, jnp.float8_e4m3fnuz)}
    base = checkpoints.save(self.directory / 'float8', numbers)
    with pytest.raises(ValueError, match='w is float8_e4m3fnuz') as refused:
      self.copy(base, self.out, format='safetensors')
    offered = str(refused.value).partition('dtype= one of ')[2].strip('.')
    assert 'float32' in offered
    for dtype in offered.split(', '):
      job.floating(dtype)
    self.copy(base, self.out, format='safetensors', dtype='float32')

  def test_text_that_says_scan_layers(self):
    """A False that became text must not be taken for True."""
    name = 'params/params/decoder/layers/kernel'
    tensors = {name: np.ones((2, 3), np.float32)}
    for said, axes in {'false': (), 'true': (1,)}.items():
      path = write(
        self.directory / said, tensors, metadata={'scan_layers': said == 'true'}
      )
      made = job.make_job([mk.average()], [path], None)
      assert made.plan.scopes[0].tensors[0].stacked == axes

  def test_overwrite(self):
    base = self.base()
    self.copy(base, self.out)
    with pytest.raises(FileExistsError, match='overwrite=True'):
      self.copy(base, self.out)
    tensors = {'w': np.ones(3, np.float32)}
    other = checkpoints.save(self.directory / 'other', tensors)
    self.copy(other, self.out, format='safetensors', overwrite=True)
    compare.same_bits(load_file(self.out / 'model.safetensors'), tensors)
    self.copy(other, self.out, overwrite=True)
    compare.same_bits(checkpoints.load(self.out), tensors)
    self.copy(base, self.out, overwrite=True)
    assert os.listdir(self.out) == ['model.safetensors']

  @pytest.mark.parametrize('other', ['thesis.tex', 'photos/'])
  def test_a_directory_of_other_things_is_not_replaced(self, other):
    """People download a model into a directory of other things."""
    base = self.base()
    self.copy(base, self.out)
    path = self.out / other
    path.mkdir() if other.endswith('/') else path.write_text('years of work')
    (self.out / 'z.txt').write_text('')
    found = f'nothing else .found {path.name}.,'
    with pytest.raises(FileExistsError, match=found):
      self.copy(base, self.out, overwrite=True)
    assert path.exists()

  def test_another_model_in_the_output_is_not_replaced(self):
    """Though the one that was merged can be told from it."""
    base = self.base()
    save_file({'a': np.ones(2)}, base / 'adapter_model.safetensors')
    self.copy(base, self.out)
    assert os.listdir(self.out) == ['model.safetensors']
    shutil.copy(base / 'adapter_model.safetensors', self.out)
    assert verify(self.out) == []
    with pytest.raises(FileExistsError, match='found adapter_model.safetensor'):
      self.copy(base, self.out, overwrite=True)

  def test_a_failure_leaves_nothing(self):
    base = self.base({'w': np.asarray([1, np.nan], np.float32)})
    with pytest.raises(FloatingPointError):
      self.copy(base, self.out)
    assert os.listdir(self.directory) == ['base']

  @pytest.mark.parametrize('name', ['model', 'adapter_model'])
  def test_resume(self, monkeypatch, name):
    """What is written before a merge is killed is not written again."""
    random = np.random.default_rng(0)
    tensors = {n: random.normal(size=(8, 3)).astype('float32') for n in 'abcd'}
    tensors |= {
      'empty': np.zeros((0, 2), np.float32),
      'one': np.ones((), np.float32),
    }
    base = self.base(tensors)
    file = f'{name}.safetensors'
    (base / 'model.safetensors').rename(base / file)
    record, units = Stage.record, []

    def killed(stage, unit, facts):
      record(stage, unit, facts)
      units.append(unit)
      if len(units) == 3:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stage, 'record', killed)
    with pytest.raises(KeyboardInterrupt):
      self.copy(base, self.out)
    assert not self.out.exists()
    with pytest.raises(ValueError, match='shard_size: null then, 90 now'):
      self.copy(base, self.out, shard_size=90)
    self.copy(base, self.out)
    assert len(set(units)) == len(units) > 3
    compare.same_bits(load_file(self.out / file), tensors)
    assert {path.name for path in self.directory.iterdir()} == {
      'base',
      'out',
      'out.report.json',
    }

  def test_command_line(self):
    base = self.base({'a': np.ones(4, np.uint8), 'b': np.ones(4, np.uint8)})
    command = ['', 'merge', '--method=average', '--experts', str(base)]
    command += ['--output', str(self.out), '--shard_size=4B']
    assert cli.main(cli.parse(command)) == 0
    assert (self.out / 'model-00002-of-00002.safetensors').exists()
    command += ['--format=orbax', '--overwrite']
    assert cli.main(cli.parse(command)) == 1
    command.remove('--shard_size=4B')
    assert cli.main(cli.parse(command)) == 0
    assert open_checkpoint(self.out).format == 'orbax'

  def test_arguments(self):
    base = self.base()
    for options, message in [
      ({'format': 'safetensor'}, "Did you mean 'safetensors'"),
      ({'format': 'orbax', 'shard_size': 5}, 'an option of safetensors, but'),
      ({'zarr3': False}, 'zarr3=False was given, which is an option of orbax'),
      ({'compression': 'zstd'}, 'an option of orbax, but the output'),
      ({'shard_size': 'big'}, "shard_size='big' was given"),
    ]:
      with pytest.raises(ValueError, match=message):
        self.copy(base, self.out, **options)
    assert os.listdir(self.directory) == ['base']
