"""The same interventions by PyTorch forward hooks, on a model of SmolLM2-135M's shape, beside the same model without hooks.

Run in an environment of its own:

    python3 -m venv target/torch-env
    target/torch-env/bin/pip install torch transformers
    target/torch-env/bin/python benches/peers/torch_hooks.py

Weights are random: speed does not depend on them. As in `pilotfish bench`, hooked and plain runs take turns, and the median of the pairs'
ratios counts.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def model(dtype):
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def hidden_states(output):
    return output[0] if isinstance(output, tuple) else output


def replaced(output, hidden):
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def hooks(kind, layers, width, dtype):
    """A forward hook for each of the layers."""
    def add(direction):
        return lambda _module, _inputs, output: replaced(output, hidden_states(output) + direction)

    def gated_add(direction):
        state = {"open": False}

        def hook(_module, _inputs, output):
            hidden = hidden_states(output)
            if hidden.shape[1] > 1:
                # A prompt: its last token decides.
                state["open"] = (hidden[0, -1] @ direction).item() > -1e9
            return replaced(output, hidden + 1e-6 * direction) if state["open"] else output
        return hook

    def autoencoder(direction):
        encoder, decoder = (torch.randn(width, width).to(dtype) / width**0.5 for _ in range(2))

        def hook(_module, _inputs, output):
            hidden = hidden_states(output)
            mapped = torch.relu(hidden @ encoder.T) @ decoder.T
            return replaced(output, hidden + 1e-6 * (mapped - hidden))
        return hook

    make = {"add": add, "gated-add": gated_add, "autoencoder": autoencoder}[kind]
    return {layer: make(torch.randn(width).to(dtype) * 1e-6) for layer in layers}


@torch.inference_mode()
def timed(network, prompt, n_tokens):
    start = time.perf_counter()
    output = network(prompt, use_cache=True)
    prefill = time.perf_counter() - start
    token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    start = time.perf_counter()
    for _ in range(n_tokens):
        output = network(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = output.logits[:, -1:].argmax(-1)
    return prefill, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    network = model(dtype)
    n_layers, width = network.config.num_hidden_layers, network.config.hidden_size
    prompt = torch.randint(0, network.config.vocab_size, (1, arguments.prompt_tokens))
    timed(network, prompt, 2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}")
    for kind, layers in [("gated-add", [15]), ("add", range(n_layers)), ("autoencoder", [15])]:
        pairs = []
        for pair in range(arguments.pairs):
            def hooked():
                handles = [
                    network.model.layers[layer].register_forward_hook(hook)
                    for layer, hook in hooks(kind, layers, width, dtype).items()
                ]
                result = timed(network, prompt, arguments.tokens)
                for handle in handles:
                    handle.remove()
                return result

            def plain():
                return timed(network, prompt, arguments.tokens)

            first, second = (plain, hooked) if pair % 2 == 0 else (hooked, plain)
            one, other = first(), second()
            pairs.append((one, other) if pair % 2 == 0 else (other, one))
        for phase, name in enumerate(["prefill", "decode"]):
            ratios = [without[phase] / with_hooks[phase] for without, with_hooks in pairs]
            n = arguments.prompt_tokens if phase == 0 else arguments.tokens
            speed = n / statistics.median(without[phase] for without, _ in pairs)
            print(f"{kind:12} {len(layers):2} hooks  {name:8} {speed:7.1f} tokens/s  ratio {statistics.median(ratios):.3f}"
                  f"  ({min(ratios):.3f} – {max(ratios):.3f})")


if __name__ == "__main__":
    main()
