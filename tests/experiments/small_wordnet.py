"""A made-up WordNet of animals and artifacts, in the format of the real one."""

import itertools

_LICENCE = '  1 This software and database is being provided to you.\n'

# Kinds of animals (file 05) and of artifacts (file 06), by their kind.
KINDS = {
  'bird': ('05', ('robin', 'wren', 'gull', 'stork', 'heron')),
  'fish': ('05', ('trout', 'perch', 'tuna', 'shark', 'eel')),
  'snake': ('05', ('viper', 'cobra', 'adder', 'boa', 'mamba')),
  'tool': ('06', ('hammer', 'saw', 'drill', 'chisel', 'wrench')),
  'vessel': ('06', ('jug', 'mug', 'vase', 'bowl', 'pan')),
  'garment': ('06', ('coat', 'shirt', 'skirt', 'glove', 'sock')),
}


def _noun(offset, file, words, pointers, gloss):
  """A line of data.noun."""
  named = ' '.join(f'{word} 0' for word in words)
  return (
    f'{offset:08d} {file} n {len(words):02x} {named} '
    f'{len(pointers):03d} {" ".join([*pointers, "|"])} {gloss}  \n'
  )


def write(folder, times=1):
  """Writes a WordNet of so many times 37 nouns and two adjectives."""
  data = [_noun(50, '05', ['creature'], [], 'whatever lives')]
  index = ['creature n 1 1 @ 1 1 00000050  \n']
  offsets = itertools.count(100, 100)
  adjectives, of_adjectives = [], []
  # Behind every word but those of the first time.
  for end in ('', *'abcdefghjklmnopqrtuvwz')[:times]:
    for name, (file, names) in KINDS.items():
      kind, words = f'{name}{end}', [f'{word}{end}' for word in names]
      of_kind = next(offsets)
      above = ['@ 00000050 n 0000'] if file == '05' else []
      data.append(_noun(of_kind, file, [kind], above, f'a group of {kind}s'))
      index.append(f'{kind} n 1 0 1 0 {of_kind:08d}  \n')
      for word in words:
        offset = next(offsets)
        gloss = (
          f'a {kind} that is called {word}ing; "the {word} of {word}ing town"'
        )
        data.append(
          _noun(
            offset, file, [word, f'{word}x'], [f'@ {of_kind:08d} n 0000'], gloss
          )
        )
        index.append(f'{word} n 1 1 @ 1 1 {offset:08d}  \n')
    # A word of two senses: a bird, used twice, and a tool.
    word, senses = f'crane{end}', [next(offsets), next(offsets)]
    for offset, name in zip(senses, ('bird', 'tool'), strict=True):
      file, _ = KINDS[name]
      kind = f'{name}{end}'
      gloss = (
        f'a tall {kind}; "the {word} by the {kind}s"; "a {word} near our '
        f'{kind}s"'
      )
      data.append(_noun(offset, file, [word], [], gloss))
    index.append(
      f'{word} n 2 0 2 2 {" ".join(f"{sense:08d}" for sense in senses)}  \n'
    )
    hot, cold = (len(adjectives) + 1) * 100, (len(adjectives) + 2) * 100
    adjectives += [
      f'{hot:08d} 00 a 02 hot{end} 0 warm{end}(p) 0 001 ! {cold:08d} a 0102 | '
      f'of high temperature; "a hot{end} stove"  \n',
      f'{cold:08d} 00 s 02 ice_cold{end} 0 cold{end} 0 001 ! {hot:08d} a 0201 '
      '| of low  \n',
    ]
    of_adjectives += [
      f'hot{end} a 1 1 ! 1 1 {hot:08d}  \n',
      f'cold{end} a 1 0 1 0 {cold:08d}\n',
    ]
  files = {
    'data.noun': data,
    'index.noun': index,
    'data.adj': adjectives,
    'index.adj': of_adjectives,
  }
  for suffix in ('noun', 'verb', 'adj', 'adv'):
    for name in (f'data.{suffix}', f'index.{suffix}'):
      (folder / name).write_text(_LICENCE + ''.join(files.get(name, [])))
