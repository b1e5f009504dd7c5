"""Texts of people with a label, read out of packages."""

from pathlib import Path
import re
import tarfile
import tempfile
from typing import NamedTuple

from experiments.scale_study import packages

# Sections of Debian whose names are topics, of which there are many packages.
TOPICS = ('games', 'graphics', 'mail', 'science', 'sound')

# Ratings go from -4 to 4; what is close to 0 is neither.
_LEAST_RATING = 1.0
_SENTENCES = 'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'
# What tells packages of one program apart: "… (data files)", "… - server".
_VARIANT = re.compile(r'\s*[(\[].*$|\s+-+\s.*$')


class Labelled(NamedTuple):
  """A text and its label.

  Attributes:
    text: a sentence or phrase.
    label: what people said of it.
    group: what texts that say the same have in common.
  """

  text: str
  label: str
  group: str


def movie_sentences() -> list[Labelled]:
  """Sentences of reviews as 'positive' or 'negative', by mean rating.

  They come with VADER (Hutto and Gilbert, 2014) in its source distribution
  (MIT).

  Raises:
    NotFetchedError: if they are not there and cannot be fetched.
  """
  path = packages.made_once('movie_sentences.txt', _fetch_sentences)
  return parse_sentences(path.read_text(encoding='utf-8', errors='replace'))


def debian_descriptions() -> list[Labelled]:
  """Short descriptions of Debian's packages and the section they are in.

  Raises:
    NotFetchedError: if the system does not know any.
  """
  path = packages.made_once('debian.txt', packages.debian_packages)
  return parse_descriptions(path.read_text(encoding='utf-8', errors='replace'))


def parse_sentences(lines: str) -> list[Labelled]:
  """Reads lines of number, mean rating and sentence, separated by tabs."""
  found = {}
  for line in lines.splitlines():
    _, rating, text = line.split('\t', 2)
    text = ' '.join(text.replace("''", '"').split())
    # A character that could not be read makes the text another.
    if abs(float(rating)) >= _LEAST_RATING and '\ufffd' not in text:
      label = 'positive' if float(rating) > 0 else 'negative'
      found.setdefault(text, Labelled(text, label, text))
  return list(found.values())


def parse_descriptions(records: str) -> list[Labelled]:
  """Reads records of Debian; of packages of one program only the first."""
  found = {}
  for record in records.split('\n\n'):
    fields = dict(
      line.split(': ', 1) for line in record.splitlines() if ': ' in line
    )
    # Sections of other archives are 'contrib/games'.
    section, text = fields.get('Section', ''), fields.get('Description', '')
    group = _VARIANT.sub('', text).lower()
    if section in TOPICS and group:
      found.setdefault(group, Labelled(text, section, group))
  return list(found.values())


def _fetch_sentences(path: Path) -> None:
  with tempfile.TemporaryDirectory() as unpacked:
    packages.unpack('vaderSentiment==3.3.2', Path(unpacked), source=True)
    (archive,) = Path(unpacked).rglob('hutto_ICWSM_2014.tar.gz')
    with tarfile.open(archive) as files:
      member = files.extractfile(_SENTENCES)
      assert member is not None
      path.write_bytes(member.read())
