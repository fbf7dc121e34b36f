#!/usr/bin/env python3
"""Keeps `pilotfish serve` under load while its guard is rewritten, and looks for what must not be.

    soak.py --pilotfish target/release/pilotfish --model smollm2-135m-instruct --guard guards/refusal-smollm2 --seconds 600

Clients send short greedy completions whose prompts begin alike; meanwhile the guard's manifest is replaced by renaming, each time with another
strength, and every tenth time with one that is broken. Afterwards each prompt is answered again at each strength, alone, by a server of its own that
has read nothing before: an answer under load must be that one.

Progress goes to stderr, a summary as JSON to stdout. Ends with 1 if a check fails. Linux (for the memory), Python 3.9, nothing else.
"""

import argparse
import collections
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# So far from each other that what they do to numbers is more than what batching does.
STRENGTHS = [-4.0, -2.0, 0.0, 1.0, 2.0, 4.0]
MAX_TOKENS = 8
DEBOUNCE_MS = 50
# Two tokens whose log-probabilities are nearer than this are as good as each other: which comes first hangs on how rows were batched.
TIE = 1e-3
# The drift of answers that have nothing in common.
FAR = 99.0
# How often a request is streamed, and how often its client goes away in the middle of it.
STREAMED, LEFT = 0.2, 0.02

PREFIXES = [
    "The harbour lies at the mouth of the river, where the water is brown in spring and green in summer. Every morning the boats go out before "
    "it is light, and every evening they come back with what the sea has given them. On the quay there is",
    "To make bread you need flour, water, salt and yeast, a large bowl, and above all time. Mix the flour with the salt, stir the yeast into "
    "lukewarm water, and bring both together until there is no dry flour left. Then",
    "Question: A train leaves the station at nine in the morning and travels at sixty miles an hour. A second train leaves an hour later and "
    "travels at eighty miles an hour on the track beside it. Answer:",
    "def read_all(folder):\n    \"\"\"Reads every file of a folder and returns what is in them, by their names.\"\"\"\n    found = {}\n"
    "    for name in sorted(os.listdir(folder)):\n        path = os.path.join(folder, name)\n",
]
# Some go on where others end.
TAILS = [
    "",
    " a small",
    " a small house that",
    " a small house that nobody has lived in for years, and",
    " the first",
    " the first thing that you have to do is",
    " the first thing that you have to do is to wait until",
    " we know that",
    " we know that it is not far from here, because",
    " it",
    " it should be remembered that",
    "\n\nAnd in the end,",
]
PROMPTS = [prefix + tail for prefix in PREFIXES for tail in TAILS]


def say(*words):
    print(f"[{time.strftime('%H:%M:%S')}]", *words, file=sys.stderr, flush=True)


# --- The guard's manifest ------------------------------------------------------------------------------------------------------------------------------

def sections(text):
    """The manifest cut before each header of a table."""
    return re.split(r"(?m)^(?=\[)", text)


def manifest_at(text, strength, number):
    """The manifest with interventions that always act, on every token, at `strength`; no two numbers give the same file."""
    def steered(section):
        if not section.startswith("[[intervention]]"):
            return section
        section = re.sub(r"(?m)^(when|positions|strength)\s*=.*\n", "", section)
        return section.rstrip("\n") + f'\nstrength = {float(strength)!r}\npositions = "all"\n\n'
    written = "".join(steered(section) for section in sections(text))
    assert written.count("strength = ") >= 1, "the guard has no intervention"
    return re.sub(r'(?m)^description = ".*"$', f'description = "soak {number}"', written, count=1)


# What no server may take. Each has a strength of its own, to be known by.
FORBIDDEN = 99.0
BREAKS = {
    "unknown key": lambda text: text + "\nnonsense = 1\n",
    "cut in the middle": lambda text: text[: text.index("strength = ") + 10],
    "empty": lambda text: "",
    "not a number": lambda text: text.replace(f"strength = {FORBIDDEN!r}", "strength = nan"),
    "other tensors": lambda text: re.sub(r'(?m)^sha256 = "[0-9a-f]{64}"$', f'sha256 = "{"0" * 64}"', text, count=1),
    # This one can be read, and is for another model.
    "other model": lambda text: re.sub(r'(?m)^fingerprint = "[0-9a-f]{64}"$', f'fingerprint = "{"0" * 64}"', text, count=1),
}


def replace(manifest, text):
    """Replaces a file by one that is whole at once. Returns when."""
    beside = manifest.with_name(manifest.name + ".new")
    beside.write_text(text)
    os.rename(beside, manifest)
    return time.monotonic()


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


# --- The server ----------------------------------------------------------------------------------------------------------------------------------------

class Server:
    def __init__(self, arguments, guards, parallel=None):
        command = [arguments.pilotfish, "serve", "--listen", "127.0.0.1:0", "--model", arguments.model, "--guards", str(guards)]
        if parallel:
            command += ["--parallel", str(parallel)]
        limits = {"QUEUE": 8 * arguments.clients + 64, "CONTEXT": 512}
        environment = {f"PILOTFISH_SERVE__LIMITS__{name}": str(value) for name, value in limits.items()}
        environment |= {"PILOTFISH_SERVE__RELOAD__DEBOUNCE_MS": str(DEBOUNCE_MS), "PILOTFISH_LOG": "pilotfish=info"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            env=os.environ | environment)
        self.log = collections.deque(maxlen=200)
        self.reloads = []
        self.address = None
        self.known = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.known.wait(120)
        if self.address is None:
            self.process.kill()
            raise RuntimeError("the server does not listen:\n" + "\n".join(self.log))

    def _read(self):
        # To the end, or it would wait for us.
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            reloaded = re.search(r"guards are reloaded .*after=([0-9.]+)(ms|s)", line)
            if reloaded:
                self.reloads.append(float(reloaded[1]) * (1000 if reloaded[2] == "s" else 1))
            found = re.match(r"listening on http://(\S+) under ", line)
            if found:
                self.address = found[1]
                self.known.set()
        self.known.set()

    def rss_kib(self):
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) if found else 0

    def end(self):
        """Asks it to end. Returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "it did not end"


class Wire:
    """A connection that is kept."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=180)

    def ask(self, method, path, body=None):
        headers = {"content-type": "application/json"} if body is not None else {}
        self.connection.request(method, path, None if body is None else json.dumps(body), headers)
        return self.connection.getresponse()

    def json(self, path):
        response = self.ask("GET", path)
        return json.loads(response.read())

    def close(self):
        self.connection.close()


class Wrong(Exception):
    """An answer that is not as it must be."""


def body_of(prompt, stream=False):
    return {"prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS, "logprobs": 2, "stream": stream}


def whole(response):
    """What an answer says: text, tokens, their log-probabilities, the two likeliest of each, epochs, the gates' scores and the counts."""
    data = response.read()
    if response.status != 200:
        raise Wrong(f"{response.status}: {data[:300]!r}")
    answer = json.loads(data)
    [choice] = answer["choices"]
    return told(response, choice["text"], choice["logprobs"], answer["guard"], choice["guard"], answer["usage"])


def streamed(response):
    if response.status != 200:
        raise Wrong(f"{response.status}: {response.read()[:300]!r}")
    text, guard, own, done = "", None, None, False
    probabilities = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    for line in response.read().decode().splitlines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            done = True
            continue
        piece = json.loads(line[6:])
        if "error" in piece:
            raise Wrong(f"in a stream: {piece['error']}")
        for choice in piece["choices"]:
            text += choice["text"]
            for key, list_of in probabilities.items():
                list_of.extend((choice["logprobs"] or {}).get(key, []))
            own = choice.get("guard", own)
        guard = piece.get("guard", guard)
    if not done or guard is None or own is None:
        raise Wrong("a stream without an end")
    return told(response, text, probabilities, guard, own, None)


def told(response, text, probabilities, guard, own, usage):
    cached = None if usage is None else usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "text": text,
        "tokens": probabilities["tokens"],
        "logprobs": probabilities["token_logprobs"],
        "likeliest": probabilities["top_logprobs"],
        "epoch": guard["epoch"],
        "header": response.getheader("x-pilotfish-epoch"),
        "scores": [gate["score"] for gate in own["gates"]],
        "cached": cached,
        "prompt_tokens": None if usage is None else usage["prompt_tokens"],
    }


# --- Under load ----------------------------------------------------------------------------------------------------------------------------------------

class Soak:
    def __init__(self, arguments, server, manifest, text):
        self.arguments, self.server, self.manifest, self.text = arguments, server, manifest, text
        # Clients and rewriter end with the one; the watcher outlives them, so as to see what they did last.
        self.enough, self.end = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.answers = []
        self.failures = []
        self.left = 0
        self.waits = []
        # By the sha256 of its bytes: (number, strength), or None for a broken one.
        self.written = {}
        # (when, sha256, kind of break or None)
        self.writes = []
        # By its number: when it was first seen, its strength, and the sha256 of its manifest.
        self.epochs = {}
        self.seen = 0
        self.degraded = []
        self.faults = []
        self.rss = []

    def note(self, what):
        with self.lock:
            self.faults.append(what)
        say("WRONG:", what)

    def client(self, number):
        pick = random.Random(number)
        wire = Wire(self.server.address)
        while not self.enough.is_set():
            # Those of one epoch and of the next have much to share, and those of the next must not.
            prompt = self.seen // 3 % len(PREFIXES) * len(TAILS) + pick.randrange(len(TAILS))
            # Neighbours come together often enough for one to go on where the other has been read.
            for index in (prompt, (prompt + 1) % len(PROMPTS)):
                if self.enough.is_set():
                    break
                stream, leaves = pick.random() < STREAMED, pick.random() < LEFT
                before, began = self.seen, time.monotonic()
                try:
                    response = wire.ask("POST", "/v1/completions", body_of(PROMPTS[index], stream or leaves))
                    if leaves:
                        response.close()
                        wire.close()
                        with self.lock:
                            self.left += 1
                        continue
                    answer = streamed(response) if stream else whole(response)
                except Exception as error:  # whatever it is, it is a request that failed
                    with self.lock:
                        self.failures.append(f"{type(error).__name__}: {error}")
                    say("a request failed:", repr(error))
                    wire.close()
                    wire = Wire(self.server.address)
                    time.sleep(0.5)
                    continue
                answer["prompt"] = index
                with self.lock:
                    self.answers.append(answer)
                    self.waits.append(time.monotonic() - began)
                if answer["header"] != str(answer["epoch"]):
                    self.note(f"the header names epoch {answer['header']}, the body {answer['epoch']}")
                if answer["epoch"] < before:
                    self.note(f"epoch {answer['epoch']} answers what was asked when {before} was in force")
        wire.close()

    def rewriter(self):
        number, last = 0, None
        pick = random.Random(0)
        kinds = list(BREAKS)
        due = time.monotonic()
        if not self.arguments.rewrite_ms:
            self.enough.wait()
        while not self.enough.is_set():
            number += 1
            kind = None
            if number % 10 == 0:
                kind = kinds[number // 10 % len(kinds)]
                text = BREAKS[kind](manifest_at(self.text, FORBIDDEN, number))
                self.written[digest(text)] = None
            else:
                last = pick.choice([strength for strength in STRENGTHS if strength != last])
                text = manifest_at(self.text, last, number)
                self.written[digest(text)] = (number, last)
            self.writes.append((replace(self.manifest, text), digest(text), kind))
            due += self.arguments.rewrite_ms / 1000
            self.enough.wait(max(0, due - time.monotonic()))
        # The last is a whole one, and has to be in force in the end.
        text = manifest_at(self.text, STRENGTHS[0], number + 1)
        self.written[digest(text)] = (number + 1, STRENGTHS[0])
        self.writes.append((replace(self.manifest, text), digest(text), None))

    def look(self, wire, when=None):
        """Reads what is in force, and which strength it has."""
        now = wire.json("/v1/guards")
        when = when or time.monotonic()
        epoch, [guard] = now["epoch"], now["data"]
        strengths = {intervention["strength"] for intervention in guard["interventions"]}
        if len(strengths) != 1:
            self.note(f"epoch {epoch} has strengths {strengths}")
        strength, content = strengths.pop(), guard["content"]
        known = self.epochs.setdefault(epoch, {"when": when, "strength": strength, "content": content})
        if (known["strength"], known["content"]) != (strength, content):
            self.note(f"epoch {epoch} is first {known} and then strength {strength}, {content}")
        meant = self.written.get(content)
        if meant is None:
            self.note(f"epoch {epoch} is a broken guard, or one that was never written: {content}, strength {strength}")
        elif abs(meant[1] - strength) > 1e-6:
            self.note(f"epoch {epoch} has strength {strength}, where its manifest has {meant[1]}")

    def watcher(self):
        wire, guards = Wire(self.server.address), Wire(self.server.address)
        was_degraded = False
        while not self.end.is_set():
            try:
                health = wire.json("/health")
                when = time.monotonic()
                epoch, degraded = health["epoch"], health["status"] == "degraded"
                if epoch < self.seen:
                    self.note(f"/health goes back from epoch {self.seen} to {epoch}")
                if epoch != self.seen:
                    self.look(guards, when)
                    self.seen = epoch
                if degraded and not was_degraded:
                    self.degraded.append(when)
                was_degraded = degraded
            except Exception as error:
                self.note(f"/health: {error!r}")
                time.sleep(0.5)
                wire, guards = Wire(self.server.address), Wire(self.server.address)
            time.sleep(0.005)

    def run(self):
        first = self.manifest.read_text()
        self.written[digest(first)] = (0, STRENGTHS[0])
        self.look(Wire(self.server.address))
        self.seen = max(self.epochs)
        watcher = threading.Thread(target=self.watcher)
        threads = [threading.Thread(target=self.client, args=(number,)) for number in range(self.arguments.clients)]
        threads.append(threading.Thread(target=self.rewriter))
        watcher.start()
        began = time.monotonic()
        for thread in threads:
            thread.start()
        while (at := time.monotonic() - began) < self.arguments.seconds and self.server.process.poll() is None:
            self.rss.append((at, self.server.rss_kib()))
            if len(self.rss) % 30 == 0:
                say(f"{at:.0f} s: {len(self.answers)} answers, {len(self.failures)} failures, epoch {self.seen}, {self.rss[-1][1] / 1024:.1f} MiB")
            time.sleep(max(0, began + len(self.rss) - time.monotonic()))
        self.enough.set()
        for thread in threads:
            thread.join()
        patience = time.monotonic() + 10
        while time.monotonic() < patience and self.epochs.get(self.seen, {}).get("content") != self.writes[-1][1]:
            time.sleep(0.02)
        self.end.set()
        watcher.join()
        self.elapsed = time.monotonic() - began
        if self.epochs.get(self.seen, {}).get("content") != self.writes[-1][1]:
            self.note("what was written last is not in force 10 s later")

    def latencies(self):
        """Milliseconds from each whole manifest's renaming until /health showed its epoch, less the debounce; and how many never were in force."""
        shown = {epoch["content"]: epoch["when"] for epoch in self.epochs.values()}
        found, never = [], []
        for when, content, kind in self.writes:
            if kind is None and content in shown:
                found.append(1000 * (shown[content] - when) - DEBOUNCE_MS)
            elif kind is None:
                never.append(content)
        return found, len(never)



# --- Alone ---------------------------------------------------------------------------------------------------------------------------------------------

def replay(arguments, guards, manifest, text, prompts, strengths):
    """Each prompt's answer at each strength, by servers that have read nothing before: {(prompt, strength): answer}."""
    found = {}
    for strength in strengths:
        replace(manifest, manifest_at(text, strength, "alone"))
        server = Server(arguments, guards, parallel=1)
        try:
            wire = Wire(server.address)
            for index in prompts:
                # Something else in between, so that nothing of a prompt has been read before.
                whole(wire.ask("POST", "/v1/completions", body_of("%") | {"max_tokens": 1}))
                answer = whole(wire.ask("POST", "/v1/completions", body_of(PROMPTS[index])))
                if answer["cached"] > 1:
                    raise Wrong(f"{answer['cached']} tokens of the reference had been read before")
                found[index, strength] = answer
        finally:
            server.end()
        say(f"alone at {strength}: {len(prompts)} prompts, {len({found[index, strength]['text'] for index in prompts})} texts")
    return found


def gap(answer, at):
    """By how much the token at `at` is likelier than the next; none where there is no such token."""
    if at >= len(answer["likeliest"]):
        return None
    ranked = sorted(answer["likeliest"][at].values(), reverse=True)
    return ranked[0] - ranked[1] if len(ranked) > 1 else 0.0


def drift(answer, reference, most=MAX_TOKENS):
    """The largest difference of the two likeliest tokens' log-probabilities, up to where the tokens part and there too, and how many tokens that is;
    no further than `most`."""
    found = []
    for ours, theirs, a, b in zip(answer["tokens"][:most], reference["tokens"], answer["likeliest"], reference["likeliest"]):
        found.append(max((abs(value - b[token]) for token, value in a.items() if token in b), default=FAR))
        if ours != theirs:
            break
    return max(found, default=FAR), len(found)


def nearer(answer, references, prompt, strength, limit):
    """The strengths whose numbers are nearer to an answer's than those of its own are, over the same tokens. Batching alone moves numbers, so one
    counts only if it lies further than twice `limit` from its own."""
    found = {}
    for other in STRENGTHS:
        if other == strength or (prompt, other) not in references:
            continue
        far, n = drift(answer, references[prompt, other])
        own, _ = drift(answer, references[prompt, strength], n)
        apart, _ = drift(references[prompt, strength], references[prompt, other], n)
        if far < own and apart > 2 * limit:
            found[other] = {"tokens": n, "own": own, "other": far, "apart": apart}
    return found


def compare(soak, references, strengths, limit):
    """What answers under load differ in from those alone."""
    counts = collections.Counter()
    different, drifts, scores, examples, suspects = [], {"read anew": [], "reused": [], "streamed": []}, [], [], []
    for answer in soak.answers:
        epoch = soak.epochs.get(answer["epoch"])
        if epoch is None:
            counts["epoch not attributed"] += 1
            continue
        prompt = answer["prompt"]
        strength = min(strengths, key=lambda strength: abs(strength - epoch["strength"]))
        reference = references.get((prompt, strength))
        if reference is None:
            counts["not replayed"] += 1
            continue
        counts["compared"] += 1
        scores.extend(abs(a - b) for a, b in zip(answer["scores"], reference["scores"]))
        own, _ = drift(answer, reference)
        # What was computed at another strength shows in numbers before it shows in words.
        found = nearer(answer, references, prompt, strength, limit)
        if found:
            counts["numbers nearer to another strength"] += 1
            suspects.append({"prompt": prompt, "strength": strength, "cached_tokens": answer["cached"], "nearer": found,
                             "under_load": answer["text"], "alone": reference["text"]})
        kind = "streamed" if answer["cached"] is None else "reused" if answer["cached"] else "read anew"
        counts[f"same to the last bit, {kind}"] += own == 0
        drifts[kind].append(own)
        if answer["text"] == reference["text"]:
            continue
        counts["other text"] += 1
        pairs = enumerate(zip(answer["tokens"], reference["tokens"]))
        at = next((at for at, (ours, theirs) in pairs if ours != theirs), min(len(answer["tokens"]), len(reference["tokens"])))
        gaps = [gap for gap in (gap(answer, at), gap(reference, at)) if gap is not None]
        nearest = min(gaps, default=None)
        tie = nearest is not None and nearest < TIE
        alike = [other for other in strengths if other != strength and references[prompt, other]["text"] == answer["text"]]
        counts["other text, a tie"] += tie
        counts["other text, that of another strength"] += bool(alike)
        counts["other text, that of another strength, and nearer to it in numbers"] += any(other in found for other in alike)
        if nearest is not None:
            different.append(nearest)
        if len(examples) < 8:
            examples.append({
                "prompt": prompt, "strength": strength, "epoch": answer["epoch"], "cached_tokens": answer["cached"], "token": at, "gap": nearest,
                "drift": own, "under_load": answer["text"], "alone": reference["text"], "as_at": alike,
            })
    return counts, different, drifts, scores, examples, suspects


# --- What comes of it ----------------------------------------------------------------------------------------------------------------------------------

def spread(values, digits=3):
    if not values:
        return None
    values = sorted(values)
    at = lambda part: round(values[min(len(values) - 1, int(part * len(values)))], digits)
    return {"n": len(values), "median": round(statistics.median(values), digits), "p90": at(0.9), "p99": at(0.99), "max": round(values[-1], digits)}


def memory(samples):
    """MiB: what it grows by in a minute after the first, and from the second minute's mean to the last minute's."""
    later = [(at, kib / 1024) for at, kib in samples if at >= 60]
    found = {"first": round(samples[0][1] / 1024, 2), "last": round(samples[-1][1] / 1024, 2), "max": round(max(kib for _, kib in samples) / 1024, 2)}
    if len(later) < 2:
        return found
    at_mean, mean = (statistics.fmean(column) for column in zip(*later))
    variance = sum((at - at_mean) ** 2 for at, _ in later)
    found["slope_per_minute"] = round(60 * sum((at - at_mean) * (mib - mean) for at, mib in later) / variance, 4)
    second = [mib for at, mib in later if at < 120]
    last = [mib for at, mib in later if at >= samples[-1][0] - 60]
    found |= {"second_minute": round(statistics.fmean(second), 2), "last_minute": round(statistics.fmean(last), 2)}
    found["growth"] = round(found["last_minute"] - found["second_minute"], 2)
    by_minute = collections.defaultdict(list)
    for at, kib in samples:
        by_minute[int(at // 60)].append(kib / 1024)
    found["means_of_minutes"] = [round(statistics.fmean(mibs), 1) for mibs in by_minute.values()]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pilotfish", required=True, help="the command")
    parser.add_argument("--model", required=True)
    parser.add_argument("--guard", required=True, type=Path, help="a guard with an intervention; it is copied")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rewrite-ms", type=float, default=500, help="0 leaves the guard as it is: what differs then is batching's doing")
    parser.add_argument("--replays", type=int, default=300, help="pairs of prompt and strength that are answered again, alone")
    parser.add_argument("--growth-mib", type=float, default=16, help="memory that may be gained from the second minute to the last")
    parser.add_argument("--drift", type=float, default=0.25, help="by how much batching alone may move log-probabilities")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pilotfish-soak-") as folder:
        summary = soak(arguments, Path(folder) / "guards")
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    return 0 if all(summary["checks"].values()) else 1


def soak(arguments, guards):
    shutil.copytree(arguments.guard, guards / "soaked", ignore=shutil.ignore_patterns("report", "prompts"))
    shared = arguments.guard.parent / "mappings"
    if shared.is_dir():
        shutil.copytree(shared, guards / "mappings")
    manifest = guards / "soaked" / "guard.toml"
    text = manifest.read_text()
    replace(manifest, manifest_at(text, STRENGTHS[0], 0))
    server = Server(arguments, guards)
    say(f"{arguments.clients} clients at {server.address} for {arguments.seconds:.0f} s")
    run = Soak(arguments, server, manifest, text)
    try:
        run.run()
        lines = Wire(server.address).ask("GET", "/metrics").read().decode().splitlines()
    finally:
        status = server.end()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "bucket" not in line)
    latencies, never = run.latencies()
    say(f"{len(run.answers)} answers; each is asked for again, alone")
    prompts = list(range(len(PROMPTS)))[: max(1, arguments.replays // len(STRENGTHS))]
    references = replay(arguments, guards, manifest, text, prompts, STRENGTHS)
    counts, different, drifts, scores, examples, suspects = compare(run, references, STRENGTHS, arguments.drift)
    distinct = [len({references[prompt, strength]["text"] for strength in STRENGTHS}) for prompt in prompts]

    apart = [
        min(drift(references[prompt, strength], references[prompt, other])[0] for other in STRENGTHS if other != strength)
        for prompt in prompts for strength in STRENGTHS
    ]
    broken = [write for write in run.writes if write[2]]
    grown = memory(run.rss)
    cached = [answer["cached"] for answer in run.answers if answer["cached"] is not None]
    unexplained = sum(1 for gap in different if gap >= TIE)
    checks = {
        "no request failed": not run.failures and bool(run.answers),
        "header, body and order of epochs": not run.faults,
        "no broken guard in force": not any(run.written.get(epoch["content"]) is None for epoch in run.epochs.values()),
        "broken guards are told of": len(run.degraded) >= min(1, len(broken)) and len(run.degraded) <= len(broken),
        "every epoch is attributed": counts["epoch not attributed"] == 0,
        "memory": grown.get("growth", 0) <= arguments.growth_mib,
        "no answer is that of another strength": counts["other text, that of another strength, and nearer to it in numbers"] == 0,
        "no numbers are those of another strength": counts["numbers nearer to another strength"] == 0,
        "prefixes are used again": sum(cached) > 0,
        "ends well": status == 0,
    }
    return {
        "ok": all(checks.values()),
        "checks": checks,
        "seconds": round(run.elapsed, 1),
        "answers": len(run.answers),
        "answers_per_second": round(len(run.answers) / run.elapsed, 2),
        "answer_seconds": spread(run.waits),
        "left_in_the_middle": run.left,
        "failures": {"n": len(run.failures), "first": run.failures[:5]},
        "faults": {"n": len(run.faults), "first": run.faults[:5]},
        "rewrites": {"whole": len(run.writes) - len(broken), "broken": len(broken), "degraded_seen": len(run.degraded), "whole_never_in_force": never},
        "epochs": {"last": run.seen, "seen": len(run.epochs), "answering": len({answer["epoch"] for answer in run.answers})},
        "reload_ms_less_debounce": spread(latencies, 1),
        "reload_ms_by_the_server_with_debounce": spread(server.reloads, 1),
        "rss_mib": grown,
        "prompt_tokens": {"all": metrics.get("pilotfish_prompt_tokens_total"), "reused": metrics.get("pilotfish_reused_prompt_tokens_total")},
        "answers_with_a_reused_prefix": {"n": sum(1 for n in cached if n), "of": len(cached)},
        "metrics": {name: value for name, value in metrics.items() if re.search("faults|reloads|requests_total|running|waiting", name)},
        "replay": {
            "pairs": len(references),
            "texts_of_a_prompt_by_strength": spread(distinct, 1),
            **counts,
            "other_text_and_no_tie": unexplained,
            "gap_where_texts_part": spread(different, 4),
            "drift_of_log_probabilities": {name: spread(values, 4) for name, values in drifts.items()},
            "drift_of_answers_alone_to_the_next_strength": {"least": round(min(apart), 4), "p10": round(sorted(apart)[len(apart) // 10], 4)} | spread(apart, 4),
            "drift_of_gate_scores": spread(scores, 5),
            "nearer_to_another_strength": suspects[:5],
            "examples": examples,
        },
        "exit_status": status,
        "log": list(server.log)[-6:],
    }


if __name__ == "__main__":
    sys.exit(main())
