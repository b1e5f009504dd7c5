"""Splits that no seed can mix: a hash decides where something belongs."""

import hashlib

from experiments.scale_study.tasks.source import Split


def split_of(subject: str) -> Split:
  """Assigns a subject to a split: 80 % train, 10 % validation, 10 % test.

  Whatever is drawn, however often and with whatever seed, no subject (a prompt,
  a word, whatever examples are about) is ever seen in two splits.
  """
  digest = hashlib.blake2b(subject.encode(), digest_size=8).digest()
  bucket = int.from_bytes(digest) % 10
  return 'test' if bucket == 0 else 'validation' if bucket == 1 else 'train'
