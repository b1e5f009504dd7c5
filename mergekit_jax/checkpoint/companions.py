"""The files beside the weights, without which nobody can load the model.

They are the configuration, the tokenizer and what prepares inputs, and code of
the model's own. A merge copies them from the base. The names of some may be
anybody's: of these a record is kept, since overwriting an output must not
delete what somebody else has put there.
"""

from collections.abc import Iterator
import contextlib
import fnmatch
import hashlib
import os

from etils import epath

from mergekit_jax.checkpoint import (
  configuration,
  files,
  safetensors_layout,
  source,
)

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
# What a model is hardly of use without, and the names of any that will do.
_NEEDED = {
  'config.json': ('config.json',),
  'tokenizer': (
    *('tokenizer.json', 'tokenizer.model*', 'vocab.*', 'vocab-*.json'),
    *('bpe.codes', 'tekken.json', '*.model', '*.spm', '*.tiktoken'),
  ),
  'chat template': ('chat_template.*', f'{_TEMPLATES}/*'),
}
# Weights and their indexes, whatever comes before: not those of the merge.
_WEIGHTS = tuple(
  '.safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .npz .npy'
  ' .index.json'.split()
)
_SAYS_CODE = b'"auto_map"'
# Where the template has no file of its own, and what there says that it is.
_OF_TEMPLATE = ('tokenizer_config.json', 'processor_config.json')
_SAYS_TEMPLATE = b'"chat_template"'


def copy(
  like: source.Checkpoint, target: epath.Path, dtype: str | None
) -> None:
  """Copies them to a new checkpoint, and waits until they are on the disk.

  Args:
    like: the checkpoint that they belong to.
    target: the directory of the new checkpoint.
    dtype: what the configuration is to name as the dtype of the weights; None
      leaves it as it is.
  """
  recorded = b''
  for name, file in _copied(like).items():
    content = _read(file)
    if dtype and name == configuration.NAME:
      content = configuration.with_dtype(content, dtype)
    _write(target / name, content)
    if name not in _KNOWN:
      recorded += f'{digest(content)}  '.encode() + os.fsencode(name) + b'\n'
  if recorded:
    _write(target / RECORD, recorded)


def demand_readable(like: source.Checkpoint) -> None:
  """Raises OSError if one of those that are to be copied cannot be read."""
  for file in _copied(like).values():
    _read(file)


def found(checkpoint: source.Checkpoint) -> dict[str, epath.Path]:
  """What may be one of them, by name; nothing if the format is Orbax."""
  if checkpoint.format != 'safetensors':
    return {}
  path = checkpoint.path
  return {
    name: file
    for name, file in entries(path if path.is_dir() else path.parent)
    if _is_named_so(name) and file.is_file()
  }


def needed(checkpoint: source.Checkpoint) -> list[str]:
  """What a checkpoint has of that which a model is hardly of use without."""
  files = found(checkpoint)
  kinds = {
    kind
    for kind, patterns in _NEEDED.items()
    if any(_matches(name, patterns) for name in files)
  }
  if any(map(_says_template, files.values())):
    kinds.add('chat template')
  return [kind for kind in _NEEDED if kind in kinds]


def entries(directory: epath.Path) -> Iterator[tuple[str, epath.Path]]:
  """What lies in a directory and in the one of its templates, with names."""
  for child in sorted(directory.iterdir()):
    if child.name == _TEMPLATES and child.is_dir():
      for file in sorted(child.iterdir()):
        yield f'{_TEMPLATES}/{file.name}', file
    else:
      yield child.name, child


def read_record(directory: epath.Path) -> dict[bytes, str]:
  """The digests, by name, of the files whose names may be anybody's."""
  file = directory / RECORD
  lines = file.read_bytes().split(b'\n') if file.exists() else []
  parts = [line.partition(b'  ') for line in lines]
  return {name: recorded.decode() for recorded, _, name in parts}


def belongs(name: str, file: epath.Path, record: dict[bytes, str]) -> bool:
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
  recorded = record.get(os.fsencode(name))
  return recorded is not None and recorded == digest(file.read_bytes())


def digests(directory: epath.Path) -> dict[str, str]:
  """The digest of every file in a new checkpoint but weights, by name."""
  return {
    name: digest(file.read_bytes())
    for name, file in entries(directory)
    if file.is_file() and not name.endswith(safetensors_layout.SUFFIX)
  }


def digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _copied(like: source.Checkpoint) -> dict[str, epath.Path]:
  """All that are found, but code only where a configuration asks for it.

  Other code beside weights is no part of the model.
  """
  files = found(like)
  has_code = any(
    _SAYS_CODE in _read(file)
    for name, file in files.items()
    if name.endswith('config.json')
  )
  return {
    name: file
    for name, file in files.items()
    if has_code or not name.endswith(_CODE)
  }


def _is_named_so(name: str) -> bool:
  return name in _KNOWN or (
    _matches(name, _ANYBODYS) and not name.endswith(_WEIGHTS)
  )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
  return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _says_template(file: epath.Path) -> bool:
  # Of an expert it need not be readable.
  with contextlib.suppress(OSError):
    return file.name in _OF_TEMPLATE and _SAYS_TEMPLATE in file.read_bytes()
  return False


def _read(file: epath.Path) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise OSError(
      f'{file.absolute()} cannot be read, and the output is to hold a copy: '
      f'{error}. Make it readable, or move it away to merge without it.'
    ) from error


def _write(file: epath.Path, content: bytes) -> None:
  file.parent.mkdir(exist_ok=True)
  file.write_bytes(content)
  files.sync(file)
