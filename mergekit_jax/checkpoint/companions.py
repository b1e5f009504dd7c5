"""The files beside the weights, without which nobody can load the model.

They are the configuration, the tokenizer and what prepares inputs, and code of
the model's own. A merge copies them from the base. The names of some may be
anybody's: of these a record is kept, since overwriting an output must not
delete what somebody else has put there.
"""

from collections.abc import Iterator
import fnmatch
import hashlib
import os

from etils import epath

from mergekit_jax.checkpoint import configuration, files

# In the form that `sha256sum --check` reads.
RECORD = 'mergekit_jax_copied.sha256'
# Names that are given to nothing else.
_KNOWN = frozenset(
  'config.json generation_config.json adapter_config.json'
  ' preprocessor_config.json processor_config.json'
  ' video_preprocessor_config.json tokenizer.json tokenizer.model'
  ' tokenizer_config.json special_tokens_map.json added_tokens.json'
  ' chat_template.jinja chat_template.json vocab.json vocab.txt'
  ' vocab-src.json vocab-tgt.json entity_vocab.json merges.txt bpe.codes'
  ' spiece.model sentencepiece.model sentencepiece.bpe.model qwen.tiktoken'
  ' tekken.json normalizer.json'.split()
)
# Where transformers keeps chat templates beside the one that is the default.
_TEMPLATES = 'additional_chat_templates'
# Vocabularies, templates and code, or somebody's own work.
_CODE = '.py'
_ANYBODYS = (
  f'*{_CODE}',
  '*processor_config.json',
  'tokenizer*',
  'chat_template.*',
  'vocab.*',
  'vocab-*.json',
  '*.model',
  '*.spm',
  '*.tiktoken',
  '*.jinja',
  'dict.txt',
)
# Weights and their indexes, whatever comes before: not those of the merge.
_WEIGHTS = tuple(
  '.safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .npz .npy'
  ' .index.json'.split()
)
_SAYS_CODE = b'"auto_map"'


def copy(source: epath.Path, target: epath.Path, dtype: str | None) -> None:
  """Copies them to a new checkpoint, and waits until they are on the disk.

  Args:
    source: the directory that holds the weights of the base.
    target: the directory of the new checkpoint.
    dtype: what the configuration is to name as the dtype of the weights; None
      leaves it as it is.
  """
  found = {
    name: file
    for name, file in entries(source)
    if _is_copied(name) and file.is_file()
  }
  # Other code beside weights is no part of the model.
  has_code = any(
    _SAYS_CODE in file.read_bytes()
    for name, file in found.items()
    if name.endswith('config.json')
  )
  recorded = b''
  for name, file in found.items():
    if name.endswith(_CODE) and not has_code:
      continue
    content = file.read_bytes()
    if dtype and name == configuration.NAME:
      content = configuration.with_dtype(content, dtype)
    _write(target / name, content)
    if name not in _KNOWN:
      recorded += _digest(content) + b'  ' + os.fsencode(name) + b'\n'
  if recorded:
    _write(target / RECORD, recorded)


def entries(directory: epath.Path) -> Iterator[tuple[str, epath.Path]]:
  """What lies in a directory and in the one of its templates, with names."""
  for child in sorted(directory.iterdir()):
    if child.name == _TEMPLATES and child.is_dir():
      for file in sorted(child.iterdir()):
        yield f'{_TEMPLATES}/{file.name}', file
    else:
      yield child.name, child


def read_record(directory: epath.Path) -> dict[bytes, bytes]:
  """The digests, by name, of the files whose names may be anybody's."""
  file = directory / RECORD
  lines = file.read_bytes().split(b'\n') if file.exists() else []
  parts = [line.partition(b'  ') for line in lines]
  return {name: digest for digest, _, name in parts}


def belongs(name: str, file: epath.Path, record: dict[bytes, bytes]) -> bool:
  """Whether what lies beside weights is there because a merge has copied it.

  Args:
    name: what `entries` calls it.
    file: where it lies.
    record: from `read_record`, of its directory.
  """
  if file.is_dir():
    return False
  if name == RECORD or name in _KNOWN:
    return True
  digest = record.get(os.fsencode(name))
  return digest is not None and digest == _digest(file.read_bytes())


def _is_copied(name: str) -> bool:
  anybodys = any(fnmatch.fnmatch(name, pattern) for pattern in _ANYBODYS)
  return name in _KNOWN or (anybodys and not name.endswith(_WEIGHTS))


def _digest(content: bytes) -> bytes:
  return hashlib.sha256(content).hexdigest().encode()


def _write(file: epath.Path, content: bytes) -> None:
  file.parent.mkdir(exist_ok=True)
  file.write_bytes(content)
  files.sync(file)
