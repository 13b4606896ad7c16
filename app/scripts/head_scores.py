"""Head scores on repeated random tokens with plain transformers: induction, previous token, duplicate token."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LENGTH = 50
SEQUENCES = 8
SEED = 0

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
known = min(model.config.vocab_size, len(tokenizer))
drawn_from = torch.tensor([token for token in range(known) if token not in left_out])
start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
length = min(LENGTH, (model.config.max_position_embeddings - 1) // 2, len(drawn_from))
sequences = []
for number in range(SEQUENCES):
    generator = torch.Generator().manual_seed(SEED + number)
    r = drawn_from[torch.randperm(len(drawn_from), generator=generator)[:length]]
    sequences.append(torch.cat([torch.tensor([start]), r, r]))
with torch.inference_mode():
    attentions = model(torch.stack(sequences), output_attentions=True).attentions
pattern_LSHQK = torch.stack(attentions)

second = torch.arange(length + 1, 2 * length + 1)
scores = {
    "induction": pattern_LSHQK[..., second, second - length + 1].mean((1, 3)),
    "previous_token": pattern_LSHQK.diagonal(-1, 3, 4).mean((1, 3)),
    "duplicate_token": pattern_LSHQK[..., second, second - length].mean((1, 3)),
}
for layer, head in torch.cartesian_prod(*map(torch.arange, scores["induction"].shape)).tolist():
    print(layer, head, *(f"{score[layer, head]:.6f}" for score in scores.values()))
