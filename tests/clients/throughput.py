#!/usr/bin/env python3
"""How fast `pilotfish serve` answers, beside llama.cpp's own server on the same weights, and under guards beside without.

    scripts/setup-llama-server.sh target/tools/llama-server
    throughput.py --pilotfish target/release/pilotfish --llama-server target/tools/llama-server/bin/llama-server \\
        --model smollm2-135m-instruct --guards guards/harm-gate-gemma3-to-smollm2

All servers are started once, with the same room, batch and threads, and stay loaded. They are asked in turn, the one that comes first last the next
time, by clients that each keep a connection and have one request on it at a time. What counts is the window in which every client is busy: the tokens
of an answer that only partly lies in it count by that part. A round's ratio is of neighbours in time; the median of the rounds counts.

Requests are greedy completions of questions in the model's own template, the same text for all. llama.cpp's server gets `top_k` 1 besides, which spares
it its other samplers. Questions have nothing in common but the template's beginning, which all servers find read in a sequence's last text. What
llama.cpp's server could keep of other texts in memory (`--cache-ram`) is off, as the other has nothing like it; its sliding windows are whole, as the
other's are. A question whose answer ends early or that a guard blocks is left out.

Progress goes to stderr, a table to stdout, or with --json all there is. Linux (for the processor's time), Python 3.11, nothing else.
"""

import argparse
import collections
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path

QUESTIONS = """
How does a sailing boat move against the wind?
Why is the sky blue during the day and red in the evening?
Describe how bread is made, from the flour to the loaf.
What is the difference between weather and climate?
Explain how a bicycle stays upright while it is moving.
Write a short story about a lighthouse keeper and his cat.
How do bees make honey, and what do they need it for?
What are the main parts of a plant, and what does each do?
Explain to a child why the moon has phases.
Which things should I pack for a week of hiking in the mountains?
How does a refrigerator keep food cold?
Describe the life of a salmon, from the river to the sea and back.
What makes a good public library?
Explain what a prime number is, and give several examples.
How did people tell the time before there were clocks?
Write a letter to a friend about your first day in a new town.
What is photosynthesis, and why does it matter?
How is paper made out of wood?
Describe a typical market in a small town on a Saturday morning.
Why do leaves change their colours in autumn?
What does a librarian do all day?
Explain how an aeroplane wing creates lift.
Give me advice on learning to play the piano as an adult.
How does the heart pump blood through the body?
What are the advantages of trains over cars for long journeys?
Describe the rules of chess to somebody who has never played.
How do volcanoes form, and why do they erupt?
Write a paragraph about the smell of rain on a warm street.
What is the purpose of a constitution?
Explain how vaccines teach the body to defend itself.
How should I take care of a houseplant that gets little light?
What did the invention of the printing press change?
Describe how glass is made and shaped.
Why do cats purr?
What is an algorithm? Explain it with a recipe.
How do rivers shape the land around them?
Plan a simple dinner for four people who eat no meat.
Explain the difference between a simile and a metaphor.
How does a compass find north?
What happens to food in the stomach?
Write a short dialogue between a baker and an early customer.
Why is the ocean salty?
How can I improve my handwriting?
Describe the work of an architect on a new school.
What are the stages of the water cycle?
Explain how sound travels through air and water.
How do birds find their way when they migrate?
What should a beginner know about growing tomatoes?
Describe a walk through a forest in winter.
How does a telescope make distant things look near?
Why do we dream, as far as anybody knows?
What is the role of a referee in a football match?
Explain how a battery stores energy.
How are mountains formed?
Write an introduction for a talk about the history of bridges.
What makes a piece of music sound sad?
How do magnets work?
Describe how a newspaper was printed a hundred years ago.
Why do some animals sleep through the winter?
What are good habits for studying before an exam?
Explain how a canal lock lifts a boat.
How is chocolate made from cocoa beans?
What does it mean for a language to be endangered?
Describe the view from the top of a tall tower in a city.
""".strip().splitlines()

ROOT = Path(__file__).resolve().parents[2]
LLAMA, PILOTFISH, GUARDED = "llama-server", "pilotfish", "guarded"


def say(*words):
    print(f"[{time.strftime('%H:%M:%S')}]", *words, file=sys.stderr, flush=True)


# --- The servers ---------------------------------------------------------------------------------------------------------------------------------------

class Server:
    """One that runs, with an address."""

    def __init__(self, name, command, environment, address=None):
        self.name, self.address = name, address
        self.log = collections.deque(maxlen=100)
        self.listens = threading.Event()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            env=os.environ | environment)
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + 180
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise RuntimeError(f"{name} does not start: {' '.join(map(str, command))}\n" + "\n".join(self.log))
            time.sleep(0.1)

    def _read(self):
        # To the end, or it would wait for us.
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            found = re.match(r"listening on http://(\S+)", line)
            if found:
                self.address = found[1]

    def _is_ready(self):
        if self.address is None:
            return False
        try:
            return Wire(self.address).ask("GET", "/health")[0] == 200
        except OSError:
            return False

    def cpu_seconds(self):
        """Of all its threads, since it began."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def busy_seconds():
    """Of all cores, whoever used them, since the machine began; what another machine took of them too."""
    user, nice, system, _idle, _wait, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def llama_server(arguments, gguf, environment):
    port = free_port()
    slots, threads = arguments.parallel, arguments.threads
    command = [
        arguments.llama_server, "--model", gguf, "--host", "127.0.0.1", "--port", port, "--parallel", slots, "--ctx-size", slots * arguments.context,
        "--no-kv-unified", "--batch-size", arguments.batch, "--ubatch-size", min(arguments.batch, 512), "--threads", threads,
        "--threads-batch", threads, "--gpu-layers", 0, "--swa-full", "--cache-ram", 0, "--no-ui", "--log-verbosity", 2,
        *arguments.llama_server_option]
    return Server(LLAMA, [str(part) for part in command], environment, f"127.0.0.1:{port}")


def pilotfish(arguments, name, guards, environment):
    command = [
        arguments.pilotfish, "serve", "--model", arguments.model, "--guards", guards, "--listen", "127.0.0.1:0", "--parallel", arguments.parallel,
        "--context", arguments.context]
    # As many threads as there are cores: it has no option for that.
    environment = environment | {"PILOTFISH_SERVE__LIMITS__BATCH": str(arguments.batch), "PILOTFISH_LOG": "pilotfish=warn"}
    return Server(name, [str(part) for part in command], environment)


class Wire:
    """A connection that is kept."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=300)
        self.is_used = False

    def ask(self, method, path, body=None):
        """Status, body, and when its first piece came."""
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            self.connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = self.connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):
            # A server may close a connection between two requests: llama.cpp's does after some.
            if not self.is_used:
                raise
            self.connection.close()
            self.is_used = False
            return self.ask(method, path, body)
        self.is_used = True
        pieces, first = [], None
        # Piece by piece, as a reader of a stream has it.
        while piece := response.read1(65536):
            first = first or time.monotonic()
            pieces.append(piece)
        # Only this lets the connection go on.
        response.read()
        return response.status, b"".join(pieces), first


class Wrong(Exception):
    """An answer that should not be."""


Answer = collections.namedtuple("Answer", "text tokens prompt_tokens cached ended began first finished question pieces")


def complete(wire, prompt, question, max_tokens, stream):
    body = {"prompt": prompt, "temperature": 0, "top_k": 1, "max_tokens": max_tokens}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.monotonic()
    status, data, first = wire.ask("POST", "/v1/completions", body)
    finished = time.monotonic()
    if status != 200:
        raise Wrong(f"{status}: {data[:300]!r}")
    if stream:
        lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
        if lines[-1] != "[DONE]":
            raise Wrong(f"a stream without an end: {lines[-1][:300]}")
        answers = [json.loads(line) for line in lines[:-1]]
    else:
        answers = [json.loads(data)]
    if wrong := [answer["error"] for answer in answers if "error" in answer]:
        raise Wrong(f"{wrong[0]}")
    choices = [choice for answer in answers for choice in answer["choices"]]
    usage = next(answer["usage"] for answer in reversed(answers) if answer.get("usage"))
    ended = next((choice["finish_reason"] for choice in reversed(choices) if choice["finish_reason"]), None)
    return Answer(
        "".join(choice["text"] for choice in choices), usage["completion_tokens"], usage["prompt_tokens"],
        usage.get("prompt_tokens_details", {}).get("cached_tokens", 0), ended, began, first, finished, question, len(choices))


# --- What is asked -------------------------------------------------------------------------------------------------------------------------------------

def template_of(model, server):
    """What a question stands in: a function. Of the model's descriptor where it has one, else the GGUF's own, by llama.cpp's server."""
    descriptor = ROOT / "models" / f"{model}.toml"
    if descriptor.is_file():
        template = tomllib.loads(descriptor.read_text()).get("template")
        if template:
            return lambda question: template.replace("{prompt}", question)

    def applied(question):
        status, data, _ = Wire(server.address).ask("POST", "/apply-template", {"messages": [{"role": "user", "content": question}]})
        if status != 200:
            raise Wrong(f"/apply-template: {status}: {data[:300]!r}")
        return json.loads(data)["prompt"]
    return applied


def all_of(server, prompts, indices, tokens, n_clients):
    """Has a server answer these prompts, by so many clients at once: answers by number."""
    left, answers, failures = iter(indices), {}, []
    lock = threading.Lock()

    def client():
        wire = Wire(server.address)
        try:
            while True:
                with lock:
                    index = next(left, None)
                if index is None:
                    return
                answers[index] = complete(wire, prompts[index], index, tokens, False)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    clients = [threading.Thread(target=client, daemon=True) for _ in range(n_clients)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    if failures:
        raise Wrong(f"{server.name}: {failures[0]}")
    return answers


def choose(servers, prompts, arguments):
    """Has every server answer each question: the numbers of those that all write to the end, what is left out, and how many tokens the prompts have."""
    found = {server.name: all_of(server, prompts, range(len(prompts)), arguments.tokens, arguments.clients) for server in servers}
    chosen, left_out, counts = [], [], []
    for index, question in enumerate(QUESTIONS[: len(prompts)]):
        answers = {name: answers[index] for name, answers in found.items()}
        if len({answer.prompt_tokens for answer in answers.values()}) > 1:
            raise Wrong(f"servers count a prompt's tokens differently: { {name: answer.prompt_tokens for name, answer in answers.items()} }: {prompts[index]!r}")
        short = {name: f"{answer.tokens} tokens, {answer.ended}" for name, answer in answers.items() if answer.tokens != arguments.tokens}
        if short:
            left_out.append({"question": question} | short)
        else:
            chosen.append(index)
            counts.append(next(iter(answers.values())).prompt_tokens)
    if not chosen:
        raise Wrong(f"no answer is {arguments.tokens} tokens long: {left_out[:2]}")
    say(f"{len(chosen)} questions; {len(left_out)} are left out")
    return chosen, left_out, statistics.fmean(counts)


def alone(servers, chosen, prompts, arguments):
    """How many of the first questions every two servers answer alike, to the last character, if nothing else is asked at the time."""
    indices = chosen[: arguments.alone]
    texts = {server.name: all_of(server, prompts, indices, arguments.tokens, 1) for server in servers}
    return {
        f"{one}, {other}": {"same": sum(texts[one][index].text == texts[other][index].text for index in indices), "of": len(indices)}
        for one, other in itertools.combinations(texts, 2)}


# --- A round -------------------------------------------------------------------------------------------------------------------------------------------

class Round:
    def __init__(self, server, questions, prompts, arguments, stream):
        self.server, self.questions, self.prompts, self.arguments, self.stream = server, questions, prompts, arguments, stream
        self.lock = threading.Lock()
        self.answers, self.failures = [], []
        self.settled = [threading.Event() for _ in range(arguments.clients)]
        self.enough = threading.Event()

    def client(self, number):
        wire = Wire(self.server.address)
        # The first answers are of different lengths, so that they don't all end at once ever after.
        tokens = max(1, self.arguments.tokens * (number + 1) // self.arguments.clients)
        try:
            while not self.enough.is_set():
                with self.lock:
                    question = next(self.questions)
                answer = complete(wire, self.prompts[question], question, tokens, self.stream)
                with self.lock:
                    self.answers.append(answer)
                if answer.tokens != tokens:
                    raise Wrong(f"{answer.tokens} tokens ({answer.ended}), where {tokens} were asked for: {self.prompts[question]!r}")
                tokens = self.arguments.tokens
                self.settled[number].set()
        except Exception as error:  # whatever it is, the round is worth nothing
            self.failures.append(f"{type(error).__name__}: {error}")
            self.enough.set()
            self.settled[number].set()

    def run(self, others):
        clients = [threading.Thread(target=self.client, args=(number,), daemon=True) for number in range(self.arguments.clients)]
        began, busy = time.monotonic(), busy_seconds()
        idle, cpu, own = [other.cpu_seconds() for other in others], self.server.cpu_seconds(), time.process_time()
        for client in clients:
            client.start()
        for settled in self.settled:
            settled.wait()
        start = time.monotonic()
        self.enough.wait(self.arguments.seconds)
        end = time.monotonic()
        # Every client is busy to the last moment: it ends what it has begun.
        self.enough.set()
        for client in clients:
            client.join()
        whole, busy = time.monotonic() - began, busy_seconds() - busy
        if self.failures:
            raise Wrong(f"{self.server.name}: {self.failures[0]}")

        def inside(answer):
            return max(0.0, min(answer.finished, end) - max(answer.began, start)) / (answer.finished - answer.began)
        tokens = sum(answer.tokens * inside(answer) for answer in self.answers)
        prompt = sum(answer.prompt_tokens * inside(answer) for answer in self.answers)
        every = sum(answer.tokens for answer in self.answers)
        cpu, own = self.server.cpu_seconds() - cpu, time.process_time() - own
        return {
            "server": self.server.name,
            "seconds": round(end - start, 3),
            "answers": len(self.answers),
            "tokens_per_second": tokens / (end - start),
            "prompt_tokens_per_second": prompt / (end - start),
            "cpu_ms_per_token": 1000 * cpu / every,
            "cpu_cores": cpu / whole,
            "client_cpu_cores": own / whole,
            "other_cpu_cores": max(0.0, busy - cpu - own) / whole,
            "idle_cpu_cores": max((other.cpu_seconds() - was for other, was in zip(others, idle)), default=0.0) / whole,
            "cached_tokens": statistics.median(answer.cached for answer in self.answers),
            "first_piece_ms": 1000 * statistics.median(answer.first - answer.began for answer in self.answers) if self.stream else None,
            "pieces": statistics.median(answer.pieces for answer in self.answers),
        }


def measure(servers, chosen, prompts, arguments, stream):
    """All rounds of one kind: what each measured, and each question's texts by server."""
    # Everyone is asked the same in the same order, and nothing again before all else has been.
    order = {server.name: itertools.cycle(chosen) for server in servers}
    rounds, noisy, texts = [], [], collections.defaultdict(lambda: collections.defaultdict(set))
    for number in itertools.count():
        if len(rounds) == arguments.rounds:
            return rounds, noisy, texts
        if len(noisy) > 3 * arguments.rounds:
            raise Wrong(f"other work takes more than {arguments.most_other} cores all the time")
        found = {}
        for server in servers if number % 2 == 0 else servers[::-1]:
            run = Round(server, order[server.name], prompts, arguments, stream)
            found[server.name] = run.run([other for other in servers if other is not server])
            for answer in run.answers:
                if answer.tokens == arguments.tokens:
                    texts[server.name][answer.question].add(answer.text)
        other = max(of["other_cpu_cores"] for of in found.values())
        (rounds if other <= arguments.most_other else noisy).append(found)
        rates = ", ".join(f"{name} {found[name]['tokens_per_second']:.1f}" for name in found)
        note = f"{other:.2f} cores of other work" + ("" if other <= arguments.most_other else ", so it does not count")
        say(f"{'streamed' if stream else 'whole'}, {len(rounds)} of {arguments.rounds}: {rates} tokens per second; {note}")


# --- What comes of it ----------------------------------------------------------------------------------------------------------------------------------

def spread(values, digits=4):
    ordered = sorted(values)
    quarter = lambda part: ordered[round(part * (len(ordered) - 1))]
    values = {"median": statistics.median(ordered), "lower_quartile": quarter(0.25), "upper_quartile": quarter(0.75), "least": ordered[0], "most": ordered[-1]}
    return {name: round(value, digits) for name, value in values.items()} | {"n": len(ordered)}


def summed_up(servers, rounds, noisy):
    names = [server.name for server in servers]
    per_server = {}
    for name in names:
        of = [found[name] for found in rounds]
        keys = [key for key, value in of[0].items() if isinstance(value, (int, float))]
        per_server[name] = {key: round(statistics.median(found[key] for found in of), 3) for key in keys}
        per_server[name]["idle_cpu_cores"] = round(max(found[name]["idle_cpu_cores"] for found in rounds), 4)
    ratios = {}
    for one, other in itertools.pairwise(names):
        ratios[f"{other} / {one}"] = {
            key: spread([found[other][key] / found[one][key] for found in rounds])
            for key in ("tokens_per_second", "prompt_tokens_per_second", "cpu_ms_per_token")}
    return {"servers": per_server, "ratios": ratios, "rounds": rounds, "noisy_rounds": noisy}


def alike_under_load(texts):
    """Questions that two servers gave a common text to, of those that both answered; and those that one gave a single text to, of those it answered."""
    found = {}
    for one, other in itertools.combinations(texts, 2):
        both = texts[one].keys() & texts[other].keys()
        found[f"{one}, {other}"] = {"same": sum(bool(texts[one][question] & texts[other][question]) for question in both), "of": len(both)}
    for name, own in texts.items():
        found[f"{name}, itself"] = {"same": sum(len(own[question]) == 1 for question in own), "of": len(own)}
    return found


def table(summary):
    lines = []
    for kind, found in summary["modes"].items():
        lines += [
            f"## {kind}", "",
            "| server | answer tokens/s | prompt tokens/s | CPU ms a token | its cores | client's | others' | reused tokens of a prompt | first piece, ms |",
            "|---|---|---|---|---|---|---|---|---|"]
        for name, of in found["servers"].items():
            first = f"{of['first_piece_ms']:.0f}" if "first_piece_ms" in of else ""
            lines.append(
                f"| {name} | {of['tokens_per_second']:.1f} | {of['prompt_tokens_per_second']:.1f} | {of['cpu_ms_per_token']:.2f} | {of['cpu_cores']:.2f} | "
                f"{of['client_cpu_cores']:.3f} | {of['other_cpu_cores']:.3f} | {of['cached_tokens']:.0f} | {first} |")
        lines += ["", "| ratio | answer tokens/s | quartiles | spread | CPU a token | rounds |", "|---|---|---|---|---|---|"]
        for name, of in found["ratios"].items():
            rate, cpu = of["tokens_per_second"], of["cpu_ms_per_token"]
            lines.append(
                f"| {name} | {rate['median']:.3f} | {rate['lower_quartile']:.3f} – {rate['upper_quartile']:.3f} | {rate['least']:.3f} – {rate['most']:.3f} | "
                f"{cpu['median']:.3f} ({cpu['least']:.3f} – {cpu['most']:.3f}) | {rate['n']} |")
        same = "; ".join(f"{names} {of['same']} of {of['of']}" for names, of in found["same_texts"].items())
        lines += ["", f"Same texts under load: {same}. Rounds in which other work took too much: {len(found['noisy_rounds'])}.", ""]
    same = "; ".join(f"{names} {of['same']} of {of['of']}" for names, of in summary["same_texts_alone"].items())
    lines.append(f"Same texts alone: {same}. Left out: {len(summary['left_out'])} questions. A prompt has {summary['prompt_tokens']} tokens.")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pilotfish", required=True, help="the command")
    parser.add_argument("--llama-server", required=True, help="the command")
    parser.add_argument("--llama-server-option", action="append", default=[], help="one more word for its command line")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name that `pilotfish models path` knows, or a GGUF file")
    parser.add_argument("--guards", type=Path, help="a guard, or a directory of guards as the server takes it: a third to compare")
    parser.add_argument("--modes", default="whole,streamed")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20, help="of a round, once its first answers are there")
    parser.add_argument(
        "--most-other", type=float, default=0.1,
        help="cores that other work may take in a round that counts: threads that wait for each other actively are slowed many times over by little of it")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--parallel", type=int, default=8, help="requests that a server answers at once")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="how many of the list are asked")
    parser.add_argument("--alone", type=int, default=16, help="how many of them also with nothing else at the time, to compare texts")
    parser.add_argument("--before", default="", help="text before each question's own, to make prompts longer: `%%` is the question's number")
    parser.add_argument("--wait-policy", choices=["default", "passive", "active"], default="default", help="OMP_WAIT_POLICY of all servers")
    parser.add_argument("--json", action="store_true", help="all there is, as JSON to stdout")
    arguments = parser.parse_args()
    # What is started is ended, whoever ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.threads = len(os.sched_getaffinity(0))
    modes = arguments.modes.split(",")
    if unknown := set(modes) - {"whole", "streamed"}:
        parser.error(f"--modes: {unknown}")
    with tempfile.TemporaryDirectory(prefix="pilotfish-throughput-") as folder:
        summary = compare(arguments, modes, Path(folder))
    print(json.dumps(summary, indent=1, ensure_ascii=False) if arguments.json else table(summary))
    return 0


def compare(arguments, modes, folder):
    gguf = arguments.model
    if not Path(gguf).is_file():
        gguf = subprocess.run([arguments.pilotfish, "models", "path", gguf], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    environment = {} if arguments.wait_policy == "default" else {"OMP_WAIT_POLICY": arguments.wait_policy}
    (folder / "none").mkdir()
    servers = []
    try:
        # Neighbours are compared: llama.cpp's and ours, ours without guards and with them.
        servers.append(llama_server(arguments, gguf, environment))
        servers.append(pilotfish(arguments, PILOTFISH, folder / "none", environment))
        if arguments.guards:
            guards = arguments.guards
            if (guards / "guard.toml").is_file():
                shutil.copytree(guards, folder / "guards" / guards.resolve().name, ignore=shutil.ignore_patterns("report*", "prompts"))
                guards = folder / "guards"
            servers.append(pilotfish(arguments, GUARDED, guards, environment))
        say(", ".join(f"{server.name} at {server.address}" for server in servers))
        template = template_of(arguments.model, servers[0])
        prompts = [
            template(arguments.before.replace("%", str(number)) + question) for number, question in enumerate(QUESTIONS[: arguments.questions])]
        chosen, left_out, prompt_tokens = choose(servers, prompts, arguments)
        if len(chosen) < 2 * arguments.parallel:
            say(f"only {len(chosen)} questions: some will still be in a sequence when they come again")
        summary = {
            "model": arguments.model,
            "settings": {
                name: getattr(arguments, name)
                for name in ("clients", "parallel", "context", "batch", "threads", "tokens", "seconds", "rounds", "wait_policy", "llama_server_option")},
            "prompt_tokens": round(prompt_tokens, 1),
            "questions": len(chosen),
            "left_out": left_out,
            "same_texts_alone": alone(servers, chosen, prompts, arguments),
            "modes": {},
        }
        for mode in modes:
            rounds, noisy, texts = measure(servers, chosen, prompts, arguments, mode == "streamed")
            summary["modes"][mode] = summed_up(servers, rounds, noisy) | {"same_texts": alike_under_load(texts)}
        return summary
    finally:
        for server in servers:
            server.end()


if __name__ == "__main__":
    sys.exit(main())
