"""A scripted child of `baton up`: `python fake_child.py ROLE [flags]`.

A worker does what the environment's FAKE_WORKER says: live (default), die (with words on standard
error), or ignore (it outlives SIGTERM and has a process of its own, too). Some fifty are started:
each imports what its role needs, and no command line.
"""

import os
import signal
import subprocess
import sys
import time

from baton.lifetime import live_with_parent
from worker.ending import end_process


def run_router(flags: list[str]) -> None:
    from concurrent import futures

    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    from protos.baton.v1 import inference_pb2_grpc
    from tests.baton.scripted import ScriptedInference

    port = next(flag.partition("=")[2] for flag in flags if flag.startswith("--grpc-port="))
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    inference = ScriptedInference(knows_workers=os.environ.get("FAKE_WORKER") != "die")
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    checks = health.HealthServicer()
    checks.set("baton.v1.Inference", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    signal.sigwait({signal.SIGTERM})
    print("router got SIGTERM", flush=True)
    server.stop(grace=None).wait()


def run_worker(role: str) -> None:
    behaviour = os.environ.get("FAKE_WORKER", "live")
    print(f"loading weights of {role}", file=sys.stderr, flush=True)
    if behaviour == "die":
        print("error: config.json is missing", file=sys.stderr, flush=True)
        sys.exit(3)
    if behaviour == "ignore":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]):
            time.sleep(600)
    signal.sigwait({signal.SIGTERM})
    print(f"{role} got SIGTERM", flush=True)


if __name__ == "__main__":
    live_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if sys.argv[1] == "router":
        run_router(sys.argv[2:])
    else:
        run_worker(sys.argv[1])
    end_process(0)
