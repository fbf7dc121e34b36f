#!/usr/bin/env python3
"""How many of a burst of connections llama.cpp's own server, with nothing attached, leaves without an answer while others are answered.

    connections.py --pilotfish target/debug/pilotfish --llama-server target/tools/llama-server/bin/llama-server [-- --threads-http 40]

Each connection is kept open and asks again as soon as it is answered. What follows `--` goes to the server.
"""

import argparse
import http.client
import json
import selectors
import socket
import subprocess
import sys
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--pilotfish", required=True, help="the command, which knows where the model is")
parser.add_argument("--llama-server", required=True)
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--connections", type=int, default=32)
parser.add_argument("--seconds", type=float, default=12)
parser.add_argument("rest", nargs="*", help="arguments of the server")
arguments = parser.parse_args()

command = [arguments.pilotfish, "models", "path", arguments.model]
model = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = probe.getsockname()
server = subprocess.Popen(
    [arguments.llama_server, "--model", model, "--host", "127.0.0.1", "--port", str(address[1]), "--parallel", "4", "--ctx-size", "2048", "--cache-ram", "0",
     "--threads", "1", "--threads-batch", "1", "--no-ui", *arguments.rest], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def is_ready():
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


try:
    patience = time.monotonic() + 180
    while not is_ready():
        if server.poll() is not None or time.monotonic() > patience:
            sys.exit(f"llama-server is not ready, and has ended with {server.poll()}")
        time.sleep(0.1)
    # The threads of these connections are idle again.
    time.sleep(6)
    body = json.dumps({"prompt": "Tell me of the sea", "n_predict": 4, "temperature": 0})
    request = f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    selector = selectors.DefaultSelector()
    for number in range(arguments.connections):
        connection = socket.create_connection(address)
        connection.sendall(request)
        selector.register(connection, selectors.EVENT_READ, number)
    answers = [0] * arguments.connections
    deadline = time.monotonic() + arguments.seconds
    while time.monotonic() < deadline:
        for key, _ in selector.select(0.5):
            try:
                received = key.fileobj.recv(1 << 20)
                # The body, which is small, ends the answer.
                if received.rstrip().endswith(b"}"):
                    answers[key.data] += 1
                    key.fileobj.sendall(request)
            except ConnectionError:
                received = b""
            if not received:
                # It has had as many answers as the server gives one connection.
                selector.unregister(key.fileobj)
finally:
    server.kill()
    server.wait()
print(f"{sum(answers)} answers in {arguments.seconds:.0f} s; {answers.count(0)} of {arguments.connections} connections had none")
