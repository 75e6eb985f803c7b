"""A scripted Inference servicer: a router without workers, for the client library and `up`."""

import threading
import time
from collections.abc import Iterator

import grpc

from protos.baton.v1 import inference_pb2 as pb

SLOW_STEP_S = 0.02


class ScriptedInference:
    """Echoes a prompt's token ids; the prompt's text or the request id chooses other behaviour.

    fail:STATUS   refuses with that gRPC status and a hint to come back after 1.5 s
    hang          sends one token, then nothing
    endless       sends tokens until the call ends
    """

    def __init__(self, *, knows_workers: bool = True) -> None:
        self._knows_workers = knows_workers
        self.ended = threading.Event()
        self.requests: list[pb.GenerateRequest] = []
        self.aborted: list[str] = []

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        context.add_callback(self.ended.set)
        if request.text.startswith("fail:"):
            context.set_trailing_metadata((("retry-after", "1.5"),))
            context.abort(grpc.StatusCode[request.text[5:]], "as the script says")
        request_id = request.request_id or "drawn-by-router"
        if request.text in ("hang", "endless"):
            yield self._chunk(request_id, 0, 65)
            index = 1
            while context.is_active():
                time.sleep(SLOW_STEP_S)
                if request.text == "endless":
                    yield self._chunk(request_id, index, 65)
                index += 1
            return
        ids = list(request.token_ids.ids) or [ord(letter) for letter in request.text]
        for index, token_id in enumerate(ids):
            yield self._chunk(request_id, index, token_id)
        yield pb.GenerateResponse(
            request_id=request_id,
            finish_reason=pb.FINISH_REASON_LENGTH,
            usage=pb.Usage(prompt_tokens=len(ids), completion_tokens=len(ids)),
            report=pb.Report(
                transport="grpc",
                kv_bytes=4096,
                phases=pb.Phases(ttft_ms=3.0, prefill_ms=2.0, network_ms=1.0),
                prefill_worker="prefill-a",
                decode_worker="decode-b",
                seed=7,
            ),
        )

    @staticmethod
    def _chunk(request_id: str, index: int, token_id: int) -> pb.GenerateResponse:
        token = pb.Token(index=index, id=token_id, logprob=-0.5)
        return pb.GenerateResponse(request_id=request_id, tokens=[token], text=chr(token_id))

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        self.aborted.append(request.request_id)
        return pb.AbortResponse(found=request.request_id == "live")

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        card = pb.ModelCard(id="echo", created=1, context_length=4096, vocab_size=256)
        return pb.ListModelsResponse(models=[card])

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        workers = [
            self._worker("prefill-a", pb.WORKER_ROLE_PREFILL, ["nixl", "grpc"]),
            self._worker("decode-b", pb.WORKER_ROLE_DECODE, ["grpc"]),
        ]
        if not self._knows_workers:
            workers.clear()
        return pb.GetServerInfoResponse(version="0.1.0", protocol_version=1, workers=workers)

    @staticmethod
    def _worker(name: str, role: pb.WorkerRole, transports: list[str]) -> pb.WorkerInfo:
        return pb.WorkerInfo(
            id=name,
            role=role,
            address="127.0.0.1:1",
            pid=10,
            engine_pids=[11],
            state=pb.WORKER_STATE_READY,
            transports=transports,
            pages=pb.PageCounts(free=5, cached=3, held=0, in_use=0, total=8),
        )
