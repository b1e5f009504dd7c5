"""Logits of Llama and Qwen 2.5 by NumPy alone, for comparison."""

import numpy as np

# By the names that llama.cpp gives them.
_NAMES = {
  'token_embd': 'embed_tokens',
  'output_norm': 'norm',
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}


def logits(config, tensors, tokens, *, neighbours=False):
  """Returns float64 [texts, length, vocabulary], one head and text at a time.

  Args:
    config: as in config.json.
    tensors: by the names that Hugging Face gives them.
    tokens: ids, [texts, length].
    neighbours: whether features 2i and 2i + 1 turn together, as llama.cpp has
      them, else i and i + size / 2.
  """
  tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
  heads, width = config['num_attention_heads'], config['hidden_size']
  size = config.get('head_dim', width // heads)
  group = heads // config['num_key_value_heads']

  def norm(x, scale):
    mean = (x**2).mean(-1, keepdims=True)
    return x / np.sqrt(mean + config['rms_norm_eps']) * scale

  def linear(x, name):
    product = x @ tensors[name + '.weight'].T
    return product + tensors.get(name + '.bias', 0)

  def rotated(x):
    # Pairs as complex numbers, turned by their position. In what order they
    # are returned does not matter to products of a query and a key.
    half = size // 2
    if neighbours:
      pairs = x[:, 0::2] + 1j * x[:, 1::2]
    else:
      pairs = x[:, :half] + 1j * x[:, half:]
    rates = config['rope_theta'] ** (-2 * np.arange(half) / size)
    turned = pairs * np.exp(1j * np.outer(np.arange(len(x)), rates))
    return np.concatenate([turned.real, turned.imag], axis=1)

  texts = []
  for text in tokens:
    x = tensors['model.embed_tokens.weight'][text]
    future = np.triu(np.full((len(text), len(text)), -np.inf), 1)
    for layer in range(config['num_hidden_layers']):
      at = f'model.layers.{layer}.'
      y = norm(x, tensors[at + 'input_layernorm.weight'])
      query, key, value = (linear(y, f'{at}self_attn.{n}_proj') for n in 'qkv')
      mixed = []
      for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        shared = slice(head // group * size, (head // group + 1) * size)
        scores = rotated(query[:, own]) @ rotated(key[:, shared]).T
        scores = np.exp(scores / np.sqrt(size) + future)
        mixed.append(scores / scores.sum(1, keepdims=True) @ value[:, shared])
      x = x + linear(np.concatenate(mixed, 1), at + 'self_attn.o_proj')
      y = norm(x, tensors[at + 'post_attention_layernorm.weight'])
      gate = linear(y, at + 'mlp.gate_proj')
      gate = gate / (1 + np.exp(-gate))
      x = x + linear(gate * linear(y, at + 'mlp.up_proj'), at + 'mlp.down_proj')
    tied = config['tie_word_embeddings']
    head = tensors['model.embed_tokens.weight' if tied else 'lm_head.weight']
    texts.append(norm(x, tensors['model.norm.weight']) @ head.T)
  return np.stack(texts)


def from_gguf(tensors):
  """Returns the tensors of a GGUF file by Hugging Face's names, unchanged."""
  renamed = {}
  for name, tensor in tensors.items():
    *layer, own, _ = name.split('.')
    prefix = f'model.layers.{layer[1]}.' if layer else 'model.'
    renamed[f'{prefix}{_NAMES[own]}.weight'] = tensor
  return renamed
