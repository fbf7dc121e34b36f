"""What attaching costs: the decoding speed of an app alone, attached with no guard, and attached with one.

Each round begins three of the app anew, in another order, since where a process has its memory alone makes some per cent, and has each decode in turns:
its speed is the median of these. The ratios are those of rounds.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pilotfish", required=True)
parser.add_argument("--node-llama-cpp", required=True, help="its dist/index.js")
parser.add_argument("--model", required=True)
parser.add_argument("--guard", required=True)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--rounds", type=int, default=36)
parser.add_argument("--turns", type=int, default=3, help="of each process in a round")
arguments = parser.parse_args()

folder = tempfile.mkdtemp()
for name in ["none", "guard"]:
    os.mkdir(os.path.join(folder, name))
shutil.copytree(arguments.guard, os.path.join(folder, "guard", "guard"))
with open(os.path.join(folder, "prompts.jsonl"), "w") as file:
    print(json.dumps({"prompt": "Write a long story about a small fish that swims beside a large one."}), file=file)
command = [arguments.pilotfish, "tokens", "--model", arguments.model, "--prompts", file.name, "--json"]
tokens = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["tokens"]
model = subprocess.run([arguments.pilotfish, "models", "path", arguments.model], capture_output=True, check=True, text=True).stdout.strip()

app = ["node", os.path.join(os.path.dirname(os.path.abspath(__file__)), "app.js"), model, "1", str(arguments.threads)]
environment = os.environ | {"NODE_LLAMA_CPP": arguments.node_llama_cpp, "PILOTFISH_LOG": "off"}


def start(*prefix):
    process = subprocess.Popen([*prefix, *app], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    return process


def speed(process):
    request = {"sequence": 0, "tokens": tokens, "n": arguments.tokens, "anew": True}
    print(json.dumps([request]), file=process.stdin, flush=True)
    [answer] = json.loads(process.stdout.readline())
    assert answer["end"] == "length", answer
    return answer["tokensPerSecond"]


attach = lambda name: [arguments.pilotfish, "attach", "--guards", os.path.join(folder, name), "--"]
prefixes = {"alone": [], "no guard": attach("none"), "guard": attach("guard")}
speeds = {name: [] for name in prefixes}
orders = list(itertools.permutations(prefixes))
for number in range(arguments.rounds):
    apps = {name: start(*prefixes[name]) for name in orders[-1 - number % len(orders)]}
    for process in apps.values():
        speed(process)
    turns = {name: [] for name in prefixes}
    for turn in range(arguments.turns):
        for name in orders[(number + turn) % len(orders)]:
            turns[name].append(speed(apps[name]))
    for name, values in turns.items():
        speeds[name].append(statistics.median(values))
    for process in apps.values():
        process.kill()
        process.wait()
shutil.rmtree(folder)
print(f"tokens per second, medians of {arguments.rounds} rounds: " + ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in speeds.items()))
for name, than in [("no guard", "alone"), ("guard", "alone"), ("guard", "no guard")]:
    ratios = [one / other for one, other in zip(speeds[name], speeds[than])]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"{name} to {than}: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})")
