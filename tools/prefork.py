"""A server that forks its workers in advance, under load for a minute: every answer has to be right.

python tools/prefork.py --seconds 60

gunicorn loads the application, which calls favor_np once, and then forks its workers.  Clients send
lengths; the answer is the digest of attention over that many tokens, which is compared with the one
computed here.
"""

import argparse
import hashlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import favor_np

LENGTHS = 1, 64, 500, 3000
FEATURES = favor_np.feature_map("positive", dim=32, num_features=64)


def digest(length):
    """SHA-256 of attention over that many tokens, of its gradients, and of a step."""
    q, k, v = np.random.default_rng(length).standard_normal((3, 2, length, 32), np.float32)
    out, pullback = favor_np.favor_attention_vjp(q, k, v, FEATURES, causal=True)
    state = favor_np.AttentionState.zeros(FEATURES, value_dim=32, batch_shape=2)
    state.update(k, v)
    arrays = out, pullback(v).k, state.step(q[:, 0], k[:, 0], v[:, 0])
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()


def application(environ, respond):
    """Answer /LENGTH with the worker's number and the digest (WSGI)."""
    body = f"{os.getpid()} {digest(int(environ['PATH_INFO'][1:]))}".encode()
    respond("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def client(port, stop, expected, seen, failures):
    """Ask until it is time to stop; note who answered, and what went wrong."""
    number = 0
    while time.monotonic() < stop:
        length, number = LENGTHS[number % len(LENGTHS)], number + 1
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", f"/{length}")
            worker, answer = connection.getresponse().read().decode().split()
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{length}: {error!r}")
            continue
        finally:
            connection.close()  # the next one may go to another worker
        seen.append(worker)
        if answer != expected[length]:
            failures.append(f"{length}: another result")


def wait_for(port, server):
    """Wait until the server listens."""
    for _ in range(600):
        if server.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the server did not start")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    expected = {length: digest(length) for length in LENGTHS}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--preload", f"--workers={args.workers}", f"--bind=127.0.0.1:{port}"
    quiet = "--log-level=warning", "--worker-class=gthread", "--threads=2"
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *options, *quiet, "prefork:ready()"],
        cwd=Path(__file__).parent,
    )
    try:
        wait_for(port, server)
        seen, failures, stop = [], [], time.monotonic() + args.seconds
        common = port, stop, expected, seen, failures
        clients = [threading.Thread(target=client, args=common) for _ in range(args.clients)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    workers = len(set(seen))
    print(f"{len(seen):,} answers of {workers} workers, {len(failures)} failures, exit {status}")
    if failures or workers < args.workers or status:
        raise SystemExit("\n".join(["not all was well", *failures[:10]]))


def ready():
    """Call once before the workers are forked, as docs/services.md says."""
    digest(300)
    return application


if __name__ == "__main__":
    main()
