"""`baton up` and `baton demo` with scripted children: `python fake_up.py up [flags of baton up]`.

Children are this file again: `python fake_up.py --child ROLE [flags]`. A worker does what the
environment's FAKE_WORKER says: live (default), die (with words on standard error), or ignore
(it outlives SIGTERM and has a process of its own, too).
"""

import os
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import baton.up
from baton.cli import main
from baton.config import flags_for
from baton.lifetime import live_with_parent
from protos.baton.v1 import inference_pb2_grpc
from tests.baton.scripted import ScriptedInference
from worker.ending import end_process


def scripted_command(command: str, config: object) -> list[str]:
    return [sys.executable, str(Path(__file__)), "--child", command, *flags_for(config)]


def run_router(flags: list[str]) -> None:
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
    if sys.argv[1] == "--child":
        live_with_parent()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if sys.argv[2] == "router":
            run_router(sys.argv[3:])
        else:
            run_worker(sys.argv[2])
        end_process(0)
    baton.up.child_command = scripted_command
    end_process(main(sys.argv[1:]))
