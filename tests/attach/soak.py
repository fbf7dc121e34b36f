#!/usr/bin/env python3
"""Keeps llama.cpp's own server, attached, under load while its guard is rewritten, and looks for what must not be.

    soak.py --pilotfish target/debug/pilotfish --llama-server target/tools/llama-server/bin/llama-server --seconds 300

Clients ask what is harmful and what is not. Each second the guard's manifest is replaced by renaming, with another message each time and, in turns of
some seconds, with its own threshold or with one that no prompt reaches; every tenth is broken. An answer to what is harmful must be a whole message that
was written, where the threshold was its own from before it was asked to its end, and none where it was out of reach as long; one to what is harmless
is never a message.

Progress goes to stderr, a summary as JSON to stdout. Ends with 1 if a check fails. Linux (for the memory), Python 3.9, nothing else.
"""

import argparse
import collections
import http.client
import json
import os
import random
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
# How many manifests in a row block, or do not, and how long one takes to be in force at most.
TURN, SETTLES = 20, 2.0
OUT_OF_REACH = 1e6
BREAKS = [
    lambda text: text[: len(text) // 2],
    lambda text: text + "\nnonsense = 1\n",
    lambda text: re.sub(r"(?m)^threshold = .*$", "threshold = nan", text),
    lambda text: "",
    lambda text: re.sub(r'(?m)^sha256 = "[0-9a-f]{64}"$', f'sha256 = "{"0" * 64}"', text, count=1),
]


def say(*words):
    print(f"[{time.strftime('%H:%M:%S')}]", *words, file=sys.stderr, flush=True)


def message(number):
    return f"Message number {number} of the guard."


def manifest_at(text, number, blocks):
    text = re.sub(r'(?m)^message = ".*"$', f'message = "{message(number)}"', text, count=1)
    assert message(number) in text, "the guard has no message"
    return text if blocks else re.sub(r"(?m)^threshold = .*$", f"threshold = {OUT_OF_REACH}", text)


class Server:
    """llama-server, attached."""

    def __init__(self, arguments, model, guards):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # As docs/attach.md tells operators to.
        command = [
            arguments.pilotfish, "attach", "--guards", guards, "--", arguments.llama_server, "--model", model, "--host", "127.0.0.1", "--port", self.port,
            "--parallel", arguments.slots, "--ctx-size", 512 * arguments.slots, "--cache-ram", 0, "--no-cache-prompt", "--threads", arguments.threads,
            # Where many connections come at once, the server's own number may leave some without a thread until others close (docs/attach.md).
            "--threads-batch", arguments.threads, "--threads-http", arguments.clients + 8, "--no-ui", "--log-verbosity", 2]
        self.log = collections.deque(maxlen=100)
        self.counts = collections.Counter()
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            env=os.environ | {"PILOTFISH_LOG": "pilotfish=info,pilotfish_attach=info"})
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + 180
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise RuntimeError("llama-server does not start:\n" + "\n".join(self.log))
            time.sleep(0.1)

    def _read(self):
        # To the end, or it would wait for us.
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            for name, pattern in [("reloads", r"epoch \d+: guarded by"), ("broken", "stays in force"), ("blocked", " blocks: gate "), ("faults", "failed|NOT GUARDED|refused")]:
                self.counts[name] += bool(re.search(pattern, line))

    def _is_ready(self):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def rss_mib(self):
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) / 1024 if found else None

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "it did not end"


class Soak:
    def __init__(self, arguments, server, manifest, text, prompts):
        self.arguments, self.server, self.manifest, self.text, self.prompts = arguments, server, manifest, text, prompts
        self.enough = threading.Event()
        self.lock = threading.Lock()
        # (when, whether it blocks), of those that are whole.
        self.writes = []
        self.n_broken = 0
        self.answers, self.failures, self.wrong, self.waits, self.rss = collections.Counter(), [], [], [], []

    def write(self, number):
        blocks = number // TURN % 2 == 0
        broken = number % 10 == 9
        text = manifest_at(self.text, number, blocks)
        if broken:
            text = BREAKS[number // 10 % len(BREAKS)](text)
        beside = self.manifest.with_name("guard.toml.new")
        beside.write_text(text)
        os.rename(beside, self.manifest)
        with self.lock:
            self.n_broken += broken
            if not broken:
                self.writes.append((time.monotonic(), number, blocks))

    def rewriter(self):
        number, due = 0, time.monotonic()
        while not self.enough.is_set():
            number += 1
            self.write(number)
            due += 1
            self.enough.wait(max(0, due - time.monotonic()))

    def watcher(self):
        while not self.enough.is_set():
            self.rss.append((time.monotonic(), self.server.rss_mib()))
            self.enough.wait(1)

    def in_force(self, began, ended):
        """Numbers of the manifests that may have been in force for a prompt that was read between these, and whether each blocks."""
        with self.lock:
            last = max((index for index, (when, *_) in enumerate(self.writes) if when <= began - SETTLES), default=0)
            return {number: blocks for when, number, blocks in self.writes[last:] if when <= ended}

    def client(self, seed):
        pick = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=180)
        while not self.enough.is_set():
            is_harmful = pick.random() < 0.5
            tokens = pick.choice(self.prompts["harmful" if is_harmful else "harmless"])
            body = {"prompt": tokens, "n_predict": 24, "temperature": 0, "top_k": 1}
            began = time.monotonic()
            try:
                connection.request("POST", "/completion", json.dumps(body), {"content-type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {answer}")
                text, stop = answer["content"], answer["stop_type"]
            except Exception as error:  # whatever it is, it is a request that failed
                with self.lock:
                    self.failures.append(f"{type(error).__name__}: {error}")
                say("a request failed:", repr(error))
                connection.close()
                time.sleep(0.5)
                continue
            ended = time.monotonic()
            may = self.in_force(began, ended)
            said = next((number for number in may if text == message(number) and stop == "eos"), None)
            wrong = None
            if said is not None and not (is_harmful and may[said]):
                wrong = "a message that should not be"
            elif said is None and is_harmful and all(may.values()):
                wrong = "no message, or none that was in force"
            elif said is None and text.startswith("Message number"):
                wrong = "a message that was not in force, or a part of one"
            with self.lock:
                self.waits.append(ended - began)
                self.answers["blocked" if said is not None else "harmful, let through" if is_harmful else "harmless"] += 1
                if wrong:
                    self.wrong.append(f"{wrong}: {text!r} ({stop}), where {may} may have been in force")
            if wrong:
                say("WRONG:", self.wrong[-1])
        connection.close()

    def run(self):
        began = time.monotonic()
        threads = [threading.Thread(target=self.client, args=(number,), daemon=True) for number in range(self.arguments.clients)]
        threads += [threading.Thread(target=work, daemon=True) for work in (self.rewriter, self.watcher)]
        for thread in threads:
            thread.start()
        while time.monotonic() - began < self.arguments.seconds and self.server.process.poll() is None:
            time.sleep(1)
            if len(self.rss) % 30 == 0:
                say(f"{time.monotonic() - began:.0f} s: {dict(self.answers)}, {dict(self.server.counts)}, {self.rss[-1][1]:.1f} MiB")
        self.enough.set()
        for thread in threads:
            thread.join()
        return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pilotfish", required=True, help="the command")
    parser.add_argument("--llama-server", required=True, help="the command, with llama.cpp as shared libraries")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--guard", type=Path, default=HERE.parents[1] / "guards/harm-gate-gemma3-to-smollm2", help="one whose gate blocks with a message; it is copied")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of the server's: more wait for each other actively, and stand still where other work takes a core")
    parser.add_argument("--growth-mib", type=float, default=16, help="memory that may be gained from the first minute's end to the last half minute")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pilotfish-soak-") as folder:
        summary = soak(arguments, Path(folder))
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    return 0 if all(summary["checks"].values()) else 1


def soak(arguments, folder):
    command = [arguments.pilotfish, "models", "path", arguments.model]
    model = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    prompts = {}
    for kind, texts in json.loads((HERE / "prompts.json").read_text()).items():
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        command = [arguments.pilotfish, "tokens", "--model", arguments.model, "--prompts", path, "--json"]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        prompts[kind] = [json.loads(line)["tokens"] for line in lines]
    guard = folder / "guards" / "soaked"
    shutil.copytree(arguments.guard, guard, ignore=shutil.ignore_patterns("report*", "prompts"))
    mappings = arguments.guard.resolve().parent / "mappings"
    if mappings.is_dir():
        shutil.copytree(mappings, folder / "guards" / "mappings")
    manifest = guard / "guard.toml"
    text = manifest.read_text()
    run = Soak(arguments, None, manifest, text, prompts)
    run.write(0)
    run.server = server = Server(arguments, model, folder / "guards")
    say(f"{arguments.clients} clients at port {server.port} for {arguments.seconds:.0f} s")
    try:
        elapsed = run.run()
        alive = server.process.poll() is None
    finally:
        status = server.end()
    # The second half of the first minute, and the last half minute.
    mean = lambda samples: round(statistics.fmean(mib for _, mib in samples if mib), 1)
    early, late = mean(run.rss[:60][-30:]), mean(run.rss[-30:])
    n_whole, counts = len(run.writes) - 1, server.counts
    checks = {
        "it lives": alive,
        "no request failed": not run.failures and sum(run.answers.values()) > 0,
        "answers are those of the guard that was in force": not run.wrong,
        "there are answers of each kind": all(run.answers[kind] for kind in ("blocked", "harmful, let through", "harmless")),
        "every message was told in the log": counts["blocked"] >= run.answers["blocked"],
        "guards were reloaded": counts["reloads"] >= 0.9 * n_whole,
        "broken ones were told of": counts["broken"] >= 0.9 * run.n_broken,
        "no guard failed": counts["faults"] == 0,
        "memory": late - early <= arguments.growth_mib,
    }
    return {
        "ok": all(checks.values()),
        "checks": checks,
        "seconds": round(elapsed, 1),
        "answers": dict(run.answers) | {"all": sum(run.answers.values())},
        "answer_seconds_median": round(statistics.median(run.waits), 2) if run.waits else None,
        "failures": {"n": len(run.failures), "first": run.failures[:5]},
        "wrong": {"n": len(run.wrong), "first": run.wrong[:5]},
        "rewrites": {"whole": n_whole, "broken": run.n_broken},
        "log": dict(counts),
        "rss_mib": {"early": early, "late": late, "most": round(max(mib or 0 for _, mib in run.rss), 1)},
        "exit_status": status,
    }


if __name__ == "__main__":
    sys.exit(main())
