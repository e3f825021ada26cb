"""Who can reach a cluster: the addresses that a local one listens at, and TLS with a scheduler of its own."""

import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

pytest.importorskip("dask.distributed")

from gpu_etl import cluster_start
from gpu_etl.__main__ import main
from gpu_etl.cluster import Cluster
from gpu_etl.errors import DataError
from gpu_etl.settings import Settings
from tests.gpu_etl.dask_processes import Processes
from tests.gpu_etl.test_cluster import environment  # noqa: F401 - what Dask puts there must not stay
from tests.gpu_etl.test_cluster_failures import digests, encode, expected, last_line, two_days  # noqa: F401

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl, which makes the certificates")


def listening() -> dict[str, set[int]]:
    """Addresses at which this process and those below it listen, with the processes that do."""
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault(connection.laddr.ip, set()).add(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("address", "expected_at"), [("", {"127.0.0.1"}), (":0", {"127.0.0.1", "0.0.0.0"})])
def test_a_local_cluster_listens_at_loopback_unless_asked(two_days, tmp_path, monkeypatch, address, expected_at):  # noqa: F811
    count, before, seen = Cluster.count, set(listening()), []
    monkeypatch.setattr(Cluster, "count", lambda self: seen.append(listening()) or count(self))
    words = [*two_days, "--out", str(tmp_path / "set"), "--workers", "2", "--threads", "1"]
    assert main(["encode", *words, "--dashboard-address", address]) == 0
    assert before <= {"127.0.0.1"} and set(seen[0]) == expected_at
    assert len(seen[0]["127.0.0.1"]) == 3  # this one, with scheduler and nannies, and two workers


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Two authorities' CA files, and a certificate with its key that each has signed."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"
    for name in ("ours", "theirs"):
        openssl("req", "-x509", *new, "-keyout", f"{name}_ca.key", "-out", f"{name}_ca.pem", "-subj", f"/CN={name}")
        openssl("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=dask")
        signed = "-CA", f"{name}_ca.pem", "-CAkey", f"{name}_ca.key", "-CAcreateserial"
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    openssl("ec", "-in", "ours.key", "-aes128", "-passout", "pass:secret", "-out", "locked.key")
    return folder


def named(folder: Path, ca: str, cert: str, key: str) -> str:
    return ",".join(str(folder / name) for name in (ca, cert, key))


@pytest.mark.slow
@needs_openssl
def test_tls(two_days, expected, certificates, tmp_path, monkeypatch, capfd):  # noqa: F811
    ours = named(certificates, "ours_ca.pem", "ours.pem", "ours.key")
    theirs = named(certificates, "theirs_ca.pem", "theirs.pem", "theirs.key")
    mixed = named(certificates, "ours_ca.pem", "theirs.pem", "theirs.key")
    ca, cert, key = ours.split(",")
    config = tmp_path / "dask.yaml"
    config.write_text(f"distributed: {{comm: {{tls: {{ca-file: {ca}, client: {{cert: {cert}, key: {key}}}}}}}}}\n")
    monkeypatch.setattr(cluster_start, "START_SECONDS", 2.0)
    with Processes(tls=("--tls-ca-file", ca, "--tls-cert", cert, "--tls-key", key)) as processes:
        assert processes.address.startswith("tls://")
        plain = processes.address.replace("tls://", "tcp://")
        wrong = [(processes.address, theirs, "CERTIFICATE_VERIFY_FAILED"), (processes.address, mixed, "both of the CA"),
                 (processes.address, "", "TLS needs --security"), (plain, "", "begins with tls://")]  # fmt: skip
        for address, security, words in wrong:
            assert encode(two_days, tmp_path / "set", address, "--security", security) == 1
            said = last_line(capfd)
            assert f"--scheduler {address}: no Dask scheduler answers there" in said and words in said
            assert not (tmp_path / "set").exists()
        processes.start_workers(1, security=cluster_start.security_of(ours))
        for security, out in ((ours, "named"), (str(config), "yaml")):
            assert encode(two_days, tmp_path / out, processes.address, "--security", security) == 0
            assert digests(tmp_path / out) == expected


@needs_openssl
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("ours_ca.pem", "ours.pem", "none.key"), "client.key: .*none.key: No such file"),
        (("ours_ca.pem", "ours.pem", "theirs.key"), "the key that belongs to it"),
        (("ours_ca.pem", "ours.pem", "locked.key"), "the key has a pass phrase"),
        (("ours.key", "ours.pem", "ours.key"), "expected a CA file"),
        (("ours_ca.pem", "ours.csr", "ours.key"), "expected a CA file"),
    ],
)
def test_tls_files_that_cannot_be(certificates, names, words):
    with pytest.raises(DataError, match=words):
        cluster_start.security_of(named(certificates, *names))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2", "not YAML"),
        ("\x00", "not YAML"),
        ("- a list\n", "distributed.comm.tls.ca-file is missing"),
        ("3\n", "distributed.comm.tls.ca-file is missing"),
        ("", "distributed.comm.tls.ca-file is missing"),
        ("distributed: {comm: {tls: {ca-file: 7}}}\n", "expected the name of a file, got 7"),
        ("distributed: {comm: {tls: {ca-file: x, client: [1]}}}\n", "distributed.comm.tls.client.cert is missing"),
        ("distributed: {comm: {tls: {ca-file: x, client: {cert: y}}}}\n", "ca-file: x: No such file"),
    ],
)
def test_security_files_that_cannot_be(tmp_path, text, words):
    (tmp_path / "dask.yaml").write_text(text)
    with pytest.raises(DataError, match=words):
        cluster_start.security_of(str(tmp_path / "dask.yaml"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"security": "a,b,c"}, "goes with --scheduler or --workers"),
        ({"workers": 1, "worker_timeout": 0.0}, "--worker-timeout: expected"),
        ({"workers": 1, "worker_timeout": float("nan")}, "--worker-timeout: expected"),
        ({"scheduler": "tcp://h:1", "dashboard_address": ":1"}, "goes with --workers"),
    ],
)
def test_flags_that_do_not_go_together(settings, words):
    with pytest.raises(DataError, match=words):
        Settings(**settings).check(2)
