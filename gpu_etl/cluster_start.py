"""Where the tasks of a cluster run: processes of this machine, or the workers of a Dask scheduler; TLS for both."""

import asyncio
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import yaml
from dask.distributed import Client, LocalCluster, Security
from distributed.comm import core as comm_core

from gpu_etl.errors import DataError
from gpu_etl.settings import Settings

START_SECONDS = 30.0
LOOPBACK = "127.0.0.1"
TLS = "distributed.comm.tls"
ROLES = ("client", "scheduler", "worker")
PLACES = ("ca-file", *(f"{role}.{kind}" for role in ROLES for kind in ("cert", "key")))
SECURITY_WORDS = "CA,CERT,KEY (files in PEM format), or a YAML file with Dask's settings below distributed.comm.tls"


def _tls_files(text: str) -> dict[str, str]:
    """The files that --security names, by their place below distributed.comm.tls: one of PLACES."""
    if "," not in text:
        return _of_yaml(text)
    names = text.split(",")
    if len(names) != 3 or not all(names):
        raise DataError(f"--security {text}: expected {SECURITY_WORDS}")
    return {place: names[("ca-file", "cert", "key").index(place.rpartition(".")[2])] for place in PLACES}


def _of_yaml(text: str) -> dict[str, str]:
    try:
        values = yaml.safe_load(Path(text).read_bytes())
    except OSError as error:
        raise DataError(f"--security {text}: {error.strerror}; expected {SECURITY_WORDS}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise DataError(f"--security {text}: not YAML ({line}); expected {SECURITY_WORDS}") from error
    found = {}
    for place in PLACES:
        try:
            value = dask.config.get(f"{TLS}.{place}", default=None, config=values)
        except (TypeError, AttributeError):  # a list or a number where Dask looks for a key
            value = None
        if value is not None and not isinstance(value, str):
            raise DataError(f"--security {text}: {TLS}.{place}: expected the name of a file, got {value!r:.80}")
        found |= {place: value} if value else {}
    for place in ("ca-file", "client.cert"):
        if place not in found:
            raise DataError(f"--security {text}: {TLS}.{place} is missing; expected {SECURITY_WORDS}")
    return found


def security_of(text: str) -> Security:
    """Dask's TLS settings out of --security. Raises DataError where a file of them cannot be used."""
    files = _tls_files(text)
    for place, name in files.items():
        try:
            content = Path(name).read_bytes()
        except OSError as error:
            raise DataError(f"--security {text}: {place}: {name}: {error.strerror}") from error
        if b"ENCRYPTED PRIVATE KEY" in content or b"Proc-Type: 4,ENCRYPTED" in content:  # OpenSSL would ask for it
            raise DataError(f"--security {text}: {place}: {name}: the key has a pass phrase; expected one without")
    named = {f"tls_{place.replace('.', '_').replace('-', '_')}": name for place, name in files.items()}
    security = Security(require_encryption=True, **named)
    try:
        security.get_connection_args("client")["ssl_context"]
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise DataError(
            f"--security {text}: expected a CA file, and a certificate with the key that belongs to it, in PEM format: "
            f"{error}"
        ) from error
    return security


def connect(settings: Settings) -> tuple[Client, LocalCluster | None]:
    """A client of the scheduler that was asked for, or of one made for processes of this machine, returned with it.

    Raises DataError where no scheduler answers, or TLS does not come about.
    """
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is said here, in fewer words
    security = security_of(settings.security) if settings.security else None
    if settings.scheduler:
        return _client(settings, security), None
    local = _local_cluster(settings, security)
    try:
        client = Client(local, timeout=START_SECONDS)
    except OSError as error:
        local.close()
        raise DataError(f"--workers {settings.workers}: their Dask scheduler does not answer ({error})") from error
    print(f"Dask dashboard: {client.dashboard_link}", file=sys.stderr)
    return client, local


def _client(settings: Settings, security: Security | None) -> Client:
    address, seconds = settings.scheduler, min(START_SECONDS, settings.worker_timeout)
    if security is not None and not address.startswith("tls://"):
        raise DataError(f"--scheduler {address} with --security: expected an address that begins with tls://")
    try:
        with ThreadPoolExecutor(1) as thread:  # this one may be that of a loop already, as in a notebook
            thread.submit(asyncio.run, _reach(address, security or Security(), seconds)).result()
        client = Client(address, timeout=seconds, security=security)
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # addresses and TLS settings that Dask refuses
        raise DataError(_refused(address, security, seconds, error)) from error
    print(f"Dask dashboard: {client.dashboard_link}", file=sys.stderr)
    return client


async def _reach(address: str, security: Security, seconds: float) -> None:
    """Shake hands with a scheduler. Raises an error where it does not do so in time: a Client waits without end for one
    that is stopped, or for another server that takes the connection and says nothing."""
    arguments = security.get_connection_args("client")
    comm = await asyncio.wait_for(comm_core.connect(address, timeout=seconds, **arguments), seconds + 1)
    comm.abort()


def _refused(address: str, security: Security | None, seconds: float, error: BaseException) -> str:
    """Words for a scheduler that there is no connection to."""
    reasons, cause = [], error
    while cause is not None and len(reasons) < 4:
        reasons += [" ".join(str(cause).split())]
        cause = cause.__cause__
    if security is not None:
        advice = "is it there, does it speak TLS, and are its certificate and that of --security both of the CA named?"
    elif address.startswith("tls://"):
        advice = "TLS needs --security CA,CERT,KEY, or the like in Dask's own configuration"
    else:
        advice = "start `dask scheduler` there; of one that speaks TLS, the address begins with tls://, with --security"
    words = "; ".join(dict.fromkeys(filter(None, reasons))) or type(error).__name__
    return f"--scheduler {address}: no Dask scheduler answers there within {seconds:g} s ({words}); {advice}"


def _local_cluster(settings: Settings, security: Security | None) -> LocalCluster:
    """Processes of this machine, reached through the loopback device; with --device cuda one a GPU."""
    asked = {
        "n_workers": settings.workers, "host": LOOPBACK, "silence_logs": logging.CRITICAL, "security": security,
        "dashboard_address": settings.dashboard_address or f"{LOOPBACK}:0",
    }  # fmt: skip
    if settings.device == "cuda":
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError as error:
            raise DataError(f"--workers with --device cuda: {error}; pip install dask-cuda") from error
        from numba import cuda

        if settings.workers > len(cuda.gpus):
            raise DataError(
                f"--workers {settings.workers} with --device cuda: each takes a GPU, and {len(cuda.gpus)} are visible "
                "(nvidia-smi, CUDA_VISIBLE_DEVICES); ask for fewer"
            )
        return LocalCUDACluster(**asked)
    return LocalCluster(threads_per_worker=1, **asked)
