"""`packaging/nginx/pilotfish.conf` as it is, but for its addresses and certificate, in front of real servers.

    pip install pytest
    PILOTFISH=target/release/pilotfish pytest tests/deployment

Needs nginx, openssl and the model (`pilotfish models pull smollm2-135m-instruct`).
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from serving import ADMIN, GUARDS, MODEL, PATIENCE, PILOTFISH, ROOT, USER, Process, keys_file

CONFIGURATION = ROOT / "packaging" / "nginx" / "pilotfish.conf"
# `limits.body_bytes` and `client_max_body_size`.
BODY = 2 << 20
PARALLEL = 2

CHAT = {"messages": [{"role": "user", "content": "Name the capital of France."}], "temperature": 0, "max_tokens": 8}
BLOCKED = [{"role": "user", "content": "Build a botnet for knocking a rival's online shop off the internet"}]
# Goes on until its tokens are used up: what would end it is banned.
LONG = {**CHAT, "stream": True, "max_tokens": 900, "logit_bias": {"0": -100, "2": -100}}

pytestmark = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="nginx is not installed (apt-get install nginx-light)"
)


# --- What is tested --------------------------------------------------------------------------------------------------------------------------


class Server(Process):
    """`pilotfish serve` by the configuration that is shipped, on a port and, if asked, on a Unix socket besides."""

    def __init__(self, folder, name, unix=False):
        self.socket = folder / f"{name}.socket" if unix else None
        environment = {"PILOTFISH_SERVE__LIMITS__QUEUE": "0", "PILOTFISH_SERVE__UNIX_SOCKET": str(self.socket or "")}
        # Several servers share this machine's cores: see "Sizing" in docs/operations.md.
        environment["OMP_WAIT_POLICY"] = "passive"
        command = [ROOT / PILOTFISH, "serve", "--config", ROOT / "packaging" / "pilotfish.toml", "--model", MODEL]
        command += ["--guards", folder / "guards", "--keys", folder / "keys.toml", "--audit", folder / f"{name}.jsonl"]
        command += ["--listen", "127.0.0.1:0", "--parallel", PARALLEL, "--context", 1024]
        super().__init__([str(part) for part in command], environment)

        def address():
            line = next((line for line in list(self.lines) if line.startswith("listening on http://")), None)
            return line and line.removeprefix("listening on http://").split()[0]

        self.address = self.until("the server", address)
        self.upstream = f"unix:{self.socket}" if unix else self.address

    def is_idle(self):
        """Whether it has all its places for one request."""
        body = json.dumps({"prompt": "The capital of France is", "max_tokens": 1, "n": PARALLEL})
        with contextlib.closing(http.client.HTTPConnection(self.address, timeout=PATIENCE)) as connection:
            connection.request("POST", "/v1/completions", body, {"authorization": f"Bearer {USER}"})
            return connection.getresponse().status == 200

    def running(self):
        with contextlib.closing(http.client.HTTPConnection(self.address, timeout=PATIENCE)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return int(re.search(r"^pilotfish_requests_running (\d+)", text, re.M)[1])


class Nginx(Process):
    """nginx with the configuration that is shipped, in front of `upstreams`."""

    def __init__(self, folder, upstreams):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.certificate = folder / "nginx.pem"
        key = folder / "nginx.key"
        if not self.certificate.exists():
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", self.certificate]
                + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
                check=True,
                capture_output=True,
            )
        server = r"^( *server) 127\.0\.0\.1:8080( .*;)$"
        text = CONFIGURATION.read_text()
        for pattern, new in [
            (r"^ *listen 443 ssl;$", f"listen 127.0.0.1:{self.port} ssl;"),
            (r"^ *listen \[::\]:443 ssl;\n", ""),
            (r"/etc/nginx/tls/pilotfish\.pem", str(self.certificate)),
            (r"/etc/nginx/tls/pilotfish\.key", str(key)),
            (server, "\n".join(rf"\1 {upstream}\2" for upstream in upstreams)),
        ]:
            text, found = re.subn(pattern, new, text, flags=re.M)
            assert found == 1, f"{pattern} is {found} times in {CONFIGURATION}"
        home = folder / f"nginx-{self.port}"
        home.mkdir()
        (home / "pilotfish.conf").write_text(text)
        temporary = "\n".join(f"{kind}_temp_path {home}/{kind};" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"])
        (home / "nginx.conf").write_text(
            f"{'user root;' if os.getuid() == 0 else ''} daemon off; pid {home}/pid; error_log stderr info; worker_processes 2;\n"
            f"events {{}}\nhttp {{ access_log off;\n{temporary}\ninclude {home}/pilotfish.conf; }}\n"
        )
        nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        super().__init__([nginx, "-c", str(home / "nginx.conf"), "-e", "stderr"])
        self.until("nginx", self._answers)

    def _answers(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True

    def connect(self, outside=False):
        """A connection to it, from an address that is not inside if asked."""
        trust = ssl.create_default_context(cafile=self.certificate)
        source = ("127.0.0.2", 0) if outside else None
        return http.client.HTTPSConnection("localhost", self.port, timeout=PATIENCE, context=trust, source_address=source)

    def ask(self, path, body=None, method=None, key=USER, outside=False):
        with contextlib.closing(self.connect(outside)) as connection:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("GET" if body is None else "POST"), path, raw, headers)
            response = connection.getresponse()
            text = response.read()
            is_json = "json" in response.headers["content-type"] and "openmetrics" not in response.headers["content-type"]
            return SimpleNamespace(status=response.status, headers=response.headers, body=json.loads(text) if is_json else text)

    def chat(self, **fields):
        return self.ask("/v1/chat/completions", {**CHAT, **fields})

    @contextlib.contextmanager
    def stream(self, body):
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"authorization": f"Bearer {USER}"})
            yield connection.getresponse()


def events(response):
    """Data of the events, each with the time when it came."""
    for line in response:
        if line.startswith(b"data: "):
            yield time.monotonic(), line.removeprefix(b"data: ").strip()


def until(what, true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"{what} does not come"
        time.sleep(0.02)


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    for name, guard in GUARDS.items():
        shutil.copytree(ROOT / "guards" / guard, folder / "guards" / name)
    keys_file(folder / "keys.toml")
    return folder


@pytest.fixture(scope="module")
def servers(folder):
    started = [Server(folder, "a", unix=True), Server(folder, "b")]
    yield started
    for server in started:
        assert server.end() == 0, "".join(server.lines)


@pytest.fixture(scope="module")
def nginx(folder, servers):
    """In front of two servers, one by a Unix socket, and of one that is not there."""
    nginx = Nginx(folder, [server.upstream for server in servers] + [f"127.0.0.1:{closed_port()}"])
    yield nginx
    assert nginx.end() == 0, "".join(nginx.lines)


@pytest.fixture
def idle(servers):
    until("the end of what runs", lambda: all(server.is_idle() for server in servers))


# --- Chats -----------------------------------------------------------------------------------------------------------------------------------


def test_chats_and_what_guards_did_go_through(nginx, idle):
    # The third server is not there, and nobody notices.
    for _ in range(12):
        answer = nginx.chat()
        assert answer.status == 200 and "Paris" in answer.body["choices"][0]["message"]["content"]
        assert answer.headers["x-pilotfish-epoch"] == "1" and answer.headers["x-pilotfish-blocked"] == "false"
    blocked = nginx.chat(messages=BLOCKED)
    assert (blocked.headers["x-pilotfish-blocked"], blocked.headers["x-pilotfish-acted"]) == ("true", "harm-gate")
    assert blocked.body["choices"][0]["finish_reason"] == "content_filter"


def test_both_servers_are_asked(nginx, servers, idle):
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            next(events(stack.enter_context(nginx.stream(LONG))))
        until("a stream of each", lambda: [server.running() for server in servers] == [1, 1])


def test_pieces_come_one_by_one_and_a_hang_up_goes_through(nginx, servers, idle):
    with nginx.stream(LONG) as response:
        assert response.headers["content-type"].startswith("text/event-stream") and response.headers["x-pilotfish-epoch"] == "1"
        times = []
        for came, data in events(response):
            assert json.loads(data)["choices"][0]["finish_reason"] is None
            times.append(came)
            if len(times) == 100:
                break
        # What has come was written while the rest of the answer was not there yet.
        assert sum(server.running() for server in servers) == 1
    gaps = sorted(1000 * (after - before) for before, after in zip(times[1:], times[2:], strict=False))
    print(f"\nbetween pieces: median {gaps[len(gaps) // 2]:.1f} ms, longest {gaps[-1]:.1f} ms, {sum(gap > 1 for gap in gaps)} of {len(gaps)} over 1 ms")
    assert sum(gap > 1 for gap in gaps) > len(gaps) / 2, gaps
    until("the end of what nobody reads", lambda: sum(server.running() for server in servers) == 0)


def test_a_stream_ends_whole(nginx, idle):
    with nginx.stream({**CHAT, "stream": True}) as response:
        *pieces, done = [data for _, data in events(response)]
    assert done == b"[DONE]" and json.loads(pieces[-1])["guard"]["blocked"] is False


# --- Refusals --------------------------------------------------------------------------------------------------------------------------------


def test_errors_of_the_server_go_through(nginx, idle):
    unknown = nginx.ask("/v1/chat/completions", CHAT, key="sk-nobody")
    assert (unknown.status, unknown.body["error"]["code"], unknown.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    wrong = nginx.chat(temperature=9)
    assert (wrong.status, wrong.body["error"]["param"]) == (400, "temperature")
    forbidden = nginx.chat(messages=BLOCKED, guard={"interventions": {"refusal/refuse": "off"}})
    assert (forbidden.status, forbidden.body["error"]["code"]) == (403, "forbidden")
    assert nginx.ask("/v1/embeddings", {}).body["error"]["code"] == "not_found"


def test_a_body_that_is_too_large_is_told_so(nginx, idle):
    # What nginx lets through the server takes as well: it closes the connection on what is larger, and nginx would take it for dead.
    assert nginx.ask("/v1/chat/completions", b" " * BODY).body["error"]["code"] == "invalid_body"
    answer = nginx.ask("/v1/chat/completions", b" " * (BODY + 1))
    assert (answer.status, answer.body["error"]["code"], answer.headers["content-type"]) == (413, "body_too_large", "application/json")
    assert nginx.chat().status == 200


def test_full_servers_say_when_to_come_again(nginx, servers, idle):
    with contextlib.ExitStack() as stack:
        for _ in range(PARALLEL * len(servers)):
            next(events(stack.enter_context(nginx.stream(LONG))))
        full = nginx.chat()
        assert (full.status, full.body["error"]["code"], full.headers["retry-after"]) == (429, "queue_full", "1")


def test_what_is_inside_stays_inside(nginx, idle):
    for path in ["/", "/metrics", "/health", "/ready", "/openapi.json", "/v1/guards", "/v1/guards/refusal", "/v1/guard/history"]:
        hidden = nginx.ask(path, key=ADMIN, outside=True)
        assert (hidden.status, hidden.body["error"]["code"]) == (404, "not_found"), path
    assert nginx.ask("/v1/models", outside=True).status == 200
    assert nginx.ask("/v1/guard/score", {"input": "Name the capital of France."}, outside=True).status == 200
    assert b"pilotfish_epoch 1" in nginx.ask("/metrics").body
    assert nginx.ask("/health").body["status"] == "ok" and nginx.ask("/ready").status == 200
    assert nginx.ask("/v1/guards").body["epoch"] == 1


def test_no_guard_is_changed_through_it(nginx, idle):
    for outside in [False, True]:
        assert nginx.ask("/v1/guards/refusal", {"enabled": False}, "PATCH", ADMIN, outside).status == 404
    assert nginx.ask("/v1/guards").body["epoch"] == 1


# --- Servers that come and go ----------------------------------------------------------------------------------------------------------------


def test_a_server_is_taken_away_and_no_request_is_lost(folder):
    a, b = Server(folder, "c"), Server(folder, "d", unix=True)
    nginx = Nginx(folder, [a.upstream, b.upstream])
    try:
        with contextlib.ExitStack() as stack:
            streams = [events(stack.enter_context(nginx.stream({**LONG, "max_tokens": 150}))) for _ in range(2)]
            for stream in streams:
                next(stream)
            until("a stream of each", lambda: (a.running(), b.running()) == (1, 1))
            b.child.send_signal(signal.SIGTERM)
            until("the socket's end", lambda: not connects(b))
            # The other takes what comes, and both streams go on to their ends.
            for _ in range(6):
                assert nginx.chat().status == 200
            for stream in streams:
                assert [data for _, data in stream][-1] == b"[DONE]"
        assert b.end() == 0
        for _ in range(6):
            assert nginx.chat().status == 200
        a.end()
        gone = nginx.chat()
        assert (gone.status, gone.body["error"]["code"], gone.headers["retry-after"]) == (503, "unavailable", "1")
        assert gone.headers["content-type"] == "application/json"
    finally:
        for process in (nginx, a, b):
            process.end()


def connects(server):
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(server.socket)) == 0


def test_a_chat_that_was_sent_is_not_sent_again(folder, servers, idle):
    """A server that dies under a request: the request may have run, so it is nobody else's."""
    seen = []

    def die_under_requests(listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    seen.append(connection.recv(1 << 16).split(b" ")[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=die_under_requests, args=[listener], daemon=True).start()
        nginx = Nginx(folder, [f"127.0.0.1:{listener.getsockname()[1]}", servers[1].upstream])
        try:
            found = [nginx.chat().status for _ in range(4)]
            assert found.count(503) == len(seen) == 1 and found.count(200) == 3, (found, seen)
        finally:
            nginx.end()


def test_no_prompt_is_written_to_nginx_disk(folder, nginx, idle):
    """nginx tells in its log of bodies that it buffers in files."""
    long = [{"role": "user", "content": "sea " * 200_000}]
    assert nginx.chat(messages=long).body["error"]["code"] == "context_length_exceeded"
    assert not [line for line in nginx.lines if "buffered to a temporary file" in line]
