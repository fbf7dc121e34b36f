"""A server to be tested: `pilotfish serve` as a process of its own, with the guards of this repository and keys of each role.

    PILOTFISH=target/release/pilotfish

The model must have been pulled (`pilotfish models pull smollm2-135m-instruct`).
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
PILOTFISH = Path(os.environ.get("PILOTFISH", "target/debug/pilotfish"))
MODEL = "smollm2-135m-instruct"
PATIENCE = 120

USER, TRUSTED, ADMIN = "sk-user", "sk-trusted", "sk-admin"
# Folders in the server's directory of guards, and what they are copies of.
GUARDS = {"harm-gate": "harm-gate-gemma3-to-smollm2", "refusal": "refusal-smollm2"}


class Process:
    """A program whose stderr and stdout are read until it ends."""

    def __init__(self, command, environment=None):
        everything = {**os.environ, **(environment or {})}
        self.child = subprocess.Popen(
            command,
            env=everything,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.child.stdout:
            self.lines.append(line)

    def until(self, what, found):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (value := found()) is not None:
                return value
            if self.child.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"{what} does not come:\n" + "".join(self.lines))

    def end(self):
        self.child.send_signal(signal.SIGTERM)
        try:
            return self.child.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)
            return self.child.wait()


def keys_file(path):
    roles = {USER: "user", TRUSTED: "trusted", ADMIN: "admin"}
    entries = [
        f'[[key]]\nname = "{role}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\nrole = "{role}"\n'
        for key, role in roles.items()
    ]
    path.write_text("".join(entries))


@contextlib.contextmanager
def serving(folder, *arguments, **limits):
    """A server that keeps guards and keys in `folder`. It has to end well."""
    for name, guard in GUARDS.items():
        shutil.copytree(ROOT / "guards" / guard, folder / "guards" / name)
    keys_file(folder / "keys.toml")
    command = [ROOT / PILOTFISH, "serve", "--model", MODEL, "--guards", folder / "guards", "--keys", folder / "keys.toml"]
    environment = {f"PILOTFISH_SERVE__LIMITS__{name.upper()}": str(value) for name, value in limits.items()}
    process = Process([str(part) for part in [*command, "--listen", "127.0.0.1:0", *arguments]], environment)

    def address():
        line = next((line for line in list(process.lines) if line.startswith("listening on http://")), None)
        return line and line.removeprefix("listening on http://").split()[0]

    address = process.until("the server", address)
    try:
        yield SimpleNamespace(address=address, base=f"http://{address}", url=f"http://{address}/v1", guards=folder / "guards")
    finally:
        ended = process.end()
    assert ended == 0, "".join(process.lines)
