"""Generates the Python code of protos/baton/v1/*.proto, in place.

Run it after every change of a .proto; a test compares the result with what is committed.
Usage: python tools/generate_protos.py [output directory]
"""

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SERVICES = {"inference.proto", "worker.proto", "kv.proto"}


def generate(output: Path) -> None:
    """Writes *_pb2.py, *_pb2.pyi and, for services, *_pb2_grpc.py below `output`."""
    include = str(resources.files("grpc_tools") / "_proto")
    for proto in sorted((ROOT / "protos" / "baton" / "v1").glob("*.proto")):
        arguments = [
            "protoc",
            f"-I{ROOT}",
            f"-I{include}",
            f"--python_out={output}",
            f"--pyi_out={output}",
        ]
        if proto.name in SERVICES:
            arguments.append(f"--grpc_python_out={output}")
        status = protoc.main([*arguments, str(proto)])
        if status != 0:
            raise SystemExit(f"protoc failed on {proto.name} with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
