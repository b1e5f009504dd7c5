"""A GGUF file of a Llama of a few thousand random numbers."""

import gguf
import numpy as np

LAYERS = 2
HEADS, KV_HEADS = 2, 1
WIDTH, HIDDEN = 32, 24
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')

# What config.json should say of it, but for the vocabulary.
CONFIG = {
  'model_type': 'llama',
  'hidden_size': WIDTH,
  'intermediate_size': HIDDEN,
  'num_attention_heads': HEADS,
  'num_key_value_heads': KV_HEADS,
  'num_hidden_layers': LAYERS,
  'rms_norm_eps': 2.0**-10,
  'rope_theta': 300.0,
  'tie_word_embeddings': True,
}


def tensors(vocabulary):
  """Weights by their names in the file; the embedding fits 8 bits exactly."""
  random = np.random.default_rng(0)
  keys = WIDTH // HEADS * KV_HEADS
  shapes = {
    'attn_q': (WIDTH, WIDTH),
    'attn_k': (keys, WIDTH),
    'attn_v': (keys, WIDTH),
    'attn_output': (WIDTH, WIDTH),
    'attn_norm': (WIDTH,),
    'ffn_norm': (WIDTH,),
    'ffn_gate': (HIDDEN, WIDTH),
    'ffn_up': (HIDDEN, WIDTH),
    'ffn_down': (WIDTH, HIDDEN),
  }
  made = {
    f'blk.{layer}.{name}.weight': random.standard_normal(shape) / 4
    + ('norm' in name)
    for layer in range(LAYERS)
    for name, shape in shapes.items()
  }
  embedding = random.integers(-127, 128, (vocabulary, WIDTH))
  # The largest of a block of 32 decides its unit: 1/64.
  embedding[:, 0] = 127
  made['token_embd.weight'] = embedding / 64
  made['output_norm.weight'] = 1 + random.standard_normal(WIDTH) / 4
  return {name: tensor.astype(np.float32) for name, tensor in made.items()}


def write(path, tokens, merges, *, change=None):
  """Writes the file.

  Args:
    path: of the file.
    tokens: the vocabulary, which opens with `SPECIAL`.
    merges: of the tokenizer, two tokens with a space between.
    change: other texts of the metadata, and tensors, by name.
  """
  change = change or {}
  texts = {
    'general.architecture': 'llama',
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    **{name: x for name, x in change.items() if isinstance(x, str)},
  }
  writer = gguf.GGUFWriter(path, texts.pop('general.architecture'))
  for name, text in texts.items():
    writer.add_string(name, text)
  for name, number in (
    ('embedding_length', WIDTH),
    ('block_count', LAYERS),
    ('attention.head_count', HEADS),
    ('attention.head_count_kv', KV_HEADS),
    ('feed_forward_length', HIDDEN),
  ):
    writer.add_uint32(f'llama.{name}', number)
  writer.add_float32('llama.rope.freq_base', CONFIG['rope_theta'])
  writer.add_float32(
    'llama.attention.layer_norm_rms_epsilon', CONFIG['rms_norm_eps']
  )
  writer.add_token_list(list(tokens))
  writer.add_token_types(
    [gguf.TokenType.CONTROL] * len(SPECIAL)
    + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))
  )
  writer.add_token_merges(list(merges))
  for name, tensor in tensors(len(tokens)).items():
    if name == 'token_embd.weight':
      kind = gguf.GGMLQuantizationType.Q8_0
      writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, tensor)
  for name, tensor in change.items():
    if not isinstance(tensor, str):
      writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
