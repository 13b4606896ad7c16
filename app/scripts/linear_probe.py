"""A linear probe with plain transformers: fit at every layer on some nouns, test on nouns it has not met."""

import torch
from transformers import AutoModel, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "The keys to the old wooden cabinet"
L2 = 1.0

NOUNS = [
    ("key", "keys"),
    ("letter", "letters"),
    ("teacher", "teachers"),
    ("child", "children"),
    ("man", "men"),
]
NOUNS += [("bird", "birds"), ("woman", "women"), ("sign", "signs"), ("guard", "guards"), ("tool", "tools")]
PLACES = ["cabinet", "cabinets", "house", "houses", "garden", "gardens"]
rows = [
    (f"The {noun[number]} near the {place}", number, index)
    for index, noun in enumerate(NOUNS)
    for number in (0, 1)
    for place in PLACES
]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()


def last_token_LD(text):
    """The residual stream at the last token, per layer; transformers norms the last of them."""
    with torch.inference_mode():
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
    return torch.stack([state[0, -1] for state in states]).double()


def fit(x_ND, y_N):
    """Logistic regression on standardised features, L2 per feature, as a softmax over two classes has it."""
    mean, scale = x_ND.mean(0), x_ND.std(0, correction=0).clamp(min=1e-12)
    weight = torch.zeros(x_ND.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        logits = (x_ND - mean) / scale @ weight[:-1] + weight[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y_N)
        value = value + L2 * x_ND.shape[1] / 4 * weight[:-1].square().sum() / len(x_ND)
        value.backward()
        return value

    optimiser.step(loss)
    return lambda x: (x - mean) / scale @ weight[:-1].detach() + weight[-1].detach()


x_NLD = torch.stack([last_token_LD(text) for text, _, _ in rows])
y_N = torch.tensor([float(number) for _, number, _ in rows])
is_new_N = torch.tensor([index % 5 == 0 for _, _, index in rows])
prompt_LD = last_token_LD(TEXT)
for layer in range(x_NLD.shape[1]):
    probe = fit(x_NLD[~is_new_N, layer], y_N[~is_new_N])
    right = ((probe(x_NLD[is_new_N, layer]) > 0) == (y_N[is_new_N] > 0)).double().mean()
    print(
        f"layer {layer}: {right:.3f} right on new nouns; P(plural) of the prompt {probe(prompt_LD[layer]).sigmoid():.3f}"
    )
